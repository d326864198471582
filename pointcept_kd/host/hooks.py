"""What a training loop does besides training: load, time, log, evaluate, save, test.

Hooks are called in the order of the config's list at every point. The evaluator stands before the saver, which reads
the metric that it leaves in `trainer.comm_info`.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import HOOKS, PROVIDER, TESTERS, comm, kd, pointcept_class, stand_in
from .checkpoint import (
    check_grids,
    copy_atomic,
    grids_of,
    load_checkpoint,
    load_into,
    rename_keys,
    save_atomic,
    unwrap,
    voxels_of,
)
from .errors import InputError
from .metrics import class_names, confusion, summary
from .runtime import to_device
from .solver import CosineScheduler, check_schedule


def progress(items: Iterable[Any], total: int, text: str) -> Any:
    """The items behind a progress bar on a terminal; the items as they are elsewhere."""
    if not (comm.is_main_process() and sys.stderr.isatty()):
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, desc=text, leave=False, dynamic_ncols=True)


_PointceptHook: Any = PROVIDER.hook_base


class HookBase(_PointceptHook):
    """The points of a run where a hook may act; `trainer` is set when it is registered."""

    trainer: Any = None

    def check(self) -> None:
        """Read and check inputs; called before the run writes anything."""

    def before_train(self) -> None:
        """Called once, before the first epoch."""

    def before_epoch(self) -> None:
        """Called before the first batch of an epoch."""

    def before_step(self) -> None:
        """Called before every batch."""

    def after_step(self) -> None:
        """Called after every batch."""

    def after_epoch(self) -> None:
        """Called after the last batch of an epoch."""

    def after_train(self) -> None:
        """Called once, after the last epoch."""


# Pointcept's own models are hooks of its kind.
_AnyHook = HookBase if _PointceptHook is object else _PointceptHook


@stand_in(HOOKS, kd.HOOKS, "CheckpointLoader")
class CheckpointLoader(HookBase, pointcept_class(HOOKS, "CheckpointLoader")):
    """Load `cfg.weight` into the model; with `cfg.resume` also the state of the run.

    Args:
        keywords, replacement: replace the first occurrence in every key, seen with a leading `module.`.
        strict: every key of file and model must meet.
        min_match: the smallest acceptable part of the model's keys.
    """

    def __init__(
        self,
        keywords: str = "",
        replacement: str | None = None,
        strict: bool = False,
        min_match: float = 0.5,
    ) -> None:
        self.keywords, self.replacement = keywords, replacement
        self.strict, self.min_match = strict, min_match
        self.lines: list[str] | None = None

    def check(self) -> None:
        """Load everything, so that a bad file stops the run before it has written anything."""
        cfg, self.lines = self.trainer.cfg, []
        weight, resume = cfg.get("weight"), cfg.get("resume", False)
        if weight is None:
            if resume:
                raise InputError(
                    "resume=True needs the run's last checkpoint: set weight=SAVE_PATH/model/model_last.pth"
                )
            self.lines.append("No weight given: the model starts as initialised")
            return
        checkpoint = load_checkpoint(weight)
        weights = rename_keys(checkpoint["state_dict"], self.keywords, self.replacement)
        check_grids(self.trainer.model, checkpoint, weight)
        report = load_into(
            self.trainer.model,
            weights,
            strict=self.strict or resume,
            min_match=self.min_match,
            source=weight,
        )
        self.lines.append(f"Weight {weight}: {report}")
        if resume:
            self._resume(checkpoint, weight)

    def _resume(self, checkpoint: Mapping[str, Any], path: str) -> None:
        trainer = self.trainer
        lacking = [k for k in ("epoch", "optimizer", "scheduler") if checkpoint.get(k) is None]
        if lacking:
            raise InputError(
                f"{path} cannot be resumed from, it has no {', '.join(lacking)}: use a model_last.pth, or resume=False"
            )
        check_schedule(checkpoint["scheduler"], trainer.scheduler)
        try:
            trainer.optimizer.load_state_dict(checkpoint["optimizer"])
            trainer.scheduler.load_state_dict(checkpoint["scheduler"])
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{path} belongs to another optimizer or other param_dicts ({error}): resume with the run's own config"
            ) from error
        if trainer.scaler is not None and checkpoint.get("scaler"):
            trainer.scaler.load_state_dict(checkpoint["scaler"])
        trainer.start_epoch = trainer.epoch = int(checkpoint["epoch"])
        trainer.best_metric_value = float(checkpoint.get("best_metric_value", -math.inf))
        self.lines.append(
            f"Resuming after epoch {trainer.start_epoch} of {trainer.max_epoch}, "
            f"best metric so far {trainer.best_metric_value:.4f}"
        )

    def before_train(self) -> None:
        if self.lines is None:
            self.check()
        for line in self.lines or []:
            self.trainer.logger.info(line)


@stand_in(HOOKS, kd.HOOKS, "ModelHook")
class ModelHook(HookBase, pointcept_class(HOOKS, "ModelHook")):
    """Pass every call on to the model where the model is a hook itself."""

    def _forward(self, point: str) -> None:
        model = unwrap(self.trainer.model)
        if isinstance(model, _AnyHook) and hasattr(model, point):  # Pointcept's have no `check`
            model.trainer = self.trainer
            getattr(model, point)()

    def check(self) -> None:
        self._forward("check")

    def before_train(self) -> None:
        self._forward("before_train")

    def before_epoch(self) -> None:
        self._forward("before_epoch")

    def before_step(self) -> None:
        self._forward("before_step")

    def after_step(self) -> None:
        self._forward("after_step")

    def after_epoch(self) -> None:
        self._forward("after_epoch")

    def after_train(self) -> None:
        self._forward("after_train")


@stand_in(HOOKS, kd.HOOKS, "IterationTimer")
class IterationTimer(HookBase, pointcept_class(HOOKS, "IterationTimer")):
    """Time of loading and of whole iterations, and from them the time that remains.

    Args:
        warmup_iter: first iterations of the run that the estimate leaves out.
    """

    def __init__(self, warmup_iter: int = 2) -> None:
        self.warmup_iter = warmup_iter
        self._mark = 0.0
        self._seen, self._spent, self._timed = 0, 0.0, 0

    def before_epoch(self) -> None:
        self._mark = time.perf_counter()

    def before_step(self) -> None:
        self.trainer.storage.put_scalar("data_time", time.perf_counter() - self._mark)

    def after_step(self) -> None:
        trainer = self.trainer
        spent = time.perf_counter() - self._mark
        self._mark += spent
        trainer.storage.put_scalar("batch_time", spent)
        self._seen += 1
        if self._seen > self.warmup_iter:
            self._spent, self._timed = self._spent + spent, self._timed + 1
        per_iter = self._spent / self._timed if self._timed else spent
        per_epoch = len(trainer.train_loader)
        left = (trainer.max_epoch - trainer.epoch) * per_epoch - trainer.comm_info["iter"] - 1
        data, batch = (trainer.storage.history(name) for name in ("data_time", "batch_time"))
        trainer.comm_info["iter_info"] += (
            f"Data {data.val:.3f} ({data.avg:.3f}) Batch {batch.val:.3f} ({batch.avg:.3f}) "
            f"Remain {timedelta(seconds=round(left * per_iter))} "
        )


@stand_in(HOOKS, kd.HOOKS, "InformationWriter")
class InformationWriter(HookBase, pointcept_class(HOOKS, "InformationWriter")):
    """Loss, its parts and the learning rate: as text lines, as scalars, and on a progress bar.

    Args:
        log_interval: iterations between two text lines; default `cfg.log_interval`. The last iteration of an epoch
            always has one.
    """

    def __init__(self, log_interval: int | None = None) -> None:
        self.log_interval = log_interval
        self.keys: list[str] = []
        self._bar: Any = None

    def before_train(self) -> None:
        if self.log_interval is None:
            self.log_interval = self.trainer.cfg.get("log_interval", 10)
        self.trainer.comm_info["iter_info"] = ""

    def before_epoch(self) -> None:
        self.keys = []
        if comm.is_main_process() and sys.stderr.isatty():
            from tqdm import tqdm

            trainer = self.trainer
            self._bar = tqdm(
                total=len(trainer.train_loader),
                desc=f"Epoch {trainer.epoch + 1}/{trainer.max_epoch}",
                leave=False,
                dynamic_ncols=True,
            )

    def before_step(self) -> None:
        trainer = self.trainer
        trainer.comm_info["iter_info"] = (
            f"Train: [{trainer.epoch + 1}/{trainer.max_epoch}]"
            f"[{trainer.comm_info['iter'] + 1}/{len(trainer.train_loader)}] "
        )

    def after_step(self) -> None:
        trainer = self.trainer
        outputs = trainer.comm_info["model_output_dict"]
        # One transfer for all values instead of one wait for the device per value.
        values = torch.stack([v.detach().float().reshape(()) for v in outputs.values()]).tolist()
        text = trainer.comm_info["iter_info"]
        for key, value in zip(outputs, values):
            if key not in self.keys:
                self.keys.append(key)
            trainer.storage.put_scalar(key, value)
            text += f"{key}: {value:.4f} "
        rate = trainer.optimizer.param_groups[0]["lr"]
        text += f"Lr: {rate:.4g}"
        iteration, count = trainer.comm_info["iter"] + 1, len(trainer.train_loader)
        if iteration % self.log_interval == 0 or iteration == count:
            if self._bar is not None:
                self._bar.clear()
            trainer.logger.info(text)
        trainer.comm_info["iter_info"] = ""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{values[list(outputs).index('loss')]:.4f}", refresh=False)
            self._bar.update()
        if trainer.writer is not None:
            step = trainer.epoch * count + iteration
            trainer.writer.add_scalar("params/lr", rate, step)
            for key, value in zip(outputs, values):
                trainer.writer.add_scalar(f"train_batch/{key}", value, step)

    def after_epoch(self) -> None:
        trainer = self.trainer
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        means = {key: trainer.storage.history(key).avg for key in self.keys}
        trainer.logger.info(
            f"Epoch {trainer.epoch + 1} mean: "
            + " ".join(f"{k}: {v:.4f}" for k, v in means.items())
        )
        if trainer.writer is not None:
            for key, value in means.items():
                trainer.writer.add_scalar(f"train/{key}", value, trainer.epoch + 1)


def compare(
    logits: torch.Tensor, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Predictions and labels of a batch, row by row, and where they were compared.

    With `inverse`, a voxel's prediction holds for every raw point in it, and raw labels are compared.
    """
    pred = logits.argmax(1)
    if "inverse" not in batch:
        return pred, batch["segment"], "at the rows the network saw"
    if "origin_segment" not in batch:
        raise InputError(
            "the batch has `inverse` but no `origin_segment`: Copy segment to origin_segment before GridSample, and "
            "Collect both"
        )
    return pred[batch["inverse"]], batch["origin_segment"], "at raw points through inverse"


