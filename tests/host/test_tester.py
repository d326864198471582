"""The tester: one forward per scan, voting and augmented passes, against loops; files; reuse; processes; weights."""

import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import pointcept_kd.data  # noqa: F401 (registers the transforms)
from pointcept_kd.host import TESTERS, InputError, kd, tester
from pointcept_kd.host.checkpoint import save_atomic
from pointcept_kd.host.results import file_stems
from pointcept_kd.host.runtime import launch, run_tool
from pointcept_kd.host.tester import SemSegTester, plain_model
from pointcept_kd.host.voting import TTA_SETS, tta_chains
from tools import test as test_tool

from . import tiny
from .tiny import tiny_config


@kd.DATASETS.register_module(force=True)
class TinyFragments(tiny.TinyScans):
    """Each scan as overlapping fragments; raw labels through `inverse`."""

    test_mode = True

    def __init__(self, test_mode=True, count=2, raw=True, fault=""):
        super().__init__(count=count, raw=raw)
        self.flaw = fault

    def __getitem__(self, index):
        scan = super().__getitem__(index)
        rows = len(scan["segment"])
        made = np.random.default_rng(100 + index)
        fragments = []
        third = np.arange(rows) % 3  # fragment i lacks every third point: each has two votes
        for i in range(3):
            part = torch.from_numpy(np.flatnonzero(third != i))
            if self.flaw == "gap":
                part = part[part != 4]
            if self.flaw == "outside":
                part = torch.cat([part, torch.tensor([rows])])
                scan["feat"], scan["segment"] = (
                    torch.cat([scan[k], scan[k][:1]])[: rows + 1] for k in ("feat", "segment")
                )
            noisy = (
                scan["feat"][part] + torch.from_numpy(made.normal(0, 0.5, (len(part), 4))).float()
            )
            offset = torch.tensor([len(part)])
            fragments.append(
                dict(feat=noisy, segment=scan["segment"][part], offset=offset, index=part)
            )
        result = dict(
            segment=scan["segment"][:rows].numpy(), name=scan["name"], fragment_list=fragments
        )
        if self.raw:
            result.update(
                origin_segment=scan["origin_segment"].numpy(), inverse=scan["inverse"].numpy()
            )
        return result


@kd.DATASETS.register_module(force=True)
class Submitting(tiny.TinyScans):
    """A dataset with a submission format of its own."""

    def __init__(self, data_root="", refuse=False, **kwargs):
        super().__init__(**kwargs)
        self.data_root, self.refuse = data_root, refuse

    def write_submission(self, name, pred, folder):
        if self.refuse and name == "scan/01":
            raise InputError(f"{name}: 40 predictions for 41 points")
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / f"{name.replace('/', '-')}.txt", pred, fmt="%d")

    def finish_submission(self, folder):
        scans = sum(p.name.startswith("scan-") for p in folder.iterdir())
        with open(folder / "done.txt", "a") as file:
            file.write(f"{scans} scans\n")


def config(path, test=None, **changes):
    data = tiny.tiny_values(path)["data"]
    if test is not None:
        data["test"] = test
    return tiny_config(path, data=data, **changes)


def scores_by_loops(pairs):
    hits, union = [0] * tiny.CLASSES, [0] * tiny.CLASSES
    for pred, target in pairs:
        for p, t in zip(pred.tolist(), target.tolist()):
            if t != -1:
                hits[t] += p == t
                union[t] += 1
                union[p] += p != t
    return [h / u if u else 0.0 for h, u in zip(hits, union)]


def test_registered():
    assert TESTERS.get("SemSegTester") is not None
    assert TESTERS.get("kd.SemSegTester") is SemSegTester


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_single_forward_against_loops_at_raw_points(tmp_path, batch_size):
    model = tiny.TinyNet().eval()
    cfg = config(
        tmp_path, batch_size_test=batch_size, test=dict(type="kd.TinyScans", count=3, raw=True)
    )
    cfg.batch_size_test_per_gpu = batch_size
    metrics = SemSegTester(cfg, model=model).test()
    scans = tiny.TinyScans(count=3, raw=True)
    pairs = []
    for index in range(3):
        scan = scans[index]
        pred = model(scan)["seg_logits"].argmax(1)[scan["inverse"]]
        saved = np.load(tmp_path / "result" / f"scan_{index:02d}_pred.npy")
        assert np.array_equal(saved, pred.numpy())
        pairs.append((pred, scan["origin_segment"]))
    iou = scores_by_loops(pairs)
    assert [metrics["classes"][n]["iou"] for n in "abcd"] == pytest.approx(iou)
    assert metrics["mIoU"] == pytest.approx(sum(iou) / 4)
    assert metrics["scans"] == 3
    assert "at raw points through inverse" in metrics["protocol"]
    assert json.loads((tmp_path / "result" / "metrics.json").read_text()) == metrics


