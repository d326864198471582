"""As the tiny one, with labels for one point in a hundred of the student's scans; the teacher had all of them."""

_base_ = ["sphereformer_to_fusion_tiny.py"]

save_path = "exp/sim_nus_tiny/sphereformer_to_fusion_few"
data = dict(train=dict(source=dict(label_fraction=0.01)))
model = dict(
    terms=dict(
        bottleneck=None,
        # Where points have no label, the student's own losses follow the teacher's classes.
        pseudo=dict(
            type="kd.PseudoLabels",
            criteria=[
                dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
                dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
            ],
            weight=1.0,
        ),
    ),
)
