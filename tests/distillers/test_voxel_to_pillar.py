"""Voxel-to-pillar: worked values, loops from the formulas, both correspondences, adapters, a pair of networks."""

import math
import multiprocessing
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.correspondence import (
    Pairs,
    column_pairs,
    places,
    point_pairs,
    point_tokens,
    pool_pairs,
)
from pointcept_kd.distillers.label_weight import label_weight_loss
from pointcept_kd.distillers.logits import dense_logit_kl, voxel_logit_kl
from pointcept_kd.distillers.taps import Activation, Taps
from pointcept_kd.distillers.voxel_to_pillar import (
    AttentionPool,
    VoxelToPillar,
    map_deviation,
    pillar_mse,
    teacher_adapter,
)
from pointcept_kd.host import MODELS, InputError, comm, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch
from pointcept_kd.ops.sparse import SparseConvTensor

from .bev_pair import GRID, TAPS_S, TAPS_T, Pillars, Voxels, check_one_step, pair, scans

DOUBLE = torch.float64
COARSE = dict(type="kd.VoxelToPillar", tap="coarse", channels=(12, 7))


def level(count, shape=(3, 7, 6, 5), channels=4, dtype=DOUBLE):
    """Distinct tokens anywhere in (scans, x, y, z), shuffled."""
    rows = torch.randperm(math.prod(shape))[:count]
    where = torch.stack(torch.unravel_index(rows, shape), 1)
    return torch.randn(count, channels, dtype=dtype), where[:, 0], where[:, 1:]


def points(count, shape):
    """Scan and cell of points anywhere in (scans, x, y, z)."""
    where = torch.stack([torch.randint(0, n, (count,)) for n in shape], 1)
    return where[:, 0], where[:, 1:]


def loop_pool(feat, tokens_of, shape, how):
    """Pooled map from a dict (scan, i, j) -> list of tokens."""
    out = torch.zeros(shape[0], feat.shape[1], *shape[1:], dtype=feat.dtype)
    for (b, i, j), tokens in tokens_of.items():
        for c in range(feat.shape[1]):
            values = [float(feat[t, c]) for t in tokens]
            out[b, c, i, j] = max(values) if how == "max" else sum(values) / len(values)
    return out


# ------------------------------------------------------------------------------------ worked values


def worked():
    feat = torch.tensor([[1.0, -2.0], [-3.0, 5.0], [-1.0, -4.0]])
    cells = torch.tensor([[0, 0, 0], [0, 0, 2], [1, 1, 1]])
    return feat, torch.zeros(3, dtype=torch.long), cells


def test_worked_map_and_losses():
    feat, batch, cells = worked()
    pairs = column_pairs(batch, cells, (1, 2, 2))
    pooled = pairs.to_map(pool_pairs(feat, pairs))
    assert pooled.tolist() == [[[[1, 0], [0, -1]], [[5, 0], [0, -4]]]]
    student = torch.zeros_like(pooled)
    assert pillar_mse(student, pooled).item() == 5.375
    assert pillar_mse(student, pooled, pairs.occupied()).item() == 10.75


def test_worked_term_with_the_adapter_as_identity():
    feat, batch, cells = worked()
    student = Outputs(x=Activation(torch.zeros(1, 2, 2, 2)))
    teacher = Outputs(x=Activation(feat, batch, cells))
    for mask, value in (("all", 5.375), ("occupied", 10.75)):
        term = VoxelToPillar("x", channels=(2, 2), mask=mask)
        term.adapter = nn.Identity()
        assert term(student, teacher, {}).item() == value
        assert term.watched()["deviation_student"] == 0
    # Of the two occupied cells: (1, 5) and (-1, -4).
    assert term.watched()["deviation_target"].item() == pytest.approx((1 + 4.5) / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [(128, 64, 74240), (512, 256, 1181696), (256, 512, 1181440), (64, 128, 74176), (64, 64, 37184)],
)
def test_parameters_of_the_adapters(student, teacher, count):
    term = VoxelToPillar("x", channels=(student, teacher))
    assert sum(p.numel() for p in term.parameters()) == count


