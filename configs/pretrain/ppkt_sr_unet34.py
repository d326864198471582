"""PPKT: every point finds its own pixel. SR-UNet34 on nuScenes."""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_ppkt_sr_unet34"
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet}},
    image={{_base_.networks.image}},
    terms={{_base_.ppkt_terms}},
)
