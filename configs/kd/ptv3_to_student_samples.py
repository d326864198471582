"""The tiny PTv3 pair on a dozen real SemanticKITTI scans, all labels, with the terms of `ptv3_to_student.py`."""

_base_ = ["ptv3_to_student_tiny.py"]

save_path = "exp/samples/ptv3_to_student"
batch_size_val = 1
epoch = 24
eval_epoch = 4
data = dict(
    train=dict(data_root="data/samples", sequences=["00", "04", "06", "07"], label_fraction=1.0),
    val=dict(data_root="data/samples", sequences=["08"]),
    test=dict(data_root="data/samples", sequences=["08"]),
)
model = dict(
    student=dict(taps=dict(bottleneck="backbone.enc")),
    teacher=dict(
        taps=dict(bottleneck="backbone.enc"),
        weight="exp/samples/semseg-pt-v3m1-0-base/model/model_last.pth",
        config="configs/semantic_kitti/semseg-pt-v3m1-0-base_samples.py",
    ),
    terms=dict(
        pseudo=None,
        bottleneck=dict(
            type="kd.FeatureMatch",
            tap="bottleneck",
            distance="cosine",
            channels=(48, 128),
            weight=1.0,
        ),
    ),
)
