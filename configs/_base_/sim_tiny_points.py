"""The demo's simulated streets, whole scans without a voxel grid."""

_base_ = ["sim_tiny.py", "points.py"]

data = dict(
    train=dict(transform={{_base_.points_train}}),
    val=dict(transform={{_base_.points_evaluate}}),
    test=dict(transform={{_base_.points_evaluate}}),
)