def test_scans_without_inverse_or_names(tmp_path):
    class Nameless(tiny.TinyScans):
        def __getitem__(self, index):
            return {k: v for k, v in super().__getitem__(index).items() if k != "name"}

    kd.DATASETS.register_module("Nameless", force=True, module=Nameless)
    cfg = config(tmp_path, test=dict(type="kd.Nameless", count=3))
    cfg.batch_size_test_per_gpu = 2
    metrics = SemSegTester(cfg, model=tiny.TinyNet()).test()
    assert metrics["points"] == 19 + 20 + 21
    files = sorted(p.name for p in (tmp_path / "result").glob("*.npy"))
    assert files == [f"scan_{i:02d}_pred.npy" for i in range(3)]
    assert [len(np.load(tmp_path / "result" / f)) for f in files] == [20, 21, 22]


@pytest.mark.parametrize(("raw", "batch_size"), [(True, 1), (False, 1), (True, 2), (False, 5)])
def test_voting_against_loops(tmp_path, raw, batch_size):
    model = tiny.TinyNet().eval()
    cfg = config(tmp_path, test=dict(type="kd.TinyFragments", test_mode=True, raw=raw))
    cfg.batch_size_test_per_gpu = batch_size
    metrics = SemSegTester(cfg, model=model).test()
    pairs = []
    for index in range(2):
        sample = TinyFragments(raw=raw)[index]
        votes = [[0.0] * tiny.CLASSES for _ in sample["segment"]]
        for fragment in sample["fragment_list"]:
            chances = model(fragment)["seg_logits"].detach().double().softmax(1)
            for row, chance in zip(fragment["index"].tolist(), chances.tolist()):
                votes[row] = [a + b for a, b in zip(votes[row], chance)]
        pred = torch.tensor([row.index(max(row)) for row in votes])
        target = torch.from_numpy(sample["segment"])
        if raw:
            pred, target = pred[sample["inverse"]], torch.from_numpy(sample["origin_segment"])
        assert np.array_equal(
            np.load(tmp_path / "result" / f"scan_{index:02d}_pred.npy"), pred.numpy()
        )
        pairs.append((pred, target))
    assert metrics["mode"] == "fragments"
    assert metrics["votes_per_point"] == [2, 2]
    assert "after voting over fragments, 2 votes per point" in metrics["protocol"]
    assert metrics["mIoU"] == pytest.approx(sum(scores_by_loops(pairs)) / 4)


def test_modes_choose_their_dataset(tmp_path):
    cfg = config(tmp_path, test=dict(type="kd.TinyFragments", test_mode=True))
    tester = SemSegTester(cfg, model=tiny.TinyNet(), mode="single")
    assert type(tester._dataset()) is tiny.TinyScans  # the validation set: test is for voting
    assert SemSegTester(config(tmp_path), model=tiny.TinyNet()).mode == "single"
    with pytest.raises(InputError, match="needs data.test with test_mode=True"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), mode="fragments")
    with pytest.raises(InputError, match=r"test\.mode='often': use one of single, fragments, tta"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), mode="often")


def test_a_point_in_no_fragment_is_an_error_with_the_scan(tmp_path):
    test = dict(type="kd.TinyFragments", test_mode=True, raw=False, fault="gap")
    with pytest.raises(InputError, match=r"scan scan/00: 1 of 20 points, the first in row 4"):
        SemSegTester(config(tmp_path, test=test), model=tiny.TinyNet()).test()
    test["fault"] = "outside"
    with pytest.raises(InputError, match=r"scan scan/00: fragment 0 points to row 20 of 20"):
        SemSegTester(config(tmp_path, test=test), model=tiny.TinyNet()).test()


