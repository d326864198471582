"""The tiny student on the same labelled sequence, trained without a teacher."""

_base_ = ["semseg-pt-v3m1-0-base_tiny.py"]

save_path = "exp/sim_tiny/semseg-pt-v3m1-1-student"
model = {{_base_.student_model}}
