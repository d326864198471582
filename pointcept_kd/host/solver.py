"""Optimisers with parameter groups by name, and learning-rate schedules stepped once per update.

Names, parameters and formulas are Pointcept's, so that its recipes and the optimiser and scheduler states
of its checkpoints carry over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from . import OPTIMIZERS, SCHEDULERS, kd, stand_in
from .dialect import nearest
from .errors import InputError
from .log import get_root_logger

for _optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    stand_in(OPTIMIZERS, kd.OPTIMIZERS, _optimizer.__name__)(_optimizer)

GROUP_KEYS = ("keyword", "lr", "momentum", "weight_decay")


def build_optimizer(
    cfg: Mapping[str, Any],
    model: nn.Module,
    param_dicts: Sequence[Mapping[str, Any]] | None = None,
) -> Optimizer:
    """The optimiser of a config entry over a model's parameters.

    Without `param_dicts` all parameters form one group, frozen ones included. With it, group i + 1 holds
    the parameters whose name contains the i-th `keyword` (the first match wins), group 0 the rest;
    parameters without gradient belong to none.

    Args:
        cfg: `type` and the optimiser's arguments.
        model: where the parameters are.
        param_dicts: dicts of `keyword` and of what differs there: `lr`, `momentum`, `weight_decay`.

    Raises:
        InputError: for an unknown type or key, or a value that the optimiser refuses.
    """
    cfg = dict(_entry(cfg, "optimizer"))
    groups = list(model.parameters()) if not param_dicts else _groups(cfg, model, param_dicts)
    if not groups:
        raise InputError("the model has no parameters to optimise")
    return _build(OPTIMIZERS, {**cfg, "params": groups}, "optimizer")


def _groups(
    cfg: Mapping[str, Any], model: nn.Module, param_dicts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if isinstance(param_dicts, (Mapping, str)):
        raise InputError(f"param_dicts must be a list of dicts, got {param_dicts!r}")
    groups: list[dict[str, Any]] = [{"params": []}]
    if "lr" in cfg:
        groups[0]["lr"] = cfg["lr"]
    for i, entry in enumerate(param_dicts):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("keyword"), str):
            raise InputError(
                f"param_dicts.{i} needs a keyword, a part of parameter names: {entry!r}"
            )
        for key in entry:
            if key not in GROUP_KEYS:
                hint = nearest(key, GROUP_KEYS) or f"; it takes {', '.join(GROUP_KEYS)}"
                raise InputError(f"param_dicts.{i} does not take {key!r}{hint}")
        groups.append({"params": [], **{k: v for k, v in entry.items() if k != "keyword"}})
    keywords = [entry["keyword"] for entry in param_dicts]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            match = next((i + 1 for i, word in enumerate(keywords) if word in name), 0)
            groups[match]["params"].append(parameter)
    logger = get_root_logger()
    for keyword, group in zip(keywords, groups[1:]):
        if group["params"]:
            settings = ", ".join(f"{k}={v}" for k, v in group.items() if k != "params")
            count = len(group["params"])
            logger.info(
                f"parameter group {keyword!r}: {count} tensors, {settings or 'as the rest'}"
            )
        else:
            # Kept, though empty: the lists of a schedule count the groups of the config.
            logger.warning(
                f"param_dicts keyword {keyword!r} matches no parameter that has not been taken; "
                "its settings have no effect"
            )
    return groups


def build_scheduler(cfg: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """The learning-rate schedule of a config entry; `total_steps` must be in it.

    Raises:
        InputError: for an unknown type or key, or a value that the schedule refuses.
    """
    cfg = dict(_entry(cfg, "scheduler"))
    if SCHEDULERS.resolve(cfg["type"]) is CosineScheduler:
        raise InputError(
            "scheduler: CosineScheduler gives values, not learning rates; use CosineAnnealingLR"
        )
    steps = cfg.get("total_steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(
            f"scheduler: total_steps={steps!r} must be a whole number, 1 or more; "
            "it is the number of updates in the whole run"
        )
    return _build(SCHEDULERS, {**cfg, "optimizer": optimizer}, "scheduler")


def _entry(cfg: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise InputError(
            f"{name} must be a dict with a type, for example dict(type=...), got {cfg!r}"
        )
    return cfg


def _build(registry: Any, cfg: Mapping[str, Any], name: str) -> Any:
    """Build, and answer a refused value (`ValueError` in torch) as the input error that it is."""
    try:
        return registry.build(cfg)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name} {cfg['type']}: {error}") from error


def check_schedule(state: Mapping[str, Any], scheduler: Any) -> None:
    """Check before resuming that a checkpoint's scheduler state fits the schedule built now.

    Loading a state replaces the schedule's length by the old one; a run that has become longer would
    stop in the middle, one that has become shorter would end before its learning rate does.

    Raises:
        InputError: for another length, other milestones or another number of parameter groups.
    """
    for name, part in getattr(scheduler, "parts", {}).items():
        check_schedule(state.get(name) or {}, part)
    remedy = (
        "keep epoch, batch_size, gradient_accumulation_steps and the data as they were, "
        "or start a new run from these weights with resume=False"
    )
    for key in ("total_steps", "T_max", "milestones"):
        now, before = getattr(scheduler, key, None), state.get(key)
        if now is not None and before is not None and now != before:
            now, before = (
                sorted(v.elements()) if isinstance(v, Counter) else v for v in (now, before)
            )
            raise InputError(
                f"cannot resume: the checkpoint's schedule has {key}={before}, this run's {now}; "
                f"{remedy}"
            )
    before = state.get("base_lrs")
    if before is not None and len(before) != len(scheduler.base_lrs):
        raise InputError(
            f"cannot resume: the checkpoint has {len(before)} parameter groups, this run "
            f"{len(scheduler.base_lrs)}; keep param_dicts as it was, or set resume=False"
        )


# ---------------------------------------------------------------------------------------- schedules


class _FactorLR(lr_scheduler.LambdaLR):
    """Every group's learning rate times a factor of the step."""

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[int], float],
        total_steps: int,
        last_epoch: int,
    ) -> None:
        # A state of Pointcept's lacks this; where it is, `check_schedule` can compare lengths.
        self.total_steps = total_steps
        super().__init__(optimizer, factor, last_epoch)


