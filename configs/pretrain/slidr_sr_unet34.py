"""SLidR: contrast between superpixels. SR-UNet34 on nuScenes."""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_slidr_sr_unet34"
data = dict(
    train=dict(transform={{_base_.voxels_superpixels.train}}, superpixels=True),
    val=dict(transform={{_base_.voxels_superpixels.evaluate}}, superpixels=True),
    test=dict(transform={{_base_.voxels_superpixels.evaluate}}, superpixels=True),
)
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet}},
    image={{_base_.networks.image}},
    terms={{_base_.slidr_terms}},
)
