"""Submissions: bytes written from the formats' descriptions, damaged ones found, readers and tools that write them."""

import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from pointcept_kd.data import submission_writers, submissions
from pointcept_kd.data.mirror import Mirror
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.semantic_kitti import (
    LEARNING_MAP_INV,
    SPLITS,
    SemanticKITTIDataset,
    map_labels,
)
from pointcept_kd.host import InputError, kd
from pointcept_kd.host.tester import SemSegTester
from tools import prepare_data

from ..host.tiny import tiny_config

TOKENS = ("a1", "b2", "c3")


@kd.DATASETS.register_module(force=True)
class KittiUnderAnotherName(SemanticKITTIDataset):
    """What a user derives from a reader."""


@kd.MODELS.register_module(force=True)
class CellClasses(nn.Module):
    """The class of a point is its cell's sum modulo 19 (or 16)."""

    def __init__(self, classes=19):
        super().__init__()
        self.classes = classes
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        ids = batch["grid_coord"].sum(1) % self.classes
        return {"seg_logits": nn.functional.one_hot(ids, self.classes).float()}


def write_kitti(folder, name, pred):
    return submission_writers.write_semantic_kitti(folder, name, pred, LEARNING_MAP_INV)


def kitti_root(root, sequences=SPLITS["test"], scans=2):
    """Small scans in SemanticKITTI's layout; point counts differ."""
    counts = {}
    for sequence in sequences:
        folder = root / "dataset" / "sequences" / sequence / "velodyne"
        folder.mkdir(parents=True)
        for i in range(scans):
            points = 20 + int(sequence) + i
            made = np.random.default_rng(points)
            made.uniform(-9, 9, (points, 4)).astype("<f4").tofile(folder / f"{i:06d}.bin")
            counts[f"{sequence}_{i:06d}"] = points
    return counts


def nuscenes_root(root, split="test"):
    """Key frames without labels, as `test` has them."""
    folder = root / "raw" / "samples" / "LIDAR_TOP"
    folder.mkdir(parents=True)
    (root / "info").mkdir()
    infos, counts = [], {}
    for i, token in enumerate(TOKENS):
        made = np.random.default_rng(i)
        made.uniform(-9, 9, (30 + i, 5)).astype("<f4").tofile(folder / f"{token}.pcd.bin")
        infos.append(dict(lidar_path=f"samples/LIDAR_TOP/{token}.pcd.bin", lidar_token=token))
        counts[token] = 30 + i
    (root / "info" / f"nuscenes_infos_10sweeps_{split}.pkl").write_bytes(pickle.dumps(infos))
    return counts


def kitti_submission(root, folder):
    counts = kitti_root(root)
    for name, points in counts.items():
        made = np.random.default_rng(points)
        write_kitti(folder, name, made.integers(0, 19, points))
    return counts


def nuscenes_submission(folder, split="test"):
    counts = {token: 30 + i for i, token in enumerate(TOKENS)}
    for token, points in counts.items():
        pred = np.random.default_rng(points).integers(0, 16, points)
        submission_writers.write_nuscenes(folder, split, token, pred)
    submission_writers.finish_nuscenes(folder, split)
    return counts


# ------------------------------------------------------------------------------------------ bytes


def test_semantic_kitti_bytes(tmp_path):
    path = write_kitti(tmp_path, "11_000042", np.array([0, 8, 18, -1, 13]))
    assert path == tmp_path / "sequences" / "11" / "predictions" / "000042.label"
    # car 10, road 40, traffic-sign 81, unlabeled 0, fence 51; little-endian, upper half 0
    assert path.read_bytes() == b"".join(bytes([raw, 0, 0, 0]) for raw in (10, 40, 81, 0, 51))
    every = np.arange(19)
    path = write_kitti(tmp_path, "11_000043", every)
    assert np.array_equal(map_labels(np.fromfile(path, "<u4")), every)