def test_batches_of_fragments_of_a_network_that_looks_around(tmp_path):
    """A network whose rows depend on the other rows of their scan: wrong offsets would show."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, tiny.CLASSES)

        def forward(self, batch):
            ends = [0, *batch["offset"].tolist()]
            parts = [batch["feat"][a:b] for a, b in pairwise(ends)]
            around = torch.cat([part - part.mean(0) for part in parts])
            return {"seg_logits": self.head(around * 3)}

    test = dict(type="kd.TinyFragments", test_mode=True, count=3)
    model, saved = Mean(), []
    for batch_size in (1, 2, 3):
        cfg = config(tmp_path / str(batch_size), test=test)
        cfg.batch_size_test_per_gpu = batch_size
        SemSegTester(cfg, model=model, save_probabilities=True).test()
        folder = tmp_path / str(batch_size) / "result"
        saved.append([np.load(folder / f"scan_{i:02d}_prob.npy") for i in range(3)])
    for other in saved[1:]:
        for one, two in zip(saved[0], other):
            np.testing.assert_allclose(two.astype(float), one.astype(float), atol=1e-3)
    assert saved[0][0].dtype == np.float16
    np.testing.assert_allclose(saved[0][0].astype(float).sum(1), 1, atol=3e-3)


# ---------------------------------------------------------------------------- augmented passes

SIZE = 0.7


@kd.MODELS.register_module(force=True)
class CellNet(nn.Module):
    """Logits from the voxel's cell alone, so that it does not matter which point stands for a voxel."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Linear(3, 16)
        self.head = nn.Linear(16, tiny.CLASSES)

    def forward(self, batch):
        assert "segment" not in batch
        return {"seg_logits": self.head(torch.sin(self.waves(batch["grid_coord"].float())))}


def scans_on_disk(root, count=2):
    """Folders of .npy assets; returns their coordinates and labels."""
    scans = []
    for i in range(count):
        made = np.random.default_rng(50 + i)
        coord = made.uniform(-4, 4, (150 + i, 3)).astype(np.float32)
        segment = made.integers(-1, tiny.CLASSES, 150 + i)
        folder = root / "train" / f"s{i}"
        folder.mkdir(parents=True)
        np.save(folder / "coord.npy", coord)
        np.save(folder / "strength.npy", made.random(150 + i).astype(np.float32))
        np.save(folder / "segment.npy", segment)
        scans.append((coord, segment))
    return scans


def evaluate(*before, keys=("segment", "origin_segment", "inverse"), **grid):
    grid = {"return_inverse": True, "return_grid_coord": True, **grid}
    return [
        dict(type="Copy", keys_dict=dict(segment="origin_segment")),
        *before,
        dict(type="GridSample", grid_size=SIZE, **grid),
        dict(type="ToTensor"),
        dict(type="Collect", keys=("coord", "grid_coord", *keys), feat_keys=("coord", "strength")),
    ]


