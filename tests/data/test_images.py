"""Image transforms against values worked by hand."""

import random

import numpy as np
import pytest
import torch

from pointcept_kd.data import images as I
from pointcept_kd.host import InputError


def picture(h=12, w=14, views=2):
    g = torch.Generator().manual_seed(0)
    return torch.rand(views, 3, h, w, generator=g)


def test_to_tensor():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tensor = I.ImgToTensor()(pixels)
    assert tensor.shape == (3, 2, 4)
    assert tensor[1, 1, 2].item() == pytest.approx(19 / 255)
    floats = I.ImgToTensor()(pixels[:, :, 0].astype(np.float32))
    assert floats.shape == (1, 2, 4)
    assert floats.max() == 21
    with pytest.raises(InputError, match="2 or 3 axes"):
        I.ImgToTensor()(np.zeros(3))


def test_blur_is_the_weighted_mean_of_its_neighbours():
    image = picture()
    blurred = I.ImgGaussianBlur(p=1.1, radius_min=1.5, radius_max=1.5)(image)
    weight = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    around = image[1, 2, 1:10, 3:12].double().numpy()
    assert blurred[1, 2, 5, 7].item() == pytest.approx((around * weight).sum(), abs=1e-6)
    edge = np.pad(image[0, 0].numpy(), 4, mode="reflect")[:9, :9]
    assert blurred[0, 0, 0, 0].item() == pytest.approx((edge * weight).sum(), abs=1e-6)
    flat = torch.full((3, 9, 9), 0.25)
    torch.testing.assert_close(I.ImgGaussianBlur(p=1.1)(flat), flat)
    with pytest.raises(InputError, match="larger than 4"):
        I.ImgGaussianBlur(p=1.1)(torch.zeros(3, 4, 9))


def test_channels_move_as_one():
    image = picture() * 0.5
    moved = I.ImgChromaticJitter(p=1.1, std=0.1)(image) - image
    assert (moved.amax((0, 2, 3)) - moved.amin((0, 2, 3))).max() < 1e-6
    assert 0 < moved.min() <= moved.max() <= 0.1
    assert I.ImgChromaticJitter(p=1.1, std=5.0)(image).max() <= 1


def test_normalise_and_grey_and_solarise_and_contrast():
    image = picture()
    normal = I.Imgnormalize(mean=(0.5, 0, 0), std=(0.5, 1, 2))(image)
    torch.testing.assert_close(normal[:, 0], image[:, 0] * 2 - 1)
    torch.testing.assert_close(normal[:, 2], image[:, 2] / 2)
    gray = I.ImgRandomGrayscale(p=1.1)(image)
    r, g, b = image[0, :, 3, 4].tolist()
    assert gray[0, :, 3, 4].tolist() == pytest.approx([0.2989 * r + 0.587 * g + 0.114 * b] * 3)
    sun = I.ImgRandomSolarize(threshold=0.5, p=1.1)(image)
    torch.testing.assert_close(sun, torch.where(image >= 0.5, 1 - image, image))
    changed = (I.ImgPixelContrast(threshold=0.25, p=1.1)(image) != image).all(1).float().mean()
    assert 0.1 < changed <= 0.25


@pytest.mark.parametrize(
    "transform",
    [
        I.ImgGaussianBlur(p=0),
        I.ImgChromaticJitter(p=0),
        I.ImgPixelContrast(0.5, p=0),
        I.ImgRandomGrayscale(p=0),
        I.ImgRandomSolarize(0.5, p=0),
    ],
    ids=lambda t: type(t).__name__,
)
def test_closed_gates(transform):
    image = picture()
    assert transform(image) is image


def test_crop_keeps_correspondences_in_step():
    random.seed(3)
    crop = I.ImgAugmentation(
        [dict(type="Imgnormalize", mean=(0, 0, 0), std=(1, 1, 1))],
        crop_h=6, crop_w=8, patch_h=5, patch_w=5, patch_size=2,
    )  # fmt: skip
    top, left = crop.start
    assert 0 <= top <= 4
    assert 0 <= left <= 2
    image = picture(10, 10)
    matches = np.random.RandomState(0).randint(0, 10, (50, 2, 2))
    matches[::7] = -1
    kept = matches.copy()
    result = crop(dict(images=image, correspondence=matches))
    assert result["images"].shape == (2, 3, 6, 8)
    assert np.array_equal(matches, kept)
    inside = 0
    for point in range(50):
        for view in range(2):
            row, column = kept[point, view]
            at = result["correspondence"][point, view]
            if top <= row < top + 6 and left <= column < left + 8:
                inside += 1
                assert at.tolist() == [row - top, column - left]
                assert torch.equal(
                    result["images"][view, :, at[0], at[1]], image[view, :, row, column]
                )
            else:
                assert at.tolist() == [-1, -1]
    assert inside > 10
    with pytest.raises(InputError, match=r"images of \(4, 4\) pixels"):
        crop(dict(images=torch.zeros(1, 3, 4, 4), correspondence=kept))
