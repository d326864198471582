"""Farthest point sampling of batches of scans."""

import torch
from torch import Tensor

from ._backend import backend
from ._checks import cloud, ends, same_device, same_scans, spans


@torch.no_grad()
def farthest_point_sampling(xyz: Tensor, offset: Tensor, new_offset: Tensor) -> Tensor:
    """Rows of points that are each as far as possible from those taken before.

    Every scan starts with its first row. Among equally far points the lowest row is taken, except
    on CPU with fpsample installed, where any of them may be. A scan asked for more samples than it
    has points repeats its first row.

    Args:
        xyz: (n, 3) points; columns after the third are not looked at.
        offset: (b) end of each scan in `xyz`.
        new_offset: (b) end of each scan in the result.

    Returns:
        int32 rows of `xyz` (new_offset[-1]), scan by scan, in the order they were taken.

    Raises:
        ValueError: offsets that decrease or do not end at the number of points, samples asked of an
            empty scan, coordinates that are not finite, or tensors on several devices.

    Eldar et al., 1997, "The farthest point strategy for progressive image sampling".
    """
    same_device(xyz=xyz, offset=offset, new_offset=new_offset)
    points = cloud("xyz", xyz[:, :3] if xyz.dim() == 2 else xyz)
    point_ends = ends("offset", offset, len(points))
    new_ends = ends("new_offset", new_offset)
    same_scans(point_ends, new_ends)
    for scan, ((first, last), (begin, end)) in enumerate(zip(spans(point_ends), spans(new_ends))):
        if first == last and begin < end:
            raise ValueError(f"scan {scan} is empty, but {end - begin} samples are asked of it")
    return backend(points).farthest(points, point_ends, new_ends)
