"""`ptv3_to_student_tiny.py` on a dozen real SemanticKITTI scans through the real reader."""

_base_ = ["ptv3_to_student_tiny.py"]

save_path = "exp/samples/ptv3_to_student"
batch_size_val = 1
epoch = 60
eval_epoch = 6
data = dict(
    train=dict(data_root="data/samples", sequences=["00", "04", "06", "07"], unlabelled=[]),
    val=dict(data_root="data/samples", sequences=["08"]),
    test=dict(data_root="data/samples", sequences=["08"]),
)
model = dict(
    teacher=dict(
        weight="exp/samples/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/semantic_kitti/semseg-pt-v3m1-0-base_samples.py",
    )
)
