"""Data: readers of LiDAR data sets, transforms, and simulated streets.

`synthetic` (which needs the extra `sim` to run) is imported by those who simulate.
"""

from . import (
    completion_pairs,
    kitti,
    mirror,
    nuscenes,
    planar,
    point_index,
    semantic_kitti,
    transforms,
    waymo,
)

__all__ = [
    "completion_pairs",
    "kitti",
    "mirror",
    "nuscenes",
    "planar",
    "point_index",
    "semantic_kitti",
    "transforms",
    "waymo",
]
