"""Several processes: the same gradients and scores as one, one reason when a process fails, all ended, nothing left."""

import gc
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pointcept_kd.host import LOSSES, TRAINERS, InputError, comm, joint, kd, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch
from pointcept_kd.host.trainer import Trainer

from . import failing  # noqa: F401  registers its hooks
from .host.tiny import HOOKS, tiny_config, write_config

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["tests.host.tiny", "tests.failing"]
pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo, fork and /proc"
)


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import everything again: forks of one that has, and that has no threads."""
    multiprocessing.set_forkserver_preload(["tests.test_distributed"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(main, world, cfg=None, **place):
    """`main(cfg)` in `world` processes."""
    runtime.launch(main, world, Config({"device": "cpu", **(cfg or {})}), **place)


# ------------------------------------------------------------------------------- the same gradients


def write_street(folder, scans=6, sizes=(500, 900, 700, 400)):
    """Scans in SemanticKITTI's layout: ground, and boxes of four classes; the third reaches past 512 voxels."""
    for sequence in ("03", "08"):
        at = folder / "dataset" / "sequences" / sequence
        for part in ("velodyne", "labels"):
            (at / part).mkdir(parents=True, exist_ok=True)
        for i in range(scans):
            made = np.random.default_rng([i, int(sequence)])
            count, reach = sizes[i % len(sizes)], 60 if i == 2 else 12
            points = made.uniform(-reach, reach, (count, 4)).astype(np.float32)
            kind = made.integers(0, 5, count)
            points[:, 2] = np.where(kind == 0, 0, points[:, 2] % 3)
            points[:, 3] = made.uniform(0, 1, count)
            labels = np.array([40, 10, 50, 70, 80])[kind].astype(np.uint32)
            points.tofile(at / "velodyne" / f"{i:06d}.bin")
            labels.tofile(at / "labels" / f"{i:06d}.label")
    return folder


@kd.TRAINERS.register_module(force=True)
class Recorder(Trainer):
    """Keeps the gradients of two iterations, and stops; in double precision where asked."""

    def build_model(self):
        torch.set_default_dtype(torch.float64 if self.cfg["double"] else torch.float32)
        self.seen = []
        return super().build_model()

    def run_step(self):
        if self.cfg["double"]:
            batch = self.comm_info["input_dict"]
            self.comm_info["input_dict"] = {
                k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
                for k, v in batch.items()
            }
        super().run_step()

    def step_optimizer(self):
        named = self.model.named_parameters()
        grads = {k.removeprefix("module."): p.grad.clone() for k, p in named}
        self.seen.append(grads)
        super().step_optimizer()


def record(cfg):
    trainer = TRAINERS.build({"type": "kd.Recorder", "cfg": cfg})
    trainer._run_epoch()
    if comm.is_main_process():
        torch.save(trainer.seen, cfg["out"])


def demo(folder, data, **changes):
    """The demo's config with a random teacher, on two batches."""
    cfg = Config.fromfile(ROOT / "configs" / "kd" / "ptv3_to_student_tiny.py")
    cfg.model.teacher.weight = "random"
    data_root = str(write_street(data, scans=4))
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = data_root
    cfg.data.train.sequences, cfg.data.train.label_fraction = ["03"], 0.1
    values = dict(
        save_path=str(folder), device="cpu", num_worker=0, evaluate=False, hooks=[], epoch=1, eval_epoch=1,
        double=False, out=str(folder / "seen.pth"),
    )  # fmt: skip
    for key, value in {**values, **changes}.items():
        cfg[key] = value
    folder.mkdir(exist_ok=True)
    return runtime.complete(cfg)


def compared(one, two):
    """Largest difference of any gradient, in units of the largest gradient of its iteration."""
    worst = []
    for a, b in zip(torch.load(one), torch.load(two), strict=True):
        assert a.keys() == b.keys()
        largest = max(float(g.abs().max()) for g in a.values())
        worst.append(max(float((a[k] - b[k]).abs().max()) for k in a) / largest)
    return worst


@pytest.fixture
def single_precision():
    yield
    torch.set_default_dtype(torch.float32)


def recorded(tmp_path, world, **changes):
    """File with the gradients of `world` processes."""
    cfg = demo(tmp_path / f"{world} {len(list(tmp_path.iterdir()))}", tmp_path / "data", **changes)
    if world == 1:
        record(cfg)
        torch.set_default_dtype(torch.float32)
    else:
        runtime.launch(record, world, cfg)
    return cfg["out"]


