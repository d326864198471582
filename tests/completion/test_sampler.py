"""The solver against published coefficients, a loop in python floats, the exact flow of a Gaussian, and diffusers."""

import math
from itertools import product

import pytest
import torch

from pointcept_kd.completion.sampler import (
    ScanNoise,
    crop,
    draw_stop,
    inside,
    sample,
    solver_steps,
    start_points,
    time_grid,
)
from pointcept_kd.completion.schedule import Schedule
from pointcept_kd.host import InputError

SCHEDULE = Schedule()


def test_time_grids():
    assert time_grid(8) == [999, 874, 749, 624, 500, 375, 250, 125]
    assert time_grid(4) == [999, 749, 500, 250]
    assert time_grid(2) == [999, 500]
    assert time_grid(1) == [999]
    assert time_grid(999) == list(range(999, 0, -1))
    assert time_grid(20, 300) == list(range(300, 0, -15))


def test_acceptance_coefficients():
    (only,) = solver_steps(SCHEDULE, 1)
    assert only.a == pytest.approx(6.19e-6, abs=5e-9)
    assert only.b == pytest.approx(0.99998144, abs=5e-9)
    assert only.c == pytest.approx(0.00591608, abs=5e-9)
    steps = solver_steps(SCHEDULE, 8)
    for number, expected in {
        0: (0.63674261, 0.14973887, 0.73445482),
        2: (0.64171613, 0.26321948, 0.62760565),
        7: (0.00058982, 0.99940992, 0.00591439),
    }.items():
        step = steps[number]
        assert (step.a, step.b, step.c) == pytest.approx(expected, abs=6e-9)
    assert steps[2].ratio == pytest.approx(0.941832, abs=5e-7)
    assert [bool(step.ratio) for step in steps] == [False] + [True] * 6 + [False]
    last = solver_steps(SCHEDULE, 8, final_sigmas="zero")[-1]
    assert (last.a, last.b, last.c) == (0, 1, 0)


def test_second_order_to_the_end_with_many_steps():
    assert solver_steps(SCHEDULE, 14)[-1].ratio == 0
    assert solver_steps(SCHEDULE, 15)[-1].ratio > 0
    assert solver_steps(SCHEDULE, 15, final_sigmas="zero")[-1].ratio == 0


@pytest.mark.parametrize(("e", "expected"), [(0.0, 5.829144881), (1.0, 0.086416432)])
def test_prediction_at_the_first_time_by_hand(e, expected):
    base = torch.zeros(1, 3, dtype=torch.float64)
    x = sample(
        lambda x, t: torch.full_like(x, e),
        base,
        torch.tensor([1]),
        1,
        noise=torch.ones_like(base),
        stop=0,
    )
    assert x.tolist() == [[pytest.approx(expected, abs=1e-9)] * 3]


def test_a_perfect_predictor_leaves_a_residual_of_unit_noise_only():
    """Noise 1 where sigma is 0.985: predicted as noise, 0.0864 of it stay; scaled by sigma, or seen whole, none."""
    base, noise = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    options = dict(noise=noise, final_sigmas="zero")
    left = sample(lambda x, t: noise, base, torch.tensor([1]), 1, **options)
    assert left[0, 0].item() == pytest.approx(0.086416432)
    start = dict(start_scale="sigma_T")
    none = sample(lambda x, t: noise, base, torch.tensor([1]), 1, **options, **start)
    assert none.abs().max() < 1e-12


def loop_solve(d, plan_times, eps, noise, sde, clean_end, base=0.0):
    """One coordinate, formula by formula, in python floats."""

    def level(t):
        a = 1.0
        for i in range(t + 1):
            a *= 1 - (3.5e-5 + (0.007 - 3.5e-5) * i / 999)
        return math.sqrt(a), math.sqrt(1 - a)

    before, lam_before = None, None
    n = len(plan_times)
    for k, u in enumerate(plan_times):
        alpha_u, sigma_u = level(u)
        final = k == n - 1
        v = 0 if final else plan_times[k + 1]
        alpha_v, sigma_v = level(v)
        clean = (d - sigma_u * eps(base + d, u)) / alpha_u
        if final and clean_end:
            return base + clean
        lam_u, lam_v = math.log(alpha_u / sigma_u), math.log(alpha_v / sigma_v)
        h = lam_v - lam_u
        used = clean
        if before is not None and not (final and n < 15):
            used = clean + 0.5 * (clean - before) * h / (lam_u - lam_before)
        if sde:
            d = (
                sigma_v / sigma_u * math.exp(-h) * d
                + alpha_v * (1 - math.exp(-2 * h)) * used
                + sigma_v * math.sqrt(1 - math.exp(-2 * h)) * noise[k]
            )
        else:
            d = sigma_v / sigma_u * d + alpha_v * (1 - math.exp(-h)) * used
        before, lam_before = clean, lam_u
    return base + d


