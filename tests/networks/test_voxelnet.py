"""VoxelNet encoders: keys and counts, known values, a dense forward, voxels, reading the bird's-eye view."""

import importlib
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import UNetV2, VoxelBackBone8x, VoxelEmbedding, VoxelResBackBone8x
from pointcept_kd.networks.voxelnet import KITTI_PARTITION, bev_map, read_bev
from pointcept_kd.ops.sparse import SparseConvTensor

ALL = (VoxelBackBone8x, VoxelResBackBone8x, UNetV2)
KITTI = {"partition": KITTI_PARTITION, "extra_z": 1}
SMALL = {  # voxels of one metre
    "low": (0.0, 0.0, 0.0),
    "high": (16.0, 16.0, 27.0),
    "shape": (16, 16, 27),
    "frame": "cartesian",
    "spacing": "n",
}


def norm_entries(name, c):
    out = {f"{name}.{leaf}": (c,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return {**out, f"{name}.num_batches_tracked": ()}


def conv_entries(name, out_channels, in_channels, kernel=(3, 3, 3)):
    shape = (out_channels, *kernel, in_channels)
    return {f"{name}.0.weight": shape, **norm_entries(f"{name}.1", out_channels)}


def residual_entries(name, c, bias):
    out = {}
    for i in "12":
        out[f"{name}.conv{i}.weight"] = (c, 3, 3, 3, c)
        if bias:
            out[f"{name}.conv{i}.bias"] = (c,)
        out.update(norm_entries(f"{name}.bn{i}", c))
    return out


def table(kind, bias=True):
    """The published layout, written down by hand."""
    residual = kind is VoxelResBackBone8x
    out = conv_entries("conv_input", 16, 4)
    if residual:
        out |= residual_entries("conv1.0", 16, bias) | residual_entries("conv1.1", 16, bias)
    else:
        out |= conv_entries("conv1.0", 16, 16)
    for level, before, after in ((2, 16, 32), (3, 32, 64), (4, 64, 128 if residual else 64)):
        out |= conv_entries(f"conv{level}.0", after, before)
        for i in (1, 2):
            if residual:
                out |= residual_entries(f"conv{level}.{i}", after, bias)
            else:
                out |= conv_entries(f"conv{level}.{i}", after, after)
    out |= conv_entries("conv_out", 128, 128 if residual else 64, (3, 1, 1))
    if kind is UNetV2:
        for level, c, finer in ((4, 64, 64), (3, 64, 32), (2, 32, 16), (1, 16, None)):
            out |= residual_entries(f"conv_up_t{level}", c, False)
            out |= conv_entries(f"conv_up_m{level}", c, 2 * c)
            if finer:
                out |= conv_entries(f"inv_conv{level}", finer, c)
        out |= conv_entries("conv5.0", 16, 16)
    return out


@pytest.mark.parametrize(
    ("kind", "entries", "parameters"),
    [
        (VoxelBackBone8x, 72, 711_872),
        (VoxelResBackBone8x, 142, 2_694_880),
        (UNetV2, 168, 1_922_784),
    ],
)
def test_keys_shapes_and_published_counts(kind, entries, parameters):
    with torch.device("meta"):
        network = kind()
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == table(kind)
    assert len(network.state_dict()) == entries
    assert sum(p.numel() for p in network.parameters()) == parameters
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_residual_blocks_without_bias():
    with torch.device("meta"):
        network = VoxelResBackBone8x(use_bias=False)
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert shapes == table(VoxelResBackBone8x, bias=False)
    assert len(shapes) == 142 - 16


def voxels(network, rows, features):
    """Voxels with indices (scan, z, y, x)."""
    return SparseConvTensor(
        torch.as_tensor(features),
        torch.tensor(rows),
        network.sparse_shape,
        max(r[0] for r in rows) + 1,
    )


def test_grid_sizes():
    sizes = []
    for network in (VoxelBackBone8x(**KITTI).eval(), VoxelBackBone8x().eval()):
        encoding = network.encode(voxels(network, [[0, 16, 80, 70]], torch.ones(1, 4)))
        sizes.append([x.spatial_shape for x in (*encoding.levels, encoding.out)])
        assert [x.features.shape[1] for x in encoding.levels] == [16, 32, 64, 64]
    assert sizes[0] == [
        (41, 1600, 1408),
        (21, 800, 704),
        (11, 400, 352),
        (5, 200, 176),
        (2, 200, 176),
    ]
    assert [s[0] for s in sizes[1]] == [40, 20, 10, 4, 1]
    assert sizes[1][-1] == (1, 128, 128)
    assert VoxelBackBone8x(**KITTI).out_channels == 256
    assert VoxelBackBone8x().out_channels == 128


@torch.no_grad()
def constant(network):
    for name, p in network.named_parameters():
        if p.dim() == 5:
            p.fill_(1 / p.shape[4])
        elif "conv" in name.split(".")[-2] and name.endswith("bias"):
            p.zero_()
    return network.eval()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        (VoxelBackBone8x, 8 * 1.001**-6, 4 * 1.001**-6),
        (VoxelResBackBone8x, 3177.3735, 1588.6868),
    ],
)
def test_one_voxel_through_constant_weights(kind, low, high):
    network = constant(kind(**KITTI))
    encoding = network.encode(voxels(network, [[0, 16, 800, 704]], torch.ones(1, 4)))
    assert len(encoding.levels[3].indices) == 2
    assert encoding.out.indices.tolist() == [[0, 0, 100, 88], [0, 1, 100, 88]]
    expected = torch.tensor([[low], [high]]).expand(2, 128)
    assert torch.allclose(encoding.out.features, expected, rtol=1e-6)


