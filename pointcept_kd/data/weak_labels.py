"""Weak labels of camera images: one uint8 PNG per image, 0 no label, 1..K a class; `classes.json` names them.

Producers, which take an image (h, w, 3) uint8 and give labels (h, w) uint8 and a dict of what they saw:

    grounded_sam   a detector that looks for words (Grounding DINO) finds boxes, a segmenter (SAM, HQ-SAM) cuts out what
                   is in them: Ren et al., "Grounded SAM", arXiv:2401.14159, as the image-to-LiDAR method of
                   arXiv:2405.14271 uses it. Through `transformers`, with weights from local folders only.
    png            files that another program has made
    lidarseg       the true classes of LiDAR points, painted where the points appear: the best that labels can do

`label_images` says where the files lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from . import nuscenes, semantic_kitti
from .label_images import (
    Maker,
    Photo,
    Producer,
    Product,
    Report,
    find_images,
    folder_name,
    layout_of,
    produce,
)
from .pictures import read_image

NONE = "none"

# The classes of the published label files: of Grounded-SAM, and of SEEM.
CLASSES = (
    "barrier", "bicycle", "bus", "car", "motorcycle", "pedestrian", "traffic_cone", "truck", "road",
    "sidewalk", "terrain", "vegetation", "building",
)  # fmt: skip
SEEM_CLASSES = (
    "barrier", "bicycle", "bus", "car", "truck", "trailer", "motorcycle", "construction_vehicle",
    "pedestrian", "traffic_cone", "road", "sidewalk", "terrain", "vegetation", "building",
    "other_ground",
)  # fmt: skip
SETS = {"grounded_sam": CLASSES, "seem": SEEM_CLASSES}

# What a detector also calls them.
ALIASES = {"cone": "traffic_cone", "traffic": "traffic_cone", "man": "pedestrian"}

DETECTORS = ("grounding-dino", "mm-grounding-dino")
SEGMENTERS = {"sam": "SamModel", "sam_hq": "SamHQModel"}
BOXES = 16  # boxes per call of the segmenter
_WEIGHTS = ("*.safetensors", "*.bin")
_NEED = "pip install 'pointcept_kd[weak-labels]'"


# Names and phrases


def class_names(text: str | None, default: Sequence[str] = CLASSES) -> tuple[str, ...]:
    """Classes of a comma-separated list, or of a set by its name.

    Raises:
        InputError: for a name that is empty, occurs twice or means no label, or more than 255 names.
    """
    if text is None:
        return tuple(default)
    if text in SETS:
        return SETS[text]
    names = tuple("_".join(name.lower().split()) for name in text.split(","))
    if len(names) > 255:
        raise InputError(f"--classes: {len(names)} classes; a byte has room for 255")
    for i, name in enumerate(names):
        if not re.fullmatch(r"\w[\w-]*", name) or name == NONE:
            raise InputError(f"--classes: {name!r} is no name of a class")
        if name in names[:i]:
            raise InputError(f"--classes: {name!r} occurs twice")
    return names


def aliases_of(texts: Sequence[str] | None, classes: Sequence[str]) -> dict[str, str]:
    """The usual aliases of classes that are there, and those of texts `PHRASE=CLASS`.

    Raises:
        InputError: for another text or an unknown class.
    """
    found = {alias: name for alias, name in ALIASES.items() if name in classes}
    for text in texts or ():
        phrase, equals, name = text.partition("=")
        if not equals or name not in classes or not phrase.strip():
            raise InputError(f"--alias: {text!r}; use PHRASE=CLASS with a class of {list(classes)}")
        found[" ".join(_words(phrase))] = name
    return found


def prompt_of(classes: Sequence[str], text: str | None = None) -> str:
    """What a detector is asked for: the classes or the user's own text, lower case, with a dot at the end."""
    text = ".".join(name.replace("_", " ") for name in classes) if text is None else text
    return text.lower().strip().rstrip(".") + "."


def _words(phrase: str) -> list[str]:
    return phrase.lower().replace("_", " ").replace(".", " ").split()


