"""The linear layer is torch's, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.ops import backend
from pointcept_kd.ops import linear as module
from pointcept_kd.ops.linear import linear


@pytest.fixture
def calls(monkeypatch):
    """Take the fast route for any size, through a product that is exact, and count its uses."""
    seen = []

    def product(x, w, bias=None):
        for operand in (x, w):
            assert operand.is_contiguous() or operand.t().is_contiguous(), "oneDNN is lost on these"
        seen.append((x.shape, w.shape))
        return x @ w.t() if bias is None else x @ w.t() + bias

    monkeypatch.setattr(module, "_WORTHWHILE", 0)
    monkeypatch.setattr(module, "onednn_linear", lambda: product)
    return seen


@pytest.mark.parametrize(("i", "o"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients(calls, i, o, with_bias):
    x, w = torch.randn(7, i, requires_grad=True), torch.randn(o, i, requires_grad=True)
    b = torch.randn(o, requires_grad=True) if with_bias else None
    inputs = [t for t in (x, w, b) if t is not None]
    made, expected = linear(x, w, b), F.linear(x, w, b)
    assert len(calls) == 1
    assert torch.allclose(made, expected, atol=1e-6)
    grad = torch.randn_like(made)
    for ours, theirs in zip(
        torch.autograd.grad(made, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(calls) == 3


def test_slices_and_broadcast_gradients(calls):
    x, w = torch.randn(6, 9, requires_grad=True), torch.randn(5, 8, requires_grad=True)

    def both(f):
        out = f(x[::2, 2:5], w[:, 1:4], None)
        loss = torch.cat([out, out], 1).mul(
            torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
        )
        return torch.autograd.grad(loss[:, 2:9].sum() + out.sum(), (x, w))

    for ours, theirs in zip(both(linear), both(F.linear)):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(calls) == 3


def test_twice_differentiable(calls):
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    def second(f):
        first = torch.autograd.grad(f(x, w, None).pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), (x, w))

    for ours, theirs in zip(second(linear), second(F.linear)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_frozen_inputs_get_no_gradient(calls):
    x, w = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    linear(x, w).sum().backward()
    assert len(calls) == 2, "forward and the weight's gradient"
    assert x.grad is None
    x.requires_grad_()
    linear(x, w.detach()).sum().backward()
    assert torch.allclose(x.grad, w.detach().sum(0).expand(4, 3))


def test_everything_else_is_torch(calls):
    x, w = torch.randn(4, 3), torch.randn(2, 3)
    assert torch.equal(linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert not calls


def test_the_real_library_agrees():
    if backend.onednn_linear() is None:
        pytest.skip("this PyTorch has no oneDNN operator")
    for n, i, o in ((400, 96, 224), (401, 224, 96)):
        x = torch.randn(n, i, requires_grad=True)
        w, b = torch.randn(o, i, requires_grad=True), torch.randn(o, requires_grad=True)
        assert n * i * o >= module._WORTHWHILE
        made, expected = linear(x, w, b), F.linear(x, w, b)
        grad = torch.randn_like(made)
        assert torch.allclose(made, expected, rtol=1e-4, atol=1e-3)
        for ours, theirs in zip(
            torch.autograd.grad(made, (x, w, b), grad),
            torch.autograd.grad(expected, (x, w, b), grad),
        ):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-3)
