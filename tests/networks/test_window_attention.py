"""Window attention: a plain loop, an edge list, values by hand, the two methods, the block, and what is refused."""

import math

import pytest
import torch

from pointcept_kd.host import InputError
from pointcept_kd.networks import window_attention as module
from pointcept_kd.networks.window_attention import (
    METHODS,
    SphereFormerBlock,
    window_attention,
    window_plan,
)
from pointcept_kd.ops.windows import Windows, exponential_rows, spherical, windows

A = 0.0125


def scene(n, scans=2, seed=0, dtype=torch.float64, heads=2, width=4, scale=1.0):
    """Positions, samples, random q, k, v and both kinds of windows with tables."""
    g = torch.Generator().manual_seed(seed)
    radius = 2 * torch.exp(torch.rand(n, generator=g) * 1.5)
    angle = torch.rand(n, generator=g) * 2 * math.pi
    xyz = torch.stack(
        (radius * angle.cos(), radius * angle.sin(), torch.rand(n, generator=g) - 1), 1
    )
    batch = torch.randint(scans, (n,), generator=g)
    qkv = [torch.randn(n, heads, width, generator=g, dtype=dtype) for _ in range(3)]
    kinds = []
    for rows, divided, a in (
        (47, windows(xyz, batch, (2.2, 2.6, 0.9)), None),
        (48, windows(spherical(xyz), batch, (9 * scale, 30, 120)), A),
    ):
        tables = [torch.randn(rows, 3, heads, width, generator=g, dtype=dtype) for _ in range(3)]
        kinds.append((divided, tables, a))
    return xyz, batch, qkv, kinds


def groups(divided):
    starts, sizes = divided.starts.tolist(), divided.sizes.tolist()
    return [divided.order[s : s + c].tolist() for s, c in zip(starts, sizes)]


def rows_of(divided, i, j, a):
    e = [int(divided.cells[i, x] - divided.cells[j, x]) + 23 for x in range(3)]
    if a is not None:
        e[2] = int(exponential_rows(divided.u[i, 2] - divided.u[j, 2], a))
    return e


def by_loop(q, k, v, divided, tables, a):
    """The formula, window by window and pair by pair."""
    tq, tk, tv = tables
    out = torch.zeros_like(v)
    for group in groups(divided):
        for i in group:
            logits, values = [], []
            for j in group:
                e = rows_of(divided, i, j, a)
                enc = [sum(t[e[x], x] for x in range(3)) for t in (tq, tk, tv)]
                logits.append(
                    (q[i] * k[j]).sum(1) + (q[i] * enc[0]).sum(1) + (k[j] * enc[1]).sum(1)
                )
                values.append(v[j] + enc[2])
            weights = torch.stack(logits).softmax(0)
            out[i] = (weights[:, :, None] * torch.stack(values)).sum(0)
    return out


def by_edges(q, k, v, divided, tables, a):
    """The formula over one list of all pairs."""
    pairs = [(i, j) for group in groups(divided) for i in group for j in group]
    i, j = torch.tensor(pairs).unbind(1)
    e = divided.cells[i] - divided.cells[j] + 23
    if a is not None:
        e[:, 2] = exponential_rows(divided.u[i, 2] - divided.u[j, 2], a)
    tq, tk, tv = (sum(t[e[:, x], x] for x in range(3)) for t in tables)
    logits = (q[i] * k[j] + q[i] * tq + k[j] * tk).sum(2)
    weights = logits.exp()
    total = weights.new_zeros(len(q), q.shape[1]).index_add(0, i, weights)
    return torch.zeros_like(v).index_add(0, i, (weights / total[i])[:, :, None] * (v[j] + tv))


# ----------------------------------------------------------------------------------------------------- against oracles


@pytest.mark.parametrize("method", METHODS)
def test_against_a_plain_loop(method):
    _, _, (q, k, v), kinds = scene(120)
    for divided, tables, a in kinds:
        sizes = divided.sizes
        assert 1 in sizes
        assert int(sizes.max()) > 4
        expected = by_loop(q, k, v, divided, tables, a)
        for pairs in (None, 30):
            made = window_attention(q, k, v, divided, *tables, a, method, pairs=pairs)
            assert made.dtype == torch.float64
            assert (made - expected).abs().max() < 1e-9


