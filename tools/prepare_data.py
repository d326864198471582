"""Prepare and check data.

python tools/prepare_data.py simulate --out data/sim --preset demo
python tools/prepare_data.py check --data-root data/sim
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("pointcept_kd") is None:  # not installed: run from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from pointcept_kd.host import InputError


def add_simulate(commands: argparse._SubParsersAction) -> None:
    """Options of `simulate`."""
    parser = commands.add_parser(
        "simulate",
        help="simulated streets in SemanticKITTI's layout",
        description="Ray-cast LiDAR drives through procedural streets into "
        "OUT/dataset/sequences/SS/{velodyne,labels,calib.txt,poses.txt,times.txt}. Sequences 08 "
        "(validation) and 11-21 (test) are laid out differently from the others. Complete scans "
        "are kept, so an interrupted run goes on where it stopped.",
        epilog="example: python tools/prepare_data.py simulate --out data/sim --preset demo",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--preset",
        default="demo",
        help="demo: 32 beams x 512 columns, sequences 00-05 and 08, 144 scans (default); "
        "standard: 64 x 2048, 00-07, 09, 10 and 08, 1650 scans",
    )
    parser.add_argument("--sequences", help="comma-separated, such as 00,01,08")
    parser.add_argument("--scans", type=int, help="scans of each sequence")
    parser.add_argument("--beams", type=int, help="64 like an HDL-64E, 32, or another number")
    parser.add_argument("--columns", type=int, help="azimuth steps of a turn")
    parser.add_argument("--spacing", type=float, help="metres between scans")
    parser.add_argument("--max-range", type=float, help="metres (default 50)")
    parser.add_argument("--seed", type=int, help="another seed is another town (default 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.set_defaults(run=simulate)


def simulate(args: argparse.Namespace) -> int:
    """Write simulated drives and say how fast it went and what is in them."""
    from pointcept_kd.data import synthetic

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    plan = synthetic.plan_from(
        args.preset,
        args.sequences.split(",") if args.sequences is not None else None,
        args.scans,
        beams=args.beams,
        columns=args.columns,
        spacing=args.spacing,
        max_range=args.max_range,
        seed=args.seed,
    )
    note = {"preset": args.preset, "command": shlex.join(["python", *sys.argv])}
    report = synthetic.simulate(args.out, plan, args.workers, note)
    if report.written:
        print(
            f"{report.written} scans, {report.points / 1e6:.2f} M points in {report.seconds:.1f} s"
            f" ({report.written / report.seconds:.1f} scans/s,"
            f" {report.points / report.seconds / 1e6:.2f} M points/s)"
            + (f"; {report.kept} kept" if report.kept else "")
        )
    else:
        print(f"nothing to do: all {report.kept} scans are there")
    print("share of points: " + class_line(report.shares))
    return 0


def class_line(shares: dict[int, float]) -> str:
    """Shares of the raw class ids as shares of the 19 classes, in one line."""
    from pointcept_kd.data.semantic_kitti import CLASS_NAMES, LEARNING_MAP

    totals = dict.fromkeys(range(-1, len(CLASS_NAMES)), 0.0)
    for raw, share in shares.items():
        totals[LEARNING_MAP[raw]] += share
    names = {-1: "ignored", **dict(enumerate(CLASS_NAMES))}
    return ", ".join(f"{names[i]} {100 * totals[i]:.2f} %" for i in (*range(len(CLASS_NAMES)), -1))


def add_check(commands: argparse._SubParsersAction) -> None:
    """Options of `check`."""
    parser = commands.add_parser(
        "check",
        help="read every scan of a folder and report what is wrong",
        description="Read every scan of a folder in SemanticKITTI's layout and report truncated "
        "files, label counts that differ from the scan's, unknown class ids, coordinates that "
        "are not finite, and poses that do not reach the last scan. Exit code 1 if there are any.",
        epilog="example: python tools/prepare_data.py check --data-root data/semantic_kitti",
    )
    parser.add_argument("--data-root", required=True, type=Path, help="holds dataset/sequences")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> int:
    """Report the problems of a folder."""
    from pointcept_kd.data.semantic_kitti import check_folder

    scans = problems = 0
    with tqdm(unit="scan", desc="check") as bar:
        for path, found in check_folder(args.data_root):
            if path.suffix == ".bin":
                scans += 1
                bar.update()
            problems += len(found)
            for line in found:
                bar.write(line)
    print(f"{scans} scans, {problems or 'no'} problem{'s' if problems != 1 else ''}")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(
        description="Prepare and check data.",
        epilog="example: python tools/prepare_data.py simulate --out data/sim --preset demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_simulate, add_check):
        add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
