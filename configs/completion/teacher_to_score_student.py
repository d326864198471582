"""Score distillation of the completion teacher into a student of 8 steps, ScoreLiDAR (arXiv:2412.03515)."""

_base_ = ["../_base_/completion.py"]

save_path = "exp/semantic_kitti/completion_score"
batch_size = 1
optimizer = dict(
    auxiliary=dict(type="SGD", lr=3e-5, modules=["watchers"]),
    student=dict(type="SGD", lr=3e-5, modules=["denoiser"]),
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
        weight="exp/semantic_kitti/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher.py",
        train_if_missing=True,
    ),
    steps=8,
    guidance=3.5,
)
