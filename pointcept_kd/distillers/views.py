"""A teacher that looks at another view of the scan: its own augmentation, voxels and past scans.

The two views share raw points, so rows correspond point by point, whatever was done to coordinates: student voxel v
stands for raw point i, which lies in teacher voxel `match[v]`. No coordinate is compared.

Sun et al., 2024, doi:10.1109/TPAMI.2024.3451658.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.point import offset2batch

from .taps import Activation

MATCH = "match"


def other_view(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries that begin with `prefix`, without it.

    Raises:
        InputError: for a batch without a second view.
    """
    view = {key[len(prefix) :]: value for key, value in batch.items() if key.startswith(prefix)}
    if "offset" not in view or MATCH not in batch:
        missing = [k for k in (f"{prefix}offset", MATCH) if k not in batch]
        raise InputError(
            f"the batch has no {' and no '.join(missing)}: a teacher with view={prefix!r} needs a second view of every "
            "scan, see kd.CameraViewDataset"
        )
    return view


def matched_rows(batch: Mapping[str, Any], prefix: str) -> Tensor:
    """For every row of the student, (n,) int64, the teacher's row in the joined batch.

    Args:
        batch: `match` (n,) int64 rows within the teacher's view of the scan, `offset` and `<prefix>offset` (b,).

    Raises:
        InputError: for other numbers of rows or scans, and rows that the teacher's view does not have.
    """
    match, ends, own = batch[MATCH], batch[f"{prefix}offset"], batch["offset"]
    if len(ends) != len(own):
        raise InputError(f"{len(own)} scans and {len(ends)} of the teacher's view")
    scan = offset2batch(own)
    if len(scan) != len(match):
        raise InputError(f"match has {len(match)} rows, the scans have {len(scan)} points")
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    rows = match + starts[scan]
    if len(rows) and bool(((match < 0) | (rows >= ends[scan])).any()):
        raise InputError("match names a row that the teacher's view of its scan does not have")
    return rows


def in_the_students_order(
    name: str, activation: Activation, rows: Tensor, count: int
) -> Activation:
    """An activation of the teacher's view with the rows of the student's.

    Args:
        name: of the tap, for the message.
        rows: see `matched_rows`.
        count: points of the teacher's view.

    Raises:
        InputError: for an activation that does not have one row per point of the view.
    """
    if len(activation.feat) != count:
        raise InputError(
            f"tap {name}: {len(activation.feat)} rows for {count} points of the teacher's view; only features of "
            "points can be matched, tap what is brought back to them"
        )
    return Activation(activation.feat[rows])