def entry(root, transform=None, **changes):
    steps = evaluate() if transform is None else transform
    return {
        **dict(type="DefaultDataset", split="train", data_root=str(root), transform=steps),
        **changes,
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", ["turns", "turns_flips"])
def test_tta_against_loops_at_raw_points(tmp_path, batch_size, name):
    scans, model = scans_on_disk(tmp_path / "data"), CellNet()
    model.waves.weight.data.mul_(3)  # neighbouring cells differ: a wrong cell would show
    cfg = config(tmp_path, test=entry(tmp_path / "data"))
    cfg.batch_size_test_per_gpu = batch_size
    metrics = SemSegTester(cfg, model=model, mode="tta", tta=name, save_probabilities=True).test()
    pairs = []
    for i, (coord, segment) in enumerate(scans):
        total = np.zeros((len(coord), tiny.CLASSES))
        for k in range(len(TTA_SETS[name])):
            x, y, z = coord.T.astype(np.float64)
            for _ in range(k % 4):
                x, y = -y, x
            y = -y if k >= 4 else y
            cells = np.floor(np.stack([x, y, z], 1) / SIZE)
            cells -= cells.min(0)
            logits = model({"grid_coord": torch.from_numpy(cells)})["seg_logits"].detach().double()
            total += logits.softmax(1).numpy()
        mean = total / len(TTA_SETS[name])
        folder = tmp_path / "result"
        found = np.load(folder / f"s{i}_prob.npy").astype(np.float64)
        np.testing.assert_allclose(found, mean, atol=1e-3)
        pred = np.load(folder / f"s{i}_pred.npy")
        assert np.array_equal(pred, mean.argmax(1))
        pairs.append((pred, segment))
    assert metrics["mIoU"] == pytest.approx(sum(scores_by_loops(pairs)) / 4)
    passes = len(TTA_SETS[name])
    assert metrics["votes_per_point"] == [passes, passes]
    assert f"mean of {passes} augmented passes per scan" in metrics["protocol"]


class PlaneNet(torch.nn.Module):
    """Scores each point by its coordinates."""

    def __init__(self):
        super().__init__()
        self.waves = torch.nn.Linear(3, tiny.CLASSES)

    def forward(self, batch):
        return {"seg_logits": self.waves(batch["coord"].float()).sin() * 3}


def test_flips_without_a_grid_start_from_the_scan_as_it_is(tmp_path):
    """Published test-time augmentation flipped one array in place: the third view was a flip of the second."""
    scans, model = scans_on_disk(tmp_path / "data"), PlaneNet()
    steps = [
        dict(type="ToTensor"),
        dict(type="Collect", keys=("coord", "segment", "name"), feat_keys=("coord",)),
    ]
    cfg = config(tmp_path, test=entry(tmp_path / "data", steps))
    SemSegTester(cfg, model=model, mode="tta", tta="flips", save_probabilities=True).test()
    for i, (coord, _) in enumerate(scans):
        views = [
            coord * np.array(signs) for signs in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, 1))
        ]
        with torch.no_grad():
            votes = [model({"coord": torch.from_numpy(v)})["seg_logits"].softmax(1) for v in views]
        found = np.load(tmp_path / "result" / f"s{i}_prob.npy").astype(np.float64)
        np.testing.assert_allclose(found, torch.stack(votes).mean(0).numpy(), atol=1e-3)


def test_views_without_a_grid_must_keep_every_point(tmp_path):
    scans_on_disk(tmp_path / "data")
    steps = [
        dict(type="kd.RangeCrop", point_cloud_range=[-3, -3, -9, 3, 3, 9]),
        dict(type="ToTensor"),
        dict(type="Collect", keys=("coord", "segment", "name"), feat_keys=("coord",)),
    ]
    tester = SemSegTester(
        config(tmp_path, test=entry(tmp_path / "data", steps)), model=PlaneNet(), mode="tta"
    )
    with pytest.raises(InputError, match=r"scan s0: the transforms keep \d+ of 150 raw points"):
        tester.test()


def test_one_plain_pass_is_mode_single(tmp_path):
    scans_on_disk(tmp_path / "data")
    model = CellNet()
    cfg = config(tmp_path, test=entry(tmp_path / "data"))
    single = SemSegTester(cfg, model=model, mode="single").test()
    once = SemSegTester(cfg, model=model, mode="tta", tta=[[]]).test()
    assert once["mIoU"] == single["mIoU"]
    assert once["points"] == single["points"]
    assert "one pass per scan, as in validation" in single["protocol"]


def test_tta_takes_the_scans_of_test_and_the_pipeline_of_val(tmp_path):
    scans_on_disk(tmp_path / "data", count=3)
    (tmp_path / "one.json").write_text('["train/s2"]')
    (tmp_path / "data" / "one.json").write_text('["train/s2"]')
    data = tiny.tiny_values(tmp_path)["data"]
    data["val"] = entry(tmp_path / "data")
    data["test"] = entry(
        tmp_path / "data", [], split="one.json", test_mode=True, test_cfg=dict(aug_transform=None)
    )
    metrics = SemSegTester(
        tiny_config(tmp_path, data=data), model=CellNet(), mode="tta", tta="turns"
    ).test()
    assert metrics["scans"] == 1
    assert metrics["data"] == "data.test through the transforms of data.val, split one.json"
    assert (tmp_path / "result" / "s2_pred.npy").is_file()


