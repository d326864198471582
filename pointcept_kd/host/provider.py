"""Which host serves: the real Pointcept, or this package's own with Pointcept's names and behaviour.

Pointcept is no pip package and has no version number: it is found on the import path, or through POINTCEPT_ROOT, the
folder of a checkout; what it can do is seen from what it has. From 1.5.2 on its registries, trainer and hooks are what
this package stands on. Nothing falls back in silence: a host that was asked for and cannot be had is an error, and the
reason of the choice is kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .registry import Registry

CHOICES = ("auto", "pointcept", "builtin")

# Where Pointcept keeps its registries, in all versions since 1.5.2.
_REGISTRIES = {
    "models": ("pointcept.models.builder", "MODELS"),
    "modules": ("pointcept.models.builder", "MODULES"),
    "losses": ("pointcept.models.losses.builder", "LOSSES"),
    "datasets": ("pointcept.datasets.builder", "DATASETS"),
    "transforms": ("pointcept.datasets.transform", "TRANSFORMS"),
    "hooks": ("pointcept.engines.hooks.builder", "HOOKS"),
    "trainers": ("pointcept.engines.train", "TRAINERS"),
    "testers": ("pointcept.engines.test", "TESTERS"),
    "optimizers": ("pointcept.utils.optimizer", "OPTIMIZERS"),
    "schedulers": ("pointcept.utils.scheduler", "SCHEDULERS"),
}
# The first version that has it, by registry and registered name; newest first.
_MARKS = (
    ("1.7", "trainers", "PartialSampledTrainer"),
    ("1.6.1", "datasets", "DefaultImagePointDataset"),
    ("1.6.0", "hooks", "ModelHook"),
)


@dataclass(frozen=True)
class Provider:
    """The host of this process.

    Attributes:
        name: "pointcept" or "builtin".
        reason: why, in a line.
        folder: of Pointcept, where it serves.
        version: the version that it is at least, where it serves.
        registries: Pointcept's registries by name, where it serves.
        hook_base: the class that hooks derive from.
    """

    name: str
    reason: str
    folder: Path | None = None
    version: str | None = None
    registries: dict[str, Any] = field(default_factory=dict)
    hook_base: type = object

    def __str__(self) -> str:
        if self.folder is None:
            return f"built in ({self.reason})"
        return f"Pointcept {self.version} or newer in {self.folder} ({self.reason})"

    def root(self, name: str) -> Registry:
        """The root registry of that name: Pointcept's, or a new one."""
        theirs = self.registries.get(name)
        return Registry(name) if theirs is None else PointceptRegistry(name, theirs)

    def child(self, root: Registry, scope: str) -> Registry:
        """A child of a root, known to Pointcept as well where the root is Pointcept's."""
        child = Registry(root.name, scope=scope, parent=root)
        if isinstance(root, PointceptRegistry):
            root.adopt(child)
        return child


class PointceptRegistry(Registry):
    """A registry of Pointcept's under this package's checks and messages; both see the same classes at any time."""

    def __init__(self, name: str, theirs: Any) -> None:
        super().__init__(name)
        self.theirs = theirs
        self._classes = theirs.module_dict

    def adopt(self, child: Registry) -> None:
        """Let Pointcept find a child's classes under its scope."""
        twin = type(self.theirs)(self.name, scope=child.scope)
        twin.parent = self.theirs
        twin._module_dict = child._classes
        self.theirs.children[child.scope] = twin

    def get(self, name: str) -> type | None:
        """The class behind a name, or None; also one in a scope that others added to Pointcept."""
        found = super().get(name)
        scope, dot, rest = name.partition(".")
        if found is None and dot and scope in self.theirs.children:
            found = self.theirs.children[scope].get(rest)
        return found


