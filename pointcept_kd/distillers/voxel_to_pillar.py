"""Voxel-to-pillar distillation: a student's bird's-eye map towards the teacher's voxels, pooled over height.

    Y[b,:,i,j] = max over the teacher's tokens in the column (b, i, j), 0 where there is none
    L = mean over (b, c, i, j) of ( A(Y) - S )^2,  A = BatchNorm, 3 x 3 convolution, ReLU, BatchNorm

The adapter A is learned with the student and thrown away with the term. As it stands on the teacher's side, the loss
could also fall by both sides becoming constant; the log shows that, and `adapter_side="student"` excludes it: the
target is then fixed.

Jiang et al., 2023, "Knowledge distillation from 3D to bird's-eye-view for LiDAR semantic segmentation",
arXiv:2304.11393. Pooling by attention, the mean, and the correspondence through points are not in the paper.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.ops.scatter import segment_softmax, segment_sum

from .base import Outputs, Term
from .correspondence import (
    MapShape,
    Pairs,
    Rows,
    cells_of,
    check_reach,
    column_pairs,
    places,
    point_pairs,
    point_tokens,
    pool_pairs,
)
from .taps import full_precision

CORRESPONDENCES = ("cells", "points")
POOLS = ("max", "mean", "attention")
SIDES = ("teacher", "student")
MASKS = ("all", "occupied")


def pillar_mse(
    student: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    occupied: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of two maps over cells and channels.

    The target keeps its gradient: behind a learned adapter it has one.

    Args:
        student, target: maps of one shape.
        occupied: cells that count; None means all.

    Returns:
        The loss; 0, still connected to both maps, when no cell counts.
    """
    channels = student.shape[1]
    if occupied is not None:
        student, target = (
            student.permute(0, 2, 3, 1)[occupied],
            target.permute(0, 2, 3, 1)[occupied],
        )
    count = student.numel() // channels
    if count == 0:
        return joint_mean(student.sum() + target.sum(), 0)
    return joint_mean(F.mse_loss(student, target), count)


def map_deviation(
    values: Float[Tensor, "b c h w"], occupied: Bool[Tensor, "b h w"] | None = None
) -> Float[Tensor, ""]:
    """Standard deviation over the cells that count, mean over channels; 0 for a map that says nothing.

    Args:
        values: a map.
        occupied: cells that count; None means all.

    Returns:
        The deviation, without graph; 0 when no cell counts.
    """
    values = values.detach()
    if occupied is None:
        return values.std((0, 2, 3), correction=0).mean()
    rows = values.permute(0, 2, 3, 1)[occupied]
    return rows.std(0, correction=0).mean() if len(rows) else rows.sum()


def teacher_adapter(channels: int, to: int, kernel: int = 3) -> nn.Sequential:
    """BatchNorm, convolution, ReLU, BatchNorm from `channels` to `to`, zero-padded."""
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, to, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.BatchNorm2d(to),
    )


class AttentionPool(nn.Module):
    """Tokens of a cell weighed by how well they answer the student's feature there.

        score = <Wq s, Wk t> / sqrt(d) + h[height of t],   y = sum over the cell's tokens of softmax(score) Wv t

    The student's feature s is a constant here: a target that could follow the student would be no target. Wv begins as
    the identity and h as zeros.

    Args:
        student, teacher: widths.
        dim: d, width of queries and keys.
        bins: heights that h tells apart; a token above the last counts there.
    """

    def __init__(self, student: int, teacher: int, dim: int = 32, bins: int = 32) -> None:
        super().__init__()
        if dim < 1 or bins < 1:
            raise InputError(f"attention: dim={dim}, bins={bins}: both need to be at least 1")
        self.query = nn.Linear(student, dim, bias=False)
        self.key = nn.Linear(teacher, dim, bias=False)
        self.value = nn.Linear(teacher, teacher, bias=False)
        nn.init.eye_(self.value.weight)
        self.height = nn.Parameter(torch.zeros(bins))

    def forward(
        self,
        feat: Float[Tensor, "m c"],
        height: Int[Tensor, " m"],
        pairs: Pairs,
        student: Float[Tensor, "b k h w"],
    ) -> Float[Tensor, "places c"]:
        """One row per place of the map, 0 where there is no token.

        Args:
            feat, height: features and z-bin of every token.
            pairs: tokens of every place.
            student: the student's map.
        """
        used, inverse = torch.unique(pairs.place, return_inverse=True)
        cell = torch.div(used, pairs.shape[2], rounding_mode="floor")
        scan = torch.div(cell, pairs.shape[1], rounding_mode="floor")
        at = (scan, slice(None), cell - scan * pairs.shape[1], used - cell * pairs.shape[2])
        query = self.query(student.detach()[at])[inverse]
        score = (query * self.key(feat)[pairs.token]).sum(1) / math.sqrt(self.query.out_features)
        bins = height.long().clamp(0, len(self.height) - 1)
        score = score + self.height[bins][pairs.token]
        share = segment_softmax(score[:, None], inverse, len(used))
        pooled = segment_sum(share * self.value(feat)[pairs.token], inverse, len(used))
        return pooled.new_zeros(pairs.size, feat.shape[1]).index_copy(0, used, pooled)


