"""All transforms of one scan under one name: dictionary of numpy arrays in, dictionary out.

    arrays      what the others share: per-point arrays and their checks
    augment     moving points
    sampling    dropping and reordering points, the voxel grid
    colour      colour of points
    collecting  keys and values, other class numbers, tensors
    views       several views of one cloud
    images      camera images

The names, parameters and results are those of Pointcept's transforms. So are the random draws:
python's `random` opens the gates of rotation, dropout and distortion, torch orders the changes of
RandomColorJitter and draws for images, numpy's global generator gives everything else, in the same
order, so that equal seeds give equal arrays. The differences are
fixes: no transform writes into an array it was given, one that leaves no points says so, and one
that would leave other arrays behind refuses.
"""

from __future__ import annotations

from .arrays import INDEX_VALID_KEYS, Array, Data, select, valid_keys
from .augment import (
    CenterShift,
    ClipGaussianJitter,
    ElasticDistortion,
    NormalizeCoord,
    PointClip,
    PositiveShift,
    RandomDropNormal,
    RandomFlip,
    RandomJitter,
    RandomRotate,
    RandomRotateTargetAngle,
    RandomScale,
    RandomShift,
)  # fmt: skip
from .collecting import Collect, Copy, InstanceParser, MapLabels, ToTensor, Update
from .colour import (
    ChromaticAutoContrast,
    ChromaticJitter,
    ChromaticTranslation,
    HueSaturationTranslation,
    NormalizeColor,
    RandomColorGrayScale,
    RandomColorJitter,
    RandomDropColor,
)  # fmt: skip
from .images import (
    ImgAugmentation,
    ImgChromaticJitter,
    ImgGaussianBlur,
    Imgnormalize,
    ImgPixelContrast,
    ImgRandomGrayscale,
    ImgRandomSolarize,
    ImgToTensor,
)  # fmt: skip
from .sampling import (
    CropBoundary,
    GridSample,
    RandomDropout,
    RangeCrop,
    ShufflePoint,
    SphereCrop,
    fnv_keys,
    ravel_keys,
)  # fmt: skip
from .views import ContrastiveViewsGenerator, MultiViewGenerator

__all__ = [
    "INDEX_VALID_KEYS", "Array", "CenterShift", "ChromaticAutoContrast", "ChromaticJitter", "ChromaticTranslation",
    "ClipGaussianJitter", "Collect", "ContrastiveViewsGenerator", "Copy", "CropBoundary", "Data",
    "ElasticDistortion", "GridSample", "HueSaturationTranslation", "ImgAugmentation", "ImgChromaticJitter",
    "ImgGaussianBlur", "ImgPixelContrast", "ImgRandomGrayscale", "ImgRandomSolarize", "ImgToTensor", "Imgnormalize",
    "InstanceParser", "MapLabels", "MultiViewGenerator", "NormalizeColor", "NormalizeCoord", "PointClip",
    "PositiveShift", "RandomColorGrayScale", "RandomColorJitter", "RandomDropColor", "RandomDropNormal",
    "RandomDropout", "RandomFlip", "RandomJitter", "RandomRotate", "RandomRotateTargetAngle", "RandomScale",
    "RandomShift", "RangeCrop", "ShufflePoint", "SphereCrop", "ToTensor", "Update", "fnv_keys", "ravel_keys",
    "select", "valid_keys",
]  # fmt: skip
