"""The opponents of benchmarks/completion.py compute what its tables say they compute."""

import json
import sys

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from benchmarks import completion, completion_data, completion_network
from pointcept_kd.completion import metrics
from pointcept_kd.data.maps import MapBuilder
from pointcept_kd.host import InputError
from pointcept_kd.ops.sparse import SparseConvTensor

from .data.map_oracles import cells_by_loops, drive, map_requantised


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    where = rng.uniform(-30, 30, (50, 3))
    pred, target = (
        where[rng.integers(0, 50, 700)] + rng.normal(0, 0.4, (700, 3)) for _ in range(2)
    )
    return completion.Clouds(pred.astype(np.float32), target[:600].astype(np.float32))


@pytest.fixture
def small_box(monkeypatch):
    """Boxes of a million cells instead of a billion."""
    monkeypatch.setattr(metrics, "CELLS", (2.0, 1.0))


def test_all_routes_count_the_same_cells(clouds):
    ours = metrics.voxel_counts(*clouds, 1.0)
    assert min(ours.tp, ours.fn, ours.fp) > 0
    assert completion.counts_by_histogram(*clouds, 1.0) == ours
    assert completion.counts_by_booleans(*clouds, 1.0) == ours
    edges = completion.Clouds(
        np.array([[50.0, 1, 1], [-50, 1, 1]]), np.array([[49.9, 1, 1], [51, 1, 1]])
    )
    for route in (completion.counts_by_histogram, completion.counts_by_booleans):
        assert route(*edges, 1.0) == metrics.voxel_counts(*edges, 1.0)


def test_both_routes_of_the_divergences(clouds):
    ours, dense = completion.jsd_by_keys(*clouds), completion.jsd_by_histogram(*clouds)
    np.testing.assert_allclose(ours, dense, rtol=1e-12)
    assert ours[0] != ours[1]


def test_all_searches_find_the_same_distances(clouds):
    for source, target in (clouds, clouds[::-1], (clouds.noisy, clouds.target)):
        exact = metrics.nearest_distances(source, target)
        for search in (completion.tree_distances, completion.pair_distances):
            np.testing.assert_allclose(search(source, target), exact, rtol=1e-12)
    value = completion.chamfer_by(completion.pair_distances, *clouds)
    assert value == pytest.approx(metrics.chamfer_distance(*clouds), rel=1e-12)


def test_noise_is_unit_noise_and_the_same_again(clouds):
    assert (clouds.noisy - clouds.pred).std() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(clouds.noisy, clouds.noisy)


def test_both_routes_of_all_scores(clouds):
    cells = (5.0, 2.0)
    ours, dense = (
        route(*clouds, cells) for route in (completion.scores_sparsely, completion.scores_densely)
    )
    np.testing.assert_allclose(ours, dense, rtol=1e-12)
    assert len(ours) == 8


def test_routes_that_differ_end_the_benchmark(clouds, monkeypatch):
    monkeypatch.setattr(completion, "jsd_by_histogram", lambda *_: (0.1, 0.2))
    with pytest.raises(SystemExit, match="Jensen-Shannon distances differ"):
        completion.time_jsd(clouds, 0)


