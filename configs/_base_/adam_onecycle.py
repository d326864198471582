"""Adam with one cycle per run, batches of two: the recipe of Cylinder3D and PolarNet with a falling rate."""

_base_ = ["runtime.py"]

batch_size = 2
epoch = 40
eval_epoch = 40
optimizer = dict(type="Adam", lr=0.001)
scheduler = dict(
    type="OneCycleLR",
    max_lr=0.001,
    pct_start=0.04,
    anneal_strategy="cos",
    div_factor=10.0,
    final_div_factor=100.0,
)
