"""All four losses on the Waymo Open Dataset with the weights of docs/methods/topology_kd.md."""

_base_ = ["ptv3_to_student_waymo.py"]

save_path = "exp/waymo/ptv3_to_student_recommended"
model = dict(terms={{_base_.recommended_terms}})
