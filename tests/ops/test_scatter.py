"""Segment reductions against plain loops, gradients, ties, NaN, empty segments."""

import math

import pytest
import torch

from pointcept_kd.ops import scatter
from pointcept_kd.ops.scatter import (
    segment_count,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
)

SIZE = 7


def rows_of(index: torch.Tensor, segment: int) -> list[int]:
    return [i for i, s in enumerate(index.tolist()) if s == segment]


def example(n: int = 23, c: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows in segments 0 .. 5 of SIZE = 7: the last one stays empty."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, c, generator=g, dtype=torch.float64)
    return values, torch.randint(0, SIZE - 1, (n,), generator=g)


def loop(values: torch.Tensor, index: torch.Tensor, reduce) -> torch.Tensor:
    out = torch.zeros(SIZE, values.shape[1], dtype=values.dtype)
    for segment in range(SIZE):
        for channel in range(values.shape[1]):
            members = [float(values[i, channel]) for i in rows_of(index, segment)]
            out[segment, channel] = reduce(members) if members else 0.0
    return out


@pytest.mark.parametrize(
    ("operation", "reduce"),
    [(segment_sum, math.fsum), (segment_max, max), (segment_mean, lambda m: math.fsum(m) / len(m))],
)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_against_loops(operation, reduce, index_type):
    values, index = example()
    out = operation(values, index.to(index_type), SIZE)
    torch.testing.assert_close(out, loop(values, index, reduce))
    assert torch.equal(out[-1], torch.zeros(3, dtype=values.dtype))


def test_count():
    _, index = example()
    assert segment_count(index, SIZE).tolist() == [len(rows_of(index, s)) for s in range(SIZE)]


def test_softmax_against_loops():
    values, index = example()
    out = segment_softmax(values, index, SIZE)
    for segment in range(SIZE):
        for channel in range(3):
            members = rows_of(index, segment)
            total = math.fsum(math.exp(values[i, channel]) for i in members)
            for i in members:
                assert float(out[i, channel]) == pytest.approx(
                    math.exp(values[i, channel]) / total, rel=1e-12
                )


def test_softmax_of_large_values_stays_finite():
    values = torch.tensor([[1e4], [1e4], [-1e4], [3e38]])
    out = segment_softmax(values, torch.tensor([0, 0, 0, 1]), 2)
    assert out.flatten().tolist() == [0.5, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_max, segment_softmax])
def test_gradcheck(operation):
    values, index = example()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: operation(v, index, SIZE), values)


def test_max_by_hand_with_ties():
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 2.0], [0.0, -4.0]], requires_grad=True)
    out = segment_max(values, torch.tensor([1, 1, 1, 0]), 3)
    assert out.tolist() == [[0.0, -4.0], [3.0, 5.0], [0.0, 0.0]]
    out.backward(torch.tensor([[10.0, 20.0], [6.0, 8.0], [99.0, 99.0]]))
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 4.0], [3.0, 4.0], [3.0, 0.0], [10.0, 20.0]]


@pytest.mark.parametrize("block", [3, 4096])
@pytest.mark.parametrize("tied", [False, True])
def test_max_gradient_against_torch(block, tied, monkeypatch):
    """As `torch.amax` over the rows of each segment, which divides the gradient among ties."""
    monkeypatch.setattr(scatter, "_BLOCK", block)
    values, index = example(n=40, c=4, seed=3)
    if tied:
        values = values.round().relu()
    values.requires_grad_()
    weights = torch.randn(SIZE, 4, dtype=values.dtype, generator=torch.Generator().manual_seed(1))
    own = segment_max(values, index, SIZE)
    (d_own,) = torch.autograd.grad((own * weights).sum(), values)
    total = sum(
        (values[index == s].amax(0) * weights[s]).sum() for s in range(SIZE) if (index == s).any()
    )
    (d_torch,) = torch.autograd.grad(total, values)
    torch.testing.assert_close(d_own, d_torch, rtol=1e-14, atol=1e-14)
    assert tied == bool(((d_own != 0) & (d_own.abs() < weights[index].abs())).any())


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_max])
def test_large_blocks_and_row_order(operation):
    """More rows than a block, in float32; shuffled rows give the same segments."""
    g = torch.Generator().manual_seed(5)
    values = torch.randn(10_000, 8, generator=g, requires_grad=True)
    index = torch.randint(0, 300, (10_000,), generator=g)
    order = torch.randperm(10_000, generator=g)
    out, shuffled = operation(values, index, 300), operation(values[order], index[order], 300)
    torch.testing.assert_close(out, shuffled)
    weights = torch.randn(300, 8, generator=g)
    (a,) = torch.autograd.grad(out, values, weights)
    (b,) = torch.autograd.grad(shuffled, values, weights)
    torch.testing.assert_close(a, b)
    if operation is segment_max:
        assert int((a != 0).sum()) == 300 * 8
        torch.testing.assert_close(torch.zeros(300, 8).index_add(0, index, a), weights)


def test_nan_is_passed_on_with_its_gradient():
    values = torch.tensor([[1.0], [float("nan")], [2.0], [3.0]], requires_grad=True)
    out = segment_max(values, torch.tensor([0, 0, 1, 1]), 3)
    assert out[0].isnan()
    assert out[1:].flatten().tolist() == [3.0, 0.0]
    out.sum().backward()
    assert values.grad is not None
    assert values.grad[:2].isnan().all()
    assert values.grad[2:].flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_max])
def test_no_rows(operation):
    values = torch.zeros(0, 4, requires_grad=True)
    out = operation(values, torch.zeros(0, dtype=torch.int64), 3)
    assert out.tolist() == [[0.0] * 4] * 3
    out.sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (0, 4)
    assert segment_softmax(values, torch.zeros(0, dtype=torch.int64), 3).shape == (0, 4)


def test_bad_segment_numbers():
    values = torch.zeros(2, 1)
    for index in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        for operation in (segment_sum, segment_mean, segment_max, segment_softmax):
            with pytest.raises(ValueError, match=r"segment numbers must lie in 0 .. 2"):
                operation(values, index, 3)
        with pytest.raises(ValueError, match="segment numbers"):
            segment_count(index, 3)
