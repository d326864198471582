"""Nearest rows and Chamfer distances against plain loops, hand-worked values and each other."""

import math

import pytest
import torch

from pointcept_kd.ops import distance
from pointcept_kd.ops.distance import (
    chamfer_distance,
    chamfer_squared,
    nearest,
    nearest_rows,
    pair_distance,
)

P = torch.tensor([[0.1, 0.1, 0.1], [1.1, 0.1, 0.1], [0.1, 2.1, 0.1]])
G = torch.tensor([[0.1, 0.1, 0.1], [1.1, 0.1, 0.6], [10.1, 0.1, 0.1], [0.1, 2.1, 0.1]])


@pytest.fixture(params=["tree", "blocks", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    if request.param == "blocks":  # the search of other devices also runs on CPU tensors
        monkeypatch.setattr(distance, "_tree", distance._blocks)
        monkeypatch.setattr(distance, "_BLOCK", 300)  # several blocks
    return "cuda" if request.param == "cuda" else "cpu"


def cloud(n, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([40.0, 40.0, 1.0], dtype=dtype)
    return torch.randn(n, 3, generator=generator, dtype=dtype) * spread


def loop_nearest(query, support):
    pairs = [min((math.dist(q, s), j) for j, s in enumerate(support)) for q in query]
    return [d for d, _ in pairs], [j for _, j in pairs]


def loop_chamfer(a, b, power):
    there = [min(math.dist(x, y) ** power for y in b) for x in a]
    back = [min(math.dist(x, y) ** power for x in a) for y in b]
    total = sum(there) / len(there) + sum(back) / len(back)
    return total / 2 if power == 1 else total


def test_nearest_is_the_loop(device):
    query, support = cloud(70, 0).to(device), cloud(90, 1).to(device)
    got, index = nearest(query, support)
    expected, rows = loop_nearest(query.tolist(), support.tolist())
    assert index.tolist() == rows
    assert index.dtype == torch.int64
    torch.testing.assert_close(got.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_lowest_row_among_equals(device):
    corners = torch.tensor([[x, y, z] for x in (1.0, -1) for y in (1, -1) for z in (1, -1)])
    support = torch.cat([corners + 50, corners.flip(0), corners])  # every near corner twice
    query = torch.cat([torch.zeros(3, 3), torch.tensor([[1.0, 1, 0], [-1, 0, 0]])])
    rows = nearest_rows(query.to(device), support.to(device)).tolist()
    assert rows == loop_nearest(query.tolist(), support.tolist())[1]
    assert rows[:3] == [8, 8, 8]
    one = torch.ones(6, 3, device=device)
    assert nearest_rows(query.to(device), one).tolist() == [0] * 5


def test_tree_and_blocks_agree_on_a_grid_of_ties():
    generator = torch.Generator().manual_seed(3)
    query = torch.randint(-4, 5, (400, 3), generator=generator) / 2
    support = torch.randint(-2, 3, (150, 3), generator=generator).float()
    assert torch.equal(distance._tree(query, support), distance._blocks(query, support))


def test_acceptance_value_by_hand(device):
    p, g = P.to(device), G.to(device)
    there, back = nearest(p, g)[0].tolist(), nearest(g, p)[0].tolist()
    assert there == pytest.approx([0, 0.5, 0])
    assert back == pytest.approx([0, 0.5, 9, 0], rel=1e-6)
    value = chamfer_distance(p, g)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(1.2708333, abs=1e-6)
    assert chamfer_squared(p, g).item() == pytest.approx(0.25 / 3 + 81.25 / 4, rel=1e-6)


@pytest.mark.parametrize(("function", "power"), [(chamfer_distance, 1), (chamfer_squared, 2)])
def test_chamfer_is_the_loop_per_scan(device, function, power):
    a, b = cloud(60, 0), cloud(80, 1)
    a_offset, b_offset = torch.tensor([25, 60]), torch.tensor([50, 80])
    got = function(a.to(device), b.to(device), a_offset, b_offset).tolist()
    expected = [
        loop_chamfer(a[:25].tolist(), b[:50].tolist(), power),
        loop_chamfer(a[25:].tolist(), b[50:].tolist(), power),
    ]
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("function", [chamfer_distance, chamfer_squared])
def test_properties(function):
    a, b = cloud(40, 0, torch.float64), cloud(50, 1, torch.float64)
    assert function(a, a).item() == 0
    torch.testing.assert_close(function(a, b), function(b, a))
    order = torch.randperm(40)
    torch.testing.assert_close(function(a[order], b), function(a, b))
    moved = torch.tensor([10.0, -3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(function(a + moved, b + moved), function(a, b))
    torch.testing.assert_close(function(torch.cat([a, a]), b), function(a, b))
    leaves = (
        cloud(6, 2, torch.float64).requires_grad_(),
        cloud(7, 3, torch.float64).requires_grad_(),
    )
    ends = torch.tensor([2, 6]), torch.tensor([3, 7])
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, *ends), leaves)


def test_gradient_by_hand():
    a = torch.tensor([[0.0, 0, 0], [4, 0, 0]], requires_grad=True)
    b = torch.tensor([[1.0, 0, 0]])
    chamfer_squared(a, b).sum().backward()
    # 1/2 (1 + 9) there, 1 back: d/da0 = 1/2 * 2 * (-1) - 2 (from b to its nearest, a0), d/da1 = 1/2 * 2 * 3.
    assert a.grad[:, 0].tolist() == [-3.0, 3.0]


def test_coinciding_points_have_a_finite_gradient():
    a = torch.tensor([[1.0, 2, 3], [4, 5, 6]], requires_grad=True)
    chamfer_distance(a, a.detach().clone()).sum().backward()
    assert a.grad.eq(0).all()
    assert pair_distance(a, a).tolist() == [0, 0]


def test_far_from_the_origin_values_stay_exact(device):
    """Two clouds 1 mm apart at 80 m: expanded squares in float32 would return anything below a centimetre."""
    a = cloud(200, 0).to(device) + 80
    b = a + torch.tensor([0.001, 0, 0], device=device)
    exact = chamfer_distance(a.double(), b.double())
    torch.testing.assert_close(chamfer_distance(a, b).double(), exact, rtol=1e-6, atol=1e-9)
    assert exact.item() == pytest.approx(0.001, rel=0.05)


def test_no_queries_is_no_rows(device):
    none = torch.zeros(0, 3, device=device)
    distances, index = nearest(none, cloud(3, 0).to(device))
    assert distances.shape == index.shape == (0,)
    ends = torch.tensor([0, 3]), torch.tensor([3, 6])
    rows = nearest_rows(cloud(3, 0).to(device), cloud(6, 1).to(device), *ends)
    assert (rows >= 3).all()


def test_bad_input():
    a = cloud(4, 0)
    bad = a.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match="support is not finite in row 2"):
        nearest(a, bad)
    with pytest.raises(ValueError, match="query is not finite in row 2"):
        nearest(bad, a)
    with pytest.raises(ValueError, match="scan 0 has 4 queries and no supports"):
        nearest(a, a[:0])
    with pytest.raises(ValueError, match="scan 0 is empty"):
        chamfer_distance(a[:0], a[:0])
    with pytest.raises(ValueError, match="offsets of both clouds"):
        nearest(a, a, torch.tensor([4]))
    with pytest.raises(ValueError, match="1 scans, the other 2"):
        nearest(a, a, torch.tensor([4]), torch.tensor([2, 4]))
    for ends in ([2, 5], [3, 2, 4], [1]):
        offset = torch.tensor(ends)
        with pytest.raises(ValueError, match="does not divide 4 rows"):
            nearest(a, a, offset, offset)
