"""Pipelines of the LiDAR-camera pair, 20 cm voxels.

`views_train` is the student's, `two_views_train` adds the teacher's view of the same scan: past scans too, an
augmentation of its own, matched point by point. Augmentation never touches where images show a point. `sweeps_train` is
LiDAR alone.
"""

# Two underscores keep a name out of the config.
__cells = dict(type="kd.VoxelSample", voxel_size=0.2, coordinates="cartesian")
__rows = dict(type="kd.ViewsToRows")
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
