"""The tiny SR-UNet from a pre-trained backbone, `weight`, on 12 of the 120 simulated training scans."""

_base_ = [
    "../_base_/sim_voxels_tiny.py",
    "../_base_/residual_unet_tiny.py",
    "../_base_/finetune_tiny.py",
]

save_path = "exp/sim_tiny/semseg-sr-unet-1-pretrained_10pct"
epoch = 50
optimizer = dict(lr=0.004)
param_dicts = [dict(keyword="final", lr=0.02)]
scheduler = dict(max_lr=[0.004, 0.02])
data = dict(train=dict(scans="configs/finetune/lists/sim_10pct.txt"))