def value_of(phrase: str, classes: Sequence[str], aliases: Mapping[str, str]) -> int:
    """The class 1..K that a phrase of the detector means, 0 for none of them.

    Dots and underscores do not count. What is neither a class nor an alias is cut to its first word.
    """
    words = _words(phrase)
    values = {alias: classes.index(name) + 1 for alias, name in aliases.items()}
    values |= {" ".join(_words(name)): value for value, name in enumerate(classes, 1)}
    for text in (" ".join(words), *words[:1]):
        if text in values:
            return values[text]
    return 0


def phrases_of(
    scores: NDArray, ids: Sequence[int], special: Iterable[int], decode: Callable, threshold: float
) -> list[str]:
    """The words that boxes belong to.

    Args:
        scores: (q, t) of every box for every token of the prompt, t at least their number.
        ids: of the tokens.
        special: ids of tokens that are no words.
        decode: a list of ids to a text.
        threshold: tokens with a larger score are part of the phrase.
    """
    special = set(special)
    words = [i for i, token in enumerate(ids) if token not in special]
    return [decode([ids[i] for i in words if row[i] > threshold]) for row in scores]


def paint(shape: tuple[int, int], masks: Iterable[NDArray], values: Sequence[int]) -> NDArray:
    """Labels (h, w) uint8: every mask (h, w) bool painted with its value, later ones over earlier ones."""
    label = np.zeros(shape, np.uint8)
    for mask, value in zip(masks, values, strict=True):
        label[mask] = value
    return label


# Grounding DINO and SAM


@dataclass(frozen=True)
class GroundedSam:
    """Maker of labels by words.

    Attributes:
        classes: names of the values 1..K.
        aliases: pairs of a phrase and its class.
        prompt: see `prompt_of`.
        detector: folder of a Grounding DINO or MM Grounding DINO: config.json, weights, tokenizer.
        segmenter: folder of a SAM or HQ-SAM.
        box_threshold: boxes with a larger score are kept.
        text_threshold: see `phrases_of`.
        device: such as `cpu` or `cuda:1`.
        threads: of torch; 0 leaves that alone.
    """

    classes: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]
    prompt: str
    detector: str
    segmenter: str
    box_threshold: float = 0.25
    text_threshold: float = 0.25
    device: str = "cpu"
    threads: int = 0

    def check(self) -> None:
        """Look at packages, folders and thresholds, without loading anything large.

        Raises:
            InputError: for what is missing or cannot be.
        """
        import_transformers()
        for key in ("box_threshold", "text_threshold"):
            value = getattr(self, key)
            if not 0 <= value < 1:
                raise InputError(f"--{key.replace('_', '-')}: {value} is not in 0..1")
        model_kind(self.detector, "--detector", DETECTORS, ("tokenizer.json", "vocab.txt"))
        model_kind(self.segmenter, "--segmenter", SEGMENTERS)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            text = str(error).splitlines()[0]
            raise InputError(f"--device: {self.device!r} cannot be used ({text})") from error

    def note(self) -> dict[str, Any]:
        """How labels are made, for `classes.json`."""
        return {
            "producer": "grounded_sam",
            "prompt": self.prompt,
            "box_threshold": self.box_threshold,
            "text_threshold": self.text_threshold,
            "aliases": dict(self.aliases),
            "model": {
                "detector": fingerprint(self.detector),
                "segmenter": fingerprint(self.segmenter),
            },
        }

    def open(self) -> Callable[[Photo], Producer]:
        """Load both models."""
        if self.threads:
            torch.set_num_threads(self.threads)
        logs = import_transformers().utils.logging
        logs.disable_progress_bar()
        logs.set_verbosity_error()  # weights that are missing are an error here, not a table
        detect = Detector(self.detector, self.prompt, self.box_threshold, self.text_threshold,
                          self.device)  # fmt: skip
        segment = Segmenter(self.segmenter, self.device)
        producer = BoxPainter(detect, segment, self.classes, dict(self.aliases))
        return lambda photo: producer


