"""`logit_kl`: hand-worked values, a loop from the formula, properties, gradients."""

import math

import pytest
import torch

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.logits import LogitKL, logit_kl
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError


def loop_kl(student, teacher, valid, tau):
    total, count = 0.0, 0
    for s, t, keep in zip(student.tolist(), teacher.tolist(), valid.tolist()):
        if not keep:
            continue
        zs = math.log(sum(math.exp(v / tau) for v in s))
        zt = math.log(sum(math.exp(v / tau) for v in t))
        for a, b in zip(s, t):
            p = math.exp(b / tau - zt)
            total += p * ((b / tau - zt) - (a / tau - zs))
        count += 1
    return tau**2 * total / count


@pytest.mark.parametrize(("tau", "value"), [(1.0, 0.3278133), (2.0, 0.4437766), (4.0, 0.4847980)])
def test_hand_values(tau, value):
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    assert logit_kl(student, teacher, temperature=tau).item() == pytest.approx(value, rel=1e-6)


def test_worked_rows_of_three_classes():
    student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 3.0]])
    rows = [logit_kl(student[i : i + 1], teacher[i : i + 1]).item() for i in range(2)]
    assert rows == pytest.approx([0.4205124, 1.1395723], abs=1e-6)
    assert logit_kl(student, teacher).item() == pytest.approx(0.7800423, abs=1e-6)


def test_mean_is_over_points_not_classes():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert logit_kl(student, teacher).item() == pytest.approx(0.3949652, rel=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_equals_loops(tau):
    student, teacher = torch.randn(2, 40, 7, dtype=torch.float64)
    valid = torch.rand(40) > 0.3
    expected = loop_kl(student, teacher, valid, tau)
    assert logit_kl(student, teacher, valid, tau).item() == pytest.approx(expected, rel=1e-12)


def test_properties():
    student, teacher = torch.randn(2, 30, 5)
    assert logit_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert logit_kl(student, teacher) > 0
    order = torch.randperm(30)
    torch.testing.assert_close(logit_kl(student[order], teacher[order]), logit_kl(student, teacher))
    shifted = logit_kl(student + 5, teacher - 3)
    torch.testing.assert_close(shifted, logit_kl(student, teacher), rtol=1e-4, atol=1e-6)
    valid = torch.arange(30) < 20
    poisoned = student.clone()
    poisoned[20:] = float("nan")
    torch.testing.assert_close(
        logit_kl(poisoned, teacher, valid), logit_kl(student[:20], teacher[:20])
    )


def test_nothing_valid_is_a_connected_zero():
    student = torch.randn(4, 3, requires_grad=True)
    loss = logit_kl(student, torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(4, 3))


def test_extreme_scores_stay_finite():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = logit_kl(student, torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_gradients():
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda s: logit_kl(s, teacher.detach(), valid, 2.0), student)
    logit_kl(student, teacher, valid).backward()
    assert teacher.grad is None, "no gradient into the teacher"
    assert torch.equal(student.grad[~valid], torch.zeros(2, 4, dtype=torch.float64))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive, got 0.0"):
        logit_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)
    with pytest.raises(InputError, match="temperature must be positive, got -1.0"):
        LogitKL(temperature=-1.0)


def test_term_masks_ignored_labels_only_when_asked():
    student, teacher = torch.randn(2, 3, 4)
    outputs = Outputs(logits=Activation(student)), Outputs(logits=Activation(teacher))
    batch = {"segment": torch.tensor([2, -1, 0])}
    everywhere = LogitKL()(*outputs, batch)
    masked = LogitKL(mask_ignored=True)(*outputs, batch)
    torch.testing.assert_close(everywhere, logit_kl(student, teacher))
    torch.testing.assert_close(masked, logit_kl(student[[0, 2]], teacher[[0, 2]]))


def test_term_refuses_other_classes():
    pair = (
        Outputs(logits=Activation(torch.zeros(3, 4))),
        Outputs(logits=Activation(torch.zeros(3, 5))),
    )
    with pytest.raises(InputError, match=r"student scores are \(3, 4\), teacher scores \(3, 5\)"):
        LogitKL()(*pair, {})
