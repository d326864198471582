"""The pair as the published distillation runs it: the teacher on PolarNet's range, the student scoring every voxel."""

_base_ = ["cylinder3d_polarnet.py"]

teacher_model = dict(backbone=dict(partition={{_base_.student_model.backbone.partition}}))
student_model = dict(backbone=dict(dense_head=True))
teacher_taps = dict(scores="backbone.cylinder_3d_spconv_seg.logits")
student_taps = dict(scores="backbone.BEV_model.network.outc")
