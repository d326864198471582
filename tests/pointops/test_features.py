"""grouping, interpolation, subtraction, aggregation and the attention steps against loops."""

import pointops
import pytest
import torch
from torch.autograd import gradcheck

from . import oracles


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def neighbours(m, k, n, missing=True):
    """Random rows, some twice in a row of idx, some missing."""
    return torch.randint(-1 if missing else 0, n, (m, k), dtype=torch.int32)


# --- grouping -------------------------------------------------------------------------------------


def grouped(idx, feat, xyz, new_xyz):
    out = torch.zeros(*idx.shape, 3 + feat.shape[1], dtype=feat.dtype)
    for row in range(idx.shape[0]):
        for slot, i in enumerate(idx[row].tolist()):
            if i >= 0:
                for axis in range(3):
                    out[row, slot, axis] = xyz[i, axis] - new_xyz[row, axis]
                for channel in range(feat.shape[1]):
                    out[row, slot, 3 + channel] = feat[i, channel]
    return out


@pytest.mark.parametrize("m", [5, 1, 0])
def test_grouping_is_the_loop(m):
    idx, feat, xyz, new_xyz = neighbours(m, 4, 6), normal(6, 2), normal(6, 3), normal(m, 3)
    want = grouped(idx, feat, xyz, new_xyz).detach()
    torch.testing.assert_close(pointops.grouping(idx, feat, xyz, new_xyz, True), want)
    torch.testing.assert_close(pointops.grouping(idx, feat, xyz, new_xyz), want[..., 3:])
    torch.testing.assert_close(pointops.grouping2(feat, idx), want[..., 3:])


def test_grouping_around_the_points_themselves():
    idx, feat, xyz = neighbours(6, 4, 6), normal(6, 2), normal(6, 3)
    want = grouped(idx, feat, xyz, xyz).detach()
    torch.testing.assert_close(pointops.grouping(idx, feat, xyz, with_xyz=True), want)


def test_no_points_at_all_group_to_zeros():
    idx = torch.full((3, 2), -1)
    assert (pointops.grouping2(torch.empty(0, 4), idx) == torch.zeros(3, 2, 4)).all()


def test_grouping_gradients():
    idx, feat, xyz, new_xyz = neighbours(5, 4, 6), normal(6, 2), normal(6, 3), normal(5, 3)
    assert gradcheck(lambda *t: pointops.grouping(idx, *t, True), (feat, xyz, new_xyz))
    assert gradcheck(lambda f: pointops.grouping2(f, idx), (feat,))


