"""Linear probing of an SR-UNet34, `weight` or random, with all of nuScenes' labels: one layer learns."""

_base_ = [
    "../_base_/nuscenes_voxels.py",
    "../_base_/residual_unet.py",
    "../_base_/finetune.py",
]

save_path = "exp/nuscenes/semseg-sr-unet34-2-probe"
optimizer = dict(lr=0.05)
param_dicts = None
hooks = [dict(type="kd.PretrainedBackbone"), *{{_base_.hooks}}[1:]]
model = dict(
    _delete_=True,
    type="kd.LinearProbe",
    num_classes=16,
    backbone_out_channels=96,
    backbone=dict(type="kd.ResidualUNet", in_channels=1, num_classes=0),
    criteria={{_base_.model.criteria}},
)