def test_forms_agree_in_float32():
    _, _, qkv, kinds = scene(3000, dtype=torch.float32, scale=0.3)
    for divided, tables, a in kinds:
        tables = [0.3 * t for t in tables]
        edges = by_edges(*qkv, divided, tables, a)
        for method in METHODS:
            made = window_attention(*qkv, divided, *tables, a, method)
            assert torch.allclose(made, edges, atol=1e-5), (method, a)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_edge_list(method):
    _, _, qkv, kinds = scene(300)
    for divided, tables, a in kinds:
        tables = [0.5 * t for t in tables]
        inputs = [t.detach().requires_grad_() for t in (*qkv, *tables)]
        cotangent = torch.randn(qkv[0].shape, dtype=torch.float64)
        expected = torch.autograd.grad(
            by_edges(*inputs[:3], divided, inputs[3:], a), inputs, cotangent
        )
        made = window_attention(*inputs[:3], divided, *inputs[3:], a, method, pairs=200)
        for got, want in zip(torch.autograd.grad(made, inputs, cotangent), expected):
            assert want.abs().max() > 0
            assert (got - want).abs().max() < 1e-9


def test_gradcheck():
    g = torch.Generator().manual_seed(3)
    u = torch.rand(7, 3, generator=g) * torch.tensor([2.0, 1.0, 1.0])
    divided = windows(u, torch.zeros(7, dtype=torch.int64), (1.0, 1.0, 1.0))
    assert divided.sizes.tolist() != [7]
    for rows, a in ((47, None), (48, A)):
        inputs = [
            torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
            for shape in [(7, 1, 2)] * 3 + [(rows, 3, 1, 2)] * 3
        ]

        def attend(q, k, v, *tables, a=a):
            return window_attention(q, k, v, divided, *tables, a)

        assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_two_tokens_by_hand():
    """One head, one channel; only the first axis has entries."""
    place = torch.zeros(2, 3, dtype=torch.float64)
    divided = Windows(
        torch.tensor([0, 1]),
        torch.tensor([0]),
        torch.tensor([2]),
        torch.tensor([[3, 0, 0], [5, 0, 0]]),
        place,
    )
    tables = torch.zeros(3, 47, 3, 1, 1, dtype=torch.float64)
    tables[0, 21, 0], tables[1, 25, 0], tables[2, 21, 0] = 0.5, -1.0, 2.0
    q, k, v = (
        torch.tensor(x, dtype=torch.float64).view(2, 1, 1) for x in ([1, 1], [0, 1], [0, 10])
    )
    for method in METHODS:
        made = window_attention(q, k, v, divided, *tables, method=method).flatten().tolist()
        assert made == pytest.approx([9.810893, 7.310586], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_window_of_one_token(method):
    far = torch.tensor([[1.0, 0, 0], [500.0, 0, 0]])
    batch = torch.tensor([0, 0])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 3, generator=g) for _ in range(3))
    for rows, u, window, a, last in (
        (47, far, (1, 1, 1), None, 23),
        (48, spherical(far), (2, 2, 120), A, 24),
    ):
        tables = [torch.randn(rows, 3, 2, 3, generator=g) for _ in range(3)]
        divided = windows(u, batch, window)
        assert divided.sizes.tolist() == [1, 1]
        made = window_attention(q, k, v, divided, *tables, a, method)
        expected = v + tables[2][23, 0] + tables[2][23, 1] + tables[2][last, 2]
        assert torch.allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_large_logits_stay_finite(method):
    _, _, (q, k, v), kinds = scene(80, dtype=torch.float32)
    for divided, tables, a in kinds:
        made = window_attention(300 * q, 300 * k, v, divided, *tables, a, method)
        assert bool(made.isfinite().all())


def test_no_tokens():
    none = torch.zeros(0, 2, 4, requires_grad=True)
    divided = windows(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), (1, 1, 1))
    for method in METHODS:
        made = window_attention(
            none, none, none, divided, *torch.ones(3, 47, 3, 2, 4), None, method
        )
        assert made.shape == (0, 2, 4)
        made.sum().backward()


def test_autocast_stays_in_float32():
    _, _, qkv, kinds = scene(60, dtype=torch.float32)
    for divided, tables, a in kinds:
        for method in METHODS:
            exact = window_attention(*qkv, divided, *tables, a, method)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = window_attention(*qkv, divided, *tables, a, method)
            assert made.dtype == torch.float32
            assert torch.equal(made, exact)
            half = [t.bfloat16() for t in qkv]
            assert window_attention(*half, divided, *tables, a, method).dtype == torch.float32


