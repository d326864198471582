"""Neighbour search and farthest point sampling against plain loops and hand-worked values."""

import math

import numpy as np
import pytest
import torch

from pointcept_kd.ops import neighbors
from pointcept_kd.ops.neighbors import farthest_point_sampling, interpolate, knn, radius

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
# The brute force also runs on CPU tensors, so its arithmetic is tested without a GPU.
ROUTES = ["tree", "brute", CUDA]


@pytest.fixture(params=ROUTES)
def device(request, monkeypatch):
    if request.param == "brute":
        monkeypatch.setattr(neighbors, "_tree", neighbors._brute)
        monkeypatch.setattr(neighbors, "_CHUNK", 500)  # several chunks
    return "cuda" if request.param == "cuda" else "cpu"


def cloud(n, seed, spread=40.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator) * torch.tensor([spread, spread, 1.0])


def loop_neighbours(query, support, k, limit=math.inf, query_batch=None, support_batch=None):
    """All distances in python floats, sorted by (distance, index)."""
    distances, indices = [], []
    for i, q in enumerate(query.tolist()):
        found = []
        for j, s in enumerate(support.tolist()):
            if query_batch is not None and query_batch[i] != support_batch[j]:
                continue
            d = math.dist(q, s)
            if d <= limit:
                found.append((d, j))
        found = sorted(found)[:k]
        found += [(math.inf, -1)] * (k - len(found))
        distances.append([d for d, _ in found])
        indices.append([j for _, j in found])
    return torch.tensor(distances), torch.tensor(indices)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_knn_is_the_loop(device, k):
    query, support = cloud(60, 0), cloud(90, 1)
    distances, indices = knn(query.to(device), support.to(device), k)
    expected_d, expected_i = loop_neighbours(query, support, k)
    assert indices.dtype == torch.int64
    assert distances.dtype == torch.float32
    assert torch.equal(indices.cpu(), expected_i)
    torch.testing.assert_close(distances.cpu(), expected_d.float(), rtol=1e-6, atol=1e-6)


def test_knn_by_hand(device):
    support = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 4, 0]], device=device)
    distances, indices = knn(torch.tensor([[3.0, 4, 0]], device=device), support, 3)
    assert indices.tolist() == [[2, 1, 0]]
    assert distances.tolist() == [[3, 4, 5]]


def test_equal_distances_are_ordered_by_index(device):
    corners = torch.tensor([[x, y, z] for x in (1.0, -1) for y in (1, -1) for z in (1, -1)])
    distances, indices = knn(torch.zeros(4, 3, device=device), corners.to(device), 8)
    assert indices.tolist() == [list(range(8))] * 4
    torch.testing.assert_close(distances.cpu(), torch.full((4, 8), math.sqrt(3)))


def test_far_from_the_origin_distances_stay_exact(device):
    """A scan at 80 m with 1 cm steps: expanded squares in float32 would mix these up."""
    support = torch.zeros(50, 3)
    support[:, 0] = 80 + 0.01 * torch.arange(50)
    distances, indices = knn(support.to(device), support.to(device), 2)
    assert torch.equal(indices[:, 0].cpu(), torch.arange(50))
    assert (distances[:, 0] == 0).all()
    torch.testing.assert_close(distances[:, 1].cpu(), torch.full((50,), 0.01), atol=1e-5, rtol=0)


def test_too_few_supports_are_padded(device):
    distances, indices = knn(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device), 4)
    assert indices.tolist() == [[0, 1, -1, -1]] * 2
    assert torch.isinf(distances[:, 2:]).all()
    assert torch.isfinite(distances[:, :2]).all()


def test_batches_are_kept_apart(device):
    query, support = cloud(40, 2), cloud(50, 3)
    query_batch, support_batch = torch.arange(40) % 3, torch.arange(50) * 7 % 3
    distances, indices = knn(
        query.to(device), support.to(device), 4, query_batch.to(device), support_batch.to(device)
    )
    expected_d, expected_i = loop_neighbours(
        query, support, 4, query_batch=query_batch, support_batch=support_batch
    )
    assert torch.equal(indices.cpu(), expected_i)
    torch.testing.assert_close(distances.cpu(), expected_d.float())
    assert (support_batch[indices.cpu()] == query_batch[:, None]).all()