def test_the_adapter_is_norm_convolution_relu_norm():
    adapter = teacher_adapter(3, 5).double()
    for value in adapter.parameters():
        nn.init.normal_(value)
    x = torch.randn(2, 3, 4, 6, dtype=DOUBLE)

    def norm(values, layer):
        mean = values.mean((0, 2, 3), keepdim=True)
        spread = (values - mean).square().mean((0, 2, 3), keepdim=True)
        out = (values - mean) / (spread + 1e-5).sqrt()
        return out * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    padded = torch.zeros(2, 3, 6, 8, dtype=DOUBLE)
    padded[:, :, 1:-1, 1:-1] = norm(x, adapter[0])
    hidden = torch.zeros(2, 5, 4, 6, dtype=DOUBLE)
    for i in range(4):
        for j in range(6):
            window = padded[:, None, :, i : i + 3, j : j + 3]
            hidden[:, :, i, j] = (window * adapter[1].weight).sum((2, 3, 4)) + adapter[1].bias
    torch.testing.assert_close(adapter(x), norm(hidden.clamp(min=0), adapter[3]))


# -------------------------------------------------------------------------- correspondence and pools


@pytest.mark.parametrize("how", ["max", "mean"])
def test_columns_equal_loops(how):
    feat, batch, cells = level(90)
    shape = (3, 6, 6)  # one row less than the level has
    tokens = {}
    for t, (b, (i, j, _)) in enumerate(zip(batch.tolist(), cells.tolist())):
        if i < 6:
            tokens.setdefault((b, i, j), []).append(t)
    pairs = column_pairs(batch, cells, shape)
    expected = loop_pool(feat, tokens, shape, how)
    torch.testing.assert_close(pairs.to_map(pool_pairs(feat, pairs, how)), expected)
    assert int(pairs.occupied().sum()) == len(tokens)
    assert all(pairs.occupied()[at] for at in tokens)
    if how == "max":
        assert bool((expected < 0).any()), "negative maxima are kept"


