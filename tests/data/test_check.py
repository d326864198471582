"""The data checker: every planted damage is found by the name of its file, and nothing else is."""

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data import check as module
from pointcept_kd.data.check import Problem, as_problem, check, detect, summary, survey
from pointcept_kd.data.pictures import write_png
from pointcept_kd.host import InputError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
POINTS = 300
TR = "Tr: 0 -1 0 0.1 0 0 -1 0.2 1 0 0 0.3"
P2 = "P2: 700 0 60 40 0 700 20 0 0 0 1 0"


def found(root, **options):
    """Broken file to kinds, hints apart."""
    files = {}
    for path, lines in check(root, **options):
        for line in lines:
            assert str(line).count("\n") == 0
            assert str(line).startswith(f"{path}"), "a line begins with the file that it is about"
            files.setdefault(str(path.relative_to(root)), []).append(
                f"hint: {line.kind}" if line.hint else line.kind
            )
    return files


# ---- SemanticKITTI -------------------------------------------------------------------------------


def invented(root):
    """Two drives of six scans with images, and one of the test split without labels."""
    rng = np.random.default_rng(0)
    for name in ("00", "08", "11"):
        folder = root / "dataset" / "sequences" / name
        for part in ("velodyne", "labels", "image_2"):
            (folder / part).mkdir(parents=True)
        for i in range(6):
            scan = rng.normal(0, 20, (POINTS, 4)).astype("<f4")
            scan[:, 3] = rng.random(POINTS)
            (folder / "velodyne" / f"{i:06d}.bin").write_bytes(scan.tobytes())
            raw = rng.choice([0, 10, 40, 252], POINTS).astype("<u4") | (np.uint32(5) << 16)
            if name != "11":
                (folder / "labels" / f"{i:06d}.label").write_bytes(raw.astype("<u4").tobytes())
        for i in range(3):
            picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            write_png(folder / "image_2" / f"{i:06d}.png", picture)
        tables(folder, 6, [TR, P2])
    return root


def tables(folder, rows, calibration):
    angles = np.arange(rows) / 10
    poses = [
        f"{np.cos(a):.9e} {-np.sin(a):.9e} 0 {a} {np.sin(a):.9e} {np.cos(a):.9e} 0 0 0 0 1 0"
        for a in angles
    ]
    (folder / "calib.txt").write_text("\n".join(calibration) + "\n")
    (folder / "poses.txt").write_text("\n".join(poses) + "\n")
    (folder / "times.txt").write_text("\n".join(f"{a:e}" for a in angles) + "\n")


def shortened(samples, root):
    """The real samples, every scan cut to its first points."""
    source = samples / "semantickitti" / "dataset" / "sequences"
    for path in source.rglob("*"):
        target = root / "dataset" / "sequences" / path.relative_to(source)
        if path.suffix in (".bin", ".label"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[: 3000 * (16 if path.suffix == ".bin" else 4)])
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return root


