"""The 2.78 M student of arXiv:2505.08101 on nuScenes, trained without a teacher."""

_base_ = ["semseg-pt-v3m1-0-base.py"]

save_path = "exp/nuscenes/semseg-pt-v3m1-1-student"
model = {{_base_.student_model}}
