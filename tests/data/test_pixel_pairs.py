"""Pairs of points and pixels: the worked chain of nuScenes, plain loops, readers' files, and the real samples."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest

from pointcept_kd.data.camera import Camera, read_rgb
from pointcept_kd.data.image_maps import read_classes, read_map, read_weak_labels
from pointcept_kd.data.kitti import KITTIObjectDataset, read_calib
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import write_png
from pointcept_kd.data.pixel_pairs import PointPixelDataset, pixel_pairs
from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset, load_calib, read_scan
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.loader import ConcatDataset

from .nuscenes_world import CAMERAS, inwards, outwards, tables, write
from .pair_scene import SIZES, Scene, rig


def plain_pairs(points, cameras):
    """The published rule, point by point."""
    found = []
    for number, camera in enumerate(cameras):
        for row, point in enumerate(np.asarray(points, float)):
            x, y, z = (camera.lidar_to_camera @ [*point[:3], 1])[:3]
            if z <= 1.0:
                continue
            u = (camera.intrinsics[0] @ [x, y, z]) / z
            v = (camera.intrinsics[1] @ [x, y, z]) / z
            if 0 < u < camera.width - 1 and 0 < v < camera.height - 1:
                found.append((row, number, round(v), round(u)))
    return found


def as_tuples(points, pixels):
    return [(int(p), *map(int, q)) for p, q in zip(points, pixels, strict=True)]


# ------------------------------------------------------------------------------------------- the rule

H1 = [  # point, camera xyz (None: not given), pixel (None: no pair), and why
    ((0, 10, -1), (0.9151, 0.7, 8.9600), (902.135, 528.125), (528, 902)),
    ((2, 20, 0.5), (3.7791, -0.8, 18.7477), (1001.576, 407.328), (407, 1002)),
    ((-9, 10, 0), (-8.0506, -0.3, 9.7444), (-26.175, 419.213), None),
    ((8.2, 10, 0), (9.0839, -0.3, 8.2454), (1901.701, 413.616), None),
    ((0, 3.1, -1.9), (0.3138, 1.6, 2.0863), (950.391, 1216.908), None),
    ((0, 1.9, 0), None, None, None),
    ((0, -10, 0), None, None, None),
]
ROOT_HALF = math.sqrt(0.5)
CHAIN = {
    "lidar": dict(rotation=[ROOT_HALF, 0, 0, -ROOT_HALF], translation=[1, 0, 1.8]),
    "lidar_ego": dict(rotation=[1, 0, 0, 0], translation=[10, 20, 0]),
    "camera_ego": dict(
        rotation=[math.cos(math.radians(2.5)), 0, 0, math.sin(math.radians(2.5))],
        translation=[10.5, 20, 0],
    ),
    "camera": dict(rotation=[0.5, -0.5, 0.5, -0.5], translation=[1.5, 0, 1.5]),
}
LENS = [[1000.0, 0, 800], [0, 1000.0, 450], [0, 0, 1]]


def chained(point):
    """LiDAR to camera in four steps, with quaternions."""
    point = outwards(CHAIN["lidar_ego"], outwards(CHAIN["lidar"], point))
    return inwards(CHAIN["camera"], inwards(CHAIN["camera_ego"], point))


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A folder in nuScenes' layout whose first key frame has the calibration of `CHAIN`."""
    root, content = tmp_path_factory.mktemp("worked"), tables({"scene-0001": 1})
    places = {"LIDAR_TOP": ("lidar", "lidar_ego"), "CAM_FRONT": ("camera", "camera_ego")}
    for channel, (sensor, car) in places.items():
        for record in content["calibrated_sensor"]:
            if record["token"] == f"cs-0-{channel}":
                record.update(CHAIN[sensor])
                if channel == "CAM_FRONT":
                    record["camera_intrinsic"] = LENS
        for record in content["ego_pose"]:
            if record["token"] == f"pose-data-0-{channel}-0":
                record.update(CHAIN[car])
    write(root / "raw", content)
    scan = np.zeros((len(H1), 5), "<f4")
    scan[:, :3] = [case[0] for case in H1]
    scan[:, 3] = 51
    (root / "raw/samples/LIDAR_TOP/data-0-LIDAR_TOP-0.pcd.bin").write_bytes(scan.tobytes())
    labels = np.array([24, 17, 0, 0, 0, 0, 0], np.uint8)  # driveable surface, car
    (root / "raw/lidarseg/v1.0-trainval/data-0-LIDAR_TOP-0_lidarseg.bin").write_bytes(
        labels.tobytes()
    )
    image = np.zeros((900, 1600, 3), np.uint8)
    image[528, 902], image[407, 1002] = (10, 20, 30), (40, 50, 60)
    write_png(root / "raw/samples/CAM_FRONT/data-0-CAM_FRONT-0.png", image)
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=1, with_camera=True)
    return root


