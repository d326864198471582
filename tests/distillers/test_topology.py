"""The topology term: values by hand, loops from the formula, landmarks, scans, networks; H1 and H2 where GUDHI is."""

import itertools
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pointcept_kd.distillers import topology
from pointcept_kd.distillers.base import Distiller, Outputs, Term
from pointcept_kd.distillers.gradient import map_loss
from pointcept_kd.distillers.logits import logit_kl
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.distillers.topology import (
    Topology,
    diagram_distance,
    landmarks_of,
    topology_loss,
)
from pointcept_kd.host import MODELS, TERMS, InputError
from pointcept_kd.host.config import Config
from pointcept_kd.ops.persistence import has_engine

from ..networks.clouds import cloud, only
from ..test_distributed import compared, forked, recorded, single_precision  # noqa: F401  fixtures
from .test_gradient import net

ROOT = Path(__file__).resolve().parents[2]
needs_engine = pytest.mark.skipif(not has_engine(), reason="needs GUDHI (extra `topology`)")
H0 = dict(h0=1.0)
ALL = dict(h0=1000, h1=1000, h2=1000)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


T1 = tensor((0, 0), (1, 0), (1, 1), (0, 1))
T2 = tensor((0, 0), (2, 0), (2, 1), (0, 1))
T10 = tensor((0, 0), (0, 0), (1, 0), (1, 0), (3, 0))


def loss_of(student, teacher, homology=None, distance="chamfer", scale="none", landmarks=None):
    names = dict.fromkeys(("h0", "h1", "h2"), distance)
    return topology_loss(student, teacher, homology or H0, names, landmarks or ALL, scale)


# ---------------------------------------------------------------------------- oracles


