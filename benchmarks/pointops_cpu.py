"""Time the searches of libs/pointops against the libraries they could have been left to.

    python benchmarks/pointops_cpu.py [--quick] [--threads 1 2] [--points 60000] [--out rows.json]

Sections: the 16 nearest neighbours of every point, farthest point sampling to 4096 points, and ball
queries, all on CPU, on a voxelised scan in the order of the scanner and shuffled. Opponents are
small-gicp, fpsample (both from the extra `fast`, left out where they are not installed), scipy, a
numpy loop and brute force in torch. Alternatives take turns in every round and the least time of
each counts, so a busy machine disturbs all alike. Trees are built in the time measured, and every
opponent starts from the same float32 tensor. The scene is that of ops.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# pointops is taken from here, installed or not.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "libs" / "pointops"))

import numpy as np  # noqa: E402
import pointops  # noqa: E402
import torch  # noqa: E402
from ops import Row, environment, least_ms, scene, table, voxels  # noqa: E402
from pointops import _brute, _cpu  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402
from torch import Tensor  # noqa: E402

K, SAMPLES, RADIUS, BALL = 16, 4096, 0.5, 32


def installed(name: str) -> str:
    """Version of a package, or that there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def clouds(count: int) -> tuple[dict[str, Tensor], str]:
    """One point per 10 cm voxel, `count` of them, as the scanner has them and shuffled."""
    points, source = scene()
    _, inverse = voxels(points, 0.1)
    first = np.unique(inverse.numpy(), return_index=True)[1]
    cloud = points[torch.from_numpy(np.sort(first))][:count].contiguous()
    mixed = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(0))]
    return {"scanner": cloud, "shuffled": mixed}, f"{source}: {len(cloud)} points of 10 cm voxels"


def without(call: Callable[[], object]) -> Callable[[], object]:
    """The call with the optional libraries of the extra `fast` hidden."""

    def hidden() -> None:
        optional = _cpu._optional
        _cpu._optional = lambda name: None
        try:
            call()
        finally:
            _cpu._optional = optional

    return hidden


def compare(alternatives: dict[str, Callable[[], object]], seconds: float, first: Row) -> Row:
    """Least times, and how many times longer each alternative takes than pointops."""

    def quiet(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: call() is None or None

    least = least_ms({name: quiet(call) for name, call in alternatives.items()}, seconds)
    row = dict(first)
    for name, spent in least.items():
        row[f"{name} ms"] = spent
    for name, spent in least.items():
        if name != "pointops":
            row[f"{name} / pointops"] = spent / least["pointops"]
    return row


def time_knn(order: str, cloud: Tensor, threads: int, seconds: float) -> Row:
    """All neighbours of all points."""
    offset = torch.tensor([len(cloud)])

    def ours() -> object:
        return pointops.knn_query(K, cloud, offset)

    def scipy() -> object:
        points = cloud.double().numpy()
        tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
        return tree.query(points, k=K, workers=threads)

    alternatives = {"pointops": ours, "pointops without fast": without(ours), "scipy": scipy}
    gicp = _cpu._optional("small_gicp")
    if gicp is not None:

        def small_gicp() -> object:
            points = cloud.double().numpy()
            return gicp.KdTree(points, num_threads=threads).batch_knn_search(
                points, K, num_threads=threads
            )

        alternatives["small-gicp"] = small_gicp
    near = scipy()[0]
    if not np.allclose(pointops.knn_query(K, cloud, offset)[1], near, rtol=1e-5, atol=1e-6):
        raise SystemExit("pointops and scipy differ: the comparison would be meaningless")
    row = compare(alternatives, seconds, {"order": order, "points": len(cloud), "threads": threads})
    # Brute force takes a hundred times longer: a sixteenth of the queries stands for all.
    part = cloud[::16].contiguous()
    ends = [len(cloud)], [len(part)]
    brute = least_ms(
        {"brute": lambda: _brute.nearest(K, cloud, ends[0], part, ends[1]) is None or None}, 0
    )["brute"]
    row["torch brute force ms (from 1/16)"] = 16 * brute
    return row


def time_farthest(order: str, cloud: Tensor, threads: int, seconds: float) -> Row:
    """Samples of one scan."""
    offset, new_offset = torch.tensor([len(cloud)]), torch.tensor([SAMPLES])

    def ours() -> Tensor:
        return pointops.farthest_point_sampling(cloud, offset, new_offset)

    def loop() -> np.ndarray:
        return _cpu._farthest_loop(cloud.numpy(), SAMPLES)

    alternatives: dict[str, Callable[[], object]] = {"pointops": ours}
    fpsample = _cpu._optional("fpsample")
    if fpsample is not None:
        # It does not start at row 0 for this, which is as much work.
        alternatives["fpsample h=7"] = lambda: fpsample.bucket_fps_kdline_sampling(
            cloud.numpy(), SAMPLES, 7, start_idx=0
        )
    same = float((ours().numpy() == loop()).mean())
    row = compare(alternatives, seconds, {"order": order, "points": len(cloud), "threads": threads})
    # The loop takes ten times longer: among the others it would leave few turns, and a cold cache.
    row["numpy loop ms"] = least_ms({"loop": lambda: loop() is None or None}, seconds / 4)["loop"]
    return {**row, "picks equal to the loop's": same}


def time_ball(order: str, cloud: Tensor, threads: int, seconds: float) -> Row:
    """Points within a radius: pointops, and the lists scipy makes, which still have to be sorted."""
    offset = torch.tensor([len(cloud)])

    def scipy() -> object:
        points = cloud.double().numpy()
        tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
        return tree.query_ball_point(points, RADIUS, workers=threads)

    alternatives = {
        "pointops": lambda: pointops.ball_query(BALL, RADIUS, 0, cloud, offset),
        "scipy, lists only": scipy,
    }
    first = {"order": order, "points": len(cloud), "radius": RADIUS, "threads": threads}
    return compare(alternatives, seconds, first)


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, for a look")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("--points", type=int, default=60_000, help="points of the scan")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    if min(args.threads) < 1:
        parser.error("--threads needs numbers of 1 or more")
    if args.points <= SAMPLES:
        parser.error(f"--points needs more than {SAMPLES}")

    seconds = 0.5 if args.quick else 4.0
    by_order, source = clouds(args.points)
    about = environment(source)
    for name in ("scipy", "small-gicp", "fpsample"):
        about["versions"][name] = installed(name)  # type: ignore[index]
    report: dict[str, object] = {"environment": about}
    print("# Neighbours and samples\n")
    print(*(f"- {k}: {v}" for k, v in about.items()), sep="\n")
    sections = {
        f"{K} nearest neighbours of every point": time_knn,
        f"Farthest point sampling to {SAMPLES}": time_farthest,
        f"Ball query, {BALL} neighbours": time_ball,
    }
    for title, section in sections.items():
        rows = []
        for order, cloud in by_order.items():
            for threads in args.threads:
                torch.set_num_threads(threads)
                rows.append(section(order, cloud, threads, seconds))
        print(f"\n## {title}\n\n{table(rows)}", flush=True)
        report[title] = rows
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
