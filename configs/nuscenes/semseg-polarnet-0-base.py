"""PolarNet (arXiv:2003.14032) on nuScenes, trained without a teacher."""

_base_ = [
    "../_base_/nuscenes_points.py",
    "../_base_/cylinder3d_polarnet_nuscenes.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/nuscenes/semseg-polarnet-0-base"
model = {{_base_.student_model}}
