"""Camera views: the worked projection, plain loops, dropped cameras, two views of a scan, batches, real key frames."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

import pointcept_kd.data.camera_views as module
from pointcept_kd.data.camera import Camera
from pointcept_kd.data.camera_views import (
    CameraViewDataset,
    TwoViews,
    ViewsToRows,
    aligned_resize,
    camera_views,
    hidden_points,
)
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.loader import Compose, ConcatDataset, collate_fn

from ..real_nuscenes import write_real_info
from .pair_scene import SIZES, Scene, rig

LENS = [[50.0, 0, 50], [0, 50.0, 25], [0, 0, 1]]
SIZE = (36, 64)
OFFSETS = {"offset": "coord", "view_offset": "view_point", "image_offset": "images"}


def yawed(degrees, name):
    """Looks along x, turned to the left; 101 x 51 pixels."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    place = np.eye(4)
    place[:3, :3] = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ [
        [c, s, 0],
        [-s, c, 0],
        [0, 0, 1],
    ]
    return Camera(name, LENS, place, 101, 51)


def plain_views(points, cameras):
    """The rule, point by point."""
    found = []
    for number, camera in enumerate(cameras):
        for row, point in enumerate(np.asarray(points, float)):
            x, y, z = (camera.lidar_to_camera @ [*point[:3], 1])[:3]
            if z <= 1:
                continue
            u, v = (camera.intrinsics @ [x, y, z])[:2] / z
            place = 2 * u / (camera.width - 1) - 1, 2 * v / (camera.height - 1) - 1
            if all(-1 < n < 1 for n in place):
                found.append((row, number, *place))
    return found


def same(found, expected):
    rows, numbers, places = found
    assert rows.dtype == numbers.dtype == np.int64
    assert places.dtype == np.float32
    assert rows.tolist() == [e[0] for e in expected]
    assert numbers.tolist() == [e[1] for e in expected]
    np.testing.assert_allclose(
        places.reshape(-1, 2), [e[2:] for e in expected] or places, atol=1e-5
    )


# ------------------------------------------------------------------------------------------ projection


def test_worked_projection():
    points = [
        (10, 0, 0), (10, -5, 0), (10, 0, 2.5), (10, 5, 0), (10, 10, 0), (0.5, 0, 0), (1, 0, 0), (-10, 0, 0), (0, 10, 0),
    ]  # fmt: skip
    ahead, left = yawed(0, "A"), yawed(45, "B")
    seen = {0: (0, 0), 1: (0.5, 0), 2: (0, -0.5), 3: (-0.5, 0)}
    same(camera_views(points, [ahead]), [(row, 0, *place) for row, place in seen.items()])
    rows, numbers, places = camera_views(points, [ahead, left])
    both = {(int(r), int(n)): tuple(p) for r, n, p in zip(rows, numbers, places, strict=True)}
    assert both[3, 1] == pytest.approx((1 / 3, 0), abs=1e-6)
    assert both[4, 1] == pytest.approx((0, 0), abs=1e-6)
    assert both[3, 0] == pytest.approx((-0.5, 0), abs=1e-6)
    assert np.isfinite(places).all()
    # The last camera that sees the point decides: with the order turned round it is the other one.
    for order, last in (([ahead, left], 1 / 3), ([left, ahead], -0.5)):
        rows, _, places = camera_views([(10, 5, 0)], order)
        assert places[np.flatnonzero(rows == 0)[-1], 0] == pytest.approx(last, abs=1e-6)


def test_views_by_plain_loops():
    points = np.random.default_rng(0).normal(size=(400, 3)) * (8, 8, 2)
    expected = plain_views(points.astype(np.float32), rig())
    same(camera_views(points.astype(np.float32), rig()), expected)
    assert len(expected) > 100
    same(camera_views([[0, 0, 50.0]], rig()), [])
    same(camera_views(points, []), [])


