"""The training loop: epochs, device, mixed precision, accumulation, exact resumption.

At the start of every epoch all random state is derived anew from (seed, epoch, rank), and every sample from (seed,
epoch, position), so a run that was killed and resumed continues as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Registered by being imported: the tester that PreciseEvaluator builds, and a hook.
from . import (  # noqa: F401
    DATASETS,
    HOOKS,
    MODELS,
    PROVIDER,
    TRAINERS,
    comm,
    kd,
    pointcept_class,
    pretrained,
    stand_in,
    tester,
)
from .batches import EpochBatchSampler, build_loader, seed_process
from .checkpoint import unwrap
from .config import default_setup
from .errors import InputError
from .hooks import HookBase, attach
from .joint import joint_batch
from .loader import collate_fn, point_collate_fn
from .log import Writer, get_root_logger, wandb_run
from .runtime import (
    amp_dtype,
    autocast,
    complete,
    device_of,
    require,
    return_freed_memory,
    to_device,
)
from .solver import build_optimizer, build_scheduler
from .sync_bn import sync_batch_norm

__all__ = ["EventStorage", "Trainer", "TrainerBase", "device_of"]


class _History:
    """Last value, mean and sum of one quantity since the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val: Any = 0.0
        self.total: Any = 0.0
        self.count = 0

    def update(self, value: Any) -> None:
        """Add a number or an array."""
        self.val, self.total, self.count = value, self.total + value, self.count + 1

    @property
    def avg(self) -> Any:
        """The mean; 0 without values."""
        return self.total / self.count if self.count else 0.0


class EventStorage:
    """Named quantities of the running epoch."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def put_scalar(self, name: str, value: Any) -> None:
        """Add a number, a one-element tensor or, as Pointcept's evaluators do, an array under a name."""
        if isinstance(value, Tensor):
            value = value.item()
        elif not (isinstance(value, np.ndarray) and value.ndim):
            value = float(value)
        self._histories.setdefault(name, _History()).update(value)

    def history(self, name: str) -> _History:
        """`val`, `avg` and `total` of a name; KeyError for one that was not put."""
        return self._histories[name]

    def reset_histories(self) -> None:
        """Start a new epoch."""
        self._histories.clear()


class TrainerBase(pointcept_class(TRAINERS, "DefaultTrainer")):
    """Hooks around epochs around steps; what a step does is the subclass's.

    On Pointcept it is a trainer of Pointcept's, of which it replaces the parts: nothing of theirs moves data to CUDA
    unasked.
    """

    def __init__(self) -> None:
        self.hooks: list[HookBase] = []
        self.epoch = self.start_epoch = self.max_epoch = 0
        self.comm_info: dict[str, Any] = {}
        self.storage = EventStorage()
        self.writer: Any = None

    def register_hooks(self, entries: list[Any]) -> None:
        """Build hooks from their configs and attach them, in order."""
        self.hooks = attach((HOOKS.build(entry) for entry in entries), self)

    def call_hooks(self, point: str) -> None:
        """Call one point of every hook, in order."""
        for hook in self.hooks:
            getattr(hook, point)()

    def before_train(self) -> None:
        self.call_hooks("before_train")

    def before_epoch(self) -> None:
        self.call_hooks("before_epoch")

    def before_step(self) -> None:
        self.call_hooks("before_step")

    def run_step(self) -> None:
        """Train on `comm_info["input_dict"]`."""
        raise TypeError(f"{type(self).__name__} defines no run_step")

    def after_step(self) -> None:
        self.call_hooks("after_step")

    def after_epoch(self) -> None:
        self.call_hooks("after_epoch")
        self.storage.reset_histories()

    def after_train(self) -> None:
        comm.synchronize()
        self.call_hooks("after_train")


