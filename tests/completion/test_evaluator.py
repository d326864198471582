"""The completion evaluator: scores of batches and processes, the saver's metric, what is missing; folders of clouds."""

import json
import logging
import math
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pointcept_kd.completion.evaluator import CompletionEvaluator, evaluate_folder, scored_clouds
from pointcept_kd.completion.metrics import CompletionScores
from pointcept_kd.host import HOOKS, InputError, comm, kd, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.hooks import CheckpointSaver
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.trainer import Trainer

from ..host.tiny import tiny_config

NAMES = [f"08/{i:06d}" for i in range(5)]


def scan(index):
    """A sample as a data set gives it; no two have equally many points."""
    rng = np.random.default_rng(index)
    coord = torch.from_numpy(rng.uniform(-9, 9, (40 + index, 3))).float()
    target = torch.cat([coord, coord + 0.3])[: 70 + index]
    counts = {"coord": coord, "target": target, "complete": target[::2]}
    ends = {
        "offset" if k == "coord" else f"{k}_offset": torch.tensor([len(v)])
        for k, v in counts.items()
    }
    return {**counts, **ends, "name": NAMES[index]}


def loader(batch_size, indices=range(5)):
    indices = list(indices)
    starts = range(0, len(indices), batch_size)
    return [collate_fn([scan(i) for i in indices[s : s + batch_size]]) for s in starts]


class Shift(torch.nn.Module):
    """Completes a scan by itself, moved; the first scan of a batch is not the second."""

    def __init__(self, by=0.1):
        super().__init__()
        self.register_buffer("by", torch.tensor(by))

    def forward(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        return dict(completed=batch["coord"] + self.by, completed_offset=batch["offset"])


class Writer(dict):
    def add_scalar(self, tag, value, step):
        self[tag, step] = value


def trainer_of(batches, model=None, **cfg):
    model = model or Shift()
    return SimpleNamespace(
        cfg=cfg,
        model=model.train(),
        val_loader=batches,
        device=torch.device("cpu"),
        logger=logging.getLogger("pointcept_kd.test"),
        writer=Writer(),
        epoch=3,
        comm_info={},
        best_metric_value=-math.inf,
    )


def evaluated(trainer, **settings):
    hook = HOOKS.build(dict(type="kd.CompletionEvaluator", **settings))
    hook.trainer = trainer
    hook.after_epoch()
    return trainer


def expected(key="target"):
    scores = CompletionScores()
    for sample in map(scan, range(5)):
        scores.add(sample["name"], sample["coord"] + torch.tensor(0.1), sample[key])
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_are_those_of_the_scans(batch_size):
    trainer = evaluated(trainer_of(loader(batch_size)))
    values = expected().summary().values()
    assert trainer.writer == {(f"val/{key}", 4): value for key, value in values.items()}
    assert trainer.comm_info == {
        "current_metric_value": -values["cd"],
        "current_metric_name": "-cd",
    }


def test_the_log_tells_the_scores(caplog):
    with caplog.at_level(logging.INFO, "pointcept_kd.test"):
        evaluated(trainer_of(loader(2)), legacy=True, emd_points=20)
    summary = expected().summary()
    assert f"Val result: {summary.headline} (5 scans)" in caplog.text
    for part in ("emd ", "iou_legacy_0.1 ", f"CD {summary.std['cd']:.4f} m std"):
        assert part in caplog.text


def test_complete_stands_in_for_a_missing_target():
    batches = loader(2)
    for batch in batches:
        del batch["target"], batch["target_offset"]
    trainer = evaluated(trainer_of(batches))
    assert trainer.comm_info["current_metric_value"] == -expected("complete").summary().mean["cd"]


@pytest.mark.parametrize(
    ("metric", "sign"), [("jsd_bev", -1), ("iou_0.5", 1), ("f", 1), ("emd", -1)]
)
def test_higher_is_better_for_the_saver(metric, sign):
    settings = dict(metric=metric, emd_points=30)
    values = {}
    for by in (0.01, 0.6):
        trainer = evaluated(trainer_of(loader(5), Shift(by)), **settings)
        values[by] = trainer.comm_info["current_metric_value"]
        assert values[by] == sign * trainer.writer[f"val/{metric}", 4]
    assert values[0.01] > values[0.6]
    assert trainer.comm_info["current_metric_name"] == ("-" if sign < 0 else "") + metric


def test_the_saver_takes_the_metric():
    saver = CheckpointSaver()
    saver.trainer = trainer_of(loader(5), Shift(0.6))
    assert [evaluated(saver.trainer) and saver._improved() for _ in range(2)] == [True, False]
    saver.trainer.model.by.fill_(0.1)
    assert evaluated(saver.trainer)
    assert saver._improved()


@kd.DATASETS.register_module(force=True)
class FiveScans(torch.utils.data.Dataset):
    """The scans of this file as a data set."""

    def __init__(self, loop=1):
        self.loop = loop

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return scan(index)


@kd.MODELS.register_module(force=True)
class Learns(torch.nn.Module):
    """Learns how far to move."""

    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, batch):
        if self.training:
            return dict(loss=self.by.square())
        return dict(completed=batch["coord"] + self.by, completed_offset=batch["offset"])


