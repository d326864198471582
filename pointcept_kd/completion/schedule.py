"""How much noise there is at each time of the diffusion, and the noising of points.

    a_t = prod_{s <= t} (1 - beta_s)      alpha_t = sqrt(a_t)      sigma_t = sqrt(1 - a_t)
    lambda_t = ln(alpha_t / sigma_t)      t = 0 .. T - 1

    local     x_t = p + sigma_t e             the signal is not scaled: the process is one on the offset d, with d_0 = 0
    global    x_t = alpha_t p + sigma_t e     DDPM on absolute coordinates

All values are computed in float64 and rounded once, to the type of the points.

Local process: Nunes et al., 2024, arXiv:2403.13470. Global: Ho et al., 2020, arXiv:2006.11239; for completion Martyniuk
et al., 2025, arXiv:2504.17791. Cosine schedule: Nichol & Dhariwal, 2021, arXiv:2102.09672.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.point import offset2bincount

PROCESSES = ("local", "global")
SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid")


def betas(
    kind: str = "linear", steps: int = 1000, first: float = 3.5e-5, last: float = 0.007
) -> NDArray[np.float64]:
    """The noise added at each time, float64 (steps,).

    Args:
        kind: `linear`, `quadratic` (linear in the square root) and `sigmoid` (over [-6, 6]) go from `first` to `last`;
            `cosine` (offset 0.008, clipped to [1e-4, 0.9999]) does not use them.
        steps: T.
        first, last: beta_0 and beta_{T-1}.

    Raises:
        InputError: for an unknown kind, fewer than 2 steps, or not 0 < first <= last < 1.
    """
    check_choice("schedule", kind, SCHEDULES)
    if steps < 2:
        raise InputError(f"a schedule needs at least 2 steps, got {steps}")
    if not 0 < first <= last < 1:
        raise InputError(f"betas must satisfy 0 < first <= last < 1, got {first} and {last}")
    if kind == "linear":
        return np.linspace(first, last, steps)
    if kind == "quadratic":
        return np.linspace(math.sqrt(first), math.sqrt(last), steps) ** 2
    if kind == "sigmoid":
        return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.clip(1 - signal[1:] / signal[:-1], 1e-4, 0.9999)


class Schedule:
    """alpha, sigma and lambda at every time, and the noising of points.

    Args:
        kind, steps, first, last: see `betas`.
    """

    def __init__(
        self, kind: str = "linear", steps: int = 1000, first: float = 3.5e-5, last: float = 0.007
    ) -> None:
        self.kind = kind
        self.betas = betas(kind, steps, first, last)
        # In logarithms, so that 1 - a_t stays exact where a_t is near 1.
        log_a = np.cumsum(np.log1p(-self.betas))
        self.alphas = np.exp(log_a / 2)
        self.sigmas = np.sqrt(-np.expm1(log_a))
        self.lambdas = log_a / 2 - np.log(self.sigmas)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def _at(self, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        key = name, t.device, dtype
        if key not in self._tables:
            table = torch.from_numpy(getattr(self, name)).to(
                dtype
            )  # before the move: not every device has float64
            self._tables[key] = table.to(t.device)
        return self._tables[key][t]

    def alpha(self, t: Int[Tensor, " b"], dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha_t for each time, in `dtype`, on the device of `t`."""
        return self._at("alphas", t, dtype)

    def sigma(self, t: Int[Tensor, " b"], dtype: torch.dtype = torch.float32) -> Tensor:
        """sigma_t for each time, in `dtype`, on the device of `t`."""
        return self._at("sigmas", t, dtype)

    def log_snr(self, t: Int[Tensor, " b"], dtype: torch.dtype = torch.float32) -> Tensor:
        """lambda_t = ln(alpha_t / sigma_t) for each time, in `dtype`, on the device of `t`."""
        return self._at("lambdas", t, dtype)

    def add_noise(
        self,
        p: Float[Tensor, "n 3"],
        t: Int[Tensor, " b"] | int,
        e: Float[Tensor, "n 3"],
        offset: Int[Tensor, " b"] | None = None,
        process: str = "local",
    ) -> Float[Tensor, "n 3"]:
        """The points at time t.

        Args:
            p: points in metres; differentiable.
            t: one time, or one per scan (with `offset`).
            e: standard normal noise.
            offset: end rows of the scans.
            process: `local` (p + sigma_t e) or `global` (alpha_t p + sigma_t e).

        Raises:
            InputError: for an unknown process, a time outside the schedule, shapes that do not fit, or one time per
                scan without `offset`.
        """
        check_choice("process", process, PROCESSES)
        if p.shape != e.shape:
            raise InputError(f"points are {tuple(p.shape)}, noise is {tuple(e.shape)}")
        sigma = self.per_row("sigmas", t, p, offset)
        if process == "local":
            return p + sigma * e
        return self.per_row("alphas", t, p, offset) * p + sigma * e

    def per_row(
        self, name: str, t: Tensor | int, like: Tensor, offset: Tensor | None = None
    ) -> Tensor | float:
        """`alphas`, `sigmas` or `lambdas` at the time of each row: a number for one time, else (n, 1).

        Raises:
            InputError: as `add_noise`.
        """
        if isinstance(t, int):
            if not 0 <= t < len(self):
                raise InputError(f"time {t} lies outside 0 .. {len(self) - 1}")
            return float(getattr(self, name)[t])
        if offset is None or len(offset) != len(t):
            scans = "no offset" if offset is None else f"{len(offset)} scans"
            raise InputError(f"{len(t)} times need as many scans, got {scans}")
        if not t.is_cuda and len(t) and not 0 <= int(t.min()) <= int(t.max()) < len(self):
            raise InputError(f"times {t.tolist()} lie outside 0 .. {len(self) - 1}")
        return spread(self._at(name, t.to(like.device), like.dtype), offset, len(like))[:, None]


def spread(values: Tensor, offset: Int[Tensor, " b"], rows: int) -> Tensor:
    """One value per row from one per scan.

    Raises:
        InputError: when the last end row is not `rows`.
    """
    counts = offset2bincount(offset.to(values.device))
    if not offset.is_cuda and (int(offset[-1]) if len(offset) else 0) != rows:
        raise InputError(f"offset {offset.tolist()} does not divide {rows} rows into scans")
    return torch.repeat_interleave(values, counts, dim=0, output_size=rows)
