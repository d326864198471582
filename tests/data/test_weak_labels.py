"""Weak labels: phrases, painting, files of other programs, labels of points, and real classes of transformers."""

import importlib.util
import json
import math
import runpy
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data import synthetic
from pointcept_kd.data import weak_labels as weak
from pointcept_kd.data.image_maps import read_classes, read_weak_labels
from pointcept_kd.data.label_images import find_images
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_files import LEARNING_MAP
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import read_image, write_png
from pointcept_kd.data.streets.cameras import CameraPlan, simulate_cameras
from pointcept_kd.host import InputError

from .nuscenes_world import tables, write
from .weak_models import write_detector, write_segmenter

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py")
NAMES = ("car", "road", "traffic_cone", "pedestrian")
HEIGHT, WIDTH = 32, 56

images = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason="the extra `images` is not installed"
)


@pytest.fixture
def drive(tmp_path):
    """A sequence of four noisy images."""
    folder = tmp_path / "data" / "dataset" / "sequences" / "03" / "image_2"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(4)
    for i in range(4):
        write_png(folder / f"{i:06d}.png", rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write(root / "raw", tables())
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=3, with_camera=True)
    return root


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "copy")
    return tmp_path / "copy"


def folder_of(drive):
    return drive / "dataset" / "sequences" / "03" / "weak_labels"


def put(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, values)


def tool(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, "weak-labels", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(TOOL, run_name="__main__")
    output = capsys.readouterr()
    return done.value.code, output.out, output.err


@dataclass(frozen=True)
class Checker:
    """A maker of a chessboard of classes 1 and 2; each image it opens for is noted in a file."""

    log: str
    classes: tuple[str, ...] = NAMES
    side: int = 4

    def check(self):
        assert self.side > 0

    def note(self):
        return {"producer": "checker", "prompt": None, "model": None, "side": self.side}

    def open(self):
        return self.producer

    def producer(self, photo):
        with open(self.log, "a") as file:
            file.write(photo.scan + "\n")
        return self.make

    def make(self, image):
        row, column = np.mgrid[: image.shape[0], : image.shape[1]] // self.side
        return (1 + (row + column) % 2).astype(np.uint8), {"counts": {"boxes": 2}}


# ------------------------------------------------------------------------------------ names and phrases


def test_the_prompt():
    wanted = "barrier.bicycle.bus.car.motorcycle.pedestrian.traffic cone.truck."
    wanted += "road.sidewalk.terrain.vegetation.building."
    assert weak.prompt_of(weak.CLASSES) == wanted
    assert weak.prompt_of(NAMES, "A Car. a person") == "a car. a person."
    assert weak.prompt_of(NAMES, "car. road.") == "car. road."
    assert len(weak.CLASSES) == 13
    assert len(weak.SEEM_CLASSES) == 16


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("traffic _ cone", "traffic_cone"), ("traffic cone", "traffic_cone"), ("cone", "traffic_cone"),
        ("traffic", "traffic_cone"), ("traffic_cone", "traffic_cone"), ("man", "pedestrian"),
        ("road", "road"), ("road sidewalk", "road"), ("Car . truck", "car"), ("building terrain", "building"),
        ("cone barrier", "traffic_cone"), ("man bicycle", "pedestrian"), ("sky", None), ("sky road", None),
        ("", None), (".", None), ("##cle", None),
    ],
)  # fmt: skip
def test_what_a_phrase_means(phrase, name):
    value = weak.value_of(phrase, weak.CLASSES, weak.ALIASES)
    assert value == (0 if name is None else weak.CLASSES.index(name) + 1)


def test_names_with_several_words_and_own_aliases():
    classes = weak.SEEM_CLASSES
    aliases = weak.aliases_of(["Digger=construction_vehicle", "big_man=barrier"], classes)
    assert weak.value_of("construction vehicle", classes, aliases) == 8
    assert weak.value_of("other ground", classes, aliases) == 16
    assert weak.value_of("digger car", classes, aliases) == 8
    assert weak.value_of("big man", classes, aliases) == 1
    assert weak.value_of("construction", classes, aliases) == 0
    # No alias without its class, and a class is not renamed by an alias of another.
    assert weak.aliases_of(None, ("car",)) == {}
    assert weak.value_of("cone", ("traffic_cone", "cone"), {"cone": "traffic_cone"}) == 2
    for text in ("digger", "digger=excavator", " =car"):
        with pytest.raises(InputError, match="--alias"):
            weak.aliases_of([text], ("car",))


