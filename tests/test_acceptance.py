"""The host contract, line by line, against numbers that Pointcept 1.7.0 printed for the same inputs.

`tests/vectors/README.md` says what each file holds. What needs a checkout of Pointcept is in `tests/contract`.
"""

import ast
import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pointcept_kd  # noqa: F401  (registers all types)
import pointcept_kd.host as host
from pointcept_kd.data.semantic_kitti import LEARNING_MAP
from pointcept_kd.host import LOSSES, MODELS, TESTERS, TRAINERS, kd
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.dialect import parse_options, run_custom_imports
from pointcept_kd.host.loader import Compose
from pointcept_kd.host.point import Point
from pointcept_kd.host.runtime import complete, launch, read_config
from pointcept_kd.host.solver import CosineScheduler, build_scheduler
from pointcept_kd.host.trainer import Trainer
from pointcept_kd.ops import curves

from .host.tiny import tiny_config
from .vectors import cases

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(__file__).resolve().parent / "vectors"
REGISTRIES = (
    "MODELS", "MODULES", "LOSSES", "DATASETS", "TRANSFORMS", "HOOKS", "TRAINERS", "TESTERS", "OPTIMIZERS",
    "SCHEDULERS",
)  # fmt: skip


def stored(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


# ---- one config: training, evaluation, test, checkpoint ------------------------------------------

SETTINGS = '''
weight = None
resume = False
evaluate = True
test_only = False
seed = 5
save_path = "{save_path}"
num_worker = 1
batch_size = 2
gradient_accumulation_steps = 1
batch_size_val = None
batch_size_test = None
epoch = 1
eval_epoch = 1
clip_grad = None
sync_bn = False
enable_amp = False
amp_dtype = "float16"
empty_cache = False
empty_cache_per_epoch = False
find_unused_parameters = False
enable_wandb = False
wandb_project = "pointcept"
wandb_key = None
mix_prob = 0.8
param_dicts = [dict(keyword="block", lr=0.0002)]
hooks = [
    dict(type="CheckpointLoader"),
    dict(type="ModelHook"),
    dict(type="IterationTimer", warmup_iter=2),
    dict(type="InformationWriter"),
    dict(type="SemSegEvaluator"),
    dict(type="CheckpointSaver", save_freq=None),
    dict(type="PreciseEvaluator", test_last=False),
]
train = dict(type="DefaultTrainer")
test = dict(type="SemSegTester", verbose=True)
model = {model}
optimizer = dict(type="AdamW", lr=0.002, weight_decay=0.005)
scheduler = dict(
    type="OneCycleLR",
    max_lr=[0.002, 0.0002],
    pct_start=0.04,
    anneal_strategy="cos",
    div_factor=10.0,
    final_div_factor=100.0,
)
data = dict(
    num_classes=19,
    ignore_index=-1,
    names={names},
    train=dict(split="train", transform={train}, test_mode=False, **{scans}),
    val=dict(split="val", transform={val}, test_mode=False, **{scans}),
    test=dict(
        split="val",
        transform=[
            dict(type="Copy", keys_dict={{"segment": "origin_segment"}}),
            dict(type="GridSample", grid_size=0.025, hash_type="fnv", mode="train", return_inverse=True),
        ],
        test_mode=True,
        test_cfg=dict(
            voxelize=dict(
                type="GridSample", grid_size=0.05, hash_type="fnv", mode="test", return_grid_coord=True
            ),
            crop=None,
            post_transform=[
                dict(type="ToTensor"),
                dict(
                    type="Collect",
                    keys=("coord", "grid_coord", "index"),
                    feat_keys=("coord", "strength"),
                ),
            ],
            aug_transform=[
                [dict(type="RandomRotateTargetAngle", angle=[0], axis="z", center=[0, 0, 0], p=1)],
                [dict(type="RandomFlip", p=1)],
            ],
        ),
        **{scans},
    ),
)
'''  # fmt: skip


def write_scans(root):
    """Four training scans and two validation scans in the layout of SemanticKITTI."""
    known = np.array([key for key in LEARNING_MAP if key > 1], dtype=np.uint32)
    for sequence, count in (("00", 4), ("08", 2)):
        folder = root / "dataset" / "sequences" / sequence
        (folder / "velodyne").mkdir(parents=True)
        (folder / "labels").mkdir()
        for number in range(count):
            rng = np.random.RandomState(number)
            points = rng.randn(700, 4) * [0.6, 0.6, 0.1, 0.1]
            points.astype(np.float32).tofile(folder / "velodyne" / f"{number:06d}.bin")
            chosen = known[rng.randint(0, len(known), 700)]
            chosen.tofile(folder / "labels" / f"{number:06d}.label")


def network(classes):
    return {**cases.ptv3(), "num_classes": classes}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config of Pointcept's names alone, trained for two iterations, evaluated and tested."""
    folder = tmp_path_factory.mktemp("run")
    write_scans(folder / "data")
    scans = dict(type="SemanticKITTIDataset", data_root=str(folder / "data"), ignore_index=-1)
    path = folder / "config.py"
    path.write_text(
        SETTINGS.format(
            save_path=folder / "exp",
            model=network(19),
            names=[f"class {i}" for i in range(19)],
            train=cases.PIPELINES["nuScenes train"],
            val=cases.PIPELINES["nuScenes val"],
            scans=scans,
        )
    )
    cfg = read_config(path)
    cfg.merge_from_dict(dict(device="cpu"))
    trainer = TRAINERS.build(dict(type="DefaultTrainer", cfg=cfg))
    trainer.train()
    return folder, trainer


def test_two_iterations_an_evaluation_and_a_test(run):
    folder, trainer = run
    assert len(trainer.train_loader) == 2
    assert 0 <= trainer.best_metric_value <= 1
    saved = load_checkpoint(folder / "exp" / "model" / "model_best.pth")
    steps = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == {2}
    text = "".join(path.read_text() for path in (folder / "exp").rglob("*.log"))
    assert "Val result: mIoU/mAcc/allAcc" in text


def test_checkpoint_has_pointcepts_keys(run):
    folder, _ = run
    saved = load_checkpoint(folder / "exp" / "model" / "model_last.pth")
    keys = ["epoch", "state_dict", "optimizer", "scheduler", "scaler", "best_metric_value"]
    assert set(keys) <= set(saved)
    assert saved["epoch"] == 1
    assert set(saved["optimizer"]) == {"state", "param_groups"}
    assert [len(saved["optimizer"]["param_groups"])] == [2]
    expected = stored("networks")["PT-v3m1"]["keys"]
    shapes = {key: list(value.shape) for key, value in saved["state_dict"].items()}
    assert set(shapes) == set(expected)
    other = {key for key in shapes if shapes[key] != expected[key]}
    assert other == {"seg_head.weight", "seg_head.bias"}  # 19 classes here, 5 in the vector
    fresh = MODELS.build(network(19))
    fresh.load_state_dict(saved["state_dict"], strict=True)


def test_tester_runs_the_saved_checkpoint(run):
    folder, trainer = run
    cfg = copy.deepcopy(trainer.cfg)
    cfg.merge_from_dict(
        dict(weight=str(folder / "exp/model/model_best.pth"), save_path=str(folder / "again"))
    )
    tester = TESTERS.build(dict(cfg=complete(cfg), **cfg["test"]))
    tester.test()
    made = [path for path in (folder / "again").rglob("*.npy") if "_pred" in path.name]
    assert len(made) == 2
    for path in made:
        # One class per row of the cloud after the first voxel grid of the test chain.
        classes = np.load(path)
        assert classes.ndim == 1
        assert 0 < len(classes) <= 700
        assert set(np.unique(classes)) <= set(range(19))


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_logits_are_pointcepts(name):
    expected = stored("networks")[name]
    model = cases.fill(MODELS.build(copy.deepcopy(cases.NETWORKS[name]))).eval()
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == expected["keys"]
    with torch.no_grad():
        result = model(cases.voxels())
    logits = result["seg_logits"]
    np.testing.assert_allclose(logits[::20], expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.double().mean(0), expected["mean"], rtol=0, atol=1e-5)
    assert result["loss"].item() == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_gradients_are_pointcepts(name):
    """In training form: batch statistics, cross entropy and Lovasz."""
    expected = stored("networks")[name]
    model = cases.fill(MODELS.build(copy.deepcopy(cases.NETWORKS[name]))).train()
    result = model(cases.voxels())
    assert result["loss"].item() == pytest.approx(expected["train loss"], abs=1e-4)
    result["loss"].backward()
    parameters = dict(model.named_parameters())
    norms = {key: float(parameters[key].grad.double().norm()) for key in expected["gradient norms"]}
    assert len(norms) > 10
    largest = max(expected["gradient norms"].values())
    assert norms == pytest.approx(expected["gradient norms"], rel=1e-3, abs=1e-5 * largest)


@pytest.mark.parametrize("name", cases.FULL_SIZE)
def test_full_size_keys_are_pointcepts(name):
    expected = stored("full_size")[name]
    with torch.device("meta"):
        model = MODELS.build(copy.deepcopy(cases.FULL_SIZE[name]))
    state = model.state_dict()
    text = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    assert len(state) == expected["entries"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]


# ---- transforms ----------------------------------------------------------------------------------


def check_array(array, expected, where):
    if isinstance(expected, str):
        assert array == expected, where
        return
    array = np.asarray(array)
    assert str(array.dtype) == expected["dtype"], where
    assert list(array.shape) == expected["shape"], where
    if "sha256" in expected:
        digest = hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()
        assert digest == expected["sha256"], where
        return
    rows = array.reshape(len(array), -1).astype(np.float64)
    chosen = rows[:: max(1, len(rows) // 6)][:6]
    # Sines and fused operations may differ by a rounding between processors.
    np.testing.assert_allclose(chosen, expected["rows"], rtol=1e-6, atol=2e-6, err_msg=where)
    assert rows.sum() == pytest.approx(expected["sum"], rel=1e-6, abs=1e-6 * rows.size), where


@pytest.mark.parametrize("name", stored("transforms"))
def test_pipelines_give_pointcepts_arrays(name):
    expected = stored("transforms")[name]
    chain, seed = name.rsplit(" / ", 1)
    cases.seed(int(seed))
    result = Compose(copy.deepcopy(cases.PIPELINES[chain]))(cases.scan())
    assert cases.generators() == expected["after"]  # every draw was made, and no other
    assert len(expected["arrays"]) >= 2
    for key, value in expected["arrays"].items():
        check_array(result[key], value, f"{name}: {key}")
    if not chain.startswith("cells"):
        lists = {"index_valid_keys", "view1_index_valid_keys", "view2_index_valid_keys"}
        assert set(result) - lists == set(expected["arrays"])


def test_every_pipeline_is_stored():
    assert {name.rsplit(" / ", 1)[0] for name in stored("transforms")} == set(cases.PIPELINES)


# ---- serialisation -------------------------------------------------------------------------------

TABLE = {  # voxel: z, z-trans, hilbert, hilbert-trans at depth 3
    (0, 0, 0): (0, 0, 0, 0),
    (1, 0, 0): (4, 2, 1, 7),
    (0, 1, 0): (2, 4, 7, 1),
    (0, 0, 1): (1, 1, 3, 3),
    (1, 1, 1): (7, 7, 5, 5),
    (3, 5, 6): (238, 350, 176, 400),
    (7, 7, 7): (511, 511, 365, 365),
    (6, 2, 5): (369, 241, 389, 167),
}


def codes(cells, batch, depth, order):
    return curves.encode(cells, batch, depth, order).tolist()


@pytest.mark.parametrize("column", range(4), ids=cases.ORDERS)
def test_codes_of_depth_three(column):
    cells = torch.tensor(list(TABLE))
    expected = [row[column] for row in TABLE.values()]
    assert codes(cells, torch.zeros(8).long(), 3, cases.ORDERS[column]) == expected
    one = torch.ones(1).long()
    assert codes(torch.zeros(1, 3).long(), one, 3, cases.ORDERS[column]) == [512]


@pytest.mark.parametrize("depth", cases.DEPTHS)
def test_codes_are_pointcepts(depth):
    cells, batch = cases.cells(depth)
    for order, expected in stored("codes")[str(depth)].items():
        assert codes(cells, batch, depth, order) == expected, order


def test_depth_is_pointcepts():
    for largest, depth in stored("codes")["largest cell to depth"].items():
        grid = torch.tensor([[0, 0, 0], [int(largest), 0, 0]])
        point = Point(dict(grid_coord=grid, offset=torch.tensor([2]), feat=torch.zeros(2, 1)))
        point.serialization(order=("z",))
        assert point["serialized_depth"] == depth, largest


# ---- losses and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.LOSSES)
def test_losses_are_pointcepts(name):
    expected = stored("losses")[name]
    pred, target = cases.loss_input(name)
    pred.requires_grad_()
    loss = LOSSES.build(copy.deepcopy(cases.LOSSES[name]))(pred, target)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert pred.grad.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
    rows = pred.grad.reshape(len(pred), -1)[:4].reshape(-1)
    np.testing.assert_allclose(rows, expected["gradient"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_schedules_are_pointcepts(name):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [dict(params=[w], lr=lr) for w, lr in zip(weights, (0.002, 0.0002))]
    optimizer = torch.optim.AdamW(groups)
    scheduler = build_scheduler({**cases.SCHEDULES[name], "total_steps": cases.STEPS}, optimizer)
    rates = []
    for step in range(cases.STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if step < cases.STEPS - 1:
            scheduler.step()
    np.testing.assert_allclose(rates[::3], stored("schedules")[name], rtol=1e-6)


def test_cosine_scheduler_is_pointcepts():
    scheduler = CosineScheduler(**cases.COSINE)
    values = [scheduler.get(step) for step in range(cases.STEPS)]
    np.testing.assert_allclose(values, stored("schedules")["CosineScheduler"], rtol=1e-6)


# ---- configs -------------------------------------------------------------------------------------


def plain(value):
    """Plain dicts and lists, for an exact comparison."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(inner) for inner in value)
    return value


@pytest.mark.parametrize("name", cases.DIALECT)
def test_dialect_is_pointcepts(name, tmp_path):
    files, main, options = cases.DIALECT[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    cfg = Config.fromfile(str(tmp_path / main))
    cfg.merge_from_dict(parse_options(options))
    expected = ast.literal_eval(stored("dialect")[name])
    assert repr(plain(dict(cfg))) == repr(expected)  # repr tells 1 from 1.0 and lists from tuples


# ---- two processes -------------------------------------------------------------------------------


def types():
    """Every registered name, by registry."""
    found = {name: sorted(getattr(host, name).names()) for name in REGISTRIES}
    found |= {f"kd.{name}": sorted(getattr(kd, name).names()) for name in REGISTRIES}
    return found


def write_types(cfg):
    """What the entry tools do first in every process; then the names this process knows."""
    run_custom_imports(cfg["custom_imports"], "config")
    rank = torch.distributed.get_rank()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    found = {"processes": int(total), "backend": torch.distributed.get_backend(), "types": types()}
    (Path(cfg["folder"]) / f"{rank}.json").write_text(json.dumps(found))


def test_two_spawned_processes_find_all_types(tmp_path):
    imports = dict(imports=["tests.host.tiny"], allow_failed_imports=False)
    launch(write_types, 2, dict(device="cpu", folder=str(tmp_path), custom_imports=imports))
    expected = types()
    assert "TinyNet" in expected["kd.MODELS"]
    assert {"PT-v3m1", "SpUNet-v1m1", "DefaultSegmentorV2"} <= set(expected["MODELS"])
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["processes"], found["backend"]) == (2, "gloo")
        for registry, names in found["types"].items():
            # Other test modules may have registered more in this process.
            assert set(names) <= set(expected[registry])
            own = [n for n in expected[registry] if is_ours(registry, n)]
            assert set(own) <= set(names), registry


def is_ours(registry, name):
    scope = kd if registry.startswith("kd.") else host
    kind = getattr(scope, registry.removeprefix("kd.")).get(name)
    return kind.__module__.startswith(("pointcept_kd", "tests.host.tiny"))


# ---- evaluation of batches -----------------------------------------------------------------------


def test_a_batch_of_two_gives_the_same_scores_as_two_batches(tmp_path):
    scores = []
    for size in (1, 2):
        cfg = tiny_config(
            tmp_path / str(size), batch_size_val=size, epoch=1, eval_epoch=1, mix_prob=0
        )
        cfg.data.val.count = 4
        trainer = Trainer(cfg)
        trainer.train()
        assert len(trainer.val_loader) == 4 // size
        scores.append(trainer.best_metric_value)
    assert 0 < scores[0] == scores[1] < 1
