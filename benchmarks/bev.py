"""Time what a bird's-eye-view pair needs around its networks against the straightforward routes.

    python benchmarks/bev.py [--quick] [--out rows.json]

One thread, CPU milliseconds. Alternatives take turns in every round and the least of each counts; each pair is checked
to compute the same. The scan is a real one where POINTCEPT_KD_SAMPLES has one (default `../shared/data` beside the
project) and a simulated sheet otherwise; the grid is PolarNet's, 480 x 360 x 32 cells, one scan at a time. The
opponents are written here from the description of the published pipeline (Cylinder3D, PolarNet):

- Sample: from the bytes of a scan and its labels to 9 features per point, cells and majority labels. Opponent: labels
  by a dictionary, an array of the positions of all cells, one of what the sensor can see, and one of all labels; the
  majority by sorting rows of (label, cell), with run lengths in NumPy. The published pipeline never uses the first two
  arrays; a column is without them.
- Distinct cells: packed 64-bit keys. Opponent: `torch.unique(dim=0)` of (scan, cell) rows.
- Pillar maximum with its gradient, 512 channels. Opponents: torch's own `scatter_reduce` with points in random order
  (the published networks shuffle them) and in scan order, and `segment_reduce`. The published code calls torch_scatter,
  which has to be compiled against torch; it is not among them.
- Losses with their gradient: weighted cross entropy and Lovasz-softmax on majority labels, and logit distillation, on
  the scores of occupied cells. Opponent: the same sums over a dense volume of scores. CPU seconds, and the memory taken
  on top of the scores, each from a process of its own; that the scores of the volume take more is not counted.
- Networks: the teacher, the student, and the student exported to ONNX (extra `onnx`), from points to labels, with
  random weights and normalisation statistics of the scan. ONNX's labels are checked against PyTorch's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Row, cpu_ms, environment, least_ms, scene, table
from pointcept_kd.data.semantic_kitti import LEARNING_MAP, map_labels
from pointcept_kd.distillers.logits import logit_kl
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.networks.onnx_export import export_onnx, session
from pointcept_kd.networks.voxels import PointCells, VoxelSegmentor, voxel_groups
from pointcept_kd.ops.grid import Partition, group_rows, majority_label, merge_groups
from pointcept_kd.ops.scatter import segment_max, sorted_segment_max

ROOT = Path(__file__).resolve().parents[1]
GRID = Partition((3.0, -np.pi, -3.0), (50.0, np.pi, 1.5), (480, 360, 32))
CLASSES = 20  # with "unlabelled" as 0
CHANNELS = 512
TEMPERATURE = 2.0


class Scan(NamedTuple):
    """The two files of a scan as they lie on the disk."""

    points: bytes
    labels: bytes


def load_scan() -> tuple[Scan, str]:
    """A scan and a line that says where it comes from."""
    samples = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    sequence = samples / "semantickitti/dataset/sequences/00"
    files = [sequence / "velodyne/000000.bin", sequence / "labels/000000.label"]
    if all(file.exists() for file in files):
        return Scan(
            *(file.read_bytes() for file in files)
        ), "SemanticKITTI sequence 00, scan 000000"
    points, source = scene()
    strength = torch.rand(len(points), 1, generator=torch.Generator().manual_seed(0))
    known = np.array(sorted(LEARNING_MAP), dtype="<u4")
    blocks = torch.floor(points[:, :2] / 4).long() @ torch.tensor([1, 7])
    labels = known[(blocks % len(known)).numpy()]
    return Scan(torch.cat((points, strength), 1).numpy().tobytes(), labels.tobytes()), source


class Sample(NamedTuple):
    """What a training step needs of one scan: n points, m occupied cells.

    features: (n, 9) float32; cells: (n, 3) of every point; occupied: (m, 3), ascending; labels: (m,) 0 .. 19.
    """

    features: Tensor
    cells: Tensor
    occupied: Tensor
    labels: Tensor


# --- sample ---------------------------------------------------------------------------------------


def prepare(scan: Scan, grid: Partition = GRID) -> Sample:
    """Our route: sparse from the beginning."""
    points = np.frombuffer(bytearray(scan.points), dtype=np.float32).reshape(-1, 4)
    segment = torch.from_numpy(map_labels(np.frombuffer(scan.labels, dtype="<u4")))
    feat = torch.from_numpy(points)
    batch = dict(coord=feat[:, :3], feat=feat, offset=torch.tensor([len(feat)]))
    cells = PointCells(grid, 4)(batch)
    groups, indices = voxel_groups(cells, grid)
    labels = majority_label(groups.inverse, segment.long() + 1, len(indices), CLASSES)
    return Sample(cells.features, cells.indices[:, 1:], indices[:, 1:], labels)


def prepare_densely(
    scan: Scan, grid: Partition = GRID, unused: bool = True
) -> tuple[NDArray, NDArray, NDArray]:
    """Features, cells of points and the volume of labels by way of dense arrays."""
    table_of = {raw: label + 1 for raw, label in LEARNING_MAP.items()}
    points = np.frombuffer(scan.points, dtype=np.float32).reshape(-1, 4)
    raw = np.frombuffer(scan.labels, dtype="<u4") & 0xFFFF
    labels = np.vectorize(table_of.__getitem__)(raw).astype(np.uint8)

    radius = np.sqrt(points[:, 0] ** 2 + points[:, 1] ** 2)
    azimuth = np.arctan2(points[:, 1], points[:, 0])
    framed = np.stack((radius, azimuth, points[:, 2]), axis=1)
    low, high, shape = np.array(grid.low), np.array(grid.high), np.array(grid.shape)
    size = (high - low) / (shape - 1)
    cells = np.floor((np.clip(framed, low, high) - low) / size).astype(np.int64)

    if unused:
        positions = np.indices(grid.shape) * size.reshape(3, 1, 1, 1) + low.reshape(3, 1, 1, 1)
        farthest = np.full(grid.shape[1:], -1)
        np.maximum.at(farthest, (cells[:, 1], cells[:, 2]), cells[:, 0])
        visible = np.arange(grid.shape[0])[:, None, None] <= farthest
        assert positions[0].shape == visible.shape == grid.shape

    # The majority: runs of equal (cell, label) in the sorted rows; the longest run of a cell, then the smallest label.
    order = np.lexsort((labels, cells[:, 2], cells[:, 1], cells[:, 0]))
    rows = np.column_stack((cells, labels))[order]
    begins = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    lengths = np.diff(np.append(begins, len(rows)))
    runs = rows[begins]
    best = np.lexsort((runs[:, 3], -lengths, runs[:, 2], runs[:, 1], runs[:, 0]))
    runs = runs[best]
    first = np.concatenate(([True], (runs[1:, :3] != runs[:-1, :3]).any(axis=1)))
    volume = np.zeros(grid.shape, dtype=np.uint8)
    volume[tuple(runs[first, :3].T)] = runs[first, 3]

    away = framed - ((cells + 0.5) * size + low)
    features = np.concatenate((away, framed, points[:, :2], points[:, 3:]), axis=1)
    return features.astype(np.float32), cells, volume


def same_sample(scan: Scan, grid: Partition = GRID) -> int:
    """Points whose cells differ between the routes, by the rounding of arctan2; SystemExit for other differences."""
    ours = prepare(scan, grid)
    features, cells, volume = prepare_densely(scan, grid)
    differ = (ours.cells.numpy() != cells).any(axis=1)
    close = np.isclose(ours.features.numpy()[~differ], features[~differ], rtol=1e-5, atol=1e-5)
    theirs = volume[tuple(ours.occupied.numpy().T)]
    wrong = int((theirs != ours.labels.numpy()).sum())
    if differ.mean() > 1e-4 or not close.all() or wrong > 2 * differ.sum():
        raise SystemExit("the two samples differ: the comparison would be meaningless")
    return int(differ.sum())


def time_sample(scan: Scan, seconds: float) -> list[Row]:
    """From bytes to what a step needs."""
    differ = same_sample(scan)
    least = least_ms(
        {
            "ours": cpu_ms(lambda: prepare(scan)),
            "dense": cpu_ms(lambda: prepare_densely(scan)),
            "used": cpu_ms(lambda: prepare_densely(scan, unused=False)),
        },
        seconds,
    )
    sample = prepare(scan)
    return [
        {
            "points": len(sample.cells),
            "occupied cells": len(sample.occupied),
            "ours ms": least["ours"],
            "dense arrays ms": least["dense"],
            "dense / ours": least["dense"] / least["ours"],
            "without the two unused ms": least["used"],
            "used / ours": least["used"] / least["ours"],
            "other cell by rounding": differ,
        }
    ]


# --- distinct cells -------------------------------------------------------------------------------


def distinct_by_key(indices: Tensor, grid: Partition = GRID) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (scan, cell) rows, inverse and counts, by way of packed keys."""
    groups = group_rows(grid.keys(indices[:, 0], indices[:, 1:]))
    batch, cells = grid.unpack(groups.keys)
    return torch.cat((batch[:, None], cells), dim=1), groups.inverse, groups.counts


