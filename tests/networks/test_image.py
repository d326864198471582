"""Pixel features of images: heads, chosen pixels, what learns, weight files."""

import pytest
import torch

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks.image import ImageEncoder, enlarge, interpolate_at
from pointcept_kd.networks.resnet import ResNet
from pointcept_kd.networks.trunks import WEIGHTS

from .test_resnet import TINY, with_statistics


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return with_statistics(ResNet())


@pytest.fixture(scope="module")
def encoder(trunk):
    torch.manual_seed(1)
    model = ImageEncoder(heads=dict(pp=5, sem=3), allow_random=True)
    model.trunk.load_state_dict(trunk.state_dict())
    return model


def test_sizes_are_the_published_ones():
    model = MODELS.build(dict(type="kd.ImageEncoder", allow_random=True))
    assert sum(p.numel() for p in model.trunk.parameters()) == 23_508_032
    assert [sum(p.numel() for p in head.parameters()) for head in model.heads.values()] == [
        131_136
    ] * 2
    assert not any(key in model.state_dict() for key in ("mean", "std"))


def test_heads_follow_the_trunk():
    model = ImageEncoder(heads=dict(a=7), allow_random=True, trunk=TINY)
    assert model.heads["a"].weight.shape == (7, 128, 1, 1)
    assert model(torch.rand(2, 3, 16, 24))["a"].shape == (2, 7, 16, 24)
    with torch.device("meta"):
        assert ImageEncoder(allow_random=True, trunk="resnet34").heads["final"].in_channels == 512


def test_ordinary_strides_are_enlarged_by_32():
    """PPKT's trunk."""
    torch.manual_seed(4)
    model = ImageEncoder(heads=dict(a=6), stride=32, allow_random=True, trunk=TINY)
    images = torch.rand(2, 3, 64, 96)
    maps = model.coarse(images)["a"]
    assert maps.shape == (2, 6, 2, 3)
    found = model(images)["a"]
    assert found.shape == (2, 6, 64, 96)
    # With aligned corners the corner pixels are the corner cells.
    corners = torch.nn.functional.normalize(maps[..., :, ::2], dim=1)
    torch.testing.assert_close(found[..., ::63, ::95], corners)
    with pytest.raises(InputError, match="must be multiples of 32"):
        model(images[..., :60, :])


def test_the_trunks_own_features():
    model = ImageEncoder(heads={}, allow_random=True, trunk=TINY).train()
    assert list(model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    images = torch.rand(2, 3, 16, 24)
    maps = model.features(images)
    assert maps.shape == (2, 128, 4, 6)
    assert not maps.requires_grad
    torch.testing.assert_close(maps, model.trunk((images - model.mean) / model.std))
    pixels = torch.tensor([[1, 15, 23], [0, 0, 0], [0, 7, 11], [1, 4, 20]])
    whole = enlarge(maps, (16, 24))
    chosen = model.features_at(images, pixels)
    torch.testing.assert_close(chosen, whole[pixels[:, 0], :, pixels[:, 1], pixels[:, 2]])
    assert not torch.allclose(chosen.norm(dim=1), torch.ones(4))
    for use in (model, model.coarse, lambda x: model.at(x, pixels)):
        with pytest.raises(InputError, match="has no heads"):
            use(images)


def test_heads_read_the_trunks_own_features(encoder):
    images = torch.rand(1, 3, 16, 24)
    maps = encoder.features(images)
    torch.testing.assert_close(encoder.coarse(images)["pp"], encoder.heads["pp"](maps))


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
    with pytest.raises(InputError, match="heads={'a': 0}: expected widths of 1 or more"):
        ImageEncoder(heads=dict(a=0), allow_random=True)
    with pytest.raises(InputError, match="stride=6 is none of 4, 8, 16, 32"):
        ImageEncoder(allow_random=True, stride=6)
    with pytest.raises(InputError, match="images are 30 x 32; both sides must be multiples of 4"):
        encoder(torch.rand(1, 3, 30, 32))
    for pixel in ([1, 0, 0], [0, 4, 0], [0, 0, -1]):
        with pytest.raises(InputError, match="outside of 1 images of 4 x 4"):
            interpolate_at(torch.rand(1, 2, 1, 1), torch.tensor([pixel]), (4, 4))
