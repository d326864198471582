"""Several optimisers in one step: a student and the auxiliary networks that judge it learn in turn.

A model of phases is called once per phase with the same batch, `model(batch, phase=name)`, and returns what a model
returns in training, for that phase. Each phase has its optimiser, schedule and clipping, over parameters of its own;
what a phase leaves as gradients elsewhere is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError, comm, kd
from pointcept_kd.host.checkpoint import unwrap
from pointcept_kd.host.joint import joint_batch
from pointcept_kd.host.runtime import autocast, return_freed_memory, to_device
from pointcept_kd.host.solver import build_optimizer, build_scheduler
from pointcept_kd.host.trainer import Trainer


class Joined:
    """Optimisers or schedules by name, as one to whoever saves, restores or logs them.

    Args:
        parts: name to an optimiser or a schedule, in the order of the phases.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all, the last phase's first: its rate is the one that logs show."""
        return [group for part in reversed(self.parts.values()) for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all.

        Raises:
            ValueError: for a state of other phases.
        """
        if set(state) != set(self.parts):
            raise ValueError(
                f"it has the phases {', '.join(map(str, state))}, the config {', '.join(self.parts)}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class JoinedSchedules(Joined):
    """Schedules by name; `total_steps` is that of all."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run, the same for every phase."""
        return next(iter(self.parts.values())).total_steps

    @property
    def optimizer(self) -> Any:
        """The optimiser of the last phase."""
        return list(self.parts.values())[-1].optimizer


class _Part(nn.Module):
    """The parameters of a phase under their own names, for the optimiser's groups."""

    def __init__(self, model: nn.Module, modules: list[str]) -> None:
        super().__init__()
        for path in modules:
            self.add_module(path.replace(".", "_"), model.get_submodule(path))


@kd.TRAINERS.register_module()
class AlternatingTrainer(Trainer):
    """A trainer whose steps have phases, in the order in which `cfg.optimizer` names them.

        optimizer = dict(
            judges=dict(type="SGD", lr=1e-5, modules=["judge"], clip_grad=0.05),
            student=dict(type="SGD", lr=1e-5, modules=["student"]),
        )
        scheduler = dict(judges=dict(type="ExpLR", gamma=0.999), student=dict(type="ExpLR", gamma=0.999))

    `modules` are paths of submodules whose parameters the phase trains; no parameter belongs to two phases. `clip_grad`
    is the phase's largest gradient norm, by default that of the config. The reported loss is the sum over phases.

    Raises:
        InputError: for phases that do not fit each other, the model or the schedules.
    """

    def _phases(self) -> dict[str, Mapping[str, Any]]:
        phases = self.cfg["optimizer"]
        if not phases or not all(isinstance(entry, Mapping) for entry in phases.values()):
            raise InputError(
                "AlternatingTrainer: optimizer has an entry per phase, "
                "dict(student=dict(type=..., modules=[...]), ...)"
            )
        return dict(phases)

    def build_optimizer(self) -> Any:
        """One optimiser per phase."""
        if self.accumulation != 1:
            raise InputError("AlternatingTrainer: gradient_accumulation_steps must be 1")
        model, owner = unwrap(self.model), {}
        parts, self._clip = {}, {}
        known = dict(model.named_modules())
        for phase, entry in self._phases().items():
            entry = dict(entry)
            modules = entry.pop("modules", None)
            if not isinstance(modules, (list, tuple)) or not modules:
                raise InputError(f"optimizer.{phase}: give modules=[...], what the phase trains")
            for path in modules:
                if path not in known:
                    tops = ", ".join(name for name, _ in model.named_children())
                    raise InputError(
                        f"optimizer.{phase}: the model has no module {path!r}; it has {tops}"
                    )
                for name, parameter in known[path].named_parameters():
                    if parameter in owner:
                        raise InputError(
                            f"optimizer.{phase}: {path}.{name} is trained by {owner[parameter]} already"
                        )
                    owner[parameter] = phase
            self._clip[phase] = entry.pop("clip_grad", self.cfg["clip_grad"])
            part = _Part(model, list(modules))
            parts[phase] = build_optimizer(entry, part, self.cfg["param_dicts"])
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p not in owner]
        if idle:
            raise InputError(
                f"no phase trains {', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}: name their modules, or "
                "freeze them"
            )
        return Joined(parts)

    def build_scheduler(self) -> Any:
        """One schedule per phase, each over all steps of the run."""
        entries = self.cfg["scheduler"]
        phases = list(self.optimizer)
        if set(entries) - {"total_steps"} != set(phases):
            raise InputError(
                f"scheduler has {', '.join(entries)}, the phases are {', '.join(phases)}: give one entry for each"
            )
        parts, total = {}, len(self.train_loader) * self.max_epoch
        for phase in phases:
            parts[phase] = build_scheduler(
                {**entries[phase], "total_steps": total}, self.optimizer[phase]
            )
            parts[phase].total_steps = total
        return JoinedSchedules(parts)

    def run_step(self) -> None:
        """Every phase in turn: forward, backward, one optimiser and schedule step."""
        cfg, iteration = self.cfg, self.comm_info["iter"]
        batch = to_device(self.comm_info["input_dict"], self.device)
        report: dict[str, Tensor] = {}
        total: Tensor | None = None
        for phase in self.optimizer:
            with autocast(cfg, self.device), joint_batch(cfg["global_loss"]):
                outputs = self.model(batch, phase=phase)
            self.check_outputs(outputs)
            loss = outputs["loss"].reshape(())
            if not torch.isfinite(loss):
                self._stop_at(iteration, outputs)
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
            self._step(phase)
            total = loss.detach() if total is None else total + loss.detach()
            report[f"loss_{phase}"] = loss.detach()
            report.update({k: v.detach() for k, v in outputs.items() if k != "loss"})
        if cfg["empty_cache"] and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.device.type == "cpu" and iteration % 10 == 0:
            return_freed_memory()
        assert total is not None  # there is a phase
        self.comm_info["model_output_dict"] = {"loss": total, **report}

    def _step(self, phase: str) -> None:
        optimizer, clip, stepped = self.optimizer[phase], self._clip[phase], True
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if clip is not None:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(own, clip)
        if self.scaler is None:
            optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        # Of all: a phase may have left gradients with the networks of another one.
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self.scheduler[phase].step()

    def _log_start(self) -> None:
        super()._log_start()
        if comm.is_main_process():
            self.logger.info(f"Phases of a step: {', '.join(self.optimizer)}")
