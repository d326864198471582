"""`teacher_to_score_student.py`, tiny, on the simulated streets."""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_score"
optimizer = dict(
    auxiliary=dict(type="SGD", lr=1e-3, modules=["watchers"]),
    student=dict(type="SGD", lr=1e-3, modules=["denoiser"]),
)
scheduler = dict(
    auxiliary=dict(type="MultiStepLR", milestones=[1.0], gamma=1.0),  # constant
    student=dict(type="MultiStepLR", milestones=[1.0], gamma=1.0),
)
train = dict(type="kd.AlternatingTrainer")
model = dict(
    type="kd.ScoreDistillation",
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/sim_tiny/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher_tiny.py",
        train_if_missing=True,
    ),
    steps=8,
    guidance=3.5,
)
