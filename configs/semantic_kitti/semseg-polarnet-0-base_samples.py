"""The tiny PolarNet on a dozen real scans, trained without a teacher."""

_base_ = [
    "../_base_/semantic_kitti_samples_points.py",
    "../_base_/cylinder3d_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/samples/semseg-polarnet-0-base"
batch_size_val = 1
epoch = 24
eval_epoch = 4
model = {{_base_.student_model}}
