"""Pictures: what is written is what is read back, by the format's rules and by Pillow; places in bird's-eye views."""

import struct
import zlib

import numpy as np
import pytest

from pointcept_kd.data import pictures
from pointcept_kd.host import InputError

COLORS = np.array([(100, 150, 245), (255, 240, 150), (0, 0, 255)])


def decode_png(data):
    """A picture from our own PNGs, read by the format's rules."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = content
        place += 12 + length
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    if kind == 3:
        return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]
    if kind == 0:
        return rows[:, 1:].copy().view(">u2" if depth == 16 else np.uint8).reshape(height, width)
    return rows[:, 1:].reshape(height, width, 3)


def test_birdseye_puts_forward_up_and_left_left():
    coord = np.array([(20.0, 0, 0), (0, 20.0, 0), (-20.0, -20.0, 0), (99, 0, 0)])
    picture = decode_png(pictures.birdseye_png(coord, np.array([0, 1, -1, 2]), COLORS))
    assert picture.shape == (500, 500, 3)
    assert (picture[50:52, 250:252] == COLORS[0]).all()
    assert (picture[250:252, 50:52] == COLORS[1]).all()
    assert (picture[450:452, 450:452] == pictures.IGNORED).all()
    assert not (picture == COLORS[2]).all(-1).any()
    # Three points of 2 x 2 pixels, the sensor's cross, and nothing else.
    drawn = (picture != pictures.BACKGROUND).any(-1).sum()
    assert drawn == 12 + (picture == 255).all(-1).sum()


def test_birdseye_draws_far_from_above_first():
    coord = np.array([(10.0, 5.0, 3.0), (10.0, 5.0, -1.7)])
    labels = np.array([0, 1])
    for order in ([0, 1], [1, 0]):
        picture = decode_png(pictures.birdseye_png(coord[order], labels[order], COLORS))
        assert (picture[150, 200] == COLORS[0]).all()
    picture = decode_png(pictures.birdseye_png(coord, labels, COLORS, priority=np.array([0, 1])))
    assert (picture[150, 200] == COLORS[1]).all()


def test_birdseye_of_nothing():
    picture = decode_png(pictures.birdseye_png(np.zeros((0, 3)), np.zeros(0, int), COLORS))
    assert set(map(tuple, picture.reshape(-1, 3))) == {pictures.BACKGROUND, (255, 255, 255)}


def test_png_with_many_colours_is_kept():
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_png(pictures.png_bytes(pixels)), pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_values(dtype):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 5)).astype(dtype)
    np.testing.assert_array_equal(decode_png(pictures.png_bytes(values)), values)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)]
)
def test_what_is_no_picture(pixels):
    with pytest.raises(ValueError, match="a picture is"):
        pictures.png_bytes(pixels)


@pytest.mark.parametrize("kind", ["few", "many", "mask", "deep"])
def test_pillow_reads_what_is_written(tmp_path, kind):
    pytest.importorskip("PIL")
    rng = np.random.default_rng(0)
    pixels = {
        "few": COLORS.astype(np.uint8)[rng.integers(0, 3, (9, 11))],
        "many": rng.integers(0, 256, (31, 17, 3)).astype(np.uint8),
        "mask": rng.integers(0, 256, (9, 11)).astype(np.uint8),
        "deep": rng.integers(0, 65536, (9, 11)).astype(np.uint16),
    }[kind]
    pictures.write_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.png"), pixels)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_pictures_that_cannot_be_read(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(pictures.png_bytes(np.zeros((9, 9), np.uint8))[:40])
    for name in ("a.png", "b.png"):
        with pytest.raises(InputError, match=f"{name}: not a readable picture"):
            pictures.read_image(tmp_path / name)
