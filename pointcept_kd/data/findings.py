"""What can be wrong with a file, as one line of text: arrays, rotations, pictures.

`check` and `check_folders` put them together for a whole data set.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .pictures import read_image

FAR = 1000.0  # metres; no LiDAR of a vehicle reaches that far
_PICTURES = (".png", ".jpg", ".jpeg")
_ROTATION = 1e-3  # how far a rotation times its transpose may be from the identity


class Problem(str):
    """One line of text about one file.

    Attributes:
        kind: what sort of damage it is, for a summary.
        hint: worth a look, but the data can be used.
    """

    kind: str
    hint: bool

    def __new__(cls, text: str, kind: str, hint: bool = False) -> Problem:
        """The line; `kind` and `hint` beside it."""
        line = super().__new__(cls, text)
        line.kind, line.hint = kind, hint
        return line


# What the lines of readers say, in the order in which they are looked for.
_SAYS = (
    ("not finite", "not finite"),
    ("has no points|no poses|is empty", "empty"),
    ("class id|unknown class|labels? .* outside", "unknown class"),
    ("missing|no such file|does not exist", "missing"),
    ("cannot be read|not a readable|not a text", "unreadable"),
    ("bytes|rows|cut off|shape|expected|should hold", "wrong size or content"),
)


def as_problem(line: str) -> Problem:
    """A reader's line as a `Problem`; its kind follows from the words."""
    if isinstance(line, Problem):
        return line
    text = line.partition(": ")[2].lower()
    kinds = (kind for words, kind in _SAYS if re.search(words, text))
    return Problem(line, next(kinds, "other"))


def coordinates(path: Path, coord: NDArray) -> list[Problem]:
    """Coordinates (n, 3), metres, that are not finite, absurdly far away, or all the same."""
    finite = np.isfinite(coord).all(1)
    lines = []
    if not finite.all():
        row = int(np.argmin(finite))
        text = (
            f"{path}: {int((~finite).sum())} points are not finite, the first in row {row} "
            f"{coord[row].tolist()}; repair the file, or remove those points"
        )
        lines.append(Problem(text, "not finite"))
    far = finite & (np.abs(np.where(np.isfinite(coord), coord, 0)) > FAR).any(1)
    if far.any():
        row = int(np.argmax(far))
        text = (
            f"{path}: {int(far.sum())} of {len(coord)} points are more than {FAR / 1000:g} km away, the first in row "
            f"{row} {coord[row].tolist()}, expected metres from the sensor; subtract the sensor's position, or copy "
            "the file again"
        )
        lines.append(Problem(text, "far away"))
    elif len(coord) > 1 and finite.all() and (coord == coord[0]).all():
        text = f"{path}: all {len(coord)} points are at {coord[0].tolist()}; copy the file again"
        lines.append(Problem(text, "all points equal"))
    return lines


def strengths(path: Path, strength: NDArray, above: str) -> list[Problem]:
    """Values outside 0 to 1 are a problem or a hint; a non-finite one is always a problem."""
    finite = np.isfinite(strength)
    if not finite.all():
        row = int(np.argmin(finite))
        text = f"{path}: {int((~finite).sum())} strengths are not finite, the first in row {row}; repair the file"
        return [Problem(text, "not finite")]
    low, high = float(strength.min()), float(strength.max())
    if low < 0 or high > 1:
        text = (
            f"{path}: strength from {low:g} to {high:g}, expected 0 to 1; divide by the sensor's maximum, such as 255, "
            "or copy the file again"
        )
        return [Problem(text, "strength", hint=above == "hint")]
    if high == 0:
        text = (
            f"{path}: strength is 0 everywhere; a network cannot use it, leave it out of feat_keys"
        )
        return [Problem(text, "strength all 0", hint=True)]
    return []


def rotation(matrix: NDArray) -> str:
    """What keeps a (3, 3) matrix from being a rotation; empty for one."""
    off = float(np.abs(matrix @ matrix.T - np.eye(3)).max())
    if off > _ROTATION:
        return f"is no rotation: its columns are off an orthonormal base by {off:.3g}, expected below {_ROTATION}"
    if np.linalg.det(matrix) < 0:
        return "is a reflection: its determinant is -1, expected +1"
    return ""


def pictures(folder: Path) -> list[Path]:
    """The picture files of a folder by name."""
    return sorted(p for p in folder.glob("[!.]*.*") if p.suffix.lower() in _PICTURES)


def images(paths: list[Path], pool: ThreadPoolExecutor) -> Iterator[tuple[Path, list[Problem]]]:
    """Pictures of one camera."""
    if paths and importlib.util.find_spec("PIL") is None:
        line = (
            f"{paths[0].parent}: {len(paths)} images not checked, that needs Pillow; "
            "pip install 'pointcept_kd[images]'"
        )
        yield paths[0].parent, [Problem(line, "not checked", hint=True)]
        return
    read = list(pool.map(_image, paths))
    sizes = Counter(size for size, _ in read if size)
    usual = sizes.most_common(1)[0][0] if sizes else None
    for path, (size, lines) in zip(paths, read):
        if size and size != usual:
            text = (
                f"{path}: {size[0]} x {size[1]} pixels, the other images of the folder have {usual[0]} x {usual[1]}; "
                "one calibration cannot fit both, copy it again"
            )
            lines.append(Problem(text, "image size"))
        yield path, lines


def _image(path: Path) -> tuple[tuple[int, int] | None, list[Problem]]:
    try:
        if not path.stat().st_size:
            return None, [Problem(f"{path}: the image is empty, 0 bytes; copy it again", "image")]
        height, width = read_image(path).shape[:2]
    except OSError as error:
        text = f"{path}: cannot be read ({error.strerror or error}); copy it again"
        return None, [Problem(text, "image")]
    except Exception as error:  # a decoder answers damaged bytes with errors of many types
        text = (
            str(error)
            if isinstance(error, InputError)
            else f"{path}: not a readable picture ({error})"
        )
        return None, [Problem(f"{text}; copy it again", "image")]
    return (width, height), []
