"""Pairs for scene completion: crops, view-point cells, sampling and padding, one draw for both clouds, test mode."""

import logging
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from pointcept_kd.data import completion_pairs as pairs
from pointcept_kd.data.completion_pairs import (
    Augmentation,
    CompletionDataset,
    RefinementDataset,
    completion_target,
    condition_points,
    moved_by,
    repeated,
    rotation,
    sample_pair,
    tile_rows,
    viewpoint_mask,
    within,
)
from pointcept_kd.data.maps import Plan, build_maps, build_sequence, cells_of, open_map
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.batches import EpochBatchSampler, build_loader
from pointcept_kd.host.loader import point_collate_fn

from .map_oracles import (
    cells_by_loops,
    crop_everywhere,
    drive,
    map_by_loops,
    same_points,
    world_points,
    write_sequence,
)

PAIR = [
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "complete", "name"),
        offset_keys_dict=dict(offset="coord", complete_offset="complete"),
    ),
]
TEST = [
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "target", "name"),
        offset_keys_dict=dict(offset="coord", target_offset="target"),
    ),
]


@pytest.fixture(scope="module")
def street():
    return drive(count=5, points=900, seed=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory, street):
    folder = tmp_path_factory.mktemp("street")
    for name in ("00", "08"):
        build_sequence(*[write_sequence(folder, name, *street)] * 2)
    write_sequence(folder, "11", street[0], [None] * 5, street[2])
    return folder


def dataset(root, **options):
    return CompletionDataset(**{"data_root": str(root), "points": 600, **options})


# ------------------------------------------------------------------------------------------- steps


def test_view_point_cells_by_hand():
    seen = np.array([[0, 0, 0], [12, 0, 0]], np.float32)
    asked = np.array([[4.9, 0, 0], [5.1, 0, 0], [-5.1, 0, 0], [16, 0, 0]], np.float32)
    assert viewpoint_mask(asked, seen).tolist() == [True, True, False, False]
    assert viewpoint_mask(seen, seen).all()


def test_view_point_cells_by_loops():
    rng = np.random.default_rng(0)
    for cell in (10.0, 3.0):
        seen = (rng.normal(size=(150, 3)) * [20, 20, 2]).astype(np.float32)
        asked = (rng.normal(size=(600, 3)) * [30, 30, 6]).astype(np.float32)
        mask = viewpoint_mask(asked, seen, cell)
        assert mask.tolist() == cells_by_loops(asked, seen, cell).tolist()
        assert 0.02 < mask.mean() < 0.9
        assert viewpoint_mask(seen, seen, cell).all()
    shift = np.float32(64)  # cells move with the data
    assert np.array_equal(viewpoint_mask(asked + shift, seen + shift, 3.0), mask)
    with pytest.raises(ValueError, match="seen nothing"):
        viewpoint_mask(asked, seen[:0])
    with pytest.raises(ValueError, match="crop it first"):
        viewpoint_mask(asked, seen * 1e6)


def test_tiling_by_hand():
    cloud = np.array(list("abc"))
    assert "".join(cloud[tile_rows(3, 5)]) == "abcab"
    assert "".join(cloud[tile_rows(3, 2)]) == "ab"
    for count, wanted in ((7, 100), (100, 7), (7, 7), (1, 3)):
        uses = np.bincount(tile_rows(count, wanted), minlength=count)
        assert uses.max() - uses[: min(count, wanted)].min() <= 1, "no point is lost"
    with pytest.raises(ValueError, match="without points"):
        tile_rows(0, 3)


def test_repeating_a_thin_cloud():
    cloud = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert repeated(cloud, 4) is cloud
    assert np.array_equal(repeated(cloud, 9), np.concatenate([cloud] * 3))
    with pytest.raises(ValueError, match="without points"):
        repeated(cloud[:0], 4)


def test_crop_at_its_limits():
    x = np.array([3.4999, 3.5, 3.5001, 49.999, 50.0, 50.001])
    points = np.column_stack([x, 0 * x, 0 * x, 60 + 0 * x]).astype(
        np.float32
    )  # remission counts nothing
    assert within(points).tolist() == [False, False, True, True, False, False]


