"""The tiny LiDAR-camera student without a teacher."""

_base_ = [
    "../_base_/sim_views_tiny.py",
    "../_base_/sphereformer_fusion_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_nus_tiny/semseg-fusion-1-student"
model = {{_base_.student_model}}
