"""Point Transformer V3 (arXiv:2312.10035), 46.2 M parameters, on the simulated streets: the teacher."""

_base_ = [
    "../_base_/sim.py",
    "../_base_/ptv3_pair.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/sim/semseg-pt-v3m1-0-base"
enable_amp = True
model = {{_base_.teacher_model}}
