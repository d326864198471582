"""Previews: pictures of other people's folders, and what is said about those that cannot be drawn."""

import shutil

import numpy as np
import pytest

from pointcept_kd.data.camera import Camera
from pointcept_kd.data.pictures import read_image, write_png
from pointcept_kd.data.preview import (
    Shot,
    draw,
    open_shot,
    panels,
    segment_picture,
    weak_picture,
    write_preview,
)
from pointcept_kd.host import InputError


def shot(count=1, weak=True):
    lens = np.array([[40.0, 0, 40], [0, 40, 12], [0, 0, 1]])
    ahead = np.eye(4)
    ahead[:3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    image = np.full((24, 80, 3), 100, np.uint8)
    mask = np.zeros((24, 80), np.uint8)
    mask[:, 40:] = 1
    mask[:4] = 255
    coord = np.array([[10.0, 0, 0], [5, 2, 0], [-5, 0, 0]])
    return Shot(
        "one", coord, np.array([0, 1, -1]), ("road", "car"), np.array([[255, 0, 255], [0, 0, 255]]),
        [Camera(f"c{i}", lens, ahead, 80, 24) for i in range(count)], [image] * count,
        [mask if weak else None] * count, [mask.astype(np.uint16)] * count, ["road", "car"], 255,
    )  # fmt: skip


def test_panels_show_what_there_is():
    assert [c.split()[0] for c, _ in panels(shot())] == ["camera", "points", "weak", "superpixels"]
    assert len(panels(shot(weak=False))) == 3
    assert panels(shot(6))[0][1].shape == (2 * 24 + 4, 3 * 80 + 8, 3)
    # (10, 0, 0) is on the optical axis, 10 m away; (-5, 0, 0) is behind the camera.
    painted = panels(shot())[1][1]
    assert not (painted[12, 40] == 100).all()
    # (5, 2, 0): u = 40 + 40 * (-2) / 5 = 24
    assert not (painted[12, 24] == 100).all()
    assert (painted != 100).any(-1).sum() <= 2 * 9


def test_weak_labels_are_tinted_and_unknown_is_dark():
    picture = weak_picture(shot(), 0)
    assert (picture[2, 10] == 45).all()  # 0.45 of 100
    assert picture[10, 10].tolist() == [201, 35, 201]  # 0.35 * 100 + 0.65 * (255, 0, 255)
    assert picture[10, 60].tolist() == [35, 35, 201]


def test_borders_lie_between_segments():
    image = np.zeros((4, 6, 3), np.uint8)
    ids = np.repeat(np.array([[0, 0, 0, 1, 1, 1]]), 4, 0)
    drawn = segment_picture(image, ids)
    assert np.flatnonzero(drawn[0].any(-1)).tolist() == [2]


def test_drawing_is_no_wider_than_asked():
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    assert draw(shot(6), width=500).size[0] <= 500
    assert draw(shot(), width=5000, kinds=1).size[0] > 200


def test_kitti_detection(tmp_path, samples):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    write_preview(samples / "kitti", tmp_path / "p.png", "002155", width=800)
    assert read_image(tmp_path / "p.png").shape[1] == 800
    assert open_shot(samples / "kitti").name == "002155"


def test_folders_that_cannot_be_drawn(tmp_path):
    with pytest.raises(InputError, match="holds neither dataset/sequences"):
        open_shot(tmp_path)
    (tmp_path / "raw" / "v1.0-sim").mkdir(parents=True)
    with pytest.raises(InputError, match="without info files; make them first"):
        open_shot(tmp_path)
    sequence = tmp_path / "dataset" / "sequences" / "00"
    (sequence / "velodyne").mkdir(parents=True)
    with pytest.raises(InputError, match="give sequence and file number, such as 00_000000"):
        open_shot(tmp_path, "12")
    (sequence / "velodyne" / "000000.bin").write_bytes(np.ones((5, 4), "<f4").tobytes())
    with pytest.raises(InputError, match="--scan 00_000007: no scan among 1"):
        open_shot(tmp_path, "00_000007")
    with pytest.raises(InputError):
        open_shot(tmp_path, "00_000000")  # neither calibration nor image
    with pytest.raises(InputError, match="--width: 10"):
        write_preview(tmp_path, tmp_path / "p.png", width=10)


def test_maps_beside_the_images_are_shown(tmp_path, samples):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    shutil.copytree(samples / "kitti", tmp_path / "kitti")
    folder = tmp_path / "kitti" / "training"
    plain = open_shot(tmp_path / "kitti")
    assert plain.weak == plain.segments == [None]
    assert plain.weak_names == []
    for name in ("weak_labels", "superpixels"):
        (folder / name).mkdir()
        write_png(folder / name / "002155.png", np.full((375, 1242), 1, np.uint8))
    # Nobody knows what the values mean: they are not shown.
    assert open_shot(tmp_path / "kitti").weak == [None]
    (folder / "weak_labels" / "classes.json").write_text('{"classes": ["a", "b"], "unknown": 255}')
    full = open_shot(tmp_path / "kitti")
    assert full.weak_names == ["none", "a", "b"]
    assert full.unknown == 0
    assert (full.weak[0] == 2).all()
    assert (full.segments[0] == 1).all()
    assert [c.split()[0] for c, _ in panels(full)] == ["camera", "points", "weak", "superpixels"]
    colors = np.random.default_rng(0).integers(0, 255, (375, 1242, 3)).astype(np.uint8)
    write_png(folder / "weak_labels" / "002155.png", colors)
    with pytest.raises(InputError, match="a mask has one channel"):
        open_shot(tmp_path / "kitti")
