"""The LiDAR-camera student without a teacher."""

_base_ = [
    "../_base_/nuscenes_views.py",
    "../_base_/sphereformer_fusion.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/nuscenes/semseg-fusion-1-student"
model = {{_base_.student_model}}
