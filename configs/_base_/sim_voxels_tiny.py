"""The demo's simulated streets in the cells of the tiny image-to-LiDAR pre-training."""

_base_ = ["sim.py", "voxel_sample_tiny.py"]

data = dict(
    train=dict(transform={{_base_.voxels_train}}),
    val=dict(transform={{_base_.voxels_evaluate}}),
    test=dict(transform={{_base_.voxels_evaluate}}),
)
