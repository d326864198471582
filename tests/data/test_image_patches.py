"""Pictures of objects: a case worked by hand, plain loops, an object put back where it was, what is skipped, files."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pointcept_kd.data.instances as instances_module
from pointcept_kd.data.camera import Camera
from pointcept_kd.data.camera_views import (
    CameraViewDataset,
    TwoViews,
    ViewsToRows,
    aligned_resize,
    hidden_points,
)
from pointcept_kd.data.image_patches import (
    PatchScene,
    Sight,
    blended,
    hull_pixels,
    patch_bytes,
    read_patch,
)
from pointcept_kd.data.instances import InstanceDatabase, build
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pasting import PasteInstances, on_ground
from pointcept_kd.data.waymo import CLASS_NAMES, WaymoDataset
from pointcept_kd.host import InputError

from .nuscenes_world import tables, write

CAR, PEDESTRIAN, ROAD, BUILDING = (
    CLASS_NAMES.index(name) for name in ("Car", "Pedestrian", "Road", "Building")
)
FULL, HALF = (51, 101), (26, 51)
LENS = np.array([[50.0, 0, 50], [0, 50.0, 25], [0, 0, 1]])
AXES = np.array(
    [[0, -1, 0], [0, 0, -1], [1, 0, 0.0]]
)  # LiDAR x ahead, z up to camera z ahead, y down


def camera(name="front", yaw=0.0, lens=LENS, shift=(0, 0, 0), size=(101, 51)):
    """Looks along x, turned to the left by `yaw` degrees."""
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    place = np.eye(4)
    place[:3, :3] = AXES @ [[c, s, 0], [-s, c, 0], [0, 0, 1]]
    place[:3, 3] = shift
    return Camera(name, lens, place, *size)


def at(u, v, depth):
    """The point that the unturned camera shows at a pixel."""
    return depth, -(u - 50) / 50 * depth, -(v - 25) / 50 * depth


# Hull 41..59 x 21..29, grown about (50, 25) to 40.1..59.9 x 20.6..29.4: columns 40..59, rows 21..28. Median depth 10.
OBJECT = [
    at(41, 21, 10), at(59, 21, 10), at(59, 29, 10), at(41, 29, 10), at(50, 25, 10.4), at(52, 24, 10.4),
]  # fmt: skip
MASK = np.zeros(FULL, bool)
MASK[21:29, 40:60] = True
GROUND = [
    (10 + i % 6 * 0.3, 3.1 + i // 6 * 0.4, -0.9) for i in range(24)
]  # beside it, 10 cm below its lowest point


def noise(seed, size=FULL):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


class World:
    """Frames of Waymo's layout with cameras, which its reader does not have."""

    def __init__(self, root, monkeypatch):
        self.root, self.cameras = root, {}
        monkeypatch.setattr(
            WaymoDataset, "cameras", lambda r, i: self.cameras[Path(r.data_list[i])], raising=False
        )
        monkeypatch.setattr(
            WaymoDataset,
            "images",
            lambda r, i: [
                np.load(Path(r.data_list[i]) / f"{c.name}.npy")
                for c in self.cameras[Path(r.data_list[i])]
            ],
            raising=False,
        )

    def frame(self, split, stamp, parts, cameras, images):
        """Parts: (points, class, object)."""
        folder = self.root / split / "segment" / str(stamp)
        folder.mkdir(parents=True)
        coord = np.concatenate([np.reshape(points, (-1, 3)) for points, _, _ in parts])
        sizes = [len(points) for points, _, _ in parts]
        np.save(folder / "coord.npy", coord.astype(np.float32))
        np.save(folder / "strength.npy", np.linspace(0, 1, len(coord), dtype=np.float32)[:, None])
        np.save(folder / "segment.npy", np.repeat([c for _, c, _ in parts], sizes).astype(np.int32))
        np.save(
            folder / "instance.npy", np.repeat([i for _, _, i in parts], sizes).astype(np.int32)
        )
        self.cameras[folder] = cameras
        for one, image in zip(cameras, images, strict=True):
            np.save(folder / f"{one.name}.npy", image)

    def build(self, **options):
        options = {"min_points": 3, "workers": 1, "progress": False, "patches": True, **options}
        build(self.root, **options)
        return self.root / "instances"

    def views(self, size=FULL, **options):
        source = WaymoDataset(split="validation", data_root=str(self.root))
        return CameraViewDataset(source, image_size=size, **options)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def paste(folder, **options):
    return PasteInstances(
        str(folder), image="patch", **{"count": 1, "min_points": 1, "weights": "uniform", **options}
    )


def rows_of(sample):
    """(point, image) to normalised coordinates."""
    keys = zip(sample["view_point"].tolist(), sample["view_image"].tolist(), strict=True)
    return {key: tuple(uv) for key, uv in zip(keys, sample["view_uv"].tolist(), strict=True)}


# ------------------------------------------------------------------------------------------------- the hull


def test_worked_hull():
    pixels = np.array([camera().project([point])[0][0] for point in OBJECT])
    (top, left), mask = hull_pixels(pixels, 101, 51)
    whole = np.zeros(FULL, bool)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    np.testing.assert_array_equal(whole, MASK)
    # What the image does not have is left out.
    (top, left), mask = hull_pixels(pixels - (50, 25), 101, 51)
    assert (top, left) == (0, 0)
    assert mask[:4, :10].all()
    assert mask.sum() == 40
    (top, left), mask = hull_pixels(pixels - (-45, -25), 101, 51)
    assert (top + mask.shape[0], left + mask.shape[1]) == (51, 101)
    assert mask.sum() == 16 * 5