def distinct_by_row(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's sort of whole rows."""
    return torch.unique(indices, dim=0, return_inverse=True, return_counts=True)


def time_distinct(scan: Scan, seconds: float) -> list[Row]:
    """Distinct cells and distinct pillars of all points."""
    cells = F.pad(prepare(scan).cells, (1, 0))
    pillars = cells.clone()
    pillars[:, 3] = 0
    rows: list[Row] = []
    for kind, indices in (("cells", cells), ("pillars", pillars)):
        if not all(map(torch.equal, distinct_by_key(indices), distinct_by_row(indices))):
            raise SystemExit("the two lists of cells differ: the comparison would be meaningless")
        least = least_ms(
            {
                "ours": cpu_ms(lambda i=indices: distinct_by_key(i)),
                "rows": cpu_ms(lambda i=indices: distinct_by_row(i)),
            },
            seconds,
        )
        rows.append(
            {
                "what": kind,
                "points": len(indices),
                "distinct": len(distinct_by_key(indices)[0]),
                "packed keys ms": least["ours"],
                "torch.unique(dim=0) ms": least["rows"],
                "torch / ours": least["rows"] / least["ours"],
            }
        )
    return rows


# --- pillar maximum -------------------------------------------------------------------------------


def amax(values: Tensor, index: Tensor, size: int) -> Tensor:
    """The maximum per segment as torch has it, differentiable."""
    wide = index.unsqueeze(1).expand(-1, values.shape[1])
    start = values.new_full((size, values.shape[1]), -torch.inf)
    return start.scatter_reduce(0, wide, values, "amax", include_self=False)


MAXIMA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours, points sorted": lambda values, index, counts: sorted_segment_max(values, counts),
    "ours, any order": lambda values, index, counts: segment_max(values, index, len(counts)),
    "scatter_reduce, random order": lambda values, index, counts: amax(values, index, len(counts)),
    "scatter_reduce, scan order": lambda values, index, counts: amax(values, index, len(counts)),
    "segment_reduce, points sorted": lambda values, index, counts: torch.segment_reduce(
        values, "max", lengths=counts, axis=0
    ),
}


