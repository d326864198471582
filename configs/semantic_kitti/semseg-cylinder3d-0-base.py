"""Cylinder3D (arXiv:2011.10033), 55.9 M parameters, on SemanticKITTI: the teacher of `kd/cylinder3d_to_polarnet.py`."""

_base_ = [
    "../_base_/semantic_kitti_points.py",
    "../_base_/cylinder3d_polarnet.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/semseg-cylinder3d-0-base"
model = {{_base_.teacher_model}}
