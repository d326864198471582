"""Test a completion network, or a folder of completed clouds, on a split; log, metrics.json, scans.csv say how.

A row of the table is one number of solver steps:

    steps      of the solver, and the network calls that they cost for one scan: with guidance two each
    scores     see `metrics`: means over scans (IoU: of cells summed over scans), then over noise seeds, with the
               sample standard deviation over seeds where there are several
    seconds    of one scan, medians: `encode` the condition, once per scan; `sample`; `post`: cropping; `refine`.
               Reading, cropping and thinning the scan are the data loader's and not in it

A scan's noise depends on its name and the seed alone, so batches and processes change no score.
"""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pointcept_kd
from pointcept_kd.host import DATASETS, MODELS, InputError, comm, kd
from pointcept_kd.host.batches import EpochBatchSampler, build_loader
from pointcept_kd.host.checkpoint import load_checkpoint, load_into, unwrap, write_atomic
from pointcept_kd.host.config import default_setup
from pointcept_kd.host.hooks import progress
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.log import get_root_logger
from pointcept_kd.host.results import file_stems, weights_fingerprint
from pointcept_kd.host.runtime import complete, device_of, require

from .diffusion import Completer, scan_seeds
from .distillation import completer_weights, plain_completer
from .evaluator import READERS, _clouds, _read, scored_clouds
from .metrics import CELLS, CompletionScores, ScanScores, _plain
from .refinement import load_refinement
from .sampler import crop, inside

MODES = ("single",)
PARTS = ("encode", "sample", "post", "refine")


def load_completer(model: Any, weight: str, source: str = "the config") -> Completer:
    """A plain completer with the weights of a checkpoint, which must match it exactly; in evaluation mode.

    Args:
        model: its config, or that of a distillation, of which the student alone is built.
        weight: checkpoint of either.
        source: where the config is from, for messages.

    Raises:
        InputError: for a config that completes nothing, or weights that do not fit.
    """
    checkpoint = load_checkpoint(weight)
    network = MODELS.build(plain_completer(model, source))
    weights = completer_weights(checkpoint["state_dict"])
    report = load_into(network, weights, strict=True, source=weight)
    epoch = checkpoint.get("epoch", "unknown")
    get_root_logger().info(f"Weight {weight} of epoch {epoch}: {report}")
    return network.eval()


@dataclass(frozen=True)
class Setting:
    """What a scan is completed by: solver steps and noise seed; neither for a finished cloud."""

    steps: int | None
    seed: int | None


@dataclass(frozen=True)
class Row:
    """One completion of one scan: its scores, and the seconds of its parts."""

    scores: ScanScores
    seconds: Mapping[str, float] = field(default_factory=dict)
    warm: bool = True  # past the warm-up