def distance_between(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def loop_deaths(points):
    """Kruskal: edges in ascending order; one that joins two components is a death."""
    component = list(range(len(points)))
    pairs = itertools.combinations(range(len(points)), 2)
    deaths = []
    for length, i, j in sorted((distance_between(points[i], points[j]), i, j) for i, j in pairs):
        if component[i] != component[j]:
            old, new = component[i], component[j]
            component = [new if c == old else c for c in component]
            deaths.append(length)
    return deaths


def loop_chamfer(a, b):
    if not a and not b:
        return 0.0
    if not a or not b:
        return sum(x * x / 2 for x in a or b) / len(a or b)
    towards_b = sum(min((x - y) ** 2 for y in b) for x in a) / len(a)
    return towards_b + sum(min((x - y) ** 2 for x in a) for y in b) / len(b)


def loop_w2(a, b):
    return sum((x - y) ** 2 for x, y in zip(sorted(a), sorted(b))) / max(1, len(a))


def loop_entropy(a):
    total = sum(a)
    return -sum(x / total * math.log(x / total) for x in a if x > 0)


def loop_loss(student, teacher, distance, scale):
    deaths = []
    for points in (student.tolist(), teacher.tolist()):
        pairs = list(itertools.combinations(points, 2))
        mean = sum(distance_between(a, b) for a, b in pairs) / max(1, len(pairs))
        deaths.append([d / (mean if scale == "mean" else 1) for d in loop_deaths(points)])
    if distance == "entropy":
        return (loop_entropy(deaths[0]) - loop_entropy(deaths[1])) ** 2
    return {"chamfer": loop_chamfer, "w2": loop_w2}[distance](*deaths)


# ---------------------------------------------------------------------------- the function


def test_hand_values():
    for distance in ("chamfer", "w2"):
        assert loss_of(T1, T2, distance=distance).item() == pytest.approx(1 / 3, rel=1e-6)
    assert loss_of(T1, T2, scale="mean").item() == pytest.approx(0.1575217, abs=1e-6)
    assert loss_of(2 * T1, T2, scale="mean").item() == pytest.approx(0.1575217, abs=1e-6)
    line, other = tensor((0, 0), (1, 0), (3, 0), (7, 0)), tensor((0,), (1,), (4,))
    assert diagram_distance(line, other, 0).item() == pytest.approx(2 / 3 + 1 / 2, rel=1e-6)
    assert diagram_distance(
        tensor((0,), (1,), (3,)), tensor((0,), (1.5,)), 0
    ).item() == pytest.approx(0.5)
    # Equal bars: ln 3 and 1.0397208 nats.
    entropy = loss_of(T1, T2, distance="entropy").item()
    assert entropy == pytest.approx((math.log(3) - 1.0397208) ** 2, rel=1e-5)


def test_gradient_by_hand():
    """Points 0, 1, 3 against deaths 1, 1."""
    for distance in ("chamfer", "w2"):
        points = tensor((0,), (1,), (3,)).requires_grad_()
        value = loss_of(points, tensor((0,), (1,), (2,)), distance=distance)
        value.backward()
        assert value.item() == pytest.approx(0.5)
        assert points.grad[:, 0].tolist() == pytest.approx([0, -1, 1])


@needs_engine
def test_hand_values_of_loops():
    h1 = dict(h1=1.0)
    assert loss_of(T1, T2, h1).item() == pytest.approx(3.3508897, abs=1e-6)
    both = loss_of(T1, T2, dict(h0=2.0, h1=0.5)).item()
    assert both == pytest.approx(2 / 3 + 3.3508897 / 2, abs=1e-6)
    mixed = topology_loss(T1, T2, dict(h0=1.0, h1=1.0), dict(h0="w2", h1="chamfer"), ALL, "none")
    assert mixed.item() == pytest.approx(1 / 3 + 3.3508897, abs=1e-6)
    # Four points on a line have no loop: the other's bar goes to the diagonal.
    line = tensor((0, 0), (1, 0), (3, 0), (7, 0)).requires_grad_()
    value = loss_of(line, T1, h1)
    assert value.item() == pytest.approx(0.0857864, abs=1e-6)
    assert value.requires_grad
    assert loss_of(T1, line.detach(), h1).item() == pytest.approx(0.0857864, abs=1e-6)
    octahedron = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert loss_of(octahedron, octahedron * 2, dict(h2=1.0)).item() > 0
    assert loss_of(octahedron, octahedron, dict(h0=1.0, h1=1.0, h2=1.0)).item() == 0


@pytest.mark.parametrize("scale", ["none", "mean"])
@pytest.mark.parametrize("distance", ["chamfer", "w2", "entropy"])
def test_equals_loops_and_properties(distance, scale):
    torch.manual_seed(1)
    student, teacher = (torch.randn(20, c, dtype=torch.float64) for c in (3, 7))
    found = loss_of(student, teacher, distance=distance, scale=scale)
    assert found.item() == pytest.approx(loop_loss(student, teacher, distance, scale), rel=1e-6)
    assert loss_of(teacher, teacher, distance=distance, scale=scale).item() == 0
    order = torch.randperm(20)
    torch.testing.assert_close(
        loss_of(student[order], teacher[order], distance=distance, scale=scale), found
    )
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    moved = student @ turn + torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(
        loss_of(moved, teacher, distance=distance, scale=scale), found, rtol=1e-5, atol=1e-9
    )
    larger = loss_of(37 * student, teacher, distance=distance, scale=scale).item()
    same = scale == "mean" or distance == "entropy"
    assert (larger == pytest.approx(found.item(), rel=1e-5)) is same
    guest = teacher.clone().requires_grad_()
    leaf = student[:9].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: loss_of(s, teacher[:9], distance=distance, scale=scale), leaf
    )
    loss_of(leaf, guest[:9], distance=distance, scale=scale).backward()
    assert guest.grad is None


@needs_engine
@pytest.mark.parametrize("scale", ["none", "mean"])
def test_gradients_of_loops(scale):
    torch.manual_seed(0)
    angle = torch.arange(12, dtype=torch.float64) * math.tau / 12
    circle = torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(12, 2).double()
    other = (circle * tensor(1.0, 0.7)).flip(1) + 0.1 * torch.randn(12, 2).double()
    homology = dict(h0=1.0, h1=1.0)
    for distance in ("chamfer", "entropy"):
        leaf = circle.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s, d=distance: loss_of(s, other, homology, d, scale), leaf
        )


@pytest.mark.parametrize("distance", ["chamfer", "w2", "entropy"])
@pytest.mark.parametrize(
    "points", [T10, torch.zeros(5, 2).double(), torch.full((1, 2), 3.0).double()]
)
def test_equal_points_and_single_ones(points, distance):
    teacher = torch.randn(len(points), 4, dtype=torch.float64)
    leaf = points.clone().requires_grad_()
    for scale in ("none", "mean"):
        value = loss_of(leaf, teacher, distance=distance, scale=scale)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, leaf)[0]).all()
        if len(points) == 1:
            assert value.item() == 0


