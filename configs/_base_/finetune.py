"""Fine-tuning of SLidR (arXiv:2203.16258), the head at a hundred times the rate of a pre-trained backbone.

The rate falls along half a cosine, once an epoch.
"""

_base_ = ["runtime.py"]

batch_size = 16
epoch = 50
eval_epoch = 10
sync_bn = True
optimizer = dict(type="SGD", lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.0001)
param_dicts = [dict(keyword="final", lr=2.0)]
scheduler = dict(type="kd.EpochCosineLR", epochs=50)
hooks = [
    dict(type="kd.PretrainedBackbone", required=True),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.SemSegEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=None),
    dict(type="kd.PreciseEvaluator", test_last=False),
]
