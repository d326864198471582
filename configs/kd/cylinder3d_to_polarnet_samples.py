"""The tiny pair on a dozen real SemanticKITTI scans, all labels: train on 00, 04, 06, 07, validate on 08."""

_base_ = [
    "../_base_/semantic_kitti_samples_points.py",
    "../_base_/cylinder3d_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/samples/cylinder3d_to_polarnet"
batch_size_val = 1
epoch = 24
eval_epoch = 4
model = dict(
    type="kd.Distiller",
    teacher_cache=None,
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        weight="exp/samples/semseg-cylinder3d-0-base/model/model_last.pth",
        config="configs/semantic_kitti/semseg-cylinder3d-0-base_samples.py",
        train_if_missing=True,
    ),
    terms={{_base_.bev_terms}},
)