def test_in_a_training(tmp_path):
    hooks = [dict(type="kd.CompletionEvaluator"), dict(type="CheckpointSaver")]
    data = dict(num_classes=1, train=dict(type="kd.FiveScans"), val=dict(type="kd.FiveScans"))
    changes = dict(
        model=dict(type="kd.Learns"), data=data, hooks=hooks, mix_prob=0, custom_imports=None
    )
    cfg = tiny_config(tmp_path, **changes)
    cfg.optimizer.lr = cfg.scheduler.max_lr = 0.5
    trainer = Trainer(cfg)
    trainer.train()
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if row["tag"] == "val/cd"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    values = [row["value"] for row in rows]
    assert values[0] > values[-1]
    best = torch.load(tmp_path / "model" / "model_best.pth")
    assert best["best_metric_value"] == pytest.approx(-min(values))


def test_no_evaluation_where_none_is_wanted():
    assert evaluated(trainer_of(None, evaluate=False)).comm_info == {}


class Nothing(Shift):
    """Completes the first scan of a batch by no points."""

    def forward(self, batch):
        first = int(batch["offset"][0])
        return dict(completed=batch["coord"][first:], completed_offset=batch["offset"] - first)


def test_an_empty_completion_is_told_and_never_the_best(caplog):
    saver = CheckpointSaver()
    saver.trainer = evaluated(trainer_of(loader(5), Nothing()))
    assert "1 of 5 completions have no points" in caplog.text
    assert saver.trainer.comm_info["current_metric_value"] == -math.inf
    assert not saver._improved()


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["completed", "completed_offset"])
def test_a_model_that_does_not_complete(key):
    batch = loader(5)[0]
    outputs = dict(completed=batch["coord"], completed_offset=batch["offset"])
    del outputs[key]
    with pytest.raises(InputError, match=f"output in evaluation has no `{key}`, only comp"):
        list(scored_clouds(outputs, batch))


@pytest.mark.parametrize(
    ("dropped", "text"),
    [
        (("name",), "the batch has no `name`, only coord"),
        (("target_offset",), "the batch has no `target_offset`"),
        (("target", "complete"), r"the batch has no `complete` \(or `target`\)"),
        (("target", "complete_offset"), "the batch has no `complete_offset`"),
    ],
)
def test_a_batch_without(dropped, text):
    batch = loader(5)[0]
    outputs = dict(completed=batch["coord"], completed_offset=batch["offset"])
    for key in dropped:
        del batch[key]
    with pytest.raises(InputError, match=text):
        list(scored_clouds(outputs, batch))


@pytest.mark.parametrize("ends", [[40, 30, 210], [40, 81, 123, 166], [-1, 210], []])
def test_offsets_that_do_not_cut_the_rows(ends):
    batch = loader(5)[0]
    with pytest.raises(InputError, match=r"completed_offset=\[.*210 rows of completed"):
        list(
            scored_clouds(
                dict(completed=batch["coord"], completed_offset=torch.tensor(ends)), batch
            )
        )


def test_other_numbers_of_scans():
    batch = loader(5)[0]
    outputs = dict(completed=batch["coord"], completed_offset=batch["offset"][-1:])
    with pytest.raises(InputError, match="5 names meet 1 completed scans and 5 scans of `target`"):
        list(scored_clouds(outputs, batch))


def test_a_metric_that_is_not_made():
    for settings in (dict(metric="CD"), dict(metric="iou_0.5", cells=(1.0,)), dict(metric="emd")):
        with pytest.raises(InputError, match="is none of cd, dist_pred2gt"):
            CompletionEvaluator(**settings)
    with pytest.raises(InputError, match="no scan was scored"):
        evaluated(trainer_of([]))


