"""Losses: hand values, loop oracles from the formulas, properties, gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import LOSSES, InputError
from pointcept_kd.host.criteria import (
    BinaryFocalLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    LovaszLoss,
    SmoothCELoss,
    build_criteria,
    jaccard_steps,
)

IGNORE = -1


def points(n=40, k=5, seed=0, ignored=0.25, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=g, dtype=dtype) * 2
    labels = torch.randint(0, k, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = IGNORE
    return logits, labels


def multiclass_losses():
    return {
        "ce": CrossEntropyLoss(),
        "ce weighted": CrossEntropyLoss([1.0, 2.0, 0.5, 3.0, 1.5], label_smoothing=0.1),
        "smooth": SmoothCELoss(),
        "focal": FocalLoss(alpha=[0.2, 0.3, 0.4, 0.5, 0.6]),
        "dice": DiceLoss(),
        "lovasz": LovaszLoss("multiclass", ignore_index=IGNORE),
    }


NAMES = list(multiclass_losses())


# ------------------------------------------------------------------------------------- hand values


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    labels = torch.tensor([1, 0])
    # -log(3/4) and -log(1/2).
    a, b = math.log(4 / 3), math.log(2)
    assert CrossEntropyLoss()(logits, labels).item() == pytest.approx((a + b) / 2)
    assert CrossEntropyLoss(reduction="sum")(logits, labels).item() == pytest.approx(a + b)
    assert CrossEntropyLoss(reduction="none")(logits, labels).tolist() == pytest.approx([a, b])
    assert CrossEntropyLoss([1, 3])(logits, labels).item() == pytest.approx((3 * a + b) / 4)
    assert CrossEntropyLoss(loss_weight=2)(logits, labels).item() == pytest.approx(a + b)


def test_smooth_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(2), 0.0]])
    # Probabilities 1/4, 1/2, 1/4 against targets 0.1, 0.8, 0.1.
    expected = 0.8 * math.log(2) + 0.2 * math.log(4)
    assert SmoothCELoss(0.2)(logits, torch.tensor([1])).item() == pytest.approx(expected)


def test_focal_by_hand():
    logits = torch.tensor([[math.log(3), 0.0]])
    # Positive with p = 3/4, negative with p = 1/2.
    positive = 0.25 * (1 / 4) ** 2 * math.log(4 / 3)
    negative = 0.75 * (1 / 2) ** 2 * math.log(2)
    loss = FocalLoss(gamma=2.0, alpha=0.25)
    assert loss(logits, torch.tensor([0])).item() == pytest.approx((positive + negative) / 2)
    total = FocalLoss(gamma=2.0, alpha=0.25, reduction="sum")
    assert total(logits, torch.tensor([0])).item() == pytest.approx(positive + negative)
    binary = BinaryFocalLoss(gamma=2.0, alpha=0.25)
    assert binary(logits[0], torch.tensor([1.0, 0.0])).item() == pytest.approx(
        (positive + negative) / 2
    )
    single = BinaryFocalLoss(gamma=2.0, alpha=0.25, logits=False, reduce=False)
    found = single(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([positive, negative])


def test_dice_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    # p = (3/4, 1/4), (1/2, 1/2); labels 0 and 1.
    first = 1 - (2 * 0.75 + 1) / (0.75**2 + 0.5**2 + 1 + 1)
    second = 1 - (2 * 0.5 + 1) / (0.25**2 + 0.5**2 + 1 + 1)
    assert DiceLoss()(logits, torch.tensor([0, 1])).item() == pytest.approx((first + second) / 2)
    # A class at the ignored index costs nothing, and the mean still counts it.
    only = DiceLoss(ignore_index=1)(logits, torch.tensor([0, 0]))
    expected = 1 - (2 * (0.75 + 0.5) + 1) / (0.75**2 + 0.5**2 + 2 + 1)
    assert only.item() == pytest.approx(expected / 2)


def test_lovasz_by_hand():
    # One class, errors 0.6 (foreground), 0.5 (background), 0.1 (foreground); foreground count 2.
    # Jaccard losses after 1, 2, 3 wrong: 1/2, 1 - 1/3 = 2/3, 1; steps 1/2, 1/6, 1/3.
    errors = torch.tensor([[0.1, 0.6, 0.5]])
    hot = torch.tensor([[True, True, False]])
    assert jaccard_steps(errors, hot)[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    # Two points of one class with p = 3/4 and 1/2: errors 1/2 and 1/4, steps 1/2 and 1/2.
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    loss = LovaszLoss("multiclass")(logits, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(0.375)


def test_cross_entropy_with_lovasz_on_worked_rows():
    """Four points of three classes, the last one without a label: its scores do not matter."""
    logits = torch.tensor([[0.0, 2, 0], [0, 0, 1], [0, 1, 1], [5, 0, 0]])
    labels = torch.tensor([1, 2, 2, 0])
    both = CrossEntropyLoss(ignore_index=0), LovaszLoss("multiclass", ignore_index=0)
    first = [loss(logits, labels).item() for loss in both]
    assert first == pytest.approx([0.5509948, 0.4092243], abs=1e-6)
    logits[3] = torch.tensor([-7.0, 3, 1])
    assert [loss(logits, labels).item() for loss in both] == first


def test_lovasz_hinge_by_hand():
    # Margins 1 - 0.5 = 0.5 (foreground) and 1 + 1 = 2 (background); steps of the order (2, 0.5):
    # after the background 1 - 1/2, after both 1.
    loss = LovaszLoss("binary")(torch.tensor([0.5, 1.0]), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(2 * 0.5 + 0.5 * 0.5)
    # No foreground: the worst element decides alone.
    loss = LovaszLoss("binary")(torch.tensor([0.5, 1.0, -3.0]), torch.tensor([0, 0, 0]))
    assert loss.item() == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------ oracles


def jaccard_loss(wrong, foreground):
    """1 - |F minus wrong| / |F united with wrong|; 0 of 0 counts as no loss."""
    union = foreground | wrong
    return 1 - len(foreground - wrong) / len(union) if union else 0.0


def lovasz_extension(errors, foreground):
    """Sum of m_i (J(first i) - J(first i - 1)) by descending error, with J from sets."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    total, wrong = 0.0, set()
    for i in order:
        before = jaccard_loss(wrong, foreground)
        wrong = wrong | {i}
        total += errors[i] * (jaccard_loss(wrong, foreground) - before)
    return total


