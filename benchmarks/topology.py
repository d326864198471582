"""Time the topology loss, and a distillation step with the gradient map, against the routes they replace.

    python benchmarks/topology.py [--quick] [--pairs tiny full | none] [--out rows.json]

One thread. Alternatives take turns in every round and the least time of each counts.

The loss is two diagrams (teacher 256 channels, no graph; student 128), a Chamfer distance and its gradient. Opponents,
both written here from the description of the published method (arXiv:2505.08101) and its code:

- "published route": squared distances of all pairs with graph, cut off at three times the 90th percentile of the
  distances; the shortest max(min(5 %, 2 n, 100000), 1000) are visited one by one, once with labels for H0 and once with
  a union-find for an "H1" without gradient, both on tensors; one Chamfer distance over both. It misses the late merges
  of H0, as a column says. Its time depends on the scale of the features: the cut-off leaves fewer of larger ones.
- "union-find, all edges": exact H0, all edges sorted, one by one on Python lists until the tree is complete.

The step is network, class scores and gradient map: the teacher differentiated from a leaf at the encoder's output on,
against a graph through all of it and its parameters. The loss is checked to be the same. H1 needs the extra `topology`,
the step the extra `sim`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Row, environment, least_ms, table
from pointcept_kd.ops import persistence
from pointcept_kd.ops.persistence import (
    chamfer_diagrams,
    edge_lengths,
    h0_deaths,
    has_engine,
    persistence_diagram,
)

ROOT = Path(__file__).resolve().parents[1]
SIZES = (512, 1024, 2048, 3264)
CHANNELS = (256, 128)
# Config, and azimuth steps of the simulated scan: the full pair sees some 4,000 voxels.
PAIRS = {"tiny": ("ptv3_to_student_tiny.py", 512), "full": ("ptv3_to_student.py", 160)}
TERMS = {"logits": 0.3, "gradient": 10.0}


def features(n: int, channels: int, seed: int) -> Tensor:
    """What an encoder could give for n cells: a random two-layer network of positions on a street, plus noise."""
    g = torch.Generator().manual_seed(seed)
    cells = 3 * torch.rand(n, 3, generator=torch.Generator().manual_seed(n))
    hidden = torch.tanh(cells @ torch.randn(3, 64, generator=g))
    smooth = hidden @ torch.randn(64, channels, generator=g) / 8
    return smooth + 0.3 * torch.randn(n, channels, generator=g)


# --- opponents ------------------------------------------------------------------------------------


def published_diagram(points: Tensor) -> tuple[Tensor, int]:
    """Bars (m, 2) of the published route, H0 and "H1" in one, and how many of them are H0."""
    n = len(points)
    upper = torch.ones(n, n, dtype=torch.bool).triu(diagonal=1)
    with torch.no_grad():
        # In the unit of distances, but applied to their squares.
        limit = 3 * float(torch.cdist(points, points)[upper].quantile(0.9))
    norms = points.square().sum(dim=1)
    squares = (norms[:, None] + norms - 2 * points @ points.T).clamp(min=0)
    upper &= squares.detach() <= limit
    values, pairs = squares[upper], upper.nonzero()
    order = values.argsort()[: max(min(n * (n - 1) // 40, 2 * n, 100_000), 1000)]

    # H0: an edge between two labels is a death, and gives one of them to all that have the other.
    labels = torch.arange(n)
    deaths = []
    for edge in order:
        i, j = pairs[edge]
        if labels[i] != labels[j]:
            labels[labels == labels[j]] = labels[i].clone()
            deaths.append(values[edge])
    h0 = torch.stack(deaths)
    bars = torch.stack((torch.zeros_like(h0), h0), dim=1)

    # "H1": an edge that closes a circle is born and dies with the next longer edge, if that is more
    # than 0.05 longer; without gradient.
    parent = torch.arange(n)

    def find(i: Tensor) -> Tensor:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    lengths = values.detach()[order]
    loops = []
    for place, edge in enumerate(order):
        i, j = find(pairs[edge, 0]), find(pairs[edge, 1])
        if i != j:
            parent[i] = j
            continue
        later = lengths[place + 1] if place + 1 < len(lengths) else lengths[place] + 0.1
        if later > lengths[place] + 0.05 and len(loops) < 100:
            loops.append(torch.stack((lengths[place], later)))
    if loops:
        h1 = torch.stack(loops)
        weight = torch.sigmoid(100 * (h1[:, 1] - h1[:, 0] - 0.05))
        bars = torch.cat((bars, h1 * weight[:, None]))
    return bars, len(deaths)


def pairwise_chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer distance from the matrix of all squared differences."""
    squares = (a[:, None] - b).square().sum(dim=2)
    return squares.amin(dim=1).mean() + squares.amin(dim=0).mean()


