r"""Put networks side by side: parameters, multiply-accumulates, latency, memory, mIoU.

    python tools/benchmark.py --config-file configs/sim/semseg-pt-v3m1-0-base.py \
        --config-file configs/kd/ptv3_to_student.py
    python tools/benchmark.py --config-file A.py --config-file B.py --weight a.pth --weight b.pth --out table.md
    python tools/benchmark.py --config-file A.py --config-file B.py --random 60000 --threads 1 --dtype bfloat16

Ratios refer to the first network. Of a distillation config the student alone is measured. Every network sees the same
scans, prepared by its own config; their preparation is not timed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pointcept_kd
from pointcept_kd.data.semantic_kitti import read_scan
from pointcept_kd.host import DATASETS, MODELS, InputError
from pointcept_kd.host.batches import EpochBatchSampler, build_loader, random_state
from pointcept_kd.host.checkpoint import (
    check_grids,
    load_checkpoint,
    load_into,
    student_weights,
    write_atomic,
)
from pointcept_kd.host.config import Config, fill_defaults
from pointcept_kd.host.dialect import parse_options
from pointcept_kd.host.hooks import compare as compare_labels
from pointcept_kd.host.hooks import progress
from pointcept_kd.host.loader import Compose, collate_fn
from pointcept_kd.host.metrics import class_names, confusion, summary
from pointcept_kd.host.runtime import device_of, read_config, require, run_tool, to_device
from pointcept_kd.host.tester import plain_model
from pointcept_kd.ops import backend
from tools.report import duration, percent, points, quantity

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "float16", "bfloat16")
# What only training and scoring read: a network in use does not get it.
LABEL_KEYS = ("segment", "origin_segment", "inverse")
MEGABYTE = 1e6

Batch = dict[str, Any]


@dataclass
class Entry:
    """One network to measure.

    Attributes:
        config: a config file, or a `Config`; of a distiller's the student is measured.
        weight: checkpoint to score; None measures an untrained network and no mIoU.
        name: its name in the table; by default the config's stem.
        options: dotted config keys to change.
    """

    config: str | Path | Config
    weight: str | Path | None = None
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Candidate:
    """A network that is ready to run, with its scans on the device."""

    cfg: Any
    model: nn.Module
    scans: list[Batch]
    row: dict[str, Any]


# ------------------------------------------------------------------------------------- measuring


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two operations for every multiply-accumulate of q k^T and of its product with v; arguments are shapes."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _attention_kernels() -> dict[Any, Callable[..., int]]:
    """PyTorch's attention kernels; its counter knows those of CUDA alone, and not in every release all of them."""
    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    found = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names)
    return {kernel: _attention_flops for kernel in found if kernel is not None}


# What makes every product of ours one that PyTorch's counter knows, without rows that only fill up a block.
PLAIN_BACKENDS = {"POINTCEPT_KD_ATTENTION": "sdpa", "POINTCEPT_KD_PRODUCTS": "torch"}


@contextmanager
def _plain_backends() -> Iterator[None]:
    """Attention and products through PyTorch's own functions, whatever else is installed or asked for."""
    before = {name: os.environ.get(name) for name in PLAIN_BACKENDS}
    level = backend.log.level
    os.environ.update(PLAIN_BACKENDS)
    backend.onednn_linear.cache_clear()
    backend.log.setLevel(logging.WARNING)  # the choices it would report are not the user's
    try:
        yield
    finally:
        backend.log.setLevel(level)
        backend.onednn_linear.cache_clear()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of every matrix product, dense convolution and attention that `run` executes.

    A sparse convolution counts its existing pairs of cells times input times output channels, the centre tap included;
    attention counts whole patches, also the copied points of a scan's last one. Sums, norms, activations and sorting
    are not counted. Backends are PyTorch's own meanwhile, so that the count does not depend on what is installed.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_attention_kernels())
    with _plain_backends(), torch.no_grad(), counter:
        run()
    return counter.get_total_flops() // 2


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes of tensors, kernels' own buffers included, that `run` holds at once beyond what was there before.

    On CUDA from the allocator's counters; on the CPU from every allocation that PyTorch's profiler sees, which leaves
    out what numpy and scipy allocate. None where the profiler reports no allocation.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library reports its own start and stop on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate(change for _, change in changes), default=None)


