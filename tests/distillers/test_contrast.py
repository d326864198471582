"""Contrastive losses: worked values, plain loops, blocks, half precision, several processes; and the draw of pairs."""

import math
import multiprocessing
import sys
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist

from pointcept_kd.distillers import contrast
from pointcept_kd.distillers.contrast import (
    class_contrast,
    cosine_regression,
    draw_pairs,
    draw_weighted_pairs,
    mean_log_positives,
    pair_infonce,
    pair_weights,
    range_density,
    superpixel_infonce,
    superpixel_means,
)
from pointcept_kd.host import InputError, comm, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch

DOUBLE = torch.float64
POINTS = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=DOUBLE)
PIXELS = torch.tensor([[0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]], dtype=DOUBLE)
LABELS = torch.tensor([2, 2, 5])
PATCHES = torch.tensor([[[0, 0, 1, 1], [0, 2, 2, 1]]])
PATCH_FEATURES = torch.tensor(
    [
        [[1, 0], [0, 1], [1, 0], [0.6, 0.8]],
        [[0.8, 0.6], [0, 1], [0, 1], [1, 0]],
    ],
    dtype=DOUBLE,
).permute(2, 0, 1)[None]
PATCH_PAIRS = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 3]])
PATCH_POINTS = torch.tensor([[1, 0], [0, 1], [0, 1], [0.6, 0.8]], dtype=DOUBLE)


def unit(n, c=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, c, generator=made, dtype=DOUBLE), dim=1)


def loop_rows(points, pixels, labels, tau, mean=False):
    """Rows of the class loss; with labels all different, of the pair loss."""
    rows = []
    for f, y in zip(points.tolist(), labels.tolist()):
        e = [math.exp(sum(a * b for a, b in zip(f, p)) / tau) for p in pixels.tolist()]
        positives = [v for v, other in zip(e, labels.tolist()) if other == y]
        above = math.fsum(positives) / (len(positives) if mean else 1)
        rows.append(-math.log(above / math.fsum(e)))
    return rows


@pytest.mark.parametrize(
    ("tau", "rows", "mean"),
    [
        (1.0, (0.725289, 0.895084, 1.036287), 0.885553),
        (0.07, (0.055844, 0.447728, 0.721459), 0.408343),
    ],
)
def test_pairs_by_hand(tau, rows, mean):
    assert loop_rows(POINTS, PIXELS, torch.arange(3), tau) == pytest.approx(rows, abs=1e-6)
    assert pair_infonce(POINTS, PIXELS, tau).item() == pytest.approx(mean, abs=1e-6)
    assert pair_infonce(POINTS.float(), PIXELS.float(), tau).item() == pytest.approx(mean, abs=2e-6)


def test_classes_by_hand():
    rows = loop_rows(POINTS, PIXELS, LABELS, 1.0)
    assert rows == pytest.approx((0.127150, 0.221737, 1.036287), abs=1e-6)
    loss = partial(class_contrast, POINTS, PIXELS, LABELS)
    assert loss(1.0).item() == pytest.approx(0.461725, abs=1e-6)
    assert loss(1.0, "mean").item() == pytest.approx(0.923823, abs=1e-6)
    assert loss(0.07).item() == pytest.approx(0.240494, abs=1e-6)
    assert loss(0.07, "mean").item() == pytest.approx(0.702592, abs=1e-6)
    # The mean outside of the logarithm, 0.925553, is another loss.
    assert abs(loss(1.0, "mean").item() - 0.925553) > 1e-3
    assert mean_log_positives(LABELS).item() == pytest.approx(2 / 3 * math.log(2))


@pytest.mark.parametrize("tau", [1.0, 0.07])
def test_both_forms_have_one_gradient(tau):
    labels = torch.tensor([0, 3, 3, 0, 1, 3, 0, 0])
    features = unit(8).requires_grad_(), unit(8, seed=1).requires_grad_()
    code, paper = (class_contrast(*features, labels, tau, form) for form in contrast.FORMS)
    assert (paper - code).item() == pytest.approx(mean_log_positives(labels).item(), abs=1e-6)
    for a, b in zip(torch.autograd.grad(code, features), torch.autograd.grad(paper, features)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [2**24, 30, 1])
