"""The checkout that POINTCEPT_ROOT names, imported beside this package."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import pointcept_kd  # noqa: F401  (before Pointcept, so that the built-in host serves)
import pointcept_kd.host as host

from . import shims


@pytest.fixture(scope="package")
def root():
    """Folder of the checkout."""
    folder = os.environ.get("POINTCEPT_ROOT")
    if not folder:
        pytest.skip("POINTCEPT_ROOT does not name a checkout of Pointcept")
    if not (Path(folder) / "pointcept" / "__init__.py").is_file():
        pytest.fail(f"POINTCEPT_ROOT={folder}: there is no pointcept/__init__.py")
    return Path(folder).resolve()


@pytest.fixture(scope="package")
def theirs(root):
    """Pointcept's registries, builders and helpers; this package's own are those of its built-in host."""
    if host.HOST != "builtin":
        pytest.skip("compares the built-in host with Pointcept; set POINTCEPT_KD_HOST=builtin")
    pytest.importorskip("spconv", reason="Pointcept's networks need spconv")
    shims.install(root)
    found = SimpleNamespace()
    for module, names in {
        "pointcept.models.builder": ("MODELS", "MODULES", "build_model"),
        "pointcept.models.losses.builder": ("LOSSES", "build_criteria"),
        "pointcept.datasets.builder": ("DATASETS",),
        "pointcept.datasets.transform": ("TRANSFORMS", "Compose"),
        "pointcept.datasets.utils": ("collate_fn", "point_collate_fn"),
        "pointcept.engines.hooks.builder": ("HOOKS",),
        "pointcept.engines.hooks": ("SemSegEvaluator",),
        "pointcept.engines.train": ("TRAINERS",),
        "pointcept.engines.test": ("TESTERS",),
        "pointcept.utils.config": ("Config", "ConfigDict"),
        "pointcept.utils.events": ("EventStorage",),
        "pointcept.utils.optimizer": ("OPTIMIZERS", "build_optimizer"),
        "pointcept.utils.scheduler": ("SCHEDULERS", "build_scheduler", "CosineScheduler"),
        "pointcept.models.utils.serialization": ("encode", "decode"),
        "pointcept.models.utils.structure": ("Point",),
        "pointcept.models.utils": (
            "offset2batch", "offset2bincount", "bincount2offset", "batch2offset",
        ),
    }.items():  # fmt: skip
        loaded = importlib.import_module(module)
        # Some came after 1.5.2; the tests that need one see that it is None.
        vars(found).update({name: getattr(loaded, name, None) for name in names})
    yield found
    shims.remove()
