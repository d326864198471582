"""How well backbones learn from a fraction of the labels: linear probing and fine-tuning, as a table.

    python tools/label_fractions.py --pretrained olivine=exp/sim_tiny/pretrain_olivine/model/model_last.pth
    python tools/label_fractions.py --family nuscenes --pretrained slidr=a.pth ppkt=b.pth --modes finetune --seeds 0
    python tools/label_fractions.py --write-lists my_lists --family nuscenes --data-root data/nuscenes

Every backbone, and one of random weights, is trained once per mode, fraction and seed, by the configs of
configs/finetune; the last checkpoint of each run is scored on the validation scans, and OUT/label_fractions.md and
OUT/label_fractions.json are written. What is finished is kept, what was interrupted goes on. A mode without a config at
a fraction is left out: on nuScenes a probe takes all labels, as published.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pointcept_kd.data import fractions, workers
from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset
from pointcept_kd.host import InputError
from pointcept_kd.host.dialect import parse_options
from pointcept_kd.host.runtime import device_of, read_config, run_tool
from tools import ablate, benchmark, demo, report

TABLE = "label_fractions"
RANDOM = "random"
MODES = ("probe", "finetune")
SEED = "{seed}"


@dataclass(frozen=True)
class Family:
    """The configs of a data set.

    Attributes:
        stem: what the names of its configs for fine-tuning have in common, with a place for the start and the percent.
        fractions: percents that have one.
        probes: configs of linear probing by percent.
    """

    stem: str
    fractions: tuple[int, ...]
    probes: Mapping[int, str]

    def config(self, mode: str, start: str, percent: int) -> str | None:
        """The config of a cell; None where there is none."""
        if mode == "probe":
            return self.probes.get(percent)
        kind = "0-random" if start == RANDOM else "1-pretrained"
        return self.stem.format(kind, percent) if percent in self.fractions else None

    def percents(self) -> list[int]:
        """All that any mode has."""
        return sorted({*self.fractions, *self.probes})


_TINY, _LARGE = "configs/finetune/semseg-sr-unet-", "configs/finetune/semseg-sr-unet34-"
FAMILIES = {
    "tiny": Family(
        f"{_TINY}{{}}_{{}}pct_tiny.py",
        (1, 10, 100),
        {percent: f"{_TINY}2-probe_{percent}pct_tiny.py" for percent in (1, 10, 100)},
    ),
    "nuscenes": Family(
        f"{_LARGE}{{}}_nuscenes_{{}}pct.py", (1, 5, 10, 25, 100), {100: f"{_LARGE}2-probe_nuscenes.py"}
    ),
    "semantic_kitti": Family(f"{_LARGE}{{}}_semantic_kitti_{{}}pct.py", (1,), {}),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One entry of the table: where the backbone is from, what is done with it, and with which share of labels."""

    start: str
    mode: str
    percent: int

    def __str__(self) -> str:
        return f"{self.start}, {self.mode}, {self.percent} %"


