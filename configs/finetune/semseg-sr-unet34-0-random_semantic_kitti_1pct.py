"""SR-UNet34 from random weights, on every 100th scan of SemanticKITTI."""

_base_ = [
    "../_base_/semantic_kitti_voxels.py",
    "../_base_/residual_unet.py",
    "../_base_/finetune.py",
]

save_path = "exp/semantic_kitti/semseg-sr-unet34-0-random_1pct"
batch_size = 10
epoch = 100
scheduler = dict(epochs=100)
optimizer = dict(lr=0.05)
param_dicts = None
hooks = [dict(type="kd.CheckpointLoader"), *{{_base_.hooks}}[1:]]
model = dict(backbone=dict(num_classes=19))
data = dict(train=dict(scans="configs/finetune/lists/semantic_kitti_1pct.txt"))
