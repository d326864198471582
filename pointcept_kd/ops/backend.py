"""The one file that asks which kernels are installed.

A backend changes speed, never meaning: every choice made here leads to the same results within rounding. Each choice
is logged once with its reason, obeys an environment variable, and fails when a forced choice is missing.

    POINTCEPT_KD_ATTENTION = auto | sdpa | flash
        auto (default): flash-attn where a network asks for it, it is installed and the tensors are on CUDA;
        PyTorch's scaled_dot_product_attention everywhere else.
    POINTCEPT_KD_PRODUCTS = auto | torch | onednn
        float32 matrix products of sparse convolutions and linear layers on CPU. auto (default): oneDNN where
        PyTorch has it, `torch.mm` everywhere else.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("pointcept_kd")


@functools.cache
def _say(line: str) -> None:
    """Log a line once per process."""
    log.info(line)


@functools.cache
def _flash_attn() -> tuple[Callable | None, str]:
    """flash-attn's packed function for sequences of several lengths, or None, and the reason."""
    try:
        module = importlib.import_module("flash_attn")
        return module.flash_attn_varlen_qkvpacked_func, "flash-attn is installed"
    except (ImportError, AttributeError, OSError) as error:
        # OSError: a wheel built for another CUDA runtime fails while its shared library is loaded.
        return None, f"flash-attn does not import ({type(error).__name__})"


def flash_attention(wanted: bool, is_cuda: bool) -> Callable | None:
    """flash-attn's function if it is to be used, else None, which means PyTorch's own attention.

    Args:
        wanted: whether the network asks for it (`enable_flash`).
        is_cuda: whether the tensors are on CUDA.

    Raises:
        ValueError: for an unknown value of POINTCEPT_KD_ATTENTION, or when `flash` is forced and cannot be had.
    """
    choice = os.environ.get("POINTCEPT_KD_ATTENTION", "auto")
    if choice not in ("auto", "sdpa", "flash"):
        raise ValueError(f"POINTCEPT_KD_ATTENTION={choice}: choose auto, sdpa or flash")
    if choice == "sdpa":
        _say("attention: PyTorch's, asked for by POINTCEPT_KD_ATTENTION")
        return None
    if choice == "auto" and not wanted:
        _say("attention: PyTorch's, the network has enable_flash=False")
        return None
    function, reason = _flash_attn()
    if function is not None and not is_cuda:
        function, reason = None, "the tensors are not on CUDA"
    if function is None and choice == "flash":
        raise ValueError(
            f"POINTCEPT_KD_ATTENTION=flash: {reason}; install the package flash-attn and run on CUDA, "
            "or use auto"
        )
    name = "flash-attn" if function else "PyTorch's"
    _say(f"attention: {name}, {reason}")
    return function


@functools.cache
def onednn_linear() -> Callable[..., Tensor] | None:
    """oneDNN's x (k, i), w (o, i), bias (o,) or None -> x @ w.T + bias for float32 on CPU, or None for `torch.mm`.

    PyTorch's own float32 products go to MKL, which leaves half of an AMD core's vector width
    unused; oneDNN, inside the same PyTorch, runs them at up to 2.3 times the speed there. PyTorch
    reaches it through an operator made for its compiler, so the operator is tried once before use.

    Raises:
        ValueError: for an unknown value of POINTCEPT_KD_PRODUCTS, or when `onednn` is forced and
            this PyTorch has no such operator.
    """
    choice = os.environ.get("POINTCEPT_KD_PRODUCTS", "auto")
    if choice not in ("auto", "torch", "onednn"):
        raise ValueError(f"POINTCEPT_KD_PRODUCTS={choice}: choose auto, torch or onednn")
    if choice == "torch":
        _say("products: torch.mm, asked for by POINTCEPT_KD_PRODUCTS")
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default

        def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return operator(x, w, bias, "none", [], "")

        with torch.no_grad():
            plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            x = torch.linspace(-1, 1, 64 * 32, **plain).view(64, 32)
            w = torch.linspace(1, -2, 16 * 32, **plain).view(16, 32)
            same = torch.allclose(linear(x, w), x @ w.t(), atol=1e-4)
            same &= torch.allclose(
                linear(x.t(), w[:, :1].expand(16, 64)), x.t().sum(1, True) * w[:, 0], atol=1e-4
            )
        reason = "oneDNN answers" if same else "oneDNN's operator gives other results"
    except (AttributeError, RuntimeError, TypeError) as error:
        same, reason = False, f"this PyTorch has no oneDNN operator ({type(error).__name__})"
    if not same and choice == "onednn":
        raise ValueError(
            f"POINTCEPT_KD_PRODUCTS=onednn: {reason}; use auto or another PyTorch build"
        )
    _say(f"products: {'oneDNN' if same else 'torch.mm'}, {reason}")
    return linear if same else None
