"""The hand-over to OpenPCDet: what is written, how OpenPCDet loads it, the way back, and what is refused."""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pointcept_kd.distillers.base import Teacher
from pointcept_kd.handoff import detectors, kitti, yaml_text
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import grids_of, load_into
from pointcept_kd.host.hooks import CheckpointLoader
from pointcept_kd.host.pretrained import PretrainedBackbone
from pointcept_kd.networks import UNetV2, VoxelBackBone8x, VoxelEmbedding, VoxelResBackBone8x
from tools import export_openpcdet as tool

from .networks.test_voxelnet import (
    KITTI,
    P3_FAR,
    SMALL,
    distinct_weights,
    lively,
    openpcdet,  # noqa: F401  a fixture
    points,
    voxels,
)

# Entries of a detector beside its encoder.
OTHERS = {"second": 91, "pv_rcnn": 295, "parta2": 165, "centerpoint": 137}
AXES = {"krsc": "oabci", "rsck": "abcio", "rskc": "abcoi"}


def other_layout(state, layout):
    """Kernels (out, z, y, x, in) in another order of axes."""
    return {
        k: torch.einsum(f"oabci->{AXES[layout]}", v).contiguous() if v.dim() == 5 else v
        for k, v in state.items()
    }


@pytest.fixture
def run(tmp_path):
    """A run of this package: the trained network, its checkpoint, and the tool on it."""
    network = VoxelEmbedding(lively(VoxelBackBone8x()))
    path = tmp_path / "model_last.pth"
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "grids": grids_of(network)}, path)
    return network, path


def export(path, *more, detector="second"):
    out = path.parent / "out"
    tool.main([str(path), "--detector", detector, "--out", str(out), "--tag", "t", *more])
    return out / "t.pth", json.loads((out / "t.json").read_text())


def loads(file_state, model):
    """How many entries OpenPCDet takes: by its rules for shapes, written from their description."""
    own = model.state_dict()
    kernels = {f"{n}.weight" for n, m in model.named_modules() if hasattr(m, "indice_key")}
    taken = {}
    for key, value in file_state.items():
        if key in kernels and own[key].shape != value.shape:
            if value.transpose(-1, -2).shape == own[key].shape:
                value = value.transpose(-1, -2)
            elif value.movedim(-1, 0).shape == own[key].shape:
                value = value.movedim(-1, 0)
        if key in own and own[key].shape == value.shape:
            taken[key] = value
    model.load_state_dict({**own, **taken})
    return len(taken), len(own)


def detector(kind=VoxelBackBone8x, others=OTHERS["second"]):
    """A model with the encoder and as many other entries as the detector has."""
    torch.manual_seed(9)
    model = nn.Module()
    model.backbone_3d = kind(**KITTI)
    model.dense_head = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(others)])
    return model.eval()


