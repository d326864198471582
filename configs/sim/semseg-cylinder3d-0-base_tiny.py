"""The tiny Cylinder3D on three fully labelled drives through the simulated streets."""

_base_ = [
    "../_base_/sim_tiny_points.py",
    "../_base_/cylinder3d_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/semseg-cylinder3d-0-base"
data = dict(train=dict(sequences=["00", "01", "02"]))
model = {{_base_.teacher_model}}