def test_class_names():
    assert weak.class_names(None) == weak.CLASSES
    assert weak.class_names("seem") == weak.SEEM_CLASSES
    assert weak.class_names("Car, traffic  cone,road") == ("car", "traffic_cone", "road")
    many = ",".join(f"c{i}" for i in range(256))
    for text, fault in (
        ("car,,road", "''"), ("car,car", "twice"), ("none,car", "'none'"), (many, "256"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"--classes: .*{fault}"):
            weak.class_names(text)


def test_phrases_of_boxes():
    ids = [101, 7, 8, 1012, 9, 1012, 102]  # begin, "traffic cone", dot, "car", dot, end
    words = {7: "traffic", 8: "cone", 9: "car", 1012: ".", 101: "[CLS]", 102: "[SEP]"}
    scores = np.zeros((4, 9))
    scores[0, [1, 2]] = 0.6, 0.3
    scores[1, [0, 4, 6, 8]] = 0.9  # special tokens and columns beyond the prompt do not count
    scores[2, 4] = 0.25  # not larger
    scores[3, [2, 3, 4]] = 0.4
    found = weak.phrases_of(
        scores, ids, [101, 102], lambda few: " ".join(words[i] for i in few), threshold=0.25
    )
    assert found == ["traffic cone", "car", "", "cone . car"]


# ------------------------------------------------------------------------------------ painting


def box_painter(boxes, phrases, calls=None):
    def detect(image):
        return (
            np.array(boxes, np.float32).reshape(-1, 4),
            np.linspace(0.9, 0.5, len(boxes)),
            phrases,
        )

    def segment(image, wanted):
        if calls is not None:
            calls.append(len(wanted))
        for left, top, right, bottom in wanted.astype(int):
            mask = np.zeros(image.shape[:2], bool)
            mask[top:bottom, left:right] = True
            yield mask

    return weak.BoxPainter(detect, segment, NAMES, weak.aliases_of(None, NAMES))


def test_later_boxes_are_painted_over_earlier_ones():
    image = np.zeros((4, 6, 3), np.uint8)
    producer = box_painter(
        [[0, 0, 6, 4], [1, 0, 4, 2], [2, 1, 5, 3], [0, 3, 1, 4]], ["road", "car", "man", "sky"]
    )
    label, meta = producer(image)
    # By hand: 2 road, 1 car, 4 pedestrian; the unknown thing in the lower left corner takes its label away.
    wanted = [[2, 1, 1, 1, 2, 2], [2, 1, 4, 4, 4, 2], [2, 2, 4, 4, 4, 2], [0, 2, 2, 2, 2, 2]]
    assert label.dtype == np.uint8
    assert label.tolist() == wanted
    assert meta["counts"] == {"boxes": 4, "images without boxes": 0}
    assert meta["unknown"] == {"sky": 1}
    assert [(i["value"], i["name"]) for i in meta["instances"]] == [
        (1, "road"), (2, "car"), (3, "pedestrian"), (4, "none"),
    ]  # fmt: skip
    assert meta["instances"][1]["box"] == [1, 0, 4, 2]
    json.dumps(meta["instances"])
    # The same boxes the other way round.
    label, _ = box_painter([[1, 0, 4, 2], [0, 0, 6, 4]], ["car", "road"])(image)
    assert (label == 2).all()


def test_no_boxes_no_labels():
    calls = []
    label, meta = box_painter([], [], calls)(np.zeros((4, 6, 3), np.uint8))
    assert label.tolist() == [[0] * 6] * 4
    assert calls == []
    assert meta["counts"] == {"boxes": 0, "images without boxes": 1}
    assert not meta["instances"]


def test_paint_needs_a_value_per_mask():
    with pytest.raises(ValueError, match="shorter"):
        weak.paint((2, 2), [np.ones((2, 2), bool)] * 2, [1])


# ------------------------------------------------------------------------------------ all images


@images
def test_files_and_restart(drive, tmp_path):
    maker = Checker(str(tmp_path / "log"))
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert (report.written, report.kept, report.counts["boxes"]) == (4, 0, 8)
    folder = folder_of(drive)
    note = json.loads((folder / "classes.json").read_text())
    assert note == {
        "classes": ["none", *NAMES], "producer": "checker", "prompt": None, "model": None, "side": 4,
    }  # fmt: skip
    assert read_classes(folder / "classes.json").names == NAMES
    label = read_weak_labels(folder / "000002.png", read_classes(folder / "classes.json"))
    assert label.dtype == np.uint8
    assert label[:5, 0].tolist() == [1, 1, 1, 1, 2]
    (folder / "000001.png").unlink()
    (tmp_path / "log").unlink()
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert (report.written, report.kept) == (1, 3)
    assert (tmp_path / "log").read_text().split() == ["03_000001"]
    for other, text in (
        (replace(maker, side=5), "side=4, asked for side=5"),
        (replace(maker, classes=NAMES[:3]), "classes="),
    ):
        with pytest.raises(InputError, match=text):
            weak.write_weak_labels(drive, other, workers=1, progress=False)


@images
def test_values_without_a_class_are_problems(drive, tmp_path):
    maker = Checker(str(tmp_path / "log"), classes=("car",))
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert report.written == 0
    assert all("has the value 2, not in 0..1" in line for line in report.problems)


# ------------------------------------------------------------------------------------ files of other programs


@images
def test_own_files_are_taken_over(drive, tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 5, (HEIGHT, WIDTH), dtype=np.uint8) for _ in range(3)]
    for i, mask in enumerate(masks):
        put(tmp_path / "from" / "03" / f"{i:06d}.png", mask)
    report = weak.write_weak_labels(
        drive, weak.PngLabels(str(tmp_path / "from"), NAMES), workers=1, progress=False
    )
    assert report.written == 3
    assert len(report.problems) == 1
    assert "image_2/000003.png: no file 03/000003.png or" in report.problems[0]
    for i, mask in enumerate(masks):
        assert np.array_equal(read_image(folder_of(drive) / f"{i:06d}.png"), mask)


