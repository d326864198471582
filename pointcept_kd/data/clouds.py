"""Point clouds in files of anyone's making: `.bin`, `.npy`, `.ply`, `.pcd`.

.bin   rows of float32: x y z intensity (KITTI), or x y z intensity ring (nuScenes, `.pcd.bin`)
.npy   (n, 3), (n, 4) or wider, x y z intensity first; or a structured array with those names
.ply   Polygon File Format 1.0: ascii, binary_little_endian, binary_big_endian
.pcd   Point Cloud Data 0.7: ascii, binary, binary_compressed
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .headers import COPY_AGAIN
from .pcd import parse_pcd
from .ply import parse_ply, write_ply

__all__ = ["STRENGTH_NAMES", "SUFFIXES", "read_points", "write_ply"]

SUFFIXES = (".bin", ".npy", ".ply", ".pcd")

# Names of the returned energy, lower case and without CloudCompare's `scalar_`; the first that a file has is taken.
STRENGTH_NAMES = ("intensity", "reflectance", "remission", "reflectivity", "strength")


def read_points(path: str | os.PathLike[str], columns: int | None = None) -> dict[str, Any]:
    """Read one point cloud.

    Args:
        columns: float32 values per point of a `.bin` file; None finds out whether there are 4 or 5.

    Returns:
        `coord` (m, 3) float32 metres; `strength` (m, 1) float32 as the file has it, or None; `kept` (n,) bool, which
        of the file's n points these m are; `dropped` = n - m, the points with a value that is not finite.

    Raises:
        InputError: for a file that cannot be read or holds no finite point.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown kind of point cloud {suffix or 'without a suffix'!r}; expected "
            f"{', '.join(SUFFIXES)}"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise InputError(f"{path}: the file is empty; {COPY_AGAIN}")
    if suffix == ".bin":
        coord, strength = _bin(path, data, columns)
    elif suffix == ".npy":
        coord, strength = _npy(path, data)
    else:
        coord, strength = _named(path, (parse_ply if suffix == ".ply" else parse_pcd)(path, data))
    if not len(coord):
        raise InputError(f"{path}: the file has no points; remove it")
    # Numbers beyond float32 become infinite here, and are dropped with the others.
    with np.errstate(over="ignore"):
        coord = np.ascontiguousarray(coord, np.float32)
        strength = None if strength is None else np.ascontiguousarray(strength, np.float32)
    kept = np.isfinite(coord).all(1)
    if strength is not None:
        kept &= np.isfinite(strength)
    dropped = int(len(kept) - kept.sum())
    if dropped == len(kept):
        raise InputError(f"{path}: none of its {dropped} points is finite; remove the file")
    if dropped:
        coord, strength = coord[kept], None if strength is None else strength[kept]
    return {
        "coord": coord,
        "strength": None if strength is None else strength[:, None],
        "kept": kept,
        "dropped": dropped,
    }


# --------------------------------------------------------------------------------------- .bin, .npy


def _bin(path: Path, data: bytes, columns: int | None) -> tuple[NDArray, NDArray | None]:
    if columns is not None:
        if columns < 3:
            raise InputError(f"{path}: {columns} columns hold no x, y, z; give --columns 3 or more")
        if len(data) % (4 * columns):
            raise InputError(
                f"{path}: {len(data)} bytes are no whole number of points of {columns} float32 values; correct "
                "--columns, or copy the file again"
            )
        rows = np.frombuffer(data, "<f4").reshape(-1, columns)
    else:
        rows = _guess_columns(path, data)
    return rows[:, :3], rows[:, 3] if rows.shape[1] > 3 else None


def _guess_columns(path: Path, data: bytes) -> NDArray:
    """Rows of 4 or 5 values, whichever the size, the name and the values allow."""
    nuscenes = path.name.lower().endswith(".pcd.bin")
    fits = [c for c in (4, 5) if len(data) % (4 * c) == 0 and not (nuscenes and c == 4)]
    if not fits:
        asked = "5" if nuscenes else "4 (KITTI) or 5 (nuScenes)"
        raise InputError(
            f"{path}: {len(data)} bytes are no whole number of points of {asked} float32 values; "
            "give --columns N if the points have others, or copy the file again"
        )
    readings = [np.frombuffer(data, "<f4").reshape(-1, c) for c in fits]
    if len(readings) == 2 and _is_ring(readings[1][:, 4]):
        return readings[1]
    # A coordinate in the place of the intensity is negative for about half of the points.
    likely = [rows for rows in readings if not np.nanmin(rows[:, 3], initial=0.0) < 0]
    if not likely:
        raise InputError(
            f"{path}: with {' or '.join(map(str, fits))} float32 values per point the fourth would be a negative "
            "intensity; say with --columns N how many values a point has"
        )
    return likely[0]


def _is_ring(values: NDArray) -> bool:
    """Whether these are laser numbers: whole, from 0 to 127, and not all the same."""
    with np.errstate(invalid="ignore"):
        whole = (values >= 0) & (values < 128) & (values == np.floor(values))
    return bool(whole.all() and values.min() < values.max())


def _npy(path: Path, data: bytes) -> tuple[NDArray, NDArray | None]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable .npy array ({reason})") from error
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{path}: an archive of several arrays; save one array (n, 3) or (n, 4) with numpy.save"
        )
    if array.dtype.names:
        return _named(path, array.reshape(-1))
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: an array {array.shape} of {array.dtype}; expected numbers (n, 3) or (n, 4): x, y, z, intensity"
        )
    return array[:, :3], array[:, 3] if array.shape[1] > 3 else None


def _named(path: Path, rows: NDArray) -> tuple[NDArray, NDArray | None]:
    """x, y, z (n, 3) and the strength (n,), or None, of a structured array."""
    names: dict[str, str] = {}
    for name in rows.dtype.names or ():
        names.setdefault(name.lower().removeprefix("scalar_"), name)
    missing = [axis for axis in "xyz" if axis not in names]
    if missing:
        raise InputError(
            f"{path}: no {', '.join(missing)} among its fields {', '.join(rows.dtype.names or ('none',))}"
        )
    found = next((names[name] for name in STRENGTH_NAMES if name in names), None)
    for name in [*(names[axis] for axis in "xyz"), *([found] if found else [])]:
        if rows.dtype[name].shape or rows.dtype[name].base.kind not in "fiu":
            raise InputError(f"{path}: {name} is {rows.dtype[name]}; expected one number per point")
    coord = np.stack([rows[names[axis]].astype(np.float64) for axis in "xyz"], axis=1)
    return coord, None if found is None else rows[found].astype(np.float64)
