"""`cylinder3d_to_polarnet.py` with the published losses: one grid for both networks, cell to cell, empty cells counted.

The teacher sees the student's range and must have been trained with it. Constant rate, as published.
"""

_base_ = [
    "../_base_/semantic_kitti_points.py",
    "../_base_/cylinder3d_student_range.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/cylinder3d_to_polarnet_paper"
optimizer = dict(lr=0.0005)
scheduler = dict(_delete_=True, type="MultiStepLR", milestones=[1.0], gamma=1.0)
model = dict(
    type="kd.Distiller",
    teacher_cache=None,
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        weight="exp/semantic_kitti/semseg-cylinder3d-0-base_student_range/model/model_best.pth",
        config="configs/semantic_kitti/semseg-cylinder3d-0-base_student_range.py",
        train_if_missing=True,
    ),
    terms={{_base_.bev_paper_terms}},
)
