"""Cylindrical and Cartesian partitions, groups of rows that share a cell, majority labels."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from pointcept_kd.ops.grid import Groups, Partition, group_rows, majority_label, merge_groups

FULL = (480, 360, 32)
POLAR = Partition((3, -math.pi, -3), (50, math.pi, 1.5), FULL)
CYLINDER = Partition((0, -3.1415926, -4), (50, 3.1415926, 2), FULL)
POINTS = torch.tensor(
    [
        [3.0, 0.0, -3.0],
        [0.0, 10.0, 0.0],
        [-3.0, -4.0, 1.0],
        [60.0, 0.0, 2.0],
        [1.0, 0.0, -1.0],
        [-10.0, 0.0, 0.0],
        [-10.0, -0.0, 0.0],
    ]
)


def tiny(spacing: str = "n", low=(0, -math.pi, 0), high=(4, math.pi, 2), shape=(4, 8, 2), **other):
    return Partition(low, high, shape, spacing=spacing, **other)


def oracle(points: np.ndarray, grid: Partition) -> tuple[np.ndarray, np.ndarray]:
    """Cells and offsets from their centres: radius and azimuth in float32, all that follows in float64."""
    radius = np.sqrt(points[:, 0] ** 2 + points[:, 1] ** 2)
    azimuth = np.arctan2(points[:, 1], points[:, 0])
    framed = np.stack((radius, azimuth, points[:, 2]), axis=1)
    low, high = np.array(grid.low), np.array(grid.high)
    intervals = np.array(grid.shape) - (grid.spacing == "n_minus_1")
    size = (high - low) / intervals
    cells = np.floor((np.clip(framed, low, high) - low) / size).astype(np.int64)
    cells = np.minimum(cells, np.array(grid.shape) - 1)
    return cells, framed - ((cells + 0.5) * size + low)


# --- cells ----------------------------------------------------------------------------------------


def test_published_cells_and_offsets():
    """Border cells: with these bounds what is clipped at 50 m and 1.5 m does not reach the last cell."""
    framed = POLAR.to_frame(POINTS)
    cells = POLAR.cells(framed)
    assert cells.tolist() == [
        [0, 179, 0],
        [71, 269, 20],
        [20, 52, 27],
        [478, 179, 30],
        [0, 179, 13],
        [71, 359, 20],
        [71, 0, 20],
    ]
    away = [
        [-0.049061, 0, -0.072581],
        [-0.015658, -0.004375, 0.024194],
        [-0.011482, 0.008445, 0.008065],
        [10.049061, 0, 0.572581],
        [-2.049061, 0, 0.040323],
        [-0.015658, -0.008751, 0.024194],
        [-0.015658, -0.008751, 0.024194],
    ]
    expected = torch.tensor(away, dtype=torch.float64)
    torch.testing.assert_close(POLAR.offsets(framed, cells), expected, rtol=0, atol=1e-5)
    assert framed[1].tolist() == pytest.approx([10, math.pi / 2, 0])


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            CYLINDER,
            [
                [28, 179, 5],
                [95, 269, 20],
                [47, 52, 25],
                [479, 179, 31],
                [9, 179, 15],
                [95, 359, 20],
                [95, 0, 20],
            ],
        ),
        (
            Partition(POLAR.low, POLAR.high, (5, 4, 3)),
            [[0, 1, 0], [0, 2, 1], [0, 0, 1], [4, 1, 2], [0, 1, 0], [0, 3, 1], [0, 0, 1]],
        ),
    ],
)
def test_cells_of_other_grids(grid, expected):
    assert grid.cells(grid.to_frame(POINTS)).tolist() == expected


@pytest.mark.parametrize(
    "grid", [POLAR, CYLINDER, Partition(POLAR.low, POLAR.high, FULL, spacing="n")]
)
@pytest.mark.parametrize("scan", ["00/velodyne/000000.bin", "last"])
def test_a_real_scan_against_numpy(grid, scan, samples):
    """Only where the two libraries' arctan2 differ by a rounding may a cell differ."""
    scans = sorted((samples / "semantickitti/dataset/sequences").glob("*/velodyne/*.bin"))
    path = scans[-1] if scan == "last" else scans[0]
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 4)[:, :3]
    cells, away = oracle(points, grid)
    framed = grid.to_frame(torch.from_numpy(points))
    own = grid.cells(framed)
    differ = (own.numpy() != cells).any(1)
    assert len(points) > 50_000
    assert int(differ.sum()) <= 20
    own_away = grid.offsets(framed, own).numpy()[~differ]
    np.testing.assert_allclose(own_away, away[~differ], rtol=0, atol=1e-5)


