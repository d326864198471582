"""What a test leaves in its result folder: predictions with a record of what made them, and a submission.

    result/NAME_pred.npy      (n,) int64, one class per raw point
    result/NAME_prob.npy      (n, K) float16, where probabilities are asked for
    result/predictions.json   what made these predictions; the scans, with their number of points
    result/submit/            what the data sets' `write_submission` wrote in the last finished test

A prediction is taken over into a later test only on demand and only where the record says that the same weights, model,
data pipeline and settings made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import comm
from .checkpoint import write_atomic
from .errors import InputError
from .log import get_root_logger

_SAVE_EVERY = 10.0  # seconds between two writings of the record: a killed test repeats this much


def fingerprint(value: Any) -> str:
    """Digest of nested plain values; the order of a dict's keys does not matter."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of all parameters and buffers: equal for equal weights, whichever file they came from."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def file_stems(names: Sequence[str]) -> list[str]:
    """Scan names as file names: no slashes, and where two would meet, the position behind."""
    stems = [str(name).replace("/", "_").replace("\\", "_") for name in names]
    seen: dict[str, int] = {}
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
    return [s if seen[s] == 1 else f"{s}_{i:06d}" for i, s in enumerate(stems)]


class Predictions:
    """The prediction files of a test, and the record by which a later test may take them over.

    Args:
        folder: `result`.
        made_with: digests by name of all that a prediction depends on; None keeps no record.
        save: write `NAME_pred.npy`.
        probabilities: also write `NAME_prob.npy`.
        reuse: take over what the record allows.
    """

    def __init__(
        self,
        folder: Path,
        made_with: Mapping[str, str] | None,
        save: bool = True,
        probabilities: bool = False,
        reuse: bool = False,
    ) -> None:
        self.folder, self.made_with = folder, made_with
        self.save, self.probabilities, self.reuse = save, probabilities, reuse
        self.scans: dict[str, dict[str, Any]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._saved = time.monotonic()

    @property
    def record(self) -> Path:
        """Where this process keeps its part of the record; the first process's is the whole one in the end."""
        rank = comm.get_rank()
        return self.folder / ("predictions.json" if rank == 0 else f"predictions_{rank}.json")

    def prepare(self) -> None:
        """On the main process: keep of earlier records what may be taken over, drop the rest.

        Called before any process predicts, so that no old entry ever stands beside a new file.
        """
        if not (self.save or self.reuse):
            return
        old = [_read_record(path) for path in sorted(self.folder.glob("predictions*.json"))]
        kept: dict[str, dict[str, Any]] = {}
        stale: list[str] = []
        for content in old:
            if self.reuse and content["made_with"] == self.made_with:
                kept.update(content["scans"])
            elif content["scans"]:
                stale += _differences(content["made_with"], self.made_with)
        if self.reuse and stale:
            get_root_logger().info(
                f"Predictions in {self.folder} were made with other {', '.join(dict.fromkeys(stale))}: "
                "those scans are predicted anew"
            )
        elif self.reuse and not kept:
            get_root_logger().info(f"No predictions in {self.folder} to reuse")
        if self.save:
            self._write(self.folder / "predictions.json", kept)
            for path in self.folder.glob("predictions_*.json"):
                path.unlink()
        self.scans = kept

    def share(self) -> None:
        """Give every process what `prepare` kept; also a barrier."""
        self.scans = comm.broadcast(self.scans)
        self._own = dict(self.scans) if comm.is_main_process() else {}

    def find(self, stem: str, points: int) -> tuple[NDArray, list[int]] | None:
        """The recorded prediction (points,) of a scan and its votes, or None where there is no usable one."""
        entry = self.scans.get(stem)
        if not self.reuse or entry is None or entry.get("points") != points:
            return None
        path = self.folder / f"{stem}_pred.npy"
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if labels.shape != (points,) or labels.dtype != np.int64:
            return None
        if self.probabilities and not (self.folder / f"{stem}_prob.npy").is_file():
            return None
        return labels, list(entry.get("votes", []))

    def put(
        self, stem: str, labels: NDArray, probabilities: NDArray | None, votes: Sequence[int]
    ) -> None:
        """Write one scan's files and note them."""
        if not self.save:
            return
        if probabilities is not None:
            write_atomic(
                self.folder / f"{stem}_prob.npy", lambda file: np.save(file, probabilities)
            )
        write_atomic(self.folder / f"{stem}_pred.npy", lambda file: np.save(file, labels))
        self._own[stem] = {"points": len(labels), "votes": list(votes)}
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write this process's part of the record."""
        if self.save and self.folder.is_dir():
            self._write(self.record, self._own)
            self._saved = time.monotonic()

    def finish(self) -> None:
        """After the last scan, on all processes: one record for all of them."""
        if not self.save:
            return
        parts = comm.gather(self._own)
        if comm.is_main_process():
            merged: dict[str, dict[str, Any]] = {}
            for part in parts:
                merged.update(part)
            self._write(self.folder / "predictions.json", merged)
        comm.synchronize()
        if not comm.is_main_process():
            self.record.unlink(missing_ok=True)

    def _write(self, path: Path, scans: Mapping[str, Any]) -> None:
        content = {"made_with": self.made_with, "scans": scans if self.made_with else {}}
        write_atomic(path, lambda file: file.write(json.dumps(content).encode()))


def _read_record(path: Path) -> dict[str, Any]:
    """A record; one that is damaged or of another kind counts as empty."""
    try:
        content = json.loads(path.read_text())
        scans, made_with = content["scans"], content["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        scans = made_with = None
    if isinstance(scans, dict) and isinstance(made_with, dict):
        return {"made_with": made_with, "scans": scans}
    return {"made_with": None, "scans": {}}


def _differences(old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> list[str]:
    old, new = old or {}, new or {}
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


class Submission:
    """The submission files of a test, written to `submit.part` and renamed to `submit` when complete.

    Args:
        folder: `result`.
        datasets: the plain data sets under test; those with `write_submission(name, pred, folder)` take part, each
            also with `finish_submission(folder)` if it has one. Data sets of other kinds or roots get folders of
            their own.
        wanted: False writes none; True makes a scan that cannot be submitted an error; None warns of it.

    Raises:
        InputError: with `wanted=True` where no data set can write one.
    """

    def __init__(self, folder: Path, datasets: Sequence[Any], wanted: bool | None = None) -> None:
        self.final, self.part = folder / "submit", folder / "submit.part"
        self.strict, self.problem = wanted is True, ""
        able = (
            [d for d in datasets if hasattr(d, "write_submission")] if wanted is not False else []
        )
        if wanted and not able:
            kinds = ", ".join(dict.fromkeys(type(d).__name__ for d in datasets))
            raise InputError(
                f"test.save_submission=True: {kinds} has no write_submission(name, pred, folder); "
                "add one to the data set, or leave the option out"
            )
        keys = [(type(d), str(getattr(d, "data_root", ""))) for d in able]
        kinds_of = list(dict.fromkeys(keys))
        self._able = able
        self._below = [
            f"{kinds_of.index(key)}_{key[0].__name__}" if len(kinds_of) > 1 else "" for key in keys
        ]

    def prepare(self) -> None:
        """On the main process, before any process predicts: drop what an interrupted test left."""
        if self._able and self.part.exists():
            shutil.rmtree(self.part)

    def _folder(self, dataset: Any) -> Path | None:
        for able, below in zip(self._able, self._below):
            if able is dataset:
                return self.part / below if below else self.part
        return None

    def add(self, dataset: Any, name: str, labels: NDArray) -> None:
        """One scan's prediction (n,) int64."""
        folder = self._folder(dataset)
        if folder is None or self.problem:
            return
        try:
            dataset.write_submission(name, labels, folder)
        except InputError as error:
            if self.strict:
                raise
            self.problem = str(error)
            get_root_logger().warning(f"No submission is written: {error}")

    def finish(self) -> str | None:
        """After the last scan, on all processes: complete the files on the main one; returns the folder, if any."""
        problems = [problem for problem in comm.all_gather(self.problem) if problem]
        if not self._able:
            return None
        if comm.is_main_process():
            if not problems:
                self.part.mkdir(parents=True, exist_ok=True)
                done: set[Path] = set()
                for dataset in self._able:
                    folder = self._folder(dataset)
                    if folder in done or not hasattr(dataset, "finish_submission"):
                        continue
                    done.add(folder)
                    dataset.finish_submission(folder)
            # A submission of earlier predictions must not stay beside the new ones.
            if self.final.exists():
                shutil.rmtree(self.final)
            if problems:
                shutil.rmtree(self.part, ignore_errors=True)
            else:
                os.replace(self.part, self.final)
        comm.synchronize()
        return None if problems else str(self.final)
