"""Every runtime key of the host with the default that suits most runs. Names are Pointcept's."""

custom_imports = dict(imports=["pointcept_kd"], allow_failed_imports=False)

weight = None  # checkpoint to start from
resume = False  # go on from save_path/model/model_last.pth
evaluate = True
test_only = False
seed = 0
save_path = "exp/default"
device = None  # None: CUDA where there is one, else CPU
num_worker = 2
batch_size = 4
gradient_accumulation_steps = 1
batch_size_val = None
batch_size_test = None
epoch = 50
eval_epoch = 50
clip_grad = None
sync_bn = False  # several processes: batch normalisation over the points of all
global_loss = True  # several processes: means of losses over the points of all; False: each its own, as Pointcept
dist_timeout = 60  # minutes that a message between processes may take
enable_amp = False
amp_dtype = "float16"
empty_cache = False
empty_cache_per_epoch = False
find_unused_parameters = False
enable_wandb = False
wandb_project = "pointcept_kd"
wandb_key = None
mix_prob = 0
param_dicts = None
log_interval = 10

hooks = [
    dict(type="kd.CheckpointLoader"),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.SemSegEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=None),
    dict(type="kd.PreciseEvaluator", test_last=False),
]
train = dict(type="kd.Trainer")
test = dict(type="kd.SemSegTester", mode="single", verbose=True)
