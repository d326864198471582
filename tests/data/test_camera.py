"""Projection against plain loops and the real samples; headers; pictures of points."""

import math
import pickle
import struct

import numpy as np
import pytest

from pointcept_kd.data.camera import (
    Camera,
    contact_sheet,
    image_size,
    kitti_camera,
    paint,
    point_pixel_pairs,
    ramp,
    read_rgb,
)
from pointcept_kd.data.pictures import write_png
from pointcept_kd.data.semantic_kitti import load_calib, read_scan
from pointcept_kd.host import InputError

# Forward (x) is the camera's z, left (y) its -x, up (z) its -y.
AHEAD = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])


def ahead(width=200, height=100, focal=100.0, name="ahead"):
    intrinsics = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    return Camera(name, intrinsics, AHEAD, width, height)


def test_hand_worked():
    # 10 m ahead, 2 m left, 1 m up: u = 100 - 100 * 2 / 10, v = 50 - 100 * 1 / 10.
    pixels, depth, visible = ahead().project([[10.0, 2.0, 1.0]])
    assert pixels.tolist() == [[80.0, 40.0]]
    assert depth.tolist() == [10.0]
    assert visible.tolist() == [True]


def test_what_is_visible():
    cases = {
        "behind": ([-10, 0, 0], False),
        "in the camera": ([0, 0, 0], False),
        "at the least depth": ([1.0, 0, 0], False),
        "just beyond it": ([1.001, 0, 0], True),
        "left edge": ([10, 10, 0], True),
        "left of it": ([10, 10.001, 0], False),
        "right edge is not inside": ([10, -10, 0], False),
        "upper edge": ([10, 0, 5], True),
        "lower edge is not inside": ([10, 0, -5], False),
    }
    points = np.array([p for p, _ in cases.values()], float)
    with np.errstate(all="raise"):
        _, _, visible = ahead().project(points)
    assert dict(zip(cases, visible.tolist(), strict=True)) == {k: v for k, (_, v) in cases.items()}
    assert ahead().project([[0.5, 0, 0]], min_depth=0.2)[2].all()
    assert not ahead().project([[0.0, 0, 0], [-1, 0, 0]], min_depth=-5)[2].any()


def by_loops(camera, points, min_depth):
    rows = []
    for point in points:
        x = [*map(float, point), 1.0]
        place = [sum(camera.lidar_to_camera[i][j] * x[j] for j in range(4)) for i in range(3)]
        image = [sum(camera.intrinsics[i][j] * place[j] for j in range(3)) for i in range(3)]
        if image[2] <= min_depth:
            rows.append((None, None, image[2], False))
            continue
        u, v = image[0] / image[2], image[1] / image[2]
        inside = 0 <= u < camera.width and 0 <= v < camera.height
        rows.append((u, v, image[2], inside))
    return rows


def random_camera(generator, name="c"):
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = rotation, generator.normal(size=3)
    intrinsics = [[90, 0.5, 61], [0, 110, 47], [0, 0, 1]]
    return Camera(name, intrinsics, place, 120, 90)


def test_projection_as_plain_loops():
    generator = np.random.default_rng(3)
    for _ in range(4):
        camera, points = random_camera(generator), generator.normal(size=(200, 3)) * 8
        pixels, depth, visible = camera.project(points, 0.7)
        expected = by_loops(camera, points, 0.7)
        assert visible.tolist() == [row[3] for row in expected]
        assert 5 < visible.sum() < 195
        np.testing.assert_allclose(depth, [row[2] for row in expected], atol=1e-12)
        for got, row in zip(pixels[visible], (r for r in expected if r[3]), strict=True):
            assert got == pytest.approx(row[:2], abs=1e-9)


def test_pairs():
    generator = np.random.default_rng(4)
    cameras = [random_camera(generator, str(i)) for i in range(3)]
    points = generator.normal(size=(150, 3)) * 8
    rows, which, pixels = point_pixel_pairs(points, cameras)
    expected = []
    for c, camera in enumerate(cameras):
        for i, (u, v, _, inside) in enumerate(by_loops(camera, points, 1.0)):
            if inside:
                expected.append((i, c, u, v))
    assert list(zip(rows, which, strict=True)) == [e[:2] for e in expected]
    np.testing.assert_allclose(pixels, [e[2:] for e in expected], atol=1e-9)
    assert rows.dtype == which.dtype == np.int64


def test_pairs_of_nothing():
    for points, cameras in ((np.empty((0, 3)), [ahead()]), (np.ones((2, 3)), [])):
        rows, which, pixels = point_pixel_pairs(points, cameras)
        assert len(rows) == len(which) == 0
        assert pixels.shape == (0, 2)
        assert rows.dtype == which.dtype == np.int64


