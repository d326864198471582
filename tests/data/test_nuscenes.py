"""NuScenesDataset on a tiny world and on the real key frame; every kind of bad input."""

import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data.boxes import count_in_boxes
from pointcept_kd.data.nuscenes import NuScenesDataset, problems
from pointcept_kd.data.nuscenes_files import (
    CLASS_NAMES,
    COLORS,
    LEARNING_MAP,
    map_labels,
    read_infos,
)
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import read_image
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.config import Config

from ..real_nuscenes import write_real_info
from .nuscenes_world import CAMERAS, SIZE, inwards, outwards, tables, write
from .test_camera import NUSCENES_COUNTS

ROOT = Path(__file__).resolve().parents[2]

# Lidarseg's categories by index, as in its category.json, and the class that the benchmark makes of each.
CATEGORIES = """noise: -
animal: -
human.pedestrian.adult: pedestrian
human.pedestrian.child: pedestrian
human.pedestrian.construction_worker: pedestrian
human.pedestrian.personal_mobility: -
human.pedestrian.police_officer: pedestrian
human.pedestrian.stroller: -
human.pedestrian.wheelchair: -
movable_object.barrier: barrier
movable_object.debris: -
movable_object.pushable_pullable: -
movable_object.trafficcone: traffic_cone
static_object.bicycle_rack: -
vehicle.bicycle: bicycle
vehicle.bus.bendy: bus
vehicle.bus.rigid: bus
vehicle.car: car
vehicle.construction: construction_vehicle
vehicle.emergency.ambulance: -
vehicle.emergency.police: -
vehicle.motorcycle: motorcycle
vehicle.trailer: trailer
vehicle.truck: truck
flat.driveable_surface: driveable_surface
flat.other: other_flat
flat.sidewalk: sidewalk
flat.terrain: terrain
static.manmade: manmade
static.other: -
static.vegetation: vegetation
vehicle.ego: -"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder, its tables and its scans by file name. Only to read from."""
    root, content = tmp_path_factory.mktemp("nuscenes"), tables()
    scans = write(root / "raw", content)
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=5, with_camera=True)
    return root, content, scans


@pytest.fixture
def copy(world, tmp_path):
    """One to spoil."""
    shutil.copytree(world[0], tmp_path / "copy")
    return tmp_path / "copy"


def dataset(root, **options):
    return NuScenesDataset(**{"data_root": str(root), "sweeps": 5, **options})


def info_of(root, split="train"):
    return root / "info" / f"nuscenes_infos_5sweeps_{split}.pkl"


def edit(root, change, split="train"):
    infos = read_infos(info_of(root, split))
    change(infos)
    info_of(root, split).write_bytes(pickle.dumps(infos))


def test_the_sixteen_classes():
    table = [line.split(": ") for line in CATEGORIES.splitlines()]
    assert len(table) == len(LEARNING_MAP) == 32
    assert sorted(LEARNING_MAP) == list(range(32))
    for raw, (_, name) in enumerate(table):
        assert LEARNING_MAP[raw] == (-1 if name == "-" else CLASS_NAMES.index(name)), name
    assert len(CLASS_NAMES) == len(COLORS) == len({tuple(c) for c in COLORS}) == 16
    raw = np.arange(32, dtype=np.uint8)
    assert map_labels(raw, 255).tolist() == [
        255 if v < 0 else v for v in map(LEARNING_MAP.get, range(32))
    ]
    with pytest.raises(ValueError, match=r"class id 32 in row 1 .* \(2 such points\)"):
        map_labels(np.array([0, 32, 200], np.uint8))


def test_registered_under_both_names():
    assert DATASETS.get("NuScenesDataset") is NuScenesDataset
    assert DATASETS.get("kd.NuScenesDataset") is NuScenesDataset


def test_key_frames(world):
    root, _, scans = world
    train, both = dataset(root), dataset(root, split=["train", "val"])
    assert (len(train), len(both)) == (4, 7)
    for idx in range(7):
        data, info = both.get_data(idx), both.info(idx)
        scan = scans[info["lidar_path"]]
        assert sorted(data) == ["coord", "name", "segment", "strength"]
        np.testing.assert_array_equal(data["coord"], scan[:, :3])
        np.testing.assert_array_equal(data["strength"][:, 0], scan[:, 3] / np.float32(255))
        assert data["coord"].dtype == data["strength"].dtype == np.float32
        raw = (root / "raw" / info["gt_segment_path"]).read_bytes()
        assert data["segment"].tolist() == [LEARNING_MAP[v] for v in raw]
        assert data["segment"].dtype == np.int32
        assert data["name"] == both.get_data_name(idx) == info["lidar_token"]
    assert both.get_data_name(4) == "data-1-LIDAR_TOP-0"
    np.testing.assert_array_equal(train[1]["coord"], both[1]["coord"])
    assert dataset(root, ignore_index=255).get_data(0)["segment"].max() == 255


