"""The tiny PTv3 and the tiny PolarNet: a teacher of points and a student of pillars."""

_base_ = ["ptv3_pair_tiny.py"]

student_model = dict(
    _delete_=True,
    type="kd.VoxelSegmentor",
    void_class=False,
    vote_labelled=True,
    backbone=dict(
        type="kd.PolarNet",
        in_channels=4,
        num_classes=19,
        partition=dict(
            low=(0.0, -3.141592653589793, -3.0),
            high=(50.0, 3.141592653589793, 3.0),
            shape=(128, 128, 24),
            spacing="n",
        ),
        point_channels=(16, 32, 64, 64),
        compressed=16,
        base=16,
        drop_block=dict(size=5, probability=0.0),
    ),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
