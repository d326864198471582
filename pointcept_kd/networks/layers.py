"""Small layers that more than one network uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.ops.linear import linear


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over rows that also takes a single row while training.

    One row has no variance, and PyTorch raises there. A network that pools meets this with its coarsest level long
    before a scan is useless: a small object in a small crop is one cell there. Such a row is normalised with the
    running statistics, which it does not change. Same state-dict keys as `nn.BatchNorm1d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (n, c)."""
        if self.training and x.shape[0] == 1 and self.track_running_stats:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class Linear(nn.Linear):
    """`nn.Linear` over rows through the faster of PyTorch's CPU libraries; same parameters, keys and results."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n, in) to (n, out)."""
        return linear(x, self.weight, self.bias)


class DropPath(nn.Module):
    """Drop whole rows of a residual branch while training, scaling the rest up (arXiv:1603.09382)."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of x (n, c) with the given probability."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = torch.empty((x.shape[0], 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (mask.div_(keep) if keep > 0.0 else mask)

    def extra_repr(self) -> str:
        """Probability for `print(module)`."""
        return f"{self.probability:.3f}"


def ramp(end: float, steps: int) -> list[float]:
    """`steps` numbers from 0 to `end`, evenly spaced; [0.0] for one step."""
    return [end * i / max(steps - 1, 1) for i in range(steps)]


def check_features(batch: Mapping, in_channels: int) -> None:
    """Answer a batch whose `feat` is missing or has another width than the network takes.

    Raises:
        InputError: naming both numbers.
    """
    if "feat" not in batch:
        raise InputError(
            "the batch has no `feat`; give feat_keys to Collect, e.g. feat_keys=('coord', 'strength')"
        )
    width = batch["feat"].shape[1]
    if width != in_channels:
        raise InputError(
            f"the backbone has in_channels={in_channels} but `feat` has {width} columns; set in_channels={width} or "
            "change feat_keys of Collect"
        )
