"""Logit distillation on the student's voxels, with a threshold, between label spaces, and over a dense volume."""

import math

import pytest
import torch

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.logits import (
    DenseLogitKL,
    LogitKL,
    dense_logit_kl,
    logit_kl,
    voxel_logit_kl,
)
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError

from .bev_pair import CLASSES, check_one_step, pair, scans

DOUBLE = torch.float64
A, B = (10 * math.log(3), 0.0), (10 * math.log(1.2), 0.0)  # two teachers of two classes
DENSE = dict(tap="dense", teacher_tap="voxels", num_classes=CLASSES, temperature=1.0)


def softmax(values, tau):
    powers = [math.exp(v / tau) for v in values]
    return [p / sum(powers) for p in powers]


def loop_voxels(student, teacher, voxel, tau, threshold=-1.0):
    kept = []
    for v in sorted(set(voxel.tolist())):
        rows = (voxel == v).nonzero()[:, 0].tolist()
        k = student.shape[1]
        scores = [sum(student[r, c].item() for r in rows) / len(rows) for c in range(k)]
        q = [0.0] * k
        for r in rows:
            for c, value in enumerate(softmax(teacher[r].tolist(), tau)):
                q[c] += value / len(rows)
        p = softmax(scores, tau)
        kept.append(sum(a * math.log(a / b) for a, b in zip(q, p)))
    kept = [m for m in kept if m > threshold]
    return tau**2 * sum(kept) / len(kept) if kept else 0.0


def loop_dense(student, teacher, where, classes, tau, threshold):
    """Over every cell of the volume; channel z * classes + c."""
    scores = {tuple(at): row for at, row in zip(where.tolist(), teacher.tolist())}
    b, channels, r, p = student.shape
    kept = []
    for n in range(b):
        for i in range(r):
            for j in range(p):
                for z in range(channels // classes):
                    own = student[n, z * classes : (z + 1) * classes, i, j].tolist()
                    own = softmax(own, tau)
                    target = softmax(scores.get((n, i, j, z), [0.0] * classes), tau)
                    m = sum(q * math.log((q + 1e-6) / (s + 1e-6)) for q, s in zip(target, own))
                    if m / classes > threshold:
                        kept.append(m / classes)
    return sum(kept) / len(kept) if kept else 0.0


# ------------------------------------------------------------------------------------ worked values


def dense_case(*teachers):
    """A student that is undecided everywhere, in one column of two heights."""
    feat = torch.tensor(teachers, dtype=torch.float32)
    cells = torch.tensor([[0, 0, z] for z in range(len(teachers))])
    student = torch.zeros(1, 4, 1, 1, requires_grad=True)
    return student, dense_logit_kl(student, feat, torch.zeros(len(teachers)).long(), cells)


def test_worked_dense_values():
    for teachers in ((A,), (A, B)):
        _, loss = dense_case(*teachers)
        assert loss.item() == pytest.approx(0.065406, abs=1e-5)
    for teachers in ((B,), ()):
        student, loss = dense_case(*teachers) if teachers else dense_case((0.0, 0.0))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(student.grad, torch.zeros_like(student))
    one = torch.zeros(1).long(), torch.zeros(1, 3).long()
    low = dense_logit_kl(torch.zeros(1, 2, 1, 1), torch.tensor([B]), *one, threshold=0.0)
    assert low.item() == pytest.approx(0.002069, abs=1e-5)


def test_worked_standard_values():
    student, teacher = torch.zeros(2, 2), torch.tensor([A, B])
    for rows, value in ((slice(0, 1), 13.08121), (slice(1, 2), 0.413793), (slice(0, 2), 6.747504)):
        for loss in (
            logit_kl(student[rows], teacher[rows], temperature=10.0),
            voxel_logit_kl(student[rows], teacher[rows], torch.arange(2)[: rows.stop - rows.start], 10.0),
        ):  # fmt: skip
            assert loss.item() == pytest.approx(value, abs=1e-4)
    # In nats A differs by 0.1308 and B by 0.0041: of the two only A is above 0.01.
    for threshold, value in ((0.01, 13.08121), (0.2, 0.0)):
        kept = logit_kl(student, teacher, temperature=10.0, threshold=threshold)
        assert kept.item() == pytest.approx(value, abs=1e-4)
        kept = voxel_logit_kl(student, teacher, torch.arange(2), 10.0, threshold)
        assert kept.item() == pytest.approx(value, abs=1e-4)


def test_worked_voxel_of_two_points():
    """Teachers (.75, .25) and (.25, .75) in one voxel are (.5, .5) on average, which the student has."""
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    student = torch.zeros(2, 2)
    assert voxel_logit_kl(student, teacher, torch.zeros(2).long()).item() == pytest.approx(0, abs=1e-7)  # fmt: skip
    assert logit_kl(student, teacher).item() == pytest.approx(0.130812, abs=1e-5)


# -------------------------------------------------------------------------------- loops, properties


@pytest.mark.parametrize("tau", [0.7, 4.0])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_voxels_equal_loops(tau, threshold):
    student, teacher = torch.randn(2, 50, 6, dtype=DOUBLE) * 3
    voxel = torch.randint(0, 12, (50,)).unique(return_inverse=True)[1]
    loss = voxel_logit_kl(student, teacher, voxel, tau, threshold)
    expected = loop_voxels(student, teacher, voxel, tau, -1.0 if threshold is None else threshold)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    alone = voxel_logit_kl(student, teacher, torch.randperm(50), tau, threshold)
    torch.testing.assert_close(alone, logit_kl(student, teacher, None, tau, threshold))
    order = torch.randperm(50)
    again = voxel_logit_kl(student[order], teacher[order], voxel[order], tau, threshold)
    torch.testing.assert_close(again, loss)


def test_voxels_have_gradients_and_stay_finite():
    student, teacher = torch.randn(2, 9, 3, dtype=DOUBLE).requires_grad_()
    voxel = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 0])
    leaf, guest = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    for threshold in (None, 0.05):
        assert torch.autograd.gradcheck(
            lambda s, t=threshold: voxel_logit_kl(s, guest.detach(), voxel, 2.0, t), leaf
        )
    voxel_logit_kl(leaf, guest, voxel).backward()
    assert guest.grad is None
    hard = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = voxel_logit_kl(hard, torch.tensor([[-1e4, 1e4]]), torch.zeros(1).long())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hard.grad).all()
    for function in (logit_kl, lambda s, t, **k: voxel_logit_kl(s, t, torch.zeros(0).long(), **k)):
        none = torch.zeros(0, 3, requires_grad=True)
        for threshold in (None, 0.1):
            loss = function(none, torch.zeros(0, 3), threshold=threshold)
            loss.backward()
            assert loss.item() == 0


