"""Views against loops over the points."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from pointcept_kd.data.views import ContrastiveViewsGenerator, MultiViewGenerator
from pointcept_kd.host import InputError

KEYS = ("coord", "tag")


def seed(value):
    random.seed(value)
    np.random.seed(value)


def cloud(n=400, **more):
    rng = np.random.RandomState(1)
    data = dict(coord=rng.randn(n, 3).astype(np.float32) * [5, 5, 1], tag=np.arange(n), name="c")
    data["index_valid_keys"] = list(KEYS)
    return {**data, **more}


def views(result, name):
    ends = [0, *result[f"{name}_offset"].tolist()]
    return [result[f"{name}_tag"][a:b] for a, b in pairwise(ends)]


def test_contrastive_views_are_made_apart():
    chain = [
        dict(type="RandomScale", scale=[2, 3]),
        dict(type="GridSample", grid_size=4.0, return_grid_coord=True),
    ]
    data = cloud()
    before = data["coord"].copy()
    seed(0)
    result = ContrastiveViewsGenerator(KEYS, chain)(data)
    assert np.array_equal(result["coord"], before)
    factors = []
    for view in ("view1", "view2"):
        tag, coord = result[f"{view}_tag"], result[f"{view}_coord"]
        assert len(tag) == len(coord) == len(result[f"{view}_grid_coord"]) < 400
        ratio = coord / before[tag]
        assert np.ptp(ratio) < 1e-5
        factors.append(ratio.mean())
    assert abs(factors[0] - factors[1]) > 1e-3
    with pytest.raises(InputError, match="no 'colour'"):
        ContrastiveViewsGenerator(("coord", "colour"))(cloud())


def test_views_are_the_nearest_points_of_their_centre():
    seed(2)
    data = cloud()
    coord = data["coord"].copy()
    maker = MultiViewGenerator(3, (0.3, 0.6), 4, (0.05, 0.2), view_keys=KEYS)
    result = maker(data)
    wide, small = views(result, "global"), views(result, "local")
    assert (len(wide), len(small)) == (3, 4)
    for rows, low, high in [*((r, 0.3, 0.6) for r in wide), *((r, 0.05, 0.2) for r in small)]:
        assert low * 400 - 1 <= len(rows) <= high * 400
        # Rows come nearest first, so the first row is the centre itself.
        distance = ((coord - coord[rows[0]]) ** 2).sum(1)
        assert set(rows) == set(np.argsort(distance)[: len(rows)])
        assert rows[0] in wide[0]
    centres = [rows[0] for rows in small]
    for number, centre in enumerate(centres):
        assert not any(centre in rows for rows in small[:number])  # not covered before


def test_shared_and_transformed_views():
    seed(1)
    data = cloud()
    before = data["coord"].copy()
    result = MultiViewGenerator(
        shared_global_view=True,
        view_keys=KEYS,
        global_transform=[dict(type="RandomScale", scale=[2, 2])],
        local_transform=[dict(type="RandomScale", scale=[3, 3])],
        global_shared_transform=[dict(type="RandomShift", shift=[(5, 5), (0, 0), (0, 0)])],
    )(data)
    first, second = views(result, "global")
    assert np.array_equal(first, second)
    tag = result["global_tag"]
    np.testing.assert_allclose(result["global_coord"], (before[tag] + [5, 0, 0]) * 2, rtol=1e-5)
    np.testing.assert_allclose(result["local_coord"], before[result["local_tag"]] * 3, rtol=1e-5)
    assert np.array_equal(result["coord"], before)


def test_the_first_centre_keeps_its_height():
    for value in range(10):
        seed(value)
        data = cloud()
        z = data["coord"][:, 2]
        low, high = z.min(), z.max()
        rows = views(
            MultiViewGenerator(view_keys=KEYS, center_height_scale=(0.5, 0.6))(data), "global"
        )
        assert low + 0.5 * (high - low) <= z[rows[0][0]] <= low + 0.6 * (high - low)
    two = cloud()
    two["coord"][:, 2] = np.where(np.arange(400) % 2, 0, 1)
    with pytest.raises(InputError, match="no point between the heights"):
        MultiViewGenerator(view_keys=KEYS, center_height_scale=(0.4, 0.6))(two)


def test_images_without_a_point_are_left_out():
    data = cloud()
    matches = np.full((400, 3, 2), -1)
    near = np.argsort((data["coord"] ** 2).sum(1))[:50]
    matches[near, 0] = matches[near, 2] = 7
    data.update(correspondence=matches, images=torch.arange(3), img_num=3)
    seed(0)
    result = MultiViewGenerator(view_keys=(*KEYS, "correspondence"), enc2d_max_size=60)(data)
    assert result["img_num"] == 2
    assert result["images"].tolist() == [0, 2]
    assert result["correspondence"].shape == (400, 2, 2)
    first = views(result, "global")[0]
    assert len(first) == 60
    assert np.array_equal(result["global_correspondence"][:60], matches[first][:, [0, 2]])


def test_local_views_of_one_sweep():
    frames = {0: np.arange(0, 400, 2), 1: np.arange(1, 400, 2)}
    seed(0)
    maker = MultiViewGenerator(view_keys=KEYS, local_view_num=6, if_frame_selected=True)
    result = maker(cloud(frame_pcd_offset=frames))
    parity = [set((rows % 2).tolist()) for rows in views(result, "local")]
    assert all(len(kinds) == 1 for kinds in parity)
    assert {next(iter(kinds)) for kinds in parity} == {0, 1}


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match="MultiViewGenerator: the sample has no 'normal'"):
        MultiViewGenerator(view_keys=("coord", "normal"))(cloud())


def test_a_tiny_cloud_has_views():
    seed(0)
    result = MultiViewGenerator(view_keys=KEYS, local_view_scale=(0.0, 0.01))(cloud(3))
    assert all(len(rows) == 3 for rows in views(result, "local"))
