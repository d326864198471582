"""Completion scores: the values worked by hand, dense and plain-loop oracles, empty clouds, order, joining."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from pointcept_kd.completion import metrics
from pointcept_kd.completion.metrics import CellCounts, CompletionScores
from pointcept_kd.host import InputError

P = np.array([(0.1, 0.1, 0.1), (1.1, 0.1, 0.1), (0.1, 2.1, 0.1)])
G = np.array([(0.1, 0.1, 0.1), (1.1, 0.1, 0.6), (10.1, 0.1, 0.1), (0.1, 2.1, 0.1)])
EMPTY = np.zeros((0, 3))
FAR = np.array([(60.0, 0, 0), (0, -50.001, 0)])
WORST = math.sqrt(math.log(2))


def street(seed=0, points=300, half=4.0):
    """Points of two close surfaces, so that clouds share cells of every size."""
    rng = np.random.default_rng(seed)
    where = np.random.default_rng(99).integers(-20, 20, (40, 3)) * half / 20
    return where[rng.integers(0, 40, points)] + rng.normal(0, 0.15, (points, 3))


# --- distances ------------------------------------------------------------------------------------


def plain_nearest(source, target):
    return np.array([min(math.dist(p, q) for q in target) for p in source])


def test_distances_by_hand():
    np.testing.assert_allclose(metrics.nearest_distances(P, G), [0, 0.5, 0], atol=1e-15)
    np.testing.assert_allclose(metrics.nearest_distances(G, P), [0, 0.5, 9, 0], atol=1e-15)
    assert metrics.chamfer_distance(P, G) == pytest.approx(1.2708333333, abs=1e-9)


def test_distances_of_all_pairs():
    a, b = street(0, 80), street(1, 60)
    a[0] = (1e7, -1e7, 3)  # beyond the cells of the search order
    np.testing.assert_allclose(metrics.nearest_distances(a, b), plain_nearest(a, b), rtol=1e-14)
    both = plain_nearest(a, b).mean() + plain_nearest(b, a).mean()
    assert metrics.chamfer_distance(a, b) == pytest.approx(both / 2, rel=1e-13)


def test_tensors_and_float32_are_widened_not_rounded():
    a, b = torch.from_numpy(street(0)).float(), torch.from_numpy(street(1)).float()
    assert metrics.chamfer_distance(a.requires_grad_(), b) == metrics.chamfer_distance(
        a.detach().double().numpy(), b.double().numpy()
    )


def plain_areas(pred2gt, gt2pred):
    """Simpson on an odd number of nodes needs a rule for the last interval; here through a parabola on a fine grid."""
    thresholds = np.linspace(0.05, 0.10, 100)
    curves = []
    for t in thresholds:
        p = sum(d < t for d in pred2gt) / len(pred2gt)
        r = sum(d < t for d in gt2pred) / len(gt2pred)
        curves.append((p, r, 2 * p * r / (p + r) if p + r else 0.0))
    h = thresholds[1] - thresholds[0]
    areas = []
    for y in np.array(curves).T:
        area = sum(h / 3 * (y[i - 1] + 4 * y[i] + y[i + 1]) for i in range(1, 98, 2))
        # The last interval: the integral of the parabola through the last three nodes.
        area += h * (5 / 12 * y[99] + 2 / 3 * y[98] - 1 / 12 * y[97])
        areas.append(area / 0.05)
    return areas


def test_areas_against_loops():
    a, b = street(0, 200), street(1, 150)
    distances = plain_nearest(a, b), plain_nearest(b, a)
    found = metrics.f_areas(*distances)
    np.testing.assert_allclose(found, plain_areas(*distances), rtol=1e-12)
    assert 0 < min(found) < max(found) < 1


def test_areas_by_hand():
    assert metrics.f_areas(np.zeros(3), np.zeros(4)) == pytest.approx((1, 1, 1), abs=1e-15)
    # Nearer than every threshold, and exactly at the first one, which is not nearer.
    assert metrics.f_areas(np.array([0.0, 9.0]), np.array([0.0])) == pytest.approx((0.5, 1, 2 / 3))
    precision = metrics.f_areas(np.array([0.05]), np.array([0.0]))[0]
    assert precision == pytest.approx(1 - 1 / 3 / 99, abs=1e-12)
    assert metrics.f_areas(np.zeros(0), np.full(3, np.inf)) == (0, 0, 0)


# --- cells ----------------------------------------------------------------------------------------


def dense(cloud, cell):
    """Counts in an array of all cells; the right edge belongs to the last one."""
    side = round(100 / cell)
    return np.histogramdd(cloud, bins=[side] * 3, range=[(-50, 50)] * 3)[0]


def dense_jsd(p, q):
    used = (p > 0) | (q > 0)
    return jensenshannon(p[used], q[used])


@pytest.fixture
def wide():
    """Two clouds that fill the box and reach beyond, with points on all its faces; off the edges between cells."""
    rng = np.random.default_rng(5)
    clouds = [rng.uniform(-52, 52, (4000, 3)) for _ in range(2)]
    clouds[1][:1500] = clouds[0][:1500] + rng.normal(0, 0.3, (1500, 3))
    faces = np.array(
        [(-50, 3.3, 1.3), (50, 3.3, 1.3), (50, 50, 50), (-50, -50, -50), (7.2, 50, -50)]
    )
    return [np.concatenate([cloud, faces[:-1] if i else faces]) for i, cloud in enumerate(clouds)]


@pytest.mark.parametrize("cell", [0.5, 1.0, 5.0])
def test_cells_of_all_clouds_against_arrays(wide, cell):
    p, q = (dense(cloud, cell) for cloud in wide)
    counts = metrics.voxel_counts(*wide, cell)
    assert counts == CellCounts(
        int(((p > 0) & (q > 0)).sum()), int(((p == 0) & (q > 0)).sum()), int(((p > 0) & (q == 0)).sum())
    )  # fmt: skip
    assert min(counts.tp, counts.fn, counts.fp) > 0
    keys, found = metrics._occupied(wide[0], cell)
    assert np.array_equal(np.flatnonzero(p), keys)
    assert np.array_equal(p[p > 0], found)
    assert metrics.jsd_3d(*wide, cell) == pytest.approx(dense_jsd(p, q), rel=1e-12)
    columns = [np.clip(counts, 0, 1).sum(axis=2) for counts in (p, q)]
    assert metrics.jsd_bev(*wide, cell) == pytest.approx(dense_jsd(*columns), rel=1e-12)


def by_hand_cell(point, cell):
    return tuple(min(math.floor((x + 50) / cell), round(100 / cell) - 1) for x in point)


@pytest.mark.parametrize("cell", metrics.CELLS)
def test_fine_cells_against_sets(wide, cell):
    near = [np.concatenate([street(seed, 400), cloud[-5:]]) for seed, cloud in enumerate(wide)]
    p, q = ({by_hand_cell(x, cell) for x in cloud if max(map(abs, x)) <= 50} for cloud in near)
    assert metrics.voxel_counts(*near, cell) == CellCounts(len(p & q), len(q - p), len(p - q))
    assert len(p & q) > 10


def test_jsd_by_hand():
    assert metrics.jsd_3d(P, G) == pytest.approx(0.5429402541, abs=1e-10)
    assert metrics.jsd_bev(P, G) == pytest.approx(0.3091966833, abs=1e-10)
    assert metrics.jsd_3d(P, P + 20) == pytest.approx(WORST, abs=1e-15)
    assert metrics.jsd_bev(P, P + np.array([0, 0, 20])) == 0


def test_bev_counts_occupied_cells_not_points():
    two, many = np.array([(0.1, 0.1, 0.1), (0.1, 0.1, 9.1), (5.1, 0.1, 0.1)]), [[0.1, 0.1, 0.1]] * 9
    assert metrics.jsd_bev(np.concatenate([two, many]), two) == 0
    assert metrics.jsd_3d(np.concatenate([two, many]), two) > 0.1


def test_iou_by_hand():
    for cell in metrics.CELLS:
        assert metrics.voxel_counts(P, G, cell) == CellCounts(tp=2, fn=2, fp=1)
    assert CellCounts(2, 2, 1).iou == 0.4
    assert (CellCounts(1, 0, 0) + CellCounts(1, 3, 0)).iou == 0.4


def legacy_sets(cloud, cell):
    """Integer places as Python rounds them, half to even; limited to 50 places around the sensor."""
    places = (tuple(round(x / cell) for x in point) for point in cloud.tolist())
    return {place for place in places if max(map(abs, place)) <= 50}


def test_legacy_iou_sees_the_innermost_cells_alone(wide):
    assert metrics.voxel_counts_legacy(P, G, 0.1) == CellCounts(tp=2, fn=1, fp=1)
    assert metrics.iou_legacy(P, G, 0.1) == 0.5
    assert metrics.voxel_counts_legacy(P, G, 0.5) == CellCounts(tp=2, fn=2, fp=1)
    # 25 m are 50 cells; 25.25 m round to 50, the even one, 25.3 m to 51.
    edge = np.array([(25.0, 0, 0), (0, -25.25, 0), (0, 0, 25.3)])
    assert metrics.voxel_counts_legacy(edge, edge, 0.5) == CellCounts(tp=2)
    for cell, clouds in ((0.5, wide), (0.2, (street(0), street(1))), (0.1, (street(0), street(1)))):
        p, q = (legacy_sets(cloud, cell) for cloud in clouds)
        found = metrics.voxel_counts_legacy(*clouds, cell)
        assert found == CellCounts(len(p & q), len(q - p), len(p - q))
        assert found.tp > 0


@pytest.mark.parametrize("cell", [0, -1, 0.3, 101, math.nan, 1e-9, "0.5"])
def test_cells_that_do_not_fill_the_box(cell):
    for function in (
        metrics.voxel_counts,
        metrics.voxel_counts_legacy,
        metrics.jsd_3d,
        metrics.jsd_bev,
    ):
        with pytest.raises(InputError, match="cell="):
            function(P, G, cell)


# --- earth mover's distance -----------------------------------------------------------------------


def test_emd_by_hand():
    assert metrics.emd(P, P) == (0, 3)
    for shift in (0.5, 0.05):
        value, points = metrics.emd(street(0), street(0) + np.array([shift, 0, 0]))
        assert (value, points) == (pytest.approx(shift, abs=1e-12), 300)
    # The nearest pair first (1 to 0.6) would cost 0.4 + 5; the best costs 0.6 + 4.
    a, b = np.array([(0.0, 0, 0), (1, 0, 0)]), np.array([(0.6, 0, 0), (5, 0, 0)])
    assert metrics.emd(a, b)[0] == pytest.approx(4.6 / 2)


def test_emd_of_all_assignments():
    from itertools import permutations

    a, b = street(0, 6), street(1, 6)
    best = min(
        sum(math.dist(p, b[j]) for p, j in zip(a, order)) for order in permutations(range(6))
    )
    assert metrics.emd(a, b)[0] == pytest.approx(best / 6)


def test_emd_chooses_the_same_points_in_any_order():
    a, b = street(0, 400), street(1, 250)
    mixed = np.random.default_rng(3).permutation(400)
    value, points = metrics.emd(a, b, points=64)
    assert points == 64
    assert metrics.emd(a[mixed], b, points=64) == (value, 64)
    assert metrics.emd(a, a[mixed], points=64) == (0, 64)
    assert metrics.emd(a, b, points=64, seed=1)[0] != value
    assert metrics.emd(a, b)[1] == 250
    with pytest.raises(InputError, match="points=0"):
        metrics.emd(a, b, points=0)


# --- nothing, one point, outside ------------------------------------------------------------------


def test_functions_of_clouds_without_points():
    assert metrics.nearest_distances(P, EMPTY).tolist() == [math.inf] * 3
    assert metrics.nearest_distances(EMPTY, P).shape == (0,)
    assert metrics.chamfer_distance(EMPTY, P) == metrics.chamfer_distance(P, EMPTY) == math.inf
    assert metrics.emd(EMPTY, P) == (math.inf, 0)
    for nothing in (EMPTY, FAR):
        for jsd in (metrics.jsd_3d, metrics.jsd_bev):
            assert jsd(nothing, P) == jsd(P, nothing) == WORST
            assert math.isnan(jsd(nothing, EMPTY))
        assert metrics.voxel_counts(nothing, P, 0.5) == CellCounts(fn=3)
        assert math.isnan(metrics.voxel_counts(nothing, EMPTY, 0.5).iou)
    assert metrics.voxel_counts_legacy(EMPTY, P, 0.5).iou == 0


def test_an_empty_prediction_is_the_worst():
    scores = CompletionScores(emd_points=9, legacy=True)
    row = scores.add("a", EMPTY, G)
    expected = dict.fromkeys(("cd", "dist_pred2gt", "dist_gt2pred", "emd"), math.inf)
    expected |= dict(precision=0, recall=0, f=0, jsd_3d=WORST, jsd_bev=WORST)
    assert row.values == expected
    scores.add("b", P, G)
    summary = scores.summary()
    assert (summary.scans, summary.empty) == (2, 1)
    assert summary.mean["cd"] == math.inf
    assert math.isnan(summary.std["cd"])
    assert summary.cells[0.5] == CellCounts(tp=2, fn=6, fp=1)
    text = json.dumps(scores.as_dict(), allow_nan=False)
    assert json.loads(text)["cd"] == {"mean": None, "std": None}


def test_one_point_on_itself_is_the_best():
    row = CompletionScores(emd_points=9).add("a", P[:1], P[:1])
    zero = ("cd", "dist_pred2gt", "dist_gt2pred", "jsd_3d", "jsd_bev", "emd")
    assert [row.values[key] for key in zero] == [0] * 6
    assert [row.values[key] for key in ("precision", "recall", "f")] == pytest.approx([1, 1, 1])
    assert {counts.iou for counts in row.cells.values()} == {1.0}
    assert row.emd_points == 1


def test_points_outside_count_in_distances_alone():
    scores = CompletionScores()
    one, two = scores.add("a", P, G), scores.add("b", np.concatenate([P, FAR]), G)
    for key in ("jsd_3d", "jsd_bev"):
        assert one.values[key] == two.values[key]
    assert one.cells == two.cells
    assert two.values["dist_pred2gt"] > 10 > one.values["dist_pred2gt"]


def test_clouds_that_cannot_be_scored():
    scores = CompletionScores()
    bad = P.copy()
    bad[1, 2] = math.nan
    with pytest.raises(InputError, match=r"^08/7: prediction: 1 of 3 points are not finite$"):
        scores.add("08/7", bad, G)
    with pytest.raises(InputError, match=r"^08/7: target: expected \(n, 3\)"):
        scores.add("08/7", P, np.zeros((4, 4)))
    with pytest.raises(InputError, match=r"^x: prediction: expected \(n, 3\)"):
        scores.add("x", np.array([["a", "b", "c"]]), P)
    for nothing in (EMPTY, FAR):
        with pytest.raises(InputError, match="sensor's frame"):
            scores.add("08/7", P, nothing)
    with pytest.raises(InputError, match="no scan was scored"):
        scores.summary()
    with pytest.raises(InputError, match="emd_points=-1"):
        CompletionScores(emd_points=-1)
    with pytest.raises(InputError, match="cells="):
        CompletionScores(cells=())


# --- sets of scans --------------------------------------------------------------------------------


def filled(order=range(4), **settings):
    scores = CompletionScores(**settings)
    for i in order:
        mixed = np.random.default_rng(i).permutation(200) if settings else slice(None)
        scores.add(f"scan {i}", street(i, 200)[mixed], street(i + 10, 220))
    return scores


def test_a_row_holds_what_the_functions_give():
    scores = CompletionScores(cells=(0.2, 1.0), legacy=True, emd_points=50, seed=2)
    p, q = street(0), street(1)
    row = scores.add("a", p, torch.from_numpy(q))
    distances = metrics.nearest_distances(p, q), metrics.nearest_distances(q, p)
    expected = dict(
        cd=metrics.chamfer_distance(p, q),
        dist_pred2gt=np.sort(distances[0]).mean(),
        dist_gt2pred=np.sort(distances[1]).mean(),
        jsd_3d=metrics.jsd_3d(p, q),
        jsd_bev=metrics.jsd_bev(p, q),
        emd=metrics.emd(p, q, 50, 2)[0],
    )
    expected |= dict(zip(("precision", "recall", "f"), metrics.f_areas(*distances)))
    assert row.values == expected
    assert row.cells == {c: metrics.voxel_counts(p, q, c) for c in (0.2, 1.0)}
    assert row.cells_legacy == {c: metrics.voxel_counts_legacy(p, q, c) for c in (0.2, 1.0)}
    assert (row.points_pred, row.points_gt, row.emd_points) == (300, 300, 50)
    assert row.as_dict()["iou_legacy_1"] == row.cells_legacy[1.0].iou


def test_means_over_scans_and_sums_over_cells():
    scores = filled()
    summary = scores.summary()
    for key in metrics.MEANS:
        column = [row.values[key] for row in scores.rows]
        assert summary.mean[key] == pytest.approx(np.mean(column), rel=1e-14)
        assert summary.std[key] == pytest.approx(np.std(column), rel=1e-9)
    for cell in metrics.CELLS:
        tp, fn, fp = np.sum(
            [(c.tp, c.fn, c.fp) for c in (r.cells[cell] for r in scores.rows)], axis=0
        )
        assert summary.values()[f"iou_{cell:g}"] == tp / (tp + fn + fp)
    assert "iou_legacy_0.5" not in summary.values()
    assert f"CD {summary.mean['cd']:.4f} m" in summary.headline
    assert "IoU at 0.5/0.2/0.1 m 0." in summary.headline


def test_no_order_shows():
    plain, mixed = filled(), filled((2, 0, 3, 1), seed=7)
    assert mixed.as_dict() == plain.as_dict()
    assert [row["name"] for row in plain.as_dict()["rows"]] == [f"scan {i}" for i in range(4)]
    assert "rows" not in plain.as_dict(rows=False)


def test_parts_join_to_the_whole():
    whole, one, two = filled(), filled((3, 1)), filled((0, 2))
    one.merge(pickle.loads(pickle.dumps(two)))
    assert one.as_dict() == whole.as_dict()
    assert whole.gathered().as_dict() == whole.as_dict()
    with pytest.raises(InputError, match="cannot join"):
        one.merge(CompletionScores(legacy=True))


def test_emd_points_are_told():
    scores = CompletionScores(emd_points=50)
    scores.add("a", street(0), street(1))
    scores.add("b", street(0, 20), street(1))
    assert scores.summary().emd_points == (20, 50)
    assert scores.as_dict()["emd_points"] == [20, 50]
    assert scores.as_dict()["rows"][1]["emd_points"] == 20


def test_a_real_scan_against_the_next(samples):
    folder = samples / "semantickitti/dataset/sequences/00/velodyne"
    a, b = (np.fromfile(folder / f"{i:06d}.bin", np.float32).reshape(-1, 4)[:, :3] for i in (0, 1))
    row = CompletionScores().add("00", a, b)
    assert 0.1 < row.values["cd"] < 0.3
    p, q = (
        dense(a, 0.5),
        dense(b, 0.5),
    )  # the scan has points on cells' edges: float32 whole numbers
    assert row.values["jsd_3d"] == pytest.approx(dense_jsd(p, q), rel=1e-12)