def pillar_orders(scan: Scan, grid: Partition = GRID) -> tuple[dict[str, Tensor], Tensor]:
    """The pillar of every point, with the points in three orders, and the points per pillar."""
    indices = F.pad(prepare(scan, grid).cells, (1, 0))
    voxels = group_rows(grid.keys(indices[:, 0], indices[:, 1:]))
    groups, _ = merge_groups(voxels, grid.shape[2])
    mixed = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    orders = {"sorted": groups.order, "random order": mixed, "scan order": torch.arange(len(mixed))}
    return {name: groups.inverse[order] for name, order in orders.items()}, groups.counts


def time_maximum(scan: Scan, seconds: float, channels: int = CHANNELS) -> list[Row]:
    """Maximum over the points of every pillar, forward and backward."""
    indices, counts = pillar_orders(scan)
    indices["any order"] = indices["random order"]
    g = torch.Generator().manual_seed(1)
    values = torch.randn(len(indices["sorted"]), channels, generator=g, requires_grad=True)
    grad = torch.randn(len(counts), channels, generator=g)

    def step(name: str) -> Tensor:
        index = next(i for order, i in indices.items() if name.endswith(order))
        return torch.autograd.grad(MAXIMA[name](values, index, counts), values, grad)[0]

    expected = step("segment_reduce, points sorted")
    error = float((step("ours, points sorted") - expected).abs().max())
    del expected
    if error > 1e-5:
        raise SystemExit("the two gradients differ: the comparison would be meaningless")
    least = least_ms({name: cpu_ms(lambda n=name: step(n)) for name in MAXIMA}, seconds)
    ours = least["ours, points sorted"]
    return [
        {
            "route": name,
            "points": len(values),
            "pillars": len(counts),
            "channels": channels,
            "ms": ms,
            "this / ours sorted": ms / ours,
        }
        for name, ms in least.items()
    ]


# --- losses ---------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Scores and labels of the m occupied cells of a grid.

    student, teacher: (m, 20); labels: (m,); cells: (m, 3); shape: cells of the grid; weights: (20,) per class.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    cells: Tensor
    shape: tuple[int, ...]
    weights: Tensor

    def volume(self, values: Tensor) -> Tensor:
        """(1, k, *shape) from (m, k), zero in empty cells."""
        out = values.new_zeros((1, values.shape[1], *self.shape))
        r, p, z = self.cells.unbind(1)
        out[0, :, r, p, z] = values.t()
        return out


