"""This package's built-in host beside the real Pointcept in one process: equal inputs give equal results.

Where versions of Pointcept differ, the tests look at what the checkout has, and at no version number.
"""

import copy
import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pointcept_kd.host as host
from pointcept_kd.data.arrays import INDEX_VALID_KEYS
from pointcept_kd.host import criteria, loader, point, solver
from pointcept_kd.host.config import Config
from pointcept_kd.host.hooks import SemSegEvaluator
from pointcept_kd.host.loader import Compose
from pointcept_kd.ops import curves

from ..vectors import cases
from . import scenes

pytestmark = pytest.mark.pointcept
FOLDERS = ("semantic_kitti", "nuscenes", "waymo")


def wrap(theirs, cfg):
    """Pointcept's constructors read nested configs by attribute, as its `Config` gives them."""
    return theirs.Config(dict(value=copy.deepcopy(cfg))).value


def parameters(kind):
    """Names that a constructor takes, those behind its `**kwargs` included."""
    names = set()
    for base in inspect.getmro(kind):
        if "__init__" not in vars(base) or base is object:
            continue
        signature = inspect.signature(base.__init__).parameters.values()
        names |= {p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return names - {"self"}


def accepts(kind, name):
    return name in parameters(kind)


def types_in(cfg):
    """Every `type` in a nested config."""
    if isinstance(cfg, dict):
        own = {cfg["type"]} if isinstance(cfg.get("type"), str) else set()
        return own.union(*(types_in(value) for value in cfg.values()))
    return set().union(*(types_in(item) for item in cfg)) if isinstance(cfg, (list, tuple)) else set()  # fmt: skip


def same(ours, other, where="", rtol=0.0, atol=0.0):
    """Equal in structure, type, shape and value; `rtol` and `atol` for floats."""
    if isinstance(other, dict):
        assert isinstance(ours, dict), where
        assert set(ours) == set(other), where
        for key in other:
            same(ours[key], other[key], f"{where}.{key}", rtol, atol)
    elif isinstance(other, (list, tuple)):
        assert isinstance(ours, (list, tuple)), where
        assert len(ours) == len(other), where
        for i, (one, two) in enumerate(zip(ours, other)):
            same(one, two, f"{where}[{i}]", rtol, atol)
    elif isinstance(other, (torch.Tensor, np.ndarray, np.generic)):
        assert type(ours) is type(other), where
        assert ours.dtype == other.dtype, where
        assert ours.shape == other.shape, where
        one, two = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (ours, other))
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, two, rtol, atol, err_msg=where)
        else:
            np.testing.assert_array_equal(one, two, err_msg=where)
    else:
        assert ours == other, where


# ---- networks ------------------------------------------------------------------------------------


def twins(theirs, cfg):
    """Both hosts' model of a config with equal weights, loaded strictly in both directions."""
    backbone = theirs.MODELS.get(cfg["backbone"]["type"])
    if not accepts(backbone, "enc_mode") and "enc_mode" in cfg["backbone"]:
        pytest.skip("this Pointcept's backbones have cls_mode in place of enc_mode")
    real = cases.fill(theirs.build_model(wrap(theirs, cfg)))
    ours = host.MODELS.build(copy.deepcopy(cfg))
    ours.load_state_dict(copy.deepcopy(real.state_dict()), strict=True)
    real.load_state_dict(copy.deepcopy(ours.state_dict()), strict=True)
    for module in real.modules():
        if hasattr(module, "shuffle_orders"):
            # Pointcept's backbone does not pass this on to its pooling layers, which shuffle all the same.
            module.shuffle_orders = cfg["backbone"]["shuffle_orders"]
    return ours, real


