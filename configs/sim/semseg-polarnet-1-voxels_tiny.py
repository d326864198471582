"""The tiny PolarNet on voxel-sampled scans, the student of `kd/ptv3_to_polarnet_tiny.py` trained without a teacher."""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/semseg-polarnet-1-voxels"
epoch = 16
eval_epoch = 4
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = {{_base_.student_model}}
