"""`ptv3_to_student.py` on SemanticKITTI: the data, and the teacher trained on it, differ; nothing else."""

_base_ = ["ptv3_to_student.py"]

save_path = "exp/semantic_kitti/ptv3_to_student"
__scans = dict(type="SemanticKITTIDataset", data_root="data/semantic_kitti")
data = dict(train=__scans, val=__scans, test=__scans)
model = dict(
    teacher=dict(
        weight="exp/semantic_kitti/semseg-pt-v3m1-0-base/model/model_best.pth",
        config="configs/semantic_kitti/semseg-pt-v3m1-0-base.py",
    )
)
