"""PTv3 (46.2 M) teaches a small PTv3 (2.78 M) on the simulated streets: class scores and bottleneck features.

The pair and the logit term are those of arXiv:2505.08101. Its siblings train the teacher and the student alone:
`configs/sim/semseg-pt-v3m1-0-base.py`, `configs/sim/semseg-pt-v3m1-1-student.py`.
"""

_base_ = [
    "../_base_/sim.py",
    "../_base_/ptv3_pair.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/sim/ptv3_to_student"
enable_amp = True
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan, docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps=dict(bottleneck="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(bottleneck="backbone.enc"),
        weight="exp/sim/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/sim/semseg-pt-v3m1-0-base.py",
        train_if_missing=True,
    ),
    terms=dict(
        logits=dict(type="kd.LogitKL", temperature=1.0, weight=0.3),
        bottleneck=dict(
            type="kd.FeatureMatch",
            tap="bottleneck",
            distance="cosine",
            channels=(128, 512),
            weight=1.0,
        ),
    ),
)
