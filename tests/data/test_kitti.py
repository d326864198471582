"""KITTIObjectDataset on hand-made frames and the real one; SemanticKITTI's camera; bad input."""

import math
import shutil

import numpy as np
import pytest

from pointcept_kd.data.boxes import count_in_boxes, inside_box
from pointcept_kd.data.camera import contact_sheet
from pointcept_kd.data.kitti import KITTIObjectDataset, read_boxes, read_calib
from pointcept_kd.data.pictures import read_image, write_png
from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset, load_calib
from pointcept_kd.host import DATASETS, InputError

# The camera looks along the LiDAR's x from 0.3 m above it; its matrix is 100 px, centre (60, 40), 5 px beside camera 0.
CALIB = """P0: 100 0 60 0 0 100 40 0 0 0 1 0
P2: 100 0 60 5 0 100 40 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0.3 1 0 0 0

"""
# A car 10 m ahead that drives away (heading x of the LiDAR: angle -90 degrees in camera coordinates), its lower face
# 1.7 m below the camera; a van 20 m ahead and 5 m right that drives to the right; a region nobody labelled.
LABELS = f"""Car 0.00 0 0 0 0 10 10 1.5 1.8 4.0 0 1.7 10 {-math.pi / 2}
Van 0.25 2 0 0 0 10 10 2.0 2.0 5.0 5 1.7 20 0
DontCare -1 -1 -10 100 0 119 30 -1 -1 -1 -1000 -1000 -1000 -10
"""


def write(root, number="000007", folder="training", points=None, calib=CALIB, labels=LABELS):
    base = root / folder
    for part in ("velodyne", "calib", "image_2") + (("label_2",) if labels is not None else ()):
        (base / part).mkdir(parents=True, exist_ok=True)
    points = POINTS if points is None else points
    scan = np.c_[points, np.linspace(0, 1, len(points))].astype(np.float32)
    (base / "velodyne" / f"{number}.bin").write_bytes(scan.tobytes())
    (base / "calib" / f"{number}.txt").write_text(calib)
    write_png(base / "image_2" / f"{number}.png", np.full((80, 120, 3), 9, np.uint8))
    if labels is not None:
        (base / "label_2" / f"{number}.txt").write_text(labels)
    return root


# In the car, in the van, on the road before the car, in the region, behind the camera.
POINTS = np.array([[10, 0.5, -1], [20, -5, -0.5], [7, 0, -1.3], [30, -15, 9], [-4, 0, 0]], float)


def dataset(root, **options):
    return KITTIObjectDataset(**{"data_root": str(root), **options})


def test_boxes_by_hand(tmp_path):
    objects = dataset(write(tmp_path)).boxes(0)
    # The car's centre is 1.7 - 0.75 = 0.95 m below the camera, which is 0.3 m above the LiDAR.
    np.testing.assert_allclose(
        objects["boxes"],
        [
            [10, 0, 0.3 - 1.7 + 0.75, 4.0, 1.8, 1.5, 0],
            [20, -5, 0.3 - 1.7 + 1.0, 5.0, 2.0, 2.0, -math.pi / 2],
        ],
        atol=1e-12,
    )
    assert objects["names"].tolist() == ["Car", "Van"]
    assert objects["truncation"].tolist() == [0, 0.25]
    assert objects["occlusion"].tolist() == [0, 2]
    assert objects["ignored"].tolist() == [[100, 0, 119, 30]]


