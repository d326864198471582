"""What a completed scan may depend on, with the sparse networks: itself, its name and the weights, nothing around it.

Not its batch, its place there, the scans before it, the order of a data loader, the number of threads.
"""

import copy
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pointcept_kd.networks.denoiser  # noqa: F401  registers encoder and denoiser
from pointcept_kd.completion.evaluator import CompletionEvaluator
from pointcept_kd.data.completion_pairs import CompletionDataset
from pointcept_kd.data.maps import build_sequence
from pointcept_kd.host import MODELS
from pointcept_kd.host.loader import collate_fn

from ..data.map_oracles import drive, write_sequence

SIZE = dict(cr=0.25, voxel_size=0.4)
NAMES = ("08_000000", "08_000001", "08_000002")
COUNTS = (60, 45, 80)


def street(points, seed):
    """Ground and walls, denser near the sensor."""
    g = torch.Generator().manual_seed(seed)
    radius = 4 * torch.exp(torch.rand(points, generator=g) * 2.2)
    angle = 2 * torch.pi * torch.rand(points, generator=g)
    height = torch.rand(points, generator=g) * 4 - 1.7
    height[::2] = -1.7
    return torch.stack((radius * angle.cos(), radius * angle.sin(), height), dim=1)


def batch_of(*which):
    """A batch of the three streets in some order."""
    clouds = [street(COUNTS[i], seed=i) for i in which]
    ends = torch.tensor([len(cloud) for cloud in clouds]).cumsum(0)
    return dict(coord=torch.cat(clouds), offset=ends, name=[NAMES[i] for i in which])


def alive(model):
    """The model with predictions the size of noise: fresh weights answer with almost nothing."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2.4)
    return model.eval()


def built(kind):
    teacher = dict(
        type="kd.DiffusionCompletion",
        encoder=dict(type="kd.ConditionEncoder", **SIZE),
        denoiser=dict(type="kd.Denoiser", **SIZE),
        steps=2,
        guidance=3.5,
        repeat=10,
    )
    torch.manual_seed(0)
    if kind == "teacher":
        return alive(MODELS.build(teacher))
    student = dict(teacher=dict(model=teacher, weight="random"), steps=2, guidance=3.5)
    return alive(MODELS.build(dict(type="kd.ScoreDistillation", ema=0.5, **student)))


@pytest.fixture(scope="module", params=["teacher", "student"])
def model(request):
    return built(request.param)


@pytest.fixture(scope="module")
def teacher():
    return built("teacher")


@pytest.fixture(scope="module")
def alone(model):
    """What each street becomes by itself."""
    return [model(batch_of(i))["completed"] for i in range(3)]


def by_scan(model, *which):
    out = model(batch_of(*which))
    sizes = torch.diff(out["completed_offset"], prepend=torch.tensor([0])).tolist()
    return list(zip(which, out["completed"].split(sizes)))


def test_the_networks_have_a_say(model, alone):
    """Else everything below would hold for the noise alone."""
    batch = batch_of(0)
    full, ends = model.complete(batch["coord"], batch["offset"], seeds=1)
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.completing.last[2].weight.mul_(1.01)
    other = louder.complete(batch["coord"], batch["offset"], seeds=1)[0]
    assert len(full) == ends[-1] == 10 * COUNTS[0]
    assert (full - other).abs().mean() > 1e-3
    assert all(len(cloud) > COUNTS[i] for i, cloud in enumerate(alone))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (1, 1, 2)])
def test_a_batch_changes_nothing(model, alone, order):
    for i, cloud in by_scan(model, *order):
        assert torch.equal(cloud, alone[i])


def test_scans_before_change_nothing(model, alone):
    for i in (2, 0, 0, 1):
        assert torch.equal(model(batch_of(i))["completed"], alone[i])


def test_names_and_seeds_do_change_it(model, alone):
    other = {**batch_of(0), "name": ["08_000009"]}
    cloud = model(other)["completed"]
    assert cloud.shape != alone[0].shape or not torch.equal(cloud, alone[0])


def test_training_between_leaves_no_trace():
    """A student in evaluation is the same before and after being switched to training."""
    model = built("student")
    cloud = model(batch_of(0))["completed"]
    model.train().eval()
    assert torch.equal(model(batch_of(0))["completed"], cloud)


# Products of 256 rows and more go another way than those of few rows.
def test_larger_clouds(model):
    first, second = street(400, seed=5), street(400, seed=6)
    names = ["first", "second"]
    both = dict(coord=torch.cat((first, second)), offset=torch.tensor([400, 800]), name=names)
    out = model(both)
    end = int(out["completed_offset"][0])
    for part, cloud, name in ((slice(end), first, "first"), (slice(end, None), second, "second")):
        one = model(dict(coord=cloud, offset=torch.tensor([400]), name=[name]))
        assert torch.equal(out["completed"][part], one["completed"])


# ------------------------------------------------------------------------------------------- threads


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 4])
def test_threads_change_nothing(teacher, count):
    """Also where products of the sizes at hand round differently with more threads (MKL: 5 to 7 rows)."""
    scan, ends = street(40, seed=9), torch.tensor([40])
    found = []
    for used in (1, count):
        with threads(used):
            found.append(teacher.complete(scan, ends, seeds=4, steps=1, guidance=1.0)[0])
            assert torch.get_num_threads() == used
    assert torch.equal(*found)


def test_more_threads_on_demand(teacher, monkeypatch):
    used = []
    encode = teacher.encoder.forward
    monkeypatch.setattr(
        teacher.encoder,
        "forward",
        lambda *given: [used.append(torch.get_num_threads()), encode(*given)][1],
    )
    scan, ends = street(40, seed=9), torch.tensor([40])
    with threads(2):
        for given in (dict(), dict(threads=None), dict(threads=3)):
            teacher.complete(scan, ends, seeds=4, steps=1, guidance=1.0, **given)
            assert torch.get_num_threads() == 2
    assert used == [1, 2, 3]


# ------------------------------------------------------------------------------------------- the evaluator


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("street")
    folder = write_sequence(root, "08", *drive(count=4, points=300, seed=3))
    build_sequence(folder, folder)
    collect = dict(
        type="Collect",
        keys=("coord", "target", "name"),
        offset_keys_dict=dict(offset="coord", target_offset="target"),
    )
    return CompletionDataset(
        split="val",
        data_root=str(root),
        points=300,
        test_mode=True,
        transform=[dict(type="ToTensor"), collect],
    )


def scores(model, loader):
    hook = CompletionEvaluator(cells=(0.5,))
    hook.trainer = SimpleNamespace(
        cfg={},
        model=model,
        val_loader=loader,
        device=torch.device("cpu"),
        logger=logging.getLogger("pointcept_kd.test"),
        writer=None,
        comm_info={},
    )
    return hook.eval().as_dict()


def test_batches_and_order_do_not_change_scores(model, scans):
    plain = scores(model, DataLoader(scans, batch_size=1, collate_fn=collate_fn))
    assert plain["scans"] == 4
    assert plain["empty"] == 0
    values = [row["cd"] for row in plain["rows"]]
    assert len(set(values)) == 4
    assert np.isfinite(values).all()
    for size in (1, 3):
        order = torch.Generator().manual_seed(size)
        loader = DataLoader(
            scans, batch_size=size, shuffle=True, generator=order, collate_fn=collate_fn
        )
        assert scores(model, loader) == plain
