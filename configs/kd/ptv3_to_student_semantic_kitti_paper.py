"""The losses of arXiv:2505.08101 on SemanticKITTI: Chamfer between unscaled diagrams, published weights."""

_base_ = ["ptv3_to_student_semantic_kitti.py"]

save_path = "exp/semantic_kitti/ptv3_to_student_paper"
model = dict(terms={{_base_.paper_terms}})
