"""PolarNet (arXiv:2003.14032), 13.6 M parameters, on SemanticKITTI, trained without a teacher."""

_base_ = [
    "../_base_/semantic_kitti_points.py",
    "../_base_/cylinder3d_polarnet.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/semseg-polarnet-0-base"
model = {{_base_.student_model}}