def test_hull_by_plain_loops():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(30, 2)) * (9, 5) + (40, 20)
    # Points on the hull: everything else is on one side of a line through them and another one.
    edges = []
    for i, a in enumerate(pixels):
        for j, b in enumerate(pixels):
            across = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in pixels]
            if i != j and min(across) >= 0:
                edges.append((a, b))
    middle = np.mean([a for a, _ in edges], 0)
    (top, left), mask = hull_pixels(pixels, 80, 50)
    found = 0
    for row in range(50):
        for column in range(80):
            inside = True
            for a, b in edges:
                a, b = (middle + 1.1 * (p - middle) for p in (a, b))
                side = (b[0] - a[0]) * (row + 0.5 - a[1]) - (b[1] - a[1]) * (column + 0.5 - a[0])
                inside &= side >= 0
            y, x = row - top, column - left
            there = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]
            assert bool(there) == inside
            found += inside
    assert found > 200


@pytest.mark.parametrize(
    "pixels",
    [
        np.empty((0, 2)),
        [[5.5, 5.5]],
        [[5.1, 5.1], [5.9, 5.2], [5.3, 5.9], [6.5, 5.5]],  # two pixels
        [[1, 1], [5, 5], [9, 9], [20, 20.0]],  # a line
        [[1, 7], [5, 7], [9, 7], [20, 7.0]],
        [[3.1, 3.1], [4.2, 3.2], [9.2, 3.1], [6.2, 3.15]],  # between the middles of two rows
    ],
)
def test_no_area(pixels):
    assert hull_pixels(np.asarray(pixels, float), 30, 30) is None


# ----------------------------------------------------------------------------------------------- blending


def patch_of(image, points=OBJECT):
    """The picture of an object, out of an image of the unturned camera."""
    return Sight(np.array(points), camera()).cut(np.arange(len(points)), image)


def test_worked_blending():
    source, target = noise(0), noise(1)
    patch = patch_of(source)
    before = target.copy()
    np.testing.assert_array_equal(blended(target, patch), np.where(MASK[..., None], source, target))
    np.testing.assert_array_equal(target, before)
    # Half the size: pixel j takes 1/4 of the pair 2j-2, 2j-1 and 3/4 of the pair 2j, 2j+1. Of the pairs of columns 20
    # to 29 are in the hull, of those of rows 10 and 14 with one half, 11 to 13.
    across, down = np.zeros(51), np.zeros(26)
    across[20], across[21:30], across[30] = 0.75, 1, 0.25
    down[10:16] = 3 / 8, 7 / 8, 1, 1, 5 / 8, 1 / 8
    bright = patch_of(np.full((*FULL, 3), 200, np.uint8))
    half = blended(np.full((*HALF, 3), 100, np.uint8), bright)
    expected = np.rint(100 + 100 * np.outer(down, across)).astype(np.uint8)
    np.testing.assert_array_equal(half, np.repeat(expected[..., None], 3, 2))
    assert half[10, 20, 0] == 128
    assert half[12, 25, 0] == 200
    assert half[15, 30, 0] == 103


@pytest.mark.parametrize("size", [HALF, FULL, (37, 83), (17, 20), (60, 140), (1, 1)])
@pytest.mark.parametrize("where", ["middle", "corner", "other corner"])
def test_blending_is_resizing_the_whole(size, where):
    # Over one colour it does not matter whether the picture is put in before or after the image is resized.
    source, points = noise(2), OBJECT
    if where != "middle":
        square = [at(u, v, 9) for u in (80, 99.9) for v in (30, 49.9)]
        points = (
            square if where == "corner" else [at(u, v, 9) for u in (0.1, 30) for v in (0.1, 20)]
        )
    patch = patch_of(source, points)
    mask = np.zeros(FULL, bool)
    (top, left), (rows, columns) = patch.corner, patch.hull.shape
    mask[top : top + rows, left : left + columns] = patch.hull
    assert mask[-1, -1] == (where == "corner")
    assert mask[0, 0] == (where == "other corner")
    whole = np.where(mask[..., None], source, 90).astype(np.uint8)
    found = blended(np.full((*size, 3), 90, np.uint8), patch).astype(int)
    assert np.abs(found - aligned_resize(whole, size)).max() <= 1
    assert (found != 90).any() or size == (1, 1)


def test_what_a_hull_covers():
    patch = patch_of(noise(0))
    pixels = np.array(
        [
            [40, 21],
            [39.99, 25],
            [59.99, 28.99],
            [60, 25],
            [50, 20.99],
            [50, 29],
            [-3, 25],
            [500, 25.0],
        ]
    )
    assert patch.covers(pixels).tolist() == [True, False, True] + [False] * 5
    assert patch.seen.all()


def test_place_before_another_camera():
    patch = patch_of(noise(0))
    other = camera(yaw=30, shift=(0.2, -0.1, 0.3))
    place = patch.placed(OBJECT, other)
    # Where the camera's own coordinates are the same: back through its place, point by point.
    for found, (x, y, z) in zip(place, OBJECT, strict=True):
        own = np.array([-y, -z, x]) - (0.2, -0.1, 0.3)
        c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
        ahead, left, up = own[2], -own[0], -own[1]
        np.testing.assert_allclose(found, [c * ahead - s * left, s * ahead + c * left, up])
    # A lens that differs a little: the same pixels and depths all the same.
    lens = LENS * [[1.006, 1, 1.01], [1, 0.995, 0.97], [1, 1, 1]]
    other = camera(yaw=-50, lens=lens)
    pixels, depth, _ = other.project(patch.placed(OBJECT, other))
    np.testing.assert_allclose(pixels, patch.pixels, atol=1e-4)
    np.testing.assert_allclose(depth, patch.depth, atol=1e-5)
    for change, fits in (
        ({}, True),
        ({"lens": lens}, True),
        ({"lens": LENS * [[1.011, 1, 1], [1, 1, 1], [1, 1, 1]]}, False),
        ({"lens": LENS * [[1, 1, 1], [1, 0.989, 1], [1, 1, 1]]}, False),
        ({"size": (102, 51)}, False),
        ({"size": (101, 50)}, False),
        ({"yaw": 90, "shift": (1, 2, 3)}, True),
    ):
        assert patch.fits(camera(**change)) is fits
    flat = camera(lens=np.zeros((3, 3)))
    with pytest.raises(InputError, match="camera front: its matrices have no inverse"):
        patch.placed(OBJECT, flat)


