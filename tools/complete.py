"""Complete LiDAR scans of your own: from one scan the whole scene around it, as a point cloud and as pictures.

    python tools/complete.py scan.bin
    python tools/complete.py scan.bin more.pcd folder/of/scans --steps 8 --out exp/mine
    python tools/complete.py scan.bin --weight exp/sim_tiny/completion_score/model/student_last.pth --seed 1
    python tools/complete.py 08/velodyne --weight weights/lidiff.pth --refine weights/refiner.pth --target 08/complete

Reads .bin (KITTI, nuScenes), .npy, .ply and .pcd; folders are searched through. Coordinates are metres around the
sensor: x forward, y left, z up. Writes below OUT:

    NAME.ply               the completed points: x y z, coloured by height
    NAME_birdseye.png      scan, completion and, with --target, the true cloud from above, forward is up
    NAME_perspective.png   the same from behind and above the sensor; all panels have one scale of colours
    NAME.json              points, steps, guidance, seed, seconds of every part, scores where there is a target

Without --config-file and --weight the completion network of exp/sim_tiny that was trained last is taken; with one of
them, what stands beside it. Of a distillation the student alone runs, with the student's steps and guidance. A scan's
completion depends on its file, the network, the seed and the options, not on what else is completed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import pointcept_kd  # noqa: F401  fills the registries
from pointcept_kd.completion.diffusion import Completer, scan_seeds
from pointcept_kd.completion.distillation import completer_weights, plain_completer
from pointcept_kd.completion.metrics import CompletionScores
from pointcept_kd.completion.refinement import CompletionRefinement, load_refinement
from pointcept_kd.completion.sampler import crop, inside
from pointcept_kd.data.clouds import SUFFIXES, read_points, write_ply
from pointcept_kd.data.completion_pairs import RADIUS, condition_points, within
from pointcept_kd.data.pictures import png_bytes
from pointcept_kd.data.splat import height_colors, height_span, panels
from pointcept_kd.host import MODELS, InputError, one_line
from pointcept_kd.host.checkpoint import load_checkpoint, load_into, write_atomic
from pointcept_kd.host.runtime import device_of, read_config, run_tool
from tools import infer

ROOT = Path(__file__).resolve().parents[1]
RUNS = "exp/sim_tiny/completion_*"  # where the tiny configs save
PUBLISHED_POINTS = 180_000  # of the released networks, which come without a config
WIDTH = 800  # pixels of a panel


# ----------------------------------------------------------------------------------- what to run


def choose(
    config: str | None, weight: str | None, options: Mapping[str, Any] | None = None
) -> tuple[str | None, str]:
    """The config and the checkpoint; no config where the checkpoint itself says what network it is of.

    As given, else what stands beside the other, else the tiny completion network that was trained last.

    Raises:
        InputError: where nothing is there, saying how to get it.
    """
    if weight and not config:
        beside = Path(weight).parent.parent / "config.py"
        if not beside.is_file() and "model_config" in load_checkpoint(weight):
            return None, weight
    if config or weight:
        return infer.choose(config, weight, options)
    found = []
    for start in (Path(), ROOT):
        for run in start.glob(f"{RUNS}/config.py"):
            try:
                if not completes(read_config(run).get("model")):
                    continue
                trained = infer.choose(str(run), None, {"save_path": str(run.parent)})[1]
            except InputError:  # a run that has not saved anything yet, or one of another version
                continue
            found.append((Path(trained).stat().st_mtime, str(run), trained))
    if not found:
        raise InputError(
            f"no --config-file and --weight given, and nothing trained in {RUNS}: train a teacher with "
            "`python tools/train.py --config-file configs/completion/teacher_tiny.py`, or name both"
        )
    return max(found)[1:]


def completes(model: Any) -> bool:
    """Whether a model's config is that of a network which completes scans."""
    kind = model.get("type") if isinstance(model, Mapping) else None
    return isinstance(kind, str) and issubclass(MODELS.resolve(kind), Completer)


