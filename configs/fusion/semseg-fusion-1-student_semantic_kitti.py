"""The LiDAR-camera student without a teacher. SemanticKITTI."""

_base_ = [
    "../_base_/semantic_kitti_views.py",
    "../_base_/sphereformer_fusion_semantic_kitti.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/semantic_kitti/semseg-fusion-1-student"
model = {{_base_.student_model}}
