"""Point-voxel U-Net: counts and keys, links by plain loops, a dense forward, released layouts, and what is refused."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks.point_voxel_unet import Level, PointVoxelUNet, Scan, rows_above
from pointcept_kd.networks.released_sphereformer import convert_point_voxel_unet, from_torchsparse
from pointcept_kd.ops.sparse import SparseConvTensor, inverse_conv, strided_conv, submanifold_conv

from .clouds import cloud, only, randomise_norms

CHANNELS = (4, 8, 8, 12, 16, 12, 8, 8, 6)
SMALL = {
    "in_channels": 4,
    "num_classes": 3,
    "channels": CHANNELS,
    "depth": 1,
    "head_size": 4,
    "spherical": (20.0, 20.0, 120.0),
}
CRITERIA = [{"type": "CrossEntropyLoss", "loss_weight": 1.0, "ignore_index": -1}]


def small(**changes):
    torch.manual_seed(0)
    network = PointVoxelUNet(**{**SMALL, **changes})
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() == 5:
                # So that every part of the network shows in a comparison.
                p.normal_(std=(p.shape[4] * 3) ** -0.5)
            elif "table" in name:
                p.normal_(std=0.5)
    randomise_norms(network)
    return network


def centred(batch):
    """The same cloud around the sensor."""
    return {**batch, "coord": batch["coord"] - 0.3}


# ------------------------------------------------------------------------------------------------------ counts and keys


def test_published_counts():
    with torch.device("meta"):
        one, two = PointVoxelUNet(), PointVoxelUNet(width=2)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert (count(one), count(two)) == (23_033_729, 91_674_353)
    assert len(one.state_dict()) == len(two.state_dict()) == 389
    table = {
        "stem": (31_232, 117_760),
        "vox_downs.0": (119_104, 475_776),
        "vox_downs.1": (398_016, 1_590_656),
        "vox_downs.2": (1_590_656, 6_359_808),
        "vox_downs.3": (6_359_808, 25_433_600),
        "transformer_blocks.0": (26_384, 77_344),
        "transformer_blocks.1": (77_344, 252_992),
        "transformer_blocks.2": (252_992, 899_200),
        "transformer_blocks.3": (899_200, 3_371_264),
        "vox_ups.0": (8_588_288, 34_347_008),
        "vox_ups.1": (2_278_912, 9_112_576),
        "vox_ups.2": (1_190_016, 4_757_760),
        "vox_ups.3": (1_165_440, 4_659_456),
        "point_transforms": (54_688, 215_872),
        "classifier_vox": (1_649, 3_281),
    }
    for name, counts in table.items():
        assert (count(one.get_submodule(name)), count(two.get_submodule(name))) == counts, name
    with torch.device("meta"):
        plain = PointVoxelUNet(attention=False)
    assert count(one) - count(plain) == 26_384 + 77_344 + 252_992 + 899_200


def test_geometry_of_the_blocks():
    network = PointVoxelUNet(channels=CHANNELS, head_size=4)
    blocks = network.transformer_blocks
    assert [b.cubic for b in blocks] == [pytest.approx((c,) * 3) for c in (0.3, 0.6, 1.2, 2.4)]
    assert [b.spherical for b in blocks] == [(t, t, 120) for t in (2, 4, 8, 16)]
    assert [b.drop_path.probability for b in blocks] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert [b.spherical_cell[0] for b in blocks] == pytest.approx([1 / 12, 1 / 6, 1 / 3, 2 / 3])
    shared = PointVoxelUNet(channels=CHANNELS, head_size=4, cells="reference").transformer_blocks
    assert [b.spherical_cell[0] for b in shared] == pytest.approx([4 / 3] * 4)
    assert network.dropout.p == 0.3
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


# -------------------------------------------------------------------------------------------- between points and voxels


def level(cells, stride, voxels, values):
    """Points at `cells` and voxels of a stride, lowest corners `voxels`, in one sample."""
    cells, voxels = torch.tensor(cells), torch.tensor(voxels)
    scan = Scan(cells, cells.double(), torch.zeros(len(cells), dtype=torch.int64))
    indices = torch.cat([torch.zeros(len(voxels), 1, dtype=torch.int64), voxels // stride], 1)
    values = torch.tensor(values, dtype=torch.float64)
    return Level(SparseConvTensor(values.view(len(voxels), -1), indices, None, 1), stride, scan)


def test_interpolation_by_hand():
    made = level(
        [[0, 0, 0], [1, 0, 0], [1, 1, 1]],
        2,
        [[0, 0, 0], [2, 0, 0], [0, 2, 0]],
        [1.0, 3.0, 10.0],
    ).to_points()
    assert made.flatten().tolist() == pytest.approx([1, 2, 14 / 3], abs=1e-6)


def interpolated(cells, batch, coarse, values, stride):
    """D_s, point by point."""
    known = {tuple(c): v for c, v in zip(coarse.tolist(), values)}
    out = []
    for b, cell in zip(batch.tolist(), cells.tolist()):
        total, share = torch.zeros_like(values[0]), 0.0
        for corner in itertools.product((0, 1), repeat=3):
            at = (b, *(c // stride + k for c, k in zip(cell, corner)))
            weight = 1.0
            for c, k in zip(cell, corner):
                inside = (c % stride) / stride
                weight *= inside if k else 1 - inside
            if at in known:
                total, share = total + weight * known[at], share + weight
        out.append(total / (share + 1e-8))
    return torch.stack(out)


def averaged(cells, batch, coarse, values, stride):
    """P_s, voxel by voxel."""
    rows = [(b, *(c // stride for c in cell)) for b, cell in zip(batch.tolist(), cells.tolist())]
    out = []
    for voxel in coarse.tolist():
        mine = [v for row, v in zip(rows, values) if row == tuple(voxel)]
        out.append(torch.stack(mine).mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_links_by_plain_loops(stride):
    g = torch.Generator().manual_seed(0)
    # Also below 0, where division rounds down.
    cells = torch.unique(torch.randint(-9, 14, (150, 3), generator=g), dim=0)
    cells = cells[torch.randperm(len(cells), generator=g)]
    batch = torch.randint(2, (len(cells),), generator=g)
    fine = torch.cat([batch[:, None], cells], 1)
    floored = torch.cat([batch[:, None], cells.div(stride, rounding_mode="floor")], 1)
    coarse = torch.unique(floored, dim=0)
    coarse = coarse[torch.randperm(len(coarse), generator=g)]
    values = torch.randn(len(coarse), 3, generator=g, dtype=torch.float64, requires_grad=True)
    scan = Scan(cells, cells.double(), batch)
    made = Level(SparseConvTensor(values, coarse, None, 2), stride, scan)
    points = made.to_points()
    assert (points - interpolated(cells, batch, coarse, values, stride)).abs().max() < 1e-9
    back = made.mean_of_points(points)
    assert (back - averaged(cells, batch, coarse, points, stride)).abs().max() < 1e-9
    assert torch.equal(coarse[rows_above(fine, coarse, stride)], floored)
    # A constant comes back as it was, and gradients add up to what went in.
    same = made.with_features(torch.full_like(values, 5)).to_points()
    assert torch.allclose(same, torch.full_like(same, 5), atol=1e-6)
    points.sum().backward()
    assert values.grad.sum().item() == pytest.approx(3 * len(cells), rel=1e-6)


def test_stride_one_is_the_identity():
    made = level([[0, 0, 0], [5, 1, 2]], 1, [[0, 0, 0], [5, 1, 2]], [1.0, 2.0])
    assert made.to_points() is made.features
    assert made.mean_of_points(made.features) is made.features


# --------------------------------------------------------------------------------------------------------- the function


def dense_forward(network, batch, side):
    """The same network on dense grids, masked to the occupied cells, in evaluation; links and positions by loops."""
    state = network.state_dict()
    cells, which, feat = (
        batch["grid_coord"],
        torch.zeros(len(batch["feat"]), dtype=int),
        batch["feat"],
    )

    def conv(name, x, **options):
        return F.conv3d(x, state[f"{name}.weight"].permute(0, 4, 1, 2, 3), **options)

    def norm(name, x):
        at = [state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        mean, var, scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in at)
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def residual(name, x, mask):
        y = mask * F.relu(norm(f"{name}.net.1", conv(f"{name}.net.0", x, padding=1)))
        y = norm(f"{name}.net.4", conv(f"{name}.net.3", y, padding=1))
        matrix = state.get(f"{name}.downsample.0.weight")
        if matrix is not None:
            x = norm(f"{name}.downsample.1", torch.einsum("oc,bcxyz->boxyz", matrix, x))
        return mask * F.relu(y + x)

    def rows(x, mask):
        return x[0].permute(1, 2, 3, 0)[mask[0, 0] > 0]

    def grid(values, mask):
        out = torch.zeros(*mask.shape[2:], values.shape[1], dtype=values.dtype)
        out[mask[0, 0] > 0] = values
        return out.permute(3, 0, 1, 2)[None]

    def voxels(mask):
        found = (mask[0, 0] > 0).nonzero()
        return torch.cat([torch.zeros(len(found), 1, dtype=int), found], 1)

    def link(j, z):
        matrix, shift = (state[f"point_transforms.{j}.0.{k}"] for k in ("weight", "bias"))
        return F.relu(norm(f"point_transforms.{j}.1", z @ matrix.t() + shift))

    a, b, c = cells.unbind(1)
    mask = torch.zeros(1, 1, side, side, side, dtype=feat.dtype)
    mask[0, 0, a, b, c] = 1
    x = torch.zeros(side, side, side, feat.shape[1], dtype=feat.dtype)
    x = x.index_put((a, b, c), feat).permute(3, 0, 1, 2)[None]
    for first in (0, 3):
        x = mask * F.relu(norm(f"stem.{first + 1}", conv(f"stem.{first}", x, padding=1)))
    skips, masks = [x], [mask]
    z = x[0, :, a, b, c].t()
    for i in range(4):
        mask, name = F.max_pool3d(mask, 2), f"vox_downs.{i}"
        x = mask * F.relu(norm(f"{name}.0.net.1", conv(f"{name}.0.net.0", x, stride=2)))
        x = residual(f"{name}.1", x, mask)
        if network.transformer_blocks:
            at = voxels(mask)
            xyz = averaged(cells, which, at, batch["coord"], 2 ** (i + 1))
            x = grid(network.transformer_blocks[i](rows(x, mask), xyz, at[:, 0]), mask)
        skips.append(x)
        masks.append(mask)
    for j in range(4):
        if j in (0, 2):
            stride, at = (16, 4)[j // 2], voxels(mask)
            z = interpolated(cells, which, at, rows(x, mask), stride) + link(j // 2, z)
            x = grid(averaged(cells, which, at, z, stride), mask)
        mask, skip, name = masks[3 - j], skips[3 - j], f"vox_ups.{j}"
        kernel = state[f"{name}.0.net.0.weight"].permute(4, 0, 1, 2, 3)
        up = mask * F.relu(norm(f"{name}.0.net.1", F.conv_transpose3d(x, kernel, stride=2)))
        x = residual(f"{name}.1.0", torch.cat([up, skip], 1), mask)
    z = x[0, :, a, b, c].t() + link(2, z)
    return z @ state["classifier_vox.0.weight"].t() + state["classifier_vox.0.bias"]


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_dense_forward(attention):
    network = small(attention=attention).double().eval()
    batch = centred(cloud([90], high=16, dtype=torch.float64))
    expected = dense_forward(network, batch, 16)
    assert expected.std() > 0.01
    assert (network(batch) - expected).abs().max() < 1e-9


@torch.no_grad()
def test_levels_one_by_one():
    network, batch = small().eval(), centred(cloud([60, 50]))
    levels = [network.start(batch)]
    for number in range(1, 5):
        levels.append(network.encode_level(number, levels[-1]))
        assert levels[-1].stride == 2**number
        points = network.to_points(levels[-1])
        assert points.shape == (110, CHANNELS[number])
        back = network.to_voxels(points, levels[-1])
        assert back.features.shape == levels[-1].features.shape
    bottleneck = network.to_points(levels[-1])
    assert torch.equal(network.decode(bottleneck, levels), network(batch))
    # Another bottleneck or another skip is another result: what a fusion changes arrives.
    assert not torch.allclose(network.decode(bottleneck + 1, levels), network(batch))
    for number in range(4):
        changed = list(levels)
        changed[number] = levels[number].with_features(levels[number].features + 1)
        assert not torch.allclose(network.decode(bottleneck, changed), network(batch)), number
    with pytest.raises(InputError, match="3 levels: expected"):
        network.decode(bottleneck, levels[:3])


@torch.no_grad()
def test_evaluation():
    network = small().eval()
    batch = centred(cloud([60, 1, 40, 0]))
    together = network(batch)
    assert torch.equal(together, network(batch))
    assert torch.allclose(network(only(batch, 2)), together[61:], atol=1e-5)
    p = torch.cat([torch.randperm(60), torch.tensor([60]), 61 + torch.randperm(40)])
    mixed = {k: v if k == "offset" else v[p] for k, v in batch.items()}
    assert torch.allclose(network(mixed), together[p], atol=1e-5)
    headless = small(num_classes=0).eval()
    assert headless(batch).shape == (101, CHANNELS[8])
    # A moved grid has other coarse voxels unless it moved by a multiple of 16.
    for step, same in ((-32, True), (5, False)):
        moved = network({**batch, "grid_coord": batch["grid_coord"] + step})
        assert torch.allclose(moved, together, atol=1e-5) == same


def test_training():
    network = small().train()
    # Wide enough that the coarsest level has several voxels, too.
    out = network(centred(cloud([70, 60], high=40)))
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    # A single voxel: no neighbour, no variance, windows of one token.
    network.zero_grad()
    one = network(centred(cloud([1])))
    one.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    still = small(dropout=0.0, drop_path=0.0).train()
    batch = centred(cloud([40]))
    assert torch.allclose(still(batch), still(batch))
    for changes in ({"dropout": 0.5, "drop_path": 0.0}, {"dropout": 0.0, "drop_path": 0.5}):
        drops = small(**changes).train()
        assert not torch.allclose(drops(batch), drops(batch))


@torch.no_grad()
def test_autocast_and_methods():
    batch = centred(cloud([60]))
    network = small().eval()
    exact = network(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(batch)
    assert bool(made.isfinite().all())
    assert (made - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.allclose(small(method="reduction").eval()(batch), exact, atol=1e-4)
    assert not torch.allclose(small(cells="reference").eval()(batch), exact, atol=1e-4)


def test_in_segmentors():
    batch = centred(cloud([50, 20]))
    model = MODELS.build(
        {
            "type": "DefaultSegmentor",
            "backbone": {"type": "kd.PointVoxelUNet", **SMALL},
            "criteria": CRITERIA,
        }
    )
    model.train()(batch)["loss"].backward()
    assert model.backbone.stem[0].weight.grad.abs().max() > 0
    assert model.eval()(batch)["seg_logits"].shape == (70, 3)


# ----------------------------------------------------------------------------------------------------- released layouts


def test_kernels_of_torchsparse():
    """Each tap of a released kernel acts where it says, against a dense convolution too."""
    g = torch.Generator().manual_seed(0)
    cells = torch.unique(torch.randint(6, (60, 3), generator=g), dim=0)
    known = {tuple(c): i for i, c in enumerate(cells.tolist())}
    feat = torch.randn(len(cells), 2, generator=g, dtype=torch.float64)
    indices = torch.cat([cells.new_zeros(len(cells), 1), cells], 1)
    x = SparseConvTensor(feat, indices, None, 1)

    k3 = torch.randn(27, 2, 3, generator=g, dtype=torch.float64)
    expected = torch.zeros(len(cells), 3, dtype=torch.float64)
    for cell, i in known.items():
        for dx, dy, dz in itertools.product((-1, 0, 1), repeat=3):
            j = known.get((cell[0] + dx, cell[1] + dy, cell[2] + dz))
            if j is not None:
                expected[i] += feat[j] @ k3[9 * (dz + 1) + 3 * (dy + 1) + dx + 1]
    weight = from_torchsparse(k3)
    assert torch.allclose(submanifold_conv(x, weight).features, expected, atol=1e-12)
    a, b, c = cells.unbind(1)
    grid = torch.zeros(6, 6, 6, 2, dtype=torch.float64).index_put((a, b, c), feat)
    dense = F.conv3d(grid.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3), padding=1)
    assert torch.allclose(dense[0, :, a, b, c].t(), expected, atol=1e-12)

    k2 = torch.randn(8, 2, 3, generator=g, dtype=torch.float64)
    down = strided_conv(x, from_torchsparse(k2), stride=2, indice_key="d")
    for row, (_, *cell) in zip(down.features, down.indices.tolist()):
        total = torch.zeros(3, dtype=torch.float64)
        for dx, dy, dz in itertools.product((0, 1), repeat=3):
            j = known.get((2 * cell[0] + dx, 2 * cell[1] + dy, 2 * cell[2] + dz))
            if j is not None:
                total += feat[j] @ k2[4 * dx + 2 * dy + dz]
        assert torch.allclose(row, total, atol=1e-12)
    back = torch.randn(8, 3, 2, generator=g, dtype=torch.float64)
    up = inverse_conv(down, from_torchsparse(back), None, "d").features
    above = {tuple(c): v for (_, *c), v in zip(down.indices.tolist(), down.features)}
    for row, (x_, y_, z_) in zip(up, cells.tolist()):
        tap = back[4 * (x_ % 2) + 2 * (y_ % 2) + z_ % 2]
        assert torch.allclose(row, above[x_ // 2, y_ // 2, z_ // 2] @ tap, atol=1e-12)

    matrix = torch.randn(2, 3, generator=g)
    assert torch.equal(from_torchsparse(matrix), matrix.t())
    with pytest.raises(InputError, match=r"\(9, 2, 3\): expected \(27 or 8, in, out\)"):
        from_torchsparse(torch.zeros(9, 2, 3))


def released(network, prefix=""):
    """The network's weights as torchsparse lays them out, tap by tap."""
    out = {}
    for key, value in network.state_dict().items():
        name = key.removesuffix("weight") + "kernel"
        if value.dim() == 5:
            o, size, _, _, i = value.shape
            taps = torch.zeros(size**3, i, o)
            for x, y, z in itertools.product(range(size), repeat=3):
                tap = 9 * z + 3 * y + x if size == 3 else 4 * x + 2 * y + z
                taps[tap] = value[:, x, y, z].t()
            out[prefix + name] = taps
        elif key.endswith("downsample.0.weight"):
            out[prefix + name] = value.t()
        else:
            out[prefix + key] = value
    return out


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_converted_weights(attention):
    source = small(attention=attention, depth=2, cells="reference").eval()
    batch = centred(cloud([50]))
    for prefix, tower in (("", "teacher"), ("module.model_t.", "teacher"), ("model_s.", "student")):
        given = released(source, prefix)
        assert f"{prefix}vox_downs.1.1.net.0.kernel" in given
        assert f"{prefix}vox_downs.0.1.downsample.0.kernel" in given
        others = {}
        if prefix:
            twin = "model_s." if "model_t." in prefix else "model_t."
            others = {f"{twin}stem.0.kernel": torch.ones(27, 4, 4)}
            others[f"{prefix}pix_branch.conv1.weight"] = torch.ones(2)
        weights, report = convert_point_voxel_unet({**given, **others}, tower, noise=True)
        arguments = {**report.network, "spherical": SMALL["spherical"]}
        network = PointVoxelUNet(**arguments).eval()
        assert arguments.get("cells") == ("reference" if attention else None)
        network.load_state_dict(weights)
        assert torch.equal(network(batch), source(batch))
        assert len(report.dropped) == len(others)
        assert set(report.fates()) == {k.removeprefix("module.") for k in {**given, **others}}
        # Without noise the other classes keep their scores.
        weights, report = convert_point_voxel_unet({**given, **others}, tower)
        arguments = {**report.network, "spherical": SMALL["spherical"]}
        network = PointVoxelUNet(**arguments).eval()
        network.load_state_dict(weights)
        torch.testing.assert_close(network(batch), source(batch)[:, 1:], rtol=0, atol=1e-6)
        assert len(report.dropped) == len(others)
        assert set(report.fates()) == {k.removeprefix("module.") for k in {**given, **others}}
        assert "2 shortened by a class 0" in str(report)


