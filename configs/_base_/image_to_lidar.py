"""Networks, terms and schedule of image-to-LiDAR pre-training: SR-UNet34 learns from the six cameras of nuScenes.

The image network is a ResNet-50 with MoCo v2's weights; put the file where `weight` says. Terms with the published
weights: `ppkt_terms` (arXiv:2104.04687), `slidr_terms` (arXiv:2203.16258), `olivine_terms` (arXiv:2405.14271, 13 weak
classes), `scalr_terms` (arXiv:2310.17504: no contrast, features of the frozen image network itself).
"""

_base_ = ["nuscenes_pairs.py", "runtime.py"]

# Two underscores keep a name out of the config.
__unet = dict(type="kd.ResidualUNet", in_channels=1, num_classes=64, bn_momentum=0.05)
__moco = dict(
    type="kd.ImageEncoder",
    weight="data/weights/moco_v2_800ep_pretrain.pth.tar",
    kind="moco_v2",
)
__voxelnet = dict(type="kd.VoxelEmbedding", backbone=dict(type="kd.VoxelBackBone8x"), embed_dim=64)

networks = dict(
    unet=dict(normalise=True, **__unet),
    unet_classes=dict(normalise=True, class_level=64, **__unet),
    voxelnet=dict(heads=("final",), **__voxelnet),
    voxelnet_classes=dict(heads=("final", "final_class_level"), **__voxelnet),
    image=dict(heads=dict(final=64), **__moco),
    image_classes=dict(heads=dict(final=64, final_class_level=64), **__moco),
)
ppkt_terms = dict(pairs=dict(type="kd.PairContrast", num_pairs=4096, temperature=0.07))
slidr_terms = dict(superpixels=dict(type="kd.SuperpixelContrast", per_image=150, temperature=0.07))
olivine_terms = dict(
    pairs=dict(type="kd.PairContrast", weight=0.5, num_pairs=4096, temperature=0.07),
    classes=dict(
        type="kd.ClassContrast",
        weight=0.5,
        num_pairs=4096,
        temperature=0.07,
        sampler="dcas",
        range_cell=0.1,
    ),
    distributions=dict(
        type="kd.ClassDistributions", weight=1.0, classes=13, dim=64, warmup_steps=10_000
    ),
)
scalr_terms = dict(features=dict(type="kd.FeatureRegression", distance="euclidean"))

# Published: 16 key frames a batch, 50 epochs; the rate goes with the batch.
batch_size = 16
epoch = 50
eval_epoch = 50
optimizer = dict(type="SGD", lr=0.5, momentum=0.9, dampening=0.1, weight_decay=0.0001)
scheduler = dict(type="CosineAnnealingLR")
sync_bn = True
hooks = [
    dict(type="kd.CheckpointLoader"),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.PairLossEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=10),
]
