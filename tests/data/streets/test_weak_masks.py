"""Weak labels: every kind of error alone, and all together."""

import numpy as np
import pytest

from pointcept_kd.data.streets.weak_masks import Errors, weak_mask

CLASSES = {10: 0, 30: 1, 40: 2, 50: 3}
SIMILAR = {0: (3,), 3: (0,)}
NONE = Errors(jitter=0, smooth=0, missed=0, confusion=0, blank=0)


def scene():
    """Sky (0), a wall (50), a road (40), forty cars with instance ids, one small person."""
    label = np.zeros((120, 240), np.uint32)
    label[30:60], label[60:] = 50, 40
    for i in range(40):
        row, column = 62 + 14 * (i // 10), 4 + 23 * (i % 10)
        label[row : row + 10, column : column + 16] = 10 | ((i + 1) << 16)
    label[40:44, 100:102] = 30 | (99 << 16)
    return label


def made(seed=0, **errors):
    chosen = Errors(**{**vars(NONE), **errors})
    return weak_mask(scene(), CLASSES, 255, SIMILAR, np.random.default_rng(seed), chosen)


def truth():
    table = np.full(1 << 16, 255, np.uint8)
    for raw, value in CLASSES.items():
        table[raw] = value
    return table[scene() & 0xFFFF]


def test_without_errors_it_is_the_truth():
    mask = made()
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, truth())


def test_small_things_are_overlooked_and_their_place_is_filled():
    mask = made(missed=1.0)
    assert not (mask == 1).any()
    wanted = truth()
    wanted[wanted == 1] = 3  # the wall behind
    assert np.array_equal(mask, wanted)


def test_confusion_changes_whole_things_at_its_rate():
    swapped = []
    for seed in range(20):
        mask = made(seed, confusion=0.3)
        for i in range(40):
            values = np.unique(mask[scene() >> 16 == i + 1])
            assert len(values) == 1
            assert values[0] in (0, 3)
            swapped.append(values[0] == 3)
        assert (mask[scene() == 40] == 2).all()  # nothing is similar to the road
    assert np.mean(swapped) == pytest.approx(0.3, abs=0.05)


def test_blank_regions_are_unknown():
    shares = [np.mean(made(seed, blank=0.4)[scene() > 0] == 255) for seed in range(20)]
    assert np.mean(shares) == pytest.approx(0.4, abs=0.06)


def test_borders_waver_and_nothing_else():
    mask = made(jitter=2 / 240)
    wrong = mask != truth()
    assert 0.005 < wrong.mean() < 0.15
    deep = np.zeros_like(wrong)
    deep[5:18] = True  # sky, more than five times as far from any border
    assert not wrong[deep].any()
    assert np.array_equal(mask, made(jitter=2 / 240))
    assert not np.array_equal(mask, made(1, jitter=2 / 240))


def test_the_majority_swallows_thin_structure():
    label = np.full((40, 60), 40, np.uint32)
    label[:, 30] = 50
    errors = Errors(**{**vars(NONE), "smooth": 5 / 60})
    mask = weak_mask(label, CLASSES, 255, {}, np.random.default_rng(0), errors)
    assert (mask == 2).all()


def test_usual_errors_leave_most_right():
    label = scene()
    mask = weak_mask(label, CLASSES, 255, SIMILAR, np.random.default_rng(0))
    right = (mask == truth())[label > 0].mean()
    assert 0.7 < right < 0.995
