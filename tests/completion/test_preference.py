"""Pairs, their ranking and the losses on them: by hand, in loops, and with gradients that are what they should be."""

import math

import pytest
import torch

from pointcept_kd.completion.preference import (
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
from pointcept_kd.completion.sampler import ScanNoise
from pointcept_kd.completion.score import score_surrogate
from pointcept_kd.host import InputError

ENDS = torch.tensor([10, 25])


def noise(seed, n=25):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


def test_scaled_pair():
    like = torch.zeros(25, 3)
    first, second = pair_noise(ENDS, like, [3, 4])
    assert torch.equal(first, ScanNoise(ENDS, [3, 4]).draw(like))
    torch.testing.assert_close(second, 1.1 * first)
    assert torch.equal(pair_noise(ENDS, like, [3, 4], scale=1.5)[1], 1.5 * first)


def test_independent_pair():
    like = torch.zeros(3000, 3)
    first, second = pair_noise(torch.tensor([3000]), like, [3], "independent")
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05
    assert second.std().item() == pytest.approx(1, abs=0.03)
    # The second of a scan is its own, too: not that of the batch.
    parts = pair_noise(torch.tensor([3000, 3004]), torch.zeros(3004, 3), [3, 9], "independent")
    assert torch.equal(parts[1][:3000], second)
    with pytest.raises(InputError, match="nearest: scaled"):
        pair_noise(ENDS, like, pairing="scale")
    with pytest.raises(InputError, match="need as many seeds"):
        pair_noise(ENDS, like, [1])


def test_ranking_by_hand():
    g = torch.tensor([[0.0, 0, 0], [0, 0, 0]])
    first = torch.tensor([[1.0, 0, 0], [3, 0, 0]])
    second = torch.tensor([[2.0, 0, 0], [2, 0, 0]])
    ends = torch.tensor([1, 2])
    a, b = quality(first, g, ends, ends), quality(second, g, ends, ends)
    assert a.tolist() == [1, 3]
    assert b.tolist() == [2, 2]
    wins = first_wins(a, b)
    assert wins.tolist() == [True, False]
    winner, loser = split_pair(first, second, wins, ends)
    assert winner[:, 0].tolist() == [1, 2]
    assert loser[:, 0].tolist() == [2, 3]
    assert first_wins(a, b, higher_is_better=True).tolist() == [False, True]


def test_of_equals_the_second_wins():
    same = torch.ones(3)
    assert not first_wins(same, same).any()
    assert not first_wins(same, same, higher_is_better=True).any()


def test_any_metric_ranks_scan_by_scan():
    seen = []

    def metric(x, g):
        seen.append((len(x), len(g)))
        return float(len(x))

    x, g = noise(0), noise(1, 40)
    values = quality(x, g, ENDS, torch.tensor([30, 40]), metric)
    assert seen == [(10, 30), (15, 10)]
    assert values.tolist() == [10, 15]
    assert values.dtype == torch.float64
    assert chamfer(x, x).item() == 0
    with pytest.raises(InputError, match="metric of scan 0 is not a number"):
        quality(x, g, ENDS, torch.tensor([30, 40]), lambda x, g: math.nan)
    with pytest.raises(InputError, match="2 completions of 1 scenes"):
        quality(x, g, ENDS, torch.tensor([40]))


def test_gradients_reach_the_pair_they_came_from():
    first, second = noise(0).requires_grad_(), noise(1).requires_grad_()
    winner, _ = split_pair(first, second, torch.tensor([True, False]), ENDS)
    winner.sum().backward()
    assert first.grad[:10].eq(1).all()
    assert first.grad[10:].eq(0).all()
    assert second.grad[:10].eq(0).all()
    assert second.grad[10:].eq(1).all()


def test_assistants_loss_by_hand():
    one = torch.ones(2, 3)
    loss = assistant_loss(one, 0 * one, 3 * one, one)
    assert loss.item() == 1 + 4


def point(value):
    return torch.tensor([[value, 0.0, 0.0]], dtype=torch.float64)


def golden(w, l):
    return preference_loss(w, l, point(0.2), point(0.5), point(0.1), point(0.4))


def test_gradient_by_hand():
    w, l = noise(0, 1).requires_grad_(), noise(1, 1).requires_grad_()
    golden(w, l).backward()
    torch.testing.assert_close(w.grad, point(-0.1))
    torch.testing.assert_close(l.grad, point(0.1))
    # Winner and loser exchanged, each with what is seen in it: both gradients turn round.
    swapped_w, swapped_l = (noise(i, 1).requires_grad_() for i in (1, 0))
    preference_loss(swapped_w, swapped_l, point(0.1), point(0.4), point(0.2), point(0.5)).backward()
    torch.testing.assert_close(swapped_l.grad, -w.grad)
    torch.testing.assert_close(swapped_w.grad, -l.grad)


def test_gradient_is_the_difference_of_scores_on_both():
    w, l = noise(0).requires_grad_(), noise(1).requires_grad_()
    t_w, better, t_l, worse = (noise(i) for i in range(2, 6))
    preference_loss(w, l, t_w, better, t_l, worse, 0.7).backward()
    torch.testing.assert_close(w.grad, (t_w - better) / 75)
    torch.testing.assert_close(l.grad, -0.7 * (t_l - worse) / 75)
    assert w.grad.abs().max() > 0


def test_the_same_pair_cancels_on_shared_parameters():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x, seen, watched = noise(0), noise(1), noise(2)
    preference_loss(weight * x, weight * x, seen, watched, seen, watched).backward()
    assert weight.grad.abs().max() < 1e-15
    # A pair of the same points whose watchers differ does not.
    weight.grad = None
    preference_loss(weight * x, weight * x, seen, watched, seen, noise(3)).backward()
    assert weight.grad.abs().max() > 1e-3


def test_logistic_form_is_the_loop():
    w, l = noise(0).requires_grad_(), noise(1).requires_grad_()
    scores = [noise(i) for i in range(2, 6)]
    got = logistic_preference_loss(w, l, *scores, ENDS, beta=3.0, loser_weight=0.5)
    values = []
    for a, b in ((0, 10), (10, 25)):
        part = [x[a:b] for x in (w, l, *scores)]
        dist_w = ((part[2] - part[3]) * part[0]).sum().item() / (3 * (b - a))
        dist_l = ((part[4] - part[5]) * part[1]).sum().item() / (3 * (b - a))
        values.append(math.log(1 + math.exp(3.0 * (dist_w - 0.5 * dist_l))))
    assert got.item() == pytest.approx(sum(values) / 2)
    assert torch.autograd.gradcheck(
        lambda w, l: logistic_preference_loss(w, l, *scores, ENDS, 3.0, 0.5), (w, l)
    )
    # One scan: the direction of the plain form, times a positive number.
    one = torch.tensor([25])
    (logistic,) = torch.autograd.grad(logistic_preference_loss(w, l, *scores, one), w)
    (plain,) = torch.autograd.grad(preference_loss(w, l, *scores), w)
    factor = logistic / plain
    torch.testing.assert_close(factor, factor[0, 0].expand(25, 3))
    assert 0 < factor[0, 0] < 1


def test_diagnostics():
    w, l = noise(0).requires_grad_(), noise(1).requires_grad_()
    t_w, better, t_l, worse = scores = [noise(i) for i in range(2, 6)]
    first, second = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    seen = diagnostics(*scores, first, second, torch.tensor([True, False]), 0.7)
    preference_loss(w, l, *scores, 0.7).backward()
    assert seen["grad_w"].item() == pytest.approx(w.grad.norm().item())
    assert seen["grad_l"].item() == pytest.approx(l.grad.norm().item())
    assert seen["gap_w"].item() == pytest.approx(((t_w - better) ** 2).mean().item())
    assert seen["gap_l"].item() == pytest.approx(((t_l - worse) ** 2).mean().item())
    assert seen["metric_w"].item() == 2  # of 1 and 3
    assert seen["metric_l"].item() == 3.5
    assert seen["swap_rate"].item() == 0.5
    assert all(value.dim() == 0 and not value.requires_grad for value in seen.values())


def loop_dpo(eps_w, ref_w, e_w, eps_l, ref_l, e_l, beta):
    values = []
    for a, b in ((0, 10), (10, 25)):
        total = 0.0
        for sign, eps, ref, e in ((1, eps_w, ref_w, e_w), (-1, eps_l, ref_l, e_l)):
            for i in range(a, b):
                own = math.dist(e[i].tolist(), eps[i].tolist()) ** 2
                kept = math.dist(e[i].tolist(), ref[i].tolist()) ** 2
                total += sign * (own - kept) / (b - a)
        values.append(-math.log(1 / (1 + math.exp(beta * total))))
    return sum(values) / len(values)


def test_dpo_is_the_loop():
    parts = [noise(i) for i in range(6)]
    assert dpo_loss(*parts, ENDS, 0.3).item() == pytest.approx(loop_dpo(*parts, 0.3))
    leaves = parts[0].requires_grad_(), parts[3].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, l: dpo_loss(w, *parts[1:3], l, *parts[4:], ENDS, 0.3), leaves
    )
    reference = parts[1].requires_grad_()
    dpo_loss(*parts, ENDS, 0.3).backward()
    assert reference.grad is None


