"""Cells of a batched integer grid as single 64-bit keys.

A cell is an integer triple; a batched cell adds the number of its scan. Sorting, comparing and
searching such quadruples is slow in PyTorch (`torch.unique(dim=0)` sorts whole rows), so every
lookup of this package packs them into one int64 first:

    key = ((batch * ex + x - lx) * ey + y - ly) * ez + z - lz

with `l` the lowest cell and `e` the number of cells along each axis. Keys order the cells by
(batch, x, y, z), and moving by one cell adds a constant to the key. `pad` widens the box on every
side, so that a cell within `pad` steps of a fitted one still has a key of its own: without it the
step over the end of an axis would land on a cell of the next column or of the next scan.

`CellKeys` fits the cells that occur. A `Partition` has bounds of its own, as cylindrical and pillar networks do; points
are sorted by its keys once (`group_rows`), and the voxels so found merge into pillars without another sort.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
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


FRAMES = ("cylindrical", "cartesian")
SPACINGS = ("n_minus_1", "n")
# Published bounds give pi with seven digits.
_ANGLE_SLACK = 1e-4


@dataclass(frozen=True)
class Partition:
    """A bounded grid around the sensor: cylindrical (radius, azimuth, height) or Cartesian.

    The cells above each other are a pillar. Points outside are not dropped; they count in the border cells. Of the two
    spacings, `n_minus_1` has cells of (high - low) / (shape - 1), as Cylinder3D and PolarNet were published with: the
    last cell of an axis then holds hardly more than what lies at `high` or beyond, and the last azimuth column of a
    full circle is all but empty. `n` has cells of (high - low) / shape, and -pi and pi are one column of a full circle.

    low, high: bounds along the three axes of the frame, metres and radians; shape: number of cells along them.

    Raises ValueError for unknown names, for bounds or a shape that give no cells, for azimuths beyond -pi .. pi, where
    no point lies, and for a grid whose cells cannot be numbered with 63 bits.
    """

    low: Sequence[float | int]
    high: Sequence[float | int]
    shape: Sequence[int]
    frame: str = "cylindrical"
    spacing: str = "n_minus_1"

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise ValueError(f"frame {self.frame!r} is none of {', '.join(FRAMES)}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing {self.spacing!r} is none of {', '.join(SPACINGS)}")
        for name, kind in (("low", float), ("high", float), ("shape", int)):
            values = tuple(kind(v) for v in getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} needs three finite values, got {getattr(self, name)!r}")
            object.__setattr__(self, name, values)  # tuples, where a config gave lists
        fewest = 2 if self.spacing == "n_minus_1" else 1
        for low, high, count in zip(self.low, self.high, self.shape):
            if not low < high or count < fewest:
                raise ValueError(
                    f"bounds {self.low} to {self.high} in {self.shape} cells: every axis needs low < high and at "
                    f"least {fewest} cells"
                )
        if self.frame == "cylindrical" and max(-self.low[1], self.high[1]) > math.pi + _ANGLE_SLACK:
            raise ValueError(
                f"azimuths from {self.low[1]} to {self.high[1]}: points have -pi to pi, nothing lies beyond"
            )
        if math.prod(self.shape) > _LARGEST_KEY:
            raise ValueError(f"a grid of {self.shape} cells does not fit 63 bits")

    @property
    def cell_size(self) -> tuple[float, float, float]:
        """Size of a cell along the three axes, metres and radians."""
        less = 1 if self.spacing == "n_minus_1" else 0
        x, y, z = ((h - l) / (n - less) for l, h, n in zip(self.low, self.high, self.shape))
        return x, y, z

    @property
    def full_circle(self) -> bool:
        """Whether the second axis is an azimuth that goes all the way round."""
        around = self.high[1] - self.low[1]
        return self.frame == "cylindrical" and abs(around - 2 * math.pi) <= _ANGLE_SLACK

    @property
    def _closed(self) -> bool:
        return self.full_circle and self.spacing == "n"

    def to_frame(self, coord: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """(radius, azimuth in [-pi, pi], height) of x, y, z in the same dtype; Cartesian coordinates as they are."""
        if self.frame == "cartesian":
            return coord
        x, y, z = coord.unbind(1)
        return torch.stack(((x * x + y * y).sqrt(), torch.atan2(y, x), z), dim=1)

    def cells(self, framed: Float[Tensor, "n 3"]) -> Int64[Tensor, "n 3"]:
        """Cells of points given in the frame: floor((clip(p, low, high) - low) / cell_size) in float64.

        In float32, or with a product in place of the quotient, half a percent of the points of a scan change cells.
        A point at `high`, or beyond, is in the last cell along that axis; around a full circle of spacing `n`, in the
        first column. A coordinate that is not a number gives a cell outside the grid: ask before.
        """
        low, high, size = (
            torch.tensor(v, dtype=torch.float64, device=framed.device)
            for v in (self.low, self.high, self.cell_size)
        )
        # A new tensor even where the points are float64 already, and then one pass after the other in place.
        places = framed.double().clamp(low, high)
        cells = places.sub_(low).div_(size).floor_().long()
        if self.spacing == "n":
            if self._closed:
                cells[:, 1].remainder_(self.shape[1])
            cells = torch.minimum(cells, cells.new_tensor(self.shape) - 1)
        return cells

    def centres(self, cells: Int[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Centre of every cell in the frame, float64."""
        size = torch.tensor(self.cell_size, dtype=torch.float64, device=cells.device)
        return (cells.double() + 0.5).mul_(size).add_(size.new_tensor(self.low))

    def offsets(
        self, framed: Float[Tensor, "n 3"], cells: Int[Tensor, "n 3"]
    ) -> Float[Tensor, "n 3"]:
        """From the centre of its cell to every point, in the frame, float64; not clipped to the cell.

        Around a full circle of spacing `n` the short way round: a point at pi is half a cell before its centre.
        """
        away = framed - self.centres(cells)
        if self._closed:
            around = self.high[1] - self.low[1]
            away[:, 1].sub_((away[:, 1] / around).round_().mul_(around))
        return away

    def keys(self, batch: Int[Tensor, " n"], cells: Int[Tensor, "n 3"]) -> Int64[Tensor, " n"]:
        """One int64 per cell, ordered by (batch, x, y, z); `key // shape[2]` is the key of its pillar.

        Raises ValueError where the grid is so fine that the cells of all scans do not fit 63 bits.
        """
        r, p, z = self.shape
        most = _LARGEST_KEY // (r * p * z)
        # Below that no batch of any size gets there, and a look at the numbers makes a GPU wait.
        if most < 2**31 and len(batch) and int(batch.max()) >= most:
            raise ValueError(
                f"a grid of {r} x {p} x {z} cells times {int(batch.max()) + 1} scans does not fit 63 bits"
            )
        a, b, c = cells.unbind(1)
        return batch.long().mul(r).add_(a).mul_(p).add_(b).mul_(z).add_(c)

    def unpack(self, keys: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, "n 3"]]:
        """Scan and cell of every key; the inverse of `keys`."""
        r, p, z = self.shape
        keys, c = _divmod(keys, z)
        keys, b = _divmod(keys, p)
        batch, a = _divmod(keys, r)
        return batch, torch.stack((a, b, c), dim=1)


