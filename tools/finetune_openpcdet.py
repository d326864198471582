"""Train a detector of OpenPCDet on KITTI from an export of `export_openpcdet.py`, and collect its AP table.

    python tools/finetune_openpcdet.py handoff/mine.pth --openpcdet-root OpenPCDet --data-root kitti --dry-run
    python tools/finetune_openpcdet.py handoff/mine.pth --openpcdet-root OpenPCDet --data-root kitti --runs 3
    python tools/finetune_openpcdet.py handoff/mine.pth --openpcdet-root OpenPCDet --data-root kitti --runs 3 --scratch
    python tools/finetune_openpcdet.py handoff/mine.pth --openpcdet-root OpenPCDet --data-root kitti --runs 3 --collect

Takes MINE.pth with MINE.json and the config beside it, checks the checkout, the packages of --python, the GPUs, the
data and the folders of the runs, puts the config into the checkout's tools/cfgs/kitti_models, and starts OpenPCDet's
own training and evaluation there, run after run. Road planes are used where every frame for training has one. A run is
stopped as soon as its log shows that the encoder is not loaded as a whole. --dry-run shows what was found and the
commands, and starts and writes nothing.

Runs differ by their random numbers, which OpenPCDet draws anew each time. --scratch trains the same config from random
weights, for comparison. A run that is complete is not repeated, so the same command goes on after an interruption.
Results: MINE_kitti.json and MINE_kitti.md with R40 of every run, mean, standard deviation and the best.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pointcept_kd.handoff import kitti
from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import write_atomic
from pointcept_kd.host.runtime import run_tool

MARK = "written by pointcept_kd"
GROUP = "kitti_models"
OLDEST = (0, 6)
# Every package that OpenPCDet imports on the way of these detectors.
PACKAGES = (
    "torch", "numpy", "spconv", "scipy", "numba", "skimage", "SharedArray", "easydict", "yaml", "tqdm", "tensorboardX",
)  # fmt: skip
FRAMES = {"train": 3712, "val": 3769}
PROBE = """
import importlib, json, sys
sys.path.insert(0, "..")
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
    except Exception:
        found[name] = None
gpus = []
if found["torch"]:
    import torch
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
compiled = False
try:
    importlib.import_module("pcdet.ops.iou3d_nms.iou3d_nms_cuda")
    compiled = True
except Exception:
    compiled = False
