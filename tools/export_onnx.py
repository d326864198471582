r"""Write a trained PolarNet student as an ONNX file, and check it on a scan.

    python tools/export_onnx.py --config-file configs/kd/cylinder3d_to_polarnet.py --weight student_best.pth \
        --out student.onnx --check scan.bin
    python tools/export_onnx.py --config-file A.py --weight a.pth --out a.onnx --check scan.bin --repeats 5
    python tools/export_onnx.py --config-file A.py --weight a.pth --out a.onnx --pooling scatter --opset 20

Of a distillation config the student alone is exported: a `kd.VoxelSegmentor` around a `kd.PolarNet`. The file takes the
features (n, 9) and cells (n, 3) of the points of one scan and gives scores and labels of the points; how to make its
inputs, from numbers in its metadata, is written in `pointcept_kd/networks/onnx_export.py`. --check runs the file in
onnxruntime and the network in PyTorch on a .bin scan, and fails with exit code 1 where fewer than 99.99 % of the labels
are equal. Needs the packages onnx and, to check, onnxruntime: pip install 'pointcept_kd[onnx]'
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

import pointcept_kd  # noqa: F401  fills the registries
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, load_into, student_weights
from pointcept_kd.host.dialect import parse_options
from pointcept_kd.host.metrics import class_names
from pointcept_kd.host.runtime import read_config, require, run_tool
from pointcept_kd.host.tester import plain_model
from pointcept_kd.networks.onnx_export import (
    OPSET,
    POOLINGS,
    export_onnx,
    require_onnx,
    session,
)
from pointcept_kd.networks.polarnet import PolarNet
from pointcept_kd.networks.voxels import VoxelSegmentor
from tools.benchmark import file_batch, interleaved_seconds

EQUAL = 0.9999  # share of labels that have to agree


def load_student(cfg: Any, weight: str | Path) -> VoxelSegmentor:
    """The config's plain network with the weights of a checkpoint, which must match exactly, in evaluation.

    Raises:
        InputError: for any other network.
    """
    require(cfg, "model")
    checkpoint = load_checkpoint(weight)
    model: nn.Module = MODELS.build(plain_model(cfg["model"]))
    backbone = getattr(model, "backbone", None)
    if not isinstance(model, VoxelSegmentor) or not isinstance(backbone, PolarNet):
        inner = f" around {type(backbone).__name__}" if backbone is not None else ""
        raise InputError(
            f"{cfg.filename}: a {type(model).__name__}{inner} cannot be exported; expected a kd.VoxelSegmentor around "
            "a kd.PolarNet"
        )
    load_into(model, student_weights(checkpoint["state_dict"]), strict=True, source=weight)
    return model.eval()


@dataclass(frozen=True)
class Comparison:
    """ONNX against PyTorch on one scan.

    Attributes:
        points: number of points.
        different: points whose labels differ.
        largest: largest difference of two scores.
        seconds: medians of PyTorch from points to labels and of onnxruntime from features and cells to labels, or
            None.
    """

    points: int
    different: int
    largest: float
    seconds: tuple[float, float] | None

    @property
    def share(self) -> float:
        """Share of equal labels."""
        return 1 - self.different / self.points


@torch.no_grad()
def compare(
    model: VoxelSegmentor, path: Path, batch: dict[str, Any], threads: int = 1, repeats: int = 0
) -> Comparison:
    """Run both on a batch of one scan, and time `repeats` runs of both in turn."""
    torch.set_num_threads(threads)
    batch = {key: value for key, value in batch.items() if key != "segment"}
    points = model.backbone.partition(batch)
    cells = points.indices[:, 1:].contiguous()
    feed = {"features": points.features.numpy(), "cells": cells.numpy()}
    running = session(path, threads)
    scores, labels = running.run(None, feed)
    ours = model(batch)["seg_logits"].float().numpy()
    seconds = None
    if repeats:
        runs = (lambda _: model(batch)["seg_logits"].argmax(1), lambda _: running.run(None, feed))
        torch_times, onnx_times = interleaved_seconds(runs, torch.device("cpu"), 1, repeats)
        seconds = (statistics.median(torch_times), statistics.median(onnx_times))
    different = int((ours.argmax(1) != labels).sum())
    return Comparison(len(labels), different, float(np.abs(ours - scores).max()), seconds)


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
    add("--config-file", required=True, metavar="FILE", help="config of the network")
    add("--weight", required=True, metavar="FILE", help="its checkpoint; a distiller's holds it")
    add("--out", required=True, type=Path, metavar="FILE", help="the .onnx file to write")
    add("--check", type=Path, metavar="SCAN", help="compare with PyTorch on this .bin scan")
    add(
        "--repeats",
        type=int,
        default=0,
        metavar="N",
        help="with --check: time N runs of both (default 0: do not)",
    )
    add("--threads", type=int, default=1, metavar="N", help="with --check: CPU threads (default 1)")
    add("--opset", type=int, default=OPSET, metavar="N", help=f"operators (default {OPSET})")
    add(
        "--pooling",
        choices=POOLINGS,
        default="roi",
        help="how pillars take the maximum: roi, for onnxruntime (default); scatter, for runtimes without MaxRoiPool",
    )
    add(
        "--keep-norms",
        action="store_true",
        help="leave batch normalisations as nodes of their own instead of folding them into their neighbours",
    )
    add(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="config keys to change, for example model.student.model.backbone.num_classes=20",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and check if asked to; returns 1 where the check fails."""
    args = build_arguments().parse_args(argv)
    if args.threads < 1 or args.repeats < 0:
        raise InputError(
            f"--threads {args.threads} --repeats {args.repeats}: expected 1 or more and 0 or more"
        )
    if args.repeats and args.check is None:
        raise InputError("--repeats times the check: name a scan with --check")
    if args.pooling == "scatter" and args.threads > 1:
        raise InputError(
            "--pooling scatter is wrong in onnxruntime with more than one thread; check it with --threads 1"
        )
    require_onnx()
    if args.check is not None:
        require_onnx("onnxruntime")
    cfg = read_config(args.config_file, parse_options(args.options))
    model = load_student(cfg, args.weight)
    network, void = model.backbone, model.void_class
    # A scan that cannot be read is to be known before anything is written.
    batch = None if args.check is None else file_batch(cfg, "val", args.check)
    data = cfg.get("data") or {}
    kept = network.num_classes - bool(void)
    names = class_names(data) if data.get("num_classes") == kept else None
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {args.out}: cannot create its folder ({error.strerror})"
        ) from error
    export_onnx(
        network,
        args.out,
        void_class=void,
        opset=args.opset,
        pooling=args.pooling,
        fold=not args.keep_norms,
        metadata={"class_names": names},
    )
    shape = " x ".join(map(str, network.partition.partition.shape))
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, opset {args.opset}, {shape} "
        f"{network.partition.partition.frame} cells, {kept} classes"
    )
    if batch is None:
        return 0
    found = compare(model, args.out, batch, args.threads, args.repeats)
    print(
        f"check on {args.check}: {found.points - found.different} of {found.points} labels equal ({found.share:.4%}), "
        f"largest difference of scores {found.largest:.1e}"
    )
    if found.seconds is not None:
        ours, theirs = found.seconds
        print(
            f"median of {args.repeats} runs, {args.threads} thread{'s' * (args.threads > 1)}: PyTorch {ours:.3f} s, "
            f"onnxruntime {theirs:.3f} s ({theirs / ours:.2f} of PyTorch's)"
        )
    if found.share < EQUAL:
        print(f"error: fewer than {EQUAL:.2%} of the labels are equal", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    codes: list[int] = []
    status = run_tool(lambda: codes.append(main()))
    sys.exit(status or codes[0])
