"""Sparse convolution against dense convolution and plain loops, and its contract."""

import itertools
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.ops import backend
from pointcept_kd.ops import tap_convolution as taps
from pointcept_kd.ops.grid import CellKeys, unique_cells
from pointcept_kd.ops.kernel_map import KernelMap
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
    inverse_conv,
    strided_conv,
    submanifold_conv,
)
from pointcept_kd.ops.tap_convolution import tap_convolution

SHAPE = (7, 8, 6)


def scene(seed: int = 0, channels: int = 3, density: float = 0.3) -> SparseConvTensor:
    """Two scans of random cells that reach every border, rows shuffled, float64."""
    g = torch.Generator().manual_seed(seed)
    indices = (torch.rand(2, *SHAPE, generator=g) < density).nonzero()
    indices = indices[torch.randperm(len(indices), generator=g)]
    features = torch.randn(len(indices), channels, generator=g, dtype=torch.float64)
    return SparseConvTensor(features.requires_grad_(), indices, SHAPE, 2)


def random_weight(out: int, kernel: tuple[int, int, int], inputs: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, *kernel, inputs, generator=g, dtype=torch.float64)
    return weight.requires_grad_()


def at(dense: Tensor, indices: Tensor) -> Tensor:
    b, x, y, z = indices.long().unbind(1)
    return dense[b, :, x, y, z]