@torch.no_grad()
def distinct_weights(network):
    """W[o, a, b, c, i] = 4 (1 + a + b / 2 + c / 4) (1 + .1 cos o) (1 + .1 cos 2 i) / taps / channels."""
    for p in network.parameters():
        if p.dim() == 5:
            o, a, b, c, i = (torch.arange(n, dtype=torch.float64) for n in p.shape)
            taps = 1 + a[:, None, None] + b[:, None] / 2 + c / 4
            outer = (1 + 0.1 * o.cos())[:, None, None, None, None] * taps[None, :, :, :, None]
            p.copy_(4 * outer * (1 + 0.1 * (2 * i).cos()) / math.prod(p.shape[1:]))
    return network.eval()


P3_FAR = {  # (z, y, x): channels 0, 1, 2, 127
    (0, 100, 88): (1117.185175, 1070.497225, 973.358061, 1039.221808),
    (0, 100, 89): (1020.777817, 978.118798, 889.362246, 949.542290),
    (0, 101, 88): (924.370459, 885.740371, 805.366432, 859.862771),
    (0, 101, 89): (827.963102, 793.361945, 721.370618, 770.183253),
    (1, 100, 88): (192.586681, 184.538348, 167.792952, 179.146916),
    (1, 100, 89): (173.305209, 166.062663, 150.993789, 161.211012),
    (1, 101, 88): (154.023737, 147.586978, 134.194626, 143.275108),
    (1, 101, 89): (134.742266, 129.111292, 117.395463, 125.339205),
}
P3_NEAR = {
    (0, 100, 88): (0.002164, 0.002073, 0.001885, 0.002013),
    (1, 100, 88): (0.000365, 0.000350, 0.000318, 0.000339),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("cell", "known", "total", "tolerance"),
    [
        ((17, 801, 705), P3_FAR, 529489.826, {"rtol": 1e-5, "atol": 0}),
        # Printed with six digits after the point.
        ((16, 800, 704), P3_NEAR, 0.294615, {"rtol": 0, "atol": 6e-7}),
    ],
)
def test_weights_that_tell_every_axis(dtype, cell, known, total, tolerance):
    network = distinct_weights(VoxelBackBone8x(**KITTI).to(dtype))
    features = torch.tensor([[1.0, 2.0, 3.0, 0.5]], dtype=dtype)
    out = network.encode(voxels(network, [[0, *cell]], features)).out
    assert [tuple(r[1:]) for r in out.indices.tolist()] == sorted(known)
    expected = torch.tensor([known[k] for k in sorted(known)], dtype=dtype)
    assert torch.allclose(out.features[:, [0, 1, 2, 127]], expected, **tolerance)
    assert float(out.features.detach().sum()) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def lively(network, seed=0):
    """Weights under which every layer shows in the result."""
    g = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.dim() == 5:
            std = 1.5 * (2 / math.prod(value.shape[1:])) ** 0.5
            value.copy_(torch.randn(value.shape, generator=g) * std)
        elif name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=g) + 0.5)
        elif value.dim() == 1:
            value.copy_(torch.randn(value.shape, generator=g) * 0.1 + 1.0 * ("weight" in name))
    return network