def copied(batch):
    return {key: value.clone() for key, value in batch.items()}


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_logits_losses_and_gradients(theirs, name):
    ours, real = twins(theirs, cases.NETWORKS[name])
    batch = cases.voxels()
    with torch.no_grad():
        one, two = ours.eval()(copied(batch)), real.eval()(copied(batch))
    assert two["seg_logits"].dtype == torch.float32
    same(one["seg_logits"], two["seg_logits"], "logits", atol=1e-4)
    same(one["loss"], two["loss"], "loss", atol=1e-4)
    one, two = ours.train()(copied(batch)), real.train()(copied(batch))
    same(one["loss"], two["loss"], "training loss", atol=1e-4)
    one["loss"].backward()
    two["loss"].backward()
    grads = {key: p.grad for key, p in real.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 1e-3
    same({key: p.grad for key, p in ours.named_parameters()}, grads, "gradient", 1e-3, 1e-4 * largest)  # fmt: skip
    same(dict(ours.named_buffers()), dict(real.named_buffers()), "buffer", 1e-4, 1e-5)


@pytest.mark.parametrize("name", ["PT-v3m1", "SpUNet-v1m1"])
def test_random_clouds_with_labels(theirs, name):
    ours, real = twins(theirs, scenes.model(name))
    batch = scenes.batch([scenes.cloud(1, 700), scenes.cloud(2, 900)])
    with torch.no_grad():
        one, two = ours.eval()(copied(batch)), real.eval()(copied(batch))
    same(one["seg_logits"], two["seg_logits"], "logits", atol=1e-4)
    same(one["loss"], two["loss"], "loss", atol=1e-4)


@pytest.mark.parametrize("name", cases.FULL_SIZE)
def test_a_real_scan_in_full_size(theirs, name, samples):
    """The default widths and depths on what a sensor measured within 25 m, in 20 cm voxels."""
    cfg = copy.deepcopy(cases.FULL_SIZE[name])
    if name == "PT-v3m1":
        cfg["backbone"]["shuffle_orders"] = False
    ours, real = twins(theirs, cfg)
    file = samples / "semantickitti/dataset/sequences/00/velodyne/000000.bin"
    scan = np.fromfile(file, np.float32).reshape(-1, 4)
    scan = scan[np.linalg.norm(scan[:, :2], axis=1) < 25]
    sample = dict(coord=scan[:, :3], strength=scan[:, 3:], segment=np.zeros(len(scan), np.int32))
    batch = scenes.batch([sample], 0.2)
    assert len(batch["coord"]) > 5000
    del batch["segment"]
    with torch.no_grad():
        one, two = ours.eval()(copied(batch)), real.eval()(copied(batch))
    spread = float(two["seg_logits"].std())
    assert spread > 0.01
    same(one["seg_logits"], two["seg_logits"], "logits", atol=1e-4 * max(1, spread))


def test_shuffled_orders_draw_alike(theirs):
    ours, real = twins(theirs, cases.ptv3(shuffle_orders=True))
    for module in ours.modules():
        if hasattr(module, "shuffle_orders_in_eval"):
            module.shuffle_orders_in_eval = True  # as Pointcept's do
    logits = []
    for model in (ours, real):
        torch.manual_seed(4)
        with torch.no_grad():
            logits.append(model.eval()(cases.voxels())["seg_logits"])
    same(*logits, "logits", atol=1e-4)


# ---- serialisation and offsets -------------------------------------------------------------------


@pytest.mark.parametrize("depth", cases.DEPTHS)
def test_codes(theirs, depth):
    cells, batch = cases.cells(depth, 400)
    for order in cases.ORDERS:
        same(curves.encode(cells, batch, depth, order), theirs.encode(cells, batch, depth, order), order)  # fmt: skip


def test_serialised_point(theirs):
    batch = cases.voxels()
    one, two = point.Point(copied(batch)), theirs.Point(copied(batch))
    for each in (one, two):
        each.serialization(order=cases.ORDERS, depth=11)
        each.sparsify()
    for key in (
        "batch",
        "serialized_code",
        "serialized_order",
        "serialized_inverse",
        "sparse_shape",
    ):
        same(one[key], two[key], key)
    one, two = point.Point(copied(batch)), theirs.Point(copied(batch))
    for each in (one, two):
        each.serialization(order="z")
    same(one["serialized_depth"], two["serialized_depth"], "depth chosen by itself")


def test_offsets(theirs):
    offset = torch.tensor([3, 4, 9, 20])
    batch = point.offset2batch(offset)
    same(batch, theirs.offset2batch(offset), "offset2batch")
    same(point.offset2bincount(offset), theirs.offset2bincount(offset), "offset2bincount")
    same(point.batch2offset(batch), theirs.batch2offset(batch), "batch2offset")
    if theirs.bincount2offset is not None:
        counts = point.offset2bincount(offset)
        same(point.bincount2offset(counts), theirs.bincount2offset(counts), "bincount2offset")


# ---- transforms ----------------------------------------------------------------------------------

GRID = dict(type="GridSample", grid_size=2.0, return_grid_coord=True)
SINGLE = {  # the transforms of points, each in all its modes
    "CenterShift": [dict(), dict(apply_z=False)],
    "Collect": [
        dict(keys=["coord", "segment"], feat_keys=["coord", "strength"]),
        dict(keys="segment", offset_keys_dict=dict(one="coord", two="color"), a_keys=["normal"]),
    ],
    "Copy": [dict(), dict(keys_dict=dict(strength="kept"))],
    "CropBoundary": [dict()],
    "ElasticDistortion": [dict(distortion_params=[[8.0, 0.4], [16.0, 1.6]])],
    "GridSample": [
        dict(grid_size=2.0),
        dict(grid_size=2.0, hash_type="ravel", return_inverse=True, return_grid_coord=True),
        dict(grid_size=[2.0, 3.0, 0.5], return_min_coord=True, return_displacement=True),
        dict(grid_size=4.0, mode="test", return_grid_coord=True, return_inverse=True),
    ],
    "NormalizeCoord": [dict()],
    "PointClip": [dict(), dict(point_cloud_range=(-35.2, -35.2, -4, 35.2, 35.2, 2))],
    "PositiveShift": [dict()],
    "RandomDropNormal": [dict(), dict(drop_ratio=0.5, drop_application_ratio=0.9)],
    "RandomDropout": [dict(), dict(dropout_ratio=0.6, dropout_application_ratio=0.9)],
    "RandomFlip": [dict(), dict(p=1), dict(p=0)],
    "RandomJitter": [dict(), dict(sigma=0.005, clip=0.02)],
    "RandomRotate": [
        dict(),
        dict(angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
        dict(angle=[-1 / 64, 1 / 64], axis="x", always_apply=True),
        dict(angle=[0.2, 0.3], axis="y", p=1),
    ],
    "RandomRotateTargetAngle": [dict(), dict(angle=[0.5], axis="z", center=[0, 0, 0], p=1)],
    "RandomScale": [dict(), dict(scale=[0.9, 1.1], anisotropic=True)],
    "RandomShift": [dict(), dict(shift=[[-1, 1], [0, 0], [2, 3]])],
    "ShufflePoint": [dict()],
    "SphereCrop": [
        dict(point_max=500),
        dict(sample_rate=0.5, mode="center"),
        dict(point_max=100000),
    ],
    "ToTensor": [dict()],
    "Update": [dict(keys_dict=dict(index_valid_keys=["coord", "segment"], note=1.5))],
}
COLOURS = {
    "ChromaticAutoContrast", "ChromaticJitter", "ChromaticTranslation", "HueSaturationTranslation", "NormalizeColor",
    "RandomColorGrayScale", "RandomColorJitter", "RandomDropColor",
}  # fmt: skip
DROPPING = {"CropBoundary", "GridSample", "RandomDropout", "ShufflePoint", "SphereCrop"}
VIEWS = {"ContrastiveViewsGenerator", "MultiViewGenerator"}  # in the pipelines
IMAGES = {  # of camera pictures, no points
    "ImgAugmentation", "ImgChromaticJitter", "ImgGaussianBlur", "ImgPixelContrast", "ImgRandomGrayscale",
    "ImgRandomSolarize", "ImgToTensor", "Imgnormalize",
}  # fmt: skip
BROKEN = {  # of Pointcept's; so is GridSample(project_displacement=True) where a voxel has two points
    "InstanceParser",  # calls numpy's in1d, which numpy 2.4 no longer has
    "ClipGaussianJitter",  # gives numpy a number where it wants a vector
}


def test_every_transform_is_compared():
    rest = {name for name in host.TRANSFORMS.names() if "." not in name} - IMAGES - BROKEN
    assert rest == set(SINGLE) | COLOURS | VIEWS
    assert types_in(list(cases.PIPELINES.values())) >= COLOURS | VIEWS


def bookkeeping(theirs):
    """The arrays that Pointcept's transforms take along by default; None where each has a list of its own."""
    sample = dict(coord=np.zeros((2, 3), np.float32), segment=np.zeros(2, np.int32))
    return theirs.Compose(wrap(theirs, [dict(type="ShufflePoint")]))(sample).get("index_valid_keys")


def fit(theirs, chain, data):
    """The chain as this Pointcept wants it; skips where it cannot have it."""
    chain = copy.deepcopy(chain)
    for name in sorted(types_in(chain)):
        if theirs.TRANSFORMS.get(name) is None:
            pytest.skip(f"this Pointcept has no {name}")
    for step in chain:
        kind = theirs.TRANSFORMS.get(step["type"])
        if step["type"] == "GridSample" and accepts(kind, "keys"):
            step["keys"] = [key for key in INDEX_VALID_KEYS if key in data]
        for name in set(step) - {"type"} - parameters(kind):
            if step["type"] != "Collect":
                pytest.skip(f"this Pointcept's {step['type']} has no {name}")
    return chain


def without_lists(value):
    """Without the bookkeeping entries, in nested results."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith("index_valid_keys")}
        return {key: without_lists(inner) for key, inner in kept.items()}
    return [without_lists(item) for item in value] if isinstance(value, list) else value


def run_both(theirs, chain, data, rtol=0.0, atol=0.0):
    """Both hosts' results of a chain of transforms, and equal draws of all three generators."""
    chains = (copy.deepcopy(chain), wrap(theirs, fit(theirs, chain, data)))
    listed = set(bookkeeping(theirs) or ()) == set(INDEX_VALID_KEYS)
    for seed in cases.SEEDS:
        results, after = [], []
        for compose, given in zip((Compose, theirs.Compose), chains):
            chained = compose(copy.deepcopy(given))
            cases.seed(seed)
            results.append(chained(copy.deepcopy(data)))
            after.append(cases.generators())
        assert after[0] == after[1], "the generators were used differently"
        if isinstance(results[0], list):
            for part in results[0]:
                # Ours keeps `index` right in later transforms that drop points; Pointcept's forgets it.
                part["index_valid_keys"].remove("index")
        if not listed:
            results = [without_lists(result) for result in results]
        same(*results, f"seed {seed}", rtol, atol)


@pytest.mark.parametrize("name", SINGLE)
def test_transforms(theirs, name):
    data = cases.scan(600)
    if bookkeeping(theirs) is None and name in DROPPING:
        # What each transform of such a Pointcept knows.
        data = {key: data[key] for key in ("coord", "color", "normal", "segment")}
    for options in SINGLE[name]:
        before = [dict(type="ToTensor")] if name == "Collect" else []
        run_both(theirs, [*before, dict(options, type=name)], data)


@pytest.mark.parametrize("name", cases.PIPELINES)
def test_pipelines(theirs, name):
    if bookkeeping(theirs) is None and {"RandomDropout", "SphereCrop"} & types_in(cases.PIPELINES[name]):  # fmt: skip
        pytest.skip("this Pointcept's transforms drop points without their strength")
    run_both(theirs, cases.PIPELINES[name], cases.scan(), rtol=1e-6, atol=1e-6)


# ---- configs -------------------------------------------------------------------------------------


def plain(value):
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(inner) for inner in value)
    return value


def lidar_configs(root):
    names = [str(p) for f in FOLDERS for p in sorted((root / "configs" / f).glob("*.py"))]
    assert len(names) > 10
    return names


def test_configs(theirs, root):
    for name in lidar_configs(root):
        ours, real = Config.fromfile(name), theirs.Config.fromfile(name)
        # repr tells 1 from 1.0 and lists from tuples.
        assert repr(plain(dict(ours))) == repr(plain(real._cfg_dict.to_dict())), name


def test_pipelines_of_all_lidar_configs(theirs, root, tmp_path):
    """Samples in training, validation and test form, through both hosts' `DefaultDataset`."""
    scenes.write_folders(tmp_path, train=1, val=0, points=500)
    seen = []
    unbuilt = []
    for name in lidar_configs(root):
        data = plain(dict(Config.fromfile(name)))["data"]
        for split in ("train", "val", "test"):
            if split not in data:
                continue
            parts = data[split].get("datasets", [data[split]])
            for part in parts:
                chosen = {key: part[key] for key in ("transform", "test_cfg") if key in part}
                if not chosen or chosen in seen:
                    continue
                seen.append(chosen)
                if not types_in(chosen) <= set(host.TRANSFORMS.names()) or (
                    "test_cfg" in chosen and chosen["test_cfg"]["voxelize"] is None
                ):
                    unbuilt.append(
                        chosen
                    )  # names from before 1.6.0; and Pointcept refuses voxelize=None
                    continue
                cfg = dict(
                    chosen,
                    type="DefaultDataset",
                    data_root=str(tmp_path),
                    split="train",
                    test_mode="test_cfg" in chosen,
                )
                samples = []
                pairs = ((host.DATASETS, unlisted(cfg)), (theirs.DATASETS, wrap(theirs, cfg)))
                for registry, given in pairs:
                    dataset = registry.build(copy.deepcopy(given))
                    cases.seed(7)
                    samples.append((dataset[0], cases.generators()))
                same(*samples, f"{name} {split}")
    assert len(seen) - len(unbuilt) >= 10


def unlisted(cfg):
    """A config without the lists of arrays that Pointcept's `GridSample` wanted before 1.6.0."""
    if isinstance(cfg, dict):
        drop = {"keys"} if cfg.get("type") == "GridSample" else set()
        return {key: unlisted(value) for key, value in cfg.items() if key not in drop}
    return [unlisted(item) for item in cfg] if isinstance(cfg, list) else cfg


# ---- collation -----------------------------------------------------------------------------------


def collected(theirs, count, inverse=False, grid_size=False):
    """Samples as a training or validation chain leaves them."""
    chain = [dict(GRID, return_inverse=inverse)]
    keys = ["coord", "grid_coord", "segment"]
    if inverse:
        chain.insert(0, dict(type="Copy", keys_dict=dict(segment="origin_segment")))
        keys += ["origin_segment", "inverse"]
    chain += [
        dict(type="ToTensor"),
        dict(type="Collect", keys=keys, feat_keys=["coord", "strength"]),
    ]
    made = []
    for seed in range(count):
        cases.seed(seed)
        cloud = scenes.cloud(seed, 60 + seed)
        cloud["coord"][:, 0] += 5 * seed  # so that no two scans start at the same place
        sample = Compose(copy.deepcopy(chain))(cloud)
        sample["name"] = f"scan {seed}"
        if grid_size:
            sample["grid_size"] = torch.tensor([2.0])
        made.append(sample)
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("mix_prob", [0, 0.5, 1])
def test_batches(theirs, count, mix_prob):
    samples = collected(theirs, count)
    same(loader.collate_fn(copy.deepcopy(samples)), theirs.collate_fn(copy.deepcopy(samples)))
    for seed in range(4):
        batches = []
        for collate in (loader.point_collate_fn, theirs.point_collate_fn):
            random.seed(seed)
            batches.append(collate(copy.deepcopy(samples), mix_prob=mix_prob))
        same(*batches, f"{count} scans, mix {mix_prob}")


def test_mixed_scans_share_one_grid_where_pointcept_does_so(theirs):
    samples = collected(theirs, 4, grid_size=True)
    ours = loader.point_collate_fn(copy.deepcopy(samples), mix_prob=1)
    real = theirs.point_collate_fn(copy.deepcopy(samples), mix_prob=1)
    unmixed = theirs.collate_fn(copy.deepcopy(samples))
    if torch.equal(real["grid_coord"], unmixed["grid_coord"]):
        pytest.skip("this Pointcept leaves the grids of mixed scans apart")
    # Ours keeps one size per merged scan, Pointcept's one per scan before.
    real["grid_size"] = real["grid_size"][::2]
    same(ours, real, "batch")


def test_inverse_is_the_one_difference_of_batches(theirs):
    samples = collected(theirs, 3, inverse=True)
    ours, real = loader.collate_fn(copy.deepcopy(samples)), theirs.collate_fn(copy.deepcopy(samples))  # fmt: skip
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), real["offset"][:-1]])
    raw = torch.tensor([len(sample["inverse"]) for sample in samples])
    real["inverse"] = real["inverse"] + torch.repeat_interleave(starts, raw)
    same(ours, real, "batch")
    # With it, every raw point finds the voxel of its own scan.
    assert ours["inverse"].max() == len(ours["coord"]) - 1


