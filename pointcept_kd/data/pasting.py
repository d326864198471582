"""Objects of other scans, put on the ground of a scan.

An object turns about the sensor's z axis to where it is put, and only ground at about its own range is taken: it keeps
the density and the shadows of its points. Nothing is taken away behind it (Sun et al., "Uni-to-Multi Modal Knowledge
Distillation for Bidirectional LiDAR-Camera Semantic Segmentation", TPAMI 46(12), 2024, whose rules these are).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError, kd

from . import nuscenes, semantic_kitti, waymo
from .arrays import Data, coord_of, lookup, need, ratio_of, valid_keys
from .image_patches import PatchScene
from .instances import InstanceDatabase, training_reader
from .pictures import birdseye_png, write_png

WEIGHTS = {"uniform": 0.0, "sqrt": 0.5, "proportional": 1.0, "inverse_sqrt": -0.5}

_NUSCENES_ROAD = ("driveable_surface",)
_NUSCENES_WALK = ("driveable_surface", "other_flat", "sidewalk")
_KITTI_ROAD = ("road", "parking")
_KITTI_CYCLE = ("road", "parking", "sidewalk")
_KITTI_RIDER = (*_KITTI_CYCLE, "other-ground")
_WAYMO_ROAD = ("Road", "Lane Marker")
_WAYMO_CYCLE = (*_WAYMO_ROAD, "Sidewalk", "Walkable")

# Where the objects of a data set may stand, by name. Waymo's are ours; its signs, lights and poles stay where they are.
GROUND: dict[str, dict[str, tuple[str, ...]]] = {
    "nuscenes": {
        **dict.fromkeys(
            ("barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "trailer", "truck"),
            _NUSCENES_ROAD,
        ),
        **dict.fromkeys(("pedestrian", "traffic_cone"), _NUSCENES_WALK),
    },
    "semantic_kitti": {
        **dict.fromkeys(("car", "truck", "other-vehicle"), _KITTI_ROAD),
        **dict.fromkeys(("bicycle", "motorcycle"), _KITTI_CYCLE),
        **dict.fromkeys(("bicyclist", "motorcyclist"), _KITTI_RIDER),
        "person": (*_KITTI_RIDER, "terrain"),
    },
    "waymo": {
        **dict.fromkeys(("Car", "Truck", "Bus", "Other Vehicle", "Construction Cone"), _WAYMO_ROAD),
        **dict.fromkeys(("Bicycle", "Motorcycle", "Motorcyclist", "Bicyclist", "Pedestrian"), _WAYMO_CYCLE),
    },
}  # fmt: skip
# The least points of an object; where a class has none, the database's own limit stands.
MIN_POINTS: dict[str, dict[str, int]] = {
    "nuscenes": {
        "barrier": 10, "bicycle": 10, "bus": 100, "car": 100, "construction_vehicle": 100, "motorcycle": 10,
        "pedestrian": 10, "traffic_cone": 10, "trailer": 100, "truck": 100,
    },
    "semantic_kitti": {
        "car": 300, "bicycle": 50, "motorcycle": 50, "truck": 300, "other-vehicle": 300, "person": 25,
        "bicyclist": 25, "motorcyclist": 25,
    },
    "waymo": {},
}  # fmt: skip

COLORS = {
    "nuscenes": nuscenes.COLORS,
    "semantic_kitti": semantic_kitti.COLORS,
    "waymo": waymo.COLORS,
}

IMAGES = ("mask_out", "patch")

_SHIFT, _LIFT = 0.5, 0.05  # metres, to the sides and up from a patch
_LEVEL = 0.25  # metres between the ground and the lowest point of an object that keeps its place
# What a pasted point has in the arrays that a sample may have.
_FILL = {"sweep": 0, "time": 0, "instance": -1, "pasted": True}


def ground_patches(coord: NDArray, cell: float = 5.0, least: int = 20) -> NDArray:
    """Means (k, 3) float64 of the ground points (n, 3) in every cell of `cell` metres that has `least` of them or more.

    Cell i of an axis reaches from (i - 1/2) cell to (i + 1/2) cell; cells are in the order of x, then of y.
    """
    if not len(coord):
        return np.empty((0, 3))
    place = np.rint(coord[:, :2].astype(np.float64) / cell).astype(np.int64)
    place -= place.min(0)
    number = place[:, 0] * (int(place[:, 1].max()) + 1) + place[:, 1]
    _, number = np.unique(number, return_inverse=True)
    counts = np.bincount(number)
    sums = [np.bincount(number, coord[:, axis].astype(np.float64)) for axis in range(3)]
    return (np.stack(sums, 1) / counts[:, None])[counts >= least]


def placed(points: NDArray, patch: NDArray) -> NDArray:
    """An object (k, 3) turned about z to the azimuth of a patch (3,) and put there; float64.

    The mean of its x and y comes to the patch's x and y, its lowest z to the patch's z.
    """
    points = points.astype(np.float64)
    x, y = points[:, :2].mean(0)
    cross, dot = x * patch[1] - y * patch[0], x * patch[0] + y * patch[1]
    angle = np.arctan2(cross, dot)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack(
        [
            c * (points[:, 0] - x) - s * (points[:, 1] - y) + patch[0],
            s * (points[:, 0] - x) + c * (points[:, 1] - y) + patch[1],
            points[:, 2] - points[:, 2].min() + patch[2],
        ],
        1,
    )


def on_ground(points: NDArray, patches: NDArray, cell: float) -> bool:
    """Whether a patch (m, 3) is within `cell` metres of an object's mean x and y and 0.25 m of its lowest z."""
    apart = np.hypot(*(patches[:, :2] - points[:, :2].mean(0)).T)
    level = np.abs(patches[:, 2] - points[:, 2].min()) <= _LEVEL
    return bool((level & (apart <= cell)).any())


