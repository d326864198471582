"""SLidR: contrast between superpixels. Simulated streets, tiny."""

_base_ = ["../_base_/image_to_lidar_tiny.py"]

save_path = "exp/sim_tiny/pretrain_slidr"
data = dict(
    train=dict(transform={{_base_.voxels_superpixels.train}}, superpixels=True),
    val=dict(transform={{_base_.voxels_superpixels.evaluate}}, superpixels=True),
    test=dict(transform={{_base_.voxels_superpixels.evaluate}}, superpixels=True),
)
model = dict(
    type="kd.ImageToLidar",
    student={{_base_.networks.unet}},
    image={{_base_.networks.image}},
    terms={{_base_.slidr_terms}},
)
