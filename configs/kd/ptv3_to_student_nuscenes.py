"""`ptv3_to_student.py` on nuScenes: the data, its 16 classes and the teacher trained on it differ; nothing else."""

_base_ = [
    "../_base_/nuscenes.py",
    "../_base_/ptv3_pair_nuscenes.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/nuscenes/ptv3_to_student"
enable_amp = True
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan, docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps=dict(bottleneck="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(bottleneck="backbone.enc"),
        weight="exp/nuscenes/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/nuscenes/semseg-pt-v3m1-0-base.py",
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
