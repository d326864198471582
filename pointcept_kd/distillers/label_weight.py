"""Label-weight distillation: a student's bird's-eye map towards the teacher's, cells with rare classes first.

    w_c = 1 / (f_c + 0.001)                                   f_c: share of class c among the training points
    W[b,i,j] = sum over occupied voxels (b,i,j,z) of w_{majority label} / 50
    L = sqrt( 1/(B X Y) * sum_{b,i,j} W[b,i,j] * sum_c ( A(Y) - S )^2 + 1e-12 )

Y and A are those of `voxel_to_pillar`. A column with many occupied voxels, such as a wall's or a pole's, weighs more
than flat ground. The published code also gives 0.61535 to every *empty* voxel, so that an empty column of 32 weighs
more than one of road, building or vegetation; here that is `empty_weight`, 0 by default.

Jiang et al., 2023, arXiv:2304.11393, at the layer before the classifier.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.joint import joint_mean, joint_sum
from pointcept_kd.ops.grid import group_rows, majority_label

from .base import Outputs
from .correspondence import MapShape, cells_of, check_reach, places
from .voxel_to_pillar import VoxelToPillar

EPS = 1e-12
SMOOTHING = 0.001  # keeps the weight of a class without points finite


def frequency_weights(frequencies: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """1 / (f + 0.001) for every class."""
    return 1 / (frequencies + SMOOTHING)


def label_weight_map(
    batch: Int[Tensor, " n"],
    cells: Int[Tensor, "n 3"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " k"],
    shape: MapShape,
    empty_weight: float = 0.0,
    bins: int | None = None,
    vote_labelled: bool = False,
) -> Float[Tensor, "b h w"]:
    """W of every cell of a map: the sum over its occupied voxels of the weight of the label that most points have.

    Args:
        batch, cells: scan and voxel of every point; the first two columns are the map's cell, the third the z-bin.
            Points beyond the map are left out.
        labels: class of every point, 0 for unlabelled; of equally frequent ones in a voxel the smallest counts.
        weights: by class, the first that of unlabelled voxels.
        shape: (scans, h, w) of the map.
        empty_weight: weight of every voxel without points.
        bins: voxels per column, for `empty_weight` alone.
        vote_labelled: unlabelled points have no vote where their voxel has others.

    Raises:
        ValueError: for a label that has no weight, and for an `empty_weight` without `bins`.
    """
    place = places(batch, cells, shape)
    keep = place >= 0
    place, height, labels = place[keep], cells[keep, 2].long(), labels[keep].long()
    size = shape[0] * shape[1] * shape[2]
    total = weights.new_zeros(size)
    occupied = weights.new_zeros(size)
    if len(place):
        lowest, highest = (int(z) for z in torch.aminmax(height))
        levels = highest - lowest + 1
        voxels = group_rows(place * levels + (height - lowest))
        # A voxel without any vote is unlabelled, 0.
        votes = labels > 0 if vote_labelled else slice(None)
        label = majority_label(voxels.inverse[votes], labels[votes], len(voxels.keys), len(weights))
        column = torch.div(voxels.keys, levels, rounding_mode="floor")
        total.index_add_(0, column, weights[label])
        if empty_weight:
            occupied.index_add_(0, column, torch.ones_like(column, dtype=weights.dtype))
    if empty_weight:
        if bins is None:
            raise ValueError("empty_weight needs bins, the number of voxels in a column")
        total += empty_weight * (bins - occupied).clamp_(min=0)
    return total.view(shape)


def label_weight_loss(
    student: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "b h w"],
) -> Float[Tensor, ""]:
    """Root of the mean over cells of weight times the squared difference, summed over channels.

    Args:
        student, target: maps of one shape; the target keeps its gradient, as in `pillar_mse`.
        weight: of every cell, at least 0; cells of weight 0 are not looked at.

    Returns:
        The loss; 1e-6, still connected to both maps and with gradient 0, where every weight or difference is 0.
    """
    counts = weight > 0
    away = student.permute(0, 2, 3, 1)[counts] - target.permute(0, 2, 3, 1)[counts]
    total = (weight[counts].detach().to(away.dtype) * away.square().sum(1)).sum()
    return (joint_mean(total / weight.numel(), weight.numel()) + EPS).sqrt()


@TERMS.register_module()
class LabelWeight(VoxelToPillar):
    """`label_weight_loss` between a student's map and the teacher's tokens, pooled over height.

    Voxels are those of the student: cells of its map, and the z-bins of its own grid or of `bin_height`.

    Args:
        tap, teacher_tap, channels, correspondence, pool, adapter_side, adapter_kernel, target_norm, teacher_cells,
            teacher_stride, attention: see `VoxelToPillar`.
        cells: the student's tap of points' cells; None for the batch's `grid_coord`.
        student_stride: those cells per cell of the map, (i, j).
        frequencies: share of the training points that each class of the data set has; or `running`: counted in the
            training batches, over labelled points.
        num_classes: classes of the data set; needed for `running`.
        void_frequency: the share of unlabelled points, which gives unlabelled voxels their weight.
        empty_weight: weight of a voxel without points, after `scale`; 0.61535 is the published code's.
        scale: class weights are divided by it.
        bins: voxels in a column, needed for an `empty_weight`.
        bin_height: metres; z-bins from the points' heights (`coord`), for a student whose grid has none.
        vote_labelled: unlabelled points have no vote on the label of a voxel that has labelled ones; for data of which
            few points are labelled.
    """

    counts: Tensor
    class_weights: Tensor

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        channels: Sequence[int] | None = None,
        frequencies: str | Sequence[float] = "running",
        num_classes: int | None = None,
        void_frequency: float = 0.03150183,
        empty_weight: float = 0.0,
        scale: float = 50.0,
        bins: int | None = None,
        bin_height: float | None = None,
        vote_labelled: bool = False,
        cells: str | None = "cells",
        correspondence: str = "cells",
        pool: str = "max",
        adapter_side: str = "teacher",
        adapter_kernel: int = 3,
        target_norm: str | None = None,
        student_stride: Sequence[int] = (1, 1),
        teacher_cells: str | None = None,
        teacher_stride: Sequence[int] = (1, 1, 1),
        attention: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(
            tap,
            teacher_tap,
            channels,
            correspondence=correspondence,
            pool=pool,
            adapter_side=adapter_side,
            adapter_kernel=adapter_kernel,
            target_norm=target_norm,
            student_cells=cells,
            student_stride=student_stride,
            teacher_cells=teacher_cells,
            teacher_stride=teacher_stride,
            attention=attention,
        )
        for name, value, low in (
            ("void_frequency", void_frequency, 0.0),
            ("empty_weight", empty_weight, 0.0),
            ("scale", scale, 1e-9),
            ("bin_height", 1.0 if bin_height is None else bin_height, 1e-9),
            ("bins", 1 if bins is None else bins, 1),
        ):
            if not isinstance(value, (int, float)) or not low <= value < float("inf"):
                raise InputError(f"LabelWeight: {name}={value!r}: expected a number from {low}")
        if empty_weight and bins is None:
            raise InputError(
                f"LabelWeight: empty_weight={empty_weight} needs bins, the number of voxels in a column"
            )
        self.void_frequency, self.empty_weight = float(void_frequency), float(empty_weight)
        self.scale, self.bins, self.bin_height = float(scale), bins, bin_height
        self.vote_labelled = vote_labelled
        self.running = frequencies == "running"
        if self.running:
            if type(num_classes) is not int or num_classes < 1:
                raise InputError(
                    "LabelWeight: frequencies='running' needs num_classes, the data set's classes"
                )
            # Saved with the run, so that a run that goes on knows what it has seen.
            self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
            return
        if isinstance(frequencies, str):
            raise InputError(
                f"LabelWeight: frequencies={frequencies!r}: expected 'running', or the share of every class"
            )
        shares = [float(f) for f in frequencies]
        if not shares or not all(0 <= f <= 1 for f in shares):
            raise InputError(
                f"LabelWeight: frequencies={frequencies!r}: expected the share, 0 to 1, of every class"
            )
        if num_classes not in (None, len(shares)):
            raise InputError(
                f"LabelWeight: {len(shares)} frequencies, but num_classes={num_classes}"
            )
        self.register_buffer("class_weights", self._weights(torch.tensor(shares)), persistent=False)

    def _weights(self, frequencies: Tensor) -> Tensor:
        """Weights of unlabelled voxels and of the classes, after `scale`."""
        void = frequencies.new_tensor([self.void_frequency])
        return frequency_weights(torch.cat([void, frequencies])) / self.scale

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        of_student, of_teacher = super().taps()
        return of_student | ({self.student_cells} if self.student_cells else set()), of_teacher

    def _labels(self, batch: Mapping, points: int) -> tuple[Tensor, Tensor]:
        """Label of every point, 0 for none, and the weights; counts the batch where it counts."""
        segment = batch.get("segment")
        if segment is None or len(segment) != points:
            has = "no segment" if segment is None else f"{len(segment)} labels"
            raise InputError(f"LabelWeight: the batch has {has} for {points} points")
        labels = segment.long().clamp(min=-1) + 1
        classes = len(self.counts if self.running else self.class_weights) - (not self.running)
        if points and int(labels.max()) > classes:
            raise InputError(
                f"LabelWeight: a label is {int(labels.max()) - 1}, but weights are of the classes 0 .. {classes - 1}"
            )
        if not self.running:
            return labels, self.class_weights
        if self.training:
            seen = torch.bincount(labels, minlength=classes + 1)[1:]
            self.counts += joint_sum(seen)
        return labels, self._weights(self.counts / self.counts.sum().clamp(min=1))

    def weight_map(self, student: Outputs, batch: Mapping, shape: MapShape) -> Tensor:
        """`label_weight_map` of a batch on the student's map."""
        points = cells_of(student, self.student_cells, batch, "LabelWeight: cells")
        what = "LabelWeight: the points' cells of the student"
        check_reach(what, *points, shape, self.student_stride)
        labels, weights = self._labels(batch, len(points.cells))
        if self.bin_height is None:
            height = points.cells[:, 2].long()
        else:
            height = (batch["coord"][:, 2].double() / self.bin_height).floor().long()
        stride = points.cells.new_tensor(self.student_stride)
        fine = torch.div(points.cells[:, :2], stride, rounding_mode="floor").long()
        cells = torch.cat([fine, height[:, None]], dim=1)
        return label_weight_map(
            points.batch,
            cells,
            labels,
            weights,
            shape,
            self.empty_weight,
            self.bins,
            self.vote_labelled,
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        feat, target, _ = self.maps(student, teacher, batch)
        shape = feat.shape[0], feat.shape[2], feat.shape[3]
        weight = self.weight_map(student, batch, shape)
        self._watch(feat, target, weight > 0)
        return label_weight_loss(feat, target, weight)
