"""nuScenes, 16 classes, 5 cm voxels: key frames alone, every point is trained on and evaluated.

Augmentation is that of Pointcept's PTv3 recipe for it; train on the 700 scenes of train, validate on the 150 of val.
"""

# Two underscores keep a name out of the config.
__train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
    dict(type="RandomScale", scale=[0.9, 1.1]),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
    dict(type="GridSample", grid_size=0.05, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
__evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(
        type="GridSample",
        grid_size=0.05,
        mode="train",
        return_grid_coord=True,
        return_inverse=True,
    ),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
        feat_keys=("coord", "strength"),
    ),
]
__scans = dict(
    type="NuScenesDataset",
    data_root="data/nuscenes",
    sweeps=10,
    ignore_index=-1,
    test_mode=False,
)

data = dict(
    num_classes=16,
    ignore_index=-1,
    names=[
        "barrier",
        "bicycle",
        "bus",
        "car",
        "construction_vehicle",
        "motorcycle",
        "pedestrian",
        "traffic_cone",
        "trailer",
        "truck",
        "driveable_surface",
        "other_flat",
        "sidewalk",
        "terrain",
        "manmade",
        "vegetation",
    ],
    train=dict(split="train", transform=__train, **__scans),
    val=dict(split="val", transform=__evaluate, **__scans),
    test=dict(split="val", transform=__evaluate, **__scans),
)