def test_stored_values_stay_inside():
    # u so near to W - 1 that float32 makes it 1.
    y = -10 * (50 / 50) * (1 - 1e-9)
    rows, _, _ = camera_views([(10.0, y, 0)], [yawed(0, "A")])
    assert len(rows) == 0
    assert len(plain_views([(10.0, y, 0)], [yawed(0, "A")])) == 1


def test_hidden_points_by_plain_loops():
    rng = np.random.default_rng(0)
    pixels, depth = rng.random((120, 2)) * (40, 30), rng.random(120) * 60 + 1
    for stride, metres, share in ((8, 1.0, 0.05), (4, 0.2, 0.3)):
        expected = []
        for (u, v), d in zip(pixels, depth, strict=True):
            near = min(
                e
                for (a, b), e in zip(pixels, depth, strict=True)
                if a // stride == u // stride and b // stride == v // stride
            )
            expected.append(d > near + max(metres, share * near))
        assert hidden_points(pixels, depth, stride, metres, share).tolist() == expected
        assert 0 < sum(expected) < 120
    assert hidden_points(np.empty((0, 2)), np.empty(0)).shape == (0,)
    # 5 % of 40 m is 2 m: 41.9 m is not behind it, 42.1 m is; 1 m counts up to 20 m.
    cell = np.full((4, 2), 3.0)
    assert hidden_points(cell, np.array([40, 41.9, 42.1, 60])).tolist() == [
        False,
        False,
        True,
        True,
    ]
    assert hidden_points(cell[:3], np.array([10, 10.9, 11.1])).tolist() == [False, False, True]


def test_resize_keeps_corners_and_slopes():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert aligned_resize(image, (9, 7)) is image
    larger = aligned_resize(image, (17, 15))
    oracle = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].double(), (17, 15), mode="bilinear", align_corners=True
    )[0].permute(1, 2, 0)  # fmt: skip
    assert np.abs(larger - oracle.numpy()).max() <= 0.5 + 1e-6
    # A slope keeps its value at every normalised coordinate, but where the average has run out of pixels.
    rows, columns = np.mgrid[:181, :251]
    slope = np.stack([rows, columns, 255 - columns], -1).astype(np.uint8)
    small = aligned_resize(slope, (41, 61))
    assert small.shape == (41, 61, 3)
    exact = np.stack(
        np.meshgrid(np.linspace(0, 180, 41), np.linspace(0, 250, 61), indexing="ij"), -1
    )
    inside = (slice(1, -1), slice(1, -1))
    assert np.abs(small[..., :2] - exact)[inside].max() <= 0.5 + 1e-3
    # Single bright columns do not vanish between the samples.
    lines = np.zeros((80, 80, 3), np.uint8)
    lines[:, ::4] = 200
    assert (aligned_resize(lines, (20, 20))[1:-1, 1:-1] > 25).all()
    assert aligned_resize(lines, (1, 1)).shape == (1, 1, 3)


# ------------------------------------------------------------------------------------------- the data set


def test_samples(tmp_path):
    source = Scene(tmp_path, blind=[1])
    data = CameraViewDataset(source, image_size=SIZE)
    assert len(data) == 3
    for idx in range(3):
        sample, scan = data[idx], source.get_data(idx)
        for key in ("coord", "strength", "segment"):
            np.testing.assert_array_equal(sample[key], scan[key])
        assert sample["point_id"].tolist() == list(range(len(scan["coord"])))
        assert "point_id" in sample["index_valid_keys"]
        views = [sample[key] for key in ("view_point", "view_image", "view_uv")]
        same(views, plain_views(scan["coord"], rig()))
        assert sample["camera_names"] == ["left", "right", "back"]
        for image, full in zip(sample["images"], source.images(idx), strict=True):
            np.testing.assert_array_equal(image, aligned_resize(full, SIZE))
            assert image.shape == (*SIZE, 3)
    assert len(data[1]["view_point"]) == 0
    assert len(data[1]["images"]) == 3


