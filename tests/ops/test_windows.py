"""Windows: values worked by hand, a plain loop, the seam, independence of the batch, chunks, and what is refused."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from pointcept_kd.ops.windows import (
    QUANTA,
    exponential_rows,
    spherical,
    windows,
)

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def tokens(n, scans=2, seed=0, spread=5.0):
    g = torch.Generator().manual_seed(seed)
    u = (torch.rand(n, 3, generator=g) - 0.4) * spread
    return u, torch.randint(scans, (n,), generator=g)


def members(divided):
    """The windows as a set of tuples of tokens."""
    made = set()
    for start, size in zip(divided.starts.tolist(), divided.sizes.tolist()):
        made.add(tuple(divided.order[start : start + size].tolist()))
    return made


def by_loop(u, batch, window, origin):
    """Windows and cells, token by token."""
    low = {}
    for b in set(batch):
        rows = [p for p, c in zip(u, batch) if c == b]
        low[b] = [min(p[x] for p in rows) if origin == "min" else 0.0 for x in range(3)]
    groups, cells = defaultdict(list), []
    for i, (p, b) in enumerate(zip(u, batch)):
        away = [p[x] - low[b][x] for x in range(3)]
        index = [math.floor(away[x] / window[x]) for x in range(3)]
        groups[(b, *index)].append(i)
        rest = [away[x] - index[x] * window[x] for x in range(3)]
        cells.append([min(max(math.floor(rest[x] / (window[x] / 24)), 0), 23) for x in range(3)])
    return {tuple(v) for v in groups.values()}, cells


# ------------------------------------------------------------------------------------------------------ by hand, oracle


def test_spherical_by_hand():
    xyz = torch.tensor(
        [[10.0, 0, 0], [-10, 0, 0], [-10, -0.001, 0], [0, 10, 10], [0, -10, -10], [3, 4, 12]]
    )
    expected = [
        (180, 90, 10),
        (360, 90, 10),
        (0.00573, 90, 10),
        (270, 45, 14.142136),
        (90, 135, 14.142136),
        (233.130102, 22.619865, 13),
    ]
    u = spherical(xyz)
    assert u.dtype == torch.float64
    assert torch.allclose(u, torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    # The window of a token is read off the division into windows of that token and one at a known place.
    index = torch.floor(u / torch.tensor([2.0, 2.0, 120.0])).long().tolist()
    assert index == [[90, 45, 0], [180, 45, 0], [0, 45, 0], [135, 22, 0], [45, 67, 0], [116, 11, 0]]
    assert torch.equal(
        spherical(torch.zeros(1, 3)), torch.tensor([[180.0, 0, 0]], dtype=torch.float64)
    )


def test_exponential_rows_by_hand():
    given = {
        0: 24,
        0.01: 24,
        0.0125: 25,
        0.03: 26,
        0.06: 27,
        0.1: 28,
        0.2: 30,
        1: 34,
        1.2: 35,
        10: 41,
        50: 45,
        80: 47,
        110: 47,
        -0.005: 23,
        -0.0125: 22,
        -0.03: 21,
        -1: 13,
        -50: 2,
        -110: 0,
    }
    for dtype in (torch.float32, torch.float64):
        d = torch.tensor(list(given), dtype=dtype)
        assert exponential_rows(d, 0.0125).tolist() == list(given.values())
        assert exponential_rows(d.view(1, -1, 1), 0.0125).shape == (1, len(given), 1)


def test_exponential_rows_by_logarithm():
    a = 0.0125
    g = torch.Generator().manual_seed(1)
    d = (torch.rand(5000, generator=g, dtype=torch.float64) * 2 - 1) * 100
    d = d * torch.rand(5000, generator=g, dtype=torch.float64) ** 6
    for value, row in zip(d.tolist(), exponential_rows(d, a).tolist()):
        k = 2 * math.floor(math.log2((abs(value) + 2 * a) / a)) - 2
        k += abs(value) >= (3 * 2 ** (k // 2) - 2) * a
        assert row == min(max(24 + k if value >= 0 else 23 - k, 0), 47), value
    rows = exponential_rows(d, a)
    assert torch.equal(rows + exponential_rows(-d, a), torch.full_like(rows, 47))
    # The bins begin where they are said to, halfway between which nothing is left to rounding.
    starts = [0, 1, 2, 4, 6, 10, 14, 22, 30, 46, 62, 94, 126, 190, 254, 382, 510, 766, 1022, 1534]
    starts += [2046, 3070, 4094, 6142, 8190, 10**9]
    inside = torch.tensor([(x + y) / 2 for x, y in itertools.pairwise(starts)]) * a
    assert exponential_rows(inside, a).tolist() == [*range(24, 48), 47]
    edges = torch.tensor(starts[1:24], dtype=torch.float64) * a
    bins = torch.bucketize(d.abs(), edges, right=True)
    assert torch.equal(rows, torch.where(d >= 0, 24 + bins, 23 - bins))


@pytest.mark.parametrize("origin", ["min", "zero"])
def test_against_a_plain_loop(origin):
    u, batch = tokens(400)
    window = (1.5, 0.7, 4.0)
    made = windows(u, batch, window, origin)
    groups, cells = by_loop(u.double().tolist(), batch.tolist(), window, origin)
    assert members(made) == groups
    assert made.cells.tolist() == cells
    assert int(made.sizes.sum()) == 400
    assert sorted(made.order.tolist()) == list(range(400))
    assert torch.equal(made.u, u.double())
    # All cells of a window occur, and none outside them.
    assert (int(made.cells.min()), int(made.cells.max())) == (0, QUANTA - 1)


def test_cells_of_another_size():
    u, batch = tokens(300)
    coarse = windows(u, batch, (2.0, 2.0, 2.0), cell=(1.0, 0.5, 0.01))
    own = windows(u, batch, (2.0, 2.0, 2.0))
    assert members(coarse) == members(own)
    assert [len(coarse.cells[:, x].unique()) for x in range(2)] == [2, 4]
    assert torch.equal(coarse.cells[:, 0], torch.div(own.cells[:, 0], 12, rounding_mode="floor"))
    # Cells beyond the 24th count in it.
    assert int((coarse.cells[:, 2] == 23).sum()) > 200


def test_border_of_a_window():
    """One float before, at and behind a border: cell and window agree."""
    edge = torch.tensor(0.6, dtype=torch.float64) * 7
    places = torch.stack([torch.nextafter(edge, edge - 1), edge, torch.nextafter(edge, edge + 1)])
    u = places[:, None].repeat(1, 3)
    made = windows(u, torch.zeros(3, dtype=torch.int64), (0.6,) * 3, "zero")
    assert len(made.sizes) == 2
    # The border itself may round to either side, with the cell of that side.
    assert made.cells[0].tolist() == [23] * 3
    assert made.cells[2].tolist() == [0] * 3
    assert made.cells[1].tolist() in ([23] * 3, [0] * 3)


# ------------------------------------------------------------------------------------------------- seam, independence


def test_seam():
    xyz = torch.tensor([[-10.0, 0.0, 0.0], [-10.0, -0.001, 0.0], [-10.0, 0.001, 0.0]])
    batch = torch.zeros(3, dtype=torch.int64)
    published = windows(spherical(xyz), batch, (2, 2, 120), "zero")
    assert members(published) == {(0,), (1,), (2,)}, "theta 360, 0.006 and 359.994"
    wrapped = spherical(xyz, wrap=True)
    assert wrapped[0].tolist() == [0.0, 90.0, 10.0]
    made = windows(wrapped, batch, (2, 2, 120), "zero")
    assert members(made) == {(0, 1), (2,)}
    assert made.cells[:, 0].tolist() == [0, 0, 23]
    # A zero of either sign is one place.
    signed = torch.tensor([[-10.0, -0.0, 0.0], [-10.0, 0.0, 0.0]])
    assert spherical(signed)[:, 0].tolist() == [360.0, 360.0]


@pytest.mark.parametrize("origin", ["min", "zero"])
def test_independent_of_the_batch(origin):
    u, batch = tokens(300, scans=3)
    together = windows(u, batch, (0.9, 0.9, 2.0), origin)
    for scan in range(3):
        rows = (batch == scan).nonzero().squeeze(1)
        alone = windows(u[rows], torch.zeros_like(rows), (0.9, 0.9, 2.0), origin)
        assert torch.equal(alone.cells, together.cells[rows])
        mine = {tuple(rows[list(m)].tolist()) for m in members(alone)}
        assert mine == {m for m in members(together) if int(batch[m[0]]) == scan}


def test_origin():
    u, batch = tokens(200)
    shift = torch.tensor([10.3, -4.2, 7.9], dtype=torch.float64)
    least = windows(u.double(), batch, (0.9,) * 3)
    moved = windows(u.double() + shift, batch, (0.9,) * 3)
    assert members(least) == members(moved)
    fixed = windows(u.double() + shift, batch, (0.9,) * 3, "zero")
    assert members(fixed) != members(moved)


# -------------------------------------------------------------------------------------------------------------- chunks


def test_chunks():
    u, batch = tokens(500)
    made = windows(u, batch, (0.8, 0.8, 3.0))
    for pairs in (None, 1, 64):
        chunks = made.chunks(pairs)
        assert made.chunks(pairs) is chunks
        seen, groups = [], set()
        for chunk in chunks:
            w, length = chunk.rows.shape
            assert length in LENGTHS
            shorter = max([0, *(other for other in LENGTHS if other < length)])
            assert pairs is None or w == 1 or w * length**2 <= pairs
            valid = torch.ones(w, length, dtype=bool) if chunk.valid is None else chunk.valid
            assert torch.equal(chunk.tokens, chunk.rows[valid])
            if chunk.valid is None:
                assert chunk.kept is None
            else:
                assert torch.equal(chunk.rows.flatten()[chunk.kept], chunk.tokens)
            for rows, real in zip(chunk.rows, valid):
                count = int(real.sum())
                assert shorter < count <= length
                assert bool(real[:count].all())
                assert rows[count:].tolist() == [int(rows[count - 1])] * (length - count)
                groups.add(tuple(rows[:count].tolist()))
            seen += chunk.rows[valid].tolist()
        assert sorted(seen) == list(range(500))
        assert groups == members(made)
    assert {c.length for c in made.chunks()} >= {1, 2, 3, 4, 6}


def test_nothing():
    none = torch.zeros(0, 3)
    made = windows(none, torch.zeros(0, dtype=torch.int64), (1, 1, 1))
    assert len(made.order) == len(made.sizes) == 0
    assert made.cells.shape == (0, 3)
    assert made.chunks() == []
    assert spherical(none).shape == (0, 3)
    one = windows(torch.ones(1, 3), torch.tensor([5]), (1, 1, 1))
    assert (one.order.tolist(), one.sizes.tolist(), one.cells.tolist()) == ([0], [1], [[0, 0, 0]])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"window": (1, 1)}, "window must be three finite numbers"),
        ({"window": (1, 0, 1)}, "window must be three finite numbers above 0"),
        ({"cell": (1, 1, math.inf)}, "cell must be three finite numbers"),
        ({"origin": "max"}, "origin 'max' is none of min, zero"),
        ({"u": torch.full((3, 3), torch.nan)}, "must be finite"),
        ({"u": torch.tensor([[0.0] * 3, [math.inf] * 3, [1.0] * 3])}, "must be finite"),
        ({"u": torch.zeros(3, 2)}, r"\(3, 2\).*expected \(n, 3\)"),
        ({"batch": torch.zeros(2, dtype=torch.int64)}, r"batch \(2,\)"),
        ({"batch": torch.tensor([0, -1, 0])}, "batch numbers must be 0 or more"),
        ({"u": torch.tensor([[0.0] * 3, [1e9] * 3, [0.0] * 3]), "window": (1e-9,) * 3}, "63 bits"),
    ],
)
def test_bad_input(changes, text):
    given = {
        "u": torch.zeros(3, 3),
        "batch": torch.zeros(3, dtype=torch.int64),
        "window": (1, 1, 1),
        **changes,
    }
    with pytest.raises(ValueError, match=text) as error:
        windows(**given)
    assert "\n" not in str(error.value)


def test_other_bad_input():
    for a in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a must be a finite number above 0"):
            exponential_rows(torch.zeros(2), a)
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        windows(torch.zeros(1, 3), torch.tensor([0]), (1, 1, 1)).chunks(0)