def test_what_hides_what():
    cell = np.full((3, 2), 3.0)
    depth = np.array([10.0, 10.9, 11.1])
    before = np.array([[4.0, 4], [20, 4]]), np.array([9.95, 1.0])
    assert hidden_points(cell, depth).tolist() == [False, False, True]
    # By others alone: the first of them is nearer than the nearest of these, the second in another cell.
    assert hidden_points(cell, depth, before=before).tolist() == [False, False, True]
    assert (
        hidden_points(cell, depth, before=(before[0], np.array([11.0, 1]))).tolist() == [False] * 3
    )
    assert hidden_points(cell, depth, before=(before[0], np.array([8.9, 1]))).tolist() == [True] * 3
    none = np.empty((0, 2)), np.empty(0)
    assert hidden_points(cell, depth, before=none).tolist() == [False] * 3
    assert hidden_points(*none, before=before).shape == (0,)


# ----------------------------------------------------------------------------------------------- database


def files_below(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_database(world):
    spread = [at(u, v, 8) for u in (20, 25, 30, 36) for v in (5, 10, 14)]
    behind = [at(u, v, 30) for u in (70, 75, 80) for v in (30, 35, 40)]
    wall = [at(u + 0.1, v + 0.1, 20) for u in (70, 75, 80) for v in (30, 35, 40)]
    line = [at(u, 48, 9) for u in range(5, 90, 9)]
    back = [(-8, i % 3, i) for i in range(5)]
    out = [at(-9, v, 7) for v in (40, 45)]
    sides = [camera(), camera("left", 85)]
    images = [noise(3), noise(4)]
    parts = [
        (OBJECT, CAR, 1), (spread, CAR, 2), (behind, CAR, 3), (line, CAR, 4), (back, CAR, 5),
        (spread[:9] + out, PEDESTRIAN, 6), (wall, BUILDING, 0), (wall[:1], CAR, 0),
        ([at(u, v, 12) for u in (60, 66) for v in range(5, 15)] + out, PEDESTRIAN, 7),
    ]  # fmt: skip
    world.frame("training", 1, parts, sides, images)
    folder = world.build()
    database = InstanceDatabase(folder)
    assert database.cameras == ("front", "left")
    numbers = [int(path.stem.split("_")[-1]) for path in map(database.path, range(len(database)))]
    assert numbers == [1, 2, 3, 4, 5, 6, 7]
    # What each camera sees, point by point; the first of equals is the one that sees most.
    for row, number in enumerate(numbers):
        points = next(p for p, _, i in parts if i == number)
        counts = []
        for one in sides:
            pixels, depth, _ = one.project(np.float32(points))
            counts.append(
                sum(
                    0 < u < 100 and 0 < v < 50 and d > 1
                    for (u, v), d in zip(pixels, depth, strict=True)
                )
            )
        assert database.visible[row].tolist() == counts
        assert database.camera[row] == (np.argmax(counts) if max(counts) else -1)
    assert database.visible[:5, 0].tolist() == [6, 12, 9, 10, 0]
    assert database.camera.tolist() == [0, 0, 0, 0, -1, 0, 0]
    # Car 3 is behind the wall, 4 a line, 5 not seen, of pedestrian 6 9 of 11 points are seen, of 7 20 of 22.
    assert database.patches.tolist() == [True, True, False, False, False, False, True]
    assert sorted(p.stem for p in folder.rglob("*.npz")) == [
        "segment_1_1",
        "segment_1_2",
        "segment_1_7",
    ]
    patch = database.patch(0)
    (top, left), (height, width) = patch.corner, patch.hull.shape
    np.testing.assert_array_equal(patch.crop, images[0][top : top + height, left : left + width])
    np.testing.assert_array_equal(patch.hull, MASK[top : top + height, left : left + width])
    assert patch.hull.sum() == MASK.sum()
    pixels, depth, _ = sides[0].project(np.float32(OBJECT))
    np.testing.assert_array_equal(patch.pixels, pixels.astype(np.float32))
    np.testing.assert_array_equal(patch.depth, depth.astype(np.float32))
    assert (patch.camera.name, patch.camera.width, patch.camera.height) == ("front", 101, 51)
    np.testing.assert_array_equal(patch.camera.intrinsics, LENS)
    np.testing.assert_array_equal(patch.camera.lidar_to_camera, sides[0].lidar_to_camera)
    with pytest.raises(InputError, match=r"segment_1_3.npz: this object has no picture"):
        database.patch(2)


def test_second_run(world, monkeypatch):
    world.frame("training", 1, [(OBJECT, CAR, 1), (GROUND, ROAD, 0)], [camera()], [noise(0)])
    folder = world.build()
    first = files_below(folder)
    assert list(first) == ["Car/segment_1_1.bin", "Car/segment_1_1.npz", "index.json"]
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*_1.*")}
    # Years later, in another place and in other processes' order: the same bytes.
    then = time.localtime(2_000_000_000)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *args: then)
    world.build()
    assert files_below(folder) == first
    assert {p: p.stat().st_mtime_ns for p in times} == times
    world.build(out=world.root / "other")
    assert files_below(world.root / "other") == first
    # A damaged picture is made anew.
    path = folder / "Car" / "segment_1_1.npz"
    path.write_bytes(first["Car/segment_1_1.npz"][:-30])
    with pytest.raises(InputError, match=r"segment_1_1.npz: no picture of an object of 6 points"):
        InstanceDatabase(folder).patch(0)
    world.build()
    assert files_below(folder) == first
    # Without the flag the index is that of all databases before.
    world.build(patches=False)
    assert set(first) == set(files_below(folder))
    note = json.loads((folder / "index.json").read_bytes())
    assert not set(note) & {"cameras", "visible", "camera", "patch"}
    assert InstanceDatabase(folder).patches is None