def dense_forward(network, x):
    """The networks on dense grids, masked to the occupied cells; bird's-eye view and decoded features."""
    state = network.state_dict()
    residual, decoder = isinstance(network, VoxelResBackBone8x), isinstance(network, UNetV2)
    grid = x.dense()
    mask = x.replace_feature(torch.ones_like(x.features[:, :1])).dense()

    def conv(name, grid, **how):
        weight = state[f"{name}.weight"].permute(0, 4, 1, 2, 3)
        return F.conv3d(grid, weight, state.get(f"{name}.bias"), **how)

    def norm(name, grid):
        args = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(grid, *args, eps=1e-3)

    def block(name, grid, mask, **how):
        return mask * F.relu(norm(f"{name}.1", conv(f"{name}.0", grid, **how)))

    def basic(name, grid, mask):
        y = mask * F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", grid, padding=1)))
        return mask * F.relu(norm(f"{name}.bn2", conv(f"{name}.conv2", y, padding=1)) + grid)

    def more(name, grid, mask):
        return basic(name, grid, mask) if residual else block(name, grid, mask, padding=1)

    grid = block("conv_input", grid, mask, padding=1)
    grid = more("conv1.0", grid, mask)
    if residual:
        grid = more("conv1.1", grid, mask)
    grids, masks = [grid], [mask]
    for level, pad in ((2, 1), (3, 1), (4, (0, 1, 1))):
        mask = F.max_pool3d(mask, 3, 2, pad)
        grid = block(f"conv{level}.0", grid, mask, stride=2, padding=pad)
        for i in (1, 2):
            grid = more(f"conv{level}.{i}", grid, mask)
        grids.append(grid)
        masks.append(mask)
    flat = F.max_pool3d(mask, (3, 1, 1), (2, 1, 1))
    out = block("conv_out", grid, flat, stride=(2, 1, 1))
    if not decoder:
        return out, None
    below = grids[3]
    for level in (4, 3, 2, 1):
        mask = masks[level - 1]
        joined = torch.cat([below, basic(f"conv_up_t{level}", grids[level - 1], mask)], 1)
        merged = block(f"conv_up_m{level}", joined, mask, padding=1)
        merged = merged + joined[:, 0::2] + joined[:, 1::2]
        if level == 1:
            return out, block("conv5.0", merged, mask, padding=1)
        weight = state[f"inv_conv{level}.0.weight"].permute(4, 0, 1, 2, 3)
        pad = (0, 1, 1) if level == 4 else (1, 1, 1)
        size = grids[level - 2].shape[2:]
        rest = [n - ((m - 1) * 2 - 2 * p + 3) for n, m, p in zip(size, merged.shape[2:], pad)]
        up = F.conv_transpose3d(merged, weight, stride=2, padding=pad, output_padding=rest)
        below = masks[level - 2] * F.relu(norm(f"inv_conv{level}.1", up))


