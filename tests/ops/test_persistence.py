"""Persistent homology against plain loops over edges and simplices, and hand-worked values."""

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from pointcept_kd.ops import persistence
from pointcept_kd.ops.persistence import (
    MissingEngineError,
    chamfer_diagrams,
    edge_lengths,
    h0_deaths,
    h0_pairs,
    has_engine,
    mean_distance,
    persistence_diagram,
    persistence_entropy,
    persistence_pairs,
    wasserstein_h0,
)

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
gudhi = pytest.mark.skipif(
    not has_engine(), reason="GUDHI is not installed: pip install 'pointcept_kd[topology]'"
)


@pytest.fixture(params=["prim", "boruvka", CUDA])
def device(request, monkeypatch):
    """Both searches; Boruvka's also on CPU tensors, so that its steps are tested without a GPU."""
    if request.param == "boruvka":
        monkeypatch.setattr(
            persistence, "_prim", lambda s: persistence._boruvka(torch.from_numpy(s)).numpy()
        )
    return "cuda" if request.param == "cuda" else "cpu"


def cloud(n, channels, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, generator=g, dtype=torch.float64).to(dtype)


def rows(*points):
    return torch.tensor(points, dtype=torch.float64)


def polygon(n, radius=1.0):
    angles = [2 * math.pi * i / n for i in range(n)]
    return rows(*((radius * math.cos(t), radius * math.sin(t)) for t in angles))


# -------------------------------------------------------------------------------- plain-loop oracles


def kruskal(points):
    """H0 deaths: all edges by length, a union-find, one edge at a time, in Python floats."""
    points = points.tolist()
    edges = sorted(
        (math.dist(points[i], points[j]), i, j) for i, j in combinations(range(len(points)), 2)
    )
    parent = list(range(len(points)))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    deaths = []
    for length, i, j in edges:
        a, b = find(i), find(j)
        if a != b:
            parent[a] = b
            deaths.append(length)
    return deaths


def rips(points, dim):
    """Finite bars of positive length: columns of the boundary matrix reduced over Z/2, one by one."""
    points = points.tolist()
    simplices = []
    for size in range(1, dim + 3):
        for corners in combinations(range(len(points)), size):
            pairs = combinations(corners, 2)
            value = max((math.dist(points[i], points[j]) for i, j in pairs), default=0.0)
            simplices.append((value, size, corners))
    simplices.sort()
    number = {corners: i for i, (_, _, corners) in enumerate(simplices)}
    owner, bars = {}, []
    for value, size, corners in simplices:
        column = {number[face] for face in combinations(corners, size - 1)} if size > 1 else set()
        while column and max(column) in owner:
            column = column ^ owner[max(column)]
        if column:
            low = max(column)
            owner[low] = column
            birth, birth_size, _ = simplices[low]
            if birth_size == dim + 1 and value > birth:
                bars.append((birth, value))
    return sorted(bars)


def loop_chamfer(a, b):
    def one_way(a, b):
        return sum(min(sum((x - y) ** 2 for x, y in zip(p, q)) for q in b) for p in a) / len(a)

    return one_way(a, b) + one_way(b, a)


# ---------------------------------------------------------------------------------------------- H0

