"""SemanticKITTI scans with what the left colour camera sees, images of 192 x 640; merged: four past scans.

Needs `image_2` of KITTI odometry beside the scans. Points behind and beside the car take imputed image features.
"""

_base_ = ["semantic_kitti.py", "views.py"]

# Two underscores keep a name out of the config.
__scans = dict(type="kd.SemanticKITTIDataset", data_root="data/semantic_kitti", ignore_index=-1)
__merged = dict(sweeps=5, sweep_labels="reference", **__scans)
__views = dict(_delete_=True, type="kd.CameraViewDataset", image_size=(192, 640))
__val = dict(source=dict(split="val", **__scans), keep=None, **__views)
sweeps_data = dict(
    train=dict(split="train", transform={{_base_.sweeps_train}}, **__merged),
    val=dict(split="val", transform={{_base_.sweeps_evaluate}}, **__merged),
    test=dict(split="val", transform={{_base_.sweeps_evaluate}}, **__merged),
)
two_views_source = dict(split="train", **__merged)

data = dict(
    train=dict(
        source=dict(split="train", **__scans),
        keep=None,
        transform={{_base_.views_train}},
        **__views,
    ),
    val=dict(transform={{_base_.views_evaluate}}, **__val),
    test=dict(transform={{_base_.views_evaluate}}, **__val),
)
