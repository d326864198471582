"""Persistent homology of point clouds: exact bars with gradients, and distances between diagrams.

The Vietoris-Rips filtration joins points in the order of their Euclidean distance. Its H0 bars are
born at 0 and die at the edge lengths of a minimum spanning tree, so H0 needs no more than that tree.
H1 (loops) and H2 (voids) come from GUDHI, which is optional. Every birth and death is the length of
one edge: the search for edges has no graph, the lengths are computed again from the points, and the
gradient is the unit vector between the two ends (zero where they coincide).

A diagram is (m, 2), births and deaths; a diagram of H0 may also be given by its deaths alone, (m,).
The one bar of H0 that never dies is left out. Half-precision input is computed in float32, under
autocast too; float64 stays.

Edelsbrunner & Harer, 2010, "Computational Topology"; Bauer, 2021, arXiv:1908.02518 (the engine).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.autograd.function import once_differentiable

# Direct differences up to this many of them; above, a matrix product and a repair of short edges.
_DIRECT = 2**20
# Squared distances below this share of a squared norm are computed again from differences. A product
# in float32 is off by some 1e-7 of the squared norms, hence by less than 1e-4 of what is kept.
_SHORT = 4e-3
# Numbers held at once while differences are taken, and while nearest bars are looked for.
_CHUNK = 2**22


class MissingEngineError(ValueError):
    """H1 or H2 was asked for and the package that computes it is not installed."""


# --- edges ----------------------------------------------------------------------------------------


def _exact(points: Tensor) -> Tensor:
    """The points in float32 or float64; refuses what has no finite squared distances."""
    points = points if points.dtype == torch.float64 else points.float()
    limit = torch.finfo(points.dtype).max ** 0.5 / 2**10
    if points.numel() and not bool(points.detach().abs().max() < limit):
        raise ValueError(f"points must be finite and below {limit:.0e} in every coordinate")
    return points


def edge_lengths(points: Float[Tensor, "n c"], pairs: Int[Tensor, "*m 2"]) -> Float[Tensor, "*m"]:
    """Euclidean length of the edge between the points of each pair, with gradient.

    The gradient of a length is the unit vector between its ends, and 0 for a length of 0.

    Args:
        points: the cloud, float16 to float64.
        pairs: row numbers, any leading shape.

    Returns:
        Lengths in float32, or float64 for float64 points.
    """
    points = points if points.dtype == torch.float64 else points.float()
    # index_select: its gradient is an index_add, much cheaper than that of plain indexing.
    first = points.index_select(0, pairs[..., 0].reshape(-1))
    second = points.index_select(0, pairs[..., 1].reshape(-1))
    return torch.linalg.vector_norm(first - second, dim=1).view(pairs.shape[:-1])


def _squared_distances(points: Tensor) -> Tensor:
    """All squared distances, (n, n), good to 1e-4 of each value, equal points exactly 0 apart.

    Not exactly symmetric; the diagonal is infinite.
    """
    n, channels = points.shape
    if points.is_cuda or n * n * channels <= _DIRECT or channels <= 8:
        # On CUDA always: products there may run in TF32, which is off by 1e-3.
        exact = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        return exact.square_().fill_diagonal_(float("inf"))
    # Centred first, because the error of a product grows with the norms.
    centred = points - points.mean(dim=0)
    norms = centred.square().sum(dim=1)
    with torch.autocast(points.device.type, enabled=False):
        squares = torch.addmm(norms, centred, centred.T, alpha=-2).add_(norms[:, None])
    squares.fill_diagonal_(float("inf"))
    short = squares < _SHORT * norms[:, None]
    if bool(short.any()):
        rows, columns = short.nonzero().unbind(1)
        step = max(1, _CHUNK // channels)
        for i, j in zip(rows.split(step), columns.split(step)):
            squares[i, j] = (points[i] - points[j]).square_().sum(dim=1)
    return squares


def _prim(squares: np.ndarray) -> np.ndarray:
    """Edges (n - 1, 2) of a minimum spanning tree, a row of the (n, n) matrix per step.

    Zero is a length like any other. Where entries (i, j) and (j, i) differ, the row of the point
    that joined the tree first counts.
    """
    n = len(squares)
    edges = np.empty((n - 1, 2), dtype=np.int64)
    reach = squares[0].copy()
    reach[0] = np.inf
    parent = np.zeros(n, dtype=np.int64)
    taken = np.zeros(n, dtype=squares.dtype)
    taken[0] = np.inf
    row, closer = np.empty_like(reach), np.empty(n, dtype=bool)
    for step in range(n - 1):
        point = int(reach.argmin())
        edges[step] = parent[point], point
        taken[point] = reach[point] = np.inf
        # Adding infinity to what is in the tree is cheaper than three operations under a mask.
        np.add(squares[point], taken, out=row)
        np.less(row, reach, out=closer)
        np.minimum(row, reach, out=reach)
        parent[closer] = point
    return edges


def _boruvka(squares: Tensor) -> Tensor:
    """Edges (n - 1, 2) of a minimum spanning tree in about log2(n) rounds, on any device.

    Every round joins each tree of the forest to its nearest other one. Edges are ordered by length
    and then by (smaller row, larger row), so that equal lengths cannot close a circle.
    """
    n, device = len(squares), squares.device
    # A round that saw (i, j) and (j, i) differ could close one as well.
    squares = torch.minimum(squares, squares.T)
    rows = torch.arange(n, device=device)
    tree = rows.clone()
    none = n * n
    chosen: list[Tensor] = []
    found = 0
    while found < n - 1:
        squares.masked_fill_(tree[:, None] == tree, float("inf"))
        nearest = squares.amin(dim=1)
        # The lowest column among equals, which argmin does not promise. It has the lowest number too.
        column = torch.where(squares == nearest[:, None], rows.int(), n).amin(dim=1).long()
        number = torch.minimum(rows, column) * n + torch.maximum(rows, column)
        least = torch.full_like(nearest, float("inf"))
        least.scatter_reduce_(0, tree, nearest, "amin")
        number = torch.where(nearest == least[tree], number, none)
        edge = torch.full_like(rows, none).scatter_reduce_(0, tree, number, "amin")
        # Only the roots of trees have an edge. Each tree hangs itself below the one at its far end.
        root = edge < none
        ends = tree[torch.stack((edge // n, edge % n)).clamp_(max=n - 1)]
        above = torch.where(root, torch.where(ends[0] == rows, ends[1], ends[0]), rows)
        # Two trees that chose the same edge hang below each other: the lower number stays on top.
        top = (above[above] == rows) & (rows < above)
        chosen.append(edge[root & ~top])
        found += len(chosen[-1])
        above = torch.where(top, rows, above)
        for _ in range(n.bit_length()):
            above = above[above]
        tree = above[tree]
    edges = torch.cat(chosen) if chosen else rows[:0]
    return torch.stack((edges // n, edges % n), dim=1)


@torch.no_grad()
def h0_pairs(points: Float[Tensor, "n c"]) -> Int64[Tensor, "m 2"]:
    """Edges of a minimum spanning tree of the cloud: the pairs of points whose distances are the H0 deaths.

    Exact up to rounding in the choice of edges: in float32 two edges whose lengths agree to 1e-4 may
    stand for each other on the CPU. Equal points are joined by edges of length 0. Takes n * n numbers
    of memory and O(n * n) time: Prim's algorithm on the CPU, Boruvka's on other devices.

    Args:
        points: the cloud, float16 to float64, in the unit that the deaths are wanted in.

    Returns:
        Row numbers (n - 1, 2), in no particular order; (0, 2) for a cloud of no or one point.

    Raises:
        ValueError: coordinates that are not finite, or whose squares are not.

    Prim, 1957; Boruvka, 1926.
    """
    points = _exact(points)
    if len(points) < 2:
        return torch.empty((0, 2), dtype=torch.int64, device=points.device)
    squares = _squared_distances(points)
    if points.device.type == "cpu":
        return torch.from_numpy(_prim(squares.numpy()))
    return _boruvka(squares)


def h0_deaths(points: Float[Tensor, "n c"]) -> Float[Tensor, " m"]:
    """Deaths of the H0 bars in ascending order, (n - 1,), with gradient.

    The lengths of the edges of `h0_pairs`; all births are 0, and the bar that never dies is left out.

    Raises:
        ValueError: as `h0_pairs`.
    """
    return edge_lengths(points, h0_pairs(points)).sort(stable=True).values


class _MeanDistance(torch.autograd.Function):
    """Mean over all pairs; the gradient needs one more matrix product instead of n * n * c numbers."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        lengths = _squared_distances(points).fill_diagonal_(0).clamp_(min=0).sqrt_()
        count = len(points) * (len(points) - 1)
        ctx.save_for_backward(points, lengths)
        return (lengths.sum(dtype=torch.float64) / count).to(points.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        points, lengths = ctx.saved_tensors
        pull = torch.where(lengths > 0, lengths, float("inf")).reciprocal_()
        centred = points - points.mean(dim=0)
        with torch.autocast(points.device.type, enabled=False):
            towards = pull @ centred
        out = centred * pull.sum(dim=1, keepdim=True) - towards
        return out * (grad * 2 / (len(points) * (len(points) - 1)))


def mean_distance(points: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Mean Euclidean distance over all pairs of different rows, with gradient; 0 below two points.

    Dividing a cloud by it makes its diagrams independent of the scale of the features. Takes n * n
    numbers of memory. Not twice differentiable.

    Raises:
        ValueError: as `h0_pairs`.
    """
    points = _exact(points)
    return _MeanDistance.apply(points) if len(points) > 1 else points.sum() * 0


# --- loops and voids ------------------------------------------------------------------------------


def _engine() -> Any:
    """GUDHI's Rips persistence, which also needs scikit-learn."""
    try:
        from gudhi.sklearn import RipsPersistence
    except ImportError as error:
        raise MissingEngineError(
            f"H1 and H2 need GUDHI and scikit-learn ({error}): pip install 'pointcept_kd[topology]'"
        ) from error
    return RipsPersistence


def has_engine() -> bool:
    """Whether `persistence_pairs` can run: GUDHI and scikit-learn are installed."""
    try:
        _engine()
    except MissingEngineError:
        return False
    return True


def _rips_bars(distances: np.ndarray, dim: int) -> np.ndarray:
    """Finite bars (m, 2) of positive length of one dimension, float64, from an (n, n) matrix.

    The values are entries of the matrix, made symmetric by the maximum and zero on its diagonal:
    the engine takes a matrix at its word, and one that is off by rounding can exhaust the memory.
    """
    distances = np.maximum(distances, distances.T).astype(np.float64)
    np.fill_diagonal(distances, 0)
    engine = _engine()(
        homology_dimensions=dim, input_type="full distance matrix", homology_coeff_field=2
    )
    bars = np.asarray(engine.fit_transform([distances])[0], dtype=np.float64).reshape(-1, 2)
    return bars[np.isfinite(bars[:, 1]) & (bars[:, 1] > bars[:, 0])]


@torch.no_grad()
def persistence_pairs(
    points: Float[Tensor, "n c"], dim: int, max_points: int = 1024
) -> Int64[Tensor, "m 2 2"]:
    """Edges whose lengths are the births and deaths of the H1 or H2 bars: [bar, birth or death, end].

    Exact, on the CPU whatever the device of the points: distances in float64, coefficients in Z/2, all
    bars of positive length. Among edges of equal length the one with the lowest rows stands for all.
    Time grows with about n ** 2.3 for H1 (on one 2026 core 0.02 s for 256 points, 0.45 s for 1024) and
    n ** 3 for H2 (0.2 s, and 1.3 s for 512).

    Args:
        points: the cloud, float16 to float64.
        dim: 1 or 2.
        max_points: larger clouds are refused; take landmarks of them.

    Returns:
        Row numbers (m, 2, 2), bars in the order of their births, then deaths.

    Raises:
        ValueError: another dimension, too many points, or coordinates as in `h0_pairs`.
        MissingEngineError: a ValueError with the command that installs GUDHI.

    The GUDHI project, RipsPersistence, a fork of Ripser.
    """
    if dim not in (1, 2):
        raise ValueError(f"dim must be 1 or 2, got {dim}; h0_pairs gives dimension 0")
    if len(points) > max_points:
        raise ValueError(
            f"{len(points)} points are more than max_points={max_points}; take landmarks of the cloud"
        )
    cloud = _exact(points).double().cpu()
    n = len(cloud)
    empty = torch.empty((0, 2, 2), dtype=torch.int64, device=points.device)
    _engine()  # before the early return, so that a missing package does not depend on the cloud
    if n < 3:
        return empty
    # Upper triangle, row by row, each distance once: symmetric by construction.
    lengths = torch.pdist(cloud).numpy()
    bars = _rips_bars(squareform(lengths), dim)
    if not len(bars):
        return empty
    order = np.argsort(lengths, kind="stable")
    where = order[np.searchsorted(lengths[order], bars).clip(max=len(order) - 1)]
    if not np.array_equal(lengths[where], bars):
        raise RuntimeError("a bar ends at a value that is no edge length; please report this cloud")
    where = where[np.lexsort((bars[:, 1], bars[:, 0]))]
    rows, columns = np.triu_indices(n, k=1)
    return torch.from_numpy(np.stack((rows[where], columns[where]), axis=-1)).to(points.device)


def persistence_diagram(
    points: Float[Tensor, "n c"], dim: int, max_points: int = 1024
) -> Float[Tensor, "m 2"]:
    """Births and deaths of the finite bars of one dimension, (m, 2), with gradient.

    Args:
        points: the cloud, float16 to float64.
        dim: 0, 1 or 2. H0 has n - 1 bars in ascending order, also of length 0; H1 and H2 come from
            `persistence_pairs`.
        max_points: limit of `persistence_pairs`; H0 has none.

    Raises:
        ValueError: as `h0_pairs` and `persistence_pairs`.
    """
    if dim == 0:
        deaths = h0_deaths(points)
        return torch.stack((torch.zeros_like(deaths), deaths), dim=1)
    return edge_lengths(points, persistence_pairs(points, dim, max_points))


# --- distances between diagrams -------------------------------------------------------------------


def _check_diagram(diagram: Tensor, name: str) -> Tensor:
    if diagram.ndim != 1 and (diagram.ndim != 2 or diagram.shape[1] != 2):
        raise ValueError(f"{name} must be (m, 2) or (m,), got {tuple(diagram.shape)}")
    if not bool(diagram.detach().isfinite().all()):
        raise ValueError(f"{name} has an infinite or undefined bar; leave out bars that never die")
    return diagram if diagram.dtype == torch.float64 else diagram.float()


def _lifetimes(diagram: Tensor) -> Tensor:
    return diagram if diagram.ndim == 1 else diagram[:, 1] - diagram[:, 0]


@torch.no_grad()
def _nearest(queries: Tensor, support: Tensor) -> Tensor:
    """Row of the nearest support of each query; a line is searched by bisection, a plane pair by pair."""
    if queries.ndim == 1:
        ordered, order = support.sort(stable=True)
        right = torch.searchsorted(ordered, queries.contiguous()).clamp_(max=len(ordered) - 1)
        left = (right - 1).clamp_(min=0)
        nearer = (queries - ordered[left]).abs() <= (ordered[right] - queries).abs()
        return order[torch.where(nearer, left, right)]
    parts = queries.split(max(1, _CHUNK // len(support)))
    return torch.cat(
        [(part[:, None] - support).square_().sum(dim=2).argmin(dim=1) for part in parts]
    )


def chamfer_diagrams(a: Float[Tensor, "*p"], b: Float[Tensor, "*q"]) -> Float[Tensor, ""]:
    """Chamfer distance of two diagrams: mean squared distance to the nearest bar, both ways, summed.

        CD(A, B) = 1/|A| sum_a min_b |a - b|^2 + 1/|B| sum_b min_a |a - b|^2

    If one diagram is empty, the mean squared distance of the other's bars to the diagonal,
    (death - birth)^2 / 2; if both are, 0. Differentiable in both.

    Args:
        a, b: births and deaths (m, 2), or deaths (m,) of bars born at 0. Both of one kind.

    Raises:
        ValueError: another shape, different kinds, or bars that are not finite.

    Fan et al., 2017, arXiv:1612.00603, equation 4, with means in place of sums; the rule for empty
    diagrams is ours.
    """
    a, b = _check_diagram(a, "a"), _check_diagram(b, "b")
    if a.ndim != b.ndim:
        raise ValueError(
            f"one diagram has births, the other not: {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if len(a) == 0 or len(b) == 0:
        lives = torch.cat((_lifetimes(a), _lifetimes(b)))
        return lives.square().sum() / (2 * max(1, len(lives)))
    towards_b = (a - b.index_select(0, _nearest(a, b))).square().sum() / len(a)
    towards_a = (b - a.index_select(0, _nearest(b, a))).square().sum() / len(b)
    return towards_b + towards_a


def wasserstein_h0(a: Float[Tensor, " p"], b: Float[Tensor, " q"]) -> Float[Tensor, ""]:
    """Squared 2-Wasserstein distance of two H0 diagrams of equal size, over the number of bars.

    All bars are born at 0, so the best matching pairs the deaths in ascending order; the diagonal
    takes no part. 0 for empty diagrams. Differentiable in both.

    Args:
        a, b: deaths, in any order.

    Raises:
        ValueError: different sizes, or deaths that are not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"H0 diagrams of different size: {len(a)} and {len(b)} deaths")
    a, b = _check_diagram(a, "a"), _check_diagram(b, "b")
    a, b = a.sort(stable=True).values, b.sort(stable=True).values
    return (a - b).square().sum() / max(1, len(a))


def persistence_entropy(diagram: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """Entropy of the lifetimes, in nats: - sum_j p_j ln p_j with p_j = l_j / sum l, l = death - birth.

    Bars of length 0 count nothing and get no gradient (the true one is infinite). 0 for a diagram
    without a bar of positive length.

    Args:
        diagram: births and deaths (m, 2), or deaths (m,) of bars born at 0.

    Raises:
        ValueError: another shape, bars that are not finite, or a death before its birth.

    Atienza, Gonzalez-Diaz & Rucco, 2019, arXiv:1701.07857.
    """
    diagram = _check_diagram(diagram, "diagram")
    lives = _lifetimes(diagram)
    values = diagram.detach().abs()
    # Lengths computed again in float32 may put a death a rounding before its birth.
    slack = 1e-5 * values.amax() if values.numel() else 0.0
    if bool((lives.detach() < -slack).any()):
        raise ValueError("diagram has a death before its birth")
    lives = lives[lives.detach() > 0]
    if not len(lives):
        return lives.sum()
    shares = lives / lives.sum()
    return -(shares * shares.log()).sum()