def test_corners_as_in_the_development_kit(tmp_path):
    """Corners from the kit's formula in camera coordinates are those of the box in the LiDAR's frame."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        h, w, l = generator.uniform(1, 5, 3)
        x, y, z, angle = *generator.uniform(-10, 10, 3), generator.uniform(-math.pi, math.pi)
        rows.append((h, w, l, x, y, z, angle))
    path = tmp_path / "a.txt"
    path.write_text(
        "".join("Car 0 0 0 0 0 1 1 " + " ".join(map(repr, map(float, r))) + "\n" for r in rows)
    )
    to_camera = np.array([[0, -1, 0, 0.1], [0, 0, -1, 0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
    boxes = read_boxes(path, to_camera)["boxes"]
    for (h, w, l, x, y, z, angle), box in zip(rows, boxes, strict=True):
        c, s = math.cos(angle), math.sin(angle)
        expected = set()
        for along in (l / 2, -l / 2):
            for across in (w / 2, -w / 2):
                for up in (0, -h):
                    # Rotation about y: x' = c a + s b, z' = -s a + c b.
                    corner = (c * along + s * across + x, up + y, -s * along + c * across + z, 1)
                    place = np.linalg.inv(to_camera) @ corner
                    expected.add(tuple(place[:3].round(6) + 0.0))
        c, s = math.cos(box[6]), math.sin(box[6])
        got = set()
        for along in (box[3] / 2, -box[3] / 2):
            for across in (box[4] / 2, -box[4] / 2):
                for up in (box[5] / 2, -box[5] / 2):
                    place = np.add(box[:3], (c * along - s * across, s * along + c * across, up))
                    got.add(tuple(place.round(6) + 0.0))
        assert got == expected


def test_weak_labels(tmp_path):
    write(tmp_path)
    plain = dataset(tmp_path).get_data(0)
    assert plain["segment"].tolist() == [-1] * 5
    assert plain["segment"].dtype == np.int32
    assert dataset(tmp_path, classes=["Car"]).get_data(0)["segment"].tolist() == [0, -1, -1, -1, -1]
    both = dataset(tmp_path, classes=["Van", "Car"], ignore_index=255).get_data(0)
    assert both["segment"].tolist() == [1, 0, 255, 255, 255]
    # Neither the van, which is no car, nor what no one labelled, nor what the camera does not see is background.
    background = dataset(tmp_path, classes=["Car"], background=1).get_data(0)
    assert background["segment"].tolist() == [0, -1, 1, -1, -1]


def test_a_frame(tmp_path):
    data = dataset(write(tmp_path)).get_data(0)
    np.testing.assert_array_equal(data["coord"], POINTS.astype(np.float32))
    assert data["strength"][:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert data["coord"].dtype == data["strength"].dtype == np.float32
    assert data["name"] == "000007"


def test_the_camera(tmp_path):
    pytest.importorskip("PIL")
    data = dataset(write(tmp_path))
    (camera,), (image,) = data.cameras(0), data.images(0)
    assert (camera.name, camera.width, camera.height) == ("image_2", 120, 80)
    # 10 m ahead at the LiDAR's height: 0.3 m below the camera; 5 px beside camera 0 at 1 m is 0.5 px at 10 m.
    pixels, depth, _ = camera.project([[10.0, 0, 0]])
    assert pixels[0] == pytest.approx((60.5, 43))
    assert depth[0] == 10
    assert image.shape == (80, 120, 3)


def test_splits(tmp_path):
    for number in ("000003", "000001"):
        write(tmp_path, number)
    write(tmp_path, "000001", "testing", labels=None)
    assert [dataset(tmp_path).get_data_name(i) for i in range(2)] == ["000001", "000003"]
    test = dataset(tmp_path, split="testing", classes=["Car"])
    assert test.get_data_name(0) == "testing_000001"
    assert test.get_data(0)["segment"].tolist() == [-1] * 5
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("000003\n\n000001\n")
    (tmp_path / "ImageSets" / "test.txt").write_text("000001\n")
    train = dataset(tmp_path, split="train")
    assert [train.get_data_name(i) for i in range(2)] == ["000003", "000001"]
    assert len(dataset(tmp_path, split=["train", "test"])) == 3
    with pytest.raises(InputError, match="val.txt is missing: split 'val' is what it lists"):
        dataset(tmp_path, split="val")
    (tmp_path / "ImageSets" / "val.txt").write_text("000001\n000009\n")
    with pytest.raises(InputError, match="val.txt: row 1: .*000009.bin is missing"):
        dataset(tmp_path, split="val")


def test_reduced_scans(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=r"velodyne_reduced: no \*.bin"):
        dataset(tmp_path, velodyne="velodyne_reduced")
    shutil.move(tmp_path / "training" / "velodyne", tmp_path / "training" / "velodyne_reduced")
    data = dataset(tmp_path, velodyne="velodyne_reduced")
    assert data.get_data_name(0) == "000007"
    assert len(data.boxes(0)["boxes"]) == 2


def test_registered():
    assert DATASETS.get("kd.KITTIObjectDataset") is KITTIObjectDataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(split="all"), "split 'all' is unknown"),
        (dict(velodyne="lidar"), "velodyne='lidar'"),
        (dict(classes="Car"), "classes='Car': expected a list"),
        (dict(background=3), "background=3 needs classes"),
    ],
)
def test_bad_options(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        dataset(tmp_path, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels="Car 1 2 3\n"), "row 0 should hold a class and 14 numbers"),
        (dict(labels=LABELS + "Car x" + " 1" * 13), "row 3 should hold"),
        (dict(calib=CALIB.replace("R0_rect", "R1")), "row 2 should hold 12"),
        (dict(calib=CALIB.replace("Tr_velo_to_cam", "Tr_velo")), "no row Tr_velo_to_cam; copy"),
        (dict(calib="P2: nan 2\n"), "row 0 should hold 12 finite numbers"),
        (dict(points=np.array([[1, 2, np.nan]])), r".bin: row 0 is not finite .*, 1 of 1"),
    ],
)
def test_broken_files(tmp_path, change, message):
    data = dataset(write(tmp_path, **change), classes=["Car"])
    with pytest.raises(InputError, match=f"000007.*{message}"):
        data.get_data(0)


def test_missing_files(tmp_path):
    data = dataset(write(tmp_path), classes=["Car"])
    (tmp_path / "training" / "label_2" / "000007.txt").unlink()
    with pytest.raises(InputError, match="label_2.*000007.txt: cannot be read"):
        data.get_data(0)
    (tmp_path / "training" / "image_2" / "000007.png").unlink()
    with pytest.raises(InputError, match="000007.png: cannot be read"):
        data.cameras(0)


def test_the_real_frame(samples):
    data = dataset(samples / "kitti", classes=["Car", "Pedestrian", "Cyclist"], background=3)
    frame, objects = data.get_data(0), data.boxes(0)
    assert frame["coord"].shape == (19083, 3)
    assert frame["name"] == "002155"
    assert objects["names"].tolist().count("Car") == 12
    assert objects["names"].tolist().count("Van") == 1
    assert objects["ignored"].shape == (2, 4)
    counts = count_in_boxes(frame["coord"], objects["boxes"])
    assert counts[0] > 400, "the car ahead"
    assert counts[1] > 1500, "the van"
    assert (frame["segment"] == 0).sum() == counts[objects["names"] == "Car"].sum()
    calib = read_calib(samples / "kitti" / "training" / "calib" / "002155.txt")
    rectify = np.eye(4)
    rectify[:3, :3] = calib["R0_rect"]
    product = calib["P2"] @ rectify @ np.vstack([calib["Tr_velo_to_cam"], [0, 0, 0, 1]])
    image = np.c_[frame["coord"], np.ones(len(frame["coord"]))] @ product.T
    pixels, _, visible = data.cameras(0)[0].project(frame["coord"])
    np.testing.assert_allclose(pixels[visible], (image[:, :2] / image[:, 2:])[visible], atol=1e-8)
    # The sample is the part of the scan that the camera sees, cut with a margin at the sides.
    assert visible.mean() > 0.98
    assert np.abs(pixels[:, 0] - 621).max() < 621 + 31
    # A labelled box is where its object is in the image: the car ahead's points lie in its rectangle.
    ahead = frame["coord"][inside_box(frame["coord"], objects["boxes"][0])]
    u, v = data.cameras(0)[0].project(ahead)[0].T
    assert (u > 585).all()
    assert (u < 668).all()
    assert (v > 173).all()
    assert (v < 252).all()


def test_semantic_kitti_has_the_camera_too(samples):
    pytest.importorskip("PIL")
    root = samples / "semantickitti"
    data = SemanticKITTIDataset(split="08", data_root=str(root))
    (camera,), (image,) = data.cameras(0), data.images(0)
    assert image.shape == (camera.height, camera.width, 3) == (370, 1226, 3)
    points = data.get_data(0)["coord"]
    assert camera.project(points)[2].sum() == 19961
    calib = load_calib(root / "dataset" / "sequences" / "08" / "calib.txt")
    np.testing.assert_allclose(camera.intrinsics, calib["P2"][:, :3])
    sheet = contact_sheet(points, [camera], [image], radius=0)
    assert 18_000 < (sheet != image).any(2).sum() <= 19_961
    np.testing.assert_array_equal(
        image, read_image(root / "dataset" / "sequences" / "08" / "image_2" / "000000.png")
    )
    with pytest.raises(InputError, match="000001.png"):
        data.cameras(1)
    with pytest.raises(InputError, match="000001.png: the image is missing"):
        data.images(1)
