"""Topology distillation: the shape of the student's feature cloud towards that of the teacher's.

For every scan, the features at the tap are a cloud of points, one per cell. Joining the points in the order of their
distances gives birth and death to components (H0), loops (H1) and voids (H2); D^k is the diagram of dimension k.

    L = mean over scans of sum_k c_k * dist( D^k(F_student / s), D^k(F_teacher / t) )

with the mean pair distances s and t as scales (or 1), and as `dist` one of

    chamfer   1/|A| sum_a min_b |a - b|^2 + 1/|B| sum_b min_a |a - b|^2
    w2        mean squared difference of the sorted deaths; H0 only, where both diagrams have equally many
    entropy   ( E(A) - E(B) )^2,  E = - sum_j p_j ln p_j of the shares p of the bars' lifetimes

The diagrams are exact on landmarks, the same cells for both networks. A birth or death is the length of one edge, so
its gradient is the unit vector between the two ends. No adapter is needed: widths may differ.

Hai, Le, Ding, Tian & Hy, 2025, arXiv:2505.08101 (Chamfer, no scale); `pointcept_kd.ops.persistence` for the diagrams.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.ops.neighbors import farthest_point_sampling
from pointcept_kd.ops.persistence import (
    chamfer_diagrams,
    h0_deaths,
    has_engine,
    mean_distance,
    persistence_diagram,
    persistence_entropy,
    wasserstein_h0,
)

from .align import align
from .base import Outputs, Term
from .scans import scan_of_rows

DIMENSIONS = ("h0", "h1", "h2")
DISTANCES = ("chamfer", "w2", "entropy")
SCALES = ("mean", "none")
SAMPLING = ("uniform", "farthest")

# Odd 64-bit constants of SplitMix64 (Steele, Lea & Flood, 2014), as int64, and one factor for each axis.
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_AXES = (0x9E3779B97F4A7C15 - 2**64, 0xD1B54A32D192ED03 - 2**64, 0x8CB92BA72F3D8DD7 - 2**64)


def _hash(cells: Tensor) -> Tensor:
    """A pseudo-random int64 for each cell, of its coordinates alone."""
    mixed = (cells.long() * cells.new_tensor(_AXES, dtype=torch.int64)).sum(1)
    for shift, factor in zip((30, 27), _MIX):
        # int64 shifts carry the sign along; the mask makes the shift a logical one.
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return mixed ^ ((mixed >> 31) & (2**33 - 1))


@torch.no_grad()
def landmarks_of(
    cells: Int[Tensor, "n 3"], count: int, sampling: str = "uniform"
) -> Int64[Tensor, " k"]:
    """Rows of `count` cells of one scan, all of them in a fixed order where there are fewer.

    The choice follows from the cells alone: not from the order of the rows, nor from the step, the other scans or the
    process. Any beginning of the result is a choice of fewer landmarks by the same rule. A scan that is augmented is
    other cells, hence other landmarks, in every epoch.

    Args:
        cells: distinct grid cells.
        count: landmarks, at least 1.
        sampling: `uniform`, each cell with equal probability; or `farthest`, farthest point sampling on the grid.

    Raises:
        InputError: for an unknown sampling.
        ValueError: for a count below 1.
    """
    check_choice("sampling", sampling, SAMPLING)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    order = _hash(cells).sort(stable=True).indices
    if sampling == "uniform" or len(cells) == 0:
        return order[:count]
    near = farthest_point_sampling(cells[order].float(), min(count, len(cells)))
    return order[near]


def diagram_distance(
    student: Float[Tensor, "n c"],
    teacher: Float[Tensor, "m d"],
    dim: int,
    distance: str = "chamfer",
) -> Float[Tensor, ""]:
    """Distance between the persistence diagrams of two clouds in one dimension; the teacher is detached.

    Computed in float32 or wider. 0, connected to `student`, where both diagrams are empty.

    Args:
        student, teacher: points of one scan.
        dim: 0, 1 or 2; 1 and 2 need GUDHI.
        distance: `chamfer`, `entropy`, or for dimension 0 `w2`, which needs as many points in both.

    Raises:
        InputError: for an unknown distance, or `w2` in another dimension.
        ValueError: for points that are not finite, and without GUDHI.
    """
    check_choice("distance", distance, DISTANCES)
    if distance == "w2" and dim != 0:
        raise InputError(f"distance 'w2' compares H0 alone, not H{dim}; use chamfer or entropy")
    teacher = teacher.detach()
    if dim == 0:
        # All are born at 0: deaths alone are the diagram.
        of_student, of_teacher = h0_deaths(student), h0_deaths(teacher)
    else:
        limit = max(len(student), len(teacher))
        of_student = persistence_diagram(student, dim, max_points=limit)
        of_teacher = persistence_diagram(teacher, dim, max_points=limit)
    if distance == "w2":
        return wasserstein_h0(of_student, of_teacher)
    if distance == "entropy":
        return (persistence_entropy(of_student) - persistence_entropy(of_teacher)).square()
    return chamfer_diagrams(of_student, of_teacher)


def topology_loss(
    student: Float[Tensor, "n c"],
    teacher: Float[Tensor, "n d"],
    homology: Mapping[str, float],
    distance: Mapping[str, str],
    landmarks: Mapping[str, int],
    scale: str = "mean",
) -> Float[Tensor, ""]:
    """Weighted sum over dimensions of `diagram_distance` for one scan; the teacher is detached.

    Args:
        student, teacher: features of the same cells, rows in the order in which they are to be landmarks.
        homology: `h0`, `h1`, `h2` to weight; those absent or of weight 0 are not computed.
        distance: dimension to `chamfer`, `w2` or `entropy`.
        landmarks: dimension to the number of rows, from the first, that its diagram is of.
        scale: `mean` divides either cloud by the mean distance between its landmarks, those of the dimension that has
            the most, with gradient; `none` does not.

    Returns:
        The loss; 0, connected to `student`, for a scan of one cell; NaN for features that are not finite.

    Raises:
        InputError: for unknown names.
    """
    check_choice("scale", scale, SCALES)
    used = {name: weight for name, weight in homology.items() if weight}
    if not used or len(student) == 0:
        return student[:0].sum()
    most = max(landmarks[name] for name in used)
    student, teacher = student[:most], teacher[:most].detach()
    # In half precision a mean over more points than its largest number would be lost.
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
    if not bool(student.detach().isfinite().all() & teacher.isfinite().all()):
        # As with any other loss: who scales gradients or stops a run at such a loss decides.
        return student.sum() * torch.nan
    total = student[:0].sum()
    with torch.autocast(student.device.type, enabled=False):
        if scale == "mean":
            student, teacher = _scaled(student), _scaled(teacher)
        for name, weight in used.items():
            first = slice(landmarks[name])
            value = diagram_distance(
                student[first], teacher[first], DIMENSIONS.index(name), distance[name]
            )
            total = total + weight * value
    return total


def _scaled(points: Tensor) -> Tensor:
    mean = mean_distance(points)
    # Points that all coincide stay where they are.
    return points / torch.where(mean > 0, mean, 1)


def _by_dimension(what: str, value: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A value for every dimension, from one for all or a dict for some."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(DIMENSIONS, value)
    for name in value:
        check_choice(f"Topology: a dimension of {what}", name, DIMENSIONS)
    return {**defaults, **value}


@TERMS.register_module()
class Topology(Term):
    """`topology_loss`, a mean over the scans of the batch, not over points.

    Without GUDHI (extra `topology`) H1 and H2 are left out, which the log says once.

    Args:
        tap: the student's tap: `enc_out`, the encoder's output, or any other.
        teacher_tap: the teacher's tap; the same name by default.
        homology: weight of each dimension, `dict(h0=1.0, h1=1.0, h2=0.0)` by default; those not named are off.
        landmarks: cells that diagrams are of, one number for all or by dimension; `dict(h0=1024, h1=256, h2=256)`.
        distance: one name for all or by dimension: `dict(h0="w2", h1="chamfer", h2="chamfer")`.
        scale: `mean` or `none`, see `topology_loss`.
        sampling: how landmarks are chosen, `uniform` or `farthest`, see `landmarks_of`.
        every: compute the term in every n-th training step alone, times n; it is 0 in the others.
    """

    steps: Tensor

    def __init__(
        self,
        tap: str = "enc_out",
        teacher_tap: str | None = None,
        homology: Mapping[str, float] | float | None = None,
        landmarks: int | Mapping[str, int] | None = None,
        distance: str | Mapping[str, str] | None = None,
        scale: str = "mean",
        sampling: str = "uniform",
        every: int = 1,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.teacher_tap = teacher_tap or tap
        weights = {"h0": 1.0, "h1": 1.0} if homology is None else homology
        if not isinstance(weights, Mapping):
            raise InputError(
                f"Topology: homology={homology!r}: give weights by dimension, dict(h0=1.0, h1=1.0)"
            )
        self.homology = _by_dimension("homology", weights, dict.fromkeys(DIMENSIONS, 0.0))
        self.landmarks = _by_dimension(
            "landmarks", {} if landmarks is None else landmarks, {"h0": 1024, "h1": 256, "h2": 256}
        )
        self.distance = _by_dimension(
            "distance",
            {} if distance is None else distance,
            {"h0": "w2", "h1": "chamfer", "h2": "chamfer"},
        )
        check_choice("Topology: scale", scale, SCALES)
        check_choice("Topology: sampling", sampling, SAMPLING)
        self.scale, self.sampling = scale, sampling
        if type(every) is not int or every < 1:
            raise InputError(f"Topology: every={every!r}: expected a whole number, at least 1")
        self.every = every
        self._check_dimensions()
        if every > 1:
            # Saved with the run, so that a run that goes on keeps its beat.
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _check_dimensions(self) -> None:
        """Check every dimension in use, and leave H1 and H2 out where nothing computes them."""
        for name, weight in self.homology.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise InputError(
                    f"Topology: homology {name}={weight!r}: expected 0 or a positive number"
                )
            if not weight:
                continue
            count = self.landmarks[name]
            if type(count) is not int or count < 2:
                raise InputError(
                    f"Topology: landmarks {name}={count!r}: expected a whole number, at least 2"
                )
            check_choice(f"Topology: distance of {name}", self.distance[name], DISTANCES)
            if self.distance[name] == "w2" and name != "h0":
                raise InputError(
                    f"Topology: distance of {name} is 'w2', which compares H0 alone; "
                    f"use distance=dict(h0='w2', {name}='chamfer')"
                )
        used = [name for name in DIMENSIONS if self.homology[name]]
        if not used:
            raise InputError(
                "Topology: every dimension has weight 0; drop the term, or give one a weight"
            )
        higher = [name.upper() for name in used if name != "h0"]
        if higher and not has_engine():
            lacking = f"{' and '.join(higher)} need GUDHI (pip install 'pointcept_kd[topology]')"
            if "h0" not in used:
                raise InputError(f"Topology: {lacking}, and H0 has weight 0")
            logging.getLogger("pointcept_kd").warning(
                "Topology: %s, which is not installed; the term is of H0 alone", lacking
            )
            self.homology.update(h1=0.0, h2=0.0)

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return {self.tap}, {self.teacher_tap}

    def _rests(self) -> bool:
        """Whether this step is one of those left out; counts it."""
        if self.every == 1:
            return False
        rests = bool(self.steps % self.every)
        self.steps += 1
        return rests

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        seen = student[self.tap]
        if self._rests():
            return seen.feat[:0].sum()
        feat_s, feat_t = align(seen, teacher[self.teacher_tap])
        scan = scan_of_rows(seen, batch, f"{self.tap} of the student")
        cells = seen.cells
        if cells is None:  # rows of a plain tensor are in one order in both networks
            cells = torch.arange(len(feat_s), device=feat_s.device)[:, None].expand(-1, 3)
        most = max(self.landmarks[name] for name, weight in self.homology.items() if weight)
        values = []
        for number in scan.unique().tolist():
            rows = (scan == number).nonzero()[:, 0]
            rows = rows[landmarks_of(cells[rows], most, self.sampling)]
            pair = feat_s.index_select(0, rows), feat_t.detach().index_select(0, rows)
            values.append(
                topology_loss(*pair, self.homology, self.distance, self.landmarks, self.scale)
            )
        if not values:
            return joint_mean(feat_s[:0].sum(), 0)
        return joint_mean(self.every * torch.stack(values).mean(), len(values))