def test_types_follow_the_features():
    idx = neighbours(5, 4, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert pointops.grouping2(torch.rand(6, 2).to(dtype), idx.long()).dtype == dtype


def test_half_features_are_grouped_and_interpolated_in_float32():
    idx, feat, xyz = neighbours(6, 4, 6), torch.rand(6, 2), torch.rand(6, 3)
    ends = torch.tensor([6]), torch.tensor([4])
    for half in (feat.half(), feat.bfloat16()):
        half.requires_grad_()
        for with_xyz in (False, True):
            out = pointops.grouping(idx, half, xyz, with_xyz=with_xyz)
            assert out.dtype == torch.float32
            assert torch.equal(out, pointops.grouping(idx, half.float(), xyz, with_xyz=with_xyz))
        new = pointops.interpolation(xyz, xyz[:4] + 0.1, half, *ends)
        assert torch.equal(new, pointops.interpolation(xyz, xyz[:4] + 0.1, half.float(), *ends))
        (out.sum() + new.sum()).backward()
        assert half.grad.dtype == half.dtype


# --- interpolation --------------------------------------------------------------------------------


def interpolated(xyz, ends, new_xyz, new_ends, feat, k):
    out = torch.zeros(len(new_xyz), feat.shape[1], dtype=feat.dtype)
    for row in range(len(new_xyz)):
        near = oracles.by_distance(row, new_xyz, new_ends, xyz, ends)[:k]
        total = sum(1 / (d + 1e-8) for d, _ in near)
        for d, i in near:
            for channel in range(feat.shape[1]):
                out[row, channel] += feat[i, channel].item() / (d + 1e-8) / total
    return out


@pytest.mark.parametrize(
    ("lengths", "new_lengths"), [([8, 9], [5, 4]), ([1, 2], [3, 2]), ([0, 6], [2, 3]), ([0], [2])]
)
@pytest.mark.parametrize("interpolate", [pointops.interpolation, pointops.interpolation2])
def test_interpolation_is_the_loop(interpolate, lengths, new_lengths):
    offset, new_offset = (torch.tensor(v).cumsum(0).int() for v in (lengths, new_lengths))
    xyz, new_xyz = (torch.rand(sum(v), 3, dtype=torch.float64) for v in (lengths, new_lengths))
    feat = normal(len(xyz), 2)
    for k in (1, 3):
        out = interpolate(xyz, new_xyz, feat, offset, new_offset, k)
        want = interpolated(xyz, offset.tolist(), new_xyz, new_offset.tolist(), feat, k)
        torch.testing.assert_close(out, want)
        if len(feat):
            call = lambda f, k=k: interpolate(xyz, new_xyz, f, offset, new_offset, k)  # noqa: E731
            assert gradcheck(call, (feat,))


def test_at_a_point_its_own_feature():
    xyz, feat = torch.rand(9, 3), torch.rand(9, 2)
    offset = torch.tensor([9])
    out = pointops.interpolation(xyz, xyz.clone(), feat, offset, offset)
    torch.testing.assert_close(out, feat, atol=1e-4, rtol=1e-4)


# --- subtraction and aggregation ------------------------------------------------------------------


def test_subtraction_is_the_loop():
    first, second, idx = normal(5, 3), normal(5, 3), neighbours(5, 4, 5)
    want = torch.zeros(5, 4, 3, dtype=torch.float64)
    for row in range(5):
        for slot, i in enumerate(idx[row].tolist()):
            for channel in range(3):
                if i >= 0:
                    want[row, slot, channel] = first[row, channel] - second[i, channel]
    torch.testing.assert_close(pointops.subtraction(first, second, idx), want.detach())
    assert gradcheck(lambda a, b: pointops.subtraction(a, b, idx), (first, second))


@pytest.mark.parametrize(("channels", "shared"), [(4, 4), (4, 2), (6, 1), (5, 3), (2, 3)])
def test_aggregation_is_the_loop(channels, shared):
    value, position, weight = normal(5, channels), normal(4, 3, channels), normal(4, 3, shared)
    idx = neighbours(4, 3, 5)
    want = torch.zeros(4, channels, dtype=torch.float64)
    for row in range(4):
        for slot, i in enumerate(idx[row].tolist()):
            for j in range(channels):
                if i >= 0:
                    term = value[i, j] + position[row, slot, j]
                    want[row, j] += (term * weight[row, slot, j % shared]).item()
    torch.testing.assert_close(pointops.aggregation(value, position, weight, idx), want)
    assert gradcheck(lambda *t: pointops.aggregation(*t, idx), (value, position, weight))


def test_aggregation_without_points():
    position = torch.rand(2, 3, 4, requires_grad=True)
    value = torch.empty(0, 4, requires_grad=True)
    idx = torch.full((2, 3), -1)
    out = pointops.aggregation(value, position, torch.rand(2, 3, 2), idx)
    out.sum().backward()
    assert (out == 0).all()
    assert (position.grad == 0).all()
    assert value.grad.shape == (0, 4)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [9, 1, 0])
def test_relation_is_the_loop(pairs):
    query, key, weight = normal(4, 2, 3), normal(5, 2, 3), normal(3)
    target, refer = torch.randint(0, 4, (pairs,)), torch.randint(0, 5, (pairs,)).int()
    want = torch.zeros(pairs, 2, dtype=torch.float64)
    for pair in range(pairs):
        for head in range(2):
            for j in range(3):
                q, k = query[target[pair], head, j], key[refer[pair], head, j]
                want[pair, head] += (q * k * weight[j]).item()
    out = pointops.attention_relation_step(query, key, weight, target, refer)
    torch.testing.assert_close(out, want)
    call = lambda *t: pointops.attention_relation_step(*t, target, refer)  # noqa: E731
    assert gradcheck(call, (query, key, weight))


@pytest.mark.parametrize("pairs", [9, 1, 0])
def test_fusion_is_the_loop(pairs):
    weight, value = normal(pairs, 2), normal(4, 2, 3)
    target, refer = torch.randint(0, 4, (pairs,)).int(), torch.randint(0, 4, (pairs,))
    want = torch.zeros(4, 2, 3, dtype=torch.float64)
    for pair in range(pairs):
        for head in range(2):
            for j in range(3):
                term = weight[pair, head] * value[refer[pair], head, j]
                want[target[pair], head, j] += term.item()
    torch.testing.assert_close(pointops.attention_fusion_step(weight, value, target, refer), want)
    call = lambda *t: pointops.attention_fusion_step(*t, target, refer)  # noqa: E731
    assert gradcheck(call, (weight, value))


