"""How the gradients written out by hand are called."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def apply(
    function: type[torch.autograd.Function], tensors: Sequence[Tensor], *indices: Tensor
) -> Tensor:
    """`function` of the tensors in their common type, without autocast.

    Autocast chooses types operation by operation, and in the forward pass only: the backward pass
    would meet two types in one sum.
    """
    common = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function.apply(*(tensor.to(common) for tensor in tensors), *indices)