def outwards_of(content, token, point):
    by = {
        n: {r["token"]: r for r in content[n]}
        for n in ("sample_data", "calibrated_sensor", "ego_pose")
    }
    data = by["sample_data"][token]
    calibration = by["calibrated_sensor"][data["calibrated_sensor_token"]]
    pose = by["ego_pose"][data["ego_pose_token"]]
    return outwards(pose, outwards(calibration, point)), calibration, pose


def test_merged_scans(world):
    root, content, scans = world
    one, merged = dataset(root), dataset(root, aggregate_sweeps=2)
    data, alone = merged.get_data(1), one.get_data(1)
    # Key frame 1 is scan 3, two scans lie between key frames.
    tokens = [f"data-0-LIDAR_TOP-{step}" for step in (3, 2, 1)]
    parts = [
        scans[r["filename"]] for t in tokens for r in content["sample_data"] if r["token"] == t
    ]
    counts = [len(part) for part in parts]
    assert data["sweep"].tolist() == np.repeat([0, 1, 2], counts).tolist()
    for key in ("coord", "strength", "segment"):
        np.testing.assert_array_equal(data[key][: counts[0]], alone[key])
    assert (data["segment"][counts[0] :] == -1).all()
    np.testing.assert_allclose(data["time"][:, 0], np.repeat([0, 1 / 6, 1 / 3], counts), atol=1e-5)
    _, calibration, pose = outwards_of(content, tokens[0], (0, 0, 0))
    start = counts[0]
    for token, part in zip(tokens[1:], parts[1:], strict=True):
        for row, point in enumerate(part[:, :3].tolist()):
            far, _, _ = outwards_of(content, token, point)
            expected = inwards(calibration, inwards(pose, far))
            np.testing.assert_allclose(data["coord"][start + row], expected, atol=1e-4)
        start += len(part)
    assert data["name"] == alone["name"]


def test_merged_scans_without_the_car(world):
    root, _, scans = world
    every = dataset(root, aggregate_sweeps=2).get_data(1)
    parts = [dataset(root, aggregate_sweeps=2, remove_close=r).get_data(1) for r in (0.0, 4.0)]
    np.testing.assert_array_equal(parts[0]["coord"], every["coord"])
    info = dataset(root).info(1)
    own = scans[info["lidar_path"]]
    assert ((np.abs(own[:, :2]) < 4).all(1)).any(), "the key frame keeps such points"
    kept = [np.ones(len(own), bool)]
    for sweep in info["sweeps"][:2]:
        kept.append([not (abs(x) < 4 and abs(y) < 4) for x, y, *_ in scans[sweep["lidar_path"]]])
    kept = np.concatenate(kept)
    assert 0 < (~kept).sum() < len(kept) - len(own)
    for key in ("coord", "strength", "segment", "sweep", "time"):
        np.testing.assert_array_equal(parts[1][key], every[key][kept])


def test_some_labels(world):
    root, _, _ = world
    whole = [dataset(root).get_data(i)["segment"] for i in range(3)]
    part = [dataset(root, label_fraction=0.5).get_data(i)["segment"] for i in range(3)]
    kept = [p != -1 for p in part]
    for all_labels, labels, mask in zip(whole, part, kept, strict=True):
        np.testing.assert_array_equal(labels[mask], all_labels[mask])
    known = sum((w != -1).sum() for w in whole)
    assert 0.3 * known < sum(mask.sum() for mask in kept) < 0.7 * known
    again = dataset(root, label_fraction=0.5, aggregate_sweeps=2).get_data(1)
    np.testing.assert_array_equal(again["segment"][: len(part[1])], part[1])
    assert (dataset(root, label_fraction=0.0).get_data(0)["segment"] == -1).all()


