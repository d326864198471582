"""`ptv3_to_polarnet.py` at the size of the demo, with the demo's teacher and streets."""

_base_ = [
    "../_base_/sim_tiny.py",
    "../_base_/ptv3_polarnet_tiny.py",
    "../_base_/cpu_minutes.py",
]

save_path = "exp/sim_tiny/ptv3_to_polarnet"
epoch = 16
eval_epoch = 4
data = dict(train=dict(sequences=["03", "04", "05"], label_fraction=0.01))
model = dict(
    type="kd.Distiller",
    teacher_cache=None,
    student=dict(
        model={{_base_.student_model}},
        taps=dict(cells="backbone.partition", enc8="backbone.BEV_model.network.down3"),
    ),
    teacher=dict(
        model={{_base_.teacher_model}},
        taps=dict(enc_out="backbone.enc"),
        weight="exp/sim_tiny/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/sim/semseg-pt-v3m1-0-base_tiny.py",
        train_if_missing=True,
    ),
    terms=dict(
        logits=dict(type="kd.LogitKL", temperature=2.0, weight=1.0),
        pillars=dict(
            type="kd.VoxelToPillar",
            tap="enc8",
            teacher_tap="enc_out",
            channels=(128, 128),
            correspondence="points",
            student_stride=(8, 8),
            teacher_stride=(8, 8, 8),  # voxels per coarsest cell
            mask="occupied",
            weight=0.2,
        ),
    ),
)
