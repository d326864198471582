"""Linear layers over rows, x W^T + b, on CPU through oneDNN.

PyTorch sends float32 products to MKL, which leaves half of an AMD core's vector width unused; the same products take
half the time in oneDNN (see `pointcept_kd.ops.backend.onednn_linear`). Everywhere else this is
`torch.nn.functional.linear`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .backend import onednn_linear

# Multiplications below which making a oneDNN kernel for a new number of rows costs more than it gains.
_WORTHWHILE = 8_000_000


def linear(
    x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "n o"]:
    """X W^T + b; twice differentiable, under autocast and on any device as `torch.nn.functional.linear`."""
    fast = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] * weight.numel() >= _WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
    product = onednn_linear() if fast else None
    if product is None:
        return F.linear(x, weight, bias)
    # oneDNN is thousands of times slower on rows that do not lie side by side.
    return _Linear.apply(x.contiguous(), weight.contiguous(), bias, product)


class _Linear(torch.autograd.Function):
    """All three products of a linear layer through one function product(a, b) = a b^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # Gradients are enabled in here only when this backward is itself to be differentiated.
        again = torch.is_grad_enabled()
        with torch.autocast("cpu", enabled=False):
            grad = grad.contiguous()
            d_x = d_weight = None
            if need_x:
                d_x = grad @ weight if again else ctx.product(grad, weight.t())
            if need_weight and again:
                d_weight = grad.t() @ x
            elif need_weight and weight.shape[0] > weight.shape[1]:
                # oneDNN is faster with the smaller side first.
                d_weight = ctx.product(x.t(), grad.t()).t()
            elif need_weight:
                d_weight = ctx.product(grad.t(), x.t())
            return d_x, d_weight, grad.sum(0) if need_bias else None, None