@pytest.fixture(scope="session", params=["invented", "real"])
def whole(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "real":
        return shortened(request.getfixturevalue("samples"), root)
    return invented(root)


@pytest.fixture
def copied(whole, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(whole, root)
    return root


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def value(dtype, row, new):
    def change(content):
        array = np.frombuffer(content, dtype).copy()
        array.flat[row] = new
        return array.tobytes()

    return change


def line(row, new):
    def change(content):
        rows = content.decode().splitlines()
        rows[row : row + 1] = [new] if new is not None else []
        return ("\n".join(rows) + "\n").encode()

    return change


def test_an_undamaged_set_has_no_problems(copied):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    assert found(copied) == {}
    assert found(copied, kind="semantic_kitti", workers=1) == {}


def test_fifteen_kinds_of_damage_are_found_and_nothing_else(copied):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    s = copied / "dataset" / "sequences"
    first, second, third, fourth = sorted((s / "00" / "velodyne").iterdir())[:4]
    labels = s / "00" / "labels"
    expected = {}

    def plant(path, kind):
        expected.setdefault(str(path.relative_to(copied)), []).append(kind)

    edit(first, lambda content: content[:-3])
    plant(first, "wrong size or content")
    second.write_bytes(b"")
    plant(second, "empty")
    edit(third, value("<f4", 4 * 7 + 1, np.nan))
    plant(third, "not finite")
    edit(fourth, value("<f4", 4 * 9, 2500.0))
    plant(fourth, "far away")
    eighth = sorted((s / "08" / "velodyne").iterdir())[:3]
    edit(eighth[0], value("<f4", 4 * 9 + 3, 200.0))
    plant(eighth[0], "strength")
    eighth[1].unlink()
    plant(s / "08" / "labels" / f"{eighth[1].stem}.label", "labels without scan")
    eighth[2].rename(eighth[2].with_suffix(".old"))
    eighth[2].symlink_to("nowhere.bin")
    plant(eighth[2], "missing")
    edit(labels / f"{third.stem}.label", lambda content: content[:-4])
    plant(labels / f"{third.stem}.label", "wrong size or content")
    edit(labels / f"{fourth.stem}.label", value("<u4", 5, 77))
    plant(labels / f"{fourth.stem}.label", "unknown class")
    (labels / f"{second.stem}.label").unlink()
    plant(labels / f"{second.stem}.label", "missing")
    twin = first.with_name(f"{int(first.stem):07d}.bin")  # sorted before the others
    shutil.copyfile(third.with_name(fourth.name), twin)
    edit(twin, value("<f4", 4 * 9, 2.0))
    shutil.copyfile(labels / f"{first.stem}.label", labels / f"{twin.stem}.label")
    plant(max(first, twin), "duplicate")
    image = min((s / "00" / "image_2").iterdir())
    image.write_bytes(b"")
    plant(image, "image")
    edit(s / "00" / "poses.txt", line(2, " ".join(["1"] * 12)))
    plant(s / "00" / "poses.txt", "no rotation")
    edit(s / "08" / "poses.txt", line(1, "1 0 0 0 0 1 0 0 0 0 nan 0"))
    plant(s / "08" / "poses.txt", "numbers")
    times = (s / "08" / "times.txt").read_text().splitlines()
    edit(s / "08" / "times.txt", line(3, times[1]))
    plant(s / "08" / "times.txt", "times")
    calibration = (s / "00" / "calib.txt").read_text().splitlines()
    kept = [text for text in calibration if not text.startswith("P2")]
    (s / "00" / "calib.txt").write_text("\n".join(kept))
    plant(s / "00" / "calib.txt", "calibration")
    assert found(copied) == expected
    assert found(copied, workers=1) == expected


@pytest.fixture
def drive(tmp_path):
    invented(tmp_path)
    for name in ("08", "11"):
        shutil.rmtree(tmp_path / "dataset" / "sequences" / name)
    return tmp_path / "dataset" / "sequences" / "00"


REFLECTION = "-1 0 0 0 0 1 0 0 0 0 1 0"


@pytest.mark.parametrize(
    ("damage", "file", "kinds", "text"),
    [
        (lambda d: (d / "poses.txt").unlink(), "poses.txt", ["missing"], "missing; copy it"),
        (lambda d: (d / "poses.txt").write_text(""), "poses.txt", ["empty"], "is empty"),
        (lambda d: (d / "poses.txt").write_bytes(b"\xff\xfe\x00"), "poses.txt", ["unreadable"],
         "cannot be read"),
        (lambda d: edit(d / "poses.txt", line(1, None)), "poses.txt", ["too few rows"],
         "5 rows, but scans up to 000005, expected 6"),
        (lambda d: edit(d / "poses.txt", line(4, REFLECTION)), "poses.txt", ["no rotation"],
         "row 4 is a reflection"),
        (lambda d: edit(d / "times.txt", line(1, None)), "times.txt", ["too few rows"], "5 rows"),
        (lambda d: edit(d / "times.txt", line(0, "zero")), "times.txt", ["numbers"],
         "row 0 should hold 1 finite numbers, got 'zero'"),
        (lambda d: (d / "calib.txt").unlink(), "calib.txt", ["missing"], "cannot be read"),
        (lambda d: edit(d / "calib.txt", line(0, "Tr: 1 2")), "calib.txt",
         ["wrong size or content"], "row 0 should hold 12"),
        (lambda d: edit(d / "calib.txt", line(0, None)), "calib.txt", ["calibration"],
         "no row Tr, which poses needs"),
        (lambda d: edit(d / "calib.txt", line(0, "Tr: 2 0 0 0 0 2 0 0 0 0 2 0")), "calib.txt",
         ["calibration"], "Tr is no rotation"),
        (lambda d: edit(d / "calib.txt", line(1, "P2: 0 0 60 0 0 0 20 0 0 0 1 0")), "calib.txt",
         ["calibration"], "P2 has a focal length of 0"),
        (lambda d: edit(d / "image_2" / "000001.png", lambda c: c[: len(c) // 2]),
         "image_2/000001.png", ["image"], "not a readable picture"),
        (lambda d: write_png(d / "image_2" / "000002.png", np.zeros((21, 30), np.uint8)),
         "image_2/000002.png", ["image size"], "30 x 21 pixels, the other images.* 30 x 20"),
        (lambda d: (d / "velodyne" / "000003.bin").write_bytes(bytes(16 * POINTS)),
         "velodyne/000003.bin", ["all points equal", "hint: strength all 0"], "all 300 points"),
        (lambda d: edit(d / "velodyne" / "000003.bin", value("<f4", 3, -0.5)),
         "velodyne/000003.bin", ["strength"], "strength from -0.5 to 0.99.*expected 0 to 1"),
        (lambda d: edit(d / "velodyne" / "000003.bin", value("<f4", 3, np.inf)),
         "velodyne/000003.bin", ["not finite"], "1 strengths are not finite, the first in row 0"),
        (lambda d: shutil.copyfile(d / "velodyne" / "000000.bin", d / "velodyne" / "a.bin"),
         "velodyne/a.bin", ["name"], "the file name is no number"),
        (lambda d: shutil.rmtree(d / "labels"), "labels", ["hint: no labels"], "no labels"),
        (lambda d: (d / "velodyne" / "000003.bin").unlink()
         or (d / "velodyne" / "000003.bin").mkdir(), "velodyne/000003.bin", ["unreadable"],
         "cannot be read"),
    ],
)  # fmt: skip
def test_each_damage_has_its_line(drive, damage, file, kinds, text):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    damage(drive)
    root = drive.parents[2]
    files = found(root)
    if file.endswith("a.bin"):
        assert files.pop("dataset/sequences/00/labels/a.label") == ["missing"]
    assert files == {f"dataset/sequences/00/{file}": kinds}
    lines = [str(problem) for _, problems in check(root) for problem in problems]
    assert any(module.re.search(text, one) for one in lines), lines


def test_a_file_without_permission(drive, monkeypatch):
    scan, real = drive / "velodyne" / "000003.bin", Path.read_bytes

    def read_bytes(path):  # root reads whatever its permissions say
        if path == scan:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert found(drive.parents[2]) == {"dataset/sequences/00/velodyne/000003.bin": ["unreadable"]}


def test_folders_of_sequences(drive):
    root = drive.parents[2]
    (drive.parent / "05" / "labels").mkdir(parents=True)
    shutil.copytree(drive, drive.parent / "drive")
    shutil.rmtree(drive / "image_2")
    for name in ("calib", "poses", "times"):
        (drive / f"{name}.txt").unlink()
    assert found(root) == {
        "dataset/sequences/05/velodyne": ["missing"],
        "dataset/sequences/drive": ["name"],
        "dataset/sequences/00": ["hint: no poses"],
    }


def test_images_without_pillow_are_left_with_a_hint(drive, monkeypatch):
    (drive / "image_2" / "000000.png").write_bytes(b"")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else real(name)
    )
    assert found(drive.parents[2]) == {"dataset/sequences/00/image_2": ["hint: not checked"]}


# ---- folders of .npy -----------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            folder = tmp_path / split / f"{split}{i}"
            folder.mkdir(parents=True)
            np.save(folder / "coord.npy", rng.normal(0, 20, (POINTS, 3)))
            np.save(folder / "strength.npy", rng.random((POINTS, 1 + i % 1)).astype(np.float32))
            np.save(folder / "segment.npy", rng.integers(-1, 4, POINTS))
            np.save(folder / "pose.npy", np.eye(4))
    (tmp_path / "few.json").write_text(json.dumps(["train/train0", "val/val1"]))
    (tmp_path / "card.json").write_text('{"about": "something else"}')
    return tmp_path


def test_undamaged_folders(folders):
    assert detect(folders) == "folders"
    assert found(folders, num_classes=4) == {}
    assert found(folders) == {}


def test_damaged_folders(folders):
    train, val = folders / "train", folders / "val"

    def save(sample, key, array):
        np.save(sample / f"{key}.npy", array)

    coord = np.load(train / "train0" / "coord.npy")
    save(train / "train0", "coord", coord + np.array([4.5e5, 5.4e6, 100]))  # UTM
    save(train / "train0", "strength", np.full(POINTS, 200.0))
    save(train / "train1", "segment", np.zeros(POINTS - 1))
    save(train / "train1", "pose", np.diag([1.0, 1, -1, 1]))
    (train / "train2" / "strength.npy").write_bytes(b"")
    save(train / "train2", "segment", np.full(POINTS, 4))
    save(train / "train2", "labels", np.zeros(POINTS))
    (train / "train3" / "segment.npy").unlink()
    save(train / "train3", "coord", coord[:, :2])
    (train / "train4").mkdir()
    coord[3] = np.inf
    save(val / "val0", "coord", coord)
    save(val / "val0", "segment", np.full(POINTS, 0.5))
    np.save(val / "val1" / "coord.npy", np.array([{}]), allow_pickle=True)
    (val / "val1" / "segment.npy").write_bytes((val / "val1" / "segment.npy").read_bytes()[:-9])
    save(val / "val1", "pose", np.eye(3))
    (folders / "bad.json").write_text("[")
    (folders / "gone.json").write_text(json.dumps(["val/val1", "val/gone", "val/val1"]))
    (folders / "none.json").write_text("[]")
    kinds = {Path(file).name: sorted(k) for file, k in by_file(folders, num_classes=4).items()}
    assert kinds == {
        "train0": ["far away", "hint: strength"],
        "train1": ["no rotation", "wrong length"],
        "train2": ["hint: name", "unknown class", "unreadable"],
        "train3": ["missing", "wrong shape"],
        "train4": ["missing", "missing"],
        "val0": ["not finite", "unknown class"],
        "val1": ["unreadable", "unreadable", "wrong shape"],
        "bad.json": ["unreadable"],
        "gone.json": ["duplicate", "missing"],
        "none.json": ["empty"],
    }
    text = "\n".join(str(line) for _, lines in check(folders, num_classes=4) for line in lines)
    for words in (
        "300 of 300 points are more than 1 km away, the first in row 0",
        "segment.npy: 299 rows, coord.npy has 300",
        "class 4 in row 0 (300 such points), expected 0 to 3, or -1 for none",
        "coord.npy: float64 of shape (300, 2), expected numbers of shape (n, 3)",
        "entry 1, 'val/gone', is no folder",
        "entry 2, 'val/val1', has the name of 'val/val1'",
        "row 0 is 0.5, expected whole numbers",
        "is a reflection",
        "labels.npy: nobody reads it",
    ):
        assert words in text, words


def by_file(root, **options):
    return {
        str(path.relative_to(root)): [f"hint: {p.kind}" if p.hint else p.kind for p in lines]
        for path, lines in check(root, **options)
        if lines
    }


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.full(POINTS, -2), "class -2 in row 0"),
        (np.full(POINTS, 255), None),
        (np.full((POINTS, 1), 3.0), None),
        (
            np.full((POINTS, 2), 3),
            r"shape \(300, 2\), expected numbers of shape \(n,\) or \(n, 1\)",
        ),
        (np.full(POINTS, "car"), "expected numbers"),
        (np.full(POINTS, np.nan), "300 values are not finite"),
    ],
)
def test_labels_of_folders(folders, array, text):
    np.save(folders / "val" / "val0" / "segment.npy", array)
    lines = [str(line) for _, lines in check(folders) for line in lines]
    assert len(lines) == (text is not None)
    assert text is None or module.re.search(text, lines[0])