def test_the_report(clouds, small_box, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(completion, "load_clouds", lambda: (clouds, "test"))
    monkeypatch.setattr(completion.time_chamfer, "__defaults__", (650,))
    monkeypatch.setattr(
        completion, "least_ms", lambda routes, _: {n: 1 + r() for n, r in routes.items()}
    )
    out = tmp_path / "rows.json"
    words = ["completion.py", "--quick", "--sections", "metrics", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    completion.main()
    report = json.loads(out.read_text())
    tables = report["metrics"]["tables"]
    assert report["metrics"]["source"] == "test: 700 and 600 points"
    assert {"commit", "cpu", "versions", "date"} <= set(report["environment"])
    assert [row["cell m"] for row in tables["Occupied cells"]] == [2.0, 1.0]
    assert [row["points"] for row in tables["Chamfer distance"]] == ["700 x 600", "650 x 600"] * 2
    assert [row["all pairs ms"] is None for row in tables["Chamfer distance"]] == [True, False] * 2
    for rows in tables.values():
        for row in rows:
            assert all(
                value > 0 for key, value in row.items() if " / " in key and value is not None
            )
    printed = capsys.readouterr().out
    assert all(f"### {title}" in printed for title in tables)


def test_clouds_are_simulated_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("POINTCEPT_KD_SAMPLES", str(tmp_path))
    clouds, source = completion.load_clouds()
    assert "simulated" in source
    assert min(map(len, clouds)) > 10**5
    assert max(float(np.linalg.norm(cloud, axis=1).max()) for cloud in clouds) < 50


# ------------------------------------------------------------------------------------------- maps and pairs


@pytest.fixture(scope="module")
def posed():
    return [completion_data.Posed(*one) for one in zip(*drive(count=4, points=500, seed=5))]


@pytest.fixture
def small(monkeypatch, posed):
    """The sections on four small scans."""
    monkeypatch.setattr(completion_data, "real_scans", lambda: posed[:3])
    monkeypatch.setattr(completion_network, "real_scans", lambda: posed[:1])
    simulated = [posed[i % 4] for i in range(16)]
    monkeypatch.setattr(completion_data, "simulated_scans", lambda count: (simulated, "test"))


def test_all_routes_build_the_same_map(posed):
    expected = map_requantised(*zip(*posed))
    for thin in (completion_data.first_by_rows, completion_data.first_by_keys):
        *_, whole = completion_data.map_whole(posed, thin)
        np.testing.assert_array_equal(whole, expected)
    parts = list(completion_data.map_growing(posed))
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert min(map(len, parts)) > 0


def test_clock_of_a_growing_map(posed):
    spent, parts = completion_data.cumulative_ms(completion_data.map_growing(posed))
    assert len(spent) == len(parts) == 4
    assert spent == sorted(spent)


def test_maps_that_differ_end_the_benchmark(posed, monkeypatch):
    monkeypatch.setattr(MapBuilder, "add", lambda self, *_: (np.zeros((1, 3)), np.zeros(1)))
    with pytest.raises(SystemExit, match="maps differ"):
        completion_data.time_maps(posed, [4], 1)


def test_crops_of_long_maps(posed, tmp_path):
    street = np.concatenate(list(completion_data.map_growing(posed)))
    stored = completion_data.long_map(tmp_path, street, 3)
    points = np.array(stored.points)
    assert len(points) == 3 * len(street)
    assert np.ptp(points[:, 0]) > 2 * completion_data.APART
    for pose in (posed[0].pose, posed[3].pose):
        plain = completion_data.crop_everywhere(points, pose)
        np.testing.assert_allclose(stored.around(pose, 50.0), plain, atol=1e-4)
        assert 100 < len(plain) < len(points)


def test_all_masks(posed):
    rng = np.random.default_rng(0)
    points, seen = rng.uniform(-40, 40, (600, 3)), rng.uniform(-30, 30, (40, 3))
    expected = cells_by_loops(points, seen)
    assert 0.05 < expected.mean() < 0.95
    for route in (completion_data.mask_by_rows, completion_data.mask_by_loops):
        np.testing.assert_array_equal(route(points, seen), expected)


def test_farthest_points_by_hand_and_ours():
    line = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0]], np.float32)
    assert completion_data.farthest_plainly(line, 3).tolist() == [0, 3, 2]
    cloud = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)
    picks = completion_data.farthest_plainly(cloud, 60)
    np.testing.assert_array_equal(completion_data.farthest(cloud, 60), picks)
    assert completion_data.reach_of(cloud, picks) < completion_data.reach_of(cloud, picks[:30])


def test_both_pairs(posed, tmp_path):
    street = np.concatenate(list(completion_data.map_growing(posed)))
    stored = completion_data.long_map(tmp_path, street, 2)
    partial = np.ascontiguousarray(posed[1].scan[:300, :3])
    args = posed[1].pose, 400, 40
    np.random.seed(3)
    plain = completion_data.pair_plainly(partial, np.array(stored.points), *args)
    np.random.seed(3)
    ours = completion_data.pair(partial, stored, *args)
    np.testing.assert_array_equal(plain["coord"], ours["coord"])
    np.testing.assert_allclose(plain["complete"], ours["complete"], atol=1e-4)
    assert ours["complete"].shape == (400, 3)


def test_simulated_scans_are_posed():
    pytest.importorskip("embreex")
    scans, source = completion_data.simulated_scans(5)
    assert source == "a simulated street"
    upright = np.isin(scans[4].labels & 0xFFFF, (50, 51, 71, 80, 81))  # the ground tells no places
    near = upright & (np.linalg.norm(scans[4].scan[:, :3], axis=1) < 25)
    last = scans[4]._replace(scan=scans[4].scan[near], labels=scans[4].labels[near])
    tree = cKDTree(completion_data.standing(scans[0]))
    gap, wrong = (
        np.median(tree.query(completion_data.standing(last._replace(pose=pose))[::5])[0])
        for pose in (last.pose, scans[0].pose)
    )
    assert gap < 0.15
    assert wrong > 2 * gap


