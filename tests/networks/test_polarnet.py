"""PolarNet: its layers against plain formulas, its parts against the published numbers, one batch against another."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointcept_kd.distillers.taps import Taps
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks.polarnet import (
    PARTITION,
    BirdsEyeUNet,
    DropBlock,
    PolarNet,
    RingConv,
    Up,
    VoxelHead,
)
from pointcept_kd.networks.voxels import build_partition

from .clouds import only, randomise_norms

CLASSES = 5
# Not divisible by 16 either way: 50 -> 25 -> 12 -> 6 -> 3 and 40 -> 20 -> 10 -> 5 -> 2.
RING = dict(low=(0.5, -math.pi, -2), high=(20, math.pi, 2), shape=(50, 40, 4))
BOX = dict(low=(-16, -16, -2), high=(16, 16, 2), shape=(40, 33, 4), frame="cartesian", spacing="n")
SMALL = dict(
    num_classes=CLASSES, point_channels=(8, 8, 8, 16), compressed=6, base=4, partition=RING
)


def scans(counts, seed=0):
    """Batches of points around the sensor, dense near it; some outside of every grid."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(counts)
    radius = 25 * torch.rand(n, generator=draw) ** 2
    angle = 2 * math.pi * torch.rand(n, generator=draw)
    x, y = radius * angle.cos(), radius * angle.sin()
    z = 2.5 * torch.randn(n, generator=draw)
    strength = torch.rand(n, generator=draw)
    coord = torch.stack((x, y, z), 1)
    return dict(
        coord=coord,
        feat=torch.cat((coord, strength[:, None]), 1),
        offset=torch.tensor(counts).cumsum(0),
        segment=torch.randint(-1, CLASSES - 1, (n,), generator=draw),
    )


def small(train=False, seed=0, **changes):
    torch.manual_seed(seed)
    network = PolarNet(**{**SMALL, **changes})
    randomise_norms(network)
    return network.train(train)


def points_of(scores):
    return scores.logits[scores.inverse]


# ------------------------------------------------------------------------------ published numbers