@pytest.mark.parametrize("tau", [1.0, 0.07])
def test_losses_are_the_loops_in_blocks_of_any_size(monkeypatch, block, tau):
    monkeypatch.setattr(contrast, "_BLOCK", block)
    points, pixels = unit(11).requires_grad_(), unit(11, seed=1).requires_grad_()
    labels = torch.arange(11) % 3
    cases = {
        partial(pair_infonce, temperature=tau): (torch.arange(11), False),
        partial(class_contrast, labels=labels, temperature=tau): (labels, False),
        partial(class_contrast, labels=labels, temperature=tau, form="mean"): (labels, True),
    }
    for loss, (own, mean) in cases.items():
        expected = sum(loop_rows(points, pixels, own, tau, mean)) / 11
        assert loss(points, pixels).item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.gradcheck(loss, (points, pixels))


def test_all_labels_different_is_the_pair_loss():
    pair = pair_infonce(unit(9), unit(9, seed=1))
    torch.testing.assert_close(class_contrast(unit(9), unit(9, seed=1), torch.arange(9)), pair)
    shuffled = torch.randperm(9)
    torch.testing.assert_close(pair_infonce(unit(9)[shuffled], unit(9, seed=1)[shuffled]), pair)
    one = class_contrast(unit(9), unit(9, seed=1), torch.ones(9, dtype=torch.uint8))
    assert one.item() == pytest.approx(0, abs=1e-12)
    same = torch.ones(50, 4)
    assert pair_infonce(same, same).item() == pytest.approx(math.log(50))


def test_ignored_pairs_are_as_if_they_were_not_there():
    labels = torch.tensor([0, 2, 0, 2, 1, 0], dtype=torch.uint8)
    points, pixels = unit(6).requires_grad_(), unit(6, seed=1)
    kept = labels != 0
    loss = class_contrast(points, pixels, labels, ignore=0)
    torch.testing.assert_close(loss, class_contrast(points[kept], pixels[kept], labels[kept]))
    (grad,) = torch.autograd.grad(loss, points)
    assert grad[~kept].eq(0).all()
    assert class_contrast(points, pixels, labels).item() != pytest.approx(loss.item())
    assert mean_log_positives(labels, 0).item() == pytest.approx(2 / 3 * math.log(2))
    nothing = class_contrast(points, pixels, torch.zeros(6, dtype=torch.int64), ignore=0)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, points)[0].eq(0).all()
    assert mean_log_positives(torch.zeros(6, dtype=torch.int64), 0).item() == 0


def test_half_precision_features_give_full_precision_losses():
    points = torch.ones(4096, 1, dtype=torch.float16, requires_grad=True)
    labels = torch.arange(4096) % 5
    with torch.autocast("cpu", torch.bfloat16):
        pair = pair_infonce(points, points.detach())
        by_class = class_contrast(points, points.detach(), labels)
    assert pair.dtype == by_class.dtype == torch.float32
    assert pair.item() == pytest.approx(math.log(4096), rel=1e-5)
    assert by_class.item() == pytest.approx(math.log(5), rel=1e-3)
    # Products under autocast would be off by parts in a hundred.
    a, b = unit(64, 64).float(), unit(64, 64, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = pair_infonce(a, b)
    assert torch.equal(low, pair_infonce(a, b))


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_large_logits_stay_finite(scale):
    points = (unit(40).float() * scale).requires_grad_()
    pixels = unit(40, seed=1).float() * scale
    for loss in (
        pair_infonce(points, pixels),
        class_contrast(points, pixels, torch.arange(40) % 2),
    ):
        (grad,) = torch.autograd.grad(loss, points)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_few_pairs():
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (
        pair_infonce(empty, empty),
        class_contrast(empty, empty, torch.zeros(0, dtype=torch.int64)),
        cosine_regression(empty, empty),
    ):
        assert loss.item() == 0
        assert loss.requires_grad
    features = [torch.zeros(0, 4, requires_grad=True) for _ in range(2)]
    assert all(len(grad) == 0 for grad in torch.autograd.grad(pair_infonce(*features), features))
    one = unit(1).requires_grad_()
    loss = pair_infonce(one, unit(1, seed=1))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, one)[0].eq(0).all()