def _seconds(run: Callable[[int], Any], number: int, device: torch.device) -> float:
    """Wall time of `run(number)`, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved_seconds(
    runs: Sequence[Callable[[int], Any]], device: torch.device, warmup: int, repeats: int
) -> list[list[float]]:
    """Times of `repeats` calls of each run, taken in turn, so that what else the machine does hits all alike.

    Each run gets the number of the round; `warmup` rounds before them are not kept.
    """
    times: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall upon one of the networks by chance
    try:
        for number in progress(range(-warmup, repeats), warmup + repeats, "Latency"):
            for run, spent in zip(runs, times):
                seconds = _seconds(run, number, device)
                if number >= 0:
                    spent.append(seconds)
    finally:
        if collecting:
            gc.enable()
    return times


def _nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


# ----------------------------------------------------------------------------------------- scans


def _split_entry(cfg: Any, split: str) -> Mapping[str, Any]:
    require(cfg, f"data.{split}")
    entry = cfg["data"][split]
    if entry.get("test_mode"):
        raise InputError(
            f"data.{split} has test_mode=True and gives fragments, not scans: use --split val, or set "
            f"--options data.{split}.test_mode=false"
        )
    return entry


def _seed(cfg: Any) -> int:
    return cfg["seed"] or 0


def dataset_batches(cfg: Any, split: str, count: int | None = None) -> tuple[int, Iterator[Batch]]:
    """The number of the first `count` scans of a split (None: all), and them, one a batch, as an evaluator sees them.

    Raises:
        InputError: for a config without the split, or data that are not there.
    """
    dataset = DATASETS.build(_split_entry(cfg, split))
    count = len(dataset) if count is None else min(count, len(dataset))
    if count == 0:
        raise InputError(f"data.{split} has no samples: check its data_root and split")
    sampler = EpochBatchSampler(len(dataset), 1, shuffle=False, seed=_seed(cfg), even=False)
    # Processes pay off for a split, not for a handful of scans.
    workers = min(cfg["num_worker"] or 0, os.cpu_count() or 1) if count > 16 else 0
    return count, islice(build_loader(dataset, sampler, _seed(cfg), workers), count)


def file_batch(cfg: Any, split: str, path: str | Path) -> Batch:
    """A SemanticKITTI scan (float32 x, y, z, remission) through the transforms of a split."""
    scan = read_scan(path)
    finite = np.isfinite(scan).all(1)
    if not finite.all():
        raise InputError(
            f"{path}: row {int(np.argmin(finite))} is not finite; repair the file or take another"
        )
    sample = {
        "coord": np.ascontiguousarray(scan[:, :3]),
        "strength": np.ascontiguousarray(scan[:, 3:]),
        "segment": np.full(len(scan), cfg["data"].get("ignore_index", -1), np.int32),
        "name": Path(path).stem,
    }
    transform = Compose(_split_entry(cfg, split).get("transform"))
    with random_state(_seed(cfg)):
        return collate_fn([transform(sample)])


def street_cells(count: int, size: float = 0.05, seed: int = 0) -> np.ndarray:
    """`count` different cells (count, 3) int64 from 0 on, of a straight street between two walls, as a LiDAR sees it.

    Rays of a sensor 1.73 m above the ground, 25 degrees down to 3 up, meet the ground, a wall 8 m to the left or right,
    or nothing within 50 m; ranges have 2 cm of noise. The cells nearest to the sensor are taken, so that beams keep
    their distances; where 64 beams of 2048 points are too few, there are more.
    """
    draw = np.random.default_rng(seed)
    beams, columns = 64, 2048
    while True:
        up = np.radians(np.linspace(-25, 3, beams))[:, None]
        turn = np.linspace(0, 2 * np.pi, columns, endpoint=False)[None]
        # Rays above the horizon and along the street: to where nothing is seen any more.
        ground = 1.73 / np.maximum(-np.tan(up), 0.02)
        flat = np.minimum(ground, 8 / np.maximum(np.abs(np.sin(turn)), 0.02))
        flat = flat + draw.normal(0, 0.02, flat.shape)
        rays = np.stack([flat * np.cos(turn), flat * np.sin(turn), flat * np.tan(up)], -1)
        rays = rays[flat < 50]
        cells = np.floor(rays / size).astype(np.int64)
        # One number per cell sorts faster than three.
        _, first = np.unique(cells @ np.array([1 << 40, 1 << 20, 1]), return_index=True)
        cells = cells[first]
        if len(cells) >= count:
            break
        if beams >= 256:
            raise InputError(
                f"a random street of {count} voxels of {size} m is more than a sensor of {beams} beams sees; ask for "
                f"at most {len(cells)}"
            )
        beams, columns = 2 * beams, 2 * columns
    cells = cells[np.argsort((cells**2).sum(1), kind="stable")[:count]]
    return cells - cells.min(0)


def random_batch(cfg: Any, split: str, count: int) -> Batch:
    """A batch of `street_cells` with features of the network's own width, for machines without data."""
    model = plain_model(cfg["model"])
    channels = (model.get("backbone") or model).get("in_channels", 4)
    transforms = (cfg.get("data") or {}).get(split, {}).get("transform") or []
    size = next((t["grid_size"] for t in transforms if "grid_size" in t), 0.05)
    cells = torch.from_numpy(street_cells(count, size=size))
    coord = (cells.float() + 0.5) * size
    draw = torch.Generator().manual_seed(0)
    rest = torch.rand(count, max(0, channels - 3), generator=draw)
    return {
        "coord": coord,
        "grid_coord": cells,
        "feat": torch.cat([coord, rest], 1)[:, :channels],
        "offset": torch.tensor([count]),
        "name": ["random"],
    }


