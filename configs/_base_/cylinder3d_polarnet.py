"""Cylinder3D (arXiv:2011.10033) of 55.9 M parameters and PolarNet (arXiv:2003.14032) of 13.6 M, for SemanticKITTI.

Both have a class 0 "unlabelled" before the 19, as the released weights do. Each has the range its own released weights
were trained with; `kd.Cylinder3D` says what `kernel_mode` is about.

The losses of arXiv:2304.11393 are in two settings, docs/methods/bev_kd.md: `bev_terms` lead from one network's cells to
the other's through the points, so that each may have a range of its own, and over occupied cells, with weights chosen
on the simulated streets; `bev_paper_terms` are cell to cell and count empty cells, as published. Taps are called by the
path, encoder or decoder, and by the number of finest cells that one of theirs spans in the plane.
"""

# Share of each class in the points of the training sequences: unlabelled, then the 19.
frequencies = [
    0.03150183,
    0.04260783,
    0.00016610,
    0.00039839,
    0.00216494,
    0.00180706,
    0.00033758,
    0.00012711,
    0.00003746,
    0.19879648,
    0.01471717,
    0.14392298,
    0.00390486,
    0.13268620,
    0.07235923,
    0.26681501,
    0.00603501,
    0.07814222,
    0.00285550,
    0.00061560,
]

teacher_model = dict(
    type="kd.VoxelSegmentor",
    void_class=True,
    backbone=dict(
        type="kd.Cylinder3D",
        in_channels=4,
        num_classes=20,
        partition=dict(
            low=(0.0, -3.1415926, -4.0),
            high=(50.0, 3.1415926, 2.0),
            shape=(480, 360, 32),
            spacing="n_minus_1",
        ),
        voxel_channels=16,
        width=32,
        kernel_mode="intended",
    ),
    criteria=[
        dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=0),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=0),
    ],
)

student_model = dict(
    type="kd.VoxelSegmentor",
    void_class=True,
    backbone=dict(
        type="kd.PolarNet",
        in_channels=4,
        num_classes=20,
        partition=dict(
            low=(3.0, -3.141592653589793, -3.0),
            high=(50.0, 3.141592653589793, 1.5),
            shape=(480, 360, 32),
            spacing="n_minus_1",
        ),
    ),
    criteria=[
        # Rare classes count more, as in the published training: 1 / (share + 0.001).
        dict(
            type="CrossEntropyLoss",
            loss_weight=1.0,
            ignore_index=0,
            weight=[round(1 / (share + 0.001), 4) for share in frequencies],
        ),
        dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=0),
    ],
)


teacher_taps = dict(
    cells="backbone.partition",
    enc2="backbone.cylinder_3d_spconv_seg.resBlock2.pool",
    enc8="backbone.cylinder_3d_spconv_seg.resBlock4.pool",
    dec8="backbone.cylinder_3d_spconv_seg.upBlock0",
    dec2="backbone.cylinder_3d_spconv_seg.upBlock2",
    dec1="backbone.cylinder_3d_spconv_seg.ReconNet",
)
student_taps = dict(
    cells="backbone.partition",
    enc2="backbone.BEV_model.network.down1",
    enc8="backbone.BEV_model.network.down3",
    dec8="backbone.BEV_model.network.up1",
    dec2="backbone.BEV_model.network.up3",
    dec1="backbone.BEV_model.network.up4",
)

__points = dict(correspondence="points", teacher_cells="cells")
__cells = dict(correspondence="cells")
__enc2 = dict(type="kd.VoxelToPillar", tap="enc2", channels=(128, 64), student_stride=(2, 2))
__enc8 = dict(type="kd.VoxelToPillar", tap="enc8", channels=(512, 256), student_stride=(8, 8))
__dec8 = dict(type="kd.VoxelToPillar", tap="dec8", channels=(256, 512), student_stride=(8, 8))
__dec2 = dict(type="kd.VoxelToPillar", tap="dec2", channels=(64, 128), student_stride=(2, 2))
__dec1 = dict(type="kd.LabelWeight", tap="dec1", channels=(64, 64), student_stride=(1, 1))
bev_terms = dict(
    logits=dict(type="kd.LogitKL", temperature=2.0, weight=1.0),
    enc2=dict(teacher_stride=(2, 2, 2), **__enc2, **__points, mask="occupied", weight=0.2),
    enc8=dict(teacher_stride=(8, 8, 4), **__enc8, **__points, mask="occupied", weight=0.2),
    dec8=dict(teacher_stride=(8, 8, 4), **__dec8, **__points, mask="occupied", weight=0.2),
    dec2=dict(teacher_stride=(2, 2, 2), **__dec2, **__points, mask="occupied", weight=0.2),
    labels=dict(
        teacher_stride=(1, 1, 1),
        frequencies=frequencies[1:],
        **__dec1,
        **__points,
        void_frequency=frequencies[0],
        weight=0.05,
    ),
)
bev_paper_terms = dict(
    # Over the whole volume, which the student scores for it: `dense_head`, and a tap `scores` at both heads.
    logits=dict(
        type="kd.DenseLogitKL",
        tap="scores",
        num_classes=20,
        temperature=10.0,
        threshold=0.01,
        weight=1.0,
    ),
    enc2=dict(teacher_stride=(2, 2, 2), **__enc2, **__cells, mask="all", weight=2.0),
    enc8=dict(teacher_stride=(8, 8, 4), **__enc8, **__cells, mask="all", weight=2.0),
    dec8=dict(teacher_stride=(8, 8, 4), **__dec8, **__cells, mask="all", weight=2.0),
    dec2=dict(teacher_stride=(2, 2, 2), **__dec2, **__cells, mask="all", weight=2.0),
    labels=dict(
        teacher_stride=(1, 1, 1),
        frequencies=frequencies[1:],
        **__dec1,
        **__cells,
        void_frequency=frequencies[0],
        weight=2.0,
    ),
)
