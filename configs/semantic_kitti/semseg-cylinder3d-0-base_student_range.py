"""Cylinder3D on PolarNet's range, 3 to 50 m and -3 to 1.5 m: the teacher of `kd/cylinder3d_to_polarnet_paper.py`."""

_base_ = [
    "../_base_/semantic_kitti_points.py",
    "../_base_/cylinder3d_student_range.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/semseg-cylinder3d-0-base_student_range"
optimizer = dict(lr=0.0005)
scheduler = dict(_delete_=True, type="MultiStepLR", milestones=[1.0], gamma=1.0)
model = {{_base_.teacher_model}}