@stand_in(SCHEDULERS, kd.SCHEDULERS, "MultiStepLR")
class MultiStepLR(lr_scheduler.MultiStepLR):
    """Times gamma at every milestone.

    Args:
        optimizer: whose learning rates to set.
        milestones: fractions of the run.
        total_steps: updates in the run.
        gamma: factor.
        last_epoch: step to go on from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float],
        total_steps: int,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        _check_milestones(milestones)
        steps = [int(share * total_steps) for share in milestones]
        super().__init__(optimizer, steps, gamma, last_epoch)


@stand_in(SCHEDULERS, kd.SCHEDULERS, "MultiStepWithWarmupLR")
class MultiStepWithWarmupLR(_FactorLR):
    """Times gamma at every milestone, after a linear rise.

    Args:
        optimizer: whose learning rates to set.
        milestones: fractions of the run.
        total_steps: updates in the run.
        gamma: factor.
        warmup_rate: fraction of the run that the rise takes.
        warmup_scale: factor at step 0.
        last_epoch: step to go on from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float],
        total_steps: int,
        gamma: float = 0.1,
        warmup_rate: float = 0.05,
        warmup_scale: float = 1e-6,
        last_epoch: int = -1,
    ) -> None:
        _check_milestones(milestones)
        ordered = sorted(share * total_steps for share in milestones)
        warmup = warmup_rate * total_steps

        def factor(step: int) -> float:
            done = min(step / warmup, 1.0) if warmup > 0 else 1.0
            rise = warmup_scale + (1 - warmup_scale) * done
            return rise * gamma ** sum(step >= milestone for milestone in ordered)

        super().__init__(optimizer, factor, total_steps, last_epoch)


