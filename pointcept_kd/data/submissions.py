"""The formats of the SemanticKITTI and nuScenes servers, and checks of their rules.

    SemanticKITTI   sequences/SS/predictions/FFFFFF.label   uint32, raw class ids, one per point of the scan; a zip with
                                                            `sequences/` at its root, sequences 11 to 21
    nuScenes        lidarseg/{split}/{token}_lidarseg.bin   uint8, classes 1 to 16, one per point of the key frame
                    {split}/submission.json                 {"meta": {"use_camera": false, ...}}

http://semantic-kitti.org/tasks.html; https://www.nuscenes.org/lidar-segmentation. Waymo's server takes range images in
protocol buffers instead of point labels; there is no writer for it here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .nuscenes import NuScenesDataset
from .semantic_kitti import LEARNING_MAP, SPLITS
from .submission_files import FileTree, zip_submission
from .submission_writers import NUSCENES_CLASSES, meta_problems

__all__ = [
    "check", "expected_nuscenes", "expected_semantic_kitti", "problems_nuscenes", "problems_semantic_kitti",
    "zip_submission",
]  # fmt: skip

_SHOWN = 5  # lines of one kind of problem; the rest is counted


def _bounded(lines: list[str], what: str) -> list[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"... and {more} more: {what}"]


def _file_problems(
    tree: FileTree,
    paths: Mapping[str, int | None],
    width: int,
    ignored: Callable[[str], bool],
    class_problem: Callable[[NDArray], str | None],
    dtype: str,
) -> list[str]:
    """Missing, surplus, wrongly sized files, and wrong classes; `paths` maps a file to its number of points."""
    missing, surplus, sized, classes = [], [], [], []
    for path, points in paths.items():
        if path not in tree.sizes:
            missing.append(f"{path}: missing")
            continue
        size = tree.sizes[path]
        if size % width or size == 0 or (points is not None and size != width * points):
            expected = (
                f"{width * points} for {points} points" if points is not None else f"{width} each"
            )
            sized.append(
                f"{path}: {size} bytes, expected {expected} ({np.dtype(dtype).name} labels)"
            )
            continue
        problem = class_problem(np.frombuffer(tree.read(path), dtype))
        if problem:
            classes.append(f"{path}: {problem}")
    for path in tree.sizes:
        if path not in paths and not ignored(path):
            surplus.append(f"{path}: belongs to no scan of the data")
    return [
        *_bounded(missing, "missing files"),
        *_bounded(sized, "files of a wrong size"),
        *_bounded(classes, "files with wrong classes"),
        *_bounded(surplus, "files too many"),
    ]


def _first_bad(values: NDArray, bad: NDArray, text: str) -> str | None:
    if not bad.any():
        return None
    row = int(np.argmax(bad))
    return f"{int(values[row])} in row {row} {text} ({int(bad.sum())} such points)"


# -------------------------------------------------------------------------------------- SemanticKITTI


def expected_semantic_kitti(
    data_root: str | os.PathLike[str], sequences: Sequence[str] = SPLITS["test"]
) -> dict[str, int]:
    """Name `SS_FFFFFF` to number of points, of all scans of the sequences below `data_root/dataset/sequences`.

    Raises:
        InputError: for a sequence without scans.
    """
    expected = {}
    for sequence in sequences:
        folder = Path(data_root, "dataset", "sequences", sequence, "velodyne")
        scans = sorted(folder.glob("[!.]*.bin")) if folder.is_dir() else []
        if not scans:
            raise InputError(
                f"{folder}: no scans; the check needs the point counts of sequence {sequence}: give --data-root, the "
                "folder that holds dataset/sequences"
            )
        expected.update({f"{sequence}_{path.stem}": path.stat().st_size // 16 for path in scans})
    return expected


def problems_semantic_kitti(
    folder: str | os.PathLike[str],
    expected: Mapping[str, int] | None = None,
    sequences: Sequence[str] = SPLITS["test"],
) -> list[str]:
    """What SemanticKITTI's server, or its evaluation, would not take.

    Args:
        folder: the folder that holds `sequences/`, or a zip file.
        expected: name `SS_FFFFFF` to number of points; None checks what is there.
        sequences: that must be there; the server wants 11 to 21.

    Returns:
        one line per problem, file first; of one kind at most a few, then their number. Empty: fit for submission.

    Raises:
        InputError: where there is nothing to read.
    """
    tree = FileTree(folder)
    labels = [p for p in tree.sizes if p.startswith("sequences/") and p.endswith(".label")]
    if expected is None:
        wanted: dict[str, int | None] = dict.fromkeys(sorted(labels))
    else:
        parts = [name.partition("_") for name in expected]
        wanted = {
            f"sequences/{sequence}/predictions/{frame}.label": points
            for (sequence, _, frame), points in zip(parts, expected.values())
        }
    problems = []
    for sequence in sequences:
        below = f"sequences/{sequence}/predictions/"
        if not any(label.startswith(below) for label in labels):
            problems.append(f"{below}: no predictions")
    if tree.folders is not None:
        needed = ["sequences/"]
        for sequence in sequences:
            needed += [f"sequences/{sequence}/", f"sequences/{sequence}/predictions/"]
        without = [
            f"{f}: the zip file has no entry for this folder"
            for f in needed
            if f not in tree.folders
        ]
        problems += _bounded(without, "folders without an entry")
        if not str(folder).endswith(".zip"):
            problems.append(f"{folder}: the name must end in .zip")
    known = np.array(sorted(LEARNING_MAP))

    def class_problem(values: NDArray) -> str | None:
        return _first_bad(values, values >> 16 != 0, "has its upper 16 bits set") or _first_bad(
            values, ~np.isin(values, known), "is no raw class id of SemanticKITTI"
        )

    return problems + _file_problems(
        tree, wanted, 4, lambda p: p == "description.txt", class_problem, "<u4"
    )


# ------------------------------------------------------------------------------------------- nuScenes


def expected_nuscenes(dataset: Any) -> dict[str, int]:
    """Token to number of points of a `NuScenesDataset`, from the sizes of its key frames (5 floats a point).

    Raises:
        InputError: for a key frame that is not there.
    """
    expected = {}
    for i in range(len(dataset)):
        path = Path(dataset.scan_path(i))
        try:
            expected[dataset.get_data_name(i)] = path.stat().st_size // 20
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return expected


def problems_nuscenes(
    folder: str | os.PathLike[str], split: str, expected: Mapping[str, int] | None = None
) -> list[str]:
    """What the nuScenes lidarseg server would not take.

    Args:
        folder: the folder that holds `lidarseg/` and `{split}/submission.json`, or a zip file of it.
        split: train, val, test, or one of the mini splits.
        expected: token to number of points; None checks what is there.

    Returns:
        one line per problem, file first; of one kind at most a few, then their number. Empty: fit for submission.

    Raises:
        InputError: where there is nothing to read.
    """
    tree = FileTree(folder)
    below, meta = f"lidarseg/{split}/", f"{split}/submission.json"
    problems = []
    if meta not in tree.sizes:
        problems.append(f"{meta}: missing")
    else:
        try:
            problems += meta_problems(json.loads(tree.read(meta)), meta)
        except ValueError as error:
            problems.append(f"{meta}: not a JSON file ({error})")
    found = [p for p in tree.sizes if p.startswith(below) and p.endswith("_lidarseg.bin")]
    if not found:
        problems.append(f"{below}: no predictions")
    if expected is None:
        wanted: dict[str, int | None] = dict.fromkeys(sorted(found))
    else:
        wanted = {f"{below}{token}_lidarseg.bin": points for token, points in expected.items()}

    def class_problem(values: NDArray) -> str | None:
        return _first_bad(
            values, (values < 1) | (values > NUSCENES_CLASSES), f"is outside 1..{NUSCENES_CLASSES}"
        )

    return problems + _file_problems(tree, wanted, 1, lambda p: p == meta, class_problem, "u1")


def check(
    kind: str,
    folder: str | os.PathLike[str],
    data_root: str | os.PathLike[str] | None = None,
    split: str = "test",
) -> list[str]:
    """The problems of a submission of either kind, with the scans of `data_root` where it is given.

    Raises:
        InputError: for an unknown kind or split, or where there is nothing to read.
    """
    if kind == "nuscenes":
        expected = None
        if data_root is not None:
            # Info files of any number of sweeps list the same key frames.
            known = sorted(Path(data_root, "info").glob(f"nuscenes_infos_*sweeps_{split}.pkl"))
            digits = [path.name.split("_")[2].removesuffix("sweeps") for path in known]
            sweeps = [int(text) for text in digits if text.isdigit()] or [10]
            reader = NuScenesDataset(split=split, data_root=os.fspath(data_root), sweeps=sweeps[0])
            expected = expected_nuscenes(reader)
        return problems_nuscenes(folder, split, expected)
    if kind != "semantic_kitti":
        raise InputError(f"kind {kind!r}: use semantic_kitti or nuscenes")
    sequences = SPLITS.get(split, (split,))
    expected = None if data_root is None else expected_semantic_kitti(data_root, sequences)
    return problems_semantic_kitti(folder, expected, sequences)