def points_in_box(coord: NDArray, points: NDArray) -> NDArray:
    """Which points (n, 3) of a scene are strictly inside the axis-aligned box of an object (k, 3): (n,) bool."""
    low, high = points.min(0), points.max(0)
    inside = np.ones(len(coord), bool)
    for axis in range(3):
        inside &= (coord[:, axis] > low[axis]) & (coord[:, axis] < high[axis])
    return inside


@kd.TRANSFORMS.register_module()
class PasteInstances:
    """Fill a scan up with objects of a database; stands before all that moves or drops points.

    Classes are drawn with replacement, then one of their objects, then up to 9 patches of ground nearest to its range
    are tried. Where nothing fits, nothing is pasted: a scan without ground comes back as it is. `pasted` (n,) bool
    marks the points and stays in step with them. They come behind the scan's own points and before those of sweeps
    merged into it, with which no collision is looked for. With image="mask_out" no camera sees them: they have no rows
    among the views of `CameraViewDataset`, whose images do not show them.

    With image="patch" (ours) an object comes with its picture. It keeps its place before the camera that took it, in
    the other scan before the camera of the same name, at the same pixels (see `image_patches`), and is pasted where
    that camera has the same image size and focal lengths within 1 %, ground is within `cell` metres of its middle and
    0.25 m of its lowest point, nothing is in its place, and at most 10 % of its points are behind others. Its picture
    is blended into the image, its points get rows there, and points behind it lose theirs: those deeper than its median
    depth in its hull. Where the sample does not keep that camera, and in all other images, nothing changes. Objects
    without a picture are not drawn; `tries`, `patches` and the nearest range play no part. An object has one place, so
    few draws fit: `count` is to be larger than with "mask_out".

    Args:
        database: folder that `tools/prepare_data.py instances` wrote.
        count: objects that are drawn.
        weights: of a class with c objects: "uniform", "sqrt", "proportional" or "inverse_sqrt" of c.
        min_points: of an object, one number or by class name; None: `MIN_POINTS` of the data set.
        limits: the most objects of a class in one scan, by class name.
        ground: class names by the name of the object that may stand on them; None: `GROUND` of the data set. Objects
            without an entry are not drawn.
        tries: places tried per patch: up to 0.5 m beside it along x and y, up to 5 cm above.
        patches: patches that are tried.
        cell, least: see `ground_patches`.
        most_points: once more points than these were added, no more is pasted.
        things, others: the most scene points in the object's box, as a share of its points, of classes that are objects
            and of all others.
        p: probability that anything is pasted.
        image: "mask_out", or "patch" for a database made with --image-patches, in the transforms of
            `CameraViewDataset`.

    Raises:
        InputError: for an unusable database, unknown classes, a sample without labels or with per-point arrays that
            pasted points have no values of; with image="patch" for a database without pictures, or a sample without
            cameras.
    """

    def __init__(
        self,
        database: str,
        count: int = 6,
        weights: str = "sqrt",
        min_points: int | Mapping[str, int] | None = None,
        limits: Mapping[str, int] | None = None,
        ground: Mapping[str, Any] | None = None,
        tries: int = 5,
        patches: int = 9,
        cell: float = 5.0,
        least: int = 20,
        most_points: int = 5000,
        things: float = 0.001,
        others: float = 0.05,
        p: float = 1.0,
        image: str = "mask_out",
    ) -> None:
        need(image in IMAGES, f"PasteInstances: image={image!r}; use {', '.join(IMAGES)}")
        self.image = image
        need(weights in WEIGHTS, f"PasteInstances: weights={weights!r}; use {', '.join(WEIGHTS)}")
        need(count >= 0, f"PasteInstances: count is 0 or more, got {count!r}")
        for key, value in (
            ("tries", tries),
            ("patches", patches),
            ("cell", cell),
            ("least", least),
        ):
            need(value > 0, f"PasteInstances: {key} is above 0, got {value!r}")
        self.things, self.others = things, others
        for key, value in (("things", things), ("others", others)):
            need(value >= 0, f"PasteInstances: {key} is a share of 0 or more, got {value!r}")
        self.p = ratio_of(p, "PasteInstances: p")
        self.count, self.tries, self.patches = count, tries, patches
        self.cell, self.least, self.most_points = cell, least, most_points
        self.database = InstanceDatabase(database)
        names = self.database.names
        allowed = GROUND.get(self.database.layout) if ground is None else ground
        need(
            allowed is not None,
            f"PasteInstances: no ground is known for {self.database.layout}; give ground",
        )
        self.ground = {
            self._number(name, names): [self._number(n, names) for n in grounds]
            for name, grounds in allowed.items()
        }
        self.limits = {self._number(n, names): int(v) for n, v in (limits or {}).items()}
        if min_points is None:
            min_points = MIN_POINTS.get(self.database.layout, {})
        each = np.zeros(len(names), np.int64)
        if isinstance(min_points, Mapping):
            for name, value in min_points.items():
                each[self._number(name, names)] = value
        else:
            each[:] = min_points
        usable = self.database.points >= each[self.database.classes]
        if image == "patch":
            if self.database.patches is None:
                raise InputError(
                    f"PasteInstances: image='patch' needs pictures of the objects, {database} has none; make it again: "
                    "python tools/prepare_data.py instances --data-root FOLDER --image-patches"
                )
            usable &= self.database.patches
        self.rows = {
            number: rows
            for number in sorted(self.ground)
            if len(rows := np.flatnonzero(usable & (self.database.classes == number)))
        }
        counts = np.array([len(rows) for rows in self.rows.values()], np.float64)
        share = counts ** WEIGHTS[weights]
        self.share = share / share.sum() if len(share) else share
        # A class that may be pasted is an object, and so is every other one of the database.
        self.objects = np.union1d(sorted(self.ground), np.unique(self.database.classes))

    @staticmethod
    def _number(name: str, names: tuple[str, ...]) -> int:
        if name not in names:
            raise InputError(f"PasteInstances: no class {name!r}; there are {', '.join(names)}")
        return names.index(name)

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "PasteInstances")
        segment = lookup(data, "segment", "PasteInstances").reshape(-1)
        own = np.flatnonzero(data["sweep"] == 0) if "sweep" in data else np.arange(len(coord))
        need(
            len(own) > 0 and own[-1] == len(own) - 1,
            "PasteInstances: the scan's own points come before those of sweeps; put it first",
        )
        data.setdefault("pasted", np.zeros(len(coord), bool))
        listed = dict.fromkeys([*valid_keys(data), "pasted"])
        data["index_valid_keys"] = list(listed)
        if not self.rows or np.random.random() >= self.p:
            return data
        scene = PatchScene(data, coord[: len(own)]) if self.image == "patch" else None
        added, classes = self._draw(coord[: len(own)], segment[: len(own)], scene)
        if not added:
            return data
        data = self._insert(data, len(own), added, classes)
        return data if scene is None else scene.show(data)

    def _draw(
        self, coord: NDArray, segment: NDArray, views: PatchScene | None
    ) -> tuple[list[NDArray], list[int]]:
        grounds = sorted({g for number in self.rows for g in self.ground[number]})
        found = {g: ground_patches(coord[segment == g], self.cell, self.least) for g in grounds}
        if not any(len(patches) for patches in found.values()):
            return [], []
        added: list[NDArray] = []
        classes: list[int] = []
        total = 0
        numbers = list(self.rows)
        is_thing = np.isin(segment, self.objects)
        for number in np.random.choice(numbers, self.count, p=self.share):
            row = int(np.random.choice(self.rows[number]))
            if classes.count(number) >= self.limits.get(number, self.count):
                continue
            patches = np.concatenate([found[g] for g in self.ground[number]])
            points = self.database.load(row)
            if views is None:
                place = self._place(points[:, :3], patches, coord, is_thing, added)
            else:
                place = self._kept(row, points[:, :3], patches, coord, is_thing, added, views)
            if place is None:
                continue
            added.append(np.hstack([place, points[:, 3:]]).astype(np.float32))
            classes.append(int(number))
            total += len(points)
            if total > self.most_points:
                break
        return added, classes

    def _kept(
        self,
        row: int,
        points: NDArray,
        patches: NDArray,
        coord: NDArray,
        is_thing: NDArray,
        added: list[NDArray],
        views: PatchScene,
    ) -> NDArray | None:
        """Where an object goes that keeps its place before its camera; its only place, so that it goes there once."""
        if row in views.rows:
            return None
        picture = self.database.patch(row)
        place = views.place(picture, points)
        if place is None or not on_ground(place, patches, self.cell):
            return None
        scene, is_thing = self._scene(coord, is_thing, added)
        if not self._free(scene, is_thing, place) or views.hides(picture):
            return None
        views.add(row, picture)
        return place

    @staticmethod
    def _scene(coord: NDArray, is_thing: NDArray, added: list[NDArray]) -> tuple[NDArray, NDArray]:
        """The scan's points with those that are already pasted, and which are of objects."""
        scene = np.concatenate([coord, *(other[:, :3] for other in added)])
        return scene, np.concatenate([is_thing, np.ones(len(scene) - len(coord), bool)])

    def _free(self, scene: NDArray, is_thing: NDArray, place: NDArray) -> bool:
        """Whether few enough points of a scene are in the box of an object."""
        inside = points_in_box(scene, place)
        things = int((inside & is_thing).sum())
        others = int(inside.sum()) - things
        return things <= self.things * len(place) and others <= self.others * len(place)

    def _place(
        self,
        points: NDArray,
        patches: NDArray,
        coord: NDArray,
        is_thing: NDArray,
        added: list[NDArray],
    ) -> NDArray | None:
        flat = points[:, :2].astype(np.float64)
        reach = np.hypot(*flat.mean(0))
        apart = np.abs(np.hypot(patches[:, 0], patches[:, 1]) - reach)
        # No point of the object comes further from the patch than this, however it turns.
        radius = np.hypot(*(flat - flat.mean(0)).T).max() + _SHIFT
        scene, is_thing = self._scene(coord, is_thing, added)
        for patch in patches[np.argsort(apart, kind="stable")[: self.patches]]:
            near = np.abs(scene[:, 0] - patch[0]) < radius
            near &= np.abs(scene[:, 1] - patch[1]) < radius
            close, thing = scene[near], is_thing[near]
            for _ in range(self.tries):
                # From the patch itself each time: shifts must not add up.
                shift = np.random.uniform((-_SHIFT, -_SHIFT, 0.0), (_SHIFT, _SHIFT, _LIFT))
                place = placed(points, patch + shift)
                if self._free(close, thing, place):
                    return place
        return None

    @staticmethod
    def _insert(data: Data, end: int, added: list[NDArray], classes: list[int]) -> Data:
        rows = np.concatenate(added)
        segment = np.repeat(classes, [len(points) for points in added])
        for key in data["index_valid_keys"]:
            if key not in data:
                continue
            old = data[key]
            new = np.zeros((len(rows), *old.shape[1:]), old.dtype)
            if key == "coord":
                new[:] = rows[:, :3]
            elif key == "strength":
                # Further columns, such as the time of a merged scan, are 0.
                new.reshape(len(rows), -1)[:, 0] = rows[:, 3]
            elif key == "segment":
                new.reshape(-1)[:] = segment
            elif key == "point_id":
                new[:] = np.arange(len(rows)) + old.max() + 1
            elif key in _FILL:
                new[:] = _FILL[key]
            else:
                raise InputError(
                    f"PasteInstances: pasted points have no value of {key!r}; put PasteInstances before the transform "
                    "that makes it, or leave that out"
                )
            data[key] = np.concatenate([old[:end], new, old[end:]])
        return data


