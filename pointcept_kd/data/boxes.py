"""Boxes around objects and the points in them.

A box is a row x, y, z, l, w, h, yaw: centre of gravity, length along the heading, width, height, metres; the heading as
an angle from x towards y, radians. Further columns, such as a velocity, are not looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def inside_box(points: ArrayLike, box: ArrayLike) -> NDArray:
    """Which points (n, 3), n bool, are in a box; those on its surface are."""
    place = np.asarray(points, np.float64)[:, :3]
    x, y, z, length, width, height, yaw = np.asarray(box, np.float64)[:7]
    place = place - (x, y, z)
    along = place[:, 0] * np.cos(yaw) + place[:, 1] * np.sin(yaw)
    across = place[:, 1] * np.cos(yaw) - place[:, 0] * np.sin(yaw)
    return (
        (np.abs(along) <= length / 2)
        & (np.abs(across) <= width / 2)
        & (np.abs(place[:, 2]) <= height / 2)
    )


def count_in_boxes(points: ArrayLike, boxes: ArrayLike) -> NDArray:
    """How many points (n, 3) each box (m, 7) contains: (m,) int64."""
    return np.array([inside_box(points, box).sum() for box in np.asarray(boxes)], np.int64)


def box_of_points(points: ArrayLike, boxes: ArrayLike) -> NDArray:
    """The row of the box (m, 7) that a point (n, 3) is in, -1 for none: (n,) int64.

    Of several, the one of least volume: what stands close to a bus is not part of it.
    """
    boxes = np.asarray(boxes, np.float64)
    points = np.asarray(points, np.float64)
    rows = np.full(len(points), -1, np.int64)
    if len(boxes):
        for row in np.argsort(-boxes[:, 3:6].prod(1), kind="stable"):
            rows[inside_box(points, boxes[row])] = row
    return rows
