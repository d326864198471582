"""Cylinder3D (55.9 M) teaches PolarNet (13.6 M) on SemanticKITTI: a bird's-eye view from 3-D, arXiv:2304.11393.

The labels, the teacher's class scores, its features by pillar at four levels, and once more at the finest level with
rare classes and tall pillars weighing more; docs/methods/bev_kd.md. Trains on 00-07, 09, 10 alone; sequence 08 is for
validation. Siblings: `_paper`, the published losses on one shared grid; `_trainval`, for a submission; `_nuscenes`;
`_samples` and `_tiny`, minutes on a CPU. Each network alone: `configs/semantic_kitti/semseg-cylinder3d-0-base.py`,
`configs/semantic_kitti/semseg-polarnet-0-base.py`. Released weights of the teacher: `tools/convert.py cylinder3d`.
"""

_base_ = [
    "../_base_/semantic_kitti_points.py",
    "../_base_/cylinder3d_polarnet.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/cylinder3d_to_polarnet"
model = dict(
    type="kd.Distiller",
    teacher_cache=None,  # a folder: ask the teacher once per scan; docs/teacher_cache.md
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        weight="exp/semantic_kitti/semseg-cylinder3d-0-base/model/model_best.pth",
        config="configs/semantic_kitti/semseg-cylinder3d-0-base.py",
        train_if_missing=True,
    ),
    terms={{_base_.bev_terms}},
)
