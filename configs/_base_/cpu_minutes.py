"""Schedule of the tiny family: one rate for all parameters, a few minutes on two CPU cores."""

_base_ = ["runtime.py"]

batch_size = 2
batch_size_val = 4
mix_prob = 0
sync_bn = True  # two processes take the same steps as one
epoch = 12
eval_epoch = 6
optimizer = dict(type="AdamW", lr=0.004, weight_decay=0.01)
scheduler = dict(
    type="OneCycleLR",
    max_lr=0.004,
    pct_start=0.1,
    anneal_strategy="cos",
    div_factor=10.0,
    final_div_factor=100.0,
)
