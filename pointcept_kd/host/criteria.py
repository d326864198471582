"""Segmentation losses and their sum, under Pointcept's names and parameters.

Every loss takes `pred` and `target` and gives `loss_weight * loss`. Logits are (n, k) for points or
(b, k, ...) for dense grids, labels (n,) or (b, ...). Where every label is ignored a loss is 0 with a
zero gradient, never NaN. All of them compute in float32 or float64, also under autocast. Class weights
are buffers that stay out of the state dict, so that checkpoint keys are Pointcept's. Means are over the
points of all processes where the batches of several count as one (see `joint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import LOSSES, kd, stand_in
from .errors import InputError
from .joint import is_joint, joint_batch, joint_mean, joint_presence, joint_rows, joint_sum


class Loss(nn.Module):
    """What all losses share: float32 at least, the weight, and the checks of their arguments."""

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise InputError(
                f"{type(self).__name__}: reduction={reduction!r} must be 'mean', 'sum' or 'none'"
            )
        self.loss_weight = loss_weight
        self.reduction = reduction

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(pred.device.type, enabled=False):
            if pred.dtype in (torch.float16, torch.bfloat16):
                pred = pred.float()
            return self.loss_weight * self.compute(pred, target)

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss before its weight."""
        raise TypeError(f"{type(self).__name__} does not define compute(pred, target)")

    def _constant(self, name: str, values: Any) -> None:
        """Keep per-class numbers where `.to(device)` moves them and `state_dict` does not list them."""
        values = None if values is None else torch.as_tensor(values, dtype=torch.float32)
        self.register_buffer(name, values, persistent=False)

    def _reduce(self, losses: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        return joint_mean(total / max(losses.numel(), 1), losses.numel())


def _rows(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as (n, k) and labels as (n,), from points or from a dense grid."""
    if pred.shape[:1] + pred.shape[2:] != target.shape:
        raise ValueError(
            f"logits {tuple(pred.shape)} and labels {tuple(target.shape)} do not belong together; "
            "expected (n, k) and (n,), or (b, k, ...) and (b, ...)"
        )
    if pred.dim() > 2:
        pred = pred.movedim(1, -1).reshape(-1, pred.shape[1])
    return pred, target.reshape(-1)


def _labelled(pred: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The rows whose label counts."""
    pred, target = _rows(pred, target)
    if ignore_index is None:
        return pred, target
    keep = target != ignore_index
    return pred[keep], target[keep]


@stand_in(LOSSES, kd.LOSSES, "CrossEntropyLoss")
class CrossEntropyLoss(Loss):
    """Cross entropy; the mean is over labelled points, each counting its class weight.

    Args:
        weight: one factor per class.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target spread evenly over the classes.
        loss_weight: factor on the result.
        ignore_index: label that does not count.
    """

    def __init__(
        self,
        weight: Sequence[float] | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
    ) -> None:
        super().__init__(loss_weight, reduction)
        self._constant("weight", weight)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(pred.dtype)
        if weight is not None and len(weight) != pred.shape[1]:
            raise InputError(
                f"CrossEntropyLoss: weight has {len(weight)} entries, the logits have "
                f"{pred.shape[1]} classes; give one weight per class"
            )
        losses = F.cross_entropy(
            pred,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum",
            label_smoothing=self.label_smoothing,
        )
        if self.reduction != "mean":
            return losses
        labelled = target != self.ignore_index
        if weight is None:
            share = labelled.sum().to(pred.dtype)
        else:
            share = weight[target.where(labelled, 0)].where(labelled, 0).sum()
        # Without labels the sum is 0 already, so any divisor gives the connected zero.
        return joint_mean(losses / share.where(share > 0, 1), share)


@stand_in(LOSSES, kd.LOSSES, "SmoothCELoss")
class SmoothCELoss(Loss):
    """Cross entropy against a target of 1 - s for the label and s / (k - 1) for each other class.

    Args:
        smoothing_ratio: s.
        loss_weight: factor on the result.
        ignore_index: label that does not count.
    """

    def __init__(
        self, smoothing_ratio: float = 0.1, loss_weight: float = 1.0, ignore_index: int = -1
    ) -> None:
        super().__init__(loss_weight)
        self.smoothing_ratio = smoothing_ratio
        self.ignore_index = ignore_index

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = _labelled(pred, target, self.ignore_index)
        log_p = pred.log_softmax(1)
        own = log_p.gather(1, target[:, None])[:, 0]
        other = self.smoothing_ratio / max(pred.shape[1] - 1, 1)
        losses = -(1 - self.smoothing_ratio) * own - other * (log_p.sum(1) - own)
        return self._reduce(losses)


@stand_in(LOSSES, kd.LOSSES, "BinaryFocalLoss")
class BinaryFocalLoss(Loss):
    """Focal loss of one score per element: alpha_t (1 - p_t)^gamma (-log p_t).

    Lin et al., 2017, arXiv:1708.02002, equation 5.

    Args:
        gamma: how much easy elements count less.
        alpha: weight of the positives; negatives have 1 - alpha.
        logits: the scores are logits (else probabilities).
        reduce: give the mean (else one loss per element).
        loss_weight: factor on the result.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 0.5,
        logits: bool = True,
        reduce: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, "mean" if reduce else "none")
        _check_alpha(self, alpha)
        self.gamma = gamma
        self.alpha = alpha
        self.logits = logits

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        target = target.to(pred.dtype)
        if not self.logits:
            entropy = F.binary_cross_entropy(pred, target, reduction="none")
            return self._reduce(_focal(pred, entropy, target, self.gamma, self.alpha))
        entropy = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
        return self._reduce(_focal(pred.sigmoid(), entropy, target, self.gamma, self.alpha))


@stand_in(LOSSES, kd.LOSSES, "FocalLoss")
class FocalLoss(Loss):
    """Focal loss with one sigmoid per class against the one-hot label; mean over points and classes.

    Lin et al., 2017, arXiv:1708.02002, equation 5.

    Args:
        gamma: how much easy elements count less.
        alpha: weight of the positives, one for all classes or one per class.
        reduction: "mean", "sum" or "none" (one loss per labelled point and class).
        loss_weight: factor on the result.
        ignore_index: label that does not count.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Sequence[float] = 0.5,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        ignore_index: int = -1,
    ) -> None:
        super().__init__(loss_weight, reduction)
        for value in [alpha] if isinstance(alpha, (int, float)) else alpha:
            _check_alpha(self, value)
        self._constant("alpha", alpha)
        self.gamma = gamma
        self.ignore_index = ignore_index

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = _labelled(pred, target, self.ignore_index)
        hot = F.one_hot(target, pred.shape[1]).to(pred.dtype)
        entropy = F.binary_cross_entropy_with_logits(pred, hot, reduction="none")
        alpha = self.alpha.to(pred.dtype)
        return self._reduce(_focal(pred.sigmoid(), entropy, hot, self.gamma, alpha))


def _check_alpha(loss: Loss, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise InputError(f"{type(loss).__name__}: alpha={alpha} must lie between 0 and 1")


def _focal(p: Tensor, entropy: Tensor, target: Tensor, gamma: float, alpha: Any) -> Tensor:
    missing = p * (1 - target) + (1 - p) * target
    return (alpha * target + (1 - alpha) * (1 - target)) * missing**gamma * entropy


@stand_in(LOSSES, kd.LOSSES, "DiceLoss")
class DiceLoss(Loss):
    """One minus the Dice overlap of probabilities and one-hot labels, mean over the classes.

    1 - (2 sum_i p_i y_i + s) / (sum_i p_i^e + y_i^e + s) per class; Milletari et al., 2016,
    arXiv:1606.04797, section 3, with a smoothing term s.

    Args:
        smooth: s, which also makes an absent and unpredicted class cost nothing.
        exponent: e.
        loss_weight: factor on the result.
        ignore_index: label that does not count; a class of that index is left out as well.
    """

    def __init__(
        self,
        smooth: float = 1.0,
        exponent: float = 2.0,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
    ) -> None:
        super().__init__(loss_weight)
        self.smooth = smooth
        self.exponent = exponent
        self.ignore_index = ignore_index

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = _labelled(pred, target, self.ignore_index)
        if len(target) == 0 and not is_joint():
            return pred.sum()
        p = pred.softmax(1)
        hot = F.one_hot(target, pred.shape[1]).to(pred.dtype)
        overlap = 2 * joint_sum((p * hot).sum(0)) + self.smooth
        size = joint_sum((p**self.exponent + hot).sum(0)) + self.smooth
        cost = 1 - overlap / size
        if 0 <= self.ignore_index < len(cost):
            cost = torch.cat([cost[: self.ignore_index], cost[self.ignore_index + 1 :]])
        return cost.sum() / pred.shape[1]


@stand_in(LOSSES, kd.LOSSES, "LovaszLoss")
class LovaszLoss(Loss):
    """Lovász extension of the Jaccard loss: what the intersection over union would lose.

    Multiclass: the Lovász-softmax loss, mean over the classes that the labels contain. Binary: the
    Lovász hinge of one logit per element. Multilabel: the Lovász hinge over all elements and classes
    at once. Berman et al., 2018, arXiv:1705.08790, equations 8, 9 and 12.

    Args:
        mode: "multiclass", "binary" or "multilabel".
        class_seen: multiclass: count only these classes.
        per_image: take the loss of every first-dimension slice and average (dense grids only).
        ignore_index: label that does not count; None counts all.
        loss_weight: factor on the result.
    """

    def __init__(
        self,
        mode: str,
        class_seen: Sequence[int] | None = None,
        per_image: bool = False,
        ignore_index: int | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight)
        if mode not in ("multiclass", "binary", "multilabel"):
            raise InputError(
                f"LovaszLoss: mode={mode!r} must be 'multiclass', 'binary' or 'multilabel'"
            )
        self.mode = mode
        self.class_seen = None if class_seen is None else list(class_seen)
        self.per_image = per_image
        self.ignore_index = ignore_index

    def compute(self, pred: Tensor, target: Tensor) -> Tensor:
        one = self._softmax if self.mode == "multiclass" else self._hinge
        if not self.per_image:
            return one(pred, target)
        if self.mode == "multiclass" and pred.dim() < 3:
            raise ValueError(
                "LovaszLoss: per_image needs logits (b, k, ...); points have no images"
            )
        if len(pred) == 0:
            return joint_mean(pred.sum(), 0)
        with joint_batch(False):
            losses = [one(pred[i : i + 1], target[i : i + 1]) for i in range(len(pred))]
        return joint_mean(torch.stack(losses).mean(), len(losses))

    def _softmax(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = _labelled(pred, target, self.ignore_index)
        present = _present(target, pred.shape[1])
        if self.class_seen is not None:
            present = present[torch.isin(present, present.new_tensor(self.class_seen))]
        if len(present) == 0:
            return pred[:0].sum()
        p = pred.softmax(1).t()[present]
        hot = target == present[:, None]
        errors = torch.where(hot, 1 - p, p)
        return joint_sum((errors * joint_rows(jaccard_steps, errors, hot)).sum(1)).mean()

    def _hinge(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.numel() != target.numel():
            raise ValueError(
                f"LovaszLoss {self.mode}: logits {tuple(pred.shape)} and labels "
                f"{tuple(target.shape)} must have as many elements"
            )
        pred, target = pred.reshape(-1), target.reshape(-1)
        if self.ignore_index is not None:
            keep = target != self.ignore_index
            pred, target = pred[keep], target[keep]
        if len(pred) == 0 and not is_joint():
            return pred.sum()
        hot = target > 0
        margins = 1 - torch.where(hot, pred, -pred)
        steps = joint_rows(jaccard_steps, margins[None], hot[None])[0]
        return joint_sum((margins.relu() * steps).sum())


def _present(target: Tensor, classes: int) -> Tensor:
    """The classes among the labels, ascending."""
    if not is_joint():
        return target.unique()
    flags = torch.zeros(classes, dtype=torch.bool, device=target.device)
    flags[target] = True
    return joint_presence(flags).nonzero()[:, 0]


@torch.no_grad()
def jaccard_steps(errors: Tensor, foreground: Tensor) -> Tensor:
    """How much each element adds to the Jaccard loss when elements go wrong by descending error.

    With g foreground elements, the Jaccard loss of the first i elements is 1 - I/U, where I = g minus
    the foreground and U = g plus the background among them. A foreground step adds 1/U and a
    background step I/(U (U-1)); these closed forms spare the cancellation of subtracting neighbours.
    Berman et al., 2018, arXiv:1705.08790, equation 9 and algorithm 1.

    Args:
        errors: (k, n), one row per class.
        foreground: (k, n) bool.

    Returns:
        (k, n) steps in the order of the input, without a gradient. Rows sum to 1.
    """
    count = errors.shape[1]
    if errors.device.type == "cpu":
        # NumPy's vectorised argsort takes a third of the time of torch's stable one.
        order = torch.from_numpy(np.argsort(-errors.numpy(), axis=1))
    else:
        order = errors.argsort(dim=1, descending=True)
    hit = foreground.gather(1, order)
    hits = hit.cumsum(1, dtype=errors.dtype)
    total = hits[:, -1:]
    ranks = torch.arange(1, count + 1, dtype=errors.dtype, device=errors.device)
    union = total + ranks - hits
    steps = torch.where(hit, 1 / union, (total - hits) / (union * (union - 1)))
    # No foreground at all: the first element takes the intersection over union from 1 to 0.
    empty = (ranks == 1).to(errors.dtype)
    steps = torch.where(total > 0, steps, empty)
    return torch.empty_like(errors).scatter_(1, order, steps)


class Criteria(nn.Module):
    """The sum of several losses; without any, the predictions pass through unchanged."""

    def __init__(self, losses: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if len(self.losses) == 0:
            return pred
        return sum(loss(pred, target) for loss in self.losses)


def build_criteria(cfg: Sequence[Mapping[str, Any]] | None) -> Criteria:
    """The losses of a list of config entries as one callable `(pred, target)`.

    Raises:
        InputError: for anything but a list, or an entry that cannot be built.
    """
    if cfg is None:
        cfg = []
    if isinstance(cfg, (Mapping, str)) or not isinstance(cfg, Sequence):
        raise InputError(f"criteria must be a list of dicts, got {cfg!r}; put it in brackets")
    return Criteria([LOSSES.build(entry) for entry in cfg])
