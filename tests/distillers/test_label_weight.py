"""Label weights: worked values, loops from the formulas, frequencies given and counted, a pair of networks."""

import math

import pytest
import torch

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.label_weight import (
    LabelWeight,
    frequency_weights,
    label_weight_loss,
    label_weight_map,
)
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError

from .bev_pair import CLASSES, check_one_step, pair, scans

DOUBLE = torch.float64
SHARES = (0.4, 0.3, 0.1, 0.05)
FINE = dict(type="kd.LabelWeight", tap="fine", channels=(6, 5), frequencies=SHARES)
ROAD, PERSON = 9, 6  # with 0 for unlabelled
VOID = 0.03150183
# Shares of SemanticKITTI's classes in the training sequences, as published.
KITTI = (
    *(0.04260783, 0.00016610, 0.00039839, 0.00216494, 0.00180706, 0.00033758, 0.00012711),
    *(0.00003746, 0.19879648, 0.01471717, 0.14392298, 0.00390486, 0.13268620, 0.07235923),
    *(0.26681501, 0.00603501, 0.07814222, 0.00285550, 0.00061560),
)


def kitti_weights():
    return frequency_weights(torch.tensor([VOID, *KITTI])) / 50


def loop_map(batch, cells, labels, weights, shape, empty=0.0, bins=0):
    """Sum over the voxels of every column of the weight of the most frequent label, ties to the smallest."""
    votes = {}
    for b, (i, j, z), label in zip(batch.tolist(), cells.tolist(), labels.tolist()):
        votes.setdefault((b, i, j), {}).setdefault(z, []).append(label)
    out = torch.zeros(shape, dtype=torch.float64)
    for b in range(shape[0]):
        for i in range(shape[1]):
            for j in range(shape[2]):
                column = votes.get((b, i, j), {})
                out[b, i, j] = empty * max(bins - len(column), 0)
                for names in column.values():
                    winner = max(sorted(set(names)), key=names.count)
                    out[b, i, j] += float(weights[winner])
    return out


def loop_loss(student, target, weight):
    total = 0.0
    b, c, h, w = student.shape
    for n in range(b):
        for i in range(h):
            for j in range(w):
                error = sum(
                    (student[n, k, i, j] - target[n, k, i, j]).item() ** 2 for k in range(c)
                )
                total += weight[n, i, j].item() * error
    return math.sqrt(total / (b * h * w) + 1e-12)


def points(count, shape):
    """Scan, voxel and label of points; labels 0 .. 4 with 0 for none."""
    where = torch.stack([torch.randint(0, n, (count,)) for n in shape], 1)
    return where[:, 0], where[:, 1:], torch.randint(0, 5, (count,))


# ------------------------------------------------------------------------------------ worked values


def test_worked_losses():
    target = torch.tensor([[[[1.0, 0.0], [0.0, -1.0]], [[5.0, 0.0], [0.0, -4.0]]]])
    weight = torch.tensor([[[3.0, 0.0], [1.0, 4.0]]])
    value = label_weight_loss(torch.zeros_like(target), target, weight)
    assert value.item() == pytest.approx(6.041523, abs=1e-5)
    ones = torch.ones(1, 2, 2, 2)
    weight = torch.tensor([[[3.0, 7.0], [0.0, 1.0]]])
    assert label_weight_loss(ones, 0 * ones, weight).item() == pytest.approx(2.345208, abs=1e-5)


def test_worked_weights():
    weights = kitti_weights()
    for label, value in ((0, 0.615350), (1, 0.458633), (8, 19.277831), (9, 0.100102), (19, 12.379335)):  # fmt: skip
        assert weights[label].item() == pytest.approx(value, rel=5e-6)
    assert sum(KITTI) + VOID == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("empty", "parts", "value"),
    [(0.61535, (15.052442, 1.2307), 5.542584), (0.0, (15.052442, 0.0), 5.486792)],
)
def test_worked_pillars(empty, parts, value):
    """Two pillars of two voxels, {road, person} and {empty, empty}, differences 2 and 1."""
    scan, cells = torch.zeros(2, dtype=torch.long), torch.tensor([[0, 0, 0], [0, 0, 1]])
    labels = torch.tensor([ROAD, PERSON])
    weight = label_weight_map(scan, cells, labels, kitti_weights(), (1, 1, 2), empty, 2)
    assert weight.flatten().tolist() == pytest.approx(parts, abs=1e-4)
    student, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[2.0, 1.0]]]])
    assert label_weight_loss(student, target, weight).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("labels", "winner"), [((5, 5, 7), 5), ((7, 5), 5), ((0, 0, 9), 0), ((9, 0), 0)])  # fmt: skip
