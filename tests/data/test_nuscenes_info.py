"""Info files from a tiny world's tables: geometry by hand-written quaternions, order, splits, broken tables."""

import hashlib
import json
import math
import pickle

import numpy as np
import pytest

from pointcept_kd.data.nuscenes_files import read_infos
from pointcept_kd.data.nuscenes_info import DETECTION_NAMES, write_infos
from pointcept_kd.data.nuscenes_tables import Tables, official_scenes, rotations
from pointcept_kd.host import InputError
from tools.prepare_data import main

from .nuscenes_world import (
    CAMERAS,
    conjugate,
    hamilton,
    inwards,
    outwards,
    quaternion,
    rotate,
    tables,
    write,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tables by token, and the entries made of them by split."""
    root = tmp_path_factory.mktemp("world")
    content = tables()
    write(root / "raw", content)
    report = write_infos(root / "raw", "v1.0-trainval", root, sweeps=5, with_camera=True)
    entries = {path.stem.rpartition("_")[2]: read_infos(path) for path in report.files}
    return {n: {r["token"]: r for r in rows} for n, rows in content.items()}, entries, report


def to_world(t, data, point):
    return outwards(
        t["ego_pose"][data["ego_pose_token"]],
        outwards(t["calibrated_sensor"][data["calibrated_sensor_token"]], point),
    )


def from_world(t, data, point):
    return inwards(
        t["calibrated_sensor"][data["calibrated_sensor_token"]],
        inwards(t["ego_pose"][data["ego_pose_token"]], point),
    )


def apply(matrix, point):
    return (np.asarray(matrix) @ [*point, 1.0])[:3]


POINTS = [(1.0, 2.0, 3.0), (-20.0, 0.5, -1.5), (0.0, 0.0, 0.0)]


def close(got, expected):
    # Places in the world are kilometres away: float64 leaves 1e-9 of them.
    np.testing.assert_allclose(got, expected, atol=1e-8, rtol=0)


def test_rotations_by_hand():
    half = math.sqrt(0.5)
    turn = rotations([half, 0, 0, half])  # a quarter turn about z
    np.testing.assert_allclose(turn, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(rotations([[2.0, 0, 0, 0]])[0], np.eye(3))
    generator = np.random.default_rng(0)
    for _ in range(5):
        q = quaternion(generator)
        for point in POINTS:
            np.testing.assert_allclose(rotations(q) @ point, rotate(q, point), atol=1e-12)
    with pytest.raises(ValueError, match="length zero"):
        rotations([0, 0, 0, 0])


def test_key_frames(world):
    t, entries, report = world
    assert {s: [e["token"] for e in rows] for s, rows in entries.items()} == {
        "train": [f"sample-0-{k}" for k in range(4)],
        "val": [f"sample-1-{k}" for k in range(3)],
    }
    assert list(report.files.values()) == [4, 3]
    for entry in entries["train"] + entries["val"]:
        data = t["sample_data"][entry["lidar_token"]]
        assert data["sample_token"] == entry["token"]
        assert data["is_key_frame"]
        assert entry["lidar_path"] == data["filename"]
        assert entry["timestamp"] == pytest.approx(data["timestamp"] / 1e6, abs=1e-6)
        assert entry["gt_segment_path"].endswith(
            f"lidarseg/v1.0-trainval/{data['token']}_lidarseg.bin"
        )
        front = entry["lidar_token"].replace("LIDAR_TOP", "CAM_FRONT")
        assert entry["cam_front_path"] == f"samples/CAM_FRONT/{front}.png"
        assert entry["cam_intrinsic"].shape == (3, 3)
        for point in POINTS:
            far = to_world(t, data, point)
            close(apply(entry["ref_from_car"] @ entry["car_from_global"], far), point)
            car = inwards(t["ego_pose"][data["ego_pose_token"]], far)
            close(apply(entry["car_from_global"], far), car)


def test_sweeps(world):
    t, entries, _ = world
    for scene, rows in enumerate(entries.values()):
        for k, entry in enumerate(rows):
            here = t["sample_data"][entry["lidar_token"]]
            # Two scans lie between key frames: key frame k is scan 3 k.
            past = [f"data-{scene}-LIDAR_TOP-{3 * k - i}" for i in range(1, 5) if 3 * k >= i]
            sweeps = entry["sweeps"]
            assert len(sweeps) == 4
            if not past:
                assert [s["sample_data_token"] for s in sweeps] == [here["token"]] * 4
                assert all(s["transform_matrix"] is None and s["time_lag"] == 0 for s in sweeps)
                assert sweeps[0]["lidar_path"] == here["filename"]
                continue
            past += [past[-1]] * (4 - len(past))
            assert [s["sample_data_token"] for s in sweeps] == past
            for sweep in sweeps:
                data = t["sample_data"][sweep["sample_data_token"]]
                assert sweep["lidar_path"] == data["filename"]
                lag = (here["timestamp"] - data["timestamp"]) / 1e6
                assert sweep["time_lag"] == pytest.approx(lag, abs=1e-6)
                for point in POINTS:
                    far = to_world(t, data, point)
                    close(apply(sweep["transform_matrix"], point), from_world(t, here, far))
                    car = apply(sweep["car_from_current"], point)
                    close(apply(sweep["global_from_car"], car), far)


def test_cameras(world):
    t, entries, _ = world
    for entry in entries["train"] + entries["val"]:
        here = t["sample_data"][entry["lidar_token"]]
        assert tuple(entry["cams"]) == CAMERAS
        for name, cam in entry["cams"].items():
            data = t["sample_data"][cam["sample_data_token"]]
            assert (data["sample_token"], cam["type"]) == (entry["token"], name)
            assert cam["data_path"] == data["filename"]
            assert cam["timestamp"] == data["timestamp"]
            calibration = t["calibrated_sensor"][data["calibrated_sensor_token"]]
            pose = t["ego_pose"][data["ego_pose_token"]]
            assert cam["sensor2ego_translation"] == calibration["translation"]
            assert cam["sensor2ego_rotation"] == calibration["rotation"]
            assert cam["ego2global_translation"] == pose["translation"]
            assert cam["ego2global_rotation"] == pose["rotation"]
            assert cam["camera_intrinsics"].tolist() == calibration["camera_intrinsic"]
            for point in POINTS:
                moved = cam["sensor2lidar_rotation"] @ point + cam["sensor2lidar_translation"]
                close(moved, from_world(t, here, to_world(t, data, point)))


def test_boxes(world):
    t, entries, _ = world
    seen = set()
    for entry in entries["train"] + entries["val"]:
        here = t["sample_data"][entry["lidar_token"]]
        expected = [
            r
            for r in t["sample_annotation"].values()
            if r["sample_token"] == entry["token"] and r["num_lidar_pts"] + r["num_radar_pts"] > 0
        ]
        assert entry["gt_boxes_token"].tolist() == [r["token"] for r in expected]
        assert entry["gt_boxes"].shape == (len(expected), 9)
        assert entry["gt_boxes_velocity"].shape == (len(expected), 3)
        for row, record in enumerate(expected):
            box, velocity = entry["gt_boxes"][row], entry["gt_boxes_velocity"][row]
            close(box[:3], from_world(t, here, record["translation"]))
            width, length, height = record["size"]
            assert box[3:6].tolist() == [length, width, height]
            # A step along the heading, seen from the LiDAR.
            tip = [
                a + b
                for a, b in zip(
                    record["translation"], rotate(record["rotation"], (1, 0, 0)), strict=True
                )
            ]
            step = np.subtract(from_world(t, here, tip), box[:3])
            assert math.cos(box[6] - math.atan2(step[1], step[0])) == pytest.approx(1, abs=1e-12)
            category = t["category"][t["instance"][record["instance_token"]]["category_token"]][
                "name"
            ]
            assert entry["gt_names"][row] == DETECTION_NAMES.get(category, "ignore")
            assert entry["num_lidar_pts"][row] == record["num_lidar_pts"]
            assert entry["num_radar_pts"][row] == record["num_radar_pts"]
            close(np.nan_to_num(box[7:]), np.nan_to_num(velocity[:2]))
            seen.add((category, bool(np.isnan(velocity).any())))
            first = t["sample_annotation"].get(record["prev"], record)
            last = t["sample_annotation"].get(record["next"], record)
            if first is last:
                assert np.isnan(velocity).all()
                continue
            passed = (
                t["sample"][last["sample_token"]]["timestamp"]
                - t["sample"][first["sample_token"]]["timestamp"]
            ) / 1e6
            far = [
                (b - a) / passed
                for a, b in zip(first["translation"], last["translation"], strict=True)
            ]
            calibration = t["calibrated_sensor"][here["calibrated_sensor_token"]]
            turned = rotate(conjugate(t["ego_pose"][here["ego_pose_token"]]["rotation"]), far)
            close(velocity, rotate(conjugate(calibration["rotation"]), turned))
    assert {
        ("vehicle.bus.bendy", True),
        ("animal", False),
        ("human.pedestrian.adult", False),
    } <= seen


def one_object(times, translations):
    """Tables of one scene whose second instance is seen at these times (s)."""
    content = tables({"scene-0001": len(times)})
    for row, time in zip(content["sample"], times, strict=True):
        row["timestamp"] = int(time * 1e6)
    rows = [r for r in content["sample_annotation"] if r["instance_token"] == "instance-0-1"]
    for row, place in zip(rows, translations, strict=True):
        row |= dict(translation=place, num_lidar_pts=1)
    return content, [r["token"] for r in rows]


@pytest.mark.parametrize(
    ("times", "middle", "first"),
    [
        ((0, 0.5, 1.0), (8.0, 0.0), (10.0, 0.0)),  # 8 m in 1 s; 5 m in 0.5 s
        ((0, 1.4, 2.9), (8 / 2.9, 0.0), (5 / 1.4, 0.0)),
        ((0, 1.6, 3.1), None, None),  # too long ago
    ],
)
def test_velocities_by_hand(tmp_path, times, middle, first):
    content, tokens = one_object(times, [[0, 0, 0], [5, 0, 0], [8, 0, 0]])
    for table in ("calibrated_sensor", "ego_pose"):
        for row in content[table]:
            row["rotation"] = [1, 0, 0, 0]
    write(tmp_path / "raw", content)
    (path,) = [
        p
        for p in write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path).files
        if "train" in p.name
    ]
    entries = read_infos(path)
    for row, expected in ((0, first), (1, middle)):
        box = entries[row]["gt_boxes"][entries[row]["gt_boxes_token"] == tokens[row]][0]
        if expected is None:
            assert np.isnan(box[7:]).all()
        else:
            np.testing.assert_allclose(box[7:], expected, atol=1e-9)


def test_a_key_frame_without_objects(tmp_path):
    content = tables({"scene-0001": 2})
    content["sample_annotation"] = []
    write(tmp_path / "raw", content)
    report = write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)
    entry = read_infos(next(iter(report.files)))[0]
    assert entry["gt_boxes"].shape == (0, 9)
    assert entry["gt_boxes_velocity"].shape == (0, 3)
    for key in ("gt_names", "gt_boxes_token", "num_lidar_pts", "num_radar_pts"):
        assert entry[key].shape == (0,)


def test_test_entries_have_no_labels(tmp_path):
    content = tables({"scene-0077": 2})
    write(tmp_path / "raw", content, "v1.0-test")
    report = write_infos(tmp_path / "raw", "v1.0-test", tmp_path, sweeps=3)
    (path,) = report.files
    assert path == tmp_path / "info" / "nuscenes_infos_3sweeps_test.pkl"
    for entry in read_infos(path):
        assert not [key for key in entry if key.startswith(("gt_", "num_"))]
        assert "cams" not in entry
        assert len(entry["sweeps"]) == 2


def test_official_scenes():
    sizes = {s: len(official_scenes(s)) for s in ("train", "val", "test", "mini_train", "mini_val")}
    assert sizes == {"train": 700, "val": 150, "test": 150, "mini_train": 8, "mini_val": 2}
    parts = [set(official_scenes(s)) for s in ("train", "val", "test")]
    assert len(set.union(*parts)) == 1000
    # Two scenes of mini_train belong to val.
    assert set(official_scenes("mini_train")) - parts[0] == {"scene-0553", "scene-0796"} <= parts[1]
    assert official_scenes("mini_val") == ["scene-0103", "scene-0916"]
    # Of the sorted names joined by line breaks, taken from the lists of the official kit.
    digests = {
        s: hashlib.sha256("\n".join(sorted(official_scenes(s))).encode()).hexdigest()[:16]
        for s in ("train", "val", "test")
    }
    assert digests == DIGESTS


DIGESTS = {"train": "182d90e54953d7b0", "val": "9c6d87239035bbd3", "test": "9e0f5aba17a92e17"}


def test_splits_of_the_mini_version(tmp_path):
    write(tmp_path / "raw", tables({"scene-0061": 1, "scene-0103": 2}), "v1.0-mini")
    report = write_infos(tmp_path / "raw", "v1.0-mini", tmp_path)
    assert {p.name: n for p, n in report.files.items()} == {
        "nuscenes_infos_10sweeps_train.pkl": 1,
        "nuscenes_infos_10sweeps_val.pkl": 2,
    }


def test_versions_of_ones_own(tmp_path):
    raw = tmp_path / "raw"
    write(raw, tables({"town-a": 1, "town-b": 2, "town-c": 1}), "v1.0-sim")
    report = write_infos(raw, "v1.0-sim", tmp_path)
    assert [(p.stem[-5:], n) for p, n in report.files.items()] == [("train", 4)]
    path = raw / "v1.0-sim" / "splits.json"
    path.write_text(json.dumps({"train": ["town-b"], "val": ["town-a"]}))
    report = write_infos(raw, "v1.0-sim", tmp_path)
    assert list(report.files.values()) == [2, 1]
    assert "1 scenes are in no split, the first is town-c" in report.notes
    for content, message in (
        ({"train": ["town-x"]}, "train lists 'town-x', which is no scene"),
        ({"train": ["town-a"], "val": ["town-a"]}, "'town-a' is in train and in val"),
        ({"training": ["town-a"]}, "split 'training'; use train, val and test"),
        (["town-a"], "expected a dict"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            write_infos(raw, "v1.0-sim", tmp_path)


def test_scans_that_are_not_there(tmp_path):
    raw, content = tmp_path / "raw", tables({"scene-0001": 1, "scene-0002": 1, "scene-0003": 1})
    write(raw, content)
    lidar = [r for r in content["sample_data"] if "LIDAR" in r["filename"]]
    (raw / lidar[1]["filename"]).unlink()
    report = write_infos(raw, "v1.0-trainval", tmp_path)
    assert list(report.files.values()) == [1, 1]
    assert report.notes == ["1 scenes have no LiDAR scans here, the first is scene-0002"]
    for row in (0, 2):
        (raw / lidar[row]["filename"]).unlink()
    with pytest.raises(
        InputError, match="none of the 3 scenes of v1.0-trainval has its first LiDAR"
    ):
        write_infos(raw, "v1.0-trainval", tmp_path)


def test_without_lidarseg(tmp_path):
    write(tmp_path / "raw", tables({"scene-0001": 1}))
    (tmp_path / "raw" / "v1.0-trainval" / "lidarseg.json").unlink()
    report = write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)
    assert "gt_segment_path" not in read_infos(next(iter(report.files)))[0]
    assert "lidarseg.json is missing" in report.notes[0]


def test_without_cameras(tmp_path):
    content = tables({"town": 1})
    content["sensor"] = content["sensor"][:1]
    for table in ("calibrated_sensor", "sample_data"):
        content[table] = [r for r in content[table] if "LIDAR" in r["token"]]
    write(tmp_path / "raw", content, "v1.0-sim")
    entry = read_infos(next(iter(write_infos(tmp_path / "raw", "v1.0-sim", tmp_path).files)))[0]
    assert "cam_front_path" not in entry
    with pytest.raises(InputError, match="this version has no cameras, leave out --with-camera"):
        write_infos(tmp_path / "raw", "v1.0-sim", tmp_path, with_camera=True)


def change(table, row, **values):
    return lambda content: content[table][row].update(values)


def drop(table, row):
    return lambda content: content[table].pop(row)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("sample_data", 0, ego_pose_token="lost"),
         r"ego_pose.json: no record 'lost', to which sample_data data-0-L"),
        (change("sample_data", 0, calibrated_sensor_token="lost"),
         r"calibrated_sensor.json: no record 'lost', to which sample_data"),
        (change("sample_data", 3, prev="lost"),
         r"sample_data.json: no record 'lost', to which sample_data data-0-LIDAR_TOP-3"),
        (change("scene", 0, first_sample_token="lost"), r"sample.json: no record 'lost', to which scene scenetoken0"),
        (change("instance", 1, category_token="lost"),
         r"category.json: no record 'lost', to which instance instance-0-1"),
        (change("sample_annotation", 4, next="lost"), r"sample_annotation.json: no record 'lost'"),
        (drop("sample_data", 3), r"sample 'sample-0-1' has no key frame of LIDAR_TOP"),
        (drop("lidarseg", 0), r"lidarseg.json: no record 'data-0-LIDAR_TOP-0'"),
        (change("calibrated_sensor", 0, rotation=[0, 0, 0, 0]), r"record 'cs-0-LIDAR_TOP': rotation .* length zero"),
        (change("ego_pose", 0, translation=[1, 2]),
         r"ego_pose.json: record 'pose-data-0-LIDAR_TOP-0': .* cannot be used"),
        (change("ego_pose", 0, translation=[1, 2, math.nan]), r"ego_pose.json: record 'pose-.* not finite"),
        (change("sample_annotation", 4, size=[1, 2]), r"sample_annotation.json: sample 'sample-0-0'"),
        (change("calibrated_sensor", 1, camera_intrinsic=[]), r"'cs-0-CAM_FRONT': camera_intrinsic should be 3 x 3"),
        (change("scene", 0, name="scene-0077"), r"'scene-0077' is no scene of v1.0-trainval"),
        (lambda content: content["sample"][1].pop("scene_token"), r"sample.json: record 1 has no scene_token"),
        (lambda content: content.pop("category"), r"category.json: cannot be read"),
    ],
)  # fmt: skip
def test_broken_tables(tmp_path, edit, message):
    content = tables({"scene-0001": 2})
    edit(content)
    write(tmp_path / "raw", content)
    with pytest.raises(InputError, match=message):
        write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path, with_camera=True)
    assert not (tmp_path / "info").exists()


def test_no_json(tmp_path):
    write(tmp_path / "raw", tables({"scene-0001": 1}))
    path = tmp_path / "raw" / "v1.0-trainval" / "sensor.json"
    for text, message in (
        ("[{", "sensor.json: not a JSON file"),
        ("{}", "expected a list of records"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)


def test_command_line(tmp_path, capsys):
    data, out = tmp_path / "download", tmp_path / "project"
    write(data, tables())
    command = ["nuscenes-info", "--data-root", str(data), "--out", str(out), "--sweeps", "2"]
    assert main([*command, "--version", "v1.0-trainval", "--with-camera"]) == 0
    text = capsys.readouterr().out
    assert "nuscenes_infos_2sweeps_train.pkl: 4 key frames" in text
    assert "nuscenes_infos_2sweeps_val.pkl: 3 key frames" in text
    assert (out / "raw" / "samples").is_dir(), "a link to the data"
    assert sorted(p.name for p in (out / "info").iterdir()) == [
        "nuscenes_infos_2sweeps_train.pkl",
        "nuscenes_infos_2sweeps_val.pkl",
    ]
    assert main([*command, "--version", "v1.0-mini"]) == 2
    error = capsys.readouterr().err
    assert "v1.0-mini is no folder" in error
    assert "v1.0-trainval" in error
    assert main([*command[:-1], "0", "--version", "v1.0-trainval"]) == 2


def test_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path / "raw", tables({"scene-0001": 1}))
    write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "info").iterdir()}

    def torn(rows, file, protocol):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pickle, "dump", torn)
    with pytest.raises(KeyboardInterrupt):
        write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)
    assert {p: p.read_bytes() for p in (tmp_path / "info").iterdir()} == before


def test_hand_worked_quaternions():
    # i j = k, and a quarter turn about z takes x to y: the helper itself.
    assert hamilton((0, 1, 0, 0), (0, 0, 1, 0)) == (0, 0, 0, 1)
    half = math.sqrt(0.5)
    assert rotate((half, 0, 0, half), (1, 0, 0)) == pytest.approx((0, 1, 0))


def test_what_is_kept_in_memory(tmp_path):
    content = tables({"scene-0001": 2})
    content["sensor"].append(dict(token="sensor-RADAR", channel="RADAR_FRONT", modality="radar"))
    content["calibrated_sensor"].append(
        {**content["calibrated_sensor"][0], "token": "cs-r", "sensor_token": "sensor-RADAR"}
    )
    radar = {
        **content["sample_data"][0],
        "token": "data-r",
        "calibrated_sensor_token": "cs-r",
        "ego_pose_token": "pose-r",
    }
    content["sample_data"].append(radar)
    content["ego_pose"].append({**content["ego_pose"][0], "token": "pose-r"})
    write(tmp_path / "raw", content)
    rows = Tables(tmp_path / "raw" / "v1.0-trainval").rows
    lidar = {f"data-0-LIDAR_TOP-{step}" for step in range(4)}
    images = {f"data-0-{name}-{step}" for name in CAMERAS for step in (0, 3)}
    assert set(rows["sample_data"]) == lidar | images
    assert set(rows["ego_pose"]) == {f"pose-{token}" for token in lidar | images}


def test_a_split_without_scenes_gets_no_file(tmp_path):
    write(tmp_path / "raw", tables({"scene-0001": 1}))
    report = write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path)
    assert [p.name for p in (tmp_path / "info").iterdir()] == ["nuscenes_infos_10sweeps_train.pkl"]
    assert "no scene of val is here: no info file for it" in report.notes
