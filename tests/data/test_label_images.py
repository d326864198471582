"""Walking camera images: which, where products go, restart, several processes, refusals."""

import json
import re
import runpy
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data import label_images
from pointcept_kd.data.label_images import (
    Photo,
    Product,
    SuperpixelMaker,
    find_images,
    layout_of,
    produce,
    write_superpixels,
)
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import read_image, write_png
from pointcept_kd.data.superpixels import superpixels
from pointcept_kd.host import InputError

from .nuscenes_world import CAMERAS, SIZE, tables, write

pytestmark = pytest.mark.usefixtures("pillow")

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py")
MAKER = SuperpixelMaker(segments=12)


@pytest.fixture(scope="module")
def pillow():
    pytest.importorskip("PIL", reason="the extra `images` is not installed")


def photos(folder, count, seed=0, shape=(24, 40)):
    """Pictures with some structure, so that superpixels are not plain squares."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), dtype=np.uint8)
        write_png(folder / f"{i:06d}.png", coarse.repeat(8, 0).repeat(8, 1))


@pytest.fixture
def drives(tmp_path):
    """Two sequences of 3 and 2 images, and one without any."""
    root = tmp_path / "kitti"
    photos(root / "dataset" / "sequences" / "00" / "image_2", 3)
    photos(root / "dataset" / "sequences" / "08" / "image_2", 2, seed=1)
    (root / "dataset" / "sequences" / "11").mkdir()
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Seven key frames with six cameras, in nuScenes' layout, below a folder with a name to fall over."""
    root = tmp_path_factory.mktemp("samples") / "samples" / "nuscenes"
    write(root / "raw", tables())
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=3, with_camera=True)
    return root


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "samples" / "copy")
    return tmp_path / "samples" / "copy"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tool(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(TOOL, run_name="__main__")
    output = capsys.readouterr()
    return done.value.code, output.out, output.err


@dataclass(frozen=True)
class Constant:
    """A maker whose maps hold one value; it refuses images of a given brightness."""

    value: int
    shape: tuple[int, int] | None = None

    def open(self):
        return lambda photo: self.make

    def make(self, image):
        shape = image.shape[:2] if self.shape is None else self.shape
        return np.full(shape, self.value), {"counts": {"images": 1}, "unknown": {"sky": 2}}


# ------------------------------------------------------------------------------------ which images


def test_images_of_drives(drives):
    found = find_images(drives)
    assert layout_of(drives) == "kitti"
    assert [(p.part, p.scan) for p in found] == [
        ("00", "00_000000"), ("00", "00_000001"), ("00", "00_000002"), ("08", "08_000000"), ("08", "08_000001"),
    ]  # fmt: skip
    sequence = drives / "dataset" / "sequences" / "08"
    assert found[-1].product("superpixels") == sequence / "superpixels" / "000001.png"
    assert find_images(drives, parts=["08"]) == found[3:]
    halves = [find_images(drives, shard=f"{i}/2") for i in (1, 2)]
    assert sorted(halves[0] + halves[1], key=found.index) == found
    assert not set(halves[0]) & set(halves[1])


def test_images_of_detection(tmp_path):
    photos(tmp_path / "training" / "image_2", 2)
    photos(tmp_path / "testing" / "image_2", 1)
    found = find_images(tmp_path)
    assert layout_of(tmp_path) == "kitti_object"
    assert [p.scan for p in found] == ["000000", "000001", "testing_000000"]
    assert found[0].product("weak_labels") == tmp_path / "training" / "weak_labels" / "000000.png"
    assert [p.part for p in find_images(tmp_path, parts=["testing"])] == ["testing"]


def test_images_of_nuscenes_go_where_the_reader_looks(world):
    found = find_images(world)
    assert len(found) == 7 * len(CAMERAS)
    assert len({p.place for p in found}) == len({p.token for p in found}) == len(found)
    by_scan = {}
    for photo in found:
        assert Path(photo.image).is_file()
        by_scan.setdefault((photo.part, photo.scan), []).append(photo)
    for part in ("train", "val"):
        reader = NuScenesDataset(part, str(world), sweeps=3)
        for idx in range(len(reader.data_list)):
            mine = by_scan.pop((part, reader.get_data_name(idx)))
            assert [p.camera for p in mine] == list(range(6))
            assert [p.product("camseg") for p in mine] == reader.weak_label_files(idx)
            wanted = reader.superpixel_files(idx)
            assert [p.product("superpixels_slic", by_token=True) for p in mine] == wanted
    assert not by_scan
    assert {p.part for p in find_images(world, parts=["val"])} == {"val"}


def test_which_layout(tmp_path, drives, world):
    assert layout_of(world) == "nuscenes"
    with pytest.raises(InputError, match="holds neither dataset/sequences"):
        layout_of(tmp_path)
    (drives / "info").mkdir()
    with pytest.raises(InputError, match="kitti and nuscenes; choose with --layout"):
        layout_of(drives)
    assert len(find_images(drives, layout="kitti")) == 5
    (tmp_path / "n" / "raw" / "v1.0-mini").mkdir(parents=True)
    with pytest.raises(InputError, match=r"without info files.*nuscenes-info --data-root \S+/raw"):
        layout_of(tmp_path / "n")


def test_images_that_are_not_there(drives, world, copy, tmp_path):
    with pytest.raises(InputError, match=r"11/image_2 is no folder; correct --parts"):
        find_images(drives, parts=["11"])
    with pytest.raises(InputError, match="has the splits train, val"):
        find_images(world, parts=["test"])
    with pytest.raises(InputError, match="--shard: '3/2'"):
        find_images(drives, shard="3/2")
    with pytest.raises(InputError, match="--layout: 'waymo' is unknown"):
        find_images(drives, layout="waymo")
    (tmp_path / "training" / "image_2").mkdir(parents=True)
    with pytest.raises(InputError, match="no camera images in the layout kitti_object"):
        find_images(tmp_path)
    write_infos(copy / "raw", "v1.0-trainval", copy, sweeps=3)
    with pytest.raises(InputError, match=r"without cameras; make it again.*--with-camera"):
        find_images(copy)


# ------------------------------------------------------------------------------------ superpixels


def test_superpixels_of_drives(drives):
    report = write_superpixels(drives, MAKER, workers=1, progress=False)
    assert (report.written, report.kept, report.problems) == (5, 0, [])
    total = 0
    for photo in find_images(drives):
        ids = read_image(photo.product("superpixels"))
        assert ids.dtype == np.uint16
        sigma = 3 * 40 / 1600
        wanted = superpixels(read_image(photo.image), 12, compactness=6.0, sigma=sigma)
        assert np.array_equal(ids, wanted)
        assert ids.max() < 12
        total += int(ids.max()) + 1
    assert report.counts["segments"] == total
    side = drives / "dataset" / "sequences" / "08" / "superpixels" / "settings.json"
    wanted = {"version": 1, "segments": 12, "compactness": 6.0, "sigma": None, "method": "slic"}
    assert json.loads(side.read_text()) == wanted


def test_superpixels_of_nuscenes(copy):
    report = write_superpixels(copy, MAKER, parts=["val"], workers=1, progress=False)
    reader = NuScenesDataset("val", str(copy), sweeps=3)
    assert report.written == 6 * len(reader.data_list)
    for idx in range(len(reader.data_list)):
        for path, image in zip(reader.superpixel_files(idx), reader.images(idx), strict=True):
            ids = read_image(path)
            assert ids.dtype == np.uint8
            assert ids.shape == image.shape[:2] == SIZE[::-1]
            assert np.array_equal(ids, superpixels(image, 12, 6.0, sigma=3 * SIZE[0] / 1600))
    write_superpixels(copy, replace(MAKER, segments=30), parts=["val"], workers=1, progress=False)
    assert len(list((copy / "raw" / "superpixels_slic_30").glob("*.png"))) == report.written
    assert not list((copy / "raw").glob("superpixels_slic/.*"))


def test_a_run_goes_on_where_it_stopped(drives):
    write_superpixels(drives, MAKER, workers=1, progress=False)
    before = files(drives)
    folder = drives / "dataset" / "sequences" / "00" / "superpixels"
    gone, empty, kept = (folder / f"{i:06d}.png" for i in range(3))
    gone.unlink()
    empty.write_bytes(b"")
    kept.write_bytes(b"not looked at")
    (folder / ".000000.png.1.tmp").write_bytes(b"half")
    report = write_superpixels(drives, MAKER, workers=1, progress=False)
    assert (report.written, report.kept) == (2, 3)
    assert kept.read_bytes() == b"not looked at"
    (folder / ".000000.png.1.tmp").unlink()
    after = files(drives)
    name = str(kept.relative_to(drives))
    assert {**after, name: before[name]} == before


def test_processes_write_the_same(drives, tmp_path):
    shutil.copytree(drives, tmp_path / "other")
    for root, workers in ((drives, 1), (tmp_path / "other", 2)):
        assert write_superpixels(root, MAKER, workers=workers, progress=False).written == 5
    assert files(drives) == files(tmp_path / "other")


def test_settings_never_mix(drives):
    write_superpixels(drives, MAKER, parts=["00"], workers=1, progress=False)
    before = files(drives)
    for maker, text in (
        (replace(MAKER, segments=13), "segments=12, asked for segments=13"),
        (replace(MAKER, sigma=1.5), "sigma=None, asked for sigma=1.5"),
    ):
        # Sequence 08 is free, but a run that cannot be finished does not begin.
        with pytest.raises(InputError, match=text + "; use another --out-name or delete"):
            write_superpixels(drives, maker, workers=1, progress=False)
    assert files(drives) == before
    more = write_superpixels(drives, replace(MAKER, segments=13), name="finer", workers=1, progress=False)  # fmt: skip
    assert more.written == 5
    side = drives / "dataset" / "sequences" / "00" / "superpixels" / "settings.json"
    side.write_text("{")
    with pytest.raises(InputError, match="not written by this tool"):
        write_superpixels(drives, MAKER, workers=1, progress=False)
    side.unlink()
    with pytest.raises(InputError, match=r"holds files, but no settings\.json"):
        write_superpixels(drives, MAKER, workers=1, progress=False)


def test_a_broken_image_does_not_stop_the_others(drives):
    folder = drives / "dataset" / "sequences" / "00"
    (folder / "image_2" / "000001.png").write_bytes(b"\x89PNG")
    report = write_superpixels(drives, MAKER, workers=1, progress=False)
    assert report.written == 4
    assert len(report.problems) == 1
    assert "00/image_2/000001.png: not a readable picture" in report.problems[0]
    assert not (folder / "superpixels" / "000001.png").exists()


@pytest.mark.parametrize(
    ("maker", "text"),
    [
        (Constant(7), "has the value 7, not in 0..6"),
        (Constant(-1), "has the value -1, not in 0..6"),
        (Constant(3, (5, 5)), r"should be \(24, 40\) integers, got \(5, 5\)"),
    ],
)
def test_maps_that_break_the_rules(drives, maker, text):
    product = Product("maps", "note.json", {}, limit=7)
    report = produce(find_images(drives), product, maker, workers=1, progress=False)
    assert report.written == 0
    assert len(report.problems) == 5
    assert all(re.search(text, line) for line in report.problems)
    assert not list(drives.rglob("maps/*.png"))


def test_what_producers_count_is_added_up(drives):
    product = Product("maps", "note.json", {"a": (1, 2)}, limit=7)
    report = produce(find_images(drives), product, Constant(6), workers=1, progress=False)
    assert dict(report.counts) == {"images": 5}
    assert dict(report.unknown) == {"sky": 10}
    again = produce(find_images(drives), product, Constant(6), workers=1, progress=False)
    assert (again.written, again.kept) == (0, 5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"segments": 0}, "--segments: 0 is not in 1..65535"),
        ({"compactness": 0.0}, "--compactness: 0.0"),
        ({"sigma": -1.0}, "--sigma: -1.0 is negative"),
        ({"method": "seeds"}, "--method: 'seeds'"),
    ],
)
def test_superpixels_that_cannot_be(drives, options, text):
    with pytest.raises(InputError, match=text):
        write_superpixels(drives, SuperpixelMaker(**options), progress=False)


