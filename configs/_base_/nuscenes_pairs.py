"""nuScenes key frames with six images, weak labels and point-pixel pairs, cylindrical cells of 10 cm and 1 degree.

`python tools/prepare_data.py nuscenes-info --with-camera` makes the info files, `weak-labels` and `superpixels` the
pictures beside the images. Classes are the weak ones.
"""

# Two underscores keep a name out of the config.
__cells = dict(type="kd.VoxelSample", voxel_size=0.1, degrees=1.0, coordinates="cylindrical")
__move = [
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
    dict(type="RandomFlip", p=0.5),
    dict(type="kd.ShuffleImages"),
    dict(type="kd.DropCuboid", max_share=0.2, least_pairs=1024),
    dict(type="kd.CropImages", size=(224, 416), area=(0.3, 1.0), aspect=(14 / 9, 17 / 9)),
    dict(type="kd.FlipImages", p=0.5),
]
__resize = [dict(type="kd.ResizeImages", size=(224, 416))]
__offsets = dict(offset="coord", pair_offset="pair_point", image_offset="images")
__keys = ("coord", "images", "pair_point", "pair_pixel", "pair_label", "name")
__end = [
    dict(type="kd.PairsToRows"),
    dict(type="ToTensor"),
]
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
    dict(
        type="Collect",
        keys=__keys,
        feat_keys=("coord", "strength"),
        offset_keys_dict=__offsets,
    ),
]
__points_superpixels = [
    *__end,
    dict(
        type="Collect",
        keys=("superpixels", *__keys),
        feat_keys=("coord", "strength"),
        offset_keys_dict=__offsets,
    ),
]
voxels = dict(train=[*__move, *__voxels], evaluate=[*__resize, *__voxels])
voxels_superpixels = dict(train=[*__move, *__superpixels], evaluate=[*__resize, *__superpixels])
points = dict(train=[*__move, *__points], evaluate=[*__resize, *__points])
points_superpixels = dict(
    train=[*__move, *__points_superpixels], evaluate=[*__resize, *__points_superpixels]
)

__scans = dict(type="kd.NuScenesDataset", data_root="data/nuscenes", sweeps=10, ignore_index=-1)
__pairs = dict(type="kd.PointPixelDataset", labels="weak")

data = dict(
    num_classes=13,
    ignore_index=-1,
    names=[
        "barrier",
        "bicycle",
        "bus",
        "car",
        "motorcycle",
        "pedestrian",
        "traffic_cone",
        "truck",
        "road",
        "sidewalk",
        "terrain",
        "vegetation",
        "building",
    ],
    train=dict(source=dict(split="train", **__scans), transform=voxels["train"], **__pairs),
    val=dict(source=dict(split="val", **__scans), transform=voxels["evaluate"], **__pairs),
    test=dict(source=dict(split="val", **__scans), transform=voxels["evaluate"], **__pairs),
)
