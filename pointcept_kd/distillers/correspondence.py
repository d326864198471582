"""Which rows of a voxel or point network belong to which cells of another network's bird's-eye map.

A map (b, c, h, w) has a place for every (scan, i, j), numbered (scan * h + i) * w + j. A level of a 3-D network has
tokens, rows with a scan and a cell. Two correspondences name the (place, token) pairs to be pooled:

    columns   the token's own i and j are the place; needs one partition for both networks
    points    the token that a point lies in, and the place that the same point lies in; grids may differ freely

On one partition the two differ where a sparse convolution made tokens that contain no point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.grid import CellKeys
from pointcept_kd.ops.scatter import segment_max, segment_mean

from .base import Outputs

MapShape = tuple[int, int, int]


class Rows(NamedTuple):
    """Where rows are: batch (n,), the scan of each; cells (n, 3), its grid cell."""

    batch: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Pairs:
    """Distinct (place, token) pairs, ascending where they came from points.

    place: (p,) int64 place on the map; token: (p,) int64 row of the level; shape: (scans, h, w) of the map.
    """

    place: Tensor
    token: Tensor
    shape: MapShape

    @property
    def size(self) -> int:
        """Places of the map."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def occupied(self) -> Bool[Tensor, "b h w"]:
        """True at the places that have a token."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.place.device)
        mask[self.place] = True
        return mask.view(self.shape)

    def to_map(self, rows: Float[Tensor, "p c"]) -> Float[Tensor, "b c h w"]:
        """One row per place as a map."""
        return rows.view(*self.shape, rows.shape[1]).permute(0, 3, 1, 2)


def places(
    batch: Int[Tensor, " n"],
    cells: Int[Tensor, "n d"],
    shape: MapShape,
    stride: Sequence[int] = (1, 1),
) -> Int64[Tensor, " n"]:
    """The place of every cell on a map of `stride` times coarser cells; -1 where the map ends before.

    Args:
        batch: scan of each row.
        cells: at least two columns, of which the first two count.
        shape: (scans, h, w) of the map.
        stride: fine cells per map cell along both axes.
    """
    scans, height, width = shape
    i = torch.div(cells[:, 0].long(), stride[0], rounding_mode="floor")
    j = torch.div(cells[:, 1].long(), stride[1], rounding_mode="floor")
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width) & (batch >= 0) & (batch < scans)
    return torch.where(inside, (batch.long() * height + i) * width + j, -1)


def point_tokens(
    point_batch: Int[Tensor, " n"],
    point_cells: Int[Tensor, "n 3"],
    batch: Int[Tensor, " m"],
    cells: Int[Tensor, "m 3"],
    stride: Sequence[int],
) -> Int64[Tensor, " n"]:
    """The row of a level that every point lies in, -1 where the level has none there.

    Args:
        point_batch, point_cells: scan and finest cell of every point.
        batch, cells: scan and cell of the level's rows; of rows with equal cells the first is found.
        stride: finest cells per cell of the level along the three axes. For pooling, and for strided convolutions
            whose kernel reaches cell // stride, as that of size 3 with padding 1, this names every point's row.
    """
    if len(cells) == 0 or len(point_cells) == 0:
        return torch.full_like(point_batch, -1, dtype=torch.int64)
    coarse = torch.div(point_cells.long(), point_cells.new_tensor(stride), rounding_mode="floor")
    keys = CellKeys.fit(batch, cells)
    ranked, order = torch.sort(keys.pack(batch, cells), stable=True)
    wanted = keys.pack(point_batch, coarse)
    at = torch.searchsorted(ranked, wanted).clamp_(max=len(ranked) - 1)
    found = (ranked[at] == wanted) & keys.inside(point_batch, coarse)
    return torch.where(found, order[at], -1)


def column_pairs(batch: Int[Tensor, " m"], cells: Int[Tensor, "m 3"], shape: MapShape) -> Pairs:
    """Every token with the place of its own column; tokens beyond the map are left out."""
    place = places(batch, cells, shape)
    token = (place >= 0).nonzero()[:, 0]
    return Pairs(place[token], token, shape)


def point_pairs(place: Int64[Tensor, " n"], token: Int64[Tensor, " n"], shape: MapShape) -> Pairs:
    """The distinct (place, token) pairs of points that have both (neither is -1)."""
    keep = (place >= 0) & (token >= 0)
    place, token = place[keep], token[keep]
    # A token with many points counts once, or a mean would weigh tokens by the density of points.
    rows = int(token.max()) + 1 if len(token) else 1
    pairs = torch.unique(place * rows + token)
    place = torch.div(pairs, rows, rounding_mode="floor")
    return Pairs(place, pairs - place * rows, shape)


def cells_of(outputs: Outputs, tap: str | None, batch: Mapping[str, Any], where: str) -> Rows:
    """Scan and finest cell of every point: of a tap at a network's partition, or the batch's own grid.

    Raises:
        InputError: when there are none.
    """
    if tap is not None:
        seen = outputs[tap]
        if seen.batch is None or seen.cells is None:
            raise InputError(
                f"{where}: tap {tap} has no cells; tap the network's partition, e.g. backbone.partition"
            )
        return Rows(seen.batch, seen.cells)
    if "grid_coord" not in batch:
        raise InputError(
            f"{where}: the batch has no grid_coord; name a tap of the network's partition"
        )
    cells = batch["grid_coord"]
    return Rows(offset2batch(batch["offset"]).to(cells.device), cells)


def check_reach(
    what: str,
    batch: Int[Tensor, " n"],
    cells: Int[Tensor, "n d"],
    shape: MapShape,
    stride: Sequence[int] = (1, 1),
) -> None:
    """Check that cells fit a map: its scans are those of the cells, and they reach at most one cell beyond it.

    One cell is what rounding a size up in one network and down in the other makes.

    Raises:
        InputError: with the numbers.
    """
    if len(cells) == 0:
        return
    scans, height, width = shape
    last, *top = torch.stack([batch.max().long(), *cells[:, :2].long().amax(0)]).tolist()
    if last >= scans:
        raise InputError(f"{what} come from {last + 1} scans, the student's map has {scans}")
    i, j = top[0] // stride[0], top[1] // stride[1]
    if i > height or j > width:
        raise InputError(
            f"{what} reach ({top[0]}, {top[1]}), at stride {tuple(stride)} cell ({i}, {j}), but the student's map is "
            f"{height} x {width}: the stride or the partition is another"
        )


def pool_pairs(
    feat: Float[Tensor, "m c"], pairs: Pairs, how: str = "max"
) -> Float[Tensor, "places c"]:
    """Maximum or mean over the tokens of every place, (places, c); 0 where there is none, negative maxima as they are.

    Written straight into the rows of the map; `Pairs.to_map` makes it one.
    """
    reduce = {"max": segment_max, "mean": segment_mean}[how]
    # The pairs of one partition name every row once, in order: nothing to gather.
    whole = len(pairs.token) == len(feat) and bool(
        (pairs.token == torch.arange(len(feat), device=feat.device)).all()
    )
    return reduce(feat if whole else feat[pairs.token], pairs.place, pairs.size)
