"""SR-UNet34: keys, counts, a dense forward and its gradients, alignment of the cells, heads, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import DefaultSegmentor, DefaultSegmentorV2
from pointcept_kd.networks.residual_unet import PLANS, ResidualUNet

from .clouds import cloud, only, randomise_norms

SMALL = {
    "in_channels": 4,
    "num_classes": 3,
    "base_channels": 6,
    "channels": (6, 8, 10, 12, 12, 10, 8, 8),
    "layers": (1, 2, 1, 1, 1, 1, 1, 2),
}
CRITERIA = [{"type": "CrossEntropyLoss", "loss_weight": 1.0, "ignore_index": -1}]


def small(**changes):
    torch.manual_seed(0)
    network = ResidualUNet(**{**SMALL, **changes})
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 5:
                # So that every part of the network shows in a comparison.
                p.normal_(std=(p.shape[4] * 3) ** -0.5)
    randomise_norms(network)
    return network


def moved(batch, step):
    return {**batch, "grid_coord": batch["grid_coord"] + torch.tensor(step)}


# ------------------------------------------------------------------------------------------------------ keys and counts


def table(c, channels, layers, heads):
    """Keys and shapes, written from the layer table."""
    out = {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            out[f"{name}.bn.{leaf}"] = (width,)
        out[f"{name}.bn.num_batches_tracked"] = ()

    def conv(name, width, came, size):
        out[f"{name}.weight"] = (width, size, size, size, came)

    def blocks(i, came):
        width = channels[i - 1]
        for j in range(layers[i - 1]):
            name, first = f"block{i}.{j}", came if j == 0 else width
            conv(f"{name}.conv1", width, first, 3)
            norm(f"{name}.norm1", width)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.norm2", width)
            if first != width:
                out[f"{name}.downsample.0.weight"] = (width, first)
                norm(f"{name}.downsample.1", width)

    conv("conv0p1s1", c[1], c[0], 3)
    norm("bn0", c[1])
    came = c[1]
    for i, name in enumerate(("conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2"), 1):
        conv(name, came, came, 2)
        norm(f"bn{i}", came)
        blocks(i, came)
        came = channels[i - 1]
    skips = (channels[2], channels[1], channels[0], c[1])
    names = ("convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2")
    for i, (name, skip) in enumerate(zip(names, skips), 4):
        conv(name, channels[i], came, 2)
        norm(f"bntr{i}", channels[i])
        came = channels[i]
        blocks(i + 1, came + skip)
    for name, width in heads.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = (width, came), (width,)
    return out


def test_keys_and_shapes():
    full = ((32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2))
    for arguments, expected in (
        ({"class_level": 64}, table((1, 32), *full, {"final": 64, "final_class_level": 64})),
        (SMALL, table((4, 6), SMALL["channels"], SMALL["layers"], {"final": 3})),
        (
            {**SMALL, "num_classes": 0},
            table((4, 6), SMALL["channels"], SMALL["layers"], {}),
        ),
    ):
        with torch.device("meta"):
            network = ResidualUNet(**arguments)
        assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({"class_level": 64}, 37_855_392),
        ({"num_classes": 17}, 37_844_625),
        ({"num_classes": 20}, 37_844_916),
    ],
)
def test_published_counts(arguments, parameters):
    with torch.device("meta"):
        network = ResidualUNet(**arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters
    if "class_level" in arguments:
        assert (len(list(network.parameters())), len(network.state_dict())) == (190, 376)


@pytest.mark.parametrize(("plan", "millions"), [(14, "11.57"), (18, "21.70"), (34, "37.85")])
def test_plans(plan, millions):
    with torch.device("meta"):
        network = ResidualUNet(layers=PLANS[plan])
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}" == millions


def test_momenta_and_initial_weights():
    network = ResidualUNet(**SMALL, bn_momentum=0.02)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert module.momentum == (0.1 if ".norm" in name else 0.02), name
            assert module.eps == 1e-5
    torch.manual_seed(0)
    network = ResidualUNet(class_level=64, layers=PLANS[14])
    for name, fan in (
        ("conv3p4s2", 64 * 8),
        ("convtr6p4s2", 96 * 8),  # by what goes out
        ("block2.0.conv2", 64 * 27),
        ("block4.0.downsample.0", 128),
        ("final", 96),
    ):
        weight = network.get_submodule(name).weight
        assert weight.abs().max() <= fan**-0.5
        assert weight.std().item() == pytest.approx((3 * fan) ** -0.5, rel=0.05), name


# --------------------------------------------------------------------------------------------------------- the function


def dense_forward(state, layers, cells, feat, side):
    """The same network on dense grids, masked to the occupied cells of each level, in evaluation."""

    def conv(name, x, **options):
        return F.conv3d(x, state[f"{name}.weight"].permute(0, 4, 1, 2, 3), **options)

    def norm(name, x):
        at = (state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var"))
        mean, var = (v.view(1, -1, 1, 1, 1) for v in at)
        at = (state[f"{name}.bn.{leaf}"] for leaf in ("weight", "bias"))
        scale, shift = (v.view(1, -1, 1, 1, 1) for v in at)
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def stage(i, x, mask):
        for j in range(layers[i - 1]):
            b = f"block{i}.{j}"
            y = mask * F.relu(norm(f"{b}.norm1", conv(f"{b}.conv1", x, padding=1)))
            y = norm(f"{b}.norm2", conv(f"{b}.conv2", y, padding=1))
            matrix = state.get(f"{b}.downsample.0.weight")
            if matrix is not None:
                x = norm(f"{b}.downsample.1", torch.einsum("oc,bcxyz->boxyz", matrix, x))
            x = mask * F.relu(y + x)
        return x

    x, y, z = cells.unbind(1)
    grid = torch.zeros(side, side, side, feat.shape[1], dtype=feat.dtype)
    grid = grid.index_put((x, y, z), feat).permute(3, 0, 1, 2)[None]
    mask = torch.zeros(1, 1, side, side, side, dtype=feat.dtype)
    mask[0, 0, x, y, z] = 1
    grid = mask * F.relu(norm("bn0", conv("conv0p1s1", grid, padding=1)))
    skips, masks = [grid], [mask]
    for i, name in enumerate(("conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2"), 1):
        mask = F.max_pool3d(mask, 2)
        grid = stage(i, mask * F.relu(norm(f"bn{i}", conv(name, grid, stride=2))), mask)
        skips.append(grid)
        masks.append(mask)
    for i, name in enumerate(("convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2"), 4):
        mask, skip = masks[7 - i], skips[7 - i]
        kernel = state[f"{name}.weight"].permute(4, 0, 1, 2, 3)
        up = mask * F.relu(norm(f"bntr{i}", F.conv_transpose3d(grid, kernel, stride=2)))
        grid = stage(i + 1, torch.cat([up, skip], 1), mask)
    rows = grid[0, :, x, y, z].t()
    return rows @ state["final.weight"].t() + state["final.bias"]


def test_dense_forward_and_gradients():
    network = small().double().eval()
    batch = cloud([300], high=16, dtype=torch.float64)
    feat = batch["feat"].requires_grad_()
    state = dict(network.state_dict(keep_vars=True))
    expected = dense_forward(state, SMALL["layers"], batch["grid_coord"], feat, 16)
    made = network(batch)
    assert expected.std() > 0.01
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)
    names, parameters = zip(*network.named_parameters())
    cotangent = torch.randn(made.shape, dtype=made.dtype)
    wanted = torch.autograd.grad(expected, (feat, *parameters), cotangent)
    got = torch.autograd.grad(made, (feat, *parameters), cotangent)
    for name, a, b in zip(("feat", *names), got, wanted):
        assert b.abs().max() > 0, name
        assert torch.allclose(a, b, atol=1e-9 * float(b.abs().max()) + 1e-12, rtol=0), name


@torch.no_grad()
def test_alignment_of_the_cells():
    network = small().double().eval()
    batch = cloud([120, 50], high=16, dtype=torch.float64)
    made = network(batch)
    # Far below 0 along an axis, with nothing at or above it: as azimuths of half a turn may be.
    for step in ((16, -32, 48), (-16, -320, -160)):
        assert torch.allclose(network(moved(batch, step)), made, atol=1e-12)
    for step in ((17, 0, 0), (0, 0, -8)):
        assert not torch.allclose(network(moved(batch, step)), made, atol=1e-3)


@torch.no_grad()
def test_evaluation():
    network = small().eval()
    batch = cloud([60, 1, 40, 0])
    together = network(batch)
    assert torch.equal(together, network(batch))
    assert torch.allclose(network(only(batch, 2)), together[61:], atol=1e-5)
    p = torch.cat([torch.randperm(60), torch.tensor([60]), 61 + torch.randperm(40)])
    mixed = {k: v if k == "offset" else v[p] for k, v in batch.items()}
    assert torch.allclose(network(mixed), together[p], atol=1e-5)


@torch.no_grad()
def test_heads():
    batch = cloud([40, 30])
    both = small(class_level=5, normalise=True).eval()
    made = both(batch)
    assert list(made) == ["final", "final_class_level"]
    points, classes = made.values()
    assert (points.shape, classes.shape) == ((70, 3), (70, 5))
    for made in (points, classes):
        assert torch.allclose(made.norm(dim=1), torch.ones(70), atol=1e-6)
    both.normalise = False
    raw = both(batch)["final"]
    assert torch.allclose(raw / raw.norm(dim=1, keepdim=True), points, atol=1e-6)
    # Without heads: what they read.
    trunk = small(num_classes=0).eval()
    trunk.load_state_dict({k: v for k, v in both.state_dict().items() if "final" not in k})
    assert torch.allclose(both.final(trunk(batch)), raw, atol=1e-6)
    assert trunk(batch).shape == (70, 8)
    one = small(normalise=True).eval()
    assert torch.equal(one.embed(batch)["final"], one(batch))


def test_training():
    network = small(class_level=5, normalise=True).train()
    points, classes = network(cloud([90, 70])).values()
    (points * torch.randn_like(points)).sum().backward()
    assert network.final_class_level.weight.grad is None
    (network(cloud([90, 70]))["final_class_level"] * torch.randn_like(classes)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad.abs().max() > 0, name
    # A single cell has no variance, and no cell beside it.
    sum(out.sum() for out in network(cloud([1])).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@torch.no_grad()
def test_autocast():
    network, batch = small(normalise=True).eval(), cloud([60])
    exact = network(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(batch)
    assert made.dtype == torch.float32
    assert torch.allclose(made.norm(dim=1), torch.ones(60), atol=1e-5)
    assert (made - exact).abs().max() < 0.2


# --------------------------------------------------------------------------------------------- in segmentors, refusals


def test_in_segmentors():
    batch = cloud([50, 20])
    backbone = {"type": "kd.ResidualUNet", **SMALL}
    first = MODELS.build({"type": "DefaultSegmentor", "backbone": backbone, "criteria": CRITERIA})
    assert isinstance(first, DefaultSegmentor)
    assert isinstance(first.backbone, ResidualUNet)
    second = MODELS.build(
        {
            "type": "DefaultSegmentorV2",
            "num_classes": 3,
            "backbone_out_channels": 8,
            "backbone": {**backbone, "num_classes": 0},
            "criteria": CRITERIA,
        }
    )
    assert isinstance(second, DefaultSegmentorV2)
    for model in (first, second):
        model.train()(batch)["loss"].backward()
        assert model.backbone.conv0p1s1.weight.grad.abs().max() > 0
        assert model.eval()(batch)["seg_logits"].shape == (70, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": (8,) * 6}, "channels=.* expected 8 entries each"),
        ({"layers": (1,) * 9}, "layers=.* expected 8 entries each"),
        ({"layers": (1,) * 7 + (0,)}, "must be at least 1"),
        ({"in_channels": 0}, "in_channels=0.* must be at least 1"),
        ({"base_channels": -3}, "base_channels=-3.* must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": 0, "class_level": 4}, "class_level needs num_classes"),
        ({"bn_momentum": 0.0}, "bn_momentum=0.0: expected above 0"),
        ({"block_bn_momentum": 1.5}, "block_bn_momentum=1.5: expected above 0 and at most 1"),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(InputError, match=text):
        ResidualUNet(**{**SMALL, **changes})


def test_bad_batches():
    network, batch = small(), cloud([20])
    without = {k: v for k, v in batch.items() if k != "grid_coord"}
    none = {**{k: v[:0] for k, v in batch.items()}, "offset": torch.tensor([0])}
    for given, text in (
        ({**batch, "feat": batch["feat"][:, :2]}, "in_channels=4 but `feat` has 2 columns"),
        (without, "no grid_coord"),
        (none, "no points"),
        ({**batch, "grid_coord": batch["grid_coord"][:9]}, r"grid_coord \(9, 3\)"),
        ({**batch, "grid_coord": batch["grid_coord"][:, :2]}, r"grid_coord \(20, 2\)"),
        ({**batch, "offset": torch.tensor([19])}, "offset, which ends at 19"),
        ({**batch, "grid_coord": batch["grid_coord"] * 0.5}, "torch.float32: expected integers"),
    ):
        with pytest.raises(InputError, match=text) as error:
            network(given)
        assert "\n" not in str(error.value)
