"""Time the parts of scene completion against straightforward formulations.

    python benchmarks/completion.py [--quick] [--sections maps ...] [--points 18000] [--out rows.json]

One thread, CPU milliseconds. Alternatives take turns in every round and the least of each counts; each pair is checked
to compute the same. The clouds are two consecutive real scans where POINTCEPT_KD_SAMPLES has them (default
`../shared/data` beside the project) and simulated sheets otherwise, cut to 50 m around the sensor, in random order
as the points of a completion are.

- Occupied cells (metrics): sorted 64-bit keys. Opponents: `np.histogramdd` over all cells of the box, as the published
  evaluation counts, and an array of booleans, which is the least that a dense route needs.
- Jensen-Shannon distances (metrics): the same keys. Opponent: `np.histogramdd` and the formula over all cells.
- Chamfer distance (metrics): a k-d tree asked in spatial order. Opponents: SciPy's tree as it comes, and all pairs in
  chunks (`torch.cdist`) on fewer points. "Noisy" is a cloud with unit noise, as at the beginning of a sampling.
- All scores of a scan (metrics): what a validation pays for one. Opponent: the dense routes and the plain tree.
- Maps (maps): a growing set of cells. Opponents: the whole map thinned out again after every scan, by distinct rows of
  cells and by distinct keys. Real posed scans, and simulated ones since those are few; the ratio grows with the scans.
- Pairs (pairs): crop by tiles, view-point mask by a small array, farthest point sampling on a grid, and all of it for a
  training pair. Opponents: the distance to every point of the map, rows of cells in `np.isin` or a set, all distances
  for every sampled point; fpsample where it is installed. Long maps are copies of a street side by side.
- Denoiser (network): gates per cell of the scan, the scan encoded once, a guided step with shared cells. Opponents:
  gates per row with a search at every place, the tenfold repeated scan encoded in every call, two calls. Full width;
  times grow with `--points`; 180,000 of them, the published number, take some 20 s of CPU for a call.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from benchmarks.completion_data import demand, maps_section, pairs_section
from benchmarks.completion_network import network_section
from benchmarks.ops import Row, cpu_ms, environment, least_ms, scene, table
from pointcept_kd.completion import metrics
from pointcept_kd.completion.metrics import CellCounts, CompletionScores

ROOT = Path(__file__).resolve().parents[1]
ALL_PAIRS = 8000  # points of each cloud that all pairs are affordable for
CHUNK = 512


class Clouds(NamedTuple):
    """A completion and the truth, (n, 3) and (m, 3) float32 metres."""

    pred: NDArray
    target: NDArray

    @property
    def noisy(self) -> NDArray:
        """The completion with unit noise."""
        noise = np.random.default_rng(0).normal(size=self.pred.shape)
        return (self.pred + noise).astype(np.float32)


def load_clouds() -> tuple[Clouds, str]:
    """Two clouds of one street and a line that says where they come from."""
    samples = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    folder = samples / "semantickitti/dataset/sequences/00/velodyne"
    files = [folder / f"{i:06d}.bin" for i in (1, 0)]
    if all(file.exists() for file in files):
        raw = [np.fromfile(file, np.float32).reshape(-1, 4)[:, :3] for file in files]
        source = "SemanticKITTI sequence 00, scans 000001 and 000000"
    else:
        points, source = scene()
        sheet = points.numpy().astype(np.float32)
        shift = np.random.default_rng(1).normal(0, 0.1, sheet.shape).astype(np.float32)
        raw = [sheet + shift, sheet]
    rng = np.random.default_rng(3)
    mixed = (points[rng.permutation(len(points))] for points in raw)
    return Clouds(*(points[np.linalg.norm(points, axis=1) < 50] for points in mixed)), source


# --- metrics: the dense routes --------------------------------------------------------------------


def histogram(points: NDArray, cell: float) -> NDArray:
    """Points per cell of the whole box, (s, s, s) float64."""
    side = round(2 * metrics.HALF / cell)
    reach = (-metrics.HALF, metrics.HALF)
    return np.histogramdd(points, bins=[side] * 3, range=[reach] * 3)[0]


def counts_by_histogram(pred: NDArray, target: NDArray, cell: float) -> CellCounts:
    """The IoU's counts from two histograms."""
    p, g = histogram(pred, cell).clip(0, 1), histogram(target, cell).clip(0, 1)
    both = int((p * g).sum())
    return CellCounts(both, int(g.sum()) - both, int(p.sum()) - both)


def counts_by_booleans(pred: NDArray, target: NDArray, cell: float) -> CellCounts:
    """The IoU's counts from two arrays of booleans."""
    side = round(2 * metrics.HALF / cell)
    boxes = []
    for points in (pred, target):
        wide = points.astype(np.float64)
        inside = wide[(np.abs(wide) <= metrics.HALF).all(axis=1)]
        i, j, k = np.minimum(((inside + metrics.HALF) / cell).astype(np.int64), side - 1).T
        box = np.zeros((side, side, side), dtype=bool)
        box[i, j, k] = True
        boxes.append(box)
    p, g = boxes
    both = int(np.count_nonzero(p & g))
    return CellCounts(both, int(np.count_nonzero(g)) - both, int(np.count_nonzero(p)) - both)


