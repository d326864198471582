"""Segmentation scores from a confusion matrix.

Two means are in use, and they differ wherever a split lacks a class. The host's mIoU counts an absent class as 0 and is
the metric that picks the best checkpoint; the mean over classes that occur in labels or predictions is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

_EPS = 1e-10  # in the denominators, as the host has it: an absent class scores 0


def confusion(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1) -> Tensor:
    """Count pairs of label and prediction.

    Args:
        pred: (N,) integers, 0 to `num_classes` - 1.
        target: (N,) integers of the same range, or `ignore_index`; such rows count nowhere.

    Returns:
        (K, K) int64 on the inputs' device; rows are labels, columns predictions.

    Raises:
        InputError: for other lengths, or a label or prediction outside the range.
    """
    pred, target = pred.reshape(-1), target.reshape(-1)
    if pred.shape != target.shape:
        raise InputError(
            f"{len(pred)} predictions meet {len(target)} labels: a pipeline that collects `inverse` must collect "
            "`origin_segment` of the same cloud, and a batch must shift `inverse` by its sample"
        )
    keep = target != ignore_index
    pred, target = pred[keep].long(), target[keep].long()
    for name, values in (("label", target), ("prediction", pred)):
        if len(values) and not (int(values.min()) >= 0 and int(values.max()) < num_classes):
            wrong = values[(values < 0) | (values >= num_classes)][0]
            raise InputError(
                f"{name} {int(wrong)} is outside 0..{num_classes - 1}: check data.num_classes={num_classes}, "
                f"data.ignore_index={ignore_index} and the learning map of the dataset"
            )
    counts = torch.bincount(target * num_classes + pred, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def ious(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of each class, (K,) float64, and (K,) bool: in labels or predictions at all."""
    matrix = matrix.double()
    intersection = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return intersection / (union + _EPS), union > 0


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says; all shares 0 to 1."""

    miou: float  # mean over all classes, absent = 0: the host's number
    miou_present: float  # mean over classes in labels or predictions
    macc: float
    all_acc: float
    iou: list[float]
    acc: list[float]
    present: list[bool]
    points: int  # labelled points

    @property
    def headline(self) -> str:
        """The three numbers the host logs."""
        return f"{self.miou:.4f}/{self.macc:.4f}/{self.all_acc:.4f}"

    def protocol(self, compared: str) -> str:
        """What the numbers mean, for the log: the class mean, and where labels were compared."""
        return (
            f"all {len(self.iou)} classes, absent = 0; present classes only ({sum(self.present)}): "
            f"mIoU {self.miou_present:.4f}; labels compared {compared}"
        )

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        classes = {
            name: {"iou": iou, "acc": acc, "present": present}
            for name, iou, acc, present in zip(names, self.iou, self.acc, self.present)
        }
        return {
            "mIoU": self.miou,
            "mIoU_present": self.miou_present,
            "mAcc": self.macc,
            "allAcc": self.all_acc,
            "points": self.points,
            "classes": classes,
        }


def summary(matrix: Tensor) -> Scores:
    """The scores of a (K, K) confusion matrix; all 0 where nothing was labelled."""
    iou, present = ious(matrix)
    hits, labelled = matrix.double().diagonal(), matrix.double().sum(1)
    acc = hits / (labelled + _EPS)
    return Scores(
        miou=float(iou.mean()),
        miou_present=float(iou[present].mean()) if bool(present.any()) else 0.0,
        macc=float(acc.mean()),
        all_acc=float(hits.sum() / (labelled.sum() + _EPS)),
        iou=iou.tolist(),
        acc=acc.tolist(),
        present=present.tolist(),
        points=int(matrix.sum()),
    )


def class_names(data_cfg: Any) -> list[str]:
    """`data.names`, or `class 0`... where a config gives none.

    Raises:
        InputError: where their number is not `data.num_classes`.
    """
    count = data_cfg["num_classes"]
    names = list(data_cfg.get("names") or [f"class {i}" for i in range(count)])
    if len(names) != count:
        raise InputError(
            f"data.names has {len(names)} entries, data.num_classes is {count}: make them agree"
        )
    return names
