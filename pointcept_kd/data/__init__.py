"""Data: readers of LiDAR data sets, transforms, and simulated streets.

`synthetic` (which needs the extra `sim` to run) is imported by those who simulate.
"""

from . import (
    camera_views,
    completion_pairs,
    image_labels,
    image_patches,
    instances,
    kitti,
    mirror,
    nuscenes,
    pair_transforms,
    pasting,
    pixel_pairs,
    planar,
    point_index,
    semantic_kitti,
    transforms,
    voxel_sample,
    waymo,
)

__all__ = [
    "camera_views",
    "completion_pairs",
    "image_labels",
    "image_patches",
    "instances",
    "kitti",
    "mirror",
    "nuscenes",
    "pair_transforms",
    "pasting",
    "pixel_pairs",
    "planar",
    "point_index",
    "semantic_kitti",
    "transforms",
    "voxel_sample",
    "waymo",
]
