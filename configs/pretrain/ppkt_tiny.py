"""PPKT: every point finds its own pixel. Simulated streets, tiny."""

_base_ = ["../_base_/image_to_lidar_tiny.py"]

save_path = "exp/sim_tiny/pretrain_ppkt"
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet}},
    image={{_base_.networks.image}},
    terms={{_base_.ppkt_terms}},
)
