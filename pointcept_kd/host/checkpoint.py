"""Checkpoints: written whole or not at all, read without running foreign code, matched with a report.

A file holds `epoch`, `state_dict`, `optimizer`, `scheduler`, `scaler` and `best_metric_value`, as Pointcept's do, and
`grids`, where the network cuts points into cells by a grid of its own. It is written to a temporary name first, so a
run that is killed while saving leaves the previous file as it was.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from pointcept_kd.ops.grid import Partition

from .errors import InputError

# Where other projects keep their weights in a checkpoint.
_WEIGHT_KEYS = ("state_dict", "model_state", "model_state_dict", "model", "network")


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, force it to the disk, then rename it to `path`.

    Args:
        write: gets the open binary file.

    Raises:
        InputError: where the file system refuses (no space, no folder, no permission).
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {path}: {error.strerror or error}; free space there or choose another save_path"
            ) from error
        raise


def save_atomic(obj: Any, path: str | Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one."""
    write_atomic(path, lambda file: torch.save(obj, file))


def copy_atomic(source: str | Path, path: str | Path) -> None:
    """Copy a file so that `path` holds either its old content or all of `source`."""
    with open(source, "rb") as opened:
        write_atomic(path, lambda file: shutil.copyfileobj(opened, file, 1 << 22))


def _numpy_scalars() -> list[Any]:
    """What Pointcept's `best_metric_value`, a numpy scalar, needs to be unpickled; nothing here can run code."""
    module = getattr(np, "_core", None) or np.core
    scalar = module.multiarray.scalar
    allowed: list[Any] = [np.dtype, type(np.dtype("float64")), type(np.dtype("float32")), scalar]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
        # numpy 1 and numpy 2 write the same function under different module names.
        names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
        allowed += [(scalar, name) for name in names]
    return allowed


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it.

    Returns:
        the file's dict; its weights are under `state_dict`, also where the file is a bare state dict.

    Raises:
        InputError: for a missing, truncated or foreign file, and for one that needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {path} {what}: give the path of a .pth file in weight=")
    torch.serialization.add_safe_globals(_numpy_scalars())
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        if first:
            raise InputError(
                f"checkpoint {path} holds objects that only running its code could read ({first[:160]}): "
                "save its state_dict alone and give that file"
            ) from error
        raise InputError(
            f"checkpoint {path} is damaged ({_brief(error)}): copy or train it again"
        ) from error
    except (
        Exception
    ) as error:  # a damaged archive fails in many ways, by chance of where it was cut
        raise InputError(
            f"checkpoint {path} is cut off or damaged ({_brief(error)}): copy or train it again"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dict with state_dict"
        )
    content = dict(content)
    if isinstance(content.get("state_dict"), Mapping):
        return content
    for key in _WEIGHT_KEYS[1:]:
        if isinstance(content.get(key), Mapping):
            return {**content, "state_dict": content.pop(key)}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {"state_dict": content}
    raise InputError(
        f"checkpoint {path} has no weights: expected one of {', '.join(_WEIGHT_KEYS)}, found {sorted(content)[:8]}"
    )


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:120] if lines else "") or type(error).__name__


