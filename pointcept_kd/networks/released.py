"""Released weights of Cylinder3D and PolarNet as weights of `kd.Cylinder3D` and `kd.PolarNet`.

Convolutions of Cylinder3D. spconv 1 keeps a kernel as (radius, azimuth, height, in, out), spconv 2 and this package as
(out, radius, azimuth, height, in); both are cross-correlations, nothing is mirrored. What spconv 1 executed is not what
the shape says: convolutions that share a rulebook ran on that of their block's first one, tap by tap in the order of
the flattened kernel. So a kernel declared (3, 1, 3) in a block that begins with (1, 3, 3) is read as (1, 3, 3), and of
the 27 taps of `upBlock*.conv3` the first 9 are. The other 18 were never used and their gradients were uninitialised
memory: released files may hold anything there, also NaN. Such weights need `kernel_mode="as_released"`.

The program's version for spconv 2 executes the declared kernels, but drops the result of one batch normalisation by a
misspelled name (`downCntx.bn1`, issue 107 of xinge008/Cylinder3D). Weights trained with it show this by a scale and a
shift that never left 1 and 0; that layer is made to change nothing, as in the network that was trained.

PolarNet's weights have the names and the order of axes of `kd.PolarNet`. Those of the first program, PolarSeg, have no
class "unlabelled"; it is put in front of each height's classes, with a score that is never the largest.

Nothing is loaded in part: a key that is not known, one that lacks and one of another shape are errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError

from . import cylinder3d, polarnet
from .cylinder3d import KERNEL_MODES, Cylinder3D, block_kernels
from .polarnet import PolarNet
from .voxels import GEOMETRY

# Score of the class "unlabelled" where the weights know none: its probability is 0 in every floating-point type.
VOID_BIAS = -1e4
# Bounds (low, high) of the grids that weights were trained with: Cylinder3D's, and that of the pillar students.
RANGES = {
    "teacher": (cylinder3d.PARTITION["low"], cylinder3d.PARTITION["high"]),
    "student": (polarnet.PARTITION["low"], polarnet.PARTITION["high"]),
}
_CONTAINERS = ("state_dict", "model")
_SPARSE = "cylinder_3d_spconv_seg."
_FORGOTTEN = f"{_SPARSE}downCntx.bn1"
_EPS = 1e-5  # of the batch normalisations


@dataclass
class ConversionReport:
    """What became of every key of a file.

    Attributes:
        layout: what kind of file it was.
        network: arguments of the network that takes the weights, all but its partition.
        matched: keys whose values are as they were.
        permuted: keys whose axes were put in another order.
        reread: kernels whose taps are read under another kernel than their shape says.
        cut: those of `reread` that lost taps, and how many numbers.
        not_finite: how many of the numbers that were cut are NaN or infinite.
        neutral: statistics of a normalisation whose result was never used, set so that it changes nothing.
        expanded: keys that got rows for the class "unlabelled".
        shortened: keys that lost the row of class 0, "noise".
        dropped: keys that no network needs.
    """

    layout: str
    network: dict[str, Any]
    matched: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)
    reread: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    not_finite: int = 0
    neutral: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def fates(self) -> dict[str, str]:
        """What became of every single key."""
        kinds: dict[str, Iterable[str]] = {
            "copied": self.matched,
            "permuted": self.permuted,
            "read under the executed kernel": self.reread,
            "cut": self.cut,
            "made neutral": self.neutral,
            "expanded": self.expanded,
            "shortened": self.shortened,
            "dropped": self.dropped,
        }
        found: dict[str, list[str]] = {}
        for kind, names in kinds.items():
            for name in names:
                found.setdefault(name, []).append(kind)
        return {name: ", ".join(found[name]) for name in sorted(found)}

    def __str__(self) -> str:
        lines = [f"{self.layout}; {len(self.matched)} entries copied as they are"]
        if self.permuted:
            lines.append(f"{len(self.permuted)} kernels permuted")
        if self.reread:
            lines.append(f"{len(self.reread)} kernels read under the kernel that was executed")
        if self.cut:
            lines.append(
                f"{len(self.cut)} of those cut ({_some(self.cut)}): {sum(self.cut.values())} numbers that were never "
                f"used, {self.not_finite} of them not finite"
            )
        if self.neutral:
            lines.append(
                f"{len(self.neutral)} made neutral ({_some(self.neutral)}): that normalisation was never used"
            )
        if self.expanded:
            lines.append(f"{len(self.expanded)} expanded by a class 0 ({_some(self.expanded)})")
        if self.shortened:
            lines.append(f"{len(self.shortened)} shortened by a class 0 ({_some(self.shortened)})")
        lines.append(
            f"{len(self.dropped)} dropped" + (f" ({_some(self.dropped)})" if self.dropped else "")
        )
        return "\n".join(lines)


def convert_cylinder3d(
    state_dict: Mapping[str, Any], kernel_mode: str | None = None
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights for `kd.Cylinder3D` from a released file's, and what was done to them.

    Args:
        state_dict: the weights, also below `state_dict` or `model`, also with `module.` in front of the keys.
        kernel_mode: the kernels that the weights were trained with. By default "as_released" for kernels in the order
            of spconv 1. Kernels in the order of spconv 2 that have the declared sizes may come from a network trained
            as drawn or from a file of spconv 1 that somebody permuted: nothing in them tells, it must be said here.

    Raises:
        InputError: for keys, shapes or an order of axes that are not Cylinder3D's, and for numbers that are not
            finite anywhere but in taps that are cut.
    """
    if kernel_mode not in (None, *KERNEL_MODES):
        raise InputError(f"kernel_mode={kernel_mode!r} is none of {', '.join(KERNEL_MODES)}")
    given, dropped = _plain(state_dict)
    first = f"{_SPARSE}downCntx.conv1.weight"
    shape = _shape(given, first, 5, "Cylinder3D")
    if shape[:3] == (1, 3, 3):
        layout, released = "spconv 1", True
    elif shape[1:4] == (1, 3, 3):
        layout, released = "spconv 2", False
    else:
        raise InputError(
            f"{first} has the shape {shape}: expected (1, 3, 3, in, out) as spconv 1 writes it or (out, 1, 3, 3, in) "
            "as spconv 2 does"
        )
    network = _encoder_sizes(given, "cylinder_3d_generator.", "Cylinder3D")
    widths = network["point_channels"]
    # The last linear layer keeps the width of the one before.
    network["point_channels"] = widths[:-1]
    network["voxel_channels"] = network.pop("compressed")
    network["width"] = shape[4] if released else shape[0]
    network["num_classes"] = _shape(given, f"{_SPARSE}logits.bias", 1, "Cylinder3D")[0]

    last = f"{_SPARSE}upBlock0.conv3.weight"
    last_shape = _shape(given, last, 5, "Cylinder3D")
    executed = not released and last_shape[1:4] == (1, 3, 3)
    found = "as_released" if executed else "intended"
    source = _meta(Cylinder3D, {**network, "kernel_mode": found})
    shapes = {key: tuple(value.shape) for key, value in source.items()}
    if released:
        shapes = {k: (*s[1:4], s[4], s[0]) if len(s) == 5 else s for k, s in shapes.items()}
    _meet(given, shapes, f"Cylinder3D in the layout of {layout}")

    if executed and kernel_mode == "intended":
        raise InputError(
            f"{last} has the shape {last_shape}, a kernel that only weights of kernel_mode='as_released' have"
        )
    if released or executed:
        kernel_mode = kernel_mode or "as_released"
    elif kernel_mode is None:
        raise InputError(
            "the kernels have the order of spconv 2 and the declared sizes: say whether they were trained so "
            "(kernel_mode='intended') or permuted from a file of spconv 1 (kernel_mode='as_released')"
        )
    network["kernel_mode"] = kernel_mode

    report = ConversionReport(f"Cylinder3D, {len(given)} entries, {layout} layout", network)
    report.dropped = dropped
    weights: dict[str, Tensor] = {}
    for key, value in given.items():
        if value.dim() != 5:
            report.matched.append(key)
            weights[key] = value
            continue
        taps_first = value if released else value.permute(1, 2, 3, 4, 0)
        kernel = tuple(taps_first.shape[:3])
        block, leaf = key.split(".")[1:3]
        target = kernel if executed else block_kernels(block, kernel_mode).get(leaf, kernel)
        if target != kernel:
            report.reread.append(key)
            flat = taps_first.flatten(0, 2)
            used = math.prod(target)
            if used < len(flat):
                dead = flat[used:]
                report.cut[key] = dead.numel()
                report.not_finite += int((~dead.isfinite()).sum())
            taps_first = flat[:used].unflatten(0, target)
        if released:
            report.permuted.append(key)
        elif target == kernel:
            report.matched.append(key)
        weights[key] = taps_first.permute(4, 0, 1, 2, 3)
    if not released and _unused(weights, _FORGOTTEN):
        # In evaluation (x - 0) / sqrt(1 - eps + eps) * 1 + 0.
        for leaf, number in (("running_mean", 0.0), ("running_var", 1.0 - _EPS)):
            key = f"{_FORGOTTEN}.{leaf}"
            weights[key] = torch.full_like(weights[key], number)
            report.matched.remove(key)
            report.neutral.append(key)
    return _finish(weights), report


