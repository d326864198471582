"""The PTv3 pair at a size that two CPU cores train in minutes; four levels, patches of 128."""

_base_ = ["ptv3_pair.py"]

teacher_model = dict(
    backbone_out_channels=48,
    backbone=dict(
        stride=(2, 2, 2),
        enc_depths=(1, 1, 2, 1),
        enc_channels=(32, 64, 96, 128),
        enc_num_head=(2, 4, 6, 8),
        enc_patch_size=(128, 128, 128, 128),
        dec_depths=(1, 1, 1),
        dec_channels=(48, 64, 96),
        dec_num_head=(3, 4, 6),
        dec_patch_size=(128, 128, 128),
        drop_path=0.1,
    ),
)

student_model = dict(
    backbone_out_channels=16,
    backbone=dict(
        stride=(2, 2, 2),
        enc_depths=(1, 1, 1, 1),
        enc_channels=(8, 16, 32, 48),
        enc_num_head=(1, 1, 2, 3),
        enc_patch_size=(128, 128, 128, 128),
        dec_depths=(1, 1, 1),
        dec_channels=(16, 16, 32),
        dec_num_head=(1, 1, 2),
        dec_patch_size=(128, 128, 128),
        drop_path=0.0,
    ),
)
