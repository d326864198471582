"""SphereFormer teacher of LiDAR alone, LiDAR-camera student: doi:10.1109/TPAMI.2024.3451658, 16 classes.

`star_terms` are the published weights for a student of width 1, `b_terms` those of width 2.
"""

teacher_model = dict(
    type="DefaultSegmentor",
    backbone=dict(type="kd.PointVoxelUNet", in_channels=4, num_classes=16, width=2.0),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
student_model = dict(
    type="kd.FusionNet",
    lidar=dict(type="kd.PointVoxelUNet", in_channels=4, num_classes=16, width=1.0),
    camera=dict(
        type="kd.SwiftNet",
        num_classes=16,
        weight="data/weights/resnet18-f37072fd.pth",
        kind="imagenet",
    ),
)
wide_student_model = dict(
    type="kd.FusionNet",
    lidar=dict(type="kd.PointVoxelUNet", in_channels=4, num_classes=16, width=2.0),
    camera=student_model["camera"],
)
lidar_student_model = dict(type="kd.FusionNet", lidar=student_model["lidar"], image=False)
teacher_taps = dict(bottleneck="backbone.bottleneck")
student_taps = dict(bottleneck="bottleneck")
star_terms = dict(
    logits=dict(type="kd.LogitKL", temperature=1.0, weight=1.0),
    bottleneck=dict(type="kd.AdaptedFeature", tap="bottleneck", channels=(256, 512), weight=1.0),
)
b_terms = dict(
    logits=dict(type="kd.LogitKL", temperature=1.0, weight=2.0),
    bottleneck=dict(type="kd.AdaptedFeature", tap="bottleneck", channels=(512, 512), weight=2.0),
)