def _scans(
    cfg: Any, split: str, count: int, files: Sequence[str | Path], cells: int | None
) -> list[Batch]:
    if cells is not None:
        return [random_batch(cfg, split, cells)]
    if files:
        return [file_batch(cfg, split, path) for path in files]
    try:
        return list(dataset_batches(cfg, split, count)[1])
    except InputError as error:
        raise InputError(
            f"{error}; or measure without the data set: --points FILE.bin or --random 60000"
        ) from error


# ------------------------------------------------------------------------------------- comparing


def _config(entry: Entry) -> Any:
    if isinstance(entry.config, (str, Path)):
        cfg = read_config(entry.config, entry.options)
    else:
        cfg = fill_defaults(copy.deepcopy(entry.config))
        cfg.merge_from_dict(entry.options)
    require(cfg, "model")
    return cfg


def _name(entry: Entry, cfg: Any, taken: Sequence[str]) -> str:
    name = entry.name or (Path(cfg.filename).stem if cfg.filename else "network")
    if name not in taken:
        return name
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def _build(cfg: Any, weight: str | Path | None, device: torch.device) -> nn.Module:
    with random_state(_seed(cfg)):
        model: nn.Module = MODELS.build(plain_model(cfg["model"]))
    if weight is not None:
        checkpoint = load_checkpoint(weight)
        check_grids(model, checkpoint, weight)
        weights = student_weights(checkpoint["state_dict"])
        load_into(model, weights, strict=True, source=weight)
    return model.to(device).eval()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{name}={value}: expected a whole number, at least {least}")