def test_images_are_read_for_pictures_alone(world, monkeypatch):
    other = [at(u, v, 10) for u in (70, 80) for v in (21, 29)]
    world.frame("training", 1, [(OBJECT, CAR, 1), ([(-5, i, 0) for i in range(4)], CAR, 2), (other, CAR, 3)],
                [camera(), camera("left", 60)], [noise(0), noise(1)])  # fmt: skip
    reads = []
    plain = instances_module.read_images
    monkeypatch.setattr(
        instances_module,
        "read_images",
        lambda r, i, which: reads.append(which) or plain(r, i, which),
    )
    world.build()
    assert reads == [[0]]  # once for two objects, and not that of the camera which sees none
    np.save(world.root / "training/segment/1/front.npy", noise(0, (50, 101)))
    with pytest.raises(InputError, match=r"the image of front is of shape \(50, 101, 3\)"):
        world.build()


def test_scans_with_other_cameras(world):
    turned = [(-x, -y, z) for x, y, z in OBJECT]
    world.frame(
        "training", 1, [(OBJECT, CAR, 1)], [camera("left", 90), camera()], [noise(0), noise(1)]
    )
    world.frame("training", 2, [(turned, CAR, 1)], [camera("back", 180)], [noise(2)])
    database = InstanceDatabase(world.build())
    assert database.cameras == ("back", "front", "left")
    assert database.visible.tolist() == [[0, 6, 0], [6, 0, 0]]
    assert database.camera.tolist() == [1, 0]
    assert [database.patch(row).camera.name for row in range(2)] == ["front", "back"]
    for row, seed in ((0, 1), (1, 2)):
        patch = database.patch(row)
        (top, left), (height, width) = patch.corner, patch.hull.shape
        np.testing.assert_array_equal(
            patch.crop, noise(seed)[top : top + height, left : left + width]
        )


