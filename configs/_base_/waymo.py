"""Waymo Open Dataset, 22 classes, 5 cm voxels, coordinates clamped to 75.2 m around and -4 to 2 m in height.

Augmentation is that of Pointcept's PTv3 recipe for Waymo. `python tools/prepare_data.py waymo` makes the folders.
"""

# Two underscores keep a name out of the config.
__clip = dict(type="PointClip", point_cloud_range=(-75.2, -75.2, -4, 75.2, 75.2, 2))
__train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
    __clip,
    dict(type="RandomScale", scale=[0.9, 1.1]),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
    dict(type="GridSample", grid_size=0.05, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
__evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    __clip,
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
__frames = dict(
    type="WaymoDataset",
    data_root="data/waymo",
    ignore_index=-1,
    test_mode=False,
)

data = dict(
    num_classes=22,
    ignore_index=-1,
    names=[
        "Car",
        "Truck",
        "Bus",
        "Other Vehicle",
        "Motorcyclist",
        "Bicyclist",
        "Pedestrian",
        "Sign",
        "Traffic Light",
        "Pole",
        "Construction Cone",
        "Bicycle",
        "Motorcycle",
        "Building",
        "Vegetation",
        "Tree Trunk",
        "Curb",
        "Road",
        "Lane Marker",
        "Other Ground",
        "Walkable",
        "Sidewalk",
    ],
    train=dict(split="training", transform=__train, **__frames),
    val=dict(split="validation", transform=__evaluate, **__frames),
    test=dict(split="validation", transform=__evaluate, **__frames),
)
