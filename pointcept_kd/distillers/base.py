"""The distiller: a student, one or several frozen teachers, and terms between them.

    L = w_task * L_task(student) + sum_j w_j * L_j(student, teacher_j)

The teacher is a guest. It stands outside the module tree, so no trainer can switch it to training mode, no optimiser
and no DDP wrapper sees its parameters, and no checkpoint carries it; it only follows the student's device and dtype.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, TERMS, InputError, kd
from pointcept_kd.host.checkpoint import (
    check_grids,
    load_checkpoint,
    load_into,
    student_weights,
)
from pointcept_kd.host.hooks import HookBase

from .taps import Activation, Taps, full_precision
from .teacher_cache import TeacherCache, fixed_view, with_point_index
from .views import in_the_students_order, matched_rows, other_view

RANDOM = "random"  # the `weight` of a teacher that is meant to be untrained


class Outputs(dict[str, Activation]):
    """Activations of one network by tap name, `logits` among them, and its task loss where it computed one."""

    loss: Tensor | None = None


class Term(nn.Module):
    """One distillation loss between a student and a teacher.

    A term defines `forward(student, teacher, batch)`: `student` holds the student's activations with graph and, as
    `student.loss`, its task loss; `teacher` the teacher's, without graph but for leaf taps; `batch` what both saw. It
    returns a 0-dim tensor, the mean over valid points, so that its size does not follow the scan's. Its weight stays
    in the config. Learned adapters are submodules of the term.

    Attributes:
        needs_teacher_grad: the term differentiates the teacher's task loss with respect to the teacher's taps that it
            reads; those taps then hand out detached leaves, and the teacher's loss is computed.
    """

    needs_teacher_grad: bool = False

    def taps(self) -> tuple[set[str], set[str]]:
        """Names of the student's and the teacher's taps that this term reads, `logits` aside."""
        return set(), set()

    def watched(self) -> dict[str, Tensor]:
        """What to log of the last step beside the loss, once per epoch: 0-dim tensors by name."""
        return {}


def log_watched(trainer: Any, terms: Any) -> None:
    """Log what terms by name watch, see `Term.watched`, and hand it to the trainer's writer."""
    for name, term in terms.items():
        seen = {key: float(value) for key, value in term.watched().items()}
        if not seen:
            continue
        text = ", ".join(f"{key} {value:.4g}" for key, value in seen.items())
        trainer.logger.info(f"Term {name}: {text}")
        if trainer.writer is not None:
            for key, value in seen.items():
                trainer.writer.add_scalar(f"{name}/{key}", value, trainer.epoch + 1)


def _with_logits(network: nn.Module, taps: Mapping[str, str] | None) -> dict[str, str]:
    """Tap paths with `logits` added: the segmentation head, or the whole backbone where that ends in class scores."""
    paths = dict(taps or {})
    if "logits" not in paths:
        head = getattr(network, "seg_head", None)
        paths["logits"] = "seg_head" if isinstance(head, nn.Module) else "backbone"
    return paths


