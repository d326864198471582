"""Time training steps with a live teacher, with a cached one, and without any.

    python benchmarks/teacher_cache.py [--steps 12] [--threads 2] [--size demo|full] [--out rows.json]

The three trainings see the same scans in the same order and take turns step by step; loading, augmentation, forward,
backward and optimiser are all inside the clock. `demo` is the pair and the data of `make demo`; `full` is the published
pair (46.2 M and 2.78 M parameters) on the same simulated scans at 5 cm. Needs the extra `sim`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from ops import environment, table

import pointcept_kd  # noqa: F401  registers what the configs name
from pointcept_kd.data import synthetic
from pointcept_kd.host import TRAINERS
from pointcept_kd.host.runtime import read_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "demo": "configs/kd/ptv3_to_student_tiny.py",
    "full": "configs/kd/ptv3_to_student_logits.py",
}
SCANS = {"00": 6, "08": 1}
TERMS = ("live teacher", "cached teacher", "no teacher")


def trainer_for(kind: str, size: str, data: Path, work: Path) -> tuple[object, float]:
    """A trainer that is ready to step, and the seconds that filling its cache took."""
    cfg = read_config(ROOT / CONFIGS[size], data_root=str(data))
    cfg.merge_from_dict(
        {
            "save_path": str(work / kind.replace(" ", "_")),
            "device": "cpu",
            "enable_amp": False,
            "num_worker": 0,
            "batch_size": 2,
            "mix_prob": 0,
            "evaluate": False,
            "seed": 0,
            "epoch": 1000,
            "eval_epoch": 1000,
        }
    )
    cfg.data.train.sequences = ["00"]
    cfg.hooks = [dict(type="kd.ModelHook")]
    if kind == "no teacher":
        cfg.model = dict(cfg.model.student.model)
    else:
        cfg.model.teacher.weight = "random"
        if kind == "cached teacher":
            cfg.model.teacher_cache = str(work / "cache")
    trainer = TRAINERS.build(dict(type="kd.Trainer", cfg=cfg))
    start = time.perf_counter()
    trainer.before_train()
    return trainer, time.perf_counter() - start


def batches(trainer: object):
    """Endless training batches."""
    epoch = 0
    while True:
        trainer.train_loader.batch_sampler.set_epoch(epoch)
        yield from trainer.train_loader
        epoch += 1


def measure(size: str, steps: int, work: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Seconds per step of the three trainings, and what the cache cost."""
    data = work / "data"
    beams = dict(beams=32, columns=512) if size == "demo" else dict(beams=64, columns=1024)
    plan = synthetic.Plan(dict(SCANS), spacing=5.0, **beams)
    synthetic.simulate(data, plan, 1, progress=False)
    trainers, fill = {}, 0.0
    for kind in TERMS:
        trainers[kind], spent = trainer_for(kind, size, data, work)
        fill = spent if kind == "cached teacher" else fill
    sources = {kind: batches(trainer) for kind, trainer in trainers.items()}
    spent: dict[str, list[float]] = {kind: [] for kind in TERMS}
    for turn in range(steps + 1):
        for kind, trainer in trainers.items():
            trainer.model.train()
            start = time.perf_counter()
            batch = next(sources[kind])
            trainer.comm_info.update(iter=turn, input_dict=batch)
            trainer.run_step()
            if turn:  # the first turn warms up
                spent[kind].append(time.perf_counter() - start)
    least = {kind: statistics.median(values) for kind, values in spent.items()}
    rows = [
        {
            "size": size,
            "training": kind,
            "ms a step": least[kind] * 1e3,
            "live / this": least["live teacher"] / least[kind],
        }
        for kind in TERMS
    ]
    files = list((work / "cache").glob("*.npz"))
    cost = {
        "size": size,
        "scans": len(files),
        "fill s a scan": fill / len(files),
        "MB a scan": sum(f.stat().st_size for f in files) / len(files) / 1e6,
        # A step sees two scans; the pass pays for itself after so many epochs.
        "epochs to pay": fill / len(files) * 2 / (least["live teacher"] - least["cached teacher"]),
    }
    return rows, cost


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=CONFIGS, default=["demo"])
    parser.add_argument("--steps", type=int, default=12, help="steps of each training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, costs = [], []
    for size in args.size:
        with tempfile.TemporaryDirectory() as folder:
            more, cost = measure(size, args.steps, Path(folder))
        rows += more
        costs.append(cost)
    source = f"simulated streets, batches of 2, {args.threads} threads, {args.steps} steps, medians"
    about = environment(source)
    print("# Training with a cached teacher\n")
    print(*(f"- {key}: {value}" for key, value in about.items()), sep="\n")
    print(f"\n{table(rows)}\n\n{table(costs)}")
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps({"environment": about, "rows": rows, "costs": costs}, indent=2))
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