def block():
    """Half of the voxels of a block, under which every layer shows."""
    g = torch.Generator().manual_seed(1)
    picked = torch.randperm(8**3, generator=g)[: 8**3 // 2]
    cells = torch.stack(torch.unravel_index(picked, (8, 8, 8)), 1)
    rows = [[0, z + 12, y + 800, x + 704] for z, y, x in cells.tolist()]
    return rows, torch.randn(len(rows), 4, generator=g)


@torch.no_grad()
def encoded(network):
    rows, features = block()
    return network.encode(voxels(network, rows, features)).out.features


def test_the_file(run):
    network, path = run
    target, report = export(path)
    file = torch.load(target, weights_only=True)
    state = file["model_state"]
    assert len(state) == 72
    assert all(k.startswith("backbone_3d.") for k in state)
    for key, value in state.items():
        counter = key.endswith("num_batches_tracked")
        assert value.dtype == (torch.int64 if counter else torch.float32)
        assert value.device.type == "cpu"
        assert value.is_contiguous()
        assert value.isfinite().all()
        assert torch.equal(value, network.backbone.state_dict()[key[len("backbone_3d.") :]])
    assert file["epoch"] == -1
    assert file["it"] == 0
    assert file["optimizer_state"] is None
    assert file["version"].startswith("pointcept_kd+")
    assert "global_step" not in state
    assert "global_step" not in file
    assert 2.8e6 < target.stat().st_size < 3.1e6
    assert report["n_matched"] == 72
    assert report["expected_log_line"] == "loaded 72/163"
    assert report["layout_source"] == report["layout_written"] == "krsc"
    assert report["unused_in_source"] == {
        "final.weight": "head",
        "final_class_level.weight": "head",
    }
    assert report["pretrain_voxel_size"] == pytest.approx([0.1, 0.1, 0.2])
    assert report["pretrain_range"] == [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
    weight = network.backbone.conv_input[0].weight.detach().double()
    assert report["checksums"]["conv_input.0.weight"] == pytest.approx(
        [float(weight.sum()), float(weight.square().sum())]
    )
    assert any("range of intensities" in w for w in report["warnings"])
    _, report = export(path, "--intensity-scale", "1")
    assert report["warnings"] == []


def test_command_lines(run, capsys):
    target, report = export(run[1], detector="pv_rcnn")
    text = target.with_suffix(".txt").read_text()
    tag = report["extra_tag"]
    assert re.fullmatch(r"t_[0-9a-f]{8}", tag)
    assert f"--pretrained_model {target.resolve()} --extra_tag {tag}\n" in text
    assert f"cp {target.parent.resolve() / 't_pv_rcnn.yaml'} cfgs/kitti_models/\n" in text
    assert "python train.py --cfg_file cfgs/kitti_models/t_pv_rcnn.yaml " in text
    assert f"../output/kitti_models/t_pv_rcnn/{tag}/ckpt/" in text
    assert "loaded 72/367" in text
    assert text in capsys.readouterr().out
    # For a shell, every line is a comment or a command.
    for line in text.splitlines():
        assert line.startswith("#") or shlex.split(line)[0] in ("cp", "unset", "python")


def test_a_tag_for_every_export(run):
    """Another encoder never gets the folder of an earlier one's runs."""
    path = run[1]
    first = export(path)[1]["extra_tag"]
    assert export(path)[1]["extra_tag"] == first
    assert export(path, detector="pv_rcnn")[1]["extra_tag"] != first
    damaged(path, lambda s: s["module.backbone.conv4.2.1.running_mean"].add_(1e-3))
    assert export(path)[1]["extra_tag"] != first


@pytest.mark.parametrize("name", list(detectors.DETECTORS))
def test_the_config(tmp_path, name):
    kind = {"centerpoint": VoxelResBackBone8x, "parta2": UNetV2}.get(name, VoxelBackBone8x)
    path = tmp_path / "a.pth"
    torch.save({"state_dict": kind().state_dict(), "grids": {}}, path)
    target, report = export(path, detector=name)
    short = target.with_name(f"t_{name}.yaml")
    assert report["config"] == short.name
    base = "once" if name == "centerpoint" else "kitti"
    assert f"  _BASE_CONFIG_: cfgs/dataset_configs/{base}_dataset.yaml\n" in short.read_text()
    assert short.read_text().startswith(f"# {detectors.DETECTORS[name].model} of OpenPCDet, ")
    lines = short.read_text().splitlines()
    text = yaml_text.dump(detectors.config(name)).splitlines()
    assert lines[2:] == text
    export(path, "--inline", detector=name)
    assert "_BASE_CONFIG_" not in short.read_text()
    assert "POINT_CLOUD_RANGE" in short.read_text()
    out = ["--out", str(tmp_path / "other")]
    tool.main([str(path), "--detector", name, *out])
    assert (tmp_path / "other" / f"a_{name}.yaml").is_file()


@pytest.mark.parametrize(
    ("stored", "count", "equal"),
    [
        ("krsc", 72, True),
        ("rsck", 72, True),
        ("rskc", 68, False),
        ("no prefix", 0, False),
        ("module", 0, False),
        ("five channels", 71, False),
    ],
)
def test_what_openpcdet_makes_of_layouts(run, stored, count, equal):
    network, path = run
    target, _ = export(path, "--layout", stored if stored in tool.WRITTEN else "krsc")
    state = torch.load(target, weights_only=True)["model_state"]
    if stored == "rskc":  # the tool does not write it
        state = other_layout(state, stored)
    elif stored == "no prefix":
        state = {k.removeprefix("backbone_3d."): v for k, v in state.items()}
    elif stored == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    elif stored == "five channels":
        state["backbone_3d.conv_input.0.weight"] = torch.zeros(16, 3, 3, 3, 5)
    model = detector()
    assert loads(state, model) == (count, 163)
    source = VoxelBackBone8x(**KITTI).eval()
    source.load_state_dict(network.backbone.state_dict())
    assert torch.equal(encoded(model.backbone_3d), encoded(source)) == equal


def test_every_entry_shows_in_the_comparison():
    """Noise on any one entry changes the features, so that equal features mean equal entries."""
    network = lively(VoxelBackBone8x(**KITTI)).eval()
    before = encoded(network)
    g = torch.Generator().manual_seed(2)
    floating = [(k, v) for k, v in network.state_dict().items() if v.is_floating_point()]
    assert len(floating) == 60
    for name, value in floating:
        kept = value.clone()
        size = float(value.std()) if value.dim() == 5 else 0.1
        value.add_(torch.randn(value.shape, generator=g) * size)
        if name.endswith("running_var"):
            value.clamp_(min=0.1)
        assert (encoded(network) - before).norm() > 1e-3 * before.norm(), name
        value.copy_(kept)


@pytest.mark.parametrize(
    ("name", "kind", "backbone", "count", "total"),
    [
        ("pv_rcnn", VoxelBackBone8x, VoxelBackBone8x, 72, 367),
        ("second", UNetV2, VoxelBackBone8x, 72, 163),
        ("parta2", UNetV2, UNetV2, 168, 333),
        ("parta2", VoxelBackBone8x, UNetV2, 72, 333),
        ("centerpoint", VoxelResBackBone8x, VoxelResBackBone8x, 142, 279),
        ("centerpoint", VoxelBackBone8x, VoxelBackBone8x, 72, 209),
    ],
)
def test_detectors(tmp_path, name, kind, backbone, count, total):
    network = lively(kind())
    path = tmp_path / "a.pth"
    state = {f"student.backbone.{k}": v for k, v in network.state_dict().items()}
    state["teacher.conv1.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "grids": {}}, path)
    target, report = export(path, detector=name)
    model = detector(backbone, OTHERS[name])
    state = torch.load(target, weights_only=True)["model_state"]
    assert loads(state, model) == (count, total)
    assert report["expected_log_line"] == f"loaded {count}/{total}"
    assert report["backbone_complete"] == (backbone is not UNetV2 or kind is UNetV2)
    source = kind(**KITTI).eval()
    source.load_state_dict(network.state_dict())
    assert torch.equal(encoded(model.backbone_3d), encoded(source))
    reasons = {"teacher.conv1.weight": "teacher"}
    if count == 72 and kind is UNetV2:
        assert set(report["unused_in_source"].values()) == {"teacher", "decoder"}
    else:
        assert report["unused_in_source"] == reasons


@pytest.mark.parametrize("layout", ["krsc", "rsck", "rskc"])
def test_files_of_others(tmp_path, layout):
    network = lively(VoxelBackBone8x())
    path = tmp_path / "a.pt"
    torch.save({"state_dict": other_layout(network.state_dict(), layout)}, path)
    with pytest.raises(InputError, match="does not say how its kernels lie"):
        export(path)
    target, report = export(path, "--source-layout", layout)
    state = torch.load(target, weights_only=True)["model_state"]
    assert report["layout_source"] == layout
    for key, value in network.state_dict().items():
        assert torch.equal(state[f"backbone_3d.{key}"], value)


@pytest.mark.parametrize("layout", ["krsc", "rsck"])
@pytest.mark.parametrize("kind", [VoxelBackBone8x, VoxelResBackBone8x, UNetV2])
def test_the_way_back(tmp_path, kind, layout):
    network = distinct_weights(kind(**KITTI))
    path = tmp_path / "a.pth"
    torch.save({"state_dict": network.state_dict(), "grids": {}}, path)
    name = {"VoxelResBackBone8x": "centerpoint", "UNetV2": "parta2"}.get(kind.__name__, "second")
    target, _ = export(path, "--layout", layout, detector=name)
    # As part of a whole detector.
    file = torch.load(target, weights_only=True)
    file["model_state"]["dense_head.conv_cls.weight"] = torch.zeros(18, 512, 1, 1)
    torch.save(file, target)
    tool.main([str(target), "--reverse", "--out", str(tmp_path / "back"), "--tag", "b"])
    back = torch.load(tmp_path / "back" / "b.pth", weights_only=True)
    assert back["model_config"]["backbone"] == {"type": f"kd.{kind.__name__}", "in_channels": 4}
    model = nn.Module()
    model.backbone = kind(**KITTI).eval()
    assert load_into(model, back["state_dict"], strict=True).share == 1
    for key, value in network.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)
    report = json.loads((tmp_path / "back" / "b.json").read_text())
    assert report["unused_in_source"] == {"dense_head.conv_cls.weight": "head"}
    if kind is VoxelBackBone8x:
        features = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
        out = model.backbone.encode(voxels(model.backbone, [[0, 17, 801, 705]], features)).out
        expected = torch.tensor([P3_FAR[k] for k in sorted(P3_FAR)])
        assert torch.allclose(out.features[:, [0, 1, 2, 127]], expected, rtol=1e-5)


def test_a_detector_teaches_and_starts_networks(tmp_path):
    """Weights of a detector as those of a teacher, and as the start of a segmentor, by `weight`."""
    network = lively(VoxelBackBone8x(partition=SMALL)).eval()
    state = {f"backbone_3d.{k}": v for k, v in network.state_dict().items()}
    state["dense_head.conv_cls.weight"] = torch.zeros(18, 512, 1, 1)
    path = tmp_path / "checkpoint_epoch_80.pth"
    torch.save({"model_state": state, "epoch": 80, "it": 9, "optimizer_state": None}, path)
    out = ["--out", str(tmp_path / "weights"), "--tag", "second"]
    tool.main([str(path), "--reverse", "--source-layout", "krsc", *out])
    weight = str(tmp_path / "weights" / "second.pth")
    backbone = {"type": "kd.VoxelBackBone8x", "in_channels": 4, "partition": SMALL}
    batch = points([200, 100])
    with torch.no_grad():
        expected = network(batch)
    teacher = Teacher("detector", {"type": "DefaultSegmentor", "backbone": backbone}, weight)
    assert torch.equal(teacher.run(batch)["logits"].feat, expected)
    config = {"type": "DefaultSegmentorV2", "num_classes": 3, "backbone": backbone}
    model = MODELS.build({**config, "backbone_out_channels": network.out_channels})
    hook = PretrainedBackbone(prefix="backbone.")
    hook.trainer = SimpleNamespace(cfg={"weight": weight, "data": {}}, model=model)
    hook.check()
    assert "72 of 72 weights of backbone loaded" in hook.lines[0]
    with torch.no_grad():
        assert torch.equal(model.eval().backbone(batch), expected)
    embedding = VoxelEmbedding(VoxelBackBone8x())
    start = CheckpointLoader()
    start.trainer = SimpleNamespace(cfg={"weight": weight}, model=embedding)
    start.check()
    assert "72 of 74 weights loaded" in start.lines[0]
    for key, value in network.state_dict().items():
        assert torch.equal(embedding.backbone.state_dict()[key], value)


def test_residual_blocks_without_bias(tmp_path):
    network = lively(VoxelResBackBone8x(use_bias=False))
    path = tmp_path / "a.pth"
    torch.save({"state_dict": network.state_dict(), "grids": {}}, path)
    _, report = export(path, detector="centerpoint")
    assert report["n_matched"] == 126
    assert report["expected_log_line"] == "loaded 126/263"
    assert any("USE_BIAS: False" in w for w in report["warnings"])
    assert "USE_BIAS: False\n" in (path.parent / "out" / "t_centerpoint.yaml").read_text()


def damaged(path, change):
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("module.backbone.conv3.1.1.running_var"),
            r"1 of the 72 entries of VoxelBackBone8x are missing: conv3.1.1.running_var",
        ),
        (
            lambda s: s["module.backbone.conv2.0.1.bias"].fill_(float("nan")),
            r"backbone.conv2.0.1.bias has values that are not finite",
        ),
        (
            lambda s: s["module.backbone.conv4.1.0.weight"][0, 0, 0, 0, 0].fill_(torch.inf),
            r"backbone.conv4.1.0.weight has values that are not finite",
        ),
        (
            lambda s: s.update(
                {"module.backbone.conv_input.0.weight": torch.zeros(16, 3, 3, 3, 5)}
            ),
            r"takes 5 input channels in the layout krsc, the detector 4",
        ),
        (
            lambda s: s.update(
                {"module.backbone.conv_input.0.weight": torch.zeros(3, 3, 3, 4, 16)}
            ),
            r"\(3, 3, 3, 4, 16\), which is no first layer of 16 channels in the layout krsc",
        ),
        (
            lambda s: s.update({"module.backbone.conv2.0.0.weight": torch.zeros(3, 3, 3, 16, 32)}),
            r"1 of the 72 .* other shapes .*conv2.0.0.weight is \(3, 3, 3, 16, 32\), expected",
        ),
        (
            lambda s: s.update({"module.backbone.conv1.0.1.bias": torch.zeros(16).long()}),
            r"conv1.0.1.bias is torch.int64, not a tensor of the expected kind",
        ),
        (
            lambda s: s.update({k.replace("backbone", "other"): v for k, v in list(s.items())}),
            r"there are 2 encoders; choose one by --prefix",
        ),
        (lambda s: s.clear(), r"no VoxelNet encoder"),
        (
            lambda s: s.update({"backbone.conv_input.0.weight": torch.zeros(1)}),
            r"is there twice, with and without `module.`",
        ),
    ],
)
def test_refused(run, change, message):
    path = run[1]
    damaged(path, change)
    with pytest.raises(InputError, match=message) as error:
        export(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert not (path.parent / "out").exists()


def test_five_channels_when_asked_for(tmp_path):
    path = tmp_path / "a.pth"
    network = VoxelBackBone8x(in_channels=5)
    torch.save({"state_dict": network.state_dict(), "grids": {}}, path)
    _, report = export(path, "--input-channels", "5")
    assert report["input_channels"] == 5
    assert report["config"] is None
    assert any("no config is written" in w and "5 input" in w for w in report["warnings"])
    assert not list((path.parent / "out").glob("*.yaml"))


def test_refused_options(run, monkeypatch):
    path = run[1]
    out = ["--out", str(path.parent / "out")]
    with pytest.raises(InputError, match="either --detector, or --reverse"):
        tool.main([str(path), *out])
    with pytest.raises(InputError, match="either --detector, or --reverse"):
        tool.main([str(path), *out, "--reverse", "--detector", "second"])
    for tag in ("a/b", "a b"):
        with pytest.raises(InputError, match="without folders and blanks"):
            tool.main([str(path), *out, "--reverse", "--tag", tag])
    with pytest.raises(InputError, match="not for --reverse"):
        tool.main([str(path), *out, "--reverse", "--inline"])
    monkeypatch.delenv("OPENPCDET_ROOT", raising=False)
    with pytest.raises(InputError, match="needs a checkout of OpenPCDet"):
        export(path, "--verify")
    with pytest.raises(InputError, match="no checkout of OpenPCDet is there"):
        export(path, "--verify", "--openpcdet-root", str(path.parent))
    with pytest.raises(InputError, match="is the file to read"):
        tool.main([str(path), "--out", str(path.parent), "--reverse", "--tag", "model_last"])
    with pytest.raises(InputError, match="--source-layout rsck, but the file says krsc"):
        export(path, "--source-layout", "rsck")
    with pytest.raises(InputError, match="no residual blocks: it is no VoxelResBackBone8x"):
        export(path, "--backbone", "VoxelResBackBone8x", detector="centerpoint")
    residual = {"state_dict": VoxelResBackBone8x().state_dict(), "grids": {}}
    torch.save(residual, path.parent / "r.pth")
    with pytest.raises(InputError, match="is a VoxelResBackBone8x, and second takes VoxelBack"):
        export(path.parent / "r.pth")
    with pytest.raises(InputError, match="no encoder there; found"):
        export(path, "--prefix", "elsewhere.")
    shutil.copy(path, path.parent / "b.pth")
    damaged(
        path.parent / "b.pth",
        lambda s: s.update({k.replace("backbone", "other"): v for k, v in list(s.items())}),
    )
    assert export(path.parent / "b.pth", "--prefix", "other.")[1]["n_matched"] == 72


def test_a_trained_network_goes_over(tmp_path):
    """Running statistics of a step of training are part of what is handed over."""
    network = VoxelBackBone8x(partition=SMALL).train()
    network(points([200, 100])).sum().backward()
    path = tmp_path / "a.pth"
    torch.save({"state_dict": network.state_dict(), "grids": grids_of(network)}, path)
    target, report = export(path)
    state = torch.load(target, weights_only=True)["model_state"]
    assert state["backbone_3d.conv_input.1.num_batches_tracked"] == 1
    assert state["backbone_3d.conv_input.1.running_mean"].abs().max() > 0
    assert report["pretrain_voxel_size"] == [1.0, 1.0, 1.0]


def openpcdet_loader(root):
    """`load_params_from_file` of a checkout, without the modules around it."""
    from spconv.pytorch.conv import SparseConvolution

    source = Path(root) / "pcdet" / "models" / "detectors" / "detector3d_template.py"
    tree = ast.parse(source.read_text())
    wanted = ("_load_state_dict", "load_params_from_file")
    methods = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in wanted]
    assert len(methods) == 2

    def kernels(model):
        return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, SparseConvolution)}

    space = {"torch": torch, "os": os, "find_all_spconv_keys": kernels}
    code = ast.Module(methods, [])
    exec(compile(code, str(source), "exec"), space)
    return {name: space[name] for name in wanted}