class Teacher:
    """A frozen network and its taps.

    Args:
        name: as the config calls it; for messages.
        model: config of the network.
        weight: checkpoint path; `"random"` for an untrained teacher, as tests use.
        taps: tap name to module path.
        view: what the keys of the batch begin with that it sees in place of the student's, such as "teacher_"; its rows
            are then matched point by point, see `views`. None: both see the same.
        config, train_if_missing: read by `tools/train.py`, which trains a missing teacher first.
    """

    def __init__(
        self,
        name: str,
        model: Mapping[str, Any],
        weight: str | None = None,
        taps: Mapping[str, str] | None = None,
        view: str | None = None,
        config: str | None = None,
        train_if_missing: bool = False,
    ) -> None:
        self.name, self.model, self.view = name, model, view
        self.network: nn.Module = MODELS.build(model)
        self.cache: TeacherCache | None = None
        if weight is None:
            raise InputError(
                f"teacher {name} has no weight: give the path of its checkpoint, or weight='{RANDOM}' to mean it"
            )
        if weight != RANDOM:
            # A teacher may itself have been distilled; every key of it must be met.
            checkpoint = load_checkpoint(weight)
            check_grids(self.network, checkpoint, f"teacher {name}: {weight}")
            weights = student_weights(checkpoint["state_dict"])
            load_into(self.network, weights, min_match=1.0, source=f"teacher {name}: {weight}")
            logging.getLogger("pointcept_kd").info("Teacher %s: weights of %s", name, weight)
        self.network.requires_grad_(False).eval()
        for module in self.network.modules():
            # Upstream PTv3 shuffles its curves in evaluation too: a teacher must answer the same way twice.
            if hasattr(module, "shuffle_orders"):
                module.shuffle_orders = False
        self._paths = _with_logits(self.network, taps)
        self._taps = Taps(self.network, self._paths)
        self._wants_grad = False

    def differentiate_at(self, names: Iterable[str]) -> None:
        """Make the named taps detached leaves and let the network compute its task loss."""
        self._wants_grad = True
        self._taps = Taps(self.network, self._paths, leaves=self._taps.leaves | set(names))

    @property
    def tap_names(self) -> set[str]:
        """Names of the activations it hands out."""
        return set(self._paths)

    def __call__(self, batch: Mapping[str, Any]) -> Outputs:
        """Its activations for a batch: from the cache where it has one, else by running the network."""
        return self.run(batch) if self.cache is None else Outputs(self.cache(batch))

    @property
    def paths(self) -> dict[str, str]:
        """Tap name to module path."""
        return dict(self._paths)

    def run(self, batch: Mapping[str, Any]) -> Outputs:
        """Run the network on a batch; no parameter or buffer of it changes.

        Returns:
            Its activations in at least float32; with graph only behind leaf taps.
        """
        shown = batch if self.view is None else other_view(batch, self.view)
        # Labels are passed on only where the teacher's own loss is asked for.
        seen = (
            dict(shown) if self._wants_grad else {k: v for k, v in shown.items() if k != "segment"}
        )
        with torch.set_grad_enabled(self._wants_grad), self._taps.record() as activations:
            result = self.network(seen)
        if self.view is not None:
            rows, count = matched_rows(batch, self.view), int(shown["offset"][-1])
            activations = {
                name: in_the_students_order(name, a, rows, count) for name, a in activations.items()
            }
        outputs = Outputs({name: full_precision(a) for name, a in activations.items()})
        outputs.loss = result.get("loss")
        return outputs


