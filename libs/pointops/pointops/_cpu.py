"""Neighbours and samples on CPU: small-gicp and fpsample where they are installed, scipy and numpy else.

Same arguments and results as in `_brute`, with two freedoms: which of several supports at exactly
the k-th distance are returned, and, in farthest point samples by fpsample, which of several
farthest points is taken.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ._checks import spans

# Queries whose pairs within a radius are held at once: few, because from 32768 numbers on torch wakes
# its threads, and these wait for each other where other work has the cores.
_QUERIES = 512
# Queries of one thread whose neighbours are held at once.
_SLICE = 8192
# Below this a cloud fits the cache in any order.
_SMALL = 8192


@cache
def _optional(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


# --- nearest neighbours ---------------------------------------------------------------------------


def nearest(
    k: int, support: Tensor, ends: list[int], query: Tensor, query_ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Squared distances (m, k) and int32 rows of the nearest k, missing ones inf and -1.

    Nearest first; equal distances are ordered by row.
    """
    near = torch.empty((len(query), k), dtype=query.dtype)
    which = torch.empty((len(query), k), dtype=torch.int32)
    for (first, last), (begin, end) in zip(spans(ends), spans(query_ends)):
        found = min(k, last - first)
        near[begin:end, found:] = float("inf")
        which[begin:end, found:] = -1
        if found == 0 or begin == end:
            continue
        _search(
            support[first:last],
            query[begin:end],
            found,
            near.numpy()[begin:end, :found],
            which.numpy()[begin:end, :found],
        )
        if first:
            which[begin:end, :found] += first
    return near, which


def _search(support: Tensor, query: Tensor, k: int, near: np.ndarray, which: np.ndarray) -> None:
    """Write squared distances and rows of the nearest k within one scan."""
    threads = torch.get_num_threads()
    same = (
        support.data_ptr() == query.data_ptr()
        and support.shape == query.shape
        and support.stride() == query.stride()
    )
    order = _spatial_order(support)
    query_order = order if same else _spatial_order(query)
    points = _sorted_doubles(support, order)
    asked = points if same else _sorted_doubles(query, query_order)
    search = _tree(points, k, threads)
    # Slices that fit the cache, and numpy, whose conversions keep no threads waiting for work.
    step = _SLICE * threads
    for begin in range(0, len(asked), step):
        part = slice(begin, begin + step)
        square, row = search(asked[part])
        square = square.astype(near.dtype)
        row = (row if order is None else order.take(row)).astype(np.int32)
        _order_ties(square, row)
        rows = part if query_order is None else query_order[part]
        near[rows] = square
        which[rows] = row


