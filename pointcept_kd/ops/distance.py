"""Nearest neighbours between two clouds, and the Chamfer distance with its gradient.

    CD(p, g)  = 1/2 ( mean_i min_j |p_i - g_j| + mean_j min_i |g_j - p_i| )          metres
    CD2(p, g) = mean_i min_j |p_i - g_j|^2 + mean_j min_i |g_j - p_i|^2              square metres

Which pair is nearest is found without gradient, on CPU by a k-d tree and elsewhere by an exact search in blocks, both
in float64; the distances of the chosen pairs are computed anew from their coordinate differences. So a gradient reaches
both clouds through the pairs alone, and values at 50 m range are as exact in float32 as the coordinates are. (Expanded
squares, |p|^2 + |g|^2 - 2 p.g, are off by millimetres there.)

Clouds of several scans are joined along their rows; `offset` holds the end row of each. A scan is compared with the
scan of the same number only.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from scipy.spatial import cKDTree
from torch import Tensor

# Distances held at once by the search in blocks: 2**25 doubles are a quarter of a gigabyte.
_BLOCK = 2**25


def nearest(
    query: Float[Tensor, "m d"],
    support: Float[Tensor, "n d"],
    query_offset: Int[Tensor, " b"] | None = None,
    support_offset: Int[Tensor, " e"] | None = None,
) -> tuple[Float[Tensor, " m"], Int64[Tensor, " m"]]:
    """The nearest support of every query; the lowest row among equally near ones.

    Args:
        query: points to find neighbours for, in metres.
        support: points to find them among.
        query_offset: end rows of the scans of `query`; None means one scan. Needs `support_offset`.
        support_offset: end rows of the scans of `support`.

    Returns:
        Euclidean distances, differentiable in both clouds (with gradient 0 where they are 0), and int64 rows of
        `support`.

    Raises:
        ValueError: for coordinates that are not finite, a scan with queries and no supports, offsets that do not fit,
            or clouds on different devices.
    """
    index = nearest_rows(query, support, query_offset, support_offset)
    return pair_distance(query, support[index]), index


@torch.no_grad()
def nearest_rows(
    query: Float[Tensor, "m d"],
    support: Float[Tensor, "n d"],
    query_offset: Int[Tensor, " b"] | None = None,
    support_offset: Int[Tensor, " e"] | None = None,
) -> Int64[Tensor, " m"]:
    """The rows that `nearest` returns, without the distances."""
    _check(query, support)
    search = _tree if query.device.type == "cpu" else _blocks
    found = []
    for number, (q, s) in enumerate(_scans(query, support, query_offset, support_offset)):
        if q.start == q.stop:
            continue
        if s.start == s.stop:
            raise ValueError(f"scan {number} has {q.stop - q.start} queries and no supports")
        found.append(search(query[q], support[s]) + s.start)
    if not found:
        return torch.empty(0, dtype=torch.int64, device=query.device)
    return torch.cat(found)


def pair_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Euclidean distance of each row of one cloud to the same row of another; gradient 0 where it is 0."""
    square = (a - b).square().sum(1)
    apart = square > 0
    return torch.where(apart, square, 1).sqrt() * apart


def chamfer_distance(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    a_offset: Int[Tensor, " b"] | None = None,
    b_offset: Int[Tensor, " e"] | None = None,
) -> Float[Tensor, " b"]:
    """CD of each scan: half the sum of the two mean distances to the nearest point of the other cloud, in metres.

    Returns:
        (b,), one value per scan; (1,) without offsets. Differentiable in both clouds.

    Raises:
        ValueError: as `nearest`, and for a scan that is empty in either cloud.
    """
    return _chamfer(a, b, a_offset, b_offset, pair_distance) / 2


def chamfer_squared(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    a_offset: Int[Tensor, " b"] | None = None,
    b_offset: Int[Tensor, " e"] | None = None,
) -> Float[Tensor, " b"]:
    """CD2 of each scan, the training form: the sum of the two mean squared distances, in square metres.

    Returns and raises as `chamfer_distance`.
    """
    return _chamfer(a, b, a_offset, b_offset, _pair_square)


def _pair_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(1)


