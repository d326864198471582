"""The refiner of scene completion, LiDiff (arXiv:2403.13470), on SemanticKITTI: 21.7 M, six points for each.

There is no evaluation after an epoch: what a refiner is worth shows on completions (`tools/test.py`, test.refine).
"""

_base_ = ["../_base_/completion.py"]

save_path = "exp/semantic_kitti/completion_refiner"
data = dict(train=dict(type="kd.RefinementDataset", window=40))
model = dict(type="kd.CompletionRefinement", network=dict(type="kd.Refiner", cr=1.0))
evaluate = False
batch_size = 8
epoch = 5
eval_epoch = 5
optimizer = dict(type="Adam", lr=0.0001)
scheduler = dict(type="MultiStepLR", milestones=[1.0], gamma=1.0)  # constant
