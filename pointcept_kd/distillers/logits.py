"""Logit distillation: pull the student's class probabilities towards the teacher's.

    L = tau^2 / |V| * sum_{i in V} KL( softmax(t_i / tau) || softmax(s_i / tau) )

over points, or over the student's voxels, whose points share one distribution.

Hinton, Vinyals & Dean, 2015, arXiv:1503.02531. `DenseLogitKL` is the variant in the code of Jiang et al., 2023,
arXiv:2304.11393, kept for comparison.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.ops.grid import CellKeys, unique_cells
from pointcept_kd.ops.scatter import segment_mean

from .base import Outputs, Term
from .correspondence import cells_of
from .taps import full_precision

AT = ("points", "cells")
DENSE_EPS = 1e-6


def _kept_mean(divergence: Tensor, factor: float, threshold: float) -> Tensor:
    """Mean, times a factor, of those rows that exceed the threshold; 0 with graph where none does."""
    kept = divergence[divergence > threshold]
    if len(kept) == 0:
        return joint_mean(kept.sum(), 0)
    return joint_mean(kept.mean() * factor, len(kept))


def logit_kl(
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    valid: Bool[Tensor, " n"] | None = None,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> Float[Tensor, ""]:
    """Mean over valid points of the KL divergence from the teacher's to the student's distribution, times tau squared.

    Args:
        student, teacher: class scores before softmax; the teacher's are detached here.
        valid: points that count; None means all.
        temperature: tau > 0; both distributions are softened by it.
        threshold: points whose divergence, in nats and before the factor tau squared, is not above it do not count.

    Returns:
        The loss in nats; 0, still connected to `student`, when no point is valid.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    if len(student) == 0:
        return joint_mean(student.sum(), 0)
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    if threshold is not None:
        divergence = F.kl_div(log_p, target, reduction="none", log_target=True).sum(1)
        return _kept_mean(divergence, temperature**2, threshold)
    divergence = F.kl_div(log_p, target, reduction="sum", log_target=True)
    return joint_mean(divergence * (temperature**2 / len(student)), len(student))


def voxel_logit_kl(
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    voxel: Int64[Tensor, " n"],
    temperature: float = 1.0,
    threshold: float | None = None,
) -> Float[Tensor, ""]:
    """`logit_kl` as a mean over voxels, so that a voxel with many points counts no more than one with few.

    A voxel's teacher distribution is the mean of its points' softened distributions. Its student scores are the mean of
    its points' scores: those of a voxel network are equal anyway.

    Args:
        student, teacher: class scores of points before softmax; the teacher's are detached here.
        voxel: voxel of every point, 0 .. m - 1.
        temperature, threshold: as for `logit_kl`, with voxels for points.

    Returns:
        The loss in nats; 0, still connected to `student`, without points or where nothing exceeds the threshold.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(student) == 0:
        return joint_mean(student.sum(), 0)
    size = int(voxel.max()) + 1
    target = segment_mean(F.softmax(teacher.detach() / temperature, dim=1), voxel, size)
    log_p = F.log_softmax(segment_mean(student, voxel, size) / temperature, dim=1)
    # A probability may underflow to 0, whose share of the divergence is 0.
    divergence = F.kl_div(log_p, target, reduction="none").sum(1)
    if threshold is None:
        return joint_mean(divergence.mean() * temperature**2, size)
    return _kept_mean(divergence, temperature**2, threshold)


def dense_logit_kl(
    student: Float[Tensor, "b zk r p"],
    teacher: Float[Tensor, "m k"],
    batch: Int[Tensor, " m"],
    cells: Int[Tensor, "m 3"],
    temperature: float = 10.0,
    threshold: float = 0.01,
) -> Float[Tensor, ""]:
    """Mean over the voxels of a whole volume, those above a threshold, of

        m = 1/k * sum_c q_c ln( (q_c + 1e-6) / (p_c + 1e-6) )

    with p of the student and q of the teacher, both softened, without the factor tau squared. Where the teacher has no
    voxel its scores are zeros and q is uniform: the published code also pulls the student to indecision in empty space.

    Args:
        student: scores of every voxel; channel z * k + c is class c at height z.
        teacher: scores of occupied voxels; detached here.
        batch, cells: their scan and cell (r, p, z).
        temperature, threshold: as published.

    Returns:
        The loss; 0, still connected to `student`, where nothing exceeds the threshold. (There it was NaN.)

    Raises:
        ValueError: for a temperature that is not positive.
        InputError: when the two do not fit each other.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scans, channels, width, depth = student.shape
    classes = teacher.shape[1]
    height = channels // classes
    if channels % classes:
        raise InputError(
            f"the student's map has {channels} channels, which is no multiple of the teacher's {classes} classes"
        )
    shape = (scans, width, depth, height)
    place = torch.cat([batch[:, None], cells], dim=1).long()
    if len(place) and bool(((place < 0) | (place >= place.new_tensor(shape))).any()):
        raise InputError(
            f"the teacher's voxels (scan, r, p, z) reach {tuple(place.amax(0).tolist())}, the student's volume is "
            f"{shape}"
        )
    scores = student.view(scans, height, classes, width, depth).permute(0, 3, 4, 1, 2)
    target = teacher.new_zeros((*shape, classes), dtype=student.dtype)
    target[place.unbind(1)] = teacher.detach().to(student.dtype)

    def divergence(of_student: Tensor, of_teacher: Tensor) -> Tensor:
        p = F.softmax(of_student / temperature, dim=-1)
        q = F.softmax(of_teacher / temperature, dim=-1)
        return (q * ((q + DENSE_EPS) / (p + DENSE_EPS)).log()).mean(-1)

    # What is not kept, NaN among it, is no part of the graph.
    with torch.no_grad():
        keep = divergence(scores, target) > threshold
    kept = divergence(scores[keep], target[keep])
    if len(kept) == 0:
        return joint_mean(kept.sum(), 0)
    return joint_mean(kept.mean(), len(kept))


