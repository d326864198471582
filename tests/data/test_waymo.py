"""WaymoDataset: folders of frames, merging by position and pose, and every kind of bad input."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data.waymo import CLASS_NAMES, COLORS, WaymoDataset, problems
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import point_collate_fn


def write(root, sequence="a", stamp=100, split="training", points=5, **change):
    """A frame whose points lie on x = 0, 1, ..., in the world, seen from a vehicle at x = stamp / 100."""
    folder = root / split / sequence / str(stamp)
    folder.mkdir(parents=True)
    pose = np.eye(4)
    pose[0, 3] = stamp / 100
    coord = np.zeros((points, 3), np.float32)
    coord[:, 0] = np.arange(points) - pose[0, 3]
    arrays = {
        "coord": coord,
        "strength": np.linspace(0, 1, points, dtype=np.float32)[:, None],
        "segment": np.arange(points) % 23 - 1,
        "pose": pose,
        **change,
    }
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    return folder


def dataset(root, **options):
    return WaymoDataset(**{"data_root": str(root), **options})


def test_the_twenty_two_classes():
    assert len(CLASS_NAMES) == len(COLORS) == len({tuple(c) for c in COLORS}) == 22
    assert COLORS.dtype == np.uint8
    assert CLASS_NAMES[0] == "Car"
    assert CLASS_NAMES[14] == "Vegetation"
    assert CLASS_NAMES[17:19] == ("Road", "Lane Marker")
    assert CLASS_NAMES[21] == "Sidewalk"


def test_registered_under_both_names():
    assert DATASETS.get("WaymoDataset") is WaymoDataset
    assert DATASETS.get("kd.WaymoDataset") is WaymoDataset


def test_values_as_stored(tmp_path):
    write(tmp_path, stamp=100)
    data = dataset(tmp_path, ignore_index=255).get_data(0)
    assert sorted(data) == ["coord", "name", "pose", "segment", "strength"]
    assert data["coord"].dtype == data["strength"].dtype == np.float32
    assert data["coord"][:, 0].tolist() == [-1, 0, 1, 2, 3]
    assert data["strength"].shape == (5, 1)
    assert data["segment"].dtype == np.int32
    assert data["segment"].tolist() == [255, 0, 1, 2, 3]
    assert data["name"] == "a_100"
    assert data["pose"][0, 3] == 1


def test_other_shapes_of_the_same_content(tmp_path):
    """Pointcept's preprocessing writes float32 poses; strength and labels come flat or as a column."""
    write(
        tmp_path,
        coord=np.arange(15.0).reshape(5, 3),
        strength=np.ones(5, np.float64),
        segment=np.arange(5, dtype=np.int64)[:, None],
        pose=np.eye(4, dtype=np.float32),
    )
    data = dataset(tmp_path).load(0)
    assert data["coord"].dtype == np.float32
    assert data["strength"].shape == (5, 1)
    assert data["segment"].tolist() == [0, 1, 2, 3, 4]


def test_splits_are_listed_by_sequence_and_time(tmp_path):
    for sequence, stamp in (("b", 100), ("a", 300), ("a", 200)):
        write(tmp_path, sequence, stamp)
    write(tmp_path, "c", 100, split="validation")
    (tmp_path / "training" / "a" / ".400.77.tmp").mkdir()  # an interrupted conversion
    (tmp_path / "training" / ".done").mkdir()

    def names(**options):
        data = dataset(tmp_path, **options)
        return [data.get_data_name(i) for i in range(len(data))]

    assert names() == ["a_200", "a_300", "b_100"]
    assert names(split=["validation", "training"]) == ["c_100", "a_200", "a_300", "b_100"]
    assert names(split="validation", loop=2) == ["c_100"] * 2


def test_merged_frames_are_moved_by_pose_and_stay_in_their_sequence(tmp_path):
    for sequence in ("a", "b"):
        for stamp in (100, 200, 400):
            write(tmp_path, sequence, stamp)
    data = dataset(tmp_path, timestamp=(0, -1, 1))
    neighbours = {0: [0, 200], 1: [0, 100, 400], 2: [0, 200], 3: [0, 200], 5: [0, 200]}
    for i, (own, *others) in neighbours.items():
        sample = data.load(i)
        assert own == 0
        assert sample["sweep"].tolist() == np.repeat(range(1 + len(others)), 5).tolist()
        # The same world points, so the same coordinates: vehicles of other frames stood elsewhere.
        parts = np.split(sample["coord"], 1 + len(others))
        for part in parts[1:]:
            assert part == pytest.approx(parts[0], abs=1e-6)
        assert sample["name"] == data.get_data_name(i)
        assert "sweep" in sample["index_valid_keys"]
    assert "sweep" not in dataset(tmp_path).get_data(0)


