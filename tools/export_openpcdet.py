"""Hand a pre-trained VoxelNet encoder to OpenPCDet's detectors, and take one back.

    python tools/export_openpcdet.py exp/pretrain/model/model_last.pth --detector second --out handoff
    python tools/export_openpcdet.py model_last.pth --detector pv_rcnn --out handoff --tag mine --intensity-scale 255
    python tools/export_openpcdet.py model_last.pth --detector second --out handoff --openpcdet-root OpenPCDet --verify
    python tools/export_openpcdet.py foreign.pt --detector second --out handoff --source-layout rsck
    python tools/export_openpcdet.py second_7862.pth --reverse --source-layout krsc --out weights --tag second

Writes OUT/TAG.pth, which OpenPCDet's tools/train.py takes as --pretrained_model, OUT/TAG_DETECTOR.yaml, its config,
OUT/TAG.json with what became of every entry, and OUT/TAG.txt with the command lines. Entries get the prefix
`backbone_3d.` and kernels (out, z, y, x, in), float32, on the CPU, running statistics included. The file can be read
with weights_only=True. The config names OpenPCDet's config of the data set; with --inline it holds all of it.

--verify builds the detector from that config and loads the file, both with the code of the checkout at --openpcdet-root
(or OPENPCDET_ROOT), in a process of its own and without a GPU; it compares every entry, and the features of 4000 voxels
with those of this package's encoder. --python names the interpreter for it, which needs spconv, easydict, pyyaml.

OpenPCDet skips what does not fit without an error, and takes kernels of another order of axes as they are where the
shapes happen to agree. So everything is checked here: each entry of the encoder has to be there once, in its shape and
finite, with four input channels (x, y, z, intensity) unless --input-channels says otherwise. The order of axes is never
guessed: files of this package's runs have krsc (out, z, y, x, in); of others --source-layout names it, rsck for spconv
1, krsc for spconv 2.2 and later, rskc for the `native` algorithm of 2.1.

--reverse reads a detector's checkpoint, or a file that this tool wrote, and writes OUT/TAG.pth for this package, under
the keys of a model whose `backbone` is the encoder, with a report beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import pointcept_kd
from pointcept_kd.handoff import detectors, yaml_text
from pointcept_kd.handoff import verify as verifier
from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint, save_atomic, write_atomic
from pointcept_kd.host.runtime import run_tool
from pointcept_kd.networks import UNetV2, VoxelBackBone8x, VoxelResBackBone8x
from pointcept_kd.ops.sparse import SparseConvTensor

PREFIX = "backbone_3d."
ENCODERS = {kind.__name__: kind for kind in (VoxelBackBone8x, VoxelResBackBone8x, UNetV2)}
# Axes of a kernel as they lie in a file, in the order (out, z, y, x, in) and back.
LAYOUTS = {"krsc": (0, 1, 2, 3, 4), "rsck": (4, 0, 1, 2, 3), "rskc": (3, 0, 1, 2, 4)}
WRITTEN = ("krsc", "rsck")
CLOSE = 1e-4  # of the largest feature: what float32 leaves between two orders of summation


@dataclass
class Encoder:
    """An encoder read from a file.

    Attributes:
        kind: name of its class.
        weights: under OpenPCDet's names without prefix, kernels (out, z, y, x, in), contiguous float32 on the CPU.
        prefix: in front of its names in the file.
        unused: entries of the file that are left, and why.
        channels: width of its input.
        use_bias: whether residual blocks have biases.
    """

    kind: str
    weights: dict[str, Tensor]
    prefix: str
    unused: dict[str, str]
    channels: int
    use_bias: bool = True
    checksums: dict[str, list[float]] = field(default_factory=dict)


def build(kind: str, channels: int, use_bias: bool = True) -> nn.Module:
    """An encoder without memory, for its names and shapes."""
    more = {} if kind != "VoxelResBackBone8x" else {"use_bias": use_bias}
    with torch.device("meta"):
        return ENCODERS[kind](in_channels=channels, **more)


def find_prefix(names: Sequence[str], wanted: str | None = None) -> str:
    """What stands in front of the encoder's names.

    Raises:
        InputError: where there is no encoder, or more than one.
    """
    first, last = "conv_input.0.weight", "conv_out.0.weight"
    known = set(names)
    found = [n[: -len(first)] for n in names if n.endswith(first)]
    found = [p for p in found if p + last in known and (not p or p.endswith("."))]
    if wanted is not None:
        if wanted not in found:
            raise InputError(f"--prefix {wanted!r}: no encoder there; found {found or 'none'}")
        return wanted
    if not found:
        raise InputError(
            f"there is no VoxelNet encoder: no entries end with {first} and {last}; the file has "
            f"{_some(sorted(names)) or 'nothing'}"
        )
    if len(found) > 1:
        raise InputError(f"there are {len(found)} encoders; choose one by --prefix: {found}")
    return found[0]


def why_unused(name: str, prefix: str) -> str:
    """What an entry beside the encoder is, from its name."""
    words = set(name.replace(".", " ").replace("_", " ").lower().split())
    if name.startswith(prefix) and name[len(prefix) :].startswith(
        ("conv_up_", "inv_conv", "conv5.")
    ):
        return "decoder"
    for reason, signs in {
        "teacher": {"teacher"},
        "vmf": {"vmf", "kappa", "mu"},
        "image": {"image", "images", "camera"},
        "head": {"final", "head", "roi", "dense", "point", "pfe"},
        "optimizer": {"optimizer"},
    }.items():
        if words & signs:
            return reason
    return "not part of the encoder"


def read_encoder(
    state: Mapping[str, Any],
    layout: str,
    channels: int | None = 4,
    kind: str | None = None,
    prefix: str | None = None,
) -> Encoder:
    """Pick the encoder from a state dict, with every entry checked.

    Args:
        layout: axes of the file's kernels, one of `LAYOUTS`.
        channels: the input channels it must have; None for any.
        kind: class to read it as; by default the largest that the names fit.
        prefix: in front of its names; by default there must be one alone.

    Raises:
        InputError: for no or several encoders, entries that are missing, of another shape or kind, or not finite, and
            another number of input channels.
    """
    plain: dict[str, Any] = {}
    for key, value in state.items():
        bare = str(key).removeprefix("module.")
        if bare in plain:
            raise InputError(f"entry {bare!r} is there twice, with and without `module.`")
        plain[bare] = value
    prefix = find_prefix(list(plain), prefix)
    part = {k[len(prefix) :]: v for k, v in plain.items() if k.startswith(prefix)}
    residual = any(k.startswith("conv1.0.conv1.") for k in part)
    if kind is None:
        decoder = any(k.startswith("conv_up_") for k in part)
        kind = "VoxelResBackBone8x" if residual else "UNetV2" if decoder else "VoxelBackBone8x"
    elif residual != (kind == "VoxelResBackBone8x"):
        raise InputError(
            f"the encoder has {'' if residual else 'no '}residual blocks: it is no {kind}"
        )
    use_bias = not residual or "conv1.0.conv1.bias" in part

    stem = part["conv_input.0.weight"]
    if not isinstance(stem, Tensor) or stem.dim() != 5:
        raise InputError(f"{prefix}conv_input.0.weight is no kernel with five axes")
    *outer, width = stem.permute(LAYOUTS[layout]).shape
    if outer != [16, 3, 3, 3]:
        raise InputError(
            f"{prefix}conv_input.0.weight is {tuple(stem.shape)}, which is no first layer of 16 channels in the layout "
            f"{layout}"
        )
    if channels is not None and width != channels:
        raise InputError(
            f"the encoder takes {width} input channels in the layout {layout}, the detector {channels}: OpenPCDet "
            "would leave out its first layer; pre-train with x, y, z, intensity, or give --input-channels "
            f"{width} with a detector of as many"
        )
    expected = {k: tuple(v.shape) for k, v in build(kind, width, use_bias).state_dict().items()}
    if missing := [k for k in expected if k not in part]:
        raise InputError(
            f"{len(missing)} of the {len(expected)} entries of {kind} are missing: {_some(missing)}"
        )
    weights, sums, bad = {}, {}, []
    for key, shape in expected.items():
        value = part[key]
        counter = key.endswith("num_batches_tracked")
        if not isinstance(value, Tensor) or value.is_floating_point() == counter:
            what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{prefix}{key} is {what}, not a tensor of the expected kind")
        value = value.detach().cpu().to(torch.int64 if counter else torch.float32)
        if len(shape) == 5 and value.dim() == 5:
            value = value.permute(LAYOUTS[layout])
        if tuple(value.shape) != shape:
            bad.append(f"{prefix}{key} is {tuple(value.shape)}, expected {shape}")
            continue
        if not bool(value.isfinite().all()):
            raise InputError(
                f"{prefix}{key} has values that are not finite; choose an earlier checkpoint"
            )
        weights[key] = value.clone(memory_format=torch.contiguous_format)
        sums[key] = [float(value.double().sum()), float(value.double().square().sum())]
    if bad:
        raise InputError(
            f"{len(bad)} of the {len(expected)} entries of {kind} have other shapes in the layout {layout}: "
            f"{'; '.join(bad[:3])}"
        )
    used = {prefix + key for key in expected}
    unused = {k: why_unused(k, prefix) for k in plain if k not in used}
    return Encoder(kind, weights, prefix, unused, width, use_bias, sums)


def source_layout(content: Mapping[str, Any], given: str | None) -> str:
    """Axes of the kernels of a file, from what it says of itself or from the command line.

    Raises:
        InputError: where neither says, or they disagree.
    """
    info = content.get("export_info")
    own = info.get("layout") if isinstance(info, Mapping) else None
    # Runs of this package, and they alone, keep the grids of their networks beside the weights.
    if own is None and "grids" in content:
        own = "krsc"
    if own is not None and own not in LAYOUTS:
        raise InputError(f"the file names an unknown layout {own!r}")
    if given is None and own is None:
        raise InputError(
            "the file does not say how its kernels lie; give --source-layout (krsc for spconv 2.2 and later, rsck for "
            "spconv 1)"
        )
    if given is not None and own is not None and given != own:
        raise InputError(f"--source-layout {given}, but the file says {own}")
    return own or given


def detector_state(encoder: Encoder, layout: str = "krsc") -> dict[str, Tensor]:
    """The encoder's entries as OpenPCDet names them, kernels in one of `WRITTEN`."""
    back = sorted(range(5), key=LAYOUTS[layout].__getitem__)
    return {
        PREFIX + key: (value.permute(back) if value.dim() == 5 else value).contiguous()
        for key, value in encoder.weights.items()
    }