def test_order_and_choice_of_cameras(tmp_path):
    source = Scene(tmp_path)
    whole = CameraViewDataset(source, image_size=SIZE)[0]
    part = CameraViewDataset(source, cameras=["back", "left"], image_size=SIZE)[0]
    same(
        [part[k] for k in ("view_point", "view_image", "view_uv")],
        plain_views(whole["coord"], [rig()[2], rig()[0]]),
    )
    np.testing.assert_array_equal(part["images"][0], whole["images"][2])
    assert part["camera_names"] == ["back", "left"]


def test_dropped_cameras(tmp_path):
    source = Scene(tmp_path, points=300)
    data = CameraViewDataset(source, keep=2, image_size=SIZE)
    found = set()
    for _ in range(20):
        sample = data[0]
        names = sample["camera_names"]
        found.add(tuple(names))
        chosen = [camera for camera in rig() if camera.name in names]
        assert names == [camera.name for camera in chosen]  # their order stays
        views = [sample[k] for k in ("view_point", "view_image", "view_uv")]
        same(views, plain_views(sample["coord"], chosen))
        blue = [image[0, 0, 2] // 60 for image in sample["images"]]
        assert [rig()[i].name for i in blue] == names
    assert found == {("left", "right"), ("left", "back"), ("right", "back")}
    np.random.seed(3)
    first = [data[i]["camera_names"] for i in range(3)]
    np.random.seed(3)
    assert [data[i]["camera_names"] for i in range(3)] == first
    assert len(CameraViewDataset(source, keep=5, image_size=SIZE)[0]["images"]) == 3
    test = CameraViewDataset(source, keep=1, image_size=SIZE, test_mode=True, test_cfg={})
    assert len({tuple(test.load(1)["camera_names"]) for _ in range(5)}) == 1


@pytest.mark.parametrize("told", ["data set", "transform"])
def test_no_camera(tmp_path, told):
    source = Scene(tmp_path)
    source.images = source.cameras = None
    rows = {"type": "kd.ViewsToRows", **({"image_size": SIZE} if told == "transform" else {})}
    size = {"image_size": SIZE} if told == "data set" else {}
    sample = CameraViewDataset(source, keep=0, transform=[rows], **size)[0]
    assert sample["images"].shape == (0, 3, *SIZE)
    assert sample["images"].dtype == np.float32
    assert sample["view_point"].shape == (0,)
    assert sample["view_uv"].shape == (0, 2)


@pytest.mark.parametrize("cache", ["memory", "shared"])
def test_cached_geometry_leaves_cameras_free(tmp_path, cache):
    source = Scene(tmp_path)
    data = CameraViewDataset(source, cache=cache, keep=1, image_size=SIZE)
    source.reads = 0
    names = {data[1]["camera_names"][0] for _ in range(15)}
    assert source.reads == 1
    assert names == {"left", "right", "back"}


def test_what_does_not_fit(tmp_path):
    source = Scene(tmp_path)
    with pytest.raises(InputError, match="cameras: no top; there are left, right, back"):
        CameraViewDataset(source, cameras=["left", "top"])[0]
    for wrong in ({"cameras": "left"}, {"cameras": []}, {"keep": -1}, {"keep": True}, {"image_size": (3,)},
                  {"image_size": (0, 4)}, {"occlusion": {"cells": 8}}, {"occlusion": {"stride": 0}}):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(wrong))):
            CameraViewDataset(source, **wrong)
    with pytest.raises(InputError, match="has no cameras; use a reader such as"):
        CameraViewDataset(ConcatDataset([source]))
    with pytest.raises(InputError, match="images of other sizes than image_size"):
        ViewsToRows((10, 10))(CameraViewDataset(source, image_size=SIZE)[0])
    with pytest.raises(InputError, match="image_size is height and width"):
        ViewsToRows((10, 0))
    source.images = lambda idx: [np.zeros((90, 159, 3), np.uint8)] * 3
    with pytest.raises(InputError, match=r"image of left is of shape \(90, 159, 3\)"):
        CameraViewDataset(source)[0]


