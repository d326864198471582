"""Residual trunks: published sizes, strides and dilations, and the features against plain convolutions."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import InputError
from pointcept_kd.networks.resnet import RESNETS, BasicBlock, Bottleneck, ResNet
from pointcept_kd.networks.trunks import build_trunk

TINY = dict(depths=(1, 1, 1, 1), width=16, bottleneck=False)


def with_statistics(model, seed=0):
    """The model in evaluation, with running statistics that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "parameters", "entries", "channels"),
    [
        ("resnet18", 11_176_512, 120, 512),
        ("resnet34", 21_284_672, 216, 512),
        ("resnet50", 23_508_032, 318, 2048),
    ],
)
def test_sizes_are_the_published_ones(name, parameters, entries, channels):
    with torch.device("meta"):
        trunk = build_trunk(name)
    assert sum(p.numel() for p in trunk.parameters()) == parameters
    assert len(trunk.state_dict()) == entries
    assert trunk.out_channels == channels
    assert trunk.stride == 4


def test_names_are_those_of_torchvision():
    with torch.device("meta"):
        names = set(ResNet(**RESNETS["resnet18"]).state_dict())
    assert {n for n in names if n.startswith("layer2.0.") and n.endswith("weight")} == {
        f"layer2.0.{part}.weight"
        for part in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")
    }
    # The first stage of a basic network changes nothing, so it has no shortcut; that of a bottleneck does.
    assert not any(n.startswith("layer1.0.downsample") for n in names)
    with torch.device("meta"):
        assert "layer1.0.downsample.0.weight" in ResNet(**RESNETS["resnet50"]).state_dict()


def test_strides_become_dilations():
    with torch.device("meta"):
        deep, basic = ResNet(**RESNETS["resnet50"]), ResNet(**RESNETS["resnet34"])
    stages = [[block.conv2.dilation[0] for block in deep.get_submodule(f"layer{n}")] for n in range(1, 5)]  # fmt: skip
    assert stages == [[1, 1, 1], [1, 2, 2, 2], [2, 4, 4, 4, 4, 4], [4, 8, 8]]
    first = [[block.conv1.dilation[0] for block in basic.get_submodule(f"layer{n}")] for n in range(1, 5)]  # fmt: skip
    assert first == stages
    second = [[block.conv2.dilation[0] for block in basic.get_submodule(f"layer{n}")] for n in range(1, 5)]  # fmt: skip
    assert second == [[1] * 3, [2] * 4, [4] * 6, [8] * 3]
    for trunk in (deep, basic):
        blocks = [m for m in trunk.modules() if isinstance(m, (BasicBlock, Bottleneck))]
        assert len(blocks) == 16
        assert {conv.stride for b in blocks for conv in (b.conv1, b.conv2)} == {(1, 1)}


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_stride_of_the_trunk(stride, bottleneck):
    trunk = ResNet((1, 1, 1, 1), 4, bottleneck, stride).eval()
    channels = 128 if bottleneck else 32
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 64, 96)).shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_dilation_keeps_what_strides_compute(bottleneck, stride):
    """The weights of an ordinary network give the same features at its places: only more places have some."""
    torch.manual_seed(3)
    ordinary = with_statistics(ResNet((2, 2, 1, 2), 6, bottleneck, 32)).double()
    dilated = ResNet((2, 2, 1, 2), 6, bottleneck, stride).double().eval()
    dilated.load_state_dict(ordinary.state_dict())
    images = torch.rand(2, 3, 96, 160, dtype=torch.float64)
    every = 32 // stride
    with torch.no_grad():
        fine, coarse = dilated(images), ordinary(images)
    torch.testing.assert_close(fine[..., ::every, ::every], coarse)
    assert not torch.allclose(fine[..., 1::every, ::every], coarse)


