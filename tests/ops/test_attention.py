"""Patch attention against loops over patches, and the promise that scans do not see each other."""

import logging
import math
import types
from itertools import pairwise

import pytest
import torch

from pointcept_kd.ops import backend
from pointcept_kd.ops.attention import patch_attention, patch_layout, relative_position_bias

COUNTS = [
    [1],
    [4],
    [8],
    [11],
    [5, 8, 3],
    [1, 0, 17, 2, 8],
    [3, 9, 16, 1, 6, 7, 2, 4],
    [0, 3, 0],
]


def patches_of(count, size):
    """(keys, own) of each patch of one scan, as lists of positions: the definition, patch by patch."""
    if count <= size:
        return [(list(range(count)), count)] if count else []
    out = []
    for start in range(0, count, size):
        own = min(size, count - start)
        copies = list(range(start - (size - own), start)) if own < size else []
        out.append((list(range(start, start + own)) + copies, own))
    return out


def oracle(qkv, counts, size, scale, bias=None):
    n, _, heads, _ = qkv.shape
    result = [None] * n
    first = 0
    for count in counts:
        for keys, own in patches_of(count, size):
            rows = [first + k for k in keys]
            for i in rows[:own]:
                per_head = []
                for h in range(heads):
                    logits = torch.stack(
                        [(qkv[i, 0, h] * qkv[j, 1, h]).sum() * scale for j in rows]
                    )
                    if bias is not None:
                        logits = logits + torch.stack([bias(i, j, h) for j in rows])
                    weights = logits.exp() / logits.exp().sum()
                    per_head.append(sum(w * qkv[j, 2, h] for w, j in zip(weights, rows)))
                result[i] = torch.stack(per_head)
        first += count
    return torch.stack(result)


def random_qkv(n, heads=2, width=4, dtype=torch.float64):
    return torch.randn(n, 3, heads, width, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_layout_is_the_definition(counts):
    layout = patch_layout(counts, 8)
    expected = []
    first = 0
    for count in counts:
        expected += [([first + k for k in keys], own) for keys, own in patches_of(count, 8)]
        first += count
    starts = layout.starts.tolist()
    made = [layout.rows[a:b].tolist() for a, b in pairwise(starts)]
    assert starts[-1] == len(layout.rows)
    # A patch's last rows may be copies, in any order among themselves; its own come first.
    wanted = {(tuple(keys[:own]), tuple(sorted(keys[own:]))) for keys, own in expected}
    own_of = {keys[0]: own for keys, own in expected}
    assert {(tuple(r[: own_of[r[0]]]), tuple(sorted(r[own_of[r[0]] :]))) for r in made} == wanted
    assert len(made) == len(expected)
    assert torch.equal(layout.rows[layout.slots], torch.arange(sum(counts)))
    assert layout.longest == max(len(keys) for keys, _ in expected)


def test_worked_layout():
    """11 points in patches of 4: the last has points 8, 9, 10 and a copy of 7."""
    layout = patch_layout([11], 4)
    assert layout.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7]
    assert layout.slots.tolist() == list(range(11))
    assert layout.starts.tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_oracle_forward_and_gradient(counts):
    qkv = random_qkv(sum(counts))
    made = patch_attention(qkv, patch_layout(counts, 8), scale=0.37)
    expected = oracle(qkv, counts, 8, 0.37)
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), qkv)[0] for out in (made, expected))
    assert torch.allclose(ours, theirs, atol=1e-9, rtol=0)


def test_default_scale_and_serialised_order():
    counts, n = [5, 11], 16
    order = torch.cat([torch.randperm(5), 5 + torch.randperm(11)])
    inverse = torch.argsort(order)
    qkv = random_qkv(n)
    made = patch_attention(qkv, patch_layout(counts, 4).through(order, inverse))
    expected = oracle(qkv[order], counts, 4, 4**-0.5)[inverse]
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)


def test_relative_position_bias():
    counts, n, heads = [3, 11, 6], 20, 2
    bound = 2
    positions = torch.randint(0, 9, (n, 3))
    table = torch.randn(3 * (2 * bound + 1), heads, dtype=torch.float64, requires_grad=True)

    def bias(i, j, h):
        total = 0
        for axis in range(3):
            step = int((positions[i, axis] - positions[j, axis]).clamp(-bound, bound))
            total = total + table[axis * (2 * bound + 1) + step + bound, h]
        return total

    qkv = random_qkv(n, heads)
    made = patch_attention(
        qkv,
        patch_layout(counts, 8),
        bias=lambda rows: relative_position_bias(positions, rows, table),
    )
    expected = oracle(qkv, counts, 8, 0.5, bias)
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), table)[0] for out in (made, expected))
    assert torch.allclose(ours, theirs, atol=1e-9, rtol=0)


def test_gradcheck():
    qkv = random_qkv(9, 1, 2)
    layout = patch_layout([6, 3], 4)
    assert torch.autograd.gradcheck(lambda x: patch_attention(x, layout), qkv)


