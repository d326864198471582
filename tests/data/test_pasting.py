"""Pasting: worked places, plain loops, what a pasted point has in each array, cameras, and what does not fit."""

import json
import math

import numpy as np
import pytest

from pointcept_kd.data.camera_views import CameraViewDataset
from pointcept_kd.data.instances import build
from pointcept_kd.data.pasting import (
    GROUND,
    MIN_POINTS,
    PasteInstances,
    before_and_after,
    draw_pasting,
    ground_patches,
    placed,
    points_in_box,
)
from pointcept_kd.data.pictures import read_image
from pointcept_kd.data.semantic_kitti import CLASS_NAMES, COLORS
from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset as Reader
from pointcept_kd.host import TRANSFORMS, InputError

from .pair_scene import Scene

CAR, PERSON, ROAD, WALK, BUILDING = (
    CLASS_NAMES.index(n) for n in ("car", "person", "road", "sidewalk", "building")
)
SIZE = (18, 32)


def object_points(kind, azimuth, reach, points=60, seed=0):
    """A box-shaped object with strength 0.5; its lowest point is at z = -1.5."""
    rng = np.random.default_rng(seed)
    size = (3.0, 1.6, 1.4) if kind == "car" else (0.5, 0.5, 1.7)
    place = (rng.random((points, 3)) - (0.5, 0.5, 0)) * size
    place[0, 2] = 0
    c, s = math.cos(azimuth), math.sin(azimuth)
    turned = np.stack([c * place[:, 0] - s * place[:, 1], s * place[:, 0] + c * place[:, 1]], 1)
    turned += reach * np.array([c, s])
    return np.c_[turned, place[:, 2] - 1.5, np.full(points, 0.5)].astype("<f4")


def database(folder, objects, layout="semantic_kitti", names=CLASS_NAMES):
    """Write a database of (class name, points)."""
    rows = []
    folder.mkdir()
    for number, (name, points) in enumerate(objects):
        path = folder / name / f"s_{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(points.astype("<f4").tobytes())
        x, y = points[:, :2].astype(float).mean(0)
        rows.append(
            (list(names).index(name), 0, number, len(points), math.hypot(x, y), math.atan2(y, x))
        )
    columns = zip(*rows, strict=True) if rows else [()] * 6
    keys = ("class", "scan", "id", "points", "range", "azimuth")
    note = {key: list(column) for key, column in zip(keys, columns, strict=True)}
    note |= {
        "layout": layout,
        "names": list(names),
        "scans": ["s"],
        "columns": ["x", "y", "z", "strength"],
    }
    (folder / "index.json").write_text(json.dumps(note))
    return str(folder)


def street(half=20.0, step=0.8, walls=True):
    """A flat road at z = -1.7 with a wall on one side."""
    x, y = np.meshgrid(np.arange(-half, half, step), np.arange(-8, 8, step))
    road = np.c_[x.ravel(), y.ravel(), np.full(x.size, -1.7)]
    wall = np.c_[
        np.arange(-half, half, 0.2),
        np.full(int(2 * half / 0.2), 9.0),
        np.zeros(int(2 * half / 0.2)),
    ]
    coord = np.r_[road, wall] if walls else road
    segment = np.r_[np.full(len(road), ROAD), np.full(len(coord) - len(road), BUILDING)]
    return {
        "coord": coord.astype(np.float32),
        "strength": np.full((len(coord), 1), 0.1, np.float32),
        "segment": segment.astype(np.int32),
        "name": "street",
    }


@pytest.fixture
def objects(tmp_path):
    cars = [
        ("car", object_points("car", a, r, seed=i))
        for i, (a, r) in enumerate(((0.3, 9), (2.5, 14), (-2, 6)))
    ]
    people = [("person", object_points("person", 1.0, 7, 30, seed=9))]
    return database(tmp_path / "objects", cars + people)


# ----------------------------------------------------------------------------------------------- the pieces


def test_patches_by_plain_loops():
    rng = np.random.default_rng(0)
    coord = (rng.normal(size=(600, 3)) * (9, 9, 0.2)).astype(np.float32)
    cells = {}
    for point in coord.astype(float):
        cells.setdefault((round(point[0] / 5), round(point[1] / 5)), []).append(point)
    expected = [np.mean(cells[key], 0) for key in sorted(cells) if len(cells[key]) >= 20]
    found = ground_patches(coord)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert 3 < len(expected) < len(cells)
    assert ground_patches(coord[:0]).shape == (0, 3)
    assert ground_patches(coord[:19]).shape == (0, 3)