@images
@pytest.mark.parametrize("first", [False, True])
def test_values_from_zero(drive, tmp_path, first):
    mask = np.tile(np.arange(5, dtype=np.uint8).repeat(2), (HEIGHT, 6))[:, :WIDTH]
    for i in range(4):
        put(tmp_path / "from" / "03" / "weak_labels" / f"{i:06d}.png", mask)
    maker = weak.PngLabels(str(tmp_path / "from"), NAMES, (), True, first)
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert report.written == 4
    label = read_image(folder_of(drive) / "000003.png")
    # Class i is stored as i; 4 is the background of four classes.
    wanted = {0: 1 if first else 0, 1: 2, 2: 3, 3: 4, 4: 0}
    for stored, value in wanted.items():
        assert set(label[mask == stored].tolist()) == {value}


@images
def test_instances_and_their_list(drive, tmp_path):
    folder = tmp_path / "from" / "03"
    ids = np.zeros((HEIGHT, WIDTH), np.uint16)
    ids[2:9], ids[9:14, 3:20], ids[20:, 30:], ids[25:, :4] = 1, 2, 300, 4
    instances = [
        {"value": 0, "name": "background", "label": "background"},
        {"value": 1, "name": "x", "label": "traffic _ cone", "logit": 0.4, "box": [0, 2, 56, 9]},
        {"value": 2, "label": "man"},
        {"value": 300, "name": "road car"},
        {"value": 4, "label": "sky"},
    ]
    for i in range(4):
        put(folder / f"{i:06d}.png", ids)
        (folder / f"{i:06d}.json").write_text(json.dumps(instances))
    (folder / "000001.json").write_text(json.dumps(instances[:-1]))
    (folder / "000002.json").write_text('[{"value": 1}]')
    maker = weak.PngLabels(str(tmp_path / "from"), NAMES, tuple(weak.aliases_of(None, NAMES).items()))  # fmt: skip
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert report.written == 2
    assert report.counts["instances"] == 8
    assert report.unknown == Counter(sky=2)
    missing, malformed = sorted(report.problems, key=lambda line: "expected a list" in line)
    assert "000001.png: instance 4 is not in" in missing
    assert "000002.json: expected a list of instances" in malformed
    label = read_image(folder_of(drive) / "000000.png")
    wanted = np.zeros_like(label)
    wanted[ids == 1], wanted[ids == 2], wanted[ids == 300] = 3, 4, 2
    assert np.array_equal(label, wanted)


