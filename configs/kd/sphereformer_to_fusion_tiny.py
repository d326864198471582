"""U2MKD on simulated key frames of six cameras: minutes on two CPU cores."""

_base_ = [
    "../_base_/sim_views_tiny.py",
    "../_base_/sphereformer_fusion_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_nus_tiny/sphereformer_to_fusion"
data = dict(train=dict(source={{_base_.two_views_source}}, transform={{_base_.two_views_train}}))
model = dict(
    type="kd.Distiller",
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        view="teacher_",
        weight="exp/sim_nus_tiny/semseg-sphereformer-0-base/model/model_last.pth",
        config="configs/fusion/semseg-sphereformer-0-base_tiny.py",
        train_if_missing=True,
    ),
    terms={{_base_.star_terms}},
)
