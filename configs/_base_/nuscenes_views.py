"""nuScenes key frames with what their six cameras see, 5 cm voxels, images of 360 x 640.

`views_train` is the student's pipeline, `two_views_train` adds the teacher's view of the same scan: past scans too, an
augmentation of its own, matched point by point. Augmentation never touches where images show a point.
"""

# Two underscores keep a name out of the config.
__cells = dict(type="kd.VoxelSample", voxel_size=0.05, coordinates="cartesian")
__size = (360, 640)
__rows = dict(type="kd.ViewsToRows", image_size=__size)
__turn = dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1)
__scale = dict(type="RandomScale", scale=[0.95, 1.05])
__keys = ("coord", "grid_coord", "segment", "images", "view_point", "view_image", "view_uv")
__offsets = dict(offset="coord", view_offset="view_point", image_offset="images")
views_train = [
    __turn,
    __scale,
    __cells,
    __rows,
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=__keys,
        feat_keys=("coord", "strength"),
        offset_keys_dict=__offsets,
    ),
]
two_views_train = [
    dict(
        type="kd.TwoViews",
        student=[__turn, __scale],
        teacher=[__turn, __scale, dict(type="RandomFlip", p=0.5)],
        student_voxel=__cells,
    ),
    __rows,
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=(*__keys, "match", "teacher_coord", "teacher_grid_coord"),
        feat_keys=("coord", "strength"),
        teacher_feat_keys=("teacher_coord", "teacher_strength"),
        offset_keys_dict=dict(teacher_offset="teacher_coord", **__offsets),
    ),
]
views_evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(return_inverse=True, **__cells),
    __rows,
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=(*__keys, "origin_segment", "inverse", "name"),
        feat_keys=("coord", "strength"),
        offset_keys_dict=__offsets,
    ),
]
# LiDAR alone, merged with past scans: how the teacher is trained.
sweeps_train = [
    __turn,
    __scale,
    dict(type="RandomFlip", p=0.5),
    __cells,
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
sweeps_evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(return_inverse=True, **__cells),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
        feat_keys=("coord", "strength"),
    ),
]
__scans = dict(type="kd.NuScenesDataset", data_root="data/nuscenes", sweeps=10, ignore_index=-1)
__views = dict(type="kd.CameraViewDataset", image_size=__size)
sweeps_data = dict(
    train=dict(split="train", aggregate_sweeps=4, transform=sweeps_train, **__scans),
    val=dict(split="val", aggregate_sweeps=4, transform=sweeps_evaluate, **__scans),
    test=dict(split="val", aggregate_sweeps=4, transform=sweeps_evaluate, **__scans),
)
two_views_source = dict(split="train", aggregate_sweeps=4, **__scans)

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
    # Three of the six cameras, drawn anew for every sample; all of them in evaluation.
    train=dict(source=dict(split="train", **__scans), keep=3, transform=views_train, **__views),
    val=dict(source=dict(split="val", **__scans), keep=None, transform=views_evaluate, **__views),
    test=dict(source=dict(split="val", **__scans), keep=None, transform=views_evaluate, **__views),
)