def grid_of(content: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """The grid that the encoder was trained on, where the file names it."""
    grids = content.get("grids") or {}
    grid = grids.get(prefix.removesuffix("."))
    return dict(grid) if isinstance(grid, Mapping) else None


def short_hash(state: Mapping[str, Tensor], *more: str) -> str:
    """Eight hexadecimal digits that change with any entry."""
    digest = hashlib.sha256("\n".join(more).encode())
    for key in sorted(state):
        digest.update(f"{key} {tuple(state[key].shape)}".encode())
        digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()[:8]


@dataclass
class Export:
    """What is written: the file for OpenPCDet, its report, its command lines, its config, and what it was made of."""

    file: dict[str, Any]
    report: dict[str, Any]
    commands: str
    config: str | None
    encoder: Encoder


def config_name(tag: str, detector: str) -> str:
    """Name of the config's file."""
    return f"{tag}.yaml" if tag.endswith(f"_{detector}") else f"{tag}_{detector}.yaml"


def export(content: Mapping[str, Any], args: argparse.Namespace) -> Export:
    """Everything that is written for OpenPCDet."""
    layout = source_layout(content, args.source_layout)
    detector = detectors.DETECTORS[args.detector]
    kind = args.backbone
    found = read_encoder(content["state_dict"], layout, args.input_channels, kind, args.prefix)
    if kind is None and found.kind == "UNetV2" and "UNetV2" not in detector.backbones:
        # A detector without decoder takes the encoder alone.
        found = read_encoder(
            content["state_dict"], layout, args.input_channels, "VoxelBackBone8x", args.prefix
        )
    if found.kind not in detector.backbones:
        raise InputError(
            f"the encoder is a {found.kind}, and {args.detector} takes {' or '.join(detector.backbones)}"
        )
    state = detector_state(found, args.layout)
    total = detectors.entries(args.detector, found.kind, found.use_bias)
    line = f"loaded {len(state)}/{total}"
    extra_tag = f"{args.tag}_{short_hash(state, args.detector, args.layout)}"
    grid = grid_of(content, found.prefix)
    size = None
    if grid is not None:
        size = [(h - l) / n for l, h, n in zip(grid["low"], grid["high"], grid["shape"])]
    warnings = []
    if args.intensity_scale is None:
        warnings.append(
            "the range of intensities in pre-training is not known; KITTI's are 0 to 1 (--intensity-scale 255 records "
            "0 to 255)"
        )
    elif args.intensity_scale != 1:
        warnings.append(
            f"intensities were 0 to {args.intensity_scale:g} in pre-training and are 0 to 1 in KITTI"
        )
    config = None
    if found.channels == 4:
        settings = detectors.config(args.detector, found.kind, found.use_bias, args.inline)
        config = yaml_text.dump(
            settings,
            f"{detector.model} of OpenPCDet, started from {args.tag}.pth; written by pointcept_kd.\n"
            "Commands with it run in OpenPCDet's folder tools/.",
        )
    else:
        warnings.append(
            f"no config is written: the detector's data must have {found.channels} input channels, and those of "
            f"{detector.data.upper()} have 4"
        )
    if not found.use_bias:
        warnings.append("the config must have USE_BIAS: False under MODEL.BACKBONE_3D")
    if args.layout != "krsc":
        warnings.append("kernels are in spconv 1's order, which OpenPCDet puts right as it loads")
    info = {
        "layout": args.layout,
        "backbone": found.kind,
        "input_channels": found.channels,
        "intensity_scale": args.intensity_scale,
        "pretrain_grid": grid,
    }
    file = {
        "model_state": state,
        "epoch": -1,
        "it": 0,
        "optimizer_state": None,
        "version": f"pointcept_kd+{pointcept_kd.__version__}",
        "export_info": info,
    }
    whole = detectors.config_backbone(args.detector, found.kind) == found.kind
    report = {
        "detector": args.detector,
        "data": detector.data,
        "config": None if config is None else config_name(args.tag, args.detector),
        "extra_tag": extra_tag,
        "backbone": found.kind,
        "backbone_complete": whole,
        "layout_source": layout,
        "layout_written": args.layout,
        "input_channels": found.channels,
        "intensity_scale": args.intensity_scale,
        "pretrain_voxel_size": size,
        "pretrain_range": None if grid is None else [*grid["low"], *grid["high"]],
        "matched": sorted(found.weights),
        "unused_in_source": found.unused,
        "n_matched": len(state),
        "n_expected": len(state),
        "n_detector": total,
        "expected_log_line": line,
        "checksums": found.checksums,
        "warnings": warnings,
    }
    return Export(file, report, command_lines(report, args.out.resolve(), args.tag), config, found)


def command_lines(report: Mapping[str, Any], out: Path, tag: str) -> str:
    """How the detector is trained and tested, as a text for a shell."""
    folder, name = f"{report['data']}_models", report["config"]
    quiet = (
        f" and must not say `Not updated weight {PREFIX}`" if report["backbone_complete"] else ""
    )
    if name is None:
        copy, config, runs = "", "CONFIG", f"../output/{folder}/CONFIG"
    else:
        copy = f"cp {shlex.quote(str(out / name))} cfgs/{folder}/\n"
        config, runs = f"cfgs/{folder}/{name}", f"../output/{folder}/{Path(name).stem}"
    given = (
        f"--cfg_file {shlex.quote(config)} --pretrained_model {shlex.quote(str(out / f'{tag}.pth'))} "
        f"--extra_tag {report['extra_tag']}"
    )
    planes = ""
    if report["data"] == "kitti" and name is not None:
        planes = "# Where the data have no road planes, set USE_ROAD_PLANE: False in the config.\n"
    last = shlex.quote(f"{runs}/{report['extra_tag']}/ckpt/checkpoint_epoch_80.pth")
    return (
        "# In OpenPCDet's folder tools/. A fresh --extra_tag: a checkpoint that lies in the run's folder would be\n"
        "# loaded over this one. Not --ckpt: that resumes a whole detector.\n"
        f"{copy}{planes}unset SPCONV_SAVED_WEIGHT_LAYOUT\n"
        f"python train.py {given}\n"
        f"# On several GPUs: bash scripts/dist_train.sh NUMBER {given}\n"
        f"# Its log must say `{report['expected_log_line']}`{quiet}.\n"
        f"python test.py --cfg_file {shlex.quote(config)} --extra_tag {report['extra_tag']} --ckpt {last}\n"
    )


# ------------------------------------------------------------------------------------------ check


def sample_voxels(channels: int) -> dict[str, Tensor]:
    """Half of the cells of a block of 20, dense enough for every layer to show in the result.

    Returns:
        `indices` (4000, 4) int64 as (scan, z, y, x), within the grid of every data set; `features` (4000, channels).
    """
    generator = torch.Generator().manual_seed(1)
    picked = torch.randperm(20**3, generator=generator)[: 20**3 // 2]
    cells = torch.stack(torch.unravel_index(picked, (20, 20, 20)), 1)
    cells = cells + torch.tensor([8, 800, 704])
    indices = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int64), cells], 1)
    return {"indices": indices, "features": torch.randn(len(cells), channels, generator=generator)}


