"""One picture of a scan and its cameras: from above by class, images, points on them by depth.

For data in SemanticKITTI's layout, nuScenes' (with info files) and KITTI detection's. Weak labels and
superpixels are drawn where they lie beside the images. Needs Pillow (extra `images`).
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from . import kitti, nuscenes, semantic_kitti
from .camera import Camera, paint
from .image_maps import read_classes
from .pictures import birdseye_png

GAP, CAPTION = 4, 16
PAPER, INK = (18, 20, 24), (225, 228, 232)

# Colours of the classes of weak labels by name; others get one of their number.
_WEAK_COLORS = {
    "barrier": (112, 128, 144), "bus": (255, 127, 80), "pedestrian": (0, 0, 230),
    "traffic_cone": (230, 120, 30),
}  # fmt: skip


@dataclass
class Shot:
    """A scan with its cameras: what a preview shows.

    Attributes:
        coord, segment: (n, 3) metres and (n,) train ids.
        names, colors: of the train ids.
        weak, segments: masks per camera, None where there is no file.
        weak_names: names of the mask's values, and the value that means unknown.
    """

    name: str
    coord: NDArray
    segment: NDArray
    names: tuple[str, ...]
    colors: NDArray
    cameras: list[Camera]
    images: list[NDArray]
    weak: list[NDArray | None]
    segments: list[NDArray | None]
    weak_names: list[str]
    unknown: int


def open_shot(data_root: str | os.PathLike[str], scan: str | None = None) -> Shot:
    """Read a scan.

    Args:
        data_root: holds `dataset/sequences`, `info` and `raw`, or `training/velodyne`.
        scan: its name in the reader, such as `08_000012`, a token or the beginning of one; the first
            scan if None.

    Raises:
        InputError: for another layout, an unknown scan, missing images or calibration.
    """
    root = Path(data_root)
    if (root / "dataset" / "sequences").is_dir():
        return _semantic_kitti(root, scan)
    if (root / "info").is_dir():
        return _nuscenes(root, scan)
    if (root / "training" / "velodyne").is_dir():
        return _kitti(root, scan)
    if any((root / "raw").glob("v1.0-*")):
        raise InputError(
            f"{root}: nuScenes without info files; make them first: python tools/prepare_data.py "
            f"nuscenes-info --data-root {root}/raw --version NAME --with-camera --out {root}"
        )
    raise InputError(
        f"--data-root {root}: holds neither dataset/sequences, nor info and raw, nor training/velodyne"
    )


def _find(dataset: Any, scan: str | None, whole: bool = True) -> int:
    names = [dataset.get_data_name(i) for i in range(len(dataset.data_list))]
    if scan is None:
        return 0
    found = [i for i, n in enumerate(names) if n == scan or (not whole and n.startswith(scan))]
    if len(found) == 1:
        return found[0]
    what = "several scans" if found else f"no scan among {len(names)}, the first is {names[0]}"
    raise InputError(f"--scan {scan}: {what} in {dataset.data_root}")


def _shot(dataset: Any, idx: int, names: tuple, colors: NDArray) -> Shot:
    data = dataset.get_data(idx)
    cameras, images = dataset.cameras(idx), dataset.images(idx)
    weak = segments = [None] * len(images)
    weak_names: list[str] = []
    files = dataset.weak_label_files(idx)
    if all(path.is_file() and dataset.weak_class_file(path).is_file() for path in files):
        weak = dataset.weak_labels(idx)
        weak_names = ["none", *read_classes(dataset.weak_class_file(files[0])).names]
    if all(path.is_file() for path in dataset.superpixel_files(idx)):
        segments = dataset.superpixels(idx)
    name = dataset.get_data_name(idx)
    return Shot(
        name, data["coord"], data["segment"], names, colors, cameras, images, weak, segments,
        weak_names, 0,
    )  # fmt: skip


def _semantic_kitti(root: Path, scan: str | None) -> Shot:
    if scan is not None and not re.fullmatch(r"\d\d_\d{6}", scan):
        raise InputError(f"--scan {scan}: give sequence and file number, such as 00_000000")
    folder = root / "dataset" / "sequences"
    first = next(
        (p.name for p in sorted(folder.iterdir()) if p.is_dir() and p.name.isdigit()), "00"
    )
    sequence = scan[:2] if scan else first
    dataset = semantic_kitti.SemanticKITTIDataset(sequence, str(root))
    idx = _find(dataset, scan)
    return _shot(dataset, idx, semantic_kitti.CLASS_NAMES, semantic_kitti.COLORS)


def _nuscenes(root: Path, scan: str | None) -> Shot:
    found = [
        re.fullmatch(r"nuscenes_infos_(\d+)sweeps_(\w+)\.pkl", p.name)
        for p in sorted((root / "info").glob("*.pkl"))
    ]
    known = [m for m in found if m and m[2] in nuscenes.SPLITS]
    if not known:
        raise InputError(f"{root / 'info'}: no nuscenes_infos_*sweeps_*.pkl of train, val or test")
    sweeps = known[0][1]
    splits = [s for s in nuscenes.SPLITS if any(m[1] == sweeps and m[2] == s for m in known)]
    dataset = nuscenes.NuScenesDataset(splits, str(root), sweeps=int(sweeps))
    idx = _find(dataset, scan, whole=False)
    return _shot(dataset, idx, nuscenes.CLASS_NAMES, nuscenes.COLORS)


def _kitti(root: Path, scan: str | None) -> Shot:
    dataset = kitti.KITTIObjectDataset("training", str(root))
    return _shot(dataset, _find(dataset, scan), (), np.zeros((0, 3), np.uint8))


# Drawing


def weak_picture(shot: Shot, number: int) -> NDArray:
    """The image under its weak labels."""
    mask, image = shot.weak[number], shot.images[number]
    table = np.full((1 << 16, 3), 0, np.uint8)
    known = dict(zip(shot.names, shot.colors, strict=True)) | _aliases(shot) | _WEAK_COLORS
    for value, name in enumerate(shot.weak_names):
        other = [(53 * value + 90) % 256, (101 * value + 30) % 256, (197 * value) % 256]
        table[value] = known.get(name, other)
    unsure = (mask == shot.unknown)[..., None]
    mixed = 0.35 * image + 0.65 * table[mask]
    return np.where(unsure, 0.45 * image, mixed).round().astype(np.uint8)


def _aliases(shot: Shot) -> dict[str, NDArray]:
    pairs = {"road": "driveable_surface", "building": "manmade"}
    colors = dict(zip(shot.names, shot.colors, strict=True))
    return {a: colors[b] for a, b in pairs.items() if b in colors}


def segment_picture(image: NDArray, segments: NDArray) -> NDArray:
    """The image with the borders of its superpixels."""
    border = np.zeros(segments.shape, bool)
    border[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    border[:-1] |= segments[:-1] != segments[1:]
    return np.where(border[..., None], np.uint8([255, 225, 40]), image)


def _grid(tiles: list[NDArray], columns: int) -> NDArray:
    height, width = (max(t.shape[i] for t in tiles) for i in (0, 1))
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(shape, PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (height + GAP) * (i // columns), (width + GAP) * (i % columns)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _depths(shot: Shot, number: int, radius: int) -> NDArray:
    pixels, depth, visible = shot.cameras[number].project(shot.coord)
    return paint(shot.images[number], pixels[visible], depth[visible], radius)


def panels(shot: Shot) -> list[tuple[str, NDArray]]:
    """Captions and pictures of the cameras, one panel per kind, all cameras in each."""
    numbers = range(len(shot.images))
    across = min(3, len(shot.images))
    radius = max(1, shot.images[0].shape[1] // 800)
    found = [
        ("camera", list(shot.images)),
        ("points of the LiDAR, red near, blue far", [_depths(shot, i, radius) for i in numbers]),
    ]
    if shot.weak_names and all(m is not None for m in shot.weak):
        found.append(("weak labels", [weak_picture(shot, i) for i in numbers]))
    if all(m is not None for m in shot.segments):
        pictures = [segment_picture(shot.images[i], shot.segments[i]) for i in numbers]
        found.append(("superpixels", pictures))
    return [(caption, _grid(tiles, across)) for caption, tiles in found]


def draw(shot: Shot, width: int = 1600, half: float = 25.0, kinds: int = 4) -> Any:
    """The whole picture, as a Pillow image with 256 colours.

    Args:
        width: of the picture, pixels.
        half: half the side of the view from above, metres.
        kinds: how many panels of the cameras, the first ones.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise InputError("a preview needs Pillow; pip install 'pointcept_kd[images]'") from error
    found = panels(shot)[:kinds]
    columns = 2 if len(shot.images) > 1 and len(found) > 2 else 1
    cell_h, cell_w = found[0][1].shape[:2]
    rows = -(-len(found) // columns)
    legend = 16 * -(-len(shot.names) // 4) + 8 if shot.names else 0
    height = rows * (cell_h + CAPTION + GAP)
    side = max(height - CAPTION - legend, 200)
    total = side + GAP + columns * (cell_w + GAP)
    sheet = Image.new("RGB", (total, max(height, side + CAPTION + legend)), PAPER)
    pen = ImageDraw.Draw(sheet)
    scale = max(side / (2 * half), 1.0)
    above = birdseye_png(shot.coord, shot.segment, shot.colors, half, max(round(0.6 * scale), 1))
    with Image.open(io.BytesIO(above)) as picture:
        sheet.paste(
            picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (0, CAPTION)
        )
    pen.text((4, 2), f"{shot.name}, {len(shot.coord)} points, {2 * half:g} m square", fill=INK)
    for i, (name, color) in enumerate(zip(shot.names, shot.colors, strict=True)):
        x, y = 4 + (i % 4) * (side // 4), side + CAPTION + 6 + 16 * (i // 4)
        pen.rectangle((x, y, x + 10, y + 10), fill=tuple(int(c) for c in color))
        pen.text((x + 15, y - 1), name, fill=INK)
    for i, (caption, picture) in enumerate(found):
        x = side + GAP + (i % columns) * (cell_w + GAP)
        y = (i // columns) * (cell_h + CAPTION + GAP)
        pen.text((x + 2, y + 2), caption, fill=INK)
        sheet.paste(Image.fromarray(picture), (x, y + CAPTION))
    if sheet.width > width:
        tall = round(sheet.height * width / sheet.width)
        sheet = sheet.resize((width, tall), Image.Resampling.LANCZOS)
    return sheet.quantize(256, dither=Image.Dither.NONE)


def write_preview(
    data_root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scan: str | None = None,
    width: int = 1600,
    half: float = 25.0,
    kinds: int = 4,
) -> Shot:
    """Write `draw(open_shot(data_root, scan))` as a PNG file; returns what it shows."""
    for option, value, low, high in (("width", width, 200, 8000), ("half", half, 1, 200)):
        if not low <= value <= high:
            raise InputError(f"--{option}: {value} is not in {low}..{high}")
    shot, out = open_shot(data_root, scan), Path(out)
    picture = draw(shot, width, half, kinds)
    hidden = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        picture.save(hidden, "PNG", optimize=True)
        os.replace(hidden, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return shot