def _tree(
    points: np.ndarray, k: int, threads: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Function from queries to squared distances and rows of the nearest k."""
    gicp = _optional("small_gicp")
    if gicp is not None:
        kdtree = gicp.KdTree(points, num_threads=threads)

        def fast(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows, square = kdtree.batch_knn_search(query, k, num_threads=threads)
            return square, rows.view(np.int64)

        return fast
    tree = _plain_tree(points)

    def plain(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near, rows = tree.query(query, k=np.arange(1, k + 1), workers=threads)
        return np.square(near), rows

    return plain


def _order_ties(near: np.ndarray, which: np.ndarray) -> None:
    """Put equal distances in order of rows, in place: they are rare, so they are looked for first."""
    tied = near[:, 1:] == near[:, :-1]
    if tied.any():
        part = np.flatnonzero((tied & (which[:, 1:] < which[:, :-1])).any(axis=1))
        order = np.lexsort((which[part], near[part]), axis=-1)
        which[part] = np.take_along_axis(which[part], order, axis=1)


def _sorted_doubles(points: Tensor, order: np.ndarray | None) -> np.ndarray:
    cloud = points.numpy() if order is None else points.numpy()[order]
    return cloud.astype(np.float64)


def _spatial_order(cloud: Tensor) -> np.ndarray | None:
    """Rows in z-order if neighbours in the cloud are far apart in memory, None if they are not.

    Hashed or shuffled voxels are searched a fifth faster in order; the rings of a scanner are in
    good order already.
    """
    n = len(cloud)
    if n < _SMALL:
        return None
    points = cloud.numpy()
    sample = np.arange(0, n - 1, max(1, n // 2048))
    here = points[sample]
    step = np.median(np.abs(points[sample + 1] - here).sum(axis=1))
    chance = np.median(np.abs(np.roll(here, len(here) // 3, axis=0) - here).sum(axis=1))
    if step <= 0.25 * chance:
        return None
    axes = points.T.astype(np.float64, order="C")
    axes -= axes.min(axis=1, keepdims=True)
    code = np.zeros(n, dtype=np.int32)
    scale = 1023 / max(axes.max(), np.finfo(np.float32).tiny)
    for place, axis in enumerate(axes):
        cells = (axis * scale).astype(np.int32)
        for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):
            cells = (cells | cells << shift) & mask
        code |= cells << place
    return code.argsort()


# --- within a radius ------------------------------------------------------------------------------


def within(
    low: float,
    high: float,
    touch: float,
    support: Tensor,
    ends: list[int],
    query: Tensor,
    query_ends: list[int],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pairs with a squared distance in [low, high) or up to `touch`; yields as `_brute.within`."""
    # The tree works in float64: it proposes a little more than the float32 distances will keep.
    reach = math.sqrt(max(high, touch)) * (1 + 1e-6)
    for (first, last), (begin, end) in zip(spans(ends), spans(query_ends)):
        if first == last or begin == end:
            continue
        points, asking = support[first:last].numpy(), query[begin:end].numpy()
        tree = _plain_tree(points)
        order = _spatial_order(query[begin:end])
        order = np.arange(end - begin) if order is None else order
        for row in range(0, end - begin, _QUERIES):
            rows = order[row : row + _QUERIES]
            here = asking[rows]
            pairs = _plain_tree(here).sparse_distance_matrix(tree, reach, output_type="ndarray")
            # One key per pair, so that one sort gives queries in order and rows within them.
            asked, which = np.divmod(np.sort(pairs["i"] * len(points) + pairs["j"]), len(points))
            gap = np.square(here[asked] - points[which])
            square = gap[:, 0] + gap[:, 1] + gap[:, 2]
            inside = (square <= touch) | ((square >= low) & (square < high))
            found = (rows + begin, asked[inside], which[inside] + first, square[inside])
            yield tuple(torch.from_numpy(v) for v in found)


def _plain_tree(points: np.ndarray) -> cKDTree:
    # Unbalanced trees are built several times faster and searched as fast on scans.
    return cKDTree(points.astype(np.float64), balanced_tree=False, compact_nodes=False)


# --- farthest point sampling ----------------------------------------------------------------------


def farthest(points: Tensor, ends: list[int], new_ends: list[int]) -> Tensor:
    """int32 rows of farthest point samples, each scan starting at its first row."""
    picks = torch.empty(new_ends[-1] if new_ends else 0, dtype=torch.int32)
    fpsample = _optional("fpsample")
    for (first, last), (begin, end) in zip(spans(ends), spans(new_ends)):
        if begin == end:
            continue
        cloud = points[first:last].numpy()
        count = min(end - begin, len(cloud))
        found = None
        if fpsample is not None and len(cloud) > 1 and cloud.dtype == np.float32:
            found = _farthest_buckets(fpsample, cloud, count)
        if found is None:
            found = _farthest_loop(cloud, count)
        picks[begin : begin + count] = torch.from_numpy(found.astype(np.int32)) + first
        # All distances are zero now, and the first row is the lowest of the equals.
        picks[begin + count : end] = first
    return picks


def _farthest_buckets(fpsample: ModuleType, cloud: np.ndarray, count: int) -> np.ndarray | None:
    """The bucket search of Han et al. ("QuickFPS", 2023), or None if it did not start at row 0."""
    # Measured on scans of 1,000 to 60,000 points: a good bucket grows with the root of the cloud.
    height = max(1, round(math.log2(len(cloud)) / 2 - 1.5))
    start = _place_of_first(cloud, height)
    picks = fpsample.bucket_fps_kdline_sampling(cloud, count, height, start_idx=start)
    return picks if picks[0] == 0 else None


def _place_of_first(cloud: np.ndarray, height: int) -> int:
    """Place of row 0 among the buckets.

    fpsample counts its start in the order its tree leaves the points in, not in the order given
    (all versions to 1.0.2), so the splits around row 0 are repeated here: at the mean of the widest
    axis, exchanging misplaced points from both ends. The caller checks the result, so another
    order in another version costs time only.
    """
    axes = np.array(cloud.T, order="C")  # a copy, as points change places in it
    place, before = 0, 0
    for _ in range(height):
        n = axes.shape[1]
        if n == 1:
            break
        values = axes[(axes.max(axis=1) - axes.min(axis=1)).argmax()]
        # The mean is made of a running sum in float32 there. numpy adds up in pairs, but subtracts
        # one by one, with the same roundings, and six times faster than it accumulates.
        total = -np.subtract.reduce(values, initial=np.float32(0))
        lower = values < total / np.float32(n)
        size = int(np.count_nonzero(lower))
        misplaced = np.flatnonzero(~lower[:size])
        exchanged = np.flatnonzero(lower[size:])[::-1] + size
        if lower[place] and place >= size:
            place = int(misplaced[exchanged == place][0])
        elif not lower[place] and place < size:
            place = int(exchanged[misplaced == place][0])
        # Only the side with row 0 is looked at further. Row by row is twice as fast as all at once.
        filled, taken = (misplaced, exchanged) if place < size else (exchanged, misplaced)
        for row in axes:
            row[filled] = row.take(taken)
        # A mean rounded to the edge leaves one side empty: one point is cut off all the same.
        cut = min(max(size, 1), n - 1)
        if place < cut:
            axes = axes[:, :cut]
        else:
            axes, place, before = axes[:, cut:], place - cut, before + cut
    return before + place


def _farthest_loop(cloud: np.ndarray, count: int) -> np.ndarray:
    # Three contiguous rows and preallocated buffers: 2-5 times faster than (n, 3) arithmetic.
    x, y, z = np.ascontiguousarray(cloud.T)
    reach = np.full(len(x), np.inf, dtype=x.dtype)
    square, term = np.empty_like(x), np.empty_like(x)
    picks = np.empty(count, dtype=np.int64)
    pick = 0
    for step in range(count):
        picks[step] = pick
        np.subtract(x, x[pick], out=square)
        np.multiply(square, square, out=square)
        for axis in (y, z):
            np.subtract(axis, axis[pick], out=term)
            np.multiply(term, term, out=term)
            np.add(square, term, out=square)
        np.minimum(reach, square, out=reach)
        pick = int(reach.argmax())
    return picks
