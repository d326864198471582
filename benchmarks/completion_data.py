"""Maps and pairs of scene completion against the published way; the sections of `benchmarks/completion.py`.

Everything that stands on the opponents' side is written here from the description of the published recipe (LiDiff,
arXiv:2403.13470): the whole map is brought to one point per cell again after every scan, a crop measures the distance
to every point of the map, and farthest point sampling passes over all points for every point it takes.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ops import Row, scene
from pointcept_kd.data.completion_pairs import (
    FLOOR,
    RADIUS,
    sample_pair,
    viewpoint_mask,
    within,
)
from pointcept_kd.data.map_tiles import FOLDER, Map, TileWriter
from pointcept_kd.data.maps import MapBuilder, posed_scans, static_rows
from pointcept_kd.data.semantic_kitti import read_labels, read_scan
from pointcept_kd.data.synthetic import Plan, Simulator
from pointcept_kd.host import InputError
from pointcept_kd.ops.neighbors import farthest_point_sampling

ROOT = Path(__file__).resolve().parents[1]
CELL, NEAR = 0.1, 3.5  # metres
APART = 100.0  # metres between the copies that a long map is made of


class Posed(NamedTuple):
    """A scan (n, 4), its labels (n,) and its pose (4, 4)."""

    scan: NDArray
    labels: NDArray
    pose: NDArray


def demand(same: bool, what: str) -> None:
    """SystemExit unless two routes agree."""
    if not same:
        raise SystemExit(f"{what} differ: the comparison would be meaningless")


def least_cpu_ms(routes: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Least CPU milliseconds of each route, taking turns; for routes too long for `benchmarks.ops.least_ms`."""
    least = dict.fromkeys(routes, float("inf"))
    for _ in range(turns):
        for name, route in routes.items():
            start = time.process_time()
            route()
            least[name] = min(least[name], (time.process_time() - start) * 1e3)
    return least


# --- scans ----------------------------------------------------------------------------------------


def real_scans(name: str = "00") -> list[Posed]:
    """The real posed scans of a sequence; none where there are no samples."""
    samples = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    folder = samples / "semantickitti/dataset/sequences" / name
    if not folder.is_dir():
        return []
    found = []
    for scan_path, label_path, pose in posed_scans(folder, incomplete=True):
        scan = read_scan(scan_path)
        found.append(Posed(scan, read_labels(label_path, len(scan)), pose))
    return found


def simulated_scans(count: int) -> tuple[list[Posed], str]:
    """Scans a metre apart through a simulated street; without Embree over a sheet, drawn a tenth at a time."""
    try:
        simulator = Simulator(Plan(scans={"00": count}), "00")
    except InputError:
        return sheet_scans(count), "a simulated sheet (no Embree found)"
    to_camera = np.vstack([simulator.calibration()["Tr"], [0, 0, 0, 1]])
    bottom = np.broadcast_to([[[0.0, 0, 0, 1]]], (count, 1, 4))
    poses = np.concatenate([simulator.camera_poses(), bottom], axis=1)
    poses = np.linalg.inv(to_camera) @ poses @ to_camera
    return [Posed(*simulator.scan(i), poses[i]) for i in range(count)], "a simulated street"