def test_superpixels_by_hand():
    arguments = PATCH_POINTS, PATCH_PAIRS, PATCH_FEATURES, PATCHES
    k, q, kept = superpixel_means(*arguments, per_image=150)
    assert kept.tolist() == [0, 1]
    assert k.tolist() == pytest.approx(
        torch.tensor([[0.5, 0.5], [0.3, 0.9]]).double().numpy(), abs=2e-6
    )
    expected = torch.tensor([[0.6, 0.533333], [0.866667, 0.266667]], dtype=DOUBLE)
    torch.testing.assert_close(q, expected, rtol=0, atol=2e-6)
    for tau, value in ((1.0, 0.734745), (0.07, 1.537858)):
        loss = superpixel_infonce(*arguments, temperature=tau)
        assert loss.item() == pytest.approx(value, abs=1e-5)


def loop_superpixels(points, pairs, pixels, segments):
    """Superpixel (image, number) to the means of its points and of its pixels."""
    of_points, of_pixels = {}, {}
    for f, (i, r, c) in zip(points, pairs.tolist()):
        of_points.setdefault((i, int(segments[i, r, c])), []).append(f)
    for i, r, c in torch.cartesian_prod(*(torch.arange(n) for n in segments.shape)).tolist():
        of_pixels.setdefault((i, int(segments[i, r, c])), []).append(pixels[i, :, r, c])
    means = {}
    for key in sorted(of_points):
        f, p = of_points[key], of_pixels[key]
        means[key] = sum(f) / (len(f) + 1e-6), sum(p) / (len(p) + 1e-6)
    return means


def superpixel_case(pairs=9):
    made = torch.Generator().manual_seed(3)
    segments = torch.randint(5, (3, 4, 6), generator=made)
    pixels = torch.randn(3, 2, 4, 6, generator=made, dtype=DOUBLE)
    pair_pixel = torch.stack(
        [torch.randint(n, (pairs,), generator=made) for n in segments.shape], 1
    )
    points = torch.randn(pairs, 2, generator=made, dtype=DOUBLE)
    points[:, 0] = 0  # a first channel of 0 says nothing about emptiness
    return points, pair_pixel, pixels, segments


def test_superpixels_are_the_loops():
    points, pair_pixel, pixels, segments = superpixel_case()
    means = loop_superpixels(points, pair_pixel, pixels, segments)
    got = superpixel_means(points, pair_pixel, pixels, segments.to(torch.uint8), per_image=7)
    assert got[2].tolist() == [image * 7 + number for image, number in means]
    torch.testing.assert_close(got[0], torch.stack([k for k, _ in means.values()]))
    torch.testing.assert_close(got[1], torch.stack([q for _, q in means.values()]))
    expected = pair_infonce(*(torch.stack(part) for part in zip(*means.values())), 0.3)
    settings = dict(per_image=7, temperature=0.3)
    loss = partial(superpixel_infonce, segments=segments, pair_pixel=pair_pixel, **settings)
    torch.testing.assert_close(loss(points, pixels=pixels), expected)
    assert torch.autograd.gradcheck(
        lambda f, p: loss(f, pixels=p), (points.requires_grad_(), pixels.requires_grad_())
    )


def test_superpixels_without_pairs():
    points, pair_pixel, pixels, segments = superpixel_case(0)
    features = points.requires_grad_(), pixels.requires_grad_()
    loss = superpixel_infonce(points, pair_pixel, pixels, segments)
    assert loss.item() == 0
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, features))


