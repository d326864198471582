"""Time the way of one scan from disk to the tensors of a training batch.

    python benchmarks/pipeline.py [--quick] [--out rows.json]
    POINTCEPT_ROOT=~/Pointcept python benchmarks/pipeline.py

Ours against two baselines, one thread and its CPU time (files are cached, nothing waits), alternatives
taking turns with the same seeds:

- textbook: each step written straight from its formula below, as a loader usually is: labels looked
  up one by one, a walk over the rows for the offset, keys hashed on uint64, `numpy.unique`.
- Pointcept: the transforms of the checkout that `POINTCEPT_ROOT` names, after the textbook reader.
  Skipped, with a reason, where there is none or its imports are missing.

Before the clock starts, the arrays of all must be equal for equal seeds. The scan is real where
POINTCEPT_KD_SAMPLES has one (default `../shared/data` beside the project), simulated otherwise.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import pointcept_kd  # noqa: F401  (registers the transforms)
from benchmarks.ops import Row, environment, scene, table
from pointcept_kd.data.semantic_kitti import LEARNING_MAP, SemanticKITTIDataset
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import Compose

ROOT = Path(__file__).resolve().parents[1]
Sample = dict[str, Any]
Step = Callable[[Sample], Sample]


# --- the textbook ---------------------------------------------------------------------------------


def textbook_read(scan: Path, labels: Path) -> Sample:
    """A SemanticKITTI scan; every label through the mapping on its own."""
    points = np.fromfile(scan, dtype=np.float32).reshape(-1, 4)
    raw = np.fromfile(labels, dtype=np.int32) & 0xFFFF
    segment = np.array([LEARNING_MAP[int(label)] for label in raw], dtype=np.int32)
    return dict(coord=points[:, :3], strength=points[:, 3:], segment=segment, name=scan.stem)


def textbook_rotate(
    data: Sample, angle: Sequence[float], center: Sequence[float], p: float, axis: str = "z"
) -> Sample:
    """About a vertical line, by an angle in multiples of pi."""
    if axis != "z":
        raise SystemExit(f"the textbook turns about z only, not {axis}")
    if random.random() <= p:
        turn = np.random.uniform(*angle) * np.pi
        c, s = np.cos(turn), np.sin(turn)
        moved = data["coord"] - np.array(center)
        data["coord"] = (moved @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T) + np.array(center)
    return data


def textbook_scale(data: Sample, scale: Sequence[float]) -> Sample:
    """By one factor."""
    dtype = data["coord"].dtype
    data["coord"] = (data["coord"] * np.random.uniform(*scale, 1)).astype(dtype)
    return data


def textbook_flip(data: Sample, p: float) -> Sample:
    """X, then y."""
    for axis in (0, 1):
        if np.random.rand() < p:
            data["coord"] = data["coord"].copy()
            data["coord"][:, axis] *= -1
    return data


def textbook_jitter(data: Sample, sigma: float, clip: float) -> Sample:
    """Clipped noise."""
    dtype, noise = data["coord"].dtype, sigma * np.random.randn(*data["coord"].shape)
    data["coord"] = (data["coord"] + np.clip(noise, -clip, clip)).astype(dtype)
    return data


def textbook_grid(
    data: Sample, grid_size: float, mode: str = "train", return_grid_coord: bool = True
) -> Sample:
    """One random point per voxel, found through the sorted FNV keys of all."""
    if mode != "train":
        raise SystemExit("the textbook samples for training only")
    cells = np.floor(data["coord"] / np.float64(grid_size)).astype(np.int64)
    cells -= cells.min(axis=0)
    keys = np.full(len(cells), 14695981039346656037, dtype=np.uint64)
    for axis in range(3):
        keys = (keys * np.uint64(1099511628211)) ^ cells[:, axis].astype(np.uint64)
    order = np.argsort(keys)
    _, _inverse, count = np.unique(keys[order], return_inverse=True, return_counts=True)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    chosen = order[first + np.random.randint(0, count.max(), count.size) % count]
    for key in ("coord", "strength", "segment"):
        data[key] = data[key][chosen]
    if return_grid_coord:
        data["grid_coord"] = cells[chosen]
    return data


def textbook_tensors(data: Sample) -> Sample:
    """Floats to float32, integers to int64."""
    kinds = {"f": torch.float32, "i": torch.int64}
    return {
        key: torch.from_numpy(value).to(kinds[value.dtype.kind])
        if isinstance(value, np.ndarray)
        else value
        for key, value in data.items()
    }


def textbook_collect(data: Sample, keys: Sequence[str], feat_keys: Sequence[str]) -> Sample:
    """The offset counted row by row."""
    rows = torch.cumsum(torch.tensor([row.shape[0] for row in data["coord"]]), dim=0)
    batch = {key: data[key] for key in keys}
    batch["offset"] = torch.tensor([len(rows)])
    batch["feat"] = torch.cat([data[key].float() for key in feat_keys], dim=1)
    return batch


TEXTBOOK: dict[str, Callable[..., Sample]] = {
    "RandomRotate": textbook_rotate,
    "RandomScale": textbook_scale,
    "RandomFlip": textbook_flip,
    "RandomJitter": textbook_jitter,
    "GridSample": textbook_grid,
    "ToTensor": textbook_tensors,
    "Collect": textbook_collect,
}


def textbook(configs: Sequence[Mapping[str, Any]]) -> list[Step]:
    """One textbook step per transform config."""

    def step(cfg: Mapping[str, Any]) -> Step:
        options = {key: value for key, value in cfg.items() if key != "type"}
        return lambda data: TEXTBOOK[cfg["type"]](data, **options)

    return [step(cfg) for cfg in configs]


# --- Pointcept ------------------------------------------------------------------------------------


def pointcept_compose() -> tuple[Callable[..., Any] | None, str]:
    """The `Compose` of a Pointcept checkout, or None and the reason."""
    root = os.environ.get("POINTCEPT_ROOT")
    if not root:
        return None, "POINTCEPT_ROOT is not set"
    if not (Path(root) / "pointcept" / "datasets" / "transform.py").is_file():
        return None, f"POINTCEPT_ROOT={root} has no pointcept/datasets/transform.py"
    sys.path.insert(0, root)
    try:
        return importlib.import_module("pointcept.datasets.transform").Compose, ""
    except Exception as error:
        return None, f"its transforms cannot be imported ({type(error).__name__}: {error})"


# --- scans ----------------------------------------------------------------------------------------


def write_simulated(root: Path) -> None:
    """A simulated scan in the layout of SemanticKITTI, sequence 00."""
    points = scene()[0].numpy()
    rng = np.random.RandomState(0)
    folder = root / "dataset" / "sequences" / "00"
    (folder / "velodyne").mkdir(parents=True)
    (folder / "labels").mkdir()
    strength = rng.rand(len(points), 1).astype(np.float32)
    np.hstack([points, strength]).tofile(folder / "velodyne" / "000000.bin")
    known = np.array([key for key in LEARNING_MAP if key > 1], dtype=np.uint32)
    known[rng.randint(0, len(known), len(points))].tofile(folder / "labels" / "000000.label")


def key_frame(samples: Path) -> tuple[Path | None, Callable[[], Sample]]:
    """A nuScenes key frame where there is one, else every fourth point of the scene; no labels."""
    files = sorted((samples / "nuscenes/samples/LIDAR_TOP").glob("*.bin"))
    thin = np.hstack([scene()[0].numpy()[::4], np.ones((len(scene()[0][::4]), 1), np.float32)])

    def read() -> Sample:
        raw = np.fromfile(files[0], dtype=np.float32).reshape(-1, 5) if files else thin.copy()
        return dict(
            coord=raw[:, :3],
            strength=raw[:, 3:4] / 255,
            segment=np.zeros(len(raw), np.int32),
            name="key frame",
        )

    return (files[0] if files else None), read


# --- clock ----------------------------------------------------------------------------------------


def seed(value: int) -> None:
    """The generators the transforms draw from."""
    random.seed(value)
    np.random.seed(value)


def take_turns(
    alternatives: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, list[float]]:
    """CPU milliseconds of every run; in each turn all alternatives get the same seed."""
    spent: dict[str, list[float]] = {name: [] for name in alternatives}
    begin, turn = time.perf_counter(), 0
    while turn <= 5 or time.perf_counter() - begin < seconds:
        for name, call in alternatives.items():
            seed(turn)
            start = time.thread_time()
            call()
            if turn:  # the first turn warms up
                spent[name].append((time.thread_time() - start) * 1e3)
        turn += 1
    return spent


def same(results: dict[str, Any], what: str) -> None:
    """Stop unless all alternatives made the same tensors."""
    (first, expected), *others = results.items()
    for name, result in others:
        for key in expected:
            if not torch.equal(expected[key], result[key]):
                raise SystemExit(
                    f"{what}: {key} of {first} and {name} differ: the comparison would be meaningless"
                )


def run_all(steps: Sequence[Step], data: Any) -> Any:
    """Through every step."""
    for step in steps:
        data = step(data)
    return data


def time_pipelines(
    scans: dict[str, dict[str, Callable[[], Sample]]],
    chains: dict[str, Callable[[Any], Any]],
    seconds: float,
) -> list[Row]:
    """Whole way, one row per scan; `scans` holds a reader per alternative."""
    rows: list[Row] = []
    for name, readers in scans.items():
        calls = {who: (lambda c=chain, r=readers[who]: c(r())) for who, chain in chains.items()}
        results = {}
        for value in (0, 1, 2):
            for who, call in calls.items():
                seed(value)
                results[who] = call()
            same(results, name)
        spent = take_turns(calls, seconds)
        row: Row = {"scan": name, "points": len(readers["ours"]()["coord"])}
        for who, times in spent.items():
            row[f"{who} min ms"] = min(times)
            row[f"{who} median ms"] = statistics.median(times)
        for who in list(spent)[1:]:
            row[f"{who} / ours"] = row[f"{who} min ms"] / row["ours min ms"]  # type: ignore[operator]
        rows.append(row)
    return rows


def time_steps(
    readers: dict[str, Callable[[], Sample]], configs: Sequence[Mapping[str, Any]], seconds: float
) -> list[Row]:
    """Each step alone, on what the steps before it left; gates are open."""
    rows: list[Row] = [_step_row("read", take_turns(dict(readers), seconds))]
    data = readers["ours"]()
    for cfg in configs:
        cfg = {**cfg, "p": 1.0} if "p" in cfg else dict(cfg)
        mine, plain = Compose([cfg]), textbook([cfg])[0]
        calls = {
            "ours": lambda m=mine, d=data: m(dict(d)),
            "textbook": lambda s=plain, d=data: s(dict(d)),
        }
        rows.append(_step_row(cfg["type"], take_turns(calls, seconds)))
        seed(0)
        data = mine(data)
    return rows


def _step_row(name: str, spent: dict[str, list[float]]) -> Row:
    ours, plain = min(spent["ours"]), min(spent["textbook"])
    return {"step": name, "ours min ms": ours, "textbook min ms": plain, "ratio": plain / ours}


def measure(seconds: float) -> Row:
    """Everything, as the rows of a report."""
    torch.set_num_threads(1)
    samples = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    configs = Config.fromfile(str(ROOT / "configs/_base_/semantic_kitti.py")).data.train.transform
    with tempfile.TemporaryDirectory() as folder:
        root = samples / "semantickitti"
        scan = root / "dataset/sequences/00/velodyne/000000.bin"
        source = "SemanticKITTI sequence 00, scan 000000"
        if not scan.exists():
            root = Path(folder)
            scan = root / "dataset/sequences/00/velodyne/000000.bin"
            source = "simulated sheet (no sample scan found)"
            write_simulated(root)
        labels = scan.parents[1] / "labels" / "000000.label"
        dataset = SemanticKITTIDataset(split=["00"], data_root=str(root))
        frame, read_frame = key_frame(samples)
        compose, reason = pointcept_compose()
        plain = textbook(configs)
        chains: dict[str, Callable[[Any], Any]] = {
            "ours": Compose(configs),
            "textbook": lambda data: run_all(plain, data),
        }
        if compose is not None:
            theirs = compose([dict(cfg) for cfg in configs])
            chains["Pointcept"] = theirs
        kitti = dict.fromkeys(chains, lambda: textbook_read(scan, labels))
        kitti["ours"] = lambda: dataset.load(0)
        scans = {
            "SemanticKITTI": kitti,
            "nuScenes key frame" if frame else "a quarter of it": dict.fromkeys(chains, read_frame),
        }
        report: Row = {"environment": {**environment(source), "threads": 1}}
        if reason:
            report["environment"]["Pointcept"] = f"skipped: {reason}"  # type: ignore[index]
        steps = {"ours": kitti["ours"], "textbook": kitti["textbook"]}
        report["From disk to tensors"] = time_pipelines(scans, chains, seconds)
        report["Step by step"] = time_steps(steps, configs, seconds / 8)
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, for a look")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    report = measure(1.0 if args.quick else 8.0)
    print("# Input pipeline\n")
    print(*(f"- {k}: {v}" for k, v in report["environment"].items()), sep="\n")  # type: ignore[attr-defined]
    for title, rows in report.items():
        if title != "environment":
            print(f"\n## {title}\n\n{table(rows)}")  # type: ignore[arg-type]
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