# --- mixed precision ------------------------------------------------------------------------------

IDX4, PAIRS = torch.tensor([[0, 2, -1], [1, 1, 0], [3, 2, 0], [0, 1, 2]]), torch.tensor([0, 3, 1])
ENDS = torch.tensor([4])
MIXED = {
    "grouping": (
        lambda feat, xyz: pointops.grouping(IDX4, feat, xyz, with_xyz=True),
        ((4, 6), (4, 3)),
    ),
    "subtraction": (lambda a, b: pointops.subtraction(a, b, IDX4), ((4, 6), (4, 6))),
    "aggregation": (
        lambda *t: pointops.aggregation(*t, IDX4),
        ((4, 6), (4, 3, 6), (4, 3, 2)),
    ),
    "interpolation": (
        lambda feat, xyz: pointops.interpolation(xyz, xyz + 0.1, feat, ENDS, ENDS),
        ((4, 6), (4, 3)),
    ),
    "relation": (
        lambda *t: pointops.attention_relation_step(*t, PAIRS, PAIRS),
        ((4, 2, 3), (4, 2, 3), (3,)),
    ),
    "fusion": (
        lambda *t: pointops.attention_fusion_step(*t, PAIRS, PAIRS),
        ((3, 2), (4, 2, 3)),
    ),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MIXED)
def test_types_may_be_mixed(name, first, autocast):
    call, shapes = MIXED[name]
    exact = [torch.randn(s).bfloat16().double().requires_grad_() for s in shapes]
    types = [first, *[torch.float32] * (len(shapes) - 1)]
    mixed = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(exact, types)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = call(*mixed)
    want = call(*exact)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    want.sum().backward()
    for ours, truth in zip(mixed, exact):
        if truth.grad is not None:
            assert ours.grad.dtype == ours.dtype
            torch.testing.assert_close(ours.grad.double(), truth.grad, atol=1e-2, rtol=1e-2)


# --- bad input ------------------------------------------------------------------------------------

F, IDX = torch.rand(6, 2), torch.zeros(6, 4, dtype=torch.int32)
BAD = {
    r"idx must be rows from -1 to 5, got values from 0 to 6": lambda: pointops.grouping2(
        F, torch.tensor([[0, 6]])
    ),
    r"idx must be rows from -1 to 5, got values from -2": lambda: pointops.grouping2(F, IDX - 2),
    r"idx must be of whole numbers": lambda: pointops.grouping2(F, IDX.float()),
    r"idx must have the shape \(any, any\), got \(6,\)": lambda: pointops.grouping2(F, IDX[:, 0]),
    r"xyz must have the shape \(6, 3\), got \(5, 3\)": lambda: pointops.grouping(
        IDX, F, torch.rand(5, 3)
    ),
    r"new_xyz must have the shape \(6, 3\)": lambda: pointops.grouping(
        IDX, F, torch.rand(6, 3), torch.rand(4, 3), True
    ),
    r"feat must have the shape \(6, any\)": lambda: pointops.interpolation(
        torch.rand(6, 3), torch.rand(2, 3), F[:4], torch.tensor([6]), torch.tensor([2])
    ),
    r"input2 must have the shape \(any, 2\)": lambda: pointops.subtraction(F, F[:, :1], IDX),
    r"idx must have the shape \(6, any\)": lambda: pointops.subtraction(F, F, IDX[:3]),
    r"position must have the shape \(any, any, 2\)": lambda: pointops.aggregation(
        F, torch.rand(6, 4, 3), torch.rand(6, 4, 1), IDX
    ),
    r"weight must have the shape \(6, 4, any\)": lambda: pointops.aggregation(
        F, torch.rand(6, 4, 2), torch.rand(6, 3, 1), IDX
    ),
    r"weight must have at least one channel": lambda: pointops.aggregation(
        F, torch.rand(6, 4, 2), torch.rand(6, 4, 0), IDX
    ),
    r"weight must have the shape \(2\)": lambda: pointops.attention_relation_step(
        F[:, None], F[:, None], torch.ones(3), IDX[:, 0], IDX[:, 0]
    ),
    r"index_refer must have the shape \(6\)": lambda: pointops.attention_relation_step(
        F[:, None], F[:, None], torch.ones(2), IDX[:, 0], IDX[:2, 0]
    ),
    r"index_target must be rows from 0 to 5": lambda: pointops.attention_fusion_step(
        F[:, :1], F[:, None], IDX[:, 0] - 1, IDX[:, 0]
    ),
    r"on one device, got input on cpu, idx on meta": lambda: pointops.grouping2(F, IDX.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
