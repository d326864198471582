"""The pair of `cylinder3d_polarnet.py` at a size that two CPU cores train in minutes: a coarse grid, narrow networks.

Cells that fit the number of columns of the simulated sensor, in numbers that halve four times; labelled points alone
vote on a cell's label, since the student has one label in a hundred.
"""

_base_ = ["cylinder3d_polarnet.py"]

__partition = dict(
    low=(0.0, -3.141592653589793, -3.0),
    high=(50.0, 3.141592653589793, 3.0),
    shape=(128, 128, 24),
    spacing="n",
)
teacher_model = dict(
    vote_labelled=True,
    backbone=dict(partition=__partition, voxel_channels=16, width=12, point_channels=(16, 32, 64)),
)
student_model = dict(
    vote_labelled=True,
    backbone=dict(
        partition=__partition,
        point_channels=(16, 32, 64, 64),
        compressed=16,
        base=16,
        drop_block=dict(size=5, probability=0.0),
    ),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=0),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=0),
    ],
)

__channels = dict(
    enc2=dict(channels=(32, 24)),
    enc8=dict(channels=(128, 96)),
    dec8=dict(channels=(64, 192)),
    dec2=dict(channels=(16, 48)),
    labels=dict(channels=(16, 24), frequencies="running", num_classes=19, vote_labelled=True),
)
bev_terms = __channels
bev_paper_terms = __channels
