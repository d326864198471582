"""One PNG for every camera image of a data set, such as superpixels or weak labels.

Where they lie, NAME being `superpixels` or `weak_labels` unless the user says otherwise:

    kitti          DIR/dataset/sequences/SS/image_2/NNNNNN.png   DIR/dataset/sequences/SS/NAME/NNNNNN.png
    kitti_object   DIR/training/image_2/NNNNNN.png               DIR/training/NAME/NNNNNN.png
    nuscenes       DIR/raw/samples/CAM_FRONT/X.jpg               DIR/raw/superpixels_slic/TOKEN.png, by its record
                                                                 DIR/raw/camseg/CAM_FRONT/X.png, weak labels

Several processes do the work. A file has its name only when it is complete, and complete ones are kept, so an
interrupted run goes on where it stopped. A small JSON file beside them says how they were made; files made otherwise
never get into the same folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .camera import read_rgb
from .kitti import FOLDERS
from .nuscenes import SPLITS
from .nuscenes_files import find_file, read_infos
from .pictures import write_png
from .superpixels import superpixels
from .waymo_convert import shard_of
from .workers import run

LAYOUTS = ("kitti", "kitti_object", "nuscenes")
CHUNK = 4  # images per unit of work

Producer = Callable[[NDArray], tuple[NDArray, dict[str, Any]]]


@dataclass(frozen=True)
class Photo:
    """A camera image, and what its products are called.

    Attributes:
        image: its path.
        home: the folder that holds the products' folders: of a sequence, `training`, `raw`.
        place: path of a product below its folder, by the image's name.
        token: the same, by the image's record; as `place` where images have no records.
        part: sequence, `training` or `testing`, or split.
        scan: name of its scan in the reader.
        camera: its number in the reader's list.
        sweeps: which info file it is from (nuScenes).
    """

    image: str
    home: str
    place: str
    token: str
    part: str
    scan: str
    camera: int = 0
    sweeps: int = 0

    def product(self, name: str, by_token: bool = False) -> Path:
        """Where the product `name` of this image belongs."""
        return Path(self.home) / name / (self.token if by_token else self.place)


class Maker(Protocol):
    """What makes products: a frozen dataclass, sent to every process and opened there once."""

    def open(self) -> Callable[[Photo], Producer]:
        """Load what is needed; the result gives the producer of an image."""


@dataclass(frozen=True)
class Product:
    """A kind of files.

    Attributes:
        name: of the folder.
        side: name of the JSON file beside them.
        note: its content.
        limit: values are below it.
        dtype: of the values, `uint8` or `uint16`.
        by_token: files are named by the images' records.
    """

    name: str
    side: str
    note: Mapping[str, Any]
    limit: int
    dtype: str = "uint8"
    by_token: bool = False


@dataclass
class Report:
    """What a run did: files written and kept, seconds, problems, and what producers counted."""

    written: int = 0
    kept: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)


# Which images


def layout_of(data_root: str | os.PathLike[str]) -> str:
    """The layout of a data set, seen from its folders.

    Raises:
        InputError: for none or several of them.
    """
    root = Path(data_root)
    signs = {
        "kitti": (root / "dataset" / "sequences").is_dir(),
        "kitti_object": (root / "training" / "image_2").is_dir(),
        "nuscenes": (root / "info").is_dir(),
    }
    found = [name for name, there in signs.items() if there]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--data-root {root}: holds {' and '.join(found)}; choose with --layout")
    if any(p.is_dir() for folder in (root, root / "raw") for p in folder.glob("v1.0-*")):
        raw = root / "raw" if (root / "raw").is_dir() else root
        raise InputError(
            f"{root}: nuScenes without info files; make them first: python tools/prepare_data.py "
            f"nuscenes-info --data-root {raw} --version NAME --with-camera --out DIR, then give DIR"
        )
    raise InputError(
        f"--data-root {root}: holds neither dataset/sequences, nor training/image_2, nor info"
    )


def find_images(
    data_root: str | os.PathLike[str],
    layout: str | None = None,
    parts: Sequence[str] | None = None,
    shard: str | None = None,
) -> list[Photo]:
    """All camera images, in order.

    Args:
        data_root: what a config names so.
        layout: one of `LAYOUTS`; seen from the folders if None.
        parts: only these sequences, folders or splits.
        shard: `i/n`: the i-th of n parts of the list.

    Raises:
        InputError: when there is none, or one of `parts` is not there.
    """
    root, layout = Path(data_root), layout or layout_of(data_root)
    if layout == "nuscenes":
        photos = _nuscenes(root, parts)
    elif layout == "kitti":
        photos = _kitti(root / "dataset" / "sequences", parts)
    elif layout == "kitti_object":
        photos = _kitti(root, parts or [f for f in FOLDERS if (root / f / "image_2").is_dir()])
    else:
        raise InputError(f"--layout: {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    if not photos:
        raise InputError(f"--data-root {root}: no camera images in the layout {layout}")
    return shard_of(photos, shard)


def _kitti(root: Path, parts: Sequence[str] | None) -> list[Photo]:
    if parts is None:
        parts = sorted(p.name for p in root.glob("*") if re.fullmatch(r"\d\d", p.name))
        parts = [name for name in parts if (root / name / "image_2").is_dir()]
    photos = []
    for name in parts:
        folder = root / name / "image_2"
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; correct --parts, or copy the images there")
        for path in sorted(folder.glob("[!.]*.png")):
            # The names that the readers give their scans.
            scan = path.stem if name == "training" else f"{name}_{path.stem}"
            photos.append(Photo(str(path), str(root / name), path.name, path.name, name, scan))
    return photos


def _nuscenes(root: Path, parts: Sequence[str] | None) -> list[Photo]:
    raw, seen, photos = root / "raw", set(), []
    found = {}
    for path in sorted((root / "info").glob("[!.]*.pkl")):
        match = re.fullmatch(r"nuscenes_infos_(\d+)sweeps_(\w+)", path.stem)
        if match and match[2] in SPLITS:
            found.setdefault(match[2], (path, int(match[1])))
    for name in SPLITS if parts is None else parts:
        if name not in found:
            if parts is None:
                continue
            raise InputError(
                f"--parts: {name!r}: {root / 'info'} has the splits {', '.join(found) or 'none'}"
            )
        path, sweeps = found[name]
        for info in read_infos(path):
            if info["lidar_token"] in seen:
                continue
            seen.add(info["lidar_token"])
            if not info.get("cams"):
                raise InputError(
                    f"{path}: an entry without cameras; make it again with tools/prepare_data.py "
                    "nuscenes-info --with-camera"
                )
            for number, (camera, cam) in enumerate(info["cams"].items()):
                parts_of_path = Path(cam.get("data_path", "")).parts
                token = cam.get("sample_data_token")
                # The file's own place, not the first `samples`: folders above may be called so too.
                if len(parts_of_path) < 3 or parts_of_path[-3] != "samples" or not token:
                    raise InputError(
                        f"{path}: {camera} of {info['lidar_token']} has no usable data_path and "
                        "sample_data_token; make the file again with tools/prepare_data.py nuscenes-info"
                    )
                image = find_file(raw, cam["data_path"])
                place = str(Path(parts_of_path[-2]) / f"{image.stem}.png")
                photos.append(
                    Photo(str(image), str(raw), place, f"{token}.png", name, info["lidar_token"],
                          number, sweeps)
                )  # fmt: skip
    return photos


# Their products


def produce(
    photos: Sequence[Photo],
    product: Product,
    maker: Maker,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Write the product of every image that has none yet.

    An image that cannot be used, or whose product breaks the rules (size, values), is a problem in the report and does
    not stop the others.

    Args:
        workers: processes; None: one per core.

    Raises:
        InputError: for a folder that holds files made otherwise, without Pillow, and what opening the maker raises.
    """
    begin, report = time.perf_counter(), Report()
    if importlib.util.find_spec("PIL") is None:
        raise InputError("reading camera images needs Pillow; pip install 'pointcept_kd[images]'")
    _claim(photos, product)
    targets = [photo.product(product.name, product.by_token) for photo in photos]
    for folder in dict.fromkeys(target.parent for target in targets):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [p for p, target in zip(photos, targets, strict=True) if not _there(target)]
    report.kept = len(photos) - len(missing)
    rules = (product.name, product.by_token, product.limit, product.dtype)
    jobs = [(maker, rules, missing[i : i + CHUNK]) for i in range(0, len(missing), CHUNK)]
    try:
        with tqdm(total=len(missing), unit="image", desc=product.name, disable=not progress) as bar:
            for written, problems, counts, unknown in run(_work, jobs, workers):
                report.written += written
                report.problems += problems
                report.counts += counts
                report.unknown += unknown
                bar.update(written + len(problems))
    finally:
        _opened.cache_clear()
    report.seconds = time.perf_counter() - begin
    return report


