"""All four losses on SemanticKITTI with the weights of docs/methods/topology_kd.md."""

_base_ = ["ptv3_to_student_semantic_kitti.py"]

save_path = "exp/semantic_kitti/ptv3_to_student_recommended"
model = dict(terms={{_base_.recommended_terms}})