def our_features(encoder: Encoder, data: str, voxels: Mapping[str, Tensor]) -> SparseConvTensor:
    """What this package's encoder makes of voxels on the detector's grid."""
    space = detectors.SPACES[data]
    partition = {
        "low": space.range[:3],
        "high": space.range[3:],
        "shape": space.shape,
        "frame": "cartesian",
        "spacing": "n",
    }
    more = {} if encoder.kind != "VoxelResBackBone8x" else {"use_bias": encoder.use_bias}
    network = ENCODERS[encoder.kind](encoder.channels, partition=partition, extra_z=1, **more)
    network.load_state_dict(encoder.weights)
    x = SparseConvTensor(voxels["features"], voxels["indices"], network.sparse_shape, 1)
    with torch.no_grad():
        return network.eval().encode(x).out


def in_order(indices: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by their cells (scan, z, y, x)."""
    key = indices[:, 0]
    for axis in indices.unbind(1)[1:]:
        key = key * 4096 + axis
    order = key.argsort()
    return indices[order], features[order]


def openpcdet_loads(
    root: Path, python: str, config: Path, weights: Path, data: str, voxels: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build a detector and load a file with the code of a checkout, in a process of its own.

    Args:
        data: one of `detectors.SPACES`.
        voxels: as of `sample_voxels`.

    Returns:
        what `verifier` reports, and `state`, `indices`, `features` of the encoder.

    Raises:
        InputError: where that code does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result, given = (Path(folder, name) for name in ("job.json", "result.json", "in.pt"))
        torch.save(dict(voxels), given)
        content = {
            "root": str(root.resolve()),
            "config": str(config.resolve()),
            "weights": str(weights.resolve()),
            "space": asdict(detectors.SPACES[data]),
            "channels": voxels["features"].shape[1],
            "voxels": str(given),
            "result": str(result),
        }
        job.write_text(json.dumps(content))
        environment = {k: v for k, v in os.environ.items() if k != "SPCONV_SAVED_WEIGHT_LAYOUT"}
        try:
            ended = subprocess.run(
                [python, verifier.__file__, str(job)],
                env={**environment, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise InputError(f"--python {python} cannot be run: {error.strerror}") from error
        if not result.is_file():
            last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise InputError(f"OpenPCDet's code at {root} did not run to its end: {last[:300]}")
        theirs = json.loads(result.read_text())
        if "error" in theirs:
            raise InputError(f"OpenPCDet's code at {root} does not run: {theirs['error']}")
        return theirs, torch.load(result.with_suffix(".pt"), weights_only=True)


def verify(
    done: Export, weights: Path, root: Path, python: str
) -> tuple[dict[str, Any], list[str]]:
    """Load the written files with OpenPCDet's code and compare.

    Returns:
        the report's `verify`, and what is wrong.

    Raises:
        InputError: where OpenPCDet's code does not run.
    """
    report, found = done.report, done.encoder
    voxels = sample_voxels(found.channels)
    config = weights.with_name(report["config"])
    theirs, kept = openpcdet_loads(root, python, config, weights, report["data"], voxels)
    equal = sum(
        torch.equal(kept["state"].get(PREFIX + key, torch.empty(0)).cpu(), value)
        for key, value in found.weights.items()
    )
    ours = our_features(found, report["data"], voxels)
    cells, features = in_order(ours.indices.long(), ours.features)
    their_cells, their_features = in_order(kept["indices"], kept["features"])
    same_cells = torch.equal(cells, their_cells)
    largest = float(features.abs().max())
    gap = float((features - their_features).abs().max()) if same_cells else None
    relative = None if gap is None else gap / max(largest, torch.finfo(torch.float32).tiny)
    checked = {
        "loaded": theirs["loaded"],
        "total": theirs["total"],
        "not_updated_backbone": theirs["not_updated_backbone"],
        "entries_equal": equal,
        "voxels": len(voxels["indices"]),
        "same_cells": same_cells,
        "max_abs_diff": gap,
        "max_rel_diff": relative,
        "parts": theirs["parts"],
    }
    encoder_entries = theirs["parts"].get(PREFIX.rstrip("."), 0)
    wrong = []
    line = f"loaded {checked['loaded']}/{checked['total']}"
    if line != report["expected_log_line"]:
        wrong.append(f"OpenPCDet {line}, expected {report['expected_log_line']}")
    if checked["not_updated_backbone"] != encoder_entries - report["n_matched"]:
        wrong.append(f"{checked['not_updated_backbone']} entries of its encoder are not updated")
    if equal != report["n_matched"]:
        wrong.append(f"{equal} of {report['n_matched']} entries are equal after loading")
    if not same_cells:
        wrong.append("its encoder's output has other cells")
    elif not relative <= CLOSE:
        wrong.append(
            f"features differ by {relative:.1e} of the largest, at most {CLOSE:g} is rounding"
        )
    return checked, wrong


# ------------------------------------------------------------------------------------------ back


def take_back(content: Mapping[str, Any], args: argparse.Namespace) -> tuple[dict, dict]:
    """The file for this package from a detector's, and its report."""
    layout = source_layout(content, args.source_layout)
    found = read_encoder(
        content["state_dict"], layout, args.input_channels, args.backbone, args.prefix
    )
    model: dict[str, Any] = {"type": f"kd.{found.kind}", "in_channels": found.channels}
    if not found.use_bias:
        model["use_bias"] = False
    report = {
        "backbone": found.kind,
        "layout_source": layout,
        "layout_written": "krsc",
        "input_channels": found.channels,
        "matched": sorted(found.weights),
        "unused_in_source": found.unused,
        "n_matched": len(found.weights),
        "checksums": found.checksums,
    }
    # Weights of these encoders fit any size of voxels, so no grid is written that others would have to agree with.
    file = {
        "epoch": 0,
        "state_dict": {f"backbone.{k}": v for k, v in found.weights.items()},
        "grids": {},
        "model_config": {"backbone": model},
    }
    return file, report


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def build_arguments() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = __doc__.partition("\n\n")
    examples, _, remarks = rest.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{remarks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint to read")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--tag", help="name of the files (default: the checkpoint's and detector's)"
    )
    parser.add_argument(
        "--detector", choices=detectors.DETECTORS, help="who is to have the encoder"
    )
    parser.add_argument("--reverse", action="store_true", help="from OpenPCDet to this package")
    parser.add_argument(
        "--backbone", choices=ENCODERS, help="read it as that (default: what its names say)"
    )
    parser.add_argument("--prefix", help="of the encoder's names, where a file holds several")
    parser.add_argument(
        "--source-layout", choices=LAYOUTS, help="axes of the kernels of files of others"
    )
    parser.add_argument(
        "--layout", choices=WRITTEN, default="krsc", help="axes to write (default krsc)"
    )
    parser.add_argument(
        "--input-channels", type=int, default=4, metavar="N", help="of the detector (default 4)"
    )
    parser.add_argument(
        "--intensity-scale", type=float, metavar="S", help="largest intensity in pre-training"
    )
    parser.add_argument("--inline", action="store_true", help="a config with all of the data's")
    parser.add_argument("--verify", action="store_true", help="load it with OpenPCDet's own code")
    parser.add_argument(
        "--openpcdet-root", type=Path, metavar="PATH", help="a checkout (default: OPENPCDET_ROOT)"
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="interpreter for --verify"
    )
    return parser


def checkout(given: Path | None) -> Path:
    """The checkout for `--verify`.

    Raises:
        InputError: where there is none.
    """
    root = given or (
        Path(os.environ["OPENPCDET_ROOT"]) if os.environ.get("OPENPCDET_ROOT") else None
    )
    if root is None:
        raise InputError("--verify needs a checkout of OpenPCDet: give --openpcdet-root PATH")
    if not (root / "pcdet" / "models" / "detectors" / "detector3d_template.py").is_file():
        raise InputError(f"--openpcdet-root {root}: no checkout of OpenPCDet is there")
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Read, check, write, report."""
    args = build_arguments().parse_args(argv)
    if args.reverse == (args.detector is not None):
        raise InputError("give either --detector, or --reverse")
    if args.reverse and (args.verify or args.inline):
        raise InputError("--verify and --inline are about what OpenPCDet gets, not for --reverse")
    root = checkout(args.openpcdet_root) if args.verify else None
    args.tag = args.tag or f"{args.checkpoint.stem}_{args.detector or 'backbone'}"
    if Path(args.tag).name != args.tag or any(c.isspace() for c in args.tag):
        raise InputError(f"--tag {args.tag!r}: expected a file name without folders and blanks")
    target = args.out / f"{args.tag}.pth"
    if target.resolve() == args.checkpoint.resolve():
        raise InputError(f"{target} is the file to read; choose another --tag or --out")
    content = load_checkpoint(args.checkpoint)
    done = None
    try:
        if args.reverse:
            file, report = take_back(content, args)
        else:
            done = export(content, args)
            file, report = done.file, done.report
    except InputError as error:
        raise InputError(f"{args.checkpoint}: {error}") from error
    if args.verify and report["config"] is None:
        raise InputError(f"--verify: {report['warnings'][-1]}")
    digest = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    report = {
        "source": {"path": str(args.checkpoint), "sha256": digest},
        **report,
        "versions": {"pointcept_kd": pointcept_kd.__version__, "torch": str(torch.__version__)},
    }
    if args.reverse:
        file["source"] = {"file": args.checkpoint.name, "sha256": digest}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: no folder can be made there ({error})") from error
    save_atomic(file, target)
    if done is not None:
        if done.config is not None:
            write_text(target.with_name(report["config"]), done.config)
        write_text(target.with_suffix(".txt"), done.commands)
    wrong: list[str] = []
    report["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    if done is not None and root is not None:
        report["verify"], wrong = verify(done, target, root, args.python)
    write_text(target.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    print(f"{target}: {report['n_matched']} entries of {report['backbone']}")
    for reason, count in Counter(report["unused_in_source"].values()).most_common():
        print(f"{count} entries of the file not used: {reason}")
    for warning in report.get("warnings", ()):
        print(f"warning: {warning}")
    if wrong:
        raise InputError(f"{target} is not what OpenPCDet makes of it: {'; '.join(wrong)}")
    if "verify" in report:
        checked = report["verify"]
        print(
            f"verified with {root}: {report['expected_log_line']}, {checked['entries_equal']} entries equal, features "
            f"within {checked['max_rel_diff']:.1e} of the largest"
        )
    if done is not None:
        print(done.commands, end="")
    else:
        print(f"model=dict(backbone={file['model_config']['backbone']})")


def write_text(path: Path, text: str) -> None:
    """Write all of it or nothing."""
    content = text.encode()
    write_atomic(path, lambda opened: opened.write(content))


if __name__ == "__main__":
    sys.exit(run_tool(main))
