"""SR-UNet34 from random weights, on 10 % of nuScenes' training scenes."""

_base_ = ["semseg-sr-unet34-0-random_nuscenes_100pct.py"]

save_path = "exp/nuscenes/semseg-sr-unet34-0-random_10pct"
data = dict(train=dict(scenes="configs/finetune/lists/nuscenes_10pct.txt"))