def test_labels_and_timing_of_merged_frames(tmp_path):
    for stamp in (100, 200):
        write(tmp_path, stamp=stamp)
    own = [-1, 0, 1, 2, 3]
    both = dataset(tmp_path, timestamp=[0, -1])
    assert both.get_data(1)["segment"].tolist() == own * 2
    one = dataset(tmp_path, timestamp=(0, -1), reference_label=False, ignore_index=255)
    assert one.get_data(1)["segment"].tolist() == [255, 0, 1, 2, 3] + [255] * 5
    timed = dataset(tmp_path, timestamp=(0, -1), timing_embedding=True).load(1)
    assert timed["strength"].shape == (10, 2)
    assert timed["strength"][:, 1].tolist() == [0] * 5 + [-1] * 5
    assert timed["strength"][:5, 0] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    # A frame without others has the column too: the network's input does not change with the place in a sequence.
    assert dataset(tmp_path, timestamp=(0, -1), timing_embedding=True).load(0)["strength"].shape == (5, 2)  # fmt: skip


def test_unlabelled_frames_are_ignored_or_only_merged(tmp_path, caplog):
    for stamp in (100, 200, 300):
        write(tmp_path, stamp=stamp, **({} if stamp == 300 else {"segment": None}))
    write(tmp_path, split="testing", segment=None)
    with caplog.at_level(logging.WARNING):
        assert (dataset(tmp_path, split="testing").get_data(0)["segment"] == -1).all()
        assert not caplog.records
        data = dataset(tmp_path)
        assert [(data.get_data(i)["segment"] >= 0).any() for i in range(3)] == [False, False, True]
    assert len(caplog.records) == 1
    assert "200" not in caplog.text
    data = dataset(tmp_path, labelled_only=True, timestamp=(0, -1, -2))
    assert len(data) == 1
    assert data.get_data_name(0) == "a_300"
    sample = data.load(0)
    assert np.bincount(sample["sweep"]).tolist() == [5, 5, 5]
    assert (sample["segment"][5:] == -1).all()
    with pytest.raises(InputError, match="labelled_only: none of 1 frames of split 'testing'"):
        dataset(tmp_path, split="testing", labelled_only=True)


def test_a_lone_frame_needs_no_pose_but_merging_does(tmp_path):
    for stamp in (100, 200):
        write(tmp_path, stamp=stamp, pose=None)
    assert "pose" not in dataset(tmp_path).load(0)
    with pytest.raises(InputError, match=r"100.pose\.npy: not a readable .*No such file"):
        dataset(tmp_path, timestamp=(0, -1)).get_data(0)


def test_drop_removes_the_rows_everywhere(tmp_path):
    coord = np.zeros((5, 3), np.float32)
    coord[1, 2] = np.nan
    strength = np.ones((5, 1), np.float32)
    strength[3] = np.inf
    for stamp in (100, 200):
        write(tmp_path, stamp=stamp, coord=coord, strength=strength)
    with pytest.raises(
        InputError, match=r"100: row 1 .* not finite .* 2 of 5 points; .*nonfinite='drop'"
    ):
        dataset(tmp_path).get_data(0)
    data = dataset(tmp_path, nonfinite="drop", timestamp=(0, -1)).load(1)
    assert data["segment"].tolist() == [-1, 1, 3] * 2
    write(tmp_path, "z", coord=np.full((5, 3), np.nan, np.float32))
    with pytest.raises(InputError, match="all 5 points are not finite"):
        dataset(tmp_path, nonfinite="drop").get_data(2)


