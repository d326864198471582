"""Trunks of image networks: which there are, and the files that fill them.

A trunk is a module from normalised images (n, 3, h, w) to features (n, `out_channels`, h / `stride`, w / `stride`). It
takes images whose sides `multiple` divides, of the channel means `mean` and deviations `std`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint

from .resnet import RESNETS, ResNet
from .timm_trunk import TimmTrunk

# Weight files of residual networks: under which key the tensors are, which prefix they have, what to leave out.
# `segmentor` is a checkpoint of `kd.ImageSegmentor`.
WEIGHTS: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "moco_v1": ("state_dict", "module.encoder_q.", ("fc",)),
    "moco_v2": ("state_dict", "module.encoder_q.", ("fc",)),
    "moco_coco": ("state_dict", "module.encoder_q.", ("fc",)),
    "swav": (None, "module.", ("pro",)),
    "deepcluster_v2": (None, "module.", ("pro",)),
    "dino": (None, "", ()),
    "obow": ("network", "", ("fc.",)),
    "pixpro": ("model", "module.encoder.", ()),
    "imagenet": (None, "", ("fc.",)),
    "segmentor": ("state_dict", "trunk.", ()),
}
KINDS = (*WEIGHTS, "timm")
_TIMM = "timm:"


def build_trunk(trunk: str | Mapping[str, Any], stride: int | None = None) -> nn.Module:
    """A trunk with random weights.

    Args:
        trunk: a key of `RESNETS`; the `depths`, `width` and `bottleneck` of a `ResNet` of another size; or "timm:NAME"
            for a model of that package, see `TimmTrunk`.
        stride: pixels of the image per feature. None: 4 for residual networks, the model's own for those of timm.

    Raises:
        InputError: for an unknown trunk, a stride that it cannot have, and timm where it is not installed.
    """
    if isinstance(trunk, str) and trunk.startswith(_TIMM):
        return TimmTrunk(trunk.removeprefix(_TIMM), stride)
    if isinstance(trunk, str) and trunk not in RESNETS:
        raise InputError(
            f"trunk={trunk!r}: known are {', '.join(RESNETS)}, {_TIMM}NAME and a dict of depths, width, bottleneck"
        )
    sizes = RESNETS[trunk] if isinstance(trunk, str) else dict(trunk)
    try:
        return ResNet(**sizes, stride=4 if stride is None else stride)
    except TypeError as error:
        raise InputError(
            f"trunk={sizes}: expected depths, width and bottleneck ({error})"
        ) from error


def load_trunk(trunk: nn.Module, path: str | Path, kind: str) -> None:
    """Fill a trunk with weights.

    Args:
        trunk: of `build_trunk`.
        path: a local file; nothing is ever fetched.
        kind: where the file is from, one of `KINDS`; "timm" for trunks of timm, and only those.

    Raises:
        InputError: for an unknown kind, a file that cannot be read, and one that lacks an entry of the trunk or has one
            of another shape; the text names them.
    """
    if kind not in KINDS:
        raise InputError(f"weights of {kind!r}: known are {', '.join(KINDS)}")
    if isinstance(trunk, TimmTrunk) != (kind == "timm"):
        raise InputError(
            f"kind={kind!r} with a {type(trunk).__name__}: 'timm' is for trunks timm:NAME, the others are for "
            f"{', '.join(RESNETS)} and their like"
        )
    if isinstance(trunk, TimmTrunk):
        used, unused = trunk.load(path)
    else:
        used, unused = _load_resnet(trunk, path, kind)
    logging.getLogger("pointcept_kd").info(
        "Image trunk: %d entries of %s (%s), %d not used", used, path, kind, unused
    )


def _load_resnet(trunk: nn.Module, path: str | Path, kind: str) -> tuple[int, int]:
    place, prefix, without = WEIGHTS[kind]
    content = load_checkpoint(path)
    found: Any = content if place is None else content.get(place)
    if place is None and isinstance(content.get("state_dict"), Mapping):
        found = content["state_dict"]  # where a bare file's weights are put
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: no {place!r}, where {kind} weights are; is it another file?")
    weights = {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(without or ("\0",))
    }
    wanted = trunk.state_dict()
    missing = [key for key in wanted if key not in weights]
    if missing:
        raise InputError(
            f"{path}: lacks {len(missing)} of the {len(wanted)} entries of the trunk, the first is "
            f"{prefix}{missing[0]} ({kind})"
        )
    odd = [key for key, value in wanted.items() if weights[key].shape != value.shape]
    if odd:
        raise InputError(
            f"{path}: {prefix}{odd[0]} is {tuple(weights[odd[0]].shape)}, the trunk's {tuple(wanted[odd[0]].shape)}"
        )
    trunk.load_state_dict({key: weights[key] for key in wanted})
    return len(wanted), len(weights) - len(wanted)


class ImageModel(nn.Module):
    """A model that reads images through `self.trunk`.

    Args:
        trunk: of `build_trunk`.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("mean", torch.tensor(trunk.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(trunk.std)[:, None, None], persistent=False)

    def read(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """The trunk's features of images of values in 0 .. 1, after its normalisation.

        Raises:
            InputError: for sides that the trunk's `multiple` does not divide.
        """
        height, width = images.shape[2:]
        if height % self.trunk.multiple or width % self.trunk.multiple:
            raise InputError(
                f"images are {height} x {width}; both sides must be multiples of {self.trunk.multiple}"
            )
        return self.trunk((images - self.mean) / self.std)