@torch.no_grad()
def compare(
    entries: Sequence[Entry | Mapping[str, Any]],
    *,
    split: str = "val",
    max_scans: int = 5,
    files: Sequence[str | Path] = (),
    random_cells: int | None = None,
    repeats: int = 10,
    warmup: int = 2,
    threads: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    latency: bool = True,
    miou: bool = True,
    miou_scans: int | None = None,
) -> list[dict[str, Any]]:
    """Measure networks on the same scans.

    Args:
        entries: the networks, as `Entry` or as a dict of its attributes; the first is what ratios refer to.
        split: whose scans are taken, `data.<split>` of each config.
        max_scans: its first scans, on which MACs, latency and memory are measured.
        files: `.bin` scans to take instead.
        random_cells: size of a random street to take instead.
        repeats, warmup: timed forwards of each network, going round the scans, after `warmup` (at least 2) others.
        threads: CPU threads; None leaves them as they are.
        device: None takes CUDA where there is one, else the CPU.
        dtype: float32, or float16 or bfloat16 for mixed precision.
        latency, miou: measure these; mIoU needs the entry's weight.
        miou_scans: score the first scans of the split only.

    Returns:
        one dict per network, in order:
            name, config, weight     str; config and weight may be None
            parameters               of the network that runs, the student of a distiller
            macs                     multiply-accumulates per scan, mean over the scans, see `count_macs`
            latency_ms               median time of a forward; None if not asked for. `latency_all_ms`: each one
            memory_mb                weights + scan + the most that the forward on the largest scan holds, 10^6 bytes;
                                     None where it cannot be measured
            scans, voxels            names and sizes of the scans
            miou                     all classes, absent = 0; None if not asked for. `miou_present`: present classes
            per_class_iou            class name to IoU, None for an absent class
            miou_protocol            how many scans and what was compared, in words
            relative                 parameters, macs, latency_ms, memory_mb as multiples of the first network's

    Raises:
        InputError: for configs, weights, data or settings that cannot be used.
    """
    for name, value, least in (
        ("max_scans", max_scans, 1),
        ("random", random_cells, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 2),
        ("threads", threads, 1),
        ("miou_scans", miou_scans, 1),
    ):
        _at_least(name, value, least)
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if not entries:
        raise InputError("no network given: name at least one config")
    device = device_of({"device": None if device is None else str(device)})

    def mixed() -> Any:
        return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")

    candidates = []
    for item in entries:
        entry = item if isinstance(item, Entry) else Entry(**item)
        cfg = _config(entry)
        row = {
            "name": _name(entry, cfg, [c.row["name"] for c in candidates]),
            "config": cfg.filename,
            "weight": None if entry.weight is None else str(entry.weight),
        }
        model = _build(cfg, entry.weight, device)
        scans = to_device(_scans(cfg, split, max_scans, files, random_cells), device)
        candidates.append(_Candidate(cfg, model, scans, row))

    with _threads(threads):
        for candidate in candidates:
            _size(candidate, device, mixed)
        if latency:
            runs = [
                lambda i, c=c: _forward(c, c.scans[i % len(c.scans)], mixed) for c in candidates
            ]
            for c, times in zip(candidates, interleaved_seconds(runs, device, warmup, repeats)):
                c.row["latency_all_ms"] = [1e3 * t for t in times]
                c.row["latency_ms"] = statistics.median(c.row["latency_all_ms"])
        for candidate in candidates:
            if miou and candidate.row["weight"] is not None:
                candidate.row.update(_score(candidate, split, miou_scans, device, mixed))
    rows = [candidate.row for candidate in candidates]
    for row in rows:
        row["relative"] = {
            key: row[key] / rows[0][key] if row[key] and rows[0][key] else None
            for key in ("parameters", "macs", "latency_ms", "memory_mb")
        }
    return rows


def _forward(candidate: _Candidate, scan: Batch, mixed: Callable[[], Any]) -> dict[str, Any]:
    """The network's answer to a scan without labels."""
    with mixed():
        return candidate.model({k: v for k, v in scan.items() if k not in LABEL_KEYS})


def _size(candidate: _Candidate, device: torch.device, mixed: Callable[[], Any]) -> None:
    """Fill in what does not depend on the clock; None for what may follow."""
    model, scans = candidate.model, candidate.scans
    voxels = [int(scan["offset"][-1]) for scan in scans]
    macs = [
        count_macs(lambda scan=scan: _forward(candidate, scan, mixed))
        for scan in progress(scans, len(scans), f"MACs {candidate.row['name']}")
    ]
    largest = scans[voxels.index(max(voxels))]
    inputs = [value for key, value in largest.items() if key not in LABEL_KEYS]
    held = _nbytes(model.parameters()) + _nbytes(model.buffers()) + _nbytes(inputs)
    peak = peak_bytes(lambda: _forward(candidate, largest, mixed), device)
    names = [scan.get("name") for scan in scans]
    candidate.row.update(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=round(sum(macs) / len(macs)),
        latency_ms=None,
        latency_all_ms=[],
        memory_mb=None if peak is None else (held + peak) / MEGABYTE,
        scans=[name[0] if name else f"scan {i}" for i, name in enumerate(names)],
        voxels=voxels,
        miou=None,
        miou_present=None,
        per_class_iou=None,
        miou_protocol=None,
    )