def _check_milestones(milestones: Sequence[float]) -> None:
    for share in milestones:
        if not 0 <= share <= 1:
            raise InputError(
                f"scheduler: milestones={list(milestones)} must be fractions of the run, 0 to 1"
            )


@stand_in(SCHEDULERS, kd.SCHEDULERS, "PolyLR")
class PolyLR(_FactorLR):
    """Times (1 - step / (total_steps + 1)) ^ power, which stays above 0 at the last step."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, power: float = 0.9, last_epoch: int = -1
    ) -> None:
        def factor(step: int) -> float:
            # A step beyond the end would take a root of a negative number.
            return max(0.0, 1 - step / (total_steps + 1)) ** power

        super().__init__(optimizer, factor, total_steps, last_epoch)


@stand_in(SCHEDULERS, kd.SCHEDULERS, "ExpLR")
class ExpLR(_FactorLR):
    """Times gamma ^ (step / total_steps): gamma is reached at the end of the run."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, gamma: float = 0.9, last_epoch: int = -1
    ) -> None:
        super().__init__(
            optimizer, lambda step: gamma ** (step / total_steps), total_steps, last_epoch
        )


@stand_in(SCHEDULERS, kd.SCHEDULERS, "CosineAnnealingLR")
class CosineAnnealingLR(lr_scheduler.CosineAnnealingLR):
    """Half a cosine from the learning rate to `eta_min` over the run."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, total_steps, eta_min, last_epoch)


@kd.SCHEDULERS.register_module()
class WarmupCosineLR(_FactorLR):
    """A rise in equal steps, then half a cosine to 0 that is as long as the whole run.

    Factor (step + 1) / warmup_steps in the rise, (1 + cos(pi (step - warmup_steps) / total_steps)) / 2 after it: the
    run ends while the cosine still has as many steps before it as the rise took (doi:10.1109/TPAMI.2024.3451658).

    Args:
        optimizer: whose learning rates to set.
        total_steps: updates in the run.
        warmup_steps: updates of the rise, 0 for none. Published: 1000 over the number of processes, none for one.
        last_epoch: step to go on from.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1
    ) -> None:
        if warmup_steps < 0:
            raise InputError(f"WarmupCosineLR: warmup_steps={warmup_steps}: expected 0 or more")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / total_steps))) / 2

        super().__init__(optimizer, factor, total_steps, last_epoch)