def test_flash_has_the_same_meaning(monkeypatch):
    """flash-attn's call, computed sequence by sequence."""
    calls = []

    def flash(packed, starts, max_seqlen, dropout_p, softmax_scale):
        calls.append(packed.dtype)
        assert (dropout_p, softmax_scale, packed.shape[3]) == (0.0, 1.0, 4 + 6 * 24)
        assert max_seqlen == int(starts.diff().max())
        assert starts.dtype == torch.int32
        parts = []
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist()):
            q, k, v = packed[first:last].float().unbind(1)
            weights = torch.einsum("ihd,jhd->hij", q, k).softmax(2)
            parts.append(torch.einsum("hij,jhd->ihd", weights, v))
        return torch.cat(parts).to(packed.dtype)

    monkeypatch.setattr(
        module, "flash_attention", lambda wanted, is_cuda: flash if wanted else None
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    _, _, qkv, kinds = scene(90, dtype=torch.float32)
    qkv = [0.3 * t for t in qkv]
    for divided, tables, a in kinds:
        tables = [0.2 * t for t in tables]
        exact = window_attention(*qkv, divided, *tables, a)
        made = window_attention(*qkv, divided, *tables, a, "reduction", enable_flash=True)
        assert torch.allclose(made, exact, atol=3e-3)
    # Not along the exponential axis.
    assert calls == [torch.float16]


# ----------------------------------------------------------------------------------------------------------- the block


def block(dim=16, **changes):
    torch.manual_seed(0)
    made = SphereFormerBlock(dim, 0.9, (20, 40, 120), **{"head_size": 4, **changes})
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "table" in name:
                p.normal_(std=0.5)
    return made.double()


def test_block_by_its_parts():
    made = block(dim=20).eval()
    xyz, batch, _, _ = scene(60)
    feat = torch.randn(60, 20, dtype=torch.float64)
    state = made.state_dict()

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    qkv = norm(feat, "norm1") @ state["attn.qkv.weight"].t() + state["attn.qkv.bias"]
    q, k, v = qkv.view(60, 3, 5, 4).unbind(1)
    tables = [state[f"attn.relative_pos_{r}_table"] for r in ("query", "key", "value")]
    round_ = [state[f"attn.relative_pos_{r}_table_sphere"] for r in ("query", "key", "value")]
    assert tables[0].shape == (47, 3, 2, 4)
    assert round_[0].shape == (48, 3, 3, 4)
    cubic = windows(xyz, batch, (0.9,) * 3)
    sphere = windows(spherical(xyz), batch, (20, 40, 120))
    heads = torch.cat(
        [
            by_edges(q[:, :2] / 2, k[:, :2], v[:, :2], cubic, tables, None),
            by_edges(q[:, 2:] / 2, k[:, 2:], v[:, 2:], sphere, round_, A),
        ],
        1,
    )
    x = feat + heads.flatten(1) @ state["attn.proj.weight"].t() + state["attn.proj.bias"]
    h = norm(x, "norm2") @ state["mlp.fc1.weight"].t() + state["mlp.fc1.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    x = x + h @ state["mlp.fc2.weight"].t() + state["mlp.fc2.bias"]
    assert torch.allclose(made(feat, xyz, batch), x, atol=1e-9)
    divided = made.divide(xyz, batch)
    assert torch.equal(made(feat, xyz, batch, divided), made(feat, xyz, batch))


@torch.no_grad()
def test_block_is_equivariant_and_independent_of_the_batch():
    made = block().eval()
    xyz, batch, _, _ = scene(150, scans=3)
    feat = torch.randn(150, 16, dtype=torch.float64)
    out = made(feat, xyz, batch)
    p = torch.randperm(150)
    assert torch.allclose(made(feat[p], xyz[p], batch[p]), out[p], atol=1e-12)
    first = batch == 0
    assert torch.allclose(made(feat[first], xyz[first], batch[first]), out[first], atol=1e-12)


def test_block_keys_and_count():
    made = SphereFormerBlock(32, 0.3, (2, 2, 120))
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    expected = {}
    for name in ("norm1", "norm2"):
        expected |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    for role in ("query", "key", "value"):
        expected[f"attn.relative_pos_{role}_table"] = (47, 3, 1, 16)
        expected[f"attn.relative_pos_{role}_table_sphere"] = (48, 3, 1, 16)
    for name, out, inner in (
        ("attn.qkv", 96, 32),
        ("attn.proj", 32, 32),
        ("mlp.fc1", 128, 32),
        ("mlp.fc2", 32, 128),
    ):
        expected |= {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}
    assert shapes == expected
    for dim, count in ((32, 26_384), (64, 77_344), (128, 252_992), (256, 899_200)):
        with torch.device("meta"):
            made = SphereFormerBlock(dim, 0.3, (2, 2, 120))
        assert sum(p.numel() for p in made.parameters()) == count


def test_block_methods_and_training():
    xyz, batch, _, _ = scene(80)
    feat = torch.randn(80, 16, dtype=torch.float64)
    results = []
    for method in METHODS:
        made = block(method=method).eval()
        made(feat, xyz, batch).square().sum().backward()
        results.append([p.grad for p in made.parameters()])
    for a, b in zip(*results):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-8)
    dropped = block(drop_path=0.5)
    assert not torch.equal(dropped(feat, xyz, batch), dropped(feat, xyz, batch))
    assert torch.equal(dropped.eval()(feat, xyz, batch), block().eval()(feat, xyz, batch))
    # The seam and the origin reach the windows.
    for changes in ({"origin": "zero"}, {"spherical_cell": (20, 40, 5)}):
        assert not torch.allclose(block(**changes)(feat, xyz, batch), block()(feat, xyz, batch))
    seam = torch.tensor([[-5.0, 0, 0], [-5, -1e-3, 0]])
    sizes = [
        block(wrap=w, origin="zero").divide(seam, batch.new_zeros(2))[1].sizes.tolist()
        for w in (False, True)
    ]
    assert sizes == [[1, 1], [2]]


def test_block_under_autocast():
    made = block().float().eval()
    xyz, batch, _, _ = scene(50)
    feat = torch.randn(50, 16)
    exact = made(feat, xyz, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = made(feat, xyz, batch)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_plan():
    start = (2.0, 2.0, 120.0)
    plan = window_plan(4, 0.3, start)
    assert [p["cubic"] for p in plan] == [(c,) * 3 for c in (0.3, 0.6, 1.2, 2.4)]
    assert [p["spherical"] for p in plan] == [(t, t, 120) for t in (2, 4, 8, 16)]
    cells = [p["spherical_cell"] for p in plan]
    assert cells == [pytest.approx((t, t, 5)) for t in (1 / 12, 1 / 6, 1 / 3, 2 / 3)]
    assert window_plan(4, 0.3, start) == plan, "the same twice: nothing is shared or changed"
    # One array, doubled after each of four levels was made: all run with what is left in it.
    shared = window_plan(4, 0.3, start, cells="reference")
    assert [p["spherical_cell"] for p in shared] == [pytest.approx((4 / 3, 4 / 3, 5))] * 4
    assert [p["spherical"] for p in shared] == [p["spherical"] for p in plan]
    u = torch.rand(4000, 3) * torch.tensor([360.0, 180.0, 100.0])
    batch = torch.zeros(4000, dtype=torch.int64)
    for p, distinct in zip(shared, (2, 3, 6, 12)):
        made = windows(u, batch, p["spherical"], cell=p["spherical_cell"])
        # A cell begins at a multiple of 4/3 degrees; the last one of a window may be cut off.
        assert len(made.cells[:, 0].unique()) == distinct
    grown = window_plan(2, (1, 2, 3), start, cubic_factor=3, angle_factor=1.5)
    assert grown[1]["cubic"] == (3, 6, 9)
    assert grown[1]["spherical"] == (3, 3, 120)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 18}, "dim=18, head_size=4: dim must be a multiple"),
        ({"dim": 16, "head_size": 16}, "that is 1 head, and cubic and spherical"),
        ({"head_size": 0}, "head_size=0"),
        ({"cubic": 0}, "cubic=0: expected one or three finite numbers"),
        ({"spherical": (2, 2)}, "spherical=.*: expected one or three"),
        ({"spherical_cell": (1, 1, -1)}, "spherical_cell="),
        ({"a": 0.0}, "a=0.0"),
        ({"origin": "max"}, "origin='max' is none of"),
        ({"method": "dense"}, "method='dense' is none of buckets, reduction"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_bad_arguments(changes, text):
    given = {"dim": 16, "cubic": 1.0, "spherical": (2, 2, 120), "head_size": 4, **changes}
    with pytest.raises(InputError, match=text) as error:
        SphereFormerBlock(**given)
    assert "\n" not in str(error.value)


def test_bad_input():
    made = block()
    feat, xyz = torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, 3)
    batch = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"xyz \(2, 3\) and batch \(3,\) do not fit 3 tokens"):
        made(feat, xyz[:2], batch)
    with pytest.raises(InputError, match="windows of attention: coordinates must be finite"):
        made(feat, xyz + torch.nan, batch)
    divided, tables = windows(xyz, batch, (1, 1, 1)), torch.zeros(3, 47, 3, 4, 4)
    x = torch.zeros(3, 4, 4)
    with pytest.raises(InputError, match="method='x' is none of"):
        window_attention(x, x, x, divided, *tables, method="x")
    with pytest.raises(InputError, match=r"query_table has the shape .*: expected \(48, 3, 4, 4\)"):
        window_attention(x, x, x, divided, *tables, A)
    with pytest.raises(InputError, match=r"cells has the shape \(3, 3\): expected \(2, 3\)"):
        window_attention(x[:2], x[:2], x[:2], divided, *tables)
    for changes, text in (
        ({"cells": "aliased"}, "cells='aliased' is none of window, reference"),
        ({"levels": 0}, "levels=0"),
        ({"cubic": "a"}, "cubic='a'"),
        ({"angle_factor": 0}, "angle_factor=0"),
    ):
        given = {"levels": 2, "cubic": 1.0, "spherical_window": (2, 2, 120), **changes}
        with pytest.raises(InputError, match=text):
            window_plan(**given)