def test_one_scan_with_fewer_points_than_k(device):
    support = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]], device=device)
    batch = torch.tensor([0, 1, 1], device=device)
    _, indices = knn(support, support, 2, batch, batch)
    assert indices.tolist() == [[0, -1], [1, 2], [2, 1]]


def test_radius_is_the_loop(device):
    query, support = cloud(50, 4, spread=2.0), cloud(80, 5, spread=2.0)
    distances, indices = radius(query.to(device), support.to(device), 1.2, 6)
    expected_d, expected_i = loop_neighbours(query, support, 6, limit=1.2)
    assert torch.equal(indices.cpu(), expected_i)
    torch.testing.assert_close(distances.cpu(), expected_d.float())
    assert (indices == -1).any()
    assert (indices[:, -1] >= 0).any()


def test_radius_includes_its_bound(device):
    support = torch.tensor([[2.0, 0, 0], [2.5, 0, 0]], device=device)
    distances, indices = radius(torch.zeros(1, 3, device=device), support, 2.0, 5)
    assert indices.tolist() == [[0, -1, -1, -1, -1]]
    assert distances[0, 0] == 2


def test_threads_do_not_change_the_result():
    query, support = cloud(700, 6), cloud(900, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = knn(query, support, 8)
        torch.set_num_threads(4)
        four = knn(query, support, 8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], four[0])
    assert torch.equal(one[1], four[1])


def test_both_routes_agree():
    query, support = cloud(300, 8), cloud(400, 9)
    tree, brute = (
        neighbors._tree(query, support, 6, 30.0),
        neighbors._brute(query, support, 6, 30.0),
    )
    assert torch.equal(tree[1], brute[1])
    torch.testing.assert_close(tree[0], brute[0])


def test_other_dimensions_and_types():
    plane = torch.tensor([[0.0, 0], [3, 4]], dtype=torch.float64)
    distances, indices = knn(plane, plane, 2)
    assert distances.dtype == torch.float64
    assert distances.tolist() == [[0, 5], [0, 5]]
    assert indices.tolist() == [[0, 1], [1, 0]]


def test_no_queries_give_no_rows():
    distances, indices = knn(torch.empty(0, 3), cloud(4, 0), 3)
    assert distances.shape == indices.shape == (0, 3)