def test_worked_chain(worked):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = NuScenesDataset(data_root=str(worked), sweeps=1)
    camera = source.cameras(0)[0]
    assert camera.name == "CAM_FRONT"
    for point, place, pixel, _ in H1:
        stored = np.float32(point).astype(float)
        steps = np.array(chained(stored))
        at_once = (camera.lidar_to_camera @ [*stored, 1])[:3]
        np.testing.assert_allclose(at_once, steps, atol=1e-6, rtol=0)
        if place is not None:
            np.testing.assert_allclose(steps, place, atol=1e-4)
            u, v = (np.array(LENS) @ steps)[:2] / steps[2]
            assert (u, v) == pytest.approx(pixel, abs=2e-3)
            found = camera.project([stored])[0][0]
            np.testing.assert_allclose(found, (u, v), atol=1e-6)
    assert chained((0, 1.9, 0))[2] == pytest.approx(0.8909, abs=1e-4)
    assert chained((0, -10, 0))[2] == pytest.approx(-10.9638, abs=1e-4)

    data = PointPixelDataset(source, labels="segment", cameras=["CAM_FRONT"])[0]
    kept = [(row, 0, *case[3]) for row, case in enumerate(H1) if case[3]]
    assert as_tuples(data["pair_point"], data["pair_pixel"]) == kept
    shown = [data["images"][n][r, c].tolist() for n, r, c in data["pair_pixel"]]
    assert shown == [[10, 20, 30], [40, 50, 60]]
    assert data["pair_label"].tolist() == [v + 1 for v in data["segment"][:2]]
    assert (data["strength"] == np.float32(0.2)).all()


def test_pairs_by_plain_loops():
    points = np.random.default_rng(0).normal(size=(500, 3)) * (8, 8, 2)
    cameras = rig()
    found = as_tuples(*pixel_pairs(points.astype(np.float32), cameras))
    assert found == plain_pairs(points.astype(np.float32), cameras)
    assert len(found) > 100
    # Two of the cameras overlap: a point has a pair in each.
    rows = [row for row, number, _, _ in found if number < 2]
    assert 5 < len(rows) - len(set(rows)) < len(rows) / 2


def test_borders_are_left_out_and_halves_go_to_even():
    # At 2 m depth, u = 10 x and v = 10 y; the image has 12 x 8 pixels.
    lens = [[20.0, 0, 0], [0, 20.0, 0], [0, 0, 1]]
    camera = Camera("c", lens, np.eye(4), 12, 8)
    inside = [(0.25, 0.35), (0.35, 0.25), (0.05, 0.65), (1.09, 0.05)]
    borders = [(0, 0.3), (1.1, 0.3), (0.3, 0), (0.3, 0.7), (-0.01, 0.3), (1.101, 0.3), (0.3, 0.71)]
    points = [(x, y, 2.0) for x, y in inside + borders]
    points += [(0.1, 0.1, 1.0), (0.1, 0.1, -2.0)]
    rows, pixels = pixel_pairs(points, [camera])
    assert rows.tolist() == [0, 1, 2, 3]
    # (2.5, 3.5), (3.5, 2.5), (0.5, 6.5), (10.9, 0.5) as u, v
    assert pixels.tolist() == [[0, 4, 2], [0, 2, 4], [0, 6, 0], [0, 0, 11]]
    assert rows.dtype == pixels.dtype == np.int64
    just_deeper = [(0.1, 0.1, np.nextafter(1.0, 2))]
    assert len(pixel_pairs(just_deeper, [camera])[0]) == 1


def test_no_camera_sees_anything():
    rows, pixels = pixel_pairs([[0, 0, 50.0]], rig())
    assert rows.shape == (0,)
    assert pixels.shape == (0, 3)


# ------------------------------------------------------------------------------------------- the data set


def test_samples(tmp_path):
    source = Scene(tmp_path, blind=[1])
    data = PointPixelDataset(source, superpixels=True, maps=True)
    assert len(data) == 3
    assert data.get_data_name(2) == "scan2"
    for idx in range(3):
        sample, scan = data[idx], source.get_data(idx)
        for key in ("coord", "strength", "segment"):
            np.testing.assert_array_equal(sample[key], scan[key])
        assert sample["point_id"].tolist() == list(range(len(scan["coord"])))
        assert "point_id" in sample["index_valid_keys"]
        assert "segment" in sample["index_valid_keys"]
        expected = plain_pairs(scan["coord"], rig())
        assert as_tuples(sample["pair_point"], sample["pair_pixel"]) == expected
        weak = source.weak_labels(idx)
        assert sample["pair_label"].tolist() == [weak[n][r, c] for _, n, r, c in expected]
        assert sample["pair_label"].dtype == np.int64
        for key, found in (("images", source.images(idx)), ("weak_labels", weak)):
            assert all(np.array_equal(a, b) for a, b in zip(sample[key], found, strict=True))
        assert [m.shape for m in sample["superpixels"]] == list(SIZES)
    assert len(data[1]["pair_point"]) == 0 < len(data[0]["pair_point"])
    assert sorted(np.unique(data[0]["pair_label"])) == [0, 1, 2, 3, 4]
    assert data.weak_classes() == ["near", "middle", "far", "top"]