def test_conversion_refuses():
    given = released(small())
    lacking = {k: v for k, v in given.items() if k != "vox_ups.2.0.net.0.kernel"}
    few = {k: v for k, v in given.items() if k != "vox_ups.2.1.0.net.3.kernel"}
    nan = {**given, "stem.0.kernel": given["stem.0.kernel"] * torch.nan}
    for weights, tower, text in (
        (given, "both", "tower='both' is none of teacher, student"),
        ({}, "teacher", "no entry begins with stem"),
        ({"model_s.stem.0.kernel": torch.ones(1)}, "teacher", "no entry begins with model_t.stem"),
        (small().state_dict(), "teacher", "converted already"),
        (lacking, "teacher", "vox_ups.2.0.net.0.kernel is not there"),
        (few, "teacher", "1 of .* keys lack .vox_ups.2.1.0.net.3.kernel"),
        ({**given, "stem.0.kernel": torch.ones(8, 4, 4)}, "teacher", "stem.0.kernel has the shape"),
        (nan, "teacher", "not finite"),
        (released(small(num_classes=1)), "teacher", "no class but noise"),
    ):
        with pytest.raises(InputError, match=text) as error:
            convert_point_voxel_unet(weights, tower)
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": (8,) * 8}, "expected 9 widths"),
        ({"width": 0.01}, "width=0.01.* at least 1"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"depth": 0}, "depth=0"),
        ({"head_size": 16}, "dim=8, head_size=16: dim must be a multiple"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"drop_path": -0.1}, "drop_path=-0.1"),
        ({"voxel_size": 0.0}, "voxel_size=0.0"),
        ({"cells": "own"}, "cells='own'"),
        ({"method": "own"}, "method='own'"),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(InputError, match=text) as error:
        PointVoxelUNet(**{**SMALL, **changes})
    assert "\n" not in str(error.value)


def test_bad_batches():
    network, batch = small(), cloud([20])
    none = {**{k: v[:0] for k, v in batch.items()}, "offset": torch.tensor([0])}
    for given, text in (
        ({**batch, "feat": batch["feat"][:, :2]}, "in_channels=4 but `feat` has 2 columns"),
        ({k: v for k, v in batch.items() if k != "grid_coord"}, "no grid_coord"),
        ({k: v for k, v in batch.items() if k != "coord"}, "no coord"),
        (none, "no points"),
        ({**batch, "grid_coord": batch["grid_coord"][:9]}, r"grid_coord \(9, 3\)"),
        ({**batch, "coord": batch["coord"][:, :2]}, r"coord \(20, 2\)"),
        ({**batch, "offset": torch.tensor([19])}, "which ends at 19"),
        ({**batch, "grid_coord": batch["grid_coord"] * 0.5}, "torch.float32: expected integers"),
        ({**batch, "coord": batch["coord"] * torch.nan}, "windows of attention: .* finite"),
    ):
        with pytest.raises(InputError, match=text) as error:
            network(given)
        assert "\n" not in str(error.value)