def test_worked_majorities(labels, winner):
    weights = torch.arange(1.0, 21.0)
    scan, cells = torch.zeros(len(labels)).long(), torch.zeros(len(labels), 3).long()
    made = label_weight_map(scan, cells, torch.tensor(labels), weights, (1, 1, 1))
    assert made.item() == weights[winner]


def test_unlabelled_points_that_have_no_vote():
    scan, cells = torch.zeros(5).long(), torch.tensor([[0, 0, z] for z in (0, 0, 0, 1, 1)])
    labels, weights = torch.tensor([0, 0, 2, 0, 0]), torch.tensor([1.0, 10.0, 100.0])
    for vote, value in ((False, 2.0), (True, 101.0)):
        made = label_weight_map(scan, cells, labels, weights, (1, 1, 1), vote_labelled=vote)
        assert made.item() == value
    term = LabelWeight("x", None, (1, 1), (0.1, 0.9), vote_labelled=True, scale=1.0)
    where = Activation(torch.zeros(5, 9), scan, cells)
    weight = term.weight_map(Outputs(cells=where), dict(segment=labels - 1), (1, 1, 1))
    assert weight.item() == pytest.approx(1 / 0.901 + 1 / (VOID + 0.001), rel=1e-5)


def test_worked_term():
    """As the worked pillars, through the term: unlabelled is -1, classes count from 0."""
    for empty, value in ((0.61535, 5.542584), (0.0, 5.486792)):
        term = LabelWeight("x", "y", (1, 1), KITTI, empty_weight=empty, bins=2)
        term.adapter = torch.nn.Identity()
        cells = torch.tensor([[0, 0, 0], [0, 0, 1]])
        where = Activation(torch.zeros(2, 9), torch.zeros(2).long(), cells)
        tokens = torch.tensor([[0, 0, 1], [0, 1, 0]])
        level = Activation(torch.tensor([[2.0], [1.0]]), torch.zeros(2).long(), tokens)
        student = Outputs(x=Activation(torch.zeros(1, 1, 1, 2)), cells=where)
        batch = dict(segment=torch.tensor([ROAD - 1, PERSON - 1]))
        loss = term(student, Outputs(y=level), batch)
        assert loss.item() == pytest.approx(value, abs=1e-5)


# ------------------------------------------------------------------------------ loops and properties


@pytest.mark.parametrize(("empty", "bins"), [(0.0, None), (0.3, 5)])
def test_map_equals_loops(empty, bins):
    batch, cells, labels = points(200, (2, 5, 4, 5))
    weights = torch.rand(5, dtype=DOUBLE)
    shape = (2, 4, 4)  # the fifth row is beyond the map
    expected = loop_map(batch, cells, labels, weights, shape, empty, bins or 0)
    made = label_weight_map(batch, cells, labels, weights, shape, empty, bins)
    torch.testing.assert_close(made, expected)
    order = torch.randperm(200)
    again = label_weight_map(batch[order], cells[order], labels[order], weights, shape, empty, bins)
    torch.testing.assert_close(again, made)
    lower = cells - torch.tensor([0, 0, 7])
    torch.testing.assert_close(
        label_weight_map(batch, lower, labels, weights, shape, empty, bins), made
    )


def test_loss_equals_loops_and_has_gradients():
    student, target = torch.randn(2, 2, 3, 3, 4, dtype=DOUBLE)
    weight = torch.rand(2, 3, 4, dtype=DOUBLE) * (torch.rand(2, 3, 4) > 0.4)
    expected = loop_loss(student, target, weight)
    assert label_weight_loss(student, target, weight).item() == pytest.approx(expected)
    leaves = [x.detach().requires_grad_() for x in (student, target)]
    assert torch.autograd.gradcheck(lambda s, t: label_weight_loss(s, t, weight), leaves)
    guest = weight.clone().requires_grad_()
    label_weight_loss(*leaves, guest).backward()
    assert guest.grad is None
    assert not leaves[0].grad.permute(0, 2, 3, 1)[weight == 0].any()