@kd.SCHEDULERS.register_module()
class EpochCosineLR(_FactorLR):
    """Half a cosine to 0 over the run in equal steps: the rate holds still for an epoch, then falls.

    Factor in the e-th of `epochs` epochs, from 0 on: (1 + cos(pi e / epochs)) / 2, as of torch's `CosineAnnealingLR`
    where that is stepped once an epoch.

    Args:
        optimizer: whose learning rates to set.
        epochs: passes over the data in the whole run: the config's `epoch`.
        total_steps: updates in the run.
        last_epoch: step to go on from.
    """

    def __init__(
        self, optimizer: Optimizer, epochs: int, total_steps: int, last_epoch: int = -1
    ) -> None:
        if epochs < 1:
            raise InputError(
                f"EpochCosineLR: epochs={epochs}: expected the epochs of the run, 1 or more"
            )

        def factor(step: int) -> float:
            epoch = min(step * epochs // total_steps, epochs)
            return (1 + math.cos(math.pi * epoch / epochs)) / 2

        super().__init__(optimizer, factor, total_steps, last_epoch)


@stand_in(SCHEDULERS, kd.SCHEDULERS, "OneCycleLR")
class OneCycleLR(lr_scheduler.OneCycleLR):
    """Rise from `max_lr / div_factor` to `max_lr`, then fall to the start divided by `final_div_factor`.

    Smith & Topin, 2017, arXiv:1708.07120, in the form of `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        optimizer: whose learning rates (and momenta, if `cycle_momentum`) to set.
        max_lr: one for all groups, or a list with one per parameter group, group 0 first.
        total_steps: updates in the run.

    The rest is torch's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        groups = len(optimizer.param_groups)
        for name, value in (
            ("max_lr", max_lr),
            ("base_momentum", base_momentum),
            ("max_momentum", max_momentum),
        ):
            if isinstance(value, (list, tuple)) and len(value) != groups:
                raise InputError(
                    f"OneCycleLR: {name} has {len(value)} entries for {groups} parameter groups; "
                    "give one for the rest of the model and one per entry of param_dicts, in order"
                )
        if pct_start * total_steps == 1:
            # A rise of exactly one step has length 0 in torch, which divides by it. A hair more keeps
            # the start at step 0 and the top at step 1; a run of one step has no rise at all.
            pct_start = pct_start * (1 + 1e-9) if total_steps > 1 else 0.5
        super().__init__(
            optimizer,
            list(max_lr) if isinstance(max_lr, (list, tuple)) else max_lr,
            total_steps=total_steps,
            pct_start=pct_start,
            anneal_strategy=anneal_strategy,
            cycle_momentum=cycle_momentum,
            base_momentum=base_momentum,
            max_momentum=max_momentum,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
            three_phase=three_phase,
            last_epoch=last_epoch,
        )


@stand_in(SCHEDULERS, kd.SCHEDULERS, "CosineScheduler")
class CosineScheduler:
    """A number that follows a schedule (a weight decay, a momentum, a loss weight): not a learning rate.

    `warmup_iters` values from `start_value` to `base_value` in equal steps, then half a cosine towards
    `final_value`, then `freeze_iters` times `freeze_value`; `final_value` ever after.

    Args:
        base_value: where the cosine starts.
        final_value: where it ends.
        total_iters: length of all three parts together.
        start_value: where the warm-up starts.
        warmup_iters: length of the warm-up.
        freeze_value: None means `final_value`.
        freeze_iters: length of the last part.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        start_value: float = 0.0,
        warmup_iters: int = 0,
        freeze_value: float | None = None,
        freeze_iters: int = 0,
    ) -> None:
        if warmup_iters + freeze_iters > total_iters:
            raise InputError(
                f"CosineScheduler: warmup_iters={warmup_iters} and freeze_iters={freeze_iters} are "
                f"longer than total_iters={total_iters}"
            )
        self.base_value = base_value
        self.final_value = final_value
        self.total_iters = total_iters
        self.start_value = start_value
        self.warmup_iters = warmup_iters
        self.freeze_value = final_value if freeze_value is None else freeze_value
        self.freeze_iters = freeze_iters
        self.iter = 0

    def get(self, it: int) -> float:
        """The value at an iteration, from 0 on."""
        if it >= self.total_iters:
            return self.final_value
        if it < self.warmup_iters:
            done = it / max(self.warmup_iters - 1, 1)
            return self.start_value + (self.base_value - self.start_value) * done
        if it >= self.total_iters - self.freeze_iters:
            return self.freeze_value
        length = self.total_iters - self.warmup_iters - self.freeze_iters
        done = (it - self.warmup_iters) / length
        span = self.base_value - self.final_value
        return self.final_value + span * (1 + math.cos(math.pi * done)) / 2

    __getitem__ = get

    def step(self) -> float:
        """The value now; then go one iteration on."""
        value = self.get(self.iter)
        self.iter += 1
        return value

    def reset(self) -> None:
        """Back to iteration 0."""
        self.iter = 0

    def state_dict(self) -> dict[str, int]:
        """Where the schedule stands."""
        return {"iter": self.iter}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state."""
        self.iter = state["iter"]