@images
def test_files_that_do_not_fit(drive, tmp_path):
    folder = tmp_path / "from" / "03"
    put(folder / "000000.png", np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    put(folder / "000001.png", np.full((HEIGHT, WIDTH), 5, np.uint8))
    put(folder / "000002.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    (folder / "000003.png").write_bytes(b"x")
    report = weak.write_weak_labels(
        drive, weak.PngLabels(str(tmp_path / "from"), NAMES), workers=1, progress=False
    )
    wanted = (
        "expected one channel of 56 x 32", "value 5, but there are 4 classes", "expected one", "not a readable",
    )  # fmt: skip
    for number, text in enumerate(wanted):
        (line,) = (line for line in report.problems if f"{number:06d}" in line)
        assert text in line
    with pytest.raises(InputError, match="no such folder"):
        weak.write_weak_labels(drive, weak.PngLabels(str(tmp_path / "nowhere"), NAMES))
    with pytest.raises(InputError, match="belongs to --zero-based"):
        weak.write_weak_labels(drive, weak.PngLabels(str(folder), NAMES, zero_is_first=True))


@images
def test_files_of_nuscenes_in_any_of_three_places(copy, tmp_path):
    photos = find_images(copy)
    shape = read_image(photos[0].image).shape[:2]
    for number, photo in enumerate(photos):
        place = (photo.place, f"camseg/{photo.place}", Path(photo.place).name)[number % 3]
        put(tmp_path / "from" / place, np.full(shape, number % 5, np.uint8))
    maker = weak.PngLabels(str(tmp_path / "from"), NAMES)
    assert weak.write_weak_labels(copy, maker, workers=1, progress=False).written == len(photos)
    values = {photo.scan: [] for photo in photos}
    for number, photo in enumerate(photos):
        values[photo.scan].append(number % 5)
    for split in ("train", "val"):
        reader = NuScenesDataset(split, str(copy), sweeps=3)
        assert reader.weak_classes() == list(NAMES)
        for idx in range(len(reader.data_list)):
            found = [int(label.max()) for label in reader.weak_labels(idx)]
            assert found == values[reader.get_data_name(idx)]


# ------------------------------------------------------------------------------------ true labels of points


@images
def test_labels_of_points_by_plain_loops(copy):
    """Random scans of a few dozen points: each pixel that one falls on has the class of the nearest."""
    maker = weak.PointLabels(str(copy), "nuscenes")
    report = weak.write_weak_labels(copy, maker, workers=1, progress=False)
    assert not report.problems
    painted = 0
    for split in ("train", "val"):
        reader = NuScenesDataset(split, str(copy), sweeps=3)
        names = reader.weak_classes()
        assert names[3] == "car"
        assert len(names) == 16
        for idx in range(len(reader.data_list)):
            points = np.fromfile(reader.scan_path(idx), np.float32).reshape(-1, 5)
            path = reader.label_path(idx)
            raw = (
                np.fromfile(path, np.uint8) if path is not None else np.zeros(len(points), np.uint8)
            )
            labels = reader.weak_labels(idx)
            for camera, label in zip(reader.cameras(idx), labels, strict=True):
                wanted, nearest = np.zeros_like(label), {}
                for point, kind in zip(points[:, :3].astype(float), raw, strict=True):
                    x, y, z = (camera.lidar_to_camera @ [*point, 1.0])[:3]
                    train = LEARNING_MAP[int(kind)]
                    if z <= 1.0 or train < 0:
                        continue
                    u, v, w = camera.intrinsics @ [x, y, z]
                    u, v = u / w, v / w
                    if not (0 < u < camera.width - 1 and 0 < v < camera.height - 1):
                        continue
                    pixel = round(v), round(u)
                    if z < nearest.get(pixel, math.inf):
                        nearest[pixel], wanted[pixel] = z, train + 1
                assert np.array_equal(label, wanted)
                painted += len(nearest)
    assert 0 < painted <= report.counts["points"]


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Two simulated scans with images, weak labels and superpixels."""
    pytest.importorskip("embreex", reason="the extra `sim` is not installed")
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    root = tmp_path_factory.mktemp("street")
    plan = synthetic.Plan({"00": 2}, beams=32, columns=256, spacing=4.0, seed=5)
    synthetic.simulate(root, plan, workers=1, progress=False)
    simulate_cameras(root, plan, CameraPlan(width=160, segments=40), workers=1, progress=False)
    return root


def test_labels_of_points_agree_with_the_picture(street, monkeypatch, capsys):
    options = ("--data-root", street, "--producer", "lidarseg", "--workers", 1)
    code, _, err = tool(monkeypatch, capsys, *options)
    assert code == 2
    assert "weak_labels: its files were made with classes=" in err
    code, out, _ = tool(monkeypatch, capsys, *options, "--out-name", "true_labels")
    assert code == 0
    assert "2 images in" in out
    folder = street / "dataset" / "sequences" / "00"
    agree, both = 0, 0
    for name in ("000000.png", "000001.png"):
        places = [folder / kind for kind in ("weak_labels", "true_labels")]
        guess, true = (read_weak_labels(p / name, read_classes(p / "classes.json")) for p in places)
        known = (guess > 0) & (true > 0)
        agree, both = agree + int((guess == true)[known].sum()), both + int(known.sum())
    assert both > 300
    assert agree > 0.75 * both  # some weak labels are wrong on purpose


@images
def test_points_have_no_labels_everywhere(tmp_path):
    with pytest.raises(InputError, match="kitti_object has no labels of points"):
        weak.write_weak_labels(tmp_path, weak.PointLabels(str(tmp_path), "kitti_object"))


@images
def test_an_image_without_a_scan(drive):
    (drive / "dataset" / "sequences" / "03" / "velodyne").mkdir()
    scan = drive / "dataset" / "sequences" / "03" / "velodyne" / "000009.bin"
    np.ones((5, 4), np.float32).tofile(scan)
    maker = weak.PointLabels(str(drive), "kitti")
    report = weak.write_weak_labels(drive, maker, workers=1, progress=False)
    assert report.written == 0
    assert "the image of 03_000000 has no scan" in "".join(report.problems)


# ------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers", reason="the extra `weak-labels` is not installed")
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    root = tmp_path_factory.mktemp("models")
    return {
        "detector": str(write_detector(root / "detector")),
        "sam": str(write_segmenter(root / "sam")),
        "sam_hq": str(write_segmenter(root / "sam_hq", "sam_hq")),
    }


def maker_of(models, kind="sam", **options):
    aliases = tuple(weak.aliases_of(None, weak.CLASSES).items())
    maker = weak.GroundedSam(
        weak.CLASSES, aliases, weak.prompt_of(weak.CLASSES), models["detector"], models[kind],
        box_threshold=0.5, text_threshold=0.3,
    )  # fmt: skip
    return replace(maker, **options)


@pytest.fixture
def image():
    return np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_boxes_are_those_of_the_package_itself(models, image):
    import torch
    import transformers
    from PIL import Image

    detect = weak.Detector(models["detector"], weak.prompt_of(weak.CLASSES), 0.5, 0.3, "cpu")
    boxes, scores, phrases = detect(image)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["detector"])
    processor = transformers.GroundingDinoProcessor(detect.images, tokenizer)
    prompt = weak.prompt_of(weak.CLASSES)
    inputs = processor(images=Image.fromarray(image), text=prompt, return_tensors="pt")
    kind = transformers.GroundingDinoForObjectDetection
    with torch.no_grad():
        out = kind.from_pretrained(models["detector"]).eval()(**inputs)
    (wanted,) = processor.post_process_grounded_object_detection(
        out, inputs["input_ids"], threshold=0.5, text_threshold=0.3, target_sizes=[(HEIGHT, WIDTH)]
    )
    assert len(boxes) > 0
    np.testing.assert_allclose(boxes, wanted["boxes"].numpy(), atol=1e-3)
    np.testing.assert_allclose(scores, wanted["scores"].numpy(), atol=1e-5)
    assert phrases == [text.replace(" [SEP]", "") for text in wanted["text_labels"]]
    none = weak.Detector(models["detector"], "car.", 1 - 1e-9, 0.3, "cpu")(image)
    assert none[0].shape == (0, 4)
    assert none[2] == []


@pytest.mark.parametrize("kind", ["sam", "sam_hq"])
def test_masks_are_those_of_the_package_itself(models, image, kind):
    import torch
    import transformers
    from PIL import Image

    segment = weak.Segmenter(models[kind], "cpu")
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (19, 2, 2)), axis=1).reshape(-1, 4)
    boxes = corners * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    masks = np.stack(list(segment(image, boxes)))
    assert masks.shape == (19, HEIGHT, WIDTH)
    assert masks.dtype == bool
    assert 0 < masks.mean() < 1
    inputs = segment.images(images=Image.fromarray(image), return_tensors="pt")
    # 56 pixels become 64: boxes are scaled to the picture that the model sees, one at a time here.
    model = getattr(transformers, weak.SEGMENTERS[kind]).from_pretrained(models[kind]).eval()
    for box, mask in zip(boxes, masks, strict=True):
        few = torch.tensor(box * 64 / [56, 32 * 64 / 37, 56, 32 * 64 / 37]).float()[None, None]
        with torch.no_grad():
            out = model(inputs["pixel_values"], input_boxes=few, multimask_output=False)
        (wanted,) = segment.images.post_process_masks(
            [out.pred_masks[0]], [(HEIGHT, WIDTH)], inputs["reshaped_input_sizes"]
        )
        assert (wanted[0, 0].numpy() == mask).mean() > 0.999


@pytest.mark.parametrize("kind", ["sam", "sam_hq"])
def test_the_tool_with_models(models, drive, kind, monkeypatch, capsys):
    options = (
        "--data-root", drive, "--detector", models["detector"], "--segmenter", models[kind],
        "--box-threshold", 0.5, "--text-threshold", 0.3, "--device", "cpu",
    )  # fmt: skip
    code, out, err = tool(monkeypatch, capsys, *options)
    assert code == 0, err
    assert "4 images in" in out
    assert " boxes\n" in out
    note = json.loads((folder_of(drive) / "classes.json").read_text())
    assert note["classes"] == ["none", *weak.CLASSES]
    assert "unknown" not in note
    assert note["prompt"] == weak.prompt_of(weak.CLASSES)
    assert (note["box_threshold"], note["text_threshold"]) == (0.5, 0.3)
    assert note["model"]["segmenter"]["name"] == kind
    producer = maker_of(models, kind).open()(None)
    seen = set()
    for i in range(4):
        path = drive / "dataset" / "sequences" / "03" / "image_2" / f"{i:06d}.png"
        label = read_image(folder_of(drive) / f"{i:06d}.png")
        assert np.array_equal(label, producer(read_image(path))[0])
        seen |= set(label.ravel().tolist())
    assert seen - {0}
    code, out, _ = tool(monkeypatch, capsys, *options)
    assert code == 0
    assert "0 images in" in out
    assert "4 kept" in out
    code, _, err = tool(monkeypatch, capsys, *options[:-2], "--text-threshold", 0.4)
    assert code == 2
    assert "text_threshold=0.3, asked for text_threshold=0.4" in err


def test_words_on_a_simulated_street(models, street, monkeypatch, capsys):
    code, out, err = tool(
        monkeypatch, capsys, "--data-root", street, "--out-name", "words", "--detector", models["detector"],
        "--segmenter", models["sam_hq"], "--classes", "car,road,building", "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    assert code == 0, err
    assert "2 images in" in out
    folder = street / "dataset" / "sequences" / "00" / "words"
    classes = read_classes(folder / "classes.json")
    assert classes.names == ("car", "road", "building")
    for name in ("000000.png", "000001.png"):
        label = read_weak_labels(folder / name, classes)
        assert label.shape == read_image(folder.parent / "image_2" / name).shape[:2]


def test_words_outside_the_classes_are_counted(models, image):
    narrow = maker_of(models, classes=("bicycle",), aliases=())
    label, meta = narrow.open()(None)(image)
    assert sum(meta["unknown"].values()) == sum(i["name"] == "none" for i in meta["instances"]) > 0
    assert set(np.unique(label)) <= {0, 1}


def test_models_that_cannot_be_used(models, tmp_path):
    detector = Path(models["detector"])

    def without(*names):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(detector, tmp_path / "model")
        for name in names:
            (tmp_path / "model" / name).unlink(missing_ok=True)  # not all releases write all
        return maker_of(models, detector=str(tmp_path / "model"))

    for names, text in (
        (["config.json"], "config.json is missing"),
        (["model.safetensors"], "no weights"),
        (["vocab.txt", "tokenizer.json"], "tokenizer.json or vocab.txt is missing"),
        (["preprocessor_config.json"], "preprocessor_config.json or processor_config.json is missing"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"--detector .*model: {text}"):
            without(*names).check()
    with pytest.raises(InputError, match="--segmenter .*'grounding-dino'; expected sam or sam_hq"):
        maker_of(models, segmenter=models["detector"]).check()
    with pytest.raises(InputError, match="--detector some/name: no such folder.*not.* downloaded"):
        maker_of(models, detector="some/name").check()
    maker = without()
    shutil.copy(Path(models["sam"]) / "model.safetensors", tmp_path / "model")
    with pytest.raises(InputError, match="weights lack .* parameters of .*to another model"):
        maker.open()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="--detector .*cannot be loaded"):
        maker.open()
    for options, text in (
        ({"box_threshold": 1.0}, "--box-threshold: 1.0"),
        ({"text_threshold": -0.1}, "--text-threshold: -0.1"),
        ({"device": "tpu9"}, "--device: 'tpu9' cannot be used"),
    ):
        with pytest.raises(InputError, match=text):
            maker_of(models, **options).check()
    with pytest.raises(InputError, match="--prompt: .* tokens; this detector takes 256"):
        maker_of(models, prompt="car." * 200).open()


# ------------------------------------------------------------------------------------ the tool


def test_without_transformers(drive, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = tool(
        monkeypatch, capsys, "--data-root", drive, "--detector", "a", "--segmenter", "b"
    )
    assert code == 2
    assert "needs the package transformers" in err
    assert "pointcept_kd[weak-labels]" in err


@images
def test_the_tool_with_files(drive, tmp_path, monkeypatch, capsys):
    for i in range(3):
        put(tmp_path / "from" / "03" / f"{i:06d}.png", np.full((HEIGHT, WIDTH), 16, np.uint8))
    options = (
        "--data-root", drive, "--producer", "png", "--from", tmp_path / "from", "--zero-based", "--workers", 1,
    )  # fmt: skip
    code, out, err = tool(monkeypatch, capsys, *options)
    assert code == 2
    assert "3 images in" in out
    assert "1 image with problems" in out
    assert "000003.png: no file" in err
    note = json.loads((folder_of(drive) / "classes.json").read_text())
    assert note["classes"] == ["none", *weak.SEEM_CLASSES]
    assert note["zero_based"] is True
    assert not read_image(folder_of(drive) / "000000.png").any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--detector", "a"], "needs --segmenter DIR"),
        (["--producer", "png"], "needs --from DIR"),
        (["--producer", "png", "--prompt", "a"], "--prompt is not for --producer png"),
        (["--from", "a"], "--from is not for --producer grounded_sam"),
        (
            ["--producer", "lidarseg", "--classes", "car"],
            "--classes is not for --producer lidarseg",
        ),
        (["--producer", "lidarseg", "--workers", "0"], "--workers: 0"),
        (["--classes", "car,car"], "'car' occurs twice"),
        (["--alias", "a=b"], "--alias: 'a=b'"),
    ],
)
def test_options_that_do_not_fit(drive, options, text, monkeypatch, capsys):
    code, _, err = tool(monkeypatch, capsys, "--data-root", drive, *options)
    assert code == 2
    assert text in err
