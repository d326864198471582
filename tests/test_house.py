"""The house rules: which room may import which, what may be imported at the top, and what no file may say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pointcept_kd"
ALLOWED = {  # room -> rooms it may import
    "ops": set(),
    "handoff": set(),
    "host": {"ops"},
    **dict.fromkeys(("data", "networks", "distillers", "completion", "engine"), {"host", "ops"}),
}
CORE = {"torch", "numpy", "scipy", "tqdm", "addict", "jaxtyping"}
OPTIONAL_AT_TOP = {"pointcept_kd"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST, package: tuple[str, ...]):
    """Absolute dotted names of every import, relative ones resolved against `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node, ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_do_not_reach_sideways(path):
    parts = path.relative_to(ROOT).parent.parts
    if len(parts) < 2:
        return
    room = parts[1]
    assert room in ALLOWED, f"{path}: {room} is not a room of the house"
    for node, name in imports(ast.parse(path.read_text()), parts):
        if name.startswith("pointcept_kd."):
            target = name.split(".")[1]
            assert target == room or target in ALLOWED[room], (
                f"{path.relative_to(ROOT)}:{node.lineno}: {room} may not import {target}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_core_dependencies_at_module_level(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for _, name in imports(ast.Module([node], []), path.relative_to(ROOT).parent.parts):
            top = name.split(".")[0]
            assert top in CORE | OPTIONAL_AT_TOP or top in sys.stdlib_module_names, (
                f"{path.relative_to(ROOT)}:{node.lineno}: {top} is optional; import it where it is used"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensors_follow_their_inputs(path):
    assert ".cuda()" not in path.read_text(), f"{path}: tensors follow their inputs' device"


def test_every_file_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_import_brings_no_optional_package():
    code = (
        "import sys, pointcept_kd; "
        "print(*[m for m in ('matplotlib','trimesh','embreex','tensorboard','spconv','timm','torchvision') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
