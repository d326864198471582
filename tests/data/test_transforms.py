"""Transforms against hand values, plain-loop oracles and golden values of Pointcept 1.7.0.

Golden values were printed by Pointcept's own transforms with the same seeds (numpy 2.4).
"""

import copy
import random
import time

import numpy as np
import pytest
import torch

import pointcept_kd.data.transforms as T
from pointcept_kd.host import TRANSFORMS, InputError, kd
from pointcept_kd.host.loader import Compose

PUBLISHED = [
    "RandomRotate",
    "RandomRotateTargetAngle",
    "RandomScale",
    "RandomFlip",
    "RandomJitter",
    "RandomShift",
    "PointClip",
    "RandomDropout",
    "CenterShift",
    "PositiveShift",
    "NormalizeCoord",
    "ElasticDistortion",
    "GridSample",
    "SphereCrop",
    "ShufflePoint",
    "CropBoundary",
    "Copy",
    "Update",
    "ToTensor",
    "Collect",
    "NormalizeColor",
    "ChromaticAutoContrast",
    "ChromaticTranslation",
    "ChromaticJitter",
    "ClipGaussianJitter",
    "RandomColorGrayScale",
    "RandomColorJitter",
    "HueSaturationTranslation",
    "RandomDropColor",
    "RandomDropNormal",
    "ContrastiveViewsGenerator",
    "MultiViewGenerator",
    "ImgToTensor",
    "ImgGaussianBlur",
    "ImgChromaticJitter",
    "ImgPixelContrast",
    "Imgnormalize",
    "ImgRandomGrayscale",
    "ImgRandomSolarize",
    "ImgAugmentation",
    "InstanceParser",
]

MOVING = [
    dict(type="RandomRotate", p=1),
    dict(type="RandomRotateTargetAngle", p=1),
    dict(type="RandomScale"),
    dict(type="RandomScale", anisotropic=True),
    dict(type="RandomFlip", p=1),
    dict(type="RandomJitter"),
    dict(type="RandomShift"),
    dict(type="PointClip", point_cloud_range=(-3, -3, -1, 3, 3, 1)),
    dict(type="CenterShift"),
    dict(type="PositiveShift"),
    dict(type="NormalizeCoord"),
    dict(type="ElasticDistortion", distortion_params=[[2.0, 0.4]]),
    dict(type="ChromaticAutoContrast", p=1),
    dict(type="ChromaticTranslation", p=1),
    dict(type="ChromaticJitter", p=1),
    dict(type="NormalizeColor"),
    dict(type="ClipGaussianJitter", store_jitter=True),
    dict(type="RandomColorGrayScale", p=1),
    dict(type="RandomColorJitter", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=1),
    dict(type="HueSaturationTranslation"),
    dict(type="RandomDropColor", drop_application_ratio=1.1),
    dict(type="RandomDropNormal", drop_application_ratio=1.1),
]
DROPPING = [
    dict(type="RandomDropout", dropout_ratio=0.3, dropout_application_ratio=1.0),
    dict(type="GridSample", grid_size=1.0, return_grid_coord=True),
    dict(type="GridSample", grid_size=1.0, hash_type="ravel"),
    dict(type="SphereCrop", point_max=40),
    dict(type="SphereCrop", sample_rate=0.5, mode="center"),
    dict(type="ShufflePoint"),
    dict(type="CropBoundary"),
    dict(type="kd.RangeCrop", point_cloud_range=(-4, -4, -2, 4, 4, 2)),
]


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def scan(n=200, spread=3.0):
    rng = np.random.RandomState(n)
    return dict(
        coord=(rng.randn(n, 3) * [spread, spread, 1]).astype(np.float32),
        normal=rng.randn(n, 3).astype(np.float32),
        color=(rng.rand(n, 3) * 255).astype(np.float32),
        strength=rng.rand(n, 1).astype(np.float32),
        segment=rng.randint(2 if n == 1 else 0, 6, n).astype(np.int32),
        instance=rng.randint(-1, 5, n).astype(np.int32),
        name="scan",
    )


def one(cfg, data, value=0):
    seed(value)
    return TRANSFORMS.build(cfg)(data)


def test_names_are_registered_in_both_places():
    for name in PUBLISHED:
        assert TRANSFORMS.get(name) is kd.TRANSFORMS.get(name) is getattr(T, name)
    assert TRANSFORMS.get("kd.RangeCrop") is T.RangeCrop
    assert TRANSFORMS.get("kd.MapLabels") is T.MapLabels
    assert set(PUBLISHED) | {"RangeCrop", "MapLabels"} == {
        name for name in T.__all__ if isinstance(getattr(T, name), type)
    } - {"Array"}
    assert TRANSFORMS.get("RangeCrop") is None


