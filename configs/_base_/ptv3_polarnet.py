"""PTv3 of 46.2 M parameters and PolarNet of 13.6 M: a teacher of points and a student of pillars."""

_base_ = ["ptv3_pair.py"]

student_model = dict(
    _delete_=True,
    type="kd.VoxelSegmentor",
    void_class=False,
    backbone=dict(
        type="kd.PolarNet",
        in_channels=4,
        num_classes=19,
        partition=dict(
            low=(0.0, -3.141592653589793, -4.0),
            high=(50.0, 3.141592653589793, 2.0),
            shape=(480, 352, 32),
            spacing="n",
        ),
    ),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