@dataclass(frozen=True)
class BoxPainter:
    """Producer of labels from a detector of boxes and a segmenter.

    Attributes:
        detect: an image to boxes (n, 4) in pixels (left, top, right, bottom), scores (n,), n phrases.
        segment: an image and boxes to n masks (h, w) bool.
        classes, aliases: see `value_of`.

    A box with an unknown phrase is painted too, with 0, so what is under it has no label; it is counted.
    """

    detect: Callable[[NDArray], tuple[NDArray, NDArray, list[str]]]
    segment: Callable[[NDArray, NDArray], Iterable[NDArray]]
    classes: tuple[str, ...]
    aliases: Mapping[str, str]

    def __call__(self, image: NDArray) -> tuple[NDArray, dict[str, Any]]:
        boxes, scores, phrases = self.detect(image)
        values = [value_of(phrase, self.classes, self.aliases) for phrase in phrases]
        masks = self.segment(image, boxes) if len(values) else ()
        label = paint(image.shape[:2], masks, values)
        names = (NONE, *self.classes)
        rows = zip(phrases, values, scores, boxes, strict=True)
        meta = {
            "instances": [
                {"value": row, "name": names[value], "phrase": phrase, "logit": float(score),
                 "box": [float(x) for x in box]}
                for row, (phrase, value, score, box) in enumerate(rows, 1)
            ],
            "counts": {"boxes": len(values), "images without boxes": int(not values)},
            "unknown": Counter(p for p, value in zip(phrases, values, strict=True) if not value),
        }  # fmt: skip
        return label, meta


def import_transformers() -> Any:
    """The package `transformers`.

    Raises:
        InputError: when it is missing or broken.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"--producer grounded_sam needs the package transformers ({error}); {_NEED}"
        ) from error
    return transformers


def model_kind(folder: str, option: str, known: Iterable[str], one_of: Sequence[str] = ()) -> str:
    """The `model_type` of a folder with a model.

    Args:
        option: that names the folder, for messages.
        known: types that can be used.
        one_of: files of which one must be there too.

    Raises:
        InputError: naming what is missing.
    """
    root, what = Path(folder), f"{option} {folder}"
    if not root.is_dir():
        raise InputError(
            f"{what}: no such folder; give the folder of a model as transformers stores it "
            f"({' or '.join(known)}: config.json, weights, preprocessor_config.json); nothing is downloaded"
        )
    try:
        kind = json.loads((root / "config.json").read_bytes())["model_type"]
    except OSError as error:
        raise InputError(f"{what}: config.json is missing; copy the whole folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{what}: config.json has no model_type; copy the folder again") from error
    if kind not in known:
        raise InputError(f"{what}: holds a model of type {kind!r}; expected {' or '.join(known)}")
    if not _weight_files(root):
        raise InputError(f"{what}: no weights ({' or '.join(_WEIGHTS)}); copy the whole folder")
    for names in (("preprocessor_config.json", "processor_config.json"), one_of):
        if names and not any((root / name).is_file() for name in names):
            raise InputError(f"{what}: {' or '.join(names)} is missing; copy the whole folder")
    return kind


def _weight_files(root: Path) -> list[Path]:
    return [path for pattern in _WEIGHTS for path in sorted(root.glob(pattern))]


def fingerprint(folder: str) -> dict[str, Any]:
    """What tells models apart: the folder's name, a hash of its config, the size of its weights."""
    root = Path(folder)
    return {
        "name": root.resolve().name,
        "config": hashlib.sha256((root / "config.json").read_bytes()).hexdigest()[:16],
        "bytes": sum(path.stat().st_size for path in _weight_files(root)),
    }