@pytest.mark.parametrize("kind", ALL)
def test_dense_forward(kind):
    network = lively(kind(partition=SMALL, extra_z=1)).double().eval()
    g = torch.Generator().manual_seed(3)
    flat = torch.randperm(2 * 28 * 16 * 16, generator=g)[:250]
    sizes = (2, 28, 16, 16)
    rows = torch.stack(torch.unravel_index(flat, sizes), 1)
    features = torch.randn(250, 4, generator=g, dtype=torch.float64)
    x = SparseConvTensor(features, rows, network.sparse_shape, 2)
    expected, decoded = dense_forward(network, x)
    encoding = network.encode(x)
    assert expected.std() > 0.01
    assert torch.allclose(encoding.out.dense(), expected, atol=1e-9, rtol=1e-9)
    assert bev_map(encoding.out).shape == (2, 128 * network.bev_height, 2, 2)
    if decoded is not None:
        made = network.decode(encoding.levels)
        assert torch.equal(made.indices, rows)
        assert decoded.std() > 0.01
        assert torch.allclose(made.dense(), decoded, atol=1e-9, rtol=1e-9)


def points(counts, seed=0, low=-2.0, high=18.0, dtype=torch.float32):
    """Points in and around the small grid."""
    g = torch.Generator().manual_seed(seed)
    coord = torch.rand(sum(counts), 3, generator=g, dtype=dtype) * (high - low) + low
    feat = torch.cat([coord, torch.rand(sum(counts), 1, generator=g, dtype=dtype)], 1)
    return {"coord": coord, "feat": feat, "offset": torch.tensor(counts).cumsum(0)}


def plain_voxels(batch, max_points, max_voxels):
    """Voxels by a loop over points in input order: {(scan, z, y, x): mean} and the voxel of every point."""
    sums, of_point, begin = {}, [], 0
    for scan, end in enumerate(batch["offset"].tolist()):
        made = 0
        for row in range(begin, end):
            x, y, z = (math.floor(v) for v in batch["coord"][row].tolist())
            key = (scan, z, y, x)
            if not (0 <= x < 16 and 0 <= y < 16 and 0 <= z < 27):
                of_point.append(None)
                continue
            if key not in sums:
                if max_voxels and made == max_voxels:
                    of_point.append(None)
                    continue
                sums[key] = []
                made += 1
            of_point.append(key)
            if len(sums[key]) < max_points:
                sums[key].append(batch["feat"][row].double())
        begin = end
    return {k: torch.stack(v).mean(0) for k, v in sums.items()}, of_point


@pytest.mark.parametrize(("max_points", "max_voxels"), [(10, 0), (1, 0), (2, 40), (3, 10_000)])
def test_voxels(max_points, max_voxels):
    batch = points([150, 0, 200])
    # Few cells, so that voxels have many points.
    batch["coord"][:, 2] = batch["coord"][:, 2] / 8
    network = VoxelBackBone8x(
        partition=SMALL, extra_z=1, max_points=max_points, max_voxels=max_voxels
    )
    x, inverse = network.voxelise(batch)
    means, of_point = plain_voxels(batch, max_points, max_voxels)
    rows = [tuple(r) for r in x.indices.tolist()]
    assert sorted(rows) == sorted(means)
    assert x.spatial_shape == (28, 16, 16)
    assert x.batch_size == 3
    expected = torch.stack([means[r] for r in rows]).float()
    assert torch.allclose(x.features, expected, atol=1e-5)
    assert [rows[i] if i >= 0 else None for i in inverse.tolist()] == of_point
    assert None in of_point


def test_border_of_the_grid():
    batch = points([4])
    batch["coord"] = torch.tensor(
        [[0.0, 0, 0], [16, 0, 0], [15.999, 15.999, 26.999], [0, -1e-6, 0]]
    )
    x, inverse = VoxelBackBone8x(partition=SMALL).voxelise(batch)
    assert x.indices.tolist() == [[0, 0, 0, 0], [0, 26, 15, 15]]
    assert inverse.tolist() == [0, -1, 1, -1]


