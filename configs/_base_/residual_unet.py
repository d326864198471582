"""SR-UNet34 with a linear head, 37.8 M parameters, as image-to-LiDAR pre-training hands it over (arXiv:2203.16258).

BatchNorm's momentum is that of its fine-tuning, 0.02, and 0.1 in residual blocks.
"""

model = dict(
    type="DefaultSegmentor",
    backbone=dict(type="kd.ResidualUNet", in_channels=1, num_classes=16, bn_momentum=0.02),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
