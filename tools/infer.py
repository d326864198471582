"""Label point clouds of your own: class ids, a coloured point cloud and a picture from above, for each scan.

    python tools/infer.py scan.bin
    python tools/infer.py scan.bin more.pcd folder/of/scans --out exp/mine
    python tools/infer.py scan.ply --config-file configs/kd/ptv3_to_student.py --weight exp/mine/model/student_best.pth
    python tools/infer.py 11/velodyne --weight exp/mine/model/student_best.pth --format label --no-ply --no-png

Reads .bin (KITTI, nuScenes), .npy, .ply and .pcd; folders are searched through. Coordinates are metres around the
sensor: x forward, y left, z up. Writes below OUT:

    NAME.npy    int32, one class id per point of the file; -1 for points that the network could not see
    NAME.json   points and colour of every class, how the scan was read, seconds
    NAME.ply    x y z, colour, intensity, label
    NAME.png    the picture from above, forward is up

Without --config-file and --weight the student of the demo is taken; with one of them, what stands beside it. No data
set is needed: the transforms of the config's data.val are used, without labels. Of a distiller the student alone runs,
and a LiDAR-camera network as without any camera; `tools/test.py` labels scans of a data set with their images.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import pointcept_kd  # noqa: F401  fills the registries
from pointcept_kd.data import semantic_kitti
from pointcept_kd.data.camera_views import ViewsToRows
from pointcept_kd.data.clouds import SUFFIXES, read_points, write_ply
from pointcept_kd.data.pictures import IGNORED, birdseye_png
from pointcept_kd.data.transforms import INDEX_VALID_KEYS
from pointcept_kd.host import MODELS, InputError, one_line
from pointcept_kd.host.checkpoint import (
    check_grids,
    load_checkpoint,
    load_into,
    student_weights,
    write_atomic,
)
from pointcept_kd.host.config import set_seed
from pointcept_kd.host.loader import Compose, collate_fn
from pointcept_kd.host.metrics import class_names
from pointcept_kd.host.runtime import device_of, read_config, run_tool, to_device
from pointcept_kd.host.tester import plain_model

ROOT = Path(__file__).resolve().parents[1]
# Where `tools/demo.py`, and its third training called by hand, leave a student.
DEMO_RUNS = ("exp/demo/seed_*/distilled", "exp/sim_tiny/ptv3_to_student")
WEIGHTS = ("student_best.pth", "model_best.pth", "student_last.pth", "model_last.pth")
PER_POINT = "raw_row"


# ----------------------------------------------------------------------------------- what to run on


def find_scans(inputs: Sequence[str], out: Path) -> list[tuple[str, Path]]:
    """(name, file) of every scan; names are unique, those from folders keep their place in it.

    Raises:
        InputError: for a path that does not exist, or when there is no scan at all.
    """
    found: dict[Path, str] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            # What this tool wrote in an earlier call is no scan.
            files = [p for p in files if p.name[0] != "." and not _below(p, out)]
            if not files:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} in this folder")
            for file in files:
                found.setdefault(file.resolve(), _stem(file.relative_to(path)))
        elif path.exists():
            found.setdefault(path.resolve(), _stem(Path(path.name)))
        else:
            raise InputError(f"{path}: there is no such file or folder")
    names = list(found.values())
    alike: dict[str, list[Path]] = {}
    for path, name in found.items():
        alike.setdefault(name, []).append(path)
    for name, paths in alike.items():
        if len(paths) > 1:
            found.update(zip(paths, _distinct(paths, set(names) - {name})))
    return [(name, path) for path, name in found.items()]


def _below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _stem(path: Path) -> str:
    name = path.name.removesuffix(path.suffix)
    return str(path.with_name(name.removesuffix(".pcd")))


def _distinct(paths: Sequence[Path], taken: set[str]) -> list[str]:
    """Names with as many folders in front as it takes: `07_velodyne_000000`, `08_velodyne_000000`."""
    parts = [[*path.parent.parts[1:], Path(_stem(path)).name] for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["_".join(part[-depth:]) for part in parts]
        if len({*names} - taken) == len(names):
            return names
    return [f"{name}_{i}" for i, name in enumerate(names)]


def choose(
    config: str | None, weight: str | None, options: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """The config and the checkpoint: as given, else what stands beside the other, else the demo's student.

    Raises:
        InputError: where nothing is there, saying how to get it.
    """
    if config and weight:
        return config, weight
    if weight:
        beside = Path(weight).parent.parent / "config.py"
        if not beside.is_file():
            raise InputError(
                f"--weight {weight}: there is no {beside}; name its config with --config-file"
            )
        return str(beside), weight
    if config:
        folder = Path(read_config(config, options)["save_path"]) / "model"
        found = _first_of(folder)
        if found is None:
            raise InputError(
                f"no checkpoint in {folder}, where {config} saves; name one with --weight, or train it: "
                f"python tools/train.py --config-file {config}"
            )
        return config, str(found)
    for start in (Path(), ROOT):
        for pattern in DEMO_RUNS:
            for run in sorted(start.glob(pattern)):
                found = _first_of(run / "model")
                if found is not None and (run / "config.py").is_file():
                    return str(run / "config.py"), str(found)
    raise InputError(
        "no --config-file and --weight given, and no student of the demo here (exp/demo/seed_0/distilled): make one "
        "with `make demo`, or name both"
    )


def _first_of(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


# ---------------------------------------------------------------------------------------- the model


@dataclass
class Labeller:
    """A network with the way from a raw scan to its input and back."""

    network: torch.nn.Module
    pipeline: Compose
    device: torch.device
    names: list[str]
    colors: NDArray
    ignore: int
    in_channels: int | None
    wants_strength: bool
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, cfg: Any, weight: str, device: str | None = None) -> Labeller:
        """The config's plain network with the weights of a checkpoint, which must match exactly.

        Raises:
            InputError: for a config, weight or device that cannot be used.
        """
        data, model_cfg = cfg.get("data") or {}, cfg.get("model")
        if model_cfg is None:
            raise InputError(
                f"{cfg.filename}: the config has no model; give one that trains a network"
            )
        entries = steps_of(data, str(cfg.filename))
        if device is not None:
            cfg["device"] = device
        place = device_of(cfg)
        checkpoint = load_checkpoint(weight)
        plain = plain_model(model_cfg)
        network = MODELS.build(plain)
        check_grids(network, checkpoint, weight)
        load_into(network, student_weights(checkpoint["state_dict"]), strict=True, source=weight)
        names = class_names(data) if "num_classes" in data else []
        return cls(
            network.to(place).eval(),
            Compose(entries),
            place,
            names,
            class_colors(data.get("colors"), len(names)),
            data.get("ignore_index", -1),
            (plain.get("backbone") or {}).get("in_channels"),
            any("strength" in (step.get("feat_keys") or ()) for step in entries),
            {"config": str(cfg.filename), "weight": str(weight)},
        )

    @torch.no_grad()
    def __call__(
        self, coord: NDArray, strength: NDArray, name: str
    ) -> tuple[NDArray, NDArray, float]:
        """Class probabilities (m, k) float32, the rows (m,) of `coord` that they belong to, the network's seconds.

        Raises:
            InputError: for a scan that the transforms or the network cannot take.
        """
        set_seed(0)  # which point stands for a voxel must not depend on the scans before
        sample, inverse, rows = self.prepare(coord, strength, name)
        batch = collate_fn([sample])
        for key in ("segment", "origin_segment", "inverse"):  # there are no labels, so no loss
            batch.pop(key, None)
        width = batch["feat"].shape[1] if "feat" in batch else None
        if self.in_channels is not None and width is not None and width != self.in_channels:
            raise InputError(
                f"{name}: the transforms make {width} features per point, the network wants {self.in_channels}; this "
                "config needs more than coordinates and intensity"
            )
        start = time.perf_counter()
        logits = self.network(to_device(batch, self.device))["seg_logits"]
        scores = logits.float().softmax(1).cpu().numpy()
        spent = time.perf_counter() - start
        self.know_classes(scores.shape[1])
        return scores[inverse], rows, spent

    def prepare(
        self, coord: NDArray, strength: NDArray, name: str
    ) -> tuple[dict[str, Any], NDArray, NDArray]:
        """The network's sample, for each point left by crops its row in there, and that point's row in `coord`."""
        count = len(coord)
        sample: Any = {
            "coord": coord,
            "strength": strength,
            "segment": np.full(count, self.ignore, np.int32),
            "name": name,
            "index_valid_keys": [*INDEX_VALID_KEYS, PER_POINT],
            PER_POINT: np.arange(count),
        }
        if any(isinstance(step, ViewsToRows) for step in self.pipeline.transforms):
            sample.update(no_views(count))
            sample["index_valid_keys"].append("point_id")
        rows, inverse = sample[PER_POINT], None
        for step in self.pipeline.transforms:
            try:
                sample = step(sample)
            except KeyError as error:
                raise InputError(
                    f"{name}: {type(step).__name__} needs {error}, which a point cloud file does not give"
                ) from error
            if not isinstance(sample, Mapping):
                raise InputError(
                    f"{name}: {type(step).__name__} cuts scans into fragments; data.val should give one whole scan"
                )
            if inverse is None and PER_POINT in sample:
                if "inverse" in sample:
                    # The rows are still those from before the voxels: `inverse` has one entry for each.
                    inverse = np.asarray(sample["inverse"])
                else:
                    rows = np.asarray(sample[PER_POINT])
            keys = sample.get("index_valid_keys")
            if keys is not None and PER_POINT in sample and PER_POINT not in keys:
                sample["index_valid_keys"] = [*keys, PER_POINT]
        return sample, np.arange(len(rows)) if inverse is None else inverse, rows

    def know_classes(self, count: int) -> None:
        """Names and colours for as many classes as the network has, where the config has others."""
        if len(self.names) != count:
            self.names = [f"class {i}" for i in range(count)]
            self.colors = class_colors(None, count)


def no_views(count: int) -> dict[str, Any]:
    """What `kd.CameraViewDataset` adds to a scan of `count` points that no camera sees."""
    return {
        "point_id": np.arange(count),
        "images": [],
        "image_size": (1, 1),  # of none
        "view_point": np.empty(0, np.int64),
        "view_image": np.empty(0, np.int64),
        "view_uv": np.empty((0, 2), np.float32),
    }


def steps_of(data: Mapping[str, Any], filename: str) -> list[dict[str, Any]]:
    """The transforms of validation, with every voxel grid asked for its way back to the points.

    Raises:
        InputError: for a config without them.
    """
    val, test = data.get("val"), data.get("test")
    entry = val if val else test if test and not test.get("test_mode") else None
    while isinstance(entry, Mapping) and "transform" not in entry and entry.get("datasets"):
        entry = entry["datasets"][0]
    if not isinstance(entry, Mapping) or not entry.get("transform"):
        raise InputError(f"{filename}: no data.val with a transform; its pipeline is needed here")
    steps = [dict(step) for step in entry["transform"]]
    grids = [s for s in steps if str(s.get("type")).removeprefix("kd.") == "GridSample"]
    if grids and grids[-1].get("mode", "train") == "train":
        grids[-1]["return_inverse"] = True
    return steps


def class_colors(given: Any, count: int) -> NDArray:
    """(count, 3) uint8: those of the config, SemanticKITTI's for 19 classes, else hues far apart."""
    if given is not None:
        colors = np.asarray(given)
        if colors.shape == (count, 3) and colors.dtype.kind in "iu":
            return colors.astype(np.uint8)
        raise InputError(
            f"data.colors has the shape {colors.shape} of {colors.dtype}; expected {count} times three whole numbers"
        )
    if count == len(semantic_kitti.COLORS):
        return semantic_kitti.COLORS
    golden = (5**0.5 - 1) / 2
    rgb = [
        colorsys.hsv_to_rgb((i * golden) % 1, (0.85, 0.55)[i // 12 % 2], (0.95, 0.7)[i // 24 % 2])
        for i in range(count)
    ]
    return np.round(255 * np.array(rgb).reshape(-1, 3)).astype(np.uint8)


# --------------------------------------------------------------------------------------- one scan


def unit_strength(
    strength: NDArray | None, count: int, scale: float | None, fill: float
) -> tuple[NDArray, str]:
    """Strength (n, 1) in 0..1 as networks are trained with, and what was done for it."""
    if strength is None:
        return np.full((count, 1), fill, np.float32), f"none in the file; {fill:g} everywhere"
    if scale is None:
        top = float(strength.max())
        scale = 1.0 if top <= 1 else 255.0 if top <= 255 else 65535.0
    if scale == 1:
        return strength, "as in the file"
    return strength / np.float32(scale), f"divided by {scale:g}"


def far_away(coord: NDArray) -> str:
    """A remark on points in map coordinates, where networks that know sensor coordinates fail; else empty."""
    middle = np.median(coord, axis=0)
    if np.abs(middle).max() < 200:
        return ""
    x, y, z = (f"{value:.0f}" for value in middle)
    return f"its points lie around ({x}, {y}, {z}); expected metres around the sensor, move them there for good labels"


def label(name: str, path: Path, labeller: Labeller, args: argparse.Namespace) -> dict[str, Any]:
    """Label one file and write the results; returns the summary that is in NAME.json.

    Raises:
        InputError: for a file that cannot be used.
    """
    start = time.perf_counter()
    cloud = read_points(path, args.columns)
    coord, raw = cloud["coord"], cloud["strength"]
    strength, how = unit_strength(raw, len(coord), args.intensity_scale, args.strength)
    read = time.perf_counter()
    scores, rows, network = labeller(coord, strength, name)
    labelled = time.perf_counter()

    pred = np.full(len(coord), -1, np.int32)
    pred[rows] = scores.argmax(1)
    everywhere = np.full(len(cloud["kept"]), -1, np.int32)
    everywhere[cloud["kept"]] = pred
    target = args.out / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target.parent}: cannot be created ({error.strerror})") from error

    def write(suffix: str, content: Any) -> None:
        write_atomic(target.parent / f"{target.name}{suffix}", content)

    if args.format == "label":
        raw_ids = np.zeros(len(labeller.names) + 1, np.uint32)
        raw_ids[list(semantic_kitti.LEARNING_MAP_INV)] = list(
            semantic_kitti.LEARNING_MAP_INV.values()
        )
        write(".label", lambda file: file.write(raw_ids[everywhere].astype("<u4").tobytes()))
    else:
        write(".npy", lambda file: np.save(file, everywhere))
    if args.save_probabilities:
        wide = np.zeros((len(everywhere), scores.shape[1]), np.float16)
        wide[np.flatnonzero(cloud["kept"])[rows]] = scores
        write("_prob.npy", lambda file: np.save(file, wide))
    if not args.no_ply:
        lookup = np.concatenate([labeller.colors, [IGNORED]]).astype(np.uint8)
        write_ply(target.parent / f"{target.name}.ply", coord, lookup[pred], pred, raw)
    if not args.no_png:
        reach = args.range
        picture = birdseye_png(coord, pred, labeller.colors, reach, max(1, round(500 / reach)))
        write(".png", lambda file: file.write(picture))
    end = time.perf_counter()
    counts = np.bincount(pred[pred >= 0], minlength=len(labeller.names))
    summary = {
        "file": str(path),
        "points": len(everywhere),
        "not_finite": cloud["dropped"],
        "not_labelled": int((everywhere < 0).sum()),
        "strength": how,
        "remark": far_away(coord),
        "classes": {
            labeller.names[i]: {
                "id": int(i),
                "points": int(counts[i]),
                "color": "#" + bytes(labeller.colors[i].tolist()).hex(),
            }
            for i in np.argsort(-counts, kind="stable")
        },
        **labeller.source,
        "device": str(labeller.device),
        "seconds": {
            "read": round(read - start, 4),
            "prepare": round(labelled - read - network, 4),
            "network": round(network, 4),
            "write": round(end - labelled, 4),
        },
    }
    text = json.dumps(summary, indent=1).encode()
    write(".json", lambda file: file.write(text))
    return summary


def one_result(name: str, summary: Mapping[str, Any]) -> str:
    """The line printed for a scan."""
    seconds = summary["seconds"]
    total = summary["points"]
    top = [
        f"{title} {100 * entry['points'] / total:.0f} %"
        for title, entry in list(summary["classes"].items())[:3]
        if entry["points"]
    ]
    parts = ", ".join(f"{key} {value:.2f}" for key, value in seconds.items())
    return f"{name}: {total} points in {sum(seconds.values()):.2f} s ({parts}): {', '.join(top)}"


# ------------------------------------------------------------------------------------- command line


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("scans", nargs="+", metavar="SCAN", help="point cloud files, or folders of them")
    add("--config-file", metavar="FILE", help="config that the network was trained with")
    add("--weight", metavar="FILE", help="its checkpoint; a distiller's holds the student")
    add(
        "--out",
        type=Path,
        default=Path("exp/infer"),
        help="folder to write to (default exp/infer)",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    add(
        "--format",
        choices=("npy", "label"),
        default="npy",
        help="npy: the config's class ids (default); label: SemanticKITTI's raw ids, as its .label files have them",
    )
    add("--no-ply", action="store_true", help="write no coloured point clouds")
    add("--no-png", action="store_true", help="write no pictures")
    add(
        "--save-probabilities",
        action="store_true",
        help="also NAME_prob.npy: float16, points x classes",
    )
    add("--columns", type=int, metavar="N", help="float32 values per point of .bin files")
    add(
        "--intensity-scale",
        type=float,
        metavar="X",
        help="divide intensities by this (default: by 1, 255 or 65535, whichever brings them to 0..1)",
    )
    add(
        "--strength",
        type=float,
        default=0.3,
        metavar="X",
        help="intensity of scans that have none, 0..1 (default 0.3)",
    )
    add(
        "--range",
        type=float,
        default=50.0,
        metavar="M",
        help="metres from the sensor to the edge of the picture (default 50)",
    )
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change, for example data.val.transform.1.grid_size=0.1",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Label every scan; returns 1 when some of them could not be read, and raises when none could."""
    from pointcept_kd.host.dialect import parse_options

    args = build_arguments().parse_args(argv)
    for option, value in (("--intensity-scale", args.intensity_scale), ("--range", args.range)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{option} {value}: expected a positive number")
    if not np.isfinite(args.strength):
        raise InputError(f"--strength {args.strength}: expected a number from 0 to 1")
    scans = find_scans(args.scans, args.out)
    options = parse_options(args.options)
    config, weight = choose(args.config_file, args.weight, options)
    cfg = read_config(config, options)
    labeller = Labeller.build(cfg, weight, args.device)
    if args.format == "label" and tuple(labeller.names) != semantic_kitti.CLASS_NAMES:
        raise InputError(
            f"--format label: the classes of {config} are not SemanticKITTI's 19; use --format npy"
        )
    print(f"{weight} ({config}) on {labeller.device}", flush=True)

    said: set[str] = set()
    failed = []
    bar = tqdm(
        scans, "Infer", disable=len(scans) < 2 or not sys.stderr.isatty(), dynamic_ncols=True
    )
    for name, path in bar:
        try:
            summary = label(name, path, labeller, args)
        except (InputError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            failed.append(error)
            text = one_line(error) if isinstance(error, InputError) else "out of memory"
            text = text if str(path) in text else f"{path}: {text}"
            tqdm.write(f"error: {text}", file=sys.stderr)
            continue
        how = summary["strength"]
        if how != "as in the file" and how not in said:
            said.add(how)
            tqdm.write(_about_strength(path, how, labeller.wants_strength), file=sys.stderr)
        if summary["remark"]:
            tqdm.write(f"warning: {path}: {summary['remark']}", file=sys.stderr)
        tqdm.write(one_result(name, summary))
    done = len(scans) - len(failed)
    if done:
        print(f"{done} scan{'s' * (done != 1)} labelled; see {args.out}{os.sep}")
    if failed and len(scans) > 1:
        print(f"{len(failed)} of {len(scans)} scans failed, see above", file=sys.stderr)
    return 0 if not failed else 1 if done else 2


def _about_strength(path: Path, how: str, wanted: bool) -> str:
    if not how.startswith("none"):
        return f"note: {path}: intensities are {how}; say otherwise with --intensity-scale"
    effect = (
        "the network was trained with them and is less accurate without"
        if wanted
        else "the network does not use them"
    )
    return f"warning: {path}: no intensities ({how}, see --strength); {effect}"


if __name__ == "__main__":
    codes: list[int] = []
    status = run_tool(lambda: codes.append(main()))
    sys.exit(status or codes[0])
