"""A reflection that is always the same one, for the augmented passes of a test."""

from __future__ import annotations

from typing import Any

import numpy as np

from pointcept_kd.host import InputError, kd


@kd.TRANSFORMS.register_module()
class Mirror:
    """Negate one axis of `coord` and `normal`, always; `RandomFlip` draws, and with p=1 negates both x and y.

    Args:
        axis: "x", "y" or "z".
    """

    def __init__(self, axis: str = "y") -> None:
        if axis not in ("x", "y", "z"):
            raise InputError(f"Mirror: axis is x, y or z, got {axis!r}")
        self.axis = "xyz".index(axis)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        for key in ("coord", "normal"):
            if key in data:
                turned = np.array(data[key])
                np.negative(turned[:, self.axis], out=turned[:, self.axis])
                data[key] = turned
        return data