def jsd_of_arrays(p: NDArray, q: NDArray) -> float:
    """The formula over all cells."""
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2

    def divergence(a: NDArray) -> float:
        used = a > 0
        return float((a[used] * np.log(a[used] / mean[used])).sum())

    return math.sqrt((divergence(p) + divergence(q)) / 2)


def jsd_by_histogram(
    pred: NDArray, target: NDArray, cell: float = metrics.JSD_CELL
) -> tuple[float, float]:
    """jsd_3d and jsd_bev."""
    p, q = histogram(pred, cell), histogram(target, cell)
    columns = (counts.clip(0, 1).sum(axis=2) for counts in (p, q))
    return jsd_of_arrays(p, q), jsd_of_arrays(*columns)


def jsd_by_keys(pred: NDArray, target: NDArray) -> tuple[float, float]:
    """The same, ours."""
    return metrics.jsd_3d(pred, target), metrics.jsd_bev(pred, target)


# --- metrics: the distances -----------------------------------------------------------------------


def tree_distances(source: NDArray, target: NDArray) -> NDArray:
    """SciPy's tree with its defaults, asked in the cloud's own order."""
    return cKDTree(target).query(source)[0]


def pair_distances(source: NDArray, target: NDArray) -> NDArray:
    """Every pair, in chunks; in float64 and by differences, because the faster product loses millimetres."""
    a, b = torch.from_numpy(source).double(), torch.from_numpy(target).double()
    exact = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(part, b, compute_mode=exact).amin(1) for part in a.split(CHUNK)]
    return torch.cat(parts).numpy()


def chamfer_by(
    nearest: Callable[[NDArray, NDArray], NDArray], pred: NDArray, target: NDArray
) -> float:
    """The Chamfer distance from some search."""
    return float(0.5 * (nearest(pred, target).mean() + nearest(target, pred).mean()))


def scores_densely(pred: NDArray, target: NDArray, cells: tuple[float, ...]) -> list[float]:
    """cd, precision, recall, f, both jsd, IoU at some cells."""
    pred2gt, gt2pred = tree_distances(pred, target), tree_distances(target, pred)
    thresholds = metrics.THRESHOLDS[:, None]
    precision, recall = ((d < thresholds).mean(axis=1) for d in (pred2gt, gt2pred))
    both = precision + recall
    f = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    areas = [float(metrics._area_weights() @ curve) for curve in (precision, recall, f)]
    ious = [counts_by_histogram(pred, target, cell).iou for cell in cells]
    cd = float(0.5 * (pred2gt.mean() + gt2pred.mean()))
    return [cd, *areas, *jsd_by_histogram(pred, target), *ious]


def scores_sparsely(pred: NDArray, target: NDArray, cells: tuple[float, ...]) -> list[float]:
    """The same, ours."""
    row = CompletionScores(cells=cells).add("scan", pred, target)
    keys = ("cd", "precision", "recall", "f", "jsd_3d", "jsd_bev")
    return [*(row.values[key] for key in keys), *(row.cells[cell].iou for cell in cells)]


# --- metrics: the clock ---------------------------------------------------------------------------


def time_cells(clouds: Clouds, seconds: float, quick: bool) -> list[Row]:
    """Counts for the IoU at three sizes; a histogram at 0.2 m is 1 GB, at 0.1 m 8 GB, booleans there 1 GB."""
    rows: list[Row] = []
    for cell in metrics.CELLS:
        routes = {"ours": lambda cell=cell: metrics.voxel_counts(*clouds, cell)}
        if cell >= (0.5 if quick else 0.2):
            routes["histogram"] = lambda cell=cell: counts_by_histogram(*clouds, cell)
        if cell >= 0.2 or not quick:
            routes["booleans"] = lambda cell=cell: counts_by_booleans(*clouds, cell)
        found = {route() for route in routes.values()}
        demand(len(found) == 1, f"counts at {cell} m")
        least = least_ms({name: cpu_ms(route) for name, route in routes.items()}, seconds)
        ours = least["ours"]
        counts = routes["ours"]()
        rows.append(
            {
                "cell m": cell,
                "tp": counts.tp,
                "fn": counts.fn,
                "fp": counts.fp,
                "ours ms": ours,
                "np.histogramdd ms": least.get("histogram"),
                "histogramdd / ours": least["histogram"] / ours if "histogram" in least else None,
                "booleans ms": least.get("booleans"),
                "booleans / ours": least["booleans"] / ours if "booleans" in least else None,
            }
        )
    return rows


