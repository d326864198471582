"""What the doctor tries in processes of its own: imports, and a training step.

Runs as a script, whose lines that begin with `MARK` the doctor reads. Nothing is imported at the top that could fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
MARK = "@@pointcept_kd "


def say(key: str, **values: Any) -> None:
    """One finding of a probe, as a line for the process that reads it."""
    print(f"{MARK}{json.dumps({'key': key, **values})}", flush=True)


def reason(error: BaseException) -> str:
    """Kind and text of an error in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def attempt(key: str, action: Callable[[], dict[str, Any]]) -> None:
    """Say what an action found, or how it failed."""
    start = time.perf_counter()
    try:
        found = action()
    except BaseException as error:  # a broken package raises anything, SystemExit included
        say(key, error=reason(error))
    else:
        say(key, **found, seconds=round(time.perf_counter() - start, 2))


def probe_imports(names: Sequence[str]) -> None:
    """Import one package after the other; the one that is begun last is to blame if this process dies."""
    for name in names:
        say("begin", name=name)

        def bring(name: str = name) -> dict[str, Any]:
            __import__(name)
            return {}

        attempt(name, bring)


def probe_core() -> None:
    """torch, the package itself, its choices, a training step, and the plugins."""
    os.environ["POINTCEPT_KD_PLUGINS"] = "0"
    attempt("torch", _torch)
    attempt("package", _package)
    attempt("backends", _backends)
    attempt("self-test cpu", lambda: train_once("cpu"))
    attempt("self-test cuda", lambda: train_once("cuda"))
    for plugin in metadata.entry_points(group="pointcept_kd.plugins"):
        owner = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown"

        def load(plugin: metadata.EntryPoint = plugin, owner: str = owner) -> dict[str, Any]:
            say("plugin", name=plugin.name, value=plugin.value, package=owner)
            plugin.load()
            return {}

        attempt(f"plugin {plugin.name}", load)


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    devices = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            traits = torch.cuda.get_device_properties(i)
            devices.append(
                {
                    "name": traits.name,
                    "gigabytes": round(traits.total_memory / 2**30, 1),
                    "capability": f"{traits.major}.{traits.minor}",
                }
            )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices,
        "bfloat16": bool(devices) and torch.cuda.is_bf16_supported(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def _package() -> dict[str, Any]:
    import pointcept_kd
    from pointcept_kd.host import MODELS, TERMS
    from pointcept_kd.host.config import find_config

    config = find_config("configs/kd/ptv3_to_student_tiny.py")
    return {
        "version": pointcept_kd.__version__,
        "folder": str(Path(pointcept_kd.__file__).parent),
        "host": str(pointcept_kd.host.PROVIDER),
        "models": len(MODELS),
        "terms": len(TERMS),
        "config": str(config) if config.is_file() else None,
    }


def _backends() -> dict[str, Any]:
    import logging

    import torch

    from pointcept_kd.ops import backend

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    backend.log.addHandler(handler)
    backend.log.setLevel(logging.INFO)
    backend.flash_attention(True, torch.cuda.is_available())
    backend.onednn_linear()
    return {"lines": lines}


def train_once(device: str) -> dict[str, Any]:
    """A forward and backward pass of the demo's student over a small random cloud.

    Raises:
        RuntimeError: for a loss or gradient that is not finite, or a weight without one.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"absent": True}
    from pointcept_kd.host import MODELS
    from pointcept_kd.host.runtime import read_config

    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = read_config("configs/sim/semseg-pt-v3m1-1-student_tiny.py")
    network = MODELS.build(cfg["model"]).to(device).train()
    cells = torch.unique(torch.randint(0, 40, (3000, 3)), dim=0)
    cells = cells[torch.randperm(len(cells))]
    batch = {
        "coord": 0.2 * cells,
        "grid_coord": cells,
        "feat": torch.cat([0.2 * cells, torch.rand(len(cells), 1)], 1),
        "segment": torch.randint(0, cfg["data"]["num_classes"], (len(cells),)),
        "offset": torch.tensor([len(cells) // 2, len(cells)]),
    }
    loss = network({key: value.to(device) for key, value in batch.items()})["loss"]
    loss.backward()
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {loss.item()}")
    for name, weight in network.named_parameters():
        if weight.grad is None or not torch.isfinite(weight.grad).all():
            raise RuntimeError(f"the gradient of {name} is missing or not finite")
    return {"loss": round(loss.item(), 4), "points": len(cells)}


def probe(words: Sequence[str]) -> None:
    """Entry of a probing process."""
    folder = str(PACKAGE.parent)
    spec = importlib.util.find_spec("pointcept_kd")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != PACKAGE:
        sys.path.insert(0, folder)
    probe_core() if words[0] == "core" else probe_imports(words[1:])


if __name__ == "__main__":
    probe(sys.argv[1:])
