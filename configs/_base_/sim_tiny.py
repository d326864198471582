"""Simulated streets seen by 32 beams and 512 columns, 20 cm voxels: small enough for two CPU cores."""

_base_ = ["sim.py"]

# Two underscores keep a name out of the config.
__train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
    dict(type="RandomScale", scale=[0.9, 1.1]),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
    dict(type="GridSample", grid_size=0.2, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
__evaluate = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(
        type="GridSample",
        grid_size=0.2,
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

data = dict(
    train=dict(transform=__train),
    val=dict(transform=__evaluate),
    test=dict(transform=__evaluate),
)
