"""`cylinder3d_to_polarnet.py` on nuScenes: the data, its 16 classes and the range; class shares counted on the way."""

_base_ = [
    "../_base_/nuscenes_points.py",
    "../_base_/cylinder3d_polarnet_nuscenes.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/nuscenes/cylinder3d_to_polarnet"
model = dict(
    type="kd.Distiller",
    teacher_cache=None,
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        weight="exp/nuscenes/semseg-cylinder3d-0-base/model/model_best.pth",
        config="configs/nuscenes/semseg-cylinder3d-0-base.py",
        train_if_missing=True,
    ),
    terms={{_base_.bev_terms}},
)