def test_where_labels_come_from(tmp_path):
    source = Scene(tmp_path)
    own = PointPixelDataset(source, labels="segment")[0]
    segment = own["segment"][own["pair_point"]]
    assert own["pair_label"].tolist() == [v + 1 if v >= 0 else 0 for v in segment]
    assert set(own["pair_label"].tolist()) == {0, 1, 2, 3, 4}
    assert "weak_labels" not in own
    assert "superpixels" not in own
    none = PointPixelDataset(source, labels=None)[0]
    assert not none["pair_label"].any()
    assert len(none["pair_label"]) == len(none["pair_point"])
    other = Scene(tmp_path, ignore_index=3)
    own = PointPixelDataset(other, labels="segment")[0]
    segment = own["segment"][own["pair_point"]]
    assert own["pair_label"].tolist() == [0 if v in (-1, 3) else v + 1 for v in segment]
    scan = source.get_data(0)
    scan["segment"][:] = -2
    source.get_data = lambda idx: scan
    assert not PointPixelDataset(source, labels="segment")[0]["pair_label"].any()


def test_some_of_the_cameras(tmp_path):
    source = Scene(tmp_path)
    whole = PointPixelDataset(source)[0]
    part = PointPixelDataset(source, cameras=["back", "left"], superpixels=True, maps=True)[0]
    assert [i.shape[:2] for i in part["images"]] == [SIZES[2], SIZES[0]]
    place = {0: 1, 2: 0}
    expected = {
        (p, place[n], r, c, label)
        for (p, n, r, c), label in zip(
            as_tuples(whole["pair_point"], whole["pair_pixel"]), whole["pair_label"], strict=True
        )
        if n in place
    }
    found = as_tuples(part["pair_point"], part["pair_pixel"])
    assert {
        (*pair, label) for pair, label in zip(found, part["pair_label"], strict=True)
    } == expected
    assert part["superpixels"][0][0, 1] == 2 * 10**6 + 1
    with pytest.raises(InputError, match="cameras: no top; there are left, right, back"):
        PointPixelDataset(source, cameras=["left", "top"])[0]
    with pytest.raises(InputError, match="expected a list of names"):
        PointPixelDataset(source, cameras="left")
    with pytest.raises(InputError, match="expected a list of names"):
        PointPixelDataset(source, cameras=[])


@pytest.mark.parametrize("cache", ["memory", "shared"])
def test_cached_samples_are_read_once(tmp_path, cache):
    source = Scene(tmp_path)
    data = PointPixelDataset(source, cache=cache, loop=2, superpixels=True)
    fresh = PointPixelDataset(source)[1]
    source.reads = 0
    first, again = data[1], data[4]
    assert source.reads == 1
    assert len(data) == 6
    first["pair_pixel"][:] = 0
    first["images"][0][:] = 0
    for key in ("pair_point", "pair_pixel", "pair_label", "point_id"):
        np.testing.assert_array_equal(again[key], fresh[key])
    np.testing.assert_array_equal(again["images"][0], fresh["images"][0])
    assert isinstance(again["images"], list)
    assert isinstance(again["superpixels"], list)


def test_several_and_testing(tmp_path):
    source = Scene(tmp_path)
    both = ConcatDataset([PointPixelDataset(source), PointPixelDataset(source, labels=None)])
    assert len(both) == 6
    assert not both[4]["pair_label"].any()
    assert both[1]["pair_label"].any()
    resize = [{"type": "kd.ResizeImages", "size": (20, 30)}]
    test = PointPixelDataset(source, transform=resize, test_mode=True, test_cfg={}, loop=5)
    assert len(test) == 3
    assert test[0]["images"][0].shape == (20, 30, 3)


