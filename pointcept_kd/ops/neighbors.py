"""Neighbours in space: k nearest, within a radius, farthest point sampling.

On CPU the search is scipy's k-d tree, on CUDA an exact brute force in chunks. Distances come from
coordinate differences on both, never from expanded squares, which at 80 m range are off by more
than a voxel. Nothing here is differentiable except `interpolate`, in its features.

Missing neighbours (fewer than asked for) have index -1 and distance inf and stand at the end.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor

from .farthest import farthest_rows

# Distances held at once by the brute force: 2**27 floats are half a gigabyte.
_CHUNK = 2**27


@torch.no_grad()
def knn(
    query: Float[Tensor, "m d"],
    support: Float[Tensor, "n d"],
    k: int,
    query_batch: Int[Tensor, " m"] | None = None,
    support_batch: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k nearest supports of every query, nearest first.

    Equal distances are ordered by index. Only which of several supports at exactly the k-th
    distance make it into the result is left to the search.

    Args:
        query: points to find neighbours for, in metres.
        support: points to find them among.
        k: neighbours per query; missing ones are padded.
        query_batch: scan of each query; neighbours are of the same scan. Needs `support_batch`.
        support_batch: scan of each support; neither needs to be sorted.

    Returns:
        Euclidean distances, in the type of `query`, and int64 rows of `support`.

    Raises:
        ValueError: k < 1, a scan without supports, coordinates that are not finite, or one batch
            vector without the other.
    """
    return _search(query, support, k, float("inf"), query_batch, support_batch, "k")


