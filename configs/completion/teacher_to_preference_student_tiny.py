"""`teacher_to_preference_student.py`, tiny, on the simulated streets; with the structural losses of score distillation.

Without them this student gets worse than its teacher: the pairs hardly differ, and the loser's term has no lower bound.
"""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_preference"
epoch = 2  # a step completes every scan twice
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
    type="kd.PreferenceDistillation",
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/sim_tiny/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher_tiny.py",
        train_if_missing=True,
    ),
    train_steps=8,
    random_stop=True,
    scene_weight=0.5,
    point_weight=0.01,
    steps=8,
    guidance=1.0,
)
