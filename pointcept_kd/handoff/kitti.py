"""KITTI's detection figures: average precision, what OpenPCDet's logs say of it, and the table of several runs.

Average precision is the mean of the precision at evenly spaced recalls: of 41 samples at recall 0, 1/40 .. 1, R40
leaves out the first, and R11 takes every fourth from the first on. "mAP@40" of image-to-LiDAR papers is the mean of the
3D R40 of Car, Pedestrian and Cyclist, moderate, at overlaps of 0.7, 0.5 and 0.5. R11, which OpenPCDet's own table of
models shows, is another figure.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OVERLAPS = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
LEVELS = ("easy", "moderate", "hard")
VIEWS = ("3d", "bev")
PREFIX = "backbone_3d."

Values = dict[str, dict[str, dict[str, float | None]]]  # class, view, level: percent


def average_precision(samples: Sequence[float], points: int = 40) -> float:
    """Average precision in percent.

    Args:
        samples: 41 precisions, 0 to 1, at recall 0, 1/40 .. 1.
        points: 40 for R40, 11 for R11.

    Raises:
        ValueError: for another number of samples or points, and samples outside 0 to 1.
    """
    if len(samples) != 41:
        raise ValueError(f"{len(samples)} samples of precision: expected 41")
    if any(not 0 <= value <= 1 for value in samples):
        raise ValueError("samples of precision must lie between 0 and 1")
    if points not in (40, 11):
        raise ValueError(f"points={points}: expected 40 or 11")
    used = samples[1:] if points == 40 else samples[::4]
    return 100 * math.fsum(used) / len(used)


def mean_ap(values: Values) -> float | None:
    """mAP@40: mean over the three classes of the moderate 3D values; None where one is not there."""
    parts = [values.get(name, {}).get("3d", {}).get("moderate") for name in OVERLAPS]
    known = [part for part in parts if part is not None]
    return math.fsum(known) / 3 if len(known) == 3 else None


# ------------------------------------------------------------------------------------------ logs


@dataclass
class Evaluation:
    """The figures of one checkpoint; epoch as OpenPCDet names it, ap in percent R40."""

    epoch: str
    ap: Values = field(default_factory=dict)


_EPOCH = re.compile(r"Performance of EPOCH (\S+) \*")
_CLASS = re.compile(r"(\w+) AP(_R40)?@([\d.]+), ([\d.]+), ([\d.]+):")
_VIEW = re.compile(r"^(bbox|bev|3d|aos)\s+AP:([\d.]+|nan), ([\d.]+|nan), ([\d.]+|nan)\s*$")


def read_log(lines: Iterable[str]) -> list[Evaluation]:
    """Every evaluation in a log of OpenPCDet, in its order: R40 at the overlaps of the benchmark."""
    found: list[Evaluation] = []
    name = None
    for line in lines:
        if match := _EPOCH.search(line):
            found.append(Evaluation(match[1]))
            name = None
        elif match := _CLASS.search(line):
            # The same classes follow at easier overlaps, and all of it for R11.
            wanted = match[2] and match[1] in OVERLAPS
            limits = {float(limit) for limit in match.group(3, 4, 5)}
            name = match[1] if wanted and limits == {OVERLAPS[match[1]]} else None
        elif name and found and (match := _VIEW.match(line.strip())) and match[1] in VIEWS:
            numbers = [None if v == "nan" else float(v) for v in match.groups()[1:]]
            found[-1].ap.setdefault(name, {})[match[1]] = dict(zip(LEVELS, numbers))
    return [evaluation for evaluation in found if evaluation.ap]


class LoadWatch:
    """Reads a training's log line by line, up to its start, for what was loaded.

    Args:
        weights: the file that is to be loaded, as given to OpenPCDet; None for a start from nothing.
        expected: entries to be loaded, and entries of the detector.
        complete: whether the file has the whole encoder.

    Attributes:
        loaded: the right number has been loaded.
        started: training has begun; what follows is not looked at.
    """

    def __init__(
        self, weights: str | None, expected: tuple[int, int] = (0, 0), complete: bool = True
    ) -> None:
        self.weights, self.expected, self.complete = weights, expected, complete
        self.loaded = self.started = False
        self._left: list[str] = []

    def feed(self, line: str) -> str | None:
        """What is wrong, as one line; None where nothing is."""
        if self.started:
            return None
        if match := re.search(r"Loading parameters from checkpoint (.+) to [CG]PU", line):
            if match[1] != self.weights:
                instead = "over the given weights" if self.weights else "into a start from nothing"
                return f"OpenPCDet loads {match[1]} {instead}: the run's folder is not fresh, choose another tag"
        elif match := re.search(rf"Not updated weight ({re.escape(PREFIX)}\S+?):", line):
            self._left.append(match[1])
        elif match := re.search(r"Done \(loaded (\d+)/(\d+)\)", line):
            return self._count(int(match[1]), int(match[2]))
        elif "Start training " in line:
            self.started = True
            return self.missing()
        return None

    def _count(self, loaded: int, total: int) -> str | None:
        wanted = "/".join(map(str, self.expected))
        left = f"; not updated: {', '.join(self._left[:3])}" if self._left else ""
        if (loaded, total) != self.expected:
            return f"OpenPCDet loaded {loaded}/{total} entries and not {wanted}{left}"
        if self._left and self.complete:
            return f"OpenPCDet loaded {loaded}/{total} entries, but others than the encoder's{left}"
        self.loaded = True
        return None

    def missing(self) -> str | None:
        """What is wrong once there is nothing more to come before training."""
        if self.weights and not self.loaded:
            return "OpenPCDet trains without having loaded the weights: its log has no line 'loaded N/M' for them"
        return None


# ------------------------------------------------------------------------------------------ tables


def flat(values: Values) -> dict[str, float]:
    """`{"Car_3d/moderate": percent}`, with `mAP@40` where it can be had."""
    out = {
        f"{name}_{view}/{level}": value
        for name, views in values.items()
        for view, levels in views.items()
        for level, value in levels.items()
        if value is not None
    }
    overall = mean_ap(values)
    return out if overall is None else {**out, "mAP@40": overall}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and best of runs.

    Args:
        runs: each with `tag`, and `ap` as `Evaluation` has it.

    Returns:
        `runs`, how many; `mean` and `std` by figure, of those that every run has, std None for one run; `best`: tag and
        figures of the run with the largest mAP@40, or without one of the largest `Car_3d/moderate`.

    Raises:
        ValueError: for no runs.
    """
    if not runs:
        raise ValueError("there are no runs to summarise")
    rows = [flat(run["ap"]) for run in runs]
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    by = next((key for key in ("mAP@40", "Car_3d/moderate") if key in shared), None)
    best = max(range(len(rows)), key=lambda i: rows[i][by]) if by else None
    return {
        "runs": len(rows),
        "mean": {key: statistics.fmean(row[key] for row in rows) for key in shared},
        "std": {
            key: statistics.stdev(row[key] for row in rows) if len(rows) > 1 else None
            for key in shared
        },
        "best": None if best is None else {"tag": runs[best]["tag"], "by": by, "ap": rows[best]},
    }


