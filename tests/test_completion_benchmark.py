"""The opponents of benchmarks/completion.py compute what its tables say they compute."""

import json
import sys

import numpy as np
import pytest

from benchmarks import completion
from pointcept_kd.completion import metrics


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
    monkeypatch.setattr(sys, "argv", ["completion.py", "--quick", "--out", str(out)])
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
