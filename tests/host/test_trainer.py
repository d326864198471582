"""The loop: reproducible, resumable bit for bit, clear when it cannot go on."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.host import TRAINERS, InputError, kd, one_line
from pointcept_kd.host.batches import EpochBatchSampler, SeededBatches, build_loader, random_state
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import collate_fn, point_collate_fn
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.runtime import autocast, device_of, to_device
from pointcept_kd.host.trainer import EventStorage, Trainer

from . import tiny
from .tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]


def run(path, **changes):
    trainer = Trainer(tiny_config(path, **changes))
    trainer.train()
    return trainer


def weights(path):
    return load_checkpoint(Path(path) / "model" / "model_last.pth")


def same(a, b):
    """Equal bit for bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    run(folder)
    return weights(folder)


def test_registered_under_both_names():
    assert TRAINERS.get("DefaultTrainer") is not None
    assert TRAINERS.get("kd.DefaultTrainer") is TRAINERS.get("kd.Trainer") is Trainer


# ------------------------------------------------------------------------------------ exactness


def test_the_same_run_twice_is_the_same(tmp_path, reference):
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    run(tmp_path)
    assert same(weights(tmp_path), reference)
    assert not same(run(tmp_path / "b", seed=4).model.state_dict(), reference["state_dict"])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(tmp_path, reference, workers):
    run(tmp_path, num_worker=workers)
    assert same(weights(tmp_path), reference)


def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, reference):
    class Stop(tiny.HookBase):
        def before_step(self):
            if self.trainer.epoch == 1 and self.trainer.comm_info["iter"] == 1:
                raise KeyboardInterrupt

    kd.HOOKS.register_module("Stop", force=True, module=Stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, hooks=[*tiny.HOOKS, dict(type="kd.Stop")])
    assert weights(tmp_path)["epoch"] == 1
    torch.manual_seed(1234)
    last = str(tmp_path / "model" / "model_last.pth")
    trainer = run(tmp_path, resume=True, weight=last)
    assert trainer.start_epoch == 1
    assert same(weights(tmp_path), reference)


