"""Cells of a batched integer grid as single 64-bit keys.

A cell is an integer triple; a batched cell adds the number of its scan. Sorting, comparing and
searching such quadruples is slow in PyTorch (`torch.unique(dim=0)` sorts whole rows), so every
lookup of this package packs them into one int64 first:

    key = ((batch * ex + x - lx) * ey + y - ly) * ez + z - lz

with `l` the lowest cell and `e` the number of cells along each axis. Keys order the cells by
(batch, x, y, z), and moving by one cell adds a constant to the key. `pad` widens the box on every
side, so that a cell within `pad` steps of a fitted one still has a key of its own: without it the
step over the end of an axis would land on a cell of the next column or of the next scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Int64
from torch import Tensor

_LARGEST_KEY = 2**63 - 1


@dataclass(frozen=True)
class CellKeys:
    """A fitted packing of (batch, x, y, z) into int64; make one with `CellKeys.fit`.

    lo: lowest x, y, z that has a key (`pad` below the lowest fitted cell); extent: cells along each
    axis, slack included; batches: number of scans, the fitted scans are 0 .. batches - 1.
    """

    lo: tuple[int, int, int]
    extent: tuple[int, int, int]
    batches: int

    @classmethod
    def fit(
        cls,
        batch: Int[Tensor, " n"],
        cells: Int[Tensor, "n 3"],
        pad: int | Sequence[int] = 0,
    ) -> "CellKeys":
        """Fit the box around `cells`, widened by `pad` cells (one number, or one per axis).

        Raises ValueError for a negative batch number or pad, and when the box times the number of
        scans does not fit 63 bits.
        """
        pads = (pad, pad, pad) if isinstance(pad, int) else tuple(int(p) for p in pad)
        if len(pads) != 3 or min(pads) < 0:
            raise ValueError(f"pad must be one or three numbers of cells, 0 or more; got {pad}")
        if cells.shape[0] == 0:
            return cls((0, 0, 0), (2 * pads[0] + 1, 2 * pads[1] + 1, 2 * pads[2] + 1), 1)
        low, high = cells.amin(0).tolist(), cells.amax(0).tolist()
        first, last = (int(v) for v in torch.stack(torch.aminmax(batch)).tolist())
        if first < 0:
            raise ValueError(f"batch numbers must be 0 or more; the lowest is {first}")
        x, y, z = (h - l + 1 + 2 * p for l, h, p in zip(low, high, pads))
        if (last + 1) * x * y * z > _LARGEST_KEY:
            raise ValueError(
                f"a grid of {x} x {y} x {z} cells times {last + 1} scans does not fit 63 bits; "
                "check the coordinates for outliers, or use larger cells"
            )
        lo = (low[0] - pads[0], low[1] - pads[1], low[2] - pads[2])
        return cls(lo, (x, y, z), last + 1)

    def pack(self, batch: Int[Tensor, " n"], cells: Int[Tensor, "n 3"]) -> Int64[Tensor, " n"]:
        """Keys ordered by (batch, x, y, z), unique for every cell inside the fitted box.

        Cells outside the box share keys with others and are not looked for here; ask `inside` about
        cells that were not fitted.
        """
        x, y, z = cells.unbind(1)
        key = batch.long() * self.extent[0] + (x.long() - self.lo[0])
        key = key.mul_(self.extent[1]).add_(y.long()).sub_(self.lo[1])
        return key.mul_(self.extent[2]).add_(z.long()).sub_(self.lo[2])

    def unpack(self, keys: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, "n 3"]]:
        """The batch numbers and cells of `keys`; the inverse of `pack`."""
        keys, z = _divmod(keys, self.extent[2])
        keys, y = _divmod(keys, self.extent[1])
        batch, x = _divmod(keys, self.extent[0])
        cells = torch.stack((x, y, z), dim=1)
        return batch, cells + cells.new_tensor(self.lo)

    def inside(self, batch: Int[Tensor, " n"], cells: Int[Tensor, "n 3"]) -> Tensor:
        """Bool (n,): True where the cell lies in the fitted box, so that its key is its own."""
        low = cells.new_tensor(self.lo)
        high = low + cells.new_tensor(self.extent)
        return ((cells >= low) & (cells < high)).all(1) & (batch >= 0) & (batch < self.batches)

    def step(self, dx: int, dy: int, dz: int) -> int:
        """What moving by (dx, dy, dz) cells adds to a key."""
        return (dx * self.extent[1] + dy) * self.extent[2] + dz


def _divmod(value: Tensor, by: int) -> tuple[Tensor, Tensor]:
    quotient = torch.div(value, by, rounding_mode="floor")
    return quotient, value - quotient * by


def unique_cells(
    keys: Int64[Tensor, " n"],
) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """Distinct keys in ascending order, for each row its place among them, and rows per key.

    `unique[inverse]` gives `keys` back; `counts` adds up to n.
    """
    unique, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    return unique, inverse, counts
