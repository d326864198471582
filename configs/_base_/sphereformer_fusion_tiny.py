"""The pair of `sphereformer_fusion.py` for two CPU cores and minutes; the teacher is twice as wide."""

__net = dict(
    type="kd.PointVoxelUNet",
    in_channels=4,
    num_classes=16,
    depth=1,
    voxel_size=0.2,
    drop_path=0.1,
)
__lidar = dict(channels=(16, 32, 32, 48, 64, 48, 32, 32, 32), **__net)
teacher_model = dict(
    type="DefaultSegmentor",
    backbone=dict(channels=(32, 64, 64, 96, 128, 96, 64, 64, 64), **__net),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
    ],
)
student_model = dict(
    type="kd.FusionNet",
    lidar=__lidar,
    camera=dict(
        type="kd.SwiftNet",
        num_classes=16,
        trunk=dict(depths=(1, 1, 1, 1), width=16, bottleneck=False),
        width=32,
        allow_random=True,
    ),
)
lidar_student_model = dict(type="kd.FusionNet", lidar=__lidar, image=False)
teacher_taps = dict(bottleneck="backbone.bottleneck")
student_taps = dict(bottleneck="bottleneck")
star_terms = dict(
    logits=dict(type="kd.LogitKL", temperature=1.0, weight=1.0),
    bottleneck=dict(type="kd.AdaptedFeature", tap="bottleneck", channels=(64, 128), weight=1.0),
)