def test_no_scan_is_merged_twice(world):
    root, _, scans = world
    data = dataset(root, aggregate_sweeps=4)
    # The first key frame of a scene has nothing before it, the second three scans.
    assert data.get_data(0)["sweep"].max() == 0
    assert data.get_data(1)["sweep"].max() == 3
    assert data.get_data(2)["sweep"].max() == 4
    assert len(data.get_data(0)["coord"]) == len(scans[data.info(0)["lidar_path"]])
    with pytest.raises(InputError, match="aggregate_sweeps=5: info files of 5 sweeps know 4 scans"):
        dataset(root, aggregate_sweeps=5)


def test_merging_needs_what_the_info_should_have(copy):
    edit(copy, lambda infos: infos[1]["sweeps"][1].pop("time_lag"))
    with pytest.raises(InputError, match="sweep 1 of data-0-LIDAR_TOP-3 has no time_lag"):
        dataset(copy, aggregate_sweeps=2).get_data(1)


def test_poses(world):
    root, content, _ = world
    data = dataset(root)
    for idx in range(4):
        pose = data.pose_of(idx)
        for point in ((0, 0, 0), (3, -2, 1)):
            far, _, _ = outwards_of(content, data.get_data_name(idx), point)
            np.testing.assert_allclose((pose @ [*point, 1])[:3], far, atol=1e-8)


def test_cameras_and_images(world):
    pytest.importorskip("PIL")
    root, content, _ = world
    data = dataset(root)
    cameras, images = data.cameras(2), data.images(2)
    assert [c.name for c in cameras] == list(CAMERAS)
    _, lidar, pose = outwards_of(content, data.get_data_name(2), (0, 0, 0))
    for camera, image in zip(cameras, images, strict=True):
        assert (camera.width, camera.height) == SIZE
        token = data.info(2)["cams"][camera.name]["sample_data_token"]
        np.testing.assert_array_equal(
            image, read_image(root / "raw" / "samples" / camera.name / f"{token}.png")
        )
        # A point 4 m before the camera, 1 m right, 0.5 m down: through the world into the LiDAR, and back.
        far, calibration, _ = outwards_of(content, token, (1.0, 0.5, 4.0))
        pixels, depth, visible = camera.project([inwards(lidar, inwards(pose, far))])
        k = calibration["camera_intrinsic"]
        assert depth[0] == pytest.approx(4.0, abs=1e-8)
        assert pixels[0] == pytest.approx((k[0][0] / 4 + 20, k[1][1] / 8 + 12), abs=1e-6)
        assert visible[0]


def test_geometry_needs_no_images(copy):
    shutil.rmtree(copy / "raw" / "samples" / "CAM_BACK")
    sizes = {c.name: (c.width, c.height) for c in dataset(copy).cameras(0)}
    assert sizes == {**dict.fromkeys(CAMERAS, SIZE), "CAM_BACK": (1600, 900)}
    with pytest.raises(InputError, match="image is missing"):
        dataset(copy).images(0)


def test_without_cameras(copy):
    write_infos(copy / "raw", "v1.0-trainval", copy, sweeps=5)
    with pytest.raises(InputError, match="prepared without cameras.*--with-camera"):
        dataset(copy).cameras(0)
    write_infos(copy / "raw", "v1.0-trainval", copy, sweeps=5, with_camera=True)
    edit(copy, lambda infos: infos[0]["cams"]["CAM_BACK"].pop("sensor2lidar_rotation"))
    with pytest.raises(InputError, match="CAM_BACK of data-0-LIDAR_TOP-0: cannot be used"):
        dataset(copy).cameras(0)


def test_boxes(world):
    data = dataset(world[0])
    objects, info = data.boxes(0), data.info(0)
    np.testing.assert_array_equal(objects["boxes"], info["gt_boxes"][:, :7])
    assert objects["names"].tolist() == info["gt_names"].tolist()
    assert objects["velocity"].shape == (len(objects["boxes"]), 3)
    assert objects["counts"].tolist() == info["num_lidar_pts"].tolist()


def test_both_kinds_of_info_files(copy):
    infos = read_infos(info_of(copy))
    info_of(copy).write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "v1.0-mini"}}))
    assert len(dataset(copy)) == 4