def scan_losses(
    model: torch.nn.Module, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any]
) -> list[float]:
    """The loss of every scan of a batch, so that their mean does not depend on how scans were put into batches.

    Takes the model's (of a distiller, the student's) `criteria` for that; without such, every scan gets the batch's
    loss.
    """
    if "loss" not in outputs:
        return []
    ends = batch["offset"].tolist()
    criteria = getattr(getattr(model, "student", model), "criteria", None)
    logits, segment = outputs["seg_logits"], batch["segment"]
    if len(ends) == 1 or criteria is None or not len(logits) == len(segment) == ends[-1]:
        return [float(outputs["loss"])] * len(ends)
    bounds = pairwise([0, *ends])
    return [float(criteria(logits[a:b], segment[a:b])) for a, b in bounds]


@stand_in(HOOKS, kd.HOOKS, "SemSegEvaluator")
class SemSegEvaluator(HookBase, pointcept_class(HOOKS, "SemSegEvaluator")):
    """Mean IoU on the validation set after every epoch, for any batch size and number of processes.

    Leaves the mean over all classes (absent = 0, the host's number) as the metric for the saver, and logs the mean over
    present classes beside it. The loss is the mean over scans.

    Args:
        write_cls_iou: also write one scalar per class.
    """

    def __init__(self, write_cls_iou: bool = False) -> None:
        self.write_cls_iou = write_cls_iou

    def after_epoch(self) -> None:
        if self.trainer.cfg.get("evaluate", True):
            self.eval()

    @torch.no_grad()
    def eval(self) -> None:
        """Evaluate now."""
        trainer = self.trainer
        data, loader = trainer.cfg["data"], trainer.val_loader
        classes, ignore = data["num_classes"], data.get("ignore_index", -1)
        names = class_names(data)
        model = unwrap(trainer.model)  # no wrapper: processes may have different numbers of batches
        comm.share_buffers(model)
        model.eval()
        trainer.logger.info(">>>>>>>>>>>>>>>> Start Evaluation >>>>>>>>>>>>>>>>")
        total = torch.zeros(classes, classes, dtype=torch.int64)
        losses: list[float] = []
        compared = ""
        for batch in progress(loader, len(loader), "Evaluation"):
            batch = to_device(batch, trainer.device)
            outputs = model(batch)
            pred, target, compared = compare(outputs["seg_logits"], batch)
            total += confusion(pred, target, classes, ignore).cpu()
            losses += scan_losses(model, outputs, batch)
        gathered = comm.all_gather((total, losses))
        total = torch.stack([part[0] for part in gathered]).sum(0)
        losses = [loss for part in gathered for loss in part[1]]
        loss = math.fsum(losses) / max(1, len(losses))  # exact, so no order of adding shows
        scores = summary(total)
        trainer.logger.info(
            f"Val result: mIoU/mAcc/allAcc {scores.headline} ({scores.protocol(compared)}); loss {loss:.4f}"
        )
        for i, name in enumerate(names):
            absent = "" if scores.present[i] else " (absent)"
            trainer.logger.info(
                f"Class_{i}-{name} Result: iou/accuracy {scores.iou[i]:.4f}/{scores.acc[i]:.4f}{absent}"
            )
        if trainer.writer is not None:
            step = trainer.epoch + 1
            values = {
                "loss": loss,
                "mIoU": scores.miou,
                "mAcc": scores.macc,
                "allAcc": scores.all_acc,
            }
            for key, value in {**values, "mIoU_present": scores.miou_present}.items():
                trainer.writer.add_scalar(f"val/{key}", value, step)
            if self.write_cls_iou:
                for i, name in enumerate(names):
                    trainer.writer.add_scalar(f"val/cls_{i}-{name} IoU", scores.iou[i], step)
        trainer.logger.info("<<<<<<<<<<<<<<<<< End Evaluation <<<<<<<<<<<<<<<<<")
        trainer.comm_info["current_metric_value"] = scores.miou
        trainer.comm_info["current_metric_name"] = "mIoU"