def test_no_difference_and_no_weight_have_finite_gradients():
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    for target, weight in (
        (student.detach().clone(), torch.ones(1, 2, 2)),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2)),
    ):
        student.grad = None
        loss = label_weight_loss(student, target, weight)
        loss.backward()
        assert loss.item() == pytest.approx(1e-6)
        assert torch.equal(student.grad, torch.zeros_like(student))


def test_what_a_map_needs():
    none = torch.zeros(0).long(), torch.zeros(0, 3).long(), torch.zeros(0).long()
    weights = torch.ones(3)
    assert torch.equal(label_weight_map(*none, weights, (1, 2, 3)), torch.zeros(1, 2, 3))
    assert bool((label_weight_map(*none, weights, (1, 2, 3), 0.5, 4) == 2).all())
    with pytest.raises(ValueError, match="needs bins"):
        label_weight_map(*none, weights, (1, 2, 3), 0.5)
    one = torch.zeros(1).long(), torch.zeros(1, 3).long()
    with pytest.raises(ValueError, match="labels must lie in 0 .. 2"):
        label_weight_map(*one, torch.tensor([3]), weights, (1, 2, 3))


# ------------------------------------------------------------------------------------------ the term


CASES = [
    dict(),
    dict(frequencies="running", num_classes=CLASSES),
    dict(empty_weight=0.61535, bins=8),
    dict(correspondence="points", pool="mean", teacher_cells="cells"),
    dict(pool="attention", bin_height=2.5),
    dict(adapter_side="student", target_norm="ln", cells=None),
    dict(tap="coarse", channels=(12, 7), student_stride=(2, 2)),
    dict(tap="coarse", channels=(12, 7), student_stride=(2, 2), teacher_stride=(2, 2, 2), correspondence="points"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_of_a_pair(case):
    loss, model = check_one_step({**FINE, **case})
    assert loss > 0.01
    assert all(v > 0 for v in model.terms["x"].watched().values())


@pytest.mark.parametrize(
    ("changes", "height"),
    [
        (dict(), 1.0),
        (dict(bin_height=2.5), 2.5),
        (dict(empty_weight=0.2, bins=8), 1.0),
        (dict(tap="coarse", channels=(12, 7), student_stride=(2, 2)), 1.0),
    ],
)
def test_term_equals_loops(changes, height):
    model = pair(dict(x={**FINE, **changes})).train()
    term = model.terms["x"]
    batch = scans(80, 50)
    with model._student_taps.record() as activations:
        model.student(batch)
    student, guest = Outputs(activations), model.teachers["teacher"](batch)
    feat, target, _ = term.maps(student, guest, batch)
    stride = 2 if "student_stride" in changes else 1
    cells = batch["grid_coord"].clone()
    cells[:, :2] //= stride
    cells[:, 2] = (batch["coord"][:, 2] / height).floor().long()
    scan = torch.arange(2).repeat_interleave(torch.tensor([80, 50]))
    weights = [1 / (f + 0.001) / 50 for f in (VOID, *SHARES)]
    shape = (2, *feat.shape[2:])
    expected = loop_map(
        scan, cells, batch["segment"] + 1, weights, shape, changes.get("empty_weight", 0), 8
    )
    weight = term.weight_map(student, batch, shape).double()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    loss = term(student, guest, batch)
    assert loss.item() == pytest.approx(loop_loss(feat, target, expected), rel=1e-4)


def term_input(segment, shape=(1, 3, 3)):
    count = len(segment)
    cells = torch.stack([torch.randint(0, n, (count,)) for n in (*shape[1:], 4)], 1)
    where = Activation(torch.randn(count, 2), torch.zeros(count).long(), cells)
    student = Outputs(x=Activation(torch.randn(1, 2, *shape[1:])), cells=where)
    return student, Outputs(x=where), dict(segment=segment)


def test_frequencies_are_counted_over_labelled_points_of_training():
    term = LabelWeight("x", None, (2, 2), "running", num_classes=3, scale=1.0)
    given = term_input(torch.tensor([0, 0, 0, 2, -1]))
    term(*given)
    assert term.counts.tolist() == [3, 0, 1]
    term.eval()(*given)
    assert term.counts.tolist() == [3, 0, 1]
    term.train()(*term_input(torch.tensor([1, -1, -1, 1])))
    assert term.counts.tolist() == [3, 2, 1]
    _, weights = term.eval()._labels(given[2], 5)
    expected = [1 / (f + 0.001) for f in (VOID, 3 / 6, 2 / 6, 1 / 6)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    # A run that goes on knows what it has seen.
    other = LabelWeight("x", None, (2, 2), "running", num_classes=3)
    other.load_state_dict(term.state_dict())
    assert other.counts.tolist() == [3, 2, 1]
    fixed = LabelWeight("x", None, (2, 2), (0.5, 0.5))
    assert not any("weights" in k or "counts" in k for k in fixed.state_dict())
    assert LabelWeight("x", None, (2, 2), num_classes=3).running


def test_counting_equals_the_same_frequencies_given():
    segment = torch.tensor([0, 0, 0, 2, 1, -1])
    given = term_input(segment)
    counted = LabelWeight("x", None, (2, 2), "running", num_classes=3)
    named = LabelWeight("x", None, (2, 2), (3 / 5, 1 / 5, 1 / 5))
    named.adapter.load_state_dict(counted.adapter.state_dict())
    torch.testing.assert_close(counted(*given), named(*given))


def test_no_points_and_no_labels():
    for segment in (torch.zeros(0).long(), torch.tensor([-1]), torch.tensor([-1, -1, -1])):
        for frequencies in ("running", (0.2, 0.7)):
            term = LabelWeight("x", None, (2, 2), frequencies, num_classes=2)
            student, teacher, batch = term_input(segment)
            student["x"].feat.requires_grad_()
            loss = term(student, teacher, batch)
            loss.backward()
            assert torch.isfinite(loss)
            assert student["x"].feat.grad.isfinite().all()


def test_half_precision_and_no_gradient_into_the_teacher():
    term = LabelWeight("x", None, (2, 2), (0.2, 0.7))
    student, teacher, batch = term_input(torch.tensor([0, 1, 1, -1]))
    teacher["x"].feat.requires_grad_()
    student["x"].feat = student["x"].feat.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, teacher, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert teacher["x"].feat.grad is None
    assert student["x"].feat.grad.isfinite().all()


def test_the_cells_are_always_read():
    assert LabelWeight("a", "b", (1, 1), (1.0,)).taps() == ({"a", "cells"}, {"b"})
    through = LabelWeight("a", "b", (1, 1), (1.0,), cells="c", correspondence="points")
    assert through.taps() == ({"a", "c"}, {"b"})
    assert LabelWeight("a", "b", (1, 1), (1.0,), cells=None).taps() == ({"a"}, {"b"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(frequencies="running"), "needs num_classes"),
        (dict(frequencies="kitti"), "expected 'running', or the share of every class"),
        (dict(frequencies=(0.1, 1.2)), "expected the share, 0 to 1"),
        (dict(frequencies=()), "expected the share, 0 to 1"),
        (dict(frequencies=(0.1, 0.9), num_classes=3), "2 frequencies, but num_classes=3"),
        (dict(empty_weight=0.6), "empty_weight=0.6 needs bins"),
        (dict(empty_weight=-1.0, bins=3), "empty_weight=-1.0: expected"),
        (dict(scale=0.0), "scale=0.0: expected"),
        (dict(bin_height=0.0), "bin_height=0.0: expected"),
        (dict(bins=0), "bins=0: expected"),
        (dict(channels=None), r"LabelWeight: channels=\(student, teacher\) is needed"),
    ],
)
def test_arguments_that_mean_nothing(arguments, says):
    with pytest.raises(InputError, match=says):
        LabelWeight("x", **{"channels": (3, 4), "frequencies": (0.5, 0.5), **arguments})


def test_batches_that_do_not_fit():
    term = LabelWeight("x", None, (2, 2), (0.2, 0.7))
    student, teacher, _ = term_input(torch.tensor([0, 1, 1]))
    for batch, says in (
        (dict(), "has no segment for 3 points"),
        (dict(segment=torch.tensor([1])), "has 1 labels for 3 points"),
        (dict(segment=torch.tensor([0, 2, -1])), r"a label is 2, but weights are of the classes 0 .. 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            term(student, teacher, batch)
    far = LabelWeight("x", None, (2, 2), (0.2, 0.7))
    student["cells"].cells[:, 0] += 9
    near = Activation(torch.randn(1, 2), torch.zeros(1).long(), torch.zeros(1, 3).long())
    with pytest.raises(InputError, match="cells of the student reach"):
        far(student, Outputs(x=near), dict(segment=torch.zeros(3).long()))