def time_jsd(clouds: Clouds, seconds: float) -> list[Row]:
    """Both Jensen-Shannon distances."""
    ours, dense = jsd_by_keys(*clouds), jsd_by_histogram(*clouds)
    demand(bool(np.allclose(ours, dense, rtol=1e-9, atol=0)), "Jensen-Shannon distances")
    least = least_ms(
        {
            "ours": cpu_ms(lambda: jsd_by_keys(*clouds)),
            "dense": cpu_ms(lambda: jsd_by_histogram(*clouds)),
        },
        seconds,
    )
    return [
        {
            "jsd_3d": ours[0],
            "jsd_bev": ours[1],
            "ours ms": least["ours"],
            "np.histogramdd ms": least["dense"],
            "histogramdd / ours": least["dense"] / least["ours"],
        }
    ]


def time_chamfer(clouds: Clouds, seconds: float, most: int = ALL_PAIRS) -> list[Row]:
    """Close and noisy clouds, all points and as many as all pairs are affordable for."""
    rng = np.random.default_rng(2)
    rows: list[Row] = []
    for kind, pred in (("close", clouds.pred), ("noisy", clouds.noisy)):
        few = [a[rng.permutation(len(a))[:most]] for a in (pred, clouds.target)]
        for p, g in ((pred, clouds.target), few):
            routes = {
                "ours": lambda p=p, g=g: metrics.chamfer_distance(p, g),
                "tree": lambda p=p, g=g: chamfer_by(tree_distances, p, g),
            }
            if len(p) <= most:
                routes["pairs"] = lambda p=p, g=g: chamfer_by(pair_distances, p, g)
            values = [route() for route in routes.values()]
            demand(bool(np.allclose(values, values[0], rtol=1e-9, atol=0)), "Chamfer distances")
            least = least_ms({name: cpu_ms(route) for name, route in routes.items()}, seconds)
            rows.append(
                {
                    "prediction": kind,
                    "points": f"{len(p)} x {len(g)}",
                    "cd m": values[0],
                    "ours ms": least["ours"],
                    "plain cKDTree ms": least["tree"],
                    "cKDTree / ours": least["tree"] / least["ours"],
                    "all pairs ms": least.get("pairs"),
                    "all pairs / ours": least["pairs"] / least["ours"]
                    if "pairs" in least
                    else None,
                }
            )
    return rows


def time_scores(clouds: Clouds, seconds: float, quick: bool) -> list[Row]:
    """Everything that a validation wants of a scan; without the cells that are too many for a dense route."""
    cells = (0.5,) if quick else (0.5, 0.2)
    values = [route(*clouds, cells) for route in (scores_sparsely, scores_densely)]
    demand(bool(np.allclose(*values, rtol=1e-9, atol=0)), "scores")
    least = least_ms(
        {
            "ours": cpu_ms(lambda: scores_sparsely(*clouds, cells)),
            "dense": cpu_ms(lambda: scores_densely(*clouds, cells)),
            "three": cpu_ms(lambda: scores_sparsely(*clouds, metrics.CELLS)),
        },
        seconds,
    )
    return [
        {
            "IoU at m": ", ".join(map(str, cells)),
            "ours ms": least["ours"],
            "dense ms": least["dense"],
            "dense / ours": least["dense"] / least["ours"],
            "ours, IoU at three sizes ms": least["three"],
        }
    ]


def metrics_section(seconds: float, quick: bool, points: int) -> tuple[dict[str, list[Row]], str]:
    """Tables by title, and where the clouds come from."""
    clouds, source = load_clouds()
    tables = {
        "Occupied cells": time_cells(clouds, seconds, quick),
        "Jensen-Shannon distances": time_jsd(clouds, seconds),
        "Chamfer distance": time_chamfer(clouds, seconds),
        "All scores of a scan": time_scores(clouds, seconds, quick),
    }
    return tables, f"{source}: {len(clouds.pred)} and {len(clouds.target)} points"


# --- report ---------------------------------------------------------------------------------------

# A section measures for about `seconds` per row, or shorter if `quick`, and returns its tables and its source. `points`
# are those that the network denoises.
Section = Callable[[float, bool, int], tuple[dict[str, list[Row]], str]]
SECTIONS: dict[str, Section] = {
    "metrics": metrics_section,
    "maps": maps_section,
    "pairs": pairs_section,
    "network": network_section,
}


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the time, and small sizes only"
    )
    parser.add_argument(
        "--points", type=int, help="points that the network denoises; 18000, or 4000 with --quick"
    )
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    points = (4_000 if args.quick else 18_000) if args.points is None else args.points
    if points < 100:
        parser.error(f"--points {points}: use 100 or more")
    torch.set_num_threads(1)

    seconds = 0.25 if args.quick else 2.0
    about = environment("")
    about["threads"] = 1
    versions = about["versions"]
    assert isinstance(versions, dict)
    versions.pop("spconv", None)
    versions["scipy"] = version("scipy")
    about.pop("scene")
    print("# Scene completion\n")
    print(*(f"- {key}: {value}" for key, value in about.items()), sep="\n")
    report: Row = {"environment": about}
    for name in args.sections:
        tables, source = SECTIONS[name](seconds, args.quick, points)
        print(f"\n## {name.capitalize()}\n\n{source}", flush=True)
        for title, rows in tables.items():
            print(f"\n### {title}\n\n{table(rows)}", flush=True)
        report[name] = {"source": source, "tables": tables}
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
