"""`ptv3_to_student.py` on nuScenes: the data, its 16 classes and the teacher trained on it differ; nothing else."""

_base_ = [
    "../_base_/nuscenes.py",
    "../_base_/ptv3_pair_nuscenes.py",
    "../_base_/topology_kd.py",
    "../_base_/adamw_onecycle.py",
]

save_path = "exp/nuscenes/ptv3_to_student"
enable_amp = True
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan, without the gradient term; docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps=dict(enc_out="backbone.enc")),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(enc_out="backbone.enc"),
        weight="exp/nuscenes/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/nuscenes/semseg-pt-v3m1-0-base.py",
        train_if_missing=True,
    ),
    terms={{_base_.recommended_terms}},
)
