"""SemanticKITTI: files, labels, poses, splits and every kind of bad input."""

import logging

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pointcept_kd.data.semantic_kitti import (
    CLASS_NAMES,
    COLORS,
    LEARNING_MAP,
    LEARNING_MAP_INV,
    SPLITS,
    SemanticKITTIDataset,
    load_calib,
    load_poses,
    map_labels,
)
from pointcept_kd.host import DATASETS, InputError

# Points per raw class id over the 12 sample scans, from the table in their README.
SAMPLE_COUNTS = {
    0: 40284, 40: 381386, 71: 24035, 1: 116, 44: 29029, 72: 168684, 10: 41685, 48: 282122,
    80: 7781, 11: 347, 49: 10003, 81: 4742, 13: 2076, 50: 163419, 99: 24124, 15: 228, 51: 15187,
    252: 5885, 18: 5645, 52: 14469, 254: 895, 20: 172, 60: 3559, 255: 361, 30: 840, 70: 254958,
}  # fmt: skip

TR = "0 -1 0 0.1 0 0 -1 0.2 1 0 0 0.3"
EYE = "1 0 0 0 0 1 0 0 0 0 1 0"


def write(root, sequence="00", number=0, points=6, labels=None, **change):
    """A tiny scan; `labels=None` writes road for every point, `labels=()` no file."""
    folder = root / "dataset" / "sequences" / sequence
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    scan = np.arange(4 * points, dtype=np.float32).reshape(-1, 4) / 100
    for (row, column), value in change.get("cells", {}).items():
        scan[row, column] = value
    (folder / "velodyne" / f"{number:06d}.bin").write_bytes(scan.tobytes()[: change.get("cut")])
    if labels != ():
        ids = np.full(points, 40, np.uint32) if labels is None else np.array(labels, np.uint32)
        (folder / "labels" / f"{number:06d}.label").write_bytes(ids.tobytes())
    (folder / "calib.txt").write_text(f"P0: {EYE}\nTr: {TR}\n")
    (folder / "poses.txt").write_text("\n".join([EYE] * change.get("poses", number + 1)))
    return folder


def dataset(root, **options):
    return SemanticKITTIDataset(**{"split": "train", "data_root": str(root), **options})


# Constants


def test_the_nineteen_classes():
    assert len(CLASS_NAMES) == len(COLORS) == 19
    assert COLORS.dtype == np.uint8
    assert len({tuple(c) for c in COLORS}) == 19
    assert CLASS_NAMES[0] == "car"
    assert CLASS_NAMES[8:12] == ("road", "parking", "sidewalk", "other-ground")
    assert CLASS_NAMES[18] == "traffic-sign"
    for train_id in range(19):
        assert LEARNING_MAP[LEARNING_MAP_INV[train_id]] == train_id
    assert LEARNING_MAP[252] == LEARNING_MAP[10]
    assert LEARNING_MAP[60] == LEARNING_MAP[40]
    assert {LEARNING_MAP[i] for i in (0, 1, 52, 99)} == {-1}


def test_map_labels_ignores_instance_and_takes_ignore_index():
    raw = np.array([10 | (7 << 16), 252, 60, 0, 99, 81], np.uint32)
    assert map_labels(raw, 255).tolist() == [0, 0, 8, 255, 255, 18]
    with pytest.raises(ValueError, match=r"class id 7 in row 1 .* \(2 such points\)"):
        map_labels(np.array([10, 7, 9], np.uint32))


# Reading


def test_values_as_stored(tmp_path):
    write(tmp_path, "03", 7, labels=[10, 40, 252 | (3 << 16), 0, 99, 81])
    data = dataset(tmp_path, ignore_index=255).get_data(0)
    assert sorted(data) == ["coord", "name", "segment", "strength"]
    assert data["coord"].dtype == data["strength"].dtype == np.float32
    assert data["coord"].shape == (6, 3)
    assert data["strength"][:, 0] == pytest.approx([0.03, 0.07, 0.11, 0.15, 0.19, 0.23])
    assert data["segment"].tolist() == [0, 8, 0, 255, 255, 18]
    assert data["name"] == "03_000007"


def test_registered_under_both_names():
    assert DATASETS.get("SemanticKITTIDataset") is SemanticKITTIDataset
    assert DATASETS.get("kd.SemanticKITTIDataset") is SemanticKITTIDataset


def test_label_path_survives_velodyne_in_the_root(tmp_path):
    root = tmp_path / "velodyne"
    write(root)
    assert dataset(root).get_data(0)["segment"].tolist() == [8] * 6


