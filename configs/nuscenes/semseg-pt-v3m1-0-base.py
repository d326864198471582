"""Point Transformer V3 (arXiv:2312.10035), 46.2 M parameters, on nuScenes: the teacher."""

_base_ = [
    "../_base_/nuscenes.py",
    "../_base_/ptv3_pair_nuscenes.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/nuscenes/semseg-pt-v3m1-0-base"
enable_amp = True
model = {{_base_.teacher_model}}
