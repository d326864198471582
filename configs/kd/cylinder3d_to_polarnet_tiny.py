"""`cylinder3d_to_polarnet.py` at the size of the demo and on its streets: minutes on two CPU cores.

The teacher knows three fully labelled drives; the student sees three others with one point in a hundred labelled.
Siblings: `_logits`, `_voxels` and `_labels`, one of the three kinds of terms each.
"""

_base_ = [
    "../_base_/sim_tiny_points.py",
    "../_base_/cylinder3d_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/cylinder3d_to_polarnet"
epoch = 16  # a bird's-eye U-Net learns slower than the networks of points
eval_epoch = 4
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = dict(
    type="kd.Distiller",
    teacher_cache=None,
    student=dict(model={{_base_.student_model}}, taps={{_base_.student_taps}}),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps={{_base_.teacher_taps}},
        weight="exp/sim_tiny/semseg-cylinder3d-0-base/model/model_last.pth",
        config="configs/sim/semseg-cylinder3d-0-base_tiny.py",
        train_if_missing=True,
    ),
    terms={{_base_.bev_terms}},
)
