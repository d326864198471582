"""The augmentation of the cylindrical recipes."""

import numpy as np
import pytest

from pointcept_kd.data.planar import GaussianShift, PlanarScale
from pointcept_kd.host import InputError


def cloud(dtype=np.float32):
    return np.random.default_rng(0).normal(size=(50, 3)).astype(dtype) * 20


def test_height_is_not_scaled_and_the_input_is_left_alone():
    coord = cloud()
    before = coord.copy()
    np.random.seed(1)
    out = PlanarScale([0.95, 1.05])({"coord": coord})["coord"]
    factor = float(out[0, 0] / before[0, 0])
    assert 0.95 <= factor <= 1.05
    assert factor != 1
    np.testing.assert_allclose(out[:, :2], before[:, :2] * factor, rtol=1e-6)
    assert np.array_equal(out[:, 2], before[:, 2])
    assert np.array_equal(coord, before)
    assert out.dtype == np.float32


def test_factors_fill_the_bounds():
    np.random.seed(0)
    coord = np.ones((1, 3), np.float32)
    factors = [PlanarScale([0.5, 1.5])({"coord": coord})["coord"][0, 0] for _ in range(400)]
    assert 0.5 <= min(factors) < 0.52
    assert 1.48 < max(factors) <= 1.5


def test_one_shift_for_the_whole_scan_with_the_stated_deviation():
    np.random.seed(0)
    coord = cloud()
    shifts = []
    for _ in range(600):
        moved = GaussianShift([0.1, 0.2, 0])({"coord": coord})["coord"]
        away = moved - coord
        np.testing.assert_allclose(away, np.broadcast_to(away[0], away.shape), atol=1e-5)
        shifts.append(away[0])
    np.testing.assert_allclose(np.std(shifts, axis=0), [0.1, 0.2, 0], atol=0.015)
    np.testing.assert_allclose(np.mean(shifts, axis=0), 0, atol=0.03)


@pytest.mark.parametrize("scale", [[1.05, 0.95], [0, 1], [1.0]])
def test_bounds_that_are_none(scale):
    with pytest.raises(InputError, match="PlanarScale: scale is two positive bounds"):
        PlanarScale(scale)


def test_a_negative_deviation():
    with pytest.raises(InputError, match="GaussianShift: sigma is 0 or more"):
        GaussianShift(-0.1)