class Grid(ablate.Plan):
    """The trainings of a table: per cell one step for every seed.

    Args:
        out: folder of all runs.
        family: whose configs.
        pretrained: checkpoints by name; `{seed}` in a path becomes the seed of the run.
        percents, modes, seeds: what to train.
        data: root of the data set in place of the configs' own.
        extra: config keys to change in all trainings.

    Raises:
        InputError: for a config, checkpoint or option that cannot be used, and where no cell has a config.
    """

    def __init__(
        self,
        out: Path,
        family: Family,
        pretrained: Mapping[str, str],
        percents: Sequence[int],
        modes: Sequence[str],
        seeds: Sequence[int],
        data: Path | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.seeds, self.data, self.extra = out, seeds, data, dict(extra or {})
        self.teachers, self.teacher_weight = [], None
        self._scans = "" if data is None else demo.scans_digest(data)
        self.cells: dict[Cell, list[demo.Step]] = {}
        for mode in modes:
            for percent in percents:
                for start in (RANDOM, *pretrained):
                    config = family.config(mode, start, percent)
                    if config is None:
                        continue
                    cell = Cell(start, mode, percent)
                    self.cells[cell] = [
                        self._run_of(cell, config, seed, pretrained.get(start)) for seed in seeds
                    ]
        if not self.cells:
            known = {"fine-tuning": family.fractions, "probing": tuple(family.probes)}
            there = "; ".join(
                f"{name} has {', '.join(map(str, has)) + ' %' if has else 'none'}"
                for name, has in known.items()
            )
            raise InputError(
                f"no config for {' and '.join(modes)} at {', '.join(map(str, percents))} %: {there}"
            )
        # What the remarks and the collection of an ablation go by.
        self.students = {str(cell): steps for cell, steps in self.cells.items()}

    def _run_of(self, cell: Cell, config: str, seed: int, pretrained: str | None) -> demo.Step:
        own, known = {}, _names_of(config, self.extra)
        if pretrained is not None:
            path = Path(pretrained.replace(SEED, str(seed)))
            own, known = {"weight": str(path)}, ablate._file_digest(path) + known
        folder = f"{cell.mode}_{cell.percent}pct_{ablate._slug(cell.start)}"
        return self._step(str(cell), config, self.out / f"seed_{seed}" / folder, seed, known, **own)


def _names_of(config: str, extra: Mapping[str, Any]) -> str:
    """The list that a config's training scans are restricted to, as text."""
    train = read_config(config, extra)["data"]["train"]
    lists = [train[key] for key in ("scans", "scenes") if train.get(key)]
    return "".join("\n".join(fractions.read_list(path)) for path in lists)


class Caller:
    """Runs several trainings at a time, each on its share of the cores, and ends them when the tool is ended."""

    def __init__(self, jobs: int) -> None:
        threads = max(1, workers.usable_cores() // jobs)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, command: Sequence[str]) -> int:
        """Run a tool of this checkout; what it writes is shown where it fails. Returns its exit code."""
        words = [sys.executable, str(demo.ROOT / command[0]), *command[1:]]
        with self._lock:
            if self._stopped:
                return 130
            process = subprocess.Popen(
                words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self._running.add(process)
        try:
            output, _ = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            print(output.decode(errors="replace")[-3000:], file=sys.stderr, flush=True)
        return process.returncode

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """End what is running when the block is left by an exception."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._stopped = True
                for process in self._running:
                    process.terminate()
            raise


def run_all(steps: Sequence[demo.Step], jobs: int) -> None:
    """Train all steps, `jobs` at a time.

    Raises:
        InputError: of the first step that fails; those that run beside it are ended, and go on by the next call.
    """
    titles = [
        f"[{number}/{len(steps)}] {step.label}, seed {step.options['seed']}"
        for number, step in enumerate(steps, start=1)
    ]
    if jobs == 1:
        for step, title in zip(steps, titles):
            demo.run_step(step, title)
        return
    caller = Caller(jobs)
    with ThreadPoolExecutor(jobs) as pool, caller.ended():
        futures = [
            pool.submit(demo.run_step, step, title, caller) for step, title in zip(steps, titles)
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def collect(grid: Grid) -> list[dict[str, Any]]:
    """One entry per cell: scores by seed, their spread, and what they gain over random weights, seed by seed."""
    rows = []
    for cell, row in zip(grid.cells, ablate.collect(grid)):
        alone = grid.cells[Cell(RANDOM, cell.mode, cell.percent)]
        gains = [a - step.metrics()["mIoU"] for a, step in zip(row["miou"], alone)]
        row.update(weights=cell.start, mode=cell.mode, percent=cell.percent, gains=gains)
        weights = [step.options.get("weight") for step in grid.cells[cell]]
        row.update(gain=report.spread(gains), checkpoints=weights)
        rows.append(row)
    return rows


def markdown(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], remarks: Sequence[str]
) -> str:
    """The table of means, that of all runs, and what a reader of them must know."""

    def score(value: float) -> str:
        return f"{100 * value:.1f}"

    several = len(seeds) > 1
    columns = list(dict.fromkeys((row["mode"], row["percent"]) for row in rows))
    by_cell = {(row["weights"], (row["mode"], row["percent"])): row for row in rows}
    header = ["weights", *(f"{mode}, {percent} %" for mode, percent in columns)]
    lines = [header, ["---"] * len(header)]
    for start in dict.fromkeys(row["weights"] for row in rows):
        cells = [by_cell[start, column]["spread"] for column in columns]
        lines.append(
            [start, *(score(c["mean"]) + f" ± {score(c['std'])}" * several for c in cells)]
        )
    for start in dict.fromkeys(row["weights"] for row in rows if row["weights"] != RANDOM):
        cells = [by_cell[start, column]["gain"] for column in columns]
        gains = [report.points(c["mean"]) + f" ± {score(c['std'])}" * several for c in cells]
        lines.append([f"{start} - {RANDOM}", *gains])
    runs = [["weights", "mode", "labels", *(f"seed {seed}" for seed in seeds)]]
    runs.append(["---"] * len(runs[0]))
    for row in rows:
        runs.append([row["weights"], row["mode"], f"{row['percent']} %", *map(score, row["miou"])])
    tables = (
        "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        for table in (lines, *[runs] * several)
    )
    return "\n\n".join([*tables, "\n".join(remarks)]) + "\n"


def parse_pretrained(texts: Sequence[str]) -> dict[str, str]:
    """Name to checkpoint, or to a pattern of such, from `NAME=CHECKPOINT`.

    Raises:
        InputError: for a name that is empty, occurs twice or is `random`, and a file that is not there.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, path = (part.strip() for part in text.partition("="))
        if not name or not path or ablate._slug(name) in {RANDOM, *map(ablate._slug, found)}:
            raise InputError(
                f"--pretrained {text}: give every checkpoint a name of its own other than {RANDOM!r}, NAME=CHECKPOINT"
            )
        found[name] = path
    return found


def write_lists(folder: Path, family: str, data: Path | None) -> list[Path]:
    """Write lists of names into a folder: the shipped ones, or those of the data at hand.

    nuScenes' are then in the order of its scene table.

    Raises:
        InputError: for data without scans or a usable table.
    """
    if data is None:
        lists = fractions.shipped_lists()
    elif family == "nuscenes":
        path = data / "raw" / "v1.0-trainval" / "scene.json"
        try:
            names = [record["name"] for record in json.loads(path.read_bytes())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: cannot be read as the table of scenes ({error})") from error
        train = set(fractions.nuscenes_scenes(1))
        names = [name for name in names if name in train]
        lists = {
            f"nuscenes_{percent}pct.txt": (
                f"nuScenes, {percent} % of the training scenes: every {step}th in the order of {path}",
                fractions.nth_scenes(names, step),
            )
            for percent, step in fractions.STEPS.items()
        }
    else:
        reader = SemanticKITTIDataset("train", str(data))
        names = [reader.get_data_name(i) for i in range(len(reader))]
        short = {"tiny": "sim"}.get(family, family)
        lists = {
            f"{short}_{percent}pct.txt": (
                f"{percent} % of the training scans of {data}: every {step}th from the first on",
                fractions.nth_scans(names, step),
            )
            for percent, step in fractions.STEPS.items()
        }
    for name, (about, names) in lists.items():
        fractions.write_list(folder / name, names, about)
    return [folder / name for name in lists]


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="tiny", help="whose configs (default tiny)")
    add(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="backbones to compare with random weights; {seed} in CHECKPOINT becomes the seed of each run",
    )
    add(
        "--fractions",
        type=int,
        nargs="+",
        metavar="PERCENT",
        help="default: all that the family has",
    )
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds (default 0 1 2)"
    )
    add(
        "--out",
        type=Path,
        help="folder to write to (default exp/label_fractions/FAMILY)",
    )
    add(
        "--data-root",
        type=Path,
        help="folder of the data set; of the tiny family data/sim, simulated where there is none",
    )
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change in all trainings",
    )
    add(
        "--write-lists",
        type=Path,
        metavar="FOLDER",
        help="write the lists of scenes and scans, with --data-root those of the data there, and stop",
    )
    return parser


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The options of all trainings, once the arguments are found to be usable."""
    for name in ("seeds", "fractions", "modes"):
        values = getattr(args, name) or []
        if len(set(values)) != len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: give each once")
    if min(args.seeds) < 0 or args.jobs < 1:
        raise InputError(
            f"--seeds {min(args.seeds)}, --jobs {args.jobs}: seeds are 0 or more, jobs 1 or more"
        )
    extra = parse_options(args.options)
    taken = [k for k in extra if k in ("seed", "save_path", "weight") or k.endswith("data_root")]
    if taken:
        raise InputError(
            f"--options {taken[0]}: set here; use --seeds, --out, --pretrained and --data-root"
        )
    return extra


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and write the table."""
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="replace")
    args = build_arguments().parse_args(argv)
    if args.write_lists is not None:
        for path in write_lists(args.write_lists, args.family, args.data_root):
            print(path)
        return
    extra, family, data = _checked(args), FAMILIES[args.family], args.data_root
    out = args.out or Path("exp") / TABLE / args.family
    pretrained = parse_pretrained(args.pretrained)
    if args.family == "tiny":
        data = data or Path("data/sim")

    def make_grid() -> Grid:
        percents = args.fractions or family.percents()
        return Grid(out, family, pretrained, percents, args.modes, args.seeds, data, extra)

    # Before the work, not after it: configs, checkpoints and options are read here.
    grid = make_grid()
    if args.family == "tiny" and not (data / "dataset").is_dir():
        demo.prepare_streets(data)
        grid = make_grid()  # runs are known by their scans
    steps = grid.steps()
    run_all(steps, args.jobs)

    rows = collect(grid)
    made = benchmark.environment(device_of(read_config(steps[-1].config, steps[-1].options)))
    command = demo.shown(["tools/label_fractions.py", *(sys.argv[1:] if argv is None else argv)])
    remarks = [
        *ablate.remarks_of(grid, command, made),
        *(f"{name}: {path}." for name, path in pretrained.items()),
    ]
    text = markdown(rows, args.seeds, remarks)
    content = {
        "family": args.family,
        "seeds": list(args.seeds),
        "cells": rows,
        "pretrained": pretrained,
        "remarks": remarks,
        "command": command,
        "commands": [demo.shown(step.command()) for step in steps],
        "environment": made,
    }
    for path, written in (
        (out / f"{TABLE}.json", json.dumps(content, indent=1, allow_nan=False) + "\n"),
        (out / f"{TABLE}.md", text),
    ):
        try:
            report.write_text(path, written)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another --out"
            ) from error
    print(f"\n{text}\n{out / TABLE}.md\n{out / TABLE}.json")
    print(f"Done in {report.duration(time.perf_counter() - start)}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, demo._stop)
    sys.exit(run_tool(main))
