"""`ptv3_to_student_recommended.py` with labels, class scores and gradient-guided maps alone."""

_base_ = ["ptv3_to_student_recommended.py"]

save_path = "exp/sim/ptv3_to_student_gradient"
model = dict(terms=dict(topology=None))
