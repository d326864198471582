"""Weighted sums of neighbours' features and position encodings, with weights shared by channels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autograd import apply
from ._checks import rows, same_device, shape


def aggregation(input: Tensor, position: Tensor, weight: Tensor, idx: Tensor) -> Tensor:
    """Sum over the neighbours s of (input[idx[:, s]] + position[:, s]) * weight[:, s].

    Channel j of the features goes with channel j mod w_c of the weights.

    Args:
        input: (n', c) features.
        position: (n, nsample, c) position encodings.
        weight: (n, nsample, w_c) weights.
        idx: (n, nsample) rows of `input`; -1 where there is no neighbour, which adds nothing.

    Returns:
        (n, c) in the common type of the three, differentiable in them (once). The backward pass
        gathers the features again instead of keeping them.

    Raises:
        ValueError: shapes that do not fit, rows outside -1 to n' - 1, tensors on several devices.
    """
    shape("input", input, None, None)
    shape("position", position, None, None, input.shape[1])
    shape("idx", idx, *position.shape[:2])
    shape("weight", weight, *position.shape[:2], None)
    if input.shape[1] and not weight.shape[2]:
        raise ValueError("weight must have at least one channel, got none")
    same_device(input=input, position=position, weight=weight, idx=idx)
    rows("idx", idx, len(input), lowest=-1)
    return apply(_Aggregation, (input, position, weight), idx)


class _Aggregation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, position, weight, idx):
        ctx.save_for_backward(input, position, weight, idx)
        return (_values(input, position, idx) * _spread(weight, idx, input.shape[1])).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, position, weight, idx = ctx.saved_tensors
        channels, shared = input.shape[1], weight.shape[2]
        grad_input = grad_position = grad_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_position = grad.unsqueeze(1) * _spread(weight, idx, channels)
        if ctx.needs_input_grad[0] and grad_position is not None:
            # Missing neighbours carry zeros, so any row may take them; there is one if idx has any.
            index = idx.clamp(min=0).reshape(-1)
            grad_input = torch.zeros_like(input)
            if len(input):
                grad_input.index_add_(0, index, grad_position.reshape(-1, channels))
        if ctx.needs_input_grad[2]:
            every = grad.unsqueeze(1) * _values(input, position, idx)
            every = every.masked_fill((idx < 0).unsqueeze(-1), 0)
            grad_weight = torch.zeros_like(weight)
            grad_weight.index_add_(2, _channel(channels, shared, weight.device), every)
        return grad_input, grad_position, grad_weight, None


def _channel(channels: int, shared: int, device: torch.device) -> Tensor:
    return torch.arange(channels, device=device) % max(1, shared)


def _values(input: Tensor, position: Tensor, idx: Tensor) -> Tensor:
    if len(input) == 0:
        return position
    return input.index_select(0, idx.clamp(min=0).reshape(-1)).view(position.shape) + position


def _spread(weight: Tensor, idx: Tensor, channels: int) -> Tensor:
    """The weight of every channel, zero for missing neighbours."""
    present = weight.masked_fill((idx < 0).unsqueeze(-1), 0)
    if present.shape[2] == channels:
        return present
    return present.index_select(2, _channel(channels, weight.shape[2], weight.device))
