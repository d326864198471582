"""Pictures of scans: PNG files without an image library, bird's-eye views.

Reading photographs is Pillow's work (extra `images`); writing needs nothing.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

IGNORED = (72, 76, 84)
BACKGROUND = (16, 18, 22)


def png_bytes(pixels: NDArray) -> bytes:
    """Pixels as a PNG file (RFC 2083): values come back from it as they went in.

    Args:
        pixels: (h, w, 3) uint8 colours, stored with a palette where 256 are enough; or (h, w) uint8 or uint16 values
            such as masks.

    Raises:
        ValueError: for another shape or dtype.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        codes = pixels.reshape(-1, 3).astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
        palette, indices = np.unique(codes, return_inverse=True)
        small = len(palette) <= 256
        rows, depth, kind = indices.astype(np.uint8) if small else pixels, 8, 3 if small else 2
        colors = palette.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    elif pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16):
        depth, kind, small, colors = 8 * pixels.dtype.itemsize, 0, False, b""
        rows = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">"))).view(np.uint8)
    else:
        raise ValueError(
            f"a picture is (h, w, 3) uint8 or (h, w) uint8 or uint16, got {pixels.shape} {pixels.dtype}"
        )
    height, width = pixels.shape[:2]
    rows = rows.reshape(height, -1)
    # Each row begins with its filter type, here always 0.
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)),
            chunk(b"PLTE", colors) if small else b"",
            chunk(b"IDAT", zlib.compress(raw, 6)),
            chunk(b"IEND", b""),
        ]
    )


def write_png(path: str | os.PathLike[str], pixels: NDArray) -> None:
    """Write `png_bytes(pixels)` to a temporary name and rename it."""
    path = Path(path)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    hidden.write_bytes(png_bytes(pixels))
    os.replace(hidden, path)


def read_image(path: str | os.PathLike[str]) -> NDArray:
    """A picture file as it is stored: (h, w, 3) uint8 colours, or (h, w) uint8 or uint16 values.

    Raises:
        InputError: for a file that cannot be read, and without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            f"{path}: reading pictures needs Pillow; pip install 'pointcept_kd[images]'"
        ) from error
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("L", "I;16", "I;16B", "I"):
                values = np.asarray(image)
                return values.astype(np.uint8 if image.mode == "L" else np.uint16)
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise InputError(f"{path}: not a readable picture ({error})") from error


def birdseye_png(
    coord: NDArray,
    labels: NDArray,
    colors: NDArray,
    half: float = 25.0,
    scale: int = 10,
    priority: NDArray | None = None,
) -> bytes:
    """A scan from above: `2 half` metres square around the sensor, forward (x) up, left (y) left.

    Args:
        coord: (n, 3) metres.
        labels: (n,) rows of `colors`; negative ones are drawn grey.
        colors: (k, 3) integers in [0, 255].
        half: half the side of the picture, metres.
        scale: pixels per metre; every point covers 2 x 2 pixels.
        priority: (n,) what is drawn last stays visible; the height by default, so that what is far
            from an eye above the street is drawn first.
    Returns: a PNG file.
    """
    size = round(2 * half * scale)
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = BACKGROUND
    coord, labels = np.asarray(coord, np.float64), np.asarray(labels)
    lookup = np.concatenate([np.asarray(colors).reshape(-1, 3), [IGNORED]]).astype(np.uint8)
    order = np.argsort(coord[:, 2] if priority is None else priority, kind="stable")
    column = np.floor((half - coord[order, 1]) * scale).astype(np.int64)
    row = np.floor((half - coord[order, 0]) * scale).astype(np.int64)
    # -1 is the last row of the lookup.
    color = lookup[np.maximum(labels[order], -1)]
    # With repeated places numpy keeps the last; one assignment for all four pixels keeps the order.
    rows = (row[:, None] + np.array([0, 0, 1, 1])).reshape(-1)
    columns = (column[:, None] + np.array([0, 1, 0, 1])).reshape(-1)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    picture[rows[inside], columns[inside]] = np.repeat(color, 4, axis=0)[inside]
    centre, arm = size // 2, max(3, scale // 2)
    picture[centre - 1 : centre + 1, centre - arm : centre + arm] = 255
    picture[centre - arm : centre + arm, centre - 1 : centre + 1] = 255
    return png_bytes(picture)
