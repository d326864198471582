"""Convert released weights into checkpoints of this package.

    python tools/convert.py cylinder3d model_save_backup.pt --out weights/cylinder3d.pth
    python tools/convert.py polarnet ours_test_61.1.pt --out weights/polarnet.pth --keys
    python tools/convert.py polarnet SemKITTI_PolarSeg.pt --out weights/polarseg.pth --range student
    python tools/convert.py cylinder3d mine.pt --out mine.pth --range 0 -3.1415926 -4 50 3.1415926 2 --shape 480 360 32
    python tools/convert.py lidiff diff_net.ckpt --out weights/lidiff.pth
    python tools/convert.py refiner refine_net.ckpt --out weights/refiner.pth
    python tools/convert.py distillationdpo distillationdpo_st.ckpt --out weights/dpo_student.pth --part student
    python tools/convert.py slidr minkunet_slidr_1gpu.pt --out weights/slidr.pth --as trunk
    python tools/convert.py sphereformer model_nuscenes.pth --out weights/sphereformer.pth

Says what became of every entry of the file, and prints the model to put into a config. Weights know nothing of the
grid that they were trained on and are of no use on another one: where a network has a choice, --range and --shape name
it, and the checkpoint keeps it. Networks that complete scans have one cell size, and their files may hold several of
them: --part names the one to take.
Nothing is converted in part: an unknown layout, a key too many or too few and a number that is not finite are errors.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint, plain_grid, save_atomic
from pointcept_kd.host.pretty import print_source
from pointcept_kd.host.runtime import run_tool
from pointcept_kd.networks.cylinder3d import KERNEL_MODES
from pointcept_kd.networks.released import (
    RANGES,
    ConversionReport,
    convert_cylinder3d,
    convert_polarnet,
)
from pointcept_kd.networks.released_completion import (
    LAYOUTS,
    convert_completion,
    convert_refiner,
    read_tensors,
)
from pointcept_kd.networks.released_residual_unet import convert_residual_unet, read_points
from pointcept_kd.networks.released_sphereformer import (
    DATA_SETS,
    TOWERS,
    convert_point_voxel_unet,
    convert_sphereformer,
)
from pointcept_kd.networks.voxels import build_partition


@dataclass
class Converted:
    """What a converter hands over.

    Attributes:
        weights: under the keys of `model`.
        model: config of the network that loads them strictly.
        report: what became of the file's entries, a few lines.
        fates: the same of every single entry.
        grids: the checkpoint's `grids`, see `host.checkpoint.grids_of`.
    """

    weights: dict[str, Tensor]
    model: dict[str, Any]
    report: str
    fates: dict[str, str]
    grids: dict[str, Any] = field(default_factory=dict)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of what a converter has to say about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass
class Command:
    """One kind of file: its line of help, its options besides those of all, and what reads and converts it."""

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    convert: Callable[[argparse.Namespace], Converted]


def _grid_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--range",
        nargs="+",
        default=[default],
        metavar="R",
        help="the grid's bounds: teacher (0 to 50 m, -4 to 2 m), student (3 to 50 m, -3 to 1.5 m), or six numbers, "
        f"low radius, azimuth, height, then high ones (default {default})",
    )
    parser.add_argument(
        "--shape",
        nargs=3,
        type=int,
        default=[480, 360, 32],
        metavar="N",
        help="the grid's cells along radius, azimuth, height (default 480 360 32)",
    )


def parse_partition(words: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
    """The config of a grid from --range and --shape.

    Raises:
        InputError: for an unknown name, other than six numbers, and bounds or a shape that give no grid.
    """
    if len(words) == 1 and words[0] in RANGES:
        low, high = RANGES[words[0]]
    else:
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) != 6:
            raise InputError(
                f"--range {' '.join(words)}: give {', '.join(RANGES)}, or six numbers: low radius, azimuth, height, "
                "high radius, azimuth, height"
            )
        low, high = tuple(numbers[:3]), tuple(numbers[3:])
    cfg = dict(low=low, high=high, shape=tuple(shape), frame="cylindrical", spacing="n_minus_1")
    build_partition(cfg)
    return cfg


def _segmentor(
    kind: str, weights: Mapping[str, Tensor], report: ConversionReport, partition: dict[str, Any]
) -> Converted:
    """The weights as those of a backbone inside the segmentor."""
    backbone = dict(type=kind, **report.network, partition=partition)
    model = dict(type="kd.VoxelSegmentor", backbone=backbone)
    named = {f"backbone.{key}": value for key, value in weights.items()}
    grids = {"backbone.partition": plain_grid(build_partition(partition))}
    return Converted(named, model, str(report), report.fates(), grids)


def _cylinder3d_options(parser: argparse.ArgumentParser) -> None:
    _grid_options(parser, "teacher")
    parser.add_argument(
        "--kernel-mode",
        choices=KERNEL_MODES,
        help="the kernels that the weights were trained with (default: as_released for files of spconv 1)",
    )


def _cylinder3d(args: argparse.Namespace) -> Converted:
    partition = parse_partition(args.range, args.shape)
    state_dict = load_checkpoint(args.file)["state_dict"]
    with naming(args.file):
        weights, report = convert_cylinder3d(state_dict, args.kernel_mode)
    return _segmentor("kd.Cylinder3D", weights, report, partition)


def _polarnet_options(parser: argparse.ArgumentParser) -> None:
    _grid_options(parser, "student")
    parser.add_argument(
        "--num-classes",
        type=int,
        default=20,
        metavar="K",
        help='classes with class 0 "unlabelled"; files that have one class less get it (default 20)',
    )


def _polarnet(args: argparse.Namespace) -> Converted:
    partition = parse_partition(args.range, args.shape)
    state_dict = load_checkpoint(args.file)["state_dict"]
    with naming(args.file):
        weights, report = convert_polarnet(state_dict, args.num_classes, args.shape[2])
    return _segmentor("kd.PolarNet", weights, report, partition)


def _part_options(kind: str) -> Callable[[argparse.ArgumentParser], None]:
    parts = tuple(LAYOUTS[kind].denoisers)

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--part",
            choices=parts,
            default=parts[0],
            help=f"the denoiser to take (default {parts[0]})",
        )

    return add


def _completion(args: argparse.Namespace) -> Converted:
    state_dict = read_tensors(args.file)
    with naming(args.file):
        weights, report = convert_completion(state_dict, args.command, args.part)
    # How the published numbers of the distilled students were sampled; those of teachers are the model's defaults.
    sampled = dict(steps=8, guidance=3.5) if args.part == "student" else {}
    model = dict(
        type="kd.DiffusionCompletion",
        encoder=dict(type="kd.ConditionEncoder", **report.network),
        denoiser=dict(type="kd.Denoiser", **report.network),
        **sampled,
    )
    return Converted(weights, model, str(report), report.fates())


def _refiner(args: argparse.Namespace) -> Converted:
    state_dict = read_tensors(args.file)
    with naming(args.file):
        weights, report = convert_refiner(state_dict)
    model = dict(type="kd.Refiner", **report.network)
    return Converted(weights, model, str(report), report.fates())


ROLES = {
    "pretrained": "the network alone with the heads that it was trained with",
    "trunk": "without heads, in a segmentor that gets a new one",
    "segmentor": "its one head is that of the classes, as in fine-tuned files",
}


def _residual_unet_options(parser: argparse.ArgumentParser) -> None:
    roles = "; ".join(f"{name}: {text}" for name, text in ROLES.items())
    parser.add_argument(
        "--as",
        dest="role",
        choices=tuple(ROLES),
        default="pretrained",
        help=f"what the weights are for. {roles} (default pretrained)",
    )


def _residual_unet(args: argparse.Namespace) -> Converted:
    file = read_points(args.file)
    with naming(args.file):
        weights, report = convert_residual_unet(file.weights, heads=args.role != "trunk")
    network = dict(type="kd.ResidualUNet", **report.network)
    lines = [str(report)]
    if file.settings:
        told = ", ".join(f"{name}={value}" for name, value in file.settings.items())
        lines.append(f"trained with {told}")
    if file.apart:
        lines.append(f"not read: {', '.join(file.apart)}")
    if args.role == "pretrained":
        # Published files of pre-training are normalised; one that says otherwise is believed.
        network["normalise"] = bool(file.settings.get("normalize_features", True))
        return Converted(weights, network, "\n".join(lines), report.fates())
    if args.role == "trunk":
        width = weights["block8.0.conv1.weight"].shape[0]
        model = dict(
            type="DefaultSegmentorV2", num_classes=0, backbone_out_channels=width, backbone=network
        )
    elif "class_level" in network:
        raise InputError(
            f"{args.file} has two heads, so it is a file of pre-training and none of a segmentor; use --as trunk"
        )
    elif file.settings.get("normalize_features"):
        raise InputError(
            f"{args.file} was trained with normalised output, so it is a file of pre-training and none of a "
            "segmentor; use --as trunk"
        )
    else:
        model = dict(type="DefaultSegmentor", backbone=network)
    named = {f"backbone.{key}": value for key, value in weights.items()}
    return Converted(named, model, "\n".join(lines), report.fates())


def _sphereformer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-set",
        choices=tuple(DATA_SETS),
        help="whose voxels and windows the weights were trained with (default: by the number of classes)",
    )


def _sphereformer(args: argparse.Namespace) -> Converted:
    state_dict = load_checkpoint(args.file)["state_dict"]
    with naming(args.file):
        weights, report = convert_sphereformer(state_dict, args.data_set)
    return _backbone("kd.SphereFormer", weights, report)


def _u2mkd_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tower",
        choices=tuple(TOWERS),
        default="teacher",
        help="which to take of a file that holds both; of a student its LiDAR branch (default teacher)",
    )
    parser.add_argument(
        "--keep-noise", action="store_true", help="keep class 0, which no training point had"
    )


def _u2mkd(args: argparse.Namespace) -> Converted:
    state_dict = load_checkpoint(args.file)["state_dict"]
    with naming(args.file):
        weights, report = convert_point_voxel_unet(state_dict, args.tower, args.keep_noise)
    return _backbone("kd.PointVoxelUNet", weights, report)


def _backbone(kind: str, weights: Mapping[str, Tensor], report: ConversionReport) -> Converted:
    """The weights as those of a segmentor's backbone with a head of its own."""
    model = dict(type="DefaultSegmentor", backbone=dict(type=kind, **report.network))
    named = {f"backbone.{key}": value for key, value in weights.items()}
    return Converted(named, model, str(report), report.fates())


