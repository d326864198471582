"""Linear probing of the tiny SR-UNet, `weight` or random, on 2 of the 120 simulated training scans."""

_base_ = ["semseg-sr-unet-2-probe_100pct_tiny.py"]

save_path = "exp/sim_tiny/semseg-sr-unet-2-probe_1pct"
epoch = 120
data = dict(train=dict(scans="configs/finetune/lists/sim_1pct.txt"))
