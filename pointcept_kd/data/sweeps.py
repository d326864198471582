"""Several scans of one drive as one cloud: each is moved by its pose into the frame of a reference scan.

    x_ref = inv(P_ref) P_i x_i        P: sensor (or vehicle) to world, 4 x 4

Poses are float64 throughout: a drive is kilometres from its origin, where float32 resolves millimetres at best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointcept_kd.host import InputError

from .scans import require_choice
from .transforms import INDEX_VALID_KEYS

LABELS = ("all", "reference")


def align(coord: NDArray, pose: ArrayLike, reference: ArrayLike) -> NDArray:
    """Points (n, 3) of a scan with `pose` in the frame of the `reference` pose; the dtype stays.

    Raises:
        InputError: for a pose that is not a finite, invertible 4 x 4 matrix.
    """
    move = np.linalg.inv(_pose(reference, "the reference")) @ _pose(pose, "a scan")
    moved = coord.astype(np.float64, copy=False) @ move[:3, :3].T
    moved += move[:3, 3]
    return moved.astype(coord.dtype, copy=False)


def aggregate(
    scans: Sequence[Mapping[str, Any]],
    poses: Sequence[ArrayLike],
    reference: int = 0,
    labels: str = "all",
    ignore_index: int = -1,
) -> dict[str, Any]:
    """One cloud of several scans, the reference first and untouched, the others in the order given.

    Args:
        scans: each with `coord` (n, 3) and any other per-point arrays, the same in all; `time` may also be one number
            per scan, in seconds from the reference. Other values, such as `name`, are the reference's.
        poses: of the scans, sensor to world (4, 4).
        reference: which of them gives the frame.
        labels: "all", or "reference": points of the other scans get `ignore_index` as their `segment`.
        ignore_index: label of points that have none.

    Returns:
        the reference's entries, per-point arrays joined; `sweep` (n,) int32, 0 for the reference and counting up with
        the others; `time` (n, 1) float32 where given; `index_valid_keys`, so that transforms keep all of these in step.

    Raises:
        InputError: for poses that cannot be used, arrays that one scan has and another lacks, or arrays of different
            width.
    """
    require_choice("labels", labels, LABELS)
    if len(scans) != len(poses) or not 0 <= reference < len(scans):
        raise InputError(
            f"{len(scans)} scans, {len(poses)} poses and reference {reference}; expected one pose for each scan and a "
            "reference among them"
        )
    order = [reference, *(i for i in range(len(scans)) if i != reference)]
    parts = [_timed(scans[i]) for i in order]
    first = parts[0]
    for part, i in zip(parts[1:], order[1:]):
        part["coord"] = align(part["coord"], poses[i], poses[reference])
        if labels == "reference" and "segment" in part:
            part["segment"] = np.full_like(part["segment"], ignore_index)
    result = dict(first)
    for key in _per_point(first):
        result[key] = _joined(parts, key)
    rows = [len(part["coord"]) for part in parts]
    result["sweep"] = np.repeat(np.arange(len(parts), dtype=np.int32), rows)
    listed = [*first.get("index_valid_keys", INDEX_VALID_KEYS), *_per_point(first), "sweep"]
    result["index_valid_keys"] = list(dict.fromkeys(listed))
    return result


def _per_point(scan: Mapping[str, Any]) -> list[str]:
    rows = len(scan["coord"])
    return [
        key
        for key, value in scan.items()
        if isinstance(value, np.ndarray) and value.ndim and len(value) == rows and key != "pose"
    ]


def _timed(scan: Mapping[str, Any]) -> dict[str, Any]:
    part = dict(scan)
    if "time" in part:
        time = np.asarray(part["time"], np.float32).reshape(-1, 1)
        rows = len(part["coord"])
        part["time"] = np.repeat(time, rows, axis=0) if len(time) == 1 else time
    return part


def _joined(parts: Sequence[Mapping[str, Any]], key: str) -> NDArray:
    arrays = []
    for part in parts:
        array, rows = part.get(key), len(part["coord"])
        width = parts[0][key].shape[1:]
        if not isinstance(array, np.ndarray) or array.shape != (rows, *width):
            found = "missing" if array is None else f"of shape {np.shape(array)}"
            raise InputError(
                f"{key} of scan {part.get('name', '?')} is {found}, expected {(rows, *width)} as in "
                f"{parts[0].get('name', 'the reference')}; scans that are merged need the same arrays"
            )
        arrays.append(array)
    return np.concatenate(arrays)


def _pose(pose: ArrayLike, whose: str) -> NDArray:
    matrix = np.asarray(pose, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-6:
        raise InputError(
            f"the pose of {whose} is no finite, invertible 4 x 4 matrix but of shape {matrix.shape}: "
            f"{matrix.reshape(-1)[:4].tolist()} ...; check the file of poses"
        )
    return matrix