def _chamfer(
    a: Tensor,
    b: Tensor,
    a_offset: Tensor | None,
    b_offset: Tensor | None,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    to_b = measure(a, b[nearest_rows(a, b, a_offset, b_offset)])
    to_a = measure(b, a[nearest_rows(b, a, b_offset, a_offset)])
    values = []
    for number, (rows, others) in enumerate(_scans(a, b, a_offset, b_offset)):
        if rows.start == rows.stop or others.start == others.stop:
            raise ValueError(f"scan {number} is empty; the Chamfer distance needs two clouds")
        values.append(to_b[rows].mean() + to_a[others].mean())
    return torch.stack(values) if values else to_b.new_empty(0)


def _check(query: Tensor, support: Tensor) -> None:
    if query.device != support.device:
        raise ValueError(f"query is on {query.device}, support on {support.device}")
    for points, name in ((query, "query"), (support, "support")):
        finite = torch.isfinite(points)
        if not finite.all():
            row = int((~finite.all(dim=1)).nonzero()[0])
            raise ValueError(f"{name} is not finite in row {row}: {points[row].tolist()}")


def _scans(
    a: Tensor, b: Tensor, a_offset: Tensor | None, b_offset: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Rows of each scan in two clouds."""
    if (a_offset is None) != (b_offset is None):
        raise ValueError("give the offsets of both clouds, or of neither")
    ends_a = [len(a)] if a_offset is None else a_offset.tolist()
    ends_b = [len(b)] if b_offset is None else b_offset.tolist()
    if len(ends_a) != len(ends_b):
        raise ValueError(f"one cloud has {len(ends_a)} scans, the other {len(ends_b)}")
    for ends, cloud in ((ends_a, a), (ends_b, b)):
        starts = [0, *ends[:-1]]
        if (ends[-1] if ends else 0) != len(cloud) or any(e < s for s, e in zip(starts, ends)):
            raise ValueError(f"offset {ends} does not divide {len(cloud)} rows into scans")
    yield from (
        (slice(*rows), slice(*others))
        for rows, others in zip(
            zip([0, *ends_a[:-1]], ends_a), zip([0, *ends_b[:-1]], ends_b), strict=True
        )
    )


def _tree(query: Tensor, support: Tensor) -> Tensor:
    """Nearest rows by a k-d tree; threads divide the queries and change no result."""
    points = support.detach().double().numpy()
    wanted = query.detach().double().numpy()
    # Clouds that were repeated to a fixed size are full of equal points; the first of each stands for all.
    order = np.lexsort(points.T[::-1])
    ordered = points[order]
    fresh = np.ones(len(points), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.sort(order[fresh])  # lexsort is stable: the lowest row of each group of equal points
    tree = cKDTree(points[first], balanced_tree=False, compact_nodes=False)
    threads = torch.get_num_threads()
    count = min(2, len(first))
    near, which = tree.query(wanted, k=np.arange(1, count + 1), workers=threads)
    result = which[:, 0].astype(np.int64)
    open_rows = np.arange(len(wanted)) if count == 2 else np.empty(0, dtype=np.int64)
    while len(open_rows):
        # Rows whose farthest neighbour so far is as near as the nearest one may have further equals.
        tied = near == near[:, :1]
        result[open_rows] = np.where(tied, which, len(first)).min(axis=1)
        still = tied[:, -1]
        open_rows = open_rows[still]
        if count == len(first) or not len(open_rows):
            break
        count = min(2 * count, len(first))
        near, which = tree.query(wanted[open_rows], k=np.arange(1, count + 1), workers=threads)
    return torch.from_numpy(first[result].astype(np.int64, copy=False))


def _blocks(query: Tensor, support: Tensor) -> Tensor:
    """Nearest rows by comparing all pairs, some queries at a time; on any device."""
    supports = support.detach().double()
    rows = torch.arange(len(supports), device=supports.device)
    found = []
    for part in query.detach().double().split(max(1, _BLOCK // len(supports))):
        every = torch.cdist(part, supports, compute_mode="donot_use_mm_for_euclid_dist")
        # argmin promises no order among equals; the lowest row is taken explicitly.
        best = every.amin(dim=1, keepdim=True)
        found.append(torch.where(every == best, rows, len(supports)).amin(dim=1))
    return torch.cat(found)
