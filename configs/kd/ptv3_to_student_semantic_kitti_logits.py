"""`ptv3_to_student_semantic_kitti_recommended.py` with labels and the teacher's class scores alone."""

_base_ = ["ptv3_to_student_semantic_kitti_recommended.py"]

save_path = "exp/semantic_kitti/ptv3_to_student_logits"
model = dict(terms=dict(gradient=None, topology=None))