@pytest.mark.parametrize(
    ("n", "solver", "final"), list(product([1, 2, 8, 16], ["sde", "ode"], ["sigma_min", "zero"]))
)
def test_solver_is_the_loop(n, solver, final):
    base = torch.tensor([[1.0, -2, 0.5], [3, 0, 1]], dtype=torch.float64)
    ends, seed = torch.tensor([2]), 7

    def eps(x, t):
        return math.sin(3 * x) + t / 2000

    def denoise(x, t):
        return (3 * x).sin() + t[0].double() / 2000

    got = sample(denoise, base, ends, n, seeds=seed, solver=solver, final_sigmas=final)
    source = ScanNoise(ends, seed)
    start = source.draw(base)
    later = [source.draw(base) for _ in range(n)]
    for row, axis in product(range(2), range(3)):
        expected = loop_solve(
            start[row, axis].item(),
            time_grid(n),
            eps,
            [z[row, axis].item() for z in later],
            solver == "sde",
            final == "zero",
            base[row, axis].item(),
        )
        assert got[row, axis].item() == pytest.approx(expected, abs=1e-9)


def gaussian(width):
    """The best prediction of the noise where the clean signal is N(0, width^2)."""

    def denoise(x, t):
        alpha, sigma = SCHEDULE.alphas[int(t[0])], SCHEDULE.sigmas[int(t[0])]
        return sigma * x / (alpha**2 * width**2 + sigma**2)

    return denoise


def test_ode_follows_the_exact_flow_of_a_gaussian():
    """Its flow only rescales: by the ratio of the standard deviations at both ends. Errors fall with the square."""
    base = torch.zeros(1, 3, dtype=torch.float64)
    noise = torch.ones_like(base)
    width = 0.5

    def deviation(t):
        return math.sqrt(SCHEDULE.alphas[t] ** 2 * width**2 + SCHEDULE.sigmas[t] ** 2)

    exact = deviation(0) / deviation(999)
    errors = []
    for n in (80, 160):
        x = sample(
            gaussian(width), base, torch.tensor([1]), n, solver="ode", noise=noise, process="global"
        )
        errors.append(abs(x[0, 0].item() - exact))
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 3.5


def test_sde_ends_with_the_right_spread():
    base = torch.zeros(20000, 3)
    ends = torch.tensor([20000])
    x = sample(gaussian(0.5), base, ends, 250, seeds=3, process="global", start_scale="unit")
    assert x.std().item() == pytest.approx(0.5, abs=0.01)
    assert x.mean().item() == pytest.approx(0, abs=0.01)


def per_scan(x, t):
    """A stand-in that treats rows alike, whatever their batch."""
    return (2 * x).sin() + 0.1 * x


@pytest.mark.parametrize("solver", ["sde", "ode"])
def test_a_scan_depends_neither_on_its_batch_nor_on_the_order(solver):
    a, b = torch.randn(5, 3), torch.randn(8, 3)
    options = dict(steps=8, solver=solver)

    def alone(x, seed):
        return sample(per_scan, x, torch.tensor([len(x)]), seeds=[seed], **options)

    first, second = alone(a, 11), alone(b, 22)
    assert torch.equal(alone(b, 22), second)
    assert torch.equal(alone(a, 11), first)
    joined = sample(per_scan, torch.cat([b, a]), torch.tensor([8, 13]), seeds=[22, 11], **options)
    assert torch.equal(joined, torch.cat([second, first]))


