"""SR-UNet34 from random weights, on all of nuScenes' labels."""

_base_ = [
    "../_base_/nuscenes_voxels.py",
    "../_base_/residual_unet.py",
    "../_base_/finetune.py",
]

save_path = "exp/nuscenes/semseg-sr-unet34-0-random_100pct"
optimizer = dict(lr=0.05)
param_dicts = None
hooks = [dict(type="kd.CheckpointLoader"), *{{_base_.hooks}}[1:]]
