"""Simulated streets with the images of their camera, weak labels and point-pixel pairs, cells of 20 cm and 1 degree.

`python tools/prepare_data.py simulate --out data/sim --cameras kitti` makes them. Images are cropped to 96 x 320.
"""

# Two underscores keep a name out of the config.
__cells = dict(type="kd.VoxelSample", voxel_size=0.2, degrees=1.0, coordinates="cylindrical")
__move = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
    dict(type="RandomFlip", p=0.5),
    dict(type="kd.DropCuboid", max_share=0.2, least_pairs=256),
    dict(type="kd.CropImages", size=(96, 320), area=(0.3, 1.0), aspect=(2.9, 3.7), least_pairs=256),
    dict(type="kd.FlipImages", p=0.5),
]
__resize = [dict(type="kd.ResizeImages", size=(96, 320))]
__offsets = dict(offset="coord", pair_offset="pair_point", image_offset="images")
__keys = ("coord", "images", "pair_point", "pair_pixel", "pair_label", "name")
__end = [dict(type="kd.PairsToRows"), dict(type="ToTensor")]
__voxels = [
    __cells,
    *__end,
    dict(
        type="Collect",
        keys=("grid_coord", *__keys),
        feat_keys=("strength",),
        offset_keys_dict=__offsets,
    ),
]
__superpixels = [
    __cells,
    *__end,
    dict(
        type="Collect",
        keys=("grid_coord", "superpixels", *__keys),
        feat_keys=("strength",),
        offset_keys_dict=__offsets,
    ),
]
# For networks that cut cells themselves.
__points = [
    *__end,
    dict(type="Collect", keys=__keys, feat_keys=("coord", "strength"), offset_keys_dict=__offsets),
]
voxels = dict(train=[*__move, *__voxels], evaluate=[*__resize, *__voxels])
voxels_superpixels = dict(train=[*__move, *__superpixels], evaluate=[*__resize, *__superpixels])
points = dict(train=[*__move, *__points], evaluate=[*__resize, *__points])

__scans = dict(type="kd.SemanticKITTIDataset", data_root="data/sim", ignore_index=-1)
__pairs = dict(type="kd.PointPixelDataset", labels="weak")
__drives = ["00", "01", "02", "03", "04", "05"]

data = dict(
    num_classes=19,
    ignore_index=-1,
    names=[
        "car",
        "bicycle",
        "motorcycle",
        "truck",
        "other-vehicle",
        "person",
        "bicyclist",
        "motorcyclist",
        "road",
        "parking",
        "sidewalk",
        "other-ground",
        "building",
        "fence",
        "vegetation",
        "trunk",
        "terrain",
        "pole",
        "traffic-sign",
    ],
    train=dict(
        source=dict(split="train", sequences=__drives, **__scans),
        transform=voxels["train"],
        **__pairs,
    ),
    val=dict(source=dict(split="val", **__scans), transform=voxels["evaluate"], **__pairs),
    test=dict(source=dict(split="val", **__scans), transform=voxels["evaluate"], **__pairs),
)