def test_scans_without_samples_and_embree(monkeypatch, tmp_path):
    monkeypatch.setenv("POINTCEPT_KD_SAMPLES", str(tmp_path))
    assert completion_data.real_scans() == []

    def missing(*_):
        raise InputError("no Embree")

    monkeypatch.setattr(completion_data, "Simulator", missing)
    sheets, source = completion_data.simulated_scans(2)
    assert "sheet" in source
    *_, last = completion_data.map_whole(sheets, completion_data.first_by_keys)
    np.testing.assert_array_equal(last, np.concatenate(list(completion_data.map_growing(sheets))))
    assert len(last) > 1000


# ------------------------------------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def scene():
    scan = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * 6
    return completion_network.Scene(scan, cr=0.125)


@torch.no_grad()
def test_gates_per_row(scene):
    inputs = completion_network.recorded(scene)
    assert list(inputs) == [*(f"stage{i}" for i in range(1, 5)), *(f"up{i}" for i in range(1, 5))]
    gate = completion_network.gates_per_row(scene.denoiser, scene.condition, scene.t)
    ours = completion_network.gates_per_cell(scene, scene.fresh(scene.condition), inputs)
    for (name, x), expected in zip(inputs.items(), ours):
        torch.testing.assert_close(gate(name, x).features, expected, rtol=1e-4, atol=1e-5)
        assert (expected - x.features).abs().max() > 1e-3


def test_nearest_corner_by_hand():
    known = torch.tensor([[0, 0, 0], [16, 0, 0], [32, 0, 0]])
    cells = torch.tensor([[0, 0, 0], [2, 0, 0], [5, 1, 0], [6, 0, 0]])
    # Corners at 0, 8, 20, 24: the second and the last lie in the middle, and the first of two is taken.
    assert completion_network.nearest(cells, 4, known).tolist() == [0, 0, 1, 1]


@torch.no_grad()
def test_all_calls_predict_the_same(scene):
    told = completion_network.one_call(scene, scene.condition)
    assert told.std() > 0.01
    torch.testing.assert_close(
        completion_network.call_per_row(scene, scene.condition), told, rtol=1e-3, atol=1e-5
    )
    ours = completion_network.guided(scene)
    assert (ours - told).abs().mean() > 0.01 * told.std()
    for other in (completion_network.two_calls, completion_network.step_as_published):
        torch.testing.assert_close(other(scene), ours, rtol=1e-3, atol=1e-4)


def test_other_predictions_end_the_benchmark(scene):
    a = torch.ones(5, 3)
    assert completion_network.same_noise(a, a, "predictions") == 0
    with pytest.raises(SystemExit, match="predictions differ"):
        completion_network.same_noise(a + 0.01, a, "predictions")


def test_multiplications(scene):
    x = SparseConvTensor(torch.zeros(7, 4), torch.zeros(7, 4).long(), None, 1)
    rows, cells = completion_network.arithmetic(scene, {"stage1": x})
    # A quarter of an eighth of the widths: 32 -> 32 -> 32 and 64 -> 32 -> 4.
    each = 32 * 32 * 2 + 64 * 32 + 32 * 4
    assert rows * 1e9 == pytest.approx(7 * each)
    assert cells * 1e9 == pytest.approx(len(scene.condition.cells) * each)


# ------------------------------------------------------------------------------------------- together


def test_report_of_all_the_rest(small, monkeypatch, tmp_path, capsys):
    scene = completion_network.Scene
    monkeypatch.setattr(completion_network, "Scene", lambda scan, noise: scene(scan, noise, 0.125))
    out = tmp_path / "rows.json"
    words = ["completion.py", "--quick", "--points", "300", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, "--sections", "maps", "pairs", "network"])
    completion.main()
    report = json.loads(out.read_text())
    names = {name: list(report[name]["tables"]) for name in ("maps", "pairs", "network")}
    assert names == {
        "maps": ["Map of real scans", "Map of simulated scans"],
        "pairs": [
            "Crop of a map", "View-point mask", "Farthest point sampling", "Whole pair",
        ],
        "network": ["Gates, noise 1 m", "Condition", "Guidance"],
    }  # fmt: skip
    rows = report["maps"]["tables"]["Map of simulated scans"]
    assert [row["scans"] for row in rows] == [2, 4, 8, 16]
    assert all(row["rows / ours"] > 0 for row in rows)
    gates = report["network"]["tables"]["Gates, noise 1 m"]
    assert gates[0]["so at 180,000 points"] == pytest.approx(23.84)
    assert gates[2]["so at 180,000 points"] == pytest.approx(1.3326, abs=1e-3)
    assert "300 to denoise" in report["network"]["source"]
    assert "### Whole pair" in capsys.readouterr().out


def test_too_few_points(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["completion.py", "--points", "5"])
    with pytest.raises(SystemExit):
        completion.main()
    assert "--points 5: use 100 or more" in capsys.readouterr().err
