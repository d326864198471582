"""SwiftNet: published sizes, weights by name, maps against a second writing of it, rows, learning, bad input."""

import logging

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import timm_trunk
from pointcept_kd.networks.resnet import MEAN, STD, ResNet
from pointcept_kd.networks.swiftnet import Norm2d, PyramidPooling, SwiftNet, Unit

from .test_resnet import norm, with_statistics

SMALL = dict(depths=(1, 1, 1, 1), width=4, bottleneck=False)
TINY = dict(num_classes=3, trunk=SMALL, width=6, allow_random=True)

try:
    timm = timm_trunk.import_timm()
except InputError:
    timm = None


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        model = MODELS.build(dict(type="kd.SwiftNet", num_classes=17, allow_random=True))
    assert count(model.trunk) == 11_176_512
    assert count(model.pooling) == 116_476
    assert count(model.decoder) == 501_376
    assert count(model.classifier) == 2_432
    assert count(model) == 11_796_796
    assert model.channels == (64, 128, 256, 128)
    assert model.pooling.merge.norm.num_features == 254
    assert {m.momentum for m in model.pooling.modules() if isinstance(m, Norm2d)} == {0.012}
    assert {m.momentum for m in model.decoder.modules() if isinstance(m, Norm2d)} == {0.1}


def test_maps_of_a_nuscenes_image():
    with torch.device("meta"):
        model = SwiftNet(17, allow_random=True).eval()
        images = torch.zeros(1, 3, 360, 640)
        x = model.start(images)
        shapes = []
        for level in (1, 2, 3, 4):
            x, skip = model.stage(level, x)
            assert skip.shape == x.shape
            shapes.append(tuple(x.shape[1:]))
        assert shapes == [(64, 180, 320), (128, 90, 160), (256, 45, 80), (512, 23, 40)]
        assert model.half(images).shape == (1, 128, 180, 320)
    assert PyramidPooling.grids(23, 40) == [(8, 14), (4, 7), (2, 3)]


def residual(weights, prefix, x, stride):
    """A basic block by its weights, before the last ReLU."""

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, weights[prefix + name], stride=stride, padding=padding)

    y = norm(conv(x, "conv1.weight", stride), weights, prefix + "bn1").relu()
    y = norm(conv(y, "conv2.weight"), weights, prefix + "bn2")
    if prefix + "downsample.0.weight" in weights:
        x = norm(conv(x, "downsample.0.weight", stride, 0), weights, prefix + "downsample.1")
    return y + x


def enlarged(x, size):
    """Bilinear with aligned corners, one axis at a time, as products with matrices of shares."""
    for axis, fine in ((2, size[0]), (3, size[1])):
        coarse = x.shape[axis]
        matrix = x.new_zeros(fine, coarse)
        for row in range(fine):
            place = row * (coarse - 1) / max(fine - 1, 1)
            low = min(int(place), coarse - 1)
            matrix[row, low] += 1 - (place - low)
            matrix[row, min(low + 1, coarse - 1)] += place - low
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.t(), -1, axis)
    return x


