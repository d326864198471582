"""`ptv3_to_student.py` at the size of the demo: minutes on two CPU cores.

One sequence of six is labelled, as in `configs/sim/*_tiny.py`. Scans are cheap and labels are not: on the other five the
student learns from the teacher's scores. It takes as many steps, on batches as large, as the student alone.
"""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_pair_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/ptv3_to_student"
data = dict(
    train=dict(
        sequences=["00", "01", "02", "03", "04", "05"],
        unlabelled=["01", "02", "03", "04", "05"],
    ),
)
epoch = 7  # 60 steps each
eval_epoch = 7
model = dict(
    type="kd.Distiller",
    student=dict(model={{_base_.student_model}}, taps=dict(bottleneck="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(bottleneck="backbone.enc"),
        weight="exp/sim_tiny/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/sim/semseg-pt-v3m1-0-base_tiny.py",
        train_if_missing=True,
    ),
    terms=dict(
        logits=dict(type="kd.LogitKL", temperature=2.0, weight=1.0),
        bottleneck=dict(
            type="kd.FeatureMatch",
            tap="bottleneck",
            distance="cosine",
            channels=(48, 128),
            weight=1.0,
        ),
    ),
)
