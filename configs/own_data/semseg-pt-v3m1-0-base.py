"""The teacher on scans of your own."""

_base_ = ["../_base_/own_data.py", "../_base_/cpu_minutes.py"]

save_path = "exp/own_data/semseg-pt-v3m1-0-base"
epoch = 30
model = {{_base_.teacher_model}}