def test_occlusion_of_samples(tmp_path):
    source = Scene(tmp_path)
    every = CameraViewDataset(source, image_size=SIZE)[0]
    seen = CameraViewDataset(source, image_size=SIZE, occlusion={})[0]
    pairs = [set(zip(s["view_point"], s["view_image"], strict=True)) for s in (every, seen)]
    assert pairs[1] < pairs[0]
    for number, camera in enumerate(rig()):
        # What is nearest of all is always seen.
        rows = every["view_point"][every["view_image"] == number]
        depth = camera.project(every["coord"][rows])[1]
        assert (rows[depth.argmin()], number) in pairs[1]


# -------------------------------------------------------------------------------------- transforms, batches

MOVE = [
    {"type": "RandomRotate", "angle": [-1, 1], "axis": "z", "center": [0, 0, 0], "p": 1},
    {"type": "RandomScale", "scale": [0.8, 1.2]},
    {"type": "RandomFlip", "p": 0.5},
]
VOXEL = {"type": "kd.VoxelSample", "voxel_size": 0.8, "coordinates": "cartesian"}


def test_augmentation_leaves_views_alone(tmp_path):
    source = Scene(tmp_path)
    rows = {"type": "kd.ViewsToRows", "image_size": SIZE}
    plain = CameraViewDataset(source, image_size=SIZE, transform=[rows])[0]
    moved = CameraViewDataset(source, image_size=SIZE, transform=[*MOVE, rows])[0]
    assert np.abs(moved["coord"] - plain["coord"]).max() > 1
    for key in ("view_point", "view_image", "view_uv", "images"):
        np.testing.assert_array_equal(moved[key], plain[key])


@pytest.mark.parametrize(
    "voxel", [VOXEL, {"type": "GridSample", "grid_size": 0.8, "return_grid_coord": True}]
)
def test_representatives_keep_their_views(tmp_path, voxel):
    source = Scene(tmp_path)
    chain = [
        {"type": "RandomDropout", "dropout_application_ratio": 1.0},
        {"type": "ShufflePoint"},
        *MOVE,
        voxel,
    ]
    data = CameraViewDataset(source, image_size=SIZE, transform=chain)[0]
    ids, before = data["point_id"].copy(), plain_views(source.get_data(0)["coord"], rig())
    data = ViewsToRows(SIZE)(data)
    row_of = {int(i): row for row, i in enumerate(ids)}
    expected = sorted((n, row_of[r], *place) for r, n, *place in before if r in row_of)
    assert 0 < len(expected) < len(before)
    same(
        [data[k] for k in ("view_point", "view_image", "view_uv")],
        [(r, n, *place) for n, r, *place in expected],
    )


def test_worked_match():
    # 8 raw points of which 5 are the key frame's; teacher voxels 0, 0, 1, 2, 1, 3, 3, 0; the student keeps 0, 2, 3, 4.
    cells = np.array([0, 0, 1, 2, 1, 3, 3, 0], np.float32)
    coord = np.stack([cells + 0.5, np.zeros(8), np.zeros(8)], 1).astype(np.float32)
    student = np.array([0.2, 0.2, 5.2, 6.2, 7.2])

    class OwnPlaces:
        def __call__(self, data):
            data["coord"][:, 0] = student[data["point_id"]]
            return data

    data = {
        "coord": coord,
        "strength": np.arange(8.0, dtype=np.float32)[:, None],
        "point_id": np.arange(8),
        "sweep": np.array([0] * 5 + [1] * 3),
        "index_valid_keys": ["coord", "strength", "point_id", "sweep"],
        "name": "a",
    }
    voxel = {"type": "kd.VoxelSample", "voxel_size": 1.0, "coordinates": "cartesian"}
    views = TwoViews(voxel)
    views.student = OwnPlaces()
    data = views(data)
    assert data["point_id"].tolist() == [0, 2, 3, 4]
    assert data["match"].tolist() == [0, 1, 2, 1]
    assert data["match"].dtype == np.int64
    assert data["teacher_strength"][:, 0].tolist() == [0, 2, 3, 5]
    assert data["teacher_grid_coord"][:, 0].tolist() == [0, 1, 2, 3]
    # Behind a scan with 7 voxels of the teacher the rows are the next ones.
    assert (data["match"] + 7).tolist() == [7, 8, 9, 8]