def assert_same_with_gradients(sparse: Tensor, dense: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    g = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(2))
    for got, expected in zip(
        torch.autograd.grad(sparse, inputs, g), torch.autograd.grad(dense, inputs, g)
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def loop_submanifold(x: SparseConvTensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """The definition, one row and tap at a time."""
    rows: dict[tuple[int, ...], int] = {}
    for row, cell in enumerate(x.indices.tolist()):
        rows.setdefault(tuple(cell), row)
    kernel = weight.shape[1:4]
    out = torch.zeros(len(x.indices), weight.shape[0], dtype=weight.dtype)
    for row, (b, *cell) in enumerate(x.indices.tolist()):
        for tap in itertools.product(*(range(k) for k in kernel)):
            step = [(t - k // 2) * dilation for t, k in zip(tap, kernel)]
            source = rows.get((b, *(c + s for c, s in zip(cell, step))))
            if step == [0, 0, 0]:
                source = row
            if source is not None:
                out[row] += weight[(slice(None), *tap)] @ x.features[source]
    return out


def loop_strided(x, weight, stride, padding, shape) -> dict[tuple[int, ...], Tensor]:
    """Output cell to value, by the definition o * stride + tap - padding = cell."""
    out: dict[tuple[int, ...], Tensor] = {}
    for row, (b, *cell) in enumerate(x.indices.tolist()):
        for tap in itertools.product(*(range(k) for k in weight.shape[1:4])):
            place = [c + p - t for c, p, t in zip(cell, padding, tap)]
            if any(v % s for v, s in zip(place, stride)):
                continue
            o = tuple(v // s for v, s in zip(place, stride))
            if shape is not None and any(not 0 <= v < n for v, n in zip(o, shape)):
                continue
            value = weight[(slice(None), *tap)] @ x.features[row]
            out[(b, *o)] = out.get((b, *o), 0) + value
    return out


# --- submanifold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "dilation"),
    [
        ((3, 3, 3), 1),
        ((5, 5, 5), 1),
        ((1, 3, 3), 1),
        ((3, 1, 1), 1),
        ((3, 1, 5), 1),
        ((3, 3, 3), 2),
    ],
)
def test_submanifold_equals_dense(kernel, dilation):
    x, weight = scene(), random_weight(4, kernel, 3)
    y = submanifold_conv(x, weight, None, dilation)
    assert y.indices is x.indices
    padding = [k // 2 * dilation for k in kernel]
    dense = F.conv3d(x.dense(), weight.permute(0, 4, 1, 2, 3), padding=padding, dilation=dilation)
    assert_same_with_gradients(y.features, at(dense, x.indices), [x.features, weight])


@pytest.mark.parametrize("dilation", [1, 2])
def test_submanifold_equals_loops(dilation):
    x, weight = scene(3), random_weight(2, (3, 3, 3), 3)
    y = submanifold_conv(x, weight, None, dilation)
    expected = loop_submanifold(x, weight, dilation)
    torch.testing.assert_close(y.features, expected, rtol=0, atol=1e-12)


def test_submanifold_by_hand():
    """Three cells in a row along z, kernel (1, 1, 3) with weights 1, 10, 100 for z - 1, z, z + 1."""
    indices = torch.tensor([[0, 5, 5, 2], [0, 5, 5, 0], [0, 5, 5, 1]])
    x = SparseConvTensor(torch.tensor([[3.0], [1.0], [2.0]]), indices, (9, 9, 9), 1)
    weight = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3, 1)
    y = submanifold_conv(x, weight)
    # z=2: 1*2 + 10*3; z=0: 10*1 + 100*2; z=1: 1*1 + 10*2 + 100*3
    assert y.features.flatten().tolist() == [32.0, 210.0, 321.0]


def test_cells_do_not_wrap_around():
    """Cells at opposite ends of neighbouring columns or scans are no neighbours."""
    indices = torch.tensor([[0, 0, 0, 5], [0, 0, 1, 0], [0, 3, 1, 5], [1, 0, 0, 0]])
    x = SparseConvTensor(torch.eye(4), indices, (4, 2, 6), 2)
    y = submanifold_conv(x, torch.ones(4, 3, 3, 3, 4))
    assert torch.equal(y.features, torch.ones(4, 4))


def test_one_by_one_kernel_is_linear():
    x, weight = scene(), random_weight(4, (1, 1, 1), 3)
    bias = torch.randn(4, dtype=torch.float64)
    y = submanifold_conv(x, weight, bias)
    torch.testing.assert_close(y.features, x.features @ weight.view(4, 3).t() + bias)


def test_one_by_one_layer_reads_its_numbers_as_spconv_does():
    """The memory of the weight is a matrix (in, out), whatever its shape says."""
    x, conv = scene(), SubMConv3d(3, 4, 1).double()
    assert conv.weight.shape == (4, 1, 1, 1, 3)
    matrix = conv.weight.detach().reshape(-1).view(3, 4)
    torch.testing.assert_close(conv(x).features, x.features @ matrix + conv.bias)


def test_rows_and_place_do_not_matter():
    """Shuffled rows give shuffled results; a shift, also below zero, changes nothing."""
    x, weight = scene(), random_weight(4, (3, 3, 3), 3)
    y = submanifold_conv(x, weight).features
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(4))
    shuffled = SparseConvTensor(x.features[order], x.indices[order], SHAPE, 2)
    torch.testing.assert_close(submanifold_conv(shuffled, weight).features, y[order])
    shift = torch.tensor([0, -100, 5, -3])
    moved = SparseConvTensor(x.features, (x.indices + shift).int(), None, 2)
    assert torch.equal(submanifold_conv(moved, weight).features, y)


def test_duplicate_cells():
    """The centre reads the row itself, other taps the lowest row of the neighbouring cell."""
    x = scene(5)
    again = torch.randint(0, len(x.indices), (40,), generator=torch.Generator().manual_seed(6))
    indices = torch.cat((x.indices, x.indices[again]))
    features = torch.randn(len(indices), 3, dtype=torch.float64, requires_grad=True)
    x = SparseConvTensor(features, indices, SHAPE, 2)
    weight = random_weight(4, (3, 3, 3), 3)
    y = submanifold_conv(x, weight)
    assert_same_with_gradients(y.features, loop_submanifold(x, weight), [features, weight])
    # Strided: every row adds its share, as `dense` adds duplicates. Inverse: every row receives.
    down = random_weight(4, (2, 2, 2), 3)
    coarse = strided_conv(x, down, None, 2, 0, "down")
    dense = F.conv3d(x.dense(), down.permute(0, 4, 1, 2, 3), stride=2)
    assert_same_with_gradients(coarse.dense(), dense, [features, down])
    up = random_weight(3, (2, 2, 2), 4)
    fine = inverse_conv(coarse, up, None, "down").features
    assert torch.equal(fine[-40:], fine[again])


# --- strided and inverse --------------------------------------------------------------------------

STRIDED = [
    ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (3, 3, 3), (0, 0, 0)),
    ((2, 3, 1), (2, 1, 1), (0, 1, 0)),
    ((2, 2, 2), (3, 3, 3), (0, 0, 0)),
    ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding"), STRIDED)
def test_strided_equals_dense(kernel, stride, padding):
    x, weight = scene(), random_weight(4, kernel, 3)
    y = strided_conv(x, weight, None, stride, padding)
    dense = F.conv3d(x.dense(), weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
    assert y.spatial_shape == dense.shape[2:]
    assert_same_with_gradients(y.dense(), dense, [x.features, weight])


@pytest.mark.parametrize(("kernel", "stride", "padding"), STRIDED)
@pytest.mark.parametrize("bounded", [True, False])
def test_strided_equals_loops(kernel, stride, padding, bounded):
    x, weight = scene(7), random_weight(2, kernel, 3)
    if not bounded:
        shift = torch.tensor([0, -20, 0, 3])
        x = SparseConvTensor(x.features, x.indices + shift, None, 2)
    y = strided_conv(x, weight, None, stride, padding)
    expected = loop_strided(x, weight, stride, padding, y.spatial_shape)
    assert [tuple(c) for c in y.indices.tolist()] == sorted(expected)
    values = torch.stack([expected[c] for c in sorted(expected)])
    torch.testing.assert_close(y.features, values, rtol=0, atol=1e-12)


def test_stride_equal_to_kernel_by_hand():
    """Output cell floor(p / 2), tap p mod 2, also below zero."""
    indices = torch.tensor([[0, -1, 0, 0], [0, 1, 1, 0], [0, -2, 0, 1]])
    x = SparseConvTensor(torch.tensor([[1.0], [10.0], [100.0]]), indices, None, 1)
    weight = torch.arange(1.0, 9.0).view(1, 2, 2, 2, 1)
    y = strided_conv(x, weight, None, 2, 0, "down")
    assert y.indices.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0]]
    # taps (1,0,0) -> weight 5 and (0,0,1) -> weight 2; (1,1,0) -> weight 7
    assert y.features.flatten().tolist() == [5 * 1.0 + 2 * 100.0, 7 * 10.0]
    z = inverse_conv(y, weight, None, "down")
    assert z.features.flatten().tolist() == [5 * 205.0, 7 * 70.0, 2 * 205.0]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((2, 2, 2), 2, 0), ((3, 3, 3), 2, 1), ((3, 3, 3), 1, 1)]
)
def test_inverse_equals_dense(kernel, stride, padding):
    x, down, up = scene(), random_weight(4, kernel, 3), random_weight(5, kernel, 4, seed=8)
    coarse = strided_conv(x, down, None, stride, padding, "down")
    fine = inverse_conv(coarse, up, None, "down")
    assert fine.indices is x.indices
    assert fine.spatial_shape == SHAPE
    grid = F.conv3d(x.dense(), down.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
    # Zeros behind the last coarse cell make the transposed convolution reach every fine cell.
    dense = F.conv_transpose3d(
        F.pad(grid, (0, 1, 0, 1, 0, 1)), up.permute(4, 0, 1, 2, 3), stride=stride, padding=padding
    )[:, :, : SHAPE[0], : SHAPE[1], : SHAPE[2]]
    assert dense.shape[2:] == SHAPE
    assert_same_with_gradients(fine.features, at(dense, x.indices), [x.features, down, up])


def test_map_of_a_name_is_kept_and_guarded():
    x, weight = scene(), random_weight(3, (2, 2, 2), 3)
    first = strided_conv(x, weight, None, 2, 0, "down")
    again = strided_conv(x.replace_feature(x.features * 2), weight, None, 2, 0, "down")
    assert again.indices is first.indices
    with pytest.raises(ValueError, match="'down' already names"):
        strided_conv(first, weight, None, 2, 0, "down")
    with pytest.raises(ValueError, match="'down' already names"):
        strided_conv(x, weight, None, 1, 0, "down")
    with pytest.raises(
        ValueError, match="no strided convolution ran under indice_key 'up'; known: down"
    ):
        inverse_conv(first, weight, None, "up")
    with pytest.raises(ValueError, match=r"'down' needs its kernel \(2, 2, 2\); got \(3, 3, 3\)"):
        inverse_conv(first, random_weight(3, (3, 3, 3), 3), None, "down")
    with pytest.raises(ValueError, match="not on its output cells"):
        inverse_conv(x, weight, None, "down")


# --- engine ---------------------------------------------------------------------------------------


def test_kernel_maps_are_shared():
    x, weight = scene(), random_weight(3, (3, 3, 3), 3)
    y = submanifold_conv(x, weight)
    kept = x._cells.submanifold((3, 3, 3), (1, 1, 1))
    assert y._cells.submanifold((3, 3, 3), (1, 1, 1)) is kept
    assert y.replace_feature(y.features)._cells is x._cells


@pytest.mark.parametrize("centre", [-1, 1])
def test_gradcheck(centre):
    """A map with an empty tap, with and without a centre; gradients asked for one at a time."""
    src, dst = torch.tensor([0, 2, 1, 3]), torch.tensor([1, 0, 2, 2])
    pairs = KernelMap(src, dst, (2, 0, 2), 4, 4, centre)
    features = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    weight, bias = random_weight(3, (1, 1, 3), 2), torch.randn(3, dtype=torch.float64)
    for need in itertools.product((True, False), repeat=3):
        if any(need):
            inputs = [
                t.detach().clone().requires_grad_(n) for t, n in zip((features, weight, bias), need)
            ]
            assert torch.autograd.gradcheck(lambda f, w, b: tap_convolution(f, w, b, pairs), inputs)


def cloud(n: int, channels: int) -> SparseConvTensor:
    """Up to n cells on a wavy sheet, float32, with some 8 neighbours each."""
    g = torch.Generator().manual_seed(10)
    xy = torch.randint(0, int((0.5 * n) ** 0.5), (n, 2), generator=g)
    z = (6 * torch.sin(xy[:, 0] / 30) + 6 * torch.cos(xy[:, 1] / 20)).long()
    batch = torch.zeros(n, dtype=torch.int64)
    cells = torch.cat((xy, z.unsqueeze(1)), dim=1)
    grid = CellKeys.fit(batch, cells)
    batch, cells = grid.unpack(unique_cells(grid.pack(batch, cells))[0])
    indices = torch.cat((batch.unsqueeze(1), cells), dim=1)
    features = torch.randn(len(indices), channels, generator=g)
    return SparseConvTensor(features.requires_grad_(), indices, None, 1)


def run(x: SparseConvTensor, weight: Tensor) -> list[Tensor]:
    """Result and both gradients."""
    y = submanifold_conv(x, weight).features
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(11)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x.features, weight), g)]