def test_two_processes_have_the_gradients_of_one(tmp_path, forked, single_precision):
    exact = dict(double=True)
    worst = compared(recorded(tmp_path, 1, **exact), recorded(tmp_path, 2, **exact))
    assert len(worst) == 2
    assert max(worst) < 1e-12


def test_and_in_single_precision_but_for_rounding(tmp_path, forked):
    plain = dict(optimizer=dict(type="SGD", lr=0.01))
    one = recorded(tmp_path, 1, **plain)
    assert max(compared(one, recorded(tmp_path, 2, **plain))) < 1e-5
    # AdamW's first step is the rate times the sign of a gradient. Where that is rounding noise the weights part, and
    # the second gradients differ as they do between one thread and two.
    first, _ = compared(one, recorded(tmp_path, 2))
    assert first < 1e-5
    # What Pointcept does: each process its own means and statistics.
    assert (
        min(compared(one, recorded(tmp_path, 2, **plain, global_loss=False, sync_bn=False))) > 1e-3
    )


def shares(rows, world):
    """Unequal shares of the rows; with three processes the second has none."""
    ends = [0, rows // 3, rows] if world == 2 else [0, rows // 3, rows // 3, rows]
    return list(pairwise(ends))


def losses():
    ce = dict(type="CrossEntropyLoss", ignore_index=-1)
    lovasz = dict(type="LovaszLoss", ignore_index=-1)
    return [
        ce,
        dict(**ce, weight=[0.5, 1.0, 2.0, 0.1, 1.0], label_smoothing=0.1),
        dict(**ce, reduction="sum"),
        dict(type="SmoothCELoss", ignore_index=-1),
        dict(type="FocalLoss", ignore_index=-1),
        dict(type="DiceLoss", ignore_index=-1),
        dict(**lovasz, mode="multiclass"),
        dict(**lovasz, mode="multiclass", class_seen=[0, 2]),
    ]


def check_losses(cfg):
    """Every loss on this process's rows: value and gradient are those of all rows."""
    world, rank = comm.get_world_size(), comm.get_rank()
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 5, generator=made, dtype=torch.float64)
    target = torch.randint(-1, 4, (30,), generator=made)  # class 4 is absent
    a, b = shares(30, world)[rank]
    if cfg["unlabelled"]:
        target[: 30 // 3] = -1  # nothing on the first process
    cases = [(entry, logits, target, slice(a, b)) for entry in losses()]
    # Dense grids: one slice of the first dimension is one image.
    images = torch.randn(6, 5, 7, generator=made, dtype=torch.float64)
    labels = torch.randint(-1, 4, (6, 7), generator=made)
    part = slice(*shares(6, world)[rank])
    per_image = dict(type="LovaszLoss", mode="multiclass", per_image=True, ignore_index=-1)
    cases += [(per_image, images, labels, part)]
    single = torch.randn(30, generator=made, dtype=torch.float64)
    binary = dict(type="LovaszLoss", mode="binary", ignore_index=-1)
    cases += [(binary, single, target.clamp_max(1), slice(a, b))]
    cases += [(dict(type="BinaryFocalLoss"), single, (target > 0).long(), slice(a, b))]
    for entry, pred, wanted, own in cases:
        loss = LOSSES.build(entry)
        everything = pred.clone().requires_grad_()
        expected = loss(everything, wanted)
        expected.backward()
        mine = pred[own].clone().requires_grad_()
        with joint_batch():
            value = loss(mine, wanted[own])
        value.backward()
        scale = world if entry.get("reduction") != "sum" else 1
        if scale > 1:  # sums are each process's own
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        # What the averaging over processes divides by their number.
        torch.testing.assert_close(
            mine.grad, scale * everything.grad[own], rtol=1e-10, atol=1e-14, msg=str(entry)
        )
    check_terms(rank, world, logits, target, slice(a, b))


def check_terms(rank, world, logits, target, own):
    from pointcept_kd.distillers.features import feature_cosine, feature_mse
    from pointcept_kd.distillers.logits import logit_kl

    teacher, valid = logits.flip(0), target >= 0
    for term in (partial(logit_kl, temperature=2.0), feature_mse, feature_cosine):
        everything, mine = logits.clone().requires_grad_(), logits[own].clone().requires_grad_()
        expected = term(everything, teacher, valid)
        expected.backward()
        with joint_batch():
            value = term(mine, teacher[own], valid[own])
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine.grad, world * everything.grad[own], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("world", "unlabelled"), [(2, False), (2, True), (3, False)])
def test_losses_are_those_of_all_rows(forked, world, unlabelled):
    run(check_losses, world, {"unlabelled": unlabelled})


