"""Predictions in the formats of the SemanticKITTI and nuScenes servers; see `submissions`, which checks them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

NUSCENES_CLASSES = 16
NUSCENES_META = {
    "use_camera": False,
    "use_lidar": True,
    "use_radar": False,
    "use_map": False,
    "use_external": False,
}


def write_semantic_kitti(
    folder: str | os.PathLike[str], name: str, pred: NDArray, raw_ids: Mapping[int, int]
) -> Path:
    """One scan's prediction as `sequences/SS/predictions/FFFFFF.label` below `folder`.

    Args:
        name: `SS_FFFFFF`.
        pred: (n,) train ids 0 to 18 for the points of the scan in file order; -1 for unlabelled.
        raw_ids: the raw class of each train id and of -1.

    Raises:
        InputError: for another name or class, or a folder that cannot be written.
    """
    sequence, _, frame = name.partition("_")
    if not (sequence.isdigit() and frame.isdigit()):
        raise InputError(
            f"scan {name!r}: expected a name such as 11_000042, sequence and file number"
        )
    ids = np.asarray(pred).reshape(-1).astype(np.int64)
    classes = len(raw_ids) - 1
    _check_classes(ids, -1, classes - 1, name)
    table = np.array([*(raw_ids[i] for i in range(classes)), raw_ids[-1]], "<u4")
    raw = table[ids]  # -1 takes the last entry
    return _write(
        Path(folder, "sequences", sequence, "predictions", f"{frame}.label"), raw.tobytes()
    )


def write_nuscenes(folder: str | os.PathLike[str], split: str, token: str, pred: NDArray) -> Path:
    """One key frame's prediction as `lidarseg/{split}/{token}_lidarseg.bin` below `folder`.

    Args:
        split: train, val, test, or one of the mini splits.
        token: of the LIDAR_TOP sample data.
        pred: (n,) train ids 0 to 15 for the points in file order; written as 1 to 16, since 0 is not allowed.

    Raises:
        InputError: for another class, or a folder that cannot be written.
    """
    ids = np.asarray(pred).reshape(-1).astype(np.int64)
    _check_classes(ids, 0, NUSCENES_CLASSES - 1, token)
    path = Path(folder, "lidarseg", split, f"{token}_lidarseg.bin")
    return _write(path, (ids + 1).astype(np.uint8).tobytes())


def finish_nuscenes(
    folder: str | os.PathLike[str], split: str, meta: Mapping[str, bool] | None = None
) -> Path:
    """Write `{split}/submission.json`, which says what the method used.

    Args:
        meta: changes to LiDAR alone: any of use_camera, use_lidar, use_radar, use_map, use_external.

    Raises:
        InputError: for another key or a value that is not True or False.
    """
    content = {**NUSCENES_META, **(meta or {})}
    problems = meta_problems({"meta": content}, "meta")
    if problems:
        raise InputError(problems[0])
    text = json.dumps({"meta": content}, indent=1).encode()
    return _write(Path(folder, split, "submission.json"), text)


def meta_problems(content: Any, where: str) -> list[str]:
    """What is wrong with the content of a `submission.json`, a line each that begins with `where`."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return [f'{where}: expected {{"meta": {{...}}}}']
    problems = []
    if set(meta) != set(NUSCENES_META):
        problems.append(
            f"{where}: has the keys {', '.join(sorted(meta)) or 'none'}; expected exactly {', '.join(NUSCENES_META)}"
        )
    problems += [
        f"{where}: {key} is {value!r}, expected true or false"
        for key, value in meta.items()
        if type(value) is not bool
    ]
    return problems


def _check_classes(ids: NDArray, low: int, high: int, name: str) -> None:
    wrong = (ids < low) | (ids > high)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"scan {name}: class {int(ids[row])} in row {row} is outside {low}..{high}; "
            "a submission needs a network with the classes of the data set"
        )


def _write(path: Path, data: bytes) -> Path:
    # Not forced to the disk as checkpoints are: every test writes its submission anew.
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def index_of(dataset: Any, name: str) -> int:
    """Position of the scan of that name in a data set.

    Raises:
        InputError: for a name that the data set does not have.
    """
    table = dataset.__dict__.setdefault("_rows_by_name", {})
    if not table:
        table.update({dataset.get_data_name(i): i for i in range(len(dataset.data_list))})
    if name not in table:
        raise InputError(
            f"{name!r} is no scan of this {type(dataset).__name__}, split {dataset.split}"
        )
    return table[name]


def rows_of_file(
    pred: NDArray,
    scan: NDArray,
    path: str | os.PathLike[str],
    dropped: bool,
    merged: bool,
    fill: int,
) -> NDArray:
    """One class per point of a file from the predictions for what a reader made of it.

    Args:
        pred: (n,) classes.
        scan: (m, c) the points of the file.
        path: the file, for messages.
        dropped: the reader leaves out points that are not finite; they get `fill`.
        merged: the reader appends the points of other scans, whose predictions are left out.

    Raises:
        InputError: for another number of predictions.
    """
    finite = np.isfinite(scan).all(1) if dropped else np.ones(len(scan), bool)
    points = int(finite.sum())
    own = pred[:points] if merged else pred
    if len(own) != points:
        raise InputError(
            f"{path}: {len(own)} predictions for {points} points; a submission needs one per raw point: keep all "
            "points in the transforms, let GridSample return and Collect keep `inverse`, or set "
            "test.save_submission=False"
        )
    rows = np.full(len(scan), fill, np.int64)
    rows[finite] = own
    return rows
