"""All four losses on nuScenes with the weights of docs/methods/topology_kd.md."""

_base_ = ["ptv3_to_student_nuscenes.py"]

save_path = "exp/nuscenes/ptv3_to_student_recommended"
model = dict(terms={{_base_.recommended_terms}})
