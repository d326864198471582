"""ScaLR: regression onto the features of a frozen DINOv2, no contrast. SR-UNet34 on nuScenes.

Published with WaffleIron, DINOv2 ViT-L/14 and four data sets; here the network of the other configs and nuScenes alone.
The head is as wide as the image network's features, 1024. Needs timm.
"""

_base_ = ["../_base_/image_to_lidar.py"]

save_path = "exp/nuscenes/pretrain_scalr_sr_unet34"

# Two underscores keep a name out of the config. Sides are multiples of 14.
__cut = dict(size=(224, 420), area=(0.3, 1.0), aspect=(14 / 9, 17 / 9))
__collect = [
    dict(type="kd.VoxelSample", voxel_size=0.1, degrees=1.0, coordinates="cylindrical"),
    dict(type="kd.PairsToRows"),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "images", "pair_point", "pair_pixel", "name"),
        feat_keys=("strength",),
        offset_keys_dict=dict(offset="coord", pair_offset="pair_point", image_offset="images"),
    ),
]
__train = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
    dict(type="RandomFlip", p=0.5),
    dict(type="kd.DropCuboid", max_share=0.2, least_pairs=1024),
    dict(type="kd.CropImages", **__cut),
    dict(type="kd.FlipImages", p=0.5),
    *__collect,
]
__evaluate = [dict(type="kd.ResizeImages", size=(224, 420)), *__collect]
data = dict(
    train=dict(labels=None, transform=__train),
    val=dict(labels=None, transform=__evaluate),
    test=dict(labels=None, transform=__evaluate),
)
optimizer = dict(_delete_=True, type="AdamW", lr=0.002, weight_decay=0.03)
model = dict(
    type="kd.ImageToLidar",
    student=dict(type="kd.ResidualUNet", in_channels=1, num_classes=1024, bn_momentum=0.05),
    image=dict(
        type="kd.ImageEncoder",
        trunk="timm:vit_large_patch14_dinov2.lvd142m",
        weight="data/weights/dinov2_vitl14_pretrain.pth",
        kind="timm",
        heads={},
    ),
    terms={{_base_.scalr_terms}},
)
