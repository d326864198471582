"""Maps: against plain loops, one point per cell, nothing that moves, crops, restarts, stale and damaged files."""

import json
import pickle
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from pointcept_kd.data import map_tiles, maps, synthetic
from pointcept_kd.data.map_tiles import Map, TileWriter
from pointcept_kd.data.maps import (
    CellSet,
    MapBuilder,
    Plan,
    build_maps,
    build_sequence,
    cells_of,
    first_of_cells,
    open_map,
    posed_scans,
    sequence_poses,
)
from pointcept_kd.host import InputError

from .map_oracles import (
    crop_everywhere,
    drive,
    map_by_loops,
    map_requantised,
    read_sequence,
    same_points,
    write_sequence,
)

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py")


@pytest.fixture(scope="module")
def street():
    return drive()


@pytest.fixture
def sequence(tmp_path, street):
    return write_sequence(tmp_path, "00", *street)


def built(scans, labels, poses, **options):
    builder = MapBuilder(**options)
    parts = [builder.add(*entry) for entry in zip(scans, labels, poses)]
    return np.concatenate([p for p, _ in parts]), np.concatenate([c for _, c in parts]), builder


# ------------------------------------------------------------------------------------------- the map


def test_map_is_that_of_plain_loops(street):
    points, classes, builder = built(*street)
    assert points.dtype == np.float32
    assert classes.dtype == np.uint16
    # The same points in the same order: whoever comes first stays, scan by scan, row by row.
    assert np.array_equal(points, map_by_loops(*street))
    assert np.array_equal(points, map_requantised(*street))
    assert set(classes.tolist()) == {40, 50}
    assert len(builder.seen) == len(points)


def test_a_wider_cell_and_range(street):
    points, _, _ = built(*street, cell=0.5)
    assert np.array_equal(points, map_by_loops(*street, cell=0.5))
    assert len(points) < len(built(*street)[0])
    far, _, _ = built(*street, near=20.0)
    assert np.array_equal(far, map_requantised(*street, near=20.0))


def test_one_point_per_cell_and_repeating_a_scan_adds_nothing(street):
    points, _, builder = built(*street)
    cells = cells_of(points, 0.1)
    assert len(np.unique(cells, axis=0)) == len(cells)
    for entry in zip(*street):
        assert len(builder.add(*entry)[0]) == 0


def test_first_seen_wins_by_hand():
    scan = np.array([[4.02, 0, 0, 9], [4.07, 0, 0, 9], [4.12, 0, 0, 9], [3.4, 0, 0, 9]], np.float32)
    labels = np.array([40, 48, 50, 40], np.uint32)
    builder = MapBuilder()
    points, classes = builder.add(scan, labels, np.eye(4))
    # 4.02 and 4.07 share a cell; 3.4 m is the car, whatever its remission.
    assert points[:, 0].tolist() == pytest.approx([4.02, 4.12])
    assert classes.tolist() == [40, 50]
    ahead = np.eye(4)
    ahead[0, 3] = -0.01
    again, _ = builder.add(scan[:3], labels[:3], ahead)
    assert len(again) == 0
    ahead[0, 3] = 0.1
    again, classes = builder.add(scan[:3], labels[:3], ahead)
    assert again[:, 0].tolist() == pytest.approx([4.22])
    assert classes.tolist() == [50]


def test_labels_at_their_limits():
    ids = [0, 1, 2, 10, 251, 252, 259, 40 | (9 << 16), 252 | (1 << 16), 1 | (3 << 16)]
    scan = np.zeros((len(ids), 4), np.float32)
    scan[:, 0] = 10 + np.arange(len(ids))
    _, classes = MapBuilder().add(scan, np.array(ids, np.uint32), np.eye(4))
    assert classes.tolist() == [2, 10, 251, 40]


def test_cell_set_is_a_set():
    rng, seen, known = np.random.default_rng(0), CellSet(), set()
    for _ in range(12):
        cells = rng.integers(-20, 20, (500, 3)) * rng.integers(1, 300)
        rows = seen.add(cells)
        expected = []
        for row, cell in enumerate(map(tuple, cells.tolist())):
            if cell not in known:
                known.add(cell)
                expected.append(row)
        assert rows.tolist() == expected
        assert len(seen) == len(known)


