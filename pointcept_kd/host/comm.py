"""Talk between the processes of a run; every function also works without a process group.

Objects travel over a gloo group, so they never need GPU memory; tensors travel on the group's own
backend.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How gloo, which raises plain RuntimeErrors, speaks of the other end; not every message names its source file.
_GLOO_PHRASES = (
    "gloo/transport", "pair closure", "Connection closed by peer", "Connection reset by peer", "Socket closed",
)  # fmt: skip

# The gloo side group of an NCCL run, with the default group that it was made for.
_side_group: tuple[Any, Any] = (None, None)


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes in the run; 1 without a process group."""
    return dist.get_world_size() if _ready() else 1


def get_rank() -> int:
    """Index of this process in the run; 0 without a process group."""
    return dist.get_rank() if _ready() else 0


def get_local_rank() -> int:
    """Index of this process on its machine: `LOCAL_RANK` as the launcher set it, else the rank."""
    return int(os.environ.get("LOCAL_RANK", get_rank()))


def is_main_process() -> bool:
    """Whether this is the process that writes logs and files."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() > 1:
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the run is gone or silent."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or any(phrase in text for phrase in _GLOO_PHRASES)


def share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the first one's buffers, such as running statistics, before they evaluate one model."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _object_group() -> Any:
    """The group for pickled objects: the default one if it is gloo, else a gloo group beside it."""
    global _side_group
    if dist.get_backend() == "gloo":
        return None
    world = dist.group.WORLD
    if _side_group[0] is not world:
        _side_group = (world, dist.new_group(backend="gloo"))
    return _side_group[1]


def all_gather(data: Any) -> list[Any]:
    """One picklable object of every process, in rank order, on every process."""
    if get_world_size() == 1:
        return [data]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, data, group=_object_group())
    return gathered


def gather(data: Any, dst: int = 0) -> list[Any]:
    """One picklable object per process, in rank order, on process `dst`; empty list elsewhere."""
    if get_world_size() == 1:
        return [data]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, gathered, dst=dst, group=_object_group())
    return gathered or []


def broadcast(data: Any, src: int = 0) -> Any:
    """The picklable object of process `src`, on every process."""
    if get_world_size() == 1:
        return data
    box = [data]
    dist.broadcast_object_list(box, src=src, group=_object_group())
    return box[0]


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or mean over processes of every entry, on every process.

    Args:
        values: tensors of one shape and dtype; the keys must be the same on every process.
        average: divide by the number of processes.

    Returns:
        Detached tensors on the device of the inputs, in the order of the inputs.
    """
    if get_world_size() == 1 or not values:
        return dict(values)
    # Sorted, so that processes that filled their dicts in different orders add like to like.
    names = sorted(values)
    stacked = torch.stack([values[name].detach() for name in names])
    home = stacked.device
    if dist.get_backend() == "nccl":
        stacked = stacked.to(torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(stacked)
    if average:
        stacked = stacked / get_world_size()
    reduced = dict(zip(names, stacked.to(home).unbind()))
    return {name: reduced[name] for name in values}
