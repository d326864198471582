"""The tiny teacher on three fully labelled drives through the simulated streets."""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_pair_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/semseg-pt-v3m1-0-base"
data = dict(train=dict(sequences=["00", "01", "02"]))
model = {{_base_.teacher_model}}