# ---- randomness ----------------------------------------------------------------------------------


GOLDEN_CHAIN = [
    dict(type="RandomDropout", dropout_ratio=0.25, dropout_application_ratio=1.0),
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.9),
    dict(type="RandomRotate", angle=[-1 / 6, 1 / 6], axis="x", p=0.9),
    dict(type="RandomRotateTargetAngle", axis="y", p=0.9),
    dict(type="RandomScale", scale=[0.9, 1.1], anisotropic=True),
    dict(type="RandomShift"),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
    dict(type="ShufflePoint"),
]


@pytest.mark.parametrize(
    ("start", "coord", "segment", "after"),
    [
        (
            0,
            [[9.863875, -1.494142, 1.846631], [3.493327, 0.125549, 0.469824],
             [-6.528467, -3.457997, 1.271734]],
            [1, 3, 2],
            (0.5112747213686085, 0.1433532874090464),
        ),
        (
            3,
            [[2.509915, 0.333208, 1.689098], [0.281274, 6.982889, 0.798869],
             [0.114376, 0.129803, 0.755302]],
            [3, 1, 0],
            (0.625720304108054, 0.15686773847496327),
        ),
    ],
)  # fmt: skip
def test_equal_seeds_give_pointcepts_arrays(start, coord, segment, after):
    points = np.array([[1, 2, 3], [-4, 5, 0.5], [10, -3, 1], [0, 0, 2]], dtype=np.float32)
    data = dict(coord=points, segment=np.arange(4, dtype=np.int32))
    seed(start)
    data = Compose(GOLDEN_CHAIN)(data)
    np.testing.assert_allclose(data["coord"], coord, atol=2e-6)
    assert data["coord"].dtype == np.float64
    assert data["segment"].tolist() == segment
    assert (random.random(), np.random.rand()) == after


def test_elastic_distortion_gives_pointcepts_array():
    points = np.array([[0, 0, 0], [1, 2, 3], [2, 1, 0.5], [0.2, 0.1, 3]], dtype=np.float32)
    cfg = dict(type="ElasticDistortion", distortion_params=[[1.0, 0.4]])
    expected = [
        [0.05614081770181656, 0.028197724372148514, -0.020037362352013588],
        [0.9569827914237976, 1.978819489479065, 3.058607339859009],
        [2.056727647781372, 0.9973714351654053, 0.5299885272979736],
        [0.19233717024326324, 0.0511762872338295, 3.0762457847595215],
    ]
    result = one(cfg, dict(coord=points), 1)["coord"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_gates_draw_from_python_and_angles_from_numpy():
    data = scan()
    before = data["coord"].copy()
    seed(5)
    gate = random.random()
    seed(5)
    skipped = T.RandomRotate(p=gate - 1e-9)(dict(data))
    assert np.array_equal(skipped["coord"], before)
    assert skipped["coord"].dtype == np.float32
    expected = np.random.RandomState(5).uniform()  # numpy's generator was not touched by the gate
    assert np.random.uniform() == expected


@pytest.mark.parametrize("cfg", MOVING + DROPPING, ids=lambda c: c["type"])
def test_a_seed_fixes_the_result_and_inputs_are_not_written(cfg):
    data = scan()
    kept = copy.deepcopy(data)
    first, second = one(cfg, dict(data), 7), one(cfg, dict(data), 7)
    for key in first:
        assert np.array_equal(first[key], second[key]), key
    for key, value in kept.items():
        assert np.array_equal(data[key], value), key


# ---- moving points -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "offset", "turned"),
    [
        ("x", [1, 1, 1], [1, -1, 1]),
        ("y", [-1, 0, 3], [3, 0, 1]),
        ("z", [1, 0, 0], [0, 1, 0]),
    ],
)
def test_quarter_turn_about_a_centre_by_hand(axis, offset, turned):
    """By the right-hand rule: y to z, z to x, x to y."""
    center = np.array([1, 2, 3])
    data = dict(coord=np.float32([center + offset]), normal=np.float32([offset]))
    result = T.RandomRotateTargetAngle([0.5], [1, 2, 3], axis, always_apply=True)(data)
    np.testing.assert_allclose(result["normal"], [turned], atol=1e-12)
    np.testing.assert_allclose(result["coord"], [center + turned], atol=1e-6)
    assert result["coord"].dtype == np.float64


