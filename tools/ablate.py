"""Train the same student by several configs and seeds, and write the table of their scores.

    python tools/ablate.py
    python tools/ablate.py --seeds 0 1 2 --rows alone=configs/sim/semseg-pt-v3m1-1-student_tiny.py all=mine.py
    python tools/ablate.py --data-root path/to/nuscenes --rows a.py b.py --teacher-weight ptv3_nuscenes.pth

By default: the student without a teacher, with the teacher's class scores, with gradient-guided maps or topology beside
them, and with all of it, on the simulated streets at the size of the demo, which are made where they are missing. A
teacher is trained once, with the first seed; every row once per seed. The last checkpoint of each run is scored on the
validation scans, and OUT/ablation.md and OUT/ablation.json are written. What is finished is kept, what was interrupted
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pointcept_kd.host import InputError
from pointcept_kd.host.dialect import parse_options
from pointcept_kd.host.metrics import class_names
from pointcept_kd.host.runtime import device_of, read_config, run_tool
from tools import benchmark, demo, report
from tools.train import teachers_of

KD = "configs/kd/ptv3_to_student_tiny"
ROWS = {
    "student alone": "configs/sim/semseg-pt-v3m1-1-student_tiny.py",
    "logits": f"{KD}_logits.py",
    "logits + gradient": f"{KD}_gradient.py",
    "logits + topology": f"{KD}_topology.py",
    "all four": f"{KD}_recommended.py",
}
TABLE = "ablation"


def parse_rows(texts: Sequence[str]) -> dict[str, str]:
    """Label to config from `LABEL=CONFIG` or `CONFIG`, whose label is the file's name.

    Raises:
        InputError: for a label that is empty or occurs twice.
    """
    rows: dict[str, str] = {}
    for text in texts:
        label, equals, config = text.partition("=")
        if not equals:
            label, config = Path(text).stem, text
        if not label.strip() or label in rows:
            raise InputError(
                f"--rows {text}: give every row a label of its own, as in LABEL=CONFIG"
            )
        rows[label.strip()] = config
    return rows


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") or "row"


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


class Plan:
    """Which trainings an ablation consists of.

    Args:
        out: folder of all runs.
        rows: label to config; the first row is what the others are compared with.
        seeds: of the students; the teachers have the first.
        data: root of the data set in place of the configs' own.
        extra: config keys to change in all trainings.
        teacher_weight: checkpoint to use in place of training a teacher.

    Attributes:
        teachers: the teachers to train.
        students: for every row its steps, one per seed.

    Raises:
        InputError: for a config or an option that cannot be used here.
    """

    def __init__(
        self,
        out: Path,
        rows: Mapping[str, str],
        seeds: Sequence[int],
        data: Path | None = None,
        extra: Mapping[str, Any] | None = None,
        teacher_weight: Path | None = None,
    ) -> None:
        self.out, self.seeds, self.data, self.extra = out, seeds, data, dict(extra or {})
        self.teacher_weight = teacher_weight
        self._scans = "" if data is None else demo.scans_digest(data)
        self._weight = "" if teacher_weight is None else _file_digest(teacher_weight)
        self._teachers: dict[Path, demo.Step] = {}
        folders = [_slug(label) for label in rows]
        if len(set(folders)) < len(folders):
            raise InputError(f"--rows: the labels {', '.join(rows)} differ by signs alone")
        self.students = {label: self._row(label, config) for label, config in rows.items()}
        self.teachers = list(self._teachers.values())

    def _step(
        self, label: str, config: str, folder: Path, seed: int, known: str = "", **own: Any
    ) -> demo.Step:
        roots = {
            f"data.{name}.data_root": str(self.data)
            for name, split in (read_config(config).get("data") or {}).items()
            if self.data is not None and isinstance(split, Mapping) and "data_root" in split
        }
        options = {**roots, **own, **self.extra}
        return demo.make_step(label, config, folder, seed, options, self._scans + known)

    def _row(self, label: str, config: str) -> list[demo.Step]:
        own, known = {}, ""
        model = read_config(config).get("model")
        for name, entry in teachers_of(model).items():
            only = entry is model["teacher"]
            key = "model.teacher.weight" if only else f"model.teacher.{name}.weight"
            if self.teacher_weight is not None:
                own[key], known = str(self.teacher_weight), self._weight
            elif entry.get("train_if_missing") and entry.get("config"):
                teacher = self._teacher(entry["config"])
                own[key] = str(teacher.folder / demo.LAST)
                known += teacher.fingerprint
        return [
            self._step(label, config, self.out / f"seed_{seed}" / _slug(label), seed, known, **own)
            for seed in self.seeds
        ]

    def _teacher(self, config: str) -> demo.Step:
        path = Path(read_config(config).filename).resolve()
        if path not in self._teachers:
            folder = self.out / "teachers" / path.stem
            self._teachers[path] = self._step("Teacher", config, folder, self.seeds[0])
        return self._teachers[path]

    def steps(self) -> list[demo.Step]:
        """All trainings in their order: the teachers, then seed by seed every row."""
        return [*self.teachers, *(step for group in zip(*self.students.values()) for step in group)]


def collect(plan: Plan) -> list[dict[str, Any]]:
    """One entry per row: scores by seed, their spread, and what it gained over the first row, seed by seed."""
    rows: list[dict[str, Any]] = []
    for label, steps in plan.students.items():
        metrics = [step.metrics() for step in steps]
        scores = [m["mIoU"] for m in metrics]
        names = class_names(read_config(steps[0].config, steps[0].options)["data"])
        first = rows[0]["miou"] if rows else scores
        gains = [score - alone for score, alone in zip(scores, first)]
        rows.append(
            {
                "label": label,
                "config": steps[0].config,
                "miou": scores,
                "spread": report.spread(scores),
                "gains": gains,
                "gain": report.spread(gains),
                "iou": dict(zip(names, demo.merged_iou(metrics, names))),
                "seconds": [step.state().get("seconds") for step in steps],
            }
        )
    return rows


def markdown(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], remarks: Sequence[str]
) -> str:
    """The table and what a reader of it must know."""

    def score(value: float) -> str:
        return f"{100 * value:.1f}"

    several = len(seeds) > 1
    header = ["row", *(f"seed {seed}" for seed in seeds)]
    header += ["mean", "sd", "smallest to largest"] * several
    header += [f"gain over {rows[0]['label']}", *["sd of the gain"] * several]
    lines = [header, ["---"] * len(header)]
    for number, row in enumerate(rows):
        spread, gain = row["spread"], row["gain"]
        cells = [row["label"], *map(score, row["miou"])]
        if several:
            ends = f"{score(spread['min'])} to {score(spread['max'])}"
            cells += [score(spread["mean"]), score(spread["std"]), ends]
        cells += [report.points(gain["mean"]) if number else ""]
        cells += [score(gain["std"]) if number else ""] * several
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n" + "\n".join(remarks) + "\n"


def remarks_of(plan: Plan, command: str, made: Mapping[str, Any]) -> list[str]:
    """How the numbers came about."""
    steps = plan.steps()
    commits = sorted({step.state().get("commit") or "unknown" for step in steps})
    spent = sum(step.state().get("seconds") or 0 for step in steps)
    metrics = next(iter(plan.students.values()))[0].metrics()
    absent = [name for name, entry in metrics["classes"].items() if not entry["present"]]
    where = made["gpu"] or f"{made['cpu']}, {made['cores']} cores"
    lines = [
        f"`{command}`, commit {', '.join(commits)}, {where}, PyTorch {made['torch']}, {made['date'][:10]}; "
        f"trainings took {report.duration(spent)} in all.",
        f"mIoU in percent over {len(metrics['classes'])} classes at raw points, last checkpoint, {metrics['scans']} "
        "scans" + (f"; {', '.join(absent)} did not occur and count 0." if absent else "."),
    ]
    if plan.teachers:
        scores = ", ".join(f"{100 * step.metrics()['mIoU']:.1f}" for step in plan.teachers)
        lines.append(f"Teacher: {scores}, trained once, with seed {plan.seeds[0]}.")
    if plan.teacher_weight is not None:
        lines.append(f"Teacher: {plan.teacher_weight}.")
    if len(plan.seeds) == 1:
        lines.append("One seed: a difference of a point or two can be luck.")
    else:
        lines.append("sd: sample standard deviation over seeds; gains are taken seed by seed.")
    return lines


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
    add(
        "--rows",
        nargs="+",
        metavar="[LABEL=]CONFIG",
        help="configs to compare, the first one with the others",
    )
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds (default 0 1 2)"
    )
    add(
        "--out",
        type=Path,
        default=Path("exp/ablation"),
        help="folder to write to (default exp/ablation)",
    )
    add(
        "--data-root",
        type=Path,
        help="folder of the data set; for the default rows data/sim, simulated where there is none",
    )
    add("--teacher-weight", type=Path, help="checkpoint of the teacher, in place of training it")
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change in all trainings, for example epoch=2 eval_epoch=2",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and write the table."""
    start = time.perf_counter()
    sys.stdout.reconfigure(errors="replace")
    args = build_arguments().parse_args(argv)
    seeds, data = args.seeds, args.data_root
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(
            f"--seeds {' '.join(map(str, seeds))}: give different whole numbers, 0 or more"
        )
    extra = parse_options(args.options)
    taken = [k for k in extra if k in ("seed", "save_path") or k.endswith("data_root")]
    if taken:
        raise InputError(f"--options {taken[0]}: set here; use --seeds, --out and --data-root")
    rows = ROWS if args.rows is None else parse_rows(args.rows)
    if args.rows is None:
        data = data or Path("data/sim")

    def make_plan() -> Plan:
        return Plan(args.out, rows, seeds, data, extra, args.teacher_weight)

    # Before the work, not after it: configs and options are read here.
    plan = make_plan()
    if args.rows is None:
        demo.prepare_streets(data)
        plan = make_plan()  # runs are known by their scans
    steps = plan.steps()
    for number, step in enumerate(steps, start=1):
        seed = f", seed {step.options['seed']}"
        demo.run_step(step, f"[{number}/{len(steps)}] {step.label}{seed}")

    table = collect(plan)
    first = steps[-1]
    made = benchmark.environment(device_of(read_config(first.config, first.options)))
    command = demo.shown(["tools/ablate.py", *(sys.argv[1:] if argv is None else argv)])
    remarks = remarks_of(plan, command, made)
    text = markdown(table, seeds, remarks)
    content = {
        "seeds": list(seeds),
        "rows": table,
        "teachers": [
            {"config": step.config, "miou": step.metrics()["mIoU"]} for step in plan.teachers
        ],
        "remarks": remarks,
        "command": command,
        "commands": [demo.shown(step.command()) for step in steps],
        "environment": made,
    }
    for path, written in (
        (args.out / f"{TABLE}.json", json.dumps(content, indent=1, allow_nan=False) + "\n"),
        (args.out / f"{TABLE}.md", text),
    ):
        try:
            report.write_text(path, written)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another --out"
            ) from error
    print(f"\n{text}\n{args.out / TABLE}.md\n{args.out / TABLE}.json")
    print(f"Done in {report.duration(time.perf_counter() - start)}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, demo._stop)
    sys.exit(run_tool(main))
