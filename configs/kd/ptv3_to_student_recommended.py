"""All four losses on the simulated streets with the weights of docs/methods/topology_kd.md."""

_base_ = ["ptv3_to_student.py"]

save_path = "exp/sim/ptv3_to_student_recommended"
model = dict(terms={{_base_.recommended_terms}})