def test_first_rows_are_the_landmarks():
    student, teacher = torch.randn(2, 30, 4, dtype=torch.float64)
    found = loss_of(student, teacher, landmarks=dict(h0=12), scale="mean")
    torch.testing.assert_close(found, loss_of(student[:12], teacher[:12], scale="mean"))
    leaf = student.clone().requires_grad_()
    loss_of(leaf, teacher, landmarks=dict(h0=12)).backward()
    assert leaf.grad[12:].abs().sum() == 0


def test_half_precision_is_widened():
    student, teacher = torch.randn(2, 25, 6).half()
    expected = loss_of(student.float(), teacher.float(), scale="mean")
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(leaf, teacher, scale="mean")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    found.backward()
    assert torch.isfinite(leaf.grad).all()


def test_undefined_features_make_an_undefined_loss():
    student = torch.randn(5, 3)
    student[2, 1] = math.inf
    value = loss_of(student.requires_grad_(), torch.randn(5, 3))
    assert math.isnan(value.item())
    assert value.requires_grad
    assert math.isnan(loss_of(torch.randn(5, 3), student).item())


def test_unknown_names():
    with pytest.raises(
        InputError, match=r"'chamfre' is none of chamfer, w2, entropy; nearest: chamfer"
    ):
        diagram_distance(T1, T2, 0, "chamfre")
    with pytest.raises(InputError, match="'w2' compares H0 alone, not H1"):
        diagram_distance(T1, T2, 1, "w2")
    with pytest.raises(InputError, match="'men' is none of mean, none; nearest: mean"):
        loss_of(T1, T2, scale="men")
    with pytest.raises(InputError, match="sampling='random'"):
        landmarks_of(torch.zeros(3, 3, dtype=torch.long), 2, "random")
    with pytest.raises(ValueError, match="count must be at least 1"):
        landmarks_of(torch.zeros(3, 3, dtype=torch.long), 0)


# ---------------------------------------------------------------------------- landmarks


