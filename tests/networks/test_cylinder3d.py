"""Cylinder3D: counts, keys, grids of the levels, a forward by dense convolutions and loops, batches, small scans."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.distillers.taps import Taps
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks.cylinder3d import (
    PARTITION,
    AsymmetricUNet,
    Cylinder3D,
    block_kernels,
)
from pointcept_kd.networks.voxels import VoxelSegmentor, build_partition
from pointcept_kd.ops.kernel_map import Cells, KernelMap
from pointcept_kd.ops.sparse import SparseConvTensor, submanifold_conv

from .clouds import only

GRID = {"low": (0.0, -3.1415926, -4.0), "high": (50.0, 3.1415926, 2.0), "shape": (12, 10, 8)}
SMALL = {
    "num_classes": 5,
    "partition": GRID,
    "voxel_channels": 3,
    "width": 2,
    "point_channels": (6, 7, 8),
}
STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))
SPARSE = "cylinder_3d_spconv_seg."
# The distilled tensors and the other levels, in the order in which they come about.
TAPS = {
    "d1": "resBlock2.pool",
    "d2": "resBlock3.pool",
    "d3": "resBlock4.pool",
    "d4": "resBlock5.pool",
    "u4": "upBlock0",
    "u3": "upBlock1",
    "u2": "upBlock2",
    "u1": "upBlock3",
    "u0": "ReconNet",
    "logits": "logits",
}


def randomise(network, seed=0):
    """Weights that show in the result, and norms that are not the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.dim() == 5:
                value.normal_(std=(value[0].numel() / 4) ** -0.5, generator=g)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=g)
            elif name.endswith("running_mean") or name.endswith("bias"):
                value.normal_(std=0.1, generator=g)
            elif value.dim() == 1:
                value.uniform_(0.5, 1.5, generator=g)
    return network


def small(**changes):
    torch.manual_seed(0)
    network = randomise(Cylinder3D(**{**SMALL, **changes})).eval()
    # Metres vary more than what random weights would make of them.
    network.cylinder_3d_generator.PPmodel[0].running_var.fill_(100.0)
    return network


def points(counts, seed=0):
    """A batch of scans; `feat` is coordinates and intensity."""
    g = torch.Generator().manual_seed(seed)
    n = sum(counts)
    coord = torch.randn(n, 3, generator=g) * torch.tensor([15.0, 15.0, 1.5])
    return {
        "coord": coord,
        "feat": torch.cat((coord, torch.rand(n, 1, generator=g)), dim=1),
        "segment": torch.randint(-1, 4, (n,), generator=g),
        "offset": torch.tensor(counts).cumsum(0),
    }


def assert_near(found, expected, tolerance):
    """Equal up to a part of the largest value."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max()))
    )


def voxels(count, channels, shape=(12, 10, 8), scans=2, seed=0, dtype=torch.float64):
    """Sorted cells (scan, r, p, z), half of them in one corner so that there are neighbours, and features."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.tensor([scans, *(s // 2 for s in shape)])
    outer = torch.tensor([scans, *shape])
    high = torch.where(torch.arange(count)[:, None] % 2 == 0, inner, outer)
    cells = torch.unique((torch.rand(count, 4, generator=g) * high).long(), dim=0)
    return cells, torch.randn(len(cells), channels, generator=g, dtype=dtype)


# -------------------------------------------------------------------------- oracle: wiring and convolutions by loops


