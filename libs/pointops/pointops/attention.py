"""Attention over lists of pairs: a score for every pair, then a sum over the pairs of a point.

The backward passes gather rows again instead of keeping the gathered ones: there are many more
pairs than points.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autograd import apply
from ._checks import rows, same_device, shape


def attention_relation_step(
    query: Tensor, key: Tensor, weight: Tensor, index_target: Tensor, index_refer: Tensor
) -> Tensor:
    """Sum over the channels of query[target] * key[refer] * weight.

    Args:
        query: (n, g, c) queries of g heads.
        key: (n', g, c) keys.
        weight: (c) factor of each channel; ones for a dot product.
        index_target: (m) rows of `query`.
        index_refer: (m) rows of `key`.

    Returns:
        (m, g) in the common type of the three, differentiable in them (once).

    Raises:
        ValueError: shapes that do not fit, rows that do not exist, tensors on several devices.
    """
    shape("query", query, None, None, None)
    shape("key", key, None, *query.shape[1:])
    shape("weight", weight, query.shape[2])
    _pairs(index_target, len(query), index_refer, len(key))
    same_device(query=query, key=key, weight=weight, index_target=index_target)
    return apply(_Relation, (query, key, weight), index_target, index_refer)


def attention_fusion_step(
    weight: Tensor, value: Tensor, index_target: Tensor, index_refer: Tensor
) -> Tensor:
    """Sum over the pairs of every target of weight * value[refer].

    Args:
        weight: (m, g) score of every pair and head.
        value: (n, g, c) values.
        index_target: (m) rows of the result.
        index_refer: (m) rows of `value`.

    Returns:
        (n, g, c) in the common type of the two, zeros for targets without pairs; differentiable in
        `weight` and `value` (once).

    Raises:
        ValueError: shapes that do not fit, rows that do not exist, tensors on several devices.
    """
    shape("value", value, None, None, None)
    shape("weight", weight, len(index_target), value.shape[1])
    _pairs(index_target, len(value), index_refer, len(value))
    same_device(weight=weight, value=value, index_target=index_target)
    return apply(_Fusion, (weight, value), index_target, index_refer)


def _pairs(index_target: Tensor, targets: int, index_refer: Tensor, refers: int) -> None:
    shape("index_target", index_target, None)
    shape("index_refer", index_refer, len(index_target))
    same_device(index_target=index_target, index_refer=index_refer)
    rows("index_target", index_target, targets)
    rows("index_refer", index_refer, refers)


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, weight, target, refer):
        ctx.save_for_backward(query, key, weight, target, refer)
        return (query.index_select(0, target) * key.index_select(0, refer)) @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, weight, target, refer = ctx.saved_tensors
        grads = [None, None, None]
        if ctx.needs_input_grad[0]:
            part = key.index_select(0, refer) * weight * grad.unsqueeze(-1)
            grads[0] = torch.zeros_like(query).index_add_(0, target, part)
        if ctx.needs_input_grad[1]:
            part = query.index_select(0, target) * weight * grad.unsqueeze(-1)
            grads[1] = torch.zeros_like(key).index_add_(0, refer, part)
        if ctx.needs_input_grad[2]:
            product = query.index_select(0, target) * key.index_select(0, refer)
            grads[2] = torch.einsum("mgc,mg->c", product, grad)
        return (*grads, None, None)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, value, target, refer):
        ctx.save_for_backward(weight, value, target, refer)
        part = value.index_select(0, refer) * weight.unsqueeze(-1)
        return torch.zeros_like(value).index_add_(0, target, part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, value, target, refer = ctx.saved_tensors
        grad_weight = grad_value = None
        gathered = grad.index_select(0, target)
        if ctx.needs_input_grad[0]:
            grad_weight = (gathered * value.index_select(0, refer)).sum(dim=-1)
        if ctx.needs_input_grad[1]:
            grad_value = torch.zeros_like(value)
            grad_value.index_add_(0, refer, gathered * weight.unsqueeze(-1))
        return grad_weight, grad_value, None, None