def test_files_that_do_not_fit(tmp_path):
    patch = patch_of(noise(0))
    path = tmp_path / "p.npz"
    path.write_bytes(patch_bytes(patch))
    again = read_patch(path, "front", 6)
    for key, kind in (
        ("crop", np.uint8),
        ("hull", bool),
        ("pixels", np.float32),
        ("depth", np.float32),
    ):
        np.testing.assert_array_equal(getattr(again, key), getattr(patch, key))
        assert getattr(again, key).dtype == kind
    assert again.corner == patch.corner
    with pytest.raises(InputError, match="no picture of an object of 5 points"):
        read_patch(path, "front", 5)
    for key, values in (
        ("crop", patch.crop[1:]), ("crop", patch.crop.astype(float)), ("hull", patch.hull.astype(int)),
        ("corner", np.array([45, 40])), ("corner", np.array([-1, 40])), ("corner", np.zeros(3, int)),
        ("depth", np.full(6, np.nan)), ("intrinsics", np.eye(4)), ("size", np.array([0, 0])),
        ("crop", np.array([None])),
    ):  # fmt: skip
        with np.load(path) as file:
            parts = dict(file)
        np.savez(tmp_path / "bad.npz", **{**parts, key: values})
        with pytest.raises(InputError, match="make the database again"):
            read_patch(tmp_path / "bad.npz", "front", 6)
    with pytest.raises(InputError, match=r"none.npz: no picture"):
        read_patch(tmp_path / "none.npz", "front", 6)


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.pop("visible"),
        lambda note: note["visible"][0].pop(),
        lambda note: note["camera"].append(0),
        lambda note: note["camera"].__setitem__(0, 1),
        lambda note: note["camera"].__setitem__(0, -1),  # with a picture
        lambda note: note["patch"].append(1),
        lambda note: note["cameras"].__setitem__(0, "../x"),
    ],
)
def test_no_index_of_pictures(world, change):
    world.frame("training", 1, [(OBJECT, CAR, 1)], [camera()], [noise(0)])
    folder = world.build()
    note = json.loads((folder / "index.json").read_bytes())
    change(note)
    (folder / "index.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match="no index of objects"):
        InstanceDatabase(folder)


# ------------------------------------------------------------------------------------------------ pasting

SCENE = [
    at(50.3, 25.3, 20),  # 0 behind
    at(45.5, 24.5, 9.9),  # 1 before it
    at(62.5, 25, 20),  # 2 beside it
    at(59.9, 25.5, 20),  # 3 behind its last column
    at(60.05, 25.5, 20),  # 4 beside that
    at(40.2, 22, 20),  # 5 behind the margin
    at(50.2, 20.9, 20),  # 6 above the first row
    (-9.0, 0, 0),  # 7 behind the car
]


def street(world, lost=(), cameras=None, images=None, more=(), ground=GROUND):
    """A training frame with OBJECT and a validation frame with SCENE, seen by the same camera."""
    world.frame("training", 1, [(OBJECT, CAR, 1), (GROUND, ROAD, 0)], [camera()], [noise(0)])
    cameras = [camera(), camera("left", 60)] if cameras is None else cameras
    images = [noise(1), noise(2)][: len(cameras)] if images is None else images
    scene = [p for i, p in enumerate(SCENE) if i not in lost]
    world.frame("validation", 2, [(scene, BUILDING, 0), (ground, ROAD, 0), *more], cameras, images)
    return world.build()


def test_worked_case(world):
    folder = street(world)
    before = world.views()[0]
    given = [image.copy() for image in before["images"]]
    sample = paste(folder)(dict(before))
    count = len(SCENE) + len(GROUND)
    assert sample["pasted"].tolist() == [False] * count + [True] * 6
    np.testing.assert_array_equal(sample["coord"][count:], np.float32(OBJECT))
    assert sample["segment"][count:].tolist() == [CAR] * 6
    assert sample["point_id"].tolist() == list(range(count + 6))
    # Points 0, 3 and 5 have lost the camera; each of the object's has its place there, by c = 2 u / (W - 1) - 1.
    old, new = rows_of(before), rows_of(sample)
    assert set(old) - set(new) == {(0, 0), (3, 0), (5, 0)}
    assert set(new) - set(old) == {(count + i, 0) for i in range(6)}
    for i, (u, v) in enumerate(((41, 21), (59, 21), (59, 29), (41, 29), (50, 25), (52, 24))):
        assert new[count + i, 0] == pytest.approx((u / 50 - 1, v / 25 - 1), abs=1e-6)
    assert all(new[key] == old[key] for key in set(old) & set(new))
    # By image, then by point.
    keys = list(zip(sample["view_image"].tolist(), sample["view_point"].tolist(), strict=True))
    assert keys == sorted(keys)
    assert any(image == 1 for image, _ in keys)
    assert [sample[k].dtype for k in ("view_point", "view_image", "view_uv")] == [
        np.int64,
        np.int64,
        np.float32,
    ]
    np.testing.assert_array_equal(
        sample["images"][0], np.where(MASK[..., None], noise(0), noise(1))
    )
    np.testing.assert_array_equal(sample["images"][1], noise(2))
    # It has one place, and is there once, however often it is drawn.
    assert paste(folder, count=9)(dict(before))["pasted"].sum() == 6
    # What came in stays as it was.
    for image, old_image in zip(before["images"], given, strict=True):
        np.testing.assert_array_equal(image, old_image)


def test_worked_case_at_half_size(world):
    flat = [np.full((*FULL, 3), 100, np.uint8)] * 2
    folder = street(world, images=flat)
    np.save(world.root / "training/segment/1/front.npy", np.full((*FULL, 3), 200, np.uint8))
    world.build()
    sample = paste(folder)(world.views(HALF)[0])
    image = sample["images"][0][..., 0]
    assert image[12, 19:32].tolist() == [100, 175, *[200] * 9, 125, 100]
    assert image[9:17, 25].tolist() == [100, 138, 188, 200, 200, 162, 112, 100]
    assert image.sum() == pytest.approx(100 * 26 * 51 + 100 * 10 * 4, abs=5)
    np.testing.assert_array_equal(sample["images"][1], aligned_resize(flat[1], HALF))
    # Normalised coordinates do not know the size.
    full = paste(folder)(world.views(FULL)[0])
    assert rows_of(sample) == rows_of(full)


@pytest.mark.parametrize("size", [FULL, HALF])
def test_put_back_where_it_was(world, size):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)) * 0.1 + np.eye(3))[0]
    turn *= np.sign(np.diag(turn))
    one = camera(shift=(0.1, 0.2, -0.1))
    place = one.lidar_to_camera.copy()
    place[:3, :3] = turn @ place[:3, :3]
    one = Camera("front", LENS * [[1.1, 1, 1.03], [1, 1.07, 0.98], [1, 1, 1]], place, 101, 51)
    cameras, images = [one, camera("left", 40)], [noise(3), noise(4)]
    thing = rng.random((40, 3)) * (1.5, 2.0, 1.4) + (9, 0.4, -0.8)
    thing[0, 2] = -0.8
    scene = rng.random((300, 3)) * (30, 40, 8) + (12, -20, -0.75)
    rest = [(scene, BUILDING, 0), (GROUND, ROAD, 0)]
    world.frame("training", 1, [*rest, (thing, CAR, 1)], cameras, images)
    others = [noise(5), noise(6)]
    world.frame("validation", 2, rest, cameras, others)
    world.frame("validation", 3, [*rest, (thing, CAR, 1)], cameras, images)
    folder = world.build()
    assert InstanceDatabase(folder).visible.min() > 0  # both cameras see it
    without, whole = (world.views(size).load(i) for i in range(2))
    sample = paste(folder)(dict(without))
    for key in ("coord", "segment"):
        np.testing.assert_array_equal(sample[key], whole[key])
    back = InstanceDatabase(folder).camera[0]
    names = InstanceDatabase(folder).cameras
    chosen = sample["camera_names"].index(names[back])
    patch = InstanceDatabase(folder).patch(0)
    # As it was in the hull, with the picture of the other scan around it, in the image that shows most of it.
    share = blended(np.zeros((*size, 3), np.uint8), replace(patch, crop=patch.crop * 0 + 255))
    assert (share == 255).sum() > 20
    for number, (found, own, other) in enumerate(
        zip(sample["images"], images, others, strict=True)
    ):
        own, other = aligned_resize(own, size), aligned_resize(other, size)
        mine = share if number == chosen else share * 0
        np.testing.assert_array_equal(found[mine == 0], other[mine == 0])
        apart = np.abs(found.astype(int) - own)[mine == 255]
        assert apart.max(initial=0) <= (size != FULL)
    if size == FULL:
        assert set(np.unique(share)) == {0, 255}
    old, new = rows_of(whole), rows_of(sample)
    own = {
        key: uv for key, uv in old.items() if key[0] >= len(without["coord"]) and key[1] == chosen
    }
    assert len(own) >= 36
    assert {key: uv for key, uv in new.items() if key[0] >= len(without["coord"])} == own
    lost = set()
    for row, point in enumerate(without["coord"]):
        pixels, depth, _ = cameras[chosen].project([point])
        deeper = depth[0] > np.median(patch.depth)
        if (row, chosen) in old and deeper:
            y, x = (
                math.floor(pixels[0, 1]) - patch.corner[0],
                math.floor(pixels[0, 0]) - patch.corner[1],
            )
            if 0 <= y < patch.hull.shape[0] and 0 <= x < patch.hull.shape[1] and patch.hull[y, x]:
                lost.add((row, chosen))
    assert len(lost) > 2
    assert {
        key: uv for key, uv in old.items() if key[0] < len(without["coord"]) and key not in lost
    } == {key: uv for key, uv in new.items() if key[0] < len(without["coord"])}