def test_the_last_column_of_the_published_spacing_is_for_pi_alone():
    angles = torch.linspace(-math.pi, math.pi, 5000, dtype=torch.float64)
    framed = torch.stack((angles.new_full((5000,), 10.0), angles, angles.new_zeros(5000)), 1)
    column = POLAR.cells(framed)[:, 1]
    assert int(column[-1]) == 359
    assert int(column[-2]) == 358
    closed = Partition(POLAR.low, POLAR.high, FULL, spacing="n")
    column = closed.cells(framed)[:, 1]
    assert [int(column[i]) for i in (0, -1, -2)] == [0, 0, 359]


@pytest.mark.parametrize("pi", [math.pi, 3.1415926])
def test_a_closed_circle(pi):
    """-pi and pi are one column, and a point at pi lies half a column before its centre."""
    grid = tiny(low=(0, -pi, 0), high=(4, pi, 2))
    assert grid.full_circle
    points = torch.tensor([[-2.5, 0.0, 0.5], [-2.5, -0.0, 0.5], [-2.5, 1e-3, 0.5]])
    framed = grid.to_frame(points)
    cells = grid.cells(framed)
    assert cells.tolist() == [[2, 0, 0], [2, 0, 0], [2, 7, 0]]
    half = math.pi / 8
    away = grid.offsets(framed, cells)
    expected = [[0, -half, 0], [0, -half, 0], [0, half - 4e-4, 0]]
    torch.testing.assert_close(away, torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_an_open_sector_does_not_wrap():
    """A camera's view: what lies beyond its bounds is in its border columns, on both sides."""
    grid = tiny(low=(0, -0.8, 0), high=(4, 0.8, 2))
    assert not grid.full_circle
    framed = torch.tensor([[1.0, a, 0.5] for a in (-2.0, -0.8, 0.0, 0.8, 2.0)])
    cells = grid.cells(framed)
    assert cells[:, 1].tolist() == [0, 0, 4, 7, 7]
    expected = framed - grid.centres(cells)
    torch.testing.assert_close(grid.offsets(framed, cells), expected)


def test_a_cartesian_grid():
    grid = Partition((-4, -4, -1), (4, 4, 1), (8, 4, 2), "cartesian", "n")
    assert not grid.full_circle
    points = torch.tensor([[-4.0, -4, -1], [0.5, 1.9, 0], [4, 4, 1], [-9, 9, 0.5]])
    assert grid.to_frame(points) is points
    cells = grid.cells(points)
    assert cells.tolist() == [[0, 0, 0], [4, 2, 1], [7, 3, 1], [0, 3, 1]]
    assert grid.centres(cells).tolist()[1] == [0.5, 1.0, 0.5]
    assert grid.cell_size == (1, 2, 1)


@pytest.mark.parametrize("spacing", ["n", "n_minus_1"])
@pytest.mark.parametrize("frame", ["cylindrical", "cartesian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_are_inside_their_cells(frame, spacing, dtype):
    """Any point gets a cell of the grid; one inside the bounds is at most half a cell from its centre."""
    grid = Partition((1, -math.pi, -2), (9, math.pi, 2), (7, 16, 5), frame, spacing)
    points = 20 * torch.rand(3000, 3, generator=torch.Generator().manual_seed(0), dtype=dtype) - 10
    before = points.clone()
    framed = grid.to_frame(points)
    assert framed.dtype == dtype
    cells = grid.cells(framed)
    assert torch.equal(points, before)
    assert bool(((cells >= 0) & (cells < torch.tensor(grid.shape))).all())
    low, high, size = (torch.tensor(v).double() for v in (grid.low, grid.high, grid.cell_size))
    inside = ((framed >= low) & (framed <= high)).all(1)
    assert 50 < int(inside.sum()) < 3000
    away = grid.offsets(framed, cells)[inside].abs()
    assert bool((away <= size / 2 + 1e-9).all())


def test_bad_partitions():
    for asked, text in (
        (dict(frame="polar"), "frame 'polar' is none of cylindrical, cartesian"),
        (dict(spacing="n-1"), "spacing 'n-1' is none of"),
        (dict(low=(0, 0)), "low needs three finite values"),
        (dict(high=(math.inf, math.pi, 2)), "high needs three finite values"),
        (dict(high=(0, math.pi, 2)), "every axis needs low < high"),
        (dict(shape=(4, 0, 2)), "at least 1 cells"),
        (dict(shape=(4, 1, 2), spacing="n_minus_1"), "at least 2 cells"),
        (dict(low=(0, 0, 0), high=(4, 2 * math.pi, 2)), "points have -pi to pi"),
        (dict(shape=(2**21, 2**21, 2**21)), "does not fit 63 bits"),
    ):
        with pytest.raises(ValueError, match=text):
            tiny(**asked)


def test_a_partition_from_lists_is_equal():
    assert Partition(list(POLAR.low), list(POLAR.high), list(FULL)) == POLAR


# --- keys -----------------------------------------------------------------------------------------


def random_cells(n: int, grid: Partition, scans: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    cells = [torch.randint(0, most, (n,), generator=g) for most in grid.shape]
    return torch.randint(0, scans, (n,), generator=g), torch.stack(cells, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_keys(dtype):
    """Ordered by scan and cell, invertible, and those of a pillar side by side."""
    grid = tiny(shape=(5, 7, 3))
    batch, cells = random_cells(400, grid)
    keys = grid.keys(batch.to(dtype), cells.to(dtype))
    rows = [(b, *c) for b, c in zip(batch.tolist(), cells.tolist())]
    assert keys.tolist() == [((b * 5 + r) * 7 + p) * 3 + z for b, r, p, z in rows]
    back_batch, back_cells = grid.unpack(keys)
    assert torch.equal(back_batch, batch)
    assert torch.equal(back_cells, cells)
    pillars = torch.div(keys, 3, rounding_mode="floor").tolist()
    assert pillars == [(b * 5 + r) * 7 + p for b, r, p, _ in rows]


def test_keys_are_refused_where_they_overflow():
    grid = tiny(shape=(2**20, 2**20, 2**20))
    last = torch.tensor([[2**20 - 1] * 3])
    assert grid.keys(torch.tensor([6]), last).tolist() == [7 * 2**60 - 1]
    assert grid.unpack(torch.tensor([7 * 2**60 - 1]))[0].tolist() == [6]
    with pytest.raises(ValueError, match=r"times 9 scans does not fit 63 bits"):
        grid.keys(torch.tensor([0, 8]), last.expand(2, 3))
    assert len(grid.keys(torch.zeros(0, dtype=torch.int64), last[:0])) == 0


# --- groups ---------------------------------------------------------------------------------------


def check(groups: Groups, keys: list[int], fine: list[int] | None = None) -> None:
    """All four fields, from the definition; rows of one key follow `fine`, or else their own order."""
    assert groups.keys.tolist() == sorted(set(keys))
    assert groups.counts.tolist() == [keys.count(k) for k in sorted(set(keys))]
    assert groups.order.tolist() == sorted(
        range(len(keys)), key=lambda i: (keys[i], fine and fine[i])
    )
    assert [int(groups.keys[i]) for i in groups.inverse.tolist()] == keys


@pytest.mark.parametrize("n", [0, 1, 200])
def test_groups_from_their_definition(n):
    grid = tiny(shape=(3, 4, 5))
    batch, cells = random_cells(n, grid)
    keys = grid.keys(batch, cells)
    groups = group_rows(keys)
    check(groups, keys.tolist())
    pillars, place = merge_groups(groups, 5)
    check(pillars, [k // 5 for k in keys.tolist()], keys.tolist())
    assert [int(pillars.keys[i]) for i in place.tolist()] == [k // 5 for k in groups.keys.tolist()]
    alone, place = merge_groups(groups, 1)
    check(alone, keys.tolist())
    assert place.tolist() == list(range(len(groups.keys)))


@pytest.mark.parametrize("offset", [0, -5, 2**54, 2**63 - 11])
def test_groups_of_keys_of_any_size(offset):
    """Also where key and row together have more than 63 bits."""
    keys = torch.randint(0, 10, (700,), generator=torch.Generator().manual_seed(6)) + offset
    groups = group_rows(keys)
    check(groups, keys.tolist())
    assert groups.keys.dtype == groups.order.dtype == groups.inverse.dtype == torch.int64


def test_scans_of_a_batch_stay_apart():
    """The groups of a batch are those of its scans, one after the other."""
    grid = tiny()
    cells = random_cells(90, grid)[1]
    batch = torch.tensor([0] * 30 + [1] * 20 + [2] * 40)
    groups = group_rows(grid.keys(batch, cells))
    scans, found = grid.unpack(groups.keys)
    begin = 0
    for scan, part in enumerate(cells.split([30, 20, 40])):
        alone = group_rows(grid.keys(torch.zeros(len(part), dtype=torch.int64), part))
        assert torch.equal(found[scans == scan], grid.unpack(alone.keys)[1])
        assert torch.equal(groups.counts[scans == scan], alone.counts)
        rows = groups.order[(groups.order >= begin) & (groups.order < begin + len(part))]
        assert torch.equal(rows - begin, alone.order)
        begin += len(part)


def test_groups_do_not_depend_on_the_order_of_rows():
    keys = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(1))
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    groups, shuffled = group_rows(keys), group_rows(keys[mixed])
    assert torch.equal(groups.keys, shuffled.keys)
    assert torch.equal(groups.counts, shuffled.counts)
    assert torch.equal(groups.inverse[mixed], shuffled.inverse)
    ends = groups.counts.cumsum(0).tolist()
    for first, end in zip([0, *ends], ends):
        rows = mixed[shuffled.order[first:end]]
        assert sorted(rows.tolist()) == groups.order[first:end].tolist()


def test_merging_needs_cells():
    with pytest.raises(ValueError, match="cells must be 1 or more, got 0"):
        merge_groups(group_rows(torch.tensor([1])), 0)


# --- labels ---------------------------------------------------------------------------------------


def test_majority_by_hand():
    """Ties go to the smallest label, also where that means "no label"; an empty cell has 0."""
    votes = [(0, 5), (0, 5), (0, 7), (1, 7), (1, 5), (2, 0), (2, 0), (2, 9), (3, 9), (3, 0)]
    inverse, labels = (torch.tensor(column) for column in zip(*votes))
    assert majority_label(inverse, labels, 5, 20).tolist() == [5, 5, 0, 0, 0]


def test_majority_against_a_counter():
    g = torch.Generator().manual_seed(4)
    inverse = torch.randint(0, 40, (300,), generator=g)
    labels = torch.randint(0, 4, (300,), generator=g)
    expected = []
    for group in range(40):
        counter = Counter(labels[inverse == group].tolist())
        expected.append(min(counter, key=lambda label: (-counter[label], label)))
    assert majority_label(inverse, labels, 40, 4).tolist() == expected
    mixed = torch.randperm(300, generator=g)
    assert majority_label(inverse[mixed], labels[mixed], 40, 4).tolist() == expected


def test_majority_of_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    assert majority_label(none, none, 0, 20).tolist() == []
    assert majority_label(none, none, 2, 20).tolist() == [0, 0]


def test_labels_and_groups_out_of_range():
    good, bad = torch.tensor([0, 1]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"labels must lie in 0 .. 2, found 0 .. 3"):
        majority_label(good, bad, 2, 3)
    with pytest.raises(ValueError, match=r"labels must lie in 0 .. 2, found -1 .. 0"):
        majority_label(good, good - 1, 2, 3)
    with pytest.raises(ValueError, match=r"groups must lie in 0 .. 1, found 0 .. 3"):
        majority_label(bad, good, 2, 3)


@pytest.mark.cuda
def test_on_cuda():
    """Cells differ at most where the device's arctan2 is rounded differently; the rest to the bit."""
    points = 60 * torch.randn(5000, 3)
    framed = POLAR.to_frame(points)
    cells = POLAR.cells(framed)
    assert int((POLAR.cells(POLAR.to_frame(points.cuda())).cpu() != cells).any(1).sum()) <= 5
    assert torch.equal(POLAR.cells(framed.cuda()).cpu(), cells)
    batch = torch.zeros(5000, dtype=torch.int64)
    keys = POLAR.keys(batch, cells)
    assert torch.equal(POLAR.keys(batch.cuda(), cells.cuda()).cpu(), keys)
    for own, other in zip(
        vars(merge_groups(group_rows(keys), 32)[0]).values(),
        vars(merge_groups(group_rows(keys.cuda()), 32)[0]).values(),
    ):
        assert torch.equal(own, other.cpu())
    labels = torch.randint(0, 20, (5000,))
    inverse = group_rows(keys).inverse
    own = majority_label(inverse, labels, 5000, 20)
    assert torch.equal(own, majority_label(inverse.cuda(), labels.cuda(), 5000, 20).cpu())
