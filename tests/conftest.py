"""What every test may rely on: few threads, seeded generators, the real samples where they are."""

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Long tests run only when asked for with `-m slow`; others only where there is what they need."""
    asked = config.getoption("-m")
    root = os.environ.get("POINTCEPT_ROOT", "")
    has_pointcept = bool(root) and (Path(root) / "pointcept" / "__init__.py").is_file()
    for item in items:
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="long; run with -m slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "pointcept" in item.keywords and not has_pointcept:
            reason = "POINTCEPT_ROOT does not name a checkout of Pointcept"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_logging():
    """A run that another test started has set the package's logger to INFO."""
    logging.getLogger("pointcept_kd").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the real sample scans; `POINTCEPT_KD_SAMPLES` names it."""
    folder = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    if not (folder / "semantickitti").is_dir():
        pytest.skip(f"no real samples at {folder}; set POINTCEPT_KD_SAMPLES to their folder")
    return folder