def in_double(x: SparseConvTensor, weight: Tensor) -> list[Tensor]:
    features = x.features.detach().double().requires_grad_()
    return run(x.replace_feature(features), weight.detach().double().requires_grad_())


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 16), (32, 32), (96, 128)])
@pytest.mark.parametrize("products", ["auto", "torch"])
def test_blocks_in_float32(inputs, outputs, products, monkeypatch):
    """Every route of the products against float64, which takes none of them."""
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", products)
    monkeypatch.setattr(taps, "_BLOCK", 1024)
    backend.onednn_linear.cache_clear()
    try:
        x = cloud(5_000, inputs)
        counts = x._cells.submanifold((3, 3, 3), (1, 1, 1)).counts
        assert max(counts) > 1024 > 256 > min(c for c in counts if c)
        weight = random_weight(outputs, (3, 3, 3), inputs).detach().float().requires_grad_()
        for got, expected in zip(run(x, weight), in_double(x, weight)):
            error = (got - expected).abs().max() / expected.abs().max()
            assert error < 5e-6
    finally:
        backend.onednn_linear.cache_clear()


def test_repeatable_and_equal_at_any_number_of_threads():
    x = cloud(5_000, 32)
    weight = random_weight(32, (3, 3, 3), 32).detach().float().requires_grad_()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(x, weight))
            for first, second in zip(results[-1], run(x, weight)):
                assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0]):
            torch.testing.assert_close(
                got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )


