"""Windows of a point cloud for attention: which tokens share one, where they lie in it, and in what groups to run them.

A window is a box of a regular grid over three coordinates u of every token, metric (cubic windows) or spherical
(Spherical Transformer, arXiv:2303.12766):

    theta = (atan2(y, x) + pi) 180 / pi      degrees, (0, 360]
    beta  = atan2(sqrt(x^2 + y^2), z) 180 / pi      degrees, [0, 180]
    r     = |(x, y, z)|                      metres

    index = floor((u - o) / W),  cell = clamp(floor((u - o - index W) / cell size), 0, 23)   per axis

Tokens of one sample with equal indices share a window. The origin o is the least u of the sample, or 0; never that of
the batch, so a sample is divided alike whatever it is batched with. The cell, one of 24 along an axis, is derived from
the index of the window and so cannot disagree with it. All of it is computed in float64.

As published, theta is not periodic: the negative x axis is a seam where two tokens side by side are in different
windows, and a token exactly on it (theta = 360) is in a window of its own kind. `wrap=True` takes theta modulo 360,
which puts that token where theta = 0 is; the windows on either side of the seam stay apart.

One sort of packed 64-bit keys brings the tokens of a window side by side. `Windows.chunks` pads windows of similar size
to a common length: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... places, powers of two and one between each two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .grid import CellKeys, _ranked

# Cells along each axis of a window.
QUANTA = 24
ORIGINS = ("min", "zero")
# Bins of a distance from 0 on.
_BINS = 24
# Pairs of tokens that one chunk has at most: what it needs stays in the cache of a CPU.
PAIRS = 2**16


@dataclass(frozen=True)
class Chunk:
    """Windows of at most `length` tokens each that are handled at a time.

    rows: int64 (w, length), the tokens of every window; behind its end its last token is repeated.
    valid: bool (w, length), which places are real; None if all are.
    kept: int64 (m,), the real places, counted row by row; None if all are.
    tokens: int64 (m,), what is in them.
    """

    rows: Tensor
    valid: Tensor | None
    kept: Tensor | None
    tokens: Tensor

    @property
    def length(self) -> int:
        """Places per window."""
        return self.rows.shape[1]


@dataclass(frozen=True)
class Windows:
    """Tokens divided into windows; made by `windows`.

    order: int64 (n,), tokens sorted by (sample, window), those of one window in ascending order.
    starts: int64 (w,), place in `order` where each window begins.
    sizes: int64 (w,), tokens per window, 1 or more.
    cells: int64 (n, 3), 0 .. 23, cell of every token in its window, in the tokens' own order.
    u: float64 (n, 3), the coordinates that were divided.
    """

    order: Tensor
    starts: Tensor
    sizes: Tensor
    cells: Tensor
    u: Tensor
    _chunks: dict[int, list[Chunk]] = field(default_factory=dict, repr=False, compare=False)

    def chunks(self, pairs: int | None = None) -> list[Chunk]:
        """The windows by length 1, 2, 3, 4, 6, ..., and every length in chunks of at most `pairs` padded pairs.

        Kept for the next call. A window with more pairs than that is a chunk of its own. Every token is in exactly
        one window. By default `pairs` is 2^16 on CPU and 2^22 on CUDA.

        Raises:
            ValueError: for `pairs` below 1.
        """
        if pairs is None:
            pairs = 2**22 if self.sizes.is_cuda else PAIRS
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {pairs}")
        if pairs not in self._chunks:
            self._chunks[pairs] = self._make(pairs)
        return self._chunks[pairs]

    def _make(self, pairs: int) -> list[Chunk]:
        made: list[Chunk] = []
        sizes, least, length = self.sizes, 0, 1
        longest = int(sizes.max()) if len(sizes) else 0
        while least < longest:
            taken = ((sizes > least) & (sizes <= length)).nonzero().squeeze(1)
            place = torch.arange(length, device=sizes.device)
            step = max(1, pairs // length**2)
            for some in taken.split(step) if len(taken) else ():
                ends = sizes[some].unsqueeze(1)
                rows = self.order[self.starts[some].unsqueeze(1) + torch.minimum(place, ends - 1)]
                if length <= least + 1:
                    made.append(Chunk(rows, None, None, rows.flatten()))
                    continue
                valid = place < ends
                kept = valid.flatten().nonzero().squeeze(1)
                made.append(Chunk(rows, valid, kept, rows.flatten().index_select(0, kept)))
            # From 2^k by half of it, from there by as much again.
            low = length & -length
            least, length = length, length + (low if low < length else max(1, low // 2))
        return made


def spherical(xyz: Float[Tensor, "n 3"], wrap: bool = False) -> Float[Tensor, "n 3"]:
    """theta, beta in degrees and r in the unit of xyz, float64; theta in (0, 360], with `wrap` in [0, 360).

    (0, 0, 0) has theta 180, beta 0, r 0.
    """
    x, y, z = xyz.double().unbind(1)
    flat = x * x + y * y
    # At y = -0.0 on the negative x axis atan2 gives -pi; published is the other side of the seam.
    theta = (torch.atan2(y + 0.0, x) + math.pi) * (180 / math.pi)
    beta = torch.atan2(flat.sqrt(), z) * (180 / math.pi)
    if wrap:
        theta = theta.remainder(360.0)
    return torch.stack((theta, beta, (flat + z * z).sqrt()), dim=1)


def windows(
    u: Tensor,
    batch: Tensor,
    window: Sequence[float | int],
    origin: str = "min",
    cell: Sequence[float | int] | None = None,
) -> Windows:
    """Divide the tokens of every sample into windows.

    Args:
        u: (n, 3) coordinates, metric or `spherical`.
        batch: (n,) integers, sample of every token, 0 or more, in any order.
        window: size along the three axes, in the units of u.
        origin: "min", from the least coordinates of the sample, as published for a batch of one; "zero".
        cell: size of a cell; by default `window` / 24.

    Raises:
        ValueError: for sizes that are not three finite positive numbers, another origin, coordinates that are not
            finite or of another shape, and more windows than 63 bits number.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin {origin!r} is none of {', '.join(ORIGINS)}")
    wide = _sizes(window, "window")
    fine = tuple(w / QUANTA for w in wide) if cell is None else _sizes(cell, "cell")
    if u.dim() != 2 or u.shape[1] != 3 or batch.shape != u.shape[:1]:
        raise ValueError(
            f"coordinates {tuple(u.shape)} and batch {tuple(batch.shape)}: expected (n, 3) and (n,)"
        )
    u = u.detach().double()
    if not len(u):
        none = batch.new_zeros(0, dtype=torch.int64)
        return Windows(none, none, none, none.view(0, 3), u)
    # Cheaper than a look at each: a sum with anything that is not finite is not finite either.
    if not math.isfinite(float(u.sum())):
        raise ValueError("coordinates must be finite; some are not")
    batch = batch.long()
    away = u
    if origin == "min":
        away = u - _lowest(u, batch)
    size = away.new_tensor(wide)
    index = (away / size).floor_()
    rest = away - index * size
    cells = rest.div_(away.new_tensor(fine)).floor_().clamp_(0, QUANTA - 1).long()
    return Windows(*side_by_side(batch, index.long()), cells, u)


