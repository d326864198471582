"""`cylinder3d_to_polarnet.py` on train and val, for a submission.

Its validation scores mean nothing: take the last checkpoint, and test with `test.mode=tta test.tta=flips`.
"""

_base_ = ["cylinder3d_to_polarnet.py"]

save_path = "exp/semantic_kitti/cylinder3d_to_polarnet_trainval"
data = dict(train=dict(split=["train", "val"]), test=dict(split="test"))
