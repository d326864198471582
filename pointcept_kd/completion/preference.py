"""Preferences between completions: distillation from pairs, and the teacher's own alignment.

Two completions of one scan are ranked by a metric; the better one is the winner w, the other the loser l.

Preference distillation. One auxiliary network e_B sees winners only, another, e_W, losers only:

    assistants    L = mean( (e_w - e_B(w_t))^2 ) + mean( (e_l - e_W(l_t))^2 )
    student       L = Dist(e_T, e_B; w) - v Dist(e_T, e_W; l)        Dist as in `score.py`; one t and e for both

so that dL/dw = (e_T - e_B)/N, towards the teacher, and dL/dl = -v (e_T - e_W)/N, away from it. Where w and l are nearly
the same the two cancel, and the second has no lower bound: v and the clipping of gradients hold it back.

Diffusion-DPO of the teacher, with a frozen copy e_ref of itself and one t for both:

    L = -log sigmoid( -beta ( [|e_w - e(w_t)|^2 - |e_w - e_ref(w_t)|^2] - [|e_l - e(l_t)|^2 - |e_l - e_ref(l_t)|^2] ) )

Zhao et al., 2025, arXiv:2504.11447; Wallace et al., 2023, arXiv:2311.12908.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.distance import chamfer_distance
from pointcept_kd.ops.scatter import segment_mean

from .diffusion import full, noise_mse
from .sampler import ScanNoise
from .schedule import spread
from .score import score_gap, score_surrogate

PAIRINGS = ("scaled", "independent")
# (completion (n, 3), scene (m, 3)) -> a number
Metric = Callable[[Tensor, Tensor], "Tensor | float"]


def pair_noise(
    offset: Int[Tensor, " b"],
    like: Float[Tensor, "n 3"],
    seeds: Sequence[int] | None = None,
    pairing: str = "scaled",
    scale: float = 1.1,
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """The noise from which the two completions of a pair start.

    Args:
        offset: end rows of the scans.
        like: gives type and device.
        seeds: one per scan; None draws them from torch's default generator.
        pairing: `scaled`: the same noise, once as it is and once times `scale`, as published; `independent`: two draws,
            the second not scaled.
        scale: of the second noise. The first of the pair is the better one nearly always where a network takes all
            noise for unit noise: then 0.086 of the noise are left after one step, of noise 1.1 times as large 0.67.

    Raises:
        InputError: for an unknown pairing, or seeds that are not one per scan.
    """
    check_choice("pairing", pairing, PAIRINGS)
    source = ScanNoise(offset, seeds)
    first = source.draw(like)
    return first, first * scale if pairing == "scaled" else source.draw(like)


def chamfer(completion: Float[Tensor, "n 3"], scene: Float[Tensor, "m 3"]) -> Tensor:
    """CD of one completion, in metres: the published ranking."""
    return chamfer_distance(completion, scene)[0]


@torch.no_grad()
def quality(
    x: Float[Tensor, "n 3"],
    g: Float[Tensor, "m 3"],
    x_offset: Int[Tensor, " b"],
    g_offset: Int[Tensor, " b"],
    metric: Metric = chamfer,
) -> Float[Tensor, " b"]:
    """A metric of each completion against its scene, float64 on the CPU.

    Raises:
        InputError: for numbers of scans that differ, or a metric that is not a number.
    """
    if len(x_offset) != len(g_offset):
        raise InputError(f"{len(x_offset)} completions of {len(g_offset)} scenes")
    values = []
    begin = start = 0
    for end, stop in zip(x_offset.tolist(), g_offset.tolist()):
        values.append(float(metric(x[begin:end], g[start:stop])))
        begin, start = end, stop
    result = torch.tensor(values, dtype=torch.float64)
    if result.isnan().any():
        scan = int(result.isnan().nonzero()[0])
        raise InputError(f"the metric of scan {scan} is not a number; it cannot rank a pair")
    return result


def first_wins(
    first: Float[Tensor, " b"], second: Float[Tensor, " b"], higher_is_better: bool = False
) -> Bool[Tensor, " b"]:
    """Whether the first of each pair is strictly the better one; of equals the second wins."""
    return first > second if higher_is_better else first < second


def split_pair(
    first: Float[Tensor, "n 3"],
    second: Float[Tensor, "n 3"],
    wins: Bool[Tensor, " b"],
    offset: Int[Tensor, " b"],
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
    """Winners and losers, scan by scan; gradients flow into both of the pair."""
    rows = spread(wins.to(first.device), offset, len(first))[:, None]
    return torch.where(rows, first, second), torch.where(rows, second, first)


def assistant_loss(
    eps_better: Float[Tensor, "n 3"],
    e_winner: Float[Tensor, "n 3"],
    eps_worse: Float[Tensor, "n 3"],
    e_loser: Float[Tensor, "n 3"],
) -> Float[Tensor, ""]:
    """The assistants' loss: mean squared error of either prediction, summed."""
    return noise_mse(eps_better, e_winner) + noise_mse(eps_worse, e_loser)