# ---- the other layouts, and the folder itself ----------------------------------------------------


def test_waymo_frames(tmp_path):
    for frame in range(3):
        folder = tmp_path / "training" / "segment-1" / str(frame)
        folder.mkdir(parents=True)
        np.save(folder / "coord.npy", np.random.default_rng(frame).normal(size=(9, 3)).astype("f4"))
        np.save(folder / "strength.npy", np.full((9, 1), 0.5, "f4"))
        np.save(folder / "segment.npy", np.zeros(9, np.int32))
        np.save(folder / "pose.npy", np.eye(4))
    assert detect(tmp_path) == "waymo"
    assert found(tmp_path) == {}
    frames = sorted((tmp_path / "training" / "segment-1").iterdir())
    (frames[0] / "pose.npy").write_bytes(b"")
    np.save(frames[1] / "coord.npy", np.full((9, 3), 2000.0, "f4"))
    np.save(frames[2] / "segment.npy", np.zeros(8, np.int32))
    kinds = by_file(tmp_path)
    assert list(kinds.values()) == [["unreadable"], ["far away"], ["wrong size or content"]]


def test_nuscenes_goes_to_its_reader(tmp_path, monkeypatch):
    from pointcept_kd.data import nuscenes

    raw = tmp_path / "raw" / "samples"
    near, far = (raw / "LIDAR_TOP" / f"{name}.pcd.bin" for name in "ab")
    (raw / "CAM_FRONT").mkdir(parents=True)
    near.parent.mkdir()
    scan = np.random.default_rng(0).normal(size=(9, 5)).astype("<f4")
    near.write_bytes(scan.tobytes())
    far.write_bytes((scan * [1e5, 1, 1, 1, 1]).astype("<f4").tobytes())
    (raw / "CAM_FRONT" / "c.jpg").write_bytes(b"")
    info = tmp_path / "info" / "x.pkl"

    def problems(root):
        assert root == tmp_path
        yield near, []
        yield far, []
        yield info, [f"{info}: 2 files of sweeps are missing, the first is sweeps/a.bin"]

    monkeypatch.setattr(nuscenes, "problems", problems)
    assert detect(tmp_path) == "nuscenes"
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    assert list(by_file(tmp_path).values()) == [["far away"], ["missing"], ["image"]]


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda d: d / "x", {}, "is no folder; .*prepare_data.py simulate"),
        (lambda d: d, {}, "no dataset/sequences .SemanticKITTI.*no \\*.npy"),
        (lambda d: d, {"kind": "semantic_kitti"}, "dataset/sequences is no folder"),
        (lambda d: d, {"kind": "folders"}, "no SPLIT/SCAN/coord.npy"),
        (lambda d: d, {"kind": "kitti"}, "kind='kitti': use one of auto, semantic_kitti"),
        (lambda d: d, {"workers": 0}, "workers=0: use 1 or more"),
        (lambda d: folder(d / "dataset" / "sequences" / "00"), {}, "no SS/velodyne"),
        (lambda d: folder(d / "dataset" / "sequences" / "00").parents[0], {}, "give the folder that"),
        (lambda d: folder(d / "dataset" / "sequences" / "00").parents[1], {}, "give the folder that"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_checked(tmp_path, make, options, text):
    root = make(tmp_path)
    if text == "no SS/velodyne":
        root = tmp_path
    with pytest.raises(InputError, match=text):
        list(check(root, **options))


def folder(path):
    path.mkdir(parents=True)
    return path


# ---- lines, summary, tool ------------------------------------------------------------------------


def test_lines_and_their_summary():
    lines = [
        Problem("a.bin: x", "empty"),
        as_problem("a.bin: 3 points are not finite, the first in row 0"),
        as_problem("b missing.bin: class id 7 in row 3"),
        as_problem("c.bin: strange"),
        Problem("d.bin: y", "strength", hint=True),
    ]
    assert [line.kind for line in lines] == [
        "empty", "not finite", "unknown class", "other", "strength",
    ]  # fmt: skip
    told = []
    scans, entries = survey([(Path("a.bin"), lines[:2]), (Path("c.txt"), lines[2:])], told.append)
    assert told == lines
    assert scans == 1
    assert entries[1] == {
        "file": "a.bin", "kind": "not finite", "hint": False,
        "text": "a.bin: 3 points are not finite, the first in row 0",
    }  # fmt: skip
    assert summary(scans, entries) == (
        "1 scans, 4 problems: 1 empty, 1 not finite, 1 unknown class, 1 other; 1 hint"
    )
    assert summary(2, []) == "2 scans, no problems"


def test_the_tool(folders, capsys):
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = ["check", "--data-root", str(folders), "--num-classes", "4"]
    assert tool.main(arguments) == 0
    assert capsys.readouterr().out == "6 scans, no problems\n"
    np.save(folders / "val" / "val0" / "strength.npy", np.zeros(POINTS))
    assert tool.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"hint: {folders / 'val' / 'val0' / 'strength.npy'}: strength is 0")
    assert out[1] == "6 scans, no problems; 1 hint"
    (folders / "val" / "val1" / "coord.npy").unlink()
    report = folders / "report.json"
    assert tool.main([*arguments, "--json", str(report), "--workers", "2"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "5 scans, 1 problem: 1 missing; 1 hint"
    written = json.loads(report.read_text())
    assert written["scans"] == 5
    assert [entry["kind"] for entry in written["found"]] == ["strength all 0", "missing"]
    assert tool.main([*arguments, "--json", str(folders / "x" / "y.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert tool.main([*arguments, "--ignore-index", "255"]) == 1
    assert tool.main(["check", "--data-root", str(folders / "nowhere")]) == 2
