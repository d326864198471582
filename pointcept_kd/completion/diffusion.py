"""The diffusion teacher: a network that predicts the noise in a noisy scene, given the scan; and its training.

    L = mean( (e' - e)^2 ) + w ( mean(e')^2 + (std(e') - 1)^2 ),      e' the prediction, w = 5

Mean and (unbiased) standard deviation are over all numbers of the batch. For guidance, which is
e_null + s (e_cond - e_null), the condition is sometimes left out in training.

Nunes et al., 2024, arXiv:2403.13470. Guidance: Ho & Salimans, 2022, arXiv:2207.12598.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import is_joint, joint_generator, joint_mean, joint_sum

from .sampler import ScanNoise, crop, inside, sample
from .schedule import PROCESSES, Schedule

DROP_MODES = ("batch", "sample")


def full(x: Tensor) -> Tensor:
    """A tensor in float32 at least: what a network computed in half precision is compared in full."""
    return x if x.dtype == torch.float64 else x.float()


def noise_mse(e_hat: Float[Tensor, "n 3"], e: Float[Tensor, "n 3"]) -> Float[Tensor, ""]:
    """Mean squared error of predicted noise over all numbers; 0, still connected, without points."""
    if not e_hat.numel():
        return joint_mean(full(e_hat).sum(), 0)
    return joint_mean((full(e_hat) - e.detach()).square().mean(), e_hat.numel())


def moment_penalty(e_hat: Float[Tensor, "n 3"]) -> Float[Tensor, ""]:
    """How far predicted noise is from mean 0 and (unbiased) standard deviation 1: mean^2 + (std - 1)^2.

    Both moments are over all numbers of all processes. Constant predictions, such as those of a head that starts at
    zero, cost 1 and have a finite gradient.

    Raises:
        InputError: for fewer than two numbers.
    """
    e_hat = full(e_hat)
    own = e_hat.numel()
    count = float(own)
    if is_joint():
        count = joint_sum(e_hat.new_tensor(count, dtype=torch.float64)).item()
    if count < 2:
        raise InputError(f"a standard deviation needs two numbers, the prediction has {count:.0f}")
    mean = joint_mean(e_hat.mean() if own else e_hat.sum(), own)
    # Deviations add up to 0, so no gradient goes through their mean; that of one process alone would not cancel.
    square = (e_hat - mean.detach()).square()
    variance = joint_mean(square.mean() if own else square.sum(), own) * (count / (count - 1))
    varies = variance > 0  # at 0 the root has no derivative
    deviation = torch.where(varies, variance, 1).sqrt() * varies
    return mean.square() + (deviation - 1).square()


def noise_loss(
    e_hat: Float[Tensor, "n 3"], e: Float[Tensor, "n 3"], reg_weight: float = 5.0
) -> Float[Tensor, ""]:
    """The teacher's loss: `noise_mse` plus `reg_weight` times `moment_penalty`."""
    loss = noise_mse(e_hat, e)
    return loss + reg_weight * moment_penalty(e_hat) if reg_weight else loss


def draw_timesteps(
    scans: int, total: int = 1000, generator: torch.Generator | None = None
) -> Int64[Tensor, " b"]:
    """A time for each scan, uniform over 0 .. total - 1; on the CPU."""
    return torch.randint(total, (scans,), generator=generator)


def drop_condition(
    scans: int,
    probability: float = 0.1,
    mode: str = "batch",
    generator: torch.Generator | None = None,
) -> Bool[Tensor, " b"]:
    """Which scans go without condition.

    Args:
        scans: how many there are.
        probability: of leaving the condition out.
        mode: `batch`: all of them or none, and none where there is one scan alone (as the published training did,
            whose BatchNorm cannot stand a single condition row); `sample`: each by itself.
        generator: of the draws; by default the one all processes share in mode `batch`, else torch's.

    Raises:
        InputError: for an unknown mode, or a probability outside [0, 1].
    """
    check_choice("drop_mode", mode, DROP_MODES)
    if not 0 <= probability <= 1:
        raise InputError(f"the probability of dropping must lie in [0, 1], got {probability}")
    if mode == "sample":
        return torch.rand(scans, generator=generator) < probability
    # Drawn in any case, so that processes with batches of different sizes stay in step.
    dropped = torch.rand((), generator=generator or joint_generator()) < probability
    return (dropped & (scans > 1)).expand(scans).clone()