def test_rotation_keeps_the_middle_of_the_box_and_all_distances():
    data = scan()
    before = data["coord"].astype(np.float64)
    middle = (before.min(0) + before.max(0)) / 2
    after = one(dict(type="RandomRotate", angle=[0.3, 0.3], p=1), data)["coord"]
    gap = np.linalg.norm(before - middle, axis=1) - np.linalg.norm(after - middle, axis=1)
    assert np.abs(gap).max() < 1e-5
    step_before = np.linalg.norm(np.diff(before, axis=0), axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(after, axis=0), axis=1), step_before, atol=1e-5
    )
    assert np.abs(after - before).max() > 0.1


def test_shifts_and_flips_by_hand():
    points = np.array([[0, 0, 1], [4, 2, 5]], dtype=np.float32)

    def make():
        return dict(coord=points.copy(), normal=np.ones((2, 3), np.float32))

    assert T.CenterShift()(make())["coord"].tolist() == [[-2, -1, 0], [2, 1, 4]]
    assert T.CenterShift(apply_z=False)(make())["coord"].tolist() == [[-2, -1, 1], [2, 1, 5]]
    assert T.PositiveShift()(make())["coord"].tolist() == [[0, 0, 0], [4, 2, 4]]
    flipped = T.RandomFlip(p=1.1)(make())
    assert flipped["coord"].tolist() == [[0, 0, 1], [-4, -2, 5]]
    assert flipped["normal"].tolist() == [[-1, -1, 1]] * 2
    assert T.RandomScale([2, 2])(make())["coord"].tolist() == [[0, 0, 2], [8, 4, 10]]
    assert T.RandomShift([(1, 1), (2, 2), (-1, -1)])(make())["coord"].tolist() == [
        [1, 2, 0],
        [5, 4, 4],
    ]
    clipped = T.PointClip((1, 1, 2, 3, 3, 4))(make())["coord"]
    assert clipped.tolist() == [[1, 1, 2], [3, 2, 4]]
    unit = T.NormalizeCoord()(make())["coord"]
    assert np.linalg.norm(unit, axis=1).tolist() == pytest.approx([1, 1])


def test_jitter_is_bounded():
    data = scan(2000)
    before = data["coord"].copy()
    moved = one(dict(type="RandomJitter", sigma=0.05, clip=0.02), data)["coord"] - before
    assert np.abs(moved).max() == pytest.approx(0.02, abs=1e-5)
    assert moved.std() > 0.01


def test_clipped_noise_is_kept_in_step():
    data = scan(2000)
    before = data["coord"].copy()
    data = one(dict(type="ClipGaussianJitter", scalar=0.1, store_jitter=True), data)
    np.testing.assert_allclose(data["coord"] - before, data["jitter"], atol=1e-6)
    assert np.abs(data["jitter"]).max() == pytest.approx(0.1)
    # 1.96 standard deviations are 0.1 m; cutting the tails off leaves some 94 % of the deviation.
    assert data["jitter"].std() == pytest.approx(0.1 / 1.96 * 0.94, rel=0.03)
    assert abs(data["jitter"].mean()) < 0.003
    assert len(T.GridSample(1.0)(data)["jitter"]) == len(data["coord"])


def test_integer_coordinates_become_float():
    data = dict(coord=np.array([[0, 0, 0], [3, 1, 0]]))
    assert T.CenterShift()(data)["coord"].tolist() == [[-1.5, -0.5, 0], [1.5, 0.5, 0]]


# ---- dropping points -----------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", DROPPING, ids=lambda c: c["type"])
def test_every_per_point_array_is_indexed_alike(cfg):
    data = scan(300)
    tags = {key: value.copy() for key, value in data.items() if key != "name"}
    keys = [*T.INDEX_VALID_KEYS, "tag"]
    data.update(tag=np.arange(300), index_valid_keys=keys)
    result = one(cfg, data, 3)
    tag = result["tag"]
    assert len(set(tag.tolist())) == len(tag)
    assert (len(tag) == 300) == (cfg["type"] == "ShufflePoint")
    for key, value in tags.items():
        assert np.array_equal(result[key], value[tag]), key
    assert "tag" in result["index_valid_keys"]
    assert keys == [*T.INDEX_VALID_KEYS, "tag"]  # a list from a config is not written


