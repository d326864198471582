"""Maps beside camera images: weak labels and superpixels, one PNG per image.

Weak labels are one byte per pixel. A `classes.json` beside them says what the values mean:

    classes   names of the values 0, 1, 2, ...
    unknown   the value of pixels without a label. Without this entry 0 has that meaning, and `classes` names the
              values from 1 on (a first name such as "none" or "background" is taken for that of 0).

What is read here has other values: 0 no label, 1..K the classes in the order of `classes`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .camera import Camera
from .pictures import read_image

CLASSES_FILE = "classes.json"
_NO_CLASS = ("none", "background", "unknown", "unlabeled", "unlabelled", "void")


@dataclass(frozen=True, eq=False)
class WeakClasses:
    """What the values of a folder's weak labels mean.

    Attributes:
        path: of the `classes.json`.
        names: of the classes 1..K.
        table: (256,) int64, stored value to 0..K; -1 for values that have no meaning.
    """

    path: Path
    names: tuple[str, ...]
    table: NDArray


def read_classes(path: str | os.PathLike[str]) -> WeakClasses:
    """Read a `classes.json`.

    Raises:
        InputError: for a file that cannot be read or has not the entries described above.
    """
    path = Path(path)
    try:
        note = json.loads(path.read_bytes())
        names = note["classes"]
        unknown = note.get("unknown")
        fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not fits or not isinstance(unknown, (int, type(None))) or isinstance(unknown, bool):
            raise TypeError("classes is a list of names, unknown one value")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); it names the classes of the weak labels "
            "beside it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected `classes`, and `unknown` where it is not 0 ({error!r})"
        ) from error
    if unknown is None:
        unknown = 0
        if not names or names[0].lower() not in _NO_CLASS:
            names = ["none", *names]
    values = [value for value in range(len(names)) if value != unknown]
    if not values or len(names) > 256 or not 0 <= unknown <= 255:
        raise InputError(
            f"{path}: {len(names)} classes, unknown {unknown}; values of one byte need 1 to 255 classes and an "
            "unknown from 0 to 255"
        )
    table = np.full(256, -1, np.int64)
    table[values], table[unknown] = np.arange(1, len(values) + 1), 0
    return WeakClasses(path, tuple(names[value] for value in values), table)


def read_map(path: str | os.PathLike[str], camera: Camera | None = None) -> NDArray:
    """A map (h, w), uint8 or uint16 as stored.

    Args:
        camera: whose image the map belongs to; None: the size is not looked at.

    Raises:
        InputError: for a file that is missing or unreadable, a colour picture, or another size than the image.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: the map of the image is missing; make it, or work without it")
    values = read_image(path)
    if values.ndim != 2:
        raise InputError(f"{path}: a mask has one channel, this is a colour picture")
    if camera is not None and values.shape != (camera.height, camera.width):
        raise InputError(
            f"{path}: {values.shape[1]} x {values.shape[0]} pixels, but the image of {camera.name} has "
            f"{camera.width} x {camera.height}; make the map of the same image"
        )
    return values


def read_weak_labels(
    path: str | os.PathLike[str], classes: WeakClasses, camera: Camera | None = None
) -> NDArray:
    """Weak labels (h, w) uint8 of an image: 0 none, 1..K.

    Raises:
        InputError: as `read_map`, and for a value that `classes` does not know.
    """
    values = read_map(path, camera)
    # One pass over the bytes tells which values occur; a look at each looked-up value would cost more.
    present = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256))
    bad = present[present > 255].tolist() or present[classes.table[present] < 0].tolist()
    if bad:
        raise InputError(
            f"{path}: value {bad[0]} is none of the {len(classes.names)} classes of {classes.path}; the files "
            "do not belong together"
        )
    return classes.table.astype(np.uint8)[values]


class ImageMapReader:
    """Mixin of readers with cameras: their weak labels and superpixels.

    A reader says where the files are; images, maps and cameras come in the same order.
    """

    cameras: Any
    get_data_name: Any

    def weak_label_files(self, idx: int) -> list[Path]:
        """Where the weak labels of a sample's images are, or would be."""
        raise InputError(f"{type(self).__name__} has no place for weak labels")

    def superpixel_files(self, idx: int, folder: str | None = None) -> list[Path]:
        """Where the superpixels of a sample's images are, or would be; `folder` in place of the usual one."""
        raise InputError(f"{type(self).__name__} has no place for superpixels")

    def weak_class_files(self) -> list[Path]:
        """The `classes.json` of all weak labels that the reader may read."""
        raise InputError(f"{type(self).__name__} has no place for weak labels")

    def weak_class_file(self, path: Path) -> Path:
        """The `classes.json` of a file of weak labels: in the same folder."""
        return path.parent / CLASSES_FILE

    def weak_classes(self) -> list[str]:
        """Names of the classes 1..K.

        Raises:
            InputError: for a missing or malformed `classes.json`, or two that differ.
        """
        found = [read_classes(path) for path in self.weak_class_files()]
        for other in found[1:]:
            if other.names != found[0].names:
                raise InputError(
                    f"{other.path}: other classes than in {found[0].path}; label all images alike"
                )
        return list(found[0].names)

    def weak_labels(self, idx: int) -> list[NDArray]:
        """Weak labels (h, w) uint8 of every image: 0 none, 1..K, see `weak_classes`.

        Raises:
            InputError: for files that are missing, of another size than their image, or with unknown values.
        """
        places = zip(self.weak_label_files(idx), self.cameras(idx), strict=True)
        return [
            read_weak_labels(path, read_classes(self.weak_class_file(path)), camera)
            for path, camera in places
        ]

    def superpixels(self, idx: int, folder: str | None = None) -> list[NDArray]:
        """Superpixels (h, w) of every image, integers from 0 as stored.

        Args:
            folder: name of another folder than the usual one.

        Raises:
            InputError: for files that are missing or of another size than their image.
        """
        places = zip(self.superpixel_files(idx, folder), self.cameras(idx), strict=True)
        return [read_map(path, camera) for path, camera in places]
