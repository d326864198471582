"""Neighbours and samples in plain torch, for any device: also the twin the Triton kernels follow.

Squared distances are summed as (x + y) + z in the type of the points, here and in the kernels, so
that both give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks import spans

# Distances held at once: 2**26 floats are a quarter of a gigabyte, and there are a few such arrays.
_CHUNK = 2**26


def squared(query: Tensor, support: Tensor) -> Tensor:
    """Squared distances of every query (m, 3) to every support (n, 3)."""
    total = (query[:, 0, None] - support[None, :, 0]).square_()
    for axis in (1, 2):
        total += (query[:, axis, None] - support[None, :, axis]).square_()
    return total


def nearest(
    k: int, support: Tensor, ends: list[int], query: Tensor, query_ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Squared distances (m, k) and int32 rows of the nearest k, missing ones inf and -1.

    Nearest first; equal distances are ordered by row.
    """
    near = query.new_full((len(query), k), float("inf"))
    which = torch.full((len(query), k), -1, dtype=torch.int32, device=query.device)
    for (first, last), (begin, end) in zip(spans(ends), spans(query_ends)):
        found = min(k, last - first)
        if found == 0:
            continue
        step = max(1, _CHUNK // (last - first))
        for row in range(begin, end, step):
            part = slice(row, min(row + step, end))
            every = squared(query[part], support[first:last])
            columns = every.topk(found, dim=1, largest=False, sorted=False).indices
            # By row first: the stable sort by distance then leaves equal ones in that order.
            columns = columns.sort(dim=1).values
            distance, order = every.gather(1, columns).sort(dim=1, stable=True)
            near[part, :found] = distance
            which[part, :found] = (columns.gather(1, order) + first).int()
    return near, which


def within(
    low: float,
    high: float,
    touch: float,
    support: Tensor,
    ends: list[int],
    query: Tensor,
    query_ends: list[int],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pairs with a squared distance in [low, high) or up to `touch`, for parts of the queries.

    Yields the rows of the queries of a part, and for every pair the place of its query among them,
    its row of the supports and its squared distance: by query, ascending rows within each.
    """
    for (first, last), (begin, end) in zip(spans(ends), spans(query_ends)):
        step = max(1, _CHUNK // max(1, last - first))
        for row in range(begin, end, step):
            rows = torch.arange(row, min(row + step, end), device=query.device)
            every = squared(query[row : row + len(rows)], support[first:last])
            inside = (every <= touch) | ((every >= low) & (every < high))
            asked, which = inside.nonzero().unbind(1)
            yield rows, asked, which + first, every[inside]


def farthest(points: Tensor, ends: list[int], new_ends: list[int]) -> Tensor:
    """int32 rows of farthest point samples; the lowest row among equals.

    The pick stays a tensor, so nothing waits for the device.
    """
    picks = torch.empty(new_ends[-1] if new_ends else 0, dtype=torch.int64, device=points.device)
    for (first, last), (begin, end) in zip(spans(ends), spans(new_ends)):
        if begin == end:
            continue
        cloud = points[first:last].T.contiguous()
        rows = torch.arange(last - first, device=points.device)
        reach = torch.full_like(cloud[0], float("inf"))
        pick = rows[:1]
        for step in range(begin, end):
            picks[step : step + 1] = pick + first
            square = (cloud - cloud.index_select(1, pick)).square_()
            reach = torch.minimum(reach, square[0] + square[1] + square[2])
            # argmax promises no order among equals; the lowest row is taken explicitly.
            pick = torch.where(reach == reach.max(), rows, last - first).min().view(1)
    return picks.int()
