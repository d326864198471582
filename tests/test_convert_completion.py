"""Released completion weights: kernels against MinkowskiEngine's rules in loops, files, the tool, what is refused."""

import itertools
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from pointcept_kd.completion.diffusion import DiffusionCompletion
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, load_into
from pointcept_kd.networks.denoiser import ConditionEncoder, Denoiser, Refiner
from pointcept_kd.networks.released_completion import (
    convert_completion,
    convert_refiner,
    from_minkowski,
    read_tensors,
)
from pointcept_kd.ops.sparse import (
    SparseConvTensor,
    inverse_conv,
    strided_conv,
    submanifold_conv,
)

from .networks.test_denoiser import MICRO, TIMES, Plain, cloud, plain_noise, scene
from .test_convert import run

KINDS = {"encoder": ConditionEncoder, "denoiser": Denoiser, "refiner": Refiner}


def entries(kind, prefix, seed, cr=MICRO):
    """Random entries of one network in the layout of the released files."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in KINDS[kind](cr).state_dict().items()}
    made = {}
    for key, shape in shapes.items():
        if len(shape) == 5:
            key, shape = key[:-6] + "kernel", (shape[1] ** 3, shape[4], shape[0])
        elif "downsample.0" in key:
            key, shape = key[:-6] + "kernel", (shape[1], shape[0])
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif key.endswith("running_var"):
            value = torch.rand(shape, generator=g) + 0.5
        else:
            inputs = shape[-2] * 2 if key.endswith("kernel") else shape[-1]
            value = torch.randn(shape, generator=g) * inputs**-0.5
        made[prefix + key] = value
    return made


def released(encoder="partial_enc.", denoisers=("model.",), **options):
    made = entries("encoder", encoder, 0, **options)
    for seed, prefix in enumerate(denoisers, 1):
        made.update(entries("denoiser", prefix, seed, **options))
    return made


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


def save(path, state_dict, **more):
    content = {
        "epoch": 19,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": state_dict,
        "hyper_parameters": Settings(batch=2, rate=np.float64(1e-4), path=path, root=Settings()),
        "callbacks": {Settings: {"best": torch.zeros(3)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}}],
        **more,
    }
    torch.save(content, path)
    return path


# -------------------------------------------------------------------------------------------------------------- kernels


def offsets(size):
    """MinkowskiEngine's offset of every flat tap: x counts fastest, odd kernels are centred."""
    for iz, iy, ix in itertools.product(range(size), repeat=3):
        tap = ix + size * iy + size * size * iz
        o = (ix, iy, iz)
        yield tap, tuple(i - size // 2 for i in o) if size % 2 else o


class Minkowski(Plain):
    """The three convolutions by MinkowskiEngine's rules, on kernels as it keeps them."""

    def __init__(self, state, prefix=""):
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        super().__init__(own)
        for key in [k for k in self.state if k.endswith("downsample.0.kernel")]:
            # y = x K, as a row times a matrix.
            self.state[key[:-6] + "weight"] = self.state[key].T

    def same(self, name, cells):
        kernel, out = self.state[f"{name}.kernel"], {}
        for u in cells:
            out[u] = np.zeros(kernel.shape[2])
            for tap, o in offsets(3):
                v = tuple(a + b for a, b in zip(u, o))
                if v in cells:
                    out[u] += cells[v] @ kernel[tap]
        return out

    def down(self, name, cells):
        kernel = self.state[f"{name}.kernel"]
        out = {tuple(math.floor(a / 2) for a in u): np.zeros(kernel.shape[2]) for u in cells}
        for p, total in out.items():
            for tap, o in offsets(2):
                u = tuple(2 * a + b for a, b in zip(p, o))
                if u in cells:
                    total += cells[u] @ kernel[tap]
        return out

    def up(self, name, cells, fine):
        kernel = self.state[f"{name}.kernel"]
        out = {u: np.zeros(kernel.shape[2]) for u in fine}
        for p, f in cells.items():
            for tap, o in offsets(2):
                u = tuple(2 * a + b for a, b in zip(p, o))
                if u in out:
                    out[u] += f @ kernel[tap]
        return out


def test_taps_by_hand():
    # Written at the place of tap k is k, so that a place in the result names its tap.
    cube = from_minkowski(torch.arange(27.0).view(27, 1, 1))
    assert cube.shape == (1, 3, 3, 3, 1)
    for offset, tap in (((-1, 0, 1), 21), ((0, 0, 0), 13), ((1, 1, 1), 26), ((1, -1, -1), 2)):
        x, y, z = (o + 1 for o in offset)
        assert cube[0, x, y, z, 0] == tap
    pair = from_minkowski(torch.arange(8.0).view(8, 1, 1))
    assert pair[0, 1, 0, 1, 0] == 5
    assert pair[0, 0, 1, 0, 0] == 2
    kernel = torch.randn(27, 4, 6)
    assert from_minkowski(kernel)[5, 2, 0, 1, 3] == kernel[2 + 3 * 0 + 9 * 1, 3, 5]
    assert torch.equal(from_minkowski(kernel[0]), kernel[0].t())
    with pytest.raises(InputError, match="26 taps is no cube"):
        from_minkowski(kernel[:26])


def test_convolutions_against_loops():
    g = torch.Generator().manual_seed(0)
    cells = torch.randint(-5, 5, (150, 3), generator=g).unique(dim=0)
    features = torch.randn(len(cells), 4, generator=g).double()
    state = {"a.kernel": (27, 4, 6), "b.kernel": (8, 6, 5), "c.kernel": (8, 5, 3)}
    state = {k: torch.randn(s, generator=g).double() for k, s in state.items()}
    loops = Minkowski(state)
    x = dict(zip(map(tuple, cells.tolist()), features.numpy()))
    a = loops.same("a", x)
    b = loops.down("b", a)
    c = loops.up("c", b, a)
    weights = {k[0]: from_minkowski(v) for k, v in state.items()}
    indices = torch.cat((torch.zeros_like(cells[:, :1]), cells), 1)
    tensor = submanifold_conv(SparseConvTensor(features, indices, None, 1), weights["a"])
    coarse = strided_conv(tensor, weights["b"], stride=2, indice_key="down")
    fine = inverse_conv(coarse, weights["c"], None, "down")
    for made, expected in ((tensor, a), (coarse, b), (fine, c)):
        assert len(made.features) == len(expected)
        for u, f in zip(made.indices[:, 1:].tolist(), made.features.numpy()):
            assert np.abs(f - expected[tuple(u)]).max() < 1e-12


@torch.no_grad()
def test_converted_denoiser_against_loops(monkeypatch):
    file = released()
    weights, report = convert_completion(file, "lidiff")
    encoder, denoiser = (
        KINDS[name](**report.network).double().eval() for name in ("encoder", "denoiser")
    )
    for name, network in (("encoder", encoder), ("denoiser", denoiser)):
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
        network.load_state_dict(own, strict=True)
    x, offset, c, c_offset = scene(sizes=(50, 20), partial=(14, 8))
    made = denoiser(x, offset, TIMES, encoder(c, c_offset))[:50]
    prefixes = iter(("partial_enc.", "model."))
    monkeypatch.setitem(
        plain_noise.__globals__, "Plain", lambda state: Minkowski(file, next(prefixes))
    )
    expected = plain_noise(denoiser, encoder, x[:50].numpy(), c[:14].numpy(), int(TIMES[0]))
    assert np.abs(made.numpy() - expected).max() < 1e-9 * np.abs(expected).max()


@torch.no_grad()
def test_converted_refiner_against_loops():
    file = entries("refiner", "model_refine.", 5)
    weights, report = convert_refiner(file)
    refiner = Refiner(**report.network).double().eval()
    refiner.load_state_dict(weights, strict=True)
    x, offset = cloud([40], 5, dtype=torch.float64)
    loops = Minkowski(file, "model_refine.")
    expected = loops.of_points(x.numpy(), loops.decode(loops.encode(loops.cells(x.numpy()))))
    made = refiner(x, offset).flatten(1).numpy()
    assert np.abs(made - np.tanh(expected)).max() < 1e-9


# ---------------------------------------------------------------------------------------------------------------- files

DPO = ("generator.", "teacher.", "auxDiffBetter.", "auxDiffWorse.")
SCORE = ("generator.", "teacher.", "auxDiff.")


@pytest.mark.parametrize(
    ("kind", "encoder", "denoisers", "part", "taken"),
    [
        ("lidiff", "partial_enc.", ("model.",), None, "model."),
        ("lidiff", "DM_encoder.", ("DiffModel.",), "teacher", "DiffModel."),
        ("scorelidar", "partial_enc.", SCORE, None, "generator."),
        ("scorelidar", "partial_enc.", SCORE, "auxiliary", "auxDiff."),
        ("distillationdpo", "partial_enc.", DPO, None, "generator."),
        ("distillationdpo", "partial_enc.", DPO, "teacher", "teacher."),
        ("distillationdpo", "partial_enc.", DPO, "better", "auxDiffBetter."),
        ("distillationdpo", "partial_enc.", DPO, "worse", "auxDiffWorse."),
    ],
)
def test_containers(kind, encoder, denoisers, part, taken):
    file = released(encoder, denoisers)
    # A prefix counts at the beginning of a key only.
    file[f"monitor.{taken}stem.0.kernel"] = torch.zeros(1)
    weights, report = convert_completion(file, kind, part)
    assert len(weights) == 150 + 394
    for mine, theirs in (("encoder.", encoder), ("denoiser.", taken)):
        kernel = file[f"{theirs}stage2.0.net.0.kernel"]
        assert torch.equal(weights[f"{mine}stage2.0.net.0.weight"], from_minkowski(kernel))
        key = "stage3.1.downsample.0."
        assert torch.equal(weights[f"{mine}{key}weight"], file[f"{theirs}{key}kernel"].t())
        key = "stage4.2.net.4.bn.running_var"
        assert torch.equal(weights[mine + key], file[theirs + key])
    key = "latemp_up1.0.weight"
    assert torch.equal(weights[f"denoiser.{key}"], file[taken + key])
    assert len(report.dropped) == 394 * (len(denoisers) - 1) + 1
    # 25 kernels of the encoder, and those of the decoder.
    assert (len(report.permuted), len(report.matched)) == (25 + 49, 544 - 74)
    assert set(report.fates()) == set(file)
    assert report.network == {"cr": MICRO}
    assert f"Denoiser from {taken} (394 entries)" in str(report)
    assert f"{len(report.dropped)} dropped" in str(report)


def test_published_widths_are_recognised():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Refiner().state_dict().items()}
    file = {}
    for key, shape in shapes.items():
        if len(shape) == 5:
            key, shape = key[:-6] + "kernel", (shape[1] ** 3, shape[4], shape[0])
        elif "downsample.0" in key:
            key, shape = key[:-6] + "kernel", shape[::-1]
        kind = torch.int64 if key.endswith("tracked") else torch.float32
        file[f"model_refine.{key}"] = torch.zeros((), dtype=kind).expand(shape)
    weights, report = convert_refiner({f"module.{k}": v for k, v in file.items()})
    assert report.network == {}
    assert {k: tuple(v.shape) for k, v in weights.items()} == shapes


