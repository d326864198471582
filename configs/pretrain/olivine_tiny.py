"""OLIVINE: pairs, weak classes and their distributions. Simulated streets, tiny."""

_base_ = ["../_base_/image_to_lidar_tiny.py"]

save_path = "exp/sim_tiny/pretrain_olivine"
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet_classes}},
    image={{_base_.networks.image_classes}},
    terms={{_base_.olivine_terms}},
)
