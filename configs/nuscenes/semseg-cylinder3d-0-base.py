"""Cylinder3D (arXiv:2011.10033) on nuScenes: the teacher of `kd/cylinder3d_to_polarnet_nuscenes.py`."""

_base_ = [
    "../_base_/nuscenes_points.py",
    "../_base_/cylinder3d_polarnet_nuscenes.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/nuscenes/semseg-cylinder3d-0-base"
model = {{_base_.teacher_model}}
