"""Pixel features of images: sizes, the trunk against plain convolutions, chosen pixels, weight files."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks.image import (
    WEIGHTS,
    Bottleneck,
    ImageEncoder,
    ResNet50,
    enlarge,
    interpolate_at,
)


@pytest.fixture(scope="module")
def trunk():
    """A trunk with running statistics that differ from channel to channel."""
    torch.manual_seed(0)
    model = ResNet50()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(trunk):
    torch.manual_seed(1)
    model = ImageEncoder(heads=dict(pp=5, sem=3), allow_random=True)
    model.trunk.load_state_dict(trunk.state_dict())
    return model


def test_sizes_are_the_published_ones(trunk):
    assert sum(p.numel() for p in trunk.parameters()) == 23_508_032
    assert len(trunk.state_dict()) == 318
    model = MODELS.build(dict(type="kd.ImageEncoder", allow_random=True))
    assert [sum(p.numel() for p in head.parameters()) for head in model.heads.values()] == [
        131_136
    ] * 2
    assert not any(key in model.state_dict() for key in ("mean", "std"))


def test_strides_become_dilations(trunk):
    dilations = [
        [block.conv2.dilation[0] for block in trunk.get_submodule(f"layer{number}")]
        for number in range(1, 5)
    ]
    assert dilations == [[1, 1, 1], [1, 2, 2, 2], [2, 4, 4, 4, 4, 4], [4, 8, 8]]
    assert {block.conv2.stride for block in trunk.modules() if isinstance(block, Bottleneck)} == {
        (1, 1)
    }


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_stride_of_the_trunk(stride):
    with torch.no_grad():
        assert ResNet50(stride).eval()(torch.rand(1, 3, 64, 96)).shape == (
            1,
            2048,
            64 // stride,
            96 // stride,
        )


def plain(weights, images):
    """The trunk at stride 4 by its weights alone, written from He et al.'s table."""

    def norm(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5) ** 0.5
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    x = F.conv2d(images, weights["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(x, "bn1").clamp(min=0), 3, 2, 1)
    rates = {1: [1] * 3, 2: [1] + [2] * 3, 3: [2] + [4] * 5, 4: [4, 8, 8]}
    for stage, dilations in rates.items():
        for block, rate in enumerate(dilations):
            name = f"layer{stage}.{block}"
            y = norm(F.conv2d(x, weights[f"{name}.conv1.weight"]), f"{name}.bn1").clamp(min=0)
            y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=rate, dilation=rate)
            y = F.conv2d(norm(y, f"{name}.bn2").clamp(min=0), weights[f"{name}.conv3.weight"])
            y = norm(y, f"{name}.bn3")
            if block == 0:
                x = norm(
                    F.conv2d(x, weights[f"{name}.downsample.0.weight"]), f"{name}.downsample.1"
                )
            x = (x + y).clamp(min=0)
    return x


def test_trunk_against_plain_convolutions(trunk):
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, wanted = trunk(images), plain(trunk.state_dict(), images)
    assert found.shape == (1, 2048, 8, 12)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_every_pixel_has_a_feature_of_length_one(encoder):
    features = encoder(torch.rand(2, 3, 32, 48))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        "pp": (2, 5, 32, 48),
        "sem": (2, 3, 32, 48),
    }
    for x in features.values():
        torch.testing.assert_close(x.norm(dim=1), torch.ones(2, 32, 48))


def test_chosen_pixels_are_those_of_the_whole(encoder):
    images = torch.rand(2, 3, 32, 48)
    pixels = torch.tensor(
        [[0, 0, 0], [1, 31, 47], [0, 31, 0], [1, 13, 22], [0, 7, 46], [1, 13, 22]]
    )
    whole, chosen = encoder(images), encoder.at(images, pixels)
    for name, x in chosen.items():
        wanted = whole[name][pixels[:, 0], :, pixels[:, 1], pixels[:, 2]]
        torch.testing.assert_close(x, wanted)
    assert encoder.at(images, pixels[:0])["pp"].shape == (0, 5)


