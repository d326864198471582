"""ScaLR: regression onto the features of the frozen image network, no contrast. Simulated streets, tiny."""

_base_ = ["../_base_/image_to_lidar_tiny.py"]

save_path = "exp/sim_tiny/pretrain_scalr"
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet_features}},
    image={{_base_.networks.image_features}},
    terms={{_base_.scalr_terms}},
)