@dataclass
class Completing:
    """A network and everything else that a completion depends on, beside the scan.

    Attributes:
        network, refiner: in evaluation mode, on `device`; `refiner` may be None.
        condition: points of a scan that the network gets.
        radius: metres from the sensor that they are taken from.
        steps, guidance, seed: of the sampling.
        threads: on the CPU; matrix products round differently with another number, and sampling enlarges that.
        source: which files it came from.
    """

    network: Completer
    refiner: CompletionRefinement | None
    condition: int
    radius: float
    steps: int
    guidance: float
    seed: int
    threads: int
    device: torch.device
    source: dict[str, str | None]

    @classmethod
    def build(cls, args: argparse.Namespace) -> Completing:
        """From the command line.

        Raises:
            InputError: for a config, weight, device or number that cannot be used.
        """
        from pointcept_kd.host.dialect import parse_options

        options = parse_options(args.options)
        config, weight = choose(args.config_file, args.weight, options)
        checkpoint = load_checkpoint(weight)
        if config is None:
            if options:
                raise InputError(f"--options need a --config-file; {weight} has none beside it")
            cfg: Any = {"model": checkpoint["model_config"]}
        else:
            cfg = read_config(config, options)
        if args.device is not None:
            cfg["device"] = args.device
        device = device_of(cfg)
        network = MODELS.build(plain_completer(cfg.get("model"), config or weight))
        weights = completer_weights(checkpoint["state_dict"])
        load_into(network, weights, strict=True, source=weight)
        refiner = None if args.refine is None else load_refinement(args.refine, device=device)
        steps = network.steps if args.steps is None else args.steps
        if not 1 <= steps < len(network.schedule):
            raise InputError(f"--steps {steps}: expected 1 to {len(network.schedule) - 1}")
        return cls(
            network.to(device).eval(),
            refiner,
            *condition_of(cfg.get("data"), args.points, network.repeat),
            steps,
            network.guidance if args.guidance is None else args.guidance,
            network.seed if args.seed is None else args.seed,
            args.threads,
            device,
            {"config": config, "weight": weight, "refine": args.refine},
        )

    @property
    def calls(self) -> int:
        """How often the network is asked for one scan: guidance needs two answers."""
        return self.steps * (1 if self.guidance in (0, 1) else 2)

    @torch.no_grad()
    def __call__(
        self, coord: NDArray, stem: str
    ) -> tuple[NDArray, NDArray | None, dict[str, float]]:
        """Completed points (n, 3), the refined ones (m, 3) where there is a refiner, and seconds of the parts.

        Args:
            coord: (k, 3) metres, sensor frame.
            stem: of the scan's file; it and the seed give the noise.

        Raises:
            InputError: for a scan that has nothing to complete, or of which nothing results.
        """
        seconds: dict[str, float] = {}
        return *self._clouds(coord, stem, seconds), seconds

    def _clouds(
        self, coord: NDArray, stem: str, seconds: dict[str, float]
    ) -> tuple[NDArray, NDArray | None]:
        with self._timed("pre", seconds):
            scan = torch.from_numpy(condition_points(coord, self.condition, self.radius))
            scan = scan.to(self.device)
            ends = torch.tensor([len(scan)], device=self.device)
        with self._timed("sample", seconds):
            seeds = scan_seeds([stem], self.seed)
            try:
                points, rows = self.network.complete(
                    scan, ends, seeds, self.steps, self.guidance, self.threads
                )
            except InputError as error:
                raise InputError(
                    f"sampling went astray ({error}); is the network trained, for scans of {self.condition} points and "
                    f"for guidance {self.guidance:g}?"
                ) from error
        with self._timed("post", seconds):
            keep = inside(points, rows, scan, ends, self.network.max_range)
            kept, rows = crop(points, rows, keep)
        if not len(kept):
            raise InputError(
                f"none of the {len(points)} completed points lies within {self.network.max_range:g} m and within the "
                "heights of the scan; is it in metres around the sensor, and the network trained?"
            )
        refined: Tensor | None = None
        if self.refiner is not None:
            with self._timed("refine", seconds):
                refined = self.refiner.refine(kept, rows, self.threads)[0]
        return _array(kept), None if refined is None else _array(refined)

    @contextmanager
    def _timed(self, part: str, seconds: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[part] = round(time.perf_counter() - start, 4)


def _array(points: Tensor) -> NDArray:
    return points.float().cpu().numpy()


def condition_of(data: Any, points: int | None, repeat: int) -> tuple[int, float]:
    """What the network gets of a scan, as the config tests it: how many points, from within how many metres.

    Args:
        data: the config's, may be None.
        points: completed points to sample instead of the config's.
        repeat: completed points per point of the scan.

    Raises:
        InputError: for fewer than two points.
    """
    entries = [(data or {}).get(split) or {} for split in ("test", "val", "train")]
    entry = next((e for e in entries if "points" in e or "condition" in e), {})
    # As `CompletionDataset` does it.
    count = entry.get("condition") or max(entry.get("points", PUBLISHED_POINTS) // 10, 1)
    if points is not None:
        count = points // repeat
        if count < 2:
            raise InputError(f"--points {points}: expected {2 * repeat} or more")
    return count, float(entry.get("radius", RADIUS))


# ----------------------------------------------------------------------------------------- one scan


def target_of(name: str, path: Path, targets: Path) -> Path:
    """The file of the true cloud: `targets` itself, or below it the file called like the scan.

    Raises:
        InputError: where there is none, or more than one.
    """
    if not targets.is_dir():
        return targets
    for stem in dict.fromkeys((name, path.name.removesuffix(path.suffix))):
        found = [file for s in SUFFIXES if (file := targets / f"{stem}{s}").is_file()]
        if len(found) > 1:
            raise InputError(f"{path}: {found[0]} and {found[1]} are two targets; remove one")
        if found:
            return found[0]
    raise InputError(f"{path}: no target {name} ({', '.join(SUFFIXES)}) in {targets}")


def complete(
    name: str, path: Path, completing: Completing, args: argparse.Namespace
) -> tuple[dict[str, Any], CompletionScores]:
    """Complete one file and write the results.

    Returns:
        the summary that is in NAME.json, and the scores, without a row where there is no target.

    Raises:
        InputError: for a file that cannot be used.
    """
    start = time.perf_counter()
    cloud = read_points(path, args.columns)
    coord = cloud["coord"]
    target = true = None
    if args.target is not None:
        target = target_of(name, path, args.target)
        true = read_points(target)["coord"]
        # As the data set cuts it; what lies beyond was not asked for.
        true = true[within(true, 0.0, completing.radius)]
    seconds = {"read": round(time.perf_counter() - start, 4)}
    # Not the name, which is longer where two scans of one call are called alike.
    stem = path.name.removesuffix(path.suffix)
    remark = infer.far_away(coord)
    try:
        completed, refined, parts = completing(coord, stem)
    except InputError as error:
        raise InputError(f"{path}: {error}{'; ' if remark else ''}{remark}") from error
    result = completed if refined is None else refined
    scores = CompletionScores()
    if true is not None:
        scores.add(name, result, true)

    start = time.perf_counter()
    base = args.out / name
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{base.parent}: cannot be created ({error.strerror})") from error

    def write(ending: str, content: bytes) -> None:
        write_atomic(base.with_name(base.name + ending), lambda file: file.write(content))

    radius = completing.radius
    clouds = [coord, result] if true is None else [coord, result, true]
    clouds = [cloud[within(cloud, 0.0, radius)] for cloud in clouds]
    # Of the scan alone: so completions of one scan by different networks have the same colours.
    span = height_span(clouds[0])
    if not args.no_ply:
        colors = height_colors(result[:, 2], span)
        write_ply(base.with_name(f"{base.name}.ply"), result, colors)
    if not args.no_png:
        for kind in ("birdseye", "perspective"):
            picture = panels(clouds, kind, width=WIDTH, half=radius, span=span)
            write(f"_{kind}.png", png_bytes(picture))
    seconds = {**seconds, **parts, "write": round(time.perf_counter() - start, 4)}
    network = completing.network
    summary = {
        "file": str(path),
        "points": len(cloud["kept"]),
        "not_finite": cloud["dropped"],
        "within_range": int(within(coord, far=completing.radius).sum()),
        "condition": completing.condition,
        "sampled": completing.condition * network.repeat,
        "completed": len(completed),
        "refined": None if refined is None else len(refined),
        "remark": remark,
        "steps": completing.steps,
        "guidance": completing.guidance,
        "network_calls": completing.calls,
        "seed": completing.seed,
        "solver": network.sampling.get("solver", "sde"),
        "process": network.process,
        "seconds": seconds,
        "target": None if target is None else str(target),
        "scores": scores.rows[0].as_dict() if scores.rows else None,
        "device": str(completing.device),
        "threads": completing.threads,
        **completing.source,
    }
    write(".json", json.dumps(summary, indent=1).encode())
    return summary, scores


def one_result(name: str, summary: Mapping[str, Any]) -> str:
    """The line printed for a scan."""
    counts = (
        f"{summary['points']} points, {summary['condition']} used, {summary['completed']} completed"
    )
    if summary["refined"] is not None:
        counts += f", {summary['refined']} refined"
    seconds = summary["seconds"]
    parts = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())
    return f"{name}: {counts} in {sum(seconds.values()):.2f} s ({parts})"


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
    add("--weight", metavar="FILE", help="its checkpoint; a distillation's holds the student")
    add("--steps", type=int, metavar="N", help="solver steps (default: the config's)")
    add(
        "--guidance",
        type=float,
        metavar="S",
        help="how much the scan counts; 1 is without guidance, at half the price (default: the config's)",
    )
    add("--seed", type=int, metavar="K", help="of the noise (default: the config's)")
    add("--refine", metavar="FILE", help="checkpoint of a refiner: six times as many points")
    add(
        "--points",
        type=int,
        metavar="P",
        help="points to sample; the network sees a tenth as many (default: the config's data.test)",
    )
    add(
        "--target",
        type=Path,
        metavar="PATH",
        help="true cloud, or a folder with one of each scan's name: prints cd, jsd and iou within the config's radius",
    )
    add(
        "--out",
        type=Path,
        default=Path("exp/complete"),
        help="folder to write to (default exp/complete)",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="on a CPU (default 1: with more, the last digits depend on their number)",
    )
    add("--no-ply", action="store_true", help="write no point clouds")
    add("--no-png", action="store_true", help="write no pictures")
    add("--columns", type=int, metavar="N", help="float32 values per point of .bin files")
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change, for example +model.sampling.solver=ode",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Complete every scan; returns 1 when some of them could not be completed, 2 when none could."""
    args = build_arguments().parse_args(argv)
    if args.guidance is not None and not np.isfinite(args.guidance):
        raise InputError(f"--guidance {args.guidance}: expected a number")
    if args.threads < 1:
        raise InputError(f"--threads {args.threads}: expected 1 or more")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed}: expected 0 to {2**31 - 1}")
    scans = infer.find_scans(args.scans, args.out)
    if args.target is not None and not args.target.exists():
        raise InputError(f"--target {args.target}: there is no such file or folder")
    if args.target is not None and len(scans) > 1 and not args.target.is_dir():
        raise InputError(
            f"--target {args.target} is one file for {len(scans)} scans: name a folder"
        )
    completing = Completing.build(args)
    source = completing.source["config"] or "as the file says"
    print(
        f"{completing.source['weight']} ({source}) on {completing.device}: {completing.steps} steps, guidance "
        f"{completing.guidance:g}, {completing.calls} network calls per scan",
        flush=True,
    )

    failed, scores = [], CompletionScores()
    silent = len(scans) < 2 or not sys.stderr.isatty()
    for name, path in tqdm(scans, "Complete", disable=silent, dynamic_ncols=True):
        try:
            summary, own = complete(name, path, completing, args)
        except (InputError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            failed.append(error)
            text = one_line(error) if isinstance(error, InputError) else "out of memory"
            text = text if str(path) in text else f"{path}: {text}"
            tqdm.write(f"error: {text}", file=sys.stderr)
            continue
        tqdm.write(one_result(name, summary))
        if own.rows:
            tqdm.write(f"{name}: {own.summary().headline}")
            scores.merge(own)
    done = len(scans) - len(failed)
    if len(scores.rows) > 1:
        print(f"all {len(scores.rows)}: {scores.summary().headline}")
    if done:
        print(f"{done} scan{'s' * (done != 1)} completed; see {args.out}{os.sep}")
    if failed and len(scans) > 1:
        print(f"{len(failed)} of {len(scans)} scans failed, see above", file=sys.stderr)
    return 0 if not failed else 1 if done else 2


if __name__ == "__main__":
    codes: list[int] = []
    status = run_tool(lambda: codes.append(main()))
    sys.exit(status or codes[0])
