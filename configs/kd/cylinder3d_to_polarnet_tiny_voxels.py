"""`cylinder3d_to_polarnet_tiny.py` with labels and features by pillar at four levels alone."""

_base_ = ["cylinder3d_to_polarnet_tiny.py"]

save_path = "exp/sim_tiny/cylinder3d_to_polarnet_voxels"
model = dict(terms=dict(logits=None, labels=None))