def test_seeds():
    ends = torch.tensor([4, 8])
    like = torch.zeros(8, 3)
    shared = ScanNoise(ends, 5).draw(like)
    assert torch.equal(shared[:4], shared[4:])
    source = ScanNoise(ends, [5, 6])
    first, second = source.draw(like), source.draw(like)
    assert torch.equal(first[:4], shared[:4])
    assert not torch.equal(first[4:], shared[4:])
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    drawn = ScanNoise(ends)
    torch.manual_seed(1)
    again = ScanNoise(ends)
    assert drawn.seeds == again.seeds
    assert drawn.seeds[0] != drawn.seeds[1]
    assert abs(ScanNoise(torch.tensor([30000]), 0).draw(torch.zeros(1)).std() - 1) < 0.01
    assert source.draw(like.double()).dtype == torch.float64


def test_noise_given_is_the_noise_drawn():
    base, ends = torch.randn(5, 3), torch.tensor([5])
    noise = ScanNoise(ends, 3).draw(base)
    drawn = sample(per_scan, base, ends, 4, seeds=3)
    assert torch.equal(sample(per_scan, base, ends, 4, seeds=3, noise=noise), drawn)
    scaled = sample(per_scan, base, ends, 4, seeds=3, noise_scale=1.1)
    assert torch.equal(sample(per_scan, base, ends, 4, seeds=3, noise=1.1 * noise), scaled)


def test_start_points():
    base, noise = torch.full((1, 3), 10.0), torch.ones(1, 3)
    assert start_points(base, noise, SCHEDULE)[0, 0].item() == 11
    small = start_points(base, noise, SCHEDULE, start_scale="sigma_T")
    assert small[0, 0].item() == pytest.approx(10.985175110)
    far = start_points(base, noise, SCHEDULE, "global", "sigma_T", 300)
    expected = 10 * SCHEDULE.alphas[300] + SCHEDULE.sigmas[300]
    assert far[0, 0].item() == pytest.approx(expected)


def test_only_the_last_step_has_a_gradient():
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    base = torch.randn(4, 3, dtype=torch.float64)
    ends, recorded = torch.tensor([4]), []

    def denoise(x, t):
        recorded.append((torch.is_grad_enabled(), x.requires_grad))
        return weight * x

    x = sample(denoise, base, ends, 8, seeds=1, last_step_grad=True)
    assert recorded == [(False, False)] * 7 + [(True, False)]
    x.sum().backward()
    # d_new = A d + B (d - sigma w x) / alpha + C z, so dx/dw = -B sigma / alpha x at the last time.
    seen = []
    sample(lambda x, t: seen.append(x) or 0.3 * x, base, ends, 8, seeds=1)
    last = solver_steps(SCHEDULE, 8)[-1]
    expected = -last.b * last.sigma / last.alpha * seen[-1].sum()
    torch.testing.assert_close(weight.grad, expected)
    recorded.clear()
    assert not sample(denoise, base, ends, 8, seeds=1).requires_grad
    assert not any(enabled for enabled, _ in recorded)
    with torch.no_grad():
        assert sample(per_scan, base, ends, 2, last_step_grad=True).requires_grad is False


def test_gradient_of_one_step():
    base = torch.randn(2, 3, dtype=torch.float64)

    def completed(weight):
        return sample(
            lambda x, t: x @ weight, base, torch.tensor([2]), 1, seeds=0, last_step_grad=True
        )

    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(completed, weight)


def test_stopping_returns_the_prediction_at_that_time():
    base, ends, seen = torch.randn(4, 3), torch.tensor([4]), []

    def denoise(x, t):
        seen.append((x, int(t[0])))
        return per_scan(x, t)

    x = sample(denoise, base, ends, 8, seeds=2, stop=3)
    assert [t for _, t in seen] == [999, 874, 749, 624]
    alpha, sigma = SCHEDULE.alphas[624], SCHEDULE.sigmas[624]
    last = seen[-1][0]
    torch.testing.assert_close(x, base + (last - base - sigma * per_scan(last, None)) / alpha)
    weight = torch.ones((), requires_grad=True)
    options = dict(seeds=2, stop=3, last_step_grad=True)
    assert sample(lambda x, t: weight * x, base, ends, 8, **options).requires_grad
    generator = torch.Generator().manual_seed(0)
    assert {draw_stop(3, generator) for _ in range(50)} == {0, 1, 2}


