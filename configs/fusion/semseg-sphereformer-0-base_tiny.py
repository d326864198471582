"""The tiny teacher: LiDAR alone, two past scans merged."""

_base_ = [
    "../_base_/sim_views_tiny.py",
    "../_base_/sphereformer_fusion_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_nus_tiny/semseg-sphereformer-0-base"
data = dict(
    train=dict(_delete_=True, **{{_base_.sweeps_data.train}}),
    val=dict(_delete_=True, **{{_base_.sweeps_data.val}}),
    test=dict(_delete_=True, **{{_base_.sweeps_data.test}}),
)
model = {{_base_.teacher_model}}
