"""AdamW with one cycle per run; transformer blocks learn ten times slower than the rest (Pointcept's PTv3 recipe)."""

_base_ = ["runtime.py"]

batch_size = 12
mix_prob = 0.8
epoch = 50
eval_epoch = 50
optimizer = dict(type="AdamW", lr=0.002, weight_decay=0.005)
scheduler = dict(
    type="OneCycleLR",
    max_lr=[0.002, 0.0002],
    pct_start=0.04,
    anneal_strategy="cos",
    div_factor=10.0,
    final_div_factor=100.0,
)
param_dicts = [dict(keyword="block", lr=0.0002)]