def test_arrays_that_are_not_listed_stay():
    data = scan(50)
    data["other"] = np.arange(50)
    assert len(one(DROPPING[0], data)["other"]) == 50


def test_range_crop_is_half_open():
    data = dict(coord=np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0.5, 0.9, 0]], np.float32))
    data["segment"] = np.arange(4)
    assert T.RangeCrop((0, 0, 0, 1, 1, 1))(data)["segment"].tolist() == [0, 3]


def test_sphere_crop_keeps_the_nearest_in_order():
    data = scan(100)
    before = data["coord"].copy()
    result = T.SphereCrop(point_max=10, mode="center")(data)["coord"]
    distance = np.linalg.norm(before - before[50], axis=1)
    assert np.array_equal(result, before[np.argsort(distance)[:10]])
    small = scan(5)
    assert T.SphereCrop(point_max=5)(small)["coord"] is small["coord"]


def test_sphere_crop_around_matched_points():
    data = dict(coord=np.arange(30, dtype=np.float32).reshape(10, 3))
    data["correspondence"] = np.full((10, 2, 2), -1)
    data["correspondence"][[7, 9]] = 3
    data["correspondence"][2, 0] = 3  # seen by one image of two only
    assert T.SphereCrop(point_max=1, mode="given")(data)["coord"].tolist() == [[24, 25, 26]]


def test_labelled_points_survive_sampling():
    data = scan(200)
    points = data["coord"][[5, 60, 199]].copy()
    data["sampled_index"] = np.array([5, 60, 199])
    chain = [DROPPING[0], dict(type="GridSample", grid_size=2.0, return_inverse=True)]
    seed(0)
    result = Compose(chain)(data)
    assert np.array_equal(result["coord"][result["sampled_index"]], points)
    assert result["inverse"].max() < len(result["coord"])


def test_a_crop_that_leaves_nothing_names_itself_and_the_sample():
    far = dict(type="kd.RangeCrop", point_cloud_range=(100, 100, 100, 101, 101, 101))
    with pytest.raises(InputError, match="RangeCrop leaves no point of sample scan"):
        one(far, scan())
    walls = scan()
    walls["segment"][:] = 1
    with pytest.raises(InputError, match="CropBoundary leaves no point of sample scan"):
        one(dict(type="CropBoundary"), walls)
    empty = dict(coord=np.empty((0, 3), np.float32), name="void")
    for cfg in [*MOVING[:12], *DROPPING[:6]]:
        with pytest.raises(InputError, match="void"):
            one(cfg, {**empty, "segment": np.empty(0)})


def test_arrays_of_another_length_are_refused():
    data = scan(20)
    data["strength"] = data["strength"][:19]
    with pytest.raises(InputError, match="strength of sample scan has 19 rows, coord 20"):
        one(dict(type="ShufflePoint"), data)


def test_sweeps_stay_told_apart():
    """`frame_pcd_offset` (cumulative ends) becomes the rows of each sweep, whatever drops points."""
    data = scan(300)
    frame = np.repeat([0, 1, 2], [100, 50, 150])
    data.update(frame=frame, frame_pcd_offset=np.array([100, 150, 300]))
    data["index_valid_keys"] = [*T.INDEX_VALID_KEYS, "frame"]
    crop = dict(type="kd.RangeCrop", point_cloud_range=(-4, -4, -2, 4, 4, 2))
    data = Compose([DROPPING[0], crop, dict(type="GridSample", grid_size=1.0)])(data)
    for number, rows in data["frame_pcd_offset"].items():
        assert np.array_equal(rows, np.flatnonzero(data["frame"] == number))
    assert sum(map(len, data["frame_pcd_offset"].values())) == len(data["coord"]) < 250


def test_dropping_after_an_inverse_is_refused():
    data = one(dict(type="GridSample", grid_size=1.0, return_inverse=True), scan())
    with pytest.raises(InputError, match="after GridSample made `inverse`"):
        one(dict(type="ShufflePoint"), data)


@pytest.mark.parametrize("cfg", MOVING + DROPPING, ids=lambda c: c["type"])
def test_one_point_survives(cfg):
    data = scan(1)
    data["coord"][:] = 0.5
    result = one({**cfg, "point_max": 1} if "point_max" in cfg else cfg, data)
    assert result["coord"].shape == (1, 3)
    assert np.isfinite(result["coord"]).all()
    assert np.isfinite(result["color"]).all()
    assert len(result["strength"]) == 1


# ---- GridSample ----------------------------------------------------------------------------------


