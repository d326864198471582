"""Fast farthest point sampling: row for row what the plain algorithm takes, ties included."""

import numpy as np
import pytest
import torch

from pointcept_kd.ops import farthest
from pointcept_kd.ops.farthest import farthest_rows
from pointcept_kd.ops.neighbors import farthest_point_sampling


@pytest.fixture(autouse=True)
def _never_plain(monkeypatch):
    """Small clouds would otherwise take the plain way, and nothing be compared."""
    monkeypatch.setattr(farthest, "_PLAIN", 0)


def plain(points, count, start=0):
    """Every pick compared with every point, in the type of the points."""
    reach, picks = np.full(len(points), np.inf, points.dtype), []
    for _ in range(count):
        picks.append(start)
        away = points - points[start]
        away *= away
        reach = np.minimum(reach, away[:, 0] + away[:, 1] + away[:, 2])
        start = int(reach.argmax())
    return np.array(picks)


def surface(points, seed):
    """Like a scan: dense near the sensor, thin far away, on the ground and a few walls."""
    rng = np.random.default_rng(seed)
    reach, angle = 50 * rng.random(points) ** 2, rng.uniform(0, 2 * np.pi, points)
    cloud = np.column_stack([reach * np.cos(angle), reach * np.sin(angle), np.zeros(points)])
    wall = rng.random(points) < 0.3
    cloud[wall, 1:] = np.column_stack([np.full(wall.sum(), 8), rng.uniform(0, 5, wall.sum())])
    return cloud.astype(np.float32)


def lattice():
    """Ties everywhere."""
    x, y, z = np.meshgrid(*[np.arange(11)] * 3)
    return np.column_stack([x.ravel(), y.ravel(), z.ravel()]).astype(np.float32)


CLOUDS = {
    "surface": surface(3000, 0),
    "blob": np.random.default_rng(1).normal(size=(2000, 3)).astype(np.float32),
    "far away": surface(1500, 2) + np.float32(3000),
    "lattice": lattice(),
    "twice": np.tile(surface(400, 3), (3, 1)),
    "line": np.linspace(0, 1, 900, dtype=np.float32)[:, None] * np.float32([1, 0, 0]),
    "one place": np.ones((300, 3), np.float32),
    "two places": np.repeat(np.float32([[0, 0, 0], [1, 2, 3]]), 200, axis=0),
}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("candidates", [1, 40, 768])
def test_rows_are_those_of_the_plain_algorithm(name, candidates, monkeypatch):
    monkeypatch.setattr(farthest, "_CANDIDATES", candidates)
    cloud = CLOUDS[name]
    for count in {1, 5, 65, len(cloud) // 3, len(cloud)}:
        assert np.array_equal(farthest_rows(cloud, count), plain(cloud, count))


def test_other_beginnings_and_double_precision():
    cloud = surface(1500, 5).astype(np.float64) / 3
    for start in (0, 17, 1499):
        assert np.array_equal(farthest_rows(cloud, 400, start), plain(cloud, 400, start))


def test_an_outlier_too_far_for_a_grid():
    cloud = surface(800, 6).astype(np.float64) * 1e-9
    cloud[5] = 1e9
    assert np.array_equal(farthest_rows(cloud, 300), plain(cloud, 300))


def test_by_hand():
    line = np.zeros((4, 3), np.float32)
    line[:, 0] = [0, 1, 2, 10]
    assert farthest_rows(line, 3).tolist() == [0, 3, 2]
    assert line[farthest_rows(line, 3), 0].tolist() == [0, 10, 2]


def test_each_pick_is_the_farthest():
    cloud = surface(1200, 7)
    picks = farthest_rows(cloud, 300)
    reach = np.full(len(cloud), np.inf)
    for pick in picks:
        assert reach[pick] >= reach.max() * (1 - 1e-6) or np.isinf(reach).all()
        reach = np.minimum(reach, ((cloud - cloud[pick]).astype(float) ** 2).sum(axis=1))
    assert len(set(picks.tolist())) == 300


def test_real_scan(samples):
    folder = samples / "semantickitti" / "dataset" / "sequences" / "08" / "velodyne"
    scan = np.fromfile(folder / "000000.bin", "<f4").reshape(-1, 4)[::4, :3]
    scan = np.ascontiguousarray(scan[np.linalg.norm(scan, axis=1) < 50])
    assert np.array_equal(farthest_rows(scan, 3000), plain(scan, 3000))
    assert np.array_equal(farthest_point_sampling(torch.from_numpy(scan), 3000), plain(scan, 3000))