def scan_with_sweeps(points=600, seed=0):
    rng = np.random.default_rng(seed)
    coord = (rng.normal(size=(points, 3)) * (8, 8, 1)).astype(np.float32)
    return {
        "coord": coord,
        "strength": rng.random((points, 1)).astype(np.float32),
        "segment": rng.integers(0, 3, points).astype(np.int32),
        "sweep": np.sort(rng.integers(0, 3, points)).astype(np.int32),
        "point_id": np.arange(points),
        "index_valid_keys": ["coord", "strength", "segment", "sweep", "point_id"],
        "name": "s",
    }


@pytest.mark.parametrize("shift", [[], [{"type": "ShufflePoint"}]])
def test_match_names_the_voxel_that_holds_the_point(shift):
    voxel = {"type": "GridSample", "grid_size": 1.5, "return_grid_coord": True}
    scan = scan_with_sweeps()
    data = TwoViews(voxel, student=[*MOVE, *shift], teacher=shift)(dict(scan))
    raw = scan["coord"]
    cells = np.floor(raw.astype(np.float64) / 1.5).astype(int)
    cells -= cells.min(
        0
    )  # no motion on the teacher's side: voxels can be worked out from the raw scan
    ids, match = data["point_id"], data["match"]
    assert (scan["sweep"][ids] == 0).all()
    np.testing.assert_array_equal(data["teacher_grid_coord"][match], cells[ids])
    assert len(data["teacher_coord"]) == len(np.unique(cells, axis=0))
    assert set(data["teacher_sweep"].tolist()) == {0, 1, 2}
    assert "teacher_inverse" not in data


def test_match_does_not_depend_on_the_students_motion():
    moved = [
        {"type": "RandomRotate", "angle": [0.25, 0.25], "axis": "z", "center": [0, 0, 0], "p": 1}
    ]
    fine = {"type": "kd.VoxelSample", "voxel_size": 1e-4, "coordinates": "cartesian"}
    coarse = {"type": "kd.VoxelSample", "voxel_size": 2.0, "coordinates": "cartesian"}
    found = []
    for chain in ([], moved):
        data = TwoViews(fine, coarse, student=chain)(scan_with_sweeps())
        found.append(data["match"][np.argsort(data["point_id"])])
    np.testing.assert_array_equal(*found)


def test_teacher_that_loses_points():
    crop = [{"type": "kd.RangeCrop", "point_cloud_range": [-1, -1, -1, 1, 1, 1]}]
    with pytest.raises(InputError, match="put crops before TwoViews"):
        TwoViews(VOXEL, teacher=crop)(scan_with_sweeps())


def pipeline():
    return [
        {"type": "kd.TwoViews", "student_voxel": VOXEL, "student": MOVE[:2], "teacher": MOVE},
        {"type": "kd.ViewsToRows", "image_size": SIZE},
        {"type": "ToTensor"},
        {
            "type": "Collect",
            "keys": ("coord", "grid_coord", "segment", "match", "images", "view_point", "view_image", "view_uv",
                     "teacher_coord", "teacher_grid_coord", "teacher_segment"),
            "offset_keys_dict": {**OFFSETS, "teacher_offset": "teacher_coord"},
            "feat_keys": ("coord", "strength"),
            "teacher_feat_keys": ("teacher_coord", "teacher_strength"),
        },
    ]  # fmt: skip


