"""Start a segmentor from the backbone of another training: all of it or none, on the same voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import kd
from .checkpoint import (
    check_grids,
    clean_state_dict,
    load_checkpoint,
    student_weights,
    unwrap,
    voxels_of,
)
from .errors import InputError
from .hooks import CheckpointLoader

VOXEL_KEYS = ("voxel_size", "degrees", "coordinates")


def check_voxels(
    trained: Mapping[str, Any] | None,
    given: Mapping[str, Any] | None,
    source: str | Path = "the checkpoint",
) -> None:
    """Refuse weights that were trained on other voxels than those of the data; where one side names none, they pass.

    Weights fit any voxels and are of use on one kind alone.

    Args:
        trained: `voxel_size`, `degrees` and `coordinates` of the checkpoint; the second matters for cylindrical ones.
        given: those of the data.

    Raises:
        InputError: naming both.
    """
    if not trained or not given:
        return
    round_about = "cylindrical" in (trained.get("coordinates"), given.get("coordinates"))
    differ = [
        f"{key}={trained.get(key)!r} (here {given.get(key)!r})"
        for key in VOXEL_KEYS
        if trained.get(key) != given.get(key) and (key != "degrees" or round_about)
    ]
    if differ:
        raise InputError(
            f"{source} was trained on other voxels: {', '.join(differ)}; set that in kd.VoxelSample of all splits"
        )


def load_backbone(
    backbone: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str = "",
    skip: Sequence[str] = ("final", "final_class_level"),
    source: str | Path = "the checkpoint",
) -> tuple[list[str], list[str]]:
    """Load every weight of a backbone but those of its heads; nothing is loaded when an error is raised.

    Args:
        state_dict: of the network itself, or of a distiller whose student it is.
        prefix: what the network's keys begin with there, that of a student aside.
        skip: modules of either side that are left out: heads.
        source: the file, for messages.

    Returns: names that were loaded, and names of the file that were not.

    Raises:
        InputError: for a weight that is missing, of another shape, or has no place here; the lists are in the text.
    """
    weights = student_weights(state_dict)
    weights = clean_state_dict(weights, prefix.removeprefix("student."))
    own = {k: v for k, v in backbone.state_dict().items() if k.partition(".")[0] not in skip}
    skipped = [key for key in weights if key.partition(".")[0] in skip]
    given = {key: value for key, value in weights.items() if key not in skipped}
    shapes = {
        key: (tuple(value.shape) if isinstance(value, Tensor) else None)
        for key, value in given.items()
    }
    missing = [key for key in own if key not in given]
    other = [key for key in own if key in given and shapes[key] != tuple(own[key].shape)]
    unplaced = [key for key in given if key not in own]
    if missing or other or unplaced or not own:
        parts = [
            f"{len(keys)} {name} ({', '.join(keys[:5])}{', ...' * (len(keys) > 5)})"
            for name, keys in (
                ("missing in the file", missing),
                ("of another shape", other),
                ("without a place in the backbone", unplaced),
            )
            if keys
        ]
        raise InputError(
            f"{source} does not hold this backbone: of its {len(own)} weights {'; '.join(parts) or 'none is loaded'}; "
            "use the network it was trained with, and prefix= or skip= of kd.PretrainedBackbone for keys of other names"
        )
    backbone.load_state_dict({key: given[key] for key in own}, strict=False)
    return list(own), skipped


@kd.HOOKS.register_module()
class PretrainedBackbone(CheckpointLoader):
    """`CheckpointLoader` for the start of fine-tuning: `cfg.weight` is a checkpoint of pre-training.

    All of its backbone goes into the model's, its heads are left out; the rest of the model starts as initialised. A
    run that is resumed loads its own checkpoint, as by `CheckpointLoader`.

    Args:
        prefix: what the keys of the backbone begin with in the file, `student.` aside, which is dropped anyway:
            "backbone." for one of `kd.VoxelEmbedding`.
        into: the model's module that takes them.
        skip: modules of the backbone that are left out: heads.
        required: refuse to start from random weights.

    Raises:
        InputError: for a backbone that is not loaded as a whole, and one that was trained on other voxels.
    """

    def __init__(
        self,
        prefix: str = "student.",
        into: str = "backbone",
        skip: Sequence[str] = ("final", "final_class_level"),
        required: bool = False,
    ) -> None:
        super().__init__()
        self.prefix, self.into, self.skip, self.required = prefix, into, tuple(skip), required

    def check(self) -> None:
        """Load everything, so that a bad file stops the run before it has written anything."""
        cfg = self.trainer.cfg
        weight, resume = cfg.get("weight"), cfg.get("resume", False)
        if resume or weight is None:
            if self.required and not resume:
                raise InputError(
                    "this run starts from a pre-trained backbone: give its checkpoint by --options weight=FILE"
                )
            super().check()
            return
        model = unwrap(self.trainer.model)
        try:
            backbone = model.get_submodule(self.into)
        except AttributeError as error:
            raise InputError(
                f"into={self.into!r}: the model has no such module but "
                f"{', '.join(name for name, _ in model.named_children())}"
            ) from error
        checkpoint = load_checkpoint(weight)
        check_voxels(checkpoint.get("voxels"), voxels_of(cfg), weight)
        prefix = self.prefix.removeprefix("student.")
        grids = {
            f"{path}.".removeprefix("student.").removeprefix(prefix).removesuffix("."): grid
            for path, grid in (checkpoint.get("grids") or {}).items()
        }
        check_grids(backbone, {"grids": grids}, weight)
        loaded, skipped = load_backbone(
            backbone, checkpoint["state_dict"], self.prefix, self.skip, weight
        )
        self.lines = [
            f"Pre-trained {weight}: {len(loaded)} of {len(loaded)} weights of {self.into} loaded: {', '.join(loaded)}",
            f"Left out: {', '.join(skipped) or 'nothing'}",
        ]