def published_keys():
    """The 163 names of a released student."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [f"PPmodel.{i}.{leaf}" for i in (0, 2, 5, 8) for leaf in norm]
    keys += [f"PPmodel.{i}.{leaf}" for i in (1, 4, 7, 10) for leaf in norm[:2]]
    keys += [f"fea_compression.0.{leaf}" for leaf in norm[:2]]
    root = "BEV_model.network"
    keys += [f"{root}.inc.conv.0.{leaf}" for leaf in norm]
    doubles = ["inc.conv.1", *(f"down{i}.mpconv.1" for i in range(1, 5))]
    doubles += [f"up{i}.conv" for i in range(1, 5)]
    for double in doubles:
        for conv in ("conv1", "conv2"):
            keys += [f"{root}.{double}.{conv}.0.{leaf}" for leaf in norm[:2]]
            keys += [f"{root}.{double}.{conv}.1.{leaf}" for leaf in norm]
    return keys + [f"{root}.outc.conv.{leaf}" for leaf in norm[:2]]


def test_keys_and_parameters_are_the_published_ones():
    with torch.device("meta"):
        network = PolarNet()
        nineteen = PolarNet(num_classes=19)
    keys = published_keys()
    assert len(keys) == 163
    assert set(network.state_dict()) == set(keys)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(network) == 13_644_530
    assert count(nineteen) == 13_642_450
    assert count(network.PPmodel) == 174_482
    assert count(network.fea_compression) == 16_416
    parts = dict(inc=55_744, down1=221_952, down2=886_272, down3=3_542_016, down4=4_721_664)
    parts |= dict(up1=2_950_656, up2=738_048, up3=184_704, up4=110_976, outc=41_600)
    for name, expected in parts.items():
        assert count(getattr(network.network, name)) == expected, name


@pytest.mark.parametrize("train", [False, True])
def test_shapes_at_full_size(train):
    with torch.device("meta"):
        network = BirdsEyeUNet(32, 640, 64, True, {}).train(train)
        seen = {}
        for name, module in network.named_children():
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])})
            )
        scores = network.outc(network(torch.empty(2, 32, 480, 360)))
    assert scores.shape == (2, 640, 480, 360)
    assert seen["inc"] == (64, 480, 360)
    assert seen["down1"] == (128, 240, 180)
    assert seen["down2"] == (256, 120, 90)
    assert seen["down3"] == (512, 60, 45)
    assert seen["down4"] == (512, 30, 22)
    assert seen["up1"] == (256, 60, 45)
    assert seen["up2"] == (128, 120, 90)
    assert seen["up3"] == (64, 240, 180)
    assert seen["up4"] == (64, 480, 360)


# ----------------------------------------------------------------------------------------- layers


def ring_oracle(layer, x, train):
    """Convolution, normalisation and activation of a `RingConv`, cell by cell."""
    conv, norm = layer[0], layer[1]
    b, _, r, p = x.shape
    weight, bias = conv.weight.double(), conv.bias.double()
    y = torch.zeros(b, len(bias), r, p, dtype=torch.float64)
    for i in range(r):
        for j in range(p):
            y[:, :, i, j] = bias
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    a, c = i + di, j + dj
                    if layer.ring:
                        c %= p
                    if 0 <= a < r and 0 <= c < p:
                        y[:, :, i, j] += x[:, :, a, c].double() @ weight[:, :, di + 1, dj + 1].T
    mean = y.mean((0, 2, 3)) if train else norm.running_mean.double()
    var = y.var((0, 2, 3), correction=0) if train else norm.running_var.double()
    mean, var, gain, shift = (
        v[None, :, None, None] for v in (mean, var, norm.weight.double(), norm.bias.double())
    )
    y = (y - mean) / (var + 1e-5).sqrt() * gain + shift
    return torch.where(y > 0, y, 0.01 * y)


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("columns", [2, 5])
@torch.no_grad()
def test_ring_convolution_cell_by_cell(ring, train, columns):
    torch.manual_seed(0)
    layer = RingConv(3, 4, ring).train(train)
    nn.init.normal_(layer[1].weight)
    nn.init.normal_(layer[1].bias)
    layer[1].running_mean.normal_()
    layer[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 6, columns)
    expected = ring_oracle(layer, x, train)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)


def test_ring_by_hand():
    """The row [1, 0, 0, 0] under a kernel of ones; zeros beyond the ends would give [1, 1, 0, 0]."""
    for ring, expected in ((True, [1, 1, 0, 1]), (False, [1, 1, 0, 0])):
        layer = RingConv(1, 1, ring).eval()
        with torch.no_grad():
            layer[0].weight.zero_()[0, 0, 1] = 1
            layer[0].bias.zero_()
            layer[1].running_var.fill_(1 - layer[1].eps)
        row = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4)
        torch.testing.assert_close(layer(row).flatten(), torch.tensor(expected).float())


def test_a_turned_map_gives_a_turned_map():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 5, 8)
    for ring in (True, False):
        layer = RingConv(3, 4, ring).eval()
        same = torch.allclose(layer(x.roll(3, 3)), layer(x).roll(3, 3), atol=1e-6)
        assert same == ring


def test_gradients_of_the_ring_in_evaluation():
    torch.manual_seed(0)
    layer = RingConv(2, 2, True).double().eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def doubled(x):
    """Bilinear doubling whose corner cells keep their values, by interpolating along one axis and then the other."""
    for axis in (2, 3):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, 2 * n)
        x = np.apply_along_axis(lambda line, n=n, at=at: np.interp(at, np.arange(n), line), axis, x)
    return x


@pytest.mark.parametrize(("fine", "front"), [((6, 4), (0, 0)), ((7, 5), (0, 0)), ((8, 7), (1, 1))])
@torch.no_grad()
def test_up_block(fine, front):
    """Coarse 3 x 2 doubles to 6 x 4; what is missing is zero, its smaller half in front; the fine map comes first."""
    torch.manual_seed(0)
    up = Up(5, 4, True, {}).eval()
    coarse, skip = torch.randn(2, 2, 3, 2), torch.randn(2, 3, *fine)
    padded = np.zeros((2, 2, *fine))
    padded[:, :, front[0] : front[0] + 6, front[1] : front[1] + 4] = doubled(
        coarse.double().numpy()
    )
    joined = torch.cat((skip, torch.from_numpy(padded).float()), 1)
    expected = ring_oracle(up.conv.conv1, joined, False).float()
    expected = ring_oracle(up.conv.conv2, expected, False)
    torch.testing.assert_close(up(coarse, skip).double(), expected, atol=1e-5, rtol=0)


def test_published_odd_width_ends_in_a_zero_column():
    """22 columns become 44, and the 45th is zero on the right."""
    up = Up(2, 1, True, {}).eval()
    seen = []
    up.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    up(torch.ones(1, 1, 30, 22), torch.ones(1, 1, 60, 45))
    joined = seen[0]
    assert joined.shape == (1, 2, 60, 45)
    assert bool((joined[:, 1, :, 44] == 0).all())
    assert joined[:, 1, :, :44].min() > 0.999


class TestDropBlock:
    """Squares dropped in training."""

    def test_nothing_in_evaluation(self):
        x = torch.randn(2, 3, 9, 9)
        assert DropBlock().eval()(x) is x
        assert DropBlock(probability=0.0).train()(x) is x

    def test_share_of_kept_cells(self):
        """A cell is kept when no cell of the 7 x 7 around it, as far as there are any, is a middle."""
        torch.manual_seed(0)
        rows, columns, samples = 20, 15, 1500
        out = DropBlock(7, 0.5).train()(torch.ones(samples, 1, rows, columns))
        kept = (out > 0).double().mean((0, 1))
        expected = torch.zeros(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(columns):
                high = min(i + 3, rows - 1) - max(i - 3, 0) + 1
                wide = min(j + 3, columns - 1) - max(j - 3, 0) + 1
                expected[i, j] = (1 - 0.5 / 49) ** (high * wide)
        assert expected[10, 7] == pytest.approx(0.605, abs=1e-3)
        # Five standard deviations of a share of 1500, whichever of the 300 cells.
        assert (kept - expected).abs().max() < 5 * (0.25 / samples) ** 0.5
        assert kept.mean() == pytest.approx(expected.mean().item(), abs=0.01)

    def test_scale_and_mask(self):
        torch.manual_seed(0)
        out = DropBlock().train()(torch.ones(3, 4, 24, 24))
        kept = out[:, 0] > 0
        assert 0 < kept.sum() < kept.numel()
        # One mask for all channels, one scale for the batch, and the mean is what it was.
        assert bool(((out > 0) == kept[:, None]).all())
        torch.testing.assert_close(out[out > 0], (kept.numel() / kept.sum()).expand(4 * kept.sum()))
        assert out.mean() == pytest.approx(1, abs=1e-5)
        assert bool((kept[0] != kept[1]).any())
        # What is dropped is made of whole squares: eroding and dilating it changes nothing away from the borders.
        dropped = (~kept).float()[:, None]
        eroded = 1 - F.max_pool2d(1 - dropped, 7, 1, 3)
        opened = F.max_pool2d(eroded, 7, 1, 3)
        assert torch.equal(opened[..., 6:-6, 6:-6], dropped[..., 6:-6, 6:-6])

    def test_no_cell_left(self):
        torch.manual_seed(0)
        block = DropBlock(3, 0.999)
        outs = [block(torch.ones(1, 1, 2, 2)) for _ in range(60)]
        assert any(float(out.sum()) == 0 for out in outs)
        assert all(bool(out.isfinite().all()) for out in outs)

    def test_bad_settings(self):
        for settings in (dict(size=6), dict(size=0), dict(probability=1.0), dict(probability=-0.1)):
            with pytest.raises(InputError, match="odd size"):
                PolarNet(**{**SMALL, "drop_block": settings})
        with pytest.raises(InputError, match="drop_block has p;"):
            PolarNet(**{**SMALL, "drop_block": dict(p=0.5)})


# ------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("partition", [RING, BOX], ids=["ring", "box"])
@torch.no_grad()
def test_sparse_head_equals_the_dense_one_at_the_voxels(partition):
    batch = scans([700, 400])
    network = small(partition=partition)
    scores = network(batch)
    dense = network.dense_logits(batch)
    r, p, z = partition["shape"]
    assert dense.shape == (2, CLASSES, r, p, z)
    scan, i, j, k = scores.indices.T
    expected = dense[scan, :, i, j, k]
    assert (scores.logits - expected).abs().max() < 1e-5
    assert torch.equal(scores.logits.argmax(1), expected.argmax(1))
    network.dense_head = True
    seen = []
    network.network.outc.register_forward_hook(lambda _, __, out: seen.append(out))
    through = network(batch)
    assert (through.logits - expected).abs().max() < 1e-5
    # Channel z * K + c.
    assert torch.equal(seen[0].view(2, z, CLASSES, r, p).permute(0, 2, 3, 4, 1), dense)


def test_head_gradients_are_those_of_the_dense_one():
    torch.manual_seed(0)
    head = VoxelHead(3, 4 * 2).double()
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    pillar, height = torch.tensor([0, 0, 2, 4, 4, 4]), torch.tensor([3, 1, 1, 0, 1, 3])
    assert torch.autograd.gradcheck(lambda x: head.at(x, pillar, height, 4), (features,))
    weights = torch.randn(6, 2, dtype=torch.float64)
    sparse = (head.at(features, pillar, height, 4) * weights).sum()
    full = F.linear(features, head.conv.weight.view(8, 3), head.conv.bias).view(5, 4, 2)
    dense = (full[pillar, height] * weights).sum()
    for a, b in zip(*(torch.autograd.grad(x, list(head.parameters())) for x in (sparse, dense))):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------- network


@torch.no_grad()
def test_rows_are_the_occupied_voxels():
    batch = scans([300, 200])
    network = small()
    scores = network(batch)
    points = network.partition(batch)
    assert torch.equal(scores.indices, torch.unique(points.indices, dim=0))
    assert torch.equal(scores.indices[scores.inverse], points.indices)
    assert scores.logits.shape == (len(scores.indices), CLASSES)


@torch.no_grad()
def test_pillar_map_point_by_point():
    """What the U-Net gets: the compressed maximum of a pillar's points; zero where there are none."""
    batch = scans([120])
    network = small()
    seen = []
    network.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(batch)
    points = network.partition(batch)
    encoded = network.PPmodel(points.features)
    expected = torch.zeros(1, 6, 50, 40)
    for cell in {tuple(row) for row in points.indices[:, 1:3].tolist()}:
        inside = (points.indices[:, 1:3] == torch.tensor(cell)).all(1)
        expected[0, :, cell[0], cell[1]] = network.fea_compression(
            encoded[inside].amax(0, keepdim=True)
        )[0]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_same_twice_and_in_another_order():
    batch = scans([900])
    network = small()
    first, again = network(batch), network(batch)
    assert torch.equal(first.logits, again.logits)
    mixed = torch.randperm(900)
    moved = network({**batch, "coord": batch["coord"][mixed], "feat": batch["feat"][mixed]})
    a, b = points_of(first)[mixed], points_of(moved)
    assert (a - b).abs().max() < 1e-5
    assert torch.equal(a.argmax(1), b.argmax(1))