def check_norm(cfg):
    from pointcept_kd.host.sync_bn import SyncBatchNorm, sync_batch_norm
    from pointcept_kd.networks.layers import BatchNorm

    world, rank = comm.get_world_size(), comm.get_rank()
    for rows, momentum, extra in ((31, 0.01, ()), (31, None, (3,)), (2, 0.1, ())):
        torch.manual_seed(rows)
        norm = BatchNorm if not extra else nn.BatchNorm1d
        one = nn.Sequential(norm(6, eps=1e-3, momentum=momentum)).double()
        for value in (one[0].weight.data, one[0].bias.data, one[0].running_mean):
            value.normal_()
        two = nn.Sequential(norm(6, eps=1e-3, momentum=momentum)).double()
        two.load_state_dict(one.state_dict())
        two = sync_batch_norm(two)
        assert type(two[0]) is SyncBatchNorm
        assert two.state_dict().keys() == one.state_dict().keys()
        for _ in range(2):
            # Far from 0: the textbook's mean of squares would lose its digits.
            x = 3 * torch.randn(rows, 6, *extra, dtype=torch.float64) + 1e4
            grad = torch.randn(rows, 6, *extra, dtype=torch.float64)
            a, b = shares(rows, world)[rank]
            everything, mine = x.clone().requires_grad_(), x[a:b].clone().requires_grad_()
            expected = one(everything)
            expected.backward(grad)
            value = two(mine)
            value.backward(grad[a:b])
            torch.testing.assert_close(value, expected[a:b], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(mine.grad, everything.grad[a:b], rtol=1e-9, atol=1e-9)
        for p, q in zip(two.parameters(), one.parameters()):
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-7)
        for p, q in zip(two.buffers(), one.buffers()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        two.eval(), one.eval()
        torch.testing.assert_close(two(x), one(x))
    # One row in all: normalised with the running statistics, as `BatchNorm` does.
    one = BatchNorm(6).double()
    one.running_mean.fill_(0.5)
    two = sync_batch_norm(nn.Sequential(one))
    before = one.running_mean.clone()
    x = torch.randn(1, 6, dtype=torch.float64)[: int(rank == 1)].requires_grad_()
    out = two(x)
    out.sum().backward()
    torch.testing.assert_close(out, BatchNorm(6).double().eval()(x - 0.5))
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5))
    assert torch.equal(two[0].running_mean, before)
    assert int(two[0].num_batches_tracked) == 0


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_all_rows(forked, world):
    run(check_norm, world)


def check_joint(cfg):
    rank = comm.get_rank()
    x = torch.tensor(3.0 + rank)
    for inside in (False, True):
        with joint_batch(inside):
            assert joint.is_joint() is inside
            assert float(joint.joint_mean(x, 1 + rank)) == pytest.approx(11 / 3 if inside else x)
            assert float(joint.joint_sum(x)) == (7.0 if inside else x)
            assert joint.joint_max(rank) == (1 if inside else rank)
            with joint_batch(False):
                assert joint.joint_max(rank) == rank
            assert float(joint.joint_mean(x, 0)) == (0.0 if inside else x)
    assert not joint.is_joint()


def test_joint_functions(forked):
    run(check_joint, 2)
    with joint_batch():  # one process: nothing to join
        assert not joint.is_joint()
        assert joint.joint_generator() is None


# ---------------------------------------------------------------------------- seeds and evaluation


def draw(cfg):
    """The samples and draws of one epoch, as this process sees them."""
    trainer = TRAINERS.build({"type": "kd.Trainer", "cfg": cfg})
    trainer.train_loader.batch_sampler.set_epoch(1)
    batches = [batch["feat"] for batch in trainer.train_loader]
    from pointcept_kd.host.batches import seed_process

    seed_process(3, 2, comm.get_rank())
    own = torch.rand(4)
    seed_process(3, 2, comm.get_rank())
    with joint_batch():
        shared = torch.randperm(100, generator=joint.joint_generator())
    gathered = comm.all_gather((batches, own, shared))
    if comm.is_main_process():
        torch.save(gathered, cfg["out"])