def in_subprocess(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; torch.set_num_threads(1)\n" + code,
            *map(str, arguments),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


RUN = """
import sys
from tests.host import tiny
from pointcept_kd.host.trainer import Trainer
hooks = [*tiny.HOOKS, {extra}]
Trainer(tiny.tiny_config(sys.argv[1], hooks=hooks, num_worker=1)).train()
"""


def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path, reference):
    done = in_subprocess(RUN.format(extra="dict(type='kd.KillAt', epoch=2, iteration=1)"), tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert weights(tmp_path)["epoch"] == 2
    run(tmp_path, resume=True, weight=str(tmp_path / "model" / "model_last.pth"))
    assert same(weights(tmp_path), reference)


def test_killed_while_saving_and_resumed(tmp_path, reference):
    done = in_subprocess(RUN.format(extra="dict(type='kd.DieSaving', epoch=1)"), tmp_path)
    assert done.returncode == 9, done.stderr
    assert weights(tmp_path)["epoch"] == 1  # the file of the epoch before is whole
    assert list((tmp_path / "model").glob("*.tmp"))
    run(tmp_path, resume=True, weight=str(tmp_path / "model" / "model_last.pth"))
    assert same(weights(tmp_path), reference)
    assert not list((tmp_path / "model").glob("*.tmp"))


@pytest.mark.parametrize(
    "scheduler",
    [
        dict(type="MultiStepLR", milestones=[0.5, 0.8]),
        dict(type="PolyLR"),
        dict(type="CosineAnnealingLR"),
        dict(type="MultiStepWithWarmupLR", milestones=[0.5]),
    ],
)
def test_other_schedules_resume_exactly_and_refuse_another_length(tmp_path, scheduler):
    options = dict(
        scheduler=scheduler, hooks=[*tiny.HOOKS[:-1], dict(type="CheckpointSaver", save_freq=1)]
    )
    run(tmp_path / "a", **options)
    first = str(tmp_path / "a" / "model" / "epoch_1.pth")
    run(tmp_path / "b", **options, resume=True, weight=first)
    assert same(weights(tmp_path / "b"), weights(tmp_path / "a"))
    with pytest.raises(InputError, match="cannot resume.*resume=False"):
        Trainer(
            tiny_config(tmp_path / "c", **options, resume=True, weight=first, epoch=4, eval_epoch=4)
        )
    assert not (tmp_path / "c").exists()


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    before = run(tmp_path).model.state_dict()
    after = run(
        tmp_path, resume=True, weight=str(tmp_path / "model" / "model_last.pth")
    ).model.state_dict()
    assert same(dict(before), dict(after))
    assert "All 3 epochs are done already" in (tmp_path / "train.log").read_text()


def test_loading_in_this_process_leaves_its_random_state_alone():
    dataset = tiny.TinyScans(augment=True)
    sampler = EpochBatchSampler(len(dataset), 2, True, seed=0)
    loader = build_loader(dataset, sampler, 0, 0, partial(point_collate_fn, mix_prob=0.5))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    batches = list(loader)
    assert len(batches) == 3
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_samples_differ_by_position_and_epoch_and_repeat_by_ticket():
    data = SeededBatches(tiny.TinyScans(augment=True), collate_fn, seed=5)
    feat = {t: data.__getitems__([t])["feat"] for t in [(0, 0, 1), (0, 1, 1), (1, 0, 1)]}
    assert torch.equal(feat[0, 0, 1], data.__getitems__([(0, 0, 1)])["feat"])
    assert not torch.equal(feat[0, 0, 1], feat[0, 1, 1])
    assert not torch.equal(feat[0, 0, 1], feat[1, 0, 1])
    with random_state(1, 2):
        first = random.random(), np.random.rand(), float(torch.rand(1))
    with random_state(1, 2):
        assert first == (random.random(), np.random.rand(), float(torch.rand(1)))


# -------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("even", [False, True])
def test_sampler_covers_the_set(drop, world, even):
    for size in (1, 5, 6, 7, 12):
        samplers = [EpochBatchSampler(size, 2, True, 3, drop, r, world, even) for r in range(world)]
        batches = [list(s) for s in samplers]
        assert [len(s) for s in samplers] == [len(b) for b in batches]
        positions = [p for own in batches for batch in own for _, p, _ in batch]
        total = 2 * world
        if drop:
            assert sorted(positions) == list(range(size - size % total))
        elif even:
            assert len({len(own) for own in batches}) == 1
            assert len({tuple(len(b) for b in own) for own in batches}) == 1
            assert set(positions) == set(range(size))
            assert len(positions) == -(-size // world) * world
        else:
            assert sorted(positions) == list(range(size))


def test_sampler_orders():
    sampler = EpochBatchSampler(8, 3, True, seed=1)
    first = [i for batch in sampler for _, _, i in batch]
    assert first == [i for batch in sampler for _, _, i in batch]
    assert sorted(first) == list(range(8))
    sampler.set_epoch(1)
    second = [t for batch in sampler for t in batch]
    assert [i for _, _, i in second] != first
    assert all(epoch == 1 for epoch, _, _ in second)
    plain = EpochBatchSampler(5, 2, False, seed=1)
    assert [[i for _, _, i in b] for b in plain] == [[0, 1], [2, 3], [4]]
    with pytest.raises(InputError, match="batch_size"):
        EpochBatchSampler(5, 0, False, seed=1)


def test_two_processes_see_together_what_one_sees():
    alone = [[i for _, _, i in b] for b in EpochBatchSampler(8, 4, True, 7)]
    pair = [
        [[i for _, _, i in b] for b in EpochBatchSampler(8, 2, True, 7, rank=r, world=2)]
        for r in (0, 1)
    ]
    assert alone == [a + b for a, b in zip(*pair)]


def test_last_batch_is_dropped_only_from_a_larger_set(tmp_path):
    larger = Trainer(tiny_config(tmp_path / "a", batch_size=2))  # 7 scans
    smaller = Trainer(tiny_config(tmp_path / "b", batch_size=8))
    assert len(larger.train_loader) == 3
    assert len(smaller.train_loader) == 1


# ------------------------------------------------------------------------------------ arithmetic


def plain(path, **changes):
    """A run without dropout, batch statistics, augmentation or mixing, on scans of equal size."""
    data = tiny.tiny_values(path)["data"]
    data["train"] = dict(type="kd.TinyScans", count=8, equal=True)
    options = dict(
        model=dict(type="kd.TinyNet", dropout=0.0, norm=False),
        data=data,
        mix_prob=0,
        optimizer=dict(type="SGD", lr=0.1),
        scheduler=dict(type="CosineAnnealingLR"),
        hooks=[],
        evaluate=False,
        epoch=2,
        eval_epoch=2,
    )
    return run(path, **{**options, **changes})


def test_accumulation_equals_a_larger_batch(tmp_path):
    large = plain(tmp_path / "a", batch_size=4)
    small = plain(tmp_path / "b", batch_size=2, gradient_accumulation_steps=2)
    assert large.cfg.scheduler.total_steps == small.cfg.scheduler.total_steps == 4
    assert large.scheduler.last_epoch == small.scheduler.last_epoch == 4
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(value, small.model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_short_last_accumulation_is_stepped_within_its_epoch(tmp_path):
    trainer = plain(
        tmp_path, batch_size=2, gradient_accumulation_steps=3
    )  # 4 batches: groups of 3 and 1
    assert trainer.scheduler.last_epoch == trainer.cfg.scheduler.total_steps == 4
    assert [trainer._accumulation(i) for i in range(4)] == [
        (3, False),
        (3, False),
        (3, True),
        (1, True),
    ]


def test_loop_repeats_the_set_between_evaluations(tmp_path):
    trainer = plain(tmp_path, epoch=4, eval_epoch=2, batch_size=2)
    assert len(trainer.train_loader) == 8
    assert trainer.max_epoch == 2
    with pytest.raises(InputError, match="epoch=3 is no multiple of eval_epoch=2"):
        plain(tmp_path / "b", epoch=3, eval_epoch=2)


def test_clipping_bounds_the_step(tmp_path):
    def moved(path, clip):
        once = dict(
            batch_size=8, epoch=1, eval_epoch=1, clip_grad=clip, optimizer=dict(type="SGD", lr=1.0)
        )
        torch.manual_seed(0)
        trainer = Trainer(plain(path, **once).cfg)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        steps = [(a.detach() - b).flatten() for a, b in zip(trainer.model.parameters(), before)]
        return float(torch.cat(steps).norm())

    assert moved(tmp_path / "a", None) > 0.05
    assert moved(tmp_path / "b", 0.01) == pytest.approx(0.01, rel=1e-3)


def test_amp_on_the_cpu_needs_no_scaler(tmp_path):
    trainer = plain(tmp_path, enable_amp=True, amp_dtype="bfloat16")
    assert trainer.scaler is None
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    with autocast(trainer.cfg, trainer.device):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with pytest.raises(InputError, match="amp_dtype='half'"):
        plain(tmp_path / "b", enable_amp=True, amp_dtype="half")


def test_training_learns(tmp_path):
    adam = dict(optimizer=dict(type="AdamW", lr=0.05), hooks=[dict(type="InformationWriter")])
    plain(tmp_path, **adam, epoch=30, eval_epoch=30, batch_size=4)
    losses = [
        row["value"] for row in read_jsonl(tmp_path / "log.jsonl") if row["tag"] == "train/loss"
    ]
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("vector", TypeError, "TinyNet returned 'feature' of .* one-element tensor"),
        ("no loss", TypeError, "TinyNet must return a dict with `loss`"),
        (
            "nan",
            RuntimeError,
            r"not finite in epoch 1, iteration 1, scans scan/0\d, scan/0\d \(loss nan",
        ),
    ],
)
def test_model_that_breaks_a_rule_is_named_and_logged(tmp_path, fault, kind, text):
    with pytest.raises(kind, match=text):
        run(tmp_path, model=dict(type="kd.TinyNet", fault=fault))
    assert "Traceback" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_scan_reaches_the_user_as_one_line(tmp_path, workers):
    data = tiny.tiny_values("")["data"]
    data["train"]["fault"] = "broken"
    with pytest.raises(InputError) as caught:
        run(tmp_path, data=data, num_worker=workers)
    assert "the file is cut off; copy it again" in one_line(caught.value)
    assert "Traceback" not in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(model=dict(type="kd.TinyNett")), "nearest: kd.TinyNet"),
        (dict(model=dict(type="kd.TinyNet", widht=3)), "did you mean width"),
        (dict(model=None), "the config has no model"),
        (dict(optimizer=dict(type="AdamW", lr=0.1, momentumm=1)), "momentumm"),
        (dict(hooks=[dict(type="CheckpointSaver", save_frequency=1)]), "save_freq"),
        (dict(weight="nowhere/model.pth"), "nowhere/model.pth does not exist"),
        (dict(resume=True), "set weight="),
        (dict(device="gpu"), "device='gpu' is no device"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(num_worker=-1), "num_worker=-1"),
    ],
)
def test_bad_input_leaves_no_folder(tmp_path, changes, text):
    with pytest.raises(InputError, match=text):
        Trainer(tiny_config(tmp_path / "exp", **changes))
    assert not (tmp_path / "exp").exists()


