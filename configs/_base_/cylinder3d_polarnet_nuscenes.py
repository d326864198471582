"""The two networks of `cylinder3d_polarnet.py` for nuScenes' 16 classes, with the range both were published with."""

_base_ = ["cylinder3d_polarnet.py"]

__partition = dict(
    low=(0.0, -3.141592653589793, -5.0),
    high=(50.0, 3.141592653589793, 3.0),
    shape=(480, 360, 32),
)
teacher_model = dict(backbone=dict(num_classes=17, partition=__partition))
student_model = dict(
    backbone=dict(num_classes=17, partition=__partition),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=0),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=0),
    ],
)
# No published shares of classes: they are counted while training.
bev_terms = dict(labels=dict(frequencies="running", num_classes=16))
