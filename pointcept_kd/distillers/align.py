"""Two networks' rows onto the same cells.

Rows of a pooled level are numbered along whichever serialisation curve came first, which differs between networks and
between steps: the *set* of cells is the same, the order is not. Rows are therefore matched by (scan, cell), never by
position.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.ops.grid import CellKeys

from .taps import Activation


def match_cells(
    batch_a: Int[Tensor, " n"],
    cells_a: Int[Tensor, "n 3"],
    batch_b: Int[Tensor, " m"],
    cells_b: Int[Tensor, "m 3"],
) -> Int[Tensor, " n"]:
    """For every row of `a`, the row of `b` that is the same cell of the same scan.

    Args:
        batch_a, batch_b: scan index of each row.
        cells_a, cells_b: grid cell of each row; both at the same resolution and origin.

    Returns:
        (n,) int64 with `cells_b[rows] == cells_a`; rows that agree already come back as 0 ... n - 1,
        duplicates included.

    Raises:
        InputError: when the two do not cover the same cells, or a cell occurs twice and the orders differ.
    """
    if (
        len(cells_a) == len(cells_b)
        and torch.equal(cells_a, cells_b)
        and torch.equal(batch_a, batch_b)
    ):
        return torch.arange(len(cells_a), device=cells_a.device)
    if len(cells_a) != len(cells_b):
        raise InputError(
            f"teacher and student cover different cells: {len(cells_b)} against {len(cells_a)}; "
            "both need the same voxel size and total stride at the tap"
        )
    keys = CellKeys.fit(torch.cat([batch_a, batch_b]), torch.cat([cells_a, cells_b]))
    sorted_a, order_a = torch.sort(keys.pack(batch_a, cells_a), stable=True)
    sorted_b, order_b = torch.sort(keys.pack(batch_b, cells_b), stable=True)
    differ = sorted_a != sorted_b
    if bool(differ.any()):
        raise InputError(
            f"teacher and student cover different cells: {int(differ.sum())} of {len(differ)} sorted keys differ; "
            "both need the same voxel size and total stride at the tap"
        )
    if bool((sorted_a[1:] == sorted_a[:-1]).any()):
        raise InputError(
            "a cell occurs twice within one scan (mixed scenes do that at the finest level) and the row orders differ; "
            "tap a pooled level instead"
        )
    rows = torch.empty_like(order_a)
    rows[order_a] = order_b
    return rows


def align(student: Activation, teacher: Activation) -> tuple[Tensor, Tensor]:
    """Features of both networks with equal rows, in the student's order.

    Activations with cells are matched by (scan, cell). Plain tensors carry no cells; they are taken as they stand when
    the row counts agree, which holds for per-point outputs such as logits.

    Returns:
        student (n, c_s) and teacher (n, c_t) features.

    Raises:
        InputError: when the two cover different cells or have different row counts.
    """
    if student.cells is not None and teacher.cells is not None:
        if student.batch is None or teacher.batch is None:
            raise InputError(
                "a tap has cells but no scan index; tap a module that returns the whole point container"
            )
        rows = match_cells(student.batch, student.cells, teacher.batch, teacher.cells)
        return student.feat, teacher.feat[rows]
    if len(student.feat) != len(teacher.feat):
        raise InputError(
            f"teacher and student have {len(teacher.feat)} and {len(student.feat)} rows and no cells to match them by"
        )
    return student.feat, teacher.feat
