"""Where a run runs: its device and its processes; and the keys that every run needs."""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import comm, processes
from .config import RUNTIME_DEFAULTS, Config, fill_defaults, find_config
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


@cache
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
    complete_distribution(cfg)
    train = (cfg.get("data") or {}).get("train")
    if isinstance(train, Mapping):
        train["loop"] = cfg["epoch"] // cfg["eval_epoch"]
    return cfg


def complete_distribution(cfg: Any) -> float:
    """Check the keys of runs in several processes.

    Returns:
        minutes that a message between processes may take.
    """
    minutes = cfg.get("dist_timeout", RUNTIME_DEFAULTS["dist_timeout"])
    if type(minutes) not in (int, float) or not 0 < minutes < 1e6:
        raise InputError(f"dist_timeout={minutes!r}: expected minutes, more than 0")
    for key in ("global_loss", "sync_bn"):
        if type(cfg.get(key, False)) is not bool:
            raise InputError(f"{key}={cfg[key]!r}: expected True or False")
    return float(minutes)


def placement(args: Any) -> dict[str, Any]:
    """What `launch` needs to know from the arguments of `build_parser`."""
    names = ("num_gpus", "num_machines", "machine_rank", "dist_url")
    return {name: getattr(args, name) for name in names}


def launch(
    main: Callable[[Any], Any],
    num_gpus: int,
    cfg: Any,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> Any:
    """Run `main(cfg)` in every process of the run.

    Under `torchrun` (RANK and WORLD_SIZE are set) this process joins the group; otherwise `num_gpus` processes are
    started on this machine, or none where one is enough. When one of them fails, all end.

    Args:
        num_machines: how many machines start this with the same config and `num_gpus`.
        machine_rank: this one's number, 0 to `num_machines` - 1.
        dist_url: where they meet, tcp://HOST:PORT of machine 0.

    Raises:
        InputError, ProcessFailure: with the rank that failed first.
    """
    minutes = complete_distribution(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if num_machines > 1:
            raise InputError(
                "--num-machines under torchrun: torchrun has --nnodes for this; leave --num-machines out"
            )
        if torch.distributed.is_initialized():
            return main(cfg)
        return processes.under_torchrun(main, cfg, partial(device_of, cfg), minutes)
    for name, value, low, high in (
        ("--num-gpus", num_gpus, 1, None),
        ("--num-machines", num_machines, 1, None),
        ("--machine-rank", machine_rank, 0, num_machines - 1),
    ):
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            raise InputError(f"{name} {value}: expected {wanted}")
    if num_gpus * num_machines == 1:
        return main(cfg)
    asked = str(cfg.get("device") or "")
    if num_gpus > 1 and asked.startswith("cuda:"):
        raise InputError(f"device={asked} is one GPU for {num_gpus} processes: use device=cuda")
    device = partial(device_of, cfg)
    processes.start(main, cfg, device, minutes, num_gpus, num_machines, machine_rank, dist_url)
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
        # Under torchrun every process reads the same bad config: one of each machine says so.
        if isinstance(error, processes.InputFailure) or comm.get_local_rank() == 0:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except processes.ProcessFailure as error:
        processes.show(error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
