"""The tiny diffusion teacher on the simulated streets."""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_teacher"
optimizer = dict(type="Adam", lr=0.001)
scheduler = dict(type="MultiStepLR", milestones=[0.25, 0.5, 0.75], gamma=0.5)
model = {{_base_.teacher_model}}
