"""Released weights: what every kernel becomes, the scores of a converted network, the tool, what is refused."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pointcept_kd.distillers.taps import Taps
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, load_into
from pointcept_kd.networks.cylinder3d import PARTITION, Cylinder3D
from pointcept_kd.networks.polarnet import PolarNet
from pointcept_kd.networks.released import VOID_BIAS, convert_cylinder3d, convert_polarnet

from .networks.test_cylinder3d import (
    GRID,
    SMALL,
    SPARSE,
    TAPS,
    assert_near,
    emulate,
    keys,
    points,
    randomise,
    taps_of,
)

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert.py"
SHARED = ("conv1", "conv1_2", "conv1_3", "conv2", "conv3")
POLAR_GRID = {"low": (3.0, -3.14, -3.0), "high": (50.0, 3.14, 1.5), "shape": (32, 32, 4)}
POLAR = {"point_channels": (4, 5, 6, 7), "compressed": 3, "base": 2}


def released(dead=float("nan"), **changes):
    """A random file in the layout of spconv 1; `dead` fills the taps that were never used."""
    torch.manual_seed(0)
    network = randomise(Cylinder3D(**{**SMALL, "kernel_mode": "intended", **changes}))
    old = {}
    for key, value in network.state_dict().items():
        value = torch.einsum("oabci->abcio", value) if value.dim() == 5 else value
        old[key] = value.clone(memory_format=torch.contiguous_format)
        if ".conv3." in key and ".upBlock" in key:
            old[key].flatten(0, 2)[9:] = dead
    return old


def second_layout(old):
    """The same file in the order of axes of spconv 2."""
    return {
        k: torch.einsum("abcio->oabci", v).clone() if v.dim() == 5 else v for k, v in old.items()
    }


def polar(num_classes, seed=0):
    torch.manual_seed(seed)
    network = PolarNet(num_classes=num_classes, partition=POLAR_GRID, **POLAR)
    return randomise(network, seed).eval()


def run(*arguments):
    """The tool in this process: exit code, its output, its errors."""
    before, out, errors = sys.argv, io.StringIO(), io.StringIO()
    out.reconfigure = lambda **_: None
    sys.argv = [str(TOOL), *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as done,
        ):
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = before
    return done.value.code, out.getvalue(), errors.getvalue()


# ------------------------------------------------------------------------------------------------- Cylinder3D, kernels


def test_kernels_by_hand():
    old = released()
    for key, value in old.items():
        if value.dim() == 5:
            axes = [
                torch.arange(n).view([-1 if i == j else 1 for j in range(5)])
                for i, n in enumerate(value.shape)
            ]
            number = sum(size * axis for size, axis in zip((10000, 1000, 100, 10, 1), axes))
            old[key] = number.float()
    new, report = convert_cylinder3d(old)
    new = {key.removeprefix(SPARSE): value for key, value in new.items()}

    context = new["downCntx.conv1_2.weight"]  # (3, 1, 3) read as (1, 3, 3)
    assert context.shape == (2, 1, 3, 3, 2)
    assert context[1, 0, 2, 1, 0] == 20101
    down = new["resBlock2.conv1_2.weight"]  # (1, 3, 3) read as (3, 1, 3)
    assert down.shape == (4, 3, 1, 3, 4)
    assert down[0, 2, 0, 1, 1] == 2110
    up = new["upBlock0.conv3.weight"]  # 27 taps, the first 9 read as (1, 3, 3)
    assert up.shape == (32, 1, 3, 3, 32)
    assert up[0, 0, 2, 2, 1] == 2210
    assert float(up.max()) < 10000
    gate = new["ReconNet.conv1_3.weight"]  # (1, 1, 3) read as (3, 1, 1)
    assert gate.shape == (4, 3, 1, 1, 4)
    assert gate[1, 2, 0, 0, 0] == 201
    pool = new["resBlock2.pool.weight"]
    assert pool.shape == (4, 3, 3, 3, 4)
    assert pool[1, 2, 1, 0, 1] == 21011
    assert set(report.cut) == {f"{SPARSE}upBlock{i}.conv3.weight" for i in range(4)}


def test_report_counts_every_entry():
    old = released()
    new, report = convert_cylinder3d({**old, "adapter.0.pe": torch.zeros(32, 64)})
    assert set(new) == keys()
    assert (len(report.matched), len(report.permuted), len(report.reread)) == (226, 48, 20)
    widths = (32, 16, 8, 4)
    assert sum(report.cut.values()) == report.not_finite == 18 * sum(w * w for w in widths)
    assert report.dropped == ["adapter.0.pe"]
    assert report.network == {
        "in_channels": 4,
        "num_classes": 5,
        "voxel_channels": 3,
        "width": 2,
        "point_channels": (6, 7, 8),
        "kernel_mode": "as_released",
    }
    fates = report.fates()
    assert len(fates) == 275
    assert fates["adapter.0.pe"] == "dropped"
    assert fates[f"{SPARSE}logits.bias"] == "copied"
    assert fates[f"{SPARSE}resBlock2.pool.weight"] == "permuted"
    assert (
        fates[f"{SPARSE}upBlock2.conv3.weight"] == "permuted, read under the executed kernel, cut"
    )
    text = str(report)
    for part in (
        "274 entries",
        "spconv 1",
        "226 entries",
        "48 kernels",
        "20 kernels",
        "24480 numbers",
        "1 dropped",
    ):
        assert part in text, text


def test_nothing_is_shared_with_the_file():
    old = released()
    new, _ = convert_cylinder3d(old)
    before = {key: value.clone() for key, value in new.items()}
    for value in old.values():
        value.zero_()
    for key, value in new.items():
        assert value.is_contiguous()
        assert torch.equal(value, before[key])


def first_rulebook(old):
    """Convolutions as spconv 1 executes them: all of a block on the neighbours that its first one has found."""

    def conv(level, key, x):
        block, _, leaf = key.partition(".")
        weight = old[f"{key}.weight"]
        kernel = (old[f"{block}.conv1.weight"] if leaf in SHARED else weight).shape[:3]
        taps = weight.flatten(0, 2)
        out = x.new_zeros(len(level.cells), weight.shape[4])
        for number, tap in enumerate(taps_of(kernel)):
            step = [t - k // 2 for t, k in zip(tap, kernel)]
            for row, (b, *cell) in enumerate(level.cells):
                source = level.row.get((b, *(c + s for c, s in zip(cell, step))))
                if source is not None:
                    out[row] += x[source] @ taps[number]
        return out + old.get(f"{key}.bias", 0)

    return conv


@torch.no_grad()
def test_converted_network_equals_the_first_layout_by_loops():
    old = released()
    weights, report = convert_cylinder3d(old)
    network = Cylinder3D(**report.network, partition=GRID)
    network.load_state_dict(weights, strict=True)
    paths = {name: SPARSE + path for name, path in TAPS.items()}
    with Taps(network.eval(), {**paths, "input": "cylinder_3d_generator"}).record() as seen:
        scores = network(points([60, 50]))

    sparse = {k.removeprefix(SPARSE): v.double() for k, v in old.items() if k.startswith(SPARSE)}
    own = {
        k: torch.einsum("abcio->oabci", v)
        if v.dim() == 5 and (".pool" in k or ".up_subm" in k)
        else v
        for k, v in sparse.items()
    }
    features = seen["input"].feat.double()
    expected = emulate(own, scores.indices, GRID["shape"], features, first_rulebook(sparse))
    for name in ("d1", "d3", "u4", "u2", "u0", "logits"):
        assert float(expected[name].std(0).max()) > 0.05
        assert_near(seen[name].feat.double(), expected[name], 1e-4)
    assert torch.equal(scores.logits, seen["logits"].feat)

    # And it matters: the declared kernels give other scores.
    plain, _ = convert_cylinder3d(released(dead=0.0), "intended")
    other = Cylinder3D(**{**report.network, "kernel_mode": "intended"}, partition=GRID)
    other.load_state_dict(plain, strict=True)
    assert float((other.eval()(points([60, 50])).logits - scores.logits).abs().max()) > 0.1


# ---------------------------------------------------------------------------------------- Cylinder3D, forms of a file


@pytest.mark.parametrize(
    "wrap",
    [
        lambda old: {"model": old},
        lambda old: {"state_dict": old, "epoch": 3},
        lambda old: {f"module.{key}": value for key, value in old.items()},
        lambda old: {"model": {f"module.{key}": value for key, value in old.items()}},
        lambda old: {key: value.double() if value.dim() else value for key, value in old.items()},
    ],
    ids=["model", "state_dict", "module", "model+module", "float64"],
)
def test_wrappings(wrap):
    expected, _ = convert_cylinder3d(released())
    found, _ = convert_cylinder3d(wrap(released()))
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_first_layout_trained_as_declared():
    old = released(dead=0.5)
    new, report = convert_cylinder3d(old, "intended")
    assert (len(report.permuted), report.reread, report.cut) == (48, [], {})
    assert report.network["kernel_mode"] == "intended"
    key = f"{SPARSE}upBlock1.conv3.weight"
    assert new[key][3, 2, 0, 1, 4] == old[key][2, 0, 1, 4, 3]


def test_second_layout():
    old = released(dead=0.5)
    expected, _ = convert_cylinder3d(old)
    # Executed kernels can only be those of released weights.
    found, report = convert_cylinder3d(expected)
    assert report.network["kernel_mode"] == "as_released"
    assert len(report.matched) == 274
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # Declared kernels tell nothing.
    second = second_layout(old)
    with pytest.raises(InputError, match="kernel_mode='intended'.*kernel_mode='as_released'"):
        convert_cylinder3d(second)
    found, report = convert_cylinder3d(second, "as_released")
    assert len(report.reread) == 20
    assert len(report.matched) == 254
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    found, report = convert_cylinder3d(second, "intended")
    assert all(torch.equal(found[key], second[key]) for key in second)
    with pytest.raises(
        InputError, match="upBlock0.conv3.*only weights of kernel_mode='as_released'"
    ):
        convert_cylinder3d(expected, "intended")


@torch.no_grad()
def test_second_layout_of_the_program_that_forgets_a_norm():
    file = second_layout(released(dead=0.5))
    norm = f"{SPARSE}downCntx.bn1"
    file[f"{norm}.weight"].fill_(1.0)
    file[f"{norm}.bias"].fill_(0.0)
    _, report = convert_cylinder3d(file, "intended")
    assert report.neutral == []  # as it is initialised: no batch was seen
    file[f"{norm}.num_batches_tracked"].fill_(7)
    weights, report = convert_cylinder3d(file, "intended")
    assert report.neutral == [f"{norm}.running_mean", f"{norm}.running_var"]
    assert "2 made neutral (downCntx.bn1.running_mean" in str(report)
    assert len(report.matched) == 272
    network = Cylinder3D(**report.network, partition=GRID).eval()
    network.load_state_dict(weights, strict=True)
    with Taps(network, {"input": "cylinder_3d_generator"}).record() as seen:
        scores = network(points([60]))
    sparse = {k.removeprefix(SPARSE): v.double() for k, v in file.items() if k.startswith(SPARSE)}
    features = seen["input"].feat.double()
    expected = emulate(sparse, scores.indices, GRID["shape"], features, without=["downCntx.bn1"])
    with_it = emulate(sparse, scores.indices, GRID["shape"], features)
    assert_near(scores.logits.double(), expected["logits"], 1e-4)
    assert float((with_it["logits"] - expected["logits"]).abs().max()) > 1e-2
    # spconv 1 did use it.
    _, report = convert_cylinder3d({**released(), **{k: v for k, v in file.items() if norm in k}})
    assert report.neutral == []


def test_published_sizes_are_recognised():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Cylinder3D(voxel_channels=32).state_dict().items()}
    small = {k: torch.zeros(()).expand(s) for k, s in shapes.items()}
    old = {k: v.permute(1, 2, 3, 4, 0) if v.dim() == 5 else v for k, v in small.items()}
    new, report = convert_cylinder3d(old)
    assert report.network == {
        "in_channels": 4,
        "num_classes": 20,
        "voxel_channels": 32,
        "width": 32,
        "point_channels": (64, 128, 256),
        "kernel_mode": "as_released",
    }
    assert sum(report.cut.values()) == 6_266_880
    live = sum(v.numel() for k, v in new.items() if "running" not in k and "num_batches" not in k)
    assert live == 49_586_486 + 55_866_694 - 55_853_366


# --------------------------------------------------------------------------------------------------------- refusals

CONV = f"{SPARSE}resBlock3.conv2.weight"
CONTEXT = f"{SPARSE}downCntx.conv1.weight"


def spoiled(key, row):
    def change(old):
        old[key].flatten()[row] = float("nan")
        return old

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda old: {}, "no weights of Cylinder3D: .*downCntx.conv1.weight is not there; .* none"),
        (lambda old: {"weight": torch.zeros(3)}, "is not there; the keys begin with weight"),
        (lambda old: {**old, "epoch": 3}, "'epoch' is a int"),
        (
            lambda old: {**old, f"module.{CONV}": old[CONV]},
            "resBlock3.conv2.weight' is there twice",
        ),
        (lambda old: {f"backbone.{k}": v for k, v in old.items()}, "converted already"),
        (
            lambda old: {k: v for k, v in old.items() if k != CONV},
            "1 of 274 keys lack .resBlock3.conv2.weight., 0 are",
        ),
        (
            lambda old: {**old, "head.weight": torch.zeros(2)},
            "0 of 274 keys lack .none., 1 are unknown .head.weight",
        ),
        (
            lambda old: {**old, CONTEXT: old[CONTEXT].transpose(0, 1)},
            r"downCntx.conv1.weight has the shape \(3, 1, 3, 3, 2\): expected",
        ),
        (lambda old: {**old, CONTEXT: old[CONTEXT][0]}, "expected 5 axes"),
        (
            lambda old: {**old, CONV: old[CONV][0]},
            r"resBlock3.conv2.weight has the shape \(3, 3, 4, 8\): expected",
        ),
        (
            lambda old: {**old, CONV: old[CONV].transpose(3, 4)},
            r"\(1, 3, 3, 8, 4\): expected \(1, 3, 3, 4, 8\)",
        ),
        (
            lambda old: {**old, CONV: old[CONV].long()},
            "resBlock3.conv2.weight has the type torch.int64",
        ),
        (spoiled(CONV, 3), "resBlock3.conv2.weight has 1 of 288 numbers that are not finite"),
        (spoiled(f"{SPARSE}upBlock0.conv3.weight", 8), "upBlock0.conv3.weight has 1 of"),
        (
            spoiled("cylinder_3d_generator.PPmodel.2.running_var", 0),
            "PPmodel.2.running_var has 1 of 6",
        ),
        (
            lambda old: {k.replace("conv1_2", "conv1x"): v for k, v in old.items()},
            "6 of 274 keys lack",
        ),
    ],
)
def test_refusals(change, text):
    with pytest.raises(InputError, match=text) as error:
        convert_cylinder3d(change(released()))
    assert "\n" not in str(error.value)


def test_declared_kernels_need_all_taps():
    with pytest.raises(InputError, match="upBlock0.conv3.weight has 18432 of 27648"):
        convert_cylinder3d(released(), "intended")
    with pytest.raises(InputError, match="kernel_mode='x' is none of"):
        convert_cylinder3d(released(), "x")


# ------------------------------------------------------------------------------------------------------------ PolarNet


def test_polarnet_is_copied():
    weights = polar(5).state_dict()
    new, report = convert_polarnet({"model": {f"module.{k}": v for k, v in weights.items()}}, 5, 4)
    assert len(new) == len(report.matched) == 163
    assert report.expanded == []
    assert report.network == {"in_channels": 4, "num_classes": 5, **POLAR}
    assert all(torch.equal(new[key], weights[key]) for key in weights)


@torch.no_grad()
def test_a_class_that_nothing_is():
    first = polar(4)
    new, report = convert_polarnet(first.state_dict(), 5, 4)
    assert report.expanded == [f"BEV_model.network.outc.conv.{leaf}" for leaf in ("weight", "bias")]
    assert (len(report.matched), "PolarSeg" in report.layout) == (161, True)
    second = PolarNet(partition=POLAR_GRID, **report.network).eval()
    second.load_state_dict(new, strict=True)
    batch = points([80, 60])
    before, after = first(batch).logits, second(batch).logits
    torch.testing.assert_close(after[:, 1:], before, rtol=0, atol=1e-5)
    assert torch.equal(after[:, 0], torch.full((len(after),), VOID_BIAS))
    assert torch.equal(after.softmax(1)[:, 0], torch.zeros(len(after)))
    torch.testing.assert_close(after.softmax(1)[:, 1:], before.softmax(1))


@pytest.mark.parametrize(
    ("change", "classes", "text"),
    [
        (
            lambda old: old,
            7,
            "outc.conv.weight has 20 rows: with 4 heights expected 28 for 7 classes, or 24",
        ),
        (lambda old: old, 1, "num_classes=1"),
        (lambda old: {}, 5, "no weights of PolarNet: PPmodel.0.weight is not there"),
        (lambda old: {**old, "x.weight": torch.zeros(1)}, 5, "1 are unknown .x.weight"),
        (
            lambda old: {
                k.replace("down2.mpconv.1.conv1.", "down2.mpconv.1.conv."): v
                for k, v in old.items()
            },
            5,
            "7 of 163 keys lack",
        ),
        (
            lambda old: {**old, "BEV_model.network.up1.conv.conv1.0.weight": torch.zeros(8, 32, 3)},
            5,
            r"up1.conv.conv1.0.weight has the shape \(8, 32, 3\): expected \(8, 32, 3, 3\)",
        ),
        (spoiled("fea_compression.0.bias", 1), 5, "fea_compression.0.bias has 1 of 3 numbers"),
    ],
)
def test_polarnet_refusals(change, classes, text):
    old = {key: value.clone() for key, value in polar(5).state_dict().items()}
    with pytest.raises(InputError, match=text) as error:
        convert_polarnet(change(old), classes, 4)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ the tool


@torch.no_grad()
def test_tool_converts_cylinder3d(tmp_path):
    file, out = tmp_path / "released.pt", tmp_path / "made" / "here.pth"
    torch.save(released(), file)
    code, text, errors = run("cylinder3d", file, "--out", out, "--shape", 12, 10, 8)
    assert (code, errors) == (0, "")
    for part in (
        "274 entries",
        'kernel_mode="as_released"',
        "shape=(12, 10, 8)",
        str(out),
        "48 kernels permuted",
    ):
        assert part in text
    checkpoint = load_checkpoint(out)
    partition = checkpoint["model_config"]["backbone"]["partition"]
    assert (partition["low"], partition["high"]) == (PARTITION["low"], PARTITION["high"])
    assert checkpoint["grids"]["backbone.partition"] == {
        k: list(v) if isinstance(v, tuple) else v for k, v in partition.items()
    }
    assert checkpoint["source"]["file"] == "released.pt"
    assert len(checkpoint["source"]["sha256"]) == 64
    assert "226 entries" in checkpoint["source"]["report"]
    # What is printed is what is kept, and the network that it describes loads the weights strictly.
    printed: dict = {}
    exec(text[text.index("model = ") : text.index("\n\n/")], {}, printed)
    assert printed["model"] == checkpoint["model_config"]
    model = MODELS.build(checkpoint["model_config"])
    report = load_into(model, checkpoint["state_dict"], strict=True)
    assert report.share == 1.0
    direct, described = convert_cylinder3d(released())
    network = Cylinder3D(**described.network, partition=partition).eval()
    network.load_state_dict(direct)
    batch = points([60])
    scores = network(batch)
    del batch["segment"]
    assert torch.equal(model.eval()(batch)["seg_logits"], scores.logits[scores.inverse][:, 1:])


def test_tool_converts_polarnet(tmp_path):
    file, out = tmp_path / "polarseg.pt", tmp_path / "made.pth"
    torch.save({"state_dict": polar(4).state_dict()}, file)
    bounds = ("--range", 0, -3.1415926, -4, 50, 3.1415926, 2)
    arguments = ("--num-classes", 5, "--shape", 32, 32, 4, *bounds)
    code, text, errors = run("polarnet", file, "--out", out, "--keys", *arguments)
    assert (code, errors) == (0, "")
    assert re.search(r"^BEV_model.network.outc.conv.bias +expanded$", text, re.MULTILINE)
    assert "2 expanded" in text
    checkpoint = load_checkpoint(out)
    partition = checkpoint["model_config"]["backbone"]["partition"]
    assert partition["low"] == (0.0, -3.1415926, -4.0)
    assert partition["high"] == (50.0, 3.1415926, 2.0)
    model = MODELS.build(checkpoint["model_config"])
    load_into(model, checkpoint["state_dict"], strict=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--range", "nowhere"), "--range nowhere: give teacher, student, or six numbers"),
        (("--range", 0, 1, 2), "--range 0 1 2: give"),
        (("--range", 50, -3, -4, 0, 3, 2), "partition="),
        (("--shape", 1, 2, 3), "partition="),
        ((), "released.pt: the weights are not those of Cylinder3D"),
    ],
)
def test_tool_refuses_in_one_line_and_writes_nothing(tmp_path, arguments, text):
    file, out = tmp_path / "released.pt", tmp_path / "out.pth"
    old = released()
    del old[CONV]
    torch.save(old, file)
    code, _, errors = run("cylinder3d", file, "--out", out, *arguments)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert text in errors
    assert not out.exists()


def test_tool_refuses_files_and_names(tmp_path):
    file = tmp_path / "a.pt"
    code, _, errors = run("polarnet", file, "--out", tmp_path / "b.pth")
    assert (code, "there is no such file" in errors) == (2, True)
    torch.save(released(), file)
    before = file.read_bytes()
    code, _, errors = run("cylinder3d", file, "--out", file)
    assert (code, "choose another name" in errors, file.read_bytes() == before) == (2, True, True)
    code, _, errors = run("cylinder3d", file, "--out", file / "b.pth")
    assert (code, "no folder can be made there" in errors) == (2, True)
    code, _, errors = run("polarnet", file, "--out", tmp_path / "b.pth")
    assert (code, "no weights of PolarNet" in errors) == (2, True)
    file.write_bytes(b"nothing")
    code, _, errors = run("cylinder3d", file, "--out", tmp_path / "b.pth")
    assert code == 2
    assert len(errors.splitlines()) == 1


def test_help_has_examples():
    code, text, _ = run("--help")
    assert code == 0
    for part in (
        "cylinder3d",
        "polarnet",
        "python tools/convert.py cylinder3d model_save_backup.pt --out",
    ):
        assert part in text
    code, text, _ = run("cylinder3d", "--help")
    assert (code, "--kernel-mode" in text) == (0, True)