class Level:
    """Occupied cells of one resolution: a list, and the row of every cell."""

    def __init__(self, cells, shape):
        self.cells = [tuple(c) for c in cells]
        self.shape = shape
        self.row = {c: i for i, c in enumerate(self.cells)}

    def coarser(self, stride):
        shape = tuple((n + 2 - 3) // s + 1 for n, s in zip(self.shape, stride))
        found = set()
        for b, *cell in self.cells:
            axes = []
            for c, s, n in zip(cell, stride, shape):
                axes.append([o for o in range(n) for t in range(3) if o * s + t - 1 == c])
            found |= {(b, *o) for o in itertools.product(*axes)}
        return Level(sorted(found), shape)


def taps_of(kernel):
    return list(itertools.product(*map(range, kernel)))


def loop_strided(fine, coarse, stride, weight, x):
    """weight (out, 3, 3, 3, in), x rows of `fine`."""
    out = x.new_zeros(len(coarse.cells), len(weight))
    for (b, *o), tap in itertools.product(coarse.cells, taps_of((3, 3, 3))):
        source = (b, *(i * s + t - 1 for i, s, t in zip(o, stride, tap)))
        if source in fine.row:
            out[coarse.row[(b, *o)]] += weight[:, tap[0], tap[1], tap[2]] @ x[fine.row[source]]
    return out


def loop_inverse(fine, coarse, stride, weight, x):
    """The same pairs the other way round, x rows of `coarse`."""
    out = x.new_zeros(len(fine.cells), len(weight))
    for (b, *o), tap in itertools.product(coarse.cells, taps_of((3, 3, 3))):
        place = (b, *(i * s + t - 1 for i, s, t in zip(o, stride, tap)))
        if place in fine.row:
            out[fine.row[place]] += weight[:, tap[0], tap[1], tap[2]] @ x[coarse.row[(b, *o)]]
    return out


def dense_submanifold(level, weight, bias, x):
    """Dense convolution, read at the occupied cells; weight (out, kr, kp, kz, in)."""
    at = torch.tensor(level.cells)
    b, r, p, z = at.unbind(1)
    grid = x.new_zeros(int(b.max()) + 1, *level.shape, x.shape[1])
    grid[b, r, p, z] = x
    padding = [k // 2 for k in weight.shape[1:4]]
    dense = F.conv3d(
        grid.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), bias, padding=padding
    )
    return dense.permute(0, 2, 3, 4, 1)[b, r, p, z]


def emulate(weights, cells, shape, x, submanifold=dense_submanifold, without=()):
    """Every level of the sparse part in evaluation, rows by name.

    weights: entries of the sparse part in this package's layout for `pool` and `up_subm`, in the layout of
    `submanifold(level, key, x)` or, by default, this package's for the others; without: norms to leave out.
    """
    levels = [Level(cells.tolist(), shape)]
    for stride in STRIDES:
        levels.append(levels[-1].coarser(stride))

    def conv(key, level, x):
        if submanifold is dense_submanifold:
            return submanifold(
                levels[level], weights[key + ".weight"], weights.get(key + ".bias"), x
            )
        return submanifold(levels[level], key, x)

    def norm(key, x):
        if key in without:
            return x
        mean, var = weights[key + ".running_mean"], weights[key + ".running_var"]
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * weights[key + ".weight"] + weights[key + ".bias"]

    def step(block, conv_name, norm_name, level, x):
        x = conv(f"{block}.{conv_name}", level, x)
        return norm(f"{block}.{norm_name}", torch.where(x > 0, x, 0.01 * x))

    def branches(block, level, x):
        a = step(block, "conv1_2", "bn0_2", level, step(block, "conv1", "bn0", level, x))
        b = step(block, "conv3", "bn2", level, step(block, "conv2", "bn1", level, x))
        return a + b

    out, skips = {}, []
    x = branches("downCntx", 0, x)
    for i, stride in enumerate(STRIDES):
        skips.append(branches(f"resBlock{i + 2}", i, x))
        weight = weights[f"resBlock{i + 2}.pool.weight"]
        x = out[f"d{i + 1}"] = loop_strided(levels[i], levels[i + 1], stride, weight, skips[i])
    for i in range(4):
        fine, block = 3 - i, f"upBlock{i}"
        x = step(block, "trans_dilao", "trans_bn", fine + 1, x)
        weight = weights[f"{block}.up_subm.weight"]
        x = loop_inverse(levels[fine], levels[fine + 1], STRIDES[fine], weight, x) + skips[fine]
        for number in (1, 2, 3):
            x = step(block, f"conv{number}", f"bn{number}", fine, x)
        out[f"u{4 - i}"] = x
    gates = 0
    for leaf, bn in (("conv1", "bn0"), ("conv1_2", "bn0_2"), ("conv1_3", "bn0_3")):
        gates = gates + torch.sigmoid(norm(f"ReconNet.{bn}", conv(f"ReconNet.{leaf}", 0, x)))
    out["u0"] = gates * x
    out["logits"] = conv("logits", 0, torch.cat((out["u0"], x), dim=1))
    return out


# ---------------------------------------------------------------------------------------------- counts, keys, shapes


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 55_853_366),
        ({"kernel_mode": "as_released"}, 49_586_486),
        ({"width": 16}, 14_071_542),
        ({"voxel_channels": 32}, 55_866_694),
        ({"voxel_channels": 48, "width": 48}, 125_494_166),
    ],
)
def test_parameters(changes, count):
    with torch.device("meta"):
        network = Cylinder3D(**changes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(network.state_dict()) == 274


def test_parameters_by_part():
    with torch.device("meta"):
        network = Cylinder3D()
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in network.cylinder_3d_spconv_seg.named_children()
    }
    assert counts == {
        "downCntx": 27_904,
        "resBlock2": 221_696,
        "resBlock3": 885_760,
        "resBlock4": 3_540_992,
        "resBlock5": 14_159_872,
        "upBlock0": 25_956_352,
        "upBlock1": 8_259_584,
        "upBlock2": 2_065_408,
        "upBlock3": 516_608,
        "ReconNet": 37_248,
        "logits": 69_140,
    }
    assert sum(p.numel() for p in network.cylinder_3d_generator.parameters()) == 112_802


