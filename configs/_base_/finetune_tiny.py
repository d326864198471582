"""Fine-tuning in the tiny family: 300 steps of two scans for every fraction of the labels, two minutes on one core.

AdamW and one cycle, as in the rest of the family, in place of the published SGD, which learns slower in so few steps.
"""

_base_ = ["cpu_minutes.py"]

num_worker = 0
eval_epoch = 1
optimizer = dict(lr=0.016)
scheduler = dict(max_lr=0.016)
hooks = [
    dict(type="kd.PretrainedBackbone", required=True),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter", log_interval=50),
    dict(type="kd.SemSegEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=None),
    dict(type="kd.PreciseEvaluator", test_last=True),
]
