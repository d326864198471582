"""The tiny SR-UNet from random weights, on 12 of the 120 simulated training scans."""

_base_ = [
    "../_base_/sim_voxels_tiny.py",
    "../_base_/residual_unet_tiny.py",
    "../_base_/finetune_tiny.py",
]

save_path = "exp/sim_tiny/semseg-sr-unet-0-random_10pct"
epoch = 50
hooks = [dict(type="kd.CheckpointLoader"), *{{_base_.hooks}}[1:]]
data = dict(train=dict(scans="configs/finetune/lists/sim_10pct.txt"))
