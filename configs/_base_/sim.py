"""Simulated streets in SemanticKITTI's layout; `python tools/prepare_data.py simulate` makes them."""

_base_ = ["semantic_kitti.py"]

data = dict(
    train=dict(data_root="data/sim"),
    val=dict(data_root="data/sim"),
    test=dict(data_root="data/sim"),
)
