"""The command `pointcept-kd`: every tool from any folder, in a checkout and in an installed package.

A tool runs as the script that it is, in a process of its own, so that processes which it starts find its functions
again. Nothing here imports torch: help and misspelled commands are answered at once.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pointcept_kd import __version__

COMMANDS = {
    "train": "train a network, or distil one into another",
    "test": "score a trained network and write its predictions",
    "infer": "label point clouds of your own",
    "complete": "complete LiDAR scans of your own",
    "prepare-data": "simulate streets, prepare data sets, check data",
    "benchmark": "compare networks: parameters, latency, memory, mIoU",
    "ablate": "train rows of configs by several seeds, and write their table",
    "label-fractions": "probe and fine-tune pre-trained backbones on fractions of the labels",
    "convert": "released weights to checkpoints of this package",
    "export-onnx": "a bird's-eye-view student as ONNX",
    "export-openpcdet": "a VoxelNet encoder for OpenPCDet's detectors, or one of theirs",
    "finetune-openpcdet": "train OpenPCDet's detectors from an export, and their KITTI table",
    "demo": "from nothing to a distilled student and its report",
    "doctor": "what is installed, what is missing, what that costs",
}

EXAMPLES = """examples:
  pointcept-kd doctor
  pointcept-kd demo
  pointcept-kd infer scan.bin
  pointcept-kd train --config-file configs/kd/ptv3_to_student.py --options epoch=10 eval_epoch=10
  pointcept-kd train --help"""


def home() -> Path:
    """The folder with `tools` and `configs`: inside the installed package, else the checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "_share"
    return inside if inside.is_dir() else package.parent


def help_text() -> str:
    """What `pointcept-kd --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pointcept-kd COMMAND [ARGUMENT ...]",
            "",
            "Distil big LiDAR networks into small ones.",
            "",
            "commands:",
            *lines,
            "",
            "`pointcept-kd train ...` is `python tools/train.py ...`. Configs are found from any folder, in",
            f"{home() / 'configs'}",
            "",
            EXAMPLES,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for an unknown one."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(words: list[str]) -> int:
    """Help, the doctor, or a tool."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), flush=True)
        return 0
    if words[0] in ("-V", "--version"):
        print(f"pointcept_kd {__version__}")
        return 0
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
        print(f"error: there is no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    if name == "doctor":
        from pointcept_kd import doctor

        return doctor.main(words[1:])
    script = home() / "tools" / f"{name.replace('-', '_')}.py"
    if not script.is_file():
        print(
            f"error: {script} is missing; install pointcept_kd again, or run from a complete checkout",
            file=sys.stderr,
        )
        return 2
    return start([sys.executable, str(script), *words[1:]])


def start(command: Sequence[str]) -> int:
    """Run a program in the place of this one, where the system can do that; else run it and wait."""
    sys.stdout.flush()
    if os.name == "posix":
        # The tool gets the signals and gives the exit code without anyone between.
        os.execv(command[0], list(command))
    return subprocess.run(list(command)).returncode