def test_samples_follow_the_position_and_draws_the_rank(tmp_path, forked):
    seen = {}
    for world, workers in ((1, 0), (2, 0), (2, 2)):
        folder = tmp_path / f"{world}{workers}"
        cfg = tiny_config(folder, mix_prob=0, num_worker=workers, batch_size=4, hooks=[])
        cfg["out"] = str(tmp_path / f"{world}{workers}.pth")
        cfg["data"]["train"]["count"] = 8
        runtime.launch(draw, world, cfg)
        seen[world, workers] = torch.load(cfg["out"])
    [(batches, own, shared)] = seen[1, 0]
    for key in ((2, 0), (2, 2)):
        first, second = seen[key]
        joined = [torch.cat(pair) for pair in zip(first[0], second[0])]
        assert len(joined) == len(batches) == 2
        assert all(torch.equal(a, b) for a, b in zip(joined, batches))
        assert torch.equal(first[1], own)  # rank 0 draws what one process draws
        assert not torch.equal(second[1], own)
        assert torch.equal(first[2], shared)
        assert torch.equal(second[2], shared)


@kd.MODELS.register_module(force=True)
class TinySegmentor(nn.Module):
    """A network with `criteria`, as this package's segmentors have, and BatchNorm statistics that training moves."""

    def __init__(self):
        super().__init__()
        from pointcept_kd.host.criteria import build_criteria

        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        kinds = (dict(type="CrossEntropyLoss"), dict(type="LovaszLoss", mode="multiclass"))
        self.criteria = build_criteria([dict(kind, ignore_index=-1) for kind in kinds])

    def forward(self, batch):
        logits = self.body(batch["feat"])
        loss = self.criteria(logits, batch["segment"])
        return {"loss": loss} if self.training else {"loss": loss, "seg_logits": logits}


def evaluate(cfg):
    trainer = TRAINERS.build({"type": "kd.Trainer", "cfg": cfg})
    if cfg["drift"]:  # without sync_bn the processes' running statistics part
        trainer.model.module.body[1].running_mean.fill_(5.0 * comm.get_rank())
    trainer.hooks[0].eval()
    trainer.writer and trainer.writer.close()
    metric = comm.all_gather(trainer.comm_info["current_metric_value"])
    assert len(set(metric)) == 1


