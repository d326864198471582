"""Neighbours and samples as Triton kernels, for float32 points on CUDA.

Same arguments and results as in `_brute`, which is the oracle of the tests: squared distances are
summed in the same order and without fused multiply-add, so that both give the same bits.

A distance and a row are one int64 key: the bits of a float that is not negative are ordered like
the float, so the smaller key is the nearer point, and the lower row among equals.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Neighbours that fit the registers of one program.
MOST_NEIGHBOURS = 128
# Candidates of a ball query held at once, 8 bytes each.
_CANDIDATES = 2**25


@triton.jit
def _squared(query, support, rows, live, columns, there):
    x = tl.load(query + rows * 3, mask=live, other=0.0)
    y = tl.load(query + rows * 3 + 1, mask=live, other=0.0)
    z = tl.load(query + rows * 3 + 2, mask=live, other=0.0)
    dx = x[:, None] - tl.load(support + columns * 3, mask=there, other=0.0)[None, :]
    dy = y[:, None] - tl.load(support + columns * 3 + 1, mask=there, other=0.0)[None, :]
    dz = z[:, None] - tl.load(support + columns * 3 + 2, mask=there, other=0.0)[None, :]
    return dx * dx + dy * dy + dz * dz


@triton.jit
def _nearest(
    query,
    support,
    begins,
    ends,
    keys,
    m,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    far: tl.constexpr = 9223372036854775807
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < m
    begin = tl.load(begins + rows, mask=live, other=2147483647)
    end = tl.load(ends + rows, mask=live, other=0)
    # Every slot starts with another number, so that one equality names one slot.
    slots = tl.arange(0, K).to(tl.int64)
    best = tl.zeros((ROWS, K), dtype=tl.int64) + (far - 1 - slots)[None, :]
    last = tl.max(end, axis=0)
    for start in range(tl.min(begin, axis=0), last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        square = _squared(query, support, rows, live, columns, columns < last)
        inside = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        key = (square.to(tl.int32, bitcast=True).to(tl.int64) << 32) | columns[None, :].to(tl.int64)
        key = tl.where(inside, key, far)
        # The nearest of the block takes the place of the worst slot while it is better.
        candidate = tl.min(key, axis=1)
        worst = tl.max(best, axis=1)
        while tl.max((candidate < worst).to(tl.int32), axis=0) > 0:
            better = candidate < worst
            slot = (best == worst[:, None]) & better[:, None]
            best = tl.where(slot, candidate[:, None], best)
            key = tl.where(key == candidate[:, None], far, key)
            candidate = tl.min(key, axis=1)
            worst = tl.max(best, axis=1)
    place = keys + rows.to(tl.int64)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(place, best, mask=live[:, None])


@triton.jit
def _within(
    query,
    support,
    begins,
    ends,
    counts,
    places,
    found,
    m,
    low,
    high,
    touch,
    COLLECT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < m
    begin = tl.load(begins + rows, mask=live, other=2147483647)
    end = tl.load(ends + rows, mask=live, other=0)
    last = tl.max(end, axis=0)
    taken = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(tl.min(begin, axis=0), last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        square = _squared(query, support, rows, live, columns, columns < last)
        inside = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        inside = inside & ((square <= touch) | ((square >= low) & (square < high)))
        hits = inside.to(tl.int32)
        if COLLECT:
            place = tl.load(places + rows, mask=live, other=0)
            place = (place + taken)[:, None] + tl.cumsum(hits, axis=1) - 1
            values = tl.zeros((ROWS, COLUMNS), dtype=tl.int32) + columns[None, :]
            tl.store(found + place, values, mask=inside)
        taken += tl.sum(hits, axis=1)
    if not COLLECT:
        tl.store(counts + rows, taken, mask=live)


@triton.jit
def _farthest(points, begins, ends, outs, counts, reach, picks, BLOCK: tl.constexpr):
    scan = tl.program_id(0)
    begin = tl.load(begins + scan)
    end = tl.load(ends + scan)
    out = tl.load(outs + scan)
    count = tl.load(counts + scan)
    pick = begin
    for step in range(0, count):
        tl.store(picks + out + step, pick)
        x = tl.load(points + pick * 3)
        y = tl.load(points + pick * 3 + 1)
        z = tl.load(points + pick * 3 + 2)
        best = tl.zeros((BLOCK,), dtype=tl.int64) - 1
        for start in range(begin, end, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            there = rows < end
            dx = tl.load(points + rows * 3, mask=there, other=0.0) - x
            dy = tl.load(points + rows * 3 + 1, mask=there, other=0.0) - y
            dz = tl.load(points + rows * 3 + 2, mask=there, other=0.0) - z
            near = tl.load(reach + rows, mask=there, other=0.0)
            near = tl.minimum(near, dx * dx + dy * dy + dz * dz)
            tl.store(reach + rows, near, mask=there)
            key = near.to(tl.int32, bitcast=True).to(tl.int64) << 32
            # The larger key is the farther point, and the lower row among equals.
            key = tl.where(there, key | (2147483647 - rows).to(tl.int64), -1)
            best = tl.maximum(best, key)
        top = tl.max(best, axis=0)
        pick = 2147483647 - (top & 2147483647).to(tl.int32)
        # The next step may read `reach` in threads other than those that wrote it.
        tl.debug_barrier()


def _ranges(ends: list[int], query_ends: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """First and one past the last support of every query, int32."""
    lengths = torch.tensor([0, *query_ends], device=device).diff()
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    return bounds[:-1].repeat_interleave(lengths), bounds[1:].repeat_interleave(lengths)


def nearest(
    k: int, support: Tensor, ends: list[int], query: Tensor, query_ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Squared distances (m, k) and int32 rows of the nearest k <= 128, missing ones inf and -1."""
    m, width = len(query), max(16, triton.next_power_of_2(k))
    keys = torch.empty((m, width), dtype=torch.int64, device=query.device)
    if m:
        begins, stops = _ranges(ends, query_ends, query.device)
        _nearest[(triton.cdiv(m, 16),)](
            query.contiguous(),
            support.contiguous(),
            begins,
            stops,
            keys,
            m,
            K=width,
            ROWS=16,
            COLUMNS=128,
            num_warps=4,
            enable_fp_fusion=False,
        )
    keys = keys.sort(dim=1).values[:, :k]
    bits = (keys >> 32).int()
    missing = bits >= 0x7F800000  # the bits of inf; empty slots have larger ones
    near = bits.view(torch.float32).masked_fill(missing, float("inf"))
    return near, (keys & 0x7FFFFFFF).int().masked_fill(missing, -1)


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
    m = len(query)
    if m == 0:
        return
    begins, stops = _ranges(ends, query_ends, query.device)
    query, support = query.contiguous(), support.contiguous()

    def launch(part: slice, counts: Tensor, places: Tensor, found: Tensor, collect: bool) -> None:
        size = part.stop - part.start
        _within[(triton.cdiv(size, 16),)](
            query[part],
            support,
            begins[part],
            stops[part],
            counts,
            places,
            found,
            size,
            low,
            high,
            touch,
            COLLECT=collect,
            ROWS=16,
            COLUMNS=128,
            num_warps=4,
            enable_fp_fusion=False,
        )

    counts = torch.zeros(m, dtype=torch.int32, device=query.device)
    launch(slice(0, m), counts, counts, counts, False)
    totals = counts.cumsum(0).tolist()
    begin = before = 0
    for row in range(m):
        if row + 1 < m and totals[row + 1] - before <= _CANDIDATES:
            continue
        part = slice(begin, row + 1)
        places = counts[part].long().cumsum(0) - counts[part]
        found = torch.empty(totals[row] - before, dtype=torch.int32, device=query.device)
        launch(part, counts, places, found, True)
        rows = torch.arange(begin, row + 1, device=query.device)
        asked = (rows - begin).repeat_interleave(counts[part].long())
        found = found.long()
        gap = (query[part].index_select(0, asked) - support.index_select(0, found)).square_()
        yield rows, asked, found, gap[:, 0] + gap[:, 1] + gap[:, 2]
        begin, before = row + 1, totals[row]


def farthest(points: Tensor, ends: list[int], new_ends: list[int]) -> Tensor:
    """int32 rows of farthest point samples; the lowest row among equals. One program per scan."""
    picks = torch.empty(new_ends[-1] if new_ends else 0, dtype=torch.int32, device=points.device)
    if len(picks) == 0:
        return picks
    bounds = torch.tensor([[0, *ends], [0, *new_ends]], dtype=torch.int32, device=points.device)
    counts = bounds[1].diff().contiguous()
    reach = torch.full((len(points),), float("inf"), device=points.device)
    longest = max(end - begin for begin, end in zip([0, *ends], ends))
    block = min(4096, max(256, triton.next_power_of_2(longest)))
    _farthest[(len(ends),)](
        points.contiguous(),
        bounds[0, :-1].contiguous(),
        bounds[0, 1:].contiguous(),
        bounds[1, :-1].contiguous(),
        counts,
        reach,
        picks,
        BLOCK=block,
        num_warps=16,
        enable_fp_fusion=False,
    )
    return picks
