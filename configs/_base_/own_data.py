"""Scans of your own as folders of .npy; docs/own_data.md goes through it. Edit the four lines at the top.

data/own/train/NAME/{coord,strength,segment}.npy, the same below data/own/val.
"""

_base_ = ["ptv3_pair_tiny.py"]  # ptv3_pair.py: the full size, for a GPU

# Two underscores keep a name out of the config.
__root = "data/own"
__names = ["ground", "structure", "vegetation", "object"]  # class 0, 1, 2, ...
__grid_size = 0.2  # metres; 0.05 with the full size

__features = ("coord", "strength")  # ("coord",) without strength, and in_channels=3 below
__train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
    dict(type="RandomScale", scale=[0.9, 1.1]),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
    dict(type="GridSample", grid_size=__grid_size, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=__features),
]
__evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(
        type="GridSample",
        grid_size=__grid_size,
        mode="train",
        return_grid_coord=True,
        return_inverse=True,
    ),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
        feat_keys=__features,
    ),
]
__scans = dict(type="DefaultDataset", data_root=__root, ignore_index=-1, test_mode=False)

data = dict(
    num_classes=len(__names),
    ignore_index=-1,
    names=__names,
    train=dict(split=["train"], transform=__train, **__scans),
    val=dict(split=["val"], transform=__evaluate, **__scans),
    test=dict(split=["val"], transform=__evaluate, **__scans),
)
teacher_model = dict(num_classes=len(__names), backbone=dict(in_channels=4))
student_model = dict(num_classes=len(__names), backbone=dict(in_channels=4))