def test_dpo_by_hand():
    """The model halves its error on the winner (from 1 to 0) and doubles it on the loser: as it should."""
    one, zero = torch.ones(1, 3), torch.zeros(1, 3)
    end = torch.tensor([1])
    assert dpo_gain(zero, one, zero, end).item() == -3
    good = dpo_loss(zero, one, zero, 2 * one, one, zero, end, 0.1)
    assert good.item() == pytest.approx(math.log(1 + math.exp(-0.1 * (3 + 9))))
    bad = dpo_loss(2 * one, one, zero, zero, one, zero, end, 0.1)
    assert bad.item() == pytest.approx(math.log(1 + math.exp(0.1 * (3 + 9))))
    assert dpo_loss(one, one, zero, zero, zero, one, end).item() == pytest.approx(math.log(2))
    # So far on the wrong side that exp overflows: the value is still the exponent.
    far = dpo_loss(100 * one, one, zero, zero, one, zero, end, 2000.0)
    assert far.item() == pytest.approx(2000 * (3 * 9999 + 3))


def test_surrogate_of_one_side():
    w, l = noise(0), noise(1)
    t_w, better, t_l, worse = (noise(i) for i in range(2, 6))
    both = preference_loss(w, l, t_w, better, t_l, worse)
    expected = score_surrogate(w, t_w, better) - score_surrogate(l, t_l, worse)
    assert both.item() == pytest.approx(expected.item())
    alone = preference_loss(w, l, t_w, better, t_l, worse, 0.0)
    assert alone.item() == pytest.approx(score_surrogate(w, t_w, better).item())
