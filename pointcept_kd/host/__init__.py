"""The host: the part of Pointcept that networks, data and distillers stand on.

`POINTCEPT_KD_HOST` chooses: `builtin` is this package's own host, with Pointcept's names and behaviour;
`auto` (the default) takes whatever is there. The choice and its reason are in `HOST` and `HOST_REASON`.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from .errors import InputError, one_line
from .registry import Registry, stand_in


def _choose() -> tuple[str, str]:
    wanted = os.environ.get("POINTCEPT_KD_HOST", "auto")
    if wanted not in ("auto", "builtin"):
        raise InputError(
            f"POINTCEPT_KD_HOST={wanted}: this version knows auto and builtin; unset it or set one of these"
        )
    reason = (
        "asked for by POINTCEPT_KD_HOST"
        if wanted == "builtin"
        else "needs no Pointcept, GPU or compiler"
    )
    return "builtin", reason


HOST, HOST_REASON = _choose()

MODELS = Registry("models")
MODULES = Registry("modules")
LOSSES = Registry("losses")
DATASETS = Registry("datasets")
TRANSFORMS = Registry("transforms")
HOOKS = Registry("hooks")
TRAINERS = Registry("trainers")
TESTERS = Registry("testers")
OPTIMIZERS = Registry("optimizers")
SCHEDULERS = Registry("schedulers")

# Our own classes: `type="kd.Distiller"` beside `type="PT-v3m1"`.
kd = SimpleNamespace(
    **{
        registry.name.upper(): Registry(registry.name, scope="kd", parent=registry)
        for registry in (
            MODELS, MODULES, LOSSES, DATASETS, TRANSFORMS, HOOKS, TRAINERS, TESTERS, OPTIMIZERS, SCHEDULERS,
        )
    }
)  # fmt: skip

# Distillation terms are ours alone; `LogitKL` and `kd.LogitKL` name the same class.
TERMS = Registry("terms", scope="kd")

__all__ = [
    "DATASETS", "HOOKS", "HOST", "HOST_REASON", "LOSSES", "MODELS", "MODULES", "OPTIMIZERS", "SCHEDULERS",
    "TERMS", "TESTERS", "TRAINERS", "TRANSFORMS", "InputError", "Registry", "kd", "one_line", "stand_in",
]  # fmt: skip