def test_autocast_computes_in_float32():
    x = cloud(300, 8)
    conv = SubMConv3d(8, 8, 3)
    plain = conv(x).features
    plain.sum().backward()
    assert conv.weight.grad is not None
    expected = conv.weight.grad.clone()
    conv.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x).features
        y.sum().backward()
        from_half = conv(x.replace_feature(x.features.bfloat16())).features
        linear = SubMConv3d(8, 8, 1)(x).features
    assert y.dtype == from_half.dtype == linear.dtype == torch.float32
    assert torch.equal(y, plain)
    assert torch.equal(conv.weight.grad, expected)
    torch.testing.assert_close(from_half, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_cell_and_one_cell(rows):
    indices = torch.tensor([[0, 4, 5, 6]])[:rows]
    features = torch.ones(rows, 2, requires_grad=True)
    net = SparseSequential(
        SubMConv3d(2, 3, 3),
        SparseConv3d(3, 4, 2, 2, indice_key="a"),
        SparseConv3d(4, 4, 3, 2, 1, indice_key="b"),
        SparseInverseConv3d(4, 4, 3, "b"),
        SparseInverseConv3d(4, 5, 2, "a"),
    )
    y = net(SparseConvTensor(features, indices, (16, 16, 16), 1))
    assert y.features.shape == (rows, 5)
    assert torch.equal(y.indices, indices)
    y.features.sum().backward()
    assert features.grad is not None
    assert all(p.grad is not None for p in net.parameters())
    assert bool(features.grad.abs().sum() > 0) == bool(rows)


def samples() -> Path:
    root = Path(__file__).parents[2]
    return Path(os.environ.get("POINTCEPT_KD_SAMPLES", root.parent / "shared" / "data"))


def test_real_scan_against_one_tap_at_a_time():
    """A real scan at 20 cm, neighbours found by a dictionary, 3 x 3 x 3, float32."""
    scan = samples() / "semantickitti/dataset/sequences/00/velodyne/000000.bin"
    if not scan.exists():
        pytest.skip(f"no sample scan at {scan}; set POINTCEPT_KD_SAMPLES")
    points = np.fromfile(scan, dtype=np.float32).reshape(-1, 4)[:, :3]
    points = points[np.abs(points).max(axis=1) < 15]
    cells = np.unique(np.floor(points / 0.2).astype(np.int64), axis=0)
    indices = torch.from_numpy(np.insert(cells, 0, 0, axis=1))
    g = torch.Generator().manual_seed(12)
    features = torch.randn(len(cells), 8, generator=g)
    weight = torch.randn(8, 3, 3, 3, 8, generator=g)
    y = submanifold_conv(SparseConvTensor(features, indices, None, 1), weight).features
    rows = {tuple(c): i for i, c in enumerate(cells.tolist())}
    expected = torch.zeros(len(cells), 8, dtype=torch.float64)
    for tap in itertools.product(range(3), repeat=3):
        met = [rows.get(tuple(c)) for c in (cells + np.array(tap) - 1).tolist()]
        out = torch.tensor([i for i, m in enumerate(met) if m is not None])
        source = torch.tensor([m for m in met if m is not None])
        expected[out] += features[source].double() @ weight[(slice(None), *tap)].double().t()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


# --- modules --------------------------------------------------------------------------------------


def test_parameters_and_their_range():
    torch.manual_seed(0)
    for conv, shape in (
        (SubMConv3d(20, 30, (1, 3, 5)), (30, 1, 3, 5, 20)),
        (SparseConv3d(20, 30, 2, 2), (30, 2, 2, 2, 20)),
        (SparseInverseConv3d(20, 30, 2, "a"), (30, 2, 2, 2, 20)),
    ):
        assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
            "weight": shape,
            "bias": (30,),
        }
        bound = 1 / (20 * shape[1] * shape[2] * shape[3]) ** 0.5
        assert 0.98 * bound < float(conv.weight.detach().abs().max()) <= bound
        assert 0.5 * bound < float(conv.bias.detach().abs().max()) <= bound
        assert isinstance(conv, SparseModule)
    assert list(SubMConv3d(2, 2, 3, bias=False).state_dict()) == ["weight"]