S2 = math.sqrt(2)
EDGE8 = 2 * math.sin(math.pi / 8)
CUBE = rows(*((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)))
OCTAHEDRON = rows((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
# name: points, H0 deaths, H1 bars, H2 bars
CASES = {
    "square": (rows((0, 0), (1, 0), (1, 1), (0, 1)), [1, 1, 1], [(1, 1.4142136)], []),
    "rectangle": (rows((0, 0), (2, 0), (2, 1), (0, 1)), [1, 1, 2], [(2, 2.2360680)], []),
    "line": (rows((0, 0), (1, 0), (3, 0), (7, 0)), [1, 2, 4], [], []),
    "triangle": (rows((0, 0), (3, 0), (0, 4)), [3, 4], [], []),
    "hexagon": (polygon(6), [1] * 5, [(1, 1.7320508)], [(1.7320508, 2)]),
    "octagon": (polygon(8), [0.7653669] * 7, [(0.7653669, 1.8477591)], None),
    "two columns": (
        rows((0, 0), (0, 1), (10, 0), (10, 1)),
        [1, 1, 10],
        [(10, 10.0498756)],
        [],
    ),
    "cube": (CUBE, [1] * 7, [(1, 1.4142136)] * 5, None),
    "octahedron": (OCTAHEDRON, [1.4142136] * 5, [], [(1.4142136, 2)]),
    "duplicates": (rows((0, 0), (0, 0), (1, 0), (1, 0), (3, 0)), [0, 0, 1, 2], [], []),
    "one place": (rows(*[(2.5, -1)] * 5), [0, 0, 0, 0], [], []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_h0_by_hand(name, dtype, device):
    points, deaths, _, _ = CASES[name]
    got = h0_deaths(points.to(device, dtype))
    assert got.dtype == dtype
    assert got.tolist() == pytest.approx(deaths, rel=1e-6, abs=0)


@pytest.mark.parametrize("n", [0, 1])
def test_clouds_without_an_edge(n, device):
    points = torch.zeros(n, 3, device=device, requires_grad=True)
    deaths = h0_deaths(points)
    assert deaths.shape == (0,)
    assert h0_pairs(points).shape == (0, 2)
    assert h0_pairs(points).dtype == torch.int64
    assert persistence_diagram(points, 0).shape == (0, 2)
    assert float(mean_distance(points).detach()) == 0
    (deaths.sum() + mean_distance(points)).backward()
    assert torch.equal(points.grad, torch.zeros_like(points))


@pytest.mark.parametrize(
    ("n", "channels", "seed"), [(2, 1, 0), (9, 3, 1), (60, 5, 2), (130, 96, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_h0_against_kruskal(n, channels, seed, dtype, device):
    points = cloud(n, channels, seed, dtype)
    expected = torch.tensor(kruskal(points), dtype=torch.float64)
    got = h0_deaths(points.to(device)).cpu().double()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


def is_spanning_tree(edges, n):
    seen = {0}
    left = [tuple(e) for e in edges.tolist()]
    while True:
        more = [e for e in left if (e[0] in seen) != (e[1] in seen)]
        if not more:
            break
        for e in more:
            seen |= set(e)
    return len(edges) == n - 1 and len(seen) == n


@pytest.mark.parametrize("kind", ["normal", "lattice", "duplicates", "clusters"])
def test_both_searches_agree(kind):
    """Equal deaths to the last bit, whatever the ties; both are spanning trees."""
    points = cloud(300, 4, 5)
    if kind == "lattice":  # almost all lengths occur many times
        points = torch.randint(0, 5, (300, 4), generator=torch.Generator().manual_seed(1)).double()
    if kind == "duplicates":
        points = points[torch.arange(300) % 40]
    if kind == "clusters":
        points = points * 1e-6 + 50.0 * (torch.arange(300) % 3)[:, None]
    for dtype in (torch.float64, torch.float32):
        one = points.to(dtype)
        squares = persistence._squared_distances(one)
        prim = torch.from_numpy(persistence._prim(squares.numpy()))
        boruvka = persistence._boruvka(squares)
        assert is_spanning_tree(prim, 300)
        assert is_spanning_tree(boruvka, 300)
        deaths = [edge_lengths(one, edges).sort().values for edges in (prim, boruvka)]
        assert torch.equal(*deaths)
        assert deaths[0].sum() == deaths[1].sum()
        expected = torch.tensor(kruskal(one), dtype=torch.float64)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-7
        torch.testing.assert_close(deaths[0].double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("n", range(2, 20))
def test_boruvka_never_closes_a_circle_among_equal_lengths(n):
    squares = torch.ones(n, n).fill_diagonal_(float("inf"))
    assert is_spanning_tree(persistence._boruvka(squares), n)
    ring = torch.full((n, n), 2.0)
    i = torch.arange(n)
    ring[i, (i + 1) % n] = ring[(i + 1) % n, i] = 1.0
    edges = persistence._boruvka(ring.fill_diagonal_(float("inf")))
    assert is_spanning_tree(edges, n)
    assert torch.equal(ring[edges[:, 0], edges[:, 1]], torch.ones(n - 1))


def test_boruvka_survives_a_matrix_that_is_not_symmetric():
    squares = torch.cdist(cloud(200, 8).float(), cloud(200, 8).float()).square()
    noise = 1 + 1e-6 * torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    edges = persistence._boruvka((squares * noise).fill_diagonal_(float("inf")))
    assert is_spanning_tree(edges, 200)


@pytest.mark.cuda
def test_both_searches_agree_across_devices():
    for n, channels in ((500, 96), (2000, 128)):
        points = cloud(n, channels, 3, torch.float32)
        torch.testing.assert_close(
            h0_deaths(points.cuda()).cpu(), h0_deaths(points), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matrix_product_route(dtype, device):
    """Large enough for it; with duplicates, near duplicates, an offset and a far point."""
    points = cloud(400, 24, 7)
    points[1::4] = points[::4]
    points[2::4] = points[::4] + 1e-3 * cloud(100, 24, 8)
    points += 3.0
    points[-1] = 900.0
    points = points.to(dtype)
    assert persistence._DIRECT < 400 * 400 * 24
    got = h0_deaths(points.to(device)).cpu().double()
    assert int((got == 0).sum()) == 100
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    expected = torch.tensor(kruskal(points), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "clusters"])
def test_squared_distances_are_good_to_a_share_of_themselves(kind, dtype):
    points = cloud(300, 128, 9)
    if kind == "clusters":
        points = 1e-4 * points + 20.0 * (torch.arange(300) % 2)[:, None]
    points = points.to(dtype)
    got = persistence._squared_distances(points).double().fill_diagonal_(0)
    exact = torch.cdist(
        points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    off = ~torch.eye(300, dtype=torch.bool)
    error = ((got - exact).abs() / exact.clamp(min=1e-30))[off].max()
    assert error < (1e-4 if dtype == torch.float32 else 1e-12)


def test_h0_gradient_by_hand(device):
    points = torch.tensor([[0.0], [1.0], [3.0]], device=device, requires_grad=True)
    for loss, value, grad in (
        (lambda d: d.sum(), 3.0, [-1.0, 0.0, 1.0]),
        (lambda d: chamfer_diagrams(d, torch.ones_like(d)), 0.5, [0.0, -1.0, 1.0]),
        (lambda d: wasserstein_h0(d, torch.ones_like(d)), 0.5, [0.0, -1.0, 1.0]),
    ):
        out = loss(h0_deaths(points))
        assert float(out.detach()) == value
        (got,) = torch.autograd.grad(out, points)
        assert got[:, 0].tolist() == grad


@pytest.mark.parametrize("name", ["duplicates", "one place", "square"])
def test_gradients_at_zero_lengths_and_ties_are_finite(name, device):
    points = CASES[name][0].to(device, torch.float32).requires_grad_()
    deaths = h0_deaths(points)
    (deaths.square().sum() + deaths.sum() + mean_distance(points)).backward()
    assert points.grad.isfinite().all()
    if name == "one place":
        assert torch.equal(points.grad, torch.zeros_like(points))


def test_h0_gradcheck(device):
    points = cloud(9, 3).to(device).requires_grad_()
    assert torch.autograd.gradcheck(h0_deaths, points)
    assert torch.autograd.gradcheck(mean_distance, points)
    target = h0_deaths(1.5 * cloud(9, 3, 1).to(device))
    for distance in (chamfer_diagrams, wasserstein_h0):
        assert torch.autograd.gradcheck(lambda p, d=distance: d(h0_deaths(p), target), points)
    assert torch.autograd.gradcheck(lambda p: persistence_entropy(h0_deaths(p)), points)


def test_mean_distance_gradcheck_through_the_matrix_product(monkeypatch):
    monkeypatch.setattr(persistence, "_DIRECT", 0)
    points = cloud(8, 9)
    points[3] = points[0] + 1e-3
    assert torch.autograd.gradcheck(mean_distance, points.requires_grad_())


def test_every_point_receives_gradient(device):
    points = cloud(200, 6).to(device).requires_grad_()
    h0_deaths(points).square().sum().backward()
    assert bool((points.grad.abs().sum(1) > 0).all())


def test_h0_does_not_depend_on_order_place_or_direction(device):
    points = cloud(80, 5).to(device)
    expected = h0_deaths(points)
    turn = torch.linalg.qr(cloud(5, 5, 1)).Q.to(device)
    for other in (points.flip(0), points + 37.0, points @ turn):
        torch.testing.assert_close(h0_deaths(other), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(h0_deaths(points * 3), expected * 3)
    a, b = points, 3 * points
    torch.testing.assert_close(h0_deaths(a / mean_distance(a)), h0_deaths(b / mean_distance(b)))


def test_h0_gradient_moves_with_the_order(device):
    points = cloud(50, 4).to(device).requires_grad_()
    order = torch.randperm(50).to(device)
    (straight,) = torch.autograd.grad(h0_deaths(points).square().sum(), points)
    shuffled = points.detach()[order].requires_grad_()
    (moved,) = torch.autograd.grad(h0_deaths(shuffled).square().sum(), shuffled)
    torch.testing.assert_close(moved, straight[order])


def test_h0_is_stable():
    """Sorted deaths move by at most twice what the points move."""
    points = cloud(100, 3)
    for size in (1e-3, 1e-1, 1.0):
        noise = cloud(100, 3, 1)
        noise = size * noise / noise.norm(dim=1, keepdim=True)
        moved = (h0_deaths(points + noise) - h0_deaths(points)).abs().max()
        assert moved <= 2 * size


def test_landmarks_are_stable():
    """With all points near landmarks, every long H0 bar has its partner within twice that distance."""
    points = cloud(300, 2)
    chosen = points[:150]
    reach = float(torch.cdist(points, chosen).amin(dim=1).max())
    few, many = h0_deaths(chosen).flip(0), h0_deaths(points).flip(0)
    assert float((few - many[:149]).abs().max()) <= 2 * reach
    assert float(many[149:].max()) <= 2 * 2 * reach


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, device):
    points = cloud(40, 6).to(device, dtype).requires_grad_()
    deaths = h0_deaths(points)
    assert deaths.dtype == torch.float32
    torch.testing.assert_close(deaths, h0_deaths(points.detach().float()), rtol=0, atol=0)
    deaths.sum().backward()
    assert points.grad.dtype == dtype
    assert mean_distance(points).dtype == torch.float32


def test_autocast_changes_nothing(device):
    points = cloud(150, 96, 2, torch.float32).to(device).requires_grad_()

    def run():
        out = [h0_deaths(points), mean_distance(points)]
        out.append(wasserstein_h0(out[0], out[0].detach() * 2))
        return [*out, *torch.autograd.grad(out[1] + out[2], points)]

    plain = run()
    with torch.autocast(device, dtype=torch.bfloat16):
        for a, b in zip(run(), plain):
            assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_points_without_finite_distances_are_refused(value, device):
    points = torch.zeros(4, 3, device=device)
    points[2, 1] = value
    for op in (h0_pairs, h0_deaths, mean_distance, lambda p: persistence_pairs(p, 1)):
        with pytest.raises(ValueError, match="finite"):
            op(points)


def test_mean_distance():
    assert float(mean_distance(CASES["square"][0])) == pytest.approx(1.1380712, rel=1e-6)
    for points in (cloud(30, 4), cloud(150, 64)):
        points = points.tolist()
        pairs = [math.dist(p, q) for p, q in combinations(points, 2)]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            got = float(mean_distance(torch.tensor(points, dtype=dtype)))
            assert got == pytest.approx(sum(pairs) / len(pairs), rel=tolerance)


def test_edge_lengths():
    points = rows((0, 0), (3, 4), (3, 4)).requires_grad_()
    pairs = torch.tensor([[[0, 1], [1, 2]], [[1, 0], [0, 0]]])
    lengths = edge_lengths(points, pairs)
    assert lengths.tolist() == [[5, 0], [5, 0]]
    (grad,) = torch.autograd.grad(lengths.sum(), points)
    assert grad.flatten().tolist() == pytest.approx([-1.2, -1.6, 1.2, 1.6, 0, 0])


# ---------------------------------------------------------------------------------------- H1 and H2


def approx_bars(bars):
    return [pytest.approx(bar, rel=1e-6) for bar in bars]


@gudhi
@pytest.mark.parametrize("name", CASES)
def test_loops_and_voids_by_hand(name):
    points, _, loops, voids = CASES[name]
    for dim, bars in ((1, loops), (2, voids)):
        if bars is None:
            bars = rips(points, dim)
        pairs = persistence_pairs(points, dim)
        assert pairs.dtype == torch.int64
        assert pairs.shape == (len(bars), 2, 2)
        got = persistence_diagram(points, dim)
        assert got.tolist() == approx_bars(bars)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_itself_by_hand(name):
    points, deaths, loops, voids = CASES[name]
    assert kruskal(points) == pytest.approx(deaths, rel=1e-6)
    # Corners of a regular polygon are a rounding apart: bars of that length are none.
    for dim, bars in ((1, loops), (2, voids)):
        if bars is not None:
            got = [bar for bar in rips(points, dim) if bar[1] - bar[0] > 1e-9]
            assert got == approx_bars(bars)


@pytest.fixture(scope="module")
def spheres():
    """Clouds of 12 points on a sphere and their bars by plain loops: 27 loops and 4 voids in all."""
    clouds = [torch.nn.functional.normalize(cloud(12, 3, seed)) for seed in range(12)]
    bars = [{dim: rips(points, dim) for dim in (1, 2)} for points in clouds]
    assert [sum(len(b[dim]) for b in bars) for dim in (1, 2)] == [27, 4]
    return list(zip(clouds, bars))


@gudhi
@pytest.mark.parametrize("dim", [1, 2])
def test_loops_and_voids_against_the_boundary_matrix(dim, spheres):
    for points, bars in spheres:
        got = sorted(map(tuple, persistence_diagram(points, dim).tolist()))
        assert len(got) == len(bars[dim])
        assert got == [pytest.approx(bar, rel=1e-12) for bar in bars[dim]]


@gudhi
def test_loops_on_a_lattice_with_ties():
    points = rows(*((x, y) for x in range(3) for y in range(3)))
    got = persistence_diagram(points, 1).tolist()
    assert got == approx_bars(rips(points, 1))
    assert len(got) == 4
    # The lowest rows stand for all edges of that length.
    assert persistence_pairs(points, 1)[:, 0].tolist() == [[0, 1]] * 4


@gudhi
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_small_clouds_have_no_loops(n, dim):
    points = cloud(n, 3).requires_grad_()
    diagram = persistence_diagram(points, dim)
    assert diagram.shape == (0, 2)
    diagram.sum().backward()
    assert torch.equal(points.grad, torch.zeros_like(points))


def noisy_circle():
    return polygon(12) + 0.05 * cloud(12, 2, 4)


@gudhi
def test_loop_gradcheck_on_a_noisy_circle():
    points = noisy_circle().requires_grad_()
    loops = persistence_diagram(points, 1)
    assert len(loops) == 1
    assert torch.autograd.gradcheck(lambda p: persistence_diagram(p, 1), points)
    target = rows((0.3, 1.2))

    def loss(p):
        h0 = wasserstein_h0(h0_deaths(p), torch.full((11,), 0.4, dtype=torch.float64))
        return h0 + chamfer_diagrams(persistence_diagram(p, 1), target)

    assert torch.autograd.gradcheck(loss, points)


@gudhi
def test_void_gradcheck_on_a_noisy_octahedron():
    points = (OCTAHEDRON + 0.05 * cloud(6, 3, 2)).requires_grad_()
    assert len(persistence_diagram(points, 2)) == 1
    assert torch.autograd.gradcheck(lambda p: persistence_diagram(p, 2), points)


@gudhi
def test_loops_do_not_depend_on_order_place_or_direction():
    points = cloud(40, 3)
    expected = persistence_diagram(points, 1)
    assert len(expected) > 3
    turn = torch.linalg.qr(cloud(3, 3, 1)).Q
    for other in (points.flip(0), points + 37.0, points @ turn):
        torch.testing.assert_close(persistence_diagram(other, 1), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(persistence_diagram(3 * points, 1), 3 * expected)


@gudhi
def test_a_loop_is_stable():
    clean, noisy = persistence_diagram(polygon(12), 1), persistence_diagram(noisy_circle(), 1)
    moved = float((0.05 * cloud(12, 2, 4)).norm(dim=1).max())
    assert float((clean - noisy).abs().max()) <= 2 * moved


@gudhi
def test_loops_in_float32_half_precision_and_under_autocast():
    points = cloud(40, 16, 3, torch.float32)
    pairs = persistence_pairs(points, 1)
    assert torch.equal(pairs, persistence_pairs(points.double(), 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(persistence_pairs(points, 1), pairs)
        assert persistence_diagram(points, 1).dtype == torch.float32
    assert persistence_diagram(points.half(), 1).dtype == torch.float32


@gudhi
@pytest.mark.cuda
def test_loops_of_a_cloud_on_cuda():
    points = cloud(40, 16, 3)
    pairs = persistence_pairs(points.cuda(), 1)
    assert pairs.is_cuda
    assert torch.equal(pairs.cpu(), persistence_pairs(points, 1))


@gudhi
def test_a_float32_product_of_distances_does_not_exhaust_the_memory():
    """256 points, 128 channels, a matrix off by rounding: asymmetric, with a diagonal that is not 0."""
    code = """
import resource
import numpy as np, torch
from pointcept_kd.ops import persistence
persistence._engine()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
torch.set_num_threads(1)
x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
norms = x.square().sum(1)
d = (norms[:, None] + norms - 2 * x @ x.T).abs().sqrt().numpy()
d *= 1 + 1e-6 * np.random.default_rng(0).standard_normal(d.shape).astype(np.float32)
assert (d != d.T).any() and d.diagonal().max() > 0
print(len(persistence._rips_bars(d, 1)), len(persistence.persistence_pairs(x, 1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    from_matrix, from_points = map(int, done.stdout.split())
    assert from_points > 100
    assert abs(from_matrix - from_points) < 0.1 * from_points


@pytest.mark.parametrize("dim", [-1, 0, 3])
def test_other_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match="dim must be"):
        persistence_pairs(cloud(5, 2), dim)


def test_large_clouds_are_refused():
    with pytest.raises(ValueError, match="landmarks"):
        persistence_pairs(cloud(20, 2), 1, max_points=19)


def test_without_gudhi(monkeypatch):
    monkeypatch.setitem(sys.modules, "gudhi", None)
    monkeypatch.setitem(sys.modules, "gudhi.sklearn", None)
    assert not has_engine()
    for n in (0, 5):
        with pytest.raises(MissingEngineError, match=r"pip install 'pointcept_kd\[topology\]'"):
            persistence_pairs(cloud(n, 2), 1)
    assert issubclass(MissingEngineError, ValueError)
    assert len(persistence_diagram(cloud(5, 2), 0)) == 4


def test_importing_the_ops_does_not_import_gudhi():
    code = (
        "import sys, pointcept_kd.ops.persistence; print({'gudhi', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------ distances between diagrams


def deaths(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_chamfer_by_hand():
    assert float(chamfer_diagrams(deaths(1, 2), deaths(1.5))) == 0.5
    assert float(chamfer_diagrams(deaths(1, 2, 4), deaths(1, 3))) == pytest.approx(2 / 3 + 0.5)
    square, rectangle = (h0_deaths(CASES[name][0]) for name in ("square", "rectangle"))
    assert float(chamfer_diagrams(square, rectangle)) == pytest.approx(1 / 3)
    assert float(wasserstein_h0(square, rectangle)) == pytest.approx(1 / 3)
    loops = chamfer_diagrams(rows((1, S2)), rows((2, math.sqrt(5))))
    assert float(loops) == pytest.approx(3.3508897, rel=1e-6)


def test_chamfer_of_scaled_clouds_by_hand():
    one, two = (CASES[name][0] for name in ("square", "rectangle"))
    a, b = (h0_deaths(p / mean_distance(p)) for p in (one, two))
    assert a.tolist() == pytest.approx([0.8786797] * 3, rel=1e-6)
    assert h0_deaths(2 * one / mean_distance(2 * one)).tolist() == pytest.approx(a.tolist())
    assert float(chamfer_diagrams(a, b)) == pytest.approx(0.1575217, rel=1e-6)


@gudhi
def test_a_loop_of_a_scaled_cloud_by_hand():
    points = CASES["square"][0]
    for size in (1, 2):
        scaled = size * points / mean_distance(size * points)
        got = persistence_diagram(scaled, 1)
        assert got.tolist() == approx_bars([(0.8786797, 1.2426407)])


def test_chamfer_of_empty_diagrams():
    none, bar = torch.zeros(0, 2, dtype=torch.float64), rows((1, S2))
    assert float(chamfer_diagrams(none, bar)) == pytest.approx(0.0857864, rel=1e-6)
    assert float(chamfer_diagrams(bar, none)) == pytest.approx(0.0857864, rel=1e-6)
    assert float(chamfer_diagrams(deaths(), deaths(1, 3))) == pytest.approx((1 + 9) / 2 / 2)
    student = none.clone().requires_grad_()
    value = chamfer_diagrams(student, none)
    assert float(value.detach()) == 0
    value.backward()
    assert student.grad.shape == (0, 2)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 9), (60, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_chamfer_against_the_loop(sizes, seed, monkeypatch):
    monkeypatch.setattr(persistence, "_CHUNK", 100)  # several chunks
    a, b = (cloud(n, 2, 10 * seed + i) for i, n in enumerate(sizes))
    expected = loop_chamfer(a.tolist(), b.tolist())
    assert float(chamfer_diagrams(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(chamfer_diagrams(b, a)) == pytest.approx(expected, rel=1e-12)
    # Deaths alone are bars born at 0; ties and order do not matter.
    a, b = (x[:, 0].mul(4).round().abs() for x in (a, b))
    zero = [torch.stack((torch.zeros_like(x), x), dim=1) for x in (a, b)]
    expected = loop_chamfer(zero[0].tolist(), zero[1].tolist())
    assert float(chamfer_diagrams(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(chamfer_diagrams(*zero)) == pytest.approx(expected, rel=1e-12)


def test_chamfer_of_a_diagram_with_itself_is_zero():
    assert float(chamfer_diagrams(cloud(30, 2), cloud(30, 2))) == 0
    assert float(chamfer_diagrams(cloud(30, 1)[:, 0], cloud(30, 1)[:, 0])) == 0


def test_chamfer_gradcheck():
    a, b = cloud(7, 2).requires_grad_(), cloud(5, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(chamfer_diagrams, (a, b))
    assert torch.autograd.gradcheck(lambda x, y: chamfer_diagrams(x[:, 0], y[:, 1]), (a, b))
    none = torch.zeros(0, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: chamfer_diagrams(x, none), a)
    assert torch.autograd.gradcheck(lambda x: chamfer_diagrams(none, x), a)


def test_wasserstein_by_hand():
    # Sorted: (1, 2, 4) against (1, 3, 7).
    assert float(wasserstein_h0(deaths(4, 1, 2), deaths(1, 7, 3))) == pytest.approx((0 + 1 + 9) / 3)
    assert float(wasserstein_h0(deaths(), deaths())) == 0
    with pytest.raises(ValueError, match="3 and 2"):
        wasserstein_h0(deaths(1, 2, 3), deaths(1, 2))


def test_wasserstein_takes_the_best_matching():
    from itertools import permutations

    a, b = cloud(6, 1, 1)[:, 0].abs(), cloud(6, 1, 2)[:, 0].abs()
    best = min(
        sum((x - y) ** 2 for x, y in zip(a.tolist(), order)) / 6
        for order in permutations(b.tolist())
    )
    assert float(wasserstein_h0(a, b)) == pytest.approx(best, rel=1e-12)


def test_entropy_by_hand():
    assert float(persistence_entropy(deaths(1, 1, 2))) == pytest.approx(1.0397208, rel=1e-6)
    for n in (1, 2, 7):
        equal = torch.full((n,), 3.0)
        assert float(persistence_entropy(equal)) == pytest.approx(math.log(n), abs=1e-6)
    moved = rows((5, 6), (0, 1), (2, 4))
    assert float(persistence_entropy(moved)) == pytest.approx(1.0397208, rel=1e-6)


def test_entropy_ignores_bars_of_length_zero():
    bars = deaths(0, 1, 0, 1, 2).requires_grad_()
    value = persistence_entropy(bars)
    assert float(value.detach()) == pytest.approx(1.0397208, rel=1e-6)
    value.backward()
    assert bars.grad.isfinite().all()
    assert bars.grad[[0, 2]].tolist() == [0, 0]
    for none in (deaths(), deaths(0, 0)):
        none.requires_grad_()
        value = persistence_entropy(none)
        assert float(value.detach()) == 0
        value.backward()
        assert torch.equal(none.grad, torch.zeros_like(none))


def test_entropy_against_the_loop_and_gradcheck():
    bars = cloud(20, 2).abs().cumsum(1)
    lives = [d - b for b, d in bars.tolist()]
    expected = -sum(v / sum(lives) * math.log(v / sum(lives)) for v in lives)
    assert float(persistence_entropy(bars)) == pytest.approx(expected, rel=1e-12)
    assert float(persistence_entropy(9 * bars)) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(persistence_entropy, bars.requires_grad_())


def test_bad_diagrams_are_refused():
    good = rows((1, 2))
    for bad in (rows((1, math.inf)), rows((math.nan, 1))):
        for call in (
            lambda d: chamfer_diagrams(d, good),
            lambda d: chamfer_diagrams(good, d),
            persistence_entropy,
            lambda d: wasserstein_h0(d[:, 1] + d[:, 0], good[:, 1]),
        ):
            with pytest.raises(ValueError, match="infinite"):
                call(bad)
    with pytest.raises(ValueError, match="births"):
        chamfer_diagrams(good, deaths(1, 2))
    with pytest.raises(ValueError, match=r"\(m, 2\)"):
        chamfer_diagrams(torch.ones(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="before its birth"):
        persistence_entropy(rows((2, 1)))
    assert np.isfinite(float(persistence_entropy(rows((2, 3), (1, 1 - 1e-9)))))
