"""Superpixels: an image cut into about equally large connected pieces that keep to its edges.

k-means on colour and place, each pixel comparing the centres of the nine cells around it (SLIC,
Achanta et al., 2012, IEEE TPAMI 34(11)), then pieces that fell apart are given to their neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

# Linear sRGB to XYZ of the white point D65 (IEC 61966-2-1), rows divided by the white's X, Y, Z.
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_XYZ = _XYZ / _XYZ.sum(1, keepdims=True)


def cielab(image: NDArray) -> NDArray:
    """CIE L*a*b* (h, w, 3) float32 of sRGB (h, w, 3) uint8."""
    table = np.arange(256) / 255
    table = np.where(table > 0.04045, ((table + 0.055) / 1.055) ** 2.4, table / 12.92)
    xyz = table.astype(np.float32)[image] @ _XYZ.T.astype(np.float32)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)


def components(ids: NDArray) -> NDArray:
    """Numbers (h, w) of the connected regions of equal ids; neighbours share a side."""
    height, width = ids.shape
    number = np.arange(height * width).reshape(height, width)
    ends = []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        same = ids[a] == ids[b]
        ends.append((number[a][same], number[b][same]))
    i, j = (np.concatenate(side) for side in zip(*ends, strict=True))
    links = coo_matrix((np.ones(len(i), bool), (i, j)), (number.size, number.size))
    return connected_components(links, directed=False)[1].reshape(height, width)


def superpixels(
    image: NDArray,
    segments: int = 150,
    compactness: float = 10.0,
    rounds: int = 6,
    sigma: float | None = None,
) -> NDArray:
    """Cut an image into at most `segments` connected pieces.

    Args:
        image: (h, w, 3) uint8 sRGB.
        segments: the most pieces; there are rarely many fewer.
        compactness: how much place counts beside colour (in units of CIE L*a*b*).
        rounds: of k-means.
        sigma: pixels of Gaussian smoothing before; a 600th of the width by default.
    Returns: (h, w) uint16, ids 0, 1, 2... in the order in which rows of the image meet them.

    Raises:
        ValueError: for another shape or dtype, or less than one segment.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image is (h, w, 3) uint8, got {image.shape} {image.dtype}")
    if not 1 <= segments <= 65535:
        raise ValueError(f"segments: {segments} is not in 1..65535")
    height, width = image.shape[:2]
    columns = int(np.clip(round(np.sqrt(segments * width / height)), 1, min(width, segments)))
    rows = int(np.clip(segments // columns, 1, height))
    sigma = width / 600 if sigma is None else sigma
    lab = gaussian_filter(cielab(image), (sigma, sigma, 0))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    scale = compactness / np.sqrt(height * width / (rows * columns))
    pixels = np.concatenate([lab, scale * np.stack([y, x], -1)], -1).reshape(-1, 5)
    cell_y = np.repeat(np.arange(height) * rows // height, width)
    cell_x = np.tile(np.arange(width) * columns // width, height)
    owner = cell_y * columns + cell_x
    for _ in range(rounds):
        centres = _means(pixels, owner, rows * columns)
        best = np.full(len(pixels), np.inf, np.float32)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near = np.clip(cell_y + dy, 0, rows - 1) * columns
                near += np.clip(cell_x + dx, 0, columns - 1)
                apart = pixels - centres[near]
                apart = np.einsum("nc,nc->n", apart, apart)
                nearer = apart < best
                owner = np.where(nearer, near, owner)
                best = np.where(nearer, apart, best)
    whole = _connected(owner.reshape(height, width), height * width / (rows * columns) / 6)
    _, first, ids = np.unique(whole, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[ids].reshape(height, width).astype(np.uint16)


def _means(pixels: NDArray, owner: NDArray, count: int) -> NDArray:
    """Mean (count, 5) of every piece; one without pixels goes out of everybody's reach."""
    sizes = np.bincount(owner, minlength=count)
    sums = [np.bincount(owner, pixels[:, i], count) for i in range(pixels.shape[1])]
    means = np.stack(sums, 1) / np.maximum(sizes, 1)[:, None]
    means[sizes == 0] = 1e6
    return means.astype(np.float32)


def _connected(owner: NDArray, least: float) -> NDArray:
    """Keep the largest region of each piece, unless it is small; neighbours grow over the rest."""
    number = components(owner)
    sizes = np.bincount(number.ravel())
    _, first = np.unique(number.ravel(), return_index=True)
    piece = owner.ravel()[first]  # of each region
    order = np.lexsort((first, -sizes, piece))
    largest = order[np.r_[True, np.diff(piece[order]) > 0]]
    kept = largest[sizes[largest] >= least]
    if not len(kept):
        kept = largest[[np.argmax(sizes[largest])]]
    result = np.where(np.isin(number, kept), owner, -1)
    while (result < 0).any():
        # Rows and columns take turns, so that a grown pixel always touches its piece.
        for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :-1], np.s_[:, 1:]),
                     (np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:])):  # fmt: skip
            here, there = result[a], result[b].copy()
            take = (here < 0) & (there >= 0)
            here[take] = there[take]
    return result
