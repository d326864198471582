"""The losses of arXiv:2505.08101 on the simulated streets: Chamfer between unscaled diagrams, published weights."""

_base_ = ["ptv3_to_student.py"]

save_path = "exp/sim/ptv3_to_student_paper"
model = dict(terms={{_base_.paper_terms}})
