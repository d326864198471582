"""The losses of arXiv:2505.08101 on the Waymo Open Dataset: Chamfer between unscaled diagrams, published weights."""

_base_ = ["ptv3_to_student_waymo.py"]

save_path = "exp/waymo/ptv3_to_student_paper"
model = dict(terms={{_base_.paper_terms}})