def test_batches_of_different_cameras(tmp_path):
    source = Scene(tmp_path, blind=[1])
    common = {"image_size": SIZE, "transform": pipeline()}
    parts = [
        CameraViewDataset(source, **common),
        CameraViewDataset(source, cameras=["back"], **common),
        CameraViewDataset(source, keep=0, **common),
    ]
    samples = [parts[0][0], parts[1][2], parts[2][0], parts[0][1]]
    batch = collate_fn(samples)
    assert batch["image_offset"].tolist() == [3, 4, 4, 7]
    assert batch["images"].shape == (7, 3, *SIZE)
    assert batch["images"].dtype == torch.float32
    assert 0 <= batch["images"].min() < batch["images"].max() <= 1
    ends = batch["view_offset"].tolist()
    assert ends[2] == ends[1] == ends[3] > ends[0] > 0
    assert batch["view_uv"].shape == (ends[-1], 2)
    assert batch["view_uv"].abs().max() < 1
    assert batch["feat"].shape == (batch["offset"][-1], 4)
    assert batch["teacher_feat"].shape == (batch["teacher_offset"][-1], 4)
    assert len(batch["match"]) == batch["offset"][-1]
    for number, sample in enumerate(samples):
        start = [0, *batch["offset"].tolist()][number]
        own = slice(start, int(batch["offset"][number]))
        assert torch.equal(batch["match"][own], sample["match"])
        assert sample["match"].max() < len(sample["teacher_coord"])


def test_test_mode(tmp_path):
    source = Scene(tmp_path)
    voxel = {**VOXEL, "return_inverse": True}
    collect = {"type": "Collect", "keys": ("coord", "index", "images", "view_point", "view_image", "view_uv"),
               "offset_keys_dict": OFFSETS}  # fmt: skip
    cfg = {"post_transform": [{"type": "ToTensor"}, collect]}
    data = CameraViewDataset(
        source, image_size=SIZE, test_mode=True, test_cfg=cfg, loop=4,
        transform=[{"type": "Copy", "keys_dict": {"segment": "origin_segment"}}, voxel,
                   {"type": "kd.ViewsToRows", "image_size": SIZE}],
    )  # fmt: skip
    assert len(data) == 3
    sample = data[0]
    (fragment,) = sample["fragment_list"]
    assert len(sample["inverse"]) == len(sample["origin_segment"]) == 3000
    assert fragment["image_offset"].tolist() == [3]
    assert int(fragment["view_offset"]) == len(fragment["view_uv"]) > 0


def test_fragments_for_voting(tmp_path):
    source, rows = Scene(tmp_path, points=400), {"type": "kd.ViewsToRows", "image_size": SIZE}
    grid = {"type": "GridSample", "grid_size": 4.0, "mode": "test", "return_grid_coord": True}
    cfg = {"voxelize": grid, "post_transform": [rows], "aug_transform": [MOVE[:1], MOVE]}
    data = CameraViewDataset(source, image_size=SIZE, test_mode=True, test_cfg=cfg)
    expected = plain_views(source.get_data(0)["coord"], rig())
    place = {(row, number): uv for row, number, *uv in expected}
    found = set()
    fragments = data[0]["fragment_list"]
    assert len(fragments) > 4
    for part in fragments:
        ids = part["index"][part["view_point"]]  # nothing was dropped before: the rows are the ids
        for row, number, uv in zip(ids, part["view_image"], part["view_uv"], strict=True):
            np.testing.assert_allclose(uv, place[row, number], atol=1e-5)
            found.add((int(row), int(number)))
    assert found == set(place)


# ----------------------------------------------------------------------------------------------- real data