def before_and_after(
    before: Data, after: Data, colors: NDArray, half: float = 25.0, scale: int = 12
) -> NDArray:
    """A scan from above without and with pasted objects, side by side; needs Pillow.

    Args:
        before, after: samples with coord and segment.
        colors: (classes, 3) of the train ids.
        half, scale: see `birdseye_png`.
    Returns: (h, w, 3) uint8.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("a picture needs Pillow; pip install 'pointcept_kd[images]'") from error
    sides = []
    for data in (before, after):
        # What is pasted is drawn last: the ground beside it does not cover it.
        order = data["coord"][:, 2] + 100.0 * data.get("pasted", np.zeros(len(data["coord"]), bool))
        png = birdseye_png(data["coord"], data["segment"], colors, half, scale, order)
        with Image.open(io.BytesIO(png)) as picture:
            sides.append(np.asarray(picture.convert("RGB")))
    gap = np.full((len(sides[0]), 8, 3), 255, np.uint8)
    return np.hstack([sides[0], gap, sides[1]])


def draw_pasting(
    data_root: str | os.PathLike[str],
    database: str | os.PathLike[str],
    out: str | os.PathLike[str],
    splits: Sequence[str] | None = None,
    **options: Any,
) -> tuple[str, int]:
    """Write `before_and_after` of the first training scan as a PNG file.

    Args:
        data_root, splits: of the scans, as for `instances.build`.
        database: see `PasteInstances`; `options` are its others.
    Returns: name of the scan, number of points pasted.

    Raises:
        InputError: for an unusable database, and a file that cannot be written.
    """
    layout = InstanceDatabase(database).layout
    reader = training_reader(layout, data_root, splits)
    paste = PasteInstances(os.fspath(database), **{"count": 10, "min_points": 0, **options})
    before = reader.load(0)
    after = paste(dict(before))
    try:
        write_png(out, before_and_after(before, after, COLORS[layout]))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    return reader.get_data_name(0), int(after["pasted"].sum())
