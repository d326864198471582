"""U2MKD: a LiDAR teacher of many sweeps teaches a LiDAR-camera student of one (setting "star"). SemanticKITTI."""

_base_ = [
    "../_base_/semantic_kitti_views.py",
    "../_base_/sphereformer_fusion_semantic_kitti.py",
    "../_base_/fusion_schedule.py",
]

save_path = "exp/semantic_kitti/sphereformer_to_fusion"
data = dict(train=dict(source={{_base_.two_views_source}}, transform={{_base_.two_views_train}}))
model = dict(
    type="kd.Distiller",
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        view="teacher_",
        weight="exp/semantic_kitti/semseg-sphereformer-0-base/model/model_last.pth",
        config="configs/fusion/semseg-sphereformer-0-base_semantic_kitti.py",
        train_if_missing=True,
    ),
    terms={{_base_.star_terms}},
)
