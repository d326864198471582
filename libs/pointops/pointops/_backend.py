"""Which of the three implementations of the searches serves a tensor."""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import _brute, _cpu


def backend(points: Tensor, k: int = 1) -> ModuleType:
    """`_cpu`, `_kernels` (CUDA, float32, Triton installed, k up to 128) or `_brute`."""
    if points.device.type == "cpu":
        return _cpu
    if points.device.type == "cuda" and points.dtype == torch.float32:
        kernels = _triton()
        if kernels is not None and k <= kernels.MOST_NEIGHBOURS:
            return kernels
    return _brute


@cache
def _triton() -> ModuleType | None:
    if os.environ.get("POINTOPS_TRITON", "1") == "0" or find_spec("triton") is None:
        return None
    from . import _kernels

    return _kernels