def test_superpixels_must_fit():
    points, pair_pixel, pixels, segments = superpixel_case()
    with pytest.raises(InputError, match=r"are 0 \.\. 3; found 0 \.\. 4"):
        superpixel_means(points, pair_pixel, pixels, segments, 4)
    with pytest.raises(InputError, match="do not fit pixel features"):
        superpixel_means(points, pair_pixel, pixels, segments[:, :3])
    with pytest.raises(InputError, match="lies outside of the images"):
        superpixel_means(points, pair_pixel - 4, pixels, segments)
    with pytest.raises(InputError, match="8 pixels for 9 points"):
        superpixel_means(points, pair_pixel[:8], pixels, segments)


def test_regression_by_hand_and_by_loop():
    points = torch.tensor([[2.0, 0], [0, 3], [1, 0], [0, 0]], requires_grad=True)
    targets = torch.tensor([[0.0, 5], [0, 1], [-4, 0], [1, 1]])
    assert cosine_regression(points, targets).item() == pytest.approx((2**0.5 + 0 + 2) / 3)
    loss = cosine_regression(points, targets, "cosine")
    assert loss.item() == pytest.approx((1 + 0 + 2) / 3)
    for distance in contrast.DISTANCES:
        (grad,) = torch.autograd.grad(cosine_regression(points, targets, distance), points)
        assert grad.isfinite().all()
        assert grad[1].tolist() == grad[3].tolist() == [0, 0]
    f, t = unit(12), 3 * unit(12, seed=1)
    cosines = [
        sum(a * b for a, b in zip(x, y)) / math.hypot(*x) / math.hypot(*y)
        for x, y in zip((7 * f).tolist(), t.tolist())
    ]
    f = (7 * f).requires_grad_()
    root = sum(math.sqrt(2 - 2 * c) for c in cosines) / 12
    assert cosine_regression(f, t).item() == pytest.approx(root)
    assert cosine_regression(f, t, "cosine").item() == pytest.approx(1 - sum(cosines) / 12)
    for distance in contrast.DISTANCES:
        assert torch.autograd.gradcheck(lambda f, d=distance: cosine_regression(f, t, d), f)
        torch.testing.assert_close(
            cosine_regression(0.1 * f, 9 * t, distance), cosine_regression(f, t, distance)
        )


def test_regression_takes_targets_as_constants():
    target = unit(5).requires_grad_()
    cosine_regression(unit(5, seed=1).requires_grad_(), target).backward()
    assert target.grad is None
    nothing = torch.zeros(5, 6, requires_grad=True)
    loss = cosine_regression(nothing, target)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, nothing)[0].eq(0).all()


RANGES, CLASSES = torch.tensor([10, 10, 20, 50]), torch.tensor([1, 1, 1, 2])