def test_cell_set_is_small_on_surfaces():
    y, z = np.meshgrid(np.arange(400), np.arange(400))
    plane = np.column_stack([np.full(y.size, 3), y.ravel(), z.ravel()])
    seen = CellSet()
    assert len(seen.add(plane)) == 160_000
    assert seen.nbytes < 4 * 160_000


def test_cells_round_down_and_have_limits():
    points = np.array([[-0.05, 0.0, 0.05], [0.1, 0.25, -0.1]], np.float32)
    assert cells_of(points, 0.1).tolist() == [[-1, 0, 0], [1, 2, -2]]
    assert first_of_cells(
        np.array([[0.5] * 3, [0.51] * 3, [0.1] * 3], np.float32), 0.5
    ).tolist() == [0, 2]
    with pytest.raises(ValueError, match="104|105 km"):
        cells_of(np.array([[2e5, 0, 0]]), 0.1)


# ------------------------------------------------------------------------------------------- poses


def test_pose_by_hand(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "calib.txt").write_text("Tr: 0 -1 0 0 0 0 -1 0 1 0 0 0\n")
    (folder / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 1\n")
    expected = np.eye(4)
    expected[0, 3] = 1  # one metre along the camera's axis is one metre ahead
    assert sequence_poses(folder)[0] == pytest.approx(expected)
    (folder / "calib.txt").unlink()
    assert sequence_poses(folder)[0][:3, 3].tolist() == [0, 0, 1]
    (folder / "poses.txt").write_text("\n")
    with pytest.raises(InputError, match=r"poses\.txt: no poses"):
        sequence_poses(folder)


def test_counts_must_agree(sequence):
    assert len(posed_scans(sequence)) == 4
    lines = (sequence / "poses.txt").read_text().splitlines()
    (sequence / "poses.txt").write_text("\n".join(lines[:3]))
    with pytest.raises(InputError, match="4 scans and 3 poses; expected a pose for each scan$"):
        posed_scans(sequence, incomplete=True)
    (sequence / "poses.txt").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(InputError, match="4 scans and 5 poses.*--incomplete"):
        posed_scans(sequence)
    (sequence / "velodyne" / "000001.bin").unlink()
    found = posed_scans(sequence, incomplete=True)
    assert [scan.stem for scan, _, _ in found] == ["000000", "000002", "000003"]
    assert found[1][2] == pytest.approx(sequence_poses(sequence)[2]), "poses follow file numbers"


# ------------------------------------------------------------------------------------------- files


def test_stored_map_and_its_crops(sequence, street, monkeypatch):
    monkeypatch.setattr(map_tiles, "_CHUNK", 300)  # several pieces, as a long drive has
    report = build_sequence(sequence, sequence, Plan(labels=True))
    points, classes, _ = built(*street)
    assert (report.built, report.scans, report.points) == (1, 4, len(points))
    stored = open_map(sequence)
    assert isinstance(stored.points, np.memmap)
    assert stored.points.dtype == np.float32
    assert same_points(np.asarray(stored.points), points)
    by_point = {p.tobytes(): c for p, c in zip(points, classes.tolist())}
    assert [by_point[np.asarray(p).tobytes()] for p in stored.points] == stored.labels.tolist()
    # In a tile, points stay in the order in which they were seen.
    order = {p.tobytes(): i for i, p in enumerate(points)}
    assert len(stored.tiles) > 6
    for x, y, begin, end in stored.tiles.tolist():
        part = np.asarray(stored.points[begin:end])
        assert (np.floor(part[:, :2].astype(float) / 25) == [x, y]).all()
        seen = [order[p.tobytes()] for p in part]
        assert seen == sorted(seen)
    for pose in street[2]:
        for radius in (5.0, 20.0, 50.0):
            crop = stored.around(pose, radius)
            expected = crop_everywhere(points, pose, radius)
            assert crop.dtype == np.float32
            assert len(crop) == len(expected) == len(stored.rows_within(pose[:3, 3], radius))
            gap, match = cKDTree(expected).query(crop)
            assert gap.max() < 1e-5
            assert len(np.unique(match)) == len(match)
    away = np.eye(4)
    away[:3, 3] = 1000
    assert stored.around(away, 50).shape == (0, 3)


def test_crops_read_only_tiles_nearby(tmp_path):
    rng = np.random.default_rng(1)
    points = rng.uniform([-200, -200, 0], [200, 200, 3], (20000, 3)).astype(np.float32)
    with TileWriter(tmp_path) as writer:
        for part in np.array_split(points, 7):
            writer.add(part)
        writer.finish({})
    stored = Map(tmp_path / "map_tiles")
    for centre in ([0, 0, 1], [-199, 130, 0], [24.999, -25.0, 0]):
        ranges = list(stored._ranges(np.array(centre, float), 50.0))
        assert sum(end - begin for begin, end in ranges) < 0.2 * len(points)
        rows = stored.rows_within(centre, 50.0)
        distance = np.linalg.norm(np.asarray(stored.points, float) - centre, axis=1)
        assert rows.tolist() == np.flatnonzero(distance < 50).tolist()


def test_building_streams(tmp_path):
    """What is held in memory is a fraction of the map, and does not hold its points."""
    scans, labels, poses = drive(count=12, points=12000, seed=3, step=40.0)
    folder = write_sequence(tmp_path, "00", scans, labels, poses)
    del scans, labels
    build_sequence(folder, tmp_path / "warm")
    tracemalloc.start()
    try:
        report = build_sequence(folder, tmp_path / "cold")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.points > 60_000
    assert report.read > 150_000
    scan_bytes = 16 * 14400
    assert peak < 40 * scan_bytes, f"{peak / 1e6:.1f} MB"


def test_mapped_arrays_do_not_travel(sequence):
    build_sequence(sequence, sequence)
    stored = open_map(sequence)
    crop = stored.around(np.eye(4), 30)
    data = pickle.dumps(stored)
    assert len(data) < len(stored.points) * 4
    assert np.array_equal(pickle.loads(data).around(np.eye(4), 30), crop)


def test_plain_maps_are_read_and_tiled(sequence, street, tmp_path):
    points = map_by_loops(*street)
    np.save(sequence / "map_clean.npy", points)
    plain = open_map(sequence)
    assert plain.tiles is None
    pose = street[2][1]
    assert plain.labels is None
    assert plain.around(pose, 30) == pytest.approx(crop_everywhere(points, pose, 30), abs=1e-5)
    report = build_maps(tmp_path, plan=Plan(source="plain"), workers=1, progress=False)
    assert (report.built, report.points) == (1, len(points))
    tiled = open_map(sequence)
    assert tiled.meta["source"] == "plain"
    assert same_points(np.asarray(tiled.points), points)
    np.save(sequence / "map_clean.npy", points[:-1])
    with pytest.raises(InputError, match="made of other files"):
        open_map(sequence)
    np.save(sequence / "map_clean.npy", points.astype(int))
    (sequence / "map_tiles").rename(sequence / "other")
    with pytest.raises(InputError, match="points .* of floats"):
        open_map(sequence)


def test_no_map_is_none(sequence):
    assert open_map(sequence) is None


# ------------------------------------------------------------------------------------------- motion


def test_a_moving_object_leaves_no_trace(street, sequence):
    build_sequence(sequence, sequence)
    stored = np.asarray(open_map(sequence).points)
    without = [(s[(k & 0xFFFF) != 252], k[(k & 0xFFFF) != 252], p) for s, k, p in zip(*street)]
    assert same_points(stored, built(*zip(*without))[0])
    # The box drives at y = 3, a metre and more above the ground: nothing else is there.
    moving = sum(int(((k & 0xFFFF) == 252).sum()) for k in street[1])
    assert moving > 200
    driven = (np.abs(stored[:, 1] - 3) < 1) & (stored[:, 2] > 0.3) & (stored[:, 2] < 1.5)
    assert not driven.any()


def test_simulated_streets_become_maps(tmp_path):
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    plan = synthetic.Plan({"00": 6}, beams=24, columns=256, spacing=5.0, seed=3)
    synthetic.simulate(tmp_path, plan, workers=1, progress=False)
    folder = tmp_path / "dataset" / "sequences" / "00"
    assert build_sequence(folder, folder).built == 1
    stored = open_map(folder)
    scans, labels, poses = read_sequence(folder)
    assert same_points(np.asarray(stored.points), map_requantised(scans, labels, poses))
    # Points that move are farther from the map than points that stand.
    tree, apart, together = cKDTree(np.asarray(stored.points)), [], []
    for scan, label, pose in zip(scans, labels, poses):
        ids = label & 0xFFFF
        world = scan[:, :3].astype(float) @ pose[:3, :3].T + pose[:3, 3]
        far = np.linalg.norm(scan[:, :3], axis=1) > 3.5
        gaps = tree.query(world)[0]
        apart += gaps[(ids >= 252) & far].tolist()
        together += gaps[(ids > 1) & (ids < 252) & far].tolist()
    assert len(apart) > 20, "the street has traffic"
    assert max(together) < 0.1 * 3**0.5 + 1e-4
    assert np.median(apart) > 0.3
    # Consecutive scans see the same surfaces: poses and Tr are used as they are meant.
    first = MapBuilder()
    first.add(scans[0], labels[0], poses[0])
    mapped, _ = first.add(scans[1], labels[1], poses[1])
    assert len(mapped) < (labels[1] > 1).sum()


# ------------------------------------------------------------------------------------------- all sequences


def test_restart_keeps_what_is_finished(tmp_path, street):
    for name in ("00", "01"):
        write_sequence(tmp_path, name, *street)
    write_sequence(tmp_path, "11", street[0], [None] * 4, street[2])  # a test drive has no labels
    report = build_maps(tmp_path, workers=1, progress=False)
    assert (report.built, report.kept, report.scans, report.problems) == (2, 0, 8, [])
    first = tmp_path / "dataset" / "sequences" / "00" / "map_tiles"
    before = (first / "points.npy").stat().st_mtime_ns
    (first.parent / ".map_tiles.77.tmp").mkdir()  # as a killed run leaves it
    again = build_maps(tmp_path, workers=1, progress=False)
    assert (again.built, again.kept, again.points) == (0, 2, report.points)
    assert (first / "points.npy").stat().st_mtime_ns == before
    (first / "tiles.npy").unlink()
    other = build_maps(tmp_path, workers=1, progress=False)
    assert (other.built, other.kept) == (1, 1)
    assert not list(first.parent.glob(".map_tiles*"))
    assert build_maps(tmp_path, plan=Plan(cell=0.2), workers=1, progress=False).built == 2


def test_a_stale_map_is_refused_and_made_anew(sequence, street, tmp_path):
    build_sequence(sequence, sequence)
    open_map(sequence)
    poses = (sequence / "poses.txt").read_text()
    (sequence / "poses.txt").write_text(poses.replace("e+00", "e+01", 1))
    with pytest.raises(InputError, match="made of other files than those in"):
        open_map(sequence)
    assert open_map(sequence, check=False) is not None
    assert build_maps(tmp_path, workers=1, progress=False).built == 1
    open_map(sequence)
    label = sequence / "labels" / "000000.label"
    label.write_bytes(label.read_bytes()[::-1])  # the same length
    with pytest.raises(InputError, match="made of other files"):
        open_map(sequence)
    (sequence / "velodyne" / "000002.bin").write_bytes(b"\0" * 160)
    with pytest.raises(InputError, match="made of other files"):
        open_map(sequence)


def test_maps_of_another_folder(sequence, tmp_path):
    out = tmp_path / "maps"
    build_maps(tmp_path, out, workers=1, progress=False)
    place = out / "dataset" / "sequences" / "00"
    assert open_map(sequence) is None
    assert len(open_map(sequence, place).points) > 100


def test_shards_processes_and_damage(tmp_path, street, monkeypatch):
    for name in ("00", "01", "02", "03"):
        folder = write_sequence(tmp_path, name, *street)
    (folder / "labels" / "000001.label").unlink()
    asked, told = [], []

    def as_processes(work, jobs, workers):
        """What crosses to a process and back has to survive pickling."""
        asked.append(workers)
        for job in jobs:
            yield pickle.loads(pickle.dumps(work))(pickle.loads(pickle.dumps(job)))

    monkeypatch.setattr(maps, "run", as_processes)
    part = build_maps(tmp_path, shard="1/2", workers=1, progress=False)  # 00 and 02
    assert (part.built, part.problems, asked) == (2, [], [])
    report = build_maps(tmp_path, shard="2/2", workers=2, tell=told.append, progress=False)
    assert (report.built, len(told), asked) == (1, 1, [2])
    assert told[0].startswith(str(folder / "labels" / "000001.label"))
    assert "\n" not in told[0]
    there = [open_map(folder.parent / name) for name in ("00", "01", "02")]
    for stored in there:
        assert np.array_equal(stored.points, there[0].points)


@pytest.mark.slow
def test_two_processes(tmp_path, street):
    for name in ("00", "01"):
        write_sequence(tmp_path, name, *street)
    report = build_maps(tmp_path, workers=2, progress=False)
    assert (report.built, report.scans, report.problems) == (2, 8, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "poses.txt").unlink(), r"poses\.txt: cannot be read"),
        (lambda f: (f / "calib.txt").write_text("P0: 1 2"), r"calib\.txt: row 0 should hold 12"),
        (lambda f: (f / "velodyne" / "000001.bin").write_bytes(b"123"), r"000001\.bin: 3 bytes"),
        (lambda f: (f / "labels" / "000001.label").write_bytes(b"1234"), r"000001\.label: 4 bytes"),
        (lambda f: damage(f, np.nan), r"000001\.bin: row 5 is not finite"),
        (lambda f: shift(f, 1e7), r"000000\.bin: points lie more than 10\d km .* check poses"),
        (lambda f: relabel(f, 252), "no point is left for the map"),
        (
            lambda f: (f / "velodyne" / "000001.bin").rename(f / "velodyne" / "one.bin"),
            "row i of poses",
        ),
    ],
)
def test_bad_input_in_one_line(sequence, tmp_path, change, message):
    change(sequence)
    with pytest.raises(InputError, match=message) as caught:
        build_sequence(sequence, tmp_path / "out")
    assert "\n" not in str(caught.value)
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert left == []


