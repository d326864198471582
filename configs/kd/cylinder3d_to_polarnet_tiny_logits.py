"""`cylinder3d_to_polarnet_tiny.py` with labels and class scores alone."""

_base_ = ["cylinder3d_to_polarnet_tiny.py"]

save_path = "exp/sim_tiny/cylinder3d_to_polarnet_logits"
model = dict(terms=dict(enc2=None, enc8=None, dec8=None, dec2=None, labels=None))