def test_weights_by_hand():
    assert RANGES.double().std().item() == pytest.approx(18.929695, abs=1e-6)
    density = range_density(RANGES).tolist()
    assert density == pytest.approx((0.0186068, 0.0186068, 0.0180622, 0.0079080), abs=1e-7)
    expected = {
        "dcas": (0.0991187, 0.0991187, 0.1021074, 0.6996551),
        "density": (0.1857676, 0.1857676, 0.1913689, 0.4370960),
        "category": (1 / 6, 1 / 6, 1 / 6, 1 / 2),
        "uniform": (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    }
    assert set(expected) == set(contrast.SAMPLERS)
    for sampler, values in expected.items():
        weights = pair_weights(RANGES, CLASSES, sampler)
        assert weights.tolist() == pytest.approx(values, abs=1e-7)


def loop_density(ranges):
    m = len(ranges)
    mean = math.fsum(ranges) / m
    sigma = math.sqrt(math.fsum((r - mean) ** 2 for r in ranges) / (m - 1))
    b = 1.06 * sigma * m**-0.2
    return [
        math.fsum(math.exp(-((r - s) ** 2) / (2 * b * b)) for s in ranges)
        / (m * b * math.sqrt(2 * math.pi))
        for r in ranges
    ]


@pytest.mark.parametrize("block", [2**24, 40])
def test_density_is_the_loop(monkeypatch, block):
    monkeypatch.setattr(contrast, "_BLOCK", block)
    ranges = (torch.rand(60) ** 2 * 50).round()
    assert range_density(ranges).tolist() == pytest.approx(loop_density(ranges.tolist()))
    # Of a scaled range, scaled: the draw does not depend on the unit.
    torch.testing.assert_close(range_density(ranges * 10) * 10, range_density(ranges))


def test_density_of_one_value():
    peak = 1 / math.sqrt(2 * math.pi)
    assert range_density(torch.tensor([7, 7, 7])).tolist() == pytest.approx([peak] * 3)
    assert range_density(torch.tensor([7.5])).tolist() == pytest.approx([peak])
    assert range_density(torch.zeros(0)).shape == (0,)
    with pytest.raises(InputError, match="not finite"):
        range_density(torch.tensor([1.0, float("nan")]))


def test_ignored_pairs_are_not_drawn_and_shape_nothing():
    labels = torch.tensor([0, 1, 1, 0, 1, 2])
    ranges = torch.tensor([3, 10, 10, 900, 20, 50])
    weights = pair_weights(ranges, labels, ignore=0)
    kept = labels != 0
    torch.testing.assert_close(weights[kept], pair_weights(RANGES, CLASSES))
    assert weights[~kept].eq(0).all()
    assert set(draw_weighted_pairs(weights, 100).tolist()) == {1, 2, 4, 5}
    nothing = pair_weights(RANGES, torch.zeros(4, dtype=torch.int64), ignore=0)
    assert nothing.eq(0).all()
    assert draw_weighted_pairs(nothing).shape == (0,)
    none = pair_weights(RANGES[:0], CLASSES[:0])
    assert draw_weighted_pairs(none).shape == (0,)


def test_uniform_draw():
    rows = draw_pairs(1000, 64)
    assert len(set(rows.tolist())) == 64
    assert sorted(draw_pairs(10).tolist()) == list(range(10))
    made = torch.Generator().manual_seed(5)
    first = draw_pairs(1000, 64, made)
    assert torch.equal(first, draw_pairs(1000, 64, made.manual_seed(5)))
    for size, count in ((1, 64), (0, 64), (10, 1)):
        with pytest.raises(InputError, match="two pairs or more"):
            draw_pairs(size, count)


def test_weighted_draw_follows_the_weights():
    """First and second of an ordered draw without replacement: w_i, and w_i w_j / (1 - w_i)."""
    weights = torch.tensor([1.0, 2, 0, 3, 4], dtype=DOUBLE)
    draws = [tuple(draw_weighted_pairs(weights, 2).tolist()) for _ in range(4000)]
    shares = (weights / 10).tolist()
    counted = Counter(draws)
    for i, a in enumerate(shares):
        for j, b in enumerate(shares):
            expected = a * b / (1 - a) if i != j else 0
            error = math.sqrt(expected * (1 - expected) / 4000)
            assert abs(counted[i, j] / 4000 - expected) <= 4.5 * error
    assert sorted(draw_weighted_pairs(weights, 50).tolist()) == [0, 1, 3, 4]
    made = torch.Generator().manual_seed(5)
    first = draw_weighted_pairs(torch.rand(500), 20, made)
    assert len(set(first.tolist())) == 20
    made.manual_seed(5)
    torch.manual_seed(0)
    weights = torch.rand(500)
    again = draw_weighted_pairs(weights, 20, made)
    made.manual_seed(5)
    assert torch.equal(again, draw_weighted_pairs(weights * 7, 20, made))


def test_balanced_draw_balances_classes():
    """Nine in ten pairs are of class 0; of those drawn with `category`, about half."""
    labels = (torch.arange(2000) % 10 == 0).long()
    ranges = torch.randint(1, 50, (2000,))
    drawn = draw_weighted_pairs(pair_weights(ranges, labels, "category"), 100)
    assert 30 <= int(labels[drawn].sum()) <= 70
    assert int(labels[draw_pairs(2000, 100)].sum()) < 25


def test_bad_input():
    points, labels = unit(4), torch.zeros(4, dtype=torch.int64)
    for loss in (
        pair_infonce,
        cosine_regression,
        lambda f, p: class_contrast(f, p, labels),
    ):
        with pytest.raises(InputError, match="must pair off"):
            loss(points, unit(5))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="temperature must be positive"):
            pair_infonce(points, points, temperature)
        with pytest.raises(InputError, match="temperature must be positive"):
            class_contrast(points, points, labels, temperature)
    with pytest.raises(InputError, match="3 labels for 4 pairs"):
        class_contrast(points, points, labels[:3])
    with pytest.raises(InputError, match="nearest: mean"):
        class_contrast(points, points, labels, form="meen")
    with pytest.raises(InputError, match="nearest: cosine"):
        cosine_regression(points, points, "cosin")
    with pytest.raises(InputError, match="nearest: dcas"):
        pair_weights(RANGES, CLASSES, "dcass")
    with pytest.raises(InputError, match="3 labels for 4 pairs"):
        pair_weights(RANGES, CLASSES[:3])
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="finite and not negative"):
            draw_weighted_pairs(torch.tensor([1.0, bad]))
    with pytest.raises(InputError, match="two pairs or more"):
        draw_weighted_pairs(torch.ones(5), 1)


