"""One point per voxel, with voxels in cylindrical coordinates or along x, y, z, at their true places.

`GridSample` counts its cells from the lowest one of the scan; here a cell has the same number in every scan, so that
0 is at the sensor and numbers may be negative.
"""

from __future__ import annotations

import numpy as np

from pointcept_kd.host import InputError, kd

from .arrays import Array, Data, bounds, coord_of, need, select, valid_keys
from .pair_transforms import drop_lost_pairs, rows_of_ids


def voxel_cells(
    coord: Array, voxel_size: float, degrees: float = 1.0, coordinates: str = "cylindrical"
) -> Array:
    """Cells (n, 3) float64, whole numbers, of points (n, 3) in metres.

    cylindrical: floor(rho / voxel_size), floor(phi / degrees), floor(z / voxel_size) with rho = sqrt(x^2 + y^2) and
    phi = atan2(y, x) in degrees, -180 to 180; cells on both sides of 180 degrees stay apart. cartesian: floor of
    x, y, z / voxel_size.
    """
    x, y, z = (coord[:, axis].astype(np.float64) for axis in range(3))
    if coordinates == "cylindrical":
        x, y = np.sqrt(x * x + y * y), np.rad2deg(np.arctan2(y, x))
    steps = (voxel_size, degrees if coordinates == "cylindrical" else voxel_size, voxel_size)
    cells = np.empty((3, len(coord)))
    for column, values, step in zip(cells, (x, y, z), steps, strict=True):
        np.floor(values / step, out=column)
    return cells.T


@kd.TRANSFORMS.register_module()
class VoxelSample:
    """Keep of every voxel the point that comes first; voxels are ordered by their cells.

    Pairs with pixels (`pair_point`) of the other points go over to the point that stands for their voxel. Honours
    `index_valid_keys`.

    Args:
        voxel_size: metres; in cylindrical coordinates along the radius and z.
        degrees: of a cylindrical cell.
        coordinates: "cylindrical" or "cartesian", see `voxel_cells`.
        return_inverse: add `inverse` (n,) int64, the row of the voxel of every input point.

    Writes `grid_coord` (m, 3) int64, the cells.

    Raises:
        InputError: for coordinates that are not finite or too far out.
    """

    def __init__(
        self,
        voxel_size: float = 0.1,
        degrees: float = 1.0,
        coordinates: str = "cylindrical",
        return_inverse: bool = False,
    ) -> None:
        need(voxel_size > 0, f"VoxelSample: voxel_size is positive metres, got {voxel_size!r}")
        need(0 < degrees <= 360, f"VoxelSample: degrees is in (0, 360], got {degrees!r}")
        need(
            coordinates in ("cylindrical", "cartesian"),
            f"VoxelSample: coordinates is cylindrical or cartesian, got {coordinates!r}",
        )
        self.voxel_size, self.degrees, self.coordinates = voxel_size, degrees, coordinates
        self.return_inverse = return_inverse

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "VoxelSample")
        cells = voxel_cells(coord, self.voxel_size, self.degrees, self.coordinates)
        low, high = bounds(cells)
        # NaN fails the comparison too.
        spans = [top - bottom + 1 for bottom, top in zip(low, high, strict=True)]
        total = spans[0] * spans[1] * spans[2]
        if not total < 2.0**62 or not max(map(abs, (*low, *high))) < 2.0**52:
            raise InputError(
                f"VoxelSample: sample {data.get('name', '?')} has coordinates that are not finite or too far "
                f"out for voxels of {self.voxel_size} m"
            )
        keys = np.zeros(len(coord), np.int64)
        for column, bottom, span in zip(cells.T, low, spans, strict=True):
            keys *= int(span)
            keys += (column - bottom).astype(np.int64)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        if "pair_point" in data:
            drop_lost_pairs(data, "VoxelSample")
            ids = data["point_id"]
            rows = rows_of_ids(ids, data["pair_point"])
            data["pair_point"] = ids[first[inverse[rows]]]
        select(data, first, "VoxelSample")
        data["grid_coord"] = cells[first].astype(np.int64)
        listed = valid_keys(data)
        data["index_valid_keys"] = list(dict.fromkeys([*listed, "grid_coord"]))
        if self.return_inverse:
            data["inverse"] = inverse
        return data