@kd.TRAINERS.register_module("Trainer")
@stand_in(TRAINERS, kd.TRAINERS, "DefaultTrainer")
class Trainer(TrainerBase):
    """Train `cfg.model` on `cfg.data.train`.

    Everything is built, and the checkpoint read, before the first file is written; so a run that cannot start leaves
    nothing behind.

    Args:
        cfg: a `Config` (missing runtime keys get their defaults).

    Raises:
        InputError: for anything in config, data or weights that cannot be used.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = complete(cfg)
        require(
            cfg, "model", "data.train", "data.num_classes", "optimizer", "scheduler", "save_path"
        )
        as_given = copy.deepcopy(cfg)
        default_setup(cfg)
        self.device = device_of(cfg)
        self.max_epoch = cfg["eval_epoch"]
        self.best_metric_value = -math.inf
        self.accumulation = cfg["gradient_accumulation_steps"]
        self.logger = get_root_logger()
        self.model = self.build_model()
        self.train_loader = self.build_train_loader()
        self.val_loader = self.build_val_loader()
        self.optimizer = self.build_optimizer()
        self.scheduler = self.build_scheduler()
        self.scaler = self.build_scaler()
        self.register_hooks(cfg["hooks"])
        for hook in self.hooks:
            if hasattr(hook, "check"):  # hooks written for Pointcept have none
                hook.check()
        self._open_folder(as_given)
        self.writer = self.build_writer()
        self._log_start()

    # -- building ------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The model on its device, wrapped for distributed training where there are several processes."""
        # One seed for all: what stands outside the module tree, such as a random teacher, is not sent around.
        seed_process(self.cfg["seed"], 0, 0)
        model = MODELS.build(self.cfg["model"])
        if self.cfg["sync_bn"] and comm.get_world_size() > 1:
            model = sync_batch_norm(model)
        model = model.to(self.device)
        if comm.get_world_size() > 1:
            model = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=self.cfg["find_unused_parameters"],
            )
        return model

    def build_writer(self) -> Writer | None:
        """Scalars into `save_path`, and to Weights & Biases where `enable_wandb` asks for it; None beside rank 0."""
        if not comm.is_main_process():
            return None
        cfg = self.cfg
        return Writer(cfg["save_path"], wandb=wandb_run(cfg) if cfg["enable_wandb"] else None)

    def build_train_loader(self) -> Any:
        """Seeded batches, shuffled; drops the last one only where the set is larger than a total batch."""
        cfg, world = self.cfg, comm.get_world_size()
        prepare = getattr(unwrap(self.model), "prepare_train_data", None)
        dataset = self._dataset("train", prepare)
        batch_size = cfg["batch_size_per_gpu"]
        sampler = EpochBatchSampler(
            len(dataset),
            batch_size,
            shuffle=True,
            seed=cfg["seed"],
            drop_last=len(dataset) > batch_size * world,
            rank=comm.get_rank(),
            world=world,
        )
        collate = partial(point_collate_fn, mix_prob=cfg["mix_prob"])
        return self._loader(dataset, sampler, cfg["num_worker_per_gpu"], collate, persistent=True)

    def build_val_loader(self) -> Any:
        """Validation batches in order, of any size; None where `evaluate` is off."""
        cfg = self.cfg
        if not cfg["evaluate"]:
            return None
        require(cfg, "data.val")
        dataset = self._dataset("val")
        sampler = EpochBatchSampler(
            len(dataset),
            cfg["batch_size_val_per_gpu"],
            shuffle=False,
            seed=cfg["seed"],
            rank=comm.get_rank(),
            world=comm.get_world_size(),
            even=False,
        )
        return self._loader(dataset, sampler, cfg["num_worker_per_gpu"], collate_fn)

    def _dataset(self, split: str, prepare: Any = None) -> Any:
        """A split's dataset; a model may change the training set's config, to collect what it needs."""
        entry = self.cfg["data"][split]
        dataset = DATASETS.build(entry if prepare is None else prepare(entry))
        if len(dataset) == 0:
            raise InputError(f"data.{split} has no samples: check its data_root and split")
        return dataset

    def _loader(
        self,
        dataset: Any,
        sampler: EpochBatchSampler,
        workers: int,
        collate: Any,
        persistent: bool = False,
    ) -> Any:
        cuda, seed = self.device.type == "cuda", self.cfg["seed"]
        return build_loader(dataset, sampler, seed, workers, collate, cuda, persistent)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser over all parameters, in the groups of `param_dicts`."""
        return build_optimizer(self.cfg["optimizer"], self.model, self.cfg["param_dicts"])

    def build_scheduler(self) -> Any:
        """The schedule over all optimiser steps of the run; their number goes into `cfg.scheduler.total_steps`."""
        # The last accumulation of an epoch may be shorter: gradients never wait for the next epoch.
        total = math.ceil(len(self.train_loader) / self.accumulation) * self.max_epoch
        self.cfg["scheduler"]["total_steps"] = total
        scheduler = build_scheduler(self.cfg["scheduler"], self.optimizer)
        # Kept in the checkpoint, so that resuming on a schedule of other length can be refused.
        scheduler.total_steps = total
        return scheduler

    def build_scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling, which only float16 on CUDA needs."""
        half = self.cfg["enable_amp"] and amp_dtype(self.cfg) is torch.float16
        return torch.amp.GradScaler("cuda") if half and self.device.type == "cuda" else None

    def _open_folder(self, as_given: Any) -> None:
        cfg = self.cfg
        if not comm.is_main_process():
            return
        folder = Path(cfg["save_path"])
        try:
            (folder / "model").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"save_path={folder}: cannot create {folder / 'model'} ({error.strerror}); choose a folder that can "
                "be written"
            ) from error
        if hasattr(as_given, "dump") and not (cfg["resume"] and (folder / "config.py").is_file()):
            as_given.dump(folder / "config.py")
        self.logger = get_root_logger(folder / "train.log", "a" if cfg["resume"] else "w")

    def _log_start(self) -> None:
        cfg, log = self.cfg, self.logger.info
        log(
            f"Config: {getattr(cfg, 'filename', None) or 'given in code'}; save_path {cfg['save_path']}"
        )
        log(f"Host: {PROVIDER}")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log(
            f"{comm.get_world_size()} x {self.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"seed {cfg['seed']}; {trained:,} trained parameters; {len(self.train_loader)} iterations per epoch"
        )
        if cfg["num_worker_per_gpu"] == 0:
            log("num_worker=0: scans are loaded in the training process")

    # -- running -------------------------------------------------------------------------------

    def train(self) -> None:
        """Run all epochs.

        Raises:
            InputError: as it was raised; any other exception is logged with its traceback first.
        """
        try:
            self.before_train()
            self.logger.info(">>>>>>>>>>>>>>>> Start Training >>>>>>>>>>>>>>>>")
            if self.start_epoch >= self.max_epoch:
                self.logger.info(f"All {self.max_epoch} epochs are done already")
            for epoch in range(self.start_epoch, self.max_epoch):
                self.epoch = epoch
                self._run_epoch()
            self.after_train()
        except InputError:
            raise
        except Exception as error:
            # A process that only lost another one says nothing: the other one's reason is the one to read.
            if not comm.lost_contact(error):
                self.logger.error("Training stopped:\n%s", traceback.format_exc())
                error.is_logged = True  # type: ignore[attr-defined]
            raise
        finally:
            if self.writer is not None:
                self.writer.close()

    def _run_epoch(self) -> None:
        self.train_loader.batch_sampler.set_epoch(self.epoch)
        batches = iter(self.train_loader)
        seed_process(self.cfg["seed"], self.epoch + 1, comm.get_rank())
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.before_epoch()
        for iteration, batch in enumerate(batches):
            self.comm_info.update(iter=iteration, input_dict=batch)
            self.before_step()
            self.run_step()
            self.after_step()
        if self.cfg["empty_cache_per_epoch"] and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.device.type == "cpu":
            return_freed_memory()  # before the evaluation starts processes that are copies of this one
        self.after_epoch()

    def run_step(self) -> None:
        """Forward, backward and, at the end of an accumulation, one optimiser and scheduler step."""
        cfg, iteration = self.cfg, self.comm_info["iter"]
        batch = to_device(self.comm_info["input_dict"], self.device)
        group, last = self._accumulation(iteration)
        quiet = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if quiet else contextlib.nullcontext():
            with autocast(cfg, self.device), joint_batch(cfg["global_loss"]):
                outputs = self.model(batch)
            self.check_outputs(outputs)
            loss = outputs["loss"].reshape(())
            if not torch.isfinite(loss):
                self._stop_at(iteration, outputs)
            loss = loss / group
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        if last:
            self.step_optimizer()
        if cfg["empty_cache"] and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.device.type == "cpu" and iteration % 10 == 0:
            return_freed_memory()
        self.comm_info["model_output_dict"] = outputs

    def _accumulation(self, iteration: int) -> tuple[int, bool]:
        """How many batches share this one's optimiser step, and whether this is the last of them."""
        start = iteration - iteration % self.accumulation
        end = min(start + self.accumulation, len(self.train_loader))
        return end - start, iteration + 1 == end

    def step_optimizer(self) -> None:
        """Clip, step, clear, and move the schedule on."""
        clip, stepped = self.cfg["clip_grad"], True
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            stepped = (
                self.scaler.get_scale() >= before
            )  # a smaller scale means that the step was skipped
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self.scheduler.step()

    def check_outputs(self, outputs: Any) -> None:
        """Hold the model to what hooks rely on: one-element tensors by name, `loss` among them.

        Raises:
            TypeError: naming the key that breaks the rule.
        """
        name = type(getattr(self.model, "module", self.model)).__name__
        if not isinstance(outputs, Mapping) or "loss" not in outputs:
            got = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise TypeError(f"{name} must return a dict with `loss` in training, it returned {got}")
        for key, value in outputs.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{name} returned {key!r} of {got} in training: every value must be a one-element tensor; keep "
                    "features and logits for evaluation"
                )
        if not outputs["loss"].requires_grad:
            raise TypeError(f"the loss of {name} has no gradient: are all its parameters frozen?")

    def _stop_at(self, iteration: int, outputs: Mapping[str, Tensor]) -> None:
        sampler = self.train_loader.batch_sampler
        tickets = next(t for i, t in enumerate(sampler) if i == iteration)
        names = ", ".join(self.train_loader.dataset.names(tickets))
        values = ", ".join(f"{key} {value.item():g}" for key, value in outputs.items())
        raise RuntimeError(
            f"the loss is not finite in epoch {self.epoch + 1}, iteration {iteration + 1}, scans {names} ({values}): "
            "check these scans, lower the learning rate, set clip_grad, or switch enable_amp off"
        )
