"""Points in boxes against plain loops."""

import math

import numpy as np

from pointcept_kd.data.boxes import box_of_points, count_in_boxes, inside_box


def by_loops(point, box):
    x, y, z, length, width, height, yaw = box[:7]
    dx, dy, dz = point[0] - x, point[1] - y, point[2] - z
    turned = complex(dx, dy) * complex(math.cos(-yaw), math.sin(-yaw))
    return (
        abs(turned.real) <= length / 2 and abs(turned.imag) <= width / 2 and abs(dz) <= height / 2
    )


def test_hand_worked():
    # A car 4 m long that heads along y: 2 m to its ends in y, 1 m to its sides in x.
    box = [10, 0, 1, 4, 2, 1.5, math.pi / 2]
    points = [[10, 1.9, 1], [10, 2.1, 1], [10.9, 0, 1], [11.1, 0, 1], [10, 0, 1.75], [10, 0, 1.76]]
    assert inside_box(points, box).tolist() == [True, False, True, False, True, False]


def test_as_plain_loops():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(300, 4)) * 3
    boxes = np.c_[
        generator.normal(size=(6, 3)),
        generator.uniform(1, 5, (6, 3)),
        generator.normal(size=(6, 3)) * 3,
    ]
    table = np.array([[by_loops(p, b) for b in boxes] for p in points])
    np.testing.assert_array_equal(np.stack([inside_box(points, b) for b in boxes], 1), table)
    np.testing.assert_array_equal(count_in_boxes(points, boxes), table.sum(0))
    volumes = [b[3] * b[4] * b[5] for b in boxes]
    rows = box_of_points(points, boxes)
    for row, inside in zip(rows, table, strict=True):
        candidates = np.flatnonzero(inside)
        assert row == (min(candidates, key=lambda i: volumes[i]) if len(candidates) else -1)
    assert table.sum(1).max() > 1


def test_no_boxes():
    assert box_of_points(np.zeros((3, 3)), np.empty((0, 7))).tolist() == [-1, -1, -1]
    assert count_in_boxes(np.zeros((3, 3)), np.empty((0, 7))).shape == (0,)
