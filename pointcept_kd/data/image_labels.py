"""Labels of pixels, as the labels that evaluators read."""

from __future__ import annotations

import numpy as np
import torch

from pointcept_kd.host import kd

from .arrays import Data, lookup, valid_keys


@kd.TRANSFORMS.register_module()
class WeakLabelsToSegment:
    """Put the labels of all pixels where evaluators look for labels of points.

    `weak_labels` (v, h, w), whole numbers with 0 for none and 1 .. K, array or tensor, stays and becomes `segment`
    (v h w,) int64 of the same kind, -1 for none and 0 .. K - 1. The arrays of points leave the sample, which is one of
    pixels from here on. For `kd.ImageSegmentor`, whose scores have this order.

    Raises:
        InputError: for a sample without weak labels.
    """

    def __call__(self, data: Data) -> Data:
        labels = lookup(data, "weak_labels", "WeakLabelsToSegment")
        kind = torch.int64 if isinstance(labels, torch.Tensor) else np.int64
        whole = labels.to(kind) if isinstance(labels, torch.Tensor) else np.asarray(labels, kind)
        for key in valid_keys(data):
            data.pop(key, None)
        data["segment"] = whole.reshape(-1) - 1
        return data