# ---- losses --------------------------------------------------------------------------------------


def loss_and_gradient(function, pred, target):
    pred = pred.clone().requires_grad_()
    loss = function(pred, target)
    loss.backward()
    return loss.detach(), pred.grad


@pytest.mark.parametrize("name", cases.LOSSES)
def test_losses(theirs, name):
    cfg = cases.LOSSES[name]
    pred, target = cases.loss_input(name)
    results = [
        loss_and_gradient(registry.build(given), pred, target)
        for registry, given in (
            (host.LOSSES, copy.deepcopy(cfg)),
            (theirs.LOSSES, wrap(theirs, cfg)),
        )
    ]
    assert float(results[1][0]) > 0
    same(*results, name, rtol=1e-5, atol=1e-7)


def test_sum_of_losses(theirs):
    pred, target = cases.loss_input("")
    ours = criteria.build_criteria(copy.deepcopy(cases.CRITERIA))
    real = theirs.build_criteria(wrap(theirs, cases.CRITERIA))
    same(loss_and_gradient(ours, pred, target), loss_and_gradient(real, pred, target), "", 1e-5, 1e-7)  # fmt: skip
    none = theirs.build_criteria([])
    assert criteria.build_criteria([])(pred, target) is pred
    assert none(pred, target) is pred