def test_tta_over_a_concatenation_names_every_scan(tmp_path):
    """Two folders with scans of the same names: none may overwrite or hide the other."""
    for part in "ab":
        scans_on_disk(tmp_path / part)
    both = dict(type="ConcatDataset", datasets=[entry(tmp_path / "a"), entry(tmp_path / "b")])
    metrics = SemSegTester(
        config(tmp_path, test=both), model=CellNet(), mode="tta", tta="turns"
    ).test()
    assert metrics["scans"] == 4
    names = sorted(p.name for p in (tmp_path / "result").glob("*.npy"))
    assert names == [f"s{i % 2}_{i:06d}_pred.npy" for i in (0, 2, 1, 3)]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (evaluate(return_inverse=False, keys=("segment",)), "no GridSample with return_inverse"),
        (evaluate(dict(type="GridSample", grid_size=0.1)), "2 GridSamples"),
        (evaluate(keys=("segment",)), "add inverse to the keys of Collect"),
        (evaluate(mode="test"), "mode='test'"),
        (
            evaluate(dict(type="kd.RangeCrop", point_cloud_range=[-3, -3, -9, 3, 3, 9])),
            r"scan s0: GridSample saw \d+ of 150 raw points",
        ),
    ],
)
def test_pipelines_that_tta_refuses(tmp_path, steps, text):
    scans_on_disk(tmp_path / "data")
    with pytest.raises(InputError, match=text):
        SemSegTester(
            config(tmp_path, test=entry(tmp_path / "data", steps)), model=CellNet(), mode="tta"
        ).test()


def test_tta_arguments(tmp_path):
    with pytest.raises(InputError, match="TinyScans has not"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), mode="tta")
    with pytest.raises(InputError, match=r"test\.tta is for test\.mode=tta"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), tta="turns")
    for bad in ("spin", [], [dict(type="RandomFlip")], 8):
        with pytest.raises(InputError, match="use one of turns, turns_flips, scales_flips, flips"):
            tta_chains(bad)
    assert len(tta_chains(None)) == 8
    assert len(tta_chains("scales_flips")) == 10


# ------------------------------------------------------------------------------ files and reuse


def test_predictions_are_always_made_anew(tmp_path):
    stale = tmp_path / "result" / "scan_00_pred.npy"
    stale.parent.mkdir()
    np.save(stale, np.full(40, 3))
    torch.manual_seed(1)
    first = SemSegTester(config(tmp_path), model=tiny.TinyNet()).test()
    before = np.load(stale)
    torch.manual_seed(2)
    second = SemSegTester(config(tmp_path), model=tiny.TinyNet()).test()
    assert not np.array_equal(before, np.full(40, 3))
    assert not np.array_equal(before, np.load(stale))
    assert first["mIoU"] != second["mIoU"]
    assert not list(stale.parent.glob("*.tmp"))


class Counting(tiny.TinyNet):
    """Counts its forwards."""

    forwards = 0

    def forward(self, batch):
        self.forwards += 1
        return super().forward(batch)


def counted(path, seed=1, mode=None, test=None, **options):
    """A test with the weights of a seed: the metrics, and how many forwards it took."""
    torch.manual_seed(seed)
    model = Counting()
    metrics = SemSegTester(config(path, test=test), model=model, mode=mode, **options).test()
    return metrics, model.forwards


