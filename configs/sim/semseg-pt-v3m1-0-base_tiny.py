"""The tiny teacher on one labelled sequence of the simulated streets, 20 scans."""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_pair_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/semseg-pt-v3m1-0-base"
data = dict(train=dict(sequences=["00"]))
epoch = 42  # 10 steps each
eval_epoch = 7
model = {{_base_.teacher_model}}
