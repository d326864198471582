"""Simulated streets in SemanticKITTI's layout; `python tools/prepare_data.py simulate` makes them."""

_base_ = ["semantic_kitti.py"]

# Ours on either host: Pointcept's own reader knows the official sequences only.
__scans = dict(type="kd.SemanticKITTIDataset", data_root="data/sim")

data = dict(train=__scans, val=__scans, test=__scans)