def test_what_does_not_fit(tmp_path):
    source = Scene(tmp_path)
    with pytest.raises(InputError, match="num_classes=5, but .* 4 classes: near, middle, far, top"):
        PointPixelDataset(source, num_classes=5)
    assert PointPixelDataset(source, num_classes=4).num_classes == 4
    with pytest.raises(InputError, match="class 3, but num_classes=3"):
        PointPixelDataset(source, labels="segment", num_classes=3)[0]
    with pytest.raises(InputError, match="labels='strong': use 'weak' or 'segment'"):
        PointPixelDataset(source, labels="strong")
    with pytest.raises(InputError, match="has no cameras; use a reader such as"):
        PointPixelDataset(ConcatDataset([source]))
    source.images = lambda idx: [np.zeros((90, 159, 3), np.uint8)] * 3
    with pytest.raises(InputError, match=r"image of left is of shape \(90, 159, 3\)"):
        PointPixelDataset(source)[0]


# ------------------------------------------------------------------------------------------- files of readers


def note(path, classes, **others):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"classes": classes, **others}))


@pytest.mark.parametrize(
    ("content", "names", "table"),
    [
        ({"classes": ["a", "b"], "unknown": 255}, ("a", "b"), {0: 1, 1: 2, 255: 0, 2: -1}),
        ({"classes": ["none", "a"], "unknown": 0}, ("a",), {0: 0, 1: 1, 2: -1}),
        ({"classes": ["a", "b"]}, ("a", "b"), {0: 0, 1: 1, 2: 2, 3: -1}),
        ({"classes": ["Background", "a"]}, ("a",), {0: 0, 1: 1, 2: -1}),
        ({"classes": ["a", "?", "b"], "unknown": 1}, ("a", "b"), {0: 1, 1: 0, 2: 2, 3: -1}),
    ],
)
def test_what_values_mean(tmp_path, content, names, table):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    classes = read_classes(tmp_path / "classes.json")
    assert classes.names == names
    assert {value: int(classes.table[value]) for value in table} == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected `classes`"),
        ("[]", "expected `classes`"),
        ('{"unknown": 0}', "expected `classes`"),
        ('{"classes": "road"}', "expected `classes`"),
        ('{"classes": ["road"], "unknown": "0"}', "expected `classes`"),
        ('{"classes": [1]}', "expected `classes`"),
        ('{"classes": []}', "0 classes|1 classes"),
        ('{"classes": ["none"], "unknown": 0}', "1 classes, unknown 0"),
        ('{"classes": ["road"], "unknown": 256}', "unknown 256"),
    ],
)
def test_notes_that_say_nothing(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(path)
    with pytest.raises(InputError, match="cannot be read.*names the classes"):
        read_classes(tmp_path / "other.json")


def test_maps_that_cannot_be_used(tmp_path):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    note(tmp_path / "classes.json", ["a", "b"])
    classes, path = read_classes(tmp_path / "classes.json"), tmp_path / "m.png"
    camera = Camera("cam", np.eye(3), np.eye(4), 6, 4)
    with pytest.raises(InputError, match="m.png: the map of the image is missing"):
        read_map(path)
    write_png(path, np.random.default_rng(0).integers(0, 255, (4, 4, 3)).astype(np.uint8))
    with pytest.raises(InputError, match="a mask has one channel"):
        read_map(path)
    write_png(path, np.zeros((4, 5), np.uint8))
    with pytest.raises(InputError, match="m.png: 5 x 4 pixels, but the image of cam has 6 x 4"):
        read_map(path, camera)
    values = np.zeros((4, 6), np.uint8)
    values[1, 2] = 3
    write_png(path, values)
    with pytest.raises(
        InputError, match="m.png: value 3 is none of the 2 classes of .*classes.json"
    ):
        read_weak_labels(path, classes, camera)
    write_png(path, (values.astype(np.uint16) * 100))
    with pytest.raises(InputError, match="value 300 is none of the 2 classes"):
        read_weak_labels(path, classes, camera)
    values[1, 2] = 2
    write_png(path, values)
    assert read_weak_labels(path, classes, camera).tolist() == values.tolist()


CALIB = """P0: 40 0 30 0 0 40 10 0 0 0 1 0
P1: 40 0 30 -20 0 40 10 0 0 0 1 0
P2: 40 0 30 2 0 40 10 0 0 0 1 0
P3: 40 0 30 -18 0 40 10 0 0 0 1 0
"""
TURN = "0 -1 0 0 0 0 -1 -0.1 1 0 0 -0.2"  # x forward, z up to x right, z forward


def street_points(seed):
    rng = np.random.default_rng(seed)
    return np.c_[rng.normal(size=(400, 3)) * (10, 6, 1), rng.random(400)].astype("<f4")


@pytest.fixture
def semantic(tmp_path):
    """Two sequences of two scans with images of 60 x 20 pixels, values of weak labels 0..2 and 255."""
    for sequence in ("00", "01"):
        folder = tmp_path / "dataset" / "sequences" / sequence
        for name in ("velodyne", "labels", "image_2", "weak_labels", "superpixels"):
            (folder / name).mkdir(parents=True)
        (folder / "calib.txt").write_text(f"{CALIB}Tr: {TURN}\n")
        note(folder / "weak_labels" / "classes.json", ["car", "road", "tree"], unknown=255)
        for number in range(2):
            rng = np.random.default_rng(number)
            name = f"{number:06d}"
            (folder / "velodyne" / f"{name}.bin").write_bytes(street_points(number).tobytes())
            labels = rng.choice([0, 10, 40, 70], 400).astype("<u4")
            (folder / "labels" / f"{name}.label").write_bytes(labels.tobytes())
            image = rng.integers(0, 256, (20, 60, 3)).astype(np.uint8)
            write_png(folder / "image_2" / f"{name}.png", image)
            weak = rng.choice(np.uint8([0, 1, 2, 255]), (20, 60))
            write_png(folder / "weak_labels" / f"{name}.png", weak)
            segments = np.repeat(np.arange(30, dtype=np.uint16), 40).reshape(20, 60) * 11
            write_png(folder / "superpixels" / f"{name}.png", segments)
    return tmp_path


def test_semantic_kitti(semantic):
    pil = pytest.importorskip("PIL.Image", reason="the extra `images` is not installed")
    config = dict(type="kd.SemanticKITTIDataset", split="train", data_root=str(semantic))
    data = DATASETS.build(
        dict(type="kd.PointPixelDataset", source=config, superpixels=True, maps=True)
    )
    assert len(data) == 4
    assert data.weak_classes() == ["car", "road", "tree"]
    sample = data[3]
    assert sample["name"] == "01_000001"
    folder = semantic / "dataset" / "sequences" / "01"
    raw = np.asarray(pil.open(folder / "weak_labels" / "000001.png"))
    # P2 Tr X from the files themselves.
    calib = load_calib(folder / "calib.txt")
    points = street_points(1)[:, :3].astype(float)
    image = np.c_[points, np.ones(400)] @ (calib["P2"] @ calib["Tr"]).T
    u, v = image[:, 0] / image[:, 2], image[:, 1] / image[:, 2]
    seen = (image[:, 2] > 1) & (u > 0) & (u < 59) & (v > 0) & (v < 19)
    assert sample["pair_point"].tolist() == np.flatnonzero(seen).tolist()
    assert 50 < seen.sum() < 250
    values = raw[sample["pair_pixel"][:, 1], sample["pair_pixel"][:, 2]]
    assert sample["pair_label"].tolist() == [0 if x == 255 else x + 1 for x in values.tolist()]
    assert sample["superpixels"][0].max() == 29 * 11
    np.testing.assert_array_equal(
        sample["weak_labels"][0], np.where(raw == 255, 0, raw.astype(int) + 1)
    )
    with pytest.raises(InputError, match="num_classes=19"):
        PointPixelDataset(data.source, num_classes=19)


def test_superpixels_of_another_folder(semantic):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = SemanticKITTIDataset("train", str(semantic))
    other = semantic / "dataset" / "sequences" / "00" / "superpixels_30"
    other.mkdir()
    write_png(other / "000000.png", np.full((20, 60), 7, np.uint16))
    assert PointPixelDataset(source, superpixels=True)[0]["superpixels"][0].max() == 29 * 11
    sample = PointPixelDataset(source, superpixels="superpixels_30")[0]
    assert (sample["superpixels"][0] == 7).all()
    with pytest.raises(
        InputError, match="superpixels_30/000001.png: the map of the image is missing"
    ):
        PointPixelDataset(source, superpixels="superpixels_30")[1]


def test_semantic_kitti_with_files_that_do_not_fit(semantic):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = SemanticKITTIDataset("train", str(semantic))
    folder = semantic / "dataset" / "sequences" / "01"
    data = PointPixelDataset(source, superpixels=True)
    weak = folder / "weak_labels" / "000000.png"
    write_png(weak, np.full((20, 60), 3, np.uint8))
    with pytest.raises(InputError, match="01/weak_labels/000000.png: value 3 is none of the 3 cl"):
        data[2]
    write_png(weak, np.zeros((20, 61), np.uint8))
    with pytest.raises(InputError, match="01/weak_labels/000000.png: 61 x 20 pixels"):
        data[2]
    weak.unlink()
    with pytest.raises(InputError, match="01/weak_labels/000000.png: the map of the image is miss"):
        data[2]
    (folder / "superpixels" / "000001.png").unlink()
    with pytest.raises(InputError, match="01/superpixels/000001.png: the map"):
        data[3]
    note(folder / "weak_labels" / "classes.json", ["car", "road", "bush"], unknown=255)
    with pytest.raises(InputError, match="01/weak_labels/classes.json: other classes than in"):
        PointPixelDataset(source)
    (folder / "weak_labels" / "classes.json").unlink()
    with pytest.raises(InputError, match="01/weak_labels/classes.json: cannot be read"):
        PointPixelDataset(source)
    assert PointPixelDataset(source, labels=None)[2]["name"] == "01_000000"


def test_kitti_detection(tmp_path):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    root = tmp_path / "training"
    for name in ("velodyne", "calib", "image_2", "weak_labels", "superpixels"):
        (root / name).mkdir(parents=True)
    text = f"{CALIB}R0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: {TURN}\n"
    (root / "calib" / "000007.txt").write_text(text)
    (root / "velodyne" / "000007.bin").write_bytes(street_points(7).tobytes())
    write_png(root / "image_2" / "000007.png", np.zeros((20, 60, 3), np.uint8))
    weak = np.random.default_rng(0).integers(0, 3, (20, 60)).astype(np.uint8)
    write_png(root / "weak_labels" / "000007.png", weak)
    write_png(root / "superpixels" / "000007.png", weak)
    note(root / "weak_labels" / "classes.json", ["car", "road"])
    source = KITTIObjectDataset("training", str(tmp_path))
    sample = PointPixelDataset(source, superpixels=True)[0]
    rows, columns = sample["pair_pixel"][:, 1:].T
    assert len(rows) > 50
    assert sample["pair_label"].tolist() == weak[rows, columns].tolist()
    np.testing.assert_array_equal(sample["superpixels"][0], weak)
    assert source.weak_classes() == ["car", "road"]


@pytest.fixture
def world(tmp_path):
    """nuScenes' layout in a folder that has `samples` in its path, with weak labels and superpixels."""
    root = tmp_path / "samples"
    write(root / "raw", tables())
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=5, with_camera=True)
    source = NuScenesDataset(data_root=str(root), sweeps=5)
    note(root / "raw" / "camseg" / "classes.json", ["none", "car", "road"], unknown=0)
    (root / "raw" / "superpixels_slic").mkdir()
    for idx in range(len(source)):
        for number, (name, cam) in enumerate(source.info(idx)["cams"].items()):
            rng = np.random.default_rng([idx, number])
            token = cam["sample_data_token"]
            path = root / "raw" / "camseg" / name / f"{token}.png"
            path.parent.mkdir(exist_ok=True)
            write_png(path, rng.integers(0, 3, (24, 40)).astype(np.uint8))
            segments = np.full((24, 40), 10 * idx + number, np.uint8)
            write_png(root / "raw" / "superpixels_slic" / f"{token}.png", segments)
    return root