@pytest.mark.parametrize("layout", ["krsc", "rsck"])
def test_openpcdet_loads_it(run, openpcdet, layout):  # noqa: F811
    """OpenPCDet's own loader and encoder, from a checkout, give the features of ours."""
    import spconv.pytorch as spconv

    network, path = run
    target, report = export(path, "--layout", layout)

    class Detector(nn.Module):
        locals().update(openpcdet_loader(os.environ["OPENPCDET_ROOT"]))

    torch.manual_seed(4)
    grid = np.array([1408, 1600, 40])
    model = Detector()
    model.backbone_3d = openpcdet[VoxelBackBone8x](model_cfg={}, input_channels=4, grid_size=grid)
    model.dense_head = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(91)])
    lines = []

    class Logger:
        info = staticmethod(lines.append)

    model.load_params_from_file(str(target), Logger, to_cpu=True)
    assert report["expected_log_line"] in lines[-1]
    assert not [x for x in lines if "Not updated weight backbone_3d" in x]
    source = VoxelBackBone8x(**KITTI).eval()
    source.load_state_dict(network.backbone.state_dict())
    rows, features = block()
    direct = openpcdet[VoxelBackBone8x](model_cfg={}, input_channels=4, grid_size=grid)
    direct.load_state_dict(network.backbone.state_dict())
    coords = torch.tensor(rows).float()
    with torch.no_grad():
        result, same = (
            encoder.eval()({"voxel_features": features, "voxel_coords": coords, "batch_size": 1})[
                "encoded_spconv_tensor"
            ]
            for encoder in (model.backbone_3d, direct)
        )
        assert torch.equal(result.features, same.features)
        ours = source.encode(voxels(source, rows, features)).out
    assert isinstance(result, spconv.SparseConvTensor)
    order = torch.tensor(
        sorted(range(len(result.indices)), key=result.indices.tolist().__getitem__)
    )
    assert torch.equal(result.indices[order].long(), ours.indices.long())
    difference = (result.features[order] - ours.features).abs().max()
    assert difference <= 1e-5 * ours.features.abs().max()