def test_splits_and_sequences(tmp_path):
    for name in ("00", "08", "11", "09"):
        write(tmp_path, name)

    def names(**options):
        data = dataset(tmp_path, **options)
        return [data.get_data_name(i)[:2] for i in range(len(data.data_list))]

    assert SPLITS["train"] == ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
    assert names() == ["00", "09"]
    assert names(split="val") == ["08"]
    assert names(split="test") == ["11"]
    assert names(split=["val", "train", "00"]) == ["08", "00", "09"]
    assert names(split="09") == ["09"]
    assert names(sequences=[0, "8"]) == ["00", "08"]
    assert len(dataset(tmp_path, loop=3)) == 6


def test_missing_labels_are_ignored_not_cars(tmp_path, caplog):
    for number in (0, 1):
        write(tmp_path, "01", number, labels=())
    write(tmp_path, "11", labels=())
    with caplog.at_level(logging.WARNING):
        test = dataset(tmp_path, split="test")
        assert test.get_data(0)["segment"].tolist() == [-1] * 6
        assert not caplog.records
        train = dataset(tmp_path)
        for i in (0, 1):
            assert train.get_data(i)["segment"].tolist() == [-1] * 6
    assert len(caplog.records) == 1
    assert "000000.label is missing" in caplog.text


def test_labels_are_withheld_where_asked(tmp_path):
    for name in ("00", "04"):
        write(tmp_path, name)
    data = dataset(tmp_path, sequences=["00", "04"], unlabelled=[4])
    first, second = (data.get_data(i) for i in range(2))
    assert (first["segment"] >= 0).any()
    assert second["segment"].tolist() == [-1] * len(second["coord"])
    assert np.array_equal(first["coord"], second["coord"])


def test_a_share_of_the_labels_is_kept_and_always_the_same(tmp_path):
    for number in (0, 1):
        write(tmp_path, "00", number, points=4000, labels=[40] * 4000)
    full, part = dataset(tmp_path), dataset(tmp_path, label_fraction=0.1)
    for i in (0, 1):
        segment, all_of_it = part.get_data(i)["segment"], full.get_data(i)["segment"]
        kept = segment >= 0
        assert 0.08 < kept.mean() < 0.12
        assert np.array_equal(segment[kept], all_of_it[kept])
        assert np.array_equal(dataset(tmp_path, label_fraction=0.1).get_data(i)["segment"], segment)
    assert not np.array_equal(*(part.get_data(i)["segment"] for i in (0, 1)))
    assert (dataset(tmp_path, label_fraction=0.0).get_data(0)["segment"] == -1).all()


# Poses


def test_poses_by_hand_and_by_file_number(tmp_path):
    folder = write(tmp_path, "02", 4)
    rows = [EYE] * 4 + ["1 0 0 0 0 1 0 0 0 0 1 5"]  # camera: 5 m along its z, which is forward
    (folder / "poses.txt").write_text("\n".join(rows) + "\n")
    pose = dataset(tmp_path).pose_of(0)
    expected = np.eye(4)
    expected[0, 3] = 5  # forward is x of the velodyne; Tr's offset cancels without rotation
    assert pose == pytest.approx(expected)
    assert load_calib(folder / "calib.txt")["P0"].shape == (3, 4)
    assert load_calib(folder / "calib.txt")["Tr"].shape == (4, 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("poses.txt", EYE, r"poses\.txt: 1 rows, none for scan 000002\.bin"),
        ("poses.txt", "1 2 3", r"poses\.txt: row 0 should hold 12"),
        ("poses.txt", "", r"poses\.txt: no poses"),
        ("poses.txt", EYE.replace("1", "nan"), r"poses\.txt: row 0 .* finite"),
        ("calib.txt", f"P0: {EYE}", r"calib\.txt: no row Tr"),
        ("calib.txt", "Tr: 1 2 x", r"calib\.txt: row 0 should hold 12"),
    ],
)
def test_bad_pose_files(tmp_path, name, text, message):
    folder = write(tmp_path, "00", 2)
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        dataset(tmp_path).pose_of(0)


def test_missing_pose_file(tmp_path):
    folder = write(tmp_path)
    (folder / "poses.txt").unlink()
    with pytest.raises(InputError, match=r"poses\.txt: cannot be read"):
        load_poses(folder)


# Several scans merged