def fnv_by_python(cell):
    value = 14695981039346656037
    for number in cell:
        value = (value * 1099511628211) % 2**64
        value ^= int(number)
    return value


def test_keys_by_plain_integers():
    cells = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [5, 7, 11], [4000, 4000, 400]])
    columns = [np.ascontiguousarray(column) for column in cells.T]
    keys = T.fnv_keys(columns).tolist()
    assert keys == [fnv_by_python(cell) for cell in cells.tolist()]
    assert keys[:2] == [15658191375538532279, 15657234800422177934]  # printed by Pointcept
    raveled = T.ravel_keys(columns).tolist()
    assert raveled == [(x * 4001 + y) * 401 + z for x, y, z in cells.tolist()]


def loop_voxels(coord, size):
    """Cell of every point and the points of every voxel, voxels in the order of their FNV key."""
    cells = [[int(np.floor(float(v) / size)) for v in point] for point in coord]
    low = [min(cell[axis] for cell in cells) for axis in range(3)]
    cells = [tuple(cell[axis] - low[axis] for axis in range(3)) for cell in cells]
    members = {}
    for row, cell in enumerate(cells):
        members.setdefault(cell, []).append(row)
    return cells, [members[cell] for cell in sorted(members, key=fnv_by_python)], low


def test_train_sampling_is_the_loop():
    data = scan(400)
    coord = data["coord"].copy()
    cells, voxels, low = loop_voxels(coord, 0.7)
    data.update(tag=np.arange(400), index_valid_keys=[*T.INDEX_VALID_KEYS, "tag"])
    flags = ("inverse", "grid_coord", "min_coord", "displacement")
    cfg = dict(type="GridSample", grid_size=0.7, **{f"return_{flag}": True for flag in flags})
    result = one(cfg, data, 4)
    assert len(result["tag"]) == len(voxels) < 400
    for row, tag in enumerate(result["tag"]):
        assert tag in voxels[row]
        assert tuple(result["grid_coord"][row]) == cells[tag]
        position = coord[tag].astype(np.float64) / 0.7 - low
        np.testing.assert_allclose(
            result["displacement"][row], position - cells[tag] - 0.5, atol=1e-9
        )
    for row, members in enumerate(voxels):
        assert set(np.flatnonzero(result["inverse"] == row)) == set(members)
    np.testing.assert_allclose(result["min_coord"], [np.array(low) * 0.7])
    assert result["grid_coord"].dtype == result["inverse"].dtype == np.int64
    assert result["index_valid_keys"][-2:] == ["grid_coord", "displacement"]
    assert np.abs(result["displacement"]).max() <= 0.5


def test_train_draws_are_pointcepts():
    """start + randint(0, largest count, voxels) % count, in the sorted order of the keys."""
    data = scan(400)
    coord = data["coord"].copy()
    cells, voxels, _ = loop_voxels(coord, 0.7)
    counts = np.array([len(members) for members in voxels])
    draws = np.random.RandomState(9).randint(0, counts.max(), counts.size) % counts
    order = np.argsort(np.array([fnv_by_python(cell) for cell in cells], dtype=np.uint64))
    starts = np.cumsum(counts) - counts
    assert len(set(counts)) > 2
    picked = one(dict(type="GridSample", grid_size=0.7), data, 9)["coord"]
    assert np.array_equal(picked, coord[order[starts + draws]])


def test_every_point_of_a_voxel_can_be_drawn():
    data = dict(coord=np.array([[0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0]], np.float32))
    seed(0)
    seen = {float(T.GridSample(1.0)(dict(data))["coord"][0, 0]) for _ in range(60)}
    assert len(seen) == 3


@pytest.mark.parametrize("hash_type", ["fnv", "ravel"])
def test_fragments_cover_every_point(hash_type):
    data = scan(400)
    coord, strength = data["coord"].copy(), data["strength"].copy()
    flags = dict(return_grid_coord=True, return_inverse=True, return_displacement=True)
    parts = T.GridSample(0.9, hash_type, "test", **flags)(data)
    cells, voxels, _ = loop_voxels(coord, 0.9)
    assert len(parts) == max(len(members) for members in voxels)
    seen = np.zeros(400, dtype=int)
    for part in parts:
        index = part["index"]
        assert len(index) == len(voxels)
        assert len({cells[row] for row in index}) == len(voxels)  # one per voxel
        seen[index] += 1
        assert np.array_equal(part["coord"], coord[index])
        assert np.array_equal(part["strength"], strength[index])
        assert [tuple(cell) for cell in part["grid_coord"]] == [cells[row] for row in index]
        assert np.array_equal(part["grid_coord"][part["inverse"]], np.array(cells))
        assert part["name"] == "scan"
    assert (seen >= 1).all()
    for members in voxels:
        if len(members) == len(parts):
            assert (seen[members] == 1).all()
    parts[0]["inverse"][:] = -1
    assert (parts[1]["inverse"] >= 0).all()