# ------------------------------------------------------------------------------------------ whole detectors


@pytest.fixture(scope="module")
def root():
    """A checkout whose detectors can be built here."""
    root = Path(os.environ.get("OPENPCDET_ROOT", ""))
    if not (root / "pcdet" / "models" / "detectors").is_dir():
        pytest.skip("OPENPCDET_ROOT does not name a checkout of OpenPCDet")
    for name in ("spconv.pytorch", "easydict", "yaml"):
        pytest.importorskip(name, reason=f"OpenPCDet's detectors need {name}")
    return root


@pytest.mark.parametrize(
    ("name", "kind", "line"),
    [
        ("second", VoxelBackBone8x, (72, 163)),
        ("pv_rcnn", VoxelBackBone8x, (72, 367)),
        ("parta2", UNetV2, (168, 333)),
        ("parta2", VoxelBackBone8x, (72, 333)),
        ("voxel_rcnn", VoxelBackBone8x, (72, 257)),
        ("second_iou", VoxelBackBone8x, (72, 189)),
        ("centerpoint", VoxelResBackBone8x, (142, 279)),
    ],
)
def test_verified(root, tmp_path, name, kind, line, capsys):
    """The written config builds OpenPCDet's detector, which takes every entry and gives our features."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": lively(kind()).state_dict(), "grids": {}}, path)
    report = export(path, "--verify", "--inline", detector=name)[1]
    found = report["verify"]
    assert (found["loaded"], found["total"]) == line
    assert found["parts"]["backbone_3d"] == line[0] + found["not_updated_backbone"]
    assert found["not_updated_backbone"] == (
        96 if (name, kind) == ("parta2", VoxelBackBone8x) else 0
    )
    assert found["entries_equal"] == report["n_matched"]
    assert found["same_cells"]
    assert found["max_rel_diff"] <= 1e-5
    assert f"verified with {root}: loaded {line[0]}/{line[1]}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "count", "equal"),
    [
        ("rsck", 72, True),
        ("rskc", 68, False),
        ("no prefix", 0, False),
        ("module", 0, False),
        ("five channels", 71, False),
    ],
)
def test_the_real_loader_and_layouts(root, run, stored, count, equal):
    """What `loads` says of a layout is what OpenPCDet does."""
    path = run[1]
    target, _ = export(path)
    voxels = tool.sample_voxels(4)
    given = (root, sys.executable, target.with_name("t_second.yaml"))
    _, reference = tool.openpcdet_loads(*given, target, "kitti", voxels)
    file = torch.load(target, weights_only=True)
    state = file["model_state"]
    if stored in AXES:
        state = other_layout(state, stored)
    elif stored == "no prefix":
        state = {k.removeprefix("backbone_3d."): v for k, v in state.items()}
    elif stored == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    else:
        state["backbone_3d.conv_input.0.weight"] = torch.zeros(16, 3, 3, 3, 5)
    torch.save({**file, "model_state": state}, target)
    found, kept = tool.openpcdet_loads(*given, target, "kitti", voxels)
    assert (found["loaded"], found["total"]) == (count, 163)
    assert found["not_updated_backbone"] == 72 - count
    assert torch.equal(kept["features"], reference["features"]) == equal
    # What stops a training that has logged this.
    watch = kitti.LoadWatch(str(target.resolve()), (72, 163))
    problems = [problem for line in found["lines"] if (problem := watch.feed(line))]
    assert watch.loaded == (count == 72)
    assert len(problems) == (count != 72)
    if problems:
        assert (
            f"loaded {count}/163 entries and not 72/163; not updated: backbone_3d." in problems[0]
        )


def test_verify_says_what_is_off(root, run, monkeypatch):
    """A file that OpenPCDet makes something else of ends in an error, with the figures in the report."""
    write = tool.save_atomic

    def turned(file, target):
        write({**file, "model_state": other_layout(file["model_state"], "rskc")}, target)

    monkeypatch.setattr(tool, "save_atomic", turned)
    with pytest.raises(
        InputError, match=r"loaded 68/163, expected loaded 72/163; 4 entries .*differ by"
    ):
        export(run[1], "--verify")
    found = json.loads((run[1].parent / "out" / "t.json").read_text())["verify"]
    assert (found["loaded"], found["entries_equal"]) == (68, 60)
    assert found["max_rel_diff"] > 0.01


def test_an_interpreter_that_does_not_fit(run, tmp_path):
    fake = tmp_path / "checkout"
    template = fake / "pcdet" / "models" / "detectors" / "detector3d_template.py"
    template.parent.mkdir(parents=True)
    template.write_text("")
    (fake / "tools").mkdir()
    given = ("--verify", "--openpcdet-root", str(fake))
    with pytest.raises(InputError, match="cannot be run: No such file"):
        export(run[1], *given, "--python", str(tmp_path / "nothing"))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(InputError, match="did not run to its end: no luck"):
        export(run[1], *given, "--python", str(broken))
    # Without packages, or without the checkout's modules.
    with pytest.raises(InputError, match=r"does not run: (OpenPCDet needs|ModuleNotFoundError)"):
        export(run[1], *given)