def union_find_deaths(points: Tensor) -> Tensor:
    """Exact H0 deaths: all edges in ascending order, one at a time."""
    n = len(points)
    rows, columns = torch.triu_indices(n, n, offset=1)
    with torch.no_grad():
        order = torch.cdist(points, points)[rows, columns].argsort()
    parent = list(range(n))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    pairs: list[tuple[int, int]] = []
    # In blocks: a list of all edges would be made in vain, the tree is complete long before.
    for block in order.split(4 * n):
        for i, j in zip(rows[block].tolist(), columns[block].tolist()):
            a, b = find(i), find(j)
            if a != b:
                parent[a] = b
                pairs.append((i, j))
        if len(pairs) == n - 1:
            break
    return edge_lengths(points, torch.tensor(pairs)).sort().values


# --- the loss -------------------------------------------------------------------------------------


def loss_of(
    diagram: Callable[[Tensor], Tensor], chamfer: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss from one kind of diagram; the teacher's has no graph."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            target = diagram(teacher)
        return chamfer(diagram(student), target)

    return loss


def on_landmarks(loss: Callable[[Tensor, Tensor], Tensor], most: int):
    """The loss of a random choice of rows, the same of both clouds, made inside the clock."""

    def chosen(student: Tensor, teacher: Tensor) -> Tensor:
        rows = torch.randperm(len(student))[:most]
        return loss(student.index_select(0, rows), teacher.index_select(0, rows))

    return chosen


def h0_and_h1(student: Tensor, teacher: Tensor) -> Tensor:
    """Both dimensions, compared each with its own."""
    h1 = loss_of(lambda p: persistence_diagram(p, 1), chamfer_diagrams)
    return loss_of(h0_deaths, chamfer_diagrams)(student, teacher) + h1(student, teacher)


LOSSES = {
    "published route": loss_of(lambda p: published_diagram(p)[0], pairwise_chamfer),
    "union-find, all edges": loss_of(union_find_deaths, chamfer_diagrams),
    "exact H0, all points": loss_of(h0_deaths, chamfer_diagrams),
    "exact H0, 1024 landmarks": on_landmarks(loss_of(h0_deaths, chamfer_diagrams), 1024),
    "exact H0, 512 landmarks": on_landmarks(loss_of(h0_deaths, chamfer_diagrams), 512),
    "exact H0 + H1, 256 landmarks": on_landmarks(h0_and_h1, 256),
}


def time_loss(n: int, seconds: float) -> list[Row]:
    """Every route at n points, forward and backward."""
    teacher, student = (features(n, c, seed) for seed, c in enumerate(CHANNELS))
    for points in (teacher, student):
        error = h0_deaths(points) / union_find_deaths(points) - 1
        if float(error.abs().max()) > 1e-5:
            raise SystemExit("the two exact routes differ: the comparison would be meaningless")
    with torch.no_grad():
        found = [f"{published_diagram(points)[1]} + {n - 1}" for points in (teacher, student)]

    def timed(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            leaf = student.clone().requires_grad_()
            loss(leaf, teacher).backward()

        return call

    names = [name for name in LOSSES if "H1" not in name or has_engine()]
    names = [name for name in names if "1024 landmarks" not in name or n > 1024]
    names = [name for name in names if "512 landmarks" not in name or n > 512]
    least = least_ms({name: timed(LOSSES[name]) for name in names}, seconds)
    published, exact = (least[name] for name in list(LOSSES)[:2])
    found = [f.replace(" + ", " of ") for f in found]
    return [
        {
            "n": n,
            "route": name,
            "ms": least[name],
            "published / this": published / least[name],
            "union-find / this": exact / least[name],
            "H0 merges, teacher": found[0] if name == "published route" else None,
            "student": found[1] if name == "published route" else None,
        }
        for name in names
    ]


def time_parts(seconds: float) -> list[Row]:
    """Where the time of an exact H0 diagram goes, and the two searches side by side on this machine."""
    rows: list[Row] = []
    for n in SIZES:
        points = features(n, CHANNELS[0], 0)
        squares = persistence._squared_distances(points)
        leaf = points.clone().requires_grad_()
        pairs = persistence.h0_pairs(points)

        def gradient(leaf=leaf, pairs=pairs) -> None:
            edge_lengths(leaf, pairs).sum().backward()

        least = least_ms(
            {
                "distances ms": lambda p=points: persistence._squared_distances(p) is None or None,
                "Prim ms": lambda s=squares: persistence._prim(s.numpy()) is None or None,
                "Boruvka ms": lambda s=squares: persistence._boruvka(s) is None or None,
                "lengths, gradient ms": gradient,
            },
            seconds,
        )
        rows.append({"n": n, "channels": CHANNELS[0], **least})
    return rows


MEMORY_WORKER = """
import resource, sys, time, torch
from pointcept_kd.ops import persistence

def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(s.split()[1]) / 1024 for s in lines if s.startswith(name))

n, route = int(sys.argv[1]), sys.argv[2]
engine = persistence._engine()
torch.set_num_threads(1)
x = torch.randn(n, 128, generator=torch.Generator().manual_seed(0))
norms = x.square().sum(1)
matrix = (norms[:, None] + norms - 2 * x @ x.T).abs().sqrt()
matrix *= 1 + 1e-6 * torch.randn(n, n, generator=torch.Generator().manual_seed(1))
unequal = int((matrix != matrix.T).sum()) // 2
limit = int((megabytes("VmSize") + 4096) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before, start = megabytes("VmRSS"), time.perf_counter()
try:
    if route == "ours":
        bars = len(persistence._rips_bars(matrix.numpy(), 1))
    else:
        asked = dict(input_type="full distance matrix", homology_coeff_field=2)
        bars = len(engine(1, **asked).fit_transform([matrix.numpy()])[0])
except MemoryError:
    bars = -1
print(unequal, bars, (time.perf_counter() - start) * 1e3, megabytes("VmHWM") - before)
"""


def measure_memory() -> list[Row]:
    """Memory that H1 of a float32 matrix takes which is off by rounding; a process may take 4 GiB."""
    rows: list[Row] = []
    for n, route in ((256, "ours"), (512, "ours"), (256, "engine alone, full matrix")):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_WORKER, str(n), route],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        unequal, bars, ms, more = done.stdout.split()
        rows.append(
            {
                "n": n,
                "route": route,
                "unequal pairs": int(unequal),
                "H1 bars": "out of memory" if bars == "-1" else int(bars),
                "ms": float(ms),
                "more MB at the peak": float(more),
            }
        )
    return rows


# --- the step -------------------------------------------------------------------------------------


def distiller_and_batch(pair: str, folder: Path) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A distiller with class scores and gradient map, and one simulated scan."""
    import pointcept_kd  # noqa: F401  registers what the configs name
    from pointcept_kd.data import synthetic
    from pointcept_kd.host import DATASETS, MODELS
    from pointcept_kd.host.loader import point_collate_fn
    from pointcept_kd.host.runtime import read_config

    config, columns = PAIRS[pair]
    plan = synthetic.Plan({"00": 1, "08": 1}, beams=32, columns=columns)
    synthetic.simulate(folder, plan, 1, progress=False)
    cfg = read_config(ROOT / "configs/kd" / config, data_root=str(folder))
    taps = dict(enc_out="backbone.enc")
    torch.manual_seed(0)
    distiller = MODELS.build(
        dict(
            type="kd.Distiller",
            student=dict(model=cfg.model.student.model, taps=taps),
            teacher=dict(model=cfg.model.teacher.model, weight="random", taps=taps),
            terms=dict(
                logits=dict(type="kd.LogitKL", weight=TERMS["logits"]),
                gradient=dict(type="kd.GradientGuided", tap="enc_out", weight=TERMS["gradient"]),
            ),
        )
    )
    cfg.data.train.sequences = ["00"]
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(0)
    batch = point_collate_fn([DATASETS.build(cfg.data.train)[0]])
    return distiller.train(), batch


def through_the_teacher(distiller: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same loss with a graph through the whole teacher, class scores included."""
    from pointcept_kd.distillers.align import align
    from pointcept_kd.distillers.gradient import gradient_map, map_loss
    from pointcept_kd.distillers.taps import Activation, Taps

    maps, logits = [], []
    points = len(batch["segment"])
    for network in (distiller.student, distiller.teachers["teacher"].network):
        taps = Taps(network, dict(enc_out="backbone.enc", logits="seg_head"))
        # A training student returns its loss; so does an evaluated teacher that has labels.
        with taps.record() as seen:
            task = network(dict(batch))["loss"]
        cells = seen["enc_out"]
        (grad,) = torch.autograd.grad(task * points, cells.feat, retain_graph=True)
        value = gradient_map(cells.feat, grad)
        maps.append(Activation(value[:, None], cells.batch, cells.cells))
        logits.append(seen["logits"].feat.log_softmax(dim=1))
        if network is distiller.student:
            loss = task
    kl = F.kl_div(logits[0], logits[1], reduction="sum", log_target=True) / len(logits[0])
    of_student, of_teacher = align(*maps)
    guided = map_loss(of_student[:, 0], of_teacher[:, 0])
    return loss + TERMS["logits"] * kl + TERMS["gradient"] * guided


def time_step(pair: str, seconds: float) -> list[Row]:
    """One step's forward and backward, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        distiller, batch = distiller_and_batch(pair, Path(folder))
    teacher = distiller.teachers["teacher"].network
    number = count()

    def run(graph: bool, seed: int) -> Tensor:
        # Equal seeds: the student's random curves and dropped paths are the same in both.
        torch.manual_seed(seed)
        teacher.requires_grad_(graph)
        loss = through_the_teacher(distiller, batch) if graph else distiller(dict(batch))["loss"]
        distiller.zero_grad(set_to_none=True)
        loss.backward()
        # The published script never clears them either, but adding up would be slower still.
        teacher.zero_grad(set_to_none=True)
        return loss.detach()

    whole, leaf = (float(run(graph, 1)) for graph in (True, False))
    if abs(whole - leaf) > 1e-4 * abs(whole):
        raise SystemExit(f"the two steps have different losses, {whole} and {leaf}")

    def forward_only() -> None:
        with torch.no_grad():
            teacher({k: v for k, v in batch.items() if k != "segment"})

    least = least_ms(
        {
            "graph through the teacher": lambda: run(True, next(number)) is None or None,
            "leaf at the encoder's output": lambda: run(False, next(number)) is None or None,
            "the teacher's plain forward alone": forward_only,
        },
        seconds,
    )
    sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, distiller.student)]
    whole_ms = least["graph through the teacher"]
    return [
        {
            "pair": pair,
            "parameters": f"{sizes[0]:,} and {sizes[1]:,}",
            "voxels": len(batch["segment"]),
            "step": name,
            "ms": ms,
            "whole graph / this": whole_ms / ms,
        }
        for name, ms in least.items()
    ]


# --- report ---------------------------------------------------------------------------------------


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, less time, for a look")
    parser.add_argument("--pairs", nargs="+", choices=[*PAIRS, "none"], default=["tiny"])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    seconds = 1.0 if args.quick else 10.0
    about = environment(f"features of a random network, {CHANNELS[0]} and {CHANNELS[1]} channels")
    about["threads"] = 1
    versions = about["versions"]
    assert isinstance(versions, dict)
    versions.pop("spconv", None)
    for name in ("gudhi", "scikit-learn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    print("# Topology and gradient map\n")
    print(*(f"- {key}: {value}" for key, value in about.items()), sep="\n")
    if not has_engine():
        print("note: GUDHI is not installed; the rows of H1 are left out", file=sys.stderr)
    report: Row = {"environment": about}

    def section(title: str, rows: list[Row]) -> None:
        print(f"\n## {title}\n\n{table(rows)}", flush=True)
        report[title] = rows

    rows: list[Row] = []
    for n in SIZES[:2] if args.quick else SIZES:
        rows += time_loss(n, seconds)
    section("Two diagrams, Chamfer distance, backward", rows)
    section("Parts of one H0 diagram", time_parts(seconds / 5))
    if has_engine():
        section("H1 of an asymmetric float32 matrix", measure_memory())
    steps = [row for pair in args.pairs if pair != "none" for row in time_step(pair, 2 * seconds)]
    if steps:
        section("One distillation step: network, class scores, gradient map", steps)
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