print("\\n" + json.dumps({"packages": found, "gpus": gpus, "compiled": compiled}))
"""


@dataclass(frozen=True)
class Export:
    """Files of `export_openpcdet.py`: weights, config text under its name, report."""

    weights: Path
    name: str
    config: str
    report: dict[str, Any]


def read_export(weights: Path) -> Export:
    """Read an export and see that its files belong together.

    Raises:
        InputError: where one is missing or of another export, or the detector is none for KITTI.
    """
    beside = weights.with_suffix(".json")
    for path in (weights, beside):
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: give the .pth of tools/export_openpcdet.py, its .json beside it"
            )
    try:
        report = json.loads(beside.read_text())
        detector, data, name = (report[key] for key in ("detector", "data", "config"))
        digest, _ = report["sha256"], report["extra_tag"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{beside} is no report of tools/export_openpcdet.py with a detector: export again"
        ) from error
    if data != "kitti" or name is None:
        raise InputError(
            f"{weights}: {detector} has no config for KITTI; {weights.with_suffix('.txt')} has the commands"
        )
    if hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
        raise InputError(f"{weights} is not the file that {beside} is about: export again")
    config = weights.with_name(name)
    if not config.is_file():
        raise InputError(f"{config}, which {beside} names, does not exist: export again")
    return Export(weights, name, config.read_text(), report)


# ------------------------------------------------------------------------------------------ checks


def check_checkout(root: Path) -> dict[str, Any]:
    """Version and commit of a checkout.

    Raises:
        InputError: where there is none, or too old a one.
    """
    for part in ("tools/train.py", "pcdet/config.py", "tools/cfgs/dataset_configs", "setup.py"):
        if not (root / part).exists():
            raise InputError(
                f"--openpcdet-root {root}: no checkout of OpenPCDet, {part} is missing"
            )
    match = re.search(r"version\s*=\s*['\"](\d+)\.(\d+)(\.\d+)?", (root / "setup.py").read_text())
    if match is None:
        raise InputError(f"{root / 'setup.py'} names no version of OpenPCDet")
    if (int(match[1]), int(match[2])) < OLDEST:
        raise InputError(
            f"OpenPCDet {match[1]}.{match[2]} at {root} is older than 0.6, which the config is for"
        )
    commit = None
    if (root / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        commit = done.stdout.strip() or None
    return {
        "version": ".".join((match[1], match[2])) + (match[3] or ""),
        "commit": commit,
        "root": str(root),
    }


def probe(python: str, root: Path) -> dict[str, Any]:
    """Versions of packages, GPUs, and whether OpenPCDet is compiled, in the interpreter that is to train.

    Raises:
        InputError: for no interpreter.
    """
    command = [python, "-c", PROBE, *PACKAGES]
    try:
        done = subprocess.run(
            command, cwd=root / "tools", capture_output=True, text=True, errors="replace"
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"--python {python} does not run: {error}") from error


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def check_packages(found: Mapping[str, Any], gpus: int, root: Path) -> tuple[list[str], list[str]]:
    """What keeps OpenPCDet from training there, and what may."""
    packages, problems, advice = found["packages"], [], []
    if packages["torch"] and not found["gpus"]:
        problems.append(
            "this machine has no CUDA device that PyTorch sees, and OpenPCDet trains on CUDA alone"
        )
    elif len(found["gpus"]) < gpus:
        problems.append(f"--gpus {gpus}: there are {len(found['gpus'])}")
    if lacking := [name for name in PACKAGES if not packages[name]]:
        problems.append(f"packages that OpenPCDet needs do not import: {', '.join(lacking)}")
    if packages["spconv"] and _version(packages["spconv"]) < (2, 2):
        problems.append(f"spconv {packages['spconv']}: weights are in the order of 2.2 and later")
    if not found["compiled"]:
        problems.append(
            f"OpenPCDet's CUDA operations are not compiled: run `python setup.py develop` in {root}"
        )
    if packages["numpy"] and _version(packages["numpy"]) >= (1, 24):
        advice.append(
            f"numpy {packages['numpy']}: OpenPCDet still names np.int, np.bool and np.float in places, which numpy "
            "before 1.24 has"
        )
    return problems, advice


def check_data(folder: Path) -> tuple[list[str], list[str], bool]:
    """Whether KITTI is there, as OpenPCDet prepares it.

    Returns:
        what is missing, what is unusual, and whether every frame for training has a road plane.
    """
    problems, advice = [], []
    frames: dict[str, list[str]] = {}
    for split, count in FRAMES.items():
        path = folder / "ImageSets" / f"{split}.txt"
        frames[split] = path.read_text().split() if path.is_file() else []
        if not frames[split]:
            problems.append(f"{path} is missing or empty")
        elif len(frames[split]) != count:
            advice.append(f"{path} lists {len(frames[split])} frames; the benchmark's has {count}")
    for part, suffix in (("velodyne", ".bin"), ("calib", ".txt")):
        there = _names(folder / "training" / part, suffix)
        lacking = [name for names in frames.values() for name in names if name not in there]
        if lacking:
            problems.append(
                f"{folder / 'training' / part} lacks {len(lacking)} of the frames, first {lacking[0]}{suffix}"
            )
    made = [f"kitti_infos_{split}.pkl" for split in FRAMES] + ["kitti_dbinfos_train.pkl"]
    lacking = [name for name in made if not (folder / name).is_file()]
    if not any((folder / "gt_database").glob("*.bin")):
        lacking.append("gt_database/*.bin")
    if lacking:
        problems.append(
            f"{folder} lacks {', '.join(lacking)}: run `python -m pcdet.datasets.kitti.kitti_dataset "
            "create_kitti_infos tools/cfgs/dataset_configs/kitti_dataset.yaml` in the checkout"
        )
    planes = _names(folder / "training" / "planes", ".txt")
    covered = bool(frames["train"]) and all(name in planes for name in frames["train"])
    if planes and not covered:
        advice.append("road planes are there for some frames only, and are not used")
    return problems, advice, covered


def _names(folder: Path, suffix: str) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)}


def set_road_plane(config: str, used: bool) -> str:
    """The config with `USE_ROAD_PLANE` set.

    Raises:
        InputError: where it is not there once.
    """
    text, count = re.subn(r"(?m)^(\s*(?:- )?USE_ROAD_PLANE:\s*)\w+\s*$", rf"\g<1>{used}", config)
    if count != 1:
        raise InputError(
            f"the config has USE_ROAD_PLANE {count} times, expected once: export again"
        )
    return text


def epochs_of(config: str) -> int:
    """`NUM_EPOCHS` of a config."""
    match = re.search(r"(?m)^\s*NUM_EPOCHS:\s*(\d+)\s*$", config)
    if match is None:
        raise InputError("the config has no NUM_EPOCHS: export again")
    return int(match[1])


# ------------------------------------------------------------------------------------------ runs


def run_folder(root: Path, name: str, tag: str) -> Path:
    """Where OpenPCDet writes a run."""
    return root / "output" / GROUP / Path(name).stem / tag


def results(folder: Path, epochs: int) -> dict[str, Any] | None:
    """The figures of the last epoch, from the run's logs; None where it has not been evaluated."""
    for log in sorted(folder.glob("train_*.log"), reverse=True):
        with open(log, errors="replace") as lines:
            for found in reversed(kitti.read_log(lines)):
                if found.epoch == str(epochs):
                    return {"log": str(log), "epoch": found.epoch, "ap": found.ap}
    return None