def table(runs: Sequence[Mapping[str, Any]], title: str) -> str:
    """Markdown: R40 of every run, their mean and deviation, and the best one."""
    whole = summarise(runs)
    names = [name for name in OVERLAPS if any(name in run["ap"] for run in runs)]
    parts = [
        f"# {title}",
        "",
        "AP_R40 in percent, easy / moderate / hard; mAP@40: mean of 3D moderate.",
    ]

    def triple(row: Mapping[str, Any], name: str, view: str) -> str:
        keys = [f"{name}_{view}/{level}" for level in LEVELS]
        return " / ".join("-" if row.get(key) is None else f"{row[key]:.2f}" for key in keys)

    for view in VIEWS:
        last = view == "3d"
        head = [f"{view}", *names, *(["mAP@40"] if last else [])]
        parts += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        rows = [(str(run["tag"]), flat(run["ap"])) for run in runs]
        rows += [("mean", whole["mean"]), ("std", whole["std"])] if len(runs) > 1 else []
        if len(runs) > 1 and whole["best"]:
            rows.append((f"best ({whole['best']['tag']})", whole["best"]["ap"]))
        for label, row in rows:
            cells = [label, *(triple(row, name, view) for name in names)]
            if last:
                cells.append("-" if row.get("mAP@40") is None else f"{row['mAP@40']:.2f}")
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"