def clean_state_dict(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Drop the `module.` of distributed training; with `prefix`, keep that part alone, under bare names.

    `prefix="student."` turns a distiller's weights into its student's.

    Raises:
        InputError: where no key has the prefix.
    """
    plain = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if not prefix:
        return plain
    part = {key[len(prefix) :]: value for key, value in plain.items() if key.startswith(prefix)}
    if not part:
        tops = sorted({key.partition(".")[0] for key in plain})
        raise InputError(
            f"no weight starts with {prefix!r}: the checkpoint has {', '.join(tops[:8])}"
        )
    return part


def rename_keys(
    state_dict: Mapping[str, Any], keywords: str, replacement: str | None
) -> dict[str, Any]:
    """Replace the first occurrence of `keywords` in every key, seen with its leading `module.`.

    `keywords="module.student.", replacement="module."` makes a student's weights a plain network's.
    """
    renamed = {}
    for key, value in state_dict.items():
        key = key if key.startswith("module.") else f"module.{key}"
        if keywords and replacement is not None:
            key = key.replace(keywords, replacement, 1)
        renamed[key.removeprefix("module.")] = value
    return renamed


def student_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the plain network: those of the student where a distiller wrote the file."""
    plain = clean_state_dict(state_dict)
    distilled = any(key.startswith("student.") for key in plain)
    return clean_state_dict(plain, "student.") if distilled else plain


def plain_grid(grid: Partition) -> dict[str, Any]:
    """A grid as plain lists, numbers and names."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(grid).items()}


def grids_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The grids by which modules of a network cut points into cells, by module path; plain values.

    Weights fit any grid and are of use on one alone, so files carry it: their `grids`.
    """
    return {
        path: plain_grid(module.partition)
        for path, module in unwrap(model).named_modules()
        if isinstance(getattr(module, "partition", None), Partition)
    }


def voxels_of(cfg: Any) -> dict[str, Any] | None:
    """Cells into which the training set's transforms sort points: the arguments of `kd.VoxelSample`; None without it.

    Weights fit any cells and are of use on such alone, so files carry them: their `voxels`.
    """
    transforms = (cfg["data"].get("train") or {}).get("transform") or ()
    for entry in transforms:
        if str(entry.get("type", "")).removeprefix("kd.") == "VoxelSample":
            defaults = {"voxel_size": 0.1, "degrees": 1.0, "coordinates": "cylindrical"}
            return {key: entry.get(key, default) for key, default in defaults.items()}
    return None


def check_grids(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str | Path = "the checkpoint"
) -> None:
    """Refuse weights that were trained on another grid than the network's; files that name none pass.

    Args:
        checkpoint: of the network itself, or of a distiller whose student it is.

    Raises:
        InputError: naming both.
    """
    known = checkpoint.get("grids") or {}
    for path, grid in grids_of(model).items():
        trained = known.get(path, known.get(f"student.{path}"))
        if trained is None or trained == grid:
            continue
        differ = ", ".join(
            f"{key}={trained.get(key)!r} (here {value!r})"
            for key, value in grid.items()
            if trained.get(key) != value
        )
        raise InputError(
            f"{source} was trained on another grid at {path}: {differ}; set that as partition in the config"
        )


@dataclass(frozen=True)
class MatchReport:
    """How the keys of a checkpoint and of a model met."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The part of the model's keys that the checkpoint filled, 0 to 1."""
        wanted = len(self.matched) + len(self.missing) + len(self.mismatched)
        return len(self.matched) / wanted if wanted else 1.0

    def __str__(self) -> str:
        wanted = len(self.matched) + len(self.missing) + len(self.mismatched)
        text = f"{len(self.matched)} of {wanted} weights loaded"
        for name, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            text += f"; {len(keys)} {name}" + (f" ({_first(keys)})" if keys else "")
        return text


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside a distributed wrapper."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = False,
    min_match: float = 0.5,
    source: str | Path = "the checkpoint",
) -> MatchReport:
    """Load weights by name and say what met what; nothing is loaded when an error is raised.

    Args:
        strict: every key of both sides must meet.
        min_match: the smallest acceptable part of the model's keys.
        source: the file, for messages.

    Raises:
        InputError: for keys of other shapes, too few matches, or with `strict` any missing or unexpected key.
    """
    model = unwrap(model)
    given = clean_state_dict(state_dict)
    wanted = model.state_dict()
    report = MatchReport()
    for key, value in wanted.items():
        if key not in given:
            report.missing.append(key)
        elif getattr(given[key], "shape", None) != getattr(value, "shape", None):
            shapes = tuple(tuple(getattr(v, "shape", ())) for v in (given[key], value))
            report.mismatched.append((key, *shapes))
        else:
            report.matched.append(key)
    report.unexpected.extend(key for key in given if key not in wanted)
    if report.mismatched:
        shown = "; ".join(
            f"{k} is {a} in the file, {b} in the model" for k, a, b in report.mismatched[:3]
        )
        raise InputError(
            f"{source} is a checkpoint of another width: {len(report.mismatched)} of {len(wanted)} weights have "
            f"other shapes ({shown}); use the config it was trained with"
        )
    if report.share < min_match:
        raise InputError(
            f"{source} matches only {len(report.matched)} of {len(wanted)} weights (at least {min_match:.0%} asked): "
            f"the model wants {_first(report.missing)}; the file has {_first(list(given))}; "
            "use keywords/replacement of CheckpointLoader, or the checkpoint of this model"
        )
    if strict and (report.missing or report.unexpected):
        raise InputError(
            f"{source} does not match the model exactly: missing {_first(report.missing) or 'none'}; "
            f"unexpected {_first(report.unexpected) or 'none'}"
        )
    model.load_state_dict({key: given[key] for key in report.matched}, strict=False)
    return report
