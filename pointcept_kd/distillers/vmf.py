"""Classes as von Mises-Fisher distributions on the unit sphere: their running statistics, and the pull towards them.

    p(g) = exp( log K_C(kappa) + kappa mu . g )
    log K_C(kappa) = (C/2 - 1) log kappa - C/2 log 2 pi - log I_{C/2 - 1}(kappa)

For the first T training steps, with m_k the mean feature of class k in the batch and alpha = 1 - 1/T,

    z_k <- alpha z_k + (1 - alpha) m_k,     R = |z_k|,     mu_k = z_k / R,     kappa_k = R (C - R^2) / (1 - R^2)

for the classes that are present; afterwards the statistics stay as they are and the loss begins:

    L = mean over present classes of  -log K_C(kappa_k) - kappa_k mean_{i: y_i = k} mu_k . g_i

Its gradient is -kappa_k mu_k / n_k for a point of class k, over the number of classes: a pull towards the class's
direction, all classes alike, stronger for a compact class. z starts at 0, and without correction of that bias R stays
below 1 - alpha^T, 0.632, hence kappa below 67 at C = 64: a cap that the published weights were trained with.

Zhang et al., 2024, arXiv:2405.14271 (OLIVINE), whose paper has the mean over points in L. Estimate of kappa: Banerjee,
Dhillon, Ghosh & Sra, 2005. Bessel function: the uniform expansion for large orders, DLMF 10.41.3.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_batch, joint_sum
from pointcept_kd.ops.scatter import segment_count, segment_sum

from .contrast import full

REDUCTIONS = ("class_mean", "point_mean")
# Debye's polynomials u_1 .. u_4, DLMF 10.41.10: t^k / divisor * (coefficients of t^0, t^2, t^4, ...).
_DEBYE: tuple[tuple[int, Sequence[int]], ...] = (
    (24, (3, -5)),
    (1152, (81, -462, 385)),
    (414720, (30375, -369603, 765765, -425425)),
    (39813120, (4465125, -94121676, 349922430, -446185740, 185910725)),
)
# From this order on four terms leave an error below 1e-8.
_LARGE_ORDER = 30.0


def _debye(order: int | float, x: Tensor) -> Tensor:
    """log( I_order(x) / x^order ) for large orders, x float64."""
    root = (1 + (x / order).square()).sqrt()
    t = 1 / root
    series = torch.ones_like(x)
    for k, (divisor, coefficients) in enumerate(_DEBYE, 1):
        polynomial = torch.zeros_like(x)
        for coefficient in reversed(coefficients):
            polynomial = polynomial * t.square() + coefficient
        series = series + polynomial * (t / order) ** k / divisor
    exponent = order * (root - (1 + root).log() - math.log(order))
    return exponent - 0.5 * (math.log(2 * math.pi * order) + root.log()) + series.log()


def log_bessel(order: int | float, x: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """log( I_order(x) / x^order ) of the modified Bessel function, in float64: finite for all x from 0 on.

    Args:
        order: 0 or more. Orders below 30 are reached from above, J_{v-1} = x^2 J_{v+1} + 2 v J_v for
            J_v = I_v / x^v, in which direction all terms are positive and errors fade.
        x: 0 or more.

    Returns:
        (k,) float64, differentiable; error below 1e-8.

    Raises:
        InputError: for a negative order.
    """
    if not order >= 0:
        raise InputError(f"the order of a Bessel function must be 0 or more, got {order}")
    x = x.double()
    steps = max(0, math.ceil(_LARGE_ORDER - order))
    value = _debye(order + steps, x)
    if steps:
        ratio = (_debye(order + steps + 1, x) - value).exp()  # J_{v+1} / J_v
        for v in (order + step for step in range(steps, 0, -1)):
            growth = x.square() * ratio + 2 * v
            value, ratio = value + growth.log(), 1 / growth
    return value


def log_normaliser(kappa: Float[Tensor, " k"], dim: int) -> Float[Tensor, " k"]:
    """log K_C(kappa) of von Mises-Fisher distributions in C = `dim` dimensions, float64; uniform density at 0.

    Raises:
        InputError: for fewer than two dimensions.
    """
    if dim < 2:
        raise InputError(f"directions need two dimensions or more, got {dim}")
    return -dim / 2 * math.log(2 * math.pi) - log_bessel(dim / 2 - 1, kappa)


def concentration(
    length: Float[Tensor, " k"], dim: int, low: float = 1e-3, high: float = 100.0
) -> Float[Tensor, " k"]:
    """kappa = R (C - R^2) / (1 - R^2) within [low, high], for R the length of a mean of unit vectors; float64.

    R is kept below 1 - 1e-6: a class of one point has R = 1.
    """
    r = length.double().clamp(0, 1 - 1e-6)
    return (r * (dim - r.square()) / (1 - r.square())).clamp(low, high)


def vmf_loss(
    points: Float[Tensor, "m c"],
    labels: Integer[Tensor, " m"],
    directions: Float[Tensor, "k c"],
    kappa: Float[Tensor, " k"],
    seen: Bool[Tensor, " k"],
    reduction: str = "class_mean",
) -> Float[Tensor, ""]:
    """Negative log-likelihood of unit features under the distributions of their classes, over all processes.

    Args:
        points: features, with graph, of unit length.
        labels: class of each point.
        directions, kappa: mu and kappa of each class; constants here.
        seen: classes that have a distribution; points of others do not count.
        reduction: `class_mean`: mean over classes with points of the mean over their points; `point_mean`: over points.

    Returns:
        The loss in nats, negative as a rule; 0, still connected, where no point counts.

    Raises:
        InputError: for an unknown reduction.
        ValueError: for labels outside 0 .. k - 1.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    classes, dim = directions.shape
    kappa, directions = kappa.detach().double(), directions.detach()
    points = full(points)
    labels = labels.long()
    alignment = (points * directions.to(points.dtype)[labels]).sum(1, keepdim=True).double()
    sums = segment_sum(alignment, labels, classes)[:, 0]
    counts = segment_count(labels, classes).to(sums)
    total, rows = joint_sum(torch.stack([sums, counts])).unbind()
    rows = rows.detach()
    counted = seen & (rows > 0)
    constant = -log_normaliser(kappa, dim)
    if reduction == "class_mean":
        parts = (constant - kappa * total / rows.clamp(min=1))[counted]
        weight = counted.sum()
    else:
        parts = (constant * rows - kappa * total)[counted]
        weight = rows[counted].sum()
    return (parts.sum() / weight.clamp(min=1)).to(points.dtype)


