"""Neighbours of points in batches of scans: the nearest, or those within a radius."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ._backend import backend
from ._checks import at_least_one, cloud, ends, same_device, same_scans, spans

# Distance given to a missing neighbour: what upstream returns, the root of its 1e10.
MISSING = 1e5
# Points up to this squared distance, 3 mm, are candidates of a ball query whatever its radii.
TOUCH = 1e-5


@torch.no_grad()
def knn_query(
    nsample: int,
    xyz: Tensor,
    offset: Tensor,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest `nsample` points of the same scan, nearest first.

    Args:
        nsample: neighbours per query; missing ones are padded.
        xyz: (n, 3) points to find neighbours among.
        offset: (b) end of each scan in `xyz`.
        new_xyz: (m, 3) points to find neighbours for; `xyz` if left out.
        new_offset: (b) end of each scan in `new_xyz`.

    Returns:
        int32 rows of `xyz` (m, nsample) and distances (m, nsample), float64 for float64 points and
        float32 otherwise. Where a scan has fewer points, row -1 and distance 1e5. Equal distances
        are ordered by row.

    Raises:
        ValueError: nsample < 1, offsets that decrease or do not end at the number of points, one of
            `new_xyz` and `new_offset` without the other, coordinates that are not finite, or
            tensors on several devices.
    """
    at_least_one("nsample", nsample)
    support, support_ends, query, query_ends = _clouds(xyz, offset, new_xyz, new_offset)
    search = backend(query, nsample).nearest
    near, which = search(nsample, support, support_ends, query, query_ends)
    if near.device.type == "cpu":
        # numpy: such short work does not pay for waking torch's threads.
        np.sqrt(near.numpy(), out=near.numpy())
    else:
        near.sqrt_()
    if any(end - begin < nsample for begin, end in spans(support_ends)):
        near = near.masked_fill_(which < 0, MISSING)
    return which, near


@torch.no_grad()
def ball_query(
    nsample: int,
    max_radius: float,
    min_radius: float,
    xyz: Tensor,
    offset: Tensor,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nsample` of the points of the same scan in a spherical shell, nearest first.

    Candidates have min_radius <= distance < max_radius, or are within 3.16 mm (the square root of
    1e-5). Of more than `nsample` candidates, every (count / nsample)-th is taken: number i is
    candidate floor(i * count / nsample) in order of distance.

    Arguments and result are otherwise as of `knn_query`.

    Raises:
        ValueError: as `knn_query`, and unless 0 <= min_radius < max_radius.
    """

    def spread(counts: Tensor, square: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(nsample, device=counts.device)
        places = torch.where(counts > nsample, steps * counts // nsample, steps)
        return square, places

    return _ball(nsample, max_radius, min_radius, (xyz, offset, new_xyz, new_offset), spread)


@torch.no_grad()
def random_ball_query(
    nsample: int,
    max_radius: float,
    min_radius: float,
    xyz: Tensor,
    offset: Tensor,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`nsample` random points of the same scan in a spherical shell, in random order.

    Candidates are as of `ball_query`. One permutation of each scan, from torch's generator of the
    device, serves all queries: the candidates that come first in it are taken.

    Arguments, result and errors are otherwise as of `ball_query`.
    """
    same_device(xyz=xyz, offset=offset)
    bounds = [0, *ends("offset", offset)]
    parts = [
        torch.randperm(b - a, dtype=torch.int32, device=xyz.device) + a for a, b in pairwise(bounds)
    ]
    order = torch.cat(parts).long() if parts else offset.long()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)

    def first(counts: Tensor, square: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return rank[which], torch.arange(nsample, device=counts.device)

    return _ball(nsample, max_radius, min_radius, (xyz, offset, new_xyz, new_offset), first)


def _clouds(
    xyz: Tensor, offset: Tensor, new_xyz: Tensor | None, new_offset: Tensor | None
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    if (new_xyz is None) != (new_offset is None):
        raise ValueError("give new_xyz and new_offset, or neither")
    same_device(xyz=xyz, offset=offset, new_xyz=new_xyz, new_offset=new_offset)
    support = cloud("xyz", xyz)
    support_ends = ends("offset", offset, len(support))
    if new_xyz is None or new_offset is None or (new_xyz is xyz and new_offset is offset):
        return support, support_ends, support, support_ends
    query = cloud("new_xyz", new_xyz)
    query_ends = ends("new_offset", new_offset, len(query))
    same_scans(support_ends, query_ends)
    if query.dtype != support.dtype:
        query, support = query.double(), support.double()
    return support, support_ends, query, query_ends


def _ball(
    nsample: int,
    max_radius: float,
    min_radius: float,
    clouds: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    choose: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Pick candidates: `choose` gives a key to sort them by and which places to take."""
    at_least_one("nsample", nsample)
    if not 0 <= min_radius < max_radius < float("inf"):
        raise ValueError(
            f"radii must be 0 <= min_radius < max_radius, got {min_radius} and {max_radius}"
        )
    support, support_ends, query, query_ends = _clouds(*clouds)
    # Rounded to the type of the points, so that every backend compares with the same numbers.
    limits = torch.tensor((min_radius, max_radius), dtype=query.dtype).square()
    low, high = limits.tolist()
    touch = torch.tensor(TOUCH, dtype=query.dtype).item()
    which = torch.full((len(query), nsample), -1, dtype=torch.int32, device=query.device)
    near = query.new_full((len(query), nsample), MISSING)
    search = backend(query).within
    steps = torch.arange(nsample, device=query.device)
    pairs = search(low, high, touch, support, support_ends, query, query_ends)
    for rows, asked, found, square in pairs:
        if len(found) == 0:
            continue
        counts = asked.bincount(minlength=len(rows))[:, None]
        key, places = choose(counts, square, found)
        order = _order(asked, key)
        slots = counts.cumsum(0) - counts + places
        there = steps < counts
        taken = order[slots.expand(-1, nsample)[there]]
        asking = rows[asked[taken]]
        column = steps.expand(len(rows), -1)[there]
        which[asking, column] = found[taken].int()
        near[asking, column] = square[taken].sqrt()
    return which, near


def _order(asked: Tensor, key: Tensor) -> Tensor:
    """Order of the pairs by query, then by a key that is not negative, then as they are."""
    if key.dtype == torch.float32:
        key = key.view(torch.int32)  # bits of floats that are not negative are ordered like them
    bits = (len(key) - 1).bit_length()
    if key.dtype != torch.float64 and int(asked[-1]).bit_length() + 31 + bits <= 63:
        # All three in one number: several times faster than two stable sorts.
        packed = (asked << 31 | key.long()) << bits | torch.arange(len(key), device=key.device)
        if packed.device.type == "cpu":
            # numpy's sort is vectorised, and torch's stalls where threads compete for cores.
            ordered = torch.from_numpy(np.sort(packed.numpy()))
        else:
            ordered = packed.sort().values
        return ordered & ((1 << bits) - 1)
    order = key.argsort(stable=True)
    return order[asked[order].argsort(stable=True)]
