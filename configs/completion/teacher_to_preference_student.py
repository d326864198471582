"""Preference distillation of the completion teacher into a student of 8 steps, Distillation-DPO (arXiv:2504.11447)."""

_base_ = ["../_base_/completion.py"]

save_path = "exp/semantic_kitti/completion_preference"
batch_size = 1
optimizer = dict(
    auxiliary=dict(type="SGD", lr=1e-5, modules=["watchers"], clip_grad=0.05),
    student=dict(type="SGD", lr=1e-5, modules=["denoiser"], clip_grad=0.05),
)
scheduler = dict(
    auxiliary=dict(type="MultiStepLR", milestones=[1.0], gamma=1.0),  # constant
    student=dict(type="MultiStepLR", milestones=[1.0], gamma=1.0),
)
train = dict(type="kd.AlternatingTrainer")
model = dict(
    type="kd.PreferenceDistillation",
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/semantic_kitti/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher.py",
        train_if_missing=True,
    ),
    steps=8,
    guidance=3.5,
)