def test_a_resized_image_shows_the_same_points():
    generator = np.random.default_rng(5)
    camera, points = random_camera(generator), generator.normal(size=(100, 3)) * 8
    half = camera.resized(60, 30)
    first, second = camera.project(points), half.project(points)
    np.testing.assert_allclose(first[0][first[2]] * (0.5, 1 / 3), second[0][second[2]], atol=1e-9)
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[2], second[2])
    assert (half.width, half.height, half.name) == (60, 30, camera.name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(intrinsics=np.eye(4)), "intrinsics should be 3 x 3"),
        (dict(lidar_to_camera=np.eye(3)), "lidar_to_camera should be 4 x 4"),
        (dict(intrinsics=np.full((3, 3), math.nan)), "finite numbers"),
        (dict(intrinsics=None), "intrinsics should be"),
        (dict(width=0), "has no pixels"),
    ],
)
def test_bad_cameras(changed, message):
    good = dict(name="c", intrinsics=np.eye(3), lidar_to_camera=np.eye(4), width=2, height=2)
    with pytest.raises(InputError, match=f"camera c: .*{message}"):
        Camera(**{**good, **changed})


@pytest.mark.parametrize("rectified", [False, True])
def test_kitti_equals_the_matrix_product(rectified):
    generator = np.random.default_rng(6)
    projection = np.array([[700, 0, 600, 45], [0, 700, 170, 0.2], [0, 0, 1, 0.003]], float)
    transform = AHEAD[:3] + generator.normal(size=(3, 4)) * 0.01
    calib, rotation = {"P2": projection}, np.eye(4)
    if rectified:
        rotation[:3, :3] += generator.normal(size=(3, 3)) * 0.01
        calib |= {"R0_rect": rotation[:3, :3], "Tr_velo_to_cam": transform}
    else:
        calib["Tr"] = transform
    camera = kitti_camera(calib, "image_2", 1242, 375)
    points = generator.uniform((5, -10, -2), (60, 10, 2), (50, 3))
    product = projection @ rotation @ np.vstack([transform, [0, 0, 0, 1]])
    image = np.c_[points, np.ones(50)] @ product.T
    pixels, depth, visible = camera.project(points)
    np.testing.assert_allclose(pixels, image[:, :2] / image[:, 2:], rtol=1e-12)
    np.testing.assert_allclose(depth, image[:, 2], rtol=1e-12)
    assert visible.any()
    assert camera.name == "image_2"


def test_kitti_without_what_it_needs():
    with pytest.raises(InputError, match="no row P3 but P2, Tr"):
        kitti_camera({"P2": np.eye(4)[:3], "Tr": np.eye(4)}, "image_3", 10, 10)
    with pytest.raises(InputError, match="no row Tr_velo_to_cam but P2"):
        kitti_camera({"P2": np.eye(4)[:3]}, "image_2", 10, 10)
    with pytest.raises(InputError, match="P2 are singular"):
        kitti_camera({"P2": np.zeros((3, 4)), "Tr": np.eye(4)}, "image_2", 10, 10)


@pytest.mark.parametrize("sequence", ["00", "04", "06", "07", "08"])
def test_real_kitti(samples, sequence):
    folder = samples / "semantickitti" / "dataset" / "sequences" / sequence
    calib, scan = load_calib(folder / "calib.txt"), read_scan(folder / "velodyne" / "000000.bin")
    size = image_size(folder / "image_2" / "000000.png")
    assert size == ((1241, 376) if sequence == "00" else (1226, 370))
    camera = kitti_camera(calib, "image_2", *size)
    pixels, depth, visible = camera.project(scan)
    image = np.c_[scan[:, :3], np.ones(len(scan))].astype(float) @ (calib["P2"] @ calib["Tr"]).T
    np.testing.assert_allclose(depth, image[:, 2], atol=1e-9)
    np.testing.assert_allclose(
        pixels[visible], image[visible, :2] / image[visible, 2:], atol=1e-8, rtol=0
    )
    assert 19_360 <= visible.sum() <= 20_000


NUSCENES_COUNTS = {
    "CAM_FRONT": 3067,
    "CAM_FRONT_RIGHT": 3079,
    "CAM_FRONT_LEFT": 3704,
    "CAM_BACK": 4826,
    "CAM_BACK_LEFT": 4097,
    "CAM_BACK_RIGHT": 3379,
}