def damage(folder, value):
    path = folder / "velodyne" / "000001.bin"
    scan = np.fromfile(path, "<f4").reshape(-1, 4).copy()
    scan[5, 1] = value
    path.write_bytes(scan.tobytes())


def shift(folder, metres):
    (folder / "calib.txt").unlink()
    row = f"1 0 0 {metres} 0 1 0 0 0 0 1 0\n"
    (folder / "poses.txt").write_text(row * 4)


def relabel(folder, label):
    for path in (folder / "labels").iterdir():
        path.write_bytes(np.full(len(path.read_bytes()) // 4, label, "<u4").tobytes())


def test_points_that_are_not_finite_can_be_dropped(sequence, tmp_path):
    damage(sequence, np.inf)
    report = build_sequence(sequence, tmp_path / "out", Plan(nonfinite="drop"))
    assert report.built == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "meta.json").write_text("{"), r"meta\.json: not a description"),
        (lambda f: (f / "points.npy").write_bytes(b"x"), r"points\.npy: not a readable array"),
        (
            lambda f: np.save(f / "points.npy", np.zeros((9, 3), np.float32)),
            "do not belong together",
        ),
        (lambda f: np.save(f / "tiles.npy", np.zeros((2, 3))), r"tiles\.npy: expected shape"),
        (lambda f: version(f), r"meta\.json: version 0, this is 1"),
    ],
)
def test_damaged_maps_are_refused(sequence, change, message):
    build_sequence(sequence, sequence)
    change(sequence / "map_tiles")
    with pytest.raises(InputError, match=message):
        open_map(sequence)
    assert build_sequence(sequence, sequence).built == 1, "and can be made again"


