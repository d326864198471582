"""Camera images beside simulated scans, as KITTI has them.

    OUT/dataset/sequences/SS/image_2/NNNNNN.png         what camera 2 sees at the scan's time
                            /weak_labels/NNNNNN.png     uint8 class of each pixel as a network might
                                                        predict it: 0..18, 255 unknown
                            /weak_labels/classes.json   the names of the classes, the errors
                            /superpixels/NNNNNN.png     uint16 segment of each pixel
                            /calib.txt                  P0..P3 for images of this size

Scans are not touched, so cameras can join a folder that has its scans already.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from ..pictures import write_png
from ..semantic_kitti import CLASS_NAMES, LEARNING_MAP
from ..superpixels import superpixels
from ..synthetic import (
    IMAGE_SIZE,
    MAST,
    Plan,
    Simulator,
    read_card,
    refuse_change,
    replace_with,
    simulator_of,
    write_calibration,
    write_card,
)
from ..workers import run
from .render import Renderer, View
from .weak_masks import Errors, weak_mask

GENERATOR = 1  # raised whenever the same parameters give other images
REACH = 110.0  # metres within which traffic is drawn
UNKNOWN = 255
CHUNK = 5  # images per unit of work

_SIMILAR = {  # what a class of the images is taken for
    "car": ("other-vehicle", "truck"), "bicycle": ("motorcycle",), "motorcycle": ("bicycle",),
    "truck": ("other-vehicle", "building"), "other-vehicle": ("truck", "car"),
    "person": ("bicyclist", "motorcyclist"), "bicyclist": ("person", "motorcyclist"),
    "motorcyclist": ("bicyclist", "motorcycle"), "road": ("parking",),
    "parking": ("road", "sidewalk"), "sidewalk": ("road", "other-ground"),
    "other-ground": ("sidewalk", "terrain"), "building": ("fence",), "fence": ("building", "vegetation"),
    "vegetation": ("terrain", "trunk"), "trunk": ("vegetation", "pole"),
    "terrain": ("vegetation", "sidewalk"), "pole": ("trunk", "building"), "traffic-sign": ("pole", "building"),
}  # fmt: skip
CLASSES = {raw: value for raw, value in LEARNING_MAP.items() if value >= 0}
SIMILAR = {
    CLASS_NAMES.index(name): tuple(CLASS_NAMES.index(other) for other in others)
    for name, others in _SIMILAR.items()
}


@dataclass(frozen=True)
class CameraPlan:
    """Which images to make.

    Attributes:
        width: pixels; the height follows from KITTI's 1242 x 375.
        segments: the most superpixels of an image.
        confusion: share of things and regions that weak labels give a similar class.
    """

    width: int = 621
    segments: int = 150
    confusion: float = 0.08

    @property
    def scale(self) -> float:
        return self.width / IMAGE_SIZE[0]

    @property
    def height(self) -> int:
        return max(round(IMAGE_SIZE[1] * self.scale), 1)

    def check(self) -> None:
        """Raise InputError for images that cannot be made."""
        for key, low, high in (("width", 32, 2484), ("segments", 1, 1000), ("confusion", 0.0, 1.0)):
            value = getattr(self, key)
            if not low <= value <= high:
                option = {"width": "image-width", "segments": "superpixels"}.get(key, key)
                raise InputError(f"--{option}: {value} is not in {low}..{high}")

    def card(self) -> dict[str, Any]:
        """What `dataset.json` says about the images."""
        size = {"height": self.height, "scale": self.scale}
        return {"rig": "kitti", "generator": GENERATOR, **asdict(self), **size}


@dataclass
class CameraReport:
    """What a run did."""

    written: int
    kept: int
    seconds: float


@lru_cache(maxsize=1)
def _renderer(plan_text: str, name: str) -> tuple[Simulator, Renderer]:
    simulator = simulator_of(plan_text, name)
    rain = simulator.difficulty.rain > 0
    return simulator, Renderer(simulator.street, simulator.still, rain)


def camera_2(simulator: Simulator, cameras: CameraPlan) -> tuple[NDArray, NDArray]:
    """Intrinsics (3, 3) of camera 2, and the transformation (4, 4) from the LiDAR to it."""
    table = simulator.calibration(cameras.scale)
    intrinsics, place = table["P2"][:, :3], np.eye(4)
    place[:3] = table["Tr"]
    place[:3, 3] += np.linalg.solve(intrinsics, table["P2"][:, 3])
    return intrinsics, place


def photograph(simulator: Simulator, renderer: Renderer, cameras: CameraPlan, index: int) -> View:
    """What camera 2 sees at the time of a scan."""
    intrinsics, place = camera_2(simulator, cameras)
    pose = simulator.street.sensor_pose(index, MAST) @ np.linalg.inv(place)
    moving = simulator.moving(index, REACH)
    return renderer.view(pose, intrinsics, cameras.width, cameras.height, moving)


def _files(folder: Path, index: int) -> tuple[Path, Path, Path]:
    name = f"{index:06d}.png"
    return folder / "image_2" / name, folder / "weak_labels" / name, folder / "superpixels" / name


def _work(job: tuple[str, str, str, list[int], CameraPlan]) -> tuple[int, int]:
    plan_text, folder, name, indices, cameras = job
    simulator, renderer = _renderer(plan_text, name)
    for index in indices:
        view = photograph(simulator, renderer, cameras, index)
        rng = np.random.default_rng([*simulator.key, 10, index])
        errors = Errors(confusion=cameras.confusion)
        weak = weak_mask(view.label, CLASSES, UNKNOWN, SIMILAR, rng, errors)
        image_file, weak_file, segment_file = _files(Path(folder), index)
        write_png(weak_file, weak)
        write_png(segment_file, superpixels(view.image, cameras.segments))
        write_png(image_file, view.image)  # last: where it is, the others are
    return len(indices), 0


def simulate_cameras(
    out: str | os.PathLike[str],
    plan: Plan,
    cameras: CameraPlan,
    workers: int | None = None,
    progress: bool = True,
) -> CameraReport:
    """Add images to a folder of `synthetic.simulate`; complete ones that are there are kept.

    `dataset.json` gets the entry `cameras`, apart from the plan of the scans.

    Raises:
        InputError: for images that cannot be, or a folder with images made otherwise.
    """
    cameras.check()
    out, begin = Path(out), time.perf_counter()
    card = read_card(out)
    if card is None:
        raise InputError(f"{out} has no dataset.json; simulate the scans first")
    if card.get("cameras") is not None:
        refuse_change(out, "images", card["cameras"], cameras.card())
    plan_text, jobs, kept = json.dumps(asdict(plan)), [], 0
    note = {"classes": list(CLASS_NAMES), "unknown": UNKNOWN, "model": "simulated",
            "errors": asdict(Errors(confusion=cameras.confusion))}  # fmt: skip
    for name, count in plan.scans.items():
        folder = out / "dataset" / "sequences" / name
        # From now on calib.txt belongs to these images.
        write_calibration(plan_text, str(folder), name, cameras.scale)
        for path in _files(folder, 0):
            path.parent.mkdir(exist_ok=True)
        replace_with(
            folder / "weak_labels" / "classes.json", (json.dumps(note, indent=2) + "\n").encode()
        )
        missing = [i for i in range(count) if not all(_there(p) for p in _files(folder, i))]
        kept += count - len(missing)
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            jobs.append((plan_text, str(folder), name, part, cameras))
    written, total = 0, sum(len(job[3]) for job in jobs)
    write_card(out, {**card, "cameras": cameras.card()})
    with tqdm(total=total, unit="image", desc="cameras", disable=not progress) as bar:
        for done, _ in run(_work, jobs, workers):
            written += done
            bar.update(done)
    return CameraReport(written, kept, time.perf_counter() - begin)


def _there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
