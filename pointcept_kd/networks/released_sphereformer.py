"""Released weights of networks with window attention as weights of `kd.SphereFormer` and `kd.PointVoxelUNet`.

SphereFormer's were trained with spconv 2, whose kernels (out, x, y, z, in) are this package's. What is checked is that
keys and shapes are those of the network that its sizes tell.

U2MKD's code runs on torchsparse 1.4, which keeps kernels as (taps, in, out): three taps an axis with x fastest and z
slowest, two taps an axis with z fastest, and one tap as a plain (in, out) matrix. Its files may hold one network, or
the teacher and the student beside each other behind `model_t.` and `model_s.`; of a student with cameras the LiDAR
branch is taken. The network gets the spherical cells that the released code ran with (`cells="reference"`), and its
head loses class 0, "noise", which no training point had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pointcept_kd.host import InputError

from .point_voxel_unet import LEVELS, PointVoxelUNet
from .released import ConversionReport, _finish, _meet, _meta, _plain, _shape
from .sphereformer import SphereFormer

TOWERS = {"teacher": "model_t.", "student": "model_s."}
# Voxels and windows that the released networks were trained with, which are not in their files, by number of classes.
DATA_SETS: dict[str, tuple[int, dict[str, Any]]] = {
    "nuscenes": (16, dict(voxel_size=0.1, spherical=(2.0, 2.0, 120.0), angle_factor=2.0)),
    "semantic_kitti": (19, dict(voxel_size=0.05, spherical=(2.0, 2.0, 80.0), angle_factor=1.5)),
    "waymo": (22, dict(voxel_size=0.1, spherical=(1.5, 1.5, 80.0), angle_factor=1.5)),
}
# What the network without cameras consists of.
_PARTS = (
    "stem",
    "vox_downs",
    "transformer_blocks",
    "vox_ups",
    "point_transforms",
    "classifier_vox",
)


def from_torchsparse(kernel: Tensor) -> Tensor:
    """A kernel of torchsparse 1.4 as (out, x, y, z, in), or, of one tap, as the matrix (out, in) of a linear layer.

    Raises:
        InputError: for kernels of other than 1, 8 or 27 taps.
    """
    if kernel.dim() == 2:
        return kernel.t()
    taps = kernel.shape[0] if kernel.dim() == 3 else 0
    if taps == 27:
        # Its offsets run through x first.
        return kernel.unflatten(0, (3, 3, 3)).permute(4, 2, 1, 0, 3)
    if taps == 8:
        return kernel.unflatten(0, (2, 2, 2)).permute(4, 0, 1, 2, 3)
    raise InputError(
        f"a kernel has the shape {tuple(kernel.shape)}: expected (27 or 8, in, out) or (in, out)"
    )


def convert_point_voxel_unet(
    state_dict: Mapping[str, Any], tower: str = "teacher", noise: bool = False
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights of `kd.PointVoxelUNet` from a state dict in the layout of torchsparse, and what was done to them.

    Args:
        state_dict: the weights, also below `state_dict` or `model`, also with `module.` in front of the keys.
        tower: "teacher" or "student": which to take where both are there.
        noise: keep class 0, which no training point had. By default it goes, and class 1 becomes 0, as everywhere in
            this package.

    Raises:
        InputError: for another tower, a head of class 0 alone, for keys, shapes and numbers of blocks that are not the
            network's, and for numbers that are not finite.
    """
    if tower not in TOWERS:
        raise InputError(f"tower={tower!r} is none of {', '.join(TOWERS)}")
    given, dropped = _plain(state_dict)
    prefix = TOWERS[tower]
    if not any(key.startswith(tuple(TOWERS.values())) for key in given):
        prefix = ""
    own = {
        key.removeprefix(prefix): value
        for key, value in given.items()
        if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in _PARTS
    }
    network = _unet_sizes(own, prefix)
    sources: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, value in _meta(PointVoxelUNet, network).items():
        name, shape = key, tuple(value.shape)
        kernel = key.endswith(".weight") and (
            len(shape) == 5 or key.endswith("downsample.0.weight")
        )
        if kernel:
            name = f"{key.removesuffix('weight')}kernel"
            taps = shape[1] * shape[2] * shape[3] if len(shape) == 5 else 0
            shape = (taps, shape[4], shape[0]) if taps else (shape[1], shape[0])
        sources[key] = name, shape
    _meet(own, dict(sources.values()), "the point-voxel U-Net")
    report = ConversionReport(
        f"point-voxel U-Net{f' from {prefix}' if prefix else ''}, {len(own)} entries", network
    )
    weights = {}
    for key, (name, _) in sources.items():
        weights[key] = own[name] if name == key else from_torchsparse(own[name])
        (report.matched if name == key else report.permuted).append(prefix + name)
    used = {*report.matched, *report.permuted}
    if not noise:
        network["num_classes"] -= 1
        if network["num_classes"] < 1:
            raise InputError(f"{prefix}classifier_vox.0.weight has one row: no class but noise")
        for key in ("classifier_vox.0.weight", "classifier_vox.0.bias"):
            weights[key] = weights[key][1:]
            report.matched.remove(prefix + key)
            report.shortened.append(prefix + key)
    report.dropped = [*dropped, *(key for key in given if key not in used)]
    return _finish(weights), report