def command(args: argparse.Namespace, export: Export, tag: str) -> list[str]:
    """OpenPCDet's training, to be started in its folder tools/."""
    words = [args.python]
    if args.gpus > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
    words += ["train.py"]
    if args.gpus > 1:
        words += ["--launcher", "pytorch"]
    words += ["--cfg_file", f"cfgs/{GROUP}/{export.name}"]
    if not args.scratch:
        words += ["--pretrained_model", str(export.weights.resolve())]
    words += ["--extra_tag", tag]
    for name in ("epochs", "batch_size", "workers"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    if args.data_root.resolve() != (args.openpcdet_root / "data" / "kitti").resolve():
        # Takes the rest of the line.
        words += ["--set", "DATA_CONFIG.DATA_PATH", str(args.data_root.resolve())]
    return words


def launch(words: Sequence[str], folder: Path, watch: kitti.LoadWatch) -> None:
    """Run a training to its end, unless its log shows that the weights are not loaded.

    Args:
        folder: where to start it.
        watch: reads its output; the first thing wrong ends it and every process it started.

    Raises:
        InputError: with what went wrong, or the exit code.
    """
    environment = {k: v for k, v in os.environ.items() if k != "SPCONV_SAVED_WEIGHT_LAYOUT"}
    process = subprocess.Popen(
        list(words),
        cwd=folder,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    # Without translation, so that a bar that returns to the start of its line still does.
    output = io.TextIOWrapper(process.stdout, errors="replace", newline="")
    try:
        for line in output:
            print(line, end="", flush=True)
            if problem := watch.feed(line):
                raise InputError(f"training stopped: {problem}")
        code = process.wait()
    finally:
        _end(process)
        output.close()
    if code:
        raise InputError(f"OpenPCDet's training ended with exit code {code}; its output says why")
    if problem := watch.missing():
        raise InputError(problem)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    # torchrun takes up to 30 s to end its own processes.
    for kind, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, kind)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def write_results(base: Path, found: Mapping[str, Any], title: str) -> str:
    """Write BASE.json and BASE.md; returns the table."""
    text = kitti.table(found["runs"], title)
    whole = {**found, "summary": kitti.summarise(found["runs"])}
    for path, content in (
        (base.with_name(f"{base.name}.json"), json.dumps(whole, indent=1) + "\n"),
        (base.with_name(f"{base.name}.md"), text),
    ):
        raw = content.encode()
        write_atomic(path, lambda opened, raw=raw: opened.write(raw))
    return text


# ------------------------------------------------------------------------------------------ tool


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", type=Path, help=".pth of tools/export_openpcdet.py")
    parser.add_argument(
        "--openpcdet-root", type=Path, metavar="PATH", help="a checkout (default: OPENPCDET_ROOT)"
    )
    parser.add_argument(
        "--data-root", type=Path, metavar="PATH", help="KITTI (default: data/kitti of the checkout)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the table (default: beside the weights)"
    )
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="trainings (default 1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="per run (default 1)")
    parser.add_argument("--epochs", type=int, metavar="N", help="in place of the config's 80")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of all GPUs together")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read data")
    parser.add_argument("--tag", help="of the runs (default: the export's, which has its hash)")
    parser.add_argument("--scratch", action="store_true", help="start from random weights")
    parser.add_argument("--dry-run", action="store_true", help="show the checks and the commands")
    parser.add_argument("--collect", action="store_true", help="only read the logs of the runs")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="interpreter with OpenPCDet"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, train, collect."""
    args = build_arguments().parse_args(argv)
    for name in ("runs", "gpus", "epochs", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.openpcdet_root is None:
        if not os.environ.get("OPENPCDET_ROOT"):
            raise InputError("give a checkout of OpenPCDet by --openpcdet-root PATH")
        args.openpcdet_root = Path(os.environ["OPENPCDET_ROOT"])
    root = args.openpcdet_root = args.openpcdet_root.resolve()
    args.data_root = args.data_root or root / "data" / "kitti"
    export = read_export(args.weights)
    openpcdet = check_checkout(root)
    base_tag = args.tag or export.report["extra_tag"] + ("_scratch" if args.scratch else "")
    if not re.fullmatch(r"[\w.+-]+", base_tag):
        raise InputError(f"--tag {base_tag!r}: expected letters, digits and . _ + -")
    tags = [f"{base_tag}_{i}" for i in range(args.runs)]
    epochs = args.epochs or epochs_of(export.config)
    stem = args.weights.stem + ("_scratch" if args.scratch else "")
    base = (args.out or args.weights.parent) / f"{stem}_kitti"
    found: dict[str, Any] = {
        "detector": export.report["detector"],
        "weights": None if args.scratch else str(args.weights),
        "sha256": None if args.scratch else export.report["sha256"],
        "openpcdet": openpcdet,
        "epochs": epochs,
        "runs": [],
    }
    title = f"{export.report['detector']} on KITTI val, from " + (
        "random weights" if args.scratch else args.weights.name
    )
    done = {tag: results(run_folder(root, export.name, tag), epochs) for tag in tags}
    if args.collect:
        found["runs"] = [{"tag": tag, **got} for tag, got in done.items() if got]
        if not found["runs"]:
            raise InputError(
                f"no run {', '.join(tags)} below {run_folder(root, export.name, '')} has been evaluated "
                f"after epoch {epochs}"
            )
        print(write_results(_folder(base), found, title), end="")
        return
    config = prepare(args, export, tags, done, openpcdet, found)
    if args.dry_run:
        return
    target = root / "tools" / "cfgs" / GROUP / export.name
    write_atomic(target, lambda opened: opened.write(config.encode()))
    _folder(base)
    for tag in tags:
        got = done[tag]
        if got is None:
            start = time.monotonic()
            watch = kitti.LoadWatch(
                None if args.scratch else str(args.weights.resolve()),
                (export.report["n_matched"], export.report["n_detector"]),
                export.report["backbone_complete"],
            )
            launch(command(args, export, tag), root / "tools", watch)
            folder = run_folder(root, export.name, tag)
            got = results(folder, epochs)
            if got is None:
                raise InputError(f"{folder}: its logs have no R40 of epoch {epochs}")
            got["hours"] = round((time.monotonic() - start) / 3600, 3)
        else:
            print(f"{tag} is complete, its results are in {got['log']}")
        found["runs"].append({"tag": tag, **got})
        text = write_results(base, found, title)
    print(text, end="")


def _folder(base: Path) -> Path:
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {base.parent}: no folder can be made there ({error})") from error
    return base


def prepare(
    args: argparse.Namespace,
    export: Export,
    tags: Sequence[str],
    done: Mapping[str, Any],
    openpcdet: Mapping[str, Any],
    found: dict[str, Any],
) -> str:
    """Check everything, print what was found and the commands; returns the config for the checkout.

    Raises:
        InputError: with the first problem, unless for a dry run.
    """
    root = args.openpcdet_root
    machine = probe(args.python, root)
    problems, advice = check_packages(machine, args.gpus, root)
    data_problems, data_advice, planes = check_data(args.data_root)
    problems += data_problems
    advice += data_advice
    if layout := os.environ.get("SPCONV_SAVED_WEIGHT_LAYOUT"):
        advice.append(f"SPCONV_SAVED_WEIGHT_LAYOUT={layout} is taken out of the run's environment")
    config = set_road_plane(export.config, planes)
    target = root / "tools" / "cfgs" / GROUP / export.name
    if target.is_file() and MARK not in target.read_text().partition("\n")[0]:
        problems.append(f"{target} is a config of someone else; export under another --tag")
    for tag in tags:
        folder = run_folder(root, export.name, tag)
        if done[tag] is None and any(folder.glob("ckpt/*.pth")):
            problems.append(
                f"{folder}/ckpt has checkpoints of an unfinished run, which OpenPCDet would go on from: delete that "
                "folder, or give another --tag"
            )
    found["packages"], found["gpus"] = machine["packages"], machine["gpus"][: args.gpus]
    found["road_planes"] = planes
    print(f"OpenPCDet {openpcdet['version']} at {root}, commit {openpcdet['commit'] or 'unknown'}")
    versions = machine["packages"].items()
    print(", ".join(f"{name} {version or 'missing'}" for name, version in versions))
    print(f"GPUs: {', '.join(machine['gpus']) or 'none'}")
    print(f"KITTI at {args.data_root}, road planes {'used' if planes else 'not used'}")
    for line in advice:
        print(f"warning: {line}")
    if problems and not args.dry_run:
        more = f" (and {len(problems) - 1} more, see --dry-run)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    for line in problems:
        print(f"problem: {line}")
    report = export.report
    print(f"cd {shlex.quote(str(root / 'tools'))}")
    for tag in tags:
        state = "  # complete, not repeated" if done[tag] else ""
        print(shlex.join(command(args, export, tag)) + state)
    if not args.scratch:
        print(f"# each log must say `{report['expected_log_line']}`", flush=True)
    return config


if __name__ == "__main__":
    sys.exit(run_tool(main))