class VonMisesFisher(nn.Module):
    """Running von Mises-Fisher statistics of classes and, once they stand, the loss.

    `forward(points, labels)` takes all labelled pairs of the batch. In training it counts a step; in the first T it
    updates the statistics and returns 0, later `vmf_loss`. In evaluation it changes nothing. The mean of a class is
    always that over the points of all processes, so that a process without the class neither holds it back nor drifts
    (the published code averages z over processes instead). A class that was never seen in the first T steps has no
    distribution and is left out.

    The state is `z` (float64), `updates` (of each class), `step` and `warmup` (T); directions and concentrations
    follow from it, so that a run resumes exactly in either phase, with the T that it began with.

    Args:
        classes: labels are 0 .. classes - 1.
        dim: width of the features.
        warmup_steps: T; None where `warmup_fraction` is given.
        warmup_fraction: T as a share of all training steps, see `set_total_steps`, for short trainings, which would
            otherwise end before T.
        alpha: momentum; 1 - 1/T if None.
        kappa_max: upper bound of the concentrations.
        bias_correction: divide z_k by 1 - alpha^(updates of k). Concentrations, and with them the pull, become up to
            fifty times as large, within `kappa_max`.
        reduction: of `vmf_loss`.
        ignore: points of this label take no part.

    Raises:
        InputError: for arguments out of their ranges.
    """

    z: Tensor
    updates: Tensor
    step: Tensor
    warmup: Tensor

    def __init__(
        self,
        classes: int,
        dim: int,
        warmup_steps: int | None = 10_000,
        warmup_fraction: float | None = None,
        alpha: float | None = None,
        kappa_max: float = 100.0,
        bias_correction: bool = False,
        reduction: str = "class_mean",
        ignore: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        if (warmup_steps is None) == (warmup_fraction is None):
            raise InputError("VonMisesFisher takes one of warmup_steps and warmup_fraction")
        if warmup_steps is not None and warmup_steps < 1:
            raise InputError(f"warmup_steps must be 1 or more, got {warmup_steps}")
        if warmup_fraction is not None and not 0 < warmup_fraction <= 1:
            raise InputError(f"warmup_fraction must lie in (0, 1], got {warmup_fraction}")
        if alpha is not None and not 0 <= alpha < 1:
            raise InputError(f"alpha must lie in [0, 1), got {alpha}")
        if classes < 1 or dim < 2:
            raise InputError(f"need a class and two dimensions or more, got {classes} and {dim}")
        if not kappa_max >= 1e-3:
            raise InputError(f"kappa_max must be 1e-3 or more, got {kappa_max}")
        self.fraction, self.fixed_alpha = warmup_fraction, alpha
        self.kappa_max, self.bias_correction = kappa_max, bias_correction
        self.reduction, self.ignore = reduction, ignore
        self.register_buffer("z", torch.zeros(classes, dim, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("warmup", torch.tensor(warmup_steps or 0))

    def set_total_steps(self, total: int) -> None:
        """Fix T from `warmup_fraction` before the first step; of no effect on `warmup_steps` and on a resumed run."""
        if self.fraction is not None and not self.step:
            self.warmup.fill_(max(1, round(self.fraction * total)))

    @property
    def alpha(self) -> float:
        """Momentum of the statistics."""
        return 1 - 1 / int(self.warmup) if self.fixed_alpha is None else self.fixed_alpha

    @property
    def seen(self) -> Bool[Tensor, " k"]:
        """Classes that have a distribution."""
        return self.updates > 0

    @property
    def lengths(self) -> Float[Tensor, " k"]:
        """R of every class, float64; 0 for one never seen."""
        r = self.z.norm(dim=1)
        if not self.bias_correction:
            return r
        # alpha ** 0 would leave 0 / 0 to classes never seen.
        return r / (1 - self.alpha ** self.updates.clamp(min=1).double())

    @property
    def directions(self) -> Float[Tensor, "k c"]:
        """mu of every class, float64; 0 for one never seen."""
        return nn.functional.normalize(self.z, dim=1)

    @property
    def kappa(self) -> Float[Tensor, " k"]:
        """Concentration of every class, float64, within [1e-3, kappa_max]."""
        return concentration(self.lengths, self.z.shape[1], high=self.kappa_max)

    @torch.no_grad()
    def update(self, points: Float[Tensor, "m c"], labels: Integer[Tensor, " m"]) -> None:
        """Move z of the classes that are present in any process towards their mean features."""
        classes = len(self.z)
        sums = segment_sum(points.double(), labels, classes)
        counts = segment_count(labels, classes).to(sums)
        # Also where losses are each process's own: the statistics of two processes must not drift apart.
        with joint_batch():
            both = joint_sum(torch.cat([sums, counts[:, None]], 1))
        present = both[:, -1] > 0
        mean = (both[:, :-1] / both[:, -1:].clamp(min=1)).to(self.z.dtype)
        moved = self.z.lerp(mean, 1 - self.alpha)
        self.z.copy_(torch.where(present[:, None], moved, self.z))
        self.updates += present

    def forward(
        self, points: Float[Tensor, "m c"], labels: Integer[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """The loss, 0 (still connected) in the first T steps.

        Args:
            points: unit features of all pairs.
            labels: their weak labels.

        Raises:
            InputError: for labels that do not fit, features of another width, or a fraction without total steps.
        """
        if not self.warmup:
            raise InputError(
                "VonMisesFisher: warmup_fraction needs set_total_steps before the first step"
            )
        classes, dim = self.z.shape
        if len(labels) != len(points) or points.shape[1] != dim:
            raise InputError(
                f"VonMisesFisher: {len(labels)} labels for features {tuple(points.shape)} of width {dim}"
            )
        if self.ignore is not None:
            points, labels = points[labels != self.ignore], labels[labels != self.ignore]
        labels = labels.long()
        if len(labels):
            low, high = (int(v) for v in torch.aminmax(labels))
            if low < 0 or high >= classes:
                raise InputError(
                    f"VonMisesFisher: classes are 0 .. {classes - 1}, labels {low} .. {high}"
                )
        if self.training:
            self.step += 1
            if self.step <= self.warmup:
                self.update(points, labels)
        if self.step <= self.warmup:
            return full(points[:0]).sum()
        return vmf_loss(points, labels, self.directions, self.kappa, self.seen, self.reduction)
