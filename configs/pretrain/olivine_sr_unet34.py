"""OLIVINE: pairs, weak classes and their distributions. SR-UNet34 on nuScenes."""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_olivine_sr_unet34"
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet_classes}},
    image={{_base_.networks.image_classes}},
    terms={{_base_.olivine_terms}},
)
