"""Segment reductions against plain loops, gradients, ties, NaN, empty segments."""

import itertools
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
    sorted_segment_max,
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


# --- runs of neighbouring rows --------------------------------------------------------------------

COUNTS = (3, 1, 0, 5, 2, 4)


def run_example(channels: int = 4, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct values in the runs of COUNTS, one of them empty."""
    g = torch.Generator().manual_seed(2)
    values = torch.randperm(sum(COUNTS) * channels, generator=g).to(dtype) - 20
    return values.view(-1, channels).requires_grad_(), torch.tensor(COUNTS)


def runs() -> list[range]:
    ends = list(itertools.accumulate(COUNTS))
    return [range(end - count, end) for end, count in zip(ends, COUNTS)]


def loop_gradient(values: torch.Tensor, grad: torch.Tensor) -> list[list[float]]:
    """Equal maxima of a run share what its maximum gets."""
    values, grad = values.detach(), grad.detach()
    out = [[0.0] * values.shape[1] for _ in values]
    for segment, rows in enumerate(runs()):
        for channel in range(values.shape[1]):
            column = {i: float(values[i, channel]) for i in rows}
            first = [i for i in rows if column[i] == max(column.values())]
            for i in first:
                out[i][channel] = float(grad[segment, channel]) / len(first)
    return out


@pytest.mark.parametrize("piece", [1, 12, 2**18])
@pytest.mark.parametrize("levels", [1000, 6, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sorted_max_against_loops(dtype, levels, piece, monkeypatch):
    """No ties, some, and nothing but ties; pieces that end inside a run."""
    monkeypatch.setattr(scatter, "_PIECE", piece)
    values, counts = run_example(dtype=dtype)
    values = (values.detach() % levels).requires_grad_()
    out = sorted_segment_max(values, counts)
    assert out.dtype == dtype
    plain = values.tolist()
    for segment, rows in enumerate(runs()):
        expected = [max((plain[i][c] for i in rows), default=0.0) for c in range(4)]
        assert out[segment].tolist() == expected
    # Sixty is a multiple of every number of ties here, so that halves are exact in every dtype.
    grad = 60 * torch.arange(1.0, 25).view(6, 4).to(dtype)
    (d_values,) = torch.autograd.grad(out, values, grad)
    assert d_values.dtype == dtype
    expected = torch.tensor(loop_gradient(values, grad), dtype=torch.float64)
    torch.testing.assert_close(d_values.double(), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(sorted_segment_max(values, counts), out)


def test_sorted_max_by_hand_with_ties():
    values = torch.tensor([[0.0, -4.0], [1.0, 5.0], [3.0, 5.0], [3.0, 2.0]], requires_grad=True)
    out = sorted_segment_max(values, torch.tensor([1, 3]))
    assert out.tolist() == [[0.0, -4.0], [3.0, 5.0]]
    out.backward(torch.tensor([[10.0, 20.0], [6.0, 8.0]]))
    assert values.grad is not None
    assert values.grad.tolist() == [[10.0, 20.0], [0.0, 4.0], [3.0, 4.0], [3.0, 0.0]]


@pytest.mark.parametrize("ties", ["none", "few", "many"])
def test_sorted_max_is_that_of_any_order(ties):
    """As `segment_max` in value and gradient, however many runs have ties; some are longer than a piece."""
    g = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 9, (700,), generator=g)
    counts[5] = 4000
    values = torch.randn(int(counts.sum()), 128, generator=g)
    if ties == "few":
        values[1:3] = values[0]
        values[int(counts[:5].sum()) :][[7, 3000], 3] = 9.0
    elif ties == "many":
        values = values.relu()
    values.requires_grad_()
    grad = torch.randn(700, 128, generator=g)
    index = torch.arange(700).repeat_interleave(counts)
    out, expected = sorted_segment_max(values, counts), segment_max(values, index, 700)
    assert torch.equal(out, expected)
    both = [torch.autograd.grad(o, values, grad)[0] for o in (out, expected)]
    torch.testing.assert_close(*both, rtol=1e-6, atol=0)


def test_sorted_max_gradcheck():
    values, counts = run_example()
    assert torch.autograd.gradcheck(lambda v: sorted_segment_max(v, counts), values)
    out = sorted_segment_max(values, counts).square().sum()
    (d_values,) = torch.autograd.grad(out, values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_values.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 300])
def test_sorted_max_passes_nan_on(dtype, channels):
    values = torch.ones(5, channels, dtype=dtype)
    values[:, 0] = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.nan])
    values.requires_grad_()
    out = sorted_segment_max(values, torch.tensor([2, 2, 1]))
    assert out[:, 0].isnan().tolist() == [True, False, True]
    out.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].isnan().tolist() == [True, True, False, False, True]
    assert values.grad[2:4, 0].tolist() == [0.0, 1.0]
    assert bool(values.grad[:, 1:].isfinite().all())


def test_sorted_max_of_infinities():
    values = torch.tensor([[torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    out = sorted_segment_max(values, torch.tensor([2]))
    assert out.tolist() == [[torch.inf, -torch.inf]]
    out.backward(torch.ones(1, 2))
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 0.5], [0.0, 0.5]]


def test_sorted_max_of_strided_values():
    """Neither the values nor the gradient need lie side by side in memory."""
    values, counts = run_example()
    flipped = values.detach().t().contiguous().t().requires_grad_()
    assert not flipped.is_contiguous()
    grad = torch.randn(1, 4, dtype=torch.float64).expand(6, 4)
    both = [
        torch.autograd.grad(sorted_segment_max(v, counts), v, grad)[0] for v in (values, flipped)
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("counts", [[], [0, 0]])
@pytest.mark.parametrize("channels", [0, 4])
def test_sorted_max_of_no_rows(counts, channels):
    values = torch.zeros(0, channels, requires_grad=True)
    out = sorted_segment_max(values, torch.tensor(counts, dtype=torch.int64))
    assert out.tolist() == [[0.0] * channels] * len(counts)
    out.sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (0, channels)


def test_sorted_max_of_bad_counts():
    for counts in ([1, 2], [5], [-1, 5], []):
        with pytest.raises(ValueError, match="counts must be 0 or more and add up to 4 rows"):
            sorted_segment_max(torch.zeros(4, 2), torch.tensor(counts, dtype=torch.int64))


@pytest.mark.cuda
@pytest.mark.parametrize("levels", [1000, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sorted_max_on_cuda(dtype, levels):
    """Values and gradient to the bit those of the CPU."""
    values, counts = run_example(dtype=dtype)
    values = values.detach() % levels
    values[4, 0] = torch.nan
    grad = 60 * torch.arange(1.0, 25).view(6, 4).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        leaf = values.to(device).requires_grad_()
        out = sorted_segment_max(leaf, counts.to(device))
        (d_leaf,) = torch.autograd.grad(out, leaf, grad.to(device))
        found += [out.detach().cpu(), d_leaf.cpu()]
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=0, equal_nan=True)
