"""The benchmark tool: counts against loops by hand, memory against known sizes, mIoU against the evaluator."""

import json
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.hooks import SemSegEvaluator
from pointcept_kd.networks.ptv3 import PatchAttention
from pointcept_kd.ops import backend
from pointcept_kd.ops.attention import patch_attention, patch_layout
from pointcept_kd.ops.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d
from tools import benchmark
from tools.benchmark import Entry, compare, count_macs

TOOL = Path(benchmark.__file__)
CPU = torch.device("cpu")
CLASSES = 19


def network(width=8, **changes):
    """A two-level PTv3 with its head."""
    backbone = dict(
        type="PT-v3m1",
        in_channels=4,
        order=("z", "hilbert"),
        stride=(2,),
        enc_depths=(1, 1),
        enc_channels=(width, 2 * width),
        enc_num_head=(1, 2),
        enc_patch_size=(16, 16),
        dec_depths=(1,),
        dec_channels=(width,),
        dec_num_head=(2,),
        dec_patch_size=(16,),
        shuffle_orders=True,
        enable_flash=False,
    )
    return dict(
        type="DefaultSegmentorV2",
        num_classes=CLASSES,
        backbone_out_channels=width,
        backbone={**backbone, **changes},
        criteria=[dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1)],
    )


def values(root, model=None, **changes):
    """A config as a dict; scans below `root`."""
    transform = [
        dict(type="Copy", keys_dict=dict(segment="origin_segment")),
        dict(
            type="GridSample",
            grid_size=0.5,
            mode="train",
            return_grid_coord=True,
            return_inverse=True,
        ),
        dict(type="ToTensor"),
        dict(
            type="Collect",
            keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
            feat_keys=("coord", "strength"),
        ),
    ]
    val = dict(type="SemanticKITTIDataset", split="val", data_root=str(root), transform=transform)
    content = dict(
        seed=0,
        num_worker=0,
        model=model or network(),
        data=dict(num_classes=CLASSES, ignore_index=-1, val=val),
    )
    return {**content, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three small scans of sequence 08, two configs and a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("bench")
    sequence = folder / "data" / "dataset" / "sequences" / "08"
    for kind in ("velodyne", "labels"):
        (sequence / kind).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(3):
        n = 200 + 50 * i
        scan = np.concatenate([draw.uniform(-6, 6, (n, 2)), draw.normal(0, 0.1, (n, 2))], 1)
        scan.astype("<f4").tofile(sequence / "velodyne" / f"{i:06d}.bin")
        labels = draw.choice([0, 10, 40, 70], n).astype("<u4")
        labels.tofile(sequence / "labels" / f"{i:06d}.label")
    for name, width in (("big", 16), ("small", 8)):
        text = Config(values(folder / "data", network(width))).pretty_text
        (folder / f"{name}.py").write_text(text)
        torch.manual_seed(5)
        model = MODELS.build(network(width))
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pth")
    return folder


# ------------------------------------------------------------------------------------------ MACs


@pytest.mark.parametrize("bias", [True, False])
def test_macs_of_a_linear_layer(bias):
    layer = nn.Linear(7, 5, bias)
    assert count_macs(lambda: layer(torch.randn(11, 7))) == 11 * 7 * 5


def cloud(n=40, side=6, seed=0):
    """Different cells, as rows (batch, x, y, z)."""
    draw = np.random.default_rng(seed)
    picked = draw.choice(side**3, n, replace=False)
    cells = np.stack(np.unravel_index(picked, (side,) * 3), 1)
    return torch.from_numpy(np.concatenate([np.zeros((n, 1), np.int64), cells], 1))


def neighbours(indices, reach):
    """Pairs of cells, each with itself included, at most `reach` apart along every axis: a plain loop."""
    cells = {tuple(row) for row in indices.tolist()}
    steps = list(product(range(-reach, reach + 1), repeat=3))
    return sum((b, x + i, y + j, z + k) in cells for b, x, y, z in cells for i, j, k in steps)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_macs_of_a_submanifold_convolution(kernel, monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_PRODUCTS", "auto")
    indices = cloud()
    pairs = neighbours(indices, kernel // 2)
    assert pairs > len(indices) or kernel == 1
    layer = SubMConv3d(3, 5, kernel)
    tensor = SparseConvTensor(torch.randn(40, 3), indices, (6, 6, 6), 1)
    assert count_macs(lambda: layer(tensor)) == pairs * 3 * 5
    # A map that is there already changes nothing.
    assert count_macs(lambda: layer(tensor)) == pairs * 3 * 5


def test_macs_of_strided_and_inverse_convolution():
    down, up = SparseConv3d(3, 4, 2, 2, indice_key="a"), SparseInverseConv3d(4, 6, 2, "a")
    tensor = SparseConvTensor(torch.randn(40, 3), cloud(), (6, 6, 6), 1)
    # Kernel = stride: each fine cell meets one coarse cell, on the way down and on the way up.
    assert count_macs(lambda: up(down(tensor))) == 40 * 3 * 4 + 40 * 4 * 6


@pytest.mark.parametrize(
    ("counts", "patch", "products"),
    [
        ([12], 4, 3 * 16),
        ([10], 4, 3 * 16),  # the last patch is filled up with copies
        ([3], 4, 9),
        ([10, 3, 4], 4, 3 * 16 + 9 + 16),
        ([5, 7], 8, 2 * 7 * 7),  # short scans of similar length share a call, padded to the longest
    ],
)
def test_macs_of_patch_attention(counts, patch, products, monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_ATTENTION", "flash")  # not to be had on the CPU: not asked for
    heads, width = 2, 8
    qkv = torch.randn(sum(counts), 3, heads, width)
    layout = patch_layout(counts, patch)
    assert count_macs(lambda: patch_attention(qkv, layout)) == products * heads * width * 2
    assert os.environ["POINTCEPT_KD_ATTENTION"] == "flash"


def test_large_products_count_alike_on_every_backend():
    layer, indices = SubMConv3d(64, 64, 3), cloud(3000, 20)
    tensor = SparseConvTensor(torch.randn(3000, 64), indices, (20, 20, 20), 1)
    pairs = neighbours(indices, 1)
    layer(tensor)  # the backend of products is chosen and kept
    chosen = backend.onednn_linear()
    assert count_macs(lambda: layer(tensor)) == pairs * 64 * 64
    assert (backend.onednn_linear() is None) == (chosen is None)


def test_counting_leaves_no_setting_behind(monkeypatch):
    monkeypatch.delenv("POINTCEPT_KD_ATTENTION", raising=False)
    with pytest.raises(ZeroDivisionError):
        count_macs(lambda: 1 / 0)
    assert "POINTCEPT_KD_ATTENTION" not in os.environ


def test_macs_of_a_network_are_those_of_its_layers():
    model = MODELS.build(network()).eval()
    cells = torch.from_numpy(benchmark.street_cells(150))
    batch = dict(
        feat=torch.randn(150, 4), grid_coord=cells, coord=cells.float(), offset=torch.tensor([150])
    )
    expected = []

    def linear(module, args, out):
        expected.append(out.shape[0] * module.in_features * module.out_features)

    def convolution(module, args, out):
        pairs = neighbours(args[0].indices, module.kernel_size[0] // 2)
        expected.append(pairs * module.in_channels * module.out_channels)

    def attention(module, args, out):
        n, size = len(out["feat"]), module.patch_size
        products = -(-n // size) * size**2 if n > size else n**2
        expected.append(2 * products * module.qkv.in_features)

    hooks = {nn.Linear: linear, SubMConv3d: convolution, PatchAttention: attention}
    for module in model.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    with torch.no_grad():
        model(dict(batch))
    by_hand, expected[:] = sum(expected), []
    assert count_macs(lambda: model(dict(batch))) == by_hand > 1e5


# ----------------------------------------------------------------------------- memory and clock


def test_peak_memory_on_the_cpu_is_what_lives_at_once():
    x = torch.randn(1000, 1000)
    megabytes = 4.0

    def one_after_the_other():
        for _ in range(3):
            y = x * 2
            del y

    def together():
        kept = [x * 2 for _ in range(3)]
        return len(kept)

    def inside():
        return torch.cat([x * 2, x * 3]).sum()  # two parts and their join

    for run, count in ((one_after_the_other, 1), (together, 3), (inside, 4), (together, 3)):
        assert benchmark.peak_bytes(run, CPU) / 1e6 == pytest.approx(megabytes * count, abs=0.05)


@pytest.mark.cuda
def test_peak_memory_on_cuda_is_what_lives_at_once():
    x = torch.randn(1000, 1000, device="cuda")
    peak = benchmark.peak_bytes(lambda: [x * 2 for _ in range(3)], x.device)
    assert peak / 1e6 == pytest.approx(12.0, rel=0.1)


def test_the_clock_takes_networks_in_turn_and_drops_the_warm_up(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def run(name, cost):
        def call(number):
            calls.append((name, number))
            now[0] += cost * (10 if number < 0 else 1)

        return call

    times = benchmark.interleaved_seconds([run("a", 2.0), run("b", 0.5)], CPU, 2, 3)
    assert calls == [(name, number) for number in range(-2, 3) for name in "ab"]
    assert times == [[2.0] * 3, [0.5] * 3]


# ------------------------------------------------------------------------------------- comparing


def evaluator_miou(cfg, model, loader):
    """What the training loop's evaluator says."""
    trainer = SimpleNamespace(
        cfg=cfg, model=model, val_loader=loader, device=CPU, writer=None, epoch=0, comm_info={}
    )
    trainer.logger = logging.getLogger("test")
    hook = SemSegEvaluator()
    hook.trainer = trainer
    hook.eval()
    return trainer.comm_info["current_metric_value"]


def test_two_networks_side_by_side(folder):
    entries = [
        Entry(folder / "big.py", folder / "big.pth"),
        dict(config=folder / "small.py", weight=folder / "small.pth", name="student"),
    ]
    big, small = compare(entries, max_scans=2, repeats=3, device="cpu")
    assert (big["name"], small["name"]) == ("big", "student")
    for row, width in ((big, 16), (small, 8)):
        model = MODELS.build(network(width))
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["scans"] == ["08_000000", "08_000001"]
        assert 100 < row["voxels"][0] < row["voxels"][1] <= 250
        assert len(row["latency_all_ms"]) == 3
        assert min(row["latency_all_ms"]) <= row["latency_ms"] <= max(row["latency_all_ms"])
        assert row["memory_mb"] > 4 * row["parameters"] / 1e6
    assert small["relative"]["macs"] == small["macs"] / big["macs"] < 0.5
    assert small["relative"]["memory_mb"] < 1
    assert big["relative"] == dict.fromkeys(big["relative"], 1.0)

    cfg = Config.fromfile(folder / "big.py")
    model = MODELS.build(network(16))
    model.load_state_dict(torch.load(folder / "big.pth")["state_dict"])
    count, loader = benchmark.dataset_batches(benchmark.fill_defaults(cfg), "val")
    batches = list(loader)
    assert count == len(batches) == 3
    assert big["miou"] == evaluator_miou(cfg, model, batches)
    assert 0 < big["miou"] < big["miou_present"]
    present = [v for v in big["per_class_iou"].values() if v is not None]
    assert 3 <= len(present) < CLASSES == len(big["per_class_iou"])
    assert sum(present) / CLASSES == pytest.approx(big["miou"])
    assert "3 scans" in big["miou_protocol"]
    assert "at raw points through inverse" in big["miou_protocol"]
    limited = compare(entries[:1], max_scans=1, latency=False, miou_scans=1, device="cpu")[0]
    assert "1 scans" in limited["miou_protocol"]
    assert limited["miou"] != big["miou"]
    assert limited["latency_ms"] is None


def test_of_a_distiller_the_student_is_measured(folder, tmp_path):
    student = network(8)
    model = dict(
        type="kd.Distiller",
        student=dict(model=student, taps=dict(bottleneck="backbone.enc")),
        teacher=dict(model=network(16), weight=str(tmp_path / "not_there.pth")),
        terms=dict(logits=dict(type="kd.LogitKL", weight=1.0)),
    )
    plain = torch.load(folder / "small.pth")["state_dict"]
    weight = tmp_path / "model_best.pth"
    torch.save({"state_dict": {f"student.{key}": v for key, v in plain.items()}}, weight)
    entries = [
        Entry(Config(values(folder / "data", model)), weight),
        Entry(folder / "small.py", folder / "small.pth"),
    ]
    distilled, alone = compare(entries, latency=False, max_scans=1, device="cpu")
    for key in ("parameters", "macs", "memory_mb", "miou", "per_class_iou"):
        assert distilled[key] == alone[key]


def test_untrained_networks_are_not_scored_and_random_state_is_kept(folder):
    state = torch.get_rng_state()
    rows = compare(
        [Entry(folder / "small.py"), Entry(folder / "small.py")],
        random_cells=200,
        repeats=2,
        dtype="bfloat16",
        device="cpu",
    )
    assert [row["name"] for row in rows] == ["small", "small (2)"]
    assert all(row["miou"] is None and row["voxels"] == [200] for row in rows)
    full = compare([Entry(folder / "small.py")], random_cells=200, latency=False, device="cpu")[0]
    assert rows[0]["macs"] == rows[1]["macs"] == full["macs"]
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_are_those_asked_for_and_then_as_before(folder, monkeypatch):
    before, seen, size = torch.get_num_threads(), [], benchmark._size

    def spy(*args):
        seen.append(torch.get_num_threads())
        torch.set_num_threads(before)
        size(*args)

    monkeypatch.setattr(benchmark, "_size", spy)
    asked = dict(threads=before + 1, random_cells=50, latency=False, device="cpu")
    compare([Entry(folder / "small.py")], **asked)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_single_scan_goes_through_the_transforms_of_the_config(folder):
    path = folder / "data" / "dataset" / "sequences" / "08" / "velodyne" / "000001.bin"
    entry = Entry(Config(values(folder / "nowhere")), name="lonely")
    row = compare([entry], files=[path], latency=False, device="cpu")[0]
    expected = compare([Entry(folder / "small.py")], max_scans=2, latency=False, device="cpu")[0]
    assert row["name"] == "lonely"
    assert row["voxels"] == expected["voxels"][1:]
    assert row["scans"] == ["000001"]


def test_options_change_every_config(folder):
    coarse = {"data.val.transform.1.grid_size": 2.0}
    fine, rough = compare(
        [Entry(folder / "small.py"), Entry(folder / "small.py", options=coarse)],
        latency=False,
        max_scans=1,
        device="cpu",
    )
    assert rough["voxels"][0] < fine["voxels"][0] / 2


@pytest.mark.parametrize("count", [1, 500, 20_000])
def test_random_streets_have_exactly_that_many_cells(count):
    cells = benchmark.street_cells(count)
    assert cells.shape == (count, 3)
    assert cells.min() == 0
    assert len(np.unique(cells, axis=0)) == count
    assert np.array_equal(cells, benchmark.street_cells(count))


def test_a_street_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="at most"):
        benchmark.street_cells(100_000, size=4.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(max_scans=0), "max_scans=0"),
        (dict(warmup=1), "warmup=1: expected a whole number, at least 2"),
        (dict(repeats=0), "repeats=0"),
        (dict(threads=0), "threads=0"),
        (dict(dtype="int8"), "float32, float16, bfloat16"),
        (dict(split="valid"), "data.valid"),
        (dict(device="gpu"), "is no device"),
    ],
)
def test_bad_settings_name_themselves(folder, change, text):
    with pytest.raises(InputError, match=text):
        compare([Entry(folder / "small.py")], **{"device": "cpu", **change})


def test_weights_of_another_network_are_refused(folder):
    with pytest.raises(InputError, match="another width"):
        compare([Entry(folder / "small.py", folder / "big.pth")], device="cpu")


def test_splits_of_fragments_are_refused(folder):
    cfg = Config(values(folder / "data"))
    cfg.data.val.test_mode = True
    with pytest.raises(InputError, match="test_mode=True"):
        compare([Entry(cfg)], device="cpu")


# ---------------------------------------------------------------------------------- command line


def test_the_tool_from_another_folder(folder, tmp_path):
    command = [
        sys.executable, str(TOOL), "--config-file", str(folder / "big.py"), "--config-file",
        str(folder / "small.py"), "--weight", str(folder / "big.pth"), "--weight", "none",
        "--max-scans", "2", "--repeats", "2", "--threads", "1", "--device", "cpu",
        "--out", "table.md", "--json", "table.json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "table.md").read_text() == done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "median of 2" in table[0]
    assert "peak memory" in table[0]
    assert "×" not in table[2]
    assert table[3].count("(×") == 4
    assert table[3].endswith("| not measured |")
    assert "1 thread; float32" in done.stdout
    content = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in content["networks"]] == ["big", "small"]
    assert content["settings"]["threads"] == 1
    assert "--max-scans 2" in content["settings"]["command"]
    made = content["environment"]
    assert made["torch"] == torch.__version__
    assert made["numpy"] == np.__version__
    assert {"commit", "cpu", "gpu", "python", "date"} <= set(made)


def test_columns_that_were_not_asked_for_are_left_out(folder, capsys):
    arguments = ["--config-file", str(folder / "small.py"), "--random", "150", "--device", "cpu"]
    benchmark.main([*arguments, "--no-latency", "--no-miou", "--name", "a|b"])
    table = capsys.readouterr().out
    assert "latency per scan" not in table
    assert "mIoU" not in table
    assert "random street of 150 voxels" in table
    assert "| a\\|b |" in table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config-file"),
        (["--config-file", "{0}/small.py", "--weight", "a", "--weight", "b"], "2 --weight for 1"),
        (["--config-file", "{0}/small.py", "--weight", "{0}/no.pth"], "does not exist"),
        (["--config-file", "{0}/no.py"], "no such config file"),
        (["--config-file", "{0}/small.py", "--random", "9", "--points", "x"], "exclude each other"),
        (["--config-file", "{0}/small.py", "--points", "{0}/no.bin"], "cannot be read"),
        (["--config-file", "{0}/small.py", "--json", "{0}/no/t.json"], "folder that exists"),
        (
            ["--config-file", "{0}/small.py", "--options", "data.val.data_root={0}/no"],
            "or measure without the data set: --points FILE.bin or --random",
        ),
        (["--config-file", "{0}/small.py", "--options", "data.vol=1"], "no such key"),
    ],
)
def test_bad_arguments_give_one_line(folder, arguments, text, capsys):
    given = [argument.format(folder) for argument in arguments]
    assert benchmark.run_tool(lambda: benchmark.main(given)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert text in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