def test_nuscenes(world):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = NuScenesDataset(data_root=str(world), sweeps=5)
    data = PointPixelDataset(source, superpixels=True, maps=True)
    sample = data[2]
    assert data.weak_classes() == ["car", "road"]
    assert [int(m[0, 0]) for m in sample["superpixels"]] == [20 + i for i in range(6)]
    for number, values in enumerate(sample["weak_labels"]):
        expected = np.random.default_rng([2, number]).integers(0, 3, (24, 40))
        np.testing.assert_array_equal(values, expected)
    assert len(sample["images"]) == len(CAMERAS)
    assert as_tuples(sample["pair_point"], sample["pair_pixel"]) == plain_pairs(
        sample["coord"], source.cameras(2)
    )
    merged = NuScenesDataset(data_root=str(world), sweeps=5, aggregate_sweeps=2)
    sample = PointPixelDataset(merged)[2]
    assert {"sweep", "time", "point_id"} <= set(sample["index_valid_keys"])


def test_nuscenes_with_paths_of_another_machine(world):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = NuScenesDataset(data_root=str(world), sweeps=5)
    before = source.weak_label_files(0)
    assert before[0] == world / "raw/camseg/CAM_FRONT/data-0-CAM_FRONT-0.png"
    for cam in source.info(0)["cams"].values():
        cam["data_path"] = "/far/samples/nuscenes/" + cam["data_path"].replace(".png", ".jpg")
    assert source.weak_label_files(0) == before
    source.info(0)["cams"]["CAM_BACK"]["data_path"] = "elsewhere/x.jpg"
    with pytest.raises(InputError, match="weak labels are looked for where images are below sampl"):
        source.weak_label_files(0)
    source.info(0)["cams"]["CAM_BACK"].pop("sample_data_token")
    with pytest.raises(InputError, match="CAM_BACK of data-0-LIDAR_TOP-0: no sample_data_token"):
        source.superpixel_files(0)


