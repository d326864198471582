"""Waymo segments: a known scene comes out where it was put in; damage is named."""

import importlib
import zlib

import numpy as np
import pytest

from pointcept_kd.data import waymo
from pointcept_kd.data.waymo import WaymoDataset
from pointcept_kd.data.waymo_convert import (
    Plan,
    convert,
    convert_file,
    image_points,
    read_frame_list,
    segment_files,
    shard_of,
)
from pointcept_kd.data.waymo_records import crc32c, matrix, read_frames, read_records, varints
from pointcept_kd.host import InputError

from . import waymo_scene
from .waymo_scene import Scene, block, double, number, record, rigid, segment, transform, varint

NAME = "segment-1234_000_020_with_camera_labels"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The raw folder and the scene in it."""
    raw = tmp_path_factory.mktemp("raw")
    return raw, segment(raw / "training" / f"{NAME}.tfrecord")


# Pieces


def test_crc32c_against_published_values_and_bits():
    # RFC 3720, B.4
    assert crc32c(b"\x00" * 32) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    for size in (4, 5, 6, 7, 8, 63, 64, 65, 999):
        assert crc32c(data[:size]) == waymo_scene.crc32c(data[:size])
    with pytest.raises(ValueError, match="4 bytes or more"):
        crc32c(b"abc")


def test_varints():
    values = [0, 1, 127, 128, 300, 2**31 - 1, -1, -(2**31), 5]
    assert varints(b"".join(map(varint, values))).tolist() == values
    assert varints(b"").tolist() == []
    for data, message in ((b"\x80", "end within"), (b"\xff" * 10 + b"\x01", "longer than ten")):
        with pytest.raises(ValueError, match=message):
            varints(data)


def test_matrix_shapes_packed_or_not():
    array = np.array([[1.5, -2.0, 3.0]], np.float32)
    assert np.array_equal(matrix(waymo_scene.matrix(array), "<f4"), array)
    single = b"".join(varint(8 + 5) + np.float32(v).tobytes() for v in array[0])
    shape = block(2, block(1, varint(1) + varint(3)))
    assert np.array_equal(matrix(zlib.compress(single + shape), "<f4"), array)
    with pytest.raises(ValueError, match=r"3 numbers do not fill a matrix of shape \[\]"):
        matrix(zlib.compress(single), "<f4")
    with pytest.raises(ValueError, match="not zlib-compressed"):
        matrix(b"none", "<f4")


def test_azimuth_by_hand():
    # One row of four columns: 135, 45, -45, -135 degrees around the vehicle, whatever the sensor's yaw.
    for yaw in (0.0, np.pi / 2, -3.0):
        pose = rigid((0, 0, yaw), (0, 0, 2))
        points, mask = image_points(np.array([[2.0, 2.0, 0.0, 2.0]]), np.zeros(1), pose)
        h = np.sqrt(2)
        assert points == pytest.approx(np.array([[-h, h, 2], [h, h, 2], [-h, -h, 2]]))
        assert mask.tolist() == [[True, True, False, True]]
    up, _ = image_points(np.array([[1.0]]), np.array([np.pi / 6]), np.eye(4))
    assert up == pytest.approx(np.array([[np.sqrt(3) / 2, 0, 0.5]]))


# Whole segments


def test_the_scene_comes_back(made, tmp_path):
    raw, scene = made
    report = convert(raw, tmp_path, Plan("training"), progress=False)
    assert (report.written, report.kept, report.files, report.problems) == (2, 0, 1, [])
    assert report.points == sum(map(len, scene.expect))
    frames = sorted((tmp_path / "training" / NAME).iterdir())
    assert [f.name for f in frames] == [str(t) for t in scene.times]
    for frame, pose, expect in zip(frames, scene.poses, scene.expect):
        coord, strength = np.load(frame / "coord.npy"), np.load(frame / "strength.npy")
        assert coord.dtype == strength.dtype == np.float32
        assert strength.shape == (len(expect), 1)
        assert len(expect) > 100
        assert np.abs(coord - expect[:, :3]).max() < 1e-3
        assert strength[:, 0] == pytest.approx(expect[:, 3])
        assert np.array_equal(np.load(frame / "pose.npy"), pose)
    labels = np.load(frames[0] / "segment.npy")
    assert labels.dtype == np.int32
    assert labels.tolist() == scene.expect[0][:, 4].tolist()
    assert set(labels) == set(range(-1, 22))
    things = np.load(frames[0] / "instance.npy")
    assert things.dtype == np.int32
    assert things.tolist() == scene.expect[0][:, 5].tolist()
    assert len(set(things.tolist())) > 20
    assert sorted(f.name for f in frames[1].iterdir()) == ["coord.npy", "pose.npy", "strength.npy"]


def test_points_lie_on_ground_and_wall(made, tmp_path):
    raw, scene = made
    convert(raw, tmp_path, Plan("training"), progress=False)
    data = WaymoDataset(data_root=str(tmp_path), timestamp=(0, -1))
    merged = data.get_data(1)
    world = merged["coord"] @ scene.poses[1][:3, :3].T + scene.poses[1][:3, 3]
    left = scene.poses[0][:3, 1] * (1, 1, 0)
    wall = (world - scene.poses[0][:3, 3]) @ left / np.linalg.norm(left) - 15
    first = np.minimum(np.abs(world[:, 2] - 3), np.abs(wall)) < 2e-3
    counts = [sum(len(e) for e in scene.expect), len(scene.expect[1])]
    assert np.bincount(merged["sweep"]).tolist() == [counts[1], counts[0] - counts[1]]
    # All but the second returns, which are in the air.
    assert 0.8 < first.mean() < 0.95
    for sweep in (0, 1):
        assert first[merged["sweep"] == sweep].mean() > 0.8


def test_reader_takes_what_was_written(made, tmp_path):
    raw, scene = made
    convert(raw, tmp_path, Plan("training"), progress=False)
    assert len(WaymoDataset(data_root=str(tmp_path))) == 2
    data = WaymoDataset(data_root=str(tmp_path), labelled_only=True, ignore_index=255)
    assert len(data) == 1
    sample = data.load(0)
    assert sample["name"] == f"{NAME}_{scene.times[0]}"
    expect = np.where(scene.expect[0][:, 4] < 0, 255, scene.expect[0][:, 4])
    assert sample["segment"].tolist() == expect.tolist()
    assert [lines for _, lines in waymo.problems(tmp_path)] == [[], []]


def test_running_again_writes_what_is_missing(made, tmp_path):
    raw, scene = made
    labelled = Plan("training", labelled_only=True)
    assert convert(raw, tmp_path, labelled, progress=False).written == 1
    assert convert(raw, tmp_path, Plan("training"), progress=False).written == 1
    folder = tmp_path / "training" / NAME
    before = (folder / str(scene.times[0]) / "coord.npy").stat().st_mtime_ns
    for victim in ("segment.npy", "instance.npy", "coord.npy"):
        (tmp_path / "training" / ".done" / f"{NAME}.json").unlink()
        (folder / str(scene.times[0]) / victim).unlink()
        (folder / f".{scene.times[0]}.tmp").mkdir()  # as a killed run leaves it
        report = convert(raw, tmp_path, Plan("training"), progress=False)
        assert (report.written, report.kept) == (1, 1)
    assert (folder / str(scene.times[0]) / "coord.npy").stat().st_mtime_ns > before
    # A finished file is not read again, but a frame that went missing is noticed.
    assert convert(raw, tmp_path, Plan("training"), progress=False).kept == 2
    (folder / str(scene.times[1]) / "coord.npy").unlink()
    assert convert(raw, tmp_path, Plan("training"), progress=False).written == 1
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_masks_put_predictions_back(tmp_path):
    scene = segment(tmp_path / "raw" / f"{NAME}.tfrecord")
    convert(tmp_path / "raw", tmp_path, Plan("validation"), progress=False)
    frame = tmp_path / "validation" / NAME / str(scene.times[0])
    masks = np.load(frame / "mask.npy", allow_pickle=True)
    assert masks.shape == (2, 2)
    assert [m.shape for m in masks[0]] == [(6, 30), (4, 12)]
    counts = [int(m.sum()) for m in masks.reshape(-1)]
    labels = np.load(frame / "segment.npy")
    assert sum(counts) == len(labels)
    image = np.zeros(masks[0, 0].shape, int)
    image[masks[0, 0]] = labels[: counts[0]] + 1
    rows, columns = np.nonzero(masks[0, 0])
    assert image[masks[0, 0]].tolist() == ((rows + columns) % 23).tolist()


def test_testing_has_no_labels_and_frames_are_listed(tmp_path):
    scene = segment(tmp_path / "raw" / "testing" / f"{NAME}.tfrecord", labelled=(False, False))
    listing = tmp_path / "frames.txt"
    listing.write_text(f"1234_000_020,{scene.times[1]}\n\nother,5\n")
    plan = Plan("testing", frames=read_frame_list(listing))
    assert convert(tmp_path / "raw", tmp_path, plan, progress=False).written == 1
    frames = list((tmp_path / "testing" / NAME).iterdir())
    assert [f.name for f in frames] == [str(scene.times[1])]
    data = WaymoDataset(data_root=str(tmp_path), split="testing")
    assert (data.get_data(0)["segment"] == -1).all()


def test_two_processes_and_shards(tmp_path):
    scene, names = Scene(), [f"segment-{i}_0.tfrecord" for i in range(3)]
    content = b"".join(record(scene.frame(i, True)) for i in (0, 1))
    for name in names:
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(content)
    files = segment_files(tmp_path / "raw", "training")
    parts = [shard_of(files, f"{i}/2") for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == files
    assert not set(parts[0]) & set(parts[1])
    report = convert(tmp_path / "raw", tmp_path, Plan("training"), "1/2", workers=2, progress=False)
    assert (report.files, report.written) == (2, 4)
    report = convert(tmp_path / "raw", tmp_path, Plan("training"), "2/2", progress=False)
    assert (report.files, report.written) == (1, 2)
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        with pytest.raises(InputError, match="use i/n with i from 1 to n"):
            shard_of(files, text)


# Damage


def test_damaged_files_are_named_and_do_not_stop_the_others(made, tmp_path):
    raw = tmp_path / "raw"
    good = (made[0] / "training" / f"{NAME}.tfrecord").read_bytes()
    first = len(good) // 3
    cases = {
        "a": (good[:first], r"record 0 at byte 0: cut off, \d+ of \d+ bytes are there"),
        "b": (good[:-1], r"record 1 at byte \d+: cut off"),
        "c": (flip(good, 700), r"record 0 at byte 0: checksum of its \d+ bytes differs"),
        "d": (flip(good, 3), "record 0 at byte 0: checksum of the length differs; no TFRecord"),
        "e": (good + good[:7], r"record 2 at byte \d+: 7 bytes, expected 12"),
        "f": (b"", "the file is empty"),
        "g": (good, None),
    }
    raw.mkdir()
    for name, (content, _) in cases.items():
        (raw / f"{name}.tfrecord").write_bytes(content)
    told = []
    report = convert(raw, tmp_path, Plan("training"), tell=told.append, progress=False)
    assert told == report.problems
    assert len(told) == 6
    for line, (name, (_, message)) in zip(told, cases.items()):
        assert line.startswith(str(raw / f"{name}.tfrecord"))
        with pytest.raises(InputError, match=message):
            raise InputError(line)
        assert "\n" not in line
    assert report.files == 7
    assert report.written == 0 + 1 + 0 + 0 + 2 + 0 + 2
    assert len(list((tmp_path / "training").glob("*/*/coord.npy"))) == 5


def flip(data, byte):
    return data[:byte] + bytes([data[byte] ^ 4]) + data[byte + 1 :]


def build(path, drop=(), **change):
    """One frame of a laser of 1 x 2 pixels, without the parts in `drop` or with others in their place."""
    image = np.array([[[2, 1, 0, -1], [3, 1, 0, -1]]], np.float32)
    parts = {
        "range": block(2, waymo_scene.matrix(image)),
        "pixels": block(4, waymo_scene.matrix(np.zeros((1, 2, 6), np.float32))),
        "labels": block(6, waymo_scene.matrix(np.array([[[0, 3], [0, 22]]]), integer=True)),
        "beams": double(2, 0.0),
        "extrinsic": block(5, transform(np.eye(4))),
        "context": block(1, b"name"),
        "stamp": number(2, 77),
        "pose": block(3, transform(np.eye(4))),
        **change,
    }
    parts |= dict.fromkeys(drop, b"")
    calibration = block(3, number(1, 1) + parts["beams"] + parts["extrinsic"])
    back = parts["range"] + parts["pixels"] + parts["labels"]
    laser = block(5, number(1, 1) + (block(2, back) if back else b""))
    head = parts["context"] + (b"" if "calibration" in drop else calibration)
    frame = block(1, head) + parts["stamp"] + parts["pose"] + (b"" if "laser" in drop else laser)
    path.write_bytes(record(frame))
    return path


def test_the_small_frame_is_whole(tmp_path):
    path = build(tmp_path / "x.tfrecord")
    assert convert_file(path, tmp_path / "out", Plan("training")).written == 1
    folder = tmp_path / "out" / "x" / "77"
    assert np.load(folder / "coord.npy") == pytest.approx(
        np.array([[0, 2, 0], [0, -3, 0]]), abs=1e-6
    )
    assert np.load(folder / "segment.npy").tolist() == [2, 21]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["context"]}, r"no context\.name"),
        ({"drop": ["stamp"]}, "no timestamp_micros"),
        ({"drop": ["pose"]}, "no pose"),
        ({"drop": ["calibration"]}, r"no context\.laser_calibrations"),
        ({"drop": ["laser"]}, "no laser TOP"),
        ({"drop": ["range"]}, "no range_image_compressed of TOP"),
        ({"drop": ["pixels"]}, "no range_image_pose_compressed of TOP"),
        ({"drop": ["range", "pixels", "labels"]}, "no ri_return1 of TOP"),
        ({"drop": ["beams"]}, "no beam_inclination of TOP"),
        ({"drop": ["extrinsic"]}, "no extrinsic of TOP"),
        ({"extrinsic": block(5, double(1, 2.0))}, "extrinsic of TOP has 1 numbers, expected 16"),
        ({"pose": block(3, transform(np.zeros((4, 4))))}, "pose is singular"),
        ({"pose": block(3, b"\xff")}, "pose cannot be read: no number at byte 1"),
        ({"beams": double(2, 0.0) * 3}, "return 1: 3 beam inclinations for 1 rows"),
        ({"context": number(1, 5)}, r"context\.name is of another type"),
        ({"context": block(1, b"\xff")}, r"context\.name is no text"),
        ({"context": block(1, b"../up")}, r"context\.name is '\.\./up', no name"),
        ({"range": block(2, b"raw")}, "range image of laser 1, return 1 cannot be read: not zlib"),
        (
            {"range": block(2, waymo_scene.matrix(np.ones((1, 2), np.float32)))},
            r"has shape \(1, 2\), expected \(rows, columns, 4\)",
        ),
        (
            {"range": block(2, waymo_scene.matrix(np.zeros((1, 2, 4), np.float32)))},
            "no range image has a point",
        ),
        (
            {"pixels": block(4, waymo_scene.matrix(np.zeros((1, 1, 6), np.float32)))},
            r"\(1, 1, 6\) poses for the range image",
        ),
        (
            {"labels": block(6, waymo_scene.matrix(np.array([[[0, 23], [0, 1]]]), integer=True))},
            "has class 23, expected 0 to 22",
        ),
        (
            {"labels": block(6, waymo_scene.matrix(np.array([[[0, 1]]]), integer=True))},
            r"segmentation_label of laser 1, return 1 has shape \(1, 1, 2\)",
        ),
    ],
)
def test_missing_and_wrong_fields_are_named(tmp_path, change, message):
    path = build(tmp_path / "x.tfrecord", **change)
    with pytest.raises(InputError, match=message) as caught:
        convert_file(path, tmp_path / "out", Plan("training"))
    assert f"{path}: record 0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*/*"))


def test_bytes_that_are_no_frame_give_input_errors_only(tmp_path):
    """Right checksums around wrong bytes: nothing but an InputError, or a frame, may come of it."""
    _, whole = next(read_records(build(tmp_path / "x.tfrecord")))
    whole, rng, refused = bytes(whole), np.random.default_rng(0), []
    for i in range(400):
        bad = bytearray(whole)
        for place in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[place] = rng.integers(0, 256)
        path = tmp_path / "bad.tfrecord"
        path.write_bytes(record(bytes(bad[: rng.integers(len(bad) // 2, len(bad) + 1)])))
        try:
            convert_file(path, tmp_path / str(i), Plan("training"))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert not [text for text in refused if "\n" in text]


def test_bad_options(made, tmp_path):
    with pytest.raises(InputError, match="--split: 'train'; use one of training"):
        convert(made[0], tmp_path, Plan("train"))
    with pytest.raises(InputError, match=r"no \*\.tfrecord in .*waymo\.com/open"):
        convert(tmp_path, tmp_path, Plan("training"))
    (tmp_path / "list").write_text("name,12\nname;13\n")
    with pytest.raises(InputError, match=r"line 2 is 'name;13', expected context,timestamp"):
        read_frame_list(tmp_path / "list")
    with pytest.raises(InputError, match="cannot be read"):
        read_frame_list(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out: cannot create"):
        convert(made[0], tmp_path / "file", Plan("training"), progress=False)
    with pytest.raises(InputError, match=r"none\.tfrecord: cannot be read"):
        list(read_frames(tmp_path / "none.tfrecord"))


def test_the_tool(made, tmp_path, capsys):
    tool = importlib.import_module("tools.prepare_data")
    options = ["--out", str(tmp_path / "out"), "--split", "training", "--workers", "1"]
    raw = tmp_path / "raw"
    raw.mkdir()
    content = (made[0] / "training" / f"{NAME}.tfrecord").read_bytes()
    (raw / f"{NAME}.tfrecord").write_bytes(content)
    assert tool.main(["waymo", "--raw", str(raw), *options, "--labelled-only"]) == 0
    assert "1 files: 1 frames written, 0 kept" in capsys.readouterr().out
    (raw / "broken.tfrecord").write_bytes(content[:50])
    assert tool.main(["waymo", "--raw", str(raw), *options]) == 2
    printed = capsys.readouterr()
    assert "1 frames written, 1 kept" in printed.out
    assert "error: " in printed.err
    assert "broken.tfrecord: record 0" in printed.err
    assert tool.main(["waymo", "--raw", str(tmp_path / "nothing"), *options]) == 2
    assert capsys.readouterr().err.startswith("error: --raw: no *.tfrecord")
