"""One point per voxel at its true place: worked cells, plain loops, pairs that go over, and the way to every point."""

import math

import numpy as np
import pytest
import torch

from pointcept_kd.data.transforms import Collect, Copy, RandomRotate, ToTensor
from pointcept_kd.data.voxel_sample import VoxelSample, voxel_cells
from pointcept_kd.host import TRANSFORMS, InputError
from pointcept_kd.host.loader import collate_fn


def cloud(count=400, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return {
        "coord": rng.normal(size=(count, 3)).astype(np.float32) * np.float32(scale),
        "strength": np.arange(count, dtype=np.float32)[:, None],
        "segment": rng.integers(-1, 5, count).astype(np.int32),
        "name": "one",
    }


def with_pairs(data, count=300, seed=1):
    rng = np.random.default_rng(seed)
    points = len(data["coord"])
    return {
        **data,
        "point_id": np.arange(points),
        "index_valid_keys": ["coord", "strength", "segment", "point_id"],
        "pair_point": rng.integers(0, points, count),
        "pair_pixel": rng.integers(0, 9, (count, 3)),
        "pair_label": np.arange(count),
    }


def cell_of(x, y, z, size, degrees, coordinates):
    """From the definition, point by point."""
    if coordinates == "cartesian":
        return tuple(math.floor(v / size) for v in (x, y, z))
    phi = math.atan2(y, x) * 180 / math.pi
    return math.floor(math.hypot(x, y) / size), math.floor(phi / degrees), math.floor(z / size)


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ((3, 4, -1.05), (50, 53, -11)),
        ((-3, 0.001, 0.26), (30, 179, 2)),
        ((-3, -0.001, 0.26), (30, -180, 2)),
        ((12.34, -5.6, 1.03), (135, -25, 10)),
    ],
)
def test_worked_cells(point, cell):
    data = VoxelSample(0.1)({"coord": np.array([point], np.float32)})
    assert data["grid_coord"].tolist() == [list(cell)]
    assert data["grid_coord"].dtype == np.int64


@pytest.mark.parametrize("coordinates", ["cylindrical", "cartesian"])
@pytest.mark.parametrize(("size", "degrees"), [(0.1, 1.0), (0.7, 5.0), (40.0, 360.0)])
def test_the_first_point_of_every_cell(coordinates, size, degrees):
    data = with_pairs(cloud())
    first, inverse_of = {}, []
    for row, point in enumerate(data["coord"].astype(float)):
        cell = cell_of(*point, size, degrees, coordinates)
        first.setdefault(cell, row)
        inverse_of.append(cell)
    done = VoxelSample(size, degrees, coordinates, return_inverse=True)(dict(data))
    kept = done["strength"][:, 0].astype(int)
    assert sorted(kept) == sorted(first.values())
    assert [tuple(c) for c in done["grid_coord"]] == sorted(first)
    assert all(first[tuple(c)] == row for c, row in zip(done["grid_coord"], kept, strict=True))
    assert [tuple(c) for c in done["grid_coord"][done["inverse"]]] == inverse_of
    for key in ("coord", "segment", "point_id"):
        np.testing.assert_array_equal(done[key], data[key][kept])
    # Pairs go over to the point that stands for their cell; nothing else about them changes.
    assert done["pair_point"].tolist() == [first[inverse_of[p]] for p in data["pair_point"]]
    np.testing.assert_array_equal(done["pair_pixel"], data["pair_pixel"])
    np.testing.assert_array_equal(done["pair_label"], data["pair_label"])


def test_pairs_of_lost_points_are_dropped():
    data = with_pairs(cloud())
    gone = np.arange(400) % 3 == 0
    for key in ("coord", "strength", "segment", "point_id"):
        data[key] = data[key][~gone][::-1]  # in another order too
    done = VoxelSample(0.5)(dict(data))
    there = ~gone[data["pair_point"]]
    assert done["pair_label"].tolist() == np.arange(300)[there].tolist()
    ids = data["point_id"].tolist()
    for point, before in zip(done["pair_point"], data["pair_point"][there], strict=True):
        coord = data["coord"][[ids.index(point), ids.index(before)]]
        assert len(np.unique(voxel_cells(coord, 0.5), axis=0)) == 1
        assert point in done["point_id"]


def test_no_input_is_written_to():
    data = with_pairs(cloud())
    before = {k: v.copy() for k, v in data.items() if isinstance(v, np.ndarray)}
    listed = list(data["index_valid_keys"])
    VoxelSample(0.5, return_inverse=True)(dict(data))
    for key, value in before.items():
        np.testing.assert_array_equal(data[key], value)
    assert data["index_valid_keys"] == listed


def test_a_shift_of_the_scan_is_seen():
    near = VoxelSample(1.0, coordinates="cartesian")(cloud())["grid_coord"]
    far = cloud()
    far["coord"] += np.float32(16)
    moved = VoxelSample(1.0, coordinates="cartesian")(far)["grid_coord"]
    assert near.min() < 0
    assert moved.mean() - near.mean() == pytest.approx(16, abs=0.5)


def test_the_way_back_to_every_point_through_a_batch():
    chain = [
        Copy({"segment": "origin_segment"}),
        VoxelSample(0.8, 10.0, return_inverse=True),
        ToTensor(),
        Collect(
            ("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
            feat_keys=("strength",),
        ),
    ]
    samples = [cloud(100, 2), cloud(173, 3)]
    done = []
    for sample in samples:
        data = dict(sample)
        for transform in chain:
            data = transform(data)
        done.append(data)
    batch = collate_fn(done)
    assert len(batch["inverse"]) == len(batch["origin_segment"]) == 273
    assert len(batch["feat"]) == batch["offset"][-1] < 273
    # A network's answer per voxel, here the voxel's cell and scan, reaches the points it is of.
    scan = torch.bucketize(torch.arange(len(batch["feat"])), batch["offset"], right=True)
    answer = torch.cat([scan[:, None], batch["grid_coord"]], 1)[batch["inverse"]]
    for number, (sample, rows) in enumerate(zip(samples, ([0, 100], [100, 273]), strict=True)):
        cells = voxel_cells(sample["coord"], 0.8, 10.0)
        assert (answer[slice(*rows), 0] == number).all()
        np.testing.assert_array_equal(answer[slice(*rows), 1:].numpy(), cells)
    with pytest.raises(InputError, match="after GridSample made `inverse`"):
        VoxelSample(0.8)({**cloud(), "inverse": np.zeros(400, int)})


def test_registered_and_after_other_transforms():
    transform = TRANSFORMS.build({"type": "kd.VoxelSample", "voxel_size": 0.2})
    done = transform(RandomRotate(p=1)(cloud()))
    np.testing.assert_array_equal(voxel_cells(done["coord"], 0.2), done["grid_coord"])
    assert "grid_coord" in done["index_valid_keys"]
    assert "inverse" not in done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxel_size": 0}, "voxel_size is positive"),
        ({"degrees": 0}, "degrees is in"),
        ({"degrees": 400}, "degrees is in"),
        ({"coordinates": "polar"}, "cylindrical or cartesian"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        VoxelSample(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bad_coordinates(value, axis):
    data = cloud()
    data["coord"][7, axis] = value
    with pytest.raises(InputError, match="sample one has coordinates that are not finite or too"):
        VoxelSample(0.1)(data)


def test_pairs_need_ids():
    data = with_pairs(cloud())
    del data["point_id"]
    with pytest.raises(InputError, match="no 'point_id'"):
        VoxelSample(0.1)(data)
