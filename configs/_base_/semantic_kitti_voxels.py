"""SemanticKITTI in the cells of image-to-LiDAR pre-training, read by this package on either host."""

_base_ = ["semantic_kitti.py", "voxel_sample.py"]

__reader = "kd.SemanticKITTIDataset"
data = dict(
    train=dict(type=__reader, transform={{_base_.voxels_train}}),
    val=dict(type=__reader, transform={{_base_.voxels_evaluate}}),
    test=dict(type=__reader, transform={{_base_.voxels_evaluate}}),
)
