"""`refiner.py`, tiny, on the simulated streets."""

_base_ = ["../_base_/completion_tiny.py"]

save_path = "exp/sim_tiny/completion_refiner"
# A drive has 20 scans.
data = dict(train=dict(type="kd.RefinementDataset", window=10))
model = dict(
    type="kd.CompletionRefinement",
    network=dict(
        type="kd.Refiner",
        cr={{_base_.teacher_model.denoiser.cr}},
        voxel_size={{_base_.teacher_model.denoiser.voxel_size}},
    ),
)
evaluate = False
epoch = 12
eval_epoch = 12
optimizer = dict(type="Adam", lr=0.001)
scheduler = dict(type="MultiStepLR", milestones=[0.5, 0.75], gamma=0.5)