# --- several processes ----------------------------------------------------------------------------


def on_one_of_several(cfg):
    """Process r evaluates the scans r, r + world, ...; their running statistics have parted."""
    rank, world = comm.get_rank(), comm.get_world_size()
    batches = loader(2, range(rank, 5, world))
    trainer = evaluated(trainer_of(batches, Shift(0.1 if rank == 0 else 7.0)))
    scores = evaluate_folder(Path(cfg["out"]) / "a", Path(cfg["out"]) / "b")
    content = {"writer": [*trainer.writer.values()], "folder": scores.as_dict()}
    (Path(cfg["out"]) / f"{world} {rank}").write_text(json.dumps(content))


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and forks"
)
def test_two_processes_score_as_one(tmp_path, monkeypatch):
    multiprocessing.set_forkserver_preload([__name__])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_folders(tmp_path)
    for world in (1, 2):
        runtime.launch(on_one_of_several, world, Config({"device": "cpu", "out": str(tmp_path)}))
    one, first, second = (json.loads((tmp_path / f).read_text()) for f in ("1 0", "2 0", "2 1"))
    assert one["writer"] == [*expected().summary().values().values()]
    assert one == first == second


# --- folders --------------------------------------------------------------------------------------


def write_folders(folder, suffix=".npy"):
    """Predictions in `a`, true clouds in `b`."""
    for name in "ab":
        (folder / name).mkdir()
    for i in range(3):
        sample = scan(i)
        pred, gt = (sample["coord"] + torch.tensor(0.1)).numpy(), sample["target"].numpy()
        np.save(folder / "a" / f"{i}.npy", pred)
        if suffix == ".bin":
            np.pad(gt, ((0, 0), (0, 1))).astype("<f4").tofile(folder / "b" / f"{i}.bin")
        else:
            np.save(folder / "b" / f"{i}.npy", np.pad(gt, ((0, 0), (0, 2))))
    (folder / "a" / "notes.txt").write_text("not a cloud")


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_folders_score_as_their_clouds(tmp_path, suffix):
    write_folders(tmp_path, suffix)
    found = evaluate_folder(tmp_path / "a", tmp_path / "b").as_dict()
    scores = expected()
    scores.rows = scores.rows[:3]
    assert [row.pop("name") for row in found["rows"]] == ["0", "1", "2"]
    wanted = scores.as_dict()
    assert [row.pop("name") for row in wanted["rows"]] == NAMES[:3]
    assert found == wanted


def test_other_files_by_other_readers(tmp_path):
    write_folders(tmp_path)
    for path in (tmp_path / "b").iterdir():
        path.rename(path.with_suffix(".XYZ"))
    with pytest.raises(InputError, match=r"holds no \.bin, \.npy"):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    given = CompletionScores(emd_points=10)
    scores = evaluate_folder(
        tmp_path / "a",
        tmp_path / "b",
        readers={".xyz": lambda path: np.load(path.open("rb"))},
        scores=given,
    )
    assert scores.summary().emd_points == (10, 10)
    assert given.rows == []


def test_files_without_their_partner(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "a" / "1.npy").unlink()
    with pytest.raises(
        InputError, match="1 of 3 targets have no prediction in .*, the first is 1;"
    ):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    scores = evaluate_folder(tmp_path / "a", tmp_path / "b", subset=True)
    assert [row.name for row in scores.rows] == ["0", "2"]
    (tmp_path / "b" / "2.npy").unlink()
    with pytest.raises(
        InputError, match="1 of 2 predictions have no target in .*, the first is 2$"
    ):
        evaluate_folder(tmp_path / "a", tmp_path / "b", subset=True)


def test_files_that_cannot_be_read(tmp_path):
    write_folders(tmp_path)
    path = tmp_path / "a" / "0.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"0\.npy: not a readable cloud"):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    np.save(path, np.zeros(9))
    with pytest.raises(InputError, match=r"0\.npy: expected \(n, 3\) or more columns, got \(9,\)"):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    path.rename(path.with_suffix(".bin")).write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match=r"0\.bin: .*5 numbers are no rows"):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "1.bin").write_bytes(b"")
    with pytest.raises(InputError, match="two files for one scan"):
        evaluate_folder(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="is no folder"):
        evaluate_folder(tmp_path / "c", tmp_path / "b")