def lovasz_softmax_oracle(logits, labels, classes=None):
    p = logits.softmax(1).tolist()
    rows = [i for i, label in enumerate(labels.tolist()) if label != IGNORE]
    losses = []
    for c in sorted({labels[i].item() for i in rows}):
        if classes is None or c in classes:
            foreground = {j for j, i in enumerate(rows) if labels[i] == c}
            errors = [1 - p[i][c] if j in foreground else p[i][c] for j, i in enumerate(rows)]
            losses.append(lovasz_extension(errors, foreground))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(4))
def test_lovasz_softmax_oracle(seed):
    logits, labels = points(n=60, seed=seed)
    labels[labels == 3] = 2
    loss = LovaszLoss("multiclass", ignore_index=IGNORE)
    expected = lovasz_softmax_oracle(logits, labels)
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    some = LovaszLoss("multiclass", class_seen=(1, 3, 4), ignore_index=IGNORE)
    expected = lovasz_softmax_oracle(logits, labels, (1, 3, 4))
    assert some(logits, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_lovasz_hinge_oracle(mode):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 3, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, 2, (12, 3), generator=g)
    keep = [(x, y) for x, y in zip(logits.flatten().tolist(), labels.flatten().tolist()) if y >= 0]
    margins = [1 - x * (1 if y else -1) for x, y in keep]
    foreground = {i for i, (_, y) in enumerate(keep) if y}
    order = sorted(range(len(keep)), key=lambda i: -margins[i])
    expected, wrong = 0.0, set()
    for i in order:
        step = jaccard_loss(wrong | {i}, foreground) - jaccard_loss(wrong, foreground)
        expected += max(margins[i], 0) * step
        wrong = wrong | {i}
    loss = LovaszLoss(mode, ignore_index=-1)(logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_lovasz_equals_jaccard_at_hard_predictions():
    """At 0/1 errors the extension is the Jaccard loss itself (Berman et al., 2018, section 2.2)."""
    _, labels = points(n=50, ignored=0)
    guess = labels.clone()
    guess[::3] = (guess[::3] + 1) % 5
    logits = F.one_hot(guess, 5).double() * 1000
    expected = 0.0
    for c in range(5):
        inside, outside = guess == c, labels == c
        expected += 1 - (inside & outside).sum().item() / (inside | outside).sum().item()
    loss = LovaszLoss("multiclass")(logits, labels)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-9)


