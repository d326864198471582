"""Feature distillation: the student's features at a tap towards the teacher's, on the same cells.

    squared error    L = 1 / (|V| c) * sum_{i in V} || g(s_i) - t_i ||^2
    cosine           L = 1 / |V|     * sum_{i in V} ( 1 - <g(s_i), t_i> / (|g(s_i)| |t_i|) )

g is the identity where widths agree, else a linear adapter that belongs to the term and is thrown away with it.
Squared error on hidden features: Romero et al., 2015, arXiv:1412.6550.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.joint import joint_mean

from .align import align
from .base import Outputs, Term


def feature_mse(
    student: Float[Tensor, "n c"],
    teacher: Float[Tensor, "n c"],
    valid: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over valid rows and channels; the teacher is detached.

    Returns:
        The loss; 0, still connected to `student`, when no row is valid.
    """
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    if len(student) == 0:
        return joint_mean(student.sum(), 0)
    return joint_mean(F.mse_loss(student, teacher.detach()), len(student))


def feature_cosine(
    student: Float[Tensor, "n c"],
    teacher: Float[Tensor, "n c"],
    valid: Bool[Tensor, " n"] | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    """Mean over valid rows of one minus the cosine between the two features; the teacher is detached.

    Norms are bounded below by `eps`, so a zero row costs 1 and has a finite gradient.

    Returns:
        The loss; 0, still connected to `student`, when no row is valid.
    """
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    if len(student) == 0:
        return joint_mean(student.sum(), 0)
    cosine = F.cosine_similarity(student, teacher.detach(), dim=1, eps=eps)
    return joint_mean((1 - cosine).mean(), len(student))


_DISTANCES = {"mse": feature_mse, "cosine": feature_cosine}


@TERMS.register_module()
class FeatureMatch(Term):
    """Student features at one tap towards teacher features at another, matched by cell.

    Args:
        tap: name of the student's tap.
        teacher_tap: name of the teacher's tap; the same name by default.
        distance: `mse` or `cosine`.
        channels: (student, teacher) widths where they differ: a linear adapter of that shape is learned.
        normalize: layer-normalise the teacher's rows (no parameters), which makes `mse` indifferent to the scale of
            the teacher's features.
    """

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        distance: str = "mse",
        channels: tuple[int, int] | list[int] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise InputError(f"FeatureMatch: distance {distance!r} is none of {sorted(_DISTANCES)}")
        self.tap = tap
        self.teacher_tap = teacher_tap or tap
        self.distance = distance
        self.normalize = normalize
        self.adapter = nn.Linear(*channels) if channels is not None else nn.Identity()

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return {self.tap}, {self.teacher_tap}

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        feat_s, feat_t = align(student[self.tap], teacher[self.teacher_tap])
        wanted = getattr(self.adapter, "in_features", feat_s.shape[1])
        if feat_s.shape[1] != wanted:
            raise InputError(
                f"FeatureMatch: the student's tap {self.tap} has {feat_s.shape[1]} channels, channels says {wanted}"
            )
        feat_s = self.adapter(feat_s)
        if feat_s.shape[1] != feat_t.shape[1]:
            raise InputError(
                f"FeatureMatch: student has {feat_s.shape[1]} channels at {self.tap}, teacher {feat_t.shape[1]}; "
                f"set channels=({student[self.tap].feat.shape[1]}, {feat_t.shape[1]})"
            )
        if self.normalize:
            feat_t = F.layer_norm(feat_t, feat_t.shape[1:])
        return _DISTANCES[self.distance](feat_s, feat_t)
