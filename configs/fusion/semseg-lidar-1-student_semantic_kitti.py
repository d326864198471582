"""The student without its cameras, trained so: the baseline. SemanticKITTI."""

_base_ = [
    "../_base_/semantic_kitti_views.py",
    "../_base_/sphereformer_fusion_semantic_kitti.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/semantic_kitti/semseg-lidar-1-student"
data = dict(train=dict(keep=0), val=dict(keep=0), test=dict(keep=0))
model = {{_base_.lidar_student_model}}
