"""The diffusion teacher of scene completion, LiDiff (arXiv:2403.13470), on SemanticKITTI: 32.7 M, 50 steps."""

_base_ = ["../_base_/completion.py"]

save_path = "exp/semantic_kitti/completion_teacher"
optimizer = dict(type="Adam", lr=0.0001)
scheduler = dict(type="MultiStepLR", milestones=[0.25, 0.5, 0.75], gamma=0.5)
model = {{_base_.teacher_model}}
