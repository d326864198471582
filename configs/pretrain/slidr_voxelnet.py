"""SLidR with the encoder of SECOND and PV-RCNN, for OpenPCDet. nuScenes, 30 superpixels an image."""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_slidr_voxelnet"
data = dict(
    train=dict(transform={{_base_.points_superpixels.train}}, superpixels="superpixels_slic_30"),
    val=dict(transform={{_base_.points_superpixels.evaluate}}, superpixels="superpixels_slic_30"),
    test=dict(transform={{_base_.points_superpixels.evaluate}}, superpixels="superpixels_slic_30"),
)
optimizer = dict(lr=0.01)
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.voxelnet}},
    image={{_base_.networks.image}},
    terms=dict(superpixels=dict(type="kd.SuperpixelContrast", per_image=30, temperature=0.07)),
)