def whole_numbers(what: str, value: Any, length: int) -> tuple[int, ...]:
    """`value` as so many whole numbers of at least 1, e.g. a stride or a pair of widths.

    Raises:
        InputError: for anything else.
    """
    fits = isinstance(value, Sequence) and len(value) == length
    if not fits or any(type(v) is not int or v < 1 for v in value):
        raise InputError(f"{what}={value!r}: expected {length} whole numbers, each at least 1")
    return tuple(value)


def _named(*taps: str | None) -> set[str]:
    return {tap for tap in taps if tap is not None}


@TERMS.register_module()
class VoxelToPillar(Term):
    """`pillar_mse` between a student's bird's-eye map and the teacher's tokens, pooled over height.

    The log has the `map_deviation` of both sides as they were compared, once per epoch. Both going to 0 together is a
    loss that falls without anything being taught.

    Args:
        tap: the student's tap, a map (b, c, h, w).
        teacher_tap: the teacher's tap, a level with scans and cells; the same name by default.
        channels: (student, teacher) widths.
        correspondence: `cells`, each token in its own column, for two networks on one partition; `points`, through the
            points of the scan, for any two.
        pool: `max`, `mean` or `attention`.
        mask: `all` cells of the map count, as published, or the `occupied` ones, those that have a token.
        adapter_side: `teacher`, as published, learns `teacher_adapter`; `student` learns a convolution on the student's
            map, towards a target that is fixed.
        adapter_kernel: size of the adapter's kernel, odd.
        target_norm: None, or `ln` to layer-normalise the pooled teacher's cells (no parameters).
        student_cells: the student's tap of points' cells, read by `points`; None for the batch's `grid_coord`.
        student_stride: those cells per cell of the map, (i, j).
        teacher_cells: the teacher's tap of points' cells, read by `points`; None for the batch's `grid_coord`.
        teacher_stride: those cells per cell of the teacher's level, (x, y, z).
        attention: arguments of `AttentionPool`, `dict(dim=32, bins=32)`.
    """

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        channels: Sequence[int] | None = None,
        correspondence: str = "cells",
        pool: str = "max",
        mask: str = "all",
        adapter_side: str = "teacher",
        adapter_kernel: int = 3,
        target_norm: str | None = None,
        student_cells: str | None = "cells",
        student_stride: Sequence[int] = (2, 2),
        teacher_cells: str | None = None,
        teacher_stride: Sequence[int] = (2, 2, 2),
        attention: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.teacher_tap = teacher_tap or tap
        me = self.me = type(self).__name__
        check_choice(f"{me}: correspondence", correspondence, CORRESPONDENCES)
        check_choice(f"{me}: pool", pool, POOLS)
        check_choice(f"{me}: mask", mask, MASKS)
        check_choice(f"{me}: adapter_side", adapter_side, SIDES)
        if target_norm is not None:
            check_choice(f"{me}: target_norm", target_norm, ("ln",))
        if type(adapter_kernel) is not int or adapter_kernel < 1 or adapter_kernel % 2 == 0:
            raise InputError(
                f"{me}: adapter_kernel={adapter_kernel!r}: expected an odd whole number"
            )
        if channels is None:
            raise InputError(f"{me}: channels=(student, teacher) is needed, the widths at the taps")
        of_student, of_teacher = whole_numbers(f"{me}: channels", channels, 2)
        self.channels = of_student, of_teacher
        self.correspondence, self.pool, self.mask = correspondence, pool, mask
        self.adapter_side, self.target_norm = adapter_side, target_norm
        self.student_cells, self.teacher_cells = student_cells, teacher_cells
        self.student_stride = whole_numbers(f"{me}: student_stride", student_stride, 2)
        self.teacher_stride = whole_numbers(f"{me}: teacher_stride", teacher_stride, 3)
        self.attention: AttentionPool | None = None
        if pool == "attention":
            if adapter_side == "student":
                raise InputError(
                    f"{me}: pool='attention' learns the target, adapter_side='student' wants it fixed; use "
                    "adapter_side='teacher', or pool='max'"
                )
            try:
                self.attention = AttentionPool(of_student, of_teacher, **dict(attention or {}))
            except TypeError as error:
                raise InputError(f"{me}: attention={attention!r}: {error}") from error
        self.adapter: nn.Module
        if adapter_side == "teacher":
            self.adapter = teacher_adapter(of_teacher, of_student, adapter_kernel)
        else:
            padding = adapter_kernel // 2
            self.adapter = nn.Conv2d(of_student, of_teacher, adapter_kernel, padding=padding)
        self._deviation: dict[str, Tensor] = {}
        self._warned = False

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        if self.correspondence == "cells":
            return {self.tap}, {self.teacher_tap}
        return _named(self.tap, self.student_cells), _named(self.teacher_tap, self.teacher_cells)

    def watched(self) -> dict[str, Tensor]:
        """Deviations of both maps in the last step; see `Term.watched`."""
        return {f"deviation_{side}": value for side, value in self._deviation.items()}

    def _read(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor, Rows]:
        """The student's map; the teacher's features, detached, and where they are; all checked."""
        feat, level = (
            full_precision(student[self.tap]).feat,
            full_precision(teacher[self.teacher_tap]),
        )
        if feat.dim() != 4:
            raise InputError(
                f"{self.me}: the student's tap {self.tap} is {tuple(feat.shape)}; a map (b, c, h, w) is needed"
            )
        if level.batch is None or level.cells is None:
            raise InputError(
                f"{self.me}: the teacher's tap {self.teacher_tap} has no cells; tap a module that returns a sparse "
                "tensor or a point container"
            )
        seen = feat.shape[1], level.feat.shape[1]
        if seen != self.channels:
            raise InputError(
                f"{self.me}: the taps {self.tap} and {self.teacher_tap} have {seen[0]} and {seen[1]} channels, "
                f"channels says {self.channels}; set channels={seen}"
            )
        return feat, level.feat.detach().to(feat.dtype), Rows(level.batch, level.cells)

    def _student_places(self, points: Rows, shape: MapShape) -> Tensor:
        """The map's place of every point."""
        what = f"{self.me}: the points' cells of the student"
        check_reach(what, *points, shape, self.student_stride)
        return places(*points, shape, self.student_stride)

    def _tokens(self, points: Rows, level: Rows) -> Tensor:
        """The teacher's row of every point."""
        token = point_tokens(*points, *level, self.teacher_stride)
        missing = int((token < 0).sum())
        if 2 * missing <= len(token) or len(level.cells) == 0:
            return token
        reach = [tuple(rows.cells.long().amax(0).tolist()) for rows in (points, level)]
        text = (
            f"{self.me}: {missing} of {len(token)} points lie in no cell of the teacher's tap {self.teacher_tap}: "
            f"the points' cells reach {reach[0]}, those of the tap {reach[1]}, and teacher_stride="
            f"{self.teacher_stride} has to lead from one to the other"
        )
        if missing == len(token):
            raise InputError(text)
        if not self._warned:
            self._warned = True
            logging.getLogger("pointcept_kd").warning("%s", text)
        return token

    def _pairs(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Mapping[str, Any],
        level: Rows,
        shape: MapShape,
    ) -> Pairs:
        """The teacher's tokens of every place on the student's map."""
        if self.correspondence == "cells":
            what = f"{self.me}: the cells of the teacher's tap {self.teacher_tap}"
            check_reach(what, *level, shape)
            return column_pairs(*level, shape)
        of_student = cells_of(student, self.student_cells, batch, f"{self.me}: student_cells")
        of_teacher = cells_of(teacher, self.teacher_cells, batch, f"{self.me}: teacher_cells")
        if len(of_student.cells) != len(of_teacher.cells):
            raise InputError(
                f"{self.me}: the student saw {len(of_student.cells)} points, the teacher {len(of_teacher.cells)}; "
                "both need the same"
            )
        place = self._student_places(of_student, shape)
        return point_pairs(place, self._tokens(of_teacher, level), shape)

    def maps(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's map and its target, alike in shape and with the adapter applied; and the occupied cells.

        Returns:
            Two (b, c, h, w) and bool (b, h, w).

        Raises:
            InputError: when taps, cells, points and the map do not fit each other or this term's arguments.
        """
        feat, tokens, level = self._read(student, teacher)
        shape: MapShape = feat.shape[0], feat.shape[2], feat.shape[3]
        pairs = self._pairs(student, teacher, batch, level, shape)
        with torch.autocast(feat.device.type, enabled=False):
            if self.attention is None:
                rows = pool_pairs(tokens, pairs, self.pool)
            else:
                rows = self.attention(tokens, level.cells[:, 2], pairs, feat)
            if self.target_norm == "ln":
                rows = F.layer_norm(rows, rows.shape[1:])
            target = pairs.to_map(rows)
            if self.adapter_side == "teacher":
                target = self.adapter(target)
            else:
                feat = self.adapter(feat)
        return feat, target, pairs.occupied()

    def _watch(self, feat: Tensor, target: Tensor, occupied: Tensor | None) -> None:
        self._deviation = {
            "student": map_deviation(feat, occupied),
            "target": map_deviation(target, occupied),
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        feat, target, occupied = self.maps(student, teacher, batch)
        counts = occupied if self.mask == "occupied" else None
        self._watch(feat, target, counts)
        return pillar_mse(feat, target, counts)
