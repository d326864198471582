"""The networks: what a teacher or a student can be.

Importing this room registers the backbones `PT-v3m1`, `SpUNet-v1m1`, `kd.Cylinder3D` and `kd.PolarNet`, the segmentors
`DefaultSegmentor`, `DefaultSegmentorV2`, `kd.LinearProbe` and `kd.VoxelSegmentor`, and for completion
`kd.ConditionEncoder`, `kd.Denoiser` and `kd.Refiner`. OpenPCDet's encoders are `kd.VoxelBackBone8x`,
`kd.VoxelResBackBone8x` and `kd.UNetV2`, and `kd.VoxelEmbedding` pre-trains the first two; `kd.ResidualUNet` is
SR-UNet34 and `kd.ImageEncoder` what it learns from in image-to-LiDAR pre-training; `kd.ImageSegmentor` trains such an
encoder's trunk. `kd.SphereFormer` and `kd.PointVoxelUNet` attend in windows, the latter with links to points. A network
does not know that it is distilled: distillers tap it by module path.
"""

from __future__ import annotations

from .cylinder3d import Cylinder3D
from .denoiser import ConditionEncoder, Denoiser, Refiner
from .fusion import FusionNet
from .image import ImageEncoder
from .image_segmentor import ImageSegmentor
from .point_voxel_unet import PointVoxelUNet
from .polarnet import PolarNet
from .probing import LinearProbe
from .ptv3 import PointTransformerV3
from .residual_unet import ResidualUNet
from .segmentor import DefaultSegmentor, DefaultSegmentorV2
from .sparse_unet import SpUNetBase
from .sphereformer import SphereFormer
from .swiftnet import SwiftNet
from .voxelnet import UNetV2, VoxelBackBone8x, VoxelEmbedding, VoxelResBackBone8x
from .voxels import VoxelSegmentor

__all__ = [
    "ConditionEncoder",
    "Cylinder3D",
    "DefaultSegmentor",
    "DefaultSegmentorV2",
    "Denoiser",
    "FusionNet",
    "ImageEncoder",
    "ImageSegmentor",
    "LinearProbe",
    "PointTransformerV3",
    "PointVoxelUNet",
    "PolarNet",
    "Refiner",
    "ResidualUNet",
    "SpUNetBase",
    "SphereFormer",
    "SwiftNet",
    "UNetV2",
    "VoxelBackBone8x",
    "VoxelEmbedding",
    "VoxelResBackBone8x",
    "VoxelSegmentor",
]
