"""Completion scores where they are needed: after every epoch of a training, and of two folders of clouds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pointcept_kd.host import InputError, comm, kd
from pointcept_kd.host.checkpoint import unwrap
from pointcept_kd.host.hooks import HookBase, progress
from pointcept_kd.host.runtime import to_device

from .metrics import CELLS, CompletionScores

# Scores of which less is better.
_DISTANCES = ("cd", "dist_pred2gt", "dist_gt2pred", "jsd_3d", "jsd_bev", "emd")


def _split(points: Any, ends: Any, key: str, ends_key: str) -> list[NDArray]:
    """One (n, 3) array per scan."""
    ends = [int(end) for end in ends]
    points = points.detach().float().cpu().numpy() if torch.is_tensor(points) else points
    if sorted(ends) != ends or not ends or ends[0] < 0 or ends[-1] != len(points):
        raise InputError(
            f"{ends_key}={ends} does not cut the {len(points)} rows of {key}: expected the end of every scan"
        )
    return [points[a:b] for a, b in pairwise([0, *ends])]


def scored_clouds(
    outputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> Iterator[tuple[str, NDArray, NDArray]]:
    """Name, completed cloud (n, 3) and true cloud (m, 3) of every scan of a batch.

    Args:
        outputs: of the model in evaluation: `completed` (n, 3) metres with `completed_offset` (b,).
        batch: `target` (m, 3) metres with `target_offset` (b,), or `complete` with `complete_offset` where there is no
            `target`; `name`, one per scan.

    Raises:
        InputError: for missing keys, offsets that do not cut their rows, or other numbers of scans.
    """
    true = "target" if "target" in batch else "complete"
    needed = (
        (outputs, "the model's output in evaluation", ("completed", "completed_offset")),
        (batch, "the batch", (true, f"{true}_offset", "name")),
    )
    for source, what, keys in needed:
        missing = [key for key in keys if key not in source]
        if missing:
            hint = " (or `target`)" if "complete" in missing else ""
            raise InputError(
                f"{what} has no {', '.join(f'`{key}`' for key in missing)}{hint}, only {', '.join(map(str, source))}; "
                "scores of completions need it"
            )
    names = [batch["name"]] if isinstance(batch["name"], str) else list(batch["name"])
    pred = _split(
        outputs["completed"], outputs["completed_offset"], "completed", "completed_offset"
    )
    gt = _split(batch[true], batch[f"{true}_offset"], true, f"{true}_offset")
    if not len(names) == len(pred) == len(gt):
        raise InputError(
            f"{len(names)} names meet {len(pred)} completed scans and {len(gt)} scans of `{true}`"
        )
    yield from zip(names, pred, gt)


@kd.HOOKS.register_module()
class CompletionEvaluator(HookBase):
    """Chamfer distance, Jensen-Shannon distances and IoU on the validation set after every epoch.

    Any batch size and number of processes give the same scores. Leaves one score as the metric for the saver, negated
    where less is better. What the model and the batch must hold is said at `scored_clouds`.

    Args:
        metric: name of that score in `Summary.values`: `cd`, `jsd_bev`, `jsd_3d`, `f`, `iou_0.5`, ...
        cells: sides of the IoU's cells, metres.
        legacy: also the IoU of older papers.
        emd_points: points of the earth mover's distance; 0 leaves it out.

    Raises:
        InputError: for a metric that these settings do not give.
    """

    def __init__(
        self,
        metric: str = "cd",
        cells: Sequence[float] = CELLS,
        legacy: bool = False,
        emd_points: int = 0,
    ) -> None:
        self.settings: dict[str, Any] = dict(
            cells=tuple(cells), legacy=legacy, emd_points=emd_points
        )
        self.metric = metric
        one_point = np.zeros((1, 3))
        trial = CompletionScores(**self.settings)
        trial.add("trial", one_point, one_point)
        known = list(trial.summary().values())
        if metric not in known:
            raise InputError(
                f"CompletionEvaluator: metric={metric!r} is none of {', '.join(known)}"
            )

    def after_epoch(self) -> None:
        if self.trainer.cfg.get("evaluate", True):
            self.eval()

    @torch.no_grad()
    def eval(self) -> CompletionScores:
        """Evaluate now; returns the scores of all processes."""
        trainer, loader = self.trainer, self.trainer.val_loader
        model = unwrap(trainer.model)  # no wrapper: processes may have different numbers of batches
        comm.share_buffers(model)
        model.eval()
        trainer.logger.info(">>>>>>>>>>>>>>>> Start Evaluation >>>>>>>>>>>>>>>>")
        scores = CompletionScores(**self.settings)
        for batch in progress(loader, len(loader), "Evaluation"):
            batch = to_device(batch, trainer.device)
            for name, pred, gt in scored_clouds(model(batch), batch):
                scores.add(name, pred, gt)
        scores = scores.gathered()
        summary = scores.summary()
        values = summary.values()
        trainer.logger.info(f"Val result: {summary.headline} ({summary.scans} scans)")
        trainer.logger.info(
            ", ".join(f"{key} {value:.4f}" for key, value in values.items())
            + f"; CD {summary.std['cd']:.4f} m std over scans"
        )
        if summary.empty:
            trainer.logger.warning(
                f"{summary.empty} of {summary.scans} completions have no points: mean distances are infinite"
            )
        if trainer.writer is not None:
            for key, value in values.items():
                trainer.writer.add_scalar(f"val/{key}", value, trainer.epoch + 1)
        trainer.logger.info("<<<<<<<<<<<<<<<<< End Evaluation <<<<<<<<<<<<<<<<<")
        less = self.metric in _DISTANCES
        trainer.comm_info["current_metric_value"] = (-1 if less else 1) * values[self.metric]
        trainer.comm_info["current_metric_name"] = ("-" if less else "") + self.metric
        return scores


# --- folders --------------------------------------------------------------------------------------

Reader = Callable[[Path], NDArray]


def _read_npy(path: Path) -> NDArray:
    return np.load(path, allow_pickle=False)


def _read_bin(path: Path) -> NDArray:
    values = np.fromfile(path, dtype="<f4")
    if len(values) % 4:
        raise ValueError(f"{len(values)} numbers are no rows of x, y, z, remission")
    return values.reshape(-1, 4)


READERS: dict[str, Reader] = {".npy": _read_npy, ".bin": _read_bin}


def _clouds(folder: str | os.PathLike[str], readers: Mapping[str, Reader]) -> dict[str, Path]:
    """The readable files of a folder by stem."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in readers or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(
                f"{path} and {found[path.stem]} are two files for one scan: remove one"
            )
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder} holds no {', '.join(sorted(readers))} file")
    return found


