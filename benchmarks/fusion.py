"""Time what passes between points and images in the LiDAR-camera student against the straightforward routes.

    python benchmarks/fusion.py [--quick] [--out rows.json]

One thread, CPU milliseconds, forward and forward + backward. Alternatives take turns in every round and the least of
each counts; each pair is checked to compute the same first. The points are 25,000 of a real scan where
POINTCEPT_KD_SAMPLES has one (default `../shared/data` beside the project) and of a simulated sheet otherwise; six
cameras with the optics and directions of nuScenes' are put around it, with maps as of 360 x 640 images. The opponents
are written here from the description of the published pipeline (U2MKD):

- Gather: every point is sampled in every camera, invisible ones outside of the map, and the visible rows of each camera
  are written over those of the cameras before. Ours samples in each camera the points that read from it.
- Scatter: per camera and scale the distinct (row, column) pairs by `torch.unique(dim=0)`, means over them, and a dense
  map they are written into. Ours sorts the cells of all cameras, per scale, and takes the means of runs; enlarging the
  coarser scales, which takes the most at the first levels, is the same in both.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops import Row, cpu_ms, environment, least_ms, scene, table
from pointcept_kd.networks.fusion_blocks import CameraViews, scaled

POINTS = 25_000
SIZE = 900, 1600
# Degrees to the left of the driving direction, in the published order, and focal lengths in pixels.
CAMERAS = ((55, 1266), (0, 1266), (-55, 1266), (110, 1256), (180, 809), (-110, 1256))
# Channels, height and width of the maps that points read, and channels of the points that are scattered (width 2).
LEVELS = ((64, 180, 320, 64), (128, 90, 160, 128), (256, 45, 80, 256), (128, 23, 40, 512))


def project(points: Tensor) -> tuple[Tensor, Tensor]:
    """Places (6, n, 2) in -1 .. 1, -2 where invisible, and visibility (6, n)."""
    height, width = SIZE
    places, seen = [], []
    for degrees, focal in CAMERAS:
        yaw = torch.tensor(degrees * torch.pi / 180)
        depth = points[:, 0] * yaw.cos() + points[:, 1] * yaw.sin()
        left = points[:, 1] * yaw.cos() - points[:, 0] * yaw.sin()
        deep = depth.clamp(min=1e-3)
        u, v = (width - 1) / 2 - focal * left / deep, (height - 1) / 2 - focal * points[:, 2] / deep
        place = torch.stack((u / (width - 1), v / (height - 1)), 1) * 2 - 1
        inside = (depth > 1) & (place.abs() < 1).all(1)
        places.append(place.where(inside[:, None], -2))
        seen.append(inside)
    return torch.stack(places), torch.stack(seen)


def gather_everywhere(maps: Tensor, places: Tensor, seen: Tensor) -> Tensor:
    """(n, c): all points in all cameras, the last visible one counts; 0 for points that none shows."""
    read = F.grid_sample(maps, places[:, None], align_corners=True)[:, :, 0]
    out = maps.new_zeros(places.shape[1], maps.shape[1])
    for camera, mask in zip(read, seen):
        out[mask] = camera.t()[mask]
    return out


def scatter_by_camera(
    values: Tensor, places: Tensor, seen: Tensor, size: tuple[int, int], scales: int
) -> Tensor:
    """(6, c, h, w): distinct cells of each camera and scale."""
    maps = []
    for place, mask in zip(places, seen):
        rows, place = values[mask], place[mask]
        total = values.new_zeros(1, values.shape[1], *size)
        for scale in (2**i for i in range(scales)):
            height, width = scaled(size[0], scale), scaled(size[1], scale)
            factor = place.new_tensor([height - 1, width - 1])
            cells = ((place.flip(1) + 1) / 2 * factor).floor().long()
            unique, inverse = torch.unique(cells, dim=0, return_inverse=True)
            sums = values.new_zeros(len(unique), values.shape[1]).index_add(0, inverse, rows)
            counts = torch.bincount(inverse, minlength=len(unique))
            dense = values.new_zeros(height, width, values.shape[1])
            dense[unique[:, 0], unique[:, 1]] = sums / counts[:, None]
            fine = dense.permute(2, 0, 1)[None]
            total = total + F.interpolate(fine, size=size, mode="bilinear", align_corners=True)
        maps.append(total[0] / scales)
    return torch.stack(maps)


def both_ways(call: Callable[[Tensor], Tensor], source: Tensor) -> Callable[[], object]:
    """Forward and backward of the sum of squares."""

    def run() -> object:
        leaf = source.detach().requires_grad_()
        return torch.autograd.grad(call(leaf).square().sum(), leaf)

    return run


def compare(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    source: Tensor,
    seconds: float,
) -> Row:
    """Times of both, after a check that they agree in value and gradient; SystemExit where they do not."""
    with torch.no_grad():
        difference = float((ours(source) - theirs(source)).abs().max())
    grads = [both_ways(call, source)()[0] for call in (ours, theirs)]
    if difference > 1e-5 or not torch.allclose(*grads, rtol=1e-4, atol=1e-4):
        raise SystemExit("the two routes differ: the comparison would be meaningless")
    with torch.no_grad():
        forward = least_ms(
            {"ours": cpu_ms(lambda: ours(source)), "theirs": cpu_ms(lambda: theirs(source))},
            seconds,
        )
    whole = least_ms(
        {"ours": cpu_ms(both_ways(ours, source)), "theirs": cpu_ms(both_ways(theirs, source))},
        seconds,
    )
    row: Row = {}
    for name, least in (("forward", forward), ("both", whole)):
        row |= {f"{name} ours ms": least["ours"], f"{name} opponent ms": least["theirs"]}
        row[f"{name} ratio"] = least["theirs"] / least["ours"]
    return row | {"difference": difference}


def time_gather(views: CameraViews, places: Tensor, seen: Tensor, seconds: float) -> list[Row]:
    """Image features of points, at the four levels."""
    rows: list[Row] = []
    for channels, height, width, _ in LEVELS:
        maps = torch.randn(len(CAMERAS), channels, height, width)

        def ours(maps: Tensor) -> Tensor:
            out = maps.new_zeros(views.points, maps.shape[1])
            return out.index_copy(0, views.visible, views.gather(maps))

        row = compare(ours, lambda m: gather_everywhere(m, places, seen), maps, seconds)
        rows.append({"maps": f"{channels} x {height} x {width}", **row})
    return rows


def time_scatter(views: CameraViews, places: Tensor, seen: Tensor, seconds: float) -> list[Row]:
    """Point features in images, at the four levels."""
    rows: list[Row] = []
    for level, (_, height, width, channels) in enumerate(LEVELS):
        size, scales = (height, width), len(LEVELS) - level
        row = compare(
            partial(views.scatter, size=size, scales=scales),
            partial(scatter_by_camera, places=places, seen=seen, size=size, scales=scales),
            torch.randn(views.points, channels),
            seconds,
        )
        rows.append({"maps": f"{channels} x {height} x {width}", "scales": scales, **row})
    return rows


def setting(points: Tensor, count: int) -> tuple[CameraViews, Tensor, Tensor]:
    """`count` of the points, seen by six cameras: their views, places and visibility."""
    keep = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    places, seen = project(points[keep])
    image, point = seen.nonzero().unbind(1)
    images = torch.zeros(len(CAMERAS), 3, 32, 32)
    return CameraViews(images, point, image, places[seen], len(keep)), places, seen


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, for a look")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    seconds = 0.5 if args.quick else 4.0
    cloud, source = scene()
    views, places, seen = setting(cloud, POINTS)
    shown = seen.sum(0)
    about = environment(
        f"{source}: {views.points} points, {int((shown > 0).sum())} visible, {int((shown > 1).sum())} of them twice"
    )
    about["threads"] = 1
    versions = about["versions"]
    assert isinstance(versions, dict)
    versions.pop("spconv", None)
    print("# Points and images\n")
    print(*(f"- {key}: {value}" for key, value in about.items()), sep="\n")
    report: Row = {"environment": about}
    for title, rows in (
        ("Gather", time_gather(views, places, seen, seconds)),
        ("Scatter", time_scatter(views, places, seen, seconds)),
    ):
        print(f"\n## {title}\n\n{table(rows)}", flush=True)
        report[title] = rows
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
