"""Gradient-guided distillation: the student's map of what its features do for the task towards the teacher's.

For each network, with its own task loss L, and for each scan of n cells:

    G   = dL / dF                                   (n, c)  F: features at the tap
    w_c = 1/n * sum_i | G_ic |                      (c,)    how much the loss asks for channel c
    M_i = sum_c w_c F_ic                            (n,)    one number per cell, whatever the width
    M~  = (M - min M) / (max M - min M + 1e-6)      or (M - mean M) / (std M + 1e-6), or M itself

    L_grad = mean_i smooth_l1( M~_student,i - M~_teacher,i ),  smooth_l1(x) = x^2 / 2 for |x| < 1, else |x| - 1/2

w is a constant and the teacher's map a target, so the loss reaches the student through F alone. Both maps are numbers
per cell: no adapter is learned. The two networks' rows are matched by (scan, cell).

Hai, Le, Ding, Tian & Hy, 2025, arXiv:2505.08101. Importance and normalisation are over one scan here; there over a
batch, which was one scan.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError, comm
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import is_joint, joint_batch, joint_max, joint_mean, joint_sum
from pointcept_kd.ops.scatter import segment_count, segment_max, segment_mean, segment_sum

from .align import align
from .base import Outputs, Term
from .scans import scan_of_rows
from .taps import Activation

EPS = 1e-6
# A float16 gradient that overflows is asked for again, this much smaller; at most so often.
_SHRINK, _ATTEMPTS = 2.0**-8, 4


def _minmax(x: Tensor, scan: Tensor, size: int) -> Tensor:
    low, high = -segment_max(-x, scan, size), segment_max(x, scan, size)
    return (x - low[scan]) / (high - low + EPS)[scan]


def _zscore(x: Tensor, scan: Tensor, size: int) -> Tensor:
    centred = x - segment_mean(x, scan, size)[scan]
    others = (segment_count(scan, size) - 1).clamp_(min=1)[:, None]
    variance = segment_sum(centred.square(), scan, size) / others
    # A constant map has deviation 0, and there the root has no derivative.
    varies = variance > 0
    deviation = torch.where(varies, variance, 1).sqrt() * varies
    return centred / (deviation + EPS)[scan]


def _none(x: Tensor, scan: Tensor, size: int) -> Tensor:
    return x


NORMALIZE = {"minmax": _minmax, "zscore": _zscore, "none": _none}


def gradient_map(
    feat: Float[Tensor, "n c"],
    grad: Float[Tensor, "n c"],
    scan: Int[Tensor, " n"] | None = None,
    normalize: str = "minmax",
) -> Float[Tensor, " n"]:
    """One number per cell: its features weighted by the importance of their channels, normalised over its scan.

    Computed in float32 or wider. Differentiable in `feat`; `grad` counts as a constant.

    Args:
        feat: features of the cells.
        grad: gradient of a task loss with respect to them.
        scan: scan of each cell, 0 and up; None means one scan.
        normalize: `minmax` to [0, 1], where the lowest and the highest cell receive gradients too; `zscore` to mean 0
            and (unbiased) standard deviation 1; or `none`. A scan whose map is constant, as with one cell, becomes 0.

    Raises:
        InputError: for an unknown normalisation.
        ValueError: for a negative scan number.

    Hai et al., 2025, arXiv:2505.08101.
    """
    check_choice("normalize", normalize, NORMALIZE)
    feat = feat if feat.dtype == torch.float64 else feat.float()
    if len(feat) == 0:
        return feat.sum(1)
    if scan is None:
        scan = torch.zeros(len(feat), dtype=torch.int64, device=feat.device)
    scan = scan.long()
    size = int(scan.max()) + 1
    with torch.autocast(feat.device.type, enabled=False):
        importance = segment_mean(grad.detach().to(feat.dtype).abs(), scan, size)
        value = (feat * importance[scan]).sum(1, keepdim=True)
        return NORMALIZE[normalize](value, scan, size)[:, 0]


def map_loss(student: Float[Tensor, " n"], teacher: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean over cells of the smooth L1 distance (beta 1) between two maps of the same cells; the teacher is detached.

    Returns:
        The loss; 0, still connected to `student`, without cells.
    """
    if len(student) == 0:
        return joint_mean(student.sum(), 0)
    return joint_mean(F.smooth_l1_loss(student, teacher.detach()), len(student))


