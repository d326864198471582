"""Scene completion on SemanticKITTI: a scan and the map around it, 180,000 points from 18,000.

`python tools/prepare_data.py maps` makes the maps. Train on 00-07, 09, 10, validate on 08.
"""

_base_ = ["runtime.py"]

# Two underscores keep a name out of the config.
__train = [
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "complete", "name"),
        offset_keys_dict=dict(offset="coord", complete_offset="complete"),
    ),
]
__evaluate = [
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "target", "name"),
        offset_keys_dict=dict(offset="coord", target_offset="target"),
    ),
]
__scans = dict(type="kd.CompletionDataset", data_root="data/semantic_kitti", points=180000)

data = dict(
    num_classes=1,  # there are none; the trainer asks for the key
    ignore_index=-1,
    names=["scene"],
    train=dict(split="train", augment=True, transform=__train, **__scans),
    val=dict(split="val", test_mode=True, transform=__evaluate, **__scans),
    test=dict(split="val", test_mode=True, transform=__evaluate, **__scans),
)

teacher_model = dict(
    type="kd.DiffusionCompletion",
    encoder=dict(type="kd.ConditionEncoder", cr=1.0),
    denoiser=dict(type="kd.Denoiser", cr=1.0),
    repeat=10,
    steps=50,
    guidance=6.0,
)

batch_size = 2
epoch = 20
eval_epoch = 20
hooks = [
    dict(type="kd.CheckpointLoader"),
    dict(type="kd.ModelHook"),
    dict(type="kd.IterationTimer", warmup_iter=2),
    dict(type="kd.InformationWriter"),
    dict(type="kd.CompletionEvaluator"),
    dict(type="kd.CheckpointSaver", save_freq=None),
]
# None: as the model has it. See `tools/test.py`; several steps or seeds as lists.
test = dict(
    _delete_=True,
    type="kd.CompletionTester",
    verbose=True,
    steps=None,
    guidance=None,
    seeds=None,
    refine=None,
    save_predictions=False,
    folder=None,
    legacy=False,
    emd_points=0,
    threads=1,
    warmup=3,
)