def test_nuscenes_bytes(tmp_path):
    path = submission_writers.write_nuscenes(tmp_path, "test", "abc", np.array([0, 15, 3]))
    assert path == tmp_path / "lidarseg" / "test" / "abc_lidarseg.bin"
    assert path.read_bytes() == bytes([1, 16, 4])
    path = submission_writers.finish_nuscenes(tmp_path, "test", {"use_camera": True})
    assert path == tmp_path / "test" / "submission.json"
    expected = dict.fromkeys(("use_radar", "use_map", "use_external"), False)
    assert json.loads(path.read_text()) == {
        "meta": {**expected, "use_camera": True, "use_lidar": True}
    }


def test_what_cannot_be_written(tmp_path):
    for name in ("scan", "11", "11_x", "a_000001"):
        with pytest.raises(InputError, match="expected a name such as 11_000042"):
            write_kitti(tmp_path, name, np.zeros(2, int))
    with pytest.raises(InputError, match=r"class 19 in row 1 is outside -1\.\.18"):
        write_kitti(tmp_path, "11_000001", np.array([0, 19]))
    with pytest.raises(InputError, match=r"class -1 in row 0 is outside 0\.\.15"):
        submission_writers.write_nuscenes(tmp_path, "test", "t", np.array([-1]))
    for meta in ({"use_lidar": 1}, {"use_sonar": True}):
        with pytest.raises(InputError, match="use_"):
            submission_writers.finish_nuscenes(tmp_path, "test", meta)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        submission_writers.write_nuscenes(tmp_path / "file", "test", "t", np.array([1]))


# ---------------------------------------------------------------------------------------- damages


def change(path, dtype, row, value):
    data = np.fromfile(path, dtype)
    data[row] = value
    data.tofile(path)


KITTI_DAMAGES = {
    "missing": (lambda f: f.unlink(), r"12/predictions/000001\.label: missing"),
    "short": (lambda f: f.write_bytes(f.read_bytes()[:-4]), "128 bytes, expected 132 for 33"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "131 bytes, expected 132 for 33"),
    "dtype": (
        lambda f: np.fromfile(f, "<u4").astype("<u2").tofile(f),
        r"66 bytes, expected 132 for 33 points \(uint32",
    ),
    "empty": (lambda f: f.write_bytes(b""), "0 bytes, expected 132"),
    "train id": (lambda f: change(f, "<u4", 3, 2), "2 in row 3 is no raw class id"),
    "instance": (lambda f: change(f, "<u4", 5, 10 | 1 << 16), "row 5 has its upper 16 bits set"),
    "surplus": (
        lambda f: f.with_name("000002.label").write_bytes(b"\0" * 4),
        r"000002\.label: belongs to no scan",
    ),
    "elsewhere": (lambda f: f.rename(f.parents[1] / f.name), r"000001\.label: missing"),
}


@pytest.mark.parametrize("damage", KITTI_DAMAGES)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_semantic_kitti(tmp_path, damage, zipped):
    folder = tmp_path / "submit"
    counts = kitti_submission(tmp_path, folder)
    assert counts["12_000001"] == 33
    assert submissions.expected_semantic_kitti(tmp_path) == counts
    assert submissions.problems_semantic_kitti(folder, counts) == []
    assert submissions.problems_semantic_kitti(folder) == []
    act, text = KITTI_DAMAGES[damage]
    act(folder / "sequences" / "12" / "predictions" / "000001.label")
    if zipped:
        folder = submissions.zip_submission(folder, tmp_path / "out.zip")
    found = submissions.problems_semantic_kitti(folder, counts)
    assert len(found) == (2 if damage == "elsewhere" else 1)
    assert any(re.search(text, line) for line in found), found