def test_a_crop_of_a_fragment_keeps_index():
    data = scan(300)
    coord = data["coord"].copy()
    part = T.GridSample(0.9, mode="test")(data)[0]
    crop = T.SphereCrop(point_max=20)(part)
    assert len(crop["index"]) == 20
    assert np.array_equal(crop["coord"], coord[crop["index"]])


def test_projected_displacement():
    data = scan(100)
    plain = one(dict(type="GridSample", grid_size=0.8, return_displacement=True), dict(data), 2)
    cfg = dict(
        type="GridSample", grid_size=0.8, return_displacement=True, project_displacement=True
    )
    result = one(cfg, dict(data), 2)
    expected = (plain["displacement"] * plain["normal"]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result["displacement"], expected)


def test_three_edges():
    data = dict(coord=np.array([[0, 0, 0], [0.9, 0.4, 0], [1.1, 0.6, 3]], np.float32))
    cfg = dict(type="GridSample", grid_size=[1, 0.5, 2], return_grid_coord=True)
    cells = sorted(one(cfg, data)["grid_coord"].tolist())
    assert cells == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_coordinates_that_have_no_cell_are_refused(value):
    data = scan(5)
    data["coord"][3, 1] = value
    with pytest.raises(
        InputError, match="sample scan has coordinates that are not finite or too far"
    ):
        one(dict(type="GridSample", grid_size=0.05), data)


# ---- keys and values -----------------------------------------------------------------------------


def test_to_tensor():
    value = dict(
        a=np.arange(3, dtype=np.int32), b=np.ones((2, 2)), c=np.array([True, False]), d="name",
        e=3, f=0.5, g=[np.zeros(1), "x"], h=np.float64(2), i=np.arange(4)[::-1], j=torch.ones(1),
    )  # fmt: skip
    value["b"].flags.writeable = False
    result = T.ToTensor()(value)
    dtypes = {key: tensor.dtype for key, tensor in result.items() if torch.is_tensor(tensor)}
    assert dtypes == {
        "a": torch.int64, "b": torch.float32, "c": torch.bool, "e": torch.int64,
        "f": torch.float32, "h": torch.float32, "i": torch.int64, "j": torch.float32,
    }  # fmt: skip
    assert result["d"] == "name"
    assert result["e"].shape == result["f"].shape == result["h"].shape == (1,)
    assert result["g"][0].dtype == torch.float32
    assert result["g"][1] == "x"
    assert result["i"].tolist() == [3, 2, 1, 0]
    result["b"].add_(1)
    assert (value["b"] == 1).all()
    with pytest.raises(InputError, match="pose is a NoneType"):
        T.ToTensor()(dict(pose=None))


def test_collect():
    data = T.ToTensor()(scan(7))
    result = T.Collect(keys=("coord", "segment", "name"), feat_keys=("coord", "strength"))(data)
    assert set(result) == {"coord", "segment", "name", "offset", "feat"}
    assert result["offset"].tolist() == [7]
    assert result["offset"].dtype == torch.int64
    assert torch.equal(result["feat"], torch.cat([data["coord"], data["strength"]], dim=1))
    two = T.Collect("coord", dict(offset="coord", origin_offset="segment"))(data)
    assert two["origin_offset"].tolist() == [7]


@pytest.mark.parametrize(
    ("collect", "change", "text"),
    [
        (dict(keys="grid_coord"), {}, "the sample has no 'grid_coord'; it has "),
        (dict(keys="coord", feat_keys=("coord", "segment")), {}, "segment has shape"),
        (
            dict(keys=("coord", "segment")),
            dict(segment=torch.zeros(6)),
            "segment of sample scan has 6",
        ),
        (
            dict(keys="coord", feat_keys=("coord", "strength")),
            dict(strength=torch.zeros(6, 1)),
            "strength",
        ),
    ],
)
def test_collect_refuses(collect, change, text):
    data = {**T.ToTensor()(scan(7)), **change}
    with pytest.raises(InputError, match=text):
        T.Collect(**collect)(data)


