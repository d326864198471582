"""SphereFormer: keys and counts, a dense forward, its windows, released weights, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, load_into
from pointcept_kd.networks.released_sphereformer import convert_sphereformer
from pointcept_kd.networks.sphereformer import SphereFormer
from pointcept_kd.networks.window_attention import SphereFormerBlock

from ..test_convert import run
from .clouds import cloud, only, randomise_norms
from .test_point_voxel_unet import released
from .test_point_voxel_unet import small as unet

SMALL = {
    "in_channels": 4,
    "num_classes": 3,
    "channels": (8, 12, 16),
    "head_size": 4,
    "spherical": (20.0, 20.0, 80.0),
    "angle_factor": 1.5,
}


def small(**changes):
    torch.manual_seed(0)
    network = SphereFormer(**{**SMALL, **changes})
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


def blocks(network):
    return [m for m in network.modules() if isinstance(m, SphereFormerBlock)]


@pytest.mark.parametrize(
    ("classes", "parameters"), [(16, 32_311_616), (19, 32_311_715), (22, 32_311_814)]
)
def test_published_counts(classes, parameters):
    with torch.device("meta"):
        network = SphereFormer(num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    attention = sum(p.numel() for b in blocks(network) for p in b.parameters())
    assert attention == 2_155_120
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-4, 0.1)}


def test_keys():
    """Names and shapes of the released file, written from the layer table."""
    expected = {"input_conv.0.weight": (8, 3, 3, 3, 4)}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.{leaf}"] = (width,)
        expected[f"{name}.num_batches_tracked"] = ()

    def residual(name, came, width):
        if came != width:
            expected[f"{name}.i_branch.0.weight"] = (width, 1, 1, 1, came)
        norm(f"{name}.conv_branch.0", came)
        expected[f"{name}.conv_branch.2.weight"] = (width, 3, 3, 3, came)
        norm(f"{name}.conv_branch.3", width)
        expected[f"{name}.conv_branch.5.weight"] = (width, 3, 3, 3, width)

    widths, at = (8, 12, 16), "unet"
    for depth, width in enumerate(widths):
        for i in range(2):
            residual(f"{at}.blocks.block{i}", width, width)
        for key, value in SphereFormerBlock(width, 1, (1, 1, 1), head_size=4).state_dict().items():
            expected[f"{at}.transformer_block.{key}"] = tuple(value.shape)
        if depth < 2:
            norm(f"{at}.conv.0", width)
            expected[f"{at}.conv.2.weight"] = (widths[depth + 1], 2, 2, 2, width)
            norm(f"{at}.deconv.0", widths[depth + 1])
            expected[f"{at}.deconv.2.weight"] = (width, 2, 2, 2, widths[depth + 1])
            residual(f"{at}.blocks_tail.block0", 2 * width, width)
            residual(f"{at}.blocks_tail.block1", width, width)
        at += ".u"
    norm("output_layer.0", 8)
    expected |= {"linear.weight": (3, 8), "linear.bias": (3,)}
    assert {k: tuple(v.shape) for k, v in small().state_dict().items()} == expected


def test_windows_of_the_levels():
    made = blocks(SphereFormer(channels=(8,) * 5, head_size=4))
    assert [b.cubic[0] for b in made] == pytest.approx([0.6, 1.2, 2.4, 4.8, 9.6])
    assert [b.spherical for b in made] == [(t, t, 120) for t in (2, 4, 8, 16, 32)]
    assert [b.spherical_cell[0] for b in made] == pytest.approx([t / 24 for t in (2, 4, 8, 16, 32)])
    assert [b.drop_path.probability for b in made] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    kitti = blocks(small(voxel_size=0.05))
    assert [b.cubic[0] for b in kitti] == pytest.approx([0.3, 0.6, 1.2])
    assert [b.spherical for b in kitti] == [(t, t, 80) for t in (20, 30, 45)]


def dense_forward(network, batch, side):
    """The same network on dense grids, masked to the occupied cells of each level, in evaluation."""
    state = network.state_dict()

    def conv(name, x, **options):
        return F.conv3d(x, state[f"{name}.weight"].permute(0, 4, 1, 2, 3), **options)

    def active(name, x, mask):
        at = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        mean, var, scale, shift = (v.view(-1, 1, 1, 1) for v in at)
        return mask * F.relu((x - mean) / (var + 1e-4).sqrt() * scale + shift)

    def stage(name, x, mask):
        for i in range(2):
            b = f"{name}.block{i}"
            y = mask * conv(f"{b}.conv_branch.2", active(f"{b}.conv_branch.0", x, mask), padding=1)
            y = mask * conv(f"{b}.conv_branch.5", active(f"{b}.conv_branch.3", y, mask), padding=1)
            weight = state.get(f"{b}.i_branch.0.weight")
            if weight is not None:
                # spconv reads the numbers of a 1 x 1 x 1 kernel as a matrix (in, out).
                matrix = weight.reshape(weight.shape[4], weight.shape[0])
                x = torch.einsum("io,bixyz->boxyz", matrix, x)
            x = x + y
        return x

    def unet(at, x, xyz, mask):
        x = stage(f"{at}.blocks", x, mask)
        here = mask[0, 0] > 0
        rows = x[0].permute(1, 2, 3, 0)[here]
        block = network.get_submodule(f"{at}.transformer_block")
        grid = torch.zeros(*here.shape, rows.shape[1], dtype=rows.dtype)
        grid[here] = block(rows, xyz[here], torch.zeros(len(rows), dtype=int))
        x = grid.permute(3, 0, 1, 2)[None]
        if f"{at}.conv.2.weight" not in state:
            return x
        coarse = F.max_pool3d(mask, 2)
        below = coarse * conv(f"{at}.conv.2", active(f"{at}.conv.0", x, mask), stride=2)
        # Means of the positions right below, not of all points under a cell.
        moved = (xyz * here[..., None]).permute(3, 0, 1, 2)
        counts = F.avg_pool3d(mask[0], 2).clamp(min=1 / 8)
        means = (F.avg_pool3d(moved, 2) / counts).permute(1, 2, 3, 0)
        below = active(f"{at}.deconv.0", unet(f"{at}.u", below, means, coarse), coarse)
        kernel = state[f"{at}.deconv.2.weight"].permute(4, 0, 1, 2, 3)
        up = mask * F.conv_transpose3d(below, kernel, stride=2)
        return stage(f"{at}.blocks_tail", torch.cat([x, up], 1), mask)

    a, b, c = batch["grid_coord"].unbind(1)
    empty = torch.zeros(side, side, side, 1, dtype=torch.float64)
    mask = empty.index_put((a, b, c), torch.ones(len(a), 1, dtype=torch.float64))
    mask = mask.permute(3, 0, 1, 2)[None]
    x = empty.expand(-1, -1, -1, 4).clone().index_put((a, b, c), batch["feat"])
    xyz = empty.expand(-1, -1, -1, 3).clone().index_put((a, b, c), batch["coord"])
    x = mask * conv("input_conv.0", x.permute(3, 0, 1, 2)[None], padding=1)
    x = active("output_layer.0", unet("unet", x, xyz, mask), mask)
    return x[0, :, a, b, c].t() @ state["linear.weight"].t() + state["linear.bias"]


@torch.no_grad()
def test_dense_forward():
    network = small().double().eval()
    batch = centred(cloud([100], high=8, dtype=torch.float64))
    expected = dense_forward(network, batch, 8)
    assert expected.std() > 0.01
    assert (network(batch) - expected).abs().max() < 1e-9


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
    assert small(num_classes=0).eval()(batch).shape == (101, 8)
    assert torch.allclose(small(method="reduction").eval()(batch), together, atol=1e-4)


def test_training():
    criteria = [{"type": "CrossEntropyLoss", "loss_weight": 1.0, "ignore_index": -1}]
    backbone = {"type": "kd.SphereFormer", **SMALL}
    model = MODELS.build({"type": "DefaultSegmentor", "backbone": backbone, "criteria": criteria})
    batch = centred(cloud([50, 40]))
    model.train()(batch)["loss"].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    assert model.eval()(batch)["seg_logits"].shape == (90, 3)
    one = model.backbone.train()(centred(cloud([1])))
    assert bool(one.isfinite().all())


def test_released_weights():
    source = small()
    given = {f"module.{k}": v for k, v in source.state_dict().items()}
    for weights in (given, {"state_dict": given}):
        made, report = convert_sphereformer(weights, "semantic_kitti")
        assert report.network == {
            "voxel_size": 0.05,
            "spherical": (2, 2, 80),
            "angle_factor": 1.5,
            "in_channels": 4,
            "num_classes": 3,
            "channels": (8, 12, 16),
            "depth": 2,
            "head_size": 4,
        }
        SphereFormer(**report.network).load_state_dict(made)
        assert all(torch.equal(made[k], v) for k, v in source.state_dict().items())
        assert len(report.matched) == len(made)
    lacking = {k: v for k, v in given.items() if "deconv.0.bias" not in k}
    for weights, text in (
        ({}, "input_conv.0.weight is not there"),
        (lacking, "2 of .* keys lack .unet.u.deconv.0.bias"),
        ({**given, "extra": torch.ones(1)}, "1 are unknown .extra"),
        ({**given, "module.linear.bias": torch.ones(4)}, r"linear.bias has the shape \(4,\)"),
        ({**given, "module.linear.bias": torch.full((3,), torch.inf)}, "not finite"),
    ):
        with pytest.raises(InputError, match=text):
            convert_sphereformer(weights, "waymo")
    with pytest.raises(InputError, match="data_set='lyft' is none of nuscenes, semantic_kitti"):
        convert_sphereformer(given, "lyft")
    with pytest.raises(InputError, match="3 classes tell no data set: name that"):
        convert_sphereformer(given)


@torch.no_grad()
def test_the_tool(tmp_path):
    source = small(num_classes=16).eval()
    file, out = tmp_path / "released.pth", tmp_path / "out.pth"
    entries = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"epoch": 50, "state_dict": entries, "optimizer": {}}, file)
    code, text, errors = run("sphereformer", file, "--out", out)
    assert (code or 0, errors) == (0, "")
    assert "SphereFormer of nuscenes" in text
    content = load_checkpoint(out)
    model = MODELS.build(content["model_config"]).eval()
    load_into(model, content["state_dict"])
    batch = centred(cloud([30]))
    expected = small(num_classes=16, spherical=(2, 2, 120), angle_factor=2.0).eval()
    assert torch.equal(model(batch)["seg_logits"], expected(batch))
    code, _, errors = run("sphereformer", file, "--out", out, "--data-set", "lyft")
    assert code == 2
    assert "lyft" in errors


@torch.no_grad()
def test_the_tool_on_torchsparse(tmp_path):
    source = unet()
    source.eval()
    file, out = tmp_path / "released.pth", tmp_path / "out.pth"
    torch.save({"model": released(source, "module.model_t.")}, file)
    batch = centred(cloud([30]))
    expected = unet(spherical=(2, 2, 120), cells="reference").eval()(batch)
    for words, classes in (([], slice(1, None)), (["--keep-noise"], slice(None))):
        code, text, errors = run("u2mkd", file, "--out", out, "--tower", "teacher", *words)
        assert (code or 0, errors) == (0, "")
        assert "kernels permuted" in text
        content = load_checkpoint(out)
        model = MODELS.build(content["model_config"]).eval()
        load_into(model, content["state_dict"])
        torch.testing.assert_close(
            model(batch)["seg_logits"], expected[:, classes], rtol=0, atol=1e-6
        )
    code, _, errors = run("u2mkd", file, "--out", out, "--tower", "student")
    assert code != 0
    assert "model_s.stem" in errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channels": ()}, "expected 1 to 7 levels"),
        ({"channels": (8,) * 8}, "expected 1 to 7 levels"),
        ({"channels": (8, 0)}, "must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"depth": 0}, "depth=0"),
        ({"voxel_size": -0.1}, "voxel_size=-0.1"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"head_size": 16}, "dim=8, head_size=16"),
        ({"angle_factor": 0}, "angle_factor=0"),
        ({"spherical": (2, 2)}, "spherical="),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(InputError, match=text) as error:
        SphereFormer(**{**SMALL, **changes})
    assert "\n" not in str(error.value)


def test_bad_batches():
    network, batch = small(), cloud([20])
    none = {**{k: v[:0] for k, v in batch.items()}, "offset": torch.tensor([0])}
    for given, text in (
        ({**batch, "feat": batch["feat"][:, :2]}, "in_channels=4 but `feat` has 2 columns"),
        ({k: v for k, v in batch.items() if k != "coord"}, "no coord"),
        (none, "no points"),
        ({**batch, "grid_coord": batch["grid_coord"][:9]}, r"grid_coord \(9, 3\)"),
    ):
        with pytest.raises(InputError, match=text):
            network(given)