def test_worked_place():
    # From azimuth 0 at 10 m to azimuth 90 degrees at 8 m: a quarter turn, its front still faces the sensor.
    points = np.array([[9.0, 1, -1], [11, 1, 0], [11, -1, 0.5], [9, -1, 1]])
    moved = placed(points, np.array([0.0, 8.0, -2.0]))
    expected = [[-1, 7, -2], [-1, 9, -1], [1, 9, -0.5], [1, 7, 0]]
    np.testing.assert_allclose(moved, expected, atol=1e-12)
    # Across the seam at 180 degrees, and half a turn, where the cosine alone would lose the sign.
    for start, end in ((179, -179), (0, 180), (10, -170), (0, 1e-7)):
        a, b = math.radians(start), math.radians(end)
        own = np.array([[10, 0.5, 0], [10, -0.5, 1], [11, 0, 2.0]])
        own -= (*own[:, :2].mean(0) - (10, 0), 0)
        c, s = math.cos(a), math.sin(a)
        turned = own @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        c, s = math.cos(b), math.sin(b)
        there = own @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        np.testing.assert_allclose(placed(turned, np.array([10 * c, 10 * s, 0])), there, atol=1e-6)


def test_height_of_the_sensor_does_not_turn_objects():
    points = object_points("car", 0.4, 9)[:, :3].astype(float)
    low, high = placed(points, np.array([3.0, 7, -2])), placed(points, np.array([3.0, 7, 40]))
    np.testing.assert_allclose(low[:, :2], high[:, :2], atol=1e-12)


def test_strictly_inside():
    corners = np.array([[0, 0, 0], [2, 2, 2.0]])
    scene = np.array(
        [[1, 1, 1], [0, 1, 1], [1, 2, 1], [1, 1, 2.0001], [1.999, 0.001, 1], [-1, 1, 1]]
    )
    assert points_in_box(scene, corners).tolist() == [True, False, False, False, True, False]


def test_tables_name_classes_that_exist():
    from pointcept_kd.data import nuscenes, waymo

    names = {
        "semantic_kitti": CLASS_NAMES,
        "nuscenes": nuscenes.CLASS_NAMES,
        "waymo": waymo.CLASS_NAMES,
    }
    for layout, table in GROUND.items():
        assert set(MIN_POINTS[layout]) <= set(table) <= set(names[layout])
        assert {ground for grounds in table.values() for ground in grounds} <= set(names[layout])
    assert len(GROUND["nuscenes"]) == 10
    assert len(GROUND["semantic_kitti"]) == 8


# -------------------------------------------------------------------------------------------------- pasting


def test_what_is_pasted(objects):
    data = street()
    before = {k: v.copy() for k, v in data.items() if k != "name"}
    data = PasteInstances(objects, min_points=1)(data)
    pasted = data["pasted"]
    count = len(before["coord"])
    assert pasted.dtype == bool
    assert pasted[count:].all()
    assert not pasted[:count].any()
    assert 60 < pasted.sum() <= 6 * 60
    for key, value in before.items():
        np.testing.assert_array_equal(data[key][:count], value)
        assert data[key].dtype == value.dtype
    assert set(data["segment"][pasted].tolist()) <= {CAR, PERSON}
    assert (data["strength"][pasted] == 0.5).all()
    # They stand on the road, at most 5 cm above.
    assert -1.7001 < data["coord"][pasted, 2].min() < -1.6499
    assert "pasted" in data["index_valid_keys"]
    thin = TRANSFORMS.build({"type": "RandomDropout", "dropout_application_ratio": 1.0})(data)
    assert len(thin["pasted"]) == len(thin["coord"]) < len(before["coord"]) + pasted.sum()


def separate(coord, pieces):
    """Cut the pasted points into their objects: they come one after the other."""
    assert len(coord) == sum(pieces)
    return np.split(coord, np.cumsum(pieces)[:-1])