def test_reading_a_map():
    # 0 .. 11 in three rows (y) and four columns (x).
    grid = torch.arange(12.0).view(1, 1, 3, 4)
    coord = torch.tensor([[-51.2, -51.2], [-50.8, -51.2], [-49.9, -50.1], [-48.4, -51.2]])
    place = (coord.double() + 51.2) / 0.8
    made = read_bev(grid, place, torch.zeros(4, dtype=torch.int64))
    assert made[:, 0].tolist() == pytest.approx([0.0, 0.5, 7.125, 3.0], abs=1e-5)


def test_reading_against_loops():
    g = torch.Generator().manual_seed(0)
    grid = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64)
    place = torch.rand(40, 2, generator=g, dtype=torch.float64) * torch.tensor([7.0, 6.0]) - 1
    scan = torch.randint(0, 2, (40,), generator=g)
    made = read_bev(grid, place, scan)
    for k in range(40):
        # Beyond the outermost cells a map goes on as it ends.
        column, row = min(max(float(place[k, 0]), 0), 4), min(max(float(place[k, 1]), 0), 3)
        expected = torch.zeros(3, dtype=torch.float64)
        for y in range(4):
            for x in range(5):
                share = max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
                expected += share * grid[scan[k], :, y, x]
        assert torch.allclose(made[k], expected, atol=1e-12)
    grid.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: read_bev(m, place[:5], scan[:5]), (grid,))


@pytest.mark.parametrize("kind", ALL)
def test_features_of_points(kind):
    network = lively(kind(partition=SMALL)).eval()
    batch = points([120, 0, 90])
    with torch.no_grad():
        together = network(batch)
        assert together.shape == (210, network.out_channels)
        outside = ((batch["coord"] < 0) | (batch["coord"] >= 16)).any(1)
        beyond = ((batch["coord"][:, :2] < 0) | (batch["coord"][:, :2] >= 16)).any(1)
        assert (together[beyond] == 0).all()
        assert (together[~outside] != 0).any(1).float().mean() > 0.9
        assert torch.isfinite(together).all()
        alone = {k: v[120:] for k, v in batch.items() if k != "offset"}
        alone["offset"] = torch.tensor([90])
        assert torch.allclose(network(alone), together[120:], atol=1e-4, rtol=1e-4)
        far = {**batch, "coord": batch["coord"].clone()}
        far["coord"][0] = 1e30
        assert (network(far)[0] == 0).all()


@pytest.mark.parametrize("kind", ALL)
def test_training(kind):
    network = kind(partition=SMALL).train()
    out = network(points([300, 200]))
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        if kind is UNetV2 and name.startswith("conv_out"):
            assert p.grad is None  # only detectors ask for the bird's-eye view
        elif not name.endswith(("conv1.bias", "conv2.bias")):  # the norm takes a bias away
            assert p.grad.abs().max() > 0, name


def test_a_level_without_cells():
    """The topmost cells are out of reach of the coarse convolutions: zeros, not an error."""
    network = VoxelBackBone8x(partition=dict(SMALL, shape=(16, 16, 40))).train()
    batch = points([3])
    batch["coord"] = torch.full((3, 3), 26.9)
    batch["coord"][:, :2] = torch.tensor([[3.0, 4], [5, 6], [7, 7]])
    encoding = network.encode(network.voxelise(batch).x)
    out = network(batch)
    assert len(encoding.out.indices) == 0
    assert (out == 0).all()
    out.sum().backward()
    assert torch.isfinite(network.conv_input[0].weight.grad).all()