def _score(
    candidate: _Candidate,
    split: str,
    limit: int | None,
    device: torch.device,
    mixed: Callable[[], Any],
) -> dict[str, Any]:
    """The host's mIoU on a split: predictions at raw points through `inverse`, as `SemSegEvaluator` compares them."""
    cfg = candidate.cfg
    require(cfg, "data.num_classes")
    classes, ignore = cfg["data"]["num_classes"], cfg["data"].get("ignore_index", -1)
    names = class_names(cfg["data"])
    count, batches = dataset_batches(cfg, split, limit)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    compared = ""
    for batch in progress(batches, count, f"mIoU {candidate.row['name']}"):
        batch = to_device(batch, device)
        if "segment" not in batch and "origin_segment" not in batch:
            raise InputError(
                f"the scans of data.{split} have no labels: Collect segment, or measure with --no-miou"
            )
        logits = _forward(candidate, batch, mixed)["seg_logits"]
        pred, target, compared = compare_labels(logits, batch)
        total += confusion(pred, target, classes, ignore).cpu()
    scores = summary(total)
    if not scores.points:
        raise InputError(
            f"data.{split} has no labelled point: choose another --split, or measure with --no-miou"
        )
    return {
        "miou": scores.miou,
        "miou_present": scores.miou_present,
        "per_class_iou": {
            name: iou if present else None
            for name, iou, present in zip(names, scores.iou, scores.present)
        },
        "miou_protocol": f"{count} scans of data.{split}; {scores.protocol(compared)}",
    }


# ------------------------------------------------------------------------------------- reporting


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files were changed; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [
        git,
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "pointcept_kd": pointcept_kd.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cell(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} (×{ratio:.3g})"


def table(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[list[str]]:
    """Header and cells of the comparison; ratios and differences refer to the first row."""
    scans, kind = len(rows[0]["scans"]), settings["device"].partition(":")[0]
    where = "allocated on CUDA" if kind == "cuda" else "allocated by PyTorch, numpy left out"
    header = [
        "network",
        "parameters",
        f"voxels per scan (mean of {scans})",
        f"MACs per scan (mean of {scans})",
        f"latency per scan (median of {settings['repeats']})",
        f"peak memory, MB (weights + scan + forward; {where})",
        "mIoU",
    ]
    body = []
    for i, row in enumerate(rows):
        relative = row["relative"] if i else dict.fromkeys(row["relative"])
        score, memory, spent = row["miou"], row["memory_mb"], row["latency_ms"]
        against = "" if not i or score is None else rows[0]["miou"]
        scored = "not measured" if score is None else percent(score, 2)
        if isinstance(against, float):
            scored += f" ({points(score - against)} points)"
        body.append(
            [
                # A bar would end the cell.
                row["name"].replace("|", "\\|"),
                _cell(quantity(row["parameters"]), relative["parameters"]),
                f"{statistics.mean(row['voxels']):,.0f}",
                _cell(quantity(row["macs"]), relative["macs"]),
                "not measured"
                if spent is None
                else _cell(duration(spent / 1e3), relative["latency_ms"]),
                "not measured"
                if memory is None
                else _cell(f"{memory:,.0f}", relative["memory_mb"]),
                scored,
            ]
        )
    keep = [True] * 4 + [settings["latency"], True, any(r["miou"] is not None for r in rows)]
    return [[cell for cell, kept in zip(line, keep) if kept] for line in (header, *body)]


def markdown(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], made: Mapping[str, Any]
) -> str:
    """The table, and under it how it was made."""
    lines = table(rows, settings)
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where = f"{made['gpu']} ({made['cpu']})" if made["gpu"] else made["cpu"]
    threads = settings["threads"]
    kind = "float32" if settings["dtype"] == "float32" else f"mixed precision, {settings['dtype']}"
    notes = [
        f"{settings['device']}: {where}, {threads} thread{'s' if threads != 1 else ''}; {kind}; PyTorch "
        f"{made['torch']}, NumPy {made['numpy']}, Python {made['python']}; pointcept_kd {made['pointcept_kd']}, "
        f"commit {made['commit'] or 'unknown'}; {made['date']}.",
        f"Scans: {settings['source']}. Batches of one scan; its reading and voxelisation are not counted.",
    ]
    if settings["latency"]:
        notes.append(
            f"Latency: {settings['repeats']} timed forwards of each network after {settings['warmup']} to warm up, the "
            "networks in turn, going round the scans."
        )
    notes += [
        f"mIoU of {row['name']}: {row['miou_protocol']}." for row in rows if row["miou"] is not None
    ]
    return "\n\n".join([text, *notes, f"`{settings['command']}`"]) + "\n"


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    head, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{head}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="config of a network; repeat for each",
    )
    add(
        "--weight",
        action="append",
        default=[],
        metavar="FILE",
        help="its checkpoint, in the same order; `none` for a network without one",
    )
    add("--name", action="append", default=[], metavar="TEXT", help="its name, in the same order")
    add("--split", default="val", help="split whose scans are measured and scored (default val)")
    add(
        "--max-scans",
        type=int,
        default=5,
        metavar="N",
        help="first scans on which MACs, latency and memory are measured (default 5)",
    )
    add(
        "--points",
        action="append",
        default=[],
        metavar="FILE.bin",
        help="measure on this scan (float32 x, y, z, remission) instead; may be repeated",
    )
    add("--random", type=int, metavar="N", help="measure on a random street of N voxels instead")
    add("--repeats", type=int, default=10, metavar="N", help="timed forwards (default 10)")
    add("--warmup", type=int, default=2, metavar="N", help="forwards before (default and least: 2)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--device", help="cpu, cuda or cuda:1 (default: CUDA where there is one)")
    add("--dtype", default="float32", help="float32 (default), or float16 or bfloat16 by autocast")
    add("--miou-scans", type=int, metavar="N", help="score the first N scans only (default: all)")
    add("--no-miou", action="store_true", help="do not score")
    add("--no-latency", action="store_true", help="do not time")
    add("--out", type=Path, metavar="FILE.md", help="also write the table to this file")
    add("--json", type=Path, metavar="FILE.json", help="write all numbers to this file")
    add(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change config keys of every network",
    )
    return parser