def version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan(cell=0.0)}, "--cell: 0.0; use metres"),
        ({"plan": Plan(near=-1.0)}, "--near: -1.0"),
        ({"plan": Plan(nonfinite="skip")}, "nonfinite='skip'"),
        ({"plan": Plan(source="plain", labels=True)}, "--labels: map_clean"),
        ({"plan": Plan(source="plain")}, r"no sequence with map_clean\.npy"),
        ({"shard": "3/2"}, "--shard: '3/2'; use i/n"),
        ({"sequences": ["x"]}, "--sequences: 'x'; use numbers"),
        ({"sequences": []}, r"no sequence with labels/\*\.label"),
    ],
)
def test_bad_options(tmp_path, street, options, message):
    write_sequence(tmp_path, "00", *street)
    with pytest.raises(InputError, match=message):
        build_maps(tmp_path, workers=1, progress=False, **options)


def test_missing_root(tmp_path):
    with pytest.raises(InputError, match="is no folder; --data-root must hold dataset/sequences"):
        build_maps(tmp_path / "nothing", progress=False)


def tool(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, "maps", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(TOOL, run_name="__main__")
    output = capsys.readouterr()
    return done.value.code, output.out, output.err


def test_the_tool(tmp_path, street, monkeypatch, capsys):
    folder = write_sequence(tmp_path, "00", *street)
    code, out, _ = tool(monkeypatch, capsys, "--data-root", tmp_path, "--workers", 1, "--labels")
    assert code == 0
    assert out.startswith("1 maps built from 4 scans")
    assert open_map(folder).labels is not None
    code, out, _ = tool(monkeypatch, capsys, "--data-root", tmp_path, "--labels")
    assert code == 0
    assert "1 kept" in out
    (folder / "labels" / "000002.label").unlink()
    code, _, err = tool(monkeypatch, capsys, "--data-root", tmp_path)
    assert code == 2
    assert "000002.label: missing" in err
    code, _, err = tool(monkeypatch, capsys, "--data-root", tmp_path, "--workers", 0)
    assert code == 2
    assert err == "error: --workers: 0; use 1 or more\n"


# ------------------------------------------------------------------------------------------- real scans


def test_real_scans_become_a_map(samples, tmp_path):
    root = samples / "semantickitti"
    plan = Plan(incomplete=True, labels=True)
    report = build_maps(root, tmp_path, plan, ["00", "08"], workers=1, progress=False)
    assert (report.built, report.scans, report.problems) == (2, 9, [])
    source = root / "dataset" / "sequences"
    for name in ("00", "08"):
        folder = tmp_path / "dataset" / "sequences" / name
        stored = open_map(source / name, folder)
        points = np.asarray(stored.points)
        assert len(points) == len(np.unique(cells_of(points, 0.1), axis=0))
        assert not set(np.unique(stored.labels)) & {0, 1, *range(252, 260)}
        # Every static point of every scan has a neighbour in the map, in its own cell.
        scans, labels, poses = read_sequence(source / name)
        tree = cKDTree(points)
        scan, ids, pose = scans[-1], labels[-1] & 0xFFFF, poses[-1]
        kept = (ids > 1) & (ids < 252) & (np.linalg.norm(scan[:, :3], axis=1) > 3.5)
        world = scan[kept][::50, :3].astype(float) @ pose[:3, :3].T + pose[:3, 3]
        assert tree.query(world)[0].max() < 0.1 * 3**0.5 + 1e-4
        assert len(points) < 0.6 * sum(map(len, scans))
    with pytest.raises(InputError, match="and 4541 poses"):
        build_sequence(source / "00", tmp_path / "x", maps.Plan())