@pytest.mark.parametrize("how", ["max", "mean"])
def test_points_equal_loops(how):
    feat, batch, cells = level(60, (3, 6, 5, 4))
    fine = points(150, (3, 13, 10, 8))
    other = points(150, (3, 21, 18, 9))[1] - torch.tensor([2, 0, 0])
    stride, stride_s, shape = (2, 2, 2), (4, 3), (3, 4, 6)
    row = {(b, *c): t for t, (b, c) in enumerate(zip(batch.tolist(), cells.tolist()))}
    tokens, found = {}, []
    for b, c, s in zip(fine[0].tolist(), fine[1].tolist(), other.tolist()):
        token = row.get((b, c[0] // 2, c[1] // 2, c[2] // 2), -1)
        found.append(token)
        i, j = s[0] // 4, s[1] // 3
        if token >= 0 and 0 <= i < 4 and 0 <= j < 6:
            tokens.setdefault((b, i, j), set()).add(token)
    token = point_tokens(*fine, batch, cells, stride)
    assert token.tolist() == found
    assert 0 < sum(t < 0 for t in found) < 150
    place = places(fine[0], other, shape, stride_s)
    assert bool((place < 0).any())
    pairs = point_pairs(place, token, shape)
    expected = loop_pool(feat, tokens, shape, how)
    torch.testing.assert_close(pairs.to_map(pool_pairs(feat, pairs, how)), expected)
    assert len(pairs.place) == sum(len(t) for t in tokens.values())
    order = torch.randperm(150)
    again = point_pairs(place[order], token[order], shape)
    assert torch.equal(again.place, pairs.place)
    assert torch.equal(again.token, pairs.token)


def test_negative_and_far_cells_have_no_token_of_another():
    batch, cells = torch.zeros(2, dtype=torch.long), torch.tensor([[0, 0, 3], [0, 1, 0]])
    asked = torch.tensor([[0, 0, 7], [0, 0, 8], [0, 2, -1], [-1, 2, 0], [0, 3, 1], [0, 0, 10**6]])
    scan = torch.tensor([0, 0, 0, 0, 0, 0])
    assert point_tokens(scan, asked, batch, cells, (2, 2, 2)).tolist() == [0, -1, -1, -1, 1, -1]
    assert point_tokens(scan + 1, asked, batch, cells, (2, 2, 2)).tolist() == [-1] * 6


@pytest.mark.parametrize("how", ["max", "mean"])
def test_both_agree_where_every_token_has_a_point(how):
    scan, fine = points(120, (2, 12, 9, 8))
    shape = (2, 6, 4)  # the last column of the teacher's five is beyond the map
    coarse = torch.cat([scan[:, None], fine // 2], 1).unique(dim=0)
    coarse = coarse[torch.randperm(len(coarse))]
    feat = torch.randn(len(coarse), 5)
    columns = column_pairs(coarse[:, 0], coarse[:, 1:], shape)
    token = point_tokens(scan, fine, coarse[:, 0], coarse[:, 1:], (2, 2, 2))
    assert bool((token >= 0).all())
    pairs = point_pairs(places(scan, fine, shape, (2, 2)), token, shape)
    torch.testing.assert_close(pool_pairs(feat, pairs, how), pool_pairs(feat, columns, how))
    assert torch.equal(pairs.occupied(), columns.occupied())


def test_a_strided_convolution_makes_tokens_without_points_and_only_those_differ():
    batch = scans(25, 18)
    student, teacher = Pillars(), Voxels()
    taps = pair(dict(x=COARSE))
    seen = taps.teachers["teacher"](batch)
    with taps._student_taps.record() as activations:
        taps.student(batch)
    student = Outputs(activations)
    shape = (2, GRID[0] // 2, GRID[1] // 2)
    coarse, cells = seen["coarse"], student["cells"]
    assert teacher.pool.stride == (2, 2, 2)
    columns = column_pairs(coarse.batch, coarse.cells, shape)
    token = point_tokens(cells.batch, cells.cells, coarse.batch, coarse.cells, (2, 2, 2))
    assert bool((token >= 0).all()), "kernel 3, stride 2, padding 1 reaches cell // 2"
    pairs = point_pairs(places(cells.batch, cells.cells, shape, (2, 2)), token, shape)
    assert len(pairs.token) < len(columns.token)
    known = torch.isin(columns.token, pairs.token)
    kept = Pairs(columns.place[known], columns.token[known], shape)
    torch.testing.assert_close(pool_pairs(coarse.feat, kept), pool_pairs(coarse.feat, pairs))


def loop_attention(module, feat, height, pairs, student):
    out = torch.zeros(pairs.size, feat.shape[1], dtype=feat.dtype)
    _, h, w = pairs.shape
    for place in pairs.place.unique().tolist():
        b, i, j = place // (h * w), place // w % h, place % w
        tokens = pairs.token[pairs.place == place].tolist()
        query = module.query.weight @ student[b, :, i, j]
        scores = []
        for t in tokens:
            z = min(max(int(height[t]), 0), len(module.height) - 1)
            dot = (query @ (module.key.weight @ feat[t])).item()
            scores.append(math.exp(dot / math.sqrt(len(query)) + module.height[z].item()))
        for t, score in zip(tokens, scores):
            out[place] += score / sum(scores) * (module.value.weight @ feat[t])
    return out


def attention_case():
    feat, batch, cells = level(40, (2, 3, 4, 6))
    pairs = column_pairs(batch, cells, (2, 3, 4))
    module = AttentionPool(3, 4, dim=2, bins=5).double()
    student = torch.randn(2, 3, 3, 4, dtype=DOUBLE)
    return module, feat, cells[:, 2], pairs, student


def test_attention_equals_loops_and_has_gradients():
    module, *case = attention_case()
    for value in module.parameters():
        nn.init.normal_(value)
    torch.testing.assert_close(module(*case), loop_attention(module, *case))
    names, values = zip(*module.named_parameters())

    def run(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), tuple(case))

    assert torch.autograd.gradcheck(run, values)


def test_attention_begins_as_a_weighted_mean_and_never_moves_the_student():
    module, feat, height, pairs, student = attention_case()
    nn.init.zeros_(module.query.weight)
    torch.testing.assert_close(
        module(feat, height, pairs, student), pool_pairs(feat, pairs, "mean")
    )
    leaf = student.clone().requires_grad_()
    assert module(feat, height, pairs, leaf).requires_grad
    module(feat, height, pairs, leaf).sum().backward()
    assert leaf.grad is None


# ------------------------------------------------------------------------------------------- losses


def loop_mse(student, target, mask):
    total = count = 0
    b, c, h, w = student.shape
    for n in range(b):
        for i in range(h):
            for j in range(w):
                if mask[n, i, j]:
                    total += sum((student[n, k, i, j] - target[n, k, i, j]) ** 2 for k in range(c))
                    count += c
    return (total / count).item()


def test_loss_equals_loops_and_has_gradients():
    student, target = torch.randn(2, 2, 3, 4, 5, dtype=DOUBLE).requires_grad_()
    mask = torch.rand(2, 4, 5) > 0.5
    every = torch.ones_like(mask)
    assert pillar_mse(student, target).item() == pytest.approx(loop_mse(student, target, every))
    assert pillar_mse(student, target, mask).item() == pytest.approx(
        loop_mse(student, target, mask)
    )
    assert pillar_mse(target, target, mask) == 0
    for occupied in (None, mask):
        leaves = [x.detach().requires_grad_() for x in (student, target)]
        assert torch.autograd.gradcheck(partial(pillar_mse, occupied=occupied), leaves)
    rows = student.permute(0, 2, 3, 1)[mask]
    assert map_deviation(student, mask).item() == pytest.approx(
        rows.std(0, unbiased=False).mean().item()
    )


def test_nothing_occupied_is_a_connected_zero():
    student, target = torch.randn(2, 1, 3, 2, 2).requires_grad_()
    nowhere = torch.zeros(1, 2, 2, dtype=torch.bool)
    leaves = [x.detach().requires_grad_() for x in (student, target)]
    loss = pillar_mse(*leaves, nowhere)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)
    assert map_deviation(student, nowhere) == 0


def check_joint(cfg):
    """The losses of two processes' scans are those of all scans, and so are the gradients."""
    world, rank = comm.get_world_size(), comm.get_rank()
    torch.manual_seed(3)
    maps, target = torch.randn(2, 4, 6, 3, 3, dtype=DOUBLE)
    mask = torch.rand(4, 3, 3) > 0.6
    mask[2:3] = False
    weight = torch.rand(4, 3, 3, dtype=DOUBLE) * mask
    feat, batch, cells = level(30, (4, 3, 3, 3), 2)
    voxel = torch.arange(4).repeat_interleave(9) * 2 + torch.arange(36) % 2

    def logits(x):
        return x.permute(0, 2, 3, 1).reshape(-1, 6)

    def losses(x, own):
        some = (batch >= own.start) & (batch < own.stop)
        yield pillar_mse(x, target[own])
        yield pillar_mse(x, target[own], mask[own])
        yield label_weight_loss(x, target[own], weight[own])
        numbers = voxel[own.start * 9 : own.stop * 9] - 2 * own.start
        for threshold in (None, 0.3):
            yield voxel_logit_kl(logits(x), logits(target[own]), numbers, 2.0, threshold)
        yield dense_logit_kl(x, feat[some], batch[some] - own.start, cells[some], 1.0)

    own = (slice(0, 2), slice(2, 3))[rank] if world == 2 else slice(0, 4)
    whole = slice(0, 3)
    everything = maps[whole].clone().requires_grad_()
    mine = maps[own].clone().requires_grad_()
    with joint_batch(False):
        expected = list(losses(everything, whole))
    with joint_batch():
        values = list(losses(mine, own))
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
        everything.grad = mine.grad = None
        wanted.backward(retain_graph=True)
        value.backward(retain_graph=True)
        torch.testing.assert_close(mine.grad, world * everything.grad[own], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo, fork and /proc"
)
def test_two_processes_have_the_loss_of_all_scans(monkeypatch):
    multiprocessing.set_forkserver_preload(["tests.distillers.test_voxel_to_pillar"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(check_joint, 2, Config({"device": "cpu"}))


# ------------------------------------------------------------------------------------------ the term


CASES = [
    dict(),
    dict(mask="occupied"),
    dict(correspondence="points"),
    dict(correspondence="points", pool="mean", teacher_cells="cells", mask="occupied"),
    dict(pool="attention", attention=dict(dim=4, bins=4)),
    dict(correspondence="points", pool="attention"),
    dict(adapter_side="student", adapter_kernel=1),
    dict(adapter_side="student", target_norm="ln", correspondence="points"),
    dict(tap="fine", channels=(6, 5), pool="mean"),
    dict(tap="fine", channels=(6, 5), correspondence="points", student_stride=(1, 1), teacher_stride=(1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_of_a_pair(case):
    loss, model = check_one_step({**COARSE, **case})
    assert loss > 0
    deviation = model.terms["x"].watched()
    assert set(deviation) == {"deviation_student", "deviation_target"}
    assert all(v.dim() == 0 and v > 0 and not v.requires_grad for v in deviation.values())


def test_term_equals_its_parts():
    model = pair(dict(a=COARSE, b={**COARSE, "correspondence": "points", "mask": "occupied"}))
    batch = scans(70, 50)
    seen = model.teachers["teacher"](batch)["coarse"]
    with model._student_taps.record() as activations:
        model.student.train()(batch)
    student = activations["coarse"].feat
    out = model(batch)
    tokens = {}
    for t, (b, (i, j, _)) in enumerate(zip(seen.batch.tolist(), seen.cells.tolist())):
        if j < 4:
            tokens.setdefault((b, i, j), []).append(t)
    pooled = loop_pool(seen.feat, tokens, (2, 5, 4), "max")
    a = model.terms["a"].adapter(pooled)
    assert float(out["loss_a"]) == pytest.approx(
        loop_mse(student, a, torch.ones(2, 5, 4)), rel=1e-4
    )
    row = {(b, *c): t for t, (b, c) in enumerate(zip(seen.batch.tolist(), seen.cells.tolist()))}
    scan = torch.repeat_interleave(torch.arange(2), torch.tensor([70, 50])).tolist()
    tokens, mask = {}, torch.zeros(2, 5, 4)
    for b, (x, y, z) in zip(scan, batch["grid_coord"].tolist()):
        if y // 2 < 4:
            tokens.setdefault((b, x // 2, y // 2), []).append(row[b, x // 2, y // 2, z // 2])
            mask[b, x // 2, y // 2] = 1
    b = model.terms["b"].adapter(loop_pool(seen.feat, tokens, (2, 5, 4), "max"))
    assert float(out["loss_b"]) == pytest.approx(loop_mse(student, b, mask), rel=1e-4)


def test_other_grids_meet_through_points():
    """A student of half the cell size: its map of stride 2 has the teacher's fine cells."""
    stride = dict(correspondence="points", student_stride=(2, 2), teacher_stride=(1, 1, 1))
    term = dict(type="kd.VoxelToPillar", tap="coarse", teacher_tap="fine", channels=(12, 5))
    model = pair(dict(x={**term, **stride, "mask": "occupied", "pool": "mean"}), size=0.5)
    batch = scans(80, 40)
    out = model(batch)
    out["loss"].backward()
    level = model.teachers["teacher"](batch)["fine"]
    maps = model.terms["x"]
    shape = (2, 10, 9)
    columns = column_pairs(level.batch, level.cells, shape)
    target = maps.adapter(columns.to_map(pool_pairs(level.feat, columns, "mean")))
    with model._student_taps.record() as activations:
        model.student.train()(batch)
    expected = pillar_mse(activations["coarse"].feat, target, columns.occupied())
    torch.testing.assert_close(out["loss_x"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_gradients_through_the_term():
    feat, batch, cells = level(30, (2, 4, 3, 2))
    guest = feat.requires_grad_()
    teacher = Outputs(x=Activation(guest, batch, cells))
    maps = torch.randn(2, 3, 4, 3, dtype=DOUBLE, requires_grad=True)
    for case in (dict(), dict(adapter_side="student", target_norm="ln", mask="occupied")):
        term = VoxelToPillar("x", channels=(3, 4), **case).double()

        def of_maps(s, term=term):
            return term(Outputs(x=Activation(s)), teacher, {})

        assert torch.autograd.gradcheck(of_maps, maps)
        term(Outputs(x=Activation(maps)), teacher, {}).backward()
        assert guest.grad is None, "no gradient into the teacher"


def test_point_order_and_token_order_do_not_matter():
    model = pair(dict(x={**COARSE, "correspondence": "points"}))
    batch = scans(60)
    order = torch.randperm(60)
    shuffled = {k: v if k == "offset" else v[order] for k, v in batch.items()}
    torch.testing.assert_close(model(batch)["loss_x"], model(shuffled)["loss_x"])


def test_layer_normalised_targets_do_not_follow_the_scale():
    feat, batch, cells = level(30, (2, 4, 3, 2), dtype=torch.float32)
    student = Outputs(x=Activation(torch.randn(2, 3, 4, 3)))
    term = VoxelToPillar("x", channels=(3, 4), adapter_side="student", target_norm="ln")
    small, large = (
        term(student, Outputs(x=Activation(feat * f, batch, cells)), {}) for f in (1, 9)
    )
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("correspondence", ["cells", "points"])
def test_no_points_one_point(correspondence):
    for count in (0, 1):
        feat, cells = torch.randn(count, 4), torch.zeros(count, 3, dtype=torch.long)
        where = Activation(feat, torch.zeros(count, dtype=torch.long), cells)
        maps = torch.randn(1, 3, 2, 2, requires_grad=True)
        student = Outputs(x=Activation(maps), cells=where)
        batch = dict(grid_coord=cells, offset=torch.tensor([count]))
        for mask in ("all", "occupied"):
            for pool in ("max", "mean", "attention"):
                term = VoxelToPillar(
                    "x",
                    channels=(3, 4),
                    mask=mask,
                    pool=pool,
                    correspondence=correspondence,
                )
                loss = term(student, Outputs(x=where), batch)
                loss.backward()
                assert torch.isfinite(loss)
                assert (loss == 0) == (count == 0 and mask == "occupied")
                assert all(p.grad is None or p.grad.isfinite().all() for p in term.parameters())
                assert torch.isfinite(maps.grad).all()


def test_half_precision_is_computed_in_float32():
    feat, batch, cells = level(30, (2, 4, 3, 2), dtype=torch.bfloat16)
    student = Outputs(x=Activation(torch.randn(2, 3, 4, 3, dtype=torch.bfloat16)))
    for pool in ("max", "attention"):
        term = VoxelToPillar("x", channels=(3, 4), pool=pool)
        teacher = Outputs(x=Activation(feat, batch, cells))
        plain = term(student, teacher, {})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = term(student, teacher, {})
        assert loss.dtype == torch.float32
        assert torch.equal(loss, plain)
    model = pair(dict(x={**COARSE, "pool": "attention"}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(scans(40))
    assert out["loss_x"].dtype == torch.float32
    out["loss"].backward()


def test_adapters_are_saved_with_the_run_and_not_with_the_student():
    model = pair(dict(x=COARSE))
    assert any(k.startswith("terms.x.adapter") for k in model.state_dict())
    Pillars().load_state_dict(model.export_state_dict(), strict=True)
    assert model.terms["x"].taps() == ({"coarse"}, {"coarse"})
    assert VoxelToPillar("a", "b", (1, 1), "points").taps() == ({"a", "cells"}, {"b"})
    full = VoxelToPillar("a", "b", (1, 1), "points", student_cells=None, teacher_cells="c")
    assert full.taps() == ({"a"}, {"b", "c"})
    assert set(TAPS_S) & set(TAPS_T) >= {"cells", "fine", "coarse"}


@pytest.mark.parametrize("spacing", ["n", "n_minus_1"])
def test_every_point_has_a_token_at_every_level_of_the_cylindrical_network(spacing):
    """Strides (2, 2, 2), (8, 8, 4) and 1 name each point's row; there both correspondences agree on occupied cells."""
    grid = dict(
        low=(0.0, -math.pi, -3.0), high=(50.0, math.pi, 3.0), shape=(37, 50, 12), spacing=spacing
    )
    backbone = dict(
        type="kd.Cylinder3D", in_channels=4, num_classes=3, partition=grid, width=2, voxel_channels=2,
        point_channels=(4, 4, 4),
    )  # fmt: skip
    network = MODELS.build(backbone).eval()
    sparse = "cylinder_3d_spconv_seg."
    taps = Taps(network, dict(
        cells="partition", enc2=sparse + "resBlock2.pool", enc8=sparse + "resBlock4.pool",
        dec8=sparse + "upBlock0", dec2=sparse + "upBlock2", dec1=sparse + "ReconNet",
    ))  # fmt: skip
    coord = torch.rand(300, 3) * torch.tensor([90.0, 90.0, 8.0]) - torch.tensor([45.0, 45.0, 4.0])
    feat = torch.cat([coord, torch.rand(300, 1)], 1)
    with torch.no_grad(), taps.record() as seen:
        network(dict(coord=coord, feat=feat, offset=torch.tensor([170, 300])))
    where = seen["cells"]
    for tap, stride in dict(
        enc2=(2, 2, 2), enc8=(8, 8, 4), dec8=(8, 8, 4), dec2=(2, 2, 2), dec1=(1, 1, 1)
    ).items():
        tokens = seen[tap]
        token = point_tokens(where.batch, where.cells, tokens.batch, tokens.cells, stride)
        assert bool((token >= 0).all()), tap
        shape = (2, 37 // stride[0], 50 // stride[1])
        pairs = point_pairs(places(where.batch, where.cells, shape, stride), token, shape)
        columns = column_pairs(tokens.batch, tokens.cells, shape)
        assert bool(torch.isin(pairs.token, columns.token).all())
        assert bool((columns.occupied() | ~pairs.occupied()).all())
        if tap == "dec1":
            assert len(pairs.token) == len(columns.token)
            both = pool_pairs(tokens.feat, pairs), pool_pairs(tokens.feat, columns)
            torch.testing.assert_close(*both)


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(channels=None), r"channels=\(student, teacher\) is needed"),
        (dict(channels=(3,)), "channels=.*expected 2 whole numbers"),
        (dict(pool="maximum"), "pool='maximum' is none of max, mean, attention; nearest: max"),
        (dict(mask="none"), "mask='none' is none of all, occupied"),
        (dict(correspondence="point"), "nearest: points"),
        (dict(adapter_side="both"), "adapter_side='both' is none of"),
        (dict(target_norm="bn"), "target_norm='bn' is none of ln"),
        (dict(student_stride=(2, 0)), "student_stride=.*expected 2 whole numbers"),
        (dict(teacher_stride=(2, 2)), "teacher_stride=.*expected 3 whole numbers"),
        (dict(adapter_kernel=2), "adapter_kernel=2: expected an odd"),
        (dict(pool="attention", adapter_side="student"), "wants it fixed"),
        (dict(pool="attention", attention=dict(width=3)), "attention=.*width"),
        (dict(pool="attention", attention=dict(dim=0)), "dim=0"),
    ],
)
def test_arguments_that_mean_nothing(arguments, says):
    with pytest.raises(InputError, match=says):
        VoxelToPillar("x", **{"channels": (3, 4), **arguments})


def test_taps_that_do_not_fit_are_answered_with_numbers():
    feat, batch, cells = level(30, (2, 4, 3, 2), dtype=torch.float32)
    maps = Activation(torch.randn(2, 3, 4, 3))
    teacher = Outputs(x=Activation(feat, batch, cells))
    term = VoxelToPillar("x", channels=(3, 4))

    def answers(says, term=term, student=maps, teacher=teacher, **rest):
        with pytest.raises(InputError, match=says):
            term(Outputs(x=student, **rest), teacher, {})

    answers(r"is \(30, 4\); a map \(b, c, h, w\)", student=Activation(feat))
    answers("teacher's tap x has no cells", teacher=Outputs(x=Activation(feat)))
    answers(
        r"have 3 and 4 channels, channels says \(4, 3\); set channels=\(3, 4\)",
        VoxelToPillar("x", channels=(4, 3)),
    )
    small = Activation(torch.randn(2, 3, 2, 2))
    answers(r"reach \(3, 2\), at stride \(1, 1\) cell \(3, 2\).*2 x 2", student=small)
    answers("come from 2 scans, the student's map has 1", student=Activation(maps.feat[:1]))
    through = VoxelToPillar("x", channels=(3, 4), correspondence="points", student_stride=(1, 1))
    where = Activation(feat, batch, cells)
    answers("tap cells has no cells; tap the network's partition", through, cells=Activation(feat))
    answers("the batch has no grid_coord", through, cells=where)
    through.teacher_cells = "fine"
    half = Activation(feat[:9], batch[:9], cells[:9])
    teacher["fine"] = half
    answers("the student saw 30 points, the teacher 9", through, cells=where)
    teacher["fine"] = where
    through.student_stride = (1, 1)
    answers(r"at stride \(1, 1\) cell \(3, 2\)", through, student=small, cells=where)
    teacher["fine"] = Activation(feat, batch, cells + 90)
    says = r"30 of 30 points lie in no cell.*reach \(93, 92, 91\), those.*\(3, 2, 1\)"
    answers(says, through, cells=where)


def test_few_points_with_tokens_are_reported_once(caplog):
    feat, batch, cells = level(20, (1, 4, 3, 2), dtype=torch.float32)
    where = Activation(feat, batch, cells)
    few = Outputs(x=Activation(feat[:6], batch[:6], cells[:6]), cells=where)
    term = VoxelToPillar(
        "x", None, (3, 4), "points", teacher_cells="cells", teacher_stride=(1, 1, 1)
    )
    student = Outputs(x=Activation(torch.randn(1, 3, 2, 2)), cells=where)
    for _ in range(2):
        term(student, few, {})
    assert caplog.text.count("14 of 20 points lie in no cell") == 1


def test_a_sparse_tensor_tap_is_read_as_it_is():
    feat, batch, cells = level(20, (1, 4, 3, 2), dtype=torch.float32)
    tensor = SparseConvTensor(feat, torch.cat([batch[:, None], cells], 1).int(), (4, 3, 2), 1)
    indices = tensor.indices.long()
    term = VoxelToPillar("x", channels=(3, 4))
    student = Outputs(x=Activation(torch.randn(1, 3, 4, 3)))
    ours = term(student, Outputs(x=Activation(feat, indices[:, 0], indices[:, 1:])), {})
    pooled = tensor.dense().masked_fill(tensor.dense() == 0, -1e9).amax(4)
    dense = torch.where(pooled < -1e8, 0.0, pooled)
    torch.testing.assert_close(ours, pillar_mse(student["x"].feat, term.adapter(dense)))