def test_paths_of_other_machines(copy):
    def change(infos):
        raw = copy / "raw"
        infos[0]["lidar_path"] = str(raw / infos[0]["lidar_path"])
        infos[1]["lidar_path"] = "./data/nuscenes/" + infos[1]["lidar_path"]
        infos[2]["lidar_path"] = "/elsewhere/raw/" + infos[2]["lidar_path"]
        infos[2]["gt_segment_path"] = "/elsewhere/raw/" + infos[2]["gt_segment_path"]

    expected = [dataset(copy).get_data(i) for i in range(3)]
    edit(copy, change)
    for idx in range(3):
        data = dataset(copy).get_data(idx)
        np.testing.assert_array_equal(data["coord"], expected[idx]["coord"])
        np.testing.assert_array_equal(data["segment"], expected[idx]["segment"])


def test_test_scans_have_no_labels(tmp_path, caplog):
    write(tmp_path / "raw", tables({"scene-0077": 2}), "v1.0-test")
    write_infos(tmp_path / "raw", "v1.0-test", tmp_path, sweeps=5)
    data = dataset(tmp_path, split="test")
    with caplog.at_level(logging.WARNING):
        assert (data.get_data(0)["segment"] == -1).all()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with pytest.raises(InputError, match="no gt_boxes"):
        data.boxes(0)


def test_missing_labels_are_told_once(copy, caplog):
    shutil.rmtree(copy / "raw" / "lidarseg")
    data = dataset(copy)
    with caplog.at_level(logging.WARNING):
        assert all((data.get_data(i)["segment"] == -1).all() for i in range(3))
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert "data-0-LIDAR_TOP-0_lidarseg.bin" in caplog.text


def scan_of(root, idx=0):
    return dataset(root).scan_path(idx)


def label_of(root, idx=0):
    return dataset(root).label_path(idx)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda r: scan_of(r).write_bytes(scan_of(r).read_bytes()[:-3]),
            "no whole number of points of 20 bytes",
        ),
        (lambda r: scan_of(r).write_bytes(b""), "has no points"),
        (lambda r: scan_of(r).unlink(), "cannot be read"),
        (
            lambda r: label_of(r).write_bytes(b"\x01\x02"),
            r"2 bytes of labels, expected (\d+) for \1 points",
        ),
        (
            lambda r: label_of(r).write_bytes(b"\x63" * (scan_of(r).stat().st_size // 20)),
            "class id 99 in row 0",
        ),
    ],
)
def test_broken_files(copy, spoil, message):
    spoil(copy)
    with pytest.raises(InputError, match=f"data-0-LIDAR_TOP-0.*{message}"):
        dataset(copy).get_data(0)
    found = [line for path, lines in problems(copy) for line in lines]
    assert len(found) == 1
    assert "data-0-LIDAR_TOP-0" in found[0]


def test_values_that_are_not_finite(copy):
    path = scan_of(copy)
    scan = np.frombuffer(path.read_bytes(), np.float32).reshape(-1, 5).copy()
    scan[3, 1], scan[5, 3] = np.nan, np.inf
    path.write_bytes(scan.tobytes())
    labels = dataset(copy, nonfinite="drop")._segment(0, len(scan))
    with pytest.raises(
        InputError, match=r"row 3 is not finite .*, 2 of \d+ points; .*nonfinite='drop'"
    ):
        dataset(copy).get_data(0)
    data = dataset(copy, nonfinite="drop").get_data(0)
    np.testing.assert_array_equal(data["coord"], np.delete(scan, [3, 5], 0)[:, :3])
    np.testing.assert_array_equal(data["segment"], np.delete(labels, [3, 5]))
    path.write_bytes(np.full_like(scan, np.nan).tobytes())
    with pytest.raises(InputError, match="all .* points are not finite"):
        dataset(copy, nonfinite="drop").get_data(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(split="valid"), "split 'valid' is unknown; use train, val, test"),
        (
            dict(split="test"),
            r"5sweeps_test.pkl is missing \(there are .*_train.pkl, .*nuscenes-info",
        ),
        (dict(sweeps=10), r"10sweeps_train.pkl is missing"),
        (dict(sweeps=0), "sweeps=0: expected a whole number, 1 or more"),
        (dict(sweeps=True), "sweeps=True"),
        (dict(aggregate_sweeps=-1), "aggregate_sweeps=-1"),
        (dict(remove_close=-1.0), "remove_close=-1.0: expected metres, 0 or more"),
        (dict(label_fraction=1.5), "label_fraction=1.5: expected a number from 0 to 1"),
        (dict(remove_close=True), "remove_close=True: expected metres"),
        (dict(nonfinite="keep"), "nonfinite='keep'"),
        (dict(data_root="nowhere/at/all"), "nowhere/at/all is no folder"),
    ],
)
def test_bad_options(world, options, message):
    with pytest.raises(InputError, match=message):
        dataset(world[0], **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"lidar_path": "a"}], "entry 0 has no lidar_token but lidar_path"),
        ([3], "entry 0 has no lidar_path and lidar_token but 3"),
        ({"data_list": [], "metainfo": {}}, r"got a dict \(keys data_list, metainfo\)"),
        ("infos", r"got a str"),
        (logging.getLogger, r"asks for logging.getLogger, which is no plain value"),
    ],
)
def test_other_info_files(copy, content, message):
    info_of(copy).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"5sweeps_train.pkl.*{message}"):
        dataset(copy)
    found = dict(problems(copy))
    assert len(found[info_of(copy)]) == 1


