"""The teacher of `cylinder3d_polarnet.py` on PolarNet's range, as the published distillation runs it."""

_base_ = ["cylinder3d_polarnet.py"]

teacher_model = dict(backbone=dict(partition={{_base_.student_model.backbone.partition}}))