# ---- optimisers and schedules --------------------------------------------------------------------

OPTIMIZERS = (
    dict(type="AdamW", lr=0.002, weight_decay=0.005),
    dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
    dict(type="Adam", lr=0.01),
)
GROUPS = [dict(keyword="block", lr=0.0002, weight_decay=0.1), dict(keyword="head", lr=0.001)]


class Net(nn.Module):
    """Names that match one, both or none of the keywords; one frozen."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.block_head, self.head, self.frozen = nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.head(self.block_head(self.block(self.stem(x)))))


def leaves_out_frozen(theirs):
    """Pointcept before 1.6.1 gives parameters without gradient to the optimiser; ours never does."""
    made = theirs.build_optimizer(wrap(theirs, OPTIMIZERS[0]), Net(), wrap(theirs, GROUPS))
    return all(p.requires_grad for group in made.param_groups for p in group["params"])


def trained(theirs, real, optimizer, groups, schedule, steps=50):
    """Learning rates of every step, and the weights after the last."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 3)
    if not leaves_out_frozen(theirs):
        net.frozen.requires_grad_(True)
    build = theirs.build_optimizer if real else solver.build_optimizer
    given = [wrap(theirs, item) if real and item else item for item in (optimizer, groups)]
    made = build(given[0], net, given[1])
    cfg = dict(schedule, total_steps=steps)
    build = theirs.build_scheduler if real else solver.build_scheduler
    stepped = build(wrap(theirs, cfg) if real else cfg, made)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in made.param_groups])
        made.zero_grad()
        net(x).square().mean().backward()
        made.step()
        stepped.step()
    options = [
        {key: value for key, value in group.items() if key != "params"}
        | {"sizes": [tuple(p.shape) for p in group["params"]]}
        for group in made.param_groups
    ]
    return rates, options, dict(net.state_dict())