def test_condition_points():
    rng = np.random.default_rng(0)
    scan = np.hstack([rng.normal(size=(700, 3)) * 20, rng.random((700, 1))]).astype(np.float32)
    norm = np.linalg.norm(scan[:, :3].astype(float), axis=1)
    kept = scan[(norm > 3.5) & (norm < 50), :3]
    assert (kept[:, 2] < -4).any(), "nothing is cut below the road"
    cloud = condition_points(scan, 100)
    assert cloud.shape == (100, 3)
    assert cloud.dtype == np.float32
    assert np.array_equal(cloud[0], kept[0]), "it starts at the first point"
    picked, reach = [0], np.full(len(kept), np.inf)
    for _ in range(99):
        gaps = ((kept.astype(float) - kept[picked[-1]]) ** 2).sum(axis=1)
        reach = np.minimum(reach, gaps)
        picked.append(int(reach.argmax()))
    assert np.array_equal(cloud, kept[picked])
    thick = condition_points(scan[:50], 200)
    near = scan[:50, :3][within(scan[:50])]
    assert thick.shape == (200, 3)
    assert len(np.unique(thick, axis=0)) == len(near)
    assert np.array_equal(condition_points(scan, 100), cloud)
    with pytest.raises(InputError, match=r"none of 700 points lies 3\.5 to 50 m"):
        condition_points(scan * 0.01, 10)


def test_rotation_about_each_axis():
    quarter = np.pi / 2
    x, y, z = np.eye(3)
    assert rotation(0, 0, quarter) @ x == pytest.approx(y)
    assert rotation(quarter, 0, 0) @ y == pytest.approx(z)
    assert rotation(0, quarter, 0) @ z == pytest.approx(x)
    a, b, c = 0.3, -0.5, 0.9
    whole = rotation(0, 0, c) @ rotation(0, b, 0) @ rotation(a, 0, 0)
    assert rotation(a, b, c) == pytest.approx(whole)


def test_draws_of_the_augmentation():
    draws = [Augmentation().draw() for _ in range(400)]
    scales = np.array([np.cbrt(abs(np.linalg.det(m))) for m in draws])
    assert scales.min() >= 0.95
    assert scales.max() <= 1.05
    assert scales.std() == pytest.approx(0.1 / 12**0.5, rel=0.15)
    mirrored = np.mean([np.linalg.det(m) < 0 for m in draws])
    assert 0.4 < mirrored < 0.6
    for matrix, scale in zip(draws, scales):
        assert matrix @ matrix.T == pytest.approx(scale**2 * np.eye(3), abs=1e-9)
    # The vertical tilts a little, by no more than two clipped angles.
    tilt = np.arccos([np.clip(m[2, 2] / s, -1, 1) for m, s in zip(draws, scales)])
    assert tilt.max() <= 0.26
    assert tilt.mean() == pytest.approx(0.06 * (np.pi / 2) ** 0.5, rel=0.2)
    still = Augmentation(yaw=0, tilt=0, scale=(1, 1), flip=0)
    assert still.draw() == pytest.approx(np.eye(3))
    only = Augmentation(yaw=0, tilt=0, scale=(1, 1), flip=1).draw()
    assert moved_by(np.float32([[1, 2, 3]]), only).tolist() == [[1, -2, 3]]
    # Row vectors: p A with A = Rz Ry Rx.
    np.random.seed(4)
    angles = np.random.uniform(0, 2 * np.pi), np.clip(np.random.normal(0, 0.06, 3), -0.18, 0.18)
    np.random.seed(4)
    drawn = Augmentation(scale=(1, 1), flip=0).draw()
    assert drawn == pytest.approx(rotation(0, 0, angles[0]) @ rotation(*angles[1]))