def _there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


@lru_cache(maxsize=1)
def _opened(maker: Maker) -> Callable[[Photo], Producer]:
    return maker.open()


def _work(job: tuple[Maker, tuple[str, bool, int, str], list[Photo]]):
    maker, (name, by_token, limit, dtype), photos = job
    producer_of, written, problems = _opened(maker), 0, []
    counts: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for photo in photos:
        try:
            image = read_rgb(photo.image)
            values, meta = producer_of(photo)(image)
            write_png(
                photo.product(name, by_token), checked(values, image, limit, dtype, photo.image)
            )
        except InputError as error:
            problems.append(str(error))
            continue
        written += 1
        counts += Counter(meta.get("counts", {}))
        unknown += Counter(meta.get("unknown", {}))
    return written, problems, counts, unknown


def checked(values: NDArray, image: NDArray, limit: int, dtype: str, path: str) -> NDArray:
    """Values (h, w) of an image as `dtype`.

    Raises:
        InputError: for another shape than the image's, or a value that is not in 0..limit - 1; `path` is in the text.
    """
    values = np.asarray(values)
    if values.shape != image.shape[:2] or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"{path}: its map should be {image.shape[:2]} integers, got {values.shape} {values.dtype}"
        )
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high >= limit:
        raise InputError(
            f"{path}: its map has the value {low if low < 0 else high}, not in 0..{limit - 1}"
        )
    return values.astype(dtype)