def sheet_scans(count: int) -> list[Posed]:
    """The benchmarks' sheet along itself, a tenth of its points in each scan, some of them moving."""
    world, found = scene()[0].numpy().astype(np.float64), []
    for i in range(count):
        rng, pose = np.random.default_rng(i), np.eye(4)
        pose[0, 3] = i
        points = world[rng.integers(0, len(world), len(world) // 10)] + rng.normal(
            0, 0.02, (len(world) // 10, 3)
        )
        points = np.column_stack([points, rng.uniform(size=len(points))])
        labels = rng.choice([0, 40, 50, 252], len(points), p=[0.05, 0.5, 0.4, 0.05])
        found.append(Posed(points.astype(np.float32), labels.astype(np.uint32), pose))
    return found


# --- maps -----------------------------------------------------------------------------------------


def first_by_rows(points: NDArray) -> NDArray:
    """The first point of every cell, by comparing rows of cells."""
    cells = np.floor(points.astype(np.float64) / CELL).astype(np.int64)
    return points[np.sort(np.unique(cells, axis=0, return_index=True)[1])]


def first_by_keys(points: NDArray) -> NDArray:
    """The same by one number per cell."""
    cells = np.floor(points.astype(np.float64) / CELL).astype(np.int64) + (1 << 20)
    keys = cells[:, 0] << 42 | cells[:, 1] << 21 | cells[:, 2]
    return points[np.sort(np.unique(keys, return_index=True)[1])]


def standing(posed: Posed) -> NDArray:
    """The static points of a scan away from the car, in the world frame, (n, 3) float32."""
    ids = posed.labels & 0xFFFF
    far = np.linalg.norm(posed.scan[:, :3].astype(np.float64), axis=1) > NEAR
    kept = posed.scan[(ids > 1) & (ids < 252) & far, :3].astype(np.float64)
    homogeneous = np.column_stack([kept, np.ones(len(kept))])
    return (homogeneous @ posed.pose.T)[:, :3].astype(np.float32)


def map_whole(scans: list[Posed], thin: Callable[[NDArray], NDArray]) -> Iterator[NDArray]:
    """The map after each scan, thinned out as a whole every time."""
    points = np.empty((0, 3), np.float32)
    for posed in scans:
        points = thin(np.concatenate([points, standing(posed)]))
        yield points


def map_growing(scans: list[Posed]) -> Iterator[NDArray]:
    """What each scan adds to the map, ours."""
    builder = MapBuilder(CELL, NEAR)
    for posed in scans:
        yield builder.add(*posed)[0]


def cumulative_ms(maps: Iterator[NDArray]) -> tuple[list[float], list[NDArray]]:
    """CPU milliseconds until each scan was in the map, and what was yielded."""
    spent, parts, total = [], [], 0.0
    while True:
        start = time.process_time()
        part = next(maps, None)
        total += (time.process_time() - start) * 1e3
        if part is None:
            return spent, parts
        spent.append(total)
        parts.append(part)


def time_maps(scans: list[Posed], counts: list[int], turns: int) -> list[Row]:
    """Maps of the first scans, the least of some turns; one pass through the scans gives all numbers of scans."""
    routes: dict[str, Callable[[], Iterator[NDArray]]] = {
        "ours": lambda: map_growing(scans),
        "rows": lambda: map_whole(scans, first_by_rows),
        "keys": lambda: map_whole(scans, first_by_keys),
    }
    least = {name: np.full(len(scans), np.inf) for name in routes}
    sizes: list[int] = []
    for _ in range(turns):
        made = {}
        for name, route in routes.items():
            spent, parts = cumulative_ms(route())
            least[name] = np.minimum(least[name], spent)
            made[name] = np.concatenate(parts) if name == "ours" else parts[-1]
            sizes = [len(part) for part in parts]
        same = all(np.array_equal(made["ours"], made[name]) for name in ("rows", "keys"))
        demand(same, "maps")
    return [
        {
            "scans": count,
            "map": sizes[count - 1],
            "ours ms": least["ours"][count - 1],
            "np.unique of rows ms": least["rows"][count - 1],
            "rows / ours": least["rows"][count - 1] / least["ours"][count - 1],
            "np.unique of keys ms": least["keys"][count - 1],
            "keys / ours": least["keys"][count - 1] / least["ours"][count - 1],
        }
        for count in counts
    ]


def maps_section(seconds: float, quick: bool, points: int) -> tuple[dict[str, list[Row]], str]:
    """Tables by title, and where the scans come from."""
    counts = [2, 4, 8, 16] if quick else [5, 10, 20, 40, 80]
    scans, source = simulated_scans(counts[-1])
    tables, turns = {}, 1 if quick else 2
    if real := real_scans():
        tables["Map of real scans"] = time_maps(real, sorted({2, len(real)}), turns)
        source = f"SemanticKITTI sequence 00, {len(real)} scans; {source}"
    tables["Map of simulated scans"] = time_maps(scans, counts, turns)
    mean = sum(len(posed.scan) for posed in scans) // len(scans)
    return tables, f"{source}, {len(scans)} scans of {mean} points on average"


# --- pairs: the plain ways ------------------------------------------------------------------------


def crop_everywhere(points: NDArray, pose: NDArray, radius: float = RADIUS) -> NDArray:
    """The distance of every point of the map to the pose, and the near ones in its frame."""
    wide = points.astype(np.float64)
    near = wide[np.linalg.norm(wide - pose[:3, 3], axis=1) < radius]
    homogeneous = np.column_stack([near, np.ones(len(near))])
    return (homogeneous @ np.linalg.inv(pose).T)[:, :3].astype(np.float32)


def view_cells(points: NDArray, seen: NDArray, cell: float = 10.0) -> NDArray:
    """Cells (n, 3) of points on the grid that begins half a cell before the scan."""
    origin = seen.astype(np.float64).min(axis=0) - cell / 2
    return np.floor((points.astype(np.float64) - origin) / cell).astype(np.int64)


def mask_by_rows(points: NDArray, seen: NDArray) -> NDArray:
    """Rows of cells compared with the distinct ones of the scan, as single values of 24 bytes."""

    def single(cells: NDArray) -> NDArray:
        return np.ascontiguousarray(cells).view([("", np.int64)] * 3)[:, 0]

    return np.isin(single(view_cells(points, seen)), single(view_cells(seen, seen)))


def mask_by_loops(points: NDArray, seen: NDArray) -> NDArray:
    """A set of cells asked point by point."""
    occupied = set(map(tuple, view_cells(seen, seen).tolist()))
    return np.array([tuple(c) in occupied for c in view_cells(points, seen).tolist()], bool)


def farthest_plainly(points: NDArray, count: int) -> NDArray:
    """Farthest point sampling from row 0: all distances again for every point taken, column by column."""
    columns = np.ascontiguousarray(points.T)
    reach, picks = np.full(len(points), np.inf, points.dtype), np.zeros(count, np.int64)
    for i in range(1, count):
        x, y, z = (column - column[picks[i - 1]] for column in columns)
        np.minimum(reach, x * x + y * y + z * z, out=reach)
        picks[i] = reach.argmax()
    return picks


def farthest(points: NDArray, count: int) -> NDArray:
    """The same, ours."""
    return farthest_point_sampling(torch.from_numpy(points), count).numpy()


def pair_plainly(
    partial: NDArray, map_points: NDArray, pose: NDArray, points: int, condition: int
) -> dict[str, NDArray]:
    """A pair out of the plain ways above."""
    full = crop_everywhere(map_points, pose)
    full = full[full[:, 2] > FLOOR]
    full = full[mask_by_rows(full, partial)]
    coord = partial[farthest_plainly(partial, condition)]
    order = np.random.permutation(len(full))
    return {"coord": coord, "complete": full[order[np.arange(points) % len(full)]]}


def pair(
    partial: NDArray, drive: Map, pose: NDArray, points: int, condition: int
) -> dict[str, NDArray]:
    """The same, ours."""
    full = drive.around(pose, RADIUS)
    return sample_pair(partial, full[full[:, 2] > FLOOR], points, condition)


# --- pairs: the clock -----------------------------------------------------------------------------


def long_map(folder: Path, points: NDArray, copies: int) -> Map:
    """A map of several copies of a street side by side, in tiles."""
    with TileWriter(folder) as writer:
        for i in range(copies):
            shift = np.array([i * APART, 0, 0], np.float32)
            writer.add(points + shift)
        writer.finish({})
    return Map(folder / FOLDER)


def time_crop(street: NDArray, pose: NDArray, copies: list[int], turns: int) -> list[Row]:
    """Crops of longer and longer maps; both have read the files before."""
    rows: list[Row] = []
    for count in copies:
        with tempfile.TemporaryDirectory() as folder:
            drive = long_map(Path(folder), street, count)
            whole = np.array(drive.points)
            found = drive.around(pose, RADIUS), crop_everywhere(whole, pose)
            same = found[0].shape == found[1].shape and np.allclose(*found, rtol=0, atol=1e-4)
            demand(same, "crops")
            least = least_cpu_ms(
                {
                    "ours": lambda drive=drive: drive.around(pose, RADIUS),
                    "plain": lambda whole=whole: crop_everywhere(whole, pose),
                },
                turns,
            )
        rows.append(
            {
                "map": len(whole),
                "crop": len(found[0]),
                "ours ms": least["ours"],
                "every distance ms": least["plain"],
                "every / ours": least["plain"] / least["ours"],
            }
        )
    return rows


def time_mask(full: NDArray, partial: NDArray, turns: int) -> list[Row]:
    """Where the scan has been."""
    masks = [route(full, partial) for route in (viewpoint_mask, mask_by_rows, mask_by_loops)]
    demand(all(np.array_equal(masks[0], mask) for mask in masks), "view-point masks")
    least = least_cpu_ms(
        {
            "ours": lambda: viewpoint_mask(full, partial),
            "rows": lambda: mask_by_rows(full, partial),
            "loops": lambda: mask_by_loops(full, partial),
        },
        turns,
    )
    return [
        {
            "points": f"{len(full)} by {len(partial)}",
            "kept": int(masks[0].sum()),
            "ours ms": least["ours"],
            "np.isin of rows ms": least["rows"],
            "rows / ours": least["rows"] / least["ours"],
            "set of cells ms": least["loops"],
            "set / ours": least["loops"] / least["ours"],
        }
    ]


def fpsample_route(cloud: NDArray, count: int) -> Callable[[], NDArray] | None:
    """fpsample's bucket search from row 0, None where it is not installed."""
    try:
        import fpsample
    except ImportError:
        return None
    return lambda: fpsample.bucket_fps_kdline_sampling(cloud, count, h=7, start_idx=0)


def reach_of(cloud: NDArray, rows: NDArray) -> float:
    """How far a point of the cloud can be from the sample, metres."""
    from scipy.spatial import cKDTree

    return float(cKDTree(cloud[rows]).query(cloud)[0].max())


def time_farthest(cloud: NDArray, sizes: list[tuple[int, int]], turns: int) -> list[Row]:
    """Samples of some sizes; plain NumPy takes the same rows, fpsample may take others that are equally far."""
    rows: list[Row] = []
    for points, count in sizes:
        part = np.ascontiguousarray(cloud[:points], np.float32)
        routes = {"ours": lambda part=part, count=count: farthest(part, count)}
        routes["plain"] = lambda part=part, count=count: farthest_plainly(part, count)
        picks = [route() for route in routes.values()]
        demand(np.array_equal(*picks), "farthest point samples")
        other = fpsample_route(part, count)
        if other is not None:
            routes["fpsample"] = other
            reach = reach_of(part, picks[0]), reach_of(part, np.asarray(other(), np.int64))
            demand(bool(np.isclose(*reach, rtol=0.02)), "the reaches of the samples")
        least = least_cpu_ms(routes, turns)
        ours, fast = least["ours"], least.get("fpsample")
        rows.append(
            {
                "points": f"{len(part)} to {count}",
                "ours ms": ours,
                "NumPy ms": least["plain"],
                "NumPy / ours": least["plain"] / ours,
                "fpsample ms": fast,
                "fpsample / ours": None if fast is None else fast / ours,
            }
        )
    return rows


def time_pair(
    partial: NDArray,
    street: NDArray,
    pose: NDArray,
    sizes: list[tuple[int, int]],
    copies: int,
    turns: int,
) -> list[Row]:
    """From a cropped scan and a map in memory to a pair."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        drive = long_map(Path(folder), street, copies)
        whole = np.array(drive.points)
        for points, condition in sizes:
            routes = {
                "ours": lambda p=points, m=condition: pair(partial, drive, pose, p, m),
                "plain": lambda p=points, m=condition: pair_plainly(partial, whole, pose, p, m),
            }
            made = []
            for route in routes.values():
                np.random.seed(0)
                made.append(route())
            demand(np.array_equal(made[0]["coord"], made[1]["coord"]), "conditions")
            demand(np.allclose(*(m["complete"] for m in made), rtol=0, atol=1e-4), "full clouds")
            least = least_cpu_ms(routes, turns)
            rows.append(
                {
                    "P": points,
                    "M": condition,
                    "map": len(whole),
                    "ours ms": least["ours"],
                    "plain ms": least["plain"],
                    "plain / ours": least["plain"] / least["ours"],
                }
            )
    return rows


def pairs_section(seconds: float, quick: bool, points: int) -> tuple[dict[str, list[Row]], str]:
    """Tables by title, and where the scans come from."""
    scans, source = real_scans(), "SemanticKITTI sequence 00"
    if not scans:
        scans, source = simulated_scans(8)
    street = np.concatenate(list(map_growing(scans)))
    middle = scans[len(scans) // 2]
    kept = middle.scan[static_rows(middle.scan, middle.labels)]
    partial = np.ascontiguousarray(kept[within(kept) & (kept[:, 2] > FLOOR), :3])
    full = crop_everywhere(street, middle.pose)
    full, mixed = full[full[:, 2] > FLOOR], np.random.default_rng(0).permutation(len(partial))
    copies = [1, 4] if quick else [1, 10, 40]
    most = [(4_000, 400)] if quick else [(20_000, 2_000), (len(partial), 18_000)]
    sizes = [(4_000, 400)] if quick else [(18_000, 1_800), (180_000, 18_000)]
    few, many = 1, 2 if quick else 5  # turns of what takes a minute, and of the others
    tables = {
        "Crop of a map": time_crop(street, middle.pose, copies, many),
        "View-point mask": time_mask(full, partial, many),
        "Farthest point sampling": time_farthest(partial[mixed], most, few),
        "Whole pair": time_pair(partial, street, middle.pose, sizes, copies[-1], few),
    }
    about = (
        f"{source}: map of {len(scans)} scans, {len(street)} points, longer ones are copies of it"
    )
    return tables, f"{about}; partial cloud of {len(partial)} points"
