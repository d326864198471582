"""Any model of timm as an image trunk: vision transformers by their patch tokens, other networks by their last map.

timm is an optional package and imported where a trunk is built. Models are made without weights, and nothing is ever
fetched: weights come from a local file, in timm's own names or in those that timm knows how to translate.

ViT: Dosovitskiy et al., 2021, arXiv:2010.11929; DINOv2: Oquab et al., 2024, arXiv:2304.07193.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint

from .resnet import MEAN, STD

# Operators that torchvision's Python half looks for when it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Entries of pre-training that no model of features has.
_PRETRAINING = ("mask_token",)
_library: Any = None  # declared operators end with the object that declared them


def _import_torchvision() -> None:
    """Import torchvision, whose compiled half may be for another torch.

    A wheel for CUDA beside a torch for the CPU does not load its operators, and then fails to describe two of them.
    Declared without code, they let its Python half be imported, which is all that timm asks for.
    """
    global _library
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    importlib.import_module("torchvision")


def import_timm() -> Any:
    """The package timm.

    Raises:
        InputError: where it or torchvision cannot be imported; the text says how to install them.
    """
    try:
        _import_torchvision()
        return importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"trunks of timm need timm and torchvision ({error!r:.120}): "
            "pip install 'pointcept_kd[timm]', or, to leave a torch for the CPU as it is, "
            "pip install --no-deps timm torchvision safetensors huggingface_hub pyyaml"
        ) from error


class TimmTrunk(nn.Module):
    """A model of timm without its classes, as a trunk.

    Transformers (models with `patch_embed` and `num_prefix_tokens`) give the tokens of their patches after the last
    normalisation, without class and register tokens; other models their last map. Image sides are multiples of the
    patch, else of the stride; position embeddings are interpolated to other sizes than the model's.

    Args:
        name: of the model, e.g. "vit_small_patch14_dinov2".
        stride: 8, 16 or 32 of a convolutional network that can be dilated; None for the model's own, the only one a
            transformer has.

    Raises:
        InputError: without timm, for a model that timm does not have or cannot build so, and for one of another kind.
    """

    def __init__(self, name: str, stride: int | None = None) -> None:
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:8])
            raise InputError(f"timm {timm.__version__} has no model {name!r}; there are {near}")
        self.name = name
        self.model = self._create(timm, name, stride)
        info = self.model.feature_info[-1]
        self.tokens = hasattr(self.model, "num_prefix_tokens") and hasattr(
            self.model, "patch_embed"
        )
        if self.tokens:
            sides = {int(side) for side in self.model.patch_embed.patch_size}
            if len(sides) > 1:
                raise InputError(f"timm:{name} has patches that are not square")
            self.stride = sides.pop()
            self.out_channels = int(self.model.num_features)
        elif hasattr(self.model, "forward_intermediates"):
            self.stride = int(info["reduction"])
            self.out_channels = int(info["num_chs"])
        else:
            raise InputError(
                f"timm:{name} gives neither tokens of patches nor maps of its stages ({type(self.model).__name__})"
            )
        if stride not in (None, self.stride):
            raise InputError(f"stride={stride} of timm:{name}: it has {self.stride}")
        self.multiple = self.stride
        known = self.model.pretrained_cfg
        self.mean, self.std = tuple(known.get("mean", MEAN)), tuple(known.get("std", STD))
        classifier = known.get("classifier") or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        self.classifier = tuple(f"{part}." for part in names)

    @staticmethod
    def _create(timm: Any, name: str, stride: int | None) -> nn.Module:
        words = {"pretrained": False, "num_classes": 0}
        # Only some models know this word; which ones, timm does not say.
        with contextlib.suppress(TypeError):
            return timm.create_model(name, dynamic_img_size=True, **words)
        dilated = {} if stride in (None, 32) else {"output_stride": stride}
        try:
            return timm.create_model(name, **words, **dilated)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise InputError(f"timm:{name} with {dilated or 'its own sizes'}: {error}") from error

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """Features of normalised images."""
        if not self.tokens:
            return self.model.forward_intermediates(
                images, indices=1, intermediates_only=True, output_fmt="NCHW"
            )[-1]
        tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        rows, columns = (side // self.stride for side in images.shape[2:])
        return tokens.transpose(1, 2).reshape(len(images), -1, rows, columns)

    def load(self, path: str | Path) -> tuple[int, int]:
        """Fill the model from a local file, `.safetensors` or any that torch reads.

        The weights may be nested (`model`, `state_dict`, ...) and have a prefix in common (`module.`,
        `backbone.`, ...). Where timm translates the names of an original release, it does so here.

        Returns:
            the number of entries used, and of those left out: the classifier's and foreign ones.

        Raises:
            InputError: for a file that cannot be read, lacks an entry, has one too many or one of another shape.
        """
        found = _weights_of(Path(path))
        wanted = self.model.state_dict()
        weights = _without_prefix(found, wanted)
        left_out = len(found) - len(weights)
        # Releases in other names; for weights in timm's own this changes nothing.
        translate = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if translate is not None and not wanted.keys() <= weights.keys():
            try:
                weights = dict(translate(dict(weights), self.model))
            except (KeyError, IndexError, RuntimeError, AttributeError) as error:
                raise InputError(f"{path}: is not of timm:{self.name} ({error!r})") from error
        skipped = self.classifier + _PRETRAINING
        kept = {k: v for k, v in weights.items() if k in wanted or not k.startswith(skipped)}
        left_out += len(weights) - len(kept)
        missing = [key for key in wanted if key not in kept]
        extra = [key for key in kept if key not in wanted]
        if missing:
            raise InputError(
                f"{path}: lacks {len(missing)} of the {len(wanted)} entries of timm:{self.name}, the first is "
                f"{missing[0]}"
            )
        if extra:
            raise InputError(
                f"{path}: has {len(extra)} entries that timm:{self.name} has not, the first is {extra[0]}"
            )
        odd = [key for key, value in wanted.items() if kept[key].shape != value.shape]
        if odd:
            raise InputError(
                f"{path}: {odd[0]} is {tuple(kept[odd[0]].shape)}, that of timm:{self.name} "
                f"{tuple(wanted[odd[0]].shape)}"
            )
        self.model.load_state_dict(kept)
        return len(kept), left_out


def _weights_of(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file."""
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint {path} is cut off or damaged ({error})") from error
    return load_checkpoint(path)["state_dict"]


def _without_prefix(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The entries under the prefix that most of the wanted ones have, without it."""
    ends = (next(iter(wanted)), next(reversed(wanted)))
    prefixes = {key.removesuffix(end) for key in found for end in ends if key.endswith(f".{end}")}

    def hits(prefix: str) -> int:
        return sum(f"{prefix}{key}" in found for key in wanted)

    best = max(["", *sorted(prefixes)], key=hits)
    return {key.removeprefix(best): value for key, value in found.items() if key.startswith(best)}