def test_jaccard_steps_sum_to_one_and_keep_precision():
    g = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 50_000, generator=g)
    hot = torch.rand(3, 50_000, generator=g) < torch.tensor([[0.5], [0.01], [0.0]])
    steps = jaccard_steps(errors, hot)
    exact = jaccard_steps(errors.double(), hot)
    torch.testing.assert_close(steps.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.sum(1), torch.ones(3, dtype=torch.float64))
    assert (steps >= 0).all()


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 3.0, 1.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(weight, smoothing, reduction):
    logits, labels = points()
    factors = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = F.cross_entropy(
        logits, labels, factors, ignore_index=IGNORE, reduction=reduction, label_smoothing=smoothing
    )
    loss = CrossEntropyLoss(weight, reduction, smoothing)
    torch.testing.assert_close(loss(logits, labels), expected)


def test_smooth_cross_entropy_oracle():
    logits, labels = points()
    log_p = logits.log_softmax(1)
    terms = []
    for row, label in zip(log_p, labels.tolist()):
        if label != IGNORE:
            target = [0.9 if c == label else 0.1 / 4 for c in range(5)]
            terms.append(-sum(t * x.item() for t, x in zip(target, row)))
    expected = sum(terms) / len(terms)
    assert SmoothCELoss(0.1)(logits, labels).item() == pytest.approx(expected)


def test_focal_and_dice_oracles():
    logits, labels = points()
    alpha = [0.2, 0.3, 0.4, 0.5, 0.6]
    terms, overlap, size = [], np.ones(5), np.ones(5)
    for row, label in zip(logits, labels.tolist()):
        if label == IGNORE:
            continue
        p_soft = row.softmax(0).tolist()
        for c in range(5):
            p = 1 / (1 + math.exp(-row[c].item()))
            p_t, a_t = (p, alpha[c]) if c == label else (1 - p, 1 - alpha[c])
            terms.append(-a_t * (1 - p_t) ** 1.5 * math.log(p_t))
            overlap[c] += 2 * p_soft[c] * (c == label)
            size[c] += p_soft[c] ** 3 + (c == label)
    focal = FocalLoss(gamma=1.5, alpha=alpha)(logits, labels)
    # The class weights are kept in float32.
    assert focal.item() == pytest.approx(np.mean(terms), rel=1e-6)
    dice = DiceLoss(exponent=3.0)(logits, labels)
    assert dice.item() == pytest.approx(np.mean(1 - overlap / size))


# --------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    loss = multiclass_losses()[name]
    logits, labels = points(n=9)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


def test_gradcheck_of_binary_losses():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (9,), generator=g)
    for loss in (LovaszLoss("binary"), BinaryFocalLoss()):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels), logits)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_points_do_not_matter(name):
    loss = multiclass_losses()[name]
    logits, labels = points()
    changed = logits.clone()
    changed[labels == IGNORE] = 77.0
    torch.testing.assert_close(loss(changed, labels), loss(logits, labels))
    keep = labels != IGNORE
    torch.testing.assert_close(loss(logits[keep], labels[keep]), loss(logits, labels))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, labels), logits)
    assert (grad[~keep] == 0).all()
    assert (grad[keep] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_point_order_does_not_matter(name):
    loss = multiclass_losses()[name]
    logits, labels = points()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss(logits[order], labels[order]), loss(logits, labels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 7])
def test_nothing_labelled(name, n):
    loss = multiclass_losses()[name]
    logits = torch.randn(n, 5, requires_grad=True)
    value = loss(logits, torch.full((n,), IGNORE))
    assert value.item() == 0
    assert value.shape == ()
    value.backward()
    assert (logits.grad == 0).all()
    total = build_criteria(
        [dict(type="CrossEntropyLoss"), dict(type="LovaszLoss", mode="multiclass", ignore_index=-1)]
    )
    assert total(logits, torch.full((n,), IGNORE)).item() == 0