def grid(n, high=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(high**3, generator=g)[:n]
    return torch.stack([flat // high**2, flat // high % high, flat % high], 1)


@pytest.mark.parametrize("sampling", ["uniform", "farthest"])
def test_landmarks_follow_from_the_cells(sampling):
    cells = grid(500)
    rows = landmarks_of(cells, 60, sampling)
    assert len(set(rows.tolist())) == 60
    assert torch.equal(rows, landmarks_of(cells, 60, sampling))
    order = torch.randperm(500)
    moved = landmarks_of(cells[order], 60, sampling)
    assert torch.equal(cells[order][moved], cells[rows])
    assert torch.equal(landmarks_of(cells, 20, sampling), rows[:20])
    assert sorted(landmarks_of(cells[:7], 60, sampling).tolist()) == list(range(7))
    assert len(landmarks_of(cells[:0], 60, sampling)) == 0
    others = grid(500) + torch.tensor([0, 0, 1])
    assert not torch.equal(landmarks_of(others, 60, sampling), rows) or sampling == "farthest"


def test_uniform_landmarks_are_uniform():
    """Of a full grid, each octant gets its share, and neighbours are taken independently."""
    axis = torch.arange(20)
    cells = torch.cartesian_prod(axis, axis, axis)
    rows = landmarks_of(cells, 1600)
    octant = (cells[rows] >= 10).long() @ torch.tensor([4, 2, 1])
    counts = torch.bincount(octant, minlength=8)
    assert counts.min() > 150  # 200 expected, standard deviation 13
    assert counts.max() < 250
    taken = torch.zeros(20, 20, 20)
    taken[tuple(cells[rows].T)] = 1
    for axis in range(3):  # 0.04 expected, standard deviation 0.0023
        both = (taken * taken.roll(1, axis)).mean().item()
        assert 0.032 < both < 0.048


def test_farthest_landmarks_spread():
    cells = grid(2000)

    def closest(rows):
        return torch.pdist(cells[rows].float()).min().item()

    assert closest(landmarks_of(cells, 50, "farthest")) > 2 * closest(landmarks_of(cells, 50))


# ---------------------------------------------------------------------------- the term


def two_scans(sizes=(40, 25), widths=(6, 9), dtype=torch.float32):
    torch.manual_seed(5)
    scan = torch.repeat_interleave(torch.tensor(sizes))
    cells = torch.cat([grid(n, seed=i) for i, n in enumerate(sizes)])
    return [torch.randn(len(scan), w, dtype=dtype) for w in widths], scan, cells


def compare(term, feats, scan, cells, order=None):
    order = torch.arange(len(scan)) if order is None else order
    student = Outputs(enc_out=Activation(feats[0], scan, cells))
    teacher = Outputs(enc_out=Activation(feats[1][order], scan[order], cells[order]))
    return term(student, teacher, {})


@pytest.fixture
def only_h0():
    return Topology(homology=H0, landmarks=12)


def test_the_term_is_the_mean_over_scans(only_h0):
    feats, scan, cells = two_scans((40, 25, 1))
    values = []
    for number in range(2):
        rows = (scan == number).nonzero()[:, 0]
        rows = rows[landmarks_of(cells[rows], 12)]
        values.append(loop_loss(feats[0][rows], feats[1][rows], "w2", "mean"))
    found = compare(only_h0, feats, scan, cells)
    assert found.item() == pytest.approx(sum(values) / 3, rel=1e-4)
    alone = compare(only_h0, [f[scan == 1] for f in feats], scan[scan == 1], cells[scan == 1])
    assert alone.item() == pytest.approx(values[1], rel=1e-4)
    single = [f[-1:].clone().requires_grad_() for f in feats]
    value = compare(only_h0, single, scan[-1:], cells[-1:])
    assert value.item() == 0
    assert value.requires_grad


def test_rows_are_matched_by_cell(only_h0):
    feats, scan, cells = two_scans()
    expected = compare(only_h0, feats, scan, cells)
    order = torch.randperm(len(scan))
    torch.testing.assert_close(compare(only_h0, feats, scan, cells, order), expected)
    moved = [f[order] for f in feats]
    torch.testing.assert_close(
        compare(only_h0, moved, scan[order], cells[order]), expected, rtol=1e-6, atol=1e-8
    )
    where = torch.tensor([(0, 0, 0), (0, 0, 1), (1, 0, 0)])
    feat, turn = torch.randn(3, 4), torch.tensor([2, 0, 1])
    same = torch.zeros(3, dtype=torch.long)
    assert compare(only_h0, (feat, feat), same, where, turn).item() == 0
    teacher = Outputs(enc_out=Activation(feat, same, where + 1))
    with pytest.raises(InputError, match="cover different cells"):
        only_h0(Outputs(enc_out=Activation(feat, same, where)), teacher, {})


def test_plain_tensors_find_their_scans_by_the_offset(only_h0):
    feats, scan, _ = two_scans((12, 8))
    pair = [Outputs(enc_out=Activation(f)) for f in feats]
    value = only_h0(*pair, {"offset": torch.tensor([12, 20])})
    values = [loop_loss(*(f[scan == i] for f in feats), "w2", "mean") for i in range(2)]
    assert value.item() == pytest.approx(sum(values) / 2, rel=1e-4)
    with pytest.raises(InputError, match="enc_out of the student hands out a plain tensor"):
        only_h0(*pair, {"offset": torch.tensor([12, 30])})


def test_no_rows_at_all(only_h0):
    nothing = torch.zeros(0, 4, requires_grad=True)
    cells, scan = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    value = compare(only_h0, (nothing, nothing), scan, cells)
    assert value.item() == 0
    assert value.requires_grad


def test_every_third_step():
    term = Topology(homology=H0, every=3)
    feats, scan, cells = two_scans()
    feats[0].requires_grad_()
    whole = compare(Topology(homology=H0), feats, scan, cells).item()
    values = [compare(term, feats, scan, cells) for _ in range(7)]
    assert [v.item() for v in values] == pytest.approx(
        [3 * whole, 0, 0, 3 * whole, 0, 0, 3 * whole]
    )
    assert torch.autograd.grad(values[1], feats[0])[0].abs().sum() == 0
    # A run that goes on keeps its beat.
    again = Topology(homology=H0, every=3)
    again.load_state_dict(term.state_dict())
    assert [compare(again, feats, scan, cells).item() > 0 for _ in range(3)] == [False, False, True]
    assert not Topology(homology=H0).state_dict()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            dict(homology=dict(h3=1.0)),
            "a dimension of homology='h3' is none of h0, h1, h2; nearest: h",
        ),
        (dict(homology=1.0), "give weights by dimension"),
        (dict(homology=dict(h0=0.0)), "every dimension has weight 0"),
        (dict(homology=dict(h0=-1.0)), "homology h0=-1.0: expected 0 or a positive number"),
        (
            dict(homology=H0, landmarks=dict(h0=1)),
            "landmarks h0=1: expected a whole number, at least 2",
        ),
        (dict(homology=H0, landmarks=dict(h9=1)), "a dimension of landmarks='h9'"),
        (
            dict(homology=H0, distance="chamfr"),
            "distance of h0='chamfr' is none of .*nearest: chamfer",
        ),
        (dict(homology=dict(h0=1.0, h1=1.0), distance="w2"), "distance of h1 is 'w2'"),
        (dict(homology=H0, scale="max"), "scale='max' is none of mean, none"),
        (dict(homology=H0, sampling="furthest"), "nearest: farthest"),
        (dict(homology=H0, every=0), "every=0: expected a whole number"),
        (dict(homology=H0, every=True), "every=True"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(InputError, match=words):
        Topology(**arguments)


def test_defaults_can_be_given_in_part(monkeypatch):
    monkeypatch.setattr(topology, "has_engine", lambda: True)
    term = Topology(landmarks=dict(h1=64), distance=dict(h0="chamfer"))
    assert term.homology == dict(h0=1.0, h1=1.0, h2=0.0)
    assert term.landmarks == dict(h0=1024, h1=64, h2=256)
    assert term.distance == dict(h0="chamfer", h1="chamfer", h2="chamfer")
    assert Topology(landmarks=128).landmarks == dict(h0=128, h1=128, h2=128)
    assert term.taps() == ({"enc_out"}, {"enc_out"})
    assert Topology("a", "b", homology=H0).taps() == ({"a"}, {"b"})


def test_without_gudhi_h0_stays_and_the_log_says_so_once(monkeypatch):
    monkeypatch.setattr(topology, "has_engine", lambda: False)
    feats, scan, cells = two_scans()
    logger, lines = logging.getLogger("pointcept_kd"), []
    monkeypatch.setattr(logger, "warning", lambda text, *words: lines.append(text % words))
    term = Topology(homology=dict(h0=1.0, h1=1.0, h2=1.0))
    for _ in range(2):
        value = compare(term, feats, scan, cells)
    assert len(lines) == 1
    assert "H1 and H2 need GUDHI" in lines[0]
    assert value.item() == compare(Topology(homology=H0), feats, scan, cells).item()
    with pytest.raises(InputError, match="H1 need GUDHI"):
        Topology(homology=dict(h1=1.0))


@needs_engine
def test_with_gudhi_both_dimensions_count():
    feats, scan, cells = two_scans(dtype=torch.float64)
    feats[0].requires_grad_()
    term = Topology(landmarks=dict(h0=30, h1=20))
    values = []
    for number in range(2):
        rows = (scan == number).nonzero()[:, 0]
        rows = rows[landmarks_of(cells[rows], 30)]
        student, teacher = (f[rows] / torch.pdist(f[rows]).mean() for f in feats)
        h0 = loop_w2(loop_deaths(student.tolist()), loop_deaths(teacher.tolist()))
        values.append(h0 + diagram_distance(student[:20], teacher[:20], 1).item())
    found = compare(term, feats, scan, cells)
    assert found.item() == pytest.approx(sum(values) / 2, rel=1e-6)
    found.backward()
    assert torch.isfinite(feats[0].grad).all()


# ---------------------------------------------------------------------------- networks


def distilled(terms, widths=(8, 16), taps=None):
    torch.manual_seed(3)
    taps = taps or dict(enc_out="backbone.enc")
    return Distiller(
        student=dict(model=net(widths[0]), taps=taps),
        teacher=dict(model=net(widths[1], 0.3), weight="random", taps=taps),
        terms=terms,
    )


FOUR = dict(
    logits=dict(type="kd.LogitKL", weight=0.3),
    gradient=dict(type="kd.GradientGuided", weight=10.0),
    topology=dict(type="kd.Topology", weight=10.0, landmarks=24),
)


def test_five_steps_with_all_four_terms():
    model = distilled(FOUR)
    teacher = model.teachers["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(5):
        out = model(cloud((200, 150), seed=step))
        total = out["loss_task"] + sum(out[f"weighted_{name}"] for name in FOUR)
        torch.testing.assert_close(out["loss"], total)
        assert out["loss_topology"] > 0
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert set(model.state_dict()) == {f"student.{k}" for k in model.student.state_dict()}


def test_evaluation_is_the_student_alone():
    model = distilled(FOUR).eval()
    batch = cloud((200, 150))
    with torch.no_grad():
        answer, alone = model(dict(batch)), model.student(dict(batch))
    assert set(answer) == set(alone)
    assert torch.equal(answer["seg_logits"], alone["seg_logits"])


def test_a_network_taught_by_itself_loses_nothing():
    model = distilled(FOUR, widths=(8, 8))
    model.teachers["teacher"].network.load_state_dict(model.student.state_dict())
    for module in model.student.modules():
        if hasattr(module, "shuffle_orders"):
            module.shuffle_orders = False
    model.train()
    model.student.eval()
    out = model(cloud((200, 150)))
    for name in FOUR:
        assert out[f"loss_{name}"].item() == pytest.approx(0, abs=1e-7)


def test_scans_count_for_themselves():
    model = distilled(dict(topology=dict(type="kd.Topology", homology=H0)))
    model.train()
    model.student.eval()
    both = cloud((260, 60))
    values = [model(only(both, scan))["loss_topology"].item() for scan in (0, 1)]
    assert model(both)["loss_topology"].item() == pytest.approx(sum(values) / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model = distilled(FOUR)
    model.train()
    batch = cloud((300, 150))
    with torch.autocast("cpu", dtype=dtype):
        out = model(batch)
    assert out["loss_topology"].dtype == torch.float32
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Constant(Term):
    """A term of a given value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, student, teacher, batch):
        return student["logits"].feat[:0].sum() + self.value


class OneLoss(nn.Module):
    """A segmentor whose loss is 1."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)

    def forward(self, batch):
        scores = self.backbone(batch["feat"])
        return {"loss": scores[:0].sum() + 1, "seg_logits": scores}


def test_the_total():
    """Published weights on the values worked by hand."""
    TERMS.register_module("TestConstant", module=Constant, force=True)
    MODELS.register_module("TestOneLoss", module=OneLoss, force=True)
    kl = logit_kl(tensor((0, 0)), tensor((2, 0))).item()
    maps = map_loss(tensor(0, 1), tensor(0.25, 0.5)).item()
    values = dict(logits=(kl, 0.3), gradient=(maps, 10.0), topology=(loss_of(T1, T2).item(), 0.1))
    model = Distiller(
        student=dict(model=dict(type="TestOneLoss")),
        teacher=dict(model=dict(type="TestOneLoss"), weight="random"),
        terms={
            name: dict(type="TestConstant", value=value, weight=weight)
            for name, (value, weight) in values.items()
        },
    )
    assert model({"feat": torch.randn(3, 2)})["loss"].item() == pytest.approx(1.9129273, rel=1e-6)


# ------------------------------------------------------------------------ several processes


def in_two_and_in_one(tmp_path, **changes):
    """Gradients of two iterations of the recommended tiny config, by one process and by two."""
    cfg = Config.fromfile(ROOT / "configs" / "kd" / "ptv3_to_student_tiny_recommended.py")
    cfg.model.teacher.weight = "random"
    for term in ("gradient", "topology"):
        for key, value in changes.get(term, {}).items():
            cfg.model.terms[term][key] = value
    model = cfg.model.to_dict()
    return [recorded(tmp_path, world, double=True, model=model) for world in (1, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        dict(topology=dict(homology=H0, landmarks=64)),
        dict(gradient=dict(normalize="none", weight=1e6), topology=dict(homology=H0, every=2)),
    ],
)
@pytest.mark.usefixtures("forked", "single_precision")
@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo, fork and /proc"
)
def test_two_processes_have_the_gradients_of_one(tmp_path, changes):
    one, two = in_two_and_in_one(tmp_path, **changes)
    worst = compared(one, two)
    assert len(worst) == 2
    assert max(worst) < 1e-10
