"""The teacher: LiDAR alone, four past scans merged, width 2. SemanticKITTI."""

_base_ = [
    "../_base_/semantic_kitti_views.py",
    "../_base_/sphereformer_fusion_semantic_kitti.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/semantic_kitti/semseg-sphereformer-0-base"
epoch = 25
data = dict(
    train=dict(_delete_=True, **{{_base_.sweeps_data.train}}),
    val=dict(_delete_=True, **{{_base_.sweeps_data.val}}),
    test=dict(_delete_=True, **{{_base_.sweeps_data.test}}),
)
model = {{_base_.teacher_model}}
