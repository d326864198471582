"""Rows of points in their scan: they follow through everything that drops and reorders points."""

import zlib

import numpy as np
import pytest

from pointcept_kd.data.point_index import PointIndex
from pointcept_kd.host.loader import Compose


def scan(seed=0, points=200):
    rng = np.random.default_rng(seed)
    return {
        "coord": rng.uniform(-5, 5, (points, 3)).astype(np.float32),
        "strength": rng.random((points, 1)).astype(np.float32),
        "segment": rng.integers(-1, 4, points).astype(np.int32),
        "name": "scan",
    }


def test_rows_follow_the_points():
    original = scan()
    chain = [
        dict(type="kd.PointIndex"),
        dict(type="RandomDropout", dropout_ratio=0.5, dropout_application_ratio=1.0),
        dict(type="kd.RangeCrop", point_cloud_range=(-4, -4, -4, 4, 4, 4)),
        dict(type="GridSample", grid_size=0.8, mode="train"),
        dict(type="ShufflePoint"),
    ]
    made = Compose(chain)(scan())
    assert 0 < len(made["coord"]) < 100
    for key in ("coord", "strength", "segment"):
        np.testing.assert_array_equal(made[key], original[key][made["raw_index"]])
    assert made["raw_index"].dtype == np.int32


@pytest.mark.parametrize("key", ["coord", "strength"])
def test_checksum_follows_the_scan_and_not_its_labels(key):
    index = PointIndex()
    before = scan()
    check = index(before)["raw_check"]
    expected = zlib.crc32(before["strength"].tobytes(), zlib.crc32(before["coord"].tobytes()))
    assert check == expected
    relabelled = scan()
    relabelled["segment"][:] = 0
    assert index(relabelled)["raw_check"] == check
    changed = scan()
    changed[key][7] += 1
    assert index(changed)["raw_check"] != check


def test_arrays_of_one_s_own_stay_listed():
    data = {**scan(), "index_valid_keys": ["coord", "beam"], "beam": np.arange(200)}
    made = PointIndex()(data)
    assert made["index_valid_keys"] == ["coord", "beam", "raw_index"]
