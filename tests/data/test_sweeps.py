"""Merging scans: against plain loops, by hand, and on real scans whose poses are known."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset
from pointcept_kd.data.sweeps import aggregate, align
from pointcept_kd.data.transforms import INDEX_VALID_KEYS, GridSample, RandomDropout
from pointcept_kd.host import InputError


def pose(seed, far=60.0):
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
    matrix[:3, 3] = rng.uniform(-far, far, 3)
    return matrix


def scan(points, seed, **more):
    rng = np.random.default_rng(seed)
    return {
        "coord": rng.uniform(-50, 50, (points, 3)).astype(np.float32),
        "strength": rng.random((points, 1)).astype(np.float32),
        "segment": rng.integers(0, 19, points).astype(np.int32),
        "name": f"scan{seed}",
        **more,
    }


def test_oracle_by_loops():
    scans, poses = [scan(n, n, time=-n / 10) for n in (7, 4, 5)], [pose(i) for i in range(3)]
    merged = aggregate(scans, poses, reference=1)
    rows = []
    for sweep, i in enumerate((1, 0, 2)):
        for row in range(len(scans[i]["coord"])):
            world = poses[i] @ [*scans[i]["coord"][row].astype(float), 1.0]
            local = np.linalg.solve(poses[1], world)
            segment, strength = scans[i]["segment"][row], scans[i]["strength"][row, 0]
            rows.append([*local[:3], strength, segment, sweep, scans[i]["time"]])
    expected = np.array(rows)
    assert np.abs(merged["coord"] - expected[:, :3]).max() < 1e-4
    assert merged["strength"][:, 0] == pytest.approx(expected[:, 3])
    assert merged["segment"].tolist() == expected[:, 4].tolist()
    assert merged["sweep"].tolist() == expected[:, 5].tolist()
    assert merged["time"] == pytest.approx(expected[:, 6:])
    assert merged["name"] == "scan4"
    kinds = {key: merged[key].dtype for key in ("coord", "strength", "segment", "sweep", "time")}
    assert kinds == {
        "coord": np.float32, "strength": np.float32, "segment": np.int32, "sweep": np.int32,
        "time": np.float32,
    }  # fmt: skip


def test_by_hand():
    # The second scan was taken 2 m further along x, turned left by a quarter turn.
    turned = np.array([[0, -1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    assert align(np.array([[3.0, 1.0, 0.5]]), turned, np.eye(4)).tolist() == [[1, 3, 0.5]]
    assert align(np.array([[1.0, 3.0, 0.5]]), np.eye(4), turned).tolist() == [[3, 1, 0.5]]


def test_the_reference_is_untouched_and_a_lone_scan_is_itself():
    one = scan(9, 0)
    merged = aggregate([one], [pose(3)])
    for key in ("coord", "strength", "segment"):
        assert np.array_equal(merged[key], one[key])
    assert merged["sweep"].tolist() == [0] * 9
    both = aggregate([one, scan(4, 1)], [pose(3), pose(4)])
    assert np.array_equal(both["coord"][:9], one["coord"])


def test_labels_of_other_sweeps_are_ignored_where_asked():
    scans = [scan(3, 0), scan(4, 1)]
    before = scans[1]["segment"].copy()
    merged = aggregate(scans, [np.eye(4)] * 2, labels="reference", ignore_index=255)
    assert merged["segment"].tolist() == [*scans[0]["segment"], 255, 255, 255, 255]
    assert np.array_equal(scans[1]["segment"], before)


def test_static_points_coincide_far_from_the_origin():
    world = np.random.default_rng(0).uniform(-40, 40, (500, 3))
    poses = [pose(1, 5.0), pose(2, 5.0)]
    scans = [{"coord": ((world - p[:3, 3]) @ p[:3, :3]).astype(np.float32)} for p in poses]
    for p in poses:
        p[:3, 3] += (500_000, 4_000_000, 100)  # as map coordinates are
    first, second = np.split(aggregate(scans, poses)["coord"], 2)
    assert np.abs(first - second).max() < 2e-5


def test_sweep_and_time_survive_dropping_and_sampling():
    scans = [scan(400, 0, time=0.0), scan(300, 1, time=-0.1)]
    merged = aggregate(scans, [np.eye(4)] * 2)
    assert set(INDEX_VALID_KEYS) < set(merged["index_valid_keys"])
    data = GridSample(grid_size=5.0, mode="train")(RandomDropout(0.5, 1.0)(merged))
    assert len(data["sweep"]) == len(data["time"]) == len(data["coord"]) < 350
    source = {tuple(c): i for i, s in enumerate(scans) for c in s["coord"].tolist()}
    sweeps = [source[tuple(c)] for c in data["coord"].tolist()]
    assert data["sweep"].tolist() == sweeps
    assert data["time"][:, 0] == pytest.approx(np.array(sweeps) * -0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "none"}, "labels='none': use 'all' or 'reference'"),
        ({"reference": 2}, "2 scans, 2 poses and reference 2"),
        ({"poses": [np.eye(4)]}, "2 scans, 1 poses"),
        ({"poses": [np.eye(4), np.eye(3)]}, r"pose of a scan .* shape \(3, 3\)"),
        ({"poses": [np.zeros((4, 4)), np.eye(4)]}, "pose of the reference is no finite"),
        ({"scans": [scan(3, 0), {"coord": np.zeros((2, 3))}]}, "strength of scan . is missing"),
        (
            {"scans": [scan(3, 0), scan(2, 1, strength=np.zeros((2, 2)))]},
            r"strength of scan scan1 is of shape \(2, 2\), expected \(2, 1\) as in scan0",
        ),
    ],
)
def test_bad_input(change, message):
    call = {"scans": [scan(3, 0), scan(2, 1)], "poses": [np.eye(4)] * 2, **change}
    with pytest.raises(InputError, match=message) as caught:
        aggregate(**call)
    assert "\n" not in str(caught.value)


def test_real_scans_lie_on_each_other(samples):
    data = SemanticKITTIDataset(data_root=str(samples / "semantickitti"), sequences=["00"])
    scans, poses = [data.get_data(i) for i in (0, 4)], [data.pose_of(i) for i in (0, 4)]
    merged = aggregate(scans, poses)
    tree = cKDTree(scans[0]["coord"])
    near = np.linalg.norm(scans[1]["coord"], axis=1) < 25
    static = near & (scans[1]["segment"] >= 8)
    moved = merged["coord"][merged["sweep"] == 1]
    apart, found = (tree.query(c[static][::5]) for c in (scans[1]["coord"], moved))
    # 6.69 m apart; the samples' README measured a median of 0.083 m with the pose.
    assert np.median(found[0]) == pytest.approx(0.083, abs=0.01)
    assert np.median(apart[0]) > 1.7 * np.median(found[0])
    close = found[0] < 0.2
    same = scans[0]["segment"][found[1]] == scans[1]["segment"][static][::5]
    assert same[close].mean() > 0.95
