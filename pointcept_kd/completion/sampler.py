"""From noise to a completed scene: DPM-Solver++ 2M with data prediction, stochastic (SDE) or not (ODE).

On a grid of times u > v > ... > 0, with lambda = ln(alpha / sigma) and h = lambda_v - lambda_u, for the noise e
predicted at u:

    D     = (d - sigma_u e) / alpha_u                                   the clean signal, as predicted
    D'    = D + 1/2 (D - D_previous) h / (lambda_u - lambda_previous)   second order (midpoint)
    SDE   d <- sigma_v/sigma_u exp(-h) d + alpha_v (1 - exp(-2h)) D' + sigma_v sqrt(1 - exp(-2h)) z
    ODE   d <- sigma_v/sigma_u         d + alpha_v (1 - exp(-h))  D'

The first step is of first order (D' = D), and so is the last one of fewer than 15, or one that ends at sigma = 0.
In the local process d is the offset from a base that repeats the scan; in the global one it is the point itself.

What a trajectory remembers lives in one call, and the noise of a scan comes from a seed of its own: a scan's result
depends neither on the scans before it nor on those beside it.

Lu et al., 2022, arXiv:2211.01095; the loop around it: Nunes et al., 2024, arXiv:2403.13470.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice

from .schedule import PROCESSES, Schedule

# (x (n, 3), t (b,) int64) -> predicted noise (n, 3)
Denoise = Callable[[Tensor, Tensor], Tensor]

SOLVERS = ("sde", "ode")
FINAL_SIGMAS = ("sigma_min", "zero")
START_SCALES = ("unit", "sigma_T")
# Fewer steps than this end with a first-order step, as diffusers does it.
_FEW = 15


def time_grid(steps: int, start: int = 999) -> list[int]:
    """The times at which the network is asked, falling; the last step leads from the last of them to 0.

    `steps` + 1 equally spaced times from `start` to 0, rounded half to even, without the 0.

    Raises:
        InputError: for fewer than 1 or more than `start` steps.
    """
    if not 1 <= steps <= start:
        raise InputError(f"steps must lie in 1 .. {start}, got {steps}")
    grid = np.linspace(0, start, steps + 1).round().astype(int)
    return grid[:0:-1].tolist()


@dataclass(frozen=True)
class Step:
    """One solver step, d <- A d + B D' + C z with D' = D + ratio / 2 (D - D_previous).

    Attributes:
        time: t at which the network is asked.
        alpha, sigma: of the schedule at `time`.
        a, b, c: A, B and C.
        ratio: h / (h of the step before); 0 in a step of first order.
    """

    time: int
    alpha: float
    sigma: float
    a: float
    b: float
    c: float
    ratio: float


def solver_steps(
    schedule: Schedule,
    steps: int,
    solver: str = "sde",
    final_sigmas: str = "sigma_min",
    start: int | None = None,
) -> list[Step]:
    """The steps of a whole trajectory, in float64.

    Args:
        schedule: noise levels.
        steps: how many.
        solver: `sde` or `ode`.
        final_sigmas: where the last step ends: at the noise of t = 0 (`sigma_min`) or without noise (`zero`).
        start: the first time; None means the last one of the schedule.

    Raises:
        InputError: for unknown names, or steps that do not fit on the grid.
    """
    check_choice("solver", solver, SOLVERS)
    check_choice("final_sigmas", final_sigmas, FINAL_SIGMAS)
    start = len(schedule) - 1 if start is None else start
    if not 0 < start < len(schedule):
        raise InputError(f"start must lie in 1 .. {len(schedule) - 1}, got {start}")
    times = time_grid(steps, start)
    plan: list[Step] = []
    before: float | None = None
    for number, (u, v) in enumerate(zip(times, [*times[1:], 0])):
        last = number == steps - 1
        clean = last and final_sigmas == "zero"
        alpha_v, sigma_v = (1.0, 0.0) if clean else (schedule.alphas[v], schedule.sigmas[v])
        h = math.inf if clean else schedule.lambdas[v] - schedule.lambdas[u]
        fade = math.exp(-h)
        if solver == "sde":
            a, b = sigma_v / schedule.sigmas[u] * fade, -alpha_v * math.expm1(-2 * h)
            c = float(sigma_v) * math.sqrt(-math.expm1(-2 * h))
        else:
            a, b, c = sigma_v / schedule.sigmas[u], -alpha_v * math.expm1(-h), 0.0
        first_order = clean or (last and steps < _FEW)
        ratio = 0.0 if before is None or first_order else h / before
        plan.append(
            Step(
                u,
                float(schedule.alphas[u]),
                float(schedule.sigmas[u]),
                float(a),
                float(b),
                c,
                float(ratio),
            )
        )
        before = h
    return plan


class ScanNoise:
    """Standard normal noise for scans joined along their rows, each from a generator of its own.

    Drawn on the CPU, in float32: the same on every device and in every batch.

    Args:
        offset: end rows of the scans.
        seeds: one per scan, or one for all of them (which then share their noise); None draws them from torch's
            default generator.

    Raises:
        InputError: when there are not as many seeds as scans.
    """

    def __init__(self, offset: Int[Tensor, " b"], seeds: int | Sequence[int] | None = None) -> None:
        ends = offset.tolist()
        if seeds is None:
            seeds = torch.randint(2**62, (len(ends),)).tolist()
        elif isinstance(seeds, int):
            seeds = [seeds] * len(ends)
        if len(seeds) != len(ends):
            raise InputError(f"{len(ends)} scans need as many seeds, got {len(seeds)}")
        self.seeds = list(seeds)
        self._counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends)]
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, like: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """The next noise, in the type and on the device of `like`."""
        parts = [
            torch.randn(count, 3, generator=generator)
            for count, generator in zip(self._counts, self._generators)
        ]
        joined = torch.cat(parts) if parts else torch.zeros(0, 3)
        return joined.to(like)


def start_points(
    base: Float[Tensor, "n 3"],
    noise: Float[Tensor, "n 3"],
    schedule: Schedule,
    process: str = "local",
    start_scale: str = "unit",
    start: int | None = None,
) -> Float[Tensor, "n 3"]:
    """Where sampling starts: the base (global: times alpha) plus noise of scale 1 (`unit`) or sigma of that time.

    Raises:
        InputError: for unknown names.
    """
    check_choice("process", process, PROCESSES)
    check_choice("start_scale", start_scale, START_SCALES)
    start = len(schedule) - 1 if start is None else start
    scale = float(schedule.sigmas[start]) if start_scale == "sigma_T" else 1.0
    signal = float(schedule.alphas[start]) if process == "global" else 1.0
    return signal * base + scale * noise


def sample(
    denoise: Denoise,
    base: Float[Tensor, "n 3"],
    offset: Int[Tensor, " b"],
    steps: int,
    schedule: Schedule | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    noise: Float[Tensor, "n 3"] | None = None,
    noise_scale: float = 1.0,
    process: str = "local",
    solver: str = "sde",
    final_sigmas: str = "sigma_min",
    start_scale: str = "unit",
    start: int | None = None,
    stop: int | None = None,
    last_step_grad: bool = False,
) -> Float[Tensor, "n 3"]:
    """Complete scans: solve from noise around `base` to points.

    Args:
        denoise: `(x (n, 3), t (b,) int64) -> (n, 3)`, the noise in x, guidance included.
        base: the scans, repeated to the wanted number of points, in metres.
        offset: end rows of the scans.
        steps: solver steps; with guidance each is two network calls.
        schedule: noise levels; the default ones if None.
        seeds: see `ScanNoise`; noise of the start and of every stochastic step.
        noise: the start's noise instead of a drawn one; the seeds then go on as if it had been drawn.
        noise_scale: factor on the start's noise.
        process: `local` or `global`.
        solver: `sde` or `ode`.
        final_sigmas: `sigma_min` or `zero`; see `solver_steps`.
        start_scale: `unit` or `sigma_T`; see `start_points`.
        start: first time of the grid; None means the schedule's last.
        stop: return what the network predicts at grid position `stop` (0 .. steps - 1) for t = 0, instead of solving
            on from there; trains a student at any time of its evaluation grid at the price of one step with gradient.
        last_step_grad: record the gradient through the last network call; those before never have one.

    Returns:
        Points in metres, (n, 3), in the type of `base`.

    Raises:
        InputError: for unknown names, steps that do not fit, noise of another shape, or a denoiser whose answer has
            another shape than its points.
    """
    check_choice("process", process, PROCESSES)
    schedule = Schedule() if schedule is None else schedule
    plan = solver_steps(schedule, steps, solver, final_sigmas, start)
    if stop is not None and not 0 <= stop < steps:
        raise InputError(f"stop must lie in 0 .. {steps - 1}, got {stop}")
    if len(base) != (int(offset[-1]) if len(offset) else 0):
        raise InputError(f"offset {offset.tolist()} does not divide {len(base)} rows into scans")
    source = ScanNoise(offset, seeds)
    drawn = source.draw(base)
    noise = drawn if noise is None else noise
    if noise.shape != base.shape:
        raise InputError(f"noise is {tuple(noise.shape)}, base is {tuple(base.shape)}")
    final = steps - 1 if stop is None else stop
    with torch.no_grad():
        points = start_points(base, noise_scale * noise, schedule, process, start_scale, start)
        origin = base if process == "local" else torch.zeros_like(base)
        d = points - origin
    before = None
    for number, step in enumerate(plan[: final + 1]):
        with nullcontext() if last_step_grad and number == final else torch.no_grad():
            t = torch.full((len(offset),), step.time, dtype=torch.int64, device=base.device)
            e = denoise(origin + d, t)
            if e.shape != base.shape:
                raise InputError(
                    f"the denoiser answered {tuple(e.shape)} for points {tuple(base.shape)}"
                )
            clean = (d - step.sigma * e.to(d.dtype)) / step.alpha
            if stop is not None and number == final:
                return origin + clean
            d = advance(d, clean, before, step, source.draw(base) if step.c else None)
            before = clean
    return origin + d


def advance(
    d: Tensor, clean: Tensor, before: Tensor | None, step: Step, noise: Tensor | None
) -> Tensor:
    """One solver step from the prediction of the clean signal at its time and at the one before."""
    if step.ratio and before is not None:
        clean = clean + 0.5 * step.ratio * (clean - before)
    d = step.a * d + step.b * clean
    return d if noise is None else d + step.c * noise


def draw_stop(steps: int, generator: torch.Generator | None = None) -> int:
    """A position on a grid of `steps` times, uniformly: what `sample` takes as `stop`."""
    return int(torch.randint(steps, (), generator=generator))


@torch.no_grad()
def inside(
    points: Float[Tensor, "n 3"],
    offset: Int[Tensor, " b"],
    condition: Float[Tensor, "m 3"],
    condition_offset: Int[Tensor, " b"],
    max_range: float = 50.0,
) -> Bool[Tensor, " n"]:
    """Which completed points to keep: nearer than `max_range`, and within the heights of the scan.

    Height: below the scan's highest point, and above the mean of its heights minus twice their (unbiased) standard
    deviation, both bounds excluded.

    Args:
        points: the completion, in metres.
        offset: end rows of its scans.
        condition: the scans completed.
        condition_offset: end rows of those; at least two points each.
        max_range: metres from the sensor.

    Raises:
        InputError: for a scan of fewer than two points, or numbers of scans that differ.
    """
    if len(offset) != len(condition_offset):
        raise InputError(f"{len(offset)} completions of {len(condition_offset)} scans")
    keep = points.norm(dim=1) < max_range
    begin = start = 0
    for number, (end, stop) in enumerate(zip(offset.tolist(), condition_offset.tolist())):
        heights = condition[start:stop, 2].double()
        if len(heights) < 2:
            raise InputError(f"scan {number} has {len(heights)} points; heights need two at least")
        low, high = heights.mean() - 2 * heights.std(), heights.max()
        z = points[begin:end, 2].double()
        keep[begin:end] &= (z > low) & (z < high)
        begin, start = end, stop
    return keep


def crop(
    points: Float[Tensor, "n 3"], offset: Int[Tensor, " b"], keep: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, "m 3"], Int[Tensor, " b"]]:
    """The kept points and the end rows of their scans; a scan may become empty."""
    counted = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return points[keep], counted[offset.to(counted.device)].to(offset)