def test_objects_keep_shape_range_and_side(tmp_path):
    own = object_points("car", 0.3, 9)
    folder = database(tmp_path / "one", [("car", own)])
    paste = PasteInstances(folder, count=1, min_points=1)
    patches = ground_patches(street()["coord"][street()["segment"] == ROAD])
    reach = np.hypot(*own[:, :2].astype(float).mean(0))
    nearest = patches[np.argsort(np.abs(np.hypot(*patches[:, :2].T) - reach), kind="stable")[:9]]
    places = set()
    for seed in range(12):
        np.random.seed(seed)
        data = paste(street())
        new = data["coord"][data["pasted"]].astype(float)
        anchor = np.array([*new[:, :2].mean(0), new[:, 2].min()])
        shift = anchor - nearest
        close = (
            (np.abs(shift[:, :2]) <= 0.5 + 1e-4).all(1)
            & (shift[:, 2] > -1e-4)
            & (shift[:, 2] < 0.0501)
        )
        assert close.any()  # never further from the patch itself, however many were tried
        places.add(tuple(anchor))
        # Seen from the sensor it is the same object: the same points in front, as high above its foot.
        np.testing.assert_allclose(ahead(new), ahead(own.astype(float)), atol=1e-3)
        np.testing.assert_allclose(
            new[:, 2] - new[:, 2].min(), own[:, 2] - own[:, 2].min(), atol=1e-5
        )
    assert len(places) == 12  # no two draws are the same


def ahead(points):
    """Distance of points from their middle, along the ray from the sensor."""
    centre = points[:, :2].mean(0)
    return (points[:, :2] - centre) @ centre / np.hypot(*centre)


def test_same_seed_same_scan(objects):
    paste, results = PasteInstances(objects, min_points=1), []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        results.append(paste(street())["coord"])
    np.testing.assert_array_equal(results[0], results[1])
    assert results[2].shape != results[0].shape or np.abs(results[2] - results[0]).max() > 0


def test_objects_in_the_database_stay_as_they_are(objects):
    paste = PasteInstances(objects, min_points=1)
    kept = [paste.database.load(row) for row in range(4)]
    for _ in range(5):
        paste(street())
    for row in range(4):
        np.testing.assert_array_equal(paste.database.load(row), kept[row])


def test_no_two_things_in_one_place(objects):
    # The road is full of cars, a few centimetres above it and beyond its edges.
    data = street(walls=False)
    x, y = np.meshgrid(np.arange(-24, 24, 0.3), np.arange(-12, 12, 0.3))
    cars = np.c_[x.ravel(), y.ravel(), np.full(x.size, -1.4)].astype(np.float32)
    full = {
        "coord": np.r_[data["coord"], cars],
        "strength": np.r_[data["strength"], np.zeros((len(cars), 1), np.float32)],
        "segment": np.r_[data["segment"], np.full(len(cars), CAR, np.int32)],
    }
    result = PasteInstances(objects, min_points=1)({**full, "name": "full"})
    assert not result["pasted"].any()
    # The same points of another class count less: 60 points take up to 3 of them.
    full["segment"][len(data["coord"]) :] = BUILDING
    result = PasteInstances(objects, min_points=1, others=10.0)({**full, "name": "full"})
    assert result["pasted"].any()
    assert not PasteInstances(objects, min_points=1, others=0)({**full, "name": "f"})[
        "pasted"
    ].any()