def test_copy_and_update():
    data = scan(4)
    literal = ["coord", "tag"]
    T.Copy()(data)
    T.Update(dict(index_valid_keys=literal, grid_size=0.05))(data)
    data["index_valid_keys"].append("more")
    data["coord"][:] = 0
    assert literal == ["coord", "tag"]
    assert data["origin_coord"].any()
    assert np.array_equal(data["origin_segment"], data["segment"])
    assert data["grid_size"] == 0.05
    with pytest.raises(InputError, match="no 'missing'"):
        T.Copy(dict(missing="x"))(data)


def test_map_labels():
    data = dict(segment=np.array([0, 3, -1, 7, 2, 300], np.int32), name="s")
    raw = data["segment"]
    assert T.MapLabels({0: 5, 3: 1, 7: 1, -1: 9})(data)["segment"].tolist() == [5, 1, 9, 1, -1, -1]
    assert raw.tolist() == [0, 3, -1, 7, 2, 300]
    as_list = T.MapLabels([4, 5, 6, 7], default=0)(dict(segment=raw))["segment"]
    assert as_list.tolist() == [4, 7, 0, 0, 6, 0]
    assert as_list.dtype == np.int32
    both = dict(segment=raw, origin_segment=raw[:2].astype(np.uint8))
    both = T.MapLabels({0: 1}, keys=("segment", "origin_segment"))(both)
    assert both["origin_segment"].tolist() == [1, -1]
    strict = T.MapLabels({0: 0, 3: 0, -1: -1, 2: 0}, default=None)
    with pytest.raises(InputError, match="class 7 of segment in sample s, row 3, has no new class"):
        strict(dict(segment=raw, name="s"))
    with pytest.raises(InputError, match="no whole numbers"):
        strict(dict(segment=torch.zeros(3)))
    with pytest.raises(InputError, match="no 'segment'"):
        strict({})


def test_collecting_outruns_a_walk_over_the_rows():
    """Every row once, as for the offset of a textbook loader, takes far more than five times as long."""
    n = 120_000
    rng = np.random.RandomState(0)
    data = dict(coord=rng.rand(n, 3), strength=rng.rand(n, 1), segment=rng.randint(0, 9, n))
    chain = [T.ToTensor(), T.Collect(("coord", "segment"), feat_keys=("coord", "strength"))]

    def ours():
        return chain[1](chain[0](data))

    def walk():
        coord = torch.from_numpy(data["coord"]).float()
        return torch.tensor([row.shape[0] for row in coord]).sum()

    def least(call):
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        return min(spent)

    assert least(walk) > 5 * least(ours)


@pytest.mark.parametrize(
    "cfg",
    [
        dict(type="kd.MapLabels", mapping={}),
        dict(type="kd.MapLabels", mapping={"car": 1}),
        dict(type="kd.MapLabels", mapping={0: 0.5}),
        dict(type="kd.MapLabels", mapping={0: 0, 2**30: 1}),
        dict(type="RandomDropColor", drop_ratio=1.5),
        dict(type="RandomColorJitter", brightness=-1),
        dict(type="RandomColorJitter", hue=0.6),
        dict(type="RandomColorJitter", contrast=(2, 1)),
        dict(type="RandomColorJitter", saturation="much"),
        dict(type="MultiViewGenerator", view_keys=("color",)),
        dict(type="MultiViewGenerator", local_view_num=0),
        dict(type="ImgGaussianBlur", radius_min=0),
        dict(type="Imgnormalize", std=(1, 0, 1)),
        dict(type="ImgAugmentation", imgtransforms=[], crop_h=600),
        dict(type="GridSample", mode="val"),
        dict(type="GridSample", grid_size=0),
        dict(type="GridSample", grid_size=[1, 2]),
        dict(type="SphereCrop", mode="all"),
        dict(type="RandomRotate", axis="w"),
        dict(type="RandomJitter", clip=0),
        dict(type="RandomDropout", dropout_ratio=1),
        dict(type="RandomShift", shift=[0.2, 0.2, 0.2]),
        dict(type="PointClip", point_cloud_range=(0, 0, 0, 1, 1)),
        dict(type="kd.RangeCrop", point_cloud_range=(1, 1, 1, 0, 0, 0)),
        dict(type="ElasticDistortion", distortion_params=[[0, 1]]),
        dict(type="Collect", keys="coord", feat=("coord",)),
    ],
    ids=lambda c: c["type"],
)
def test_wrong_options_are_refused_when_built(cfg):
    with pytest.raises(InputError, match=cfg["type"].removeprefix("kd.")) as caught:
        TRANSFORMS.build(cfg)
    assert "\n" not in str(caught.value)


