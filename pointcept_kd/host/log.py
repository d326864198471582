"""Logs: text lines for people, JSON lines for programs, TensorBoard event files where installed."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import comm
from .errors import InputError

NAME = "pointcept_kd"
_COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}


class _Console(logging.StreamHandler):
    """Writes to the `sys.stderr` of the moment, so a redirected or captured stream is honoured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _ColourFormatter(logging.Formatter):
    """Warnings yellow and errors red, on a terminal only."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        colour = _COLOURS.get(record.levelno)
        if colour and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            return f"{colour}{text}\033[0m"
        return text


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot write the log ({error.strerror}); choose a save_path that can be written"
    )


def get_root_logger(
    log_file: str | Path | None = None, file_mode: str = "a", log_level: int = logging.INFO
) -> logging.Logger:
    """The run's logger: `[time LEVEL] text` on the console and, if asked for, in a file.

    Calling it again returns the same logger without doubling its lines; another `log_file` replaces
    the one before. Processes other than the first write errors only, and to the console only.

    Raises:
        InputError: for a log file that cannot be opened.
    """
    logger = logging.getLogger(NAME)
    main = comm.is_main_process()
    line, clock = "[%(asctime)s %(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S"
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        console = _Console()
        console.setFormatter(_ColourFormatter(line, clock))
        logger.addHandler(console)
        logger.propagate = False
    logger.setLevel(log_level if main else logging.ERROR)
    if log_file is None or not main:
        return logger
    path = Path(log_file).absolute()
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        if Path(handler.baseFilename) == path and path.exists():
            return logger
        logger.removeHandler(handler)
        handler.close()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, mode=file_mode, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error
    file.setFormatter(logging.Formatter(line, clock))
    logger.addHandler(file)
    return logger


class JsonlWriter:
    """Scalars as lines `{"tag": ..., "value": ..., "step": ..., "time": ...}`, flushed one by one.

    Opens in append mode; a last line that a killed run left unfinished is cut off first, so that
    every line parses. NaN and infinities, which JSON does not have, become null.

    Raises:
        InputError: for a path that cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_unfinished_line(self.path)
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def add(self, tag: str, value: Any, step: int) -> None:
        """Append one scalar; `value` may be a number or a one-element tensor or array."""
        number = float(value)
        entry = {
            "tag": tag,
            "value": number if math.isfinite(number) else None,
            "step": int(step),
            "time": round(time.time(), 3),
        }
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        # Search backwards in blocks: the log of a long run is large, its last line is not.
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every complete line of a `JsonlWriter`'s file; an unfinished last line is left out.

    Raises:
        InputError: for a file that is not there, or a line before the last that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such log; give the log.jsonl of a run's save_path")
    lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path}:{number}: not a JSON object; delete that line or the file"
            ) from error
        entries.append(entry)
    return entries


def wandb_run(cfg: Mapping[str, Any]) -> Any:
    """Start a run at Weights & Biases, in `wandb_project` and named by the last two folders of `save_path`.

    Raises:
        InputError: without the package, or where it refuses to start.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "enable_wandb=True needs the package wandb: pip install wandb, or set enable_wandb=False"
        ) from error
    folder = Path(cfg["save_path"])
    tag, name = folder.absolute().parts[-2:]
    try:
        if cfg.get("wandb_key"):
            wandb.login(key=cfg["wandb_key"])
        run = wandb.init(
            project=cfg.get("wandb_project") or "pointcept",
            name=f"{tag}/{name}",
            tags=[tag],
            dir=str(folder),
            config=cfg.to_dict() if hasattr(cfg, "to_dict") else None,
        )
    except Exception as error:  # its own classes of errors are many and change
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"enable_wandb=True: {reason}; log in, set WANDB_MODE=offline, or set enable_wandb=False"
        ) from error
    for pattern in ("params/*", "train_batch/*"):
        run.define_metric(pattern, step_metric="Iter")
    for pattern in ("train/*", "val/*"):
        run.define_metric(pattern, step_metric="Epoch")
    return run


class Writer:
    """A run's scalars: `log.jsonl` in `folder` always, TensorBoard event files if it is installed.

    Args:
        folder: the run's `save_path`.
        tensorboard: write event files.
        wandb: a run of `wandb_run`, which gets them as well.

    Raises:
        InputError: for a folder that cannot be written.
    """

    _said_missing = False

    def __init__(self, folder: str | Path, tensorboard: bool = True, wandb: Any = None) -> None:
        self.wandb = wandb
        self.jsonl = JsonlWriter(Path(folder) / "log.jsonl")
        self.events = self._open_events(folder) if tensorboard else None

    @classmethod
    def _open_events(cls, folder: str | Path) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not cls._said_missing:
                cls._said_missing = True
                get_root_logger().info(
                    "TensorBoard is not installed (pip install 'pointcept_kd[log]'); "
                    "scalars go to log.jsonl only"
                )
            return None
        return SummaryWriter(str(folder))

    def add_scalar(self, tag: str, value: Any, step: int) -> None:
        """Log one number under a tag at a step."""
        number = float(value)
        self.jsonl.add(tag, number, step)
        if self.events is not None:
            self.events.add_scalar(tag, number, step)
        if self.wandb is not None:
            batchwise = tag.startswith(("params/", "train_batch/"))
            self.wandb.log({tag: number, "Iter" if batchwise else "Epoch": step})

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self.jsonl.close()
        if self.events is not None:
            self.events.close()
            self.events = None
        if self.wandb is not None:
            self.wandb.finish()
            self.wandb = None
