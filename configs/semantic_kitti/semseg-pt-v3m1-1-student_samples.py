"""The tiny student on a dozen real scans, trained without a teacher."""

_base_ = ["semseg-pt-v3m1-0-base_samples.py"]

save_path = "exp/samples/semseg-pt-v3m1-1-student"
model = {{_base_.student_model}}
