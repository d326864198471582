"""A dozen real SemanticKITTI scans, without a voxel grid."""

_base_ = ["semantic_kitti_samples.py", "points.py"]

data = dict(
    train=dict(transform={{_base_.points_train}}),
    val=dict(transform={{_base_.points_evaluate}}),
    test=dict(transform={{_base_.points_evaluate}}),
)
