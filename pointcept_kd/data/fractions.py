"""Lists of scans and scenes for training on a fraction of the labels, one name a line.

The protocol of SLidR (arXiv:2203.16258) and those after it. nuScenes: of the scenes of the training split, in the order
of the scene table, those at the positions n, 2 n, ... from 1 on, with all their key frames; n = 100, 20, 10, 4 for 1,
5, 10 and 25 %. SemanticKITTI: of all training scans, sorted, those at 0, n, 2 n, ... The lists are in files, so that a
fraction does not hang on the order of a table on somebody's disk. Of the released table only the order matters here:
it is that of the scenes' names, as far as is known.

`PARAMETRIZING` and `VERIFYING` are SLidR's parts of the training scenes: settings are chosen on them, results reported
on the validation split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pointcept_kd.host import InputError
from pointcept_kd.host.dialect import shipped_root

from .nuscenes_tables import official_scenes
from .scans import read_rows

# Percent of the labels to n: every n-th scene or scan.
STEPS = {1: 100, 5: 20, 10: 10, 25: 4, 100: 1}
# What one percent of nothing is: a scene with all classes.
RICHEST_SCENE = "scene-0392"
# Scans of SemanticKITTI's training sequences.
KITTI_SCANS = {
    "00": 4541, "01": 1101, "02": 4661, "03": 801, "04": 271, "05": 2761, "06": 1101, "07": 1101, "09": 1591,
    "10": 1201,
}  # fmt: skip

# 100 of the 700 training scenes: 44 of Singapore, 20 in rain, 12 at night.
_VERIFYING = """
    0008 0009 0019 0029 0032 0042 0045 0049 0052 0054 0056 0066 0067 0073 0131 0152 0166 0168 0183 0190
    0194 0208 0210 0211 0241 0243 0248 0259 0260 0261 0287 0292 0297 0305 0306 0350 0352 0358 0361 0365
    0368 0377 0388 0391 0395 0413 0427 0428 0438 0444 0452 0453 0459 0463 0464 0475 0513 0533 0544 0575
    0587 0589 0642 0652 0658 0669 0678 0687 0701 0703 0706 0710 0715 0726 0735 0740 0758 0786 0790 0804
    0806 0847 0856 0868 0882 0897 0899 0976 0996 1012 1015 1016 1018 1020 1024 1044 1058 1094 1098 1107
"""
VERIFYING = tuple(f"scene-{number}" for number in _VERIFYING.split())
PARAMETRIZING = tuple(sorted(set(official_scenes("train")) - set(VERIFYING)))

T = TypeVar("T")


def nth_scenes(scenes: Sequence[str], step: int) -> list[str]:
    """Scenes at the positions step, 2 step, ... counted from 1; `RICHEST_SCENE` where there are fewer than `step`."""
    _check_step(step)
    return list(scenes[step - 1 :: step]) or [RICHEST_SCENE]


def nth_scans(scans: Iterable[str], step: int) -> list[str]:
    """Of the sorted scans those at 0, step, 2 step, ..."""
    _check_step(step)
    return sorted(scans)[::step]


def _check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise InputError(
            f"step={step!r}: expected a whole number, 1 or more: every step-th is kept"
        )


def nuscenes_scenes(step: int) -> list[str]:
    """The list of nuScenes for every `step`-th training scene."""
    return nth_scenes(sorted(official_scenes("train")), step)


def kitti_scans(step: int) -> list[str]:
    """The list of SemanticKITTI for every `step`-th training scan, `SS_FFFFFF`."""
    return nth_scans((f"{s}_{i:06d}" for s, n in KITTI_SCANS.items() for i in range(n)), step)


def shipped_lists() -> dict[str, tuple[str, list[str]]]:
    """The lists that come with this package: file name to the line about it and its names."""
    lists: dict[str, tuple[str, list[str]]] = {}
    for percent, step in STEPS.items():
        if step > 1:
            lists[f"nuscenes_{percent}pct.txt"] = (
                f"nuScenes, {percent} % of the training scenes: every {step}th in the order of their names, which is "
                "taken for that of the scene table",
                nuscenes_scenes(step),
            )
    lists["nuscenes_parametrizing.txt"] = (
        "nuScenes, training scenes to choose settings with: all but those of verifying",
        list(PARAMETRIZING),
    )
    lists["nuscenes_verifying.txt"] = (
        "nuScenes, training scenes to compare settings on, of SLidR: 44 of Singapore, 20 in rain, 12 at night",
        list(VERIFYING),
    )
    lists["semantic_kitti_1pct.txt"] = (
        "SemanticKITTI, 1 % of the training scans: every 100th, from the first on",
        kitti_scans(STEPS[1]),
    )
    for percent in (1, 10):
        lists[f"sim_{percent}pct.txt"] = (
            f"Simulated streets of the demo, {percent} % of the training scans: every {STEPS[percent]}th of 120",
            nth_scans((f"{s:02d}_{i:06d}" for s in range(6) for i in range(20)), STEPS[percent]),
        )
    return lists


def write_list(path: str | os.PathLike[str], names: Sequence[str], about: str) -> None:
    """Write a list below a line that says what it is."""
    text = "".join(f"{line}\n" for line in (f"# {about}.", *names))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error


def list_path(path: str | os.PathLike[str]) -> Path:
    """Where a list is: at its path, or, for one that begins with `configs/`, among those of this package.

    Raises:
        InputError: where there is none.
    """
    given, shipped = Path(path), shipped_root() / path
    if given.is_file():
        return given
    if given.parts[:1] == ("configs",) and shipped.is_file():
        return shipped
    raise InputError(
        f"{path}: there is no such list of names; python tools/label_fractions.py --write-lists FOLDER makes some"
    )


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """Names of a list; lines that begin with # are remarks.

    Raises:
        InputError: for a list that is missing, empty, or has a name twice.
    """
    found = list_path(path)
    names = [line.strip() for _, line in read_rows(found) if not line.lstrip().startswith("#")]
    if not names:
        raise InputError(f"{found}: no names; expected one a line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{found}: {twice[0]!r} is in it {names.count(twice[0])} times")
    return names


def restrict(
    entries: Sequence[T],
    path: str | os.PathLike[str],
    name_of: Callable[[T], str],
    group_of: Callable[[str], str],
) -> tuple[list[T], int]:
    """The entries that a list names, in their own order, and how many of its names belong to groups without entries.

    Such a group, a sequence or scene, may be left out on this disk or by the reader; a name that is missing from a
    group that is there may not.

    Args:
        name_of: an entry's name, as in the list.
        group_of: the group that a name belongs to.

    Raises:
        InputError: for a name that is missing from its group, and where no entry is left.
    """
    wanted = set(read_list(path))
    kept = [entry for entry in entries if name_of(entry) in wanted]
    there = {name_of(entry) for entry in entries}
    groups = {group_of(name) for name in there}
    missing = sorted(wanted - there)
    lost = [name for name in missing if group_of(name) in groups]
    if lost:
        raise InputError(
            f"{path}: {lost[0]!r} is in the list and not in the data ({len(lost)} such names); the list is of another "
            "data set, or files are missing"
        )
    if not kept:
        raise InputError(
            f"{path}: none of its {len(wanted)} names, {missing[0]!r} the first, is in the data; correct the list or "
            "data_root"
        )
    return kept, len(missing)