@stand_in(HOOKS, kd.HOOKS, "CheckpointSaver")
class CheckpointSaver(HookBase, pointcept_class(HOOKS, "CheckpointSaver")):
    """Save the run after every epoch: `model_last.pth`, `model_best.pth`, `epoch_N.pth`.

    A distiller's student is written beside them, with plain keys, as `student_last.pth` and `student_best.pth`.

    Args:
        save_freq: epochs between two numbered files; None writes none.
    """

    def __init__(self, save_freq: int | None = None) -> None:
        self.save_freq = save_freq

    def after_epoch(self) -> None:
        if not comm.is_main_process():
            return
        trainer, best = self.trainer, False
        if trainer.cfg.get("evaluate", True):
            best = self._improved()
        model = unwrap(trainer.model)
        epoch = trainer.epoch + 1
        state = {
            "epoch": epoch,
            "state_dict": model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
            "best_metric_value": float(trainer.best_metric_value),
        }
        if grids := grids_of(model):
            state["grids"] = grids
        cells = voxels_of(trainer.cfg)
        if cells is not None:
            state["voxels"] = cells
        folder = Path(trainer.cfg["save_path"]) / "model"
        numbered = self.save_freq and epoch % self.save_freq == 0
        if hasattr(model, "export_state_dict"):
            student = {"epoch": epoch, "state_dict": model.export_state_dict()}
            if grids := grids_of(model):
                inside = ((path.partition("student."), grid) for path, grid in grids.items())
                student["grids"] = {rest: grid for (_, found, rest), grid in inside if found}
            if cells is not None:
                student["voxels"] = cells
            self._write(student, folder, ["student_best.pth"] * best + ["student_last.pth"])
        # The last file comes last: it is what a killed run goes on from, and going on writes the others again.
        names = ["model_best.pth"] * best + [f"epoch_{epoch}.pth"] * bool(numbered)
        self._write(state, folder, [*names, "model_last.pth"])
        trainer.logger.info(f"Saved {', '.join([*names, 'model_last.pth'])} to {folder}")

    def _improved(self) -> bool:
        trainer = self.trainer
        value = trainer.comm_info.get("current_metric_value")
        if value is None:
            trainer.logger.warning(
                "No evaluator stands before CheckpointSaver in hooks: no model_best.pth is written"
            )
            return False
        name = trainer.comm_info.get("current_metric_name", "metric")
        value = float(value)  # of Pointcept's evaluator, a numpy number
        improved = value > trainer.best_metric_value
        if improved:
            trainer.best_metric_value = value
            trainer.logger.info(f"Best validation {name} updated to: {value:.4f}")
        trainer.logger.info(f"Currently Best {name}: {trainer.best_metric_value:.4f}")
        return improved

    @staticmethod
    def _write(state: Mapping[str, Any], folder: Path, names: list[str]) -> None:
        save_atomic(state, folder / names[0])
        for name in names[1:]:
            copy_atomic(folder / names[0], folder / name)