@kd.TESTERS.register_module()
class CompletionTester:
    """Complete and score the scans of `data.test`.

    Writes `result/metrics.json`, `result/scans.csv` (one row per steps, seed and scan) and, where asked for, the
    completed clouds as `result/NAME.npy` (float32, (n, 3)), below `save_path`.

    Args:
        cfg: the run's config.
        model: the completer; None builds that of `cfg.model` (of a distillation, the student) and loads `cfg.weight`.
        test_loader: batches to test on instead of those of the config.
        verbose: one line per scan.
        mode: "single"; there is no other.
        steps: solver steps, or a list of such; None: the model's.
        guidance: scale of the guidance; None: the model's.
        seeds: of the noise, a number or a list; None: the model's.
        refine: checkpoint of a refiner, see `load_refinement`; the refined clouds are then scored.
        save_predictions: write the scored clouds; with one number of steps and one seed only.
        folder: score the finished clouds in this folder, by file name, instead of completing; such a test has no
            model. NAME.npy (n, 3 or more), NAME.bin (x, y, z, remission), or what else `READERS` reads; NAME is the
            scan's name with _ for /, or the part behind its last / where that is unique.
        cells, legacy, emd_points: see `CompletionScores`.
        threads: on the CPU; None: as many as torch has, and results whose last digits depend on it.
        warmup: scans at the beginning of each process whose seconds do not count.

    Raises:
        InputError: for options, weights, data and files that cannot be used.
    """

    def __init__(
        self,
        cfg: Any,
        model: nn.Module | None = None,
        test_loader: Any = None,
        verbose: bool = False,
        mode: str | None = None,
        steps: int | Sequence[int] | None = None,
        guidance: float | None = None,
        seeds: int | Sequence[int] | None = None,
        refine: str | None = None,
        save_predictions: bool = False,
        folder: str | None = None,
        cells: Sequence[float] = CELLS,
        legacy: bool = False,
        emd_points: int = 0,
        threads: int | None = 1,
        warmup: int = 3,
    ) -> None:
        self.cfg = cfg
        if model is None:
            if cfg.get("seed") is None:
                cfg["seed"] = 0
            complete(cfg)
            default_setup(cfg)
        if mode not in (None, *MODES):
            raise InputError(f"test.mode={mode!r}: completion has one mode, {MODES[0]}")
        require(cfg, "save_path", "data.test")
        chosen = (steps, guidance, seeds, refine)
        if folder is not None and (any(o is not None for o in chosen) or save_predictions):
            raise InputError(
                "test.folder scores finished clouds; leave out steps, guidance, seeds, refine and save_predictions"
            )
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise InputError(f"test.warmup={warmup!r}: expected a whole number of scans, 0 or more")
        if not isinstance(emd_points, int) or emd_points < 0:
            raise InputError(
                f"test.emd_points={emd_points!r}: expected a whole number of points, 0 or more"
            )
        self.logger, self.device, self.verbose = get_root_logger(), device_of(cfg), verbose
        self.scoring: dict[str, Any] = dict(
            cells=tuple(cells), legacy=bool(legacy), emd_points=emd_points
        )
        CompletionScores(**self.scoring)  # says what is wrong with them before anything runs
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(
                f"test.threads={threads!r}: expected a whole number, 1 or more, or None"
            )
        self.threads = threads
        self.warmup, self.save_predictions, self.weight = warmup, save_predictions, None
        self.source = "a given loader" if test_loader is not None else _described(cfg)
        self.test_loader = self._build_loader() if test_loader is None else test_loader
        self.names = self._all_names()
        self.model: Completer | None = None
        self.folder, self.refine, self.refiner = folder, refine, None
        if folder is not None:
            self.files = self._files(Path(folder))
            self.settings = [Setting(None, None)]
            return
        network = self._load() if model is None else unwrap(model)
        if not isinstance(network, Completer):
            raise InputError(f"{type(network).__name__} completes no scans; see configs/completion")
        self.model = network.to(self.device).eval()
        if refine is not None:
            self.refiner = load_refinement(refine, device=self.device)
        self.steps = _numbers("test.steps", steps, network.steps, 1, len(network.schedule) - 1)
        self.seeds = _numbers("test.seeds", seeds, network.seed, 0, 2**31 - 1)
        if guidance is not None and not _is_number(guidance):
            raise InputError(f"test.guidance={guidance!r}: expected a number")
        self.guidance = float(network.guidance if guidance is None else guidance)
        self.settings = [Setting(count, seed) for count in self.steps for seed in self.seeds]
        if save_predictions and len(self.settings) > 1:
            raise InputError(
                f"test.save_predictions=True writes one cloud per scan, and there are {len(self.steps)} numbers of "
                f"steps and {len(self.seeds)} seeds: choose one of each"
            )

    def _load(self) -> Completer:
        require(self.cfg, "model")
        self.weight = self.cfg.get("weight")
        if self.weight is None:
            raise InputError(
                "testing needs a checkpoint: give --options weight=SAVE_PATH/model/model_best.pth"
            )
        return load_completer(self.cfg["model"], self.weight, self.cfg.filename or "the config")

    def _build_loader(self) -> Any:
        """Batches in order, each scan once over all processes."""
        entry = self.cfg["data"]["test"]
        dataset = DATASETS.build({**entry, "loop": 1} if "loop" in entry else entry)
        if len(dataset) == 0:
            raise InputError("the test set has no samples: check its data_root and split")
        seed = self.cfg.get("seed") or 0
        sampler = EpochBatchSampler(
            len(dataset),
            self.cfg.get("batch_size_test_per_gpu") or 1,
            shuffle=False,
            seed=seed,
            rank=comm.get_rank(),
            world=comm.get_world_size(),
            even=False,
        )
        workers = self.cfg.get("num_worker_per_gpu", 0)
        return build_loader(dataset, sampler, seed, workers, collate_fn)

    def _all_names(self) -> list[str]:
        """The names of all scans; empty where the data set cannot tell them."""
        dataset = getattr(self.test_loader, "dataset", None)
        dataset = getattr(dataset, "dataset", dataset)
        named = getattr(dataset, "get_data_name", None)
        if dataset is None or named is None:
            return []
        return [str(named(i)) for i in range(len(dataset))]

    def _files(self, folder: Path) -> dict[str, Path]:
        """The file of every scan by the scan's name."""
        if not self.names:
            raise InputError("test.folder needs a data set that names its scans")
        found = _clouds(folder, READERS)
        last = [name.rpartition("/")[2] for name in self.names]
        files: dict[str, Path] = {}
        for name, stem, short in zip(self.names, file_stems(self.names), last):
            if stem in found:
                files[name] = found[stem]
            elif short in found and last.count(short) == 1:
                files[name] = found[short]
            else:
                raise InputError(
                    f"{folder} has no cloud of scan {name}, expected {stem} with "
                    f"{' or '.join(sorted(READERS))}"
                )
        return files

    # ---------------------------------------------------------------------------------------- testing

    @torch.no_grad()
    def test(self) -> dict[str, Any]:
        """Run over the split.

        Returns:
            What is in `metrics.json`: `protocol`, `data`, `scans`, `weight`, `settings`, `made_with`, and `rows`, one
            per number of steps.
        """
        folder = Path(self.cfg["save_path"]) / "result"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"save_path={self.cfg['save_path']}: cannot create {folder} ({error.strerror}); choose another"
            ) from error
        if comm.is_main_process():
            # An interrupted test must not leave the scores of another one.
            for name in ("metrics.json", "scans.csv"):
                (folder / name).unlink(missing_ok=True)
        self.logger.info(">>>>>>>>>>>>>>>> Start Testing (completion) >>>>>>>>>>>>>>>>")
        stems = dict(zip(self.names, file_stems(self.names)))
        own: dict[Setting, list[Row]] = {setting: [] for setting in self.settings}
        loader = progress(self.test_loader, len(self.test_loader), "Test")
        for number, (name, coord, target) in enumerate(self._scans(loader)):
            for setting in self.settings:
                cloud, seconds = self._completed(name, coord, setting)
                scores = CompletionScores(**self.scoring).add(name, cloud, target)
                own[setting].append(Row(scores, seconds, number >= self.warmup))
                if self.save_predictions:
                    stem = stems.get(name) or file_stems([name])[0]
                    write_atomic(folder / f"{stem}.npy", partial(np.save, arr=cloud))
                if self.verbose:
                    self._tell(number, setting, own[setting][-1])
        rows: dict[Setting, list[Row]] = {
            setting: [row for part in comm.all_gather(own[setting]) for row in part]
            for setting in self.settings
        }
        for found in rows.values():
            found.sort(key=lambda row: row.scores.name)
        return self._report(rows, folder)

    def _scans(self, loader: Any) -> Iterator[tuple[str, NDArray, NDArray]]:
        """Name, condition points (m, 3) and true cloud (n, 3) of every scan of this process."""
        for batch in loader:
            if "coord" not in batch or "offset" not in batch:
                raise InputError("data.test gives no `coord` and `offset`; completion needs them")
            scans = {"completed": batch["coord"], "completed_offset": batch["offset"]}
            yield from scored_clouds(scans, batch)

    def _completed(
        self, name: str, coord: NDArray, setting: Setting
    ) -> tuple[NDArray, dict[str, float]]:
        """The cloud of a scan to be scored, (n, 3) float32, and the seconds that its parts took."""
        if self.model is None or setting.steps is None or setting.seed is None:
            return np.asarray(_read(self.files[name], READERS), np.float32), {}
        scan = torch.from_numpy(coord).to(self.device)
        ends = torch.tensor([len(scan)], device=self.device)
        marks = [self._now()]
        with self._timed(self.model.encoder) as encoded:
            points, rows = self.model.complete(
                scan,
                ends,
                scan_seeds([name], setting.seed),
                setting.steps,
                self.guidance,
                self.threads,
            )
        marks.append(self._now())
        points, rows = crop(points, rows, inside(points, rows, scan, ends, self.model.max_range))
        marks.append(self._now())
        if self.refiner is not None:
            points, rows = self.refiner.refine(points, rows, self.threads)
        marks.append(self._now())
        sampled, post, refined = (after - before for before, after in pairwise(marks))
        spent = (sum(encoded), sampled - sum(encoded), post, refined)
        kept = len(PARTS) - (self.refiner is None)
        return points.float().cpu().numpy(), dict(zip(PARTS[:kept], spent))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _timed(self, module: nn.Module) -> Iterator[list[float]]:
        """Within it, the seconds of every call of a module."""
        starts: list[float] = []
        spent: list[float] = []

        def before(*_: Any) -> None:
            starts.append(self._now())

        def after(*_: Any) -> None:
            spent.append(self._now() - starts.pop())

        handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        try:
            yield spent
        finally:
            for handle in handles:
                handle.remove()

    # -------------------------------------------------------------------------------------- reporting

    def _tell(self, number: int, setting: Setting, row: Row) -> None:
        how = "" if setting.steps is None else f", {setting.steps} steps, noise seed {setting.seed}"
        values, seconds = row.scores.values, sum(row.seconds.values())
        self.logger.info(
            f"Test: {row.scores.name} [{number + 1}]{how}: {row.scores.points_pred} points"
            + (f" in {seconds:.2f} s" if row.seconds else "")
            + f", CD {values['cd']:.4f} m, JSD-BEV {values['jsd_bev']:.4f}"
        )

    def _report(self, rows: Mapping[Setting, list[Row]], folder: Path) -> dict[str, Any]:
        table = []
        for steps in dict.fromkeys(setting.steps for setting in self.settings):
            table.append(
                self._row(steps, {s: found for s, found in rows.items() if s.steps == steps})
            )
        first = next(iter(rows.values()))
        model, settings = self.model, {**self.scoring, "cells": list(self.scoring["cells"])}
        content: dict[str, Any] = {
            "protocol": self._protocol(len(first)),
            "mode": MODES[0],
            "data": self.source,
            "scans": len(first),
            "weight": self.weight,
            "weights": None if model is None else weights_fingerprint(model),
            "refine": None if self.refine is None else str(self.refine),
            "refine_weights": None if self.refiner is None else weights_fingerprint(self.refiner),
            "folder": None if self.folder is None else str(self.folder),
            "settings": settings,
            "rows": table,
            "made_with": self._environment(),
        }
        if model is not None:
            settings.update(
                guidance=self.guidance, seeds=self.seeds, process=model.process,
                repeat=model.repeat, sampling=dict(model.sampling), max_range=model.max_range,
                warmup=self.warmup,
            )  # fmt: skip
        self._show(content)
        if comm.is_main_process():
            text = json.dumps(content, indent=1).encode()
            write_atomic(folder / "metrics.json", lambda file: file.write(text))
            lines = _csv(rows)
            write_atomic(folder / "scans.csv", lambda file: file.write(lines))
        self.logger.info(f"Results are in {folder}")
        self.logger.info("<<<<<<<<<<<<<<<<< End Testing <<<<<<<<<<<<<<<<<")
        return content

    def _row(self, steps: int | None, found: Mapping[Setting, list[Row]]) -> dict[str, Any]:
        """What `metrics.json` says of one number of steps."""
        seeds, values = {}, []
        for setting, rows in found.items():
            scores = CompletionScores(**self.scoring)
            scores.rows = [row.scores for row in rows]
            seeds[str(setting.seed)] = scores.as_dict(rows=False)
            values.append(scores.summary().values())
        columns = {key: [value[key] for value in values] for key in values[0]}
        timed = [row.seconds for rows in found.values() for row in rows if row.warm and row.seconds]
        parts = [part for part in PARTS if timed and part in timed[0]]
        seconds = {part: statistics.median(s[part] for s in timed) for part in parts}
        if timed:
            seconds["total"] = statistics.median(sum(s.values()) for s in timed)
        calls = None
        if steps is not None:
            calls = steps * (1 if self.guidance in (0, 1) else 2)
        return {
            "steps": steps,
            "calls": calls,
            "mean": {key: _plain(statistics.fmean(column)) for key, column in columns.items()},
            "std": {key: _plain(_deviation(column)) for key, column in columns.items()},
            "seeds": seeds,
            "seconds": {part: round(value, 6) for part, value in seconds.items()},
            "timed": len(timed),
        }

    def _protocol(self, scans: int) -> str:
        clouds = "finished clouds"
        if self.model is not None:
            count = len(self.seeds)
            clouds = f"completions from {count} noise seed{'s' * (count > 1)}"
            clouds += ", cropped and refined" if self.refiner is not None else ", cropped"
        text = (
            f"{scans} scans of {self.source}: {clouds}, against the true cloud; CD, JSD and F are means over scans, "
            "IoU is of cells summed over scans"
        )
        if self.model is None:
            return text
        return (
            f"{text}; seconds are medians after {self.warmup} scans of warm-up, without loading, cropping and thinning "
            "the scan"
        )

    def _environment(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": self.threads or torch.get_num_threads(),
            "processes": comm.get_world_size(),
            "dtype": "float32",
            "pointcept_kd": pointcept_kd.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }

    def _show(self, content: Mapping[str, Any]) -> None:
        """The table, line by line."""
        log, rows = self.logger.info, content["rows"]
        log(f"Test result ({content['protocol']})")
        several = len(self.settings) > len(rows)
        parts = [*rows[0]["seconds"]]
        head = ["steps", "calls", *_columns(rows[0]["mean"]), *(f"{part} s" for part in parts)]
        lines = [head]
        for row in rows:
            line = ["-" if row[key] is None else str(row[key]) for key in ("steps", "calls")]
            for key in head[2 : len(head) - len(parts)]:
                mean, std = row["mean"][key], row["std"][key]
                cell = "inf" if mean is None else f"{mean:.4f}"
                line.append(f"{cell} ± {std:.4f}" if several and std is not None else cell)
            lines.append([*line, *(f"{row['seconds'][part]:.3f}" for part in parts)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            log("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))
        empty = sum(seed["empty"] for row in rows for seed in row["seeds"].values())
        if empty:
            self.logger.warning(f"{empty} completions have no points: mean distances are infinite")


def _columns(values: Mapping[str, Any]) -> list[str]:
    """The scores that the table shows, of those there are."""
    ious = [key for key in values if key.startswith("iou_")]
    shown = ["cd", "jsd_bev", "jsd_3d", *ious, "f", "emd"]
    return [key for key in shown if key in values]


def _csv(rows: Mapping[Setting, list[Row]]) -> bytes:
    """One line per steps, seed and scan."""
    lines = [
        {
            "steps": setting.steps,
            "seed": setting.seed,
            **row.scores.as_dict(),
            **{f"seconds_{part}": round(spent, 6) for part, spent in row.seconds.items()},
        }
        for setting, found in rows.items()
        for row in found
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _described(cfg: Any) -> str:
    split = cfg["data"]["test"].get("split")
    return "data.test" + (f", split {split}" if split is not None else "")


def _deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of a single value, NaN where one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(name: str, value: Any, default: int, low: int, high: int) -> list[int]:
    """A whole number or several different ones as a list.

    Raises:
        InputError: for something else, and for numbers outside low .. high.
    """
    numbers = [default] if value is None else value
    numbers = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
    fine = all(type(number) is int and low <= number <= high for number in numbers)
    if not numbers or not fine or len(set(numbers)) < len(numbers):
        raise InputError(
            f"{name}={value!r}: expected a whole number from {low} to {high}, or a list of different ones"
        )
    return numbers