@pytest.mark.parametrize("threshold", [0.0, 0.02])
def test_dense_equals_loops(threshold):
    student = torch.randn(2, 3 * 4, 3, 2, dtype=DOUBLE) * 5
    place = torch.randperm(2 * 3 * 2 * 3)[:14]
    where = torch.stack(torch.unravel_index(place, (2, 3, 2, 3)), 1)
    teacher = torch.randn(14, 4, dtype=DOUBLE) * 5
    arguments = teacher, where[:, 0], where[:, 1:], 4.0, threshold
    loss = dense_logit_kl(student, *arguments)
    expected = loop_dense(student, teacher, where, 4, 4.0, threshold)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dense_logit_kl(s, *arguments), leaf)
    guest = teacher.clone().requires_grad_()
    dense_logit_kl(leaf, guest, *arguments[1:]).backward()
    assert guest.grad is None


def test_dense_nan_is_dropped_with_its_gradient():
    student = torch.zeros(1, 2, 2, 1)
    student[0, :, 1, 0] = math.nan
    student.requires_grad_()
    cells = torch.tensor([[0, 0, 0], [1, 0, 0]])
    loss = dense_logit_kl(student, torch.tensor([A, A]), torch.zeros(2).long(), cells)
    loss.backward()
    assert loss.item() == pytest.approx(0.065406, abs=1e-5)
    assert student.grad.isfinite().all()


# ---------------------------------------------------------------------------------------- the terms


def outputs(student, teacher, cells=None):
    extra = {} if cells is None else dict(cells=cells)
    return Outputs(logits=Activation(student), **extra), Outputs(logits=Activation(teacher))