@pytest.mark.parametrize(
    ("test", "each"),
    [(None, 1), (dict(type="kd.TinyFragments", test_mode=True, count=3), 3)],
)
def test_reuse_takes_over_what_the_same_weights_made(tmp_path, test, each, caplog):
    made, forwards = counted(tmp_path, test=test)
    assert forwards == 3 * each
    again, forwards = counted(tmp_path, test=test, reuse=True)
    assert (forwards, again["reused"]) == (0, 3)
    assert {**again, "reused": 0} == made

    # What does not fit is predicted anew: a file cut off, a file that is gone, another number of points.
    folder = tmp_path / "result"
    (folder / "scan_00_pred.npy").write_bytes((folder / "scan_00_pred.npy").read_bytes()[:-8])
    (folder / "scan_01_pred.npy").unlink()
    again, forwards = counted(tmp_path, test=test, reuse=True)
    assert (forwards, again["reused"], again["mIoU"]) == (2 * each, 1, made["mIoU"])
    record = json.loads((folder / "predictions.json").read_text())
    record["scans"]["scan_02"]["points"] += 1
    (folder / "predictions.json").write_text(json.dumps(record))
    assert counted(tmp_path, test=test, reuse=True)[1] == each

    # So are probabilities where none were kept.
    assert counted(tmp_path, test=test, reuse=True, save_probabilities=True)[1] == 3 * each
    assert counted(tmp_path, test=test, reuse=True, save_probabilities=True)[1] == 0

    # Other weights: everything anew, said in one line; and what they left is theirs.
    logging.getLogger("pointcept_kd").addHandler(caplog.handler)
    caplog.clear()
    assert counted(tmp_path, seed=2, test=test, reuse=True)[1] == 3 * each
    lines = [m for m in caplog.messages if "predicted anew" in m]
    assert len(lines) == 1
    assert "made with other weights:" in lines[0]
    logging.getLogger("pointcept_kd").removeHandler(caplog.handler)
    assert counted(tmp_path, seed=1, test=test, reuse=True)[1] == 3 * each
    assert counted(tmp_path, seed=1, test=test)[1] == 3 * each


def test_reuse_asks_for_the_same_data_and_mode(tmp_path):
    scans_on_disk(tmp_path / "data")
    forwards = []

    def run(steps, **options):
        torch.manual_seed(1)
        model = CellNet()
        count = model.register_forward_hook(lambda *_: forwards.append(1))
        before = len(forwards)
        cfg = config(tmp_path, test=entry(tmp_path / "data", steps), model=dict(type="kd.CellNet"))
        SemSegTester(cfg, model=model, reuse=True, **options).test()
        count.remove()
        return len(forwards) - before

    assert run(evaluate()) == 2
    assert run(evaluate()) == 0
    assert run(evaluate(hash_type="ravel")) == 2
    assert run(evaluate(hash_type="ravel"), mode="tta", tta="turns") == 8
    assert run(evaluate(hash_type="ravel"), mode="tta", tta="turns") == 0
    assert run(evaluate(hash_type="ravel"), mode="tta") == 16


def test_an_interrupted_test_goes_on(tmp_path):
    class Stopped(tiny.TinyScans):
        stops = True

        def __getitem__(self, index):
            if index == 2 and self.stops:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    kd.DATASETS.register_module("TinyStopping", force=True, module=Stopped)
    test = dict(type="kd.TinyStopping", count=3, raw=True)
    with pytest.raises(KeyboardInterrupt):
        counted(tmp_path, test=test)
    assert not (tmp_path / "result" / "metrics.json").exists()
    Stopped.stops = False
    metrics, forwards = counted(tmp_path, test=test, reuse=True)
    assert (metrics["scans"], metrics["reused"], forwards) == (3, 2, 1)
    assert metrics["mIoU"] == counted(tmp_path / "whole", test=test)[0]["mIoU"]


def test_predictions_may_be_left_out(tmp_path):
    counted(tmp_path, save_predictions=False)
    assert [p.name for p in (tmp_path / "result").iterdir()] == ["metrics.json"]
    with pytest.raises(InputError, match="needs test.save_predictions=True"):
        counted(tmp_path, save_predictions=False, save_probabilities=True)


def test_file_stems():
    assert file_stems(["a/b", "c"]) == ["a_b", "c"]
    assert file_stems(["a/b", "c", "a_b"]) == ["a_b_000000", "c", "a_b_000002"]


def test_a_dataset_writes_its_own_submission(tmp_path):
    cfg = config(tmp_path, test=dict(type="kd.Submitting", count=2, raw=True))
    SemSegTester(cfg, model=tiny.TinyNet()).test()
    for i in range(2):
        written = np.loadtxt(tmp_path / "result" / "submit" / f"scan-{i:02d}.txt")
        assert np.array_equal(written, np.load(tmp_path / "result" / f"scan_{i:02d}_pred.npy"))