@stand_in(HOOKS, kd.HOOKS, "PreciseEvaluator")
class PreciseEvaluator(HookBase, pointcept_class(HOOKS, "PreciseEvaluator")):
    """Run the tester of `cfg.test` after training, on the best checkpoint.

    Args:
        test_last: test the model as training left it.
    """

    def __init__(self, test_last: bool = False) -> None:
        self.test_last = test_last

    def after_train(self) -> None:
        trainer = self.trainer
        trainer.logger.info(">>>>>>>>>>>>>>>> Start Precise Evaluation >>>>>>>>>>>>>>>>")
        best = Path(trainer.cfg["save_path"]) / "model" / "model_best.pth"
        comm.synchronize()
        if not self.test_last and best.is_file():
            checkpoint = load_checkpoint(best)
            load_into(trainer.model, checkpoint["state_dict"], strict=True, source=best)
            trainer.logger.info(f"Testing {best} of epoch {checkpoint.get('epoch')}")
        elif not self.test_last:
            trainer.logger.info(f"There is no {best}: testing the model of the last epoch")
        comm.share_buffers(unwrap(trainer.model))
        settings = {"type": "SemSegTester", **trainer.cfg.get("test", {})}
        TESTERS.build({**settings, "cfg": trainer.cfg, "model": unwrap(trainer.model)}).test()


