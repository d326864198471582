"""Search and gather in one call, and the two ways to write a batch: ends of scans, or scan of each point."""

import torch
from torch import Tensor

from ._checks import at_least_one, ends, spans
from .grouping import grouping, grouping2
from .query import ball_query, knn_query


def knn_query_and_group(
    feat: Tensor,
    xyz: Tensor,
    offset: Tensor | None = None,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
    idx: Tensor | None = None,
    nsample: int | None = None,
    with_xyz: bool = False,
) -> tuple[Tensor, Tensor]:
    """`grouping` of the neighbours `idx`, or of those `knn_query` finds, and their rows.

    Returns:
        (m, nsample, c), or (m, nsample, 3 + c) with `with_xyz`, and int32 (m, nsample).

    Raises:
        ValueError: neither `idx` nor both `nsample` and `offset`; else as the two functions.
    """
    if idx is None:
        if nsample is None or offset is None:
            raise ValueError("give idx, or nsample and offset to search with")
        idx, _ = knn_query(nsample, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def ball_query_and_group(
    feat: Tensor,
    xyz: Tensor,
    offset: Tensor | None = None,
    new_xyz: Tensor | None = None,
    new_offset: Tensor | None = None,
    idx: Tensor | None = None,
    max_radio: float | None = None,
    min_radio: float = 0,
    nsample: int | None = None,
    with_xyz: bool = False,
) -> tuple[Tensor, Tensor]:
    """`grouping` of the neighbours `idx`, or of those `ball_query` finds, and their rows.

    `max_radio` and `min_radio` are the radii, under upstream's names.

    Returns:
        (m, nsample, c), or (m, nsample, 3 + c) with `with_xyz`, and int32 (m, nsample).

    Raises:
        ValueError: neither `idx` nor all of `nsample`, `offset` and `max_radio`; else as the two
            functions.
    """
    if idx is None:
        if nsample is None or offset is None or max_radio is None:
            raise ValueError("give idx, or nsample, offset and max_radio to search with")
        idx, _ = ball_query(nsample, max_radio, min_radio, xyz, offset, new_xyz, new_offset)
    return grouping(idx, feat, xyz, new_xyz, with_xyz), idx


def query_and_group(
    nsample: int,
    xyz: Tensor,
    new_xyz: Tensor | None,
    feat: Tensor,
    idx: Tensor | None,
    offset: Tensor,
    new_offset: Tensor,
    dilation: int = 0,
    with_feat: bool = True,
    with_xyz: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    """Every (dilation + 1)-th of the nearest neighbours, their relative positions and features.

    A scan with too few points for that dilation, n of them, gives neighbour
    floor(i * (n - 1) / (nsample - 1)) in place i, so that its neighbours repeat.

    Args:
        nsample: neighbours per query.
        xyz: (n, 3) positions.
        new_xyz: (m, 3) positions of the queries; `xyz` if None.
        feat: (n, c) features.
        idx: (m, nsample) neighbours, if they are known.
        offset: (b) end of each scan in `xyz`.
        new_offset: (b) end of each scan in `new_xyz`.
        dilation: neighbours left out between two that are taken.
        with_feat: False returns the rows alone.
        with_xyz: put the relative coordinates in front of the features.

    Returns:
        (m, nsample, 3 + c) or (m, nsample, c), and int32 rows (m, nsample); or the rows alone.

    Raises:
        ValueError: nsample < 1 or dilation < 0; else as `knn_query` and `grouping`.
    """
    if new_xyz is None:
        new_xyz, new_offset = xyz, offset if new_offset is None else new_offset
    if idx is None:
        idx = _dilated(nsample, xyz, new_xyz, offset, new_offset, dilation)
    if not with_feat:
        return idx
    grouped = grouping(idx, feat, xyz, new_xyz, with_xyz) if with_xyz else grouping2(feat, idx)
    return grouped, idx


def _dilated(
    nsample: int, xyz: Tensor, new_xyz: Tensor, offset: Tensor, new_offset: Tensor, dilation: int
) -> Tensor:
    at_least_one("nsample", nsample)
    if dilation < 0:
        raise ValueError(f"dilation must not be negative, got {dilation}")
    wanted = 1 + (nsample - 1) * (dilation + 1)
    near, _ = knn_query(wanted, xyz, offset, new_xyz, new_offset)
    idx = torch.empty((len(near), nsample), dtype=near.dtype, device=near.device)
    steps = torch.arange(nsample, device=near.device)
    for (first, last), (begin, end) in zip(
        spans(ends("offset", offset)), spans(ends("new_offset", new_offset))
    ):
        if last - first < wanted:
            places = steps * max(0, last - first - 1) // max(1, nsample - 1)
        else:
            places = steps * (dilation + 1)
        idx[begin:end] = near[begin:end].index_select(1, places)
    return idx


def offset2batch(offset: Tensor) -> Tensor:
    """int64 scan of each point (offset[-1]) from the ends of the scans (b).

    Raises:
        ValueError: ends that decrease, or are not whole numbers.
    """
    bounds = [0, *ends("offset", offset)]
    lengths = torch.tensor(bounds, device=offset.device).diff()
    return torch.arange(len(lengths), device=offset.device).repeat_interleave(lengths)


def batch2offset(batch: Tensor) -> Tensor:
    """int32 ends of the scans from the scan of each point, which need not be sorted.

    Scans without points after the last one are not seen.

    Raises:
        ValueError: not a vector of whole numbers of 0 or more.
    """
    if batch.dim() != 1 or batch.is_floating_point() or batch.dtype == torch.bool:
        raise ValueError(
            f"batch must be a vector of whole numbers, got {batch.dtype} {tuple(batch.shape)}"
        )
    if len(batch) and int(batch.min()) < 0:
        raise ValueError(f"batch must be 0 or more, got {int(batch.min())}")
    return batch.bincount().cumsum(0).int()
