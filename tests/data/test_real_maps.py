"""Maps of real posed scans: do scans agree in them, would a wrong pose show, do targets hold what the scan has seen?"""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pointcept_kd.data.completion_pairs import CompletionDataset
from pointcept_kd.data.map_tiles import Map
from pointcept_kd.data.maps import MapBuilder, Plan, build_maps, open_map, sequence_poses
from pointcept_kd.data.semantic_kitti import load_calib

from .map_oracles import cells_by_loops, read_sequence

SEQUENCES = ("00", "08")
MOVING = set(range(252, 260))
UPRIGHT = (
    50,
    51,
    71,
    80,
    81,
)  # buildings, fences, trunks, poles, signs: they tell places, the ground does not
MAST = 1.73  # metres from the road to the sensor
CELL_DIAGONAL = 0.1 * 3**0.5


class Drive(NamedTuple):
    """A sequence: scans (n, 4), labels (n,), poses (4, 4), the camera's frame (4, 4), and the map of all scans."""

    name: str
    scans: list[NDArray]
    labels: list[NDArray]
    poses: list[NDArray]
    to_camera: NDArray
    map: Map


@pytest.fixture(scope="module")
def root(samples):
    return samples / "semantickitti"


@pytest.fixture(scope="module")
def maps(root, tmp_path_factory):
    """The data root that holds the maps."""
    out = tmp_path_factory.mktemp("maps")
    plan = Plan(incomplete=True, labels=True)
    assert not build_maps(root, out, plan, list(SEQUENCES), workers=1, progress=False).problems
    return out


@pytest.fixture(scope="module", params=SEQUENCES)
def drive(request, root, maps):
    source, made = (r / "dataset" / "sequences" / request.param for r in (root, maps))
    to_camera = load_calib(source / "calib.txt")["Tr"]
    return Drive(request.param, *read_sequence(source), to_camera, open_map(source, made))


def static(scan, ids):
    """Rows of standing things, without the car itself."""
    ids = ids & 0xFFFF
    return (ids > 1) & (ids < 252) & (np.linalg.norm(scan[:, :3], axis=1) > 3.5)


def world(points, pose):
    return points[:, :3].astype(float) @ pose[:3, :3].T + pose[:3, 3]


def test_nothing_that_moves(drive):
    met = {int(i) for ids in drive.labels for i in np.unique(ids & 0xFFFF)}
    assert met & MOVING, "without moving things this would test nothing"
    assert set(np.unique(drive.map.labels)) == met - MOVING - {0, 1}
    # Moving things were where nothing stands, so the map is empty there.
    tree, gaps = cKDTree(drive.map.points), []
    for scan, ids, pose in zip(drive.scans, drive.labels, drive.poses):
        moving = np.isin(ids & 0xFFFF, list(MOVING))
        gaps.append(tree.query(world(scan[moving], pose))[0])
    assert (np.concatenate(gaps) > CELL_DIAGONAL).mean() > 0.3


def test_sizes(drive):
    points = np.asarray(drive.map.points)
    seen = [int(static(*pair).sum()) for pair in zip(drive.scans, drive.labels)]
    # 10 cm thin out the road near the car, and consecutive scans see the same things again.
    assert 0.5 * max(seen) < len(points) < 0.6 * sum(seen)
    length, width, height = np.sort(np.ptp(points, axis=0))[::-1]
    assert 60 < width <= length < 250
    assert 5 < height < 40
    road = points[np.asarray(drive.map.labels) == 40]
    for pose in drive.poses:
        near = road[np.linalg.norm(road[:, :2] - pose[:2, 3], axis=1) < 8]
        assert np.median(near[:, 2]) - pose[2, 3] == pytest.approx(-MAST, abs=0.15)


def disagreement(drive, poses):
    """Median distance (m) from what stands upright within 25 m in the last scan to a map of the scans before it."""
    builder = MapBuilder()
    *before, scan = zip(drive.scans, drive.labels, poses)
    built = np.concatenate([builder.add(*one)[0] for one in before])
    points, ids, pose = scan
    kept = np.isin(ids & 0xFFFF, UPRIGHT) & (np.linalg.norm(points[:, :3], axis=1) < 25)
    assert kept.sum() > 2000
    return float(np.median(cKDTree(built).query(world(points[kept][::5], pose))[0]))


def test_scans_agree_and_wrong_poses_do_not(drive):
    right = disagreement(drive, drive.poses)
    assert right < 0.08
    rows = [drive.to_camera @ pose @ np.linalg.inv(drive.to_camera) for pose in drive.poses]
    wrong = {
        "rows of poses.txt as they stand, without Tr": rows,
        "Tr on the wrong sides": [
            drive.to_camera @ row @ np.linalg.inv(drive.to_camera) for row in rows
        ],
        "inverted": [np.linalg.inv(pose) for pose in drive.poses],
        "first and last exchanged": [drive.poses[-1], *drive.poses[1:-1], drive.poses[0]],
        "all scans in one place": [np.eye(4)] * len(drive.poses),
    }
    for what, poses in wrong.items():
        assert disagreement(drive, poses) > 2 * right, what


def test_poses_are_those_of_the_files(drive, root):
    """Row i of poses.txt belongs to scan i, and between the camera's frame and the sensor's stands Tr."""
    folder = root / "dataset" / "sequences" / drive.name
    rows = np.loadtxt(folder / "poses.txt").reshape(-1, 3, 4)
    line = next(t for t in (folder / "calib.txt").read_text().splitlines() if t.startswith("Tr"))
    tr = np.vstack([np.array(line.split()[1:], float).reshape(3, 4), [0, 0, 0, 1]])
    poses = sequence_poses(folder)
    assert len(poses) == len(rows)
    for i in (0, 1, 9, len(rows) - 1):
        camera = np.vstack([rows[i], [0, 0, 0, 1]])
        # A point in the first camera's frame, by way of either side.
        point = np.array([3.0, -2.0, 1.0, 1.0])
        np.testing.assert_allclose(tr @ poses[i] @ point, camera @ tr @ point, atol=1e-9)


def test_targets_hold_what_the_scan_has_seen(drive, root, maps):
    options = dict(sequences=[drive.name], maps=str(maps), points=2000, test_mode=True)
    data = CompletionDataset(data_root=str(root), **options)
    assert len(data) == len(drive.scans)
    for i in (0, len(data) - 1):
        sample, scan, ids = data[i], drive.scans[i], drive.labels[i]
        target = sample["target"]
        distance, z = np.linalg.norm(scan[:, :3], axis=1), scan[:, 2]
        own = scan[static(scan, ids) & (distance < 49.8) & (z > -3.8) & (z < 4.2), :3]
        assert cKDTree(target).query(own[::20])[0].max() < CELL_DIAGONAL + 1e-3
        # And more than one scan sees: other scans' points, in the cells of this one alone.
        assert 40_000 < len(target) < len(drive.map.points)
        gaps = cKDTree(own).query(target)[0]
        assert (gaps > CELL_DIAGONAL).mean() > 0.05
        seen = scan[distance < 50, :3]
        lowest = [seen[:, axis].argmin() for axis in range(3)]  # they set the cells' origin
        few = np.concatenate([seen[lowest], seen[::7]])
        assert cells_by_loops(target[::100], few).mean() > 0.97
        assert np.linalg.norm(target, axis=1).max() < 50
        assert -4 < target[:, 2].min() < target[:, 2].max() < 4.4
        assert sample["coord"].shape == (200, 3)
