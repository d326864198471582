"""Which library multiplies: the environment variable, and that both give the same product."""

import pytest
import torch

from pointcept_kd.ops.backend import onednn_linear


@pytest.fixture(autouse=True)
def _ask_again():
    """The choice is made once per process: forget it before and after each test."""
    onednn_linear.cache_clear()
    yield
    onednn_linear.cache_clear()


def test_torch_when_asked_for(monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", "torch")
    assert onednn_linear() is None


def test_unknown_choice(monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", "fast")
    with pytest.raises(
        ValueError, match="POINTCEPT_KD_PRODUCTS=fast: choose auto, torch or onednn"
    ):
        onednn_linear()


def test_missing_operator(monkeypatch):
    """Without the operator `auto` falls back to `torch.mm` and a forced choice says so."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", "auto")
    assert onednn_linear() is None
    onednn_linear.cache_clear()
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", "onednn")
    with pytest.raises(ValueError, match="no oneDNN operator"):
        onednn_linear()


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_products_agree(default, monkeypatch):
    monkeypatch.delenv("POINTCEPT_KD_PRODUCTS", raising=False)
    torch.set_default_dtype(default)
    try:
        linear = onednn_linear()
    finally:
        torch.set_default_dtype(torch.float32)
    if linear is None:
        pytest.skip("this PyTorch has no oneDNN operator")
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(700, 48, generator=g), torch.randn(20, 48, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, w), x @ w.t(), rtol=1e-5, atol=1e-4)
        # Sums of outer products come as transposed views.
        y = torch.randn(700, 20, generator=g)
        torch.testing.assert_close(linear(x.t(), y.t()), x.t() @ y, rtol=1e-5, atol=1e-4)
