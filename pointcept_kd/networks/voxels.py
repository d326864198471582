"""What the cylindrical and the pillar networks share: points to cells, the point encoder, labels and scores of cells.

Such a network takes raw points, cuts them into cells by a partition of its own (range, shape and spacing belong to the
weights, not to the data), scores occupied cells, and is trained on the label that most points of a cell have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.grid import Groups, Partition, group_rows, majority_label
from pointcept_kd.ops.scatter import sorted_segment_max
from pointcept_kd.ops.sparse import SparseConvTensor

from .layers import BatchNorm, Linear, check_features

GEOMETRY = 8  # columns that the partition adds in place of the coordinates
_BLOCK = 2048  # points encoded at a time in evaluation on a CPU


def build_partition(cfg: Mapping[str, Any] | Partition) -> Partition:
    """A `Partition` from its config, `dict(low=..., high=..., shape=..., frame=..., spacing=...)`.

    Raises:
        InputError: for a config that gives none.
    """
    if isinstance(cfg, Partition):
        return cfg
    try:
        return Partition(**cfg)
    except (TypeError, ValueError) as error:
        raise InputError(f"partition={dict(cfg)!r}: {error}") from error


class PointCells(nn.Module):
    """Every point with its cell and what it looks like from there; without parameters.

    Takes a batch dict with `coord` (n, 3), `feat` (n, in_channels) whose first three columns are the coordinates, and
    `offset`. Returns a `SparseConvTensor` with one row per *point*, in input order, so that a tap at this module gives
    every point its scan and cell. Features (n, 8 + in_channels - 3): offset from the cell's centre, position in the
    frame (both three), position in the other frame's plane (x, y for a cylindrical grid, radius and azimuth for a
    Cartesian one), then the columns of `feat` after the coordinates. Positions are not clipped to the grid.

    Args:
        partition: the grid.
        in_channels: width of `feat`.

    Raises:
        InputError: for `feat` of another width, or coordinates that are not finite.
    """

    def __init__(self, partition: Partition, in_channels: int) -> None:
        super().__init__()
        if in_channels < 3:
            raise InputError(
                f"in_channels={in_channels}: `feat` begins with the coordinates, so at least 3"
            )
        self.partition = partition
        self.in_channels = in_channels
        self.out_channels = GEOMETRY + in_channels - 3

    def forward(self, batch: Mapping[str, Any]) -> SparseConvTensor:
        """One row per point."""
        check_features(batch, self.in_channels)
        coord = batch["coord"]
        # Half precision would move points by more than a cell.
        coord = coord if coord.dtype == torch.float64 else coord.float()
        if not bool(coord.isfinite().all()):
            row = int((~coord.isfinite()).any(1).nonzero()[0])
            raise InputError(f"coord has values that are not finite, first in row {row}")
        framed = self.partition.to_frame(coord)
        cells = self.partition.cells(framed)
        away = self.partition.offsets(framed, cells)
        if self.partition.frame == "cylindrical":
            other = coord[:, :2]
        else:
            other = torch.stack(
                (coord[:, :2].norm(dim=1), torch.atan2(coord[:, 1], coord[:, 0])), 1
            )
        extra = batch["feat"][:, 3:].to(coord.dtype)
        features = torch.cat((away.to(coord.dtype), framed, other, extra), dim=1).float()
        scan = offset2batch(batch["offset"])
        indices = torch.cat((scan[:, None], cells), dim=1)
        return SparseConvTensor(features, indices, self.partition.shape, len(batch["offset"]))


def point_layers(
    in_channels: int, widths: Sequence[int], out_channels: int, compressed: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """The layers of the point encoder, with the state-dict keys `PPmodel.{0..10}` and `fea_compression.0`.

    Batch normalisation of the input, three times linear, batch normalisation and ReLU, a linear layer; then, after the
    maximum over a cell's points, linear and ReLU.
    """
    layers: list[nn.Module] = [BatchNorm(in_channels)]
    for before, after in zip((in_channels, *widths), widths):
        layers += [Linear(before, after), BatchNorm(after), nn.ReLU()]
    layers.append(Linear(widths[-1], out_channels))
    return nn.Sequential(*layers), nn.Sequential(Linear(out_channels, compressed), nn.ReLU())


def encode_points(
    layers: nn.Module, compression: nn.Module, features: Tensor, groups: Groups, cap: int = 0
) -> Tensor:
    """Features (m, compressed) of the m groups of points: layers, maximum per group, compression.

    Args:
        layers, compression: of `point_layers`.
        features: (n, c), in input order.
        groups: points by cell or by pillar.
        cap: at most this many points per group, drawn at random; 0 for all.
    """
    order, counts = groups.order, groups.counts
    if cap and bool((counts > cap).any()):
        # A random order within each group; then the first `cap` of each.
        mixed = torch.randperm(len(order), device=order.device)
        place = torch.sort(groups.inverse[mixed], stable=True).indices
        order = mixed[place]
        begin = (counts.cumsum(0) - counts).repeat_interleave(counts)
        order = order[torch.arange(len(order), device=order.device) - begin < cap]
        counts = counts.clamp(max=cap)
    # Sorted before the layers: a row has few columns there.
    features = features[order]
    if torch.is_grad_enabled() or layers.training or features.is_cuda or not len(features):
        return compression(sorted_segment_max(layers(features), counts))
    # Block by block what lies between the layers stays in the cache, and the widest map never exists.
    highest = None
    for rows, place in zip(features.split(_BLOCK), groups.inverse[order].split(_BLOCK)):
        first = int(place[0])
        part = sorted_segment_max(layers(rows), torch.bincount(place - first))
        if highest is None:
            highest = part.new_full((len(counts), part.shape[1]), -torch.inf)
        span = highest[first : first + len(part)]
        torch.maximum(span, part, out=span)
    return compression(highest)


class VoxelScores(NamedTuple):
    """Class scores of the occupied cells of a batch.

    logits: (m, k) with graph; indices: (m, 4) int64, rows (scan, cell), ascending; inverse: (n,) int64, the row of
    every point.
    """

    logits: Tensor
    indices: Tensor
    inverse: Tensor


class PointScores(nn.Module):
    """Scores of every point, those of its cell; a module, so that a tap can name it.

    Args:
        void_class: leave out the first class, "unlabelled", which nothing is ever to be.
    """

    def __init__(self, void_class: bool) -> None:
        super().__init__()
        self.void_class = void_class

    def forward(self, scores: VoxelScores) -> Tensor:
        """(n, k) or, without the void class, (n, k - 1)."""
        logits = scores.logits[:, 1:] if self.void_class else scores.logits
        return logits[scores.inverse]


@kd.MODELS.register_module()
class VoxelSegmentor(nn.Module):
    """A backbone that scores cells (`kd.Cylinder3D`, `kd.PolarNet`), trained on the majority label of every cell.

    In training it returns `dict(loss)`, in evaluation `dict(loss, seg_logits)` where the batch has labels of its points
    and `dict(seg_logits)` where it has none. Scores of a point are those of its cell: no neighbours, no refinement.

    Args:
        backbone: its config, or the module; called with the batch it returns `VoxelScores`.
        criteria: list of loss configs, applied to (m, k) scores and the labels of the m cells.
        void_class: the backbone has a class 0 "unlabelled" before the data set's classes, as released weights do. Cells
            without a label then are class 0, the criteria take `ignore_index=0`, and the class is left out of the
            scores of points. Without it cells without a label are -1.
        vote_labelled: points without a label have no vote where a cell has others; by default their label counts as any
            other, and wins ties.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nn.Module,
        criteria: Sequence[Mapping[str, Any]] | None = None,
        void_class: bool = True,
        vote_labelled: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        self.seg_head = PointScores(void_class)
        # Not `criteria`: those are taken to be of points.
        self.voxel_criteria = build_criteria(criteria)
        self.void_class = void_class
        self.vote_labelled = vote_labelled

    def labels(self, scores: VoxelScores, segment: Tensor) -> Tensor:
        """Majority label (m,) of every cell from the labels of the points, see `void_class`."""
        size, classes = len(scores.logits), scores.logits.shape[1]
        shifted = segment.long().clamp(min=-1) + 1  # 0 is "no label"
        number = classes if self.void_class else classes + 1
        if self.vote_labelled:
            keep = shifted > 0
            labels = majority_label(scores.inverse[keep], shifted[keep], size, number)
        else:
            labels = majority_label(scores.inverse, shifted, size, number)
        return labels if self.void_class else labels - 1

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss and scores of a batch dict."""
        scores: VoxelScores = self.backbone(batch)
        of_points = self.seg_head(scores)
        out = {} if self.training else {"seg_logits": of_points}
        segment = batch.get("segment")
        points = len(scores.inverse)
        if self.training and segment is None:
            raise InputError("training needs `segment` in the batch; add it to the keys of Collect")
        if segment is not None:
            if len(segment) != points:
                raise InputError(f"the batch has {len(segment)} labels for {points} points")
            out["loss"] = self.voxel_criteria(scores.logits, self.labels(scores, segment))
        return out


def voxel_groups(points: SparseConvTensor, partition: Partition) -> tuple[Groups, Tensor]:
    """Points by voxel, and the (m, 4) indices (scan, cell) of the voxels in ascending order."""
    keys = partition.keys(points.indices[:, 0], points.indices[:, 1:])
    groups = group_rows(keys)
    batch, cells = partition.unpack(groups.keys)
    return groups, torch.cat((batch[:, None], cells), dim=1)