def test_nothing_wrong(world):
    found = list(problems(world[0]))
    assert len(found) == 7 + 2
    assert not [line for _, lines in found for line in lines]


def test_missing_files_beside_key_frames(copy):
    raw = copy / "raw"
    next((raw / "samples" / "CAM_FRONT").iterdir()).unlink()
    (raw / "sweeps" / "LIDAR_TOP" / "data-0-LIDAR_TOP-1.pcd.bin").unlink()
    lines = [line for _, lines in problems(copy) for line in lines]
    assert any(
        "1 files of sweeps are missing" in line and "LIDAR_TOP-1.pcd.bin" in line for line in lines
    )
    assert any("1 files of CAM_FRONT are missing" in line for line in lines)
    assert len(lines) == 2
    # A download without them is complete in itself.
    shutil.rmtree(raw / "sweeps")
    shutil.rmtree(raw / "samples" / "CAM_FRONT")
    assert not [line for _, lines in problems(copy) for line in lines]
    with pytest.raises(InputError, match=r"none.*no \*\.pkl|no \*\.pkl"):
        list(problems(copy / "none"))


def test_the_config_reads_a_scan(world):
    cfg = Config.fromfile(ROOT / "configs" / "_base_" / "nuscenes.py")
    train = {"coord", "grid_coord", "segment", "feat", "offset"}
    for split, keys in (("train", train), ("val", train | {"origin_segment", "inverse", "name"})):
        options = {**cfg.data[split], "data_root": str(world[0]), "sweeps": 5}
        sample = DATASETS.build(options)[0]
        assert set(sample) == keys
        assert sample["feat"].shape[1] == 4


@pytest.fixture
def real(samples, tmp_path):
    """The real key frame, read by an info file."""
    write_real_info(samples, tmp_path, sweeps=5)
    return dataset(tmp_path, split="val")


def test_the_real_key_frame(real):
    data = real.get_data(0)
    assert data["coord"].shape == (34688, 3)
    assert 0 <= data["strength"].min() < data["strength"].max() <= 1
    assert (data["segment"] == -1).all()
    assert data["name"] == "ca9a282c9e77460f8360f564131a8af5"
    pose = real.pose_of(0)
    assert pose[:3, 3] == pytest.approx((411.3, 1180.9, 1.84), abs=1), "the map of Singapore"
    assert pose[2, 2] == pytest.approx(1, abs=0.02), "the LiDAR stands upright"


def test_points_in_the_real_images(real):
    points = real.get_data(0)["coord"]
    cameras = real.cameras(0)
    counts = {c.name: int(c.project(points)[2].sum()) for c in cameras}
    assert counts == NUSCENES_COUNTS
    assert {(c.width, c.height) for c in cameras} == {(1600, 900)}


def test_the_real_images(real):
    pytest.importorskip("PIL")
    images = real.images(0)
    assert [image.shape for image in images] == [(900, 1600, 3)] * 6
    assert all(image.std() > 20 for image in images)


def test_points_in_the_real_boxes(real):
    objects = real.boxes(0)
    counts = count_in_boxes(real.get_data(0)["coord"], objects["boxes"])
    assert len(counts) == 69
    assert (counts == objects["counts"]).sum() == 61
    assert np.abs(counts - objects["counts"]).sum() == 29
    assert objects["counts"].sum() == 1009
    assert (objects["names"] == "pedestrian").sum() == 30
