"""What the transforms share: the per-point arrays of one sample and their checks.

A sample is a dictionary of numpy arrays. Per-point arrays are those under the keys of
`data["index_valid_keys"]`; transforms that drop or reorder points index exactly these. A new
per-point array must be added to that list with `Update`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pointcept_kd.host import InputError

Data = dict[str, Any]
Array = np.ndarray

INDEX_VALID_KEYS = ("coord", "color", "normal", "superpoint", "strength", "segment", "instance")


def valid_keys(data: Data) -> list[str]:
    """The sample's own, writable list of per-point keys; a list that came from a config is copied."""
    data["index_valid_keys"] = list(data.get("index_valid_keys", INDEX_VALID_KEYS))
    return data["index_valid_keys"]


def select(data: Data, index: Array, who: str) -> Data:
    """Index every per-point array of the sample.

    Args:
        index: rows (m,) or mask (n,).
        who: name of the transform, for messages.

    Raises:
        InputError: when no point is left, when a per-point array has another length than `coord`,
            or when the sample holds an `inverse`, whose rows would then be wrong.
    """
    if "inverse" in data:
        raise InputError(
            f"{who} drops or reorders points after GridSample made `inverse`, which then points to "
            "wrong rows; put it before that GridSample"
        )
    rows = per_point(data, index, who)
    data.update(rows)
    return data


def per_point(data: Data, index: Array, who: str) -> Data:
    """The chosen rows of every per-point array; `data` stays as it is. Raises as `select`."""
    total = len(data["coord"])
    is_mask = index.dtype == bool
    chosen = {}
    for key in valid_keys(data):
        if key in data:
            if len(data[key]) != total:
                raise InputError(
                    f"{who}: {key} of sample {data.get('name', '?')} has {len(data[key])} rows, "
                    f"coord {total}; every key of index_valid_keys needs one row per point"
                )
            chosen[key] = data[key][index] if is_mask else np.take(data[key], index, axis=0)
    if "frame_pcd_offset" in data:
        rows = np.flatnonzero(index) if is_mask else index
        chosen["frame_pcd_offset"] = _frames_of(data["frame_pcd_offset"], rows, total)
    if len(chosen.get("coord", data["coord"])) == 0:
        raise InputError(
            f"{who} leaves no point of sample {data.get('name', '?')} ({total} before); "
            "check its range or ratio against the units of the data"
        )
    return chosen


def _frames_of(frames: Any, rows: Array, total: int) -> dict[int, Array]:
    """The new rows of every sweep; `frames` holds cumulative ends (sweeps,) or the old rows."""
    number = np.full(total, -1)
    if isinstance(frames, Mapping):
        for frame, members in frames.items():
            number[members] = frame
        names = list(frames)
    else:
        number = np.searchsorted(np.asarray(frames), np.arange(total), side="right")
        names = list(range(len(frames)))
    return {frame: np.flatnonzero(number[rows] == frame) for frame in names}


def coord_of(data: Data, who: str) -> Array:
    """The coordinates (n, 3) of a sample, integers as float32.

    Raises:
        InputError: when there are none or their shape is another.
    """
    coord = data.get("coord")
    if coord is None or coord.ndim != 2 or coord.shape[1] != 3 or len(coord) == 0:
        found = "no coord" if coord is None else f"coord of shape {coord.shape}"
        name = data.get("name", "?")
        raise InputError(f"{who}: sample {name} has {found}; expected (n, 3) with n > 0")
    return coord if np.issubdtype(coord.dtype, np.floating) else coord.astype(np.float32)


def bounds(coord: Array) -> tuple[list[Any], list[Any]]:
    """Smallest and largest value per axis, by columns: several times faster than `axis=0` here."""
    columns = [coord[:, axis] for axis in range(3)]
    return [c.min() for c in columns], [c.max() for c in columns]


def moved(coord: Array, shift: Any) -> Array:
    """`coord + shift` for a shift (3,), in the type of `coord`.

    Column by column in double precision: numpy is tens of times slower with a trailing axis of 3 and
    mixed types, and rounding a double sum to float32 is the same as adding in float32.
    """
    result = coord.astype(np.float64)
    for axis in range(3):
        if shift[axis] != 0:
            result[:, axis] += shift[axis]
    return result.astype(coord.dtype, copy=False)


def need(condition: bool, message: str) -> None:
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def box_of(limits: Sequence[float], who: str) -> tuple[Array, Array]:
    """Lower and upper corner (3,) float64 of x, y, z minimum then maximum, in metres."""
    box = np.asarray(limits, dtype=np.float64)
    need(
        box.shape == (6,) and bool((box[:3] < box[3:]).all()),
        f"{who}: point_cloud_range is x, y, z minimum then maximum, got {limits!r}",
    )
    return box[:3], box[3:]


def lookup(data: Mapping[str, Any], key: str, who: str) -> Any:
    """`data[key]`, or an InputError that lists the keys there are."""
    if key not in data:
        raise InputError(f"{who}: the sample has no {key!r}; it has {', '.join(sorted(data))}")
    return data[key]


def ratio_of(value: float, name: str) -> float:
    """`value`, which has to lie in 0..1."""
    need(0 <= value <= 1, f"{name} is in [0, 1], got {value!r}")
    return value


def clear_rows(data: Data, key: str, share: float, p: float) -> Data:
    """Set a random share of the rows of `data[key]` to zero with probability p; no key, no draw."""
    if key in data and random.random() < p:
        values = data[key].copy()
        values[np.random.choice(len(values), int(len(values) * share), replace=False)] = 0
        data[key] = values
    return data