def test_times_are_one_per_scan():
    asked = []
    sample(lambda x, t: asked.append(t) or x, torch.zeros(6, 3), torch.tensor([2, 6]), 2)
    assert [t.tolist() for t in asked] == [[999, 999], [500, 500]]
    assert asked[0].dtype == torch.int64


def test_post_processing_by_hand():
    # Heights of the scan 0, 1, 2: mean 1, unbiased deviation 1, so -1 < z < 2.
    scan = torch.tensor([[0.0, 0, 0], [1, 0, 1], [2, 0, 2]])
    points = torch.tensor(
        [[0.0, 0, 1.9], [0, 0, 2], [0, 0, -0.9], [0, 0, -1], [30, 40, 0], [30, 39.9, 0]]
    )
    keep = inside(points, torch.tensor([6]), scan, torch.tensor([3]))
    assert keep.tolist() == [True, False, True, False, False, True]
    both = inside(
        torch.cat([points, points]),
        torch.tensor([6, 12]),
        torch.cat([scan, scan + torch.tensor([0.0, 0, 10])]),
        torch.tensor([3, 6]),
    )
    assert both[:6].tolist() == keep.tolist()
    assert not both[6:].any()
    kept, ends = crop(torch.cat([points, points]), torch.tensor([6, 12]), both)
    assert ends.tolist() == [3, 3]
    assert torch.equal(kept, points[keep])


def test_bad_input():
    base, ends = torch.zeros(4, 3), torch.tensor([4])
    for steps in (0, 1000):
        with pytest.raises(InputError, match=r"steps must lie in 1 \.\. 999"):
            sample(per_scan, base, ends, steps)
    for name, value in dict(
        solver="sd", final_sigmas="sigma_max", start_scale="one", process="x"
    ).items():
        with pytest.raises(InputError, match=f"{name}='{value}' is none of"):
            sample(per_scan, base, ends, 2, **{name: value})
    with pytest.raises(InputError, match=r"start must lie in 1 \.\. 999"):
        sample(per_scan, base, ends, 2, start=1000)
    with pytest.raises(InputError, match=r"stop must lie in 0 \.\. 1"):
        sample(per_scan, base, ends, 2, stop=2)
    with pytest.raises(InputError, match="1 scans need as many seeds, got 2"):
        sample(per_scan, base, ends, 2, seeds=[1, 2])
    with pytest.raises(InputError, match=r"noise is \(3, 3\)"):
        sample(per_scan, base, ends, 2, noise=torch.zeros(3, 3))
    with pytest.raises(InputError, match="does not divide 4 rows"):
        sample(per_scan, base, torch.tensor([3]), 2)
    with pytest.raises(InputError, match=r"the denoiser answered \(4, 2\)"):
        sample(lambda x, t: x[:, :2], base, ends, 2)
    with pytest.raises(InputError, match="scan 0 has 1 points"):
        inside(base, ends, base[:1], torch.tensor([1]))
    with pytest.raises(InputError, match="1 completions of 2 scans"):
        inside(base, ends, base, torch.tensor([2, 4]))


@pytest.mark.parametrize(
    ("n", "algorithm", "final"),
    list(product([1, 2, 8, 50], ["sde", "ode"], ["sigma_min", "zero"])),
)
def test_solver_is_that_of_diffusers(n, algorithm, final):
    diffusers = pytest.importorskip("diffusers", reason="the test's oracle, diffusers, is absent")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=3.5e-5,
        beta_end=0.007,
        beta_schedule="linear",
        algorithm_type="sde-dpmsolver++" if algorithm == "sde" else "dpmsolver++",
        solver_order=2,
        final_sigmas_type=final,
    )
    # Its own table is in float32, which at t = 0 is off by a thousandth of 1 - a_0.
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas**2)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == time_grid(n)
    base, ends = torch.randn(200, 3), torch.tensor([200])
    source = ScanNoise(ends, 9)
    d = source.draw(base)

    def denoise(x, t):
        return 0.9 * (x - base) + 0.2 * x.sin()

    for t in scheduler.timesteps:
        e = denoise(base + d, t)
        d = scheduler.step(e, t, d, variance_noise=source.draw(base)).prev_sample
    got = sample(denoise, base, ends, n, seeds=9, solver=algorithm, final_sigmas=final)
    torch.testing.assert_close(got, base + d, rtol=0, atol=3e-5)
