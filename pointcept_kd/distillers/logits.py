"""Logit distillation: pull the student's class probabilities towards the teacher's.

    L = tau^2 / |V| * sum_{i in V} KL( softmax(t_i / tau) || softmax(s_i / tau) )

Hinton, Vinyals & Dean, 2015, arXiv:1503.02531.
"""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.joint import joint_mean

from .base import Outputs, Term


def logit_kl(
    student: Float[Tensor, "n k"],
    teacher: Float[Tensor, "n k"],
    valid: Bool[Tensor, " n"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean over valid points of the KL divergence from the teacher's to the student's distribution, times tau squared.

    Args:
        student, teacher: class scores before softmax; the teacher's are detached here.
        valid: points that count; None means all.
        temperature: tau > 0; both distributions are softened by it.

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
    divergence = F.kl_div(log_p, target, reduction="sum", log_target=True)
    return joint_mean(divergence * (temperature**2 / len(student)), len(student))


@TERMS.register_module()
class LogitKL(Term):
    """`logit_kl` on the two networks' class scores, row by row.

    Args:
        temperature: tau.
        mask_ignored: leave out points whose label is ignored. Off by default: the teacher has an opinion on
            unlabelled points too, and the published systems use it.
        ignore_index: labels equal to this, or negative, count as ignored.
    """

    def __init__(
        self, temperature: float = 1.0, mask_ignored: bool = False, ignore_index: int = -1
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"LogitKL: temperature must be positive, got {temperature}")
        self.temperature = float(temperature)
        self.mask_ignored = mask_ignored
        self.ignore_index = ignore_index

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        scores_s, scores_t = student["logits"].feat, teacher["logits"].feat
        if scores_s.shape != scores_t.shape:
            raise InputError(
                f"LogitKL: student scores are {tuple(scores_s.shape)}, teacher scores {tuple(scores_t.shape)}; "
                "both need the same points and classes"
            )
        valid = None
        if self.mask_ignored:
            segment = batch["segment"]
            valid = (segment != self.ignore_index) & (segment >= 0)
        return logit_kl(scores_s, scores_t, valid, self.temperature)
