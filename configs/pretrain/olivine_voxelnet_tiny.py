"""OLIVINE with the encoder of SECOND and PV-RCNN, for OpenPCDet. Simulated streets, tiny."""

_base_ = ["../_base_/image_to_lidar_tiny.py"]

save_path = "exp/sim_tiny/pretrain_olivine_voxelnet"
data = dict(
    train=dict(transform={{_base_.points.train}}),
    val=dict(transform={{_base_.points.evaluate}}),
    test=dict(transform={{_base_.points.evaluate}}),
)
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.voxelnet_classes}},
    image={{_base_.networks.image_classes}},
    terms={{_base_.olivine_terms}},
)
