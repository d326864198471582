"""PTv3 (46.2 M) teaches PolarNet (13.6 M) on SemanticKITTI: any network of points is a teacher of pillars.

Both see one voxel-sampled scan; features of the encoder's coarsest cells go to the pillars that their points lie in.
"""

_base_ = [
    "../_base_/semantic_kitti.py",
    "../_base_/ptv3_polarnet.py",
    "../_base_/adam_onecycle.py",
]

save_path = "exp/semantic_kitti/ptv3_to_polarnet"
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
        weight="exp/semantic_kitti/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/semantic_kitti/semseg-pt-v3m1-0-base.py",
        train_if_missing=True,
    ),
    terms=dict(
        logits=dict(type="kd.LogitKL", temperature=2.0, weight=1.0),
        pillars=dict(
            type="kd.VoxelToPillar",
            tap="enc8",
            teacher_tap="enc_out",
            channels=(512, 512),
            correspondence="points",
            student_stride=(8, 8),
            teacher_stride=(16, 16, 16),  # voxels per coarsest cell
            mask="occupied",
            weight=0.2,
        ),
    ),
)