def side_by_side(batch: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n,) sorted by sample and window (n, 3), where each of the m windows begins, and its rows; all int64.

    One sort of packed keys. Rows of one window stay in ascending order.

    Raises:
        ValueError: for negative samples and more windows than 63 bits number.
    """
    keys, order = _ranked(CellKeys.fit(batch, index).pack(batch, index))
    sizes = torch.unique_consecutive(keys, return_counts=True)[1]
    return order, sizes.cumsum(0) - sizes, sizes


def _lowest(u: Tensor, batch: Tensor) -> Tensor:
    """Least coordinates of the sample that each row is in, (n, 3), or (1, 3) of a single sample."""
    first, last = (int(v) for v in torch.stack(torch.aminmax(batch)).tolist())
    if first < 0:
        raise ValueError(f"batch numbers must be 0 or more; the lowest is {first}")
    if first == last:
        return u.amin(0, keepdim=True)
    lowest = u.new_full((last + 1, 3), torch.inf)
    lowest.scatter_reduce_(0, batch.unsqueeze(1).expand(-1, 3), u, "amin")
    return lowest[batch]


def _sizes(values: Sequence[float | int], name: str) -> tuple[float, ...]:
    sizes = tuple(float(v) for v in values)
    if len(sizes) != 3 or not all(0 < v < math.inf for v in sizes):
        raise ValueError(f"{name} must be three finite numbers above 0; got {tuple(values)}")
    return sizes


def exponential_rows(d: Float[Tensor, "..."], a: float) -> Int64[Tensor, "..."]:
    """Row 0 .. 47 of a signed distance d: bins that grow with |d|, from row 24 on for d >= 0, from 23 down for d < 0.

    Bin k begins at (2^(k/2 + 1) - 2) a for even k and at (3 2^((k - 1)/2) - 2) a for odd k; distances beyond the 24th
    count in the last. So row(d) + row(-d) = 47 but for d = 0, which has row 24.

    Args:
        d: of any shape, in the unit of a.
        a: width of the first two bins; published 0.0125 m.

    Raises:
        ValueError: for an `a` that is not finite and positive.
    """
    if not 0 < a < math.inf:
        raise ValueError(f"a must be a finite number above 0, got {a}")
    # |d| / a + 2 is 2^e (1 + f) with k = 2 (e - 1) + (1 if f >= 1/2 else 0): e and the first digit of f stand at the
    # head of its 64 bits, where 2 has 1024 and 0.
    bits = (d.double().abs() / a).add_(2).view(torch.int64)
    bins = bits.bitwise_right_shift_(51).sub_(2 * 1024).clamp_(max=_BINS - 1)
    # The complement of k is -1 - k.
    return torch.where(d >= 0, bins, ~bins).add_(_BINS)