def choose() -> Provider:
    """The host that POINTCEPT_KD_HOST asks for: pointcept, builtin, or auto (the default).

    `auto` takes Pointcept where the process has imported it already, as its own tools have, or where it can be imported
    and there is a CUDA device, which its networks need.

    Raises:
        InputError: for another word, for a POINTCEPT_ROOT without Pointcept, and for Pointcept asked for but missing,
            broken or older than 1.5.2.
    """
    wanted = os.environ.get("POINTCEPT_KD_HOST", "auto")
    if wanted not in CHOICES:
        raise InputError(f"POINTCEPT_KD_HOST={wanted}: use auto, pointcept or builtin, or unset it")
    if wanted == "builtin":
        return Provider("builtin", "asked for by POINTCEPT_KD_HOST")
    running = "pointcept.utils.registry" in sys.modules
    folder = _folder()
    if wanted == "pointcept":
        if folder is None:
            raise InputError(
                "POINTCEPT_KD_HOST=pointcept, but there is no module named pointcept: set POINTCEPT_ROOT to the folder "
                "of a checkout, or add that to PYTHONPATH"
            )
        return _load(folder, "asked for by POINTCEPT_KD_HOST")
    if folder is None:
        return Provider("builtin", "there is no Pointcept here")
    if running:
        return _load(folder, "this process has imported it")
    if not torch.cuda.is_available():
        return Provider(
            "builtin", f"Pointcept in {folder} needs CUDA for its networks, and there is none"
        )
    try:
        return _load(folder, "it can be imported, and there is CUDA")
    except InputError as error:
        reason = f"{error}"
        logging.getLogger("pointcept_kd").warning("The built-in host serves: %s", reason)
        return Provider("builtin", reason)


def _folder() -> Path | None:
    """The folder with the package `pointcept`; None where there is none."""
    loaded = sys.modules.get("pointcept")
    if loaded is not None and getattr(loaded, "__path__", None):
        return Path(next(iter(loaded.__path__))).parent
    root = os.environ.get("POINTCEPT_ROOT")
    if root:
        if not (Path(root) / "pointcept" / "__init__.py").is_file():
            raise InputError(
                f"POINTCEPT_ROOT={root}: there is no pointcept/__init__.py; give the folder of a checkout of "
                "Pointcept, or unset it"
            )
        return Path(root).resolve()
    try:
        spec = importlib.util.find_spec("pointcept")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent


def _load(folder: Path, reason: str) -> Provider:
    """Import Pointcept from a folder and look at what it has."""
    try:
        _import_package(folder)
        registries = {
            name: getattr(importlib.import_module(module), attribute)
            for name, (module, attribute) in _REGISTRIES.items()
        }
        hook_base = importlib.import_module("pointcept.engines.hooks.default").HookBase
    except Exception as error:
        raise InputError(
            f"Pointcept in {folder} cannot be imported: {_why(error, folder)}; repair its environment, or set "
            "POINTCEPT_KD_HOST=builtin"
        ) from error
    dataset = registries["datasets"].get("DefaultDataset")
    if not hasattr(dataset, "VALID_ASSETS"):
        raise InputError(
            f"Pointcept in {folder} is older than 1.5.2: its networks and data differ from what this package shares "
            "with it; update it, or set POINTCEPT_KD_HOST=builtin"
        )
    version = next((v for v, kind, name in _MARKS if registries[kind].get(name)), "1.5.2")
    return Provider("pointcept", reason, folder, version, registries, hook_base)


def _import_package(folder: Path) -> None:
    """Import `pointcept` from there; the folder stays off the import path, as it has `tools` and `configs`, too."""
    if "pointcept" in sys.modules:
        return
    init = folder / "pointcept" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "pointcept", init, submodule_search_locations=[str(init.parent)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{init} is no package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pointcept"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["pointcept"]
        raise


def _why(error: BaseException, folder: Path) -> str:
    """What went wrong in an import, and which file of Pointcept asked for it."""
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    own = [f for f in files if f.is_relative_to(folder.resolve() / "pointcept")]
    where = f", needed by {own[-1].relative_to(folder.resolve())}" if own else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"there is no module named {error.name}{where}"
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def pointcept_class(registry: Registry, name: str) -> Any:
    """Pointcept's class of that name, to derive from; `object` where this package is the host itself."""
    found = registry.get(name) if isinstance(registry, PointceptRegistry) else None
    return object if found is None else found