def test_pair_by_loops():
    rng = np.random.default_rng(5)
    partial = (rng.normal(size=(150, 3)) * [15, 15, 1]).astype(np.float32)
    full = (rng.normal(size=(900, 3)) * [25, 25, 2]).astype(np.float32)
    kept = full[cells_by_loops(full, partial)]
    assert 10 < len(kept) < 900
    many = sample_pair(partial, full, 2000, 200)
    assert many["coord"].shape == (200, 3)
    assert many["complete"].shape == (2000, 3)
    # The partial cloud is repeated before it is sampled: every point is there.
    assert len(np.unique(many["coord"], axis=0)) == 150
    # A permutation as a whole, again and again.
    first = many["complete"][: len(kept)]
    assert same_points(first, kept)
    assert not np.array_equal(first, kept)
    assert np.array_equal(many["complete"], np.tile(first, (-(-2000 // len(kept)), 1))[:2000])
    few = sample_pair(partial, full, 50, 20)
    assert len(np.unique(few["complete"], axis=0)) == 50
    assert {p.tobytes() for p in few["complete"]} <= {p.tobytes() for p in kept}
    with pytest.raises(ValueError, match="without points"):
        sample_pair(partial, full + np.float32(500), 50, 20)


# ------------------------------------------------------------------------------------------- training


def test_registered_with_scope():
    assert DATASETS.get("kd.CompletionDataset") is CompletionDataset
    assert DATASETS.get("kd.RefinementDataset") is RefinementDataset


def test_clouds_are_those_of_the_recipe(root, street):
    data = dataset(root)
    assert len(data) == 5
    everything = map_by_loops(*street)
    for i, (scan, label, pose) in enumerate(zip(*street)):
        cloud = data.get_data(i)
        assert cloud["name"] == f"00_{i:06d}"
        norm = np.linalg.norm(scan[:, :3].astype(float), axis=1)
        ids = label & 0xFFFF
        kept = (ids > 1) & (ids < 252) & (norm > 3.5) & (norm < 50) & (scan[:, 2] > -4)
        assert np.array_equal(cloud["coord"], scan[kept, :3])
        expected = crop_everywhere(everything, pose)
        expected = expected[expected[:, 2] > -4]
        assert cloud["complete"].dtype == np.float32
        gap, match = cKDTree(expected).query(cloud["complete"])
        assert len(cloud["complete"]) == len(expected) == len(np.unique(match))
        assert gap.max() < 1e-5


def test_points_below_the_road_are_left_out(tmp_path, street):
    scans, _, poses = street
    deep = [s.copy() for s in scans]
    for scan in deep:
        scan[30:60, 2] = -5
    folder = write_sequence(tmp_path, "00", deep, [np.full(len(s), 40) for s in deep], poses)
    build_sequence(folder, folder)
    cloud = dataset(tmp_path).get_data(2)
    assert open_map(folder).around(poses[2], 50)[:, 2].min() < -4
    assert cloud["coord"][:, 2].min() > -4
    assert cloud["complete"][:, 2].min() > -4


def test_samples_have_their_sizes(root):
    data = dataset(root, points=2000, augment=True, transform=PAIR)
    sample = data[3]
    assert sample["coord"].shape == (200, 3)
    assert sample["complete"].shape == (2000, 3)
    assert sample["coord"].dtype == sample["complete"].dtype == torch.float32
    assert sample["offset"].tolist() == [200]
    assert sample["complete_offset"].tolist() == [2000]
    assert dataset(root, points=700, condition=33, transform=PAIR)[0]["coord"].shape == (33, 3)
    batch = point_collate_fn([data[0], data[1]])
    assert batch["coord"].shape == (400, 3)
    assert batch["offset"].tolist() == [200, 400]
    assert batch["complete_offset"].tolist() == [2000, 4000]
    assert batch["name"] == ["00_000000", "00_000001"]


def test_both_clouds_move_together(root):
    """The map is made of the scans, so every partial point has a map point in its cell: also after moving."""
    data = dataset(root, points=6000, condition=300, augment=True)
    still = dataset(root, points=6000, condition=300)
    turned = 0.0
    for i in range(5):
        moved, plain = data[i], still[i]
        gap = cKDTree(moved["complete"]).query(moved["coord"])[0]
        assert gap.max() < 0.1 * 3**0.5 * 1.05 + 1e-4
        assert cKDTree(plain["complete"]).query(plain["coord"])[0].max() < 0.1 * 3**0.5 + 1e-4
        turned = max(turned, np.abs(moved["coord"] - plain["coord"]).max())
        norm = np.linalg.norm(moved["coord"], axis=1)
        assert norm.min() > 3.5 * 0.95
        assert norm.max() < 50 * 1.05
    assert turned > 5


def test_augmentation_can_be_set(root):
    exact = dataset(root, augment=dict(yaw=0, tilt=0, scale=(1, 1), flip=0))[0]
    assert np.array_equal(exact["coord"], dataset(root)[0]["coord"])
    flipped = dataset(root, augment=dict(yaw=0, tilt=0, scale=(2, 2), flip=1))[0]
    assert np.array_equal(flipped["coord"][0], exact["coord"][0] * np.float32([2, -2, 2]))
    with pytest.raises(InputError, match="augment does not take roll; it takes yaw, tilt"):
        dataset(root, augment=dict(roll=1))


def test_any_number_of_workers_gives_the_same_samples(root):
    found = []
    for workers in (0, 2):
        random.seed(workers)  # whatever the process's own generators are at
        np.random.seed(workers)
        data = dataset(root, augment=True, transform=PAIR)
        sampler = EpochBatchSampler(len(data), 2, shuffle=True, seed=3)
        loader = build_loader(data, sampler, 3, workers, partial(point_collate_fn, mix_prob=0))
        found.append(list(loader))
    assert len(found[0]) == 3
    for a, b in zip(*found):
        assert a["name"] == b["name"]
        assert torch.equal(a["coord"], b["coord"])
        assert torch.equal(a["complete"], b["complete"])


def test_epochs_and_repeats_differ_but_seeds_do_not(root):
    data = dataset(root, augment=True)
    np.random.seed(1)
    first, second = data[2], data[2]
    np.random.seed(1)
    assert np.array_equal(data[2]["complete"], first["complete"])
    assert not np.array_equal(first["complete"], second["complete"])


def test_cached_samples_are_drawn_anew(root):
    data = dataset(root, augment=True, cache="memory")
    first, second = data[1], data[1]
    assert not np.array_equal(first["coord"], second["coord"])
    np.random.seed(1)
    again = data[1]
    np.random.seed(1)
    assert np.array_equal(dataset(root, augment=True)[1]["coord"], again["coord"])


def test_tests_and_trainings_share_no_cache(root):
    train, test = (dataset(root, test_mode=mode, cache="shared") for mode in (False, True))
    for _ in range(2):
        assert sorted(train.load(0)) == ["complete", "coord", "name"]
        assert sorted(test.load(0)) == ["coord", "name", "target"]


def test_dataset_travels_to_processes(root):
    data = dataset(root)
    before = data.get_data(2)
    text = pickle.dumps(data)
    assert len(text) < 30_000
    assert np.array_equal(pickle.loads(text).get_data(2)["complete"], before["complete"])


# ------------------------------------------------------------------------------------------- testing


def test_target_by_loops(root, street):
    data = dataset(root, split="val", test_mode=True, augment=True)
    everything = map_by_loops(*street)
    for i, (scan, _, pose) in enumerate(zip(*street)):
        sample = data[i]
        assert np.array_equal(sample["coord"], condition_points(scan, 60))
        norm = np.linalg.norm(scan[:, :3].astype(float), axis=1)
        expected = crop_everywhere(everything, pose)
        expected = expected[(expected[:, 2] > -4) & (expected[:, 2] < 4.4)]
        expected = expected[cells_by_loops(expected, scan[norm < 50, :3])]
        gap, match = cKDTree(expected).query(sample["target"])
        assert len(expected) == len(sample["target"]) == len(np.unique(match))
        assert gap.max() < 1e-5
        again = data[i]
        assert np.array_equal(again["target"], sample["target"])
        assert np.array_equal(again["coord"], sample["coord"])


def test_target_height():
    around = np.array([[0, 0, z] for z in (-4.1, -3.9, 0, 4.3, 4.5)], np.float32)
    scan = np.array([[0, 0, 0, 1], [60, 0, 0, 1]], np.float32)
    assert completion_target(around, scan)[:, 2] == pytest.approx([-3.9, 0, 4.3])


def test_batches_of_tests(root):
    data = dataset(root, split="val", test_mode=True, transform=TEST)
    batch = point_collate_fn([data[0], data[4]])
    assert batch["offset"].tolist() == [60, 120]
    ends = batch["target_offset"].tolist()
    assert ends[-1] == len(batch["target"])
    assert ends[0] != ends[1] - ends[0], "as many points as there are, not padded"


def test_scans_without_a_map(root, street, caplog):
    with caplog.at_level(logging.WARNING):
        data = dataset(root, split="test", test_mode=True)
    assert len(caplog.records) == 1
    assert "11: no map of the drive; make it with" in caplog.text
    for i in (0, 1):
        scan = street[0][i]
        assert np.array_equal(data[i]["target"], scan[within(scan), :3])
        assert np.array_equal(data[i]["coord"], condition_points(scan, 60))
    training = dataset(root, split="test").get_data(0)  # no labels: everything above -4 m
    assert np.array_equal(training["coord"], training["complete"])
    with pytest.raises(InputError, match="11: no map of the drive"):
        dataset(root, split="test", without_map="error")


def test_training_needs_maps(tmp_path, street):
    folder = write_sequence(tmp_path, "00", *street)
    with pytest.raises(InputError, match=r"00: no map of the drive; .*prepare_data\.py maps"):
        dataset(tmp_path)
    sample = dataset(tmp_path, without_map="input", points=20_000, condition=60)[0]
    assert {p.tobytes() for p in sample["coord"]} <= {p.tobytes() for p in sample["complete"]}
    build_maps(tmp_path, tmp_path / "maps", workers=1, progress=False)
    found = dataset(tmp_path, maps=str(tmp_path / "maps"))
    assert len(found.get_data(0)["complete"]) > len(found.get_data(0)["coord"])
    (folder / "poses.txt").write_text((folder / "poses.txt").read_text() + "\n" + "0 " * 12)
    with pytest.raises(InputError, match="made of other files"):
        dataset(tmp_path, maps=str(tmp_path / "maps"))
    dataset(tmp_path, maps=str(tmp_path / "maps"), check_maps=False)


def test_a_plain_map_serves_too(tmp_path, street, root):
    folder = write_sequence(tmp_path, "00", *street)
    np.save(folder / "map_clean.npy", map_by_loops(*street))
    found, tiled = dataset(tmp_path).get_data(1), dataset(root).get_data(1)
    assert same_points(found["complete"], tiled["complete"])


def test_sequences_without_calibration(tmp_path, street):
    folder = write_sequence(tmp_path, "00", *street, calib=False)
    build_sequence(folder, folder)
    assert not (folder / "calib.txt").exists()
    assert len(dataset(tmp_path)[0]["complete"]) == 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "points=0: expected a whole number"),
        ({"points": 5.5}, r"points=5\.5"),
        ({"condition": 0}, "condition=0: expected a whole number"),
        ({"without_map": "skip"}, "without_map='skip': use 'auto' or 'error' or 'input'"),
        ({"nonfinite": "fix"}, "nonfinite='fix'"),
    ],
)
def test_bad_options(root, options, message):
    with pytest.raises(InputError, match=message):
        dataset(root, **options)


def test_scans_that_cannot_be_used(tmp_path, street):
    scans, labels, poses = street
    nothing = [np.full(len(s), 252) for s in scans[:1]] + list(labels[1:])
    folder = write_sequence(tmp_path, "00", scans, nothing, poses)
    build_sequence(folder, folder)
    with pytest.raises(InputError, match=r"000000\.bin: no labelled static point"):
        dataset(tmp_path)[0]
    assert len(dataset(tmp_path)[1]["complete"]) == 600
    near = [s * np.float32([0.01, 0.01, 0.01, 1]) for s in scans[:1]] + list(scans[1:])
    folder = write_sequence(tmp_path, "08", near, labels, poses)
    build_sequence(folder, folder)
    with pytest.raises(InputError, match=r"000000\.bin: none of \d+ points lies"):
        dataset(tmp_path, split="val", test_mode=True)[0]
    damaged = scans[1].copy()
    damaged[3, 0] = np.nan
    (folder / "velodyne" / "000001.bin").write_bytes(damaged.tobytes())
    with pytest.raises(InputError, match=r"000001\.bin: row 3 is not finite"):
        dataset(tmp_path, split="val", check_maps=False)[1]
    kept = dataset(tmp_path, split="val", check_maps=False, nonfinite="drop")[1]
    assert np.isfinite(kept["coord"]).all()


# ------------------------------------------------------------------------------------------- windows


def windows(root, **options):
    return RefinementDataset(**{"data_root": str(root), "points": 500, "window": 3, **options})


def joined(street, indices, frame):
    """Points of several scans in the frame of one, by loops."""
    found = []
    for i in indices:
        scan, label, pose = (part[i] for part in street)
        label = np.where((label & 0xFFFF) < 252, 2, 252)  # unlabelled points stay
        found.append(world_points(scan, label.astype(np.uint32), pose))
    return crop_everywhere(np.concatenate(found), street[2][frame])


def test_windows_cover_every_start(root):
    data = windows(root)
    names = [data.get_data_name(i) for i in range(len(data))]
    assert names == ["00_000001", "00_000002", "00_000003"]
    assert [data.get_data_name(i) for i in range(3)] == [data[i]["name"] for i in range(3)]
    last = windows(root, frame="last")
    assert [last.get_data_name(i) for i in range(3)] == [f"00_{i:06d}" for i in (2, 3, 4)]
    assert len(windows(root, window=5)) == len(windows(root, window=40)) == 1
    assert len(windows(root, split=["train", "val"])) == 6


@pytest.mark.parametrize("frame", ["middle", "last"])
def test_window_is_joined_in_its_frame(root, street, frame):
    data = windows(root, frame=frame, points=30_000)
    sample = data[1]  # scans 1, 2, 3
    expected = joined(street, (1, 2, 3), 2 if frame == "middle" else 3)
    wrong = joined(street, (1, 2, 3), 3 if frame == "middle" else 2)
    tree = cKDTree(expected)
    assert sample["complete"].shape == (60_000, 3)
    assert tree.query(sample["complete"])[0].max() < 1e-3
    assert cKDTree(wrong).query(sample["complete"])[0].max() > 0.1
    # One point per cell, and every cell has one.
    dense = np.unique(sample["complete"], axis=0)
    assert len(dense) == len(np.unique(cells_of(dense, 0.1), axis=0))
    assert cKDTree(dense).query(expected)[0].max() < 0.1 * 3**0.5 + 1e-3
    assert np.linalg.norm(dense, axis=1).max() < 50


def test_noise_of_the_input(root, street):
    data = windows(root, points=4000)
    cloud = data.get_data(1)["coord"]
    assert (np.linalg.norm(cloud, axis=1) < 50.7).all()
    sparse = np.concatenate([data[1]["coord"] for _ in range(3)])
    assert len(sparse) == 12000
    assert np.linalg.norm(sparse, axis=1).max() < 50
    gap = cKDTree(cloud).query(sparse)[0]
    assert gap.max() <= 0.3 * 3**0.5 + 1e-5
    assert gap.mean() > 0.05
    # The noise itself, on points a metre apart.
    lonely = np.stack(np.meshgrid(*[np.arange(-10.0, 10.0)] * 3), -1).reshape(-1, 3)
    noisy = windows(root, points=8000)._noisy(lonely.astype(np.float32))
    noise = noisy - np.round(noisy)
    assert np.abs(noise).max() <= 0.3 + 1e-5
    assert noise.std() == pytest.approx(clipped_deviation(0.2, 0.3), rel=0.05)
    assert abs(noise.mean()) < 0.01


def clipped_deviation(sigma, most):
    """Standard deviation of a normal variable clipped at +-most, by summation."""
    x = np.linspace(-8 * sigma, 8 * sigma, 200_001)
    weight = np.exp(-0.5 * (x / sigma) ** 2)
    return np.sqrt((weight * np.clip(x, -most, most) ** 2).sum() / weight.sum())


def test_windows_in_batches(root):
    data = windows(root, augment=True, transform=PAIR)
    batch = point_collate_fn([data[0], data[2]])
    assert batch["coord"].shape == (1000, 3)
    assert batch["complete"].shape == (2000, 3)
    assert batch["complete_offset"].tolist() == [1000, 2000]


def test_bad_windows(root, tmp_path, street):
    for options, message in (
        ({"frame": "first"}, "frame='first': use 'middle' or 'last'"),
        ({"window": 0}, "window=0: expected a whole number of scans"),
        ({"test_mode": True}, "RefinementDataset is for training"),
    ):
        with pytest.raises(InputError, match=message):
            windows(root, **options)
    with pytest.raises(InputError, match=r"11.velodyne.00000\d\.bin: no labels"):
        windows(root, split="test")[0]
    far = [s + np.float32([300, 0, 0, 0]) for s in street[0]]
    write_sequence(tmp_path, "00", far, street[1], street[2])
    with pytest.raises(InputError, match="window of 00_000001: no static point within 50 m"):
        windows(tmp_path)[0]
    blown = dict(scale=(1.0, 100.0))
    with pytest.raises(InputError, match="window of 00_000001: .* without points"):
        windows(root, augment=blown)[0]


# ------------------------------------------------------------------------------------------- real scans


def test_real_pairs(samples, tmp_path):
    root = samples / "semantickitti"
    plan = Plan(incomplete=True)
    build_maps(root, tmp_path, plan, ["08"], workers=1, progress=False)
    options = dict(sequences=["08"], maps=str(tmp_path), points=3000)
    data = CompletionDataset(data_root=str(root), augment=True, **options)
    sample = data[2]
    assert sample["coord"].shape == (300, 3)
    assert sample["complete"].shape == (3000, 3)
    assert np.isfinite(sample["complete"]).all()
    cloud = data.get_data(2)
    gap = cKDTree(cloud["complete"]).query(cloud["coord"][::20])[0]
    assert gap.max() < 0.1 * 3**0.5 + 1e-3
    assert len(cloud["complete"]) > 0.7 * len(cloud["coord"])
    test = CompletionDataset(data_root=str(root), test_mode=True, **options)[2]
    assert len(test["target"]) > 10_000
    assert test["target"][:, 2].max() < 4.4
    assert np.linalg.norm(test["target"], axis=1).max() < 50
    assert pairs.RADIUS == 50
