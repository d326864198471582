"""The tiny teacher on a dozen real scans."""

_base_ = [
    "../_base_/semantic_kitti_samples.py",
    "../_base_/ptv3_pair_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/samples/semseg-pt-v3m1-0-base"
batch_size_val = 1
epoch = 24
eval_epoch = 4
model = {{_base_.teacher_model}}