def test_embedding():
    config = {"type": "kd.VoxelBackBone8x", "partition": SMALL}
    network = MODELS.build({"type": "kd.VoxelEmbedding", "backbone": config, "embed_dim": 8})
    lively(network.backbone)
    assert sum(p.numel() for p in network.parameters()) == 711_872 + 2 * 8 * 128
    assert sum(p.numel() for p in VoxelEmbedding(config).parameters()) == 711_872 + 2 * 8192
    batch = points([200, 100])
    made = network.eval()(batch)
    assert list(made) == ["final", "final_class_level"]
    for features in made.values():
        length = features.norm(dim=1)
        assert ((length - 1).abs().lt(1e-5) | (length == 0)).all()
        assert (length > 0).sum() > 100
    # By loops: a cell's unit vector, four of them weighted, unit length again.
    out = network.backbone.encode(network.backbone.voxelise(batch).x).out
    matrix = network.final.weight.view(128, 8)  # spconv's way of reading such a weight
    units = {}
    for (scan, _, y, x), feature in zip(out.indices.tolist(), out.features):
        vector = feature @ matrix
        units[scan, y, x] = vector / vector.norm()
    for point, (x, y, z) in enumerate(batch["coord"].tolist()):
        expected = torch.zeros(8)
        if 0 <= x < 16 and 0 <= y < 16 and 0 <= z < 27:
            for row in (0, 1):
                for column in (0, 1):
                    # Two cells along each axis; from the second on the map goes on as it ends.
                    share = abs(1 - row - min(y / 8, 1)) * abs(1 - column - min(x / 8, 1))
                    unit = units.get((int(point >= 200), row, column))
                    expected += 0 if unit is None else share * unit.detach()
        length = expected.norm()
        expected = expected / length if length >= 1e-6 else expected * 0
        assert torch.allclose(made["final"][point], expected, atol=1e-4), point
    # A point on a cell has that cell's direction.
    backbone = network.backbone
    x, inverse = backbone.voxelise(batch)
    cells = network.final(backbone.encode(x).out)
    row = int(((cells.indices[:, 2:] == 1).all(1) & (cells.indices[:, 0] == 0)).nonzero()[0])
    point = {"coord": batch["coord"].clone(), **{k: batch[k] for k in ("feat", "offset")}}
    point["coord"][0] = torch.tensor([8.0, 8.0, 1.0])
    read = backbone.read(cells, point, torch.zeros_like(inverse))
    assert torch.allclose(read[0], cells.features[row], atol=1e-5)
    network.train()
    sum((f * torch.randn_like(f)).sum() for f in network(batch).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("kind", ALL)
def test_as_a_segmentor(kind):
    config = {"type": f"kd.{kind.__name__}", "partition": SMALL}
    width = MODELS.build(config).out_channels
    model = MODELS.build(
        {
            "type": "DefaultSegmentorV2",
            "num_classes": 3,
            "backbone_out_channels": width,
            "backbone": config,
            "criteria": [{"type": "CrossEntropyLoss"}],
        }
    )
    batch = {**points([80]), "segment": torch.arange(80) % 3}
    model.train()(batch)["loss"].backward()
    assert model.eval()(batch)["seg_logits"].shape == (80, 3)


def test_bad_input():
    network = VoxelBackBone8x(partition=SMALL)
    batch = points([10])
    with pytest.raises(InputError, match="in_channels=4 but `feat` has 3 columns"):
        network({**batch, "feat": batch["feat"][:, :3]})
    with pytest.raises(InputError, match="not finite, first in row 2"):
        network({**batch, "coord": batch["coord"].index_fill(0, torch.tensor([2]), torch.nan)})
    with pytest.raises(InputError, match="no point of the batch lies in"):
        network({**batch, "coord": batch["coord"] + 100})
    with pytest.raises(InputError, match="offset ends at 9"):
        network({**batch, "offset": torch.tensor([9])})
    with pytest.raises(InputError, match="'n_minus_1'; VoxelNet takes"):
        VoxelBackBone8x(partition=dict(SMALL, spacing="n_minus_1"))
    with pytest.raises(InputError, match="cells along z, and each needs one"):
        VoxelBackBone8x(partition=dict(SMALL, shape=(16, 16, 8)))
    with pytest.raises(InputError, match="max_points=0"):
        VoxelBackBone8x(max_points=0)
    with pytest.raises(InputError, match="2 cells high and must be one"):
        VoxelEmbedding({"type": "kd.VoxelBackBone8x", **KITTI})
    with pytest.raises(InputError, match="is a UNetV2"):
        VoxelEmbedding({"type": "kd.UNetV2"})


@pytest.fixture
def openpcdet(monkeypatch):
    """OpenPCDet's classes from a checkout, without its compiled operations."""
    root = os.environ.get("OPENPCDET_ROOT", "")
    folder = Path(root) / "pcdet" / "models" / "backbones_3d"
    if not root or not (folder / "spconv_backbone.py").is_file():
        pytest.skip("OPENPCDET_ROOT does not name a checkout of OpenPCDet")
    pytest.importorskip("spconv.pytorch", reason="OpenPCDet's classes need spconv")
    for name in [n for n in sys.modules if n.split(".")[0] == "pcdet"]:
        monkeypatch.delitem(sys.modules, name)
    for name, path in {
        "pcdet": folder.parents[1],
        "pcdet.models": folder.parent,
        "pcdet.models.backbones_3d": folder,
        "SharedArray": None,
        "pcdet.utils.common_utils": None,
    }.items():
        module = types.ModuleType(name)
        if path is not None:
            module.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, module)
    centres = sys.modules["pcdet.utils.common_utils"]
    centres.get_voxel_centers = lambda cells, **_: cells.float()
    names = ("spconv_backbone", "spconv_unet")
    modules = [importlib.import_module(f"pcdet.models.backbones_3d.{n}") for n in names]
    yield {kind: getattr(modules[kind is UNetV2], kind.__name__) for kind in ALL}
    for name in [n for n in sys.modules if n.split(".")[0] == "pcdet"]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ALL)