def test_bad_input_is_one_clear_line():
    points = cloud(5, 0)
    broken = points.clone()
    broken[3, 1] = math.nan
    batch = torch.zeros(5, dtype=torch.int64)
    cases = [
        (lambda: knn(points, points, 0), "k must be at least 1, got 0"),
        (lambda: knn(points, torch.empty(0, 3), 1), "support is empty"),
        (lambda: knn(broken, points, 1), "query is not finite in row 3"),
        (lambda: knn(points, broken, 1), "support is not finite in row 3"),
        (lambda: knn(points, points, 1, batch), "query_batch and support_batch"),
        (lambda: knn(points, points, 1, batch + 1, batch), "no point of scan 1"),
        (lambda: radius(points, points, -1.0, 3), "r must be positive"),
        (lambda: radius(points, points, 1.0, 0), "max_neighbors must be at least 1"),
        (lambda: farthest_point_sampling(points, 6), "count must be 1 to the 5 points, got 6"),
        (lambda: farthest_point_sampling(points, 0), "count must be 1"),
        (lambda: farthest_point_sampling(points, 2, start=5), "start must be a row"),
        (lambda: farthest_point_sampling(points, 3, batch=batch + torch.arange(5) // 3), "scan 1"),
        (lambda: farthest_point_sampling(broken, 2), "points is not finite in row 3"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- farthest point sampling ---------------------------------------------------------------------


def loop_farthest(points, count, start):
    """Plain loops in float32, one addition at a time."""
    points = points.numpy().astype(np.float32)
    reach = [np.float32(np.inf)] * len(points)
    picks = [start]
    while True:
        for i, p in enumerate(points):
            dx, dy, dz = p - points[picks[-1]]
            reach[i] = min(reach[i], dx * dx + dy * dy + dz * dz)
        if len(picks) == count:
            return picks
        best = 0
        for i in range(len(points)):
            if reach[i] > reach[best]:
                best = i
        picks.append(best)


SAMPLERS = ["cpu", "torch", CUDA]


@pytest.fixture(params=SAMPLERS)
def fps_device(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(neighbors, "_farthest_numpy", neighbors._farthest_torch)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.mark.parametrize("start", [0, 17])
def test_farthest_points_are_the_loop(fps_device, start):
    points = cloud(120, 10)
    picks = farthest_point_sampling(points.to(fps_device), 40, start)
    assert picks.dtype == torch.int64
    assert picks.tolist() == loop_farthest(points, 40, start)


def test_farthest_ties_take_the_lowest_row(fps_device):
    """On a regular grid nearly every step is a tie; the last steps are exact duplicates."""
    axis = torch.arange(4.0)
    points = torch.cartesian_prod(axis, axis, axis[:2])
    points = torch.cat([points, points[:3]])
    picks = farthest_point_sampling(points.to(fps_device), len(points))
    assert picks.tolist() == loop_farthest(points, len(points), 0)


def test_farthest_by_hand(fps_device):
    line = torch.zeros(5, 3)
    line[:, 0] = torch.tensor([0.0, 1, 2, 8, 10])
    assert farthest_point_sampling(line.to(fps_device), 4).tolist() == [0, 4, 2, 3]


def test_farthest_per_scan(fps_device):
    points, batch = cloud(60, 11), torch.arange(60) % 2
    picks = farthest_point_sampling(points.to(fps_device), 10, 3, batch.to(fps_device)).cpu()
    for scan in (0, 1):
        rows = (batch == scan).nonzero()[:, 0]
        alone = farthest_point_sampling(points[rows], 10, 3)
        assert torch.equal(picks[10 * scan : 10 * scan + 10], rows[alone])


def test_farthest_points_cover_the_cloud():
    """2-approximation: the sample is spread by at least its own covering radius."""
    points = cloud(500, 12)
    picks = farthest_point_sampling(points, 25)
    assert len(set(picks.tolist())) == 25
    cover = torch.cdist(points, points[picks]).amin(dim=1).max()
    between = torch.cdist(points[picks], points[picks]) + torch.eye(25) * 1e9
    assert between.min() >= cover - 1e-4
    generator = torch.Generator().manual_seed(0)
    chance = points[torch.randperm(500, generator=generator)[:25]]
    assert cover < torch.cdist(points, chance).amin(dim=1).max()


def test_one_point():
    assert farthest_point_sampling(torch.zeros(1, 3), 1).tolist() == [0]


# ---- interpolation -------------------------------------------------------------------------------


def test_interpolation_by_hand():
    features = torch.tensor([[0.0], [12.0], [99.0]])
    distances = torch.tensor([[1.0, 2.0], [3.0, math.inf], [math.inf, math.inf]])
    indices = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    # weights 2/3 and 1/3; a single neighbour; none
    expected = torch.tensor([[4.0], [12.0], [0.0]])
    torch.testing.assert_close(interpolate(features, distances, indices), expected)


def test_interpolation_at_a_support_is_its_feature():
    points, features = cloud(30, 13), cloud(30, 14)
    distances, indices = knn(points, points, 3)
    torch.testing.assert_close(
        interpolate(features, distances, indices), features, atol=1e-4, rtol=0
    )


def test_interpolation_gradient():
    distances, indices = knn(cloud(6, 15).double(), cloud(5, 16).double(), 3)
    features = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: interpolate(f, distances, indices), (features,))