def _load(kind: type, folder: str, option: str, **options: Any) -> Any:
    """`from_pretrained` of a local folder.

    Raises:
        InputError: when it fails, or leaves parameters at random values.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # what is wrong with a folder reaches us as any kind of exception
        text = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"{option} {folder}: {kind.__name__} cannot be loaded: {text}") from error


def _model(kind: type, folder: str, option: str, device: str) -> Any:
    model, found = _load(kind, folder, option, output_loading_info=True)
    missing = set(found["missing_keys"]) & {name for name, _ in model.named_parameters()}
    if missing:
        raise InputError(
            f"{option} {folder}: the weights lack {len(missing)} parameters of {kind.__name__}, the first is "
            f"{min(missing)}; they belong to another model"
        )
    # Weights may be stored as halves; images are not.
    return model.eval().requires_grad_(False).float().to(device)


def _image_processor(transformers: Any, name: str) -> type:
    # Newer releases call the class that works without torchvision so; older ones have no other.
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _picture(image: NDArray) -> Any:
    from PIL import Image

    return Image.fromarray(image)


class Detector:
    """Grounding DINO: boxes of what a text names.

    Args:
        folder: of the model.
        prompt: names with dots between them.
        box_threshold, text_threshold: see `GroundedSam`.
        device: that it runs on.
    """

    def __init__(
        self, folder: str, prompt: str, box_threshold: float, text_threshold: float, device: str
    ) -> None:
        option, transformers = "--detector", import_transformers()
        model_kind(folder, option, DETECTORS, ("tokenizer.json", "vocab.txt"))
        self.images = _load(
            _image_processor(transformers, "GroundingDinoImageProcessor"), folder, option
        )
        tokenizer = _load(transformers.AutoTokenizer, folder, option)
        self.model = _model(
            transformers.AutoModelForZeroShotObjectDetection, folder, option, device
        )
        self.text = tokenizer(prompt, return_tensors="pt").to(device)
        self.ids = self.text["input_ids"][0].tolist()
        most = self.model.config.max_text_len
        if len(self.ids) > most:
            raise InputError(f"--prompt: {len(self.ids)} tokens; this detector takes {most}")
        self.special, self.decode = tokenizer.all_special_ids, tokenizer.decode
        self.box_threshold, self.text_threshold = box_threshold, text_threshold
        self.device = device

    @torch.inference_mode()
    def __call__(self, image: NDArray) -> tuple[NDArray, NDArray, list[str]]:
        """Boxes (n, 4) float32 in pixels, left, top, right, bottom; scores (n,); n phrases: in the model's order."""
        pixels = self.images(images=_picture(image), return_tensors="pt").to(self.device)
        found = self.model(**pixels, **self.text)
        tokens = found.logits[0].float().sigmoid()
        scores = tokens.amax(-1)
        kept = scores > self.box_threshold
        middle, size = found.pred_boxes[0][kept].float().split(2, -1)
        boxes = torch.cat([middle - size / 2, middle + size / 2], -1).cpu().numpy()
        height, width = image.shape[:2]
        phrases = phrases_of(
            tokens[kept].cpu().numpy(), self.ids, self.special, self.decode, self.text_threshold
        )
        scale = np.array([width, height, width, height], np.float32)
        return boxes * scale, scores[kept].cpu().numpy(), phrases


class Segmenter:
    """SAM or HQ-SAM: what is in a box.

    Args:
        folder: of the model.
        device: that it runs on.
    """

    def __init__(self, folder: str, device: str) -> None:
        option, transformers = "--segmenter", import_transformers()
        kind = model_kind(folder, option, SEGMENTERS)
        self.images = _load(_image_processor(transformers, "SamImageProcessor"), folder, option)
        self.model = _model(getattr(transformers, SEGMENTERS[kind]), folder, option, device)
        self.side = self.model.config.vision_config.image_size
        self.device = device

    @torch.inference_mode()
    def __call__(self, image: NDArray, boxes: NDArray) -> Iterator[NDArray]:
        """A mask (h, w) bool of every box, the only one that the model is asked for."""
        inputs = self.images(images=_picture(image), return_tensors="pt")
        high, wide = (int(x) for x in inputs["reshaped_input_sizes"][0])
        height, width = image.shape[:2]
        scale = torch.tensor([wide / width, high / height] * 2)
        prompts = (torch.from_numpy(np.ascontiguousarray(boxes)).float() * scale).to(self.device)
        embedding = self.model.get_image_embeddings(inputs["pixel_values"].to(self.device))
        seen = {"image_embeddings": embedding}
        if isinstance(embedding, tuple):  # HQ-SAM also needs what its trunk saw half way
            seen = dict(zip(("image_embeddings", "intermediate_embeddings"), embedding))
        for start in range(0, len(prompts), BOXES):
            few = prompts[None, start : start + BOXES]
            masks = (
                self.model(input_boxes=few, multimask_output=False, **seen).pred_masks[0].float()
            )
            # The model sees the image in the upper left corner of a square.
            masks = resize(masks, (self.side, self.side))[..., :high, :wide]
            yield from (resize(masks, (height, width))[:, 0] > 0).cpu().numpy()


