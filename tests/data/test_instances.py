"""The database of objects: toy scans with one id in two classes, all layouts, damaged files, the real samples."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pointcept_kd.data.instances as module
from pointcept_kd.data.instances import InstanceDatabase, build, counts_by_class, layout_of
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import write_png
from pointcept_kd.data.semantic_kitti import LEARNING_MAP
from pointcept_kd.host import InputError

from .nuscenes_world import tables, write

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
CALIB = "P2: 1 0 0 0 0 1 0 0 0 0 1 0\nTr: 1 0 0 0 0 1 0 0 0 0 1 0\n"


def scan_of(seed, labels):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(len(labels), 4)) * (10, 10, 1, 0.2)
    return points.astype("<f4")


def label(raw, instance=0):
    return instance << 16 | raw


def toy(root):
    """Sequence 00 with three scans, 08 with one; car and bicycle share the id 5, road and building have ids too."""
    content = {}
    for sequence, number in (("00", 0), ("00", 1), ("00", 2), ("08", 0)):
        labels = [label(10, 5)] * 7 + [label(40)] * 9 + [label(11, 5)] * 4 + [label(252, 5)] * 3
        labels += [label(40, 5)] * 6 + [label(30, 1)] * (2 + number) + [label(10)] * 8
        labels = np.random.default_rng(number).permutation(np.array(labels, "<u4"))
        points = scan_of(number, labels)
        folder = root / "dataset" / "sequences" / sequence
        for name, suffix, array in (("velodyne", "bin", points), ("labels", "label", labels)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{number:06d}.{suffix}").write_bytes(array.tobytes())
        content[f"{sequence}_{number:06d}"] = points, labels
    return content


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_toy_scan(tmp_path):
    content = toy(tmp_path)
    counts = build(tmp_path, min_points=3, workers=1, progress=False)
    # Persons have 2, 3 and 4 points; moving car 5 is not car 5; roads and cars without an id are no objects.
    assert counts["car"] == 6
    assert counts["bicycle"] == 3
    assert counts["person"] == 2
    assert sum(counts.values()) == 11
    expected = {}
    for scan, (points, labels) in content.items():
        for raw, instance, name in (
            (10, 5, "car"),
            (252, 5, "car"),
            (11, 5, "bicycle"),
            (30, 1, "person"),
        ):
            chosen = [row for row, value in enumerate(labels) if value == label(raw, instance)]
            if scan.startswith("00") and len(chosen) >= 3:
                expected[f"{name}/{scan}_{label(raw, instance)}.bin"] = points[chosen].tobytes()
    found = files_below(tmp_path / "instances")
    index = found.pop("index.json")
    assert found == expected
    database = InstanceDatabase(tmp_path / "instances")
    assert len(database) == len(expected) == 11
    for row in range(11):
        points = database.load(row)
        assert points.dtype == np.float32
        assert len(points) == database.points[row]
        x, y = points[:, :2].astype(float).mean(0)
        assert database.ranges[row] == pytest.approx(np.hypot(x, y), abs=1e-4)
        assert database.azimuths[row] == pytest.approx(np.arctan2(y, x), abs=1e-5)
        assert database.path(row).parent.name == database.names[database.classes[row]]
    assert counts_by_class(database) == {"car": 6, "bicycle": 3, "person": 2}
    # Again: nothing is written anew but the index, which is the same.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "instances").rglob("*.bin")}
    assert build(tmp_path, min_points=3, workers=1, progress=False) == counts
    assert files_below(tmp_path / "instances") == {**found, "index.json": index}
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_index_does_not_depend_on_who_comes_first(tmp_path, monkeypatch):
    toy(tmp_path)
    build(tmp_path, min_points=3, workers=1, progress=False)
    first = files_below(tmp_path / "instances")
    monkeypatch.setattr(module, "_CHUNK", 1)
    monkeypatch.setattr(module, "run", lambda work, jobs, workers: map(work, reversed(jobs)))
    other = tmp_path / "other"
    build(tmp_path, out=other, min_points=3, progress=False)
    assert files_below(other) == first


def test_scans_that_came_later(tmp_path):
    toy(tmp_path)
    before = build(tmp_path, min_points=3, workers=1, progress=False)
    folder = tmp_path / "dataset" / "sequences" / "00"
    for name, suffix in (("velodyne", "bin"), ("labels", "label")):
        content = (folder / name / f"000000.{suffix}").read_bytes()
        (folder / name / f"000009.{suffix}").write_bytes(content)
    after = build(tmp_path, min_points=3, workers=1, progress=False)
    assert (before["car"], after["car"]) == (6, 8)


def test_a_damaged_object_is_made_anew(tmp_path):
    toy(tmp_path)
    build(tmp_path, min_points=3, workers=1, progress=False)
    whole = files_below(tmp_path / "instances")
    database = InstanceDatabase(tmp_path / "instances")
    database.path(0).write_bytes(database.path(0).read_bytes()[:-16])
    with pytest.raises(InputError, match=r"points, the index has"):
        database.load(0)
    database.path(1).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        database.load(1)
    build(tmp_path, min_points=3, workers=1, progress=False)
    assert files_below(tmp_path / "instances") == whole


def test_training_scans_alone(tmp_path):
    toy(tmp_path)
    for split in ("08", "val", "test", "11"):
        with pytest.raises(
            InputError, match=f"--split {split}: objects are cut out of training scans alone"
        ):
            build(tmp_path, splits=["00", split], progress=False)
    with pytest.raises(InputError, match="--min-points: 0"):
        build(tmp_path, min_points=0, progress=False)
    with pytest.raises(
        InputError, match="--layout kitti: use semantic_kitti, nuscenes, waymo or auto"
    ):
        build(tmp_path, layout="kitti", progress=False)
    with pytest.raises(InputError, match="holds neither dataset/sequences"):
        layout_of(tmp_path / "dataset")
    assert not (tmp_path / "instances").exists()


def test_scan_without_labels(tmp_path):
    toy(tmp_path)
    (tmp_path / "dataset/sequences/00/labels/000001.label").unlink()
    with pytest.raises(InputError, match=r"000001.label: cannot be read"):
        build(tmp_path, workers=1, progress=False)
    assert not (tmp_path / "instances" / "index.json").exists()


def test_no_object_is_large_enough(tmp_path):
    toy(tmp_path)
    counts = build(tmp_path, workers=1, progress=False)  # 40 points
    assert not sum(counts.values())
    assert len(InstanceDatabase(tmp_path / "instances")) == 0


# --------------------------------------------------------------------------------------------- other layouts


@pytest.fixture
def world(tmp_path):
    """nuScenes with two training scenes, all of whose points are labelled cars or pedestrians."""
    write(tmp_path / "raw", tables({"scene-0001": 2}))
    write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path, sweeps=2)
    reader = NuScenesDataset(data_root=str(tmp_path), sweeps=2)
    for idx in range(len(reader)):
        points = len(reader.load(idx)["coord"])
        values = np.where(np.arange(points) % 2, 17, 2).astype(np.uint8)  # car, adult
        reader.label_path(idx).write_bytes(values.tobytes())
    return tmp_path


def test_panoptic_labels(world):
    reader = NuScenesDataset(data_root=str(world), sweeps=2)
    folder = world / "raw" / "panoptic" / "v1.0-trainval"
    folder.mkdir(parents=True)
    expected = Counter()
    for idx in range(len(reader)):
        data = reader.load(idx)
        order = np.arange(len(data["coord"]))
        # Id 1 in both classes, 0 is no object; the last rows say car where lidarseg says pedestrian.
        panoptic = np.where(order % 2, 17, 2) * 1000 + (order % 5 > 0)
        path = folder / f"{reader.get_data_name(idx)}_panoptic.npz"
        np.savez_compressed(path, data=panoptic.astype(np.uint16))
        for name, odd in (("car", 1), ("pedestrian", 0)):
            rows = [r for r in order if r % 2 == odd and r % 5]
            number = (17 if odd else 2) * 1000 + 1
            scan = np.hstack([data["coord"], data["strength"]])[rows]
            expected[f"{name}/{reader.get_data_name(idx)}_{number}.bin"] = scan.tobytes()
    counts = build(world, min_points=3, workers=1, progress=False)
    assert counts["car"] == counts["pedestrian"] == 2
    found = files_below(world / "instances")
    del found["index.json"]
    assert found == dict(expected)
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="no panoptic labels can be read"):
        build(world, workers=1, progress=False)
    path.unlink()
    with pytest.raises(InputError, match="no panoptic labels can be read"):
        build(world, workers=1, progress=False)


def test_boxes_where_there_are_no_panoptic_labels(world, monkeypatch):
    # Two boxes: the first around all points that are left, the second around those that are right.
    boxes = np.array([[0, 500, 0, 1000, 1000, 1000, 0], [0, -500, 0, 1000, 1000, 1000, 0]], float)
    monkeypatch.setattr(NuScenesDataset, "boxes", lambda self, idx: {"boxes": boxes})
    build(world, min_points=1, workers=1, progress=False)
    reader, database = (
        NuScenesDataset(data_root=str(world), sweeps=2),
        InstanceDatabase(world / "instances"),
    )
    assert database.layout == "nuscenes"
    expected = 0
    for idx in range(len(reader)):
        data = reader.load(idx)
        for number, side in ((1, data["coord"][:, 1] >= 0), (2, data["coord"][:, 1] < 0)):
            for thing in (3, 6):
                rows = side & (data["segment"] == thing)
                path = (
                    world
                    / "instances"
                    / database.names[thing]
                    / f"{reader.get_data_name(idx)}_{number}.bin"
                )
                found = np.frombuffer(path.read_bytes(), "<f4").reshape(-1, 4)
                np.testing.assert_array_equal(found[:, :3], data["coord"][rows])
                np.testing.assert_array_equal(found[:, 3:], data["strength"][rows])
                expected += 1
    assert len(database) == expected == 8


def test_waymo(tmp_path):
    rng = np.random.default_rng(0)
    for split, stamp in (("training", "1"), ("training", "2"), ("validation", "3")):
        folder = tmp_path / split / "segment" / stamp
        folder.mkdir(parents=True)
        np.save(folder / "coord.npy", rng.normal(size=(120, 3)).astype(np.float32))
        np.save(folder / "strength.npy", rng.random((120, 1)).astype(np.float32))
        np.save(folder / "segment.npy", np.repeat([0, 6, 17], 40).astype(np.int32))
        if stamp != "2":
            np.save(folder / "instance.npy", np.tile([7, 0, -1, 9], 30).astype(np.int32))
    with pytest.raises(InputError, match=r"2/instance.npy is missing"):
        build(tmp_path, min_points=5, workers=1, progress=False)
    np.save(tmp_path / "training/segment/2/instance.npy", np.zeros(7, np.int32))
    with pytest.raises(InputError, match="7 instance ids for 120 points"):
        build(tmp_path, min_points=5, workers=1, progress=False)
    np.save(tmp_path / "training/segment/2/instance.npy", np.zeros(120, np.float32))
    with pytest.raises(InputError, match="float32, expected whole numbers"):
        build(tmp_path, min_points=5, workers=1, progress=False)
    (tmp_path / "training/segment/2/instance.npy").write_bytes(b"no")
    with pytest.raises(InputError, match="not a readable .npy array"):
        build(tmp_path, min_points=5, workers=1, progress=False)
    np.save(tmp_path / "training/segment/2/instance.npy", np.zeros(120, np.int32))
    counts = build(tmp_path, min_points=5, workers=1, progress=False)
    assert (
        counts["Car"] == counts["Pedestrian"] == 2
    )  # ids 7 and 9, ten points each; roads are no objects
    assert sum(counts.values()) == 4
    assert (tmp_path / "instances/Car/segment_1_7.bin").stat().st_size == 160


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.pop("range"),
        lambda note: note["points"].pop(),
        lambda note: note["class"].__setitem__(0, 40),
        lambda note: note["scan"].__setitem__(0, -1),
        lambda note: note["scans"].__setitem__(0, "../../secret"),
        lambda note: note["names"].__setitem__(0, ".."),
        lambda note: note["columns"].append("ring"),
        lambda note: note["id"].__setitem__(0, "five"),
    ],
)
def test_no_index(tmp_path, change):
    toy(tmp_path)
    build(tmp_path, min_points=3, workers=1, progress=False)
    path = tmp_path / "instances" / "index.json"
    note = json.loads(path.read_text())
    change(note)
    path.write_text(json.dumps(note))
    with pytest.raises(InputError, match="no index of objects"):
        InstanceDatabase(tmp_path / "instances")


def test_no_database(tmp_path):
    with pytest.raises(
        InputError, match=r"index.json is missing; make it: python tools/prepare_data.py instances"
    ):
        InstanceDatabase(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match="no index of objects"):
        InstanceDatabase(tmp_path)


# -------------------------------------------------------------------------------------------- tool, real data


def test_tool(tmp_path, capsys):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    toy(tmp_path)
    command = ["instances", "--data-root", str(tmp_path), "--min-points", "3", "--workers", "1"]
    picture = tmp_path / "both.png"
    assert tool.main([*command, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "instances: 11 objects\ncar 6, bicycle 3, " in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for wrong, text in (
        (["--split", "08"], "--split 08: objects are cut"),
        (["--workers", "0"], "--workers: 0"),
    ):
        assert tool.main([*command, *wrong]) == 2
        assert text in capsys.readouterr().err


def test_tool_with_images(tmp_path, capsys):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    content = toy(tmp_path)
    command = ["instances", "--data-root", str(tmp_path), "--min-points", "3", "--workers", "1"]
    command += ["--split", "00", "--image-patches"]
    assert tool.main(command) == 2
    assert "calib.txt" in capsys.readouterr().err
    folder = tmp_path / "dataset" / "sequences" / "00"
    (folder / "image_2").mkdir()
    # One axis of the scan is that of the camera; bicycle 5 stands before it in every scan, 12 pixels wide.
    (folder / "calib.txt").write_text(
        "P2: 20 0 30 0 0 20 20 0 0 0 1 0\nTr: 1 0 0 0 0 1 0 0 0 0 1 0\n"
    )
    square = [(-1.5, -1, 5), (1.5, -1, 5), (1.5, 1, 5), (-1.5, 1, 5.2)]
    for number in range(3):
        points, labels = content[f"00_{number:06d}"]
        points[labels == label(11, 5), :3] = square
        (folder / "velodyne" / f"{number:06d}.bin").write_bytes(points.tobytes())
        image = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        write_png(folder / "image_2" / f"{number:06d}.png", image)
    assert tool.main(command) == 0
    database = InstanceDatabase(tmp_path / "instances")
    assert database.cameras == ("image_2",)
    found = set()
    for row in range(len(database)):
        expected = 0
        for x, y, z, _ in database.load(row).astype(float):
            u, v = 20 * x / z + 30, 20 * y / z + 20
            expected += z > 1 and 0 < u < 59 and 0 < v < 39
        assert database.visible[row].tolist() == [expected]
        assert database.camera[row] == (0 if expected else -1)
        if database.patches[row]:
            found.add(database.path(row).stem)
            patch = database.patch(row)
            assert patch.camera.name == "image_2"
            assert len(patch.depth) == database.points[row]
    assert {f"00_{number:06d}_{label(11, 5)}" for number in range(3)} <= found
    out = capsys.readouterr().out
    assert f"instances: {len(database)} objects\n{len(found)} of them with a picture\n" in out
    first = files_below(tmp_path / "instances")
    assert sum(name.endswith(".npz") for name in first) == len(found)
    assert tool.main(command) == 0
    assert files_below(tmp_path / "instances") == first


def test_real_scans(samples, tmp_path):
    root = samples / "semantickitti"
    out = tmp_path / "objects"
    counts = build(root, out=out, workers=1, progress=False)
    expected, sizes = Counter(), Counter()
    names = list(counts)  # of the train ids 0 to 7
    for path in sorted(root.glob("dataset/sequences/*/labels/*.label")):
        if path.parent.parent.name == "08":  # validation
            continue
        values, number = np.unique(np.fromfile(path, "<u4"), return_counts=True)
        for value, points in zip(values.tolist(), number.tolist(), strict=True):
            thing = LEARNING_MAP[value & 0xFFFF]
            if value >> 16 and 0 <= thing < 8 and points >= 40:
                expected[names[thing]] += 1
                sizes[names[thing]] += points
    assert {name: count for name, count in counts.items() if count} == dict(expected)
    assert expected["car"] > 50
    database = InstanceDatabase(out)
    for thing in range(8):
        assert database.points[database.classes == thing].sum() == sizes[names[thing]]
    assert not list(root.rglob("instances"))
    # All points of an object are in the scan, with its reflectance.
    row = int(np.argmax(database.points))
    path = database.path(row)
    scan = np.fromfile(
        root / "dataset/sequences" / path.name[:2] / "velodyne" / f"{path.name[3:9]}.bin", "<f4"
    )
    every = {point.tobytes() for point in scan.reshape(-1, 4)}
    assert all(point.tobytes() in every for point in database.load(row))
