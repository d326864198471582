"""The two networks of `ptv3_pair.py` with a head for nuScenes' 16 classes."""

_base_ = ["ptv3_pair.py"]

teacher_model = dict(num_classes=16)
student_model = dict(num_classes=16)