def _claim(photos: Sequence[Photo], product: Product) -> None:
    """Write the JSON file into every folder, or refuse one that holds something else."""
    wanted, new = json.loads(json.dumps(product.note)), []
    for home in dict.fromkeys(photo.home for photo in photos):
        folder = Path(home) / product.name
        side = folder / product.side
        advice = "use another --out-name or delete the folder"
        if side.is_file():
            try:
                found = dict(json.loads(side.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{side}: not written by this tool; {advice}") from error
            for key in (*wanted, *(key for key in found if key not in wanted)):
                if found.get(key) != wanted.get(key):
                    raise InputError(
                        f"{folder}: its files were made with {key}={found.get(key)!r}, asked for "
                        f"{key}={wanted.get(key)!r}; {advice}"
                    )
        elif folder.is_dir() and next(folder.rglob("[!.]*.png"), None) is not None:
            raise InputError(
                f"{folder}: holds files, but no {product.side} that says how they were made; {advice}"
            )
        else:
            new.append(side)
    text = json.dumps(product.note, indent=2) + "\n"
    for side in new:
        side.parent.mkdir(parents=True, exist_ok=True)
        hidden = side.with_name(f".{side.name}.{os.getpid()}.tmp")
        hidden.write_text(text, encoding="utf-8")
        os.replace(hidden, side)


# Superpixels


@dataclass(frozen=True)
class SuperpixelMaker:
    """Superpixels of `superpixels.superpixels`.

    Attributes:
        segments: the most per image.
        compactness: how much place counts beside colour.
        sigma: pixels of smoothing before; None: 3 for images 1600 wide, others in proportion.
        method: `slic`.
    """

    segments: int = 150
    compactness: float = 6.0
    sigma: float | None = None
    method: str = "slic"

    def check(self, top: int) -> None:
        """Raise InputError for what cannot be made; `top` is the largest number of segments."""
        if not 1 <= self.segments <= top:
            raise InputError(f"--segments: {self.segments} is not in 1..{top}")
        if not self.compactness > 0:
            raise InputError(f"--compactness: {self.compactness} is not above 0")
        if self.sigma is not None and not self.sigma >= 0:
            raise InputError(f"--sigma: {self.sigma} is negative")
        if self.method != "slic":
            raise InputError(f"--method: {self.method!r} is unknown; use slic")

    def open(self) -> Callable[[Photo], Producer]:
        """The same producer for all images."""
        return lambda photo: self.cut

    def cut(self, image: NDArray) -> tuple[NDArray, dict[str, Any]]:
        """Ids (h, w) uint16 below `segments`, and how many there are."""
        sigma = 3 * image.shape[1] / 1600 if self.sigma is None else self.sigma
        ids = superpixels(image, self.segments, self.compactness, sigma=sigma)
        return ids, {"counts": {"segments": int(ids.max()) + 1}}


def write_superpixels(
    data_root: str | os.PathLike[str],
    maker: SuperpixelMaker,
    layout: str | None = None,
    parts: Sequence[str] | None = None,
    shard: str | None = None,
    name: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Write superpixels beside all camera images: bytes for nuScenes, else two bytes per pixel.

    `settings.json` holds how they were made.

    Args:
        name: of the folder; `superpixels`, for nuScenes `superpixels_slic`, and `superpixels_slic_30` for 30 segments.
    """
    layout = layout or layout_of(data_root)
    rig = layout == "nuscenes"
    # Losses give image i the ids from i times `segments` on; an id too large would fall into the next image.
    maker.check(256 if rig else 65535)
    if name is None:
        name = "superpixels"
        if rig:
            name = "superpixels_slic_30" if maker.segments == 30 else "superpixels_slic"
    product = Product(
        folder_name(name), "settings.json", {"version": 1, **asdict(maker)}, maker.segments,
        "uint8" if rig else "uint16", by_token=rig,
    )  # fmt: skip
    return produce(find_images(data_root, layout, parts, shard), product, maker, workers, progress)


def folder_name(name: str) -> str:
    """A name of one folder.

    Raises:
        InputError: for a path, a hidden name, or a folder of the data itself.
    """
    taken = ("image_2", "samples", "sweeps", "lidarseg", "velodyne", "labels", "label_2", "calib")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in taken or name.startswith("v1.0-"):
        raise InputError(f"--out-name: {name!r}; give the name of a folder of its own")
    return name
