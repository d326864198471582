"""knn_query, ball_query, random_ball_query: loops as oracles, every backend that runs on a CPU."""

import numpy as np
import pointops
import pytest
import torch
from pointops import _brute, _cpu, query

from . import oracles


@pytest.fixture(params=["scipy", "small_gicp", "brute"])
def search(request, monkeypatch):
    """One of the implementations behind the same functions."""
    if request.param == "small_gicp":
        pytest.importorskip("small_gicp", reason="small-gicp is not installed (extra fast)")
    elif request.param == "scipy":
        monkeypatch.setattr(_cpu, "_optional", lambda name: None)
    else:
        monkeypatch.setattr(query, "backend", lambda points, k=1: _brute)
    return request.param


def batch(lengths, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    offset = torch.tensor(lengths).cumsum(0).int()
    return torch.rand(int(offset[-1]), 3, generator=g, dtype=dtype) * 2, offset


BATCHES = {
    "two scans": ([30, 25], [10, 12]),
    "one point": ([1, 20], [3, 1]),
    "empty support": ([0, 20, 0], [2, 5, 3]),
    "empty query": ([5, 20, 7], [4, 0, 2]),
    "nothing": ([0], [0]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("k", [1, 4, 40])
def test_knn_is_the_loop(search, name, k):
    (xyz, offset), (new_xyz, new_offset) = (batch(n, i) for i, n in enumerate(BATCHES[name]))
    idx, dist = pointops.knn_query(k, xyz, offset, new_xyz, new_offset)
    want_idx, want_dist = oracles.knn(k, xyz, offset.tolist(), new_xyz, new_offset.tolist())
    assert idx.dtype == torch.int32
    assert dist.dtype == torch.float32
    assert idx.shape == dist.shape == (len(new_xyz), k)
    assert idx.tolist() == want_idx
    torch.testing.assert_close(dist, torch.tensor(want_dist).reshape(dist.shape))


def test_without_new_points_the_points_ask_themselves(search):
    xyz, offset = batch([7, 9])
    idx, dist = pointops.knn_query(3, xyz, offset)
    assert idx.tolist() == oracles.knn(3, xyz, offset.tolist(), xyz, offset.tolist())[0]
    assert idx[:, 0].tolist() == list(range(16))
    assert (dist[:, 0] == 0).all()


def test_equal_distances_are_in_order_of_rows(search):
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    xyz = torch.cat((grid, grid))  # every point twice
    offset = torch.tensor([len(xyz)])
    # All 128 points: no tie is cut at the end.
    idx, dist = pointops.knn_query(128, xyz, offset)

    assert idx[0, :2].tolist() == [0, 64]
    for row in (0, 21, 127):
        found = oracles.by_distance(row, xyz, [128], xyz, [128])
        assert idx[row].tolist() == [i for _, i in found]
        np.testing.assert_allclose(dist[row], [d for d, _ in found], rtol=1e-6)


def test_one_place_many_times(search):
    xyz = torch.zeros(3000, 3)
    idx, dist = pointops.knn_query(5, xyz, torch.tensor([3000]), xyz[:2], torch.tensor([2]))
    assert (dist == 0).all()
    assert all(len(set(row)) == 5 for row in idx.tolist())


def test_order_in_memory_does_not_show(search):
    xyz = torch.rand(9000, 3) * 20
    new_xyz = torch.rand(8500, 3) * 20
    assert _cpu._spatial_order(xyz) is not None
    assert _cpu._spatial_order(xyz[xyz[:, 0].argsort()] * torch.tensor([1.0, 0, 0])) is None
    ends = torch.tensor([9000]), torch.tensor([8500])
    idx, dist = pointops.knn_query(3, xyz, ends[0], new_xyz, ends[1])
    for row in (0, 4000, 8499):
        every = (xyz.double() - new_xyz[row].double()).norm(dim=1)
        near, which = every.topk(3, largest=False)
        assert idx[row].tolist() == which.tolist()
        torch.testing.assert_close(dist[row], near.float())
    itself, _ = pointops.knn_query(2, xyz, ends[0])
    assert torch.equal(itself[:, 0], torch.arange(9000).int())


def test_two_views_that_begin_at_one_place(search):
    memory = torch.rand(40, 3)
    xyz, new_xyz = memory[:20], memory[::2]
    idx, _ = pointops.knn_query(2, xyz, torch.tensor([20]), new_xyz, torch.tensor([20]))
    assert idx.tolist() == oracles.knn(2, xyz, [20], new_xyz, [20])[0]
    # Three columns of a wider tensor.
    wide = torch.rand(20, 5)
    idx, _ = pointops.knn_query(2, wide[:, 1:4], torch.tensor([20]))
    assert idx.tolist() == oracles.knn(2, wide[:, 1:4], [20], wide[:, 1:4], [20])[0]


def test_double_stays_double(search):
    xyz, offset = batch([6], dtype=torch.float64)
    shift = xyz + 1e-9
    assert pointops.knn_query(1, xyz, offset, shift, offset)[1].dtype == torch.float64
    assert pointops.knn_query(1, xyz, offset, shift.float(), offset)[1].dtype == torch.float64
    assert pointops.knn_query(1, xyz.half(), offset)[1].dtype == torch.float32


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("low", "high"), [(0, 0.8), (0.4, 1.1), (5, 6)])
def test_ball_is_the_loop(search, name, low, high):
    (xyz, offset), (new_xyz, new_offset) = (batch(n, i) for i, n in enumerate(BATCHES[name]))
    ends, new_ends = offset.tolist(), new_offset.tolist()
    for k in (1, 3, 50):
        idx, dist = pointops.ball_query(k, high, low, xyz, offset, new_xyz, new_offset)
        assert idx.shape == dist.shape == (len(new_xyz), k)
        assert idx.dtype == torch.int32
        for row in range(len(new_xyz)):
            found = oracles.shell(row, low, high, new_xyz, new_ends, xyz, ends)
            if len(found) > k:
                found = [found[int(i * len(found) / k + 1e-9)] for i in range(k)]
            found += [(1e5, -1)] * (k - len(found))
            assert idx[row].tolist() == [i for _, i in found]
            np.testing.assert_allclose(dist[row], [d for d, _ in found], rtol=1e-6)


def test_shell_is_closed_inside_and_open_outside_and_keeps_the_point_itself(search):
    xyz = torch.tensor([[0.0, 0, 0], [0.003, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    offset = torch.tensor([5])
    idx, dist = pointops.ball_query(5, 3, 1, xyz, offset, xyz[:1], torch.tensor([1]))
    assert idx.tolist() == [[0, 1, 2, 3, -1]]
    torch.testing.assert_close(dist, torch.tensor([[0, 0.003, 1, 2, 1e5]]))


def test_many_candidates_are_thinned_evenly(search):
    xyz = torch.zeros(10, 3)
    xyz[:, 0] = torch.arange(10) / 10
    idx, _ = pointops.ball_query(4, 5, 0, xyz, torch.tensor([10]), xyz[:1], torch.tensor([1]))
    assert idx.tolist() == [[0, 2, 5, 7]]  # floor of 0, 2.5, 5, 7.5


def test_queries_in_several_slices(search, monkeypatch):
    (xyz, offset), (new_xyz, new_offset) = batch([30, 25], 0), batch([10, 12], 1)
    whole = pointops.ball_query(4, 1, 0, xyz, offset, new_xyz, new_offset)
    near = pointops.knn_query(4, xyz, offset, new_xyz, new_offset)
    monkeypatch.setattr(_cpu, "_QUERIES", 3)
    monkeypatch.setattr(_cpu, "_SLICE", 4)
    monkeypatch.setattr(_brute, "_CHUNK", 60)
    for a, b in zip(whole, pointops.ball_query(4, 1, 0, xyz, offset, new_xyz, new_offset)):
        assert torch.equal(a, b)
    for a, b in zip(near, pointops.knn_query(4, xyz, offset, new_xyz, new_offset)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BATCHES)
def test_random_ball_takes_the_first_of_a_permutation(search, name):
    (xyz, offset), (new_xyz, new_offset) = (batch(n, i) for i, n in enumerate(BATCHES[name]))
    ends, new_ends = offset.tolist(), new_offset.tolist()
    torch.manual_seed(7)
    idx, dist = pointops.random_ball_query(3, 0.9, 0.2, xyz, offset, new_xyz, new_offset)
    torch.manual_seed(7)
    order = []
    for scan in range(len(ends)):
        rows = oracles.rows_of(scan, ends)
        order += [rows[int(i)] for i in torch.randperm(len(rows), dtype=torch.int32)]
    for row in range(len(new_xyz)):
        found = oracles.shell(row, 0.2, 0.9, new_xyz, new_ends, xyz, ends)
        found = sorted(found, key=lambda pair: order.index(pair[1]))[:3]
        found += [(1e5, -1)] * (3 - len(found))
        assert idx[row].tolist() == [i for _, i in found]
        np.testing.assert_allclose(dist[row], [d for d, _ in found], rtol=1e-6)


def test_random_ball_differs_from_call_to_call():
    xyz, offset = torch.rand(200, 3), torch.tensor([200])
    first, second = (pointops.random_ball_query(5, 3, 0, xyz, offset)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_nothing_is_differentiable():
    xyz, offset = batch([9])
    for k_query in (
        lambda x: pointops.knn_query(2, x, offset),
        lambda x: pointops.ball_query(2, 1, 0, x, offset),
    ):
        idx, dist = k_query(xyz.requires_grad_())
        assert not dist.requires_grad
        assert not idx.requires_grad


GOOD = dict(nsample=2, xyz=torch.rand(6, 3), offset=torch.tensor([2, 6]))
BAD = {
    "nsample must be at least 1": dict(nsample=0),
    "must not decrease": dict(offset=torch.tensor([7, 6])),
    "must not decrease: scan 0": dict(offset=torch.tensor([-1, 6])),
    "ends at 5, but there are 6 points": dict(offset=torch.tensor([2, 5])),
    "vector of whole numbers": dict(offset=torch.tensor([2.0, 6.0])),
    r"\(n, 3\), got torch.float32 \(6, 2\)": dict(xyz=torch.rand(6, 2)),
    r"\(n, 3\), got torch.int64": dict(xyz=torch.zeros(6, 3, dtype=torch.long)),
    "not finite in row 1": dict(xyz=torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]] * 3)),
    "give new_xyz and new_offset": dict(new_xyz=torch.rand(6, 3)),
    "offset has 2 scans, new_offset has 1": dict(
        new_xyz=torch.rand(6, 3), new_offset=torch.tensor([6])
    ),
    "on one device": dict(offset=torch.tensor([2, 6], device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        pointops.knn_query(**GOOD | BAD[message])
    for ball in (pointops.ball_query, pointops.random_ball_query):
        with pytest.raises(ValueError, match=message):
            ball(max_radius=1, min_radius=0, **GOOD | BAD[message])


@pytest.mark.parametrize("radii", [(1, 1), (1, 2), (1, -1), (float("inf"), 0), (float("nan"), 0)])
def test_bad_radii_are_named(radii):
    with pytest.raises(ValueError, match="min_radius < max_radius"):
        pointops.ball_query(2, *radii, GOOD["xyz"], GOOD["offset"])