def test_camera_that_is_not_kept(world):
    folder = street(world)
    whole = rows_of(world.views()[0])
    seen = set()
    for seed in range(6):
        np.random.seed(seed)
        data = world.views(keep=1)
        before = data[0]
        assert [c.name for c in before["cameras"]] == before["camera_names"]
        assert [c.name for c in before["dropped_cameras"]] == [
            name for name in ("front", "left") if name not in before["camera_names"]
        ]
        sample = paste(folder)(dict(before))
        seen.add(before["camera_names"][0])
        assert sample["pasted"].sum() == 6
        rows = rows_of(sample)
        mine = sum(sample["pasted"][point] for point, _ in rows)
        if before["camera_names"] == ["left"]:
            assert mine == 0
            assert {(p, 1): uv for (p, _), uv in rows.items()} == {
                key: uv for key, uv in whole.items() if key[1] == 1
            }
            np.testing.assert_array_equal(sample["images"][0], noise(2))
        else:
            assert mine == 6
            assert (sample["images"][0] != noise(1)).any()
    assert seen == {"front", "left"}
    # Without cameras there is no place for it.
    sample = paste(folder)(world.views(keep=0)[0])
    assert not sample["pasted"].any()


def test_order_of_cameras(world):
    folder = street(world)
    sample = paste(folder)(world.views(cameras=["left", "front"])[0])
    pasted = sample["pasted"][sample["view_point"]]
    assert sample["view_image"][pasted].tolist() == [1] * 6
    np.testing.assert_array_equal(sample["images"][0], noise(2))
    keys = list(zip(sample["view_image"].tolist(), sample["view_point"].tolist(), strict=True))
    assert keys == sorted(keys)
    # The camera is there and yet not in use: it is no camera of the sample.
    assert not paste(folder)(world.views(cameras=["left"])[0])["pasted"].any()


WALL = [at(u, v, 8) for u in range(42, 59, 2) for v in range(21, 30, 2)]


@pytest.mark.parametrize(
    ("change", "there"),
    [
        ({}, True),
        ({"cameras": [camera(lens=LENS * [[1.008, 1, 1], [1, 0.992, 1], [1, 1, 1]])]}, True),
        ({"cameras": [camera(lens=LENS * [[1.02, 1, 1], [1, 1, 1], [1, 1, 1]])]}, False),
        ({"cameras": [camera(lens=LENS * [[1, 1, 1], [1, 0.98, 1], [1, 1, 1]])]}, False),
        ({"cameras": [camera(size=(103, 51))], "images": [noise(1, (51, 103))]}, False),
        ({"cameras": [camera("other")]}, False),
        ({"more": [(WALL, BUILDING, 0)]}, False),  # it is behind a wall 2 m before it
        ({"more": [(np.array(WALL) / 8 * 9.6, BUILDING, 0)]}, True),  # 0.8 m hide nothing
        ({"more": [([at(41, 21, 8)], BUILDING, 0)]}, False),  # 1 of 6 points is more than 10 %
        ({"more": [([at(70, 25, 8)], BUILDING, 0)]}, True),
        ({"more": [([(10.2, 0, 0)], BUILDING, 0)]}, False),  # in its place
        ({"more": [([(10.2, 0, 0.9)], BUILDING, 0)]}, True),
        ({"ground": np.array(GROUND) - (0, 0, 0.14)}, True),  # 24 cm below it
        ({"ground": np.array(GROUND) - (0, 0, 0.17)}, False),
        ({"ground": np.array(GROUND) - (0, 0, -0.3)}, True),
        ({"ground": np.array(GROUND) - (0, 0, -0.37)}, False),
        ({"ground": np.array(GROUND) - (0, -2.5, 0)}, False),  # further than 5 m
    ],
)
def test_where_it_may_stand(world, change, there):
    sample = paste(street(world, **change))(world.views()[0])
    assert sample["pasted"].sum() == 6 * there


def test_ground():
    points = np.array([[1, 1, 0.5], [3, 1, 2], [2, 4, 3.0]])  # middle (2, 2), lowest 0.5
    for patch, fits in (
        ([2, 2, 0.5], True), ([2, 6.99, 0.5], True), ([2, 7.01, 0.5], False), ([6, 5, 0.5], True),
        ([6, 5.1, 0.5], False), ([2, 2, 0.74], True), ([2, 2, 0.76], False), ([2, 2, 0.24], False),
    ):  # fmt: skip
        assert on_ground(points, np.array([patch]), 5.0) is fits
    assert on_ground(points, np.array([[9, 9, 0.5], [2, 2, 9], [2, 2, 0.5]]), 5.0)
    assert not on_ground(points, np.empty((0, 3)), 5.0)


def far_and_near(world):
    """Two objects that overlap in the image: at 10 m, and at 16 m a little to the right."""
    far = [at(u, v, 16) for u, v in ((56, 16), (78, 16), (78, 31), (56, 31), (58, 22), (58, 24))]
    far += [at(u, v, 16.2) for u in range(64, 79, 2) for v in range(17, 30, 2)]
    lower = [(x + 5.5, y - 9, z - 1.05) for x, y, z in GROUND]
    world.frame("training", 1, [(OBJECT, CAR, 1), (GROUND, ROAD, 0)], [camera()], [noise(0)])
    world.frame("training", 3, [(far, PEDESTRIAN, 2), (GROUND, ROAD, 0)], [camera()], [noise(7)])
    world.frame(
        "validation", 2, [(SCENE[:1], BUILDING, 0), (GROUND, ROAD, 0), (lower, ROAD, 0)], [camera()], [noise(1)]
    )  # fmt: skip
    return world.build(), far