@torch.no_grad()
def radius(
    query: Float[Tensor, "m d"],
    support: Float[Tensor, "n d"],
    r: float,
    max_neighbors: int,
    query_batch: Int[Tensor, " m"] | None = None,
    support_batch: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The nearest `max_neighbors` supports not farther than `r`; arguments and result as `knn`.

    Raises:
        ValueError: as `knn`, and for an `r` that is not positive and finite.
    """
    if not 0 < r < float("inf"):
        raise ValueError(f"radius: r must be positive and finite, got {r}")
    return _search(query, support, max_neighbors, r, query_batch, support_batch, "max_neighbors")


def _search(
    query: Tensor,
    support: Tensor,
    k: int,
    r: float,
    query_batch: Tensor | None,
    support_batch: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"{name} must be at least 1, got {k}")
    if query.device != support.device:
        raise ValueError(f"query is on {query.device}, support on {support.device}")
    _check_finite(query, "query")
    _check_finite(support, "support")
    distances = query.new_full((len(query), k), float("inf"))
    indices = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    search = _tree if query.device.type == "cpu" else _brute
    for rows, columns in _scans(query_batch, support_batch, len(query), len(support)):
        found = min(k, len(support) if columns is None else len(columns))
        q = query if rows is None else query[rows]
        s = support if columns is None else support[columns]
        near, which = search(q, s, found, r)
        if columns is not None:
            which = torch.where(which < 0, which, columns[which.clamp(min=0)])
        if rows is None:
            distances[:, :found], indices[:, :found] = near, which
        else:
            distances[rows, :found], indices[rows, :found] = near, which
    return distances, indices


def _check_finite(points: Tensor, name: str) -> None:
    finite = torch.isfinite(points)
    if not finite.all():
        row = int((~finite.all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} is not finite in row {row}: {points[row].tolist()}")


def _scans(
    query_batch: Tensor | None, support_batch: Tensor | None, queries: int, supports: int
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Rows of each scan in query and support; None stands for all rows."""
    if (query_batch is None) != (support_batch is None):
        raise ValueError("give query_batch and support_batch, or neither")
    if queries == 0:
        return
    if query_batch is None or support_batch is None:
        if supports == 0:
            raise ValueError("support is empty; every query needs at least one point to look at")
        yield None, None
        return
    for scan in query_batch.unique().tolist():
        columns = (support_batch == scan).nonzero()[:, 0]
        if len(columns) == 0:
            raise ValueError(f"support has no point of scan {scan}, which query has")
        yield (query_batch == scan).nonzero()[:, 0], columns


def _tree(query: Tensor, support: Tensor, k: int, r: float) -> tuple[Tensor, Tensor]:
    # Unbalanced trees are built several times faster and searched as fast on scans.
    tree = cKDTree(support.detach().double().numpy(), balanced_tree=False, compact_nodes=False)
    near, which = tree.query(
        query.detach().double().numpy(),
        k=np.arange(1, k + 1),
        distance_upper_bound=np.nextafter(r, np.inf),  # the bound itself counts as too far
        workers=torch.get_num_threads(),
    )
    which = which.astype(np.int64, copy=False)
    near = near.astype(np.float64, copy=False)
    swapped = ((near[:, 1:] == near[:, :-1]) & (which[:, 1:] < which[:, :-1])).any(axis=1)
    if swapped.any():
        order = np.lexsort((which[swapped], near[swapped]), axis=-1)
        which[swapped] = np.take_along_axis(which[swapped], order, axis=1)
    which[np.isinf(near)] = -1
    return torch.from_numpy(near).to(query.dtype), torch.from_numpy(which)


def _brute(query: Tensor, support: Tensor, k: int, r: float) -> tuple[Tensor, Tensor]:
    exact = query.dtype if query.dtype == torch.float64 else torch.float32
    query, support = query.to(exact), support.to(exact)
    near, which = [], []
    for part in query.split(max(1, _CHUNK // len(support))):
        every = torch.cdist(part, support, compute_mode="donot_use_mm_for_euclid_dist")
        index = every.topk(k, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
        distance = (part[:, None] - support[index]).square().sum(dim=-1).sqrt()
        # Rows are sorted by index already, so a stable sort leaves equal distances in that order.
        distance, order = distance.sort(dim=1, stable=True)
        index = index.gather(1, order)
        beyond = distance > r
        near.append(distance.masked_fill(beyond, float("inf")))
        which.append(index.masked_fill(beyond, -1))
    return torch.cat(near), torch.cat(which)


@torch.no_grad()
def farthest_point_sampling(
    points: Float[Tensor, "n 3"],
    count: int,
    start: int = 0,
    batch: Int[Tensor, " n"] | None = None,
) -> Int[Tensor, " k"]:
    """Rows of points that are each as far as possible from those taken before.

    Exact: every step takes the point with the largest distance to the chosen set, the lowest row
    among equals, whatever the device.

    Args:
        points: coordinates in metres.
        count: points to take, from each scan if `batch` is given.
        start: the first row taken, counted within its scan.
        batch: scan of each point; scans are sampled one after the other, in ascending order.

    Returns:
        int64 rows, in the order they were taken: (count,), or (scans * count,).

    Raises:
        ValueError: for a count below 1 or above the points of a scan, a start outside it, or
            coordinates that are not finite.

    Eldar et al., 1997, "The farthest point strategy for progressive image sampling".
    """
    _check_finite(points, "points")
    scans = [0] if batch is None else batch.unique().tolist()
    taken = []
    for scan in scans:
        rows = None if batch is None else (batch == scan).nonzero()[:, 0]
        cloud = points if rows is None else points[rows]
        where = "" if batch is None else f" of scan {scan}"
        if not 1 <= count <= len(cloud):
            raise ValueError(f"count must be 1 to the {len(cloud)} points{where}, got {count}")
        if not 0 <= start < len(cloud):
            raise ValueError(f"start must be a row of the {len(cloud)} points{where}, got {start}")
        sample = _farthest_numpy if points.device.type == "cpu" else _farthest_torch
        picks = sample(cloud, count, start)
        taken.append(picks if rows is None else rows[picks])
    return torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64, device=points.device)


def _farthest_numpy(points: Tensor, count: int, start: int) -> Tensor:
    cloud = points.detach() if points.dtype == torch.float64 else points.detach().float()
    return torch.from_numpy(farthest_rows(cloud.numpy(), count, start))


def _farthest_torch(points: Tensor, count: int, start: int) -> Tensor:
    """The same steps without waiting for the device: the pick stays a tensor."""
    cloud = points if points.dtype == torch.float64 else points.float()
    cloud = cloud.T.contiguous()
    rows = torch.arange(cloud.shape[1], device=cloud.device)
    reach = torch.full_like(cloud[0], float("inf"))
    picks = torch.empty(count, dtype=torch.int64, device=cloud.device)
    pick = rows[start : start + 1]
    for step in range(count):
        picks[step : step + 1] = pick
        square = (cloud - cloud.index_select(1, pick)).square()
        reach = torch.minimum(reach, square[0] + square[1] + square[2])
        # argmax promises no order among equals; the lowest row is taken explicitly.
        pick = torch.where(reach == reach.max(), rows, cloud.shape[1]).min().view(1)
    return picks


def interpolate(
    features: Float[Tensor, "n c"],
    distances: Float[Tensor, "m k"],
    indices: Int[Tensor, "m k"],
    eps: float = 1e-8,
) -> Float[Tensor, "m c"]:
    """Features at the queries of `knn`, weighted by 1 / (distance + eps).

    Padded neighbours (index -1) weigh nothing; a query without any neighbour gets zeros.
    Differentiable in `features`.

    Qi et al., 2017, arXiv:1706.02413, equation 2, with the exponent 1.
    """
    weights = (indices >= 0).to(features.dtype) / (distances.to(features.dtype) + eps)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (features[indices.clamp(min=0)] * weights[..., None]).sum(dim=1)