def test_images_may_be_jpeg(world):
    pil = pytest.importorskip("PIL.Image", reason="the extra `images` is not installed")
    source = NuScenesDataset(data_root=str(world), sweeps=5)
    for cam in source.info(0)["cams"].values():
        path = world / "raw" / cam["data_path"]
        pil.open(path).convert("RGB").save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
        cam["data_path"] = cam["data_path"].replace(".png", ".jpg")
    sample = PointPixelDataset(source, maps=True)[0]
    assert [i.shape for i in sample["images"]] == [(24, 40, 3)] * 6
    expected = np.random.default_rng([0, 5]).integers(0, 3, (24, 40))
    np.testing.assert_array_equal(sample["weak_labels"][5], expected)


# ------------------------------------------------------------------------------------------- real samples


class RealKeyframe(Scene):
    """The real key frame; cameras from the sample's own file, of known checksum."""

    def __init__(self, folder, turn=0.0):
        content = pickle.loads(next(folder.glob("*.pkl")).read_bytes())
        self.folder, self.views = folder / "samples", content["data_list"][0]["images"]
        (path,) = (self.folder / "LIDAR_TOP").iterdir()
        self.scan = np.fromfile(path, np.float32).reshape(-1, 5)
        self.turn = turned(turn)
        super().__init__(folder, count=1)

    def get_data(self, idx):
        segment = np.full(len(self.scan), -1, np.int32)
        return {"coord": self.scan[:, :3].copy(), "segment": segment, "name": "key frame"}

    def cameras(self, idx):
        return [
            Camera(name, view["cam2img"], self.turn @ view["lidar2cam"], 1600, 900)
            for name, view in self.views.items()
        ]

    def images(self, idx):
        return [read_rgb(self.folder / name / v["img_path"]) for name, v in self.views.items()]