def task_gradient(
    loss: Float[Tensor, ""], feat: Float[Tensor, "n c"], factor: Float[Tensor, ""]
) -> Float[Tensor, "n c"]:
    """`d(factor * loss) / d(feat)` in the dtype of `feat`, float32 at least; the graph stays for others.

    The factor enters before the backward pass, so that gradients of a mean over many points do not underflow where
    the network ran in half precision. Where they overflow, a smaller factor is tried and made up for afterwards.

    Raises:
        InputError: when the loss does not depend on `feat`.
    """
    source: Tensor | GradientEdge = feat
    if not loss.requires_grad:
        raise InputError(
            "the task loss has no gradient; the network and its criteria must be differentiable"
        )
    shrunk = 1.0
    for attempt in range(_ATTEMPTS):
        (grad,) = torch.autograd.grad(
            loss * factor * shrunk, source, retain_graph=True, allow_unused=True
        )
        if grad is None and source is feat and feat.grad_fn is not None:
            # A tap hands half-precision features out in float32; the network went on with what they were made of.
            source = GradientEdge(*feat.grad_fn.next_functions[0])
            (grad,) = torch.autograd.grad(
                loss * factor * shrunk, source, retain_graph=True, allow_unused=True
            )
        if grad is None:
            raise InputError(
                "the task loss does not depend on the tapped features: the tap lies beside the path to the class "
                "scores, or another term differentiates the same teacher at a later tap"
            )
        grad = grad if grad.dtype == torch.float64 else grad.float()
        with (
            joint_batch()
        ):  # all processes repeat, or none: a backward pass may hold messages between them
            overflow = joint_max(int(not bool(torch.isfinite(grad).all())))
        if not overflow or attempt == _ATTEMPTS - 1:
            break
        shrunk *= _SHRINK
    return grad / shrunk


@TERMS.register_module()
class GradientGuided(Term):
    """`map_loss` between the two networks' `gradient_map`, a mean over all cells of the batch.

    The gradients are those of the task loss times the number of points in the batch (`none` undoes that), so that the
    1e-6 of the normalisation is as small for a large scan as for a small one.

    Args:
        tap: the student's tap: `enc_out`, the encoder's output, which the paper draws; or `dec_in`, its projection on
            the way into the decoder, on the same cells, which the published code used. Any other tap does as well.
        teacher_tap: the teacher's tap; the same name by default.
        normalize: `minmax`, `zscore` or `none`.
    """

    needs_teacher_grad = True

    def __init__(
        self, tap: str = "enc_out", teacher_tap: str | None = None, normalize: str = "minmax"
    ) -> None:
        super().__init__()
        check_choice("GradientGuided: normalize", normalize, NORMALIZE)
        self.tap = tap
        self.teacher_tap = teacher_tap or tap
        self.normalize = normalize

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return {self.tap}, {self.teacher_tap}

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        points = torch.tensor(
            float(len(student["logits"].feat)), device=student["logits"].feat.device
        )
        points = joint_sum(points)
        map_s, map_t = align(
            self._map(student, self.tap, batch, points, "student"),
            self._map(teacher, self.teacher_tap, batch, points, "teacher"),
        )
        return map_loss(map_s[:, 0], map_t[:, 0])

    def _map(
        self, outputs: Outputs, tap: str, batch: dict, points: Tensor, side: str
    ) -> Activation:
        """One network's map in the shape of an activation, (n, 1)."""
        if outputs.loss is None:
            raise InputError(
                f"GradientGuided: the {side} returned no loss; its config needs criteria, and the batch labels"
            )
        seen = outputs[tap]
        grad = task_gradient(outputs.loss, seen.feat, points)
        if is_joint():
            # The gradient of a joint loss comes times the processes that averaging divides by.
            grad = grad / comm.get_world_size()
        if self.normalize == "none":
            grad = grad / points
        scan = scan_of_rows(seen, batch, f"{tap} of the {side}")
        feat = seen.feat if side == "student" else seen.feat.detach()
        value = gradient_map(feat, grad, scan, self.normalize)
        return Activation(value[:, None], seen.batch, seen.cells)