def pooled(x, rows, columns):
    """Means of the cells floor(i h / rows) .. ceil((i + 1) h / rows)."""
    height, width = x.shape[2:]
    out = x.new_zeros(*x.shape[:2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, -(-(i + 1) * height // rows)
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            out[:, :, i, j] = x[:, :, top:bottom, left:right].mean((2, 3))
    return out


def by_hand(weights, images, depths):
    """Scores of every pixel by the weights alone."""

    def unit(name, x):
        weight = weights[f"{name}.conv.weight"]
        return F.conv2d(norm(x, weights, f"{name}.norm").relu(), weight, padding=weight.shape[2] // 2)  # fmt: skip

    mean, std = (torch.tensor(x).to(images)[:, None, None] for x in (MEAN, STD))
    x = (images - mean) / std
    x = F.conv2d(x, weights["trunk.conv1.weight"], stride=1, padding=3)
    x = F.max_pool2d(norm(x, weights, "trunk.bn1").relu(), 3, 2, 1)
    skips = []
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 else 1
            out = residual(weights, f"trunk.layer{stage}.{block}.", x, stride)
            x = out.relu()
        skips.append(out)
    size = skips[3].shape[2:]
    x = unit("pooling.narrow", skips[3])
    parts = [x]
    for i, rows in enumerate((8, 4, 2)):
        columns = round(rows * size[1] / size[0])
        parts.append(enlarged(unit(f"pooling.pools.{i}", pooled(x, rows, columns)), size))
    x = unit("pooling.merge", torch.cat(parts, 1))
    for i in (2, 1, 0):
        side = unit(f"decoder.laterals.{i}", skips[i])
        x = unit(f"decoder.blends.{i}", enlarged(x, side.shape[2:]) + side)
    return unit("classifier", enlarged(x, images.shape[2:]))


def test_against_a_second_writing():
    torch.manual_seed(0)
    depths = (1, 2, 1, 1)
    model = SwiftNet(3, dict(SMALL, depths=depths), 7, allow_random=True)
    with_statistics(model).double()
    images = torch.rand(2, 3, 37, 50, dtype=torch.float64)
    with torch.no_grad():
        found = model(dict(images=images))["seg_logits"].view(2, 37, 50, 3)
        wanted = by_hand(model.state_dict(), images, depths)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted.permute(0, 2, 3, 1))


def test_weights_of_imagenet_fit_by_name(tmp_path, caplog):
    """The state dict of an ordinary ResNet-18 with its classes, as torchvision and timm write it."""
    torch.manual_seed(1)
    ordinary = with_statistics(ResNet((2, 2, 2, 2), 64, False, 32))
    weights = {**ordinary.state_dict(), "fc.weight": torch.rand(10, 512), "fc.bias": torch.rand(10)}
    path = tmp_path / "resnet18.pth"
    torch.save(weights, path)
    with caplog.at_level(logging.INFO, "pointcept_kd"):
        model = SwiftNet(3, weight=str(path))
    assert "120 entries of" in caplog.text
    assert "no weights" not in caplog.text
    assert set(model.trunk.state_dict()) == set(weights) - {"fc.weight", "fc.bias"}
    assert all(torch.equal(weights[k], v) for k, v in model.trunk.state_dict().items())
    assert model.trunk.conv1.stride == (1, 1)
    del weights["layer3.1.bn2.bias"]
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"lacks 1 of the 120 entries.*layer3\.1\.bn2\.bias"):
        SwiftNet(3, weight=str(path))


@pytest.mark.skipif(timm is None, reason="timm cannot be imported")
def test_names_are_those_of_timm():
    own = {k: v.shape for k, v in SwiftNet(3, allow_random=True).trunk.state_dict().items()}
    theirs = {k: v.shape for k, v in timm.create_model("resnet18").state_dict().items()}
    assert len(own) == 120
    assert {k: v for k, v in theirs.items() if not k.startswith("fc.")} == own


def test_random_trunks_are_meant(caplog):
    with pytest.raises(InputError, match="the image trunk has no weights"):
        SwiftNet(3, SMALL)
    with caplog.at_level(logging.WARNING, "pointcept_kd"):
        SwiftNet(**TINY)
    assert "no weights, random" in caplog.text


def test_rows_are_places_of_a_map():
    torch.manual_seed(2)
    unit = Unit(5, 3).train()
    again = Unit(5, 3).train()
    again.load_state_dict(unit.state_dict())
    rows = torch.randn(7, 5)
    torch.testing.assert_close(unit.rows(rows), again(rows.t()[None, :, :, None])[0, :, :, 0].t())
    torch.testing.assert_close(unit.norm.running_mean, again.norm.running_mean)
    normal = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(unit.rows(rows), normal.relu() @ unit.conv.weight[:, :, 0, 0].t())


@pytest.mark.parametrize("places", [0, 1])
def test_no_place_or_one(places):
    unit = Unit(5, 3).train()
    before = unit.norm.running_var.clone(), unit.norm.running_mean.clone()
    rows = torch.randn(places, 5, requires_grad=True)
    out = unit.rows(rows)
    assert out.shape == (places, 3)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())
    assert torch.equal(unit.norm.running_var, before[0])
    assert torch.equal(unit.norm.running_mean, before[1])


def test_no_images_still_have_gradients():
    model = SwiftNet(**TINY).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    out = model.classifier(model.read(torch.zeros(0, 3, 32, 32)))
    assert out.shape == (0, 3, 32, 32)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_learns_colours():
    torch.manual_seed(3)
    images = torch.rand(2, 3, 32, 48) * 0.2
    images[:, 0, :, :24] += 0.7
    images[:, 2, :, 24:] += 0.7
    labels = torch.zeros(2, 32, 48, dtype=torch.long)
    labels[..., :18], labels[..., 30:] = 1, 2
    model = SwiftNet(2, SMALL, 6, allow_random=True).train()
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        steps.zero_grad()
        out = model(dict(images=images, weak_labels=labels))
        assert set(out) == {"loss"}
        losses.append(out["loss"].item())
        out["loss"].backward()
        steps.step()
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_trunk():
    model = SwiftNet(**TINY, freeze_trunk=True).train()
    assert not any(m.training for m in model.trunk.modules())
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert model.decoder.training


def test_bad_input():
    with pytest.raises(InputError, match="width=2"):
        SwiftNet(3, SMALL, 2, allow_random=True)
    for trunk in ("resnet50", "timm:resnet18", dict(depths=(1, 1, 1, 1), width=4)):
        with pytest.raises(InputError, match="SwiftNet takes resnet18"):
            SwiftNet(3, trunk, allow_random=True)
    with pytest.raises(InputError, match="must be at least 32"):
        SwiftNet(**TINY).eval()(dict(images=torch.rand(1, 3, 64, 31)))
    with pytest.raises(InputError, match="num_classes=0"):
        SwiftNet(0, SMALL, allow_random=True)
