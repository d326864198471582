"""Confusion counts and both class means against plain loops."""

import pytest
import torch

from pointcept_kd.host import InputError
from pointcept_kd.host.metrics import class_names, confusion, ious, summary


def by_loops(pred, target, classes, ignore):
    counts = [[0] * classes for _ in range(classes)]
    for p, t in zip(pred.tolist(), target.tolist()):
        if t != ignore:
            counts[t][p] += 1
    return counts


@pytest.mark.parametrize("ignore", [-1, 255, 2])
def test_confusion_against_loops(ignore):
    pred, target = torch.randint(0, 5, (300,)), torch.randint(0, 5, (300,))
    target[::7] = ignore
    assert confusion(pred, target, 5, ignore).tolist() == by_loops(pred, target, 5, ignore)


def test_scores_against_loops():
    pred, target = torch.randint(0, 4, (200,)), torch.randint(0, 3, (200,))
    pred[pred == 3] = 1  # class 3 occurs nowhere, class 4 in predictions alone
    pred[0] = 4
    counts = by_loops(pred, target, 5, -1)
    iou, acc, present = [], [], []
    for c in range(5):
        hit = counts[c][c]
        union = sum(counts[c]) + sum(row[c] for row in counts) - hit
        iou.append(hit / union if union else 0.0)
        acc.append(hit / sum(counts[c]) if sum(counts[c]) else 0.0)
        present.append(union > 0)
    scores = summary(confusion(pred, target, 5))
    assert scores.iou == pytest.approx(iou)
    assert scores.acc == pytest.approx(acc)
    assert scores.present == present == [True, True, True, False, True]
    assert scores.miou == pytest.approx(sum(iou) / 5)
    assert scores.miou_present == pytest.approx(sum(iou) / 4)
    assert scores.macc == pytest.approx(sum(acc) / 5)
    assert scores.all_acc == pytest.approx(sum(counts[c][c] for c in range(5)) / 200)
    assert scores.points == 200


def test_hand_value():
    # class 0: 1 of 2 found, one of class 1 taken for it: IoU 1/3; class 1: 1 hit, union 3: 1/3; class 2 absent.
    matrix = confusion(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), 3)
    scores = summary(matrix)
    assert scores.miou == pytest.approx(2 / 9)
    assert scores.miou_present == pytest.approx(1 / 3)
    assert scores.headline == "0.2222/0.3333/0.5000"
    assert "all 3 classes, absent = 0; present classes only (2): mIoU 0.3333" in scores.protocol(
        "here"
    )


def test_joined_equals_summed():
    pred, target = torch.randint(0, 4, (100,)), torch.randint(-1, 4, (100,))
    parts = confusion(pred[:37], target[:37], 4) + confusion(pred[37:], target[37:], 4)
    assert torch.equal(parts, confusion(pred, target, 4))


def test_nothing_labelled_is_zero_not_nan():
    matrix = confusion(torch.tensor([1, 2]), torch.tensor([-1, -1]), 3)
    scores = summary(matrix)
    assert (scores.miou, scores.miou_present, scores.all_acc, scores.points) == (0.0, 0.0, 0.0, 0)
    assert not ious(matrix)[1].any()


@pytest.mark.parametrize(
    ("pred", "target", "text"),
    [
        ([0, 1], [0, 7], "label 7 is outside 0..2.*num_classes"),
        ([0, 1], [0, -2], "label -2"),
        ([5, 1], [0, 1], "prediction 5"),
        ([0, 1, 1], [0, 1], "3 predictions meet 2 labels"),
    ],
)
def test_bad_input(pred, target, text):
    with pytest.raises(InputError, match=text):
        confusion(torch.tensor(pred), torch.tensor(target), 3)


def test_class_names():
    assert class_names({"num_classes": 2}) == ["class 0", "class 1"]
    assert class_names({"num_classes": 1, "names": ["road"]}) == ["road"]
    with pytest.raises(InputError, match="names has 1 entries, data.num_classes is 2"):
        class_names({"num_classes": 2, "names": ["road"]})
