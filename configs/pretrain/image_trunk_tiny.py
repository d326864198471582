"""The tiny image network on weak labels of the simulated streets; its trunk teaches the tiny pre-training runs."""

_base_ = ["../_base_/image_trunk_tiny.py"]

save_path = "exp/sim_tiny/image_trunk"
model = {{_base_.image_model}}