@stand_in(HOOKS, kd.HOOKS, "GarbageHandler")
class GarbageHandler(HookBase, pointcept_class(HOOKS, "GarbageHandler")):
    """Collect Python's garbage at fixed intervals instead of whenever it strikes.

    Args:
        interval: iterations between two collections.
        disable_auto: switch automatic collection off during training.
        empty_cache: also hand unused CUDA memory back.
    """

    def __init__(
        self, interval: int = 150, disable_auto: bool = True, empty_cache: bool = False
    ) -> None:
        self.interval, self.disable_auto, self.empty_cache = interval, disable_auto, empty_cache
        self._steps = 0

    def before_train(self) -> None:
        if self.disable_auto:
            gc.disable()

    def before_epoch(self) -> None:
        self._collect()

    def after_step(self) -> None:
        self._steps += 1
        if self._steps % self.interval == 0:
            self._collect()

    def after_train(self) -> None:
        gc.enable()
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.empty_cache and self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()


@stand_in(HOOKS, kd.HOOKS, "WeightDecaySchedular")  # the host spells it so
class WeightDecayScheduler(HookBase, pointcept_class(HOOKS, "WeightDecaySchedular")):
    """Move the weight decay along half a cosine over the run.

    Groups whose weight decay is 0 keep it.
    """

    def __init__(self, base_value: float = 0.04, final_value: float = 0.2) -> None:
        self.base_value, self.final_value = base_value, final_value

    def before_step(self) -> None:
        trainer = self.trainer
        count = len(trainer.train_loader)
        done = trainer.epoch * count + trainer.comm_info["iter"]
        schedule = CosineScheduler(self.base_value, self.final_value, count * trainer.max_epoch)
        value = schedule.get(done)
        for group in trainer.optimizer.param_groups:
            if group["weight_decay"] != 0:
                group["weight_decay"] = value
        if trainer.writer is not None:
            trainer.writer.add_scalar("params/wd", value, done + 1)


def attach(hooks: Iterable[HookBase], trainer: Any) -> list[HookBase]:
    """Set the trainer of each hook, weakly: a hook must not keep a finished trainer alive."""
    hooks = list(hooks)
    for hook in hooks:
        hook.trainer = weakref.proxy(trainer)
    return hooks
