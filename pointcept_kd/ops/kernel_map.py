"""Which rows of a sparse tensor meet in which tap of a convolution kernel.

A kernel map lists, tap after tap, the pairs (input row, output row) that a convolution joins. It
depends on the occupied cells alone and is kept with them, as making one costs about as much as two
convolutions of 32 channels. `pointcept_kd.ops.sparse` states what the convolutions mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import CellKeys, unique_cells

Triple = tuple[int, int, int]


def triple(value: int | Sequence[int], name: str, least: int) -> Triple:
    """One number or three as a tuple of three ints, none below `least`."""
    values = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 3 or min(values) < least:
        raise ValueError(f"{name} must be one or three whole numbers >= {least}; got {value}")
    return values


@dataclass(frozen=True)
class KernelMap:
    """Pairs of rows that meet in each tap of a kernel.

    src, dst: int64 (p,), input and output rows, tap after tap; counts: pairs per tap, in the order
    of the weight's flattened kernel axes; n_in, n_out: rows of the two sides; centre: the tap that
    joins every row with itself and has no entry in the list, or -1.
    """

    src: Tensor
    dst: Tensor
    counts: tuple[int, ...]
    n_in: int
    n_out: int
    centre: int = -1

    def swapped(self) -> "KernelMap":
        """The same pairs with input and output exchanged."""
        return KernelMap(self.dst, self.src, self.counts, self.n_out, self.n_in, self.centre)


class Cells:
    """One set of occupied cells with everything that was derived from it."""

    def __init__(self, indices: Tensor, shape: Triple | None, batch_size: int) -> None:
        self.indices = indices
        self.shape = shape
        self.batch_size = batch_size
        self._submanifold: dict[tuple[Triple, Triple], KernelMap] = {}
        self._order: Tensor | None = None

    def _fit(self, batch: Tensor, cells: Tensor, pad: Sequence[int] = (0, 0, 0)) -> CellKeys:
        """Keys for `cells` of these scans; ValueError for a scan beyond `batch_size`."""
        grid = CellKeys.fit(batch, cells, pad)
        if len(cells) and grid.batches > self.batch_size:
            raise ValueError(
                f"indices name scan {grid.batches - 1} but batch_size is {self.batch_size}"
            )
        return grid

    def submanifold(self, kernel: Triple, dilation: Triple) -> KernelMap:
        """The map of a centred kernel over these cells, made once."""
        wanted = (kernel, dilation)
        if wanted not in self._submanifold:
            self._submanifold[wanted] = self._search(kernel, dilation)
        return self._submanifold[wanted]

    def _search(self, kernel: Triple, dilation: Triple) -> KernelMap:
        rx, ry, rz = (k // 2 for k in kernel)
        sx, sy, sz = dilation
        batch, cells = self.indices[:, 0], self.indices[:, 1:]
        grid = self._fit(batch, cells, (rx * sx, ry * sy, rz * sz))
        keys = grid.pack(batch, cells)
        if self._order is None:
            # The padding moves no cell past another, so one order serves every kernel. A stable
            # sort puts the lowest row of a duplicated cell first.
            self._order = torch.sort(keys, stable=True).indices
        order = self._order
        keys = keys[order]
        distinct, rows = keys, order
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=first[1:])
        mirrored = bool(first.all())
        if not mirrored:
            distinct, rows = keys[first], order[first]
        # A sentinel above every key makes the place behind the last cell readable.
        distinct = torch.cat((distinct, distinct.new_full((1,), 2**63 - 1)))

        taps = math.prod(kernel)
        centre = taps // 2
        nothing = keys.new_empty(0)
        src, dst = [nothing] * taps, [nothing] * taps
        for a in range(kernel[0]):
            for b in range(kernel[1]):
                # Without duplicates the pairs of tap t are those of tap taps - 1 - t, swapped: only
                # taps behind the centre are searched for.
                here = (a * kernel[1] + b) * kernel[2]
                start = max(0, centre + 1 - here) if mirrored else 0
                place = None
                for c in range(start, kernel[2]):
                    tap = here + c
                    target = keys + grid.step((a - rx) * sx, (b - ry) * sy, (c - rz) * sz)
                    if place is None or sz > 1:
                        place = torch.searchsorted(distinct, target)
                    hit = distinct[place] == target
                    found = hit.nonzero().squeeze(1)
                    if tap != centre and len(found):
                        src[tap], dst[tap] = rows[place[found]], order[found]
                        if mirrored:
                            src[taps - 1 - tap], dst[taps - 1 - tap] = dst[tap], src[tap]
                    # Cells of a column stand side by side: the next tap of the column is here or,
                    # after a hit, one further. One search serves the whole column.
                    place = place + hit
        counts = tuple(len(s) for s in src)
        n = len(keys)
        return KernelMap(torch.cat(src), torch.cat(dst), counts, n, n, centre)

    def strided(self, kernel: Triple, stride: Triple, padding: Triple) -> tuple["Cells", KernelMap]:
        """The cells of a strided convolution's output and the map that leads there."""
        shape: Triple | None = None
        if self.shape is not None:
            x, y, z = (
                (n + 2 * p - k) // s + 1 for n, p, k, s in zip(self.shape, padding, kernel, stride)
            )
            shape = (x, y, z)
            if min(shape) < 1:
                raise ValueError(
                    f"kernel {kernel} with padding {padding} does not fit into spatial_shape "
                    f"{self.shape}"
                )
        batch, cells = self.indices[:, 0].long(), self.indices[:, 1:].long()
        steps = cells.new_tensor(stride)
        taps = math.prod(kernel)
        if kernel == stride and padding == (0, 0, 0):
            out = torch.div(cells, steps, rounding_mode="floor")
            rest = cells - out * steps
            tap = (rest[:, 0] * kernel[1] + rest[:, 1]) * kernel[2] + rest[:, 2]
            tap, row = torch.sort(tap, stable=True)
            out, batch = out[row], batch[row]
            kept = None if shape is None else (out < out.new_tensor(shape)).all(1)
        else:
            # Axis by axis: (k, n) candidates each, of which only the meeting ones are combined.
            outs, fits = [], []
            for axis, (k, s, p) in enumerate(zip(kernel, stride, padding)):
                ahead = cells[:, axis] + p - torch.arange(k, device=cells.device).unsqueeze(1)
                outs.append(torch.div(ahead, s, rounding_mode="floor"))
                fits.append(outs[-1] * s == ahead)
                if shape is not None:
                    fits[-1] &= (outs[-1] >= 0) & (outs[-1] < shape[axis])
            kept = fits[0][:, None, None] & fits[1][None, :, None] & fits[2][None, None]
            tap, row = kept.flatten(0, 2).nonzero().unbind(1)
            column = torch.div(tap, kernel[2], rounding_mode="floor")
            across = torch.div(column, kernel[1], rounding_mode="floor")
            places = (across, column - across * kernel[1], tap - column * kernel[2])
            out = torch.stack([o[t, row] for o, t in zip(outs, places)], dim=1)
            batch, kept = batch[row], None
        if kept is not None and not bool(kept.all()):
            tap, row, out, batch = tap[kept], row[kept], out[kept], batch[kept]
        counts = tuple(torch.bincount(tap, minlength=taps).tolist())

        grid = self._fit(batch, out)
        unique, dst, _ = unique_cells(grid.pack(batch, out))
        batch, out = grid.unpack(unique)
        indices = torch.cat((batch.unsqueeze(1), out), dim=1).to(self.indices.dtype)
        coarse = Cells(indices, shape, self.batch_size)
        return coarse, KernelMap(row, dst, counts, len(self.indices), len(indices))
