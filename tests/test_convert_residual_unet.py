"""Released SR-UNet weights: against MinkowskiEngine's rules in loops, containers, the tool, what is refused."""

import itertools
import math
import os

import numpy as np
import pytest
import torch

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, load_into
from pointcept_kd.networks import DefaultSegmentor, DefaultSegmentorV2
from pointcept_kd.networks.released_residual_unet import convert_residual_unet, read_points
from pointcept_kd.networks.residual_unet import PLANS, ResidualUNet

from .test_convert import run

CHANNELS = (4, 6, 5, 8, 8, 5, 6, 6)
DOWNS = ("conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2")
UPS = ("convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2")
PAIR = {"final": 7, "final_class_level": 5}
CONFIG = {
    "voxel_size": 0.1,
    "cylindrical_coordinates": True,
    "normalize_features": True,
    "crop_size": [224, 416],
    "dataset": "nuscenes",
}


def layout(heads, inputs=1, stem=3, channels=CHANNELS, layers=PLANS[14]):
    """Keys and shapes of a released file, written from the layer table."""
    out = {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            out[f"{name}.bn.{leaf}"] = (width,)
        out[f"{name}.bn.num_batches_tracked"] = ()

    def blocks(i, came):
        width = channels[i - 1]
        for j in range(layers[i - 1]):
            out[f"block{i}.{j}.conv1.kernel"] = (27, came, width)
            norm(f"block{i}.{j}.norm1", width)
            out[f"block{i}.{j}.conv2.kernel"] = (27, width, width)
            norm(f"block{i}.{j}.norm2", width)
            if came != width:
                out[f"block{i}.{j}.downsample.0.kernel"] = (came, width)
                norm(f"block{i}.{j}.downsample.1", width)
            came = width

    out["conv0p1s1.kernel"] = (27, inputs, stem)
    norm("bn0", stem)
    came = stem
    for i, name in enumerate(DOWNS, 1):
        out[f"{name}.kernel"] = (8, came, came)
        norm(f"bn{i}", came)
        blocks(i, came)
        came = channels[i - 1]
    for i, name in enumerate(UPS, 4):
        out[f"{name}.kernel"] = (8, came, channels[i])
        norm(f"bntr{i}", channels[i])
        blocks(i + 1, channels[i] + (stem, *channels)[7 - i])
        came = channels[i]
    for name, width in heads.items():
        out[f"{name}.kernel"], out[f"{name}.bias"] = (came, width), (1, width)
    return out


def released(heads=None, prefix="", seed=0, **sizes):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for key, shape in layout(PAIR if heads is None else heads, **sizes).items():
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif key.endswith("running_var"):
            value = torch.rand(shape, generator=g) + 0.5
        elif key.endswith("kernel"):
            value = torch.randn(shape, generator=g) * (2 * shape[-2]) ** -0.5
        else:
            value = torch.randn(shape, generator=g) * 0.3 + key.endswith("bn.weight")
        made[prefix + key] = value
    return made


def network_of(weights, report, **more):
    network = ResidualUNet(**report.network, **more)
    network.load_state_dict(weights, strict=True)
    return network.eval()


# -------------------------------------------------------------------------------------------------------------- kernels


def offsets(size):
    """MinkowskiEngine's offset of every flat tap: the first axis counts fastest, odd kernels are centred."""
    for iz, iy, ix in itertools.product(range(size), repeat=3):
        o = (ix, iy, iz)
        yield (
            ix + size * iy + size**2 * iz,
            tuple(i - size // 2 for i in o) if size % 2 else o,
        )


class Loops:
    """The network cell by cell, by MinkowskiEngine's rules, on entries as the file has them.

    Cells of stride s have coordinates that are multiples of s, as that library keeps them.
    """

    def __init__(self, state):
        self.state = {k: v.double().numpy() for k, v in state.items()}

    def norm(self, name, cells, relu=True):
        mean, var = (self.state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var"))
        scale, shift = (self.state[f"{name}.bn.{k}"] for k in ("weight", "bias"))
        out = {u: (f - mean) / np.sqrt(var + 1e-5) * scale + shift for u, f in cells.items()}
        return {u: np.maximum(f, 0) for u, f in out.items()} if relu else out

    def same(self, name, cells, stride):
        kernel, out = self.state[f"{name}.kernel"], {}
        for u in cells:
            out[u] = np.zeros(kernel.shape[2])
            for tap, o in offsets(3):
                v = tuple(a + stride * b for a, b in zip(u, o))
                if v in cells:
                    out[u] += cells[v] @ kernel[tap]
        return out

    def down(self, name, cells, stride):
        kernel, step = self.state[f"{name}.kernel"], 2 * stride
        out = {}
        for u in cells:
            out[tuple(math.floor(a / step) * step for a in u)] = np.zeros(kernel.shape[2])
        for p, total in out.items():
            for tap, o in offsets(2):
                u = tuple(a + stride * b for a, b in zip(p, o))
                if u in cells:
                    total += cells[u] @ kernel[tap]
        return out

    def up(self, name, cells, fine, stride):
        kernel = self.state[f"{name}.kernel"]
        out = {u: np.zeros(kernel.shape[2]) for u in fine}
        for p, f in cells.items():
            for tap, o in offsets(2):
                u = tuple(a + stride * b for a, b in zip(p, o))
                if u in out:
                    out[u] += f @ kernel[tap]
        return out

    def block(self, i, cells, stride):
        j = 0
        while f"block{i}.{j}.conv1.kernel" in self.state:
            name = f"block{i}.{j}"
            y = self.norm(f"{name}.norm1", self.same(f"{name}.conv1", cells, stride))
            y = self.norm(f"{name}.norm2", self.same(f"{name}.conv2", y, stride), relu=False)
            matrix = self.state.get(f"{name}.downsample.0.kernel")
            if matrix is not None:
                cells = {u: f @ matrix for u, f in cells.items()}
                cells = self.norm(f"{name}.downsample.1", cells, relu=False)
            cells = {u: np.maximum(y[u] + cells[u], 0) for u in cells}
            j += 1
        return cells

    def __call__(self, x):
        x = self.norm("bn0", self.same("conv0p1s1", x, 1))
        levels = [x]
        for i, name in enumerate(DOWNS, 1):
            x = self.norm(f"bn{i}", self.down(name, x, 2 ** (i - 1)))
            x = self.block(i, x, 2**i)
            levels.append(x)
        for i, name in enumerate(UPS, 4):
            skip, stride = levels[7 - i], 2 ** (7 - i)
            x = self.norm(f"bntr{i}", self.up(name, x, skip, stride))
            x = {u: np.concatenate([x[u], skip[u]]) for u in x}
            x = self.block(i + 1, x, stride)
        made = {}
        for head in PAIR:
            matrix, bias = self.state[f"{head}.kernel"], self.state[f"{head}.bias"][0]
            made[head] = {u: f @ matrix + bias for u, f in x.items()}
        return made


@torch.no_grad()
@pytest.mark.parametrize("plan", [14, 34])
def test_converted_against_loops(plan):
    file = released(inputs=2, layers=PLANS[plan], seed=plan)
    weights, report = convert_residual_unet(file)
    network = network_of(weights, report).double()
    g = torch.Generator().manual_seed(3)
    # On both sides of 0, where rounding towards it would join other cells.
    cells = torch.randint(-7, 6, (90, 3), generator=g).unique(dim=0)
    feat = torch.randn(len(cells), 2, generator=g).double()
    expected = Loops(file)(dict(zip(map(tuple, cells.tolist()), feat.numpy())))
    made = network(dict(grid_coord=cells, feat=feat, offset=torch.tensor([len(cells)])))
    assert list(made) == list(PAIR)
    for name, rows in made.items():
        wanted = np.stack([expected[name][u] for u in map(tuple, cells.tolist())])
        assert wanted.std() > 0.01
        assert np.abs(rows.numpy() - wanted).max() < 1e-9 * np.abs(wanted).max()


def test_published_sizes():
    full = dict(stem=32, channels=(32, 64, 128, 256, 256, 128, 96, 96), layers=PLANS[34])
    shapes = layout({"final": 64, "final_class_level": 64}, **full)
    assert len(shapes) == 376
    own = [v for k, v in shapes.items() if "running" not in k and "tracked" not in k]
    assert (len(own), sum(math.prod(v) for v in own)) == (190, 37_855_392)
    file = {
        k: torch.zeros((), dtype=torch.int64 if k.endswith("tracked") else torch.float32).expand(v)
        for k, v in shapes.items()
    }
    weights, report = convert_residual_unet(file)
    assert report.network == {"in_channels": 1, "num_classes": 64, "class_level": 64}
    with torch.device("meta"):
        target = ResidualUNet(**report.network).state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in target.items()}


# ---------------------------------------------------------------------------------------------------------------- files


def test_entries_and_report():
    file = released(prefix="model_points.")
    others = {
        "model_images.encoder.conv1.weight": torch.randn(2, 3),
        "vmf_distributions.3.mu": torch.randn(5),
    }
    weights, report = convert_residual_unet(
        {f"module.{k}": v for k, v in {**file, **others}.items()}
    )
    assert report.network == {
        "in_channels": 1,
        "num_classes": 7,
        "class_level": 5,
        "base_channels": 3,
        "channels": CHANNELS,
        "layers": PLANS[14],
    }
    at = "model_points."
    kernel = file[f"{at}convtr5p8s2.kernel"]
    # Tap 6 of a kernel of 8: 0 + 2 * 1 + 4 * 1.
    assert torch.equal(weights["convtr5p8s2.weight"][:, 0, 1, 1], kernel[6].t())
    kernel = file[f"{at}block3.0.conv1.kernel"]
    # Tap 5 of a kernel of 27: 2 + 3 * 1 + 9 * 0.
    assert torch.equal(weights["block3.0.conv1.weight"][:, 2, 1, 0], kernel[5].t())
    name = "block6.0.downsample.0"
    assert torch.equal(weights[f"{name}.weight"], file[f"{at}{name}.kernel"].t())
    assert torch.equal(weights["final.weight"], file[f"{at}final.kernel"].t())
    assert torch.equal(weights["final.bias"], file[f"{at}final.bias"][0])
    name = "block4.0.norm2.bn.running_var"
    assert torch.equal(weights[name], file[at + name])
    assert report.dropped == list(others)
    assert set(report.fates()) == {*file, *others}
    permuted = [k for k in file if k.endswith("kernel") or k.startswith(f"{at}final")]
    assert sorted(report.permuted) == sorted(permuted)
    assert "SR-UNet14 from model_points., 202 entries" in str(report)


@torch.no_grad()
def test_without_heads():
    file = released()
    trunk, report = convert_residual_unet(file, heads=False)
    assert report.network["num_classes"] == 0
    assert report.dropped == [k for k in file if k.startswith("final")]
    whole, full_report = convert_residual_unet(file)
    batch = dict(
        grid_coord=torch.randint(0, 9, (30, 3)), feat=torch.randn(30, 1), offset=torch.tensor([30])
    )
    network = network_of(whole, full_report)
    read = network_of(trunk, report)(batch)
    assert read.shape == (30, 6)
    assert torch.allclose(network.final(read), network(batch)["final"], atol=1e-5)


class Settings:
    """Stands for what a training program pickles beside the weights."""

    def __init__(self, **values):
        self.__dict__.update(values)


class Trap:
    """Makes a folder where it is unpickled by somebody careless."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_reading(tmp_path):
    trap, path = tmp_path / "made by the file", tmp_path / "a.pt"
    file = released()
    images = {"encoder.conv1.weight": torch.zeros(4)}
    torch.save(
        dict(model_points=file, model_images=images, epoch=50, config=CONFIG, more=Trap(str(trap))),
        path,
    )
    made = read_points(path)
    assert not trap.exists()
    assert list(made.weights) == list(file)
    assert all(torch.equal(made.weights[k], v) for k, v in file.items())
    assert made.settings == {k: CONFIG[k] for k in list(CONFIG)[:3]}
    assert made.apart == ("model_images",)

    file = {**released(prefix="model_points."), "vmf_distributions.3.kappa": 4.5}
    torch.save(dict(state_dict=file, epoch=50, config=Settings(**CONFIG)), path)
    made = read_points(path)
    assert (list(made.weights), made.settings, made.apart) == (list(file), {}, ())
    assert convert_residual_unet(made.weights)[1].dropped == ["vmf_distributions.3.kappa"]
    file = released()

    for old in (False, True):
        torch.save(file, path, _use_new_zipfile_serialization=not old)
        made = read_points(path)
        assert list(made.weights) == list(file)
        assert all(torch.equal(made.weights[k], v) for k, v in file.items())


def test_damaged_files(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match="does not exist"):
        read_points(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cut off or damaged|is damaged"):
        read_points(path)
    for content, text in (
        ({"epoch": 3}, "expected model_points or state_dict, found epoch"),
        ({}, "found no dict"),
        ([1, 2], "found no dict"),
        ({"model_points": {}, "epoch": 1}, "has no weights"),
        ({"a": torch.ones(2), "b": 3}, "expected model_points or state_dict, found a, b"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=text):
            read_points(path)
    torch.save({"model_points": {"a": torch.ones(600)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        read_points(path)


# ------------------------------------------------------------------------------------------------------------- refusals

CONV = "block3.0.conv2.kernel"


def put(key, change):
    return lambda file: {**file, key: change(file.get(key))}


def without(start):
    return lambda file: {k: v for k, v in file.items() if not k.startswith(start)}


def spoil(value):
    value = value.clone()
    value.flatten()[3] = math.nan
    return value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: {}, "no released weights of SR-UNet; conv0p1s1.kernel .* begin with none"),
        (lambda file: {f"x.{k}": v for k, v in file.items()}, "conv0p1s1.kernel is not there"),
        (
            lambda file: {k.replace("kernel", "weight"): v for k, v in file.items()},
            "converted already",
        ),
        (without(CONV), "not those of SR-UNet14: 1 of 202 keys lack .block3.0.conv2.kernel"),
        (without("final."), "final.kernel is not there"),
        (without("block5"), "block5.0.conv1.kernel is not there"),
        (put("more", lambda _: torch.ones(2)), "1 are unknown .more"),
        (
            put("block2.1.conv1.kernel", lambda _: torch.ones(27, 6, 6)),
            r"have \(1, 2, 1, 1, 1, 1, 1, 1\) residual blocks",
        ),
        (put(CONV, lambda k: k[:26]), r"conv2.kernel has the shape \(26, 5, 5\): expected \(27, 5"),
        (put("conv0p1s1.kernel", lambda k: k[:26]), r"conv0p1s1.kernel has the shape \(26, 1, 3\)"),
        (put("conv0p1s1.kernel", lambda k: k[0]), "expected 3 axes"),
        (put("final.kernel", lambda k: k[None]), "final.kernel .* expected 2 axes"),
        (put("final.bias", lambda k: k[0]), r"final.bias has the shape \(7,\): expected \(1, 7\)"),
        (put(CONV, lambda k: k.long()), "has the type torch.int64"),
        (put(CONV, spoil), "block3.0.conv2.weight has 1 of 675 numbers that are not finite"),
        (put(CONV, lambda _: "text"), "block3.0.conv2.kernel is no tensor"),
        (lambda file: {**file, f"module.{CONV}": file[CONV]}, "twice, with and without `module.`"),
    ],
)
def test_refusals(change, text):
    with pytest.raises(InputError, match=text) as error:
        convert_residual_unet(change(released()))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- the tool


def save(path, heads=None, **config):
    torch.save(dict(model_points=released(heads), epoch=50, config={**CONFIG, **config}), path)
    return path


@torch.no_grad()
def test_tool(tmp_path):
    file, out = save(tmp_path / "pre.pt"), tmp_path / "made" / "pre.pth"
    code, text, errors = run("slidr", file, "--out", out, "--keys")
    assert (code, errors) == (0, "")
    for part in (
        "block1.0.conv1.kernel",
        "SR-UNet14, 202 entries",
        "trained with voxel_size=0.1, cylindrical_coordinates=True, normalize_features=True",
        'type="kd.ResidualUNet"',
        str(out),
    ):
        assert part in text
    checkpoint = load_checkpoint(out)
    model = MODELS.build(checkpoint["model_config"]).eval()
    assert isinstance(model, ResidualUNet)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    batch = dict(
        grid_coord=torch.randint(-9, 9, (30, 3)), feat=torch.randn(30, 1), offset=torch.tensor([30])
    )
    points, classes = model(batch).values()
    assert (points.shape, classes.shape) == ((30, 7), (30, 5))
    assert torch.allclose(points.norm(dim=1), torch.ones(30), atol=1e-5)

    code, _, errors = run("slidr", file, "--out", out, "--as", "trunk")
    assert (code, errors) == (0, "")
    checkpoint = load_checkpoint(out)
    model = MODELS.build({**checkpoint["model_config"], "num_classes": 4})
    assert isinstance(model, DefaultSegmentorV2)
    assert set(load_into(model, checkpoint["state_dict"]).missing) == {
        "seg_head.weight",
        "seg_head.bias",
    }
    assert model.eval()(batch)["seg_logits"].shape == (30, 4)


def test_tool_segmentor(tmp_path):
    out = tmp_path / "a.pth"
    file = save(tmp_path / "fine.pt", {"final": 17}, normalize_features=False)
    code, _, errors = run("slidr", file, "--out", out, "--as", "segmentor")
    assert (code, errors) == (0, "")
    checkpoint = load_checkpoint(out)
    model = MODELS.build(checkpoint["model_config"])
    assert isinstance(model, DefaultSegmentor)
    assert load_into(model, checkpoint["state_dict"], strict=True).share == 1
    assert model.backbone.final.out_features == 17
    out.unlink()
    for file, part in (
        (save(tmp_path / "two.pt"), "two heads"),
        (save(tmp_path / "one.pt", {"final": 64}), "normalised output"),
        (tmp_path / "none.pt", "there is no such file"),
    ):
        code, _, errors = run("slidr", file, "--out", out, "--as", "segmentor")
        assert (code, len(errors.splitlines())) == (2, 1)
        assert part in errors
        assert not out.exists()