def _entries(args: argparse.Namespace) -> list[Entry]:
    configs = args.config_file
    if not configs:
        raise InputError("no config given: name one or more with --config-file")
    for option, values in (("--weight", args.weight), ("--name", args.name)):
        if values and len(values) != len(configs):
            remark = "; write none for a network without one" if option == "--weight" else ""
            raise InputError(
                f"{len(values)} {option} for {len(configs)} --config-file: give one for each, in the same order{remark}"
            )
    weights = [None if w.lower() == "none" else w for w in args.weight] or [None] * len(configs)
    names = args.name or [None] * len(configs)
    options = parse_options(args.options)
    return [Entry(c, w, n, options) for c, w, n in zip(configs, weights, names)]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    args = build_arguments().parse_args(argv)
    entries = _entries(args)
    if args.points and args.random is not None:
        raise InputError("--points and --random exclude each other: give one of them")
    for path in (args.out, args.json):
        # Before the work, not after it.
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"{path}: cannot be written, name a file in a folder that exists")
    rows = compare(
        entries,
        split=args.split,
        max_scans=args.max_scans,
        files=args.points,
        random_cells=args.random,
        repeats=args.repeats,
        warmup=args.warmup,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        latency=not args.no_latency,
        miou=not args.no_miou,
        miou_scans=args.miou_scans,
    )
    device = device_of({"device": args.device})
    given = sys.argv[1:] if argv is None else argv
    source = f"the first {len(rows[0]['scans'])} of data.{args.split}"
    if args.points:
        source = ", ".join(args.points)
    elif args.random is not None:
        source = f"a random street of {args.random:,} voxels"
    settings = {
        "command": f"python tools/benchmark.py {shlex.join(given)}",
        "device": str(device),
        "threads": args.threads or torch.get_num_threads(),
        "dtype": args.dtype,
        "split": args.split,
        "source": source,
        "latency": not args.no_latency,
        "repeats": args.repeats,
        "warmup": args.warmup,
    }
    made = environment(device)
    text = markdown(rows, settings, made)
    print(text, end="")
    content = {"networks": rows, "settings": settings, "environment": made}
    for path, body in ((args.out, text), (args.json, json.dumps(content, indent=1) + "\n")):
        if path is not None:
            write_atomic(path, lambda file, body=body: file.write(body.encode()))


if __name__ == "__main__":
    sys.exit(run_tool(main))