def test_near_objects_cover_far_ones(world):
    folder, far = far_and_near(world)
    database = InstanceDatabase(folder)
    assert database.patches.all()
    orders = set()
    expected = None
    for seed in range(12):
        np.random.seed(seed)
        sample = paste(folder, count=12, limits={"Car": 1, "Pedestrian": 1})(world.views()[0])
        kinds = sample["segment"][sample["pasted"]]
        if len(kinds) != 6 + len(far):
            continue  # the far one does not fit in behind the near one
        orders.add(int(kinds[0]))
        near, back = (database.patch(row) for row in (0, 1))
        image = blended(blended(noise(1), back), near)
        np.testing.assert_array_equal(sample["images"][0], image)
        covered = near.covers(camera().project(np.float32(far))[0])
        assert 0 < covered.sum() < len(far)
        ids = sample["point_id"][(sample["segment"] == PEDESTRIAN) & sample["pasted"]]
        rows = rows_of(sample)
        assert [(int(i), 0) in rows for i in ids] == (~covered).tolist()
        ids = sample["point_id"][(sample["segment"] == CAR) & sample["pasted"]]
        assert all((int(i), 0) in rows for i in ids)
        expected = True
    assert expected
    assert orders == {CAR, PEDESTRIAN}


def test_far_object_does_not_go_behind_a_pasted_one(world):
    folder, _ = far_and_near(world)
    # Now the near one covers all of the far one.
    wide = [at(u, v, 9) for u in range(40, 90, 4) for v in range(10, 36, 4)]
    wide += [(9.0, wide[0][1], -0.85)]
    world.frame("training", 5, [(wide, CAR, 3), (GROUND, ROAD, 0)], [camera()], [noise(8)])
    world.build()
    found = set()
    for seed in range(8):
        np.random.seed(seed)
        sample = paste(folder, count=2, limits={"Car": 1})(world.views()[0])
        found.add(tuple(dict.fromkeys(sample["segment"][sample["pasted"]].tolist())))
    assert (PEDESTRIAN, CAR) in found
    assert len(InstanceDatabase(folder)) == 3
    data = paste(folder, count=30, limits={"Car": 1})
    database = data.database
    (row,) = np.flatnonzero(database.points == len(wide))
    sample = world.views()[0]
    scene = PatchScene(sample, sample["coord"])
    far_row = int(np.flatnonzero(database.classes == PEDESTRIAN)[0])
    assert not scene.hides(database.patch(far_row))
    scene.add(int(row), database.patch(int(row)))
    assert scene.hides(database.patch(far_row))


def test_same_seed_same_sample(world):
    folder, _ = far_and_near(world)
    results = []
    for seed in (4, 4, 5, 6, 7, 8, 9):
        np.random.seed(seed)
        results.append(paste(folder, count=2)(world.views()[0]))
    for key in ("coord", "segment", "view_point", "view_image", "view_uv", "images"):
        np.testing.assert_array_equal(results[0][key], results[1][key])
    assert len({len(r["coord"]) for r in results} | {int(r["segment"][-1]) for r in results}) > 2


def test_objects_without_a_picture_are_not_drawn(world):
    line = [at(u, 48, 9) for u in range(5, 90, 9)]
    world.frame("training", 1, [(OBJECT, CAR, 1), (line, PEDESTRIAN, 2)], [camera()], [noise(0)])
    transform = paste(world.build())
    assert list(transform.rows) == [CAR]
    assert transform.share.tolist() == [1]
    # They stay objects: nothing is put onto them.
    assert PEDESTRIAN in transform.objects
    assert list(PasteInstances(str(world.root / "instances"), min_points=1).rows) == [
        CAR,
        PEDESTRIAN,
    ]


def test_merged_scans(world):
    folder = street(world)
    before = world.views()[0]
    count = len(before["coord"])
    keys = ("coord", "strength", "segment")
    twice = {**before, **{k: np.concatenate([before[k], before[k]]) for k in keys}}
    twice |= {"sweep": np.repeat([0, 1], count).astype(np.int32), "point_id": np.arange(2 * count)}
    twice["index_valid_keys"] = [*keys, "sweep", "point_id"]
    sample, plain = paste(folder)(twice), paste(folder)(dict(before))
    assert np.flatnonzero(sample["pasted"]).tolist() == list(range(count, count + 6))
    assert sample["point_id"][count : count + 6].tolist() == list(range(2 * count, 2 * count + 6))
    moved = {(p if p < count else p + count, i): uv for (p, i), uv in rows_of(plain).items()}
    assert rows_of(sample) == moved


@pytest.mark.parametrize("keep", [None, 1])
def test_both_views_and_rows(world, keep):
    folder = street(world)
    voxel = {"type": "kd.VoxelSample", "voxel_size": 0.05, "coordinates": "cartesian"}
    turn = {"type": "RandomRotate", "angle": [-1, 1], "axis": "z", "center": [0, 0, 0], "p": 1}
    for seed in range(4):
        np.random.seed(seed)
        pasted = paste(folder)(world.views(keep=keep)[0])
        before = {k: pasted[k].copy() for k in ("coord", "view_point", "view_image", "view_uv")}
        views, seen = TwoViews(voxel, student=[turn], teacher=[turn]), []
        move = views.teacher
        views.teacher = lambda data, move=move, seen=seen: seen.extend(data) or move(data)
        data = views(pasted)
        assert "segment" in seen
        assert not {"cameras", "dropped_cameras", "images", "camera_names", "view_point"} & set(
            seen
        )
        assert not {"teacher_cameras", "teacher_images", "teacher_view_point"} & set(data)
        assert len(data["cameras"]) == len(data["images"])
        ids = data["point_id"].copy()
        data = ViewsToRows(FULL)(data)
        assert not {"cameras", "dropped_cameras"} & set(data)
        assert data["pasted"].sum() == 6  # 0.05 m apart and more
        np.testing.assert_array_equal(data["teacher_pasted"][data["match"]], data["pasted"])
        np.testing.assert_array_equal(data["teacher_point_id"][data["match"]], ids)
        place = {
            (int(p), int(i)): uv
            for p, i, uv in zip(
                before["view_point"], before["view_image"], before["view_uv"], strict=True
            )
        }
        assert len(data["view_point"]) == len(place) > 6
        for row, image, uv in zip(
            data["view_point"], data["view_image"], data["view_uv"], strict=True
        ):
            np.testing.assert_array_equal(place[int(ids[row]), int(image)], uv)


