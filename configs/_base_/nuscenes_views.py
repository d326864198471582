"""nuScenes key frames with what their six cameras see, images of 360 x 640; merged: four past scans."""

_base_ = ["nuscenes.py", "views.py"]

# Two underscores keep a name out of the config.
__scans = dict(type="kd.NuScenesDataset", data_root="data/nuscenes", sweeps=10, ignore_index=-1)
__merged = dict(aggregate_sweeps=4, remove_close=1.0, **__scans)
__views = dict(_delete_=True, type="kd.CameraViewDataset", image_size=(360, 640))
__val = dict(source=dict(split="val", **__scans), keep=None, **__views)
sweeps_data = dict(
    train=dict(split="train", transform={{_base_.sweeps_train}}, **__merged),
    val=dict(split="val", transform={{_base_.sweeps_evaluate}}, **__merged),
    test=dict(split="val", transform={{_base_.sweeps_evaluate}}, **__merged),
)
two_views_source = dict(split="train", **__merged)

data = dict(
    # Three of the six cameras, drawn anew for every sample; all of them in evaluation.
    train=dict(
        source=dict(split="train", **__scans),
        keep=3,
        transform={{_base_.views_train}},
        **__views,
    ),
    val=dict(transform={{_base_.views_evaluate}}, **__val),
    test=dict(transform={{_base_.views_evaluate}}, **__val),
)
