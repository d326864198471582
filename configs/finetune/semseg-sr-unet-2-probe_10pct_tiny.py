"""Linear probing of the tiny SR-UNet, `weight` or random, on 12 of the 120 simulated training scans."""

_base_ = ["semseg-sr-unet-2-probe_100pct_tiny.py"]

save_path = "exp/sim_tiny/semseg-sr-unet-2-probe_10pct"
epoch = 20
data = dict(train=dict(scans="configs/finetune/lists/sim_10pct.txt"))
