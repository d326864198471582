"""Few-step students: a denoiser that learns from a frozen teacher and from networks that watch what it completes.

Encoder, student and watching networks start with the teacher's weights; encoder and teacher stay as they are. A batch
is used twice: in phase `auxiliary` the watching networks learn the noise in the student's completions, in phase
`student` the student follows the difference between the teacher's prediction and theirs. The student's completion has a
gradient through its last network call only, and no guidance.

    kd.ScoreDistillation        one watching network, and structural losses     Zhang et al., 2024, arXiv:2412.03515
    kd.PreferenceDistillation   two, for the better and the worse of a pair     Zhao et al., 2025, arXiv:2504.11447
    kd.PreferenceAlignment      none: Diffusion-DPO of the teacher itself       Wallace et al., 2023, arXiv:2311.12908
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.checkpoint import load_checkpoint, load_into, student_weights
from pointcept_kd.host.errors import check_choice

from .diffusion import Completer, draw_timesteps, evaluating, full, noise_mse, tile
from .metrics import jsd_bev, voxel_counts
from .preference import (
    PAIRINGS,
    Metric,
    assistant_loss,
    chamfer,
    diagnostics,
    dpo_gain,
    dpo_loss,
    first_wins,
    logistic_preference_loss,
    pair_noise,
    preference_loss,
    quality,
    split_pair,
)
from .sampler import ScanNoise, draw_stop
from .score import (
    POINT_KINDS,
    SCENE_KINDS,
    normalising_weight,
    point_loss,
    scene_loss,
    score_gap,
    score_surrogate,
)

RANDOM = "random"  # the `weight` of a teacher that is meant to be untrained
PHASES = ("auxiliary", "student")
# What completing needs to know beside the networks and the schedule.
SETTINGS = ("process", "repeat", "steps", "guidance", "sampling", "seed", "max_range")


def _iou(completion: Tensor, scene: Tensor) -> float:
    return voxel_counts(completion, scene, 0.5).iou


# Name of a ranking to its metric, and whether more of it is better.
RANKINGS: dict[str, tuple[Metric, bool]] = {
    "cd": (chamfer, False),
    "jsd": (jsd_bev, False),
    "iou": (_iou, True),
}


def rank(
    first: Tensor, second: Tensor, ends: Tensor, batch: Mapping[str, Any], by: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of either completion of each scan against the batch's `complete`, and whether the first wins."""
    metric, higher = RANKINGS[by]
    scene, scene_ends = batch["complete"], batch["complete_offset"]
    a, b = (quality(x, scene, ends, scene_ends, metric) for x in (first, second))
    return a, b, first_wins(a, b, higher)


def load_teacher(model: Mapping[str, Any] | nn.Module, weight: str | None) -> Completer:
    """A frozen teacher from its config, or a copy of the module, and its checkpoint.

    Args:
        model: config of a `kd.DiffusionCompletion`, or the module itself.
        weight: path of the checkpoint; `"random"` for the weights that the model comes with.

    Raises:
        InputError: for a missing weight, one that does not fit, or a model that completes nothing.
    """
    if weight is None:
        raise InputError(
            f"the teacher has no weight: give the path of its checkpoint, or weight='{RANDOM}' to mean it"
        )
    teacher = copy.deepcopy(model) if isinstance(model, nn.Module) else MODELS.build(model)
    if not isinstance(teacher, Completer):
        raise InputError(f"the teacher is a {type(teacher).__name__}; it must complete scans")
    if weight != RANDOM:
        weights = student_weights(load_checkpoint(weight)["state_dict"])
        load_into(teacher, weights, min_match=1.0, source=f"teacher: {weight}")
        logging.getLogger("pointcept_kd").info("Teacher: weights of %s", weight)
    teacher.requires_grad_(False).eval()
    return teacher


def plain_completer(model: Any, source: str = "the config") -> dict[str, Any]:
    """The config of the network that completes: a completer's own; of a distillation the student's, with its settings.

    Args:
        model: config of a registered completer.
        source: where it is from, for messages.

    Raises:
        InputError: for a config of something that does not complete scans.
    """
    kind = model.get("type") if isinstance(model, Mapping) else None
    if not isinstance(kind, str) or not issubclass(MODELS.resolve(kind), Completer):
        raise InputError(
            f"{source}: {kind or 'no model'} completes no scans; see configs/completion"
        )
    if not issubclass(MODELS.resolve(kind), _Taught):
        return dict(model)
    with torch.device("meta"):  # only to ask it for its settings
        taught = MODELS.build({**model, "teacher": {**model["teacher"], "weight": RANDOM}})
    return {**model["teacher"]["model"], **{name: getattr(taught, name) for name in SETTINGS}}