def test_samples_in_memory_stay_as_they_are(world):
    folder = street(world)
    data = world.views(cache=True)
    plain = data[0]
    for _ in range(2):
        sample = paste(folder)(data[0])
        assert sample["pasted"].any()
    again = data[0]
    for key in ("coord", "view_point", "view_image", "view_uv", "images"):
        np.testing.assert_array_equal(again[key], plain[key])


def test_cameras_of_a_reader_without_any(world):
    world.frame("training", 1, [(OBJECT, CAR, 1)], [camera()], [noise(0)])
    del WaymoDataset.cameras
    with pytest.raises(
        InputError, match="--image-patches: WaymoDataset reads no images; leave it out"
    ):
        world.build()
    assert not (world.root / "instances").exists()
    world.build(patches=False)
    WaymoDataset.cameras = None  # for the fixture to take away


def test_what_does_not_fit(world):
    folder = street(world)
    with pytest.raises(InputError, match="image='crop'; use mask_out, patch"):
        PasteInstances(str(folder), image="crop")
    transform = paste(folder)
    for key in ("cameras", "dropped_cameras", "view_point", "images", "point_id"):
        sample = world.views()[0]
        del sample[key]
        with pytest.raises(InputError, match=f"no '{key}'"):
            transform(sample)
    sample = world.views()[0]
    sample["cameras"].pop()
    with pytest.raises(InputError, match="one camera per image, got 1"):
        transform(sample)
    world.build(patches=False)
    with pytest.raises(
        InputError, match="python tools/prepare_data.py instances .*--image-patches"
    ):
        paste(folder)
    # As before without: the other way takes any database, and no camera sees what is pasted.
    before = world.views()[0]
    sample = PasteInstances(str(folder), min_points=1, count=9)(dict(before))
    assert sample["pasted"].any()
    assert rows_of(sample) == rows_of(before)
    np.testing.assert_array_equal(sample["images"], before["images"])


# ------------------------------------------------------------------------------------------- nuScenes' layout


def test_key_frames(tmp_path):
    """Two key frames in nuScenes' layout: an object of the first appears before the same camera in the second."""
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    write(tmp_path / "raw", tables({"scene-0001": 2}))
    write_infos(tmp_path / "raw", "v1.0-trainval", tmp_path, sweeps=2, with_camera=True)
    reader = NuScenesDataset(data_root=str(tmp_path), sweeps=2)
    cameras = [{c.name: c for c in reader.cameras(idx)}["CAM_BACK"] for idx in range(2)]
    rng = np.random.default_rng(0)
    # Before the camera, in its own coordinates; 40 x 24 pixels, f = 30.
    own = rng.random((14, 3)) * (4, 2.5, 0.5) + (-2, -1.2, 8)
    folder = tmp_path / "raw" / "panoptic" / "v1.0-trainval"
    folder.mkdir(parents=True)
    for idx, one in enumerate(cameras):
        place = np.linalg.inv(one.lidar_to_camera)
        thing = own @ place[:3, :3].T + place[:3, 3]
        low = thing[:, 2].min()
        # Ground beside it and further away than it, on whatever side that is.
        spots = [
            (*(thing[:, :2].mean(0) + 4 * np.array([math.cos(a), math.sin(a)])), low - 0.1)
            for a in np.arange(0, 2 * math.pi, 0.1)
        ]
        spot = spots[int(np.argmax(one.project(spots)[1]))]
        ground = np.array(spot) + rng.random((25, 3)) * (0.01, 0.01, 0)
        points = np.concatenate([thing, ground] if idx == 0 else [ground])
        scan = np.c_[points, np.full(len(points), 51), np.zeros(len(points))].astype(np.float32)
        reader.scan_path(idx).write_bytes(scan.tobytes())
        kinds = np.repeat([17, 24], [len(thing), 25])[-len(points) :]  # car, driveable surface
        reader.label_path(idx).write_bytes(kinds.astype(np.uint8).tobytes())
        ids = np.where(kinds == 17, 17001, 0).astype(np.uint16)
        np.savez_compressed(folder / f"{reader.get_data_name(idx)}_panoptic.npz", data=ids)
    counts = build(tmp_path, min_points=3, workers=1, progress=False, patches=True)
    assert counts["car"] == 1
    database = InstanceDatabase(tmp_path / "instances")
    assert database.cameras[database.camera[0]] == "CAM_BACK"
    assert database.patches.tolist() == [True]
    assert os.path.isfile(database.path(0).with_suffix(".npz"))
    whole = np.array(reader.images(0)[[c.name for c in reader.cameras(0)].index("CAM_BACK")])
    data = CameraViewDataset(reader, image_size=(24, 40))
    before = data.load(1)
    back = before["camera_names"].index("CAM_BACK")
    sample = paste(tmp_path / "instances")(dict(before))
    assert sample["pasted"].sum() == 14
    place = np.linalg.inv(cameras[1].lidar_to_camera)
    np.testing.assert_allclose(
        sample["coord"][sample["pasted"]], own @ place[:3, :3].T + place[:3, 3], atol=1e-4
    )
    patch = database.patch(0)
    (top, left), (height, width) = patch.corner, patch.hull.shape
    expected = before["images"][back].copy()
    part = expected[top : top + height, left : left + width]
    part[patch.hull] = whole[top : top + height, left : left + width][patch.hull]
    np.testing.assert_array_equal(sample["images"][back], expected)
    rows = sample["pasted"][sample["view_point"]]
    assert set(sample["view_image"][rows].tolist()) == {back}
    lens = cameras[0].intrinsics
    for uv, (x, y, z) in zip(sample["view_uv"][rows], own, strict=True):
        u, v = lens[0, 0] * x / z + lens[0, 2], lens[1, 1] * y / z + lens[1, 2]
        np.testing.assert_allclose(uv, (2 * u / 39 - 1, 2 * v / 23 - 1), atol=1e-4)