@dataclass(frozen=True)
class Groups:
    """Rows that share a key, side by side; make one with `group_rows`.

    keys: (m,) distinct keys, ascending; order: (n,) rows sorted by key, equal keys in their own order;
    counts: (m,) rows per key; inverse: (n,) place of every row's key among `keys`. All int64.
    """

    keys: Tensor
    order: Tensor
    counts: Tensor
    inverse: Tensor


def group_rows(keys: Int64[Tensor, " n"]) -> Groups:
    """Sort the rows by key once, so that every later reduction runs over neighbours."""
    ranked, order = _ranked(keys)
    unique, place, counts = torch.unique_consecutive(
        ranked, return_inverse=True, return_counts=True
    )
    inverse = torch.empty_like(order).scatter_(0, order, place)
    return Groups(unique, order, counts, inverse)


def _ranked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in ascending order and their rows, those of equal keys in ascending order."""
    bits = len(keys).bit_length()
    if keys.is_cuda or not len(keys):
        return torch.sort(keys, stable=True)
    low, high = (int(v) for v in torch.aminmax(keys))
    if low < 0 or high >= 2 ** (63 - bits):
        return torch.sort(keys, stable=True)
    # Key and row in one number: NumPy sorts plain numbers twice as fast as torch sorts pairs.
    both = torch.bitwise_left_shift(keys, bits).bitwise_or_(torch.arange(len(keys)))
    both = torch.from_numpy(np.sort(both.numpy()))
    return torch.bitwise_right_shift(both, bits), both.bitwise_and_(2**bits - 1)


def merge_groups(groups: Groups, cells: int) -> tuple[Groups, Int64[Tensor, " m"]]:
    """Groups of the same rows by `key // cells`, without sorting again, and the place of each old group among the new.

    With `cells=partition.shape[2]` voxels become pillars. Within a new group the rows keep the order of the old ones.

    Raises ValueError for `cells` below 1.
    """
    if cells < 1:
        raise ValueError(f"cells must be 1 or more, got {cells}")
    coarse = torch.div(groups.keys, cells, rounding_mode="floor")
    keys, place = torch.unique_consecutive(coarse, return_inverse=True)
    counts = torch.zeros_like(keys).index_add_(0, place, groups.counts)
    return Groups(keys, groups.order, counts, place[groups.inverse]), place


def majority_label(
    inverse: Int64[Tensor, " n"], labels: Int64[Tensor, " n"], size: int, classes: int
) -> Int64[Tensor, " m"]:
    """The label that most rows of each of `size` groups have; of equally frequent ones the smallest.

    A group without rows gets 0.

    Args:
        inverse: group of every row.
        labels: 0 .. classes - 1.

    Raises:
        ValueError: for a label or a group outside its range.
    """
    for name, values, count in (("labels", labels, classes), ("groups", inverse, size)):
        if len(values):
            low, high = (int(v) for v in torch.stack(torch.aminmax(values)).tolist())
            if low < 0 or high >= count:
                raise ValueError(f"{name} must lie in 0 .. {count - 1}, found {low} .. {high}")
    votes = torch.bincount(inverse * classes + labels, minlength=size * classes)
    # The first of equal maxima is the smallest label.
    return votes.view(size, classes).argmax(1)