def test_real_nuscenes_counts(samples):
    folder = samples / "nuscenes"
    # The samples' own file, of known checksum: the one place that loads a pickle as it is.
    content = pickle.loads(next(folder.glob("*.pkl")).read_bytes())
    (scan,) = (folder / "samples" / "LIDAR_TOP").iterdir()
    points = np.fromfile(scan, np.float32).reshape(-1, 5)
    counts = {}
    for name, view in content["data_list"][0]["images"].items():
        size = image_size(folder / "samples" / name / view["img_path"])
        assert size == (1600, 900)
        camera = Camera(name, view["cam2img"], view["lidar2cam"], *size)
        counts[name] = int(camera.project(points)[2].sum())
    assert counts == NUSCENES_COUNTS


def test_sizes_from_headers(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((7, 11, 3), np.uint8))
    assert image_size(tmp_path / "a.png") == (11, 7)
    # A comment and a Huffman table (FF C4) before the frame header.
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"abcd"
    table = b"\xff\xc4" + struct.pack(">H", 5) + b"xyz"
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, 900, 1600, 3)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + comment + table + frame)
    assert image_size(tmp_path / "a.jpg") == (1600, 900)


def test_bad_headers(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(InputError, match="cannot be read"):
        image_size(path)
    for content, message in (
        (b"", "neither PNG nor JPEG"),
        (b"GIF89a" + bytes(40), "neither PNG nor JPEG"),
        (b"\xff\xd8\xff\xfe\x00\x06abcd", "neither"),
        (b"\xff\xd8\xff\xc0\x00\x11\x08", "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            image_size(path)


def test_reading_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    color = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image_module.fromarray(color).save(tmp_path / "c.png")
    image_module.fromarray(color[..., 0]).save(tmp_path / "g.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "c.png"), color)
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "g.png"), np.stack([color[..., 0]] * 3, axis=2)
    )
    with pytest.raises(InputError, match="image is missing"):
        read_rgb(tmp_path / "none.png")


def test_ramp_goes_from_red_to_blue():
    colors = ramp([-5, 0, 10, 99], 0, 10).astype(int)
    assert (colors[0] == colors[1]).all()
    assert (colors[2] == colors[3]).all()
    assert colors[1].argmax() == 0
    assert colors[2].argmax() == 2
    assert ramp([3.0], 3.0, 3.0).shape == (1, 3)


def test_painted_points():
    image = np.full((20, 30, 3), 7, np.uint8)
    picture = paint(image, [[10.9, 5.2]], [4.0], radius=0)
    assert (image == 7).all(), "the image given stays as it is"
    assert np.argwhere((picture != 7).any(2)).tolist() == [[5, 10]]
    # A disc of radius 1 is a plus; half of one at the corner is outside.
    picture = paint(image, [[0.0, 0.0]], [4.0], radius=1)
    assert np.argwhere((picture != 7).any(2)).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_near_points_hide_far_ones():
    image = np.zeros((9, 9, 3), np.uint8)
    far = paint(image, [[4, 4]], [50.0])
    for depths in ([5.0, 50.0], [50.0, 5.0]):
        both = paint(image, [[4, 4], [4, 4]], depths)
        np.testing.assert_array_equal(both, paint(image, [[4, 4]], [5.0]))
        assert (both != far).any()


def test_points_in_colors_of_their_own():
    green = np.array([[0, 255, 0]], np.uint8)
    picture = paint(np.zeros((5, 5, 3), np.uint8), [[2, 2]], green, radius=0)
    assert picture[2, 2].tolist() == [0, 255, 0]
    assert picture.sum() == 255


def test_contact_sheet():
    cameras = [ahead(name="a"), ahead(name="b"), ahead(name="c")]
    images = [np.full((100, 200, 3), shade, np.uint8) for shade in (50, 100, 150)]
    sheet = contact_sheet([[10.0, 0, 0]], cameras, images, columns=2, shrink=2, radius=0)
    assert sheet.shape == (104, 204, 3)
    # The point is in the middle of every tile: pixel (50, 25) of 100 x 50.
    changed = np.argwhere(sheet[..., 0] != sheet[..., 2]).tolist()
    assert changed == [[25, 50], [25, 154], [79, 50]]
    assert [int(sheet[10, 10, 0]), int(sheet[10, 120, 0]), int(sheet[70, 10, 0])] == [50, 100, 150]
    assert (sheet[54:, 104:] == 16).all()
    classes = contact_sheet(
        [[10.0, 0, 0]], cameras[:1], images[:1], radius=0, colors=np.array([[1, 2, 3]])
    )
    assert classes[50, 100].tolist() == [1, 2, 3]


def test_contact_sheet_of_wrong_images():
    with pytest.raises(ValueError, match="1 cameras and 0 images"):
        contact_sheet(np.zeros((1, 3)), [ahead()], [])
    with pytest.raises(ValueError, match="camera ahead: 200 x 100 pixels, but its image is 5 x 4"):
        contact_sheet(np.zeros((1, 3)), [ahead()], [np.zeros((4, 5, 3), np.uint8)])
