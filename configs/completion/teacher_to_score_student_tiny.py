"""`teacher_to_score_student.py`, tiny, on the simulated streets."""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_score"
epoch = 4
eval_epoch = 1
optimizer = dict(
    auxiliary=dict(type="Adam", lr=1e-4, modules=["watchers"]),
    student=dict(type="Adam", lr=2e-4, modules=["denoiser"]),
)
scheduler = dict(
    auxiliary=dict(type="MultiStepLR", milestones=[1.0], gamma=1.0),  # constant
    student=dict(type="MultiStepLR", milestones=[0.5, 0.75], gamma=0.3),
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
    train_steps=8,
    random_stop=True,
    steps=8,
    guidance=1.0,
)