COMMANDS = {
    "cylinder3d": Command(
        "Cylinder3D and PVKD, trained with spconv 1", _cylinder3d_options, _cylinder3d
    ),
    "polarnet": Command(
        "PolarNet: distilled students, and PolarSeg with one class less",
        _polarnet_options,
        _polarnet,
    ),
    "lidiff": Command(
        "LiDiff: encoder and denoiser, also those fine-tuned on preferences",
        _part_options("lidiff"),
        _completion,
    ),
    "refiner": Command("LiDiff's refiner, which all three methods use", lambda _: None, _refiner),
    "scorelidar": Command(
        "ScoreLiDAR: encoder and one of its denoisers", _part_options("scorelidar"), _completion
    ),
    "distillationdpo": Command(
        "Distillation-DPO: encoder and one of its denoisers",
        _part_options("distillationdpo"),
        _completion,
    ),
    "slidr": Command(
        "SR-UNet34 of SLidR, OLIVINE and others that pre-train with MinkowskiEngine",
        _residual_unet_options,
        _residual_unet,
    ),
    "sphereformer": Command(
        "SphereFormer, trained with spconv 2", _sphereformer_options, _sphereformer
    ),
    "u2mkd": Command("U2MKD's LiDAR network, trained with torchsparse", _u2mkd_options, _u2mkd),
}


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="command", required=True, metavar="KIND")
    for name, command in COMMANDS.items():
        part = parts.add_parser(name, help=command.summary, description=command.summary)
        part.add_argument("file", type=Path, help="the released file")
        part.add_argument("--out", type=Path, required=True, help="checkpoint to write")
        part.add_argument(
            "--keys", action="store_true", help="also print what became of every entry"
        )
        command.options(part)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read, convert, write, report."""
    sys.stdout.reconfigure(errors="replace")
    args = build_arguments().parse_args(argv)
    if not args.file.is_file():
        raise InputError(f"{args.file}: there is no such file")
    if args.out.resolve() == args.file.resolve():
        raise InputError(f"--out {args.out} is the file to convert; choose another name")
    made = COMMANDS[args.command].convert(args)
    digest = hashlib.sha256()
    with open(args.file, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    content = {
        "epoch": 0,
        "state_dict": made.weights,
        "grids": made.grids,
        # Read by people and by tools, not by the loader: which network this is, and from where.
        "model_config": made.model,
        "source": {"file": args.file.name, "sha256": digest.hexdigest(), "report": made.report},
    }
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: no folder can be made there ({error})") from error
    save_atomic(content, args.out)
    if args.keys:
        width = max(map(len, made.fates))
        print("\n".join(f"{key:<{width}}  {fate}" for key, fate in made.fates.items()), end="\n\n")
    print(f"{args.file}: {made.report}\n\n{print_source({'model': made.model})}\n{args.out}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
