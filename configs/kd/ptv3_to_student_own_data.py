"""A teacher and its student on scans of your own; docs/own_data.md goes through it."""

_base_ = ["../_base_/own_data.py", "../_base_/cpu_minutes.py"]

save_path = "exp/own_data/ptv3_to_student"
epoch = 30
model = dict(
    type="kd.Distiller",
    student=dict(model={{_base_.student_model}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        weight="exp/own_data/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/own_data/semseg-pt-v3m1-0-base.py",
        train_if_missing=True,
    ),
    terms=dict(logits=dict(type="kd.LogitKL", temperature=1.0, weight=1.0)),
)