def keys():
    """The entries of the published program."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    generator = "cylinder_3d_generator."
    names = {f"{generator}PPmodel.{i}.{leaf}" for i in (0, 2, 5, 8) for leaf in norm}
    linear = [*(f"PPmodel.{i}" for i in (1, 4, 7, 10)), "fea_compression.0"]
    names |= {f"{generator}{i}.{leaf}" for i in linear for leaf in ("weight", "bias")}
    branches = ("conv1", "conv1_2", "conv2", "conv3"), ("bn0", "bn0_2", "bn1", "bn2")
    up = ("trans_dilao", "up_subm", "conv1", "conv2", "conv3"), ("trans_bn", "bn1", "bn2", "bn3")
    blocks = {"downCntx": branches, **{f"upBlock{i}": up for i in range(4)}}
    blocks["ReconNet"] = ("conv1", "conv1_2", "conv1_3"), ("bn0", "bn0_2", "bn0_3")
    for i in range(2, 6):
        blocks[f"resBlock{i}"] = (*branches[0], "pool"), branches[1]
    for block, (convs, norms) in blocks.items():
        names |= {f"{SPARSE}{block}.{conv}.weight" for conv in convs}
        names |= {f"{SPARSE}{block}.{bn}.{leaf}" for bn in norms for leaf in norm}
    return names | {f"{SPARSE}logits.weight", f"{SPARSE}logits.bias"}


@pytest.mark.parametrize("mode", ["intended", "as_released"])
def test_keys_and_kernels(mode):
    weights = small(kernel_mode=mode).state_dict()
    assert set(weights) == keys()
    intended = {
        "downCntx": {
            "conv1": (1, 3, 3),
            "conv1_2": (3, 1, 3),
            "conv2": (3, 1, 3),
            "conv3": (1, 3, 3),
        },
        "resBlock4": {
            "conv1": (3, 1, 3),
            "conv1_2": (1, 3, 3),
            "conv2": (1, 3, 3),
            "conv3": (3, 1, 3),
        },
        "upBlock1": {"conv1": (1, 3, 3), "conv2": (3, 1, 3), "conv3": (3, 3, 3)},
        "ReconNet": {"conv1": (3, 1, 1), "conv1_2": (1, 3, 1), "conv1_3": (1, 1, 3)},
    }
    released = {
        "downCntx": (1, 3, 3),
        "resBlock4": (3, 1, 3),
        "upBlock1": (1, 3, 3),
        "ReconNet": (3, 1, 1),
    }
    for block, kernels in intended.items():
        for leaf, kernel in kernels.items():
            expected = kernel if mode == "intended" else released[block]
            assert weights[f"{SPARSE}{block}.{leaf}.weight"].shape[1:4] == expected
    for own in ("resBlock2.pool", "upBlock3.trans_dilao", "upBlock0.up_subm", "logits"):
        assert weights[f"{SPARSE}{own}.weight"].shape[1:4] == (3, 3, 3)
    assert block_kernels("logits", mode) == {}


def test_norms_keep_the_defaults():
    for module in Cylinder3D(**SMALL).modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_default_grid_bins_as_published():
    coord = [
        (3, 0, -3),
        (0, 10, 0),
        (-3, -4, 1),
        (60, 0, 2),
        (1, 0, -1),
        (-10, 0.0, 0),
        (-10, -0.0, 0),
    ]
    grid = build_partition(PARTITION)
    cells = grid.cells(grid.to_frame(torch.tensor(coord, dtype=torch.float32)))
    expected = [
        [28, 179, 5],
        [95, 269, 20],
        [47, 52, 25],
        [479, 179, 31],
        [9, 179, 15],
        [95, 359, 20],
        [95, 0, 20],
    ]
    assert cells.tolist() == expected


def test_levels_of_the_full_grid():
    network = small(partition=PARTITION, width=1)
    shapes, widths = {}, {}
    for name, path in TAPS.items():

        def hook(_module, _inputs, out, name=name):
            shapes[name], widths[name] = out.spatial_shape, out.features.shape[1]

        network.get_submodule(SPARSE + path).register_forward_hook(hook)
    with torch.no_grad():
        network(points([200]))
    assert shapes == {
        "d1": (240, 180, 16),
        "d2": (120, 90, 8),
        "d3": (60, 45, 8),
        "d4": (30, 23, 8),
        "u4": (60, 45, 8),
        "u3": (120, 90, 8),
        "u2": (240, 180, 16),
        "u1": (480, 360, 32),
        "u0": (480, 360, 32),
        "logits": (480, 360, 32),
    }
    assert [widths[name] for name in ("d1", "d2", "d3", "d4")] == [2, 4, 8, 16]
    assert [widths[name] for name in ("u4", "u3", "u2", "u1", "u0")] == [16, 8, 4, 2, 2]


# --------------------------------------------------------------------------------------------- the forward, by loops


@pytest.mark.parametrize("mode", ["intended", "as_released"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sparse_part_equals_dense_convolutions_and_loops(mode, dtype, tolerance):
    cells, x = voxels(90, 3)
    network = randomise(AsymmetricUNet(3, 2, 5, mode)).to(dtype).eval()
    weights = {key: value.double() for key, value in network.state_dict().items()}
    expected = emulate(weights, cells, GRID["shape"], x)
    with torch.no_grad(), Taps(network, TAPS).record() as seen:
        out = network(SparseConvTensor(x.to(dtype), cells, GRID["shape"], 2))
    assert torch.equal(out.indices, cells)
    assert set(seen) == set(expected)
    for name, rows in expected.items():
        assert float(rows.std(0).max()) > 0.05, f"{name} says too little"
        assert_near(seen[name].feat.double(), rows, tolerance)


def test_modes_differ():
    cells, x = voxels(90, 3)
    intended = randomise(AsymmetricUNet(3, 2, 5, "intended")).double().eval()
    weights = dict(intended.state_dict())
    before = emulate(weights, cells, GRID["shape"], x)["logits"]
    flat = weights["downCntx.conv3.weight"].transpose(1, 2)  # (1, 3, 3) as (3, 1, 3)
    after = emulate({**weights, "downCntx.conv3.weight": flat}, cells, GRID["shape"], x)["logits"]
    assert float((before - after).abs().max()) > 1e-2


def test_gradients_equal_finite_differences():
    cells, x = voxels(24, 2, shape=(6, 6, 4), scans=1)
    network = randomise(AsymmetricUNet(2, 1, 2, "intended")).double().eval()
    names, values = zip(*network.named_parameters())
    sizes = [value.numel() for value in values]

    def logits(features, together):
        parts = [part.view_as(v) for part, v in zip(together.split(sizes), values)]
        sparse = SparseConvTensor(features, cells, (6, 6, 4), 1)
        return torch.func.functional_call(network, dict(zip(names, parts)), (sparse,)).features

    together = torch.cat([value.detach().flatten() for value in values]).requires_grad_()
    assert torch.autograd.gradcheck(logits, (x.requires_grad_(), together), fast_mode=True)


# ------------------------------------------------------------------------------------------------- points and scores


@torch.no_grad()
def test_scores_belong_to_the_voxels_of_the_points():
    network, batch = small(), points([150, 120])
    scores = network(batch)
    grid = network.partition.partition
    cells = grid.cells(grid.to_frame(batch["coord"]))
    scan = torch.tensor([0] * 150 + [1] * 120)
    assert torch.equal(scores.indices[scores.inverse], torch.cat((scan[:, None], cells), dim=1))
    rows = [tuple(row) for row in scores.indices.tolist()]
    assert rows == sorted(set(rows))
    assert scores.logits.shape == (len(scores.indices), 5)
    assert torch.equal(network(batch).logits, scores.logits)


@torch.no_grad()
def test_order_of_points_does_not_matter():
    network, batch = small(), points([200])
    mixed = torch.randperm(200)
    other = {**batch, "coord": batch["coord"][mixed], "feat": batch["feat"][mixed]}
    a, b = network(batch), network(other)
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.inverse[mixed], b.inverse)
    assert_near(a.logits, b.logits, 2e-6)


@pytest.mark.parametrize("counts", [[150, 1, 120], [40, 0, 30]])
@torch.no_grad()
def test_a_scan_alone_equals_the_scan_in_a_batch(counts):
    network, batch = small(), points(counts)
    scores = network(batch)
    for scan, count in enumerate(counts):
        if count:
            alone = network(only(batch, scan))
            rows = scores.indices[:, 0] == scan
            assert torch.equal(alone.indices[:, 1:], scores.indices[rows][:, 1:])
            assert_near(alone.logits, scores.logits[rows], 2e-6)


@pytest.mark.parametrize("training", [False, True])
def test_one_point(training):
    scores = small().train(training)(points([1]))
    assert scores.logits.shape == (1, 5)
    assert bool(scores.logits.isfinite().all())
    assert scores.inverse.tolist() == [0]


def test_it_learns_in_the_segmentor():
    network = Cylinder3D(**SMALL)
    criteria = [dict(type="CrossEntropyLoss", ignore_index=0)]
    model = VoxelSegmentor(network, criteria).train()
    batch = points([150, 120])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(6):
        loss = model(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    out = model.eval()(batch)
    assert out["seg_logits"].shape == (270, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_without_gradients_nothing_is_kept():
    def alive():
        gc.collect()
        return sum(isinstance(o, (Cells, KernelMap, SparseConvTensor)) for o in gc.get_objects())

    network, before = small(), alive()
    with torch.no_grad():
        scores = network(points([150]))
    assert scores.logits.grad_fn is None
    assert alive() == before


def test_built_by_name():
    network = MODELS.build(dict(type="kd.Cylinder3D", **SMALL))
    assert isinstance(network, Cylinder3D)
    assert network.partition.partition.shape == (12, 10, 8)
    assert network.kernel_mode == "intended"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kernel_mode": "released"}, "kernel_mode='released'.*intended, as_released"),
        ({"width": 0}, "width=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"voxel_channels": -1}, "voxel_channels=-1"),
        ({"point_channels": ()}, "point_channels"),
        ({"in_channels": 2}, "in_channels=2"),
        ({"partition": {**GRID, "shape": (1, 10, 8)}}, "partition"),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(InputError, match=text):
        Cylinder3D(**{**SMALL, **changes})


@pytest.mark.parametrize("mode", ["intended", "as_released"])
def test_weights_of_the_other_mode_do_not_fit(mode):
    other = "intended" if mode == "as_released" else "as_released"
    with pytest.raises(RuntimeError, match="size mismatch"):
        small(kernel_mode=mode).load_state_dict(small(kernel_mode=other).state_dict())


# ------------------------------------------------------------------------------------------------------------ threads


def test_flat_kernel_equals_dense_with_two_threads():
    shape, g = (40, 36, 24), torch.Generator().manual_seed(0)
    flat = torch.randperm(40 * 36 * 24, generator=g)[:4000].sort().values
    cells = torch.stack((flat // (36 * 24), flat // 24 % 36, flat % 24), dim=1)
    indices = torch.cat((torch.zeros(4000, 1, dtype=torch.long), cells), dim=1)
    x = torch.randn(4000, 8, generator=g)
    weight = torch.randn(8, 3, 1, 3, 8, generator=g) / 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        results = [
            submanifold_conv(SparseConvTensor(x, indices, shape, 1), weight).features
            for _ in range(3)
        ]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    expected = dense_submanifold(Level(indices.tolist(), shape), weight, None, x)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
        assert torch.equal(result, results[0])
