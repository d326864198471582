"""The networks: what a teacher or a student can be.

Importing this room registers the backbones `PT-v3m1` and `SpUNet-v1m1` and the segmentors `DefaultSegmentor` and
`DefaultSegmentorV2`. A network does not know that it is distilled: distillers tap it by module path.
"""

from __future__ import annotations

from .ptv3 import PointTransformerV3
from .segmentor import DefaultSegmentor, DefaultSegmentorV2
from .sparse_unet import SpUNetBase

__all__ = ["DefaultSegmentor", "DefaultSegmentorV2", "PointTransformerV3", "SpUNetBase"]