def test_pickled_settings_are_not_run(tmp_path):
    trap = tmp_path / "made by the file"
    file = released()
    file["odd"] = Trap(str(trap))
    shared = torch.arange(12.0).view(3, 4)
    file["view"], file["parameter"] = shared[:, 1::2], torch.nn.Parameter(shared)
    path = save(tmp_path / "a.ckpt", file, trap=Trap(str(trap)), more=[Settings(), {Settings: 1}])
    with pytest.raises(InputError, match="only running its code could read"):
        load_checkpoint(path)
    made = read_tensors(path)
    assert not trap.exists()
    assert torch.equal(made["view"], shared[:, 1::2])
    assert torch.equal(made["parameter"], shared)
    assert not isinstance(made.pop("odd"), torch.Tensor)
    for key, value in made.items():
        assert torch.equal(value, file[key]), key
        assert value.dtype == file[key].dtype
    # The same entries where the weights stand alone, and in the form of old files.
    plain = released()
    for old in (False, True):
        torch.save(plain, path, _use_new_zipfile_serialization=not old)
        made = read_tensors(path)
        assert all(torch.equal(made[key], value) for key, value in plain.items())
    torch.save(Trap(str(trap)), path)
    with pytest.raises(InputError, match="has no weights"):
        read_tensors(path)
    assert not trap.exists()