@pytest.mark.parametrize(("batch", "drift"), [(None, False), (2, False), (4, False), (2, True)])
def test_five_scans_on_two_processes_score_as_on_one(tmp_path, forked, batch, drift):
    scores = []
    for world in (1, 2):
        cfg = tiny_config(tmp_path / str(world), model=dict(type="kd.TinySegmentor"))
        cfg["hooks"] = [dict(type="SemSegEvaluator", write_cls_iou=True)]
        cfg["batch_size_val"], cfg["drift"] = batch, drift and world == 2
        cfg["data"]["val"]["count"] = 5
        runtime.launch(evaluate, world, cfg)
        lines = (tmp_path / str(world) / "log.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        scores.append({entry["tag"]: entry["value"] for entry in entries})
        assert len(scores[-1]) == len(entries)
    one, two = scores
    assert one.keys() == two.keys() >= {"val/loss", "val/mIoU", "val/mAcc", "val/allAcc"}
    loss = [score.pop("val/loss") for score in scores]
    assert one == two
    assert loss[1] == pytest.approx(loss[0], rel=1e-6)
    assert math.isfinite(loss[0])


# -------------------------------------------------------------------------------- ends and resuming


def gone(pids, seconds=8.0):
    """Whether all these processes end within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(processes._ended(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def noted(note):
    """Process numbers of both ranks and of their loading processes, once they are written."""
    paths = [Path(f"{note}.{rank}") for rank in range(2)]
    end = time.monotonic() + 60
    while not all(path.is_file() for path in paths):
        assert time.monotonic() < end
        time.sleep(0.05)
    return [pid for path in paths for pid in json.loads(path.read_text())]


def train(cfg):
    if cfg.get("said"):
        sys.stderr = open(f"{cfg['said']}.{comm.get_rank()}", "w", buffering=1)  # noqa: SIM115  for good
    TRAINERS.build({"type": "kd.Trainer", "cfg": cfg}).train()


def failing_config(tmp_path, how, **changes):
    hook = dict(type="kd.FailOn", note=str(tmp_path / "note"), how=how)
    hooks = [*HOOKS, {**hook, **changes.pop("hook", {})}]
    custom = dict(imports=PARTS, allow_failed_imports=False)
    values = dict(hooks=hooks, custom_imports=custom, num_worker=2, batch_size=2, **changes)
    return tmp_path / "exp", values


FAILURES = {
    "input": (InputError, r"^rank 1 of 2 on \S+: scan 7: the file is cut off; copy it again$"),
    "bug": (processes.ProcessFailure, r"^rank 1 of 2 on \S+ failed: ZeroDivisionError: a planted bug$"),
    "kill": (processes.ProcessFailure, r"^rank 1 of 2 on \S+ \(process \d+\) was killed by SIGKILL"),
    "exit": (processes.ProcessFailure, r"^rank 1 of 2 on \S+ .* ended with exit code 5 and no message$"),
    "hang": (processes.ProcessFailure, r"^rank 0 of 2 on \S+ lost contact .* dist_timeout=0\.1 minutes"),
}  # fmt: skip


@pytest.mark.parametrize("how", FAILURES)
def test_one_failure_ends_all(tmp_path, forked, how):
    folder, values = failing_config(tmp_path, how)
    cfg = tiny_config(folder, **values)
    cfg["dist_timeout"], cfg["said"] = 0.1 if how == "hang" else 60, str(tmp_path / "said")
    kind, text = FAILURES[how]
    start = time.monotonic()
    with pytest.raises(kind, match=text) as raised:
        runtime.launch(train, 2, cfg)
    assert time.monotonic() - start < 40  # not the hour after which messages time out
    assert "\n" not in str(raised.value)
    pids = noted(tmp_path / "note")
    assert len(pids) == 4  # two processes with one loading process each
    assert gone(pids)
    said = [Path(f"{cfg['said']}.{rank}").read_text() for rank in range(2)]
    assert [text.count("Traceback") for text in said] == [0, how == "bug"]
    assert list((folder / "model").iterdir()) == []


def test_rank_0_may_fail_as_well(tmp_path, forked):
    folder, values = failing_config(tmp_path, "kill", hook=dict(rank=0))
    with pytest.raises(processes.ProcessFailure, match="^rank 0 of 2 .* was killed by SIGKILL"):
        runtime.launch(train, 2, tiny_config(folder, **values))
    assert gone(noted(tmp_path / "note"))


def build_then_fail(cfg):
    if comm.get_rank() == 1:
        raise InputError("device 7 is on fire\nand more")
    comm.synchronize()


def test_a_failure_before_training_is_told_too(forked):
    with pytest.raises(InputError, match="^rank 1 of 3 on .*and more$"):
        run(build_then_fail, 3)


def leave_early(cfg):
    sys.stderr = open(f"{cfg['said']}.{comm.get_rank()}", "w", buffering=1)  # noqa: SIM115  for good
    if comm.get_rank() == 1:
        time.sleep(0.5)
        raise ZeroDivisionError("late")


def test_nobody_leaves_before_the_last_one(tmp_path, forked):
    said = tmp_path / "said"
    with pytest.raises(processes.ProcessFailure, match="rank 1 of 2 .*ZeroDivisionError: late"):
        run(leave_early, 2, {"said": str(said)})
    assert said.with_suffix(".0").read_text() == ""
    assert said.with_suffix(".1").read_text().count("Traceback") == 1  # nobody has logged it


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, forked):
    whole = tiny_config(tmp_path / "whole", model=dict(type="kd.TinySegmentor"))
    runtime.launch(train, 2, whole)
    folder, values = failing_config(tmp_path, "kill", hook=dict(epoch=1))
    values.update(model=dict(type="kd.TinySegmentor"), num_worker=0)
    with pytest.raises(processes.ProcessFailure):
        runtime.launch(train, 2, tiny_config(folder, **values))
    last = str(folder / "model" / "model_last.pth")
    assert torch.load(last)["epoch"] == 1
    again = tiny_config(folder, model=dict(type="kd.TinySegmentor"), weight=last, resume=True)
    runtime.launch(train, 2, again)
    one = torch.load(tmp_path / "whole" / "model" / "model_last.pth")
    two = torch.load(last)
    assert one["epoch"] == two["epoch"] == 3
    for key in one["state_dict"]:
        assert torch.equal(one["state_dict"][key], two["state_dict"][key]), key
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert one["best_metric_value"] == two["best_metric_value"]
    # One process writes: no scalar is there twice.
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    tags = [(e["tag"], e["step"]) for e in map(json.loads, lines)]
    assert len(tags) == len(set(tags)) > 0


# ------------------------------------------------------------------------------- several machines


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def machine(number, url, main, cfg, connection, runs):
    """What the command does on one machine; reports how it ended."""
    processes._METHOD = "fork"
    gc.disable()  # a fork must not collect what belongs to threads that it does not have
    try:
        for _ in range(runs):
            runtime.launch(main, 1, cfg, 2, number, url)
        connection.send("done")
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def on_two_machines(main, cfg, runs=1):
    """How the command ends on each of two machines."""
    url, ends, started = f"tcp://127.0.0.1:{free_port()}", [], []
    context = multiprocessing.get_context("forkserver")
    for number in (1, 0):  # machine 1 waits for machine 0
        mine, theirs = context.Pipe()
        started.append(context.Process(target=machine, args=(number, url, main, cfg, theirs, runs)))
        started[-1].start()
        ends.append(mine)
    answers = [end.recv() if end.poll(100) else "no answer" for end in ends]
    for process in started:
        process.join(10)
        process.kill()
    return answers[::-1]


def places(cfg):
    found = comm.all_gather((comm.get_rank(), comm.get_local_rank(), os.getppid()))
    assert [place[:2] for place in found] == [(0, 0), (1, 0)]
    assert found[0][2] != found[1][2]


def test_two_machines(forked):
    # Twice: a teacher, then its student, through one meeting point.
    cfg = Config({"device": "cpu"})
    assert on_two_machines(places, cfg, runs=2) == ["done", "done"]


def test_a_failure_on_one_machine_is_told_on_both(tmp_path, forked):
    folder, values = failing_config(tmp_path, "kill")
    answers = on_two_machines(train, tiny_config(folder, **values))
    assert answers[0] == answers[1]
    assert answers[0].startswith("ProcessFailure: rank 1 of 2 on ")
    assert "was killed by SIGKILL" in answers[0]
    assert gone(noted(tmp_path / "note"))


@pytest.mark.parametrize(
    ("arguments", "changes", "text"),
    [
        ((0,), {}, "--num-gpus 0: expected at least 1"),
        ((1, 0), {}, "--num-machines 0: expected at least 1"),
        ((1, 2, 2, "tcp://localhost:1"), {}, "--machine-rank 2: expected 0 to 1"),
        ((1, 2), {}, "--dist-url auto: 2 machines need one meeting point"),
        ((1, 2, 0, "tcp://localhost"), {}, "tcp://HOST:PORT"),
        ((1, 2, 0, "file:///meeting"), {}, "tcp://HOST:PORT"),
        ((1, 2, 1, "tcp://127.0.0.1:9"), {"dist_timeout": 0.001}, "machine 0 does not answer"),
        ((2,), {"device": "cuda:0"}, "device=cuda:0 is one GPU for 2 processes"),
        ((2,), {"dist_timeout": 0}, "dist_timeout=0: expected minutes"),
        ((2,), {"global_loss": "yes"}, "global_loss='yes': expected True or False"),
    ],
)
def test_bad_arguments(forked, arguments, changes, text):
    number, *rest = arguments
    with pytest.raises(InputError) as raised:
        runtime.launch(places, number, Config({"device": "cpu", **changes}), *rest)
    assert text in str(raised.value)


# ------------------------------------------------------------------------------- as users start it


def command(*arguments, torchrun=False, **options):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *(start if torchrun else []), ROOT / "tools" / "train.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("WORLD_SIZE", None)
    return subprocess.Popen(
        list(map(str, words)), stderr=subprocess.PIPE, text=True, env=env, **options
    )


def test_torchrun_shows_the_reason(tmp_path):
    folder, values = failing_config(tmp_path, "input")
    config = write_config(tmp_path / "c.py", save_path=str(folder), **values)
    process = command("--config-file", config, torchrun=True, cwd=tmp_path)
    printed = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: rank 1 of 2 on ")
    assert lines[0].endswith(": scan 7: the file is cut off; copy it again")
    assert gone(noted(tmp_path / "note"))


def test_ctrl_c_ends_all(tmp_path):
    folder, values = failing_config(tmp_path, "hang")
    config = write_config(tmp_path / "c.py", save_path=str(folder), **values)
    # A test run in the background of a shell ignores SIGINT, and what it starts would, too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command(
        "--config-file", config, "--num-gpus", "2", cwd=tmp_path, start_new_session=True,
        preexec_fn=heard,
    )  # fmt: skip
    pids = noted(tmp_path / "note")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "interrupted"
    assert "Traceback" not in printed
    assert gone(pids)
