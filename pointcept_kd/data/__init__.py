"""Data: readers of LiDAR data sets, transforms, and simulated streets.

`synthetic` (which needs the extra `sim` to run) is imported by those who simulate.
"""

from . import point_index, semantic_kitti, transforms

__all__ = ["point_index", "semantic_kitti", "transforms"]
