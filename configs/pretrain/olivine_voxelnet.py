"""OLIVINE with the encoder of SECOND and PV-RCNN, for OpenPCDet. nuScenes."""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_olivine_voxelnet"
data = dict(
    train=dict(transform={{_base_.points.train}}),
    val=dict(transform={{_base_.points.evaluate}}),
    test=dict(transform={{_base_.points.evaluate}}),
)
optimizer = dict(lr=0.01)
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.voxelnet_classes}},
    image={{_base_.networks.image_classes}},
    terms={{_base_.olivine_terms}},
)
