"""ONNX export: the file in onnxruntime against the network in PyTorch, its inputs from its metadata, the tool."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import onnx_export
from pointcept_kd.networks.onnx_export import build_graph, session
from pointcept_kd.networks.polarnet import PolarNet
from tools import export_onnx as tool

from .networks.clouds import randomise_norms

TOOL = Path(tool.__file__)
CLASSES = 5
RING = dict(low=(0.5, -math.pi, -2), high=(20, math.pi, 2), shape=(50, 40, 4))
GRIDS = {
    "ring": RING,
    "ring, n": {**RING, "shape": (32, 48, 3), "spacing": "n"},
    "half": dict(low=(0.5, -1.6, -2), high=(20, 1.6, 2), shape=(33, 47, 4)),
    "box": dict(
        low=(-16, -16, -2), high=(16, 16, 2), shape=(40, 33, 4), frame="cartesian", spacing="n"
    ),
}
SMALL = dict(num_classes=CLASSES, point_channels=(8, 8, 8, 16), compressed=6, base=4)
PACKAGES = ("onnx", "onnxruntime")


@pytest.fixture
def packages():
    for name in PACKAGES:
        pytest.importorskip(
            name, reason=f"{name} is not installed: pip install 'pointcept_kd[onnx]'"
        )


def network(partition="ring", in_channels=4):
    torch.manual_seed(0)
    polar = PolarNet(partition=GRIDS[partition], in_channels=in_channels, **SMALL)
    randomise_norms(polar)
    with torch.no_grad():
        for parameter in polar.parameters():
            # Scores that differ, and biases and norms that matter.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return polar.eval()


def points(n, seed=0, channels=4):
    """(n, channels) float32: x, y, z and columns from 0 to 1; some beyond every grid."""
    draw = np.random.default_rng(seed)
    radius, angle = 25 * draw.random(n) ** 2, 2 * np.pi * draw.random(n)
    columns = [radius * np.cos(angle), radius * np.sin(angle), 2 * draw.standard_normal(n)]
    columns += [draw.random(n) for _ in range(channels - 3)]
    return np.stack(columns, 1).astype(np.float32)


def batch_of(scan):
    scan = torch.from_numpy(scan)
    return dict(coord=scan[:, :3], feat=scan, offset=torch.tensor([len(scan)]))


def feed(polar, scan):
    inputs = polar.partition(batch_of(scan))
    return dict(features=inputs.features.numpy(), cells=inputs.indices[:, 1:].numpy())


@torch.no_grad()
def expected(polar, scan, void=True):
    scores = polar(batch_of(scan))
    return scores.logits[scores.inverse][:, int(void) :].numpy()


def preprocess(facts, scan):
    """The inputs of the file from its metadata, as the documentation of the format says, without the package."""
    low, high = np.array(facts["low"]), np.array(facts["high"])
    shape = np.array(facts["shape"])
    size = (high - low) / (shape - 1 if facts["spacing"] == "n_minus_1" else shape)
    x, y, z = scan[:, :3].T
    polar = np.stack((np.sqrt(x * x + y * y), np.arctan2(y, x)), 1)
    cylindrical = facts["frame"] == "cylindrical"
    p = np.column_stack((polar, z)) if cylindrical else scan[:, :3]
    cells = np.floor((np.clip(p.astype(np.float64), low, high) - low) / size).astype(np.int64)
    if facts["spacing"] == "n":
        if cylindrical:
            cells[:, 1] %= shape[1]
        cells = np.minimum(cells, shape - 1)
    centre = (cells + 0.5) * size + low
    other = scan[:, :2] if cylindrical else polar
    features = np.column_stack(((p - centre).astype(np.float32), p, other, scan[:, 3:]))
    return dict(features=features.astype(np.float32), cells=cells)


@pytest.mark.usefixtures("packages")
class TestGraph:
    """The file against the network."""

    @pytest.mark.parametrize("fold", [True, False])
    @pytest.mark.parametrize("pooling", onnx_export.POOLINGS)
    @pytest.mark.parametrize("partition", list(GRIDS))
    def test_scores_and_labels(self, partition, pooling, fold):
        polar = network(partition)
        running = session(build_graph(polar, pooling=pooling, fold=fold).SerializeToString(), 1)
        for n in (1, 2, 700):  # one file for any number of points
            scan = points(n, seed=n)
            scores, labels = running.run(None, feed(polar, scan))
            want = expected(polar, scan)
            assert scores.shape == (n, CLASSES - 1)
            assert labels.dtype == np.int64
            np.testing.assert_allclose(scores, want, atol=1e-5)
            np.testing.assert_array_equal(labels, want.argmax(1))
        assert len(set(labels.tolist())) > 1

    def test_folding_leaves_no_normalisation(self):
        kinds = {
            fold: [node.op_type for node in build_graph(network(), fold=fold).graph.node]
            for fold in (True, False)
        }
        assert "BatchNormalization" not in kinds[True]
        assert kinds[False].count("BatchNormalization") == 4 + 1 + 18
        for pooling in onnx_export.POOLINGS:
            nodes = [node.op_type for node in build_graph(network(), pooling=pooling).graph.node]
            assert ("MaxRoiPool" in nodes) == (pooling == "roi")

    def test_threads_change_nothing(self):
        """A pillar with many points is where maxima without a lock get lost."""
        polar = network()
        scan = points(20_000)
        scan[:15_000, :3] = [3, 0, 0] + 0.01 * scan[:15_000, :3]
        inputs = feed(polar, scan)
        content = build_graph(polar).SerializeToString()
        alone = session(content, 1).run(None, inputs)
        for _ in range(3):
            for a, b in zip(alone, session(content, 4).run(None, inputs)):
                np.testing.assert_allclose(a, b, atol=1e-5)

    def test_order_of_the_points(self):
        polar = network()
        inputs = feed(polar, points(400))
        running = session(build_graph(polar).SerializeToString(), 1)
        mixed = np.random.default_rng(0).permutation(400)
        first = running.run(None, inputs)[0]
        moved = running.run(None, {key: value[mixed] for key, value in inputs.items()})[0]
        np.testing.assert_allclose(moved, first[mixed], atol=1e-5)

    def test_void_class_kept(self):
        polar, scan = network(), points(300)
        model = build_graph(polar, void_class=False)
        scores, labels = session(model.SerializeToString(), 1).run(None, feed(polar, scan))
        want = expected(polar, scan, void=False)
        np.testing.assert_allclose(scores, want, atol=1e-5)
        np.testing.assert_array_equal(labels, want.argmax(1))

    @pytest.mark.parametrize("channels", [3, 4, 6])
    @pytest.mark.parametrize("partition", list(GRIDS))
    def test_inputs_from_the_metadata(self, partition, channels):
        polar = network(partition, channels)
        model = build_graph(polar, metadata={"class_names": list("abcd")})
        facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        scan = points(3000, channels=channels)
        made, own = preprocess(facts, scan), feed(polar, scan)
        assert facts["class_names"] == list("abcd")
        assert len(facts["features"]) == own["features"].shape[1] == 5 + channels
        assert facts["void_class"] == 0
        # numpy and PyTorch round azimuths differently by one step, which may move a point on a border.
        same = (made["cells"] == own["cells"]).all(1)
        assert same.mean() > 0.999
        for i, name in enumerate(facts["features"]):
            np.testing.assert_allclose(
                made["features"][same, i], own["features"][same, i], atol=1e-5, err_msg=name
            )

    def test_network_is_left_alone(self):
        polar = network().train()
        before = {key: value.clone() for key, value in polar.state_dict().items()}
        build_graph(polar)
        assert polar.training
        for key, value in polar.state_dict().items():
            assert torch.equal(before[key], value), key

    def test_bad_settings(self):
        with pytest.raises(InputError, match="opset 17: expected 18 to"):
            build_graph(network(), opset=17)
        with pytest.raises(InputError, match="pooling 'sum' is none of roi, scatter"):
            build_graph(network(), pooling="sum")
        one = PolarNet(partition=RING, **{**SMALL, "num_classes": 1})
        with pytest.raises(InputError, match="no class besides"):
            build_graph(one)


def test_missing_package(monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=rf"{name}: pip install 'pointcept_kd\[onnx\]'"):
            onnx_export.require_onnx(name)


# ------------------------------------------------------------------------------------------- tool

SEGMENTOR = dict(
    type="kd.VoxelSegmentor",
    backbone=dict(type="kd.PolarNet", partition=RING, **SMALL),
    criteria=[dict(type="CrossEntropyLoss", ignore_index=0)],
)
DATA = dict(
    num_classes=CLASSES - 1,
    ignore_index=-1,
    names=["road", "car", "tree", "pole"],
    val=dict(
        type="SemanticKITTIDataset",
        transform=[
            dict(type="ToTensor"),
            dict(type="Collect", keys=("coord", "segment"), feat_keys=("coord", "strength")),
        ],
    ),
)


def run_files(folder, model=SEGMENTOR, prefix=""):
    """Config, checkpoint and scan of a tiny student; with a prefix, the checkpoint of its distiller."""
    config, weight, scan = folder / "config.py", folder / "model.pth", folder / "scan.bin"
    config.write_text(f"model = {model!r}\ndata = {DATA!r}\n")
    segmentor = MODELS.build(SEGMENTOR)
    segmentor.backbone.load_state_dict(network().state_dict())
    state = {prefix + key: value for key, value in segmentor.state_dict().items()}
    torch.save(dict(state_dict=state), weight)
    points(800).tofile(scan)
    return [
        *("--config-file", str(config), "--weight", str(weight)),
        *("--out", str(folder / "new" / "student.onnx")),
    ], scan


@pytest.mark.usefixtures("packages")
def test_tool_exports_and_checks(tmp_path, capsys):
    command, scan = run_files(tmp_path)
    assert tool.main([*command, "--check", str(scan), "--repeats", "2"]) == 0
    said = capsys.readouterr().out
    assert "opset 18, 50 x 40 x 4 cylindrical cells, 4 classes" in said
    assert "800 of 800 labels equal (100.0000%)" in said
    assert "median of 2 runs, 1 thread: PyTorch 0." in said
    file = tmp_path / "new" / "student.onnx"
    facts = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == DATA["names"]
    assert json.loads(facts["high"])[1] == math.pi


@pytest.mark.usefixtures("packages")
def test_tool_takes_the_student_out_of_a_distiller(tmp_path, capsys):
    teacher = dict(model=SEGMENTOR, weight="none.pth")
    distiller = dict(type="kd.Distiller", teacher=teacher, student=dict(model=SEGMENTOR), terms={})
    command, scan = run_files(tmp_path, distiller, "module.student.")
    assert tool.main([*command, "--check", str(scan), "--pooling", "scatter", "--keep-norms"]) == 0
    assert "800 of 800" in capsys.readouterr().out


@pytest.mark.usefixtures("packages")
def test_tool_fails_where_labels_differ(tmp_path, capsys, monkeypatch):
    command, scan = run_files(tmp_path)

    def other(network, path, **settings):
        with torch.no_grad():
            network.network.outc.conv.bias.add_(3 * torch.randn(4 * CLASSES))
            model = onnx_export.export_onnx(network, path, **settings)
            network.network.outc.conv.bias.zero_()
        return model

    monkeypatch.setattr(tool, "export_onnx", other)
    assert tool.main([*command, "--check", str(scan)]) == 1
    assert "fewer than 99.99% of the labels" in capsys.readouterr().err


@pytest.mark.usefixtures("packages")
def test_tool_answers_bad_input(tmp_path):
    command, scan = run_files(tmp_path)
    for extra, message in (
        (["--threads", "0"], "--threads 0"),
        (["--repeats", "3"], "name a scan with --check"),
        (["--check", str(scan), "--pooling", "scatter", "--threads", "2"], "check it with"),
        (["--check", str(tmp_path / "no.bin")], "no.bin"),
        (["--opset", "7"], "opset 7: expected 18"),
        (["--options", "model.backbone.num_classes=7"], "another width"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main([*command, *extra])
    assert not list((tmp_path / "new").glob("*"))
    spunet = dict(type="SpUNet-v1m1", in_channels=4, num_classes=3, base_channels=8)
    command, _ = run_files(tmp_path, dict(type="DefaultSegmentor", backbone=spunet))
    with pytest.raises(InputError, match="a DefaultSegmentor around SpUNetBase cannot be exported"):
        tool.main(command)


def test_tool_helps_without_the_packages():
    done = subprocess.run(
        [sys.executable, str(TOOL), "--help"], capture_output=True, text=True, check=True
    )
    assert "--pooling" in done.stdout
    assert "examples:" in done.stdout