def test_elastic_distortion_of_a_street_is_refused():
    data = scan(10)
    data["coord"] *= 1000
    with pytest.raises(InputError, match="noise grid of"):
        T.ElasticDistortion().distort(data["coord"], 0.2, 0.4)


# ---- colour and instances ------------------------------------------------------------------------


def test_colour():
    color = np.array([[0, 100, 50], [100, 100, 150]], dtype=np.float32)
    data = dict(coord=np.zeros((2, 3)), color=color)
    stretched = one(dict(type="ChromaticAutoContrast", p=1, blend_factor=1), dict(data))["color"]
    assert stretched.tolist() == [[0, 100, 0], [255, 100, 255]]
    assert T.NormalizeColor()(dict(color=np.array([[255.0, 0, 51]])))["color"].tolist() == [
        [1, 0, 0.2]
    ]
    moved = one(dict(type="ChromaticTranslation", p=1, ratio=0.1), dict(data))["color"]
    inside = moved[:, 1:] - color[:, 1:]
    assert np.allclose(inside[0], inside[1], atol=1e-4)
    assert 0 < np.abs(inside).max() <= 25.5
    noisy = one(dict(type="ChromaticJitter", p=1, std=0.5), dict(data))["color"]
    assert noisy.min() >= 0
    assert noisy.max() <= 255
    assert not np.array_equal(noisy, color)


def test_instances_by_loop():
    data = scan(120)
    data["segment"][:20] = -1
    coord, segment, instance = data["coord"], data["segment"].copy(), data["instance"].copy()
    # instances of one class each, as real ones are
    segment[20:] = np.array([2, 3, 4, 5, 2, 3])[instance[20:] + 1]
    segment[20:30] = 1
    data["segment"] = segment
    result = T.InstanceParser()(data)
    kept = segment >= 2
    assert (result["instance"][~kept] == -1).all()
    assert (result["instance_centroid"][~kept] == -1).all()
    ids = sorted(set(instance[kept].tolist()))
    assert result["bbox"].shape == (len(ids), 8)
    for number, label in enumerate(ids):
        rows = np.flatnonzero(kept & (instance == label))
        assert (result["instance"][rows] == number).all()
        points = coord[rows].astype(np.float64)
        low, high = points.min(0), points.max(0)
        box = [*((low + high) / 2), *(high - low), 0, segment[rows[0]] - 2]
        np.testing.assert_allclose(result["bbox"][number], box, atol=1e-9)
        np.testing.assert_allclose(
            result["instance_centroid"][rows], np.tile(points.mean(0), (len(rows), 1)), atol=1e-9
        )


def test_no_instances():
    data = scan(10)
    data["segment"][:] = 0
    result = T.InstanceParser()(data)
    assert result["bbox"].shape == (0, 8)
    assert (result["instance"] == -1).all()


# ---- a real scan ---------------------------------------------------------------------------------


def test_pipeline_on_a_real_scan(samples):
    path = samples / "semantickitti/dataset/sequences/00/velodyne/000000.bin"
    raw = np.fromfile(path, dtype=np.float32).reshape(-1, 4)
    data = dict(coord=raw[:, :3].copy(), strength=raw[:, 3:].copy(), name="00_000000")
    data["segment"] = np.zeros(len(raw), np.int32)
    chain = Compose(
        [
            dict(type="Copy", keys_dict=dict(coord="origin_coord")),
            dict(type="GridSample", grid_size=0.05, return_grid_coord=True, return_inverse=True),
            dict(type="ToTensor"),
            dict(
                type="Collect",
                keys=("coord", "grid_coord", "segment", "inverse", "origin_coord"),
                feat_keys=("coord", "strength"),
            ),
        ]
    )
    seed(0)
    batch = chain(data)
    n = len(batch["coord"])
    assert 60_000 < n < len(raw) == 124_668
    assert batch["feat"].shape == (n, 4)
    assert batch["grid_coord"].min(0).values.tolist() == [0, 0, 0]
    assert len(torch.unique(batch["grid_coord"], dim=0)) == n
    # Every point lies in the voxel of its representative.
    gap = (batch["coord"][batch["inverse"]] - batch["origin_coord"]).abs().max()
    assert gap <= 0.05 + 1e-4