def test_bias_is_added_to_every_row():
    x = scene(channels=2)
    conv = SubMConv3d(2, 3, 3, indice_key="a", padding=1).double()
    without = submanifold_conv(x, conv.weight).features
    torch.testing.assert_close(conv(x).features, without + conv.bias)
    assert "kernel_size=(3, 3, 3)" in repr(conv)


def test_sequential_mixes_sparse_and_plain_modules():
    x = scene(channels=2)
    parts = OrderedDict(conv=SubMConv3d(2, 4, 3), norm=nn.BatchNorm1d(4), act=nn.ReLU())
    net = SparseSequential(parts).double()
    expected = net.act(net.norm(net.conv(x).features))
    assert torch.equal(net(x).features, expected)
    assert isinstance(net, SparseModule)
    assert set(net.state_dict()) >= {"conv.weight", "norm.running_mean"}
    nested = SparseSequential(SparseSequential(nn.ReLU()), SubMConv3d(2, 2, 1)).double()
    assert "1.weight" in nested.state_dict()
    assert nested(x).features.shape == (len(x.indices), 2)


def test_bad_input():
    indices = torch.zeros(3, 4, dtype=torch.int64)
    features = torch.zeros(3, 2)
    for wrong in (indices[:, :3], indices[0]):
        with pytest.raises(ValueError, match=r"indices must have the shape \(n, 4\)"):
            SparseConvTensor(features, wrong, None, 1)
    with pytest.raises(ValueError, match="indices must be integers"):
        SparseConvTensor(features, indices.float(), None, 1)
    with pytest.raises(ValueError, match=r"features must have the shape \(3, channels\)"):
        SparseConvTensor(features[:2], indices, None, 1)
    with pytest.raises(ValueError, match="spatial_shape must be"):
        SparseConvTensor(features, indices, (4, 4), 1)
    x = SparseConvTensor(features, indices, (4, 4, 4), 1)
    with pytest.raises(ValueError, match=r"features must have the shape \(3, channels\)"):
        x.replace_feature(features[:1])
    with pytest.raises(ValueError, match="takes 5 channels; the tensor has 2"):
        SubMConv3d(5, 5, 3)(x)
    with pytest.raises(ValueError, match="must be odd"):
        SubMConv3d(2, 2, (3, 2, 3))
    with pytest.raises(ValueError, match="must be odd"):
        submanifold_conv(x, torch.zeros(2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="kernel_size must be one or three whole numbers"):
        SubMConv3d(2, 2, (3, 3))
    with pytest.raises(ValueError, match="stride 1; got 2"):
        SubMConv3d(2, 2, 3, stride=2)
    with pytest.raises(ValueError, match="stride must be"):
        SparseConv3d(2, 2, 2, 0)
    with pytest.raises(ValueError, match="weight must be"):
        submanifold_conv(x, torch.zeros(2, 3, 3, 2))
    with pytest.raises(ValueError, match="does not fit into spatial_shape"):
        SparseConv3d(2, 2, 5, 1)(x)
    other = SparseConvTensor(features, indices + torch.tensor([2, 0, 0, 0]), (4, 4, 4), 2)
    for conv in (SubMConv3d(2, 2, 3), SparseConv3d(2, 2, 2, 2), SparseConv3d(2, 2, 3, 2)):
        with pytest.raises(ValueError, match="scan 2 but batch_size is 2"):
            conv(other)


def test_dense_needs_bounds():
    features, indices = torch.ones(1, 1), torch.tensor([[0, 0, 0, 5]])
    with pytest.raises(ValueError, match="unbounded"):
        SparseConvTensor(features, indices, None, 1).dense()
    with pytest.raises(ValueError, match="cells inside spatial_shape"):
        SparseConvTensor(features, indices, (4, 4, 4), 1).dense()
