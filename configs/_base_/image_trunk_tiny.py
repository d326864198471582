"""The image network of the tiny family, and the images that it learns from: weak labels of the simulated streets.

It stands in for a foundation model, whose weights would have to be fetched: its trunk learns what weak labels say about
images, and nothing from points or their labels. `tools/prepare_data.py simulate` with images and weak labels makes the
streets. Images are 96 x 320 pixels; the trunk has a feature of 128 numbers for every 4 x 4 of them.
"""

_base_ = ["semantic_kitti.py", "cpu_minutes.py"]

image_trunk = dict(depths=(1, 1, 1, 1), width=16, bottleneck=False)
image_model = dict(
    type="kd.ImageSegmentor",
    num_classes=19,
    trunk=image_trunk,
    stride=4,
    criteria=[dict(type="CrossEntropyLoss", ignore_index=-1)],
)

# Two underscores keep a name out of the config.
__collect = [
    dict(type="kd.PairsToRows"),
    dict(type="kd.WeakLabelsToSegment"),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("images", "weak_labels", "segment", "name"),
        offset_keys_dict=dict(offset="segment"),
    ),
]
__train = [
    # The images are 3.3 times as wide as high.
    dict(type="kd.CropImages", size=(96, 320), area=(0.3, 1.0), aspect=(3.0, 3.7)),
    dict(type="kd.FlipImages", p=0.5),
    *__collect,
]
__evaluate = [dict(type="kd.ResizeImages", size=(96, 320)), *__collect]
# Pairs are not needed here; the labels of points are not even read.
__images = dict(_delete_=True, type="kd.PointPixelDataset", labels=None, maps=True, num_classes=19)
__streets = dict(type="kd.SemanticKITTIDataset", data_root="data/sim")

data = dict(
    train=dict(
        source=dict(split="train", sequences=["00", "01", "02", "03", "04", "05"], **__streets),
        transform=__train,
        **__images,
    ),
    val=dict(source=dict(split="val", **__streets), transform=__evaluate, **__images),
    test=dict(source=dict(split="val", **__streets), transform=__evaluate, **__images),
)

batch_size = 4
epoch = 48
eval_epoch = 8
num_worker = 0
hooks = [
    dict(type="kd.CheckpointLoader"),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.SemSegEvaluator"),  # against the weak labels of other streets
    dict(type="kd.CheckpointSaver", save_freq=None),
]
