"""`cylinder3d_to_polarnet_tiny.py` with labels and features of the finest level weighted by label alone."""

_base_ = ["cylinder3d_to_polarnet_tiny.py"]

save_path = "exp/sim_tiny/cylinder3d_to_polarnet_labels"
model = dict(terms=dict(logits=None, enc2=None, enc8=None, dec8=None, dec2=None))
