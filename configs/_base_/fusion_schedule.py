"""Schedule of doi:10.1109/TPAMI.2024.3451658: SGD with Nesterov, a short rise, half a cosine, once per update."""

_base_ = ["runtime.py"]

batch_size = 16
epoch = 50
eval_epoch = 25
optimizer = dict(type="SGD", lr=0.24, momentum=0.9, weight_decay=0.0001, nesterov=True)
scheduler = dict(type="kd.WarmupCosineLR", warmup_steps=250)
sync_bn = True