def test_pasted_objects_do_not_meet(tmp_path):
    folder = database(tmp_path / "one", [("car", object_points("car", 0.3, 9))])
    data = PasteInstances(folder, count=15, min_points=1)(street())
    pieces = separate(
        data["coord"][data["pasted"]].astype(float), [60] * int(data["pasted"].sum() // 60)
    )
    assert len(pieces) > 3
    for i, later in enumerate(pieces):
        for earlier in pieces[:i]:
            assert not points_in_box(earlier, later).any()


def test_scan_without_ground(objects):
    data = street()
    data["segment"][:] = BUILDING
    before = data["coord"].copy()
    result = PasteInstances(objects, min_points=1)(data)
    np.testing.assert_array_equal(result["coord"], before)
    assert result["pasted"].tolist() == [False] * len(before)
    sparse = {k: v[:15] if k != "name" else v for k, v in street().items()}
    assert not PasteInstances(objects, min_points=1)(sparse)["pasted"].any()


def test_where_who_may_stand(objects):
    # The sidewalk carries persons but no cars.
    data = street(walls=False)
    data["segment"][:] = WALK
    result = PasteInstances(objects, count=20, min_points=1)(data)
    assert set(result["segment"][result["pasted"]].tolist()) == {PERSON}
    result = PasteInstances(objects, count=20, min_points=1, ground={"car": ["sidewalk"]})(
        street(walls=False)
    )
    assert not result["pasted"].any()


def test_limits(objects):
    every = PasteInstances(objects)  # a car has 300 points or more, a person 25
    assert list(every.rows) == [PERSON]
    assert list(PasteInstances(objects, min_points=31).rows) == [CAR]
    assert list(PasteInstances(objects, min_points={"car": 61}).rows) == [PERSON]
    data = PasteInstances(objects, count=30, min_points=1, limits={"car": 1, "person": 2})(street())
    found = np.bincount(data["segment"][data["pasted"]], minlength=19)
    assert found[CAR] == 60
    assert found[PERSON] == 60
    # The third car would be more than 100 points already; what is begun is finished.
    data = PasteInstances(objects, count=30, min_points=1, most_points=100, limits={"person": 0})(
        street()
    )
    assert data["pasted"].sum() == 120
    assert not PasteInstances(objects, count=0, min_points=1)(street())["pasted"].any()
    assert not PasteInstances(objects, min_points=1, p=0)(street())["pasted"].any()


def test_weights(tmp_path):
    few, many = object_points("person", 1.0, 7, 30), object_points("car", 1.0, 7)
    folder = database(tmp_path / "w", [("person", few)] + [("car", many)] * 9)
    for weights, share in (
        ("uniform", 1 / 2),
        ("sqrt", 3 / 4),
        ("proportional", 9 / 10),
        ("inverse_sqrt", 1 / 4),
    ):
        paste = PasteInstances(folder, min_points=1, weights=weights)
        assert dict(zip(paste.rows, paste.share, strict=True))[CAR] == pytest.approx(share)


def test_merged_scans(objects):
    data = street()
    count = len(data["coord"])
    twice = {k: np.concatenate([v, v]) for k, v in data.items() if k != "name"}
    twice |= {"sweep": np.repeat([0, 1], count).astype(np.int32), "time": np.zeros((2 * count, 1), np.float32),
              "name": "m", "index_valid_keys": ["coord", "strength", "segment", "sweep", "time"]}  # fmt: skip
    result = PasteInstances(objects, min_points=1)(twice)
    new = int(result["pasted"].sum())
    assert new > 0
    assert result["pasted"][count : count + new].all()
    assert (np.diff(result["sweep"]) >= 0).all()
    assert int((result["sweep"] == 0).sum()) == count + new
    assert len(result["time"]) == 2 * count + new
    np.testing.assert_array_equal(result["coord"][count + new :], data["coord"])
    result["sweep"] = result["sweep"][::-1]
    with pytest.raises(InputError, match="own points come before those of sweeps"):
        PasteInstances(objects, min_points=1)(result)


def test_no_camera_sees_pasted_points(tmp_path, objects):
    class Street(Scene):
        def get_data(self, idx):
            return {**super().get_data(idx), **street(), "name": f"scan{idx}"}

    source = Street(tmp_path)
    chain = [{"type": "kd.PasteInstances", "database": objects, "min_points": 1}]
    rows = [{"type": "kd.ViewsToRows", "image_size": SIZE}]
    plain = CameraViewDataset(source, image_size=SIZE, transform=rows)[0]
    data = CameraViewDataset(source, image_size=SIZE, transform=chain + rows)[0]
    pasted = data["pasted"]
    assert pasted.any()
    assert len(np.unique(data["point_id"])) == len(data["coord"])
    assert len(data["view_point"]) > 0
    assert not pasted[data["view_point"]].any()
    for key in ("view_point", "view_image", "view_uv", "images"):
        np.testing.assert_array_equal(data[key], plain[key])
    views = {
        "type": "kd.TwoViews",
        "student_voxel": {"type": "kd.VoxelSample", "coordinates": "cartesian"},
    }
    both = CameraViewDataset(source, image_size=SIZE, transform=[*chain, views, *rows])[0]
    # Both views hold the same objects.
    np.testing.assert_array_equal(both["teacher_pasted"][both["match"]], both["pasted"])
    assert both["pasted"].any()
    assert not both["pasted"][both["view_point"]].any()


def test_a_database_without_pictures(tmp_path, objects):
    with pytest.raises(InputError, match=r"image='patch' needs pictures .* --image-patches"):
        PasteInstances(objects, image="patch")
    results = []
    for options in ({}, {"image": "mask_out"}):
        np.random.seed(0)
        results.append(PasteInstances(objects, min_points=1, **options)(street())["coord"])
    np.testing.assert_array_equal(*results)


def test_what_does_not_fit(objects, tmp_path):
    for wrong, text in (
        ({"weights": "log"}, "weights='log'; use uniform, sqrt"),
        ({"image": "blend"}, "image='blend'; use mask_out, patch"),
        ({"count": -1}, "count is 0 or more"),
        ({"tries": 0}, "tries is above 0"),
        ({"cell": -1}, "cell is above 0"),
        ({"others": -0.1}, "others is a share"),
        ({"p": 2}, "p is in"),
        ({"min_points": {"cars": 1}}, "no class 'cars'; there are car, bicycle"),
        ({"ground": {"car": ["street"]}}, "no class 'street'"),
        ({"limits": {"dog": 1}}, "no class 'dog'"),
    ):
        with pytest.raises(InputError, match=text):
            PasteInstances(objects, **wrong)
    own = database(
        tmp_path / "own", [("tree", object_points("car", 0, 9))], "mine", ("tree", "lawn")
    )
    with pytest.raises(InputError, match="no ground is known for mine; give ground"):
        PasteInstances(own)
    paste = PasteInstances(own, ground={"tree": ["lawn"]})
    assert list(paste.rows) == [0]  # and no class has a least number of points
    data = street()
    del data["segment"]
    with pytest.raises(InputError, match="no 'segment'"):
        PasteInstances(objects)(data)
    data = street()
    data |= {
        "raw_index": np.arange(len(data["coord"])),
        "index_valid_keys": ["coord", "segment", "raw_index"],
    }
    with pytest.raises(InputError, match="no value of 'raw_index'; put PasteInstances before"):
        PasteInstances(objects, min_points=1)(data)


def test_a_database_without_objects(tmp_path):
    folder = database(tmp_path / "none", [])
    data = PasteInstances(folder)(street())
    assert not data["pasted"].any()


# ------------------------------------------------------------------------------------------ picture, real data


def test_picture(objects):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    before = street()
    after = PasteInstances(objects, min_points=1)(dict(before))
    picture = before_and_after(before, after, COLORS, half=20, scale=4)
    assert picture.shape == (160, 2 * 160 + 8, 3)
    changed = (picture[:, :160] != picture[:, 168:]).any(2)
    assert 0 < changed.sum() < 0.2 * changed.size
    car = (picture == COLORS[CAR]).all(2)
    assert not car[:, :160].any()


def test_real_scans(samples, tmp_path):
    root = samples / "semantickitti"
    build(root, out=tmp_path / "objects", workers=1, progress=False)
    paste = PasteInstances(str(tmp_path / "objects"))
    assert CAR in paste.rows
    assert (paste.database.points[paste.rows[CAR]] >= 300).all()
    scan = Reader("04", str(root)).load(0)
    count = len(scan["coord"])
    data = paste(scan)
    pasted = data["pasted"]
    assert 300 <= pasted.sum() < 5000 + paste.database.points.max()
    assert len(data["coord"]) == count + pasted.sum()
    assert set(data["segment"][pasted].tolist()) <= set(range(8))
    road = data["coord"][:count][np.isin(data["segment"][:count], [8, 9, 10])]
    for thing in np.unique(data["segment"][pasted]):
        low = data["coord"][pasted & (data["segment"] == thing), 2].min()
        assert road[:, 2].min() < low < road[:, 2].max() + 0.05
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    name, points = draw_pasting(root, tmp_path / "objects", tmp_path / "both.png", ["04"])
    assert name == "04_000000"
    assert points > 0
    assert read_image(tmp_path / "both.png").shape == (600, 1208, 3)
    with pytest.raises(InputError, match="cannot be written"):
        draw_pasting(root, tmp_path / "objects", tmp_path / "no" / "both.png", ["04"])