def test_as_openpcdet(kind, openpcdet):
    ours = lively(kind(**KITTI)).eval()
    theirs = openpcdet[kind](
        model_cfg={},
        input_channels=4,
        grid_size=np.array([1408, 1600, 40]),
        voxel_size=[0.05, 0.05, 0.1],
        point_cloud_range=np.array([0, -40, -3, 70.4, 40, 1]),
    )
    # The order of entries too: optimisers number parameters.
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    theirs.eval()
    for module in theirs.modules():
        if hasattr(module, "indice_key"):
            module.training = True  # spconv refuses a bias on the CPU in evaluation
    g = torch.Generator().manual_seed(5)
    picked = torch.randperm(20 * 20 * 20, generator=g)[:2000]
    cells = torch.stack(torch.unravel_index(picked, (20, 20, 20)), 1)
    rows = torch.cat([torch.zeros(2000, 1).long(), cells + torch.tensor([8, 800, 704])], 1)
    features = torch.randn(2000, 4, generator=g)
    with torch.no_grad():
        given = {"voxel_features": features, "voxel_coords": rows.float(), "batch_size": 1}
        result = theirs(given)
        encoding = ours.encode(SparseConvTensor(features, rows, ours.sparse_shape, 1))
        pairs = [(encoding.out, result["encoded_spconv_tensor"])]
        if kind is UNetV2:
            made = ours.decode(encoding.levels).features
            assert torch.allclose(made, result["point_features"], rtol=1e-4, atol=1e-4)
        else:
            scales = result["multi_scale_3d_features"]
            pairs += [(x, scales[f"x_conv{i}"]) for i, x in enumerate(encoding.levels, 1)]
    for mine, other in pairs:
        assert tuple(mine.spatial_shape) == tuple(other.spatial_shape)
        dense = {tuple(r): f for r, f in zip(other.indices.tolist(), other.features)}
        mine_rows = [tuple(r) for r in mine.indices.tolist()]
        assert sorted(mine_rows) == sorted(dense)
        expected = torch.stack([dense[r] for r in mine_rows])
        assert torch.allclose(mine.features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