def _read(path: Path, readers: Mapping[str, Reader]) -> NDArray:
    try:
        cloud = np.asarray(readers[path.suffix.lower()](path))
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable cloud ({error}); copy it again") from error
    if cloud.ndim != 2 or cloud.shape[1] < 3:
        raise InputError(f"{path}: expected (n, 3) or more columns, got {cloud.shape}")
    return cloud[:, :3]


def evaluate_folder(
    predictions: str | os.PathLike[str],
    targets: str | os.PathLike[str],
    readers: Mapping[str, Reader] | None = None,
    scores: CompletionScores | None = None,
    subset: bool = False,
) -> CompletionScores:
    """Score a folder of completed clouds against one of true clouds, paired by file name without suffix.

    Several processes may call it together; each reads its share and all get the scores of all.

    Args:
        predictions, targets: folders of `.npy` (n, 3 or more), of `.bin` (float32 x, y, z, remission), and of what
            `readers` adds; metres in the sensor's frame.
        readers: from a suffix such as `.ply` to a function that reads such a file as (n, 3 or more).
        scores: settings to use, and scans to start from; by default those of `CompletionScores()`.
        subset: accept targets without a prediction, and leave them out.

    Raises:
        InputError: for files that lack their partner or cannot be read, and for clouds that cannot be scored.
    """
    readers = {**READERS, **(readers or {})}
    pred, gt = _clouds(predictions, readers), _clouds(targets, readers)
    alone = sorted(set(pred) - set(gt)), sorted(set(gt) - set(pred))
    if alone[0]:
        raise InputError(
            f"{len(alone[0])} of {len(pred)} predictions have no target in {targets}, the first is {alone[0][0]}"
        )
    if alone[1] and not subset:
        raise InputError(
            f"{len(alone[1])} of {len(gt)} targets have no prediction in {predictions}, the first is {alone[1][0]}; "
            "complete them, or ask for the subset alone"
        )
    start = CompletionScores() if scores is None else scores
    own = CompletionScores(*start.settings)
    for stem in sorted(pred)[comm.get_rank() :: comm.get_world_size()]:
        own.add(stem, _read(pred[stem], readers), _read(gt[stem], readers))
    joined = own.gathered()
    joined.rows = [*start.rows, *joined.rows]
    return joined
