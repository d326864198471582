"""The teacher: LiDAR alone, four past scans merged, width 2."""

_base_ = [
    "../_base_/nuscenes_views.py",
    "../_base_/sphereformer_fusion.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/nuscenes/semseg-sphereformer-0-base"
epoch = 25
data = dict(
    train=dict(_delete_=True, **{{_base_.sweeps_data.train}}),
    val=dict(_delete_=True, **{{_base_.sweeps_data.val}}),
    test=dict(_delete_=True, **{{_base_.sweeps_data.test}}),
)
model = {{_base_.teacher_model}}