def preference_loss(
    winner: Float[Tensor, "n 3"],
    loser: Float[Tensor, "n 3"],
    eps_teacher_w: Float[Tensor, "n 3"],
    eps_better: Float[Tensor, "n 3"],
    eps_teacher_l: Float[Tensor, "n 3"],
    eps_worse: Float[Tensor, "n 3"],
    loser_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """The student's loss, Dist(e_T, e_B; w) - loser_weight Dist(e_T, e_W; l); its value has no meaning.

    Args:
        winner, loser: completions, with graph.
        eps_teacher_w, eps_better: noise that teacher and first assistant see in the noised winner; constants.
        eps_teacher_l, eps_worse: the same of teacher and second assistant in the noised loser.
        loser_weight: v.
    """
    towards = score_surrogate(winner, eps_teacher_w, eps_better)
    return towards - loser_weight * score_surrogate(loser, eps_teacher_l, eps_worse)


def logistic_preference_loss(
    winner: Float[Tensor, "n 3"],
    loser: Float[Tensor, "n 3"],
    eps_teacher_w: Float[Tensor, "n 3"],
    eps_better: Float[Tensor, "n 3"],
    eps_teacher_l: Float[Tensor, "n 3"],
    eps_worse: Float[Tensor, "n 3"],
    offset: Int[Tensor, " b"],
    beta: float = 1.0,
    loser_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """-log sigmoid( -beta (Dist_w - v Dist_l) ) of each scan, mean over scans: an option beyond the published loss.

    Dist_w - v Dist_l is counted from where the coordinates have their origin, so beta sets how strongly a pair weighs
    only for clouds centred alike; the direction of the gradient is that of `preference_loss`.
    """
    scans = offset2batch(offset).to(winner.device)
    towards = score_gap(eps_teacher_w, eps_better) * full(winner)
    away = score_gap(eps_teacher_l, eps_worse) * full(loser)
    rows = (towards - loser_weight * away).mean(1, keepdim=True)
    values = F.softplus(beta * segment_mean(rows, scans, len(offset))[:, 0])
    return joint_mean(values.mean() if len(values) else values.sum(), len(values))


@torch.no_grad()
def diagnostics(
    eps_teacher_w: Float[Tensor, "n 3"],
    eps_better: Float[Tensor, "n 3"],
    eps_teacher_l: Float[Tensor, "n 3"],
    eps_worse: Float[Tensor, "n 3"],
    first: Float[Tensor, " b"],
    second: Float[Tensor, " b"],
    wins: Bool[Tensor, " b"],
    loser_weight: float = 1.0,
) -> dict[str, Tensor]:
    """What to watch instead of the loss's value, 0-dim tensors by name.

    Args:
        eps_teacher_w, eps_better, eps_teacher_l, eps_worse: see `preference_loss`.
        first, second: the metric of each pair's two completions, and `wins` which of them won.
        loser_weight: v.

    Returns:
        `gap_w`, `gap_l`: mean squared difference of the two scores on winners and on losers; `grad_w`, `grad_l`: norms
        of the loss's gradient with respect to them; `metric_w`, `metric_l`: mean metric of winners and of losers;
        `swap_rate`: part of the pairs that the second completion won.
    """
    gap_w, gap_l = score_gap(eps_teacher_w, eps_better), score_gap(eps_teacher_l, eps_worse)
    wins = wins.to(first.device)
    return {
        "gap_w": gap_w.square().mean(),
        "gap_l": gap_l.square().mean(),
        "grad_w": gap_w.norm() / gap_w.numel(),
        "grad_l": abs(loser_weight) * gap_l.norm() / gap_l.numel(),
        "metric_w": torch.where(wins, first, second).mean(),
        "metric_l": torch.where(wins, second, first).mean(),
        "swap_rate": (~wins).double().mean(),
    }


def dpo_loss(
    eps_w: Float[Tensor, "n 3"],
    ref_w: Float[Tensor, "n 3"],
    e_w: Float[Tensor, "n 3"],
    eps_l: Float[Tensor, "n 3"],
    ref_l: Float[Tensor, "n 3"],
    e_l: Float[Tensor, "n 3"],
    offset: Int[Tensor, " b"],
    beta: float = 2000.0,
) -> Float[Tensor, ""]:
    """Diffusion-DPO: how little more the network improves on its reference on winners than on losers.

    Args:
        eps_w, ref_w: noise that the network (with graph) and its reference see in the noised winners.
        e_w: the noise that is in them.
        eps_l, ref_l, e_l: the same of the losers; noised to the same times.
        offset: end rows of the scans.
        beta: strength, the product beta T omega(t) of the paper.

    Returns:
        Mean over scans of -log sigmoid; |.|^2 is the squared length of a point's noise, averaged over a scan's points.
        ln 2 where network and reference agree.
    """
    gains = dpo_gain(eps_w, ref_w, e_w, offset), dpo_gain(eps_l, ref_l, e_l, offset)
    values = F.softplus(beta * (gains[0] - gains[1]))
    return joint_mean(values.mean() if len(values) else values.sum(), len(values))


def dpo_gain(
    eps: Float[Tensor, "n 3"],
    ref: Float[Tensor, "n 3"],
    e: Float[Tensor, "n 3"],
    offset: Int[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """|e - eps|^2 - |e - ref|^2, mean over the points of each scan: below 0 where the network beats its reference."""
    own = (e - full(eps)).square().sum(1, keepdim=True)
    kept = (e - full(ref).detach()).square().sum(1, keepdim=True)
    return segment_mean(own - kept, offset2batch(offset).to(eps.device), len(offset))[:, 0]
