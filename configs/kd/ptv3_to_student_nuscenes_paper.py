"""The losses of arXiv:2505.08101 on nuScenes: Chamfer between unscaled diagrams, published weights."""

_base_ = ["ptv3_to_student_nuscenes.py"]

save_path = "exp/nuscenes/ptv3_to_student_paper"
model = dict(terms={{_base_.paper_terms}})
