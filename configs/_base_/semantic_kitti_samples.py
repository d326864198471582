"""A dozen real SemanticKITTI scans: train on those of sequences 00, 04, 06, 07, validate on those of 08; 20 cm voxels.

For a look at real data in minutes on a CPU, not for numbers to quote.
"""

_base_ = ["sim_tiny.py"]

data = dict(
    train=dict(data_root="data/samples", sequences=["00", "04", "06", "07"], label_fraction=1.0),
    val=dict(data_root="data/samples", sequences=["08"]),
    test=dict(data_root="data/samples", sequences=["08"]),
)
