"""The tiny SR-UNet from random weights, on the 120 simulated training scans."""

_base_ = [
    "../_base_/sim_voxels_tiny.py",
    "../_base_/residual_unet_tiny.py",
    "../_base_/finetune_tiny.py",
]

save_path = "exp/sim_tiny/semseg-sr-unet-0-random_100pct"
epoch = 5
hooks = [dict(type="kd.CheckpointLoader"), *{{_base_.hooks}}[1:]]