def test_semantic_kitti_wants_eleven_sequences_and_folder_entries(tmp_path):
    folder = tmp_path / "submit"
    counts = kitti_submission(tmp_path, folder)
    archive = submissions.zip_submission(folder, tmp_path / "a.zip", "a network")
    assert submissions.problems_semantic_kitti(archive, counts) == []
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
        assert packed.read("description.txt") == b"a network"
        first = packed.read("sequences/11/predictions/000000.label")
    assert {"sequences/", "sequences/21/", "sequences/21/predictions/"} < set(names)
    path = folder / "sequences" / "11" / "predictions" / "000000.label"
    assert first == path.read_bytes()

    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        for path in folder.rglob("*.label"):
            packed.write(path, path.relative_to(folder))
    found = submissions.problems_semantic_kitti(tmp_path / "b.zip", counts)
    assert found[0] == "sequences/: the zip file has no entry for this folder"
    assert found[-1] == "... and 18 more: folders without an entry"

    for path in (folder / "sequences" / "17" / "predictions").iterdir():
        path.unlink()
    found = submissions.problems_semantic_kitti(folder)
    assert found == ["sequences/17/predictions/: no predictions"]
    with pytest.raises(InputError, match=r"sequences/08/velodyne: no scans"):
        submissions.check("semantic_kitti", folder, tmp_path, "val")


def swap_meta(folder, content):
    (folder / "test" / "submission.json").write_text(content)


META = dict(use_camera=False, use_lidar=True, use_radar=False, use_map=False, use_external=False)
NUSCENES_DAMAGES = {
    "missing": (lambda s, f: f.unlink(), r"b2_lidarseg\.bin: missing"),
    "short": (lambda s, f: f.write_bytes(f.read_bytes()[:-1]), "30 bytes, expected 31"),
    "dtype": (lambda s, f: np.fromfile(f, "u1").astype("<i8").tofile(f), "248 bytes, expected 31"),
    "zero": (lambda s, f: change(f, "u1", 7, 0), r"0 in row 7 is outside 1\.\.16"),
    "seventeen": (lambda s, f: change(f, "u1", 2, 17), r"17 in row 2 is outside 1\.\.16"),
    "surplus": (lambda s, f: f.with_name("d4_lidarseg.bin").write_bytes(b"\1"), "no scan"),
    "no json": (lambda s, f: (s / "test" / "submission.json").unlink(), "json: missing"),
    "bad json": (lambda s, f: swap_meta(s, "{"), "not a JSON file"),
    "no meta": (lambda s, f: swap_meta(s, "[]"), "expected {"),
    "few keys": (lambda s, f: swap_meta(s, '{"meta": {"use_lidar": true}}'), "expected exactly"),
    "number": (
        lambda s, f: swap_meta(s, json.dumps({"meta": {**META, "use_map": 0}})),
        "use_map is 0, expected true or false",
    ),
}


@pytest.mark.parametrize("damage", NUSCENES_DAMAGES)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_nuscenes(tmp_path, damage, zipped):
    folder = tmp_path / "submit"
    counts = nuscenes_submission(folder)
    assert submissions.problems_nuscenes(folder, "test", counts) == []
    assert len(submissions.problems_nuscenes(folder, "val", counts)) > 3
    act, text = NUSCENES_DAMAGES[damage]
    act(folder, folder / "lidarseg" / "test" / "b2_lidarseg.bin")
    if zipped:
        folder = submissions.zip_submission(folder, tmp_path / "out.zip")
    found = submissions.problems_nuscenes(folder, "test", counts)
    assert len(found) == 1
    assert any(re.search(text, line) for line in found), found


