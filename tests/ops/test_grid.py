"""Packed cell keys: order, inverse, padding, limits."""

import pytest
import torch

from pointcept_kd.ops.grid import CellKeys, unique_cells


def random_cells(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 3, (n,), generator=g)
    return batch, torch.randint(-9, 9, (n, 3), generator=g)


def test_hand_value():
    batch = torch.tensor([0, 1])
    cells = torch.tensor([[2, 5, -1], [3, 5, 1]])
    grid = CellKeys.fit(batch, cells)
    assert grid == CellKeys(lo=(2, 5, -1), extent=(2, 1, 3), batches=2)
    # ((batch * 2 + x - 2) * 1 + y - 5) * 3 + z + 1
    assert grid.pack(batch, cells).tolist() == [0, (1 * 2 + 1) * 3 + 2]


@pytest.mark.parametrize("pad", [0, 1, (2, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_keys_are_ordered_and_invertible(pad, dtype):
    batch, cells = random_cells(500)
    batch, cells = batch.to(dtype), cells.to(dtype)
    grid = CellKeys.fit(batch, cells, pad)
    keys = grid.pack(batch, cells)
    rows = [(b, *c) for b, c in zip(batch.tolist(), cells.tolist())]
    by_key = sorted(range(500), key=lambda i: int(keys[i]))
    assert [rows[i] for i in by_key] == sorted(rows)
    back_batch, back_cells = grid.unpack(keys)
    assert torch.equal(back_batch, batch.long())
    assert torch.equal(back_cells, cells.long())


def test_padding_keeps_neighbours_apart():
    """A step over the border of the box must not land on a cell of another column or scan."""
    full = torch.cartesian_prod(torch.arange(2), *(torch.arange(3),) * 3)
    batch, cells = full[:, 0], full[:, 1:]
    taken = {tuple(row) for row in full.tolist()}
    for pad, apart in ((1, True), (0, False)):
        grid = CellKeys.fit(batch, cells, pad)
        keys = grid.pack(batch, cells)
        known = dict(zip(keys.tolist(), full.tolist()))
        wrong = 0
        for step in ((0, 0, 1), (0, 1, -1), (-1, -1, -1), (1, 0, 0)):
            for row, key in zip(full.tolist(), keys.tolist()):
                target = (row[0], row[1] + step[0], row[2] + step[1], row[3] + step[2])
                met = known.get(key + grid.step(*step))
                wrong += (met is not None) != (target in taken)
                if apart and met is not None:
                    assert tuple(met) == target
        assert (wrong == 0) == apart


def test_inside():
    batch, cells = torch.tensor([0, 0]), torch.tensor([[0, 0, 0], [4, 4, 4]])
    grid = CellKeys.fit(batch, cells, 1)
    asked = torch.tensor([[-1, 0, 5], [-2, 0, 0], [0, 6, 0], [2, 2, 2]])
    assert grid.inside(torch.tensor([0, 0, 0, 1]), asked).tolist() == [True, False, False, False]


def test_unique_cells():
    batch, cells = random_cells(2000, seed=1)
    grid = CellKeys.fit(batch, cells)
    keys = grid.pack(batch, cells)
    unique, inverse, counts = unique_cells(keys)
    rows = [(b, *c) for b, c in zip(batch.tolist(), cells.tolist())]
    distinct = sorted(set(rows))
    ub, uc = grid.unpack(unique)
    assert [(b, *c) for b, c in zip(ub.tolist(), uc.tolist())] == distinct
    assert torch.equal(unique[inverse], keys)
    assert counts.tolist() == [rows.count(r) for r in distinct]


def test_no_cells():
    none = torch.zeros(0, dtype=torch.int64)
    grid = CellKeys.fit(none, none.view(0, 3), pad=1)
    keys = grid.pack(none, none.view(0, 3))
    unique, inverse, counts = unique_cells(keys)
    assert len(unique) == len(inverse) == len(counts) == 0
    assert grid.unpack(keys)[1].shape == (0, 3)


def test_largest_grid_that_fits():
    """2 ** 63 - 1 keys fit, one more scan does not; the corners keep their own keys."""
    cells = torch.tensor([[0, 0, 0], [2**21 - 1, 2**21 - 1, 2**20 - 1]])
    grid = CellKeys.fit(torch.tensor([0, 0]), cells)
    assert grid.pack(torch.tensor([0, 0]), cells).tolist() == [0, 2**62 - 1]
    with pytest.raises(ValueError, match="does not fit 63 bits"):
        CellKeys.fit(torch.tensor([0, 1]), cells)


def test_bad_input():
    cells = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch numbers must be 0 or more; the lowest is -1"):
        CellKeys.fit(torch.tensor([0, -1]), cells)
    with pytest.raises(ValueError, match="pad must be"):
        CellKeys.fit(torch.tensor([0, 0]), cells, pad=-1)
    with pytest.raises(ValueError, match="pad must be"):
        CellKeys.fit(torch.tensor([0, 0]), cells, pad=(1, 1))