BAD_ARRAYS = [
    ({"coord": None}, r"coord\.npy: not a readable \.npy array \(No such file"),
    (
        {"coord": np.zeros((5, 4))},
        r"coord\.npy: float64 of shape \(5, 4\), expected numbers \(n, 3\)",
    ),
    ({"coord": np.zeros((0, 3))}, r"coord\.npy: .* with n > 0"),
    ({"coord": np.array([["a"] * 3])}, r"coord\.npy: <U1 of shape"),
    ({"strength": np.zeros((4, 1))}, r"strength\.npy: .* expected numbers \(5, 1\)"),
    ({"strength": None}, r"strength\.npy: not a readable"),
    ({"segment": np.zeros(6, int)}, r"segment\.npy: .* expected integers \(5,\)"),
    ({"segment": np.zeros(5)}, r"segment\.npy: float64 .* expected integers"),
    (
        {"segment": np.array([0, -1, 22, 0, 30])},
        r"segment\.npy: class 22 in row 2, expected -1 to 21 \(2 such",
    ),
    ({"pose": np.eye(3)}, r"pose\.npy: .* expected numbers \(4, 4\)"),
    ({"pose": np.eye(4) * 2}, r"pose\.npy: no rotation and translation"),
    ({"pose": np.full((4, 4), np.nan)}, r"pose\.npy: no rotation and translation"),
    ({"coord": np.array([None, 1])}, r"coord\.npy: not a readable .npy array"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS)
def test_bad_files_are_named(tmp_path, change, message):
    write(tmp_path, **change)
    with pytest.raises(InputError, match=message) as caught:
        dataset(tmp_path).get_data(0)
    assert "\n" not in str(caught.value)


def test_problems_reports_each(tmp_path):
    for i, (change, _) in enumerate(BAD_ARRAYS):
        write(tmp_path, stamp=100 + i, **change)
    write(tmp_path, "b", segment=None)
    bad = np.zeros((5, 3), np.float32)
    bad[2] = np.inf
    write(tmp_path, "c", split="validation", coord=bad, strength=np.full((5, 1), np.nan), pose=None)
    found = dict(problems(tmp_path))
    assert len(found) == len(BAD_ARRAYS) + 2
    for i, (_, message) in enumerate(BAD_ARRAYS):
        (line,) = found[tmp_path / "training" / "a" / str(100 + i)]
        assert re.search(message, line)
    assert found[tmp_path / "training" / "b" / "100"] == []
    lines = found[tmp_path / "validation" / "c" / "100"]
    for line, message in zip(
        lines,
        (r"coord.npy: 1 points are not finite, the first in row 2", r"strength.npy: 5 points", "pose.npy"),
        strict=True,
    ):  # fmt: skip
        assert message in line
    with pytest.raises(InputError, match="no SPLIT/SEQUENCE/TIMESTAMP"):
        list(problems(tmp_path / "training"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestamp": ()}, r"timestamp=\(\): expected different whole numbers, the first 0"),
        ({"timestamp": (1, 0)}, "the first 0"),
        ({"timestamp": (0, 1, 1)}, "different whole numbers"),
        ({"timestamp": (0, 0.5)}, "whole numbers"),
        ({"timestamp": 0}, "such as"),
        ({"nonfinite": "skip"}, "nonfinite='skip'"),
        ({"split": "train"}, r"split 'train': .*train is no folder; correct the split"),
        ({"split": "empty"}, "no SEQUENCE/TIMESTAMP folders"),
        (
            {"data_root": "/none/there"},
            r"data_root .* is no folder; .*waymo\.com/open.*prepare_data",
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    write(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        dataset(tmp_path, **options)
    assert "\n" not in str(caught.value)


# With the shipped config, and beside other data


def config():
    return Config.fromfile(Path(__file__).parents[2] / "configs/waymo/semseg-pt-v3m1-0-base.py")


def cloud(root, stamp):
    rng = np.random.default_rng(stamp)
    coord = rng.uniform((-100, -100, -8), (100, 100, 8), (400, 3)).astype(np.float32)
    labels = rng.integers(-1, 22, 400)
    return write(root, stamp=stamp, points=400, coord=coord, segment=labels)


def test_the_config_names_the_readers_classes_and_runs(tmp_path):
    cloud(tmp_path, 100)
    cfg = config()
    assert tuple(cfg.data.names) == CLASS_NAMES
    for split in ("train", "val"):
        entry = {**cfg.data[split], "data_root": str(tmp_path), "split": "training"}
        sample = DATASETS.build(entry)[0]
        assert sample["feat"].shape == (len(sample["coord"]), 4)
        assert sample["coord"].abs()[:, :2].max() < 75.2 * 1.1 + 0.03
        assert sample["segment"].min() == -1
    assert len(sample["origin_segment"]) == len(sample["inverse"]) == 400
    # A clamped point keeps its label, and comes back through `inverse`.
    unique = sample["segment"][sample["inverse"]] == sample["origin_segment"]
    assert unique.float().mean() > 0.95  # a few clamped points share an edge voxel


def beside(root):
    """A Waymo frame with all classes below `root`, and a SemanticKITTI scan of road alone."""
    cloud(root, 100)
    folder = root / "dataset" / "sequences" / "00"
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True)
    scan = np.random.default_rng(0).uniform(-20, 20, (300, 4)).astype(np.float32)
    (folder / "velodyne" / "000000.bin").write_bytes(scan.tobytes())
    (folder / "labels" / "000000.label").write_bytes(np.full(300, 40, np.uint32).tobytes())


@pytest.mark.parametrize("mapped", [False, True])
def test_beside_semantic_kitti_in_one_batch(tmp_path, mapped):
    """Each source of a ConcatDataset keeps its own classes unless its own transforms map them."""
    beside(tmp_path)
    chain = config().data.train.transform
    first = [dict(type="kd.MapLabels", mapping={CLASS_NAMES.index("Road"): 8})] if mapped else []
    entries = [
        dict(type=kind, data_root=str(tmp_path), split=split, transform=[*head, *chain])
        for kind, split, head in (
            ("WaymoDataset", "training", first),
            ("SemanticKITTIDataset", "train", []),
        )
    ]
    data = DATASETS.build(dict(type="ConcatDataset", datasets=entries, loop=2))
    assert [data.get_data_name(i) for i in range(4)] == ["a_100", "00_000000"] * 2
    batch = point_collate_fn([data[0], data[1]])
    sizes = np.diff([0, *batch["offset"].tolist()])
    assert batch["feat"].shape == (sizes.sum(), 4)
    waymo, kitti = batch["segment"].split(sizes.tolist())
    assert set(kitti.tolist()) == {8}
    assert set(waymo.tolist()) == ({-1, 8} if mapped else set(range(-1, 22)))
