"""Features at other points, weighted by the inverse distance of the nearest neighbours."""

import torch
from torch import Tensor

from ._checks import same_device, shape
from .query import knn_query


def interpolation(
    xyz: Tensor,
    new_xyz: Tensor,
    feat: Tensor,
    offset: Tensor,
    new_offset: Tensor,
    k: int = 3,
) -> Tensor:
    """Mean of the features of the k nearest points, weighted by 1 / (distance + 1e-8).

    A scan with fewer points gives all it has; a query in a scan without points gets zeros.

    Args:
        xyz: (m, 3) positions of the features.
        new_xyz: (n, 3) where to interpolate.
        feat: (m, c) features.
        offset: (b) end of each scan in `xyz`.
        new_offset: (b) end of each scan in `new_xyz`.
        k: neighbours.

    Returns:
        (n, c) in the type of `feat`, float32 for half precision; differentiable in `feat` only.

    Raises:
        ValueError: as `knn_query`, and if `feat` does not fit `xyz`.

    Qi et al., 2017, arXiv:1706.02413, equation 2, with the exponent 1.
    """
    same_device(xyz=xyz, feat=feat)
    shape("feat", feat, len(xyz), None)
    feat = feat.to(torch.promote_types(feat.dtype, torch.float32))
    idx, distance = knn_query(k, xyz, offset, new_xyz, new_offset)
    if len(feat) == 0:
        return feat.new_zeros(len(idx), feat.shape[1])
    weight = (idx >= 0).to(distance.dtype) / (distance + 1e-8)
    # At least one neighbour gives a sum above 1e-6, so the bound touches only empty rows.
    weight = (weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-30)).to(feat.dtype)
    out = feat.new_zeros(len(idx), feat.shape[1])
    # Neighbour by neighbour: a (n, k, c) array is never made.
    for column, share in zip(idx.clamp(min=0).unbind(1), weight.unbind(1)):
        out = torch.addcmul(out, feat.index_select(0, column), share.unsqueeze(1))
    return out


def interpolation2(
    xyz: Tensor,
    new_xyz: Tensor,
    input: Tensor,
    offset: Tensor,
    new_offset: Tensor,
    k: int = 3,
) -> Tensor:
    """`interpolation` under upstream's second name, where `feat` is called `input`."""
    return interpolation(xyz, new_xyz, input, offset, new_offset, k)