def test_empty_sets_are_refused(tmp_path):
    data = tiny.tiny_values("")["data"]
    with pytest.raises(InputError, match=r"data\.train has no samples"):
        Trainer(
            tiny_config(
                tmp_path / "exp", data={**data, "train": dict(type="kd.TinyScans", count=0)}
            )
        )
    with pytest.raises(InputError, match=r"no data\.val"):
        Trainer(tiny_config(tmp_path / "exp", data={k: v for k, v in data.items() if k != "val"}))
    assert not (tmp_path / "exp").exists()


def test_a_save_path_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create .*Not a directory"):
        Trainer(tiny_config(tmp_path / "file" / "exp"))


# ------------------------------------------------------------------------------------ small parts


def test_no_workers_is_said_once(tmp_path):
    run(tmp_path)
    text = (tmp_path / "train.log").read_text()
    assert text.count("num_worker=0: scans are loaded in the training process") == 1


def test_config_is_dumped_as_given_and_kept_on_resume(tmp_path):
    run(tmp_path, seed=None)
    dumped = Config.fromfile(tmp_path / "config.py")
    assert isinstance(dumped.seed, int)
    assert "batch_size_per_gpu" not in dumped
    before = (tmp_path / "config.py").read_text()
    run(tmp_path, resume=True, weight=str(tmp_path / "model" / "model_last.pth"), clip_grad=1.0)
    assert (tmp_path / "config.py").read_text() == before


