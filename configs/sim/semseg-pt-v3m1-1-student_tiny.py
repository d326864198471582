"""The tiny student on three other drives, one point in a hundred labelled, trained without a teacher."""

_base_ = ["semseg-pt-v3m1-0-base_tiny.py"]

save_path = "exp/sim_tiny/semseg-pt-v3m1-1-student"
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = {{_base_.student_model}}
