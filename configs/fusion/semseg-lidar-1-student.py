"""The student without its cameras, trained so: the baseline."""

_base_ = [
    "../_base_/nuscenes_views.py",
    "../_base_/sphereformer_fusion.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/nuscenes/semseg-lidar-1-student"
data = dict(train=dict(keep=0), val=dict(keep=0), test=dict(keep=0))
model = {{_base_.lidar_student_model}}