def convert_sphereformer(
    state_dict: Mapping[str, Any], data_set: str | None = None
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights of `kd.SphereFormer` from a released file's; they are checked, not changed.

    Args:
        state_dict: the weights, also below `state_dict` or `model`, also with `module.` in front of the keys.
        data_set: of `DATA_SETS`, whose voxels and windows the network then has; by default that of the number of
            classes.

    Raises:
        InputError: for another data set, or none where the number of classes tells none, for keys and shapes that are
            not SphereFormer's, and for numbers that are not finite.
    """
    given, dropped = _plain(state_dict)
    what = "SphereFormer"
    width, *_, inputs = _shape(given, "input_conv.0.weight", 5, what)
    channels, at = [width], "unet."
    while f"{at}conv.2.weight" in given:
        channels.append(_shape(given, f"{at}conv.2.weight", 5, what)[0])
        at += "u."
    table = "unet.transformer_block.attn.relative_pos_query_table_sphere"
    network = dict(
        in_channels=inputs,
        num_classes=_shape(given, "linear.weight", 2, what)[0],
        channels=tuple(channels),
        depth=_blocks(given, r"unet\.blocks\.block(\d+)\."),
        head_size=_shape(given, table, 4, what)[3],
    )
    if data_set is None:
        known = {classes: name for name, (classes, _) in DATA_SETS.items()}
        data_set = known.get(network["num_classes"])
        if data_set is None:
            raise InputError(
                f"{network['num_classes']} classes tell no data set: name that whose voxels and windows the weights "
                f"were trained with, one of {', '.join(DATA_SETS)}"
            )
    elif data_set not in DATA_SETS:
        raise InputError(f"data_set={data_set!r} is none of {', '.join(DATA_SETS)}")
    network.update(DATA_SETS[data_set][1])
    source = _meta(SphereFormer, network)
    _meet(given, {key: tuple(value.shape) for key, value in source.items()}, what)
    report = ConversionReport(f"SphereFormer of {data_set}, {len(given)} entries", network)
    report.matched, report.dropped = list(given), dropped
    return _finish(given), report


def _unet_sizes(own: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    what = "the point-voxel U-Net"
    if not own:
        raise InputError(f"these are no weights of {what}: no entry begins with {prefix}stem")
    if "stem.0.weight" in own:
        raise InputError(
            "stem.0.weight stands where a released file has a kernel: converted already"
        )
    _, inputs, stem = _shape(own, "stem.0.kernel", 3, what)
    down = [_shape(own, f"vox_downs.{i}.1.net.0.kernel", 3, what)[2] for i in range(LEVELS)]
    up = [_shape(own, f"vox_ups.{j}.0.net.0.kernel", 3, what)[2] for j in range(LEVELS)]
    network: dict[str, Any] = dict(
        in_channels=inputs,
        num_classes=_shape(own, "classifier_vox.0.weight", 2, what)[0],
        channels=(stem, *down, *up),
        depth=_blocks(own, r"vox_ups\.0\.1\.(\d+)\."),
        attention=any(key.startswith("transformer_blocks.") for key in own),
    )
    if network["attention"]:
        table = "transformer_blocks.0.attn.relative_pos_query_table_sphere"
        network["head_size"] = _shape(own, table, 4, what)[3]
        # What the released code ran with is what its weights have learned.
        network["cells"] = "reference"
    return network


def _blocks(given: Mapping[str, Any], pattern: str) -> int:
    """One more than the highest number of a residual block, at least 1."""
    found = (re.match(pattern, key) for key in given)
    return 1 + max((int(match.group(1)) for match in found if match), default=0)