def _unused(weights: Mapping[str, Tensor], norm: str) -> bool:
    """Whether a batch normalisation saw batches and never got a gradient."""
    scale, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
    seen = int(weights[f"{norm}.num_batches_tracked"])
    return seen > 0 and bool((scale == 1).all()) and bool((shift == 0).all())


def convert_polarnet(
    state_dict: Mapping[str, Any], num_classes: int = 20, heights: int = 32
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights for `kd.PolarNet` from a released student's or from PolarSeg's, and what was done to them.

    Args:
        state_dict: the weights, also below `state_dict` or `model`, also with `module.` in front of the keys.
        num_classes: K of the result, with class 0 "unlabelled". A head of K - 1 classes per height gets a class 0
            with the weight 0 and the bias -10,000, so that nothing is ever given to it.
        heights: Z, cells along the height of the grid that the weights were trained with.

    Raises:
        InputError: for keys, shapes or a number of classes that do not fit, and for numbers that are not finite.
    """
    if num_classes < 2 or heights < 1:
        raise InputError(
            f"num_classes={num_classes}, heights={heights}: expected at least 2 classes and 1 height"
        )
    given, dropped = _plain(state_dict)
    head = "BEV_model.network.outc.conv."
    first = "BEV_model.network.inc.conv.1.conv1.0.weight"
    network = _encoder_sizes(given, "", "PolarNet")
    network["base"] = _shape(given, first, 4, "PolarNet")[0]
    rows = _shape(given, f"{head}weight", 4, "PolarNet")[0]
    classes = {heights * k: k for k in (num_classes - 1, num_classes)}.get(rows)
    if classes is None:
        raise InputError(
            f"{head}weight has {rows} rows: with {heights} heights expected {heights * num_classes} for "
            f"{num_classes} classes, or {heights * (num_classes - 1)} without the class 'unlabelled'"
        )
    grid = {**polarnet.PARTITION, "shape": (*polarnet.PARTITION["shape"][:2], heights)}
    source = _meta(PolarNet, {**network, "num_classes": classes, "partition": grid})
    _meet(given, {key: tuple(value.shape) for key, value in source.items()}, "PolarNet")

    network["num_classes"] = num_classes
    program = "PolarSeg" if classes < num_classes else "PolarNet"
    report = ConversionReport(f"{program}, {len(given)} entries, {classes} classes", network)
    report.dropped = dropped
    weights = dict(given)
    if classes < num_classes:
        report.expanded = [f"{head}weight", f"{head}bias"]
        for key, void in zip(report.expanded, (0.0, VOID_BIAS)):
            known = given[key].unflatten(0, (heights, classes))
            nothing = torch.full_like(known[:, :1], void)
            weights[key] = torch.cat((nothing, known), dim=1).flatten(0, 1)
    report.matched = [key for key in given if key not in report.expanded]
    return _finish(weights), report


def _plain(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under their bare keys, and the keys that are left out: buffers of adapters."""
    for name in _CONTAINERS:
        if isinstance(state_dict.get(name), Mapping):
            state_dict = state_dict[name]
            break
    given: dict[str, Tensor] = {}
    dropped = []
    for key, value in state_dict.items():
        bare = str(key).removeprefix("module.")
        if not isinstance(value, Tensor):
            raise InputError(
                f"entry {key!r} is a {type(value).__name__}: expected weights alone, or weights below "
                f"{' or '.join(_CONTAINERS)}"
            )
        if bare in given:
            raise InputError(f"entry {bare!r} is there twice, with and without `module.`")
        if bare.endswith(".pe"):
            dropped.append(bare)
        else:
            given[bare] = value
    if any(key.startswith("backbone.") for key in given):
        raise InputError(
            "the keys begin with `backbone.`: these weights are converted already, or are those of a run"
        )
    return given, dropped


def _shape(given: Mapping[str, Tensor], key: str, rank: int, what: str) -> tuple[int, ...]:
    if key not in given:
        raise InputError(
            f"these are no weights of {what}: {key} is not there; the keys begin with {_some(list(given)) or 'none'}"
        )
    shape = tuple(given[key].shape)
    if len(shape) != rank:
        raise InputError(f"{key} has the shape {shape}: expected {rank} axes for {what}")
    return shape


def _encoder_sizes(given: Mapping[str, Tensor], prefix: str, what: str) -> dict[str, Any]:
    """Sizes of the point encoder: its input, the widths of its linear layers, and of what leaves it."""
    inputs = _shape(given, f"{prefix}PPmodel.0.weight", 1, what)[0]
    names = [f"{prefix}PPmodel.{1 + 3 * i}.weight" for i in range(4)]
    return dict(
        in_channels=inputs - GEOMETRY + 3,
        point_channels=tuple(_shape(given, name, 2, what)[0] for name in names),
        compressed=_shape(given, f"{prefix}fea_compression.0.weight", 2, what)[0],
    )


def _meta(kind: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of a network's weights, without memory for them."""
    with torch.device("meta"):
        return kind(**arguments).state_dict()


def _meet(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Every key on both sides, of one shape, and of numbers.

    Raises:
        InputError: naming the first keys that are not.
    """
    missing = [key for key in shapes if key not in given]
    unknown = [key for key in given if key not in shapes]
    if missing or unknown:
        raise InputError(
            f"the weights are not those of {what}: {len(missing)} of {len(shapes)} keys lack "
            f"({_some(missing) or 'none'}), {len(unknown)} are unknown ({_some(unknown) or 'none'})"
        )
    for key, shape in shapes.items():
        found = tuple(given[key].shape)
        if found != shape:
            raise InputError(f"{key} has the shape {found}: expected {shape} for {what}")
        if not given[key].is_floating_point() and not key.endswith(".num_batches_tracked"):
            raise InputError(f"{key} has the type {given[key].dtype}: expected floating point")


def _finish(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of their own in float32, none of which holds a number that is not finite."""
    done = {}
    for key, value in weights.items():
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise InputError(
                f"{key} has {count} of {value.numel()} numbers that are not finite: the file is damaged, or its "
                "training diverged"
            )
        kind = torch.float32 if value.is_floating_point() else value.dtype
        done[key] = value.to(kind, copy=True, memory_format=torch.contiguous_format)
    return done


def _some(keys: Sequence[str] | Mapping[str, Any], count: int = 4) -> str:
    keys = [key.removeprefix(_SPARSE) for key in keys]
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
