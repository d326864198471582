"""Scene completion on the simulated streets, tiny: 4,000 points from 400, networks of a quarter of the width.

`python tools/prepare_data.py maps --data-root data/sim` makes the maps. Cells of 0.2 m: so few points would fill no
neighbouring ones of 0.05 m.
"""

_base_ = ["completion.py"]

__scans = dict(data_root="data/sim", points=4000)
data = dict(
    train=dict(sequences=["00", "01", "02", "03", "04", "05"], **__scans), val=__scans, test=__scans
)
teacher_model = dict(
    encoder=dict(cr=0.25, voxel_size=0.2),
    denoiser=dict(cr=0.25, voxel_size=0.2),
)
epoch = 12
eval_epoch = 4
num_worker = 0
