"""The shims do what they stand in for, refuse the rest, and leave nothing behind."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from . import shims

LIFE = """
import importlib.util, sys, torch
from tests.contract import shims

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in shims.PACKAGES else real(name, *a)
before = torch.Tensor.cuda, torch.histc, list(sys.path), list(sys.meta_path)
said = shims.install(sys.argv[1])
assert shims.install(sys.argv[1]) == said
assert all(any(line.startswith(package + ":") for line in said) for package in shims.PACKAGES)
import pointcept
assert pointcept.__file__.startswith(sys.argv[1])
from torch_cluster import knn
from open3d.geometry import PointCloud
class Derived(PointCloud): pass
for use in (lambda: knn(1, 2), PointCloud, PointCloud.create, Derived):
    try:
        use()
    except RuntimeError as error:
        assert "stand-in" in str(error)
    else:
        raise SystemExit("a stand-in was used")
if not torch.cuda.is_available():
    x = torch.arange(6)
    assert x.cuda() is x
    net = torch.nn.Linear(1, 1)
    assert net.cuda(0) is net
    counts = torch.histc(torch.tensor([0, 1, 1, 3]), bins=4, min=0, max=3)
    assert counts.dtype == torch.int64 and counts.tolist() == [1, 2, 0, 1]
    assert torch.histc(torch.tensor([0.5, 1.5]), bins=2, min=0, max=2).tolist() == [1, 1]
shims.remove()
assert before == (torch.Tensor.cuda, torch.histc, sys.path, sys.meta_path)
assert not {"pointcept", "torch_cluster", "open3d"} & set(sys.modules)
"""


def checkout(tmp_path):
    (tmp_path / "pointcept").mkdir()
    (tmp_path / "pointcept" / "__init__.py").touch()
    return str(tmp_path)


def test_install_and_remove(tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", LIFE, checkout(tmp_path)],
        capture_output=True, text=True, cwd=request.config.rootpath,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_runner_runs_the_script_as_main(tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pointcept\n"
        "if __name__ == '__main__':\n    print(*sys.argv[1:], __file__ == sys.argv[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.run", str(script), "--one", "2"],
        capture_output=True, text=True, cwd=request.config.rootpath,
        env={**os.environ, "POINTCEPT_ROOT": checkout(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "--one 2 True"


def test_no_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="pointcept/__init__.py"):
        shims.install(tmp_path)


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_segment_csr(reduce):
    values = torch.randn(9, 2, 3)
    ends = torch.tensor([1, 3, 3, 8])
    result = shims.segment_csr(values, ends, reduce=reduce)
    assert result.shape == (3, 2, 3)
    assert not result[1].any()
    for row, part in ((0, values[1:3]), (2, values[3:8])):
        expected = getattr(part, {"min": "amin", "max": "amax"}.get(reduce, reduce))(0)
        torch.testing.assert_close(result[row], expected)
    if importlib.util.find_spec("torch_scatter"):
        import torch_scatter

        torch.testing.assert_close(result, torch_scatter.segment_csr(values, ends, reduce=reduce))


def test_scatter_min():
    values = torch.randint(-9, 9, (40, 3))
    index = torch.arange(40) % 7
    least, row = shims.scatter_min(values, index)
    for group in range(7):
        assert least[group].tolist() == values[group::7].amin(0).tolist()
    assert torch.equal(values.gather(0, row), least)
    assert torch.equal(index[row], torch.arange(7)[:, None].expand(7, 3))


def test_drop_path_keeps_the_mean():
    layer = shims.DropPath(0.25)
    x = torch.ones(4000, 2)
    assert layer.eval()(x) is x
    kept = layer.train()(x)
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
