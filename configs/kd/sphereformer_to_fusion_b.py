"""U2MKD with a student as wide as its teacher (setting "B")."""

_base_ = [
    "../_base_/nuscenes_views.py",
    "../_base_/sphereformer_fusion.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/nuscenes/sphereformer_to_fusion_b"
data = dict(train=dict(source={{_base_.two_views_source}}, transform={{_base_.two_views_train}}))
model = dict(
    type="kd.Distiller",
    student=dict(model={{_base_.wide_student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        view="teacher_",
        weight="exp/nuscenes/semseg-sphereformer-0-base/model/model_last.pth",
        config="configs/fusion/semseg-sphereformer-0-base.py",
        train_if_missing=True,
    ),
    terms={{_base_.b_terms}},
)