def test_term_at_the_students_cells():
    student, teacher = torch.randn(2, 30, 4)
    cells, batch = torch.randint(0, 2, (30, 3)), torch.arange(30) // 15
    voxel = torch.cat([batch[:, None], cells], 1).unique(dim=0, return_inverse=True)[1]
    given = outputs(student, teacher, Activation(torch.zeros(30, 9), batch, cells))
    expected = voxel_logit_kl(student, teacher, voxel, 2.0)
    torch.testing.assert_close(LogitKL(2.0, at="cells")(*given, {}), expected)
    own = dict(grid_coord=cells, offset=torch.tensor([15, 30]), segment=torch.randint(-1, 4, (30,)))
    torch.testing.assert_close(LogitKL(2.0, at="cells", cells=None)(*given, own), expected)
    keep = own["segment"] >= 0
    kept = voxel[keep].unique(return_inverse=True)[1]
    masked = LogitKL(2.0, mask_ignored=True, at="cells", threshold=0.1)(*given, own)
    torch.testing.assert_close(masked, voxel_logit_kl(student[keep], teacher[keep], kept, 2.0, 0.1))
    assert LogitKL(at="cells").taps() == ({"cells"}, set())
    assert LogitKL(at="cells", cells=None).taps() == (set(), set())
    assert LogitKL().taps() == (set(), set())
    with pytest.raises(InputError, match="at='voxels' is none of points, cells"):
        LogitKL(at="voxels")
    given[0]["cells"].cells = given[0]["cells"].cells[:7]
    with pytest.raises(InputError, match="30 scores, but the cells of 7 points"):
        LogitKL(at="cells")(*given, {})


def test_shared_classes_are_renormalised():
    student, teacher = torch.randn(6, 4), torch.randn(6, 5)
    term = LogitKL(2.0, classes=([0, 3, 1], [4, 2, 0]))
    loss = term(*outputs(student, teacher), {})
    columns = student[:, [0, 3, 1]], teacher[:, [4, 2, 0]]
    torch.testing.assert_close(loss, logit_kl(*columns, temperature=2.0))
    # A class of the teacher's own takes nothing from the shared ones.
    teacher[:, 1] = 50.0
    torch.testing.assert_close(term(*outputs(student, teacher), {}), loss)
    for classes, says in (
        (([0, 1],), "expected"),
        (([0], [1]), "at least two"),
        (([0, 1], [1, 2, 3]), "two lists of the same classes"),
        (([0, 0], [1, 2]), "stands twice"),
        (([0, -1], [1, 2]), "expected"),
    ):
        with pytest.raises(InputError, match=says):
            LogitKL(classes=classes)
    with pytest.raises(InputError, match="names class 5 of the teacher, which has 5"):
        LogitKL(classes=([0, 1], [4, 5]))(*outputs(student, teacher), {})


@pytest.mark.parametrize(
    "term",
    [
        dict(type="kd.LogitKL", at="cells", temperature=2.0),
        dict(type="kd.LogitKL", at="cells", threshold=0.001, classes=([0, 2], [0, 2])),
        dict(type="kd.DenseLogitKL", **DENSE),
    ],
    ids=str,
)  # fmt: skip
def test_one_step_of_a_pair(term):
    loss, _ = check_one_step(term)
    assert loss > 0


def test_dense_term_equals_loops():
    term = dict(type="kd.DenseLogitKL", **DENSE)
    model = pair(dict(x=term)).train()
    batch = scans(20)
    with model._student_taps.record() as activations:
        model.student(batch)
    voxels = model.teachers["teacher"](batch)["voxels"]
    where = torch.cat([voxels.batch[:, None], voxels.cells], 1)
    expected = loop_dense(activations["dense"].feat, voxels.feat, where, CLASSES, 1.0, 0.01)
    assert model(batch)["loss_x"].item() == pytest.approx(expected, rel=1e-4)


def test_dense_input_that_does_not_fit():
    cells, batch = torch.zeros(1, 3).long(), torch.zeros(1).long()
    with pytest.raises(InputError, match="has 5 channels, which is no multiple of the teacher's 2"):
        dense_logit_kl(torch.zeros(1, 5, 2, 2), torch.zeros(1, 2), batch, cells)
    with pytest.raises(InputError, match=r"reach \(0, 3, 0, 0\), the student's volume is \(1, 2, 2, 3\)"):  # fmt: skip
        dense_logit_kl(torch.zeros(1, 6, 2, 2), torch.zeros(1, 2), batch, torch.tensor([[3, 0, 0]]))
    for function in (
        lambda: dense_logit_kl(torch.zeros(1, 6, 2, 2), torch.zeros(1, 2), batch, cells, 0.0),
        lambda: voxel_logit_kl(torch.zeros(1, 2), torch.zeros(1, 2), batch, -1.0),
    ):
        with pytest.raises(ValueError, match="temperature must be positive"):
            function()
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        DenseLogitKL("x", temperature=0.0)
    level = Outputs(x=Activation(torch.zeros(1, 2), batch, cells))
    with pytest.raises(InputError, match="scores 2 classes, num_classes=20"):
        DenseLogitKL("x")(Outputs(x=Activation(torch.zeros(1, 20, 2, 2))), level, {})
    with pytest.raises(InputError, match=r"needs a map \(b, z \* k, r, p\).*is \(1, 2\)"):
        DenseLogitKL("x", num_classes=2)(level, level, {})
