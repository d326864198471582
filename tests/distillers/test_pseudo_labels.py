"""Pseudo-labels: which points get one, and the loss they lead to."""

import math

import pytest
import torch

from pointcept_kd.distillers.base import Outputs
from pointcept_kd.distillers.pseudo_labels import PseudoLabels, pseudo_labels
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError

CE = dict(type="CrossEntropyLoss", ignore_index=-1)
LOVASZ = dict(type="LovaszLoss", mode="multiclass", ignore_index=-1)


def loop(teacher, segment, confidence):
    labels = []
    for scores, label in zip(teacher.tolist(), segment.tolist()):
        total = sum(math.exp(v) for v in scores)
        best = max(range(len(scores)), key=lambda k: scores[k])
        sure = math.exp(scores[best]) / total >= confidence
        labels.append(best if label == -1 and sure else -1)
    return labels


def outputs(scores):
    return Outputs(logits=Activation(scores))


def test_hand_value():
    teacher = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.1], [5.0, 0.0]])
    segment = torch.tensor([-1, -1, -1, 1])
    # Probabilities 0.88, 0.95, 0.52; the last point is labelled.
    assert pseudo_labels(teacher, segment).tolist() == [1, 0, 1, -1]
    assert pseudo_labels(teacher, segment, 0.6).tolist() == [1, 0, -1, -1]
    assert pseudo_labels(teacher, segment, 0.9).tolist() == [-1, 0, -1, -1]
    student = torch.zeros(4, 2)
    loss = PseudoLabels([CE])(outputs(student), outputs(teacher), {"segment": segment})
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.7, 1.0])
def test_equals_loops(confidence):
    teacher = torch.randn(200, 5, dtype=torch.float64) * 2
    segment = torch.randint(-1, 1, (200,))
    assert pseudo_labels(teacher, segment, confidence).tolist() == loop(
        teacher, segment, confidence
    )


def test_the_loss_is_the_criteria_on_unlabelled_points_alone():
    student, teacher = torch.randn(2, 40, 4)
    segment = torch.randint(-1, 4, (40,))
    segment[0] = -1
    term = PseudoLabels([CE, LOVASZ])
    loss = term(outputs(student), outputs(teacher), {"segment": segment})
    free = segment == -1
    expected = term.criteria(student[free], teacher[free].argmax(1))
    torch.testing.assert_close(loss, expected)
    order = torch.randperm(40)
    again = term(outputs(student[order]), outputs(teacher[order]), {"segment": segment[order]})
    torch.testing.assert_close(again, loss)


def test_gradient_reaches_the_student_only():
    student = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    segment = torch.tensor([-1, 0] * 6)
    term = PseudoLabels([CE])
    batch = {"segment": segment}
    assert torch.autograd.gradcheck(
        lambda s: term(outputs(s), outputs(teacher.detach()), batch), student
    )
    term(outputs(student), outputs(teacher), batch).backward()
    assert teacher.grad is None
    assert (student.grad[1::2] == 0).all()
    assert (student.grad[::2] != 0).any()


def test_all_labelled_is_a_connected_zero():
    student = torch.randn(5, 3, requires_grad=True)
    batch = {"segment": torch.zeros(5, dtype=torch.long)}
    loss = PseudoLabels([CE, LOVASZ])(outputs(student), outputs(torch.randn(5, 3)), batch)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(5, 3))


def test_a_score_that_is_no_number_gives_no_label():
    teacher = torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])
    assert pseudo_labels(teacher, torch.tensor([-1, -1])).tolist() == [-1, 0]


def test_bad_arguments():
    with pytest.raises(InputError, match="criteria is empty"):
        PseudoLabels([])
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.5"):
        PseudoLabels([CE], confidence=1.5)