def _class_pairs(classes: Sequence[Sequence[int]] | None) -> tuple[list[int], list[int]] | None:
    """The shared classes' columns in either network's scores."""
    if classes is None:
        return None
    try:
        of_student, of_teacher = (list(ids) for ids in classes)
        whole = all(type(i) is int and i >= 0 for i in of_student + of_teacher)
    except (TypeError, ValueError):
        whole = False
    if not whole or len(of_student) != len(of_teacher) or len(of_student) < 2:
        raise InputError(
            f"LogitKL: classes={classes!r}: expected (ids of the student, ids of the teacher), two lists of the same "
            "classes, at least two"
        )
    if len(set(of_student)) < len(of_student) or len(set(of_teacher)) < len(of_teacher):
        raise InputError(f"LogitKL: classes={classes!r}: a class stands twice in one list")
    return of_student, of_teacher


@TERMS.register_module()
class LogitKL(Term):
    """`logit_kl` on the two networks' class scores, row by row, or `voxel_logit_kl` on the student's voxels.

    Args:
        temperature: tau.
        mask_ignored: leave out points whose label is ignored. Off by default: the teacher has an opinion on
            unlabelled points too, and the published systems use it.
        ignore_index: labels equal to this, or negative, count as ignored.
        at: `points` or `cells`, the distinct voxels that the student cuts the points into.
        cells: for `cells`, the student's tap of points' cells; None for the batch's `grid_coord`.
        threshold: leave out rows whose divergence is not above it, see `logit_kl`; None to keep all.
        classes: (ids of the student, ids of the teacher), the same classes in the same order, where the networks know
            different ones: only these are compared, with probabilities that add up to 1 over them.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        mask_ignored: bool = False,
        ignore_index: int = -1,
        at: str = "points",
        cells: str | None = "cells",
        threshold: float | None = None,
        classes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"LogitKL: temperature must be positive, got {temperature}")
        check_choice("LogitKL: at", at, AT)
        self.temperature = float(temperature)
        self.mask_ignored = mask_ignored
        self.ignore_index = ignore_index
        self.at, self.cells, self.threshold = at, cells, threshold
        self.classes = _class_pairs(classes)

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return ({self.cells} if self.at == "cells" and self.cells else set()), set()

    def _scores(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Both networks' scores of the same points and classes."""
        scores = [student["logits"].feat, teacher["logits"].feat]
        if self.classes is not None:
            for i, side in enumerate(("student", "teacher")):
                last = max(self.classes[i])
                if last >= scores[i].shape[1]:
                    raise InputError(
                        f"LogitKL: classes names class {last} of the {side}, which has {scores[i].shape[1]}"
                    )
                scores[i] = scores[i][:, self.classes[i]]
        if scores[0].shape != scores[1].shape:
            raise InputError(
                f"LogitKL: student scores are {tuple(scores[0].shape)}, teacher scores {tuple(scores[1].shape)}; "
                "both need the same points and classes"
            )
        return scores[0], scores[1]

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        scores_s, scores_t = self._scores(student, teacher)
        valid = None
        if self.mask_ignored:
            segment = batch["segment"]
            valid = (segment != self.ignore_index) & (segment >= 0)
        if self.at == "points":
            return logit_kl(scores_s, scores_t, valid, self.temperature, self.threshold)
        points = cells_of(student, self.cells, batch, "LogitKL: cells")
        if len(points.cells) != len(scores_s):
            raise InputError(
                f"LogitKL: {len(scores_s)} scores, but the cells of {len(points.cells)} points"
            )
        voxel = CellKeys.fit(*points).pack(*points)
        if valid is not None:
            scores_s, scores_t, voxel = scores_s[valid], scores_t[valid], voxel[valid]
        voxel = unique_cells(voxel)[1]
        return voxel_logit_kl(scores_s, scores_t, voxel, self.temperature, self.threshold)


@TERMS.register_module()
class DenseLogitKL(Term):
    """`dense_logit_kl` between a student's whole score volume and a teacher's scores of occupied voxels.

    For comparison with the published code; it costs what the whole volume costs. Train with `LogitKL`.

    Args:
        tap: the student's tap, a map (b, heights * num_classes, r, p).
        teacher_tap: the teacher's tap, a level of scores with scans and cells; the same name by default.
        num_classes: classes, the unlabelled one among them where the networks have it.
        temperature, threshold: see `dense_logit_kl`.
    """

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        num_classes: int = 20,
        temperature: float = 10.0,
        threshold: float = 0.01,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"DenseLogitKL: temperature must be positive, got {temperature}")
        self.tap = tap
        self.teacher_tap = teacher_tap or tap
        self.num_classes = num_classes
        self.temperature, self.threshold = float(temperature), float(threshold)

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return {self.tap}, {self.teacher_tap}

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        scores, level = (
            full_precision(student[self.tap]).feat,
            full_precision(teacher[self.teacher_tap]),
        )
        if scores.dim() != 4 or level.batch is None or level.cells is None:
            raise InputError(
                f"DenseLogitKL: needs a map (b, z * k, r, p) of the student at {self.tap}, which is "
                f"{tuple(scores.shape)}, and scores with cells of the teacher at {self.teacher_tap}"
            )
        if level.feat.shape[1] != self.num_classes:
            raise InputError(
                f"DenseLogitKL: the teacher scores {level.feat.shape[1]} classes, num_classes={self.num_classes}"
            )
        return dense_logit_kl(
            scores, level.feat, level.batch, level.cells, self.temperature, self.threshold
        )