def norm(x, weights, name):
    """BatchNorm in evaluation, written out."""
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5) ** 0.5
    return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def dilated_by_hand(x, weight, rate):
    """3 x 3 convolution of a dilation: nine shifted products, zero outside of the map."""
    out = x.new_zeros(len(x), len(weight), *x.shape[2:])
    wide = F.pad(x, [rate] * 4)
    height, width = x.shape[2:]
    for row in range(3):
        for column in range(3):
            top, left = row * rate, column * rate
            part = wide[:, :, top : top + height, left : left + width]
            out += torch.einsum("nchw,oc->nohw", part, weight[:, :, row, column])
    return out


def plain(weights, images, rates, bottleneck):
    """The trunk at stride 4 by its weights alone, written from He et al.'s table.

    `rates`: of every stage, its blocks' dilations of the first and of the second 3 x 3 convolution.
    """
    x = F.conv2d(images, weights["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(x, weights, "bn1").clamp(min=0), 3, 2, 1)
    for stage, blocks in enumerate(rates, start=1):
        for block, (first, second) in enumerate(blocks):
            at = f"layer{stage}.{block}"
            if bottleneck:
                y = F.conv2d(x, weights[f"{at}.conv1.weight"])
                y = norm(y, weights, f"{at}.bn1").clamp(min=0)
                y = dilated_by_hand(y, weights[f"{at}.conv2.weight"], first)
                y = F.conv2d(norm(y, weights, f"{at}.bn2").clamp(min=0), weights[f"{at}.conv3.weight"])  # fmt: skip
                y = norm(y, weights, f"{at}.bn3")
            else:
                y = dilated_by_hand(x, weights[f"{at}.conv1.weight"], first)
                y = norm(y, weights, f"{at}.bn1").clamp(min=0)
                y = dilated_by_hand(y, weights[f"{at}.conv2.weight"], second)
                y = norm(y, weights, f"{at}.bn2")
            if f"{at}.downsample.0.weight" in weights:
                way = F.conv2d(x, weights[f"{at}.downsample.0.weight"])
                x = norm(way, weights, f"{at}.downsample.1")
            x = (x + y).clamp(min=0)
    return x


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [
        (
            RESNETS["resnet50"],
            [
                [(1, 1)] * 3,
                [(1, 1)] + [(2, 2)] * 3,
                [(2, 2)] + [(4, 4)] * 5,
                [(4, 4), (8, 8), (8, 8)],
            ],
        ),
        (
            RESNETS["resnet18"],
            [[(1, 1)] * 2, [(1, 2), (2, 2)], [(2, 4), (4, 4)], [(4, 8), (8, 8)]],
        ),
        (TINY, [[(1, 1)], [(1, 2)], [(2, 4)], [(4, 8)]]),
    ],
    ids=["resnet50", "resnet18", "tiny"],
)
def test_against_plain_convolutions(sizes, rates):
    torch.manual_seed(0)
    trunk = with_statistics(ResNet(**sizes))
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = trunk(images)
        wanted = plain(trunk.state_dict(), images, rates, sizes["bottleneck"])
    assert found.shape == (1, trunk.out_channels, 8, 12)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_small_ones():
    trunk = build_trunk(TINY)
    assert trunk.out_channels == 128
    assert trunk.conv1.weight.shape == (16, 3, 7, 7)
    assert build_trunk(dict(TINY, bottleneck=True), 16).out_channels == 512


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ResNet(stride=6), "stride=6 is none of 4, 8, 16, 32"),
        (lambda: ResNet((1, 1, 1)), r"depths=\(1, 1, 1\), width=64: expected four depths"),
        (lambda: ResNet((1, 1, 0, 1)), "expected four depths and a width, of 1 or more"),
        (lambda: ResNet(width=0), "width=0"),
        (lambda: build_trunk("resnet51"), "trunk='resnet51': known are resnet18, resnet34"),
        (lambda: build_trunk(dict(layers=4)), "expected depths, width and bottleneck"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(InputError, match=says):
        make()
