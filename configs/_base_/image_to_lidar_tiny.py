"""Image-to-LiDAR pre-training on the simulated streets, tiny: a small SR-UNet, a small image network.

The image network comes from `configs/pretrain/image_trunk_tiny.py`; train that first.
"""

_base_ = ["sim_pairs_tiny.py", "cpu_minutes.py"]

# Two underscores keep a name out of the config.
__unet = dict(
    type="kd.ResidualUNet",
    in_channels=1,
    base_channels=16,
    channels=(16, 32, 48, 64, 64, 48, 32, 32),
    layers=(1,) * 8,
    bn_momentum=0.05,
)
__trunk = dict(
    type="kd.ImageEncoder",
    trunk=dict(depths=(1, 1, 1, 1), width=16, bottleneck=False),
    stride=4,
    weight="exp/sim_tiny/image_trunk/model/model_best.pth",
    kind="segmentor",
)
networks = dict(
    unet=dict(num_classes=32, normalise=True, **__unet),
    unet_classes=dict(num_classes=32, class_level=32, normalise=True, **__unet),
    # As wide as the features of the image network.
    unet_features=dict(num_classes=128, **__unet),
    # The encoder of SECOND and PV-RCNN at its own size and grid.
    voxelnet_classes=dict(
        type="kd.VoxelEmbedding",
        backbone=dict(type="kd.VoxelBackBone8x"),
        embed_dim=32,
        heads=("final", "final_class_level"),
    ),
    image=dict(heads=dict(final=32), **__trunk),
    image_classes=dict(heads=dict(final=32, final_class_level=32), **__trunk),
    image_features=dict(heads={}, **__trunk),
)
ppkt_terms = dict(pairs=dict(type="kd.PairContrast", num_pairs=2048, temperature=0.07))
slidr_terms = dict(superpixels=dict(type="kd.SuperpixelContrast", per_image=150, temperature=0.07))
olivine_terms = dict(
    pairs=dict(type="kd.PairContrast", weight=0.5, num_pairs=2048, temperature=0.07),
    classes=dict(
        type="kd.ClassContrast",
        weight=0.5,
        num_pairs=2048,
        temperature=0.07,
        sampler="dcas",
        range_cell=0.2,
    ),
    distributions=dict(
        type="kd.ClassDistributions",
        weight=1.0,
        classes=19,
        dim=32,
        warmup_steps=None,
        warmup_fraction=0.5,
    ),
)
scalr_terms = dict(features=dict(type="kd.FeatureRegression", distance="euclidean"))

batch_size = 4
epoch = 20
eval_epoch = 4
hooks = [
    dict(type="kd.CheckpointLoader"),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.PairLossEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=None),
]