def turned(degrees):
    """A camera's error: a rotation about its vertical axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    matrix[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    return matrix


def jumps(scan, ring):
    """Points before a gap of more than 2 m to a neighbour in their ring: there images should have edges, too."""
    order = np.lexsort((np.arctan2(scan[:, 1], scan[:, 0]), ring))
    distance = np.linalg.norm(scan[order, :3].astype(float), axis=1)
    step = np.where(np.diff(ring[order]) == 0, np.diff(distance), 0)
    found = np.zeros(len(scan), bool)
    found[order[:-1]] |= step > 2
    found[order[1:]] |= step < -2
    return found


def edge_ratio(points, pixels, images, edges):
    """How much steeper the images are, left to right, where the points have a jump than at all pairs."""
    from scipy.ndimage import gaussian_filter

    steep = np.zeros(len(points))
    for number, image in enumerate(images):
        slope = np.abs(np.gradient(gaussian_filter(image.mean(2), 2), axis=1))
        here = pixels[:, 0] == number
        steep[here] = np.minimum(slope, np.quantile(slope, 0.95))[pixels[here, 1], pixels[here, 2]]
    return steep[edges[points]].mean() / steep.mean()


def test_real_nuscenes(samples):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = RealKeyframe(samples / "nuscenes")
    sample = PointPixelDataset(source, labels=None)[0]
    names = [camera.name for camera in source.cameras(0)]
    for number, (name, view) in enumerate(source.views.items()):
        image = (
            np.c_[source.scan[:, :3], np.ones(len(source.scan))]
            @ (np.array(view["cam2img"]) @ np.array(view["lidar2cam"])[:3]).T
        )
        u, v, z = image[:, 0] / image[:, 2], image[:, 1] / image[:, 2], image[:, 2]
        seen = (z > 1) & (u > 0) & (u < 1599) & (v > 0) & (v < 899)
        here = sample["pair_pixel"][:, 0] == number
        assert here.sum() == seen.sum(), name
        assert sample["pair_point"][here].tolist() == np.flatnonzero(seen).tolist()
        rows, columns = np.rint(v[seen]), np.rint(u[seen])
        np.testing.assert_array_equal(sample["pair_pixel"][here, 1:].T, [rows, columns])
    counts = dict(zip(names, np.bincount(sample["pair_pixel"][:, 0]).tolist(), strict=True))
    # Of those with u and v in the whole image, at most a few in the last row and column are missing.
    known = {"CAM_FRONT": 3067, "CAM_FRONT_RIGHT": 3079, "CAM_FRONT_LEFT": 3704, "CAM_BACK": 4826,
             "CAM_BACK_LEFT": 4097, "CAM_BACK_RIGHT": 3379}  # fmt: skip
    assert all(0 <= known[name] - count <= 12 for name, count in counts.items())
    # Where the LiDAR sees a gap the images have edges, and a camera half a degree aside would not show it.
    edges = jumps(source.scan, source.scan[:, 4])
    ratio = edge_ratio(sample["pair_point"], sample["pair_pixel"], sample["images"], edges)
    assert ratio > 1.9
    for degrees in (-0.5, 0.5, 2.0):
        wrong = RealKeyframe(samples / "nuscenes", degrees).cameras(0)
        off = edge_ratio(*pixel_pairs(source.scan[:, :3], wrong), sample["images"], edges)
        assert off < 0.9 * ratio, degrees


@pytest.mark.parametrize("sequence", ["00", "06", "08"])
def test_real_semantic_kitti(samples, sequence):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = SemanticKITTIDataset(sequence, str(samples / "semantickitti"))
    sample = PointPixelDataset(source, labels="segment", num_classes=19)[0]
    assert 19_000 < len(sample["pair_point"]) < 20_100
    assert len(np.unique(sample["pair_point"])) == len(sample["pair_point"])
    height, width = sample["images"][0].shape[:2]
    _, row, column = sample["pair_pixel"].T
    assert row.min() >= 0
    assert row.max() < height
    assert column.min() >= 0
    assert column.max() < width
    own = sample["segment"][sample["pair_point"]]
    np.testing.assert_array_equal(sample["pair_label"], own + 1)
    # Road lies below the horizon, and lower in the image the nearer it is.
    depth = sample["coord"][sample["pair_point"], 0]
    road = own == 8
    assert row[road].min() > 0.4 * height
    assert np.corrcoef(1 / depth[road], row[road])[0, 1] > 0.98
    # Edges as above; the scanner's rings from the jumps of azimuth from point to point.
    scan = sample["coord"]
    azimuth = np.arctan2(scan[:, 1], scan[:, 0]) % (2 * np.pi)
    ring = np.r_[0, np.cumsum(np.diff(azimuth) < -np.pi)]
    edges = jumps(scan, ring)
    ratio = edge_ratio(sample["pair_point"], sample["pair_pixel"], sample["images"], edges)
    camera = source.cameras(0)[0]
    for degrees in (-1.0, 1.0, 3.0):
        wrong = Camera(
            "wrong", camera.intrinsics, turned(degrees) @ camera.lidar_to_camera, width, height
        )
        assert edge_ratio(*pixel_pairs(scan, [wrong]), sample["images"], edges) < 0.9 * ratio


def test_real_kitti_detection(samples):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    source = KITTIObjectDataset("training", str(samples / "kitti"), classes=["Car", "Van"])
    sample = PointPixelDataset(source, labels="segment")[0]
    folder = samples / "kitti" / "training"
    scan, calib = read_scan(folder / "velodyne/002155.bin"), read_calib(folder / "calib/002155.txt")
    rectified = np.eye(4)
    rectified[:3, :3] = calib["R0_rect"]
    image = (
        np.c_[scan[:, :3], np.ones(len(scan))]
        @ (calib["P2"] @ rectified @ np.vstack([calib["Tr_velo_to_cam"], [0, 0, 0, 1]])).T
    )
    u, v = image[:, 0] / image[:, 2], image[:, 1] / image[:, 2]
    seen = (image[:, 2] > 1) & (u > 0) & (u < 1241) & (v > 0) & (v < 374)
    assert sample["pair_point"].tolist() == np.flatnonzero(seen).tolist()
    np.testing.assert_array_equal(
        sample["pair_pixel"][:, 1:].T, [np.rint(v[seen]), np.rint(u[seen])]
    )
    # People drew rectangles around the objects in the image: the pairs of points in their boxes lie in them.
    rectangles = [
        [float(word) for word in line.split()[4:8]]
        for line in (folder / "label_2/002155.txt").read_text().splitlines()
        if line.split()[0] in ("Car", "Van")
    ]
    _, row, column = sample["pair_pixel"][sample["pair_label"] > 0].T

    def share(shift):
        place = column + shift
        inside = [
            (place >= a - 1) & (place <= c + 1) & (row >= b - 1) & (row <= d + 1)
            for a, b, c, d in rectangles
        ]
        return np.any(inside, axis=0).mean()

    assert len(row) > 500
    assert share(0) > 0.97
    assert share(80) < share(0) - 0.1


def test_a_copy_of_real_files_with_weak_labels(samples, tmp_path):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    shutil.copytree(samples / "kitti", tmp_path / "kitti")
    folder = tmp_path / "kitti" / "training"
    for name in ("weak_labels", "superpixels"):
        (folder / name).mkdir()
        rows = np.repeat((np.arange(375) // 125).astype(np.uint8), 1242).reshape(375, 1242)
        write_png(folder / name / "002155.png", rows)
    note(folder / "weak_labels" / "classes.json", ["middle", "low"])
    source = KITTIObjectDataset("training", str(tmp_path / "kitti"))
    sample = PointPixelDataset(source, superpixels=True)[0]
    assert sample["pair_label"].tolist() == (sample["pair_pixel"][:, 1] // 125).tolist()
    assert (sample["pair_label"] == 0).sum() < (sample["pair_label"] > 0).sum()
