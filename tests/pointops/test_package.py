"""The installable project: its metadata, and what importing it brings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pointops
import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "libs" / "pointops"


def test_metadata_and_a_version_in_one_place():
    tomllib = pytest.importorskip("tomllib", reason="Python reads TOML from 3.11 on")
    settings = tomllib.loads((LIBRARY / "pyproject.toml").read_text())
    project, setuptools = settings["project"], settings["tool"]["setuptools"]
    assert project["name"] == "pointops"
    assert project["license"] == {"text": "Apache-2.0"}
    assert setuptools["packages"] == ["pointops"]
    assert set(project["optional-dependencies"]) == {"fast", "cuda"}
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert setuptools["dynamic"]["version"] == {"attr": "pointops.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", pointops.__version__)


def test_import_brings_nothing_optional_and_nothing_of_the_main_project():
    code = (
        "import sys, torch; before = set(sys.modules); import pointops; print(pointops.__file__); "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*new & {'small_gicp', 'fpsample', 'triton', 'pointcept_kd'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(LIBRARY)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, brought = done.stdout.splitlines()
    assert Path(where).resolve() == Path(pointops.__file__).resolve()
    assert brought == ""