def guide(
    e_null: Float[Tensor, "n 3"], e_cond: Float[Tensor, "n 3"], scale: float
) -> Float[Tensor, "n 3"]:
    """Classifier-free guidance: e_null + scale (e_cond - e_null)."""
    return e_null + scale * (e_cond - e_null)


def tile(
    coord: Float[Tensor, "m 3"], offset: Int[Tensor, " b"], times: int
) -> tuple[Float[Tensor, "n 3"], Int[Tensor, " b"]]:
    """Every scan repeated as a block, (a b c a b c ...), and the new end rows: the base of a completion."""
    if times < 1:
        raise InputError(f"a scan is repeated once at least, got {times}")
    ends = offset.tolist()
    parts = [coord[begin:end].repeat(times, 1) for begin, end in zip([0, *ends[:-1]], ends)]
    return torch.cat(parts) if parts else coord, offset * times


def scan_seeds(names: Sequence[str], seed: int = 0) -> list[int]:
    """A seed per scan that depends on its name and on `seed` alone, not on where in a batch it stands."""
    # 32 bits: torch's generator on the CPU looks at no more of a seed.
    return [zlib.crc32(str(name).encode(), seed) for name in names]


@contextmanager
def cpu_threads(count: int | None, device: torch.device) -> Iterator[None]:
    """Within it torch computes on the CPU with so many threads; None, or another device: as it is set.

    Libraries add the products of a matrix product in an order that depends on the number of threads. The last digits
    that differ then put points into other cells, and solver steps enlarge that.
    """
    before = torch.get_num_threads()
    if count is None or count == before or device.type != "cpu":
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within it a network is in evaluation mode and has no gradient; each part's mode is put back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Completer(nn.Module):
    """A condition encoder and a denoiser that complete scans; training is up to its subclasses.

    In evaluation, `forward` returns `completed` (n, 3) in metres, post-processed, and `completed_offset`, their end
    rows. A batch holds `coord` (m, 3), `offset` and, for seeds that follow the scan, `name`.

    Args:
        encoder: config of the condition encoder, `forward(coord, offset) -> condition`, where `condition.drop(scans)`
            is the same without the scans marked True (b,); or the module.
        denoiser: config of the denoiser, `forward(x, offset, t, condition) -> noise` and
            `guided(x, offset, t, condition, scale)`; or the module.
        schedule: arguments of `Schedule`.
        process: `local` or `global`.
        repeat: completed points per scan point.
        steps: solver steps in evaluation.
        guidance: scale s in evaluation; 1 is the conditional prediction alone, at half the price.
        sampling: further arguments of `sample`: `solver`, `final_sigmas`, `start_scale`, `start`.
        seed: of the noise in evaluation.
        max_range: metres; completed points beyond are dropped, see `inside`.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | nn.Module,
        denoiser: Mapping[str, Any] | nn.Module,
        schedule: Mapping[str, Any] | None = None,
        process: str = "local",
        repeat: int = 10,
        steps: int = 50,
        guidance: float = 6.0,
        sampling: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_range: float = 50.0,
    ) -> None:
        super().__init__()
        check_choice("process", process, PROCESSES)
        unknown = set(sampling or {}) - {"solver", "final_sigmas", "start_scale", "start"}
        if unknown:
            raise InputError(f"sampling does not know {', '.join(sorted(unknown))}")
        self.encoder: nn.Module = _build(encoder)
        self.denoiser: nn.Module = _build(denoiser)
        self.schedule = Schedule(**(schedule or {}))
        self.process = process
        self.repeat = repeat
        self.steps, self.guidance, self.seed = steps, guidance, seed
        self.sampling = dict(sampling or {})
        self.max_range = max_range

    @property
    def completing(self) -> nn.Module:
        """The denoiser that completes in evaluation."""
        return self.denoiser

    def noised(
        self, x: Float[Tensor, "n 3"], offset: Int[Tensor, " b"], t: Int[Tensor, " b"], e: Tensor
    ) -> Float[Tensor, "n 3"]:
        """x at time t of the model's process."""
        return self.schedule.add_noise(x, t, e, offset, self.process)

    def solve(
        self,
        network: nn.Module,
        base: Float[Tensor, "n 3"],
        offset: Int[Tensor, " b"],
        condition: Any,
        steps: int,
        guidance: float = 1.0,
        **options: Any,
    ) -> Float[Tensor, "n 3"]:
        """`sample` with a denoiser network and a condition; options as there."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1:
                return network(x, offset, t, condition)
            guided: Any = network.guided
            return guided(x, offset, t, condition, guidance)

        options = {**self.sampling, **options}
        return sample(denoise, base, offset, steps, self.schedule, process=self.process, **options)

    @torch.no_grad()
    def complete(
        self,
        coord: Float[Tensor, "m 3"],
        offset: Int[Tensor, " b"],
        seeds: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        threads: int | None = 1,
    ) -> tuple[Float[Tensor, "n 3"], Int[Tensor, " b"]]:
        """Complete scans: points in metres as the solver left them, and their end rows.

        One by one, and on the CPU by one thread: products of larger matrices, or by more threads, round differently,
        and a scan should depend neither on its batch nor on the machine's cores.

        Args:
            coord: scans in metres, sensor frame.
            offset: their end rows.
            seeds: see `ScanNoise`; the model's seed if None.
            steps, guidance: instead of the model's.
            threads: on the CPU; None: as many as torch has, where speed counts for more.
        """
        ends = offset.tolist()
        noise = ScanNoise(offset, self.seed if seeds is None else seeds)
        parts = []
        with cpu_threads(threads, coord.device):
            for begin, end, seed in zip([0, *ends[:-1]], ends, noise.seeds):
                scan = coord[begin:end]
                own = offset.new_tensor([end - begin])
                condition = self.encoder(scan, own)
                base, rows = tile(scan, own, self.repeat)
                parts.append(
                    self.solve(
                        self.completing,
                        base,
                        rows,
                        condition,
                        self.steps if steps is None else steps,
                        self.guidance if guidance is None else guidance,
                        seeds=seed,
                    )
                )
        return torch.cat(parts), offset * self.repeat

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Complete the scans of a batch; in training the subclass's losses."""
        if self.training:
            return self.losses(batch)
        coord, offset = batch["coord"], batch["offset"]
        seeds = scan_seeds(batch["name"], self.seed) if "name" in batch else self.seed
        points, ends = self.complete(coord, offset, seeds)
        points, ends = crop(points, ends, inside(points, ends, coord, offset, self.max_range))
        return {"completed": points, "completed_offset": ends}

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What training minimises, 0-dim tensors by name, `loss` among them."""
        raise InputError(f"{type(self).__name__} only completes; train one of its subclasses")


def _build(part: Mapping[str, Any] | nn.Module) -> nn.Module:
    return part if isinstance(part, nn.Module) else MODELS.build(part)


@kd.MODELS.register_module()
class DiffusionCompletion(Completer):
    """The teacher: encoder and denoiser trained together to predict noise.

    In training a batch holds, beside the scan, `complete` (n, 3) in metres and `complete_offset`. Returned are `loss`,
    `loss_noise`, `loss_moments`.

    Args:
        reg_weight: weight of the moments' penalty.
        drop: probability of leaving the condition out.
        drop_mode: `batch` or `sample`, see `drop_condition`.
        Others: see `Completer`.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any] | nn.Module,
        denoiser: Mapping[str, Any] | nn.Module,
        reg_weight: float = 5.0,
        drop: float = 0.1,
        drop_mode: str = "batch",
        **options: Any,
    ) -> None:
        super().__init__(encoder, denoiser, **options)
        check_choice("drop_mode", drop_mode, DROP_MODES)
        if not 0 <= drop <= 1:
            raise InputError(f"drop must lie in [0, 1], got {drop}")
        self.reg_weight, self.drop, self.drop_mode = reg_weight, drop, drop_mode

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Completer.losses`."""
        p, offset = batch["complete"], batch["complete_offset"]
        t = draw_timesteps(len(offset), len(self.schedule)).to(p.device)
        e = torch.randn_like(p)
        x = self.noised(p, offset, t, e)
        dropped = drop_condition(len(offset), self.drop, self.drop_mode)
        condition = self.encoder(batch["coord"], batch["offset"])
        if dropped.any():
            condition = condition.drop(dropped)
        e_hat = self.denoiser(x, offset, t, condition)
        with torch.autocast(p.device.type, enabled=False):
            noise, moments = noise_mse(e_hat, e), moment_penalty(e_hat)
            loss = noise + self.reg_weight * moments
        return {"loss": loss, "loss_noise": noise.detach(), "loss_moments": moments.detach()}
