"""`teacher_dpo.py`, tiny, on the simulated streets; a student's options name exp/sim_tiny and teacher_dpo_tiny.py."""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_teacher_dpo"
epoch = 2
eval_epoch = 1
clip_grad = 1.0
optimizer = dict(type="Adam", lr=1e-6)
scheduler = dict(type="MultiStepLR", milestones=[1.0], gamma=1.0)  # constant
model = dict(
    type="kd.PreferenceAlignment",
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/sim_tiny/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher_tiny.py",
        train_if_missing=True,
    ),
    beta=2000.0,
    pair_steps=4,
    pair_guidance=1.0,
)
