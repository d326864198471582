"""Rows are matched by (scan, cell): against a dictionary, with duplicates, and with different cell sets."""

import pytest
import torch

from pointcept_kd.distillers.align import align, match_cells
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import InputError


def random_cells(n, scans=3, low=-9, high=9):
    """Unique (scan, cell) rows."""
    rows = torch.stack(
        [
            torch.randint(0, scans, (4 * n,)),
            *(torch.randint(low, high, (4 * n,)) for _ in range(3)),
        ],
        1,
    )
    rows = torch.unique(rows, dim=0)
    rows = rows[torch.randperm(len(rows))[:n]]
    return rows[:, 0], rows[:, 1:]


@pytest.mark.parametrize("n", [1, 2, 200])
def test_equals_a_dictionary(n):
    batch, cells = random_cells(n)
    order = torch.randperm(n)
    where = {(int(b), *c.tolist()): i for i, (b, c) in enumerate(zip(batch[order], cells[order]))}
    expected = torch.tensor([where[(int(b), *c.tolist())] for b, c in zip(batch, cells)])
    assert torch.equal(match_cells(batch, cells, batch[order], cells[order]), expected)


def test_equal_rows_come_back_as_they_are_even_with_duplicates():
    batch, cells = torch.tensor([0, 0, 1]), torch.tensor([[1, 2, 3], [1, 2, 3], [0, 0, 0]])
    assert match_cells(batch, cells, batch, cells).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="a cell occurs twice"):
        match_cells(batch, cells, batch.flip(0), cells.flip(0))


def test_same_cells_of_another_scan_do_not_match():
    cells = torch.tensor([[0, 0, 0], [0, 0, 1]])
    with pytest.raises(InputError, match="2 of 2 sorted keys differ"):
        match_cells(torch.tensor([0, 0]), cells, torch.tensor([1, 1]), cells)


def test_other_counts_are_refused():
    batch, cells = random_cells(5)
    with pytest.raises(InputError, match="4 against 5"):
        match_cells(batch, cells, batch[:4], cells[:4])
    with pytest.raises(InputError, match="4 and 5 rows and no cells"):
        align(Activation(torch.zeros(5, 2)), Activation(torch.zeros(4, 2)))


def test_features_follow_their_cells_and_keep_the_graph():
    batch, cells = random_cells(30)
    feat = torch.randn(30, 4)
    order = torch.randperm(30)
    leaf = feat.clone().requires_grad_()
    left, right = align(
        Activation(leaf, batch, cells), Activation(feat[order], batch[order], cells[order])
    )
    assert torch.equal(left, right)
    assert left is leaf
