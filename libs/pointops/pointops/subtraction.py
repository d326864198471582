"""Differences between the features of a point and those of its neighbours."""

from torch import Tensor

from ._checks import same_device, shape
from .grouping import grouping2


def subtraction(input1: Tensor, input2: Tensor, idx: Tensor) -> Tensor:
    """`input1` of every point minus `input2` of its neighbours.

    Args:
        input1: (n, c) features of the points.
        input2: (n', c) features of the neighbours.
        idx: (n, nsample) rows of `input2`; -1 where there is no neighbour.

    Returns:
        (n, nsample, c), zeros for missing neighbours. Differentiable in both features.

    Raises:
        ValueError: shapes that do not fit, rows outside -1 to n' - 1, tensors on several devices.
    """
    shape("input1", input1, None, None)
    shape("input2", input2, None, input1.shape[1])
    shape("idx", idx, len(input1), None)
    same_device(input1=input1, input2=input2, idx=idx)
    difference = input1.unsqueeze(1) - grouping2(input2, idx)
    return difference.masked_fill((idx < 0).unsqueeze(-1), 0)
