"""The networks: what a teacher or a student can be.

Importing this room registers the backbones `PT-v3m1`, `SpUNet-v1m1`, `kd.Cylinder3D` and `kd.PolarNet`, the
segmentors `DefaultSegmentor`, `DefaultSegmentorV2` and `kd.VoxelSegmentor`, and for completion `kd.ConditionEncoder`,
`kd.Denoiser` and `kd.Refiner`. A network does not know that it is distilled: distillers tap it by module path.
"""

from __future__ import annotations

from .cylinder3d import Cylinder3D
from .denoiser import ConditionEncoder, Denoiser, Refiner
from .polarnet import PolarNet
from .ptv3 import PointTransformerV3
from .segmentor import DefaultSegmentor, DefaultSegmentorV2
from .sparse_unet import SpUNetBase
from .voxels import VoxelSegmentor

__all__ = [
    "ConditionEncoder",
    "Cylinder3D",
    "DefaultSegmentor",
    "DefaultSegmentorV2",
    "Denoiser",
    "PointTransformerV3",
    "PolarNet",
    "Refiner",
    "SpUNetBase",
    "VoxelSegmentor",
]
