"""SR-UNet34 from a pre-trained backbone, `weight`, on all of nuScenes' labels."""

_base_ = [
    "../_base_/nuscenes_voxels.py",
    "../_base_/residual_unet.py",
    "../_base_/finetune.py",
]

save_path = "exp/nuscenes/semseg-sr-unet34-1-pretrained_100pct"
