"""The pair of `sphereformer_fusion.py` for SemanticKITTI's 19 classes."""

_base_ = ["sphereformer_fusion.py"]

__branches = dict(lidar=dict(num_classes=19), camera=dict(num_classes=19))
teacher_model = dict(backbone=dict(num_classes=19))
student_model = __branches
wide_student_model = __branches
lidar_student_model = dict(lidar=dict(num_classes=19))