@pytest.mark.parametrize("count", [1, 5, 8, 19])
def test_a_scan_does_not_see_the_others(count):
    qkv = random_qkv(count + 40)
    alone = patch_attention(qkv[:count], patch_layout([count], 8))
    for others in ([40], [2, 0, 38], [3, 7, 1, 29]):
        together = patch_attention(qkv, patch_layout([count, *others], 8))
        assert torch.allclose(together[:count], alone, atol=1e-12, rtol=0)


def test_one_point_attends_to_itself():
    qkv = random_qkv(1)
    assert torch.allclose(patch_attention(qkv, patch_layout([1], 8)), qkv[:, 2])


def test_empty_and_bad_input():
    layout = patch_layout([0, 0], 8)
    assert patch_attention(random_qkv(0), layout).shape == (0, 2, 4)
    assert layout.longest == 0
    with pytest.raises(ValueError, match="patch_size must be at least 1"):
        patch_layout([3], 0)


def test_upcast_computes_in_float32():
    qkv = torch.randn(20, 3, 2, 16).bfloat16()
    layout = patch_layout([20], 8)
    exact = patch_attention(qkv.float(), layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = patch_attention(qkv, layout, upcast=True)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, exact.bfloat16())


def test_dropout_drops():
    qkv = torch.randn(16, 3, 2, 4)
    layout = patch_layout([16], 8)
    out = patch_attention(qkv, layout, dropout=0.5)
    assert not torch.allclose(out, patch_attention(qkv, layout))
    zero = patch_attention(qkv, layout, dropout=1.0)
    assert (zero == 0).all()


class FakeFlash:
    """flash-attn's call, computed sequence by sequence; it remembers that it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, qkv, starts, max_seqlen, dropout_p, softmax_scale):
        self.calls += 1
        assert qkv.dtype in (torch.float16, torch.bfloat16)
        assert max_seqlen == int(starts.diff().max())
        scale = softmax_scale or 1 / math.sqrt(qkv.shape[-1])
        out = []
        for a, b in pairwise(starts.tolist()):
            q, k, v = qkv[a:b].double().permute(1, 2, 0, 3)
            out.append((torch.softmax(scale * q @ k.mT, -1) @ v).transpose(0, 1))
        return torch.cat(out).to(qkv.dtype)


def test_flash_route_has_the_same_meaning(monkeypatch):
    flash = FakeFlash()
    monkeypatch.setattr(
        "pointcept_kd.ops.attention.flash_attention",
        lambda wanted, is_cuda: flash if wanted else None,
    )
    counts = [3, 11, 6]
    qkv = torch.randn(20, 3, 2, 4)
    layout = patch_layout(counts, 4)
    exact = patch_attention(qkv, layout, scale=0.6)
    assert flash.calls == 0
    made = patch_attention(qkv, layout, scale=0.6, enable_flash=True)
    assert flash.calls == 1
    assert made.dtype == torch.float32
    assert torch.allclose(made, exact, atol=0.05)
    patch_attention(qkv, layout, enable_flash=True, upcast=True)
    assert flash.calls == 1, "upcast keeps float32"


def kernel():
    """Stands for flash-attn's function."""


@pytest.fixture
def choose(monkeypatch):
    """Set POINTCEPT_KD_ATTENTION and whether flash-attn is there."""

    def set_up(choice, installed):
        backend._flash_attn.cache_clear()
        backend._say.cache_clear()
        if choice is None:
            monkeypatch.delenv("POINTCEPT_KD_ATTENTION", raising=False)
        else:
            monkeypatch.setenv("POINTCEPT_KD_ATTENTION", choice)

        def import_module(name):
            if not installed:
                raise ImportError(name)
            return types.SimpleNamespace(flash_attn_varlen_qkvpacked_func=kernel)

        monkeypatch.setattr(backend.importlib, "import_module", import_module)

    yield set_up
    backend._flash_attn.cache_clear()
    backend._say.cache_clear()


@pytest.mark.parametrize(
    ("choice", "installed", "wanted", "is_cuda", "expected"),
    [
        (None, True, True, True, kernel),
        ("auto", True, True, False, None),
        ("auto", True, False, True, None),
        ("auto", False, True, True, None),
        ("sdpa", True, True, True, None),
        ("flash", True, False, True, kernel),
    ],
)
def test_choice_of_the_backend(choose, caplog, choice, installed, wanted, is_cuda, expected):
    choose(choice, installed)
    with caplog.at_level(logging.INFO, "pointcept_kd"):
        assert backend.flash_attention(wanted, is_cuda) == expected
        backend.flash_attention(wanted, is_cuda)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("attention: ")]
    assert len(lines) == 1, "said once"
    assert ("flash-attn, " if expected else "PyTorch's, ") in lines[0]


def test_forced_choices_that_cannot_be_had(choose):
    choose("flash", False)
    with pytest.raises(ValueError, match="install the package flash-attn"):
        backend.flash_attention(False, True)
    choose("flash", True)
    with pytest.raises(ValueError, match="not on CUDA"):
        backend.flash_attention(True, False)
    choose("fast", True)
    with pytest.raises(ValueError, match="choose auto, sdpa or flash"):
        backend.flash_attention(True, True)