# Ten pairs of one process and four of the other, or all of one.
SHARES = ((10, 14), (14, 14))


def check(cfg):
    rank, world = comm.get_rank(), comm.get_world_size()
    points, pixels, labels = unit(14), unit(14, seed=1), torch.arange(14) % 3
    segments = (torch.arange(48).view(2, 4, 6) // 5) % 7
    places = torch.stack([torch.arange(14) % n for n in segments.shape], 1)
    features = unit(48).view(2, 4, 6, 6).permute(0, 3, 1, 2)
    cases = {
        "pairs": lambda x, s: (pair_infonce(x, pixels[s]), len(x)),
        "classes": lambda x, s: (
            class_contrast(x, pixels[s], labels[s], ignore=1),
            int((labels[s] != 1).sum()),
        ),
        "regression": lambda x, s: (cosine_regression(x, pixels[s]), len(x)),
        "superpixels": lambda x, s: (
            superpixel_infonce(x, places[s], features, segments, 7),
            len(superpixel_means(x, places[s], features, segments, 7)[2]),
        ),
        "constant": lambda x, s: (
            mean_log_positives(labels[s]).double() + 0 * x.sum(),
            len(x),
        ),
    }
    for first, last in SHARES:
        slices = slice(0, first), slice(first, last)
        for name, case in cases.items():
            # Negatives are the own process's: the mean over all rows is that of the shares' means by their rows.
            shares = [points[s].clone().requires_grad_() for s in slices]
            parts = [case(x, s) for x, s in zip(shares, slices)]
            total = sum(rows for _, rows in parts)
            expected = sum(value * rows for value, rows in parts) / total
            expected.backward()
            mine = points[slices[rank]].clone().requires_grad_()
            with joint_batch():
                value, _ = case(mine, slices[rank])
            value.backward()
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12, msg=name)
            torch.testing.assert_close(
                mine.grad, world * shares[rank].grad, rtol=1e-9, atol=1e-13, msg=name
            )


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and fork"
)
def test_rows_of_all_processes_weigh_the_same(monkeypatch):
    multiprocessing.set_forkserver_preload(["tests.distillers.test_contrast"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(check, 2, Config({"device": "cpu"}))