def resize(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (n, 1, h, w) at another size, bilinear."""
    return torch.nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)


# Files of other programs


@dataclass(frozen=True)
class PngLabels:
    """Maker of labels from PNG files.

    Attributes:
        folder: holds them, named as the products are or by the image.
        classes, aliases: see `value_of`.
        zero_based: values are 0 for the first class, K - 1 for the last, K for the background.
        zero_is_first: 0 of such files is the first class; else it is taken for what nobody painted.

    A file with a JSON list of the same name beside it holds numbers of instances; the list says what they are:
    `value`, and the phrase in `label` or `name`.
    """

    folder: str
    classes: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    zero_based: bool = False
    zero_is_first: bool = False

    def check(self) -> None:
        """Raise InputError without the folder."""
        if not Path(self.folder).is_dir():
            raise InputError(f"--from {self.folder}: no such folder")
        if self.zero_is_first and not self.zero_based:
            raise InputError("--zero-is-first belongs to --zero-based")

    def note(self) -> dict[str, Any]:
        """How labels are made, for `classes.json`."""
        return {
            "producer": "png",
            "prompt": None,
            "aliases": dict(self.aliases),
            "model": None,
            "zero_based": self.zero_based,
            "zero_is_first": self.zero_is_first,
        }

    def open(self) -> Callable[[Photo], Producer]:
        """The producer of an image reads its file."""
        return lambda photo: lambda image: self._labels(self.find(photo), image)

    def find(self, photo: Photo) -> Path:
        """The file of an image.

        Raises:
            InputError: when it has none.
        """
        root, name = Path(self.folder), Path(photo.place).name
        if photo.token != photo.place:  # names of images are those of one only
            places = [photo.place, f"camseg/{photo.place}", name, photo.token]
        else:
            places = [f"{photo.part}/{name}", f"{photo.part}/weak_labels/{name}",
                      f"dataset/sequences/{photo.part}/weak_labels/{name}"]  # fmt: skip
        for place in places:
            if (root / place).is_file():
                return root / place
        raise InputError(f"{photo.image}: no file {' or '.join(places)} below {root}")

    def _labels(self, path: Path, image: NDArray) -> tuple[NDArray, dict[str, Any]]:
        values = read_image(path)
        if values.shape != image.shape[:2]:
            raise InputError(
                f"{path}: {values.shape}, expected one channel of {image.shape[1]} x {image.shape[0]} pixels"
            )
        if path.with_suffix(".json").is_file():
            return self._instances(path, values)
        size = len(self.classes)
        top = int(values.max())
        if top > size:
            raise InputError(f"{path}: value {top}, but there are {size} classes")
        if not self.zero_based:
            return values.astype(np.uint8), {}
        table = np.r_[np.arange(1, size + 1), 0].astype(np.uint8)
        if not self.zero_is_first:
            table[0] = 0
        return table[values], {}

    def _instances(self, path: Path, values: NDArray) -> tuple[NDArray, dict[str, Any]]:
        side = path.with_suffix(".json")
        try:
            rows = [(int(row["value"]), _phrases(row)) for row in json.loads(side.read_bytes())]
            if any(not 0 <= value <= 65535 for value, _ in rows):
                raise ValueError("a value is not in 0..65535")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{side}: expected a list of instances with value, and label or name ({error!r})"
            ) from error
        table, unknown = np.full(65536, -1, np.int64), Counter()
        table[0] = 0
        for value, phrases in rows:
            if value == 0:
                continue
            found = [value_of(phrase, self.classes, dict(self.aliases)) for phrase in phrases]
            table[value] = next(filter(None, found), 0)
            if not table[value]:
                unknown[phrases[0]] += 1
        label = table[values]
        if (label < 0).any():
            raise InputError(f"{path}: instance {int(values[label < 0].min())} is not in {side}")
        boxes = sum(value > 0 for value, _ in rows)
        return label.astype(np.uint8), {"counts": {"instances": boxes}, "unknown": unknown}


def _phrases(row: Mapping[str, Any]) -> list[str]:
    found = [row[key] for key in ("label", "name") if isinstance(row.get(key), str)]
    if not found:
        raise KeyError("label")
    return found


# True labels of points


@dataclass(frozen=True)
class PointLabels:
    """Maker of labels from labelled points: the pixel nearest to a point gets its class; the nearest point wins.

    Points count where training pairs them: deeper than 1 m, and more than 0 and less than size - 1 along both axes.

    Attributes:
        data_root: of the reader.
        layout: `kitti` or `nuscenes`.
    """

    data_root: str
    layout: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the points."""
        module = nuscenes if self.layout == "nuscenes" else semantic_kitti
        return tuple(module.CLASS_NAMES)

    def check(self) -> None:
        """Raise InputError for a layout without labels of points."""
        if self.layout not in ("kitti", "nuscenes"):
            raise InputError(
                f"--producer lidarseg: the layout {self.layout} has no labels of points"
            )

    def note(self) -> dict[str, Any]:
        """How labels are made, for `classes.json`."""
        return {"producer": "lidarseg", "prompt": None, "model": None}

    def open(self) -> Callable[[Photo], Producer]:
        """The producer of an image knows its scan."""
        return lambda photo: lambda image: self._labels(photo, image)

    def _labels(self, photo: Photo, image: NDArray) -> tuple[NDArray, dict[str, Any]]:
        coord, segment, cameras = _scan(
            self.data_root, self.layout, photo.part, photo.sweeps, photo.scan
        )
        camera = cameras[photo.camera].resized(image.shape[1], image.shape[0])
        pixels, depth, seen = camera.project(coord)
        seen &= (pixels > 0).all(1) & (pixels < (camera.width - 1, camera.height - 1)).all(1)
        seen &= segment >= 0
        order = np.flatnonzero(seen)[np.argsort(-depth[seen], kind="stable")]
        column, row = np.rint(pixels[order]).astype(np.int64).T
        label = np.zeros(image.shape[:2], np.uint8)
        # With repeated places numpy keeps the last one, here the nearest.
        label[row, column] = segment[order] + 1
        return label, {"counts": {"points": len(order)}}


@lru_cache(maxsize=4)
def _reader(data_root: str, layout: str, part: str, sweeps: int) -> tuple[Any, dict[str, int]]:
    if layout == "nuscenes":
        reader = nuscenes.NuScenesDataset(part, data_root, sweeps=sweeps, nonfinite="drop")
    else:
        reader = semantic_kitti.SemanticKITTIDataset(part, data_root, nonfinite="drop")
    return reader, {reader.get_data_name(i): i for i in range(len(reader.data_list))}


@lru_cache(maxsize=1)
def _scan(data_root: str, layout: str, part: str, sweeps: int, name: str):
    reader, numbers = _reader(data_root, layout, part, sweeps)
    if name not in numbers:
        raise InputError(f"the image of {name} has no scan")
    data = reader.get_data(numbers[name])
    return data["coord"], data["segment"], reader.cameras(numbers[name])


# All images


def write_weak_labels(
    data_root: str | os.PathLike[str],
    maker: Maker,
    layout: str | None = None,
    parts: Sequence[str] | None = None,
    shard: str | None = None,
    name: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Write weak labels beside all camera images, with `classes.json`.

    Args:
        maker: such as `GroundedSam`; has `classes`, `check` and `note` too.
        name: of the folder; `weak_labels`, for nuScenes `camseg`.
    """
    maker.check()
    layout = layout or layout_of(data_root)
    note = {"classes": [NONE, *maker.classes], **maker.note()}
    default = "camseg" if layout == "nuscenes" else "weak_labels"
    product = Product(folder_name(name or default), "classes.json", note, len(maker.classes) + 1)
    try:
        return produce(
            find_images(data_root, layout, parts, shard), product, maker, workers, progress
        )
    finally:
        _scan.cache_clear()
        _reader.cache_clear()
