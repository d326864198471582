"""Where the points of a sample come from: their rows in the scan as it was read.

What was computed once for a scan (a teacher's answers, say) is found again by these rows in every augmented view of it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from pointcept_kd.host import kd

from .transforms import INDEX_VALID_KEYS


@kd.TRANSFORMS.register_module()
class PointIndex:
    """Number the points of a scan; stands first in a pipeline.

    Adds `raw_index` (n,) int32, the row of each point, to the arrays that are dropped and reordered with the points,
    and `raw_check`, a checksum of the scan's coordinates and features (labels may change, they are no part of it).
    """

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        listed = list(data.get("index_valid_keys", INDEX_VALID_KEYS))
        check = 0
        for key in ("coord", "color", "normal", "strength"):
            if key in data:
                check = zlib.crc32(np.ascontiguousarray(data[key]).data, check)
        data["raw_index"] = np.arange(len(data["coord"]), dtype=np.int32)
        data["raw_check"] = check
        data["index_valid_keys"] = list(dict.fromkeys([*listed, "raw_index"]))
        return data
