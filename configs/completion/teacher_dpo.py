"""Diffusion-DPO (arXiv:2311.12908) of the completion teacher: it learns to prefer the better of its own completions.

A student learns from it with `model.teacher.weight=exp/semantic_kitti/completion_teacher_dpo/model/student_last.pth`
and `model.teacher.config=configs/completion/teacher_dpo.py`. Rate and length are choices of this package: none are
published.
"""

_base_ = ["../_base_/completion.py"]

save_path = "exp/semantic_kitti/completion_teacher_dpo"
batch_size = 1
epoch = 2
eval_epoch = 2
clip_grad = 1.0
optimizer = dict(type="Adam", lr=2e-7)
scheduler = dict(type="MultiStepLR", milestones=[1.0], gamma=1.0)  # constant
model = dict(
    type="kd.PreferenceAlignment",
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/semantic_kitti/completion_teacher/model/model_last.pth",
        config="configs/completion/teacher.py",
        train_if_missing=True,
    ),
    beta=2000.0,
    pair_steps=8,
    pair_guidance=6.0,
)
