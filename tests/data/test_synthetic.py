"""Simulated streets: files, geometry, motion, restart, refusals."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pointcept_kd.data import synthetic
from pointcept_kd.data.check import check
from pointcept_kd.data.semantic_kitti import (
    LEARNING_MAP,
    load_calib,
    load_poses,
    map_labels,
    read_labels,
    read_scan,
)
from pointcept_kd.data.streets import lidar, scenery, shapes, things
from pointcept_kd.data.streets.ground import BARRIER, CONE, MACHINE
from pointcept_kd.data.streets.street import Soup, Street
from pointcept_kd.host import InputError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
TINY = synthetic.Plan({"00": 3, "08": 2}, beams=16, columns=128, spacing=4.0, seed=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    out = tmp_path_factory.mktemp("sim")
    report = synthetic.simulate(out, TINY, workers=1, progress=False)
    return out, report


@pytest.fixture(scope="module")
def street():
    return Street((1, 3), length=60.0, step_time=0.5, scans=21, unseen=False)


def volume(triangles):
    """Signed volume of a closed surface by the divergence theorem, one triangle at a time."""
    return sum(float(np.dot(a, np.cross(b, c))) for a, b, c in triangles.astype(np.float64)) / 6


def files(out):
    return sorted(p for p in (out / "dataset").rglob("*") if p.is_file())


def same_bytes(a, b):
    names = [p.relative_to(a) for p in files(a)]
    assert names == [p.relative_to(b) for p in files(b)]
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


# Shapes


def test_solids_are_closed_and_face_outwards():
    assert volume(shapes.box([0, 0, 0], [2, 3, 4])) == pytest.approx(24)
    # Frustum of height 3, base 2 x 2, top 1 x 1: h/3 (A + B + sqrt(AB)) = 7.
    frustum = shapes.box([0, 0, 0], [2, 2, 3], 0.5, 0.5, 0.5)
    assert volume(frustum) == pytest.approx(7, rel=1e-5)
    # A prism over a regular hexagon of radius 1 has the area 3 sqrt(3) / 2.
    tube = shapes.tube([1, 2, 0], [1, 2, 5], 1.0, sides=6)
    assert abs(volume(tube)) == pytest.approx(5 * 3 * np.sqrt(3) / 2, rel=1e-5)
    ball = shapes.ellipsoid([5, 0, 1], [1, 2, 3], rows=40, columns=60)
    assert abs(volume(ball)) == pytest.approx(4 / 3 * np.pi * 6, rel=0.01)


@pytest.mark.parametrize(
    ("make", "labels", "height"),
    [
        (things.car, {10}, (1.3, 2.2)), (things.truck, {18}, (2.1, 3.8)),
        (things.bus, {13}, (2.5, 3.3)), (things.caravan, {20}, (1.8, 2.7)),
        (things.tractor, {20}, (2.4, 2.6)), (things.person, {30}, (1.4, 2.1)),
        (things.bicycle, {11}, (0.9, 1.1)), (things.motorcycle, {15}, (0.95, 1.15)),
        (things.bicyclist, {31}, (1.4, 2.0)), (things.motorcyclist, {32}, (1.3, 2.0)),
        (scenery.sign, {80, 81}, (1.8, 4.5)), (scenery.lamp, {80}, (0.7, 8.4)),
        (scenery.tree, {70, 71}, (2.0, 12.0)), (scenery.bush, {70}, (0.3, 3.0)),
    ],
)  # fmt: skip
def test_things_have_their_class_and_size(make, labels, height):
    for seed in range(5):
        parts = make(np.random.default_rng(seed))
        assert {p.label for p in parts} == labels
        corners = np.concatenate([p.triangles for p in parts]).reshape(-1, 3)
        assert np.isfinite(corners).all()
        assert height[0] <= corners[:, 2].max() <= height[1]
        assert all(0 <= p.reflectivity <= 1 and 0 <= p.drop < 1 for p in parts)


@pytest.mark.parametrize(
    ("make", "label", "height"),
    [
        (things.excavator, MACHINE, (2.6, 3.7)),
        (scenery.barrier, BARRIER, (0.9, 1.15)),
        (scenery.cone, CONE, (0.5, 0.95)),
    ],
)
def test_roadworks_have_their_class_and_size(make, label, height):
    for seed in range(5):
        parts = make(np.random.default_rng(seed), label)
        assert {p.label for p in parts} == {label}
        assert height[0] <= max(p.triangles[..., 2].max() for p in parts) <= height[1]


# Street


def test_street_is_a_function_of_its_key(street):
    again = Street((1, 3), 60.0, 0.5, 21, False)
    other = Street((1, 4), 60.0, 0.5, 21, False)
    for a, b in zip(street.soup.arrays(), again.soup.arrays()):
        assert np.array_equal(a, b)
    assert again.movers == street.movers
    assert other.movers != street.movers


def test_places_never_fold_over(street):
    """The map from (s, d) to the plane keeps its orientation everywhere, so nothing overlaps."""
    s, d = np.meshgrid(np.arange(-55, 115, 1.0), np.arange(-46, 47, 1.0), indexing="ij")
    x, y, _ = street.frame(s, d)
    along = np.stack([np.diff(x, axis=0)[:, :-1], np.diff(y, axis=0)[:, :-1]])
    left = np.stack([np.diff(x, axis=1)[:-1], np.diff(y, axis=1)[:-1]])
    assert (along[0] * left[1] - along[1] * left[0] > 0.3).all()


def test_kerb_lifts_the_pavement(street):
    side = next(b for b in street.blocks if b.kind != "side" and 0 < b.start < 50)
    s = (side.start + side.end) / 2
    edge = street.edge(side.side)
    road = street.height(s, side.side * (street.road - 0.3))
    pavement = street.height(s, side.side * (edge - 0.3))
    assert 0.05 < pavement - road < 0.2


def test_movers_of_every_kind_keep_apart(street):
    kinds = {"car", "truck", "bus", "person", "bicyclist", "motorcyclist"}
    assert {m.kind for m in street.movers} == kinds
    assert all(abs(m.speed) > 0.5 for m in street.movers)
    for t in np.arange(21) * 0.5:
        lanes = [(m.place(t), m.d) for m in street.movers if m.kind in ("car", "truck", "bus")]
        for i, (s, d) in enumerate(lanes):
            for other, e in lanes[:i]:
                assert abs(d - e) > 1.4 or abs(s - other) > 4.5


def test_moving_things_change_place_and_keep_their_instance(street):
    mover = max(street.movers, key=lambda m: abs(m.speed))
    meet = next(t for t in np.arange(21) * 0.5 if -40 < mover.place(t) < 90)
    centres = []
    for t in (meet, meet + 0.2):
        triangles, label, *_ = street.moving(t, mover.place(t), 3.0).arrays()
        mine = label >> 16 == mover.instance
        centres.append(triangles[mine].reshape(-1, 3).mean(0))
    moved = np.linalg.norm(centres[1][:2] - centres[0][:2])
    # The arc on its own lane is a little longer or shorter than on the centre line.
    assert moved == pytest.approx(abs(mover.speed) * 0.2, rel=0.15)


@pytest.mark.parametrize("unseen", [False, True])
def test_things_that_carry_a_moving_class_move_and_no_others(unseen):
    street = Street((9, 4), length=24.0, step_time=0.5, scans=7, unseen=unseen)
    times = np.arange(7) * 0.5
    frames = [street.solids_at(t, 8.0 * t, 60.0) for t in times]
    moved = still = 0
    for before, after in itertools.pairwise(frames):
        for instance in before.keys() & after.keys():
            a, b = before[instance], after[instance]
            assert a.label == b.label
            way = float(np.linalg.norm(b.centre - a.centre))
            if 252 <= a.label <= 259:
                moved += 1
                assert way > 0.3  # half a second at walking pace
            else:
                still += 1
                assert way == 0.0
    assert moved > 15
    assert still > 100


def test_extras_leave_the_ordinary_street_as_it_was(street):
    for extra in ({"crowd": 12}, {"roadworks": True}):
        other = Street((1, 3), 60.0, 0.5, 21, False, **extra)
        count = sum(g.count for g in other.soup.groups)
        ours, theirs = street.soup.arrays(), other.soup.arrays()
        assert count > len(ours[0])
        assert np.array_equal(ours[0], theirs[0][: len(ours[0])])
        if "crowd" in extra:
            assert np.array_equal(ours[1], theirs[1][: len(ours[1])])
        else:
            labels = set((theirs[1] & 0xFFFF).tolist())
            assert {MACHINE, BARRIER, CONE} <= labels
    assert not {MACHINE, BARRIER, CONE} & set((street.soup.arrays()[1] & 0xFFFF).tolist())


# Ray casting


def test_nearer_surface_hides_the_farther():
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    soup = Soup()
    soup.add(shapes.box([4, -1, -1], [5, 1, 1]), 50, 0.5)
    soup.add(shapes.box([7, -9, -9], [8, 9, 9]), 51, 0.25)
    rays = np.array([[1, 0.1, 0.05], [1, 0.6, 0.05], [-1, 0.1, 0], [0.05, 0.02, 1]])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    distance, cosine, label, reflectivity, *_ = synthetic.Caster(soup).cast(np.zeros(3), rays)
    assert distance[:2] == pytest.approx([4 / rays[0, 0], 7 / rays[1, 0]], rel=1e-5)
    assert np.isinf(distance[2:]).all()
    assert label[:2].tolist() == [50, 51]
    assert reflectivity[:2] == pytest.approx([0.5, 0.25])
    assert cosine[:2] == pytest.approx(rays[:2, 0], rel=1e-5)


def test_beams():
    for beams in (16, 32, 64):
        elevation = np.rad2deg(lidar.beam_elevations(beams))
        assert len(elevation) == beams
        assert (np.diff(elevation) < 0).all()
    directions = lidar.ray_directions(64, 100)
    assert np.linalg.norm(directions, axis=1) == pytest.approx(1)
    assert np.rad2deg(np.arcsin(directions[[0, -1], 2])) == pytest.approx([2.0, -24.8])


# Files


def test_layout_and_values(tiny):
    out, report = tiny
    assert (report.written, report.kept) == (5, 0)
    assert sum(report.shares.values()) == pytest.approx(1)
    points = 0
    for name, count in TINY.scans.items():
        folder = out / "dataset" / "sequences" / name
        for i in range(count):
            scan = read_scan(folder / "velodyne" / f"{i:06d}.bin")
            label = read_labels(folder / "labels" / f"{i:06d}.label", len(scan))
            points += len(scan)
            assert set(label & 0xFFFF) <= set(LEARNING_MAP)
            distance = np.linalg.norm(scan[:, :3], axis=1)
            assert 1.2 < distance.min() < distance.max() < 50.5
            assert 0 <= scan[:, 3].min() <= scan[:, 3].max() < 1
            things_ = np.isin(label & 0xFFFF, [10, 11, 13, 15, 18, 20, 30, 31, 32])
            assert (label[things_] >> 16 > 0).all()
            ground = np.isin(label & 0xFFFF, [40, 60])
            near = ground & (distance < 8)
            assert np.median(scan[near, 2]) == pytest.approx(-synthetic.MAST, abs=0.15)
        assert len(load_poses(folder)) == count
        assert len((folder / "times.txt").read_text().split()) == count
    assert points == report.points
    assert all(not found for _, found in check(out))


def test_workers_change_nothing(tiny, tmp_path):
    out, _ = tiny
    synthetic.simulate(tmp_path, TINY, workers=2, progress=False)
    assert same_bytes(out, tmp_path)


def test_seed_changes_the_scans(tiny, tmp_path):
    out, _ = tiny
    plan = synthetic.plan_from("demo", ["00"], 1, beams=16, columns=128, spacing=4.0, seed=6)
    synthetic.simulate(tmp_path, plan, workers=1, progress=False)
    name = Path("dataset/sequences/00/velodyne/000000.bin")
    assert (out / name).read_bytes() != (tmp_path / name).read_bytes()


def test_interrupted_run_goes_on(tiny, tmp_path):
    out, _ = tiny
    synthetic.simulate(tmp_path, TINY, workers=1, progress=False)
    folder = tmp_path / "dataset" / "sequences" / "00"
    (folder / "velodyne" / "000001.bin").unlink()
    (folder / "poses.txt").unlink()
    whole = folder / "labels" / "000002.label"
    whole.write_bytes(whole.read_bytes()[:-4])
    kept = folder / "velodyne" / "000000.bin"
    before = kept.stat().st_mtime_ns
    report = synthetic.simulate(tmp_path, TINY, workers=1, progress=False)
    assert (report.written, report.kept) == (2, 3)
    assert kept.stat().st_mtime_ns == before
    assert same_bytes(out, tmp_path)
    assert synthetic.simulate(tmp_path, TINY, workers=1, progress=False).written == 0


def test_poses_bring_scans_together(tiny):
    out, _ = tiny
    folder = out / "dataset" / "sequences" / "00"
    calib, poses = load_calib(folder / "calib.txt"), load_poses(folder)
    turn = calib["Tr"][:3, :3]
    assert turn @ turn.T == pytest.approx(np.eye(3), abs=1e-9)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert not np.allclose(turn, np.round(turn), atol=1e-4)
    assert poses[0] == pytest.approx(np.eye(4), abs=1e-9)
    assert np.linalg.norm(poses[1][:3, 3]) == pytest.approx(4.0, rel=0.05)
    assert poses[1][0, 3] > 3.8  # forward is +x of the sensor
    clouds = []
    for i in (0, 2):
        scan = read_scan(folder / "velodyne" / f"{i:06d}.bin")[:, :3]
        label = read_labels(folder / "labels" / f"{i:06d}.label") & 0xFFFF
        clouds.append(scan[np.isin(label, [50, 51, 80, 81, 10, 18]) & (label < 250)])
    moved = clouds[1] @ poses[2][:3, :3].T + poses[2][:3, 3]
    tree = cKDTree(clouds[0])
    apart, together = (np.median(tree.query(c)[0]) for c in (clouds[1], moved))
    assert together < 0.7 * apart


def test_points_lie_in_the_box_of_their_instance():
    """Labels, instance ids and moving classes agree with boxes computed apart from the ray casting."""
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    plan = synthetic.Plan({"00": 4}, beams=32, columns=256, spacing=4.0, seed=5)
    simulator = synthetic.Simulator(plan, "00")
    checked = {True: set(), False: set()}
    for i in range(4):
        points, label = simulator.scan(i)
        pose = simulator.street.sensor_pose(i, synthetic.MAST)
        world = points[:, :3] @ pose[:3, :3].T + pose[:3, 3]
        boxes = simulator.street.solids_at(i * simulator.step_time, 4.0 * i, 60.0)
        for instance in set((label >> 16).tolist()) - {0}:
            mine = label >> 16 == instance
            box = boxes[instance]
            assert set((label[mine] & 0xFFFF).tolist()) == {box.label}
            c, s = np.cos(box.yaw), np.sin(box.yaw)
            away = world[mine] - box.place
            own = np.stack(
                [c * away[:, 0] + s * away[:, 1], c * away[:, 1] - s * away[:, 0], away[:, 2]], 1
            )
            outside = np.maximum(box.low - own, own - box.high).max()
            assert outside < 0.12, (instance, box.label, outside)  # the range's noise is 2 cm
            checked[box.label >= 252].add(instance)
    assert len(checked[True]) >= 4
    assert len(checked[False]) >= 20


def test_difficulty_changes_noise_loss_and_clutter():
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    scans = {}
    for name in ("easy", "normal", "hard"):
        plan = synthetic.Plan(
            {"00": 2}, beams=32, columns=256, spacing=4.0, seed=5, difficulty=name
        )
        scans[name] = synthetic.Simulator(plan, "00").scan(1)
    outliers = {name: int((label & 0xFFFF == 1).sum()) for name, (_, label) in scans.items()}
    assert outliers["easy"] == outliers["normal"] == 0
    assert outliers["hard"] > 40
    near = {}
    for name, (points, label) in scans.items():  # road close by, a plane that tilts little
        road = points[(label == 40) & (np.linalg.norm(points[:, :2], axis=1) < 9), :3].astype(
            np.float64
        )
        columns = np.column_stack([road[:, :2], np.abs(road[:, 1]), np.ones(len(road))])
        fit = columns @ np.linalg.lstsq(columns, road[:, 2], rcond=None)[0]
        near[name] = float(np.std(road[:, 2] - fit))
    assert near["easy"] < near["normal"] < near["hard"]
    distance = np.full(20000, 30.0)
    ones = np.ones_like(distance)
    lost = [
        lidar._lost(np.random.default_rng(0), distance, ones, ones, 0 * ones, d.loss).mean()
        for d in (synthetic.DIFFICULTIES[n] for n in ("easy", "normal", "hard"))
    ]
    # 1 - (1 - 0.015 f) (1 - 0.2 f (30/50)^2)
    for share, f in zip(lost, (0.4, 1.0, 2.5)):
        assert share == pytest.approx(1 - (1 - 0.015 * f) * (1 - 0.072 * f), abs=0.01)


@pytest.mark.parametrize("name", ["00", "04", "08"])
def test_every_class_occurs(name):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    simulator = synthetic.Simulator(synthetic.PRESETS["demo"], name)
    seen = [map_labels(simulator.scan(i)[1]) for i in range(0, 20, 3)]
    counts = np.bincount(np.concatenate(seen) + 1, minlength=20)[1:]
    assert (counts >= 20).all(), dict(enumerate(counts.tolist()))


# Refusals


def test_another_plan_is_not_mixed_in(tiny):
    out, _ = tiny
    plan = synthetic.Plan({"00": 3, "08": 2}, 16, 128, spacing=4.0, seed=7)
    with pytest.raises(InputError, match=r"seed=5, asked for seed=7; use another --out"):
        synthetic.simulate(out, plan, workers=1, progress=False)


def test_folders_made_before_there_were_difficulties_go_on(tmp_path):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    plan = synthetic.Plan({"00": 1}, 8, 64)
    synthetic.simulate(tmp_path, plan, workers=1, progress=False)
    card = json.loads((tmp_path / "dataset.json").read_text())
    del card["plan"]["difficulty"], card["layout"]
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    assert synthetic.simulate(tmp_path, plan, workers=1, progress=False).kept == 1
    hard = synthetic.Plan({"00": 1}, 8, 64, difficulty="hard")
    with pytest.raises(InputError, match="difficulty=normal, asked for difficulty=hard"):
        synthetic.simulate(tmp_path, hard, workers=1, progress=False)


def test_real_data_is_not_mixed_in(tmp_path):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    (tmp_path / "dataset" / "sequences" / "00").mkdir(parents=True)
    with pytest.raises(InputError, match=r"exists without dataset\.json"):
        synthetic.simulate(tmp_path, TINY, workers=1, progress=False)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(InputError, match="not written by this tool"):
        synthetic.simulate(tmp_path, TINY, workers=1, progress=False)


def test_missing_embree_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex.rtcore_scene", None)
    with pytest.raises(InputError, match=r'pip install "pointcept_kd\[sim\]"'):
        synthetic.simulate(tmp_path / "x", TINY, progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("huge", None, None), "--preset: 'huge'"),
        (("demo", ["99"], None), "--sequences: '99'"),
        (("demo", [], None), "--sequences is empty"),
        (("demo", None, 0), "--scans: 0"),
    ],
)
def test_options_out_of_range(arguments, text):
    with pytest.raises(InputError, match=text):
        synthetic.plan_from(*arguments)


def test_numbers_out_of_range():
    with pytest.raises(InputError, match="--beams: 1 is not in 2..256"):
        synthetic.plan_from("demo", None, None, beams=1)
    with pytest.raises(
        InputError, match="--difficulty: 'rough' is unknown; use easy, normal, hard"
    ):
        synthetic.plan_from("demo", None, None, difficulty="rough")
    with pytest.raises(InputError, match="--spacing"):
        synthetic.plan_from("demo", None, None, spacing=float("nan"))


TOOL_OPTIONS = ["--sequences", "8", "--scans", "1", "--beams", "8", "--columns", "64"]


def test_tool_from_another_folder(tmp_path):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(TOOL), "simulate", "--out", "o", *TOOL_OPTIONS]
    made = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert "1 scans, " in made.stdout
    assert "share of points: car" in made.stdout
    card = json.loads((tmp_path / "o" / "dataset.json").read_text())
    assert card["plan"]["scans"] == {"08": 1}
    assert "--beams 8" in card["command"]


def test_tool_exit_codes(tmp_path, capsys):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = str(tmp_path / "o")
    make = ["simulate", "--out", out, *TOOL_OPTIONS, "--workers", "1"]
    assert tool.main(make) == 0
    assert tool.main(make) == 0
    assert "nothing to do: all 1 scans are there" in capsys.readouterr().out
    assert tool.main([*make, "--seed", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} holds scans with seed=0")
    assert tool.main(["check", "--data-root", out]) == 0
    assert capsys.readouterr().out == "1 scans, no problems\n"
    scan = tmp_path / "o" / "dataset" / "sequences" / "08" / "velodyne" / "000000.bin"
    scan.write_bytes(scan.read_bytes()[:-3])
    assert tool.main(["check", "--data-root", out]) == 1
    assert "000000.bin" in capsys.readouterr().out
    assert tool.main(["check", "--data-root", str(tmp_path / "nowhere")]) == 2