def completer_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a plain completer: of a distillation's the student's, or their running average."""
    weights = student_weights(state_dict)
    if not any(key.startswith(("watchers.", "average.")) for key in weights):
        return weights
    averaged = any(key.startswith("average.") for key in weights)
    student = "average." if averaged else "denoiser."
    kept = {key: value for key, value in weights.items() if key.startswith("encoder.")}
    for key, value in weights.items():
        if key.startswith(student):
            kept[f"denoiser.{key.removeprefix(student)}"] = value
    return kept


class _Taught(Completer):
    """A completer with a trained denoiser, a frozen encoder, and a frozen denoiser outside the module tree.

    What stands outside moves with the model, but no optimiser, wrapper or checkpoint sees it.

    Args:
        teacher: `dict(model=..., weight=...)`, see `load_teacher`.
        freeze_bn: batch normalisation of all trained networks on running statistics.
        options: instead of the teacher's settings, see `Completer`.
    """

    def __init__(self, teacher: Mapping[str, Any], freeze_bn: bool, **options: Any) -> None:
        guest = load_teacher(teacher["model"], teacher.get("weight"))
        settings = {name: getattr(guest, name) for name in SETTINGS}
        if "schedule" in options:
            raise InputError("the schedule is the teacher's; a student cannot have another one")
        super().__init__(guest.encoder, copy.deepcopy(guest.denoiser), **{**settings, **options})
        self.schedule = guest.schedule
        self.denoiser.requires_grad_(True)
        self.freeze_bn = freeze_bn
        self._outside = [guest.denoiser]

    @property
    def teacher(self) -> nn.Module:
        """The frozen denoiser."""
        return self._outside[0]

    def _apply(self, fn: Any, recurse: bool = True) -> _Taught:
        super()._apply(fn, recurse)
        for network in self._outside:
            network._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> _Taught:
        """Training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        self.encoder.eval()
        self.teacher.eval()
        average = getattr(self, "average", None)
        if isinstance(average, nn.Module):
            average.eval()
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def export_state_dict(self) -> dict[str, Tensor]:
        """The weights of a `kd.DiffusionCompletion`: encoder and student, without what only trains them."""
        return {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith(("encoder.", "denoiser."))
        }

    def forward(self, batch: Mapping[str, Any], phase: str | None = None) -> dict[str, Tensor]:
        """Complete the scans of a batch; in training the losses of one phase, or of all of them."""
        if not self.training:
            return super().forward(batch)
        self.train()  # whoever switched the frozen parts since the last step
        return self.losses(batch, phase)

    def losses(self, batch: Mapping[str, Any], phase: str | None = None) -> dict[str, Tensor]:
        """See `Completer.losses`; `phase` names those of one kind of parameters, None all of them."""
        raise InputError(f"{type(self).__name__} has no losses; train one of its subclasses")

    def _condition(self, batch: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return self.encoder(batch["coord"], batch["offset"])

    def _base(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return tile(batch["coord"], batch["offset"], self.repeat)

    def _noise(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Times and noise for a batch."""
        t = draw_timesteps(len(offset), len(self.schedule)).to(x.device)
        return t, torch.randn_like(x)

    def _predict(
        self, networks: list[nn.Module], x: Tensor, offset: Tensor, t: Tensor, condition: Any
    ) -> list[Tensor]:
        """What several networks see in the same points, which are cut into cells once."""
        cells = getattr(networks[0], "voxelise", None)
        shared = {} if cells is None else {"voxels": cells(x, offset)}
        return [network(x, offset, t, condition, **shared) for network in networks]


class _Student(_Taught):
    """What the two distillations have in common.

    Args:
        train_steps: solver steps of the student's completions in training; the last of them has a gradient.
        random_stop: instead of solving to the end, complete by the prediction at a random one of the `train_steps`
            times; so a student for 8 steps learns at all of its 8 times, and not at the noisiest alone.
        ema: decay of a running average of the student's weights, which then completes in evaluation and is exported;
            0 for none. It takes in the weights that a training step of the student starts from.
        steps, guidance: in evaluation.
        scene_weight, point_weight: weights of the structural losses, which compare completions with the full scene; 0
            leaves one out.
        scene, point: their forms, see `scene_loss` and `point_loss`.
        candidates, keys, neighbours: of `point_loss`.
        Others: see `_Taught`.
    """

    watchers: nn.ModuleList

    def __init__(
        self,
        teacher: Mapping[str, Any],
        train_steps: int = 1,
        random_stop: bool = False,
        ema: float = 0.0,
        freeze_bn: bool = True,
        steps: int = 8,
        guidance: float = 3.5,
        scene_weight: float = 0.0,
        point_weight: float = 0.0,
        scene: str = "chamfer",
        point: str = "matched",
        candidates: int | None = None,
        keys: int | None = None,
        neighbours: int = 180,
        **options: Any,
    ) -> None:
        super().__init__(teacher, freeze_bn, steps=steps, guidance=guidance, **options)
        check_choice("scene", scene, SCENE_KINDS)
        check_choice("point", point, POINT_KINDS)
        self.scene_weight, self.point_weight = scene_weight, point_weight
        self.scene, self.point = scene, point
        self.candidates, self.keys, self.neighbours = candidates, keys, neighbours
        if not 1 <= train_steps < len(self.schedule):
            raise InputError(f"train_steps must lie in 1 .. {len(self.schedule) - 1}")
        if not 0 <= ema < 1:
            raise InputError(f"ema must lie in 0 .. 1, 1 excluded, got {ema}")
        self.train_steps, self.random_stop, self.ema = train_steps, random_stop, ema
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False) if ema else None

    @property
    def completing(self) -> nn.Module:
        """The running average where there is one, else the student."""
        return self.denoiser if self.average is None else self.average

    def export_state_dict(self) -> dict[str, Tensor]:
        """See `_Taught.export_state_dict`; of the running average where there is one."""
        weights = super().export_state_dict()
        if self.average is not None:
            state = self.average.state_dict()
            weights.update({f"denoiser.{key}": value for key, value in state.items()})
        return weights

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the running average towards the student."""
        if self.average is None:
            return
        state = self.denoiser.state_dict()
        for key, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(state[key], 1 - self.ema)
            else:
                value.copy_(state[key])

    def _watch(self, count: int) -> None:
        self.watchers = nn.ModuleList(copy.deepcopy(self.teacher) for _ in range(count))
        self.watchers.requires_grad_(True)

    def _completion(self, base: Tensor, ends: Tensor, condition: Any, **options: Any) -> Tensor:
        """The student's completions, with a gradient through the last call unless gradients are off."""
        return self.solve(
            self.denoiser,
            base,
            ends,
            condition,
            self.train_steps,
            last_step_grad=torch.is_grad_enabled(),
            **options,
        )

    def _structure(
        self, x: Tensor, ends: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The weighted structural losses of completions, summed, and each of them for the log."""
        g, g_ends = batch["complete"], batch["complete_offset"]
        total: Tensor | float = 0.0
        report = {}
        if self.scene_weight:
            value = scene_loss(x, g, ends, g_ends, self.scene)
            total = total + self.scene_weight * value
            report["loss_scene"] = value.detach()
        if self.point_weight:
            keys = self.candidates, self.keys, self.neighbours
            value = point_loss(x, g, ends, g_ends, *keys, kind=self.point)
            total = total + self.point_weight * value
            report["loss_point"] = value.detach()
        return total, report

    def _stop(self) -> int | None:
        return draw_stop(self.train_steps) if self.random_stop else None

    def losses(self, batch: Mapping[str, Any], phase: str | None = None) -> dict[str, Tensor]:
        """Losses of one phase; without a phase the sum of both, whose parameters have nothing in common."""
        if phase is None:
            first, second = (self.losses(batch, name) for name in PHASES)
            return {**first, **second, "loss": first["loss"] + second["loss"]}
        check_choice("phase", phase, PHASES)
        if phase == "student":
            self._follow()
        condition = self._condition(batch)
        return getattr(self, f"_{phase}")(batch, condition)


@kd.MODELS.register_module()
class ScoreDistillation(_Student):
    """Score distillation with structural losses.

    A batch holds, beside the scan, `complete` (n, 3) in metres and `complete_offset`. Phase `auxiliary` returns
    `loss_auxiliary`; phase `student` `loss_scene`, `loss_point` and, since the distillation term's value means nothing,
    `gap`: the mean squared difference of the two scores.

    Args:
        scene_weight, point_weight: as published, see `_Student`.
        score_weight: weight of the distillation term.
        normalize: divide that term, scan by scan, by the mean error of the teacher's prediction.
        Others: see `_Student`.
    """

    def __init__(
        self,
        teacher: Mapping[str, Any],
        scene_weight: float = 0.5,
        point_weight: float = 0.01,
        score_weight: float = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(teacher, scene_weight=scene_weight, point_weight=point_weight, **options)
        self.score_weight, self.normalize = score_weight, normalize
        self._watch(1)

    def _auxiliary(self, batch: Mapping[str, Any], condition: Any) -> dict[str, Tensor]:
        base, ends = self._base(batch)
        with evaluating(self.denoiser):
            x = self._completion(base, ends, condition, stop=self._stop())
        t, e = self._noise(x, ends)
        loss = noise_mse(self.watchers[0](self.noised(x, ends, t, e), ends, t, condition), e)
        return {"loss": loss, "loss_auxiliary": loss.detach()}

    def _student(self, batch: Mapping[str, Any], condition: Any) -> dict[str, Tensor]:
        base, ends = self._base(batch)
        x = self._completion(base, ends, condition, stop=self._stop())
        t, e = self._noise(x, ends)
        watcher = self.watchers[0]
        with evaluating(watcher):
            x_t = self.noised(x, ends, t, e)
            seen, watched = self._predict([self.teacher, watcher], x_t, ends, t, condition)
        report = {"gap": score_gap(seen, watched).square().mean()}
        with torch.autocast(x.device.type, enabled=False):
            weight: Tensor | float = 1.0
            if self.normalize:
                weight = normalising_weight(x, self._clean(x_t, seen, t, ends), ends)
            total = self.score_weight * score_surrogate(x, seen, watched, weight)
            structure, values = self._structure(x, ends, batch)
        return {"loss": total + structure, **report, **values}

    def _clean(self, x_t: Tensor, e: Tensor, t: Tensor, ends: Tensor) -> Tensor:
        """What predicted noise leaves of noised points."""
        signal = x_t - self.schedule.per_row("sigmas", t, x_t, ends) * full(e)
        if self.process == "local":
            return signal
        return signal / self.schedule.per_row("alphas", t, x_t, ends)


@kd.MODELS.register_module()
class PreferenceDistillation(_Student):
    """Preference distillation: towards the teacher on the better of two completions, away from it on the worse.

    A batch holds, beside the scan, `complete` (n, 3) in metres and `complete_offset`. Phase `auxiliary` returns
    `loss_auxiliary`; phase `student` what `diagnostics` says, since the loss's value means nothing.

    The term of the loser has no lower bound. Structural losses of the winner (`scene_weight`, `point_weight`, which
    the published method has not) hold it.

    Args:
        pairing, scale: see `pair_noise`.
        rank_by: `cd`, `jsd` (of the bird's-eye view) or `iou` (cells of 0.5 m), of all points against all of the
            scene.
        loser_weight: weight of the term that leads away from the loser.
        form: `difference`, or `logistic` with `beta`, see `logistic_preference_loss`.
        Others: see `_Student`.
    """

    def __init__(
        self,
        teacher: Mapping[str, Any],
        pairing: str = "scaled",
        scale: float = 1.1,
        rank_by: str = "cd",
        loser_weight: float = 1.0,
        form: str = "difference",
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(teacher, **options)
        check_choice("pairing", pairing, PAIRINGS)
        check_choice("rank_by", rank_by, RANKINGS)
        check_choice("form", form, ("difference", "logistic"))
        self.pairing, self.scale, self.rank_by = pairing, scale, rank_by
        self.loser_weight, self.form, self.beta = loser_weight, form, beta
        self._watch(2)

    def _pair(
        self, batch: Mapping[str, Any], condition: Any
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Winners, losers, end rows, and what `rank` said of first and second."""
        base, ends = self._base(batch)
        stop = self._stop()
        # The solver's own noise is shared by a scaled pair, so that its scale is all that differs.
        seeds = ScanNoise(ends).seeds
        others = seeds if self.pairing == "scaled" else ScanNoise(ends).seeds
        starts = pair_noise(ends, base, seeds, self.pairing, self.scale)
        first, second = (
            self._completion(base, ends, condition, noise=noise, seeds=own, stop=stop)
            for noise, own in zip(starts, (seeds, others))
        )
        ranking = rank(first, second, ends, batch, self.rank_by)
        return *split_pair(first, second, ranking[2], ends), ends, ranking

    def _auxiliary(self, batch: Mapping[str, Any], condition: Any) -> dict[str, Tensor]:
        with evaluating(self.denoiser):
            winner, loser, ends, _ = self._pair(batch, condition)
        seen = []
        for watcher, x in zip(self.watchers, (winner, loser)):
            t, e = self._noise(x, ends)
            seen.append((watcher(self.noised(x, ends, t, e), ends, t, condition), e))
        (better, e_w), (worse, e_l) = seen
        loss = assistant_loss(better, e_w, worse, e_l)
        return {"loss": loss, "loss_auxiliary": loss.detach()}

    def _student(self, batch: Mapping[str, Any], condition: Any) -> dict[str, Tensor]:
        winner, loser, ends, ranking = self._pair(batch, condition)
        t, e = self._noise(winner, ends)
        scores: list[Tensor] = []
        for watcher, x in zip(self.watchers, (winner, loser)):
            with evaluating(watcher):
                x_t = self.noised(x, ends, t, e)
                scores += self._predict([self.teacher, watcher], x_t, ends, t, condition)
        seen_w, better, seen_l, worse = scores
        v = self.loser_weight
        with torch.autocast(winner.device.type, enabled=False):
            if self.form == "logistic":
                loss = logistic_preference_loss(
                    winner, loser, seen_w, better, seen_l, worse, ends, self.beta, v
                )
            else:
                loss = preference_loss(winner, loser, seen_w, better, seen_l, worse, v)
            structure, values = self._structure(winner, ends, batch)
        report = diagnostics(seen_w, better, seen_l, worse, *ranking, v)
        return {"loss": loss + structure, **report, **values}


@kd.MODELS.register_module()
class PreferenceAlignment(_Taught):
    """Diffusion-DPO: the teacher learns to prefer the better of two of its own completions, held by a frozen copy.

    The pairs are completions by the frozen copy from two seeds, ranked by a metric; a batch that holds `winner`,
    `winner_offset`, `loser` and `loser_offset` brings its own. In training `forward` returns `loss`, `margin` (how much
    more the model improved on winners than on losers, times beta) and `accuracy` (part of the scans where it did).

    Args:
        teacher: `dict(model=..., weight=...)`, see `load_teacher`.
        beta: strength, see `dpo_loss`.
        pair_steps, pair_guidance: how the pairs are completed.
        rank_by: see `PreferenceDistillation`.
        freeze_bn: batch normalisation on running statistics, as the frozen copy has it.
        options: see `Completer`.
    """

    def __init__(
        self,
        teacher: Mapping[str, Any],
        beta: float = 2000.0,
        pair_steps: int = 8,
        pair_guidance: float = 6.0,
        rank_by: str = "cd",
        freeze_bn: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(teacher, freeze_bn, **options)
        check_choice("rank_by", rank_by, RANKINGS)
        if not beta > 0:
            raise InputError(f"beta must be positive, got {beta}")
        self.beta, self.rank_by = beta, rank_by
        self.pair_steps, self.pair_guidance = pair_steps, pair_guidance

    @torch.no_grad()
    def _pair(self, batch: Mapping[str, Any], condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        if "winner" in batch:
            ends = batch["winner_offset"]
            if ends.tolist() != batch["loser_offset"].tolist():
                raise InputError(
                    "winner and loser of a scan must have equally many points; they end at "
                    f"{ends.tolist()} and {batch['loser_offset'].tolist()}"
                )
            return batch["winner"], batch["loser"], ends
        base, ends = self._base(batch)
        first, second = (
            self.solve(self.teacher, base, ends, condition, self.pair_steps, self.pair_guidance)
            for _ in range(2)
        )
        wins = rank(first, second, ends, batch, self.rank_by)[2]
        return *split_pair(first, second, wins, ends), ends

    def losses(self, batch: Mapping[str, Any], phase: str | None = None) -> dict[str, Tensor]:
        """See `Completer.losses`; there is one phase."""
        condition = self._condition(batch)
        winner, loser, ends = self._pair(batch, condition)
        t, e = self._noise(winner, ends)
        parts = []
        for x in (winner, loser):
            x_t = self.noised(x, ends, t, e)
            own = self.denoiser(x_t, ends, t, condition)
            with torch.no_grad():
                parts.append((own, self.teacher(x_t, ends, t, condition)))
        (own_w, ref_w), (own_l, ref_l) = parts
        with torch.autocast(winner.device.type, enabled=False):
            loss = dpo_loss(own_w, ref_w, e, own_l, ref_l, e, ends, self.beta)
        with torch.no_grad():
            margin = dpo_gain(own_l, ref_l, e, ends) - dpo_gain(own_w, ref_w, e, ends)
        return {
            "loss": loss,
            "margin": self.beta * margin.mean(),
            "accuracy": (margin > 0).double().mean(),
        }
