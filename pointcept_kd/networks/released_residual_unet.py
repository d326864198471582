"""Released weights of image-to-LiDAR pre-training (SLidR, OLIVINE and their baselines) as weights of `kd.ResidualUNet`.

Files of SLidR have the network under `model_points` and the image network under `model_images`; those of OLIVINE have
all in one `state_dict`, with `model_points.` in front, besides the image network and the statistics of classes. Both
keep their settings under `config`, of which three concern who uses the weights: the cells they were trained on and
whether their output was normalised. Kernels are MinkowskiEngine's, see `released_completion`; a head's bias has a row.

A plan of blocks that no published network has is an error, as is a key too many or too few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pointcept_kd.host import InputError

from .released import ConversionReport, _finish, _meet, _meta, _some
from .released_completion import from_minkowski, read_containers
from .residual_unet import CHANNELS, LEVELS, PLANS, ResidualUNet

PREFIX = "model_points."
CONTAINERS = ("model_points", "state_dict")
HEADS = ("final", "final_class_level")
_SETTINGS = ("voxel_size", "cylindrical_coordinates", "normalize_features")
_STEM = "conv0p1s1.kernel"


@dataclass
class ReleasedFile:
    """What `read_points` found.

    Attributes:
        weights: the file's entries, those of `model_points` alone where they stand apart.
        settings: of `voxel_size`, `cylindrical_coordinates` and `normalize_features` what the file's config has.
        apart: containers of the file that were not read.
    """

    weights: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    apart: tuple[str, ...] = ()


def read_points(path: str | Path) -> ReleasedFile:
    """The LiDAR network's entries of a released checkpoint; see `read_containers` for how, and for errors."""
    content, taken, weights = read_containers(path, CONTAINERS)
    if not weights:
        raise InputError(f"{path} has no weights: {taken} is empty")
    if taken is None:
        return ReleasedFile(weights)
    config = content.get("config")
    config = config if isinstance(config, dict) else {}
    settings = {
        name: config[name] for name in _SETTINGS if isinstance(config.get(name), (bool, int, float))
    }
    others = (
        str(k) for k, v in content.items() if k not in (taken, "config") and isinstance(v, dict)
    )
    return ReleasedFile(weights, settings, tuple(others))


def convert_residual_unet(
    state_dict: Mapping[str, Any], heads: bool = True
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights of `kd.ResidualUNet` from a released file's, and what was done to them.

    Args:
        state_dict: the weights under the keys of the file: bare, or with `model_points.` in front and others besides,
            each also with `module.`.
        heads: also those of the heads; without them the network's result is what the heads read.

    Raises:
        InputError: for keys, shapes and numbers of blocks that are not the network's, and for numbers that are not
            finite.
    """
    given = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    if len(given) < len(state_dict):
        raise InputError("there are entries twice, with and without `module.`")
    prefix = PREFIX if any(key.startswith(PREFIX) for key in given) else ""
    own = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    for key, value in own.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{prefix}{key} is no tensor")
    network = _sizes(own)
    plan = next(name for name, layers in PLANS.items() if layers == network["layers"])
    _meet(own, dict(_sources(network).values()), f"SR-UNet{plan}")
    if not heads:
        network.update(num_classes=0, class_level=0)

    title = f"SR-UNet{plan}{f' from {prefix}' if prefix else ''}, {len(own)} entries"
    report = ConversionReport(title, _plain_arguments(network))
    weights = {}
    for key, (name, _) in _sources(network).items():
        value = own[name]
        if name != key:
            value = from_minkowski(value)
        elif key.endswith(".bias") and value.dim() == 2:
            value = value[0]
        weights[key] = value
        kept = name == key and value.shape == own[name].shape
        (report.matched if kept else report.permuted).append(prefix + name)
    used = {*report.matched, *report.permuted}
    report.dropped = [key for key in given if key not in used]
    return _finish(weights), report


def _width(own: Mapping[str, Tensor], key: str, rank: int, axis: int) -> int:
    if key not in own:
        what = "these are no released weights of SR-UNet"
        if key.replace(".kernel", ".weight") in own:
            what = f"{key.replace('.kernel', '.weight')} stands where a released file has a kernel: converted already"
        raise InputError(
            f"{what}; {key} is not there, the keys begin with {_some(list(own)) or 'none'}"
        )
    shape = tuple(own[key].shape)
    if len(shape) != rank:
        raise InputError(f"{key} has the shape {shape}: expected {rank} axes")
    return shape[axis]


def _sizes(own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the network that has these entries, all of them."""
    blocks = range(1, 2 * LEVELS + 1)
    network: dict[str, Any] = dict(
        in_channels=_width(own, _STEM, 3, 1),
        num_classes=_width(own, "final.kernel", 2, 1),
        class_level=0,
        base_channels=_width(own, _STEM, 3, 2),
        channels=tuple(_width(own, f"block{i}.0.conv1.kernel", 3, 2) for i in blocks),
        layers=tuple(
            len({k.split(".")[1] for k in own if k.startswith(f"block{i}.")}) for i in blocks
        ),
    )
    if any(key.startswith("final_class_level.") for key in own):
        network["class_level"] = _width(own, "final_class_level.kernel", 2, 1)
    if network["layers"] not in PLANS.values():
        known = "; ".join(f"{name}: {layers}" for name, layers in PLANS.items())
        raise InputError(
            f"block1 to block8 have {network['layers']} residual blocks: no published network has, those are {known}"
        )
    return network


def _sources(network: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key and shape in a released file of every entry of the network, in its order."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, value in _meta(ResidualUNet, network).items():
        shape, kernel = tuple(value.shape), f"{key.removesuffix('weight')}kernel"
        if len(shape) == 5:
            found[key] = kernel, (shape[1] * shape[2] * shape[3], shape[4], shape[0])
        elif len(shape) == 2:
            found[key] = kernel, shape[::-1]
        elif key in [f"{head}.bias" for head in HEADS]:
            found[key] = key, (1, *shape)
        else:
            found[key] = key, shape
    return found


def _plain_arguments(network: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are the published network's anyway."""
    usual = dict(class_level=0, base_channels=32, channels=CHANNELS, layers=PLANS[34])
    return {k: v for k, v in network.items() if k not in usual or v != usual[k]}