@kd.MODELS.register_module()
class Distiller(nn.Module, HookBase):
    """A student that learns from labels and from teachers.

    In training, `forward` returns 0-dim tensors only: `loss`, `loss_task`, for every term `loss_<term>` and, with its
    weight, `weighted_<term>`. In evaluation it returns exactly what the student returns.

    Args:
        student: `dict(model=..., taps=...)`: the network's config, and tap name to module path.
        teacher: `dict(model=..., weight=..., taps=...)`, see `Teacher`; or several of those by name.
        terms: name to `dict(type=..., weight=1.0, teacher=...)` plus the term's own arguments; `teacher` names one
            of several teachers. A term with weight 0 is left out. None in place of a dict drops an inherited term.
        task_weight: weight of the student's own loss.
        teacher_cache: folder where the teachers' answers to a fixed view of every training scan are kept, so that
            they are computed once and not in every epoch, see `teacher_cache.py`; or `dict(folder=...,
            transform=[...])` with the transforms of that view, by default those of `data.val`. Several teachers get a
            folder each below it. Filled before the first epoch by the hook `ModelHook`.

    Raises:
        InputError: for unknown taps, teachers or terms, for teacher weights that do not fit, and for a cache that
            another teacher or transform made.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        terms: Mapping[str, Any],
        task_weight: float = 1.0,
        teacher_cache: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.student: nn.Module = MODELS.build(student["model"])
        self.task_weight = task_weight
        named = {"teacher": teacher} if "model" in teacher else dict(teacher)
        # A plain dict keeps the teachers out of the module tree.
        self.teachers = {name: Teacher(name, **entry) for name, entry in named.items()}
        self._student_taps = Taps(self.student, _with_logits(self.student, student.get("taps")))

        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self._teacher_of: dict[str, str] = {}
        for name, entry in terms.items():
            arguments = dict(entry or {})
            weight = float(arguments.pop("weight", 1.0))
            guest = arguments.pop("teacher", next(iter(self.teachers)))
            if entry is None or weight == 0.0:
                continue
            if guest not in self.teachers:
                raise InputError(
                    f"term {name}: no teacher {guest!r}; teachers: {sorted(self.teachers)}"
                )
            term: Term = TERMS.build(arguments)
            self._connect(name, term, guest)
            self.terms[name] = term
            self.weights[name] = weight
            self._teacher_of[name] = guest
        self._cache_at = self._cache_settings(teacher_cache)

    def _connect(self, name: str, term: Term, guest: str) -> None:
        """Check that the taps a term reads exist, and ask the teacher for gradients where it needs them."""
        of_student, of_teacher = term.taps()
        for side, wanted, known in (
            ("student", of_student, set(self._student_taps.paths)),
            (f"teacher {guest}", of_teacher, self.teachers[guest].tap_names),
        ):
            missing = wanted - known
            if missing:
                raise InputError(
                    f"term {name} reads tap {', '.join(sorted(missing))} of the {side}, which has {sorted(known)}; "
                    "name it under `taps`"
                )
        if term.needs_teacher_grad and self.teachers[guest].view is not None:
            raise InputError(
                f"term {name} differentiates teacher {guest}, which has a view of its own with other rows"
            )
        if term.needs_teacher_grad:
            self.teachers[guest].differentiate_at(of_teacher)

    def _cache_settings(self, entry: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
        if entry is None:
            return None
        settings = dict(entry) if isinstance(entry, Mapping) else {"folder": entry}
        unknown = sorted(set(settings) - {"folder", "transform"})
        if unknown or not isinstance(settings.get("folder"), str):
            raise InputError(
                f"teacher_cache={entry!r}: expected a folder, or dict(folder=..., transform=[...])"
            )
        for name in set(self._teacher_of.values()):
            if self.teachers[name].view is not None:
                raise InputError(
                    f"teacher {name} has a view of its own, which a cache of one fixed view cannot answer: drop "
                    "teacher_cache"
                )
        for name, term in self.terms.items():
            if term.needs_teacher_grad:
                raise InputError(
                    f"term {name} differentiates the teacher, which a cache cannot answer: drop the term, or "
                    "teacher_cache"
                )
        return settings

    # -- called by the trainer -----------------------------------------------------------------

    def prepare_train_data(self, dataset: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of the training set, with what the teachers' cache needs to find its rows again."""
        return dataset if self._cache_at is None else with_point_index(dataset)

    def check(self) -> None:
        """Attach the caches; a stale one stops the run before it has written anything."""
        if self._cache_at is None:
            return
        transform = self._cache_at.get("transform")
        if transform is None:
            transform = (self.trainer.cfg["data"].get("val") or {}).get("transform")
            if not transform:
                raise InputError(
                    "teacher_cache takes the transforms of data.val, and there are none: give "
                    "teacher_cache=dict(folder=..., transform=[...])"
                )
        folder = Path(self._cache_at["folder"])
        used = dict.fromkeys(self._teacher_of.values())
        for name in used:
            teacher = self.teachers[name]
            place = folder if len(self.teachers) == 1 else folder / name
            teacher.cache = TeacherCache(
                place, teacher.network, teacher.model, teacher.paths, transform
            )
        self._view = fixed_view(self.trainer.cfg["data"]["train"], transform)

    def before_train(self) -> None:
        """Compute what the caches do not hold yet."""
        if self._cache_at is None:
            return
        for name in dict.fromkeys(self._teacher_of.values()):
            teacher = self.teachers[name]
            if teacher.cache is None:
                self.check()
            assert teacher.cache is not None  # set by `check`
            workers = self.trainer.cfg["num_worker_per_gpu"]
            teacher.cache.fill(teacher, self._view, self.trainer.device, workers)

    def after_epoch(self) -> None:
        """Log what the terms watch, as of the epoch's last step."""
        log_watched(self.trainer, self.terms)

    # -- running -------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> "Distiller":
        """Move or cast the teachers along with the student."""
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher.network._apply(fn, recurse)
        return self

    def export_state_dict(self) -> dict[str, Tensor]:
        """The student's weights alone, under the plain student's keys."""
        return self.student.state_dict()

    def forward(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Run the student; in training also the teachers and the terms."""
        if not self.training:
            return self.student(input_dict, **kwargs)
        batch = dict(input_dict)
        with self._student_taps.record() as activations:
            # The student gets a container of its own: networks write into theirs.
            result = self.student(dict(batch))
        student = Outputs({name: full_precision(a) for name, a in activations.items()})
        student.loss = result["loss"]
        if self._cache_at is not None and any(
            self.teachers[name].cache is None for name in self._teacher_of.values()
        ):
            raise InputError(
                "teacher_cache is filled by the trainer's hook ModelHook, which the config's hooks lack: add "
                "dict(type='kd.ModelHook')"
            )
        guests = {
            name: self.teachers[name](batch) for name in dict.fromkeys(self._teacher_of.values())
        }

        total = self.task_weight * student.loss
        report = {"loss_task": student.loss.detach()}
        with torch.autocast(student.loss.device.type, enabled=False):
            for name, term in self.terms.items():
                value = term(student, guests[self._teacher_of[name]], batch)
                weighted = self.weights[name] * value
                total = total + weighted
                report[f"loss_{name}"] = value.detach()
                report[f"weighted_{name}"] = weighted.detach()
        return {"loss": total, **report}