def test_real_key_frame(samples, tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    write_real_info(samples, tmp_path)
    source = NuScenesDataset("val", str(tmp_path))
    reads = []

    def counted(path):
        reads.append(path)
        return np.full((900, 1600, 3), 7, np.uint8)

    order = [
        "CAM_FRONT_LEFT",
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_LEFT",
        "CAM_BACK",
        "CAM_BACK_RIGHT",
    ]
    whole = CameraViewDataset(source, cameras=order, image_size=(90, 160))[0]
    assert [image.shape for image in whole["images"]] == [(90, 160, 3)] * 6
    assert [image.std() > 10 for image in whole["images"]] == [True] * 6
    cameras = {camera.name: camera for camera in source.cameras(0)}
    some = np.arange(0, len(whole["coord"]), 97)
    expected = plain_views(whole["coord"][some], [cameras[name] for name in order])
    kept = np.isin(whole["view_point"], some)
    same(
        [
            np.searchsorted(some, whole["view_point"][kept]),
            whole["view_image"][kept],
            whole["view_uv"][kept],
        ],
        expected,
    )
    twice = np.bincount(whole["view_point"]) > 1
    assert 0.05 < twice.sum() / len(np.unique(whole["view_point"])) < 0.3
    monkeypatch.setattr(module, "read_rgb", counted)
    part = CameraViewDataset(source, cameras=order, keep=3, image_size=(90, 160))[0]
    assert len(reads) == 3  # the others are never opened
    assert len(part["images"]) == 3
    assert all(any(name in str(path) for path in reads) for name in part["camera_names"])
    assert CameraViewDataset(source, keep=0)[0]["images"] == []
    assert len(reads) == 3


@pytest.mark.parametrize("keep", [None, 0])
def test_submissions_are_the_readers(samples, tmp_path, keep):
    write_real_info(samples, tmp_path)
    source = NuScenesDataset("val", str(tmp_path))
    data = pickle.loads(pickle.dumps(CameraViewDataset(source, keep=keep)))
    name, points = data.get_data_name(0), len(source.get_data(0)["coord"])
    out = tmp_path / "out"
    data.write_submission(name, np.full(points, 3), out)
    data.finish_submission(out)
    written = np.fromfile(out / "lidarseg" / "val" / f"{name}_lidarseg.bin", np.uint8)
    assert written.tolist() == [4] * points
    meta = json.loads((out / "val" / "submission.json").read_text())["meta"]
    assert meta["use_lidar"]
    assert meta["use_camera"] == (keep is None)
    assert not hasattr(CameraViewDataset(Scene(tmp_path)), "write_submission")


def test_real_drive_with_sweeps(samples):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    root = str(samples / "semantickitti")
    reader = {"type": "kd.SemanticKITTIDataset", "split": "00", "data_root": root}
    reader |= {"sweeps": 3, "sweep_labels": "reference"}
    data = DATASETS.build(
        {"type": "kd.CameraViewDataset", "source": reader, "image_size": (92, 304), "transform": []}
    )
    assert isinstance(data.source, SemanticKITTIDataset)
    sample = data[0]  # scan 0 has none before it, but the only image
    assert len(sample["coord"]) == 124668
    source = data.source.cameras(0)
    rows, _, _ = camera_views(sample["coord"], source)
    np.testing.assert_array_equal(sample["view_point"], rows)
    assert 0.1 < len(rows) / 124668 < 0.25
    # Two views of the merged scans 2, 1, 0: the student's are of scan 2 alone.
    merged = data.source.load(2)
    count = int((merged["sweep"] == 0).sum())
    merged["point_id"] = np.arange(len(merged["coord"]))
    merged["index_valid_keys"].append("point_id")
    views = Compose(
        [{"type": "kd.TwoViews", "student_voxel": {**VOXEL, "voxel_size": 0.2}, "teacher": MOVE}]
    )
    view = views(merged)
    assert view["point_id"].max() < count == 124478
    assert len(view["teacher_coord"]) > len(view["coord"]) == len(view["match"])
    assert set(view["teacher_sweep"].tolist()) == {0, 1, 2}
    # One label for each point of the student's own scan, none for those of the others.
    assert (view["teacher_segment"][view["teacher_sweep"] > 0] == -1).all()


def test_merged_scans_show_only_the_first(tmp_path):
    source = Scene(tmp_path)
    scan = source.get_data(0)
    half = len(scan["coord"]) // 2
    scan["sweep"] = (np.arange(len(scan["coord"])) >= half).astype(np.int32)
    source.get_data = lambda idx: {
        **scan,
        "index_valid_keys": ["coord", "strength", "segment", "sweep"],
    }
    sample = CameraViewDataset(source, image_size=SIZE)[0]
    same(
        [sample[k] for k in ("view_point", "view_image", "view_uv")],
        plain_views(scan["coord"][:half], rig()),
    )
    assert SIZES[0] == (90, 160)