def test_one_byte_has_room_for_256(world):
    with pytest.raises(InputError, match=r"--segments: 300 is not in 1\.\.256"):
        write_superpixels(world, SuperpixelMaker(segments=300), progress=False)


@pytest.mark.parametrize("name", ["image_2", "../x", ".hidden", "a/b", "v1.0-mini", ""])
def test_folders_that_are_not_free(drives, name):
    with pytest.raises(InputError, match="--out-name"):
        write_superpixels(drives, MAKER, name=name, progress=False)


def test_without_pillow(drives, monkeypatch):
    monkeypatch.setattr(label_images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs Pillow"):
        produce([Photo("a.png", str(drives), "a.png", "a.png", "00", "a")],
                Product("maps", "n.json", {}, 2), Constant(1))  # fmt: skip


def test_the_tool(drives, monkeypatch, capsys):
    options = ("superpixels", "--data-root", drives, "--segments", 12, "--workers", 1)
    code, out, _ = tool(monkeypatch, capsys, *options, "--parts", "00", "--compactness", 9, "--sigma", 1)  # fmt: skip
    assert code == 0
    assert "segments per image" in out
    assert "3 images in" in out
    assert "0 kept; no images with problems" in out
    code, _, err = tool(monkeypatch, capsys, *options)
    assert code == 2
    assert "compactness=9.0, asked for compactness=6.0" in err
    (drives / "dataset" / "sequences" / "08" / "image_2" / "000000.png").write_bytes(b"x")
    code, out, err = tool(monkeypatch, capsys, *options, "--out-name", "pieces")
    assert code == 2
    assert "4 images in" in out
    assert "1 image with problems" in out
    assert "error: " in err
    assert "08/image_2/000000.png" in err
    code, _, err = tool(monkeypatch, capsys, *options[:-1], 0)
    assert code == 2
    assert "--workers: 0" in err
