"""SR-UNet34 from a pre-trained backbone, `weight`, on 25 % of nuScenes' training scenes."""

_base_ = ["semseg-sr-unet34-1-pretrained_nuscenes_100pct.py"]

save_path = "exp/nuscenes/semseg-sr-unet34-1-pretrained_25pct"
data = dict(train=dict(scenes="configs/finetune/lists/nuscenes_25pct.txt"))
