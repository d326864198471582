"""Superpixels: connected, few enough, true to edges."""

import numpy as np
import pytest
from scipy.ndimage import label as regions

from pointcept_kd.data.superpixels import cielab, components, superpixels


def picture(height=60, width=90, seed=0):
    """Noise on a gradient, with a disc and a bar in it."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 / width, y * 255 / height, 0 * x + 90], -1)
    image[(y - 25) ** 2 + (x - 30) ** 2 < 150] = [220, 30, 30]
    image[:, 60:64] = [20, 20, 200]
    return np.clip(image + np.random.default_rng(seed).normal(0, 6, image.shape), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize("segments", [1, 7, 40, 150])
def test_pieces_are_connected_and_not_too_many(segments):
    ids = superpixels(picture(), segments)
    count = int(ids.max()) + 1
    assert ids.dtype == np.uint16
    assert count <= segments
    assert count >= 0.6 * segments
    assert np.array_equal(np.unique(ids), np.arange(count))
    for i in range(count):
        assert regions(ids == i)[1] == 1


def test_ids_count_up_in_reading_order():
    ids = superpixels(picture(), 30).ravel()
    first = [int(np.argmax(ids == i)) for i in range(ids.max() + 1)]
    assert first == sorted(first)


def test_no_piece_crosses_a_sharp_edge():
    image = np.full((48, 64, 3), 40, np.uint8)
    image[:, 37:] = [240, 200, 60]
    ids = superpixels(image, 24, sigma=0.0)
    left, right = set(ids[:, :37].ravel().tolist()), set(ids[:, 37:].ravel().tolist())
    assert not left & right


def test_pieces_of_a_plain_image_are_of_similar_size():
    sizes = np.bincount(superpixels(np.full((60, 90, 3), 128, np.uint8), 54).ravel())
    assert len(sizes) == 54
    assert sizes.max() < 2 * sizes.min()


def test_cielab_of_known_colours():
    colors = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]], np.uint8)
    wanted = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]  # CIE, D65
    assert cielab(colors)[0] == pytest.approx(np.array(wanted), abs=0.15)


def test_components_against_a_flood():
    ids = np.random.default_rng(3).integers(0, 3, (12, 17))
    number = components(ids)
    for value in range(3):
        found, count = regions(ids == value)
        for i in range(1, count + 1):
            assert len(np.unique(number[found == i])) == 1
        assert len(np.unique(number[ids == value])) == count


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(h, w, 3\) uint8"):
        superpixels(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="segments: 0"):
        superpixels(np.zeros((4, 4, 3), np.uint8), 0)
