"""A small SR-UNet, 0.96 M parameters, with a linear head for the simulated streets."""

model = dict(
    type="DefaultSegmentor",
    backbone=dict(
        type="kd.ResidualUNet",
        in_channels=1,
        num_classes=19,
        base_channels=16,
        channels=(16, 32, 48, 64, 64, 48, 32, 32),
        layers=(1,) * 8,
        bn_momentum=0.02,
    ),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
