"""Pseudo-labels: where nobody labelled a point, the teacher's confident class takes the label's place.

    y'_i = argmax_k t_ik   if y_i is ignored and max_k softmax(t_i)_k >= confidence,   else ignored
    L    = criteria(s, y')

Lee, 2013, "Pseudo-Label: the simple and efficient semi-supervised learning method for deep neural networks". With the
criteria of the student's own training, a measure-oriented loss such as Lovasz-softmax reaches unlabelled scans too,
which a divergence between class scores does not give.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.criteria import build_criteria

from .base import Outputs, Term


def pseudo_labels(
    teacher: Float[Tensor, "n k"],
    segment: Int[Tensor, " n"],
    confidence: float = 0.0,
    ignore_index: int = -1,
) -> Int[Tensor, " n"]:
    """The teacher's class on unlabelled points it is sure of, `ignore_index` everywhere else.

    Args:
        teacher: class scores before softmax.
        segment: labels; `ignore_index` and negative values mean unlabelled.
        confidence: smallest probability of the chosen class, 0 to 1; a NaN score is never confident.
    """
    probability, chosen = teacher.detach().softmax(1).max(1)
    unlabelled = (segment == ignore_index) | (segment < 0)
    return torch.where(unlabelled & (probability >= confidence), chosen, ignore_index)


@TERMS.register_module()
class PseudoLabels(Term):
    """The task's criteria on `pseudo_labels`; a connected 0 where every point is labelled.

    Args:
        criteria: losses as a segmentor takes them, all with the same `ignore_index`.
        confidence: smallest probability of a pseudo-label.
        ignore_index: the label of unlabelled points.
    """

    def __init__(
        self,
        criteria: Sequence[Mapping[str, Any]],
        confidence: float = 0.0,
        ignore_index: int = -1,
    ) -> None:
        super().__init__()
        if not criteria:
            raise InputError("PseudoLabels: criteria is empty; give the losses of the student")
        if not 0 <= confidence <= 1:
            raise InputError(f"PseudoLabels: confidence must be between 0 and 1, got {confidence}")
        self.criteria = build_criteria(list(criteria))
        self.confidence = confidence
        self.ignore_index = ignore_index

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`."""
        target = pseudo_labels(
            teacher["logits"].feat, batch["segment"], self.confidence, self.ignore_index
        )
        return self.criteria(student["logits"].feat, target)