def test_a_submission_holds_the_scans_of_the_last_finished_test_alone(tmp_path):
    submit = tmp_path / "result" / "submit"
    for count in (3, 2):
        cfg = config(tmp_path, test=dict(type="kd.Submitting", count=count))
        metrics = SemSegTester(cfg, model=tiny.TinyNet()).test()
        assert metrics["submission"] == str(submit)
        names = {p.name for p in submit.iterdir()}
        assert names == {"done.txt", *(f"scan-{i:02d}.txt" for i in range(count))}
        assert (submit / "done.txt").read_text() == f"{count} scans\n"
    # One that cannot be written is said, insisted on only where asked, and no old one stays.
    cfg = config(tmp_path, test=dict(type="kd.Submitting", count=2, refuse=True))
    with pytest.raises(InputError, match="scan/01: 40 predictions for 41 points"):
        SemSegTester(cfg, model=tiny.TinyNet(), save_submission=True).test()
    assert submit.is_dir()
    metrics = SemSegTester(cfg, model=tiny.TinyNet()).test()
    assert metrics["submission"] is None
    assert not list(submit.parent.glob("submit*"))
    cfg = config(tmp_path, test=dict(type="kd.Submitting", count=2))
    assert SemSegTester(cfg, model=tiny.TinyNet(), save_submission=False).test()["scans"] == 2
    assert not submit.exists()
    with pytest.raises(InputError, match="TinyScans has no write_submission"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), save_submission=True).test()


def test_members_of_a_concatenation_submit(tmp_path):
    def members(*roots):
        parts = [dict(type="kd.Submitting", count=2, data_root=root) for root in roots]
        return dict(type="ConcatDataset", datasets=[*parts, dict(type="kd.TinyScans", count=1)])

    cfg = config(tmp_path, test=members("x", "y"))
    assert SemSegTester(cfg, model=tiny.TinyNet()).test()["scans"] == 5
    submit = tmp_path / "result" / "submit"
    assert sorted(p.relative_to(submit).as_posix() for p in submit.rglob("*.txt")) == [
        f"{i}_Submitting/{name}.txt" for i in (0, 1) for name in ("done", "scan-00", "scan-01")
    ]
    SemSegTester(config(tmp_path, test=members("x")), model=tiny.TinyNet()).test()
    assert {p.name for p in submit.iterdir()} == {"done.txt", "scan-00.txt", "scan-01.txt"}


# ------------------------------------------------------------------------------------------ tool


def test_the_tool_takes_mode_and_options(tmp_path, monkeypatch, capsys):
    config_file = tiny.write_config(tmp_path / "c.py", seed=None)
    folder = tmp_path / "exp"
    (folder / "model").mkdir(parents=True)
    torch.manual_seed(0)
    save_atomic({"state_dict": tiny.TinyNet().state_dict()}, folder / "model" / "model_best.pth")

    def run(*arguments):
        argv = ["test.py", "--config-file", str(config_file), *arguments]
        monkeypatch.setattr("sys.argv", argv)
        code = run_tool(test_tool.main)
        path = folder / "result" / "metrics.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    assert run("--mode", "often")[0] == 2
    assert "use one of single, fragments, tta" in capsys.readouterr().err
    code, made = run("--mode", "single", "--options", "test.save_probabilities=True")
    assert (code, made["mode"], made["reused"]) == (0, "single", 0)
    assert np.load(folder / "result" / "scan_02_prob.npy").shape == (44, tiny.CLASSES)
    # A config without a seed still tests the same way each time, so that reuse can hold.
    code, again = run("--options", "test.reuse=True", "batch_size_test=3")
    assert (code, again["reused"], again["mIoU"]) == (0, 3, made["mIoU"])
    assert run("--options", "test.reus=True")[0] == 2
    assert "did you mean test.reuse" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- processes


def both_modes(cfg):
    """What two processes run: a note for every metrics.json that is written, then both protocols."""
    torch.set_num_threads(1)
    write = tester.write_atomic

    def noting(path, content):
        if path.name == "metrics.json":
            with open(path.parent / "written.txt", "a") as file:
                file.write("once\n")
        write(path, content)

    tester.write_atomic = noting
    root = cfg["save_path"]
    try:
        for name, test in (
            ("single", dict(type="kd.Submitting", count=5, raw=True)),
            ("fragments", dict(type="kd.TinyFragments", test_mode=True, count=5)),
            ("lonely", dict(type="kd.Submitting", count=1)),
        ):
            cfg["save_path"], cfg["data"]["test"] = f"{root}/{name}", test
            SemSegTester(cfg).test()
    finally:
        tester.write_atomic = write


