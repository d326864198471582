"""The batches of all processes as one: means, sums and draws that do not depend on how a batch was split.

A process computes its loss from its own scans, and `DistributedDataParallel` averages the gradients. That average is
the gradient of the whole batch only where a loss is a mean over the rows of *all* processes. Inside `joint_batch` the
functions below make it one. Outside of it, and in a single process, they change nothing, to the last bit.

Every process must call them equally often and in the same order: also one whose scans have no row that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm

_active = False
_generator = torch.Generator()


@contextmanager
def joint_batch(enabled: bool = True) -> Iterator[None]:
    """Within it the batches of all processes count as one; `joint_batch(False)` suspends that."""
    global _active
    before, _active = _active, enabled and comm.get_world_size() > 1
    try:
        yield
    finally:
        _active = before


def is_joint() -> bool:
    """Whether the batches of several processes count as one just now."""
    return _active


def seed_joint(seed: int) -> None:
    """Seed the draws that concern the whole batch; every process must give the same number."""
    _generator.manual_seed(seed)


def joint_generator() -> torch.Generator | None:
    """The generator of draws that concern the whole batch: one stream for all processes, None for the default one."""
    return _generator if _active else None


class _Sum(torch.autograd.Function):
    """Sum over processes. Each of them goes on to compute the same loss, so backward needs no message: the gradient of
    the own summand is that of the sum, times the number of processes that the averaging of gradients divides by.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * comm.get_world_size()


def joint_sum(x: Tensor) -> Tensor:
    """The sum of `x` over processes; `x` must have one shape in all of them.

    Only for what ends in a loss that all processes compute alike.
    """
    return _Sum.apply(x) if _active else x


def joint_mean(mean: Tensor, count: int | Tensor) -> Tensor:
    """The mean over the rows of all processes, from the mean over this one's.

    Args:
        mean: 0-dim; finite where `count` is 0, too, and then of no effect.
        count: rows, or sum of weights, behind `mean`.
    """
    if not _active:
        return mean
    count = torch.as_tensor(count, device=mean.device).to(torch.float64)
    total = joint_sum(torch.stack([mean.double() * count, count.detach()]))
    rows = total[1].detach()
    return (total[0] / rows.where(rows > 0, 1)).to(mean.dtype)


def joint_max(value: int) -> int:
    """The largest of the processes' numbers."""
    if not _active:
        return value
    box = torch.tensor(value, device=_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def joint_presence(present: Tensor) -> Tensor:
    """(k,) bool: true where it is true in any process."""
    if not _active:
        return present
    flags = present.to(torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags > 0


@torch.no_grad()
def joint_rows(
    function: Callable[[Tensor, Tensor], Tensor], values: Tensor, flags: Tensor
) -> Tensor:
    """`function(values, flags)` as if the columns of all processes stood side by side; the own columns of the result.

    For functions that treat every row by itself, such as one that sorts it. Each process computes every `world`-th row
    for all, so the work of one process is what it would be alone, and what it sends and receives is its own columns,
    twice.

    Args:
        function: (k, n) values and (k, n) bool to (k, n) values.
        values: (k, n) with one k and any n per process.
        flags: (k, n) bool.
    """
    if not _active:
        return function(values, flags)
    world, rank = comm.get_world_size(), comm.get_rank()
    rows, columns = values.shape
    sizes = values.new_empty(world, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind()), sizes.new_tensor(columns))
    width = sizes.tolist()
    height = [len(range(owner, rows, world)) for owner in range(world)]
    mine = height[rank]

    def swap(parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
        sent = torch.cat([part.reshape(-1) for part in parts])
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, lengths, [part.numel() for part in parts])
        return list(received.split(lengths))

    def gathered(x: Tensor) -> Tensor:
        parts = swap([x[owner::world] for owner in range(world)], [mine * n for n in width])
        return torch.cat([part.view(mine, n) for part, n in zip(parts, width)], 1)

    done = function(gathered(values), gathered(flags.to(torch.uint8)).bool())
    back = swap(list(done.split(width, 1)), [h * columns for h in height])
    result = torch.empty_like(values)
    for owner, part in enumerate(back):
        result[owner::world] = part.view(height[owner], columns)
    return result