def rewritten(path, change):
    """The archive with another pickle."""
    with zipfile.ZipFile(path) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_damaged_files(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(InputError, match="does not exist"):
        read_tensors(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cut off or damaged|is damaged"):
        read_tensors(path)
    torch.save({"state_dict": {}, "epoch": 3}, path)
    assert read_tensors(path) == {}
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="expected state_dict, found epoch"):
        read_tensors(path)
    torch.save({"state_dict": {"a": torch.ones(6)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        read_tensors(path)
    for change in (lambda content: content[: len(content) // 2], lambda _: pickle.dumps([])):
        path.write_bytes(whole)
        rewritten(path, change)
        with pytest.raises(InputError, match="not readable as a checkpoint|has no weights"):
            read_tensors(path)
    # A view beyond the end of its numbers: 6 becomes 9 elements.
    path.write_bytes(whole)
    rewritten(path, lambda content: content.replace(b"K\x06\x85", b"K\x09\x85"))
    with pytest.raises(InputError, match="beyond the end"):
        read_tensors(path)


# ------------------------------------------------------------------------------------------------------------- refusals

CONV = "model.stage3.1.net.3.kernel"


def without(key):
    return lambda file: {k: v for k, v in file.items() if k != key}


def put(key, change):
    return lambda file: {**file, key: change(file.get(key))}


def spoil(value):
    value = value.clone()
    value.flatten()[3] = math.nan
    return value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: {}, "ConditionEncoder below partial_enc. or DM_encoder.; .* begin with none"),
        (
            lambda file: {f"x.{k}": v for k, v in file.items()},
            "expected weights of ConditionEncoder .* the keys begin with x.",
        ),
        (
            lambda file: {**file, **entries("denoiser", "DiffModel.", 1)},
            "below model. or DiffModel., not below both",
        ),
        (without(CONV), "Denoiser below model.: 1 of 394 keys lack .stage3.1.net.3.kernel"),
        (put("model.more", lambda _: torch.ones(2)), "1 are unknown .more"),
        (put(CONV, lambda k: k.transpose(1, 2)[:, :1]), "stage3.1.net.3.kernel has the shape"),
        (put(CONV, lambda k: k[:26]), r"has the shape \(26, 8, 8\): expected \(27, 8, 8\)"),
        (put(CONV, lambda k: k.long()), "has the type torch.int64"),
        (
            put(CONV, spoil),
            "denoiser.stage3.1.net.3.weight has 1 of 1728 numbers that are not finite",
        ),
        (put(CONV, lambda _: "text"), "model.stage3.1.net.3.kernel is no tensor"),
        (without("model.stem.0.kernel"), "model.stem.0.kernel is not there"),
        (
            lambda file: {**file, f"module.{CONV}": file[CONV]},
            "twice, with and without `module.`",
        ),
        (
            lambda file: {k.replace("kernel", "weight"): v for k, v in file.items()},
            "converted already",
        ),
        (
            lambda file: {**file, **entries("denoiser", "model.", 1, cr=0.125)},
            "unlike widths",
        ),
    ],
)
def test_refusals(change, text):
    with pytest.raises(InputError, match=text) as error:
        convert_completion(change(released()), "lidiff")
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(InputError, match="kind='x' is none of lidiff, scorelidar, distillationdpo"):
        convert_completion({}, "x")
    with pytest.raises(InputError, match="part='student' is none of teacher"):
        convert_completion({}, "lidiff", "student")
    with pytest.raises(InputError, match="expected weights of Refiner below model_refine."):
        convert_refiner(released())


# ------------------------------------------------------------------------------------------------------------- the tool


@torch.no_grad()
def test_tool_converts_a_student(tmp_path):
    file = save(tmp_path / "st.ckpt", released("partial_enc.", DPO))
    out = tmp_path / "made" / "st.pth"
    code, text, errors = run("distillationdpo", file, "--out", out, "--part", "student", "--keys")
    assert (code, errors) == (0, "")
    for part in (
        "Distillation-DPO, student",
        "Denoiser from generator. (394",
        "1182 dropped",
        str(out),
    ):
        assert part in text
    assert "generator.up1.0.net.0.kernel" in text
    checkpoint = load_checkpoint(out)
    model = MODELS.build(checkpoint["model_config"]).eval()
    assert isinstance(model, DiffusionCompletion)
    assert (model.steps, model.guidance) == (8, 3.5)
    assert load_into(model, checkpoint["state_dict"], strict=True).share == 1
    direct, _ = convert_completion(released("partial_enc.", DPO), "distillationdpo")
    made = model.state_dict()
    assert all(torch.equal(made[key], value) for key, value in direct.items())
    c, offset = cloud([14, 8], 4)
    points, ends = model.complete(c, offset, steps=2)
    assert (points.shape, ends.tolist()) == ((220, 3), [140, 220])
    assert bool(points.isfinite().all())
    code, _, errors = run("scorelidar", file, "--out", tmp_path / "b.pth", "--part", "auxiliary")
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "st.ckpt: expected weights of Denoiser below auxDiff.; the keys begin with" in errors
    assert not (tmp_path / "b.pth").exists()


def test_tool_converts_a_refiner(tmp_path):
    file = save(tmp_path / "refine_net.ckpt", entries("refiner", "model_refine.", 5))
    out = tmp_path / "refiner.pth"
    code, text, errors = run("refiner", file, "--out", out)
    assert (code, errors) == (0, "")
    assert 'type="kd.Refiner"' in text
    checkpoint = load_checkpoint(out)
    MODELS.build(checkpoint["model_config"]).load_state_dict(checkpoint["state_dict"], strict=True)