def test_two_processes_score_as_one(tmp_path):
    torch.manual_seed(4)
    save_atomic({"state_dict": tiny.TinyNet().state_dict()}, tmp_path / "w.pth")
    for world in (1, 2):
        cfg = config(tmp_path / str(world), weight=str(tmp_path / "w.pth"))
        launch(both_modes, world, cfg)
    for name, scans in (("single", 5), ("fragments", 5), ("lonely", 1)):
        one, two = (tmp_path / world / name / "result" for world in "12")
        results = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
        for metrics in results:
            metrics.pop("submission")
        assert results[0] == results[1]
        assert results[0]["scans"] == scans
        assert (two / "written.txt").read_text() == "once\n"
        records = [json.loads((f / "predictions.json").read_text()) for f in (one, two)]
        assert records[0] == records[1]
        assert len(records[0]["scans"]) == scans
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
        for path in one.glob("*.npy"):
            assert np.array_equal(np.load(path), np.load(two / path.name))
    assert (tmp_path / "2" / "single" / "result" / "submit" / "done.txt").read_text() == "5 scans\n"


# ---------------------------------------------------------------------------------------- labels


def test_a_split_without_labels_is_predicted_not_scored(tmp_path, caplog):
    class Unlabelled(tiny.TinyScans):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "segment": torch.full_like(sample["segment"], -1)}

    kd.DATASETS.register_module("Unlabelled", force=True, module=Unlabelled)
    for kind, labelled in (("Unlabelled", False), ("TinyScans", True)):
        cfg = config(tmp_path, test=dict(type=f"kd.{kind}", count=1))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            metrics = SemSegTester(cfg, model=tiny.TinyNet(), verbose=True).test()
        told = [r.getMessage() for r in caplog.records if "Test: " in r.getMessage()]
        end = f"s, accuracy {metrics['allAcc']:.4f}" if labelled else "s, no labels"
        assert [line.endswith(end) for line in told] == [True]
        assert (metrics["points"] > 0) is labelled
        assert (tmp_path / "result" / "scan_00_pred.npy").is_file()


# --------------------------------------------------------------------------------------- weights


def test_the_plain_student_of_a_distiller_is_built_and_loaded(tmp_path):
    student = tiny.TinyNet(width=5)
    pair = dict(
        type="kd.TinyPair",
        student=dict(model=dict(type="kd.TinyNet", width=5)),
        teacher=dict(weight="absent.pth"),
    )
    for name, state in (
        (
            "pair.pth",
            {f"student.{k}": v for k, v in student.state_dict().items()}
            | {"adapter.weight": torch.ones(1)},
        ),
        ("student.pth", student.state_dict()),
    ):
        save_atomic({"epoch": 4, "state_dict": state}, tmp_path / name)
        tester = SemSegTester(config(tmp_path / "exp", model=pair, weight=str(tmp_path / name)))
        assert type(tester.model) is tiny.TinyNet
        assert torch.equal(tester.model.seg_head.weight, student.seg_head.weight)


def test_plain_model():
    assert plain_model(dict(type="A", student=dict(model=dict(type="B")))) == dict(type="B")
    assert plain_model(dict(type="A", student=dict(type="B"))) == dict(type="B")
    assert plain_model(dict(type="A")) == dict(type="A")


def test_weights_are_needed_and_must_match_exactly(tmp_path):
    with pytest.raises(InputError, match="testing needs a checkpoint"):
        SemSegTester(config(tmp_path / "exp"))
    state = tiny.TinyNet().state_dict()
    del state["seg_head.bias"]
    save_atomic({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"missing seg_head\.bias"):
        SemSegTester(config(tmp_path / "exp", weight=str(tmp_path / "w.pth")))
    assert not (tmp_path / "exp").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create"):
        SemSegTester(config(tmp_path / "file"), model=tiny.TinyNet()).test()
