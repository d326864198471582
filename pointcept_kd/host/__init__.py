"""The host: the part of Pointcept that networks, data and distillers stand on.

`POINTCEPT_KD_HOST` chooses: `pointcept` is the real one, `builtin` this package's own with its names and behaviour,
`auto` (the default) the real one where it can be imported and CUDA is there. The choice and its reason are in `HOST`
and `HOST_REASON`; see `provider.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

from .errors import InputError, one_line
from .provider import Provider, choose, pointcept_class
from .registry import Registry, stand_in

PROVIDER: Provider = choose()
HOST, HOST_REASON = PROVIDER.name, PROVIDER.reason

MODELS = PROVIDER.root("models")
MODULES = PROVIDER.root("modules")
LOSSES = PROVIDER.root("losses")
DATASETS = PROVIDER.root("datasets")
TRANSFORMS = PROVIDER.root("transforms")
HOOKS = PROVIDER.root("hooks")
TRAINERS = PROVIDER.root("trainers")
TESTERS = PROVIDER.root("testers")
OPTIMIZERS = PROVIDER.root("optimizers")
SCHEDULERS = PROVIDER.root("schedulers")

# Our own classes: `type="kd.Distiller"` beside `type="PT-v3m1"`.
kd = SimpleNamespace(
    **{
        registry.name.upper(): PROVIDER.child(registry, "kd")
        for registry in (
            MODELS, MODULES, LOSSES, DATASETS, TRANSFORMS, HOOKS, TRAINERS, TESTERS, OPTIMIZERS, SCHEDULERS,
        )
    }
)  # fmt: skip

# Distillation terms are ours alone; `LogitKL` and `kd.LogitKL` name the same class.
TERMS = Registry("terms", scope="kd")

__all__ = [
    "DATASETS", "HOOKS", "HOST", "HOST_REASON", "LOSSES", "MODELS", "MODULES", "OPTIMIZERS", "PROVIDER",
    "SCHEDULERS", "TERMS", "TESTERS", "TRAINERS", "TRANSFORMS", "InputError", "Registry", "kd", "one_line",
    "pointcept_class", "stand_in",
]  # fmt: skip