@pytest.mark.parametrize("partition", [RING, BOX], ids=["ring", "box"])
@torch.no_grad()
def test_scans_of_a_batch_do_not_mix(partition):
    batch = scans([500, 1, 300])
    network = small(partition=partition)
    together = points_of(network(batch))
    alone = torch.cat([points_of(network(only(batch, i))) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_few_points():
    network = small()
    one = network(scans([1]))
    assert one.logits.shape == (1, CLASSES)
    assert bool(one.logits.isfinite().all())
    # An empty scan between two others changes nothing.
    batch = scans([30, 20])
    gap = {**batch, "offset": torch.tensor([30, 30, 50])}
    torch.testing.assert_close(network(batch).logits, network(gap).logits, atol=1e-5, rtol=1e-5)
    small(train=True)(scans([1]))


def test_every_parameter_learns():
    network = small(train=True)
    scores = network(scans([800, 600]))
    scores.logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # A bias before a normalisation has no effect, and its gradient is rounding.
        if parameter.dim() > 1:
            assert parameter.grad.abs().max() > 0, name


def test_gradients_in_training_and_evaluation_meet():
    """With the running statistics the folded weights and the layers one by one are the same function."""
    batch = scans([300])
    grads = []
    for folded in (True, False):
        network = small()
        if not folded:
            for layer in network.modules():
                if isinstance(layer, RingConv):
                    layer[1].training = True
                    layer[1].forward = lambda x, norm=layer[1]: F.batch_norm(
                        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
                    )
        network(batch).logits.square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_points_of_a_pillar_are_capped_in_training_alone():
    batch = scans([600])
    for train, cap, expected in ((True, 1, None), (True, 0, 600), (False, 1, 600)):
        network = small(train=train, max_points=cap)
        rows = []
        network.PPmodel.register_forward_hook(lambda _, __, out, rows=rows: rows.append(len(out)))
        scores = network(batch)
        pillars = len(torch.unique(scores.indices[:, :3], dim=0))
        assert sum(rows) == (pillars if expected is None else expected)


def test_bfloat16():
    batch = scans([500])
    for train in (False, True):
        network = small(train=train)
        exact = None
        if not train:
            with torch.no_grad():
                exact = network(batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(batch).logits
        assert logits.dtype == torch.bfloat16
        assert bool(logits.isfinite().all())
        if exact is not None:
            assert (logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
        logits.float().square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_taps():
    """Every map of the docstring, while training too."""
    batch = scans([400, 300])
    paths = {n: f"BEV_model.network.{n}" for n in ("down1", "down3", "up1", "up3", "up4", "outc")}
    network = small(train=True, dense_head=True)
    taps = Taps(network, {**paths, "points": "partition"})
    with taps.record() as seen:
        network(batch)
    shapes = {name: tuple(seen[name].feat.shape) for name in paths}
    assert shapes == dict(
        down1=(2, 8, 25, 20),
        down3=(2, 32, 6, 5),
        up1=(2, 16, 6, 5),
        up3=(2, 4, 25, 20),
        up4=(2, 4, 50, 40),
        outc=(2, 4 * CLASSES, 50, 40),
    )
    assert seen["points"].feat.shape == (700, 9)
    # After DropBlock: some cells of a sample are zero in all channels.
    assert bool((seen["up4"].feat == 0).all(1).any())


def test_circle_or_not():
    def grid(**changes):
        return build_partition({**PARTITION, **changes})

    assert grid().full_circle
    assert grid(low=(0, -3.1415926, -4), high=(50, 3.1415926, 2)).full_circle
    assert not grid(low=(3, -1.5, -3), high=(50, 1.5, 1.5)).full_circle
    assert not grid(low=(3, -math.pi, -3), frame="cartesian").full_circle
    for partition, ring in ((RING, True), (BOX, False)):
        layers = [m for m in small(partition=partition).modules() if isinstance(m, RingConv)]
        assert len(layers) == 18
        assert all(layer.ring == ring for layer in layers)


def test_learns_as_a_segmentor():
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type="kd.VoxelSegmentor",
            backbone=dict(type="kd.PolarNet", **SMALL, drop_block=dict(probability=0.0)),
            criteria=[dict(type="CrossEntropyLoss", ignore_index=0)],
        )
    )
    batch = scans([250])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(45):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    out = model.eval()({k: v for k, v in batch.items() if k != "segment"})
    assert set(out) == {"seg_logits"}
    assert out["seg_logits"].shape == (250, CLASSES - 1)


def test_bad_arguments():
    with pytest.raises(InputError, match="at least 32 cells"):
        PolarNet(**{**SMALL, "partition": {**RING, "shape": (64, 31, 4)}})
    with pytest.raises(InputError, match="num_classes=0"):
        PolarNet(**{**SMALL, "num_classes": 0})
    with pytest.raises(InputError, match="two widths"):
        PolarNet(**{**SMALL, "point_channels": (8,)})
    with pytest.raises(InputError, match="in_channels=4 but `feat` has 5"):
        small()({**scans([9]), "feat": torch.randn(9, 5)})
