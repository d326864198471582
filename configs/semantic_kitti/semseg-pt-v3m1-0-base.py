"""Point Transformer V3 (arXiv:2312.10035), 46.2 M parameters, on SemanticKITTI: the teacher."""

_base_ = [
    "../_base_/semantic_kitti.py",
    "../_base_/ptv3_pair.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/semantic_kitti/semseg-pt-v3m1-0-base"
enable_amp = True
model = {{_base_.teacher_model}}
