"""Colour transforms against python's colorsys and values worked by hand."""

import colorsys
import random

import numpy as np
import pytest
import torch

from pointcept_kd.data import colour


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def colors(n=300):
    made = np.random.RandomState(0).randint(0, 256, (n, 3)).astype(np.float32)
    made[:4] = [[0, 0, 0], [255, 255, 255], [80, 80, 80], [255, 0, 0]]
    return made


def test_hue_saturation_value_is_colorsys():
    hue, saturation, value = colour.hsv_of(colors() / 255.0)
    for row, rgb in enumerate(colors() / 255.0):
        h, s, v = colorsys.rgb_to_hsv(*map(float, rgb))
        assert (hue[row] % 1, saturation[row], value[row]) == pytest.approx((h, s, v), abs=1e-6)


def test_colours_and_back():
    hue, saturation, value = colour.hsv_of(colors() / 255.0)
    for wrapped in (hue % 1, hue):
        np.testing.assert_allclose(
            colour.rgb_of(wrapped, saturation, value) * 255, colors(), atol=1e-3
        )


def test_grey():
    gray = colour.gray_of(np.array([[100, 50, 200], [10, 10, 10]], np.float64))
    assert gray[:, 0].tolist() == pytest.approx([29.89 + 29.35 + 22.8, 9.999])
    result = colour.RandomColorGrayScale(p=1.1)(dict(color=colors()))["color"]
    assert (result == result[:, :1]).all()
    assert result.shape == colors().shape


@pytest.mark.parametrize(
    ("which", "factor", "expected"),
    [
        (0, 0.5, [[50, 25, 100], [127.5, 0, 0]]),  # brightness: towards black
        (0, 2.0, [[200, 100, 255], [255, 0, 0]]),
        (2, 0.0, [[82.04] * 3, [76.2195] * 3]),  # no saturation: luma
        (1, 0.0, [[79.12975] * 3, [79.12975] * 3]),  # no contrast: mean luma
        (3, 1 / 3, [[200, 100, 50], [0, 255, 0]]),  # a third of the circle: r to g to b
    ],
)
def test_each_change_by_hand(which, factor, expected):
    color = np.array([[100, 50, 200], [255, 0, 0]], np.float64)
    changed = colour.RandomColorJitter.change(color, which, factor)
    np.testing.assert_allclose(changed, expected, atol=1e-3)


def test_jitter_that_changes_nothing_draws_the_order_only():
    seed(3)
    data = colour.RandomColorJitter()(dict(color=colors()))
    assert np.array_equal(data["color"], colors())
    after = np.random.rand()
    seed(3)
    assert after == np.random.rand()


def test_hue_shift_keeps_value_and_whole_numbers():
    data = colour.HueSaturationTranslation(hue_max=0.5, saturation_max=0)(dict(color=colors()))
    moved = data["color"]
    assert np.array_equal(moved, np.floor(moved))
    assert np.abs(moved.max(1) - colors().max(1)).max() <= 1
    assert np.abs(moved - colors()).max() > 50
    assert np.array_equal(moved[:3], colors()[:3])  # grey has no hue


def test_dropped_colours_are_black():
    seed(0)
    transform = colour.RandomDropColor(drop_ratio=0.25, drop_application_ratio=1.1)
    result = transform(dict(color=colors() + 1))["color"]
    assert (result == 0).all(axis=1).sum() == 75
    assert colour.RandomDropColor(1.0, 0.0)(dict(color=colors()))["color"].any()


def test_a_cloud_without_colour_stays():
    for transform in (
        colour.RandomColorGrayScale(1.1),
        colour.RandomColorJitter(0.4, 0.4, 0.4, 0.1, p=1.1),
        colour.HueSaturationTranslation(),
        colour.RandomDropColor(0.5, 1.1),
    ):
        assert transform(dict(coord=1)) == dict(coord=1)
