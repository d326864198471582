"""The student on scans of your own, trained without a teacher."""

_base_ = ["semseg-pt-v3m1-0-base.py"]

save_path = "exp/own_data/semseg-pt-v3m1-1-student"
model = {{_base_.student_model}}
