"""The opponents of benchmarks/bev.py compute what its tables say they compute."""

import math

import numpy as np
import pytest
import torch

from benchmarks import bev
from pointcept_kd.data.semantic_kitti import LEARNING_MAP
from pointcept_kd.ops.grid import Partition

SMALL = Partition((0.0, -math.pi, -3.0), (20.0, math.pi, 3.0), (12, 16, 6))


@pytest.fixture(scope="module")
def scan():
    """600 points around the sensor, some beyond the grid, with labels of all kinds."""
    g = np.random.default_rng(0)
    points = g.normal(size=(600, 4)) * np.array([8, 8, 2, 0.1])
    instances = g.integers(0, 9, 600) << 16
    labels = g.choice(sorted(LEARNING_MAP), 600) + instances
    return bev.Scan(points.astype(np.float32).tobytes(), labels.astype("<u4").tobytes())


@pytest.mark.parametrize("unused", [False, True])
def test_both_samples_are_equal(scan, unused):
    ours = bev.prepare(scan, SMALL)
    features, cells, volume = bev.prepare_densely(scan, SMALL, unused)
    np.testing.assert_allclose(ours.features.numpy(), features, rtol=1e-5, atol=1e-5)
    assert np.array_equal(ours.cells.numpy(), cells)
    assert np.array_equal(ours.occupied.numpy(), np.unique(cells, axis=0))
    assert np.array_equal(volume[tuple(ours.occupied.numpy().T)], ours.labels.numpy())
    assert int(volume.astype(int).sum()) == int(ours.labels.sum()) > 0
    assert bev.same_sample(scan, SMALL) == 0


def test_other_samples_stop_the_benchmark(scan, monkeypatch):
    ours = bev.prepare(scan, SMALL)
    monkeypatch.setattr(bev, "prepare", lambda *_: ours._replace(labels=ours.labels + 1))
    with pytest.raises(SystemExit, match="differ"):
        bev.same_sample(scan, SMALL)


def test_both_lists_of_cells_are_equal(scan):
    indices = torch.nn.functional.pad(bev.prepare(scan, SMALL).cells, (1, 0))
    indices[300:, 0] = 1
    for own, other in zip(bev.distinct_by_key(indices, SMALL), bev.distinct_by_row(indices)):
        assert torch.equal(own, other)


def test_all_maxima_are_equal(scan):
    indices, counts = bev.pillar_orders(scan, SMALL)
    assert indices["sorted"].tolist() == sorted(indices["scan order"].tolist())
    assert indices["random order"].tolist() != indices["scan order"].tolist()
    g = torch.Generator().manual_seed(1)
    values = torch.randn(600, 5, generator=g, requires_grad=True)
    grad = torch.randn(len(counts), 5, generator=g)
    found = []
    for maximum in bev.MAXIMA.values():
        out = maximum(values, indices["sorted"], counts)
        found.append((out.detach(), torch.autograd.grad(out, values, grad)[0]))
    for out, d_values in found[1:]:
        assert torch.equal(out, found[0][0])
        torch.testing.assert_close(d_values, found[0][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", bev.LOSSES)
def test_both_losses_have_the_same_value_and_gradient(name, scan):
    scores = bev.scores_of(scan, SMALL)
    (sparse, student), (dense, volume) = (
        route(scores) for route in (bev.LOSSES[name]["occupied"], bev.LOSSES[name]["dense"])
    )
    assert volume.shape == (1, bev.CLASSES, *SMALL.shape)
    values = sparse(student.requires_grad_()), dense(volume.requires_grad_())
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    for value in values:
        value.backward()
    r, p, z = scores.cells.unbind(1)
    torch.testing.assert_close(student.grad, volume.grad[0, :, r, p, z].t(), rtol=1e-3, atol=1e-7)
    volume.grad[0, :, r, p, z] = 0
    assert float(volume.grad.abs().sum()) == 0


def test_the_worker_measures(scan, monkeypatch, capsys):
    monkeypatch.setattr(bev, "load_scan", lambda: (scan, "test"))
    monkeypatch.setattr(bev.scores_of, "__defaults__", (SMALL,))
    bev.loss_worker("logit distillation", "occupied")
    value, seconds, _ = (float(v) for v in capsys.readouterr().out.split())
    assert value > 0
    assert seconds > 0


def test_rows_of_the_networks(scan, capsys):
    tiny = ("sim/semseg-cylinder3d-0-base_tiny.py", "sim/semseg-polarnet-0-base_tiny.py")
    rows = bev.time_networks(scan, 0.0, *tiny)
    assert [row["network"] for row in rows][:2] == ["Cylinder3D", "PolarNet"]
    assert rows[0]["Cylinder3D / this"] == 1
    assert all(row["ms"] > 0 for row in rows)
    if len(rows) == 3:
        assert rows[2]["equal labels"] >= 0.9999
    else:
        assert "pip install 'pointcept_kd[onnx]'" in capsys.readouterr().out


def test_a_scan_is_simulated_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_SAMPLES", str(tmp_path))
    scan, source = bev.load_scan()
    assert "simulated" in source
    assert len(scan.points) == 4 * len(scan.labels) > 10**6
    assert len(bev.prepare(scan).labels.unique()) > 10