def scores_of(scan: Scan, grid: Partition = GRID) -> Scores:
    """Random scores; the rarer a class in the scan, the larger its weight."""
    sample = prepare(scan, grid)
    g = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, len(sample.labels), CLASSES, generator=g).unbind(0)
    share = torch.bincount(sample.labels, minlength=CLASSES) / len(sample.labels)
    weights = 1 / (share + 1e-3)
    return Scores(student, 2 * teacher, sample.labels, sample.occupied, tuple(grid.shape), weights)


def occupied_task(scores: Scores) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Cross entropy and Lovasz-softmax as the configs build them, and the scores they are of."""
    criteria = build_criteria(
        [
            dict(type="CrossEntropyLoss", weight=scores.weights.tolist(), ignore_index=0),
            dict(type="LovaszLoss", mode="multiclass", ignore_index=0),
        ]
    )
    return lambda student: criteria(student, scores.labels), scores.student


def occupied_logits(scores: Scores) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Logit distillation as the distiller has it, and the scores it is of."""
    teacher = scores.teacher
    return lambda student: logit_kl(student, teacher, temperature=TEMPERATURE), scores.student


def dense_task(scores: Scores) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The same two losses over all cells, empty ones having label 0."""
    labels = scores.volume(scores.labels[:, None])[:, 0]

    def loss(student: Tensor) -> Tensor:
        entropy = F.cross_entropy(student, labels, weight=scores.weights, ignore_index=0)
        p = student.softmax(dim=1).movedim(1, -1).reshape(-1, CLASSES)
        flat = labels.reshape(-1)
        p, flat = p[flat != 0], flat[flat != 0]
        losses = []
        for c in flat.unique():
            hit = (flat == c).to(p.dtype)
            errors, order = (hit - p[:, c]).abs().sort(descending=True)
            hits = hit[order].cumsum(0)
            jaccard = 1 - (hit.sum() - hits) / (hit.sum() + (1 - hit[order]).cumsum(0))
            losses.append((errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum())
        return entropy + torch.stack(losses).mean()

    return loss, scores.volume(scores.student)


def dense_logits(scores: Scores) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The divergence of every cell of the volume, averaged over the occupied ones."""
    teacher = scores.volume(scores.teacher)
    occupied = scores.volume(torch.ones(len(scores.cells), 1))[:, 0] > 0

    def loss(student: Tensor) -> Tensor:
        q = (teacher / TEMPERATURE).softmax(dim=1)
        p = (student / TEMPERATURE).softmax(dim=1)
        divergence = (q * (q / p).log()).sum(dim=1)
        return TEMPERATURE**2 * divergence[occupied].mean()

    return loss, scores.volume(scores.student)


LOSSES = {
    "cross entropy + Lovasz": {"occupied": occupied_task, "dense": dense_task},
    "logit distillation": {"occupied": occupied_logits, "dense": dense_logits},
}


def loss_worker(name: str, route: str) -> None:
    """Print the value, the CPU seconds of forward and backward, and the megabytes taken on top of the scores."""
    torch.set_num_threads(1)
    scores = scores_of(load_scan()[0])
    # The first call of an operator costs time and memory of its own.
    few = Scores(
        *(scores.student[:64], scores.teacher[:64], torch.arange(64) % CLASSES),
        *(torch.cartesian_prod(*(torch.arange(4),) * 3), (4, 4, 4), scores.weights),
    )
    loss, student = LOSSES[name][route](few)
    loss(student.requires_grad_()).backward()
    loss, student = LOSSES[name][route](scores)
    student.requires_grad_()

    def megabytes(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(s.split()[1]) / 1024 for s in lines if s.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = megabytes("VmRSS"), time.process_time()
    value = loss(student)
    value.backward()
    print(float(value.detach()), time.process_time() - start, megabytes("VmHWM") - before)


def time_losses(rounds: int) -> list[Row]:
    """CPU seconds, the least of some rounds, and memory, the most of them."""
    rows: list[Row] = []
    for name, routes in LOSSES.items():
        found: dict[str, list[list[float]]] = {route: [] for route in routes}
        for _ in range(rounds):
            for route, results in found.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--loss-worker", name, route],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=ROOT,
                )
                results.append([float(v) for v in done.stdout.split()])
        ours, dense = (found[route] for route in ("occupied", "dense"))
        if abs(ours[0][0] - dense[0][0]) > 1e-4 * abs(dense[0][0]):
            raise SystemExit(f"{name}: {ours[0][0]} and {dense[0][0]} are not the same loss")
        seconds = [min(result[1] for result in results) for results in (ours, dense)]
        memory = [max(result[2] for result in results) for results in (ours, dense)]
        rows.append(
            {
                "loss": name,
                "value": ours[0][0],
                "occupied CPU s": seconds[0],
                "dense CPU s": seconds[1],
                "dense / occupied": seconds[1] / seconds[0],
                "occupied MB": memory[0],
                "dense MB": memory[1],
                "dense / occupied, MB": memory[1] / memory[0],
            }
        )
    return rows