def drive(root, numbers, points=6, **change):
    """Scans whose file number is their x in metres; row i of `poses.txt` is i metres ahead."""
    for number in numbers:
        folder = write(root, "00", number, points, **change)
    rows = [f"1 0 0 0 0 1 0 0 0 0 1 {i}" for i in range(max(numbers) + 1)]  # camera z is forward
    (folder / "poses.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_sweeps_are_chosen_and_moved_by_file_number(tmp_path):
    drive(tmp_path, (0, 1, 3, 4))
    data = dataset(tmp_path, sweeps=3)
    merged = [data.get_data(i) for i in range(4)]
    assert [len(m["coord"]) // 6 for m in merged] == [1, 2, 2, 2]
    last = merged[3]  # scan 4 with 3; 2 is not there, and listing positions would have taken 1 too
    assert last["name"] == "00_000004"
    assert last["sweep"].tolist() == [0] * 6 + [1] * 6
    alone = dataset(tmp_path).get_data(3)["coord"]
    assert np.array_equal(last["coord"][:6], alone)
    assert last["coord"][6:] - alone == pytest.approx(np.tile([-1.0, 0, 0], (6, 1)), abs=1e-6)
    third = merged[2]  # scan 3 with 1, two metres behind
    assert third["coord"][6:] - alone == pytest.approx(np.tile([-2.0, 0, 0], (6, 1)), abs=1e-6)
    assert "sweep" not in dataset(tmp_path).get_data(0)


def test_sweep_labels_of_the_reference_only(tmp_path):
    drive(tmp_path, (0, 1), labels=[10, 40, 48, 50, 70, 81])
    both, one = (dataset(tmp_path, sweeps=2, sweep_labels=w) for w in ("all", "reference"))
    assert both.get_data(1)["segment"].tolist() == [0, 8, 10, 12, 14, 18] * 2
    assert one.get_data(1)["segment"].tolist() == [0, 8, 10, 12, 14, 18] + [-1] * 6


def test_each_sweep_keeps_its_own_rules(tmp_path):
    drive(tmp_path, (0, 1), points=4000, labels=[40] * 4000)
    alone = dataset(tmp_path, label_fraction=0.1)
    merged = dataset(tmp_path, label_fraction=0.1, sweeps=2).get_data(1)["segment"]
    assert np.array_equal(merged, np.concatenate([alone.get_data(i)["segment"] for i in (1, 0)]))
    write(tmp_path, "00", 0, cells={(2, 1): np.nan}, poses=2)
    with pytest.raises(InputError, match=r"000000\.bin: row 2 is not finite"):
        dataset(tmp_path, sweeps=2).get_data(1)
    assert len(dataset(tmp_path, sweeps=2, nonfinite="drop").get_data(1)["coord"]) == 4005
    withheld = dataset(tmp_path, sweeps=2, nonfinite="drop", unlabelled=["00"]).get_data(1)
    assert (withheld["segment"] == -1).all()


def test_sweeps_need_their_poses(tmp_path):
    folder = drive(tmp_path, (0, 1))
    (folder / "poses.txt").write_text(EYE)
    with pytest.raises(InputError, match=r"poses\.txt: 1 rows, none for scan 000001\.bin"):
        dataset(tmp_path, sweeps=2).get_data(1)
    assert len(dataset(tmp_path).get_data(1)["coord"]) == 6


def test_merged_scans_through_train_and_test_pipelines(tmp_path):
    drive(tmp_path, (0, 1), points=50)
    keys = ("coord", "grid_coord", "segment", "sweep")
    sample = dict(type="GridSample", grid_size=0.1, return_grid_coord=True)
    end = [dict(type="ToTensor"), dict(type="Collect", keys=keys, feat_keys=("coord", "strength"))]
    shuffle = dict(type="ShufflePoint")
    train = dataset(tmp_path, sweeps=2, transform=[shuffle, dict(sample, mode="train"), *end])[1]
    assert len(train["sweep"]) == len(train["coord"]) < 100
    # x of the stored points lies in 0..2 m; those of the past scan are a metre further back.
    behind = train["coord"][:, 0] < -0.001
    assert behind.any()
    assert (train["sweep"][behind] == 1).all()
    keys = ("coord", "grid_coord", "index", "sweep")
    end[1] = dict(end[1], keys=keys)
    cfg = dict(voxelize=dict(sample, mode="test"), post_transform=end)
    test = dataset(tmp_path, sweeps=2, sweep_labels="reference", test_mode=True, test_cfg=cfg)[1]
    assert (test["segment"] >= 0).sum() == 50
    for part in test["fragment_list"]:
        assert np.array_equal(part["sweep"], (part["index"] >= 50).long())
    seen = np.concatenate([part["index"] for part in test["fragment_list"]])
    assert np.unique(seen).tolist() == list(range(100))


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": -3}, r"000000\.bin: 93 bytes are no whole number of points"),
        ({"points": 0}, r"000000\.bin: the scan has no points"),
        ({"labels": [40] * 5}, r"000000\.label: 20 bytes of labels, expected 24 for 6 points"),
        ({"labels": [40, 40, 40, 7, 7, 40]}, r"000000\.label: class id 7 in row 3"),
        (
            {"cells": {(2, 1): np.nan, (4, 0): np.inf}},
            r"000000\.bin: row 2 is not finite .* 2 of 6 points; .*nonfinite='drop'",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    write(tmp_path, **change)
    with pytest.raises(InputError, match=message) as caught:
        dataset(tmp_path).get_data(0)
    assert "\n" not in str(caught.value)


def test_drop_removes_the_rows_everywhere(tmp_path):
    labels = [10, 40, 48, 50, 70, 81]
    write(tmp_path, labels=labels, cells={(2, 1): np.nan, (4, 3): -np.inf})
    data = dataset(tmp_path, nonfinite="drop").get_data(0)
    assert data["segment"].tolist() == [0, 8, 12, 18]
    assert len(data["coord"]) == len(data["strength"]) == 4
    assert np.isfinite(data["coord"]).all()
    write(tmp_path, points=1, cells={(0, 0): np.nan})
    with pytest.raises(InputError, match="all 1 points are not finite"):
        dataset(tmp_path, nonfinite="drop").get_data(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, r"for sequences 08 \(split 'val'\).*semantic-kitti\.org.*simulate"),
        ({"split": "validation"}, "split: 'validation' is unknown; use train, val, test"),
        ({"sequences": ["00", "05"]}, r"05.velodyne: no scans; `sequences` asks for 05"),
        ({"sequences": []}, "for sequences none"),
        ({"sequences": ["train"]}, "sequences: 'train' is unknown"),
        ({"label_fraction": 1.5}, "label_fraction=1.5: expected a number from 0 to 1"),
        ({"unlabelled": ["rest"]}, "unlabelled: 'rest' is unknown"),
        ({"nonfinite": "skip"}, "nonfinite='skip': use 'error' or 'drop'"),
        ({"sweeps": 0}, "sweeps=0: expected a whole number of scans, 1 or more"),
        ({"sweeps": 2.5}, "sweeps=2.5: expected a whole number"),
        ({"sweep_labels": "own"}, "sweep_labels='own': use 'all' or 'reference'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        dataset(tmp_path, **options)


def test_missing_folder_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"semantic-kitti\.org.*prepare_data\.py simulate"):
        dataset(tmp_path / "nothing")


# Real scans


@pytest.fixture(scope="module")
def real(samples):
    return samples / "semantickitti"


def test_real_histogram(real):
    data = dataset(real, split=["train", "val"])
    assert len(data) == 12
    counts = np.zeros(20, np.int64)
    for i in range(12):
        scan = data.get_data(i)
        assert scan["strength"].min() >= 0
        assert scan["strength"].max() <= 1
        counts += np.bincount(scan["segment"] + 1, minlength=20)
    expected = np.zeros(20, np.int64)
    for raw, count in SAMPLE_COUNTS.items():
        expected[LEARNING_MAP[raw] + 1] += count
    assert counts.tolist() == expected.tolist()
    assert [i for i in range(19) if counts[i + 1] == 0] == [CLASS_NAMES.index("bicyclist")]


def test_real_poses_follow_file_numbers(real):
    data = dataset(real, sequences=["00"])
    names = [data.get_data_name(i) for i in range(len(data))]
    assert names == [f"00_{i:06d}" for i in (0, 1, 2, 5, 9)]
    pose = np.linalg.inv(data.pose_of(0)) @ data.pose_of(4)
    assert np.linalg.norm(pose[:3, 3]) == pytest.approx(6.69, abs=0.02)
    clouds = []
    for i in (0, 4):
        coord = data.get_data(i)["coord"]
        clouds.append(coord[np.linalg.norm(coord, axis=1) < 25][::7])
    tree = cKDTree(data.get_data(0)["coord"])
    moved = clouds[1] @ pose[:3, :3].T + pose[:3, 3]
    apart, together = (np.median(tree.query(c)[0]) for c in (clouds[1], moved))
    assert together < 0.6 * apart
    assert together < 0.1
    assert len(clouds[0]) > 1000
