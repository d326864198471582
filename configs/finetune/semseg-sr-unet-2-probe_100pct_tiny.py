"""Linear probing of the tiny SR-UNet, `weight` or random, on the 120 simulated training scans."""

_base_ = [
    "../_base_/sim_voxels_tiny.py",
    "../_base_/residual_unet_tiny.py",
    "../_base_/finetune_tiny.py",
]

save_path = "exp/sim_tiny/semseg-sr-unet-2-probe_100pct"
epoch = 2
optimizer = dict(lr=0.1)
scheduler = dict(max_lr=0.1)
hooks = [dict(type="kd.PretrainedBackbone"), *{{_base_.hooks}}[1:]]
model = dict(
    _delete_=True,
    type="kd.LinearProbe",
    num_classes=19,
    backbone_out_channels=32,
    backbone=dict(
        type="kd.ResidualUNet",
        in_channels=1,
        num_classes=0,
        base_channels=16,
        channels=(16, 32, 48, 64, 64, 48, 32, 32),
        layers=(1,) * 8,
    ),
    criteria={{_base_.model.criteria}},
)
