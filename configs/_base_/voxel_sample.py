"""Pipelines of image-to-LiDAR pre-training's downstream tasks: cylindrical cells of 0.1 m, 1 degree and 0.1 m.

One point, the first, stands for a cell, its intensity is the only feature, its label that of the cell; evaluation is at
raw points. Augmentation: any turn about the vertical, x and y flipped with one half each.
"""

__cells = dict(type="kd.VoxelSample", voxel_size=0.1, degrees=1.0, coordinates="cylindrical")

voxels_train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
    dict(type="RandomFlip", p=0.5),
    __cells,
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("strength",)),
]
voxels_evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(return_inverse=True, **__cells),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
        feat_keys=("strength",),
    ),
]
