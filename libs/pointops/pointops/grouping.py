"""Features of neighbours. A missing neighbour, row -1, gives zeros and takes no gradient."""

import torch
from torch import Tensor

from ._checks import rows, same_device, shape


def grouping(
    idx: Tensor,
    feat: Tensor,
    xyz: Tensor,
    new_xyz: Tensor | None = None,
    with_xyz: bool = False,
) -> Tensor:
    """Features of the neighbours of every query, and their positions relative to it.

    Args:
        idx: (m, nsample) rows of `feat` and `xyz`; -1 where there is no neighbour.
        feat: (n, c) features.
        xyz: (n, 3) positions.
        new_xyz: (m, 3) positions of the queries; `xyz` if left out.
        with_xyz: put the 3 relative coordinates in front of the features.

    Returns:
        (m, nsample, c), or (m, nsample, 3 + c), float32 for features of half precision.
        Differentiable in `feat`, `xyz` and `new_xyz`.

    Raises:
        ValueError: shapes that do not fit, rows outside -1 to n - 1, tensors on several devices.
    """
    shape("idx", idx, None, None)
    shape("xyz", xyz, len(feat), 3)
    same_device(idx=idx, feat=feat, xyz=xyz, new_xyz=new_xyz)
    features = grouping2(feat.to(torch.promote_types(feat.dtype, torch.float32)), idx)
    if not with_xyz:
        return features
    centre = xyz if new_xyz is None else new_xyz
    shape("new_xyz", centre, len(idx), 3)
    relative = grouping2(xyz, idx) - centre.unsqueeze(1)
    relative = relative.masked_fill((idx < 0).unsqueeze(-1), 0)
    return torch.cat((relative, features), dim=-1)


def grouping2(input: Tensor, idx: Tensor) -> Tensor:
    """Rows (m, nsample, c) of `input` (n, c) named by `idx` (m, nsample), zeros for -1.

    Differentiable in `input`.

    Raises:
        ValueError: shapes that do not fit, rows outside -1 to n - 1, tensors on several devices.
    """
    shape("idx", idx, None, None)
    shape("input", input, None, None)
    same_device(input=input, idx=idx)
    rows("idx", idx, len(input), lowest=-1)
    # One row of zeros behind the last serves the missing ones without a look at the values.
    padded = torch.cat((input, input.new_zeros(1, input.shape[1])))
    index = torch.where(idx < 0, len(input), idx)
    # index_select, because its gradient is index_add, several times faster than that of indexing.
    return padded.index_select(0, index.reshape(-1)).view(*idx.shape, input.shape[1])
