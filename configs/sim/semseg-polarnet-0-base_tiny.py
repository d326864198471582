"""The tiny PolarNet on three other drives, one point in a hundred labelled, trained without a teacher."""

_base_ = [
    "../_base_/sim_tiny_points.py",
    "../_base_/cylinder3d_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/semseg-polarnet-0-base"
epoch = 16  # a bird's-eye U-Net learns slower than the networks of points
eval_epoch = 4
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = {{_base_.student_model}}
