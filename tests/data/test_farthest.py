"""Fast farthest point sampling: row for row what the plain algorithm takes, ties included."""

import numpy as np
import pytest
import torch

from pointcept_kd.data import farthest
from pointcept_kd.data.farthest import farthest_points
from pointcept_kd.ops.neighbors import farthest_point_sampling


@pytest.fixture(autouse=True)
def _never_plain(monkeypatch):
    """Small clouds would otherwise take the plain way, and nothing be compared."""
    monkeypatch.setattr(farthest, "_PLAIN", 0)


def plain(points, count):
    return farthest_point_sampling(torch.from_numpy(points), count).numpy()


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
        assert np.array_equal(farthest_points(cloud, count), plain(cloud, count))


def test_by_hand():
    line = np.zeros((4, 3), np.float32)
    line[:, 0] = [0, 1, 2, 10]
    assert farthest_points(line, 3).tolist() == [0, 3, 2]
    assert line[farthest_points(line, 3), 0].tolist() == [0, 10, 2]


def test_each_pick_is_the_farthest():
    cloud = surface(1200, 7)
    picks = farthest_points(cloud, 300)
    reach = np.full(len(cloud), np.inf)
    for pick in picks:
        assert reach[pick] >= reach.max() * (1 - 1e-6) or np.isinf(reach).all()
        reach = np.minimum(reach, ((cloud - cloud[pick]).astype(float) ** 2).sum(axis=1))
    assert len(set(picks.tolist())) == 300


@pytest.mark.parametrize("count", [0, 5])
def test_counts_out_of_range(count):
    with pytest.raises(ValueError, match="count must be 1 to the 4 points"):
        farthest_points(np.zeros((4, 3), np.float32), count)


def test_points_that_are_not_finite():
    cloud = surface(300, 0)
    cloud[7, 2] = np.nan
    with pytest.raises(ValueError, match="not finite in row 7"):
        farthest_points(cloud, 100)


def test_real_scan(samples):
    folder = samples / "semantickitti" / "dataset" / "sequences" / "08" / "velodyne"
    scan = np.fromfile(folder / "000000.bin", "<f4").reshape(-1, 4)[::4, :3]
    scan = np.ascontiguousarray(scan[np.linalg.norm(scan, axis=1) < 50])
    assert np.array_equal(farthest_points(scan, 3000), plain(scan, 3000))