def test_nothing_labelled_binary():
    logits = torch.randn(4, requires_grad=True)
    value = LovaszLoss("binary", ignore_index=255)(logits, torch.full((4,), 255))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_dense_grids_are_rows(name):
    loss = multiclass_losses()[name]
    logits, labels = points(n=24)
    dense = logits.reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(loss(dense, labels.reshape(2, 3, 4)), loss(logits, labels))


def test_lovasz_per_image():
    logits, labels = points(n=24)
    dense, grid = logits.reshape(2, 12, 5).transpose(1, 2), labels.reshape(2, 12)
    loss = LovaszLoss("multiclass", ignore_index=IGNORE, per_image=True)
    plain = LovaszLoss("multiclass", ignore_index=IGNORE)
    expected = (plain(logits[:12], labels[:12]) + plain(logits[12:], labels[12:])) / 2
    torch.testing.assert_close(loss(dense, grid), expected)
    with pytest.raises(ValueError, match="points have no images"):
        loss(logits, labels)


@pytest.mark.parametrize("name", NAMES)
def test_float32_under_autocast(name):
    loss = multiclass_losses()[name]
    logits, labels = points(dtype=torch.float32)
    expected = loss(logits.bfloat16().float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_perfect_predictions_cost_nothing():
    labels = torch.arange(5)
    logits = (F.one_hot(labels, 5) * 2 - 1) * 100.0
    for name, loss in multiclass_losses().items():
        if name not in ("ce weighted", "smooth"):  # these pull away from certainty
            assert loss(logits, labels).item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------ building


def test_build_criteria():
    criteria = build_criteria(
        [
            dict(type="CrossEntropyLoss", weight=[1, 2, 3, 4, 5], loss_weight=2.0, ignore_index=-1),
            dict(type="kd.LovaszLoss", mode="multiclass", loss_weight=0.5, ignore_index=-1),
        ]
    )
    logits, labels = points(dtype=torch.float32)
    expected = sum(loss(logits, labels) for loss in criteria.losses)
    torch.testing.assert_close(criteria(logits, labels), expected)
    assert criteria.state_dict() == {}
    assert criteria.losses[0].weight.device == logits.device
    # The weights move with the module although the state dict does not hold them.
    assert criteria.to("meta").losses[0].weight.device.type == "meta"


@pytest.mark.parametrize("empty", [None, [], ()])
def test_no_criteria_pass_predictions_through(empty):
    pred = object()
    assert build_criteria(empty)(pred, None) is pred


def test_registered_under_both_names():
    for name in [
        "CrossEntropyLoss",
        "SmoothCELoss",
        "BinaryFocalLoss",
        "FocalLoss",
        "DiceLoss",
        "LovaszLoss",
    ]:
        assert LOSSES.get(name) is LOSSES.get(f"kd.{name}") is not None


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (dict(type="CrossEntropyLoss"), "must be a list of dicts"),
        ([dict(type="LovaszLoss")], "needs 'mode'"),
        ([dict(type="LovaszLoss", mode="multi")], "mode='multi' must be"),
        ([dict(type="CrossEntropyLoss", reduction="avg")], "reduction='avg' must be"),
        ([dict(type="FocalLoss", alpha=1.0)], "alpha=1.0 must lie between"),
        ([dict(type="FocalLoss", alpha=[0.5, 2.0])], "alpha=2.0 must lie between"),
        ([dict(type="CrosEntropyLoss")], "nearest: CrossEntropyLoss"),
    ],
)
def test_bad_criteria(cfg, text):
    with pytest.raises(InputError, match=text):
        build_criteria(cfg)


def test_shapes_that_do_not_fit():
    logits, labels = points()
    with pytest.raises(InputError, match="weight has 3 entries, the logits have 5 classes"):
        CrossEntropyLoss([1, 2, 3])(logits, labels)
    with pytest.raises(ValueError, match="do not belong together"):
        LovaszLoss("multiclass")(logits, labels[:-1])
    with pytest.raises(ValueError, match="as many elements"):
        LovaszLoss("binary")(logits, labels)
