"""Batch normalisation over the rows of all processes, on CPU and GPU alike.

`torch.nn.SyncBatchNorm` takes CUDA tensors only. This one is plain PyTorch: each process sends its number of rows, its
means and its sums of squared deviations, which are put together without cancellation (Chan, Golub & LeVeque, 1983,
"Algorithms for computing the sample variance"); backward adds two sums per channel over the processes. Processes may
have different numbers of rows, also none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import comm


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(c,) as (1, c, 1, ...), to meet the dimensions of `like`."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _joint_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of rows, (), mean and biased variance, (c,), over all processes; equal in each of them to the last bit."""
    axes = [i for i in range(x.dim()) if i != 1]
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if rows:
        variance, mean = torch.var_mean(wide, axes, correction=0)
    else:
        variance = mean = wide.new_zeros(channels)
    own = torch.cat([mean, variance * rows, mean.new_tensor([rows])])
    parts = [torch.empty_like(own) for _ in range(comm.get_world_size())]
    dist.all_gather(parts, own)
    stacked = torch.stack(parts)
    counts, means = stacked[:, -1:], stacked[:, :channels]
    total = counts.sum()
    divisor = total.clamp_min(1)
    mean = (means * counts).sum(0) / divisor
    spread = stacked[:, channels:-1] + counts * (means - mean).square()
    return total, mean, spread.sum(0) / divisor


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias with the moments of all processes' rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: tuple[Tensor, Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        total, mean, variance = moments
        ctx.save_for_backward(x, weight, total, mean, torch.rsqrt(variance + eps))
        ctx.has_bias = bias is not None
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total, mean, scale = ctx.saved_tensors
        axes = [i for i in range(x.dim()) if i != 1]
        wide = grad.to(mean.dtype)
        normal = (x - _per_channel(mean, x)) * _per_channel(scale, x)
        grad_bias, grad_weight = wide.sum(axes), (wide * normal).sum(axes)
        grad_x = None
        # Parameters' gradients stay the own rows': the trainer's averaging adds those of the other processes.
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        if ctx.needs_input_grad[0]:
            of_bias, of_weight = (sums / total.clamp_min(1)).chunk(2)
            grad_x = wide - _per_channel(of_bias, x) - normal * _per_channel(of_weight, x)
            factor = scale if weight is None else scale * weight
            grad_x = (grad_x * _per_channel(factor, x)).to(x.dtype)
        if weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return (
            grad_x,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias.to(grad_weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of all processes' rows; same state-dict keys.

    Where all processes together have a single row, it is normalised with the running statistics, which it does not
    change. In evaluation, and in a run of one process, it is ordinary batch normalisation.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (n, c, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, c) or (n, c, ...)."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            total, mean, variance = _joint_moments(input)
            if self.running_mean is not None and self.running_var is not None:
                # One row has no variance. `where`, not `if`: the host need not wait for the device.
                alone = total <= 1
                self._follow(total, mean, variance, ~alone)
                mean = self.running_mean.to(mean.dtype).where(alone, mean)
                variance = self.running_var.to(mean.dtype).where(alone, variance)
                # Constants have no gradient: the sums that backward divides by this become 0.
                total = total.masked_fill(alone, torch.inf)
        return _Normalise.apply(input, self.weight, self.bias, (total, mean, variance), self.eps)

    def _follow(self, total: Tensor, mean: Tensor, variance: Tensor, moves: Tensor) -> None:
        """Move the running statistics, where `moves`, a () bool, is true."""
        self.num_batches_tracked.add_(moves)
        step = self.momentum
        if step is None:
            step = 1 / self.num_batches_tracked.clamp_min(1).to(self.running_mean.dtype)
        step = moves.to(self.running_mean.dtype) * step
        unbiased = variance * (total / (total - 1).clamp_min(1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation in a module by `SyncBatchNorm`, keeping parameters, statistics and keys.

    Returns:
        the module; where it is a batch normalisation itself, its replacement.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        synced = SyncBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        for kind in ("_parameters", "_buffers"):
            getattr(synced, kind).update(getattr(module, kind))
        return synced.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child))
    return module
