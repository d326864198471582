"""The Triton kernels against their plain-torch twin: in the interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pointops
import pytest
import torch
from pointops import _backend, _brute

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (extra cuda)"
)

LENGTHS = {
    "two scans in one block": ([7, 150], [9, 4]),
    "several blocks": ([140, 300, 20], [18, 20, 3]),
    "one point": ([1, 5], [2, 1]),
    "empty scans": ([0, 30, 0, 12], [3, 0, 2, 5]),
    "no queries": ([5], [0]),
    "nothing": ([0], [0]),
}


def batch(lengths, seed, grid=False):
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    xyz = torch.rand(ends[-1], 3, generator=g) * 2
    return ((xyz * 3).round() if grid else xyz), ends


def cases():
    found = {}
    for name, (lengths, new_lengths) in LENGTHS.items():
        for grid in (False, True):
            support, ends = batch(lengths, 1, grid)
            query, query_ends = batch(new_lengths, 2, grid)
            clouds = (support, ends, query, query_ends)
            for k in (1, 5, 33):
                found[f"{name}, nearest {k}, grid {grid}"] = ("nearest", (k, *clouds))
            high = 6.0 if grid else 0.4
            found[f"{name}, within, grid {grid}"] = ("within", (high / 6, high, 1e-5, *clouds))
            counts = torch.tensor([min(n, 12) for n in lengths]).cumsum(0).tolist()
            found[f"{name}, farthest, grid {grid}"] = ("farthest", (support, ends, counts))
    xyz, ends = batch([1, 9], 3)
    found["more samples than points"] = ("farthest", (xyz, ends, [3, 15]))
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of all cases, from the interpreter."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save(list(cases().values()), folder / "cases.pt")
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("interpreted.py")),
            str(folder / "cases.pt"),
            str(folder / "results.pt"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases(), torch.load(folder / "results.pt")))


@needs_triton
@pytest.mark.parametrize("name", cases())
def test_interpreted_kernels_are_their_twin_bit_by_bit(interpreted, name):
    function, arguments = cases()[name]
    result, twin = interpreted[name], getattr(_brute, function)(*arguments)
    if function == "nearest":
        near, which = twin
        assert torch.equal(result[0], near)
        # Which of several at exactly the k-th distance are taken is free, so only nearer ones count.
        certain = near < near[:, -1:]
        assert torch.equal(result[1][certain], which[certain])
        assert (
            result[1].sort(dim=1).values.diff(dim=1)[result[1].min(dim=1).values >= 0] > 0
        ).all()
    elif function == "farthest":
        assert torch.equal(result, twin)
    else:
        assert pairs(result) == pairs(twin)
        rows = [row for part in result for row in part[0].tolist()]
        assert rows == list(range(len(arguments[5])))


def pairs(parts):
    """(query, support, squared distance) of all parts."""
    found = []
    for rows, asked, which, square in parts:
        found += zip(rows[asked].tolist(), which.tolist(), square.tolist())
    return found


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pointops import _kernels as k
floats, ints, longs = "*fp32", "*i32", "*i64"
for kernel, kinds, constants in (
    (k._nearest, (floats, floats, ints, ints, longs, "i32"), dict(K=16, ROWS=16, COLUMNS=128)),
    (k._nearest, (floats, floats, ints, ints, longs, "i32"), dict(K=128, ROWS=16, COLUMNS=128)),
    (k._within, (floats, floats, ints, ints, ints, ints, ints, "i32", *["fp32"] * 3),
     dict(COLLECT=False, ROWS=16, COLUMNS=128)),
    (k._within, (floats, floats, ints, ints, ints, longs, ints, "i32", *["fp32"] * 3),
     dict(COLLECT=True, ROWS=16, COLUMNS=128)),
    (k._farthest, (floats, ints, ints, ints, ints, floats, ints), dict(BLOCK=4096)),
):
    names = [n for n in kernel.arg_names if n not in constants]
    signature = {**dict(zip(names, kinds)), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=4 if kernel is not k._farthest else 16, enable_fp_fusion=False)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    print(kernel.__name__, len(made.asm["ptx"]), "fma" in made.asm["ptx"], len(made.asm["cubin"]))
"""


@needs_triton
def test_kernels_compile_for_a_gpu_without_one():
    folder = Path(pointops.__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert "True" not in done.stdout, "a fused multiply-add would change the last bits"


def test_without_triton_or_float32_plain_torch_serves():
    class Points:
        device, dtype = torch.device("cuda"), torch.float64

    assert _backend.backend(Points()) is _brute
    assert _backend.backend(torch.empty(1, 3, device="meta")) is _brute


def test_triton_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("POINTOPS_TRITON", "0")
    _backend._triton.cache_clear()
    try:
        assert _backend._triton() is None
    finally:
        _backend._triton.cache_clear()


@pytest.mark.cuda
def test_on_a_gpu_as_on_a_cpu():
    (xyz, ends), (new_xyz, new_ends) = batch([400, 0, 900], 1), batch([50, 0, 60], 2)
    clouds = (xyz, torch.tensor(ends), new_xyz, torch.tensor(new_ends))
    there = tuple(t.to("cuda") for t in clouds)
    for call in (
        lambda *c: pointops.knn_query(16, *c),
        lambda *c: pointops.knn_query(200, *c),
        lambda *c: pointops.ball_query(8, 0.5, 0.1, *c),
    ):
        for a, b in zip(call(*clouds), call(*there)):
            torch.testing.assert_close(a, b.cpu())
    counts = torch.tensor([40, 40, 90])
    picks = pointops.farthest_point_sampling(*there[:2], counts.to("cuda"))
    want = pointops.farthest_point_sampling(*clouds[:2], counts)
    assert torch.equal(picks.cpu(), want)
    idx, feat = pointops.knn_query(4, *there)[0], torch.rand(1300, 8)
    torch.testing.assert_close(
        pointops.grouping2(feat.to("cuda"), idx).cpu(), pointops.grouping2(feat, idx.cpu())
    )