@pytest.mark.parametrize("name", cases.SCHEDULES)
def test_schedules(theirs, name):
    schedule = dict(cases.SCHEDULES[name])
    groups = [dict(keyword="block", lr=0.0002)]
    results = [trained(theirs, real, OPTIMIZERS[0], groups, schedule) for real in (False, True)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-9, atol=1e-15)
    assert len({rates[0] for rates in results[1][0]}) > 2
    same(results[0][2], results[1][2], "weights", 1e-6, 1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda cfg: cfg["type"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one group", "three groups"])
def test_optimizers(theirs, optimizer, groups):
    schedule = dict(type="PolyLR", power=0.9)
    ours, real = (trained(theirs, real, optimizer, groups, schedule, 5) for real in (False, True))
    np.testing.assert_allclose(ours[0], real[0], rtol=1e-9)
    same(ours[1], real[1], "groups", rtol=1e-9)
    same(ours[2], real[2], "weights", 1e-6, 1e-7)


def test_value_schedule(theirs):
    if theirs.CosineScheduler is None:
        pytest.skip("this Pointcept has no CosineScheduler")
    ours, real = solver.CosineScheduler(**cases.COSINE), theirs.CosineScheduler(**cases.COSINE)
    values = [(ours.step(), real.step()) for _ in range(cases.STEPS + 5)]
    assert len(set(values)) > 10
    np.testing.assert_allclose(*zip(*values), rtol=1e-9)


# ---- evaluation ----------------------------------------------------------------------------------


class Guess(nn.Module):
    """A fixed linear network: it gets some points right, and every batch size gives the same logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, scenes.CLASSES)
        cases.fill(self)

    def forward(self, batch):
        logits = self.head(batch["feat"])
        loss = nn.functional.cross_entropy(logits, batch["segment"], ignore_index=-1)
        return dict(seg_logits=logits, loss=loss)


class Lines(list):
    """A logger that keeps its lines."""

    def info(self, text, *args):
        self.append(text)


def evaluated(theirs, kind, batches):
    """The metric of an evaluator hook, and what it wrote about the classes."""
    real = kind is theirs.SemSegEvaluator
    values = dict(
        num_classes=scenes.CLASSES, ignore_index=-1, names=[str(i) for i in range(scenes.CLASSES)]
    )
    whole = dict(data=values, evaluate=True, enable_wandb=False)
    scalars = {}
    writer = SimpleNamespace(add_scalar=lambda key, value, step: scalars.update({key: float(value)}))  # fmt: skip
    trainer = SimpleNamespace(
        model=Guess(), val_loader=batches, cfg=theirs.Config(whole) if real else Config(whole), logger=Lines(),
        writer=writer, epoch=0, comm_info={}, device=torch.device("cpu"), best_metric_value=0,
    )  # fmt: skip
    hook = kind()
    hook.trainer = trainer
    with theirs.EventStorage() as trainer.storage:
        hook.eval()
    return float(trainer.comm_info["current_metric_value"]), scalars


def test_evaluator(theirs):
    """Batches of one as Pointcept scores them; of two, ours stays the same."""
    voxels = "inverse" not in theirs.SemSegEvaluator.eval.__code__.co_consts
    samples = collected(theirs, 4, inverse=not voxels)
    ones = [[sample] for sample in samples]
    twos = [samples[:2], samples[2:]]

    def batches(groups, collate):
        return [collate(copy.deepcopy(group)) for group in groups]

    expected, told = evaluated(theirs, theirs.SemSegEvaluator, batches(ones, theirs.collate_fn))
    assert 0.05 < expected < 0.95
    for groups in (ones, twos):
        metric, scalars = evaluated(theirs, SemSegEvaluator, batches(groups, loader.collate_fn))
        assert metric == pytest.approx(expected, abs=1e-9)
        assert set(told) <= set(scalars)
        for key in ("val/mIoU", "val/mAcc", "val/allAcc"):
            assert scalars[key] == pytest.approx(told[key], abs=1e-9), key


# ---- registered names ----------------------------------------------------------------------------

REGISTRIES = (
    "MODELS", "MODULES", "LOSSES", "DATASETS", "TRANSFORMS", "HOOKS", "TRAINERS", "TESTERS", "OPTIMIZERS",
    "SCHEDULERS",
)  # fmt: skip


# Parameters of Pointcept's that ours does not take.
LEFT_OUT = {
    ("LOSSES", "CrossEntropyLoss"): {
        "size_average",
        "reduce",
    },  # torch has replaced them by `reduction`
}
# Parameters of ours alone; each default behaves as Pointcept does.
ADDED = {
    ("MODELS", "PT-v3m1"): {"legacy_cpe", "shuffle_orders_in_eval", "cls_mode"},
    ("MODELS", "SpUNet-v1m1"): {"cls_mode"},
    ("LOSSES", "SmoothCELoss"): {"loss_weight", "ignore_index"},
    ("DATASETS", "NuScenesDataset"): {
        "aggregate_sweeps", "label_fraction", "nonfinite", "remove_close", "scenes",
    },
    ("DATASETS", "SemanticKITTIDataset"): {
        "sequences", "unlabelled", "label_fraction", "nonfinite", "sweeps", "sweep_labels", "scans",
    },
    ("DATASETS", "WaymoDataset"): {"labelled_only", "nonfinite"},
    ("HOOKS", "CheckpointLoader"): {"min_match"},
    ("HOOKS", "InformationWriter"): {"log_interval"},
    ("TESTERS", "SemSegTester"): {
        "mode", "tta", "reuse", "save_predictions", "save_probabilities", "save_submission",
    },
}  # fmt: skip


# What Pointcept got after 1.5.2, and what it has dropped since.
LATER = {("TRANSFORMS", name) for name in IMAGES} | {
    ("TRANSFORMS", "MultiViewGenerator"), ("TRANSFORMS", "RandomDropColor"), ("TRANSFORMS", "RandomDropNormal"),
    ("TRANSFORMS", "Update"), ("HOOKS", "GarbageHandler"), ("HOOKS", "ModelHook"),
    ("HOOKS", "WeightDecaySchedular"), ("SCHEDULERS", "CosineScheduler"),
}  # fmt: skip
LATER_PARAMETERS = {
    ("MODELS", "DefaultSegmentorV2"): {"freeze_backbone"},
    ("MODELS", "PT-v3m1"): {"enc_mode"},
    ("MODELS", "SpUNet-v1m1"): {"enc_mode"},
    ("HOOKS", "SemSegEvaluator"): {"write_cls_iou"},
    ("TRANSFORMS", "MultiViewGenerator"): {
        "static_view_keys", "enc2d_max_size", "enc2d_scale", "if_frame_selected",
    },
}  # fmt: skip
GONE = {("TRANSFORMS", "GridSample"): {"keys"}} | {
    ("SCHEDULERS", name): {"verbose"} for name in host.SCHEDULERS.names() if "." not in name
}


def compared(theirs):
    """Registry, name, our class and Pointcept's (None where it has none)."""
    for registry in REGISTRIES:
        ours, real = getattr(host, registry), getattr(theirs, registry)
        for name in ours.names():
            if "." not in name:
                yield registry, name, ours.get(name), real.get(name)


def test_names_and_parameters(theirs):
    missing = {(registry, name) for registry, name, _, real in compared(theirs) if real is None}
    assert missing <= LATER
    complete = not missing
    for registry, name, ours, real in compared(theirs):
        if real is None:
            continue
        where = (registry, name)
        refused, added = parameters(real) - parameters(ours), parameters(ours) - parameters(real)
        if complete:
            assert refused == LEFT_OUT.get(where, set()), where
            assert added == ADDED.get(where, set()), where
        else:
            assert refused <= LEFT_OUT.get(where, set()) | GONE.get(where, set()), where
            assert added <= ADDED.get(where, set()) | LATER_PARAMETERS.get(where, set()), where
