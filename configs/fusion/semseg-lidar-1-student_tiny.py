"""The tiny student without its cameras, trained so: the baseline."""

_base_ = [
    "../_base_/sim_views_tiny.py",
    "../_base_/sphereformer_fusion_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_nus_tiny/semseg-lidar-1-student"
data = dict(train=dict(keep=0), val=dict(keep=0), test=dict(keep=0))
model = {{_base_.lidar_student_model}}