# --- report ---------------------------------------------------------------------------------------


# --- networks -------------------------------------------------------------------------------------


def networks(teacher: str, student: str) -> dict[str, VoxelSegmentor]:
    """The networks of two configs with random weights, by name."""
    built = {}
    for name, config in (("Cylinder3D", teacher), ("PolarNet", student)):
        torch.manual_seed(0)
        built[name] = MODELS.build(Config.fromfile(str(ROOT / "configs" / config)).model)
    return built


@torch.no_grad()
def settle(model: VoxelSegmentor, batch: dict[str, Tensor]) -> VoxelSegmentor:
    """The network in evaluation, normalising by the statistics of this batch, so that labels differ."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    model.train()(batch)
    return model.eval()


@torch.no_grad()
def time_networks(
    scan: Scan,
    seconds: float,
    teacher: str = "semantic_kitti/semseg-cylinder3d-0-base.py",
    student: str = "semantic_kitti/semseg-polarnet-0-base.py",
) -> list[Row]:
    """From points to labels."""
    feat = torch.from_numpy(np.frombuffer(bytearray(scan.points), dtype=np.float32).reshape(-1, 4))
    segment = torch.from_numpy(map_labels(np.frombuffer(scan.labels, dtype="<u4"))).long()
    batch = dict(coord=feat[:, :3], feat=feat, offset=torch.tensor([len(feat)]))
    models = {
        name: settle(model, {**batch, "segment": segment})
        for name, model in networks(teacher, student).items()
    }
    routes: dict[str, Callable[[], object]] = {
        name: lambda m=model: m(batch)["seg_logits"].argmax(1) for name, model in models.items()
    }
    sizes = {
        name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()
    }
    equal: dict[str, float] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "student.onnx"
            export_onnx(models["PolarNet"].backbone, path, void_class=True)
            running = session(path, 1)
    except InputError as error:
        print(f"\nONNX skipped: {error}")
    else:

        def by_onnx() -> NDArray:
            points = models["PolarNet"].backbone.partition(batch)
            cells = points.indices[:, 1:].contiguous().numpy()
            return running.run(["labels"], dict(features=points.features.numpy(), cells=cells))[0]

        same = by_onnx() == models["PolarNet"](batch)["seg_logits"].argmax(1).numpy()
        equal["PolarNet, ONNX"] = float(same.mean())
        if same.mean() < 0.9999:
            raise SystemExit(f"ONNX and PyTorch agree on {same.mean():.4%} of the points only")
        routes["PolarNet, ONNX"], sizes["PolarNet, ONNX"] = by_onnx, sizes["PolarNet"]
    least = least_ms({name: cpu_ms(route) for name, route in routes.items()}, seconds)
    return [
        {
            "network": name,
            "parameters (M)": sizes[name],
            "ms": ms,
            "Cylinder3D / this": least["Cylinder3D"] / ms,
            "equal labels": equal.get(name, float("nan")),
        }
        for name, ms in least.items()
    ]


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, for a look")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    parser.add_argument("--loss-worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.loss_worker:
        loss_worker(*args.loss_worker)
        return

    seconds = 0.5 if args.quick else 4.0
    scan, source = load_scan()
    about = environment(f"{source}: {len(scan.points) // 16} points")
    about["threads"] = 1
    versions = about["versions"]
    assert isinstance(versions, dict)
    versions.pop("spconv", None)
    print("# Bird's-eye view\n")
    print(*(f"- {key}: {value}" for key, value in about.items()), sep="\n")
    report: Row = {"environment": about}

    def section(title: str, rows: list[Row]) -> None:
        print(f"\n## {title}\n\n{table(rows)}", flush=True)
        report[title] = rows

    section("Sample from bytes", time_sample(scan, seconds))
    section("Distinct cells", time_distinct(scan, seconds))
    section("Pillar maximum, forward + backward", time_maximum(scan, 4 * seconds))
    section("Losses, forward + backward", time_losses(1 if args.quick else 3))
    section("Networks, points to labels", time_networks(scan, 8 * seconds))
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
