"""Feature terms: values by hand, loops from the formulas, alignment by cell, adapters."""

import math

import pytest
import torch

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.features import FeatureMatch, feature_cosine, feature_mse
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError


def loop_mse(student, teacher, valid):
    values = [
        sum((a - b) ** 2 for a, b in zip(s, t)) / len(s)
        for s, t, keep in zip(student.tolist(), teacher.tolist(), valid.tolist())
        if keep
    ]
    return sum(values) / len(values)


def loop_cosine(student, teacher, valid):
    values = []
    for s, t, keep in zip(student.tolist(), teacher.tolist(), valid.tolist()):
        if keep:
            dot = sum(a * b for a, b in zip(s, t))
            norms = math.sqrt(sum(a * a for a in s)) * math.sqrt(sum(b * b for b in t))
            values.append(1 - dot / norms)
    return sum(values) / len(values)


def test_hand_values():
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[0.0, 2.0], [6.0, 8.0]])
    assert feature_mse(student, teacher).item() == pytest.approx((1 + 4 + 9 + 16) / 4)
    assert feature_cosine(student, teacher).item() == pytest.approx(0.5)
    first = torch.tensor([True, False])
    assert feature_mse(student, teacher, first).item() == pytest.approx(2.5)
    assert feature_cosine(student, teacher, first).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("loss", "loop"), [(feature_mse, loop_mse), (feature_cosine, loop_cosine)])
def test_equals_loops_and_properties(loss, loop):
    student, teacher = torch.randn(2, 25, 6, dtype=torch.float64)
    valid = torch.rand(25) > 0.4
    assert loss(student, teacher, valid).item() == pytest.approx(loop(student, teacher, valid))
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    order = torch.randperm(25)
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    leaf = student.clone().requires_grad_()
    guest = teacher.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid), leaf)
    loss(leaf, guest).backward()
    assert guest.grad is None
    empty = loss(leaf, teacher, torch.zeros(25, dtype=torch.bool))
    assert empty.item() == 0
    assert empty.requires_grad


def test_cosine_of_a_zero_row_is_one_with_finite_gradient():
    student = torch.zeros(1, 3, requires_grad=True)
    loss = feature_cosine(student, torch.ones(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert torch.isfinite(student.grad).all()


def cells(*rows):
    return torch.tensor(rows)


def test_rows_are_matched_by_cell_not_by_position():
    where = cells((0, 0, 0), (0, 0, 1), (1, 0, 0))
    feat = torch.randn(3, 4)
    order = torch.tensor([2, 0, 1])
    batch = torch.zeros(3, dtype=torch.long)
    teacher = Activation(feat, batch, where)
    student = Activation(feat[order], batch, where[order])
    assert FeatureMatch("x")(Outputs(x=student), Outputs(x=teacher), {}).item() == 0
    moved = Activation(feat, batch, where + torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="cover different cells"):
        FeatureMatch("x")(Outputs(x=student), Outputs(x=moved), {})


def test_adapter_and_normalisation():
    term = FeatureMatch("x", "y", channels=(4, 6), normalize=True)
    student, teacher = torch.randn(5, 4), torch.randn(5, 6) * 100 + 7
    loss = term(Outputs(x=Activation(student)), Outputs(y=Activation(teacher)), {})
    target = (teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, unbiased=False)[:, None]
    expected = feature_mse(student @ term.adapter.weight.T + term.adapter.bias, target)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert term.taps() == ({"x"}, {"y"})
    assert {name for name, _ in term.named_parameters()} == {"adapter.weight", "adapter.bias"}


def test_widths_that_do_not_fit_say_what_to_set():
    pair = Outputs(x=Activation(torch.zeros(3, 4))), Outputs(x=Activation(torch.zeros(3, 6)))
    with pytest.raises(InputError, match=r"set channels=\(4, 6\)"):
        FeatureMatch("x")(*pair, {})
    with pytest.raises(InputError, match="has 4 channels, channels says 5"):
        FeatureMatch("x", channels=(5, 6))(*pair, {})
    with pytest.raises(InputError, match="'l1' is none of"):
        FeatureMatch("x", distance="l1")