def test_storage():
    storage = EventStorage()
    for value in (1.0, torch.tensor([3.0])):
        storage.put_scalar("loss", value)
    history = storage.history("loss")
    assert (history.val, history.avg, history.total) == (3.0, 2.0, 4.0)
    storage.reset_histories()
    with pytest.raises(KeyError):
        storage.history("loss")
    # What Pointcept's own hooks do with it.
    storage.put_scalar("val_union", np.array([1, 2]))
    storage.put_scalar("val_union", np.array([3, 4]))
    assert storage.history("val_union").total.tolist() == [4, 6]
    storage.history("val_union").reset()
    assert storage.history("val_union").avg == 0


def test_device_and_moving():
    assert device_of({"device": "cpu"}) == torch.device("cpu")
    assert device_of({}).type == ("cuda" if torch.cuda.is_available() else "cpu")
    moved = to_device(
        {"a": [torch.ones(1)], "b": ("x", torch.ones(1)), "n": 3}, torch.device("meta")
    )
    assert moved["a"][0].device.type == moved["b"][1].device.type == "meta"
    assert moved["b"][0] == "x"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device; use device=cpu"):
            device_of({"device": "cuda"})


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp_on_cuda(tmp_path, dtype):
    trainer = plain(tmp_path, device="cuda", enable_amp=True, amp_dtype=dtype)
    assert (trainer.scaler is not None) == (dtype == "float16")
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
