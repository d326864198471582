"""nuScenes in the cells of image-to-LiDAR pre-training, read by this package on either host."""

_base_ = ["nuscenes.py", "voxel_sample.py"]

__reader = "kd.NuScenesDataset"
data = dict(
    train=dict(type=__reader, transform={{_base_.voxels_train}}),
    val=dict(type=__reader, transform={{_base_.voxels_evaluate}}),
    test=dict(type=__reader, transform={{_base_.voxels_evaluate}}),
)