def test_interpolation_by_hand():
    maps = torch.tensor([[[[0.0, 3.0], [6.0, 9.0]]]])
    pixels = torch.tensor([[0, row, column] for row in range(4) for column in range(4)])
    found = interpolate_at(maps, pixels, (4, 4)).view(4, 4)
    torch.testing.assert_close(found, torch.arange(4.0)[:, None] * 2 + torch.arange(4.0))
    torch.testing.assert_close(found, enlarge(maps, (4, 4))[0, 0])
    # A single cell, and a single pixel.
    assert interpolate_at(maps[..., :1, :1], pixels[:3], (4, 4)).unique().tolist() == [0]
    assert interpolate_at(maps, pixels[:1], (1, 1)).tolist() == [[0]]


def test_gradients_of_chosen_pixels():
    maps = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    pixels = torch.tensor([[0, 0, 0], [1, 8, 11], [1, 5, 3], [0, 2, 7]])
    assert torch.autograd.gradcheck(lambda x: interpolate_at(x, pixels, (9, 12)), maps)


def test_only_heads_learn(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.trunk.modules())
    before = {key: value.clone() for key, value in encoder.trunk.state_dict().items()}
    sum(x.sum() for x in encoder(torch.rand(1, 3, 32, 32)).values()).backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is not None} == {
        f"heads.{head}.{part}" for head in ("pp", "sem") for part in ("weight", "bias")
    }
    assert all(torch.equal(before[key], value) for key, value in encoder.trunk.state_dict().items())
    encoder.zero_grad()


def test_images_are_normalised(encoder):
    kept = []
    hook = encoder.trunk.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    encoder.coarse(torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].expand(1, 3, 4, 4))
    encoder.coarse(torch.ones(1, 3, 4, 4))
    hook.remove()
    torch.testing.assert_close(kept[0], torch.zeros(1, 3, 4, 4))
    torch.testing.assert_close(
        kept[1][0, :, 0, 0], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weight_files(kind, trunk, tmp_path):
    place, prefix, without = WEIGHTS[kind]
    weights = {f"{prefix}{key}": value for key, value in trunk.state_dict().items()}
    weights.update({f"{prefix}{start}x.weight": torch.zeros(2) for start in without})
    weights["module.encoder_k.conv1.weight"] = torch.zeros(1)  # of another part
    torch.save(weights if place is None else {place: weights, "epoch": 3}, tmp_path / "w.pth")
    model = ImageEncoder(str(tmp_path / "w.pth"), kind)
    for key, value in trunk.state_dict().items():
        assert torch.equal(model.trunk.state_dict()[key], value)


def test_weight_files_that_do_not_fit(trunk, tmp_path):
    weights = dict(trunk.state_dict())
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"lacks 318 of the 318 entries.*module.encoder_q.conv1.weight"
    ):
        ImageEncoder(str(tmp_path / "w.pth"), "moco_v2")
    with pytest.raises(InputError, match="no 'network', where obow weights are"):
        ImageEncoder(str(tmp_path / "w.pth"), "obow")
    with pytest.raises(InputError, match="weights of 'clip': known are moco_v1"):
        ImageEncoder(str(tmp_path / "w.pth"), "clip")
    weights["layer1.0.conv1.weight"] = torch.zeros(64, 32, 1, 1)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"layer1.0.conv1.weight is \(64, 32, 1, 1\), the trunk's \(64, 64, 1, 1\)"
    ):
        ImageEncoder(str(tmp_path / "w.pth"), "imagenet")
    del weights["layer4.2.bn3.bias"]
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(InputError, match="lacks 1 of the 318 entries"):
        ImageEncoder(str(tmp_path / "w.pth"), "dino")
    with pytest.raises(InputError, match="does not exist"):
        ImageEncoder(str(tmp_path / "none.pth"), "dino")


def test_bad_input(encoder):
    with pytest.raises(InputError, match="the image trunk has no weights"):
        ImageEncoder()
    with pytest.raises(InputError, match="heads={}"):
        ImageEncoder(heads={}, allow_random=True)
    with pytest.raises(InputError, match="stride=6 is none of 4, 8, 16, 32"):
        ResNet50(6)
    with pytest.raises(InputError, match="images are 30 x 32; both sides must be multiples of 4"):
        encoder(torch.rand(1, 3, 30, 32))
    for pixel in ([1, 0, 0], [0, 4, 0], [0, 0, -1]):
        with pytest.raises(InputError, match="outside of 1 images of 4 x 4"):
            interpolate_at(torch.rand(1, 2, 1, 1), torch.tensor([pixel]), (4, 4))
