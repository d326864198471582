"""From nothing to a distilled student and its report: what `make demo` runs.

    python tools/demo.py
    python tools/demo.py --seeds 0 1 2
    python tools/demo.py --out exp/quick --options epoch=2 eval_epoch=2

Simulates streets, trains a teacher, a small student alone and the same student with the teacher's help, scores the
last checkpoint of each on the validation sequence, and writes OUT/results.json and OUT/report.html. What is finished is
kept, what was interrupted goes on; so a second call takes seconds. The teacher is trained once, with the first seed;
the two students once per seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from pointcept_kd.data import synthetic, workers
from pointcept_kd.data.semantic_kitti import COLORS
from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.dialect import parse_options
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.metrics import class_names
from pointcept_kd.host.runtime import device_of, read_config, run_tool
from tools import benchmark, report

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "configs/sim/semseg-pt-v3m1-0-base_tiny.py"
ALONE = "configs/sim/semseg-pt-v3m1-1-student_tiny.py"
DISTILLED = "configs/kd/ptv3_to_student_tiny.py"
LABELS = ("Teacher", "Student alone", "Distilled student")
LAST = "model/model_last.pth"
STATE = "demo.json"
REPEATS = 20


@dataclass
class Step:
    """One training run.

    Attributes:
        label: the network, as tables call it.
        config: path of its config, relative to the checkout.
        folder: its save_path.
        options: config keys that differ from the file.
        after: the step whose result it needs.
    """

    label: str
    config: str
    folder: Path
    options: dict[str, Any]
    after: Step | None = None
    fingerprint: str = field(default="", repr=False)

    def command(self, resume: bool = False) -> list[str]:
        """The command line that trains and tests it."""
        words = [f"{key}={_quoted(key, value)}" for key, value in self.options.items()]
        return [
            "tools/train.py", "--config-file", self.config, *["--resume"] * resume, "--options", *words
        ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What is known about the run in its folder; empty where there is none."""
        return _read_json(self.folder / STATE)

    def metrics(self) -> dict[str, Any]:
        """The scores of its last checkpoint."""
        return _read_json(self.folder / "result" / "metrics.json")

    def finished(self) -> bool:
        """Whether a finished result of exactly these settings is there."""
        state = self.state()
        return (
            state.get("fingerprint") == self.fingerprint
            and bool(state.get("finished"))
            and bool(self.metrics())
            and (self.folder / LAST).is_file()
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _quoted(key: str, value: Any) -> str:
    """An option's value as text that reads back as the same value."""
    text = str(value)
    try:
        same = parse_options([f"{key}={text}"])[key] == value
    except InputError:  # brackets that do not match
        same = False
    return text if same else f"'{text}'"


def shown(command: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", *command])


def prepare_streets(folder: Path) -> str:
    """Simulate the demo's streets unless the folder holds scans already; returns the command that does it."""
    plan, card = synthetic.PRESETS["demo"], _read_json(folder / "dataset.json")
    command = ["tools/prepare_data.py", "simulate", "--out", str(folder), "--preset", "demo"]
    there = bool(card) or (folder / "dataset").is_dir()
    if there and (card.get("plan"), card.get("generator")) != (asdict(plan), synthetic.GENERATOR):
        print(f"Data: using the scans of {folder} as they are", flush=True)
        return f"# {folder}: scans that were there before"
    done = synthetic.simulate(folder, plan, note={"preset": "demo", "command": shown(command)})
    made = f"{done.written} scans simulated in {report.duration(done.seconds)}, " * bool(
        done.written
    )
    print(f"Data: {made}{done.kept} kept in {folder}", flush=True)
    return shown(command)


def scans_digest(folder: Path) -> str:
    """A digest of names and sizes of all scans, so that other data are noticed."""
    digest = hashlib.sha256()
    for path in sorted((folder / "dataset" / "sequences").glob("*/velodyne/*.bin")):
        digest.update(f"{path.parent.parent.name}/{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def make_step(
    label: str,
    config: str,
    folder: Path,
    seed: int,
    options: Mapping[str, Any],
    known: str = "",
    after: Step | None = None,
) -> Step:
    """A training run that tests its last checkpoint, and the fingerprint by which it is known again.

    Args:
        options: config keys that differ from the file, folder and seed aside.
        known: digest of what the run depends on beside its settings: the data, the teacher.

    Raises:
        InputError: for a config or an option that cannot be used here.
    """
    set_here = {"save_path": str(folder), "seed": seed}
    hooks = [hook["type"].removeprefix("kd.") for hook in read_config(config)["hooks"]]
    if "PreciseEvaluator" not in hooks:
        raise InputError(
            f"{config}: hooks has no kd.PreciseEvaluator, whose scores are read; add it as the last hook"
        )
    set_here[f"hooks.{hooks.index('PreciseEvaluator')}.test_last"] = True
    everything = {**set_here, **options}
    settings = read_config(config, everything).pretty_text
    digest = hashlib.sha256(f"{settings}\0{known}".encode()).hexdigest()
    return Step(label, config, folder, everything, after, digest)


def plan_steps(
    out: Path, data: Path, seeds: Sequence[int], extra: Mapping[str, Any] | None = None
) -> tuple[Step, list[tuple[Step, Step]]]:
    """The teacher, and for every seed the student alone and the distilled one.

    Raises:
        InputError: for a config that cannot be used here.
    """
    roots = {f"data.{split}.data_root": str(data) for split in ("train", "val", "test")}
    options, scans = {**roots, **(extra or {})}, scans_digest(data)

    def step(label: str, config: str, folder: Path, seed: int, teacher: Step | None = None) -> Step:
        taught = {} if teacher is None else {"model.teacher.weight": str(teacher.folder / LAST)}
        known = f"{scans}\0{teacher.fingerprint if teacher else ''}"
        return make_step(label, config, folder, seed, {**taught, **options}, known, teacher)

    teacher = step(LABELS[0], TEACHER, out / f"seed_{seeds[0]}" / "teacher", seeds[0])
    students = [
        (
            step(LABELS[1], ALONE, out / f"seed_{seed}" / "student", seed),
            step(LABELS[2], DISTILLED, out / f"seed_{seed}" / "distilled", seed, teacher),
        )
        for seed in seeds
    ]
    return teacher, students


def call(command: Sequence[str]) -> int:
    """Run a tool of this checkout in a process of its own, its output shown; returns its exit code."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode


def run_step(step: Step, title: str, caller: Callable[[Sequence[str]], int] | None = None) -> None:
    """Train and test a step unless that is done; go on where it stopped.

    Args:
        caller: what runs the command and gives its exit code, in place of `call`.

    Raises:
        InputError: for a folder of something else, or a training that failed.
    """
    state = step.state()
    if step.finished():
        spent = report.duration(state["seconds"])
        made = f"by commit {state['commit']}" if state.get("commit") else "before"
        print(f"{title}: finished {made} in {spent}; kept in {step.folder}", flush=True)
        return
    if step.folder.exists() and not step.folder.is_dir():
        raise InputError(f"{step.folder} is a file; delete it or choose another --out")
    if step.folder.is_dir() and any(step.folder.iterdir()) and not state:
        raise InputError(
            f"{step.folder} holds something that this tool did not make; choose another --out or delete it"
        )
    same = state.get("fingerprint") == step.fingerprint
    if state and not same:
        print(f"{title}: settings or data changed since {step.folder} was made", flush=True)
        shutil.rmtree(step.folder)
    resume = same and (step.folder / LAST).is_file()
    spent = float(state.get("seconds", 0)) if same else 0.0
    state = {
        "fingerprint": step.fingerprint,
        "finished": False,
        "seconds": spent,
        "commit": benchmark.commit(),
    }
    command = step.command(resume)
    print(f"{title}: {'going on with' if resume else 'training'} {step.config}", flush=True)
    print(f"  {shown(command)}", flush=True)
    _write_json(step.folder / STATE, state)
    start = time.perf_counter()
    try:
        code = (caller or call)(command)
    finally:
        state["seconds"] = spent + time.perf_counter() - start
        _write_json(step.folder / STATE, state)
    if code:
        if [path.name for path in step.folder.iterdir()] == [STATE]:
            shutil.rmtree(step.folder)
        raise InputError(
            f"{step.label}: training ended with exit code {code}, the lines above say why; correct that and "
            "call this again, finished steps are kept"
        )
    if not step.metrics():
        raise InputError(
            f"{step.folder}/result/metrics.json was not written though the training ended; delete {step.folder} "
            "and call this again"
        )
    _write_json(step.folder / STATE, {**state, "finished": True})


def _write_json(path: Path, content: Any) -> None:
    try:
        report.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from error


def curve(entries: Sequence[Mapping[str, Any]], tag: str) -> list[tuple[int, float | None]]:
    """(epoch, value) of a tag; of an epoch that was logged twice, the later one."""
    values = {entry["step"]: entry["value"] for entry in entries if entry.get("tag") == tag}
    return sorted(values.items())


def merged_iou(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[float | None]:
    """IoU per class, mean over seeds; None for a class in neither labels nor predictions of any."""
    rows = []
    for name in names:
        entries = [m["classes"][name] for m in metrics]
        values = [entry["iou"] for entry in entries if entry["present"]]
        rows.append(float(np.mean(values)) if values else None)
    return rows


def run_entry(
    steps: Sequence[Step], names: Sequence[str], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """One entry of the report's `runs` from the folders of one network's seeds."""
    metrics = [step.metrics() for step in steps]
    logs = [read_jsonl(step.folder / "log.jsonl") for step in steps]
    return {
        "label": steps[0].label,
        "miou": [m["mIoU"] for m in metrics],
        "iou": merged_iou(metrics, names),
        "loss": [curve(entries, "train/loss") for entries in logs],
        "val_miou": [curve(entries, "val/mIoU") for entries in logs],
        **measured,
    }


def example_scan(steps: Sequence[Step]) -> dict[str, Any] | None:
    """The middle validation scan with the predictions of the given runs; None where one is missing."""
    dataset = DATASETS.build(read_config(steps[0].config, steps[0].options)["data"]["val"])
    index = len(dataset) // 2
    scan = dataset.get_data(index)
    files = [step.folder / "result" / f"{scan['name']}_pred.npy" for step in steps]
    if not all(file.is_file() for file in files):
        return None
    predictions = [np.load(file) for file in files]
    return {
        "name": scan["name"],
        "coord": scan["coord"],
        "segment": scan["segment"],
        "predictions": predictions,
    }


def measure(steps: Sequence[Step], out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Parameters, MACs and seconds per scan of each step's network, and the command that measures the same.

    Kept in OUT/benchmark.json, and measured again where networks or machine are others.
    """
    device = steps[0].options.get("device")
    threads = torch.get_num_threads()
    made_from = {
        "networks": [step.fingerprint for step in steps],
        "processor": benchmark.processor(),
        "threads": threads,
    }
    root = f"data.val.data_root={_quoted('x', steps[0].options['data.val.data_root'])}"
    command = ["tools/benchmark.py"]
    for step in steps:
        command += ["--config-file", step.config, "--weight", str(step.folder / LAST)]
    command += ["--repeats", str(REPEATS), "--options", root]
    kept = _read_json(out / "benchmark.json")
    if kept.get("made_from") != made_from:
        print(f"Measuring MACs and latency ({REPEATS} forwards of each network)", flush=True)
        entries = [
            benchmark.Entry(step.config, step.folder / LAST, step.label, step.options)
            for step in steps
        ]
        rows = benchmark.compare(entries, repeats=REPEATS, device=device, miou=False)
        environment = benchmark.environment(device_of({"device": device}))
        kept = {"made_from": made_from, "environment": environment, "rows": rows}
        _write_json(out / "benchmark.json", kept)
    measured = [
        {
            "parameters": row["parameters"],
            "macs": row["macs"],
            "latency": row["latency_ms"] / 1000,
        }
        for row in kept["rows"]
    ]
    return measured, command


def notes(
    runs: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    metrics: Mapping[str, Any],
    device: torch.device,
) -> list[str]:
    """What a reader of the table must know."""
    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' * (threads != 1)}" if device.type == "cpu" else str(device)
    absent = [name for name, entry in metrics["classes"].items() if not entry["present"]]
    lines = [
        f"Scores are those of the last checkpoint of each run ({Path(LAST).name}) on {metrics['scans']} validation "
        f"scans: mean IoU over all {len(metrics['classes'])} classes at raw points"
        + (f"; {', '.join(absent)} did not occur and count 0." if absent else "."),
        f"MACs and latency: a forward of one scan in float32, median of {REPEATS}, {where}; reading and voxelising are "
        "not counted. Both students are the same network: their latencies differ by noise only.",
    ]
    gains = [report.points(gain) for gain in report.gains(runs)]
    if len(seeds) == 1:
        lines.append(
            f"Distillation: {gains[0]} points with one seed ({seeds[0]}). A difference of a point or two can be luck; "
            "python tools/demo.py --seeds 0 1 2 shows the spread."
        )
    else:
        gain = report.spread(report.gains(runs))
        lines.append(
            f"Distillation: {report.points(gain['mean'])} points, mean over seeds {', '.join(map(str, seeds))} "
            f"(one by one {', '.join(gains)}; sd {100 * gain['std']:.1f}). Beside the students' means stand "
            f"smallest, largest and standard deviation over seeds. The teacher was trained once, with seed {seeds[0]}."
        )
    return lines


def labels_note(teacher: Step, student: Step) -> str:
    """What teacher and students trained on: scans, and the share of their points that carry labels."""

    def scans(step: Step) -> str:
        entry = read_config(step.config, step.options)["data"]["train"]
        share, drives = entry.get("label_fraction", 1.0), entry.get("sequences")
        labels = "all points" if share == 1 else f"{100 * share:g} % of the points"
        where = f" of drives {', '.join(drives)}" if drives else ""
        return f"{len(DATASETS.build(entry))} scans{where}, {labels} labelled"

    return f"Teacher: {scans(teacher)}. Both students: {scans(student)}; they differ by the teacher alone."


def circumstances(
    steps: Sequence[Step], made: Mapping[str, Any], device: Any
) -> list[tuple[str, str]]:
    """What the numbers were made with."""
    trained = ", ".join(
        f"{step.label.lower()} {report.duration(step.state()['seconds'])}" for step in steps
    )
    commits = sorted({step.state().get("commit") or "unknown" for step in steps})
    return [
        ("Date", made["date"]),
        ("Commit", ", ".join(commits)),
        ("Processor", f"{made['cpu']}, {workers.usable_cores()} cores"),
        *([("GPU", made["gpu"])] if made["gpu"] else []),
        ("Device", str(device)),
        (
            "Versions",
            f"pointcept_kd {made['pointcept_kd']}, Python {made['python']}, PyTorch {made['torch']}, "
            f"NumPy {made['numpy']}",
        ),
        ("System", made["system"]),
        ("Training", f"{trained}; evaluation included"),
    ]


def results_of(
    runs: Sequence[Mapping[str, Any]], seeds: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    """The numbers of the report for programs: one row per seed, then one entry per network."""
    teacher, alone, distilled = runs
    rows = [
        {
            "seed": seed,
            "teacher": teacher["miou"][0],
            "student_alone": without,
            "distilled_student": with_teacher,
            "gain": with_teacher - without,
        }
        for seed, without, with_teacher in zip(seeds, alone["miou"], distilled["miou"])
    ]
    networks = {
        key: {
            "miou": report.spread(run["miou"]),
            "parameters": run["parameters"],
            "macs": run["macs"],
            "latency_s": run["latency"],
            "iou": dict(zip(names, run["iou"])),
        }
        for key, run in zip(("teacher", "student_alone", "distilled_student"), runs)
    }
    return {
        "checkpoint": Path(LAST).name,
        "seeds": rows,
        "gain": report.spread(report.gains(runs)),
        "networks": networks,
    }


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
    add("--out", type=Path, default=Path("exp/demo"), help="folder to write to (default exp/demo)")
    add(
        "--data",
        type=Path,
        default=Path("data/sim"),
        help="streets, simulated where there are none (default data/sim)",
    )
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds (default 0)")
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change in all three trainings, for example epoch=2 eval_epoch=2",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the pipeline."""
    start = time.perf_counter()
    # A terminal without Unicode gets question marks instead of an error at the very end.
    sys.stdout.reconfigure(errors="replace")
    args = build_arguments().parse_args(argv)
    out, data, seeds = args.out, args.data, args.seeds
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(
            f"--seeds {' '.join(map(str, seeds))}: give different whole numbers, 0 or more"
        )
    extra = parse_options(args.options)
    taken = [k for k in extra if k in ("seed", "save_path") or k.endswith("data_root")]
    if taken:
        raise InputError(f"--options {taken[0]}: the demo sets it; use --seeds, --out and --data")
    # Before the work, not after it: configs and options are read here.
    plan_steps(out, data, seeds, extra)
    commands = [prepare_streets(data)]
    teacher, students = plan_steps(out, data, seeds, extra)
    steps = [teacher, *(step for pair in students for step in pair)]
    for number, step in enumerate(steps, start=1):
        seed = f", seed {step.options['seed']}" if len(seeds) > 1 else ""
        run_step(step, f"[{number}/{len(steps)}] {step.label}{seed}")
        commands.append(shown(step.command()))

    cfg = read_config(teacher.config, teacher.options)
    names = class_names(cfg["data"])
    trio = (teacher, *students[0])
    measured, command = measure(trio, out)
    commands.append(shown(command))
    groups = [[teacher], *(list(group) for group in zip(*students))]
    runs = [run_entry(group, names, sizes) for group, sizes in zip(groups, measured)]
    device = device_of(cfg)
    made = benchmark.environment(device)
    about = [labels_note(teacher, students[0][0]), *notes(runs, seeds, teacher.metrics(), device)]
    given = sys.argv[1:] if argv is None else argv
    asked = shown(["tools/demo.py", *given])
    around = circumstances(steps, made, device)
    wall = time.perf_counter() - start
    around.append(("Wall time", f"{report.duration(wall)} (this call; finished steps were kept)"))
    scan = example_scan(trio)
    if scan is not None and len(seeds) > 1:
        scan["name"] += f", networks of seed {seeds[0]}"
    page = {
        "title": "pointcept_kd: a large and a small Point Transformer on simulated streets",
        "runs": runs,
        "classes": names,
        "colors": COLORS,
        "scan": scan,
        "notes": about,
        "commands": [asked, "", "# It runs:", *commands],
        "environment": around,
    }
    results = {
        **results_of(runs, seeds, names),
        "notes": about,
        "command": asked,
        "commands": commands,
        "environment": dict(around),
    }
    _write_json(out / "results.json", results)
    report.write_text(out / "report.html", report.build_report(page))

    print(f"\n{report.text_table(*report.summary_table(runs))}\n")
    print("\n".join([report.headline(runs), *about]))
    print(f"\n{out / 'results.json'}\n{out / 'report.html'}")
    print(f"Done in {report.duration(time.perf_counter() - start)}.")


def _stop(*_: Any) -> None:
    # The exception ends the training that is running; without it that would go on alone.
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(run_tool(main))
