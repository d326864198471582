"""The checker for folders of `.npy`, as `DefaultDataset` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError
from pointcept_kd.host.loader import DefaultDataset

from .findings import Problem, coordinates, rotation, strengths


def check_folders(
    root: Path, pool: ThreadPoolExecutor, num_classes: int | None, ignore_index: int
) -> Iterator[tuple[Path, list[Problem]]]:
    """Every sample folder, then every split file, with its problems; the arguments are those of `check`.

    Raises:
        InputError: for a folder without samples.
    """
    samples, parents = set(), set()
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        if any(name.endswith(".npy") and name[0] != "." for name in names):
            samples.add(Path(folder))
            parents.add(Path(folder).parent)
    # A split is a folder all of whose folders are samples, so an empty one among them is a broken one.
    samples |= {
        f for parent in parents for f in parent.iterdir() if f.is_dir() and f.name[0] != "."
    }
    for parent in parents & samples:  # samples inside samples: what is above them is a split
        if not any(parent.glob("*.npy")):
            samples.discard(parent)
    if not samples:
        raise InputError(f"{root}: no SPLIT/SCAN/coord.npy; see docs/own_data.md for the layout")
    labelled = {sample.parent for sample in samples if (sample / "segment.npy").is_file()}
    one = partial(_sample, labelled=labelled, num_classes=num_classes, ignore_index=ignore_index)
    ordered = sorted(samples)
    yield from zip(ordered, pool.map(one, ordered))
    for path in sorted(root.glob("[!.]*.json")):
        yield path, _split_problems(path, root)


def _sample(
    folder: Path, labelled: Iterable[Path], num_classes: int | None, ignore_index: int
) -> list[Problem]:
    """One folder of arrays."""
    lines: list[Problem] = []
    arrays: dict[str, NDArray] = {}
    for path in sorted(folder.glob("[!.]*.npy")):
        if path.stem not in DefaultDataset.VALID_ASSETS:
            text = f"{path}: nobody reads it, expected {', '.join(DefaultDataset.VALID_ASSETS)}; rename it if it is one"
            lines.append(Problem(text, "name", hint=True))
            continue
        try:
            arrays[path.stem] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            text = getattr(error, "strerror", None) or str(error) or "it ends too early"
            lines.append(
                Problem(f"{path}: not a readable .npy array ({text}); write it again", "unreadable")
            )
    coord = arrays.pop("coord", None)
    path = folder / "coord.npy"
    if coord is None:
        if not os.path.lexists(path):
            lines.append(
                Problem(
                    f"{path}: missing; a scan needs it, write it or remove the folder", "missing"
                )
            )
    elif coord.ndim != 2 or coord.shape[1] != 3 or coord.dtype.kind not in "fiu":
        text = f"{path}: {coord.dtype} of shape {coord.shape}, expected numbers of shape (n, 3); write it again"
        lines.append(Problem(text, "wrong shape"))
        coord = None
    elif not len(coord):
        lines.append(
            Problem(f"{path}: the scan has no points; write it again or remove the folder", "empty")
        )
        coord = None
    else:
        lines += coordinates(path, coord)
    for key, array in arrays.items():
        lines += _asset(folder / f"{key}.npy", array, coord, num_classes, ignore_index)
    if folder.parent in labelled and not os.path.lexists(folder / "segment.npy"):
        path = folder / "segment.npy"
        text = f"{path}: missing, the other scans of {folder.parent.name} have it; its points would be ignored"
        lines.append(Problem(text, "missing"))
    return lines


def _asset(
    path: Path, array: NDArray, coord: NDArray | None, num_classes: int | None, ignore_index: int
) -> list[Problem]:
    key = path.stem
    width = {"strength": 1, "segment": 1, "instance": 1, "color": 3, "normal": 3}.get(key)
    if key == "pose":
        if array.shape != (4, 4) or array.dtype.kind not in "fiu":
            text = f"{path}: {array.dtype} of shape {array.shape}, expected (4, 4) numbers; write it again"
            return [Problem(text, "wrong shape")]
        if not np.isfinite(array).all():
            return [Problem(f"{path}: not finite; write it again", "not finite")]
        text = rotation(array[:3, :3])
        return [Problem(f"{path}: {text}; write it again", "no rotation")] if text else []
    shape = f"(n,) or (n, {width})" if width == 1 else f"(n, {width})"
    if array.dtype.kind not in "fiub" or array.size != (array.shape or (0,))[0] * width:
        text = f"{path}: {array.dtype} of shape {array.shape}, expected numbers of shape {shape}; write it again"
        return [Problem(text, "wrong shape")]
    if coord is not None and len(array) != len(coord):
        text = f"{path}: {len(array)} rows, coord.npy has {len(coord)}, expected one per point; write both again"
        return [Problem(text, "wrong length")]
    values = array.reshape(-1) if width == 1 else array
    if key == "strength" and len(values):
        return strengths(path, values, "hint")
    finite = np.isfinite(values)
    if not finite.all():
        text = f"{path}: {int((~finite).sum())} values are not finite; write it again"
        return [Problem(text, "not finite")]
    return _labels(path, values, num_classes, ignore_index) if key == "segment" else []


def _labels(
    path: Path, values: NDArray, num_classes: int | None, ignore_index: int
) -> list[Problem]:
    if values.dtype.kind == "f" and (values != np.round(values)).any():
        row = int(np.argmax(values != np.round(values)))
        text = f"{path}: row {row} is {values[row]:g}, expected whole numbers, one class per point; write it again"
        return [Problem(text, "unknown class")]
    wrong = values < min(ignore_index, 0)
    allowed = f"{ignore_index} or 0 and above"
    if num_classes is not None:
        wrong = ((values < 0) | (values >= num_classes)) & (values != ignore_index)
        allowed = f"0 to {num_classes - 1}, or {ignore_index} for none"
    if not wrong.any():
        return []
    row = int(np.argmax(wrong))
    text = (
        f"{path}: class {int(values[row])} in row {row} ({int(wrong.sum())} such points), expected {allowed}; "
        "correct the labels, num_classes or ignore_index"
    )
    return [Problem(text, "unknown class")]


def _split_problems(path: Path, root: Path) -> list[Problem]:
    """A JSON file beside the splits. One that is no list of names is something else's."""
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [Problem(f"{path}: not a JSON file ({error}); write it again", "unreadable")]
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return []
    lines, names = [], {}
    if not entries:
        lines.append(Problem(f"{path}: an empty list; name scans such as train/0001", "empty"))
    for row, entry in enumerate(entries):
        name = os.path.basename(os.path.normpath(entry))
        if not (root / entry).is_dir():
            text = (
                f"{path}: entry {row}, {entry!r}, is no folder below {root}; correct or remove it"
            )
            lines.append(Problem(text, "missing"))
        elif name in names:
            text = (
                f"{path}: entry {row}, {entry!r}, has the name of {names[name]!r}, expected one scan per name as "
                "predictions are kept by it; rename a folder or remove the entry"
            )
            lines.append(Problem(text, "duplicate"))
        else:
            names[name] = entry
    return lines
