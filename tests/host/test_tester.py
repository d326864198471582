"""The tester: one forward per scan and voting, against loops; files; weights."""

import json

import numpy as np
import pytest
import torch

from pointcept_kd.host import TESTERS, InputError, kd
from pointcept_kd.host.checkpoint import save_atomic
from pointcept_kd.host.tester import SemSegTester, plain_model

from . import tiny
from .tiny import tiny_config


@kd.DATASETS.register_module(force=True)
class TinyFragments(tiny.TinyScans):
    """Each scan as overlapping fragments; raw labels through `inverse`."""

    test_mode = True

    def __init__(self, test_mode=True, count=2, raw=True):
        super().__init__(count=count, raw=raw)

    def __getitem__(self, index):
        scan = super().__getitem__(index)
        rows = len(scan["segment"])
        made = np.random.default_rng(100 + index)
        fragments = []
        for _ in range(3):
            part = torch.from_numpy(np.sort(made.choice(rows, rows * 3 // 4, replace=False)))
            noisy = (
                scan["feat"][part] + torch.from_numpy(made.normal(0, 0.5, (len(part), 4))).float()
            )
            offset = torch.tensor([len(part)])
            fragments.append(
                dict(feat=noisy, segment=scan["segment"][part], offset=offset, index=part)
            )
        result = dict(segment=scan["segment"].numpy(), name=scan["name"], fragment_list=fragments)
        if self.raw:
            result.update(
                origin_segment=scan["origin_segment"].numpy(), inverse=scan["inverse"].numpy()
            )
        return result


@kd.DATASETS.register_module(force=True)
class Submitting(tiny.TinyScans):
    """A dataset with a submission format of its own."""

    def write_submission(self, name, pred, folder):
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / f"{name.replace('/', '-')}.txt", pred, fmt="%d")


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


@pytest.mark.parametrize("raw", [True, False])
def test_voting_against_loops(tmp_path, raw):
    model = tiny.TinyNet().eval()
    cfg = config(tmp_path, test=dict(type="kd.TinyFragments", test_mode=True, raw=raw))
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
    assert metrics["mIoU"] == pytest.approx(sum(scores_by_loops(pairs)) / 4)


def test_modes_choose_their_dataset(tmp_path):
    cfg = config(tmp_path, test=dict(type="kd.TinyFragments", test_mode=True))
    tester = SemSegTester(cfg, model=tiny.TinyNet(), mode="single")
    assert type(tester._dataset()) is tiny.TinyScans  # the validation set: test is for voting
    assert SemSegTester(config(tmp_path), model=tiny.TinyNet()).mode == "single"
    with pytest.raises(InputError, match="needs data.test with test_mode=True"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), mode="fragments")
    with pytest.raises(InputError, match=r"test\.mode='tta': use one of single, fragments"):
        SemSegTester(config(tmp_path), model=tiny.TinyNet(), mode="tta")


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


def test_a_dataset_writes_its_own_submission(tmp_path):
    cfg = config(tmp_path, test=dict(type="kd.Submitting", count=2, raw=True))
    SemSegTester(cfg, model=tiny.TinyNet()).test()
    for i in range(2):
        written = np.loadtxt(tmp_path / "result" / "submit" / f"scan-{i:02d}.txt")
        assert np.array_equal(written, np.load(tmp_path / "result" / f"scan_{i:02d}_pred.npy"))


def test_a_split_without_labels_is_predicted_not_scored(tmp_path):
    class Unlabelled(tiny.TinyScans):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "segment": torch.full_like(sample["segment"], -1)}

    kd.DATASETS.register_module("Unlabelled", force=True, module=Unlabelled)
    metrics = SemSegTester(
        config(tmp_path, test=dict(type="kd.Unlabelled", count=1)), model=tiny.TinyNet()
    ).test()
    assert metrics["points"] == 0
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
