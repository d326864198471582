"""Where a run runs: its device and its processes; and the keys that every run needs."""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import comm
from .config import Config, fill_defaults, find_config
from .errors import InputError, one_line


def require(cfg: Any, *keys: str) -> None:
    """Check that dotted keys are in the config.

    Raises:
        InputError: naming the first one that is not.
    """
    for key in keys:
        inner = cfg
        for part in key.split("."):
            inner = inner.get(part) if hasattr(inner, "get") else None
            if inner is None:
                raise InputError(f"the config has no {key}: add it, or inherit it through _base_")


def device_of(cfg: Any) -> torch.device:
    """The device of this process: `cfg.device`, by default CUDA where there is one, else the CPU.

    Raises:
        InputError: for a device that this machine does not have.
    """
    asked = cfg.get("device")
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InputError(f"device={asked!r} is no device: use cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device={asked}: this PyTorch sees no CUDA device; use device=cpu")
        index = device.index if device.index is not None else comm.get_local_rank()
        if index >= torch.cuda.device_count():
            raise InputError(
                f"device cuda:{index}: there are {torch.cuda.device_count()}, numbered from 0; "
                "start fewer processes or choose another"
            )
        device = torch.device("cuda", index)
    return device


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor in nested dicts, lists and tuples on the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(inner, device) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(inner, device) for inner in value)
    return value


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it (glibc does).

    Every batch has another number of points, so freed blocks seldom fit again and a training process on CPU would grow
    to several times what it uses.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None


def amp_dtype(cfg: Any) -> torch.dtype:
    """`cfg.amp_dtype`: float16 (the default) or bfloat16."""
    name = cfg.get("amp_dtype", "float16")
    if name not in ("float16", "bfloat16"):
        raise InputError(f"amp_dtype={name!r}: use float16 or bfloat16")
    return getattr(torch, name)


def autocast(cfg: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision on the run's own device where `cfg.enable_amp` asks for it."""
    enabled = bool(cfg.get("enable_amp", False))
    return torch.autocast(device.type, dtype=amp_dtype(cfg), enabled=enabled)


def complete(cfg: Any) -> Any:
    """Fill the keys that a run needs and a config may leave out: defaults, the seed, the loop of the train set.

    Raises:
        InputError: for epochs that do not fit together.
    """
    fill_defaults(cfg)
    for key in ("epoch", "eval_epoch", "gradient_accumulation_steps"):
        if type(cfg[key]) is not int or cfg[key] < 1:
            raise InputError(f"{key}={cfg[key]!r}: expected a whole number, at least 1")
    if cfg["epoch"] % cfg["eval_epoch"]:
        raise InputError(
            f"epoch={cfg['epoch']} is no multiple of eval_epoch={cfg['eval_epoch']}: the train set is looped "
            "epoch // eval_epoch times between evaluations; change one of them"
        )
    if cfg["seed"] is None:
        cfg["seed"] = secrets.randbelow(2**31)
    if type(cfg["seed"]) is not int or cfg["seed"] < 0:
        raise InputError(f"seed={cfg['seed']!r}: expected a whole number, 0 or more")
    train = (cfg.get("data") or {}).get("train")
    if isinstance(train, Mapping):
        train["loop"] = cfg["epoch"] // cfg["eval_epoch"]
    return cfg


def _join(cfg: Any, rank: int, world: int) -> None:
    """Join the process group that the environment describes: NCCL on CUDA, gloo on the CPU."""
    cuda = device_of(cfg).type == "cuda"
    if cuda:
        torch.cuda.set_device(device_of(cfg))
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=timedelta(minutes=60)
    )


def _spawned(rank: int, main: Callable[[Any], Any], world: int, cfg: Any, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    launch(main, world, cfg)


def launch(main: Callable[[Any], Any], num_gpus: int, cfg: Any) -> Any:
    """Run `main(cfg)` in every process of the run.

    Under `torchrun` (RANK and WORLD_SIZE are set) this process joins the group; otherwise `num_gpus` processes are
    started on this machine, or none where one is enough.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        joined = dist.is_initialized()
        if not joined:
            _join(cfg, int(os.environ["RANK"]), world)
        try:
            return main(cfg)
        finally:
            if not joined:
                dist.destroy_process_group()
    if num_gpus <= 1:
        return main(cfg)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_spawned, (main, num_gpus, cfg, port), nprocs=num_gpus)
    except torch.multiprocessing.ProcessRaisedException as error:
        if "InputError: " in str(error).strip().splitlines()[-1]:
            raise InputError(one_line(error)) from None
        raise
    return None


def read_config(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    data_root: str | None = None,
) -> Config:
    """The config of a run: the file, the defaults, the options of the command line over both.

    Args:
        data_root: folder of the data set, in place of `data_root` of every split.

    Raises:
        InputError: for a bad file or option.
    """
    cfg = fill_defaults(Config.fromfile(find_config(path)))
    if data_root is not None:
        for split in cfg.get("data", {}).values():
            if isinstance(split, dict) and "data_root" in split:
                split["data_root"] = data_root
    cfg.merge_from_dict(options or {})
    return cfg


def run_tool(main: Callable[[], Any]) -> int:
    """Run a tool and give its exit code: bad input is one line on stderr and code 2, a bug keeps its traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
