"""Pipelines without a voxel grid, for networks that cut cells themselves: every point is trained on and evaluated.

Augmentation of the 3D-to-bird's-eye-view distillation (arXiv:2304.11393): any turn about the vertical, x and y flipped
with one half each. One augmented scan feeds both networks.
"""

points_train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
    dict(type="RandomFlip", p=0.5),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "segment"), feat_keys=("coord", "strength")),
]
points_evaluate = [
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "segment", "name"), feat_keys=("coord", "strength")),
]
