"""The two networks of `ptv3_pair.py` with a head for Waymo's 22 classes."""

_base_ = ["ptv3_pair.py"]

teacher_model = dict(num_classes=22)
student_model = dict(num_classes=22)
