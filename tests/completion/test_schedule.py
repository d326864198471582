"""Noise levels against published values and loops in python floats."""

import math

import numpy as np
import pytest
import torch

from pointcept_kd.completion.schedule import SCHEDULES, Schedule, betas, spread
from pointcept_kd.host import InputError


def test_acceptance_values():
    schedule = Schedule()
    assert len(schedule) == 1000
    a = schedule.alphas**2
    for t, value in {
        0: 0.999965000,
        1: 0.999923029,
        99: 0.962693192,
        249: 0.797808791,
        499: 0.411356220,
        749: 0.136970219,
        999: 0.029430003,
    }.items():
        assert a[t] == pytest.approx(value, abs=6e-10)
    for t, value in {0: 0.005916080, 499: 0.767231243, 999: 0.985175110}.items():
        assert schedule.sigmas[t] == pytest.approx(value, abs=6e-10)
    assert schedule.alphas[999] == pytest.approx(0.171551749, abs=6e-10)
    assert schedule.betas.sum() == pytest.approx(3.5175)


def loop_betas(kind, total, first, last):
    if kind == "linear":
        return [first + (last - first) * i / (total - 1) for i in range(total)]
    if kind == "quadratic":
        a, b = math.sqrt(first), math.sqrt(last)
        return [(a + (b - a) * i / (total - 1)) ** 2 for i in range(total)]
    if kind == "sigmoid":
        at = [-6 + 12 * i / (total - 1) for i in range(total)]
        return [first + (last - first) / (1 + math.exp(-v)) for v in at]

    def f(i):
        return math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(0.9999, max(1e-4, 1 - f(i + 1) / f(i))) for i in range(total)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_the_loops(kind):
    expected = loop_betas(kind, 200, 1e-4, 0.02)
    np.testing.assert_allclose(betas(kind, 200, 1e-4, 0.02), expected, rtol=1e-12)
    schedule = Schedule(kind, 200, 1e-4, 0.02)
    a = 1.0
    for t, beta in enumerate(expected):
        a *= 1 - beta
        assert schedule.alphas[t] == pytest.approx(math.sqrt(a), rel=1e-11)
        assert schedule.sigmas[t] == pytest.approx(math.sqrt(1 - a), rel=1e-9)
        assert schedule.lambdas[t] == pytest.approx(math.log(a / (1 - a)) / 2, abs=1e-8)
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, 1, rtol=1e-12)
    assert (np.diff(schedule.lambdas) < 0).all()


def test_noised_point_by_hand():
    p, e = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 0, -1]])
    x = Schedule().add_noise(p, 499, e)
    torch.testing.assert_close(x, torch.tensor([[1.767231243, 2, 2.232768757]]))
    assert x.dtype == torch.float32
    x = Schedule().add_noise(p, torch.tensor([499]), e, torch.tensor([1]), "global")
    alpha = math.sqrt(0.411356220)
    expected = [[alpha + 0.767231243, 2 * alpha, 3 * alpha - 0.767231243]]
    torch.testing.assert_close(x, torch.tensor(expected))


def test_one_time_per_scan():
    schedule = Schedule()
    p, e = torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    x = schedule.add_noise(p, torch.tensor([999, 0, 5]), e, torch.tensor([2, 5, 5]))
    assert x[:, 0].tolist() == [schedule.sigmas[999]] * 2 + [schedule.sigmas[0]] * 3
    t = torch.tensor([0, 999])
    assert schedule.sigma(t).dtype == torch.float32
    assert schedule.alpha(t, torch.float64).tolist() == schedule.alphas[[0, 999]].tolist()
    assert schedule.log_snr(t, torch.float64).tolist() == schedule.lambdas[[0, 999]].tolist()


@pytest.mark.parametrize("process", ["local", "global"])
def test_noising_is_differentiable_in_the_points(process):
    p = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    e, ends = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 4])
    t = torch.tensor([30, 700])
    schedule = Schedule()
    assert torch.autograd.gradcheck(lambda p: schedule.add_noise(p, t, e, ends, process), p)


def test_bad_input():
    with pytest.raises(InputError, match="nearest: cosine"):
        Schedule("cosin")
    with pytest.raises(InputError, match="at least 2 steps"):
        Schedule(steps=1)
    for first, last in ((0, 0.1), (0.2, 0.1), (0.1, 1)):
        with pytest.raises(InputError, match="0 < first <= last < 1"):
            Schedule(first=first, last=last)
    schedule, p = Schedule(), torch.zeros(4, 3)
    with pytest.raises(InputError, match="process='locl'"):
        schedule.add_noise(p, 1, p, process="locl")
    with pytest.raises(InputError, match="time 1000 lies outside"):
        schedule.add_noise(p, 1000, p)
    with pytest.raises(InputError, match=r"times \[-1, 3\] lie outside"):
        schedule.add_noise(p, torch.tensor([-1, 3]), p, torch.tensor([2, 4]))
    with pytest.raises(InputError, match="2 times need as many scans, got no offset"):
        schedule.add_noise(p, torch.tensor([1, 3]), p)
    with pytest.raises(InputError, match="points are"):
        schedule.add_noise(p, 1, p[:2])
    with pytest.raises(InputError, match="does not divide 4 rows"):
        spread(torch.zeros(2), torch.tensor([2, 3]), 4)