def test_many_problems_of_one_kind_are_counted(tmp_path):
    found = submissions.problems_nuscenes(tmp_path, "test", {f"t{i}": 3 for i in range(100)})
    assert found[:2] == ["test/submission.json: missing", "lidarseg/test/: no predictions"]
    assert len(found) == 2 + 5 + 1
    assert found[-1] == "... and 95 more: missing files"


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="no such folder or zip file"):
        submissions.problems_semantic_kitti(tmp_path / "absent")
    (tmp_path / "a.zip").write_text("no archive")
    with pytest.raises(InputError, match="not a readable zip file"):
        submissions.problems_nuscenes(tmp_path / "a.zip", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no files to pack"):
        submissions.zip_submission(tmp_path / "empty", tmp_path / "b.zip")
    with pytest.raises(InputError, match=r"end in \.zip"):
        submissions.zip_submission(tmp_path, tmp_path / "b.tar")
    with pytest.raises(InputError, match="use semantic_kitti or nuscenes"):
        submissions.check("waymo", tmp_path)


# ---------------------------------------------------------------------------------------- readers


def test_the_kitti_reader_fills_what_it_dropped_and_leaves_out_what_it_merged(tmp_path):
    kitti_root(tmp_path, ("11",), scans=1)
    path = tmp_path / "dataset" / "sequences" / "11" / "velodyne" / "000000.bin"
    change(path, "<f4", 4 * 5 + 1, np.nan)  # point 5
    reader = SemanticKITTIDataset(split="11", data_root=tmp_path, nonfinite="drop")
    rows = len(reader.get_data(0)["coord"])
    assert rows == 30
    pred = np.arange(rows) % 19
    reader.write_submission("11_000000", pred, tmp_path / "s")
    written = np.fromfile(
        tmp_path / "s" / "sequences" / "11" / "predictions" / "000000.label", "<u4"
    )
    assert written[5] == 0
    assert np.array_equal(map_labels(np.delete(written, 5)), pred)

    reader.sweeps = 3  # its own points come first
    reader.write_submission("11_000000", np.append(pred, [0] * 50), tmp_path / "t")
    again = np.fromfile(tmp_path / "t" / "sequences" / "11" / "predictions" / "000000.label", "<u4")
    assert np.array_equal(again, written)
    with pytest.raises(InputError, match="29 predictions for 30 points"):
        reader.write_submission("11_000000", pred[1:], tmp_path / "t")
    with pytest.raises(InputError, match="is no scan of this SemanticKITTIDataset"):
        reader.write_submission("12_000000", pred, tmp_path / "t")


def test_the_nuscenes_reader(tmp_path):
    counts = nuscenes_root(tmp_path)
    reader = NuScenesDataset(split="test", data_root=tmp_path)
    assert submissions.expected_nuscenes(reader) == counts
    for token, points in counts.items():
        reader.write_submission(token, np.arange(points) % 16, tmp_path / "s")
    reader.finish_submission(tmp_path / "s")
    info = tmp_path / "info" / "nuscenes_infos_10sweeps_test.pkl"
    info.rename(info.with_name("nuscenes_infos_2sweeps_test.pkl"))
    assert submissions.check("nuscenes", tmp_path / "s", tmp_path, "test") == []
    info.with_name("nuscenes_infos_2sweeps_test.pkl").rename(info)
    assert submissions.check("nuscenes", tmp_path / "s", tmp_path, "test") == []
    with pytest.raises(InputError, match="5 predictions for 30 points"):
        reader.write_submission("a1", np.zeros(5, int), tmp_path / "s")
    reader.split = ["test", "val"]
    with pytest.raises(InputError, match="for one split"):
        reader.finish_submission(tmp_path / "s")
    path = tmp_path / "raw" / "samples" / "LIDAR_TOP" / "a1.pcd.bin"
    change(path, "<f4", 5 * 2, np.inf)  # point 2
    change(path, "<f4", 5 * 7 + 4, np.nan)  # the ring of point 7
    reader = NuScenesDataset(split="test", data_root=tmp_path, nonfinite="drop")
    reader.write_submission("a1", np.array([4] * 19 + [9] * 9), tmp_path / "s")
    written = (tmp_path / "s" / "lidarseg" / "test" / "a1_lidarseg.bin").read_bytes()
    assert written == bytes([5] * 21 + [10] * 9)


# -------------------------------------------------------------------------------- tester and tool


def entry(kind, root, **changes):
    steps = [
        dict(type="Copy", keys_dict=dict(segment="origin_segment")),
        dict(type="GridSample", grid_size=1.0, return_inverse=True, return_grid_coord=True),
        dict(type="ToTensor"),
        dict(
            type="Collect",
            keys=("coord", "grid_coord", "segment", "origin_segment", "inverse"),
            feat_keys=("coord", "strength"),
        ),
    ]
    return {**dict(type=kind, split="test", data_root=str(root), transform=steps), **changes}


def run(path, test, classes, **options):
    data = dict(num_classes=classes, ignore_index=-1, test=test)
    cfg = tiny_config(path, data=data)
    return SemSegTester(cfg, model=CellClasses(classes), **options).test()


@pytest.mark.parametrize("mode", ["single", "tta"])
def test_a_concatenation_of_derived_readers_makes_one_valid_submission(tmp_path, mode):
    counts = kitti_root(tmp_path / "data")
    half = [str(i) for i in range(11, 16)], [str(i) for i in range(16, 22)]
    kinds = "KittiUnderAnotherName", "KittiUnderAnotherName"
    parts = [
        entry(f"kd.{kind}", tmp_path / "data", split=list(part)) for kind, part in zip(kinds, half)
    ]
    test = dict(type="ConcatDataset", datasets=parts)
    metrics = run(tmp_path, test, 19, mode=mode, save_submission=True)
    assert metrics["scans"] == len(counts)
    folder = tmp_path / "result" / "submit"
    assert submissions.check("semantic_kitti", folder, tmp_path / "data") == []
    # The bytes are those of the predictions.
    pred = np.load(tmp_path / "result" / "14_000001_pred.npy")
    written = np.fromfile(folder / "sequences" / "14" / "predictions" / "000001.label", "<u4")
    assert np.array_equal(map_labels(written), pred)
    if mode == "single":
        scan = np.fromfile(
            tmp_path / "data" / "dataset" / "sequences" / "14" / "velodyne" / "000001.bin", "<f4"
        ).reshape(-1, 4)[:, :3]
        cells = np.floor(scan)
        assert np.array_equal(pred, (cells - cells.min(0)).sum(1) % 19)


def test_the_tool_checks_and_packs(tmp_path, capsys):
    nuscenes_root(tmp_path / "data")
    run(tmp_path, entry("NuScenesDataset", tmp_path / "data"), 16)
    folder = tmp_path / "result" / "submit"
    command = ["check-submission", "--kind", "nuscenes", "--folder", str(folder)]
    full = [*command, "--data-root", str(tmp_path / "data"), "--zip", str(tmp_path / "o.zip")]
    assert prepare_data.main(full) == 0
    assert "no problems" in capsys.readouterr().out
    packed = ["check-submission", "--kind", "nuscenes", "--folder", str(tmp_path / "o.zip")]
    assert prepare_data.main([*packed, "--data-root", str(tmp_path / "data")]) == 0
    (tmp_path / "o.zip").unlink()
    (folder / "lidarseg" / "test" / "a1_lidarseg.bin").unlink()
    capsys.readouterr()
    assert prepare_data.main(full) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lidarseg/test/a1_lidarseg.bin: missing"
    assert "1 problem" in lines[1]
    assert not (tmp_path / "o.zip").exists()
    assert prepare_data.main(command) == 0
    assert "were not counted" in capsys.readouterr().out
    assert prepare_data.main([*command[:-1], str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_mirror():
    coord = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = Mirror("y")({"coord": coord, "normal": coord + 1, "strength": coord[:, :1]})
    assert found["coord"].tolist() == [[0, -1, 2], [3, -4, 5]]
    assert found["normal"].tolist() == [[1, -2, 3], [4, -5, 6]]
    assert coord[0, 1] == 1, "the caller's array stays"
    with pytest.raises(InputError, match="axis is x, y or z"):
        Mirror("w")
