"""Pictures of clouds: which point is seen, where it is, in which colour; nothing, and what is outside."""

import numpy as np
import pytest

from pointcept_kd.data import splat
from pointcept_kd.data.pictures import BACKGROUND, IGNORED
from pointcept_kd.data.splat import View

from .test_pictures import decode_png

RED, GREEN, BLUE = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)


def middle(picture, color):
    """Row and column of the middle of the pixels of a colour."""
    rows, columns = np.nonzero((picture == color).all(axis=2))
    return rows.mean() + 0.5, columns.mean() + 0.5


# --- z-buffer -------------------------------------------------------------------------------------


def test_a_nearer_point_hides_a_farther_one():
    place, colors = np.array([(1.5, 0.5), (1.2, 0.9)]), np.stack([RED, GREEN])
    for order in ([0, 1], [1, 0]):
        picture, depths = splat.splat(
            place[order], np.array([5.0, 3.0])[order], colors[order], (2, 3)
        )
        assert picture[0, 1].tolist() == GREEN.tolist()
        assert depths[0, 1] == 3
        assert np.isinf(depths).sum() == 5
        assert ((picture == BACKGROUND).all(axis=2) == np.isinf(depths)).all()


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [(1, (4,), (5,)), (2, (4, 5), (4, 5)), (3, (3, 4, 5), (4, 5, 6))]
)
def test_squares_stand_around_their_point(size, rows, columns):
    picture, _ = splat.splat(np.array([(5.4, 4.6)]), np.ones(1), RED[None], (9, 9), size)
    found = np.nonzero((picture == RED).all(axis=2))
    assert sorted(set(found[0])) == list(rows)
    assert sorted(set(found[1])) == list(columns)
    assert len(found[0]) == size * size


def test_squares_of_many_sizes_against_loops():
    rng = np.random.default_rng(0)
    place, depth = rng.uniform(-4, 24, (400, 2)), rng.permutation(400) / 7
    colors, size = rng.integers(0, 255, (400, 3)).astype(np.uint8), rng.integers(1, 5, 400)
    place[200:300] = place[:100]  # equal squares
    size[200:300] = size[:100]
    expected = np.full((16, 20), np.inf)
    owner = np.full((16, 20), -1)
    for i in range(400):
        left, top = (int(np.floor(place[i, k] - (size[i] - 1) / 2)) for k in (0, 1))
        for r in range(top, top + size[i]):
            for c in range(left, left + size[i]):
                if 0 <= r < 16 and 0 <= c < 20 and depth[i] < expected[r, c]:
                    expected[r, c], owner[r, c] = depth[i], i
    picture, depths = splat.splat(place, depth, colors, (16, 20), size)
    np.testing.assert_array_equal(depths, expected)
    np.testing.assert_array_equal(picture[owner >= 0], colors[owner[owner >= 0]])
    assert (picture[owner < 0] == BACKGROUND).all()


def test_points_that_have_no_place():
    place = np.array([(np.nan, 1), (1e300, 1), (-1e12, 1), (1, np.inf), (1, 1), (9, 9)])
    depth = np.array([1, 1, 1, 1, np.nan, 1])
    picture, depths = splat.splat(place, depth, np.tile(RED, (6, 1)), (3, 3))
    assert (picture == BACKGROUND).all()
    assert np.isinf(depths).all()


# --- colours --------------------------------------------------------------------------------------


def test_colours_run_from_low_to_high():
    colors = splat.height_colors(np.array([-9, 0, 1.0, 1.5, 6, 99]), (0, 6))
    assert colors.dtype == np.uint8
    assert colors[[0, 1, 2, 4, 5]].tolist() == splat.RAMP[[0, 0, 1, 6, 6]].tolist()
    np.testing.assert_allclose(colors[3], (splat.RAMP[1] + splat.RAMP[2]) / 2, atol=0.5)
    # Even the darkest colour stands out.
    assert splat.RAMP.sum(axis=1).min() > 4 * sum(BACKGROUND)


def test_the_span_leaves_stray_points_out():
    cloud = np.zeros((1001, 3))
    cloud[:, 2] = np.linspace(-2, 3, 1001)
    cloud[0, 2], cloud[-1, 2] = -500, 900
    low, high = splat.height_span(cloud[:500], cloud[500:])
    assert (low, high) == (pytest.approx(-1.95, abs=0.01), pytest.approx(2.95, abs=0.01))
    assert splat.height_span(np.zeros((5, 3))) == (0, 1)
    assert splat.height_span() == splat.height_span(np.zeros((0, 3))) == (-2, 4)


# --- from above -----------------------------------------------------------------------------------


def test_above_forward_is_up_and_left_is_left():
    cloud = np.array([(40.0, 0, 0), (0, 40, 0), (-30, -30, 0), (51, 0, 0), (0, 0, 1e9)])
    colors = np.stack([RED, GREEN, BLUE, RED, BLUE])
    picture = splat.birdseye(cloud[:4], colors[:4], width=100, smooth=1)
    assert picture.shape == (100, 100, 3)
    drawn = {(r, c): picture[r, c].tolist() for r, c in np.argwhere((picture != BACKGROUND).any(2))}
    assert drawn == {(10, 50): [255, 0, 0], (50, 10): [0, 255, 0], (80, 80): [0, 0, 255]}


def test_above_the_highest_is_seen():
    cloud, colors = np.array([(1.0, 2, -1.7), (1, 2, 3)]), np.stack([RED, GREEN])
    for order in ([0, 1], [1, 0]):
        picture = splat.birdseye(cloud[order], colors[order], half=5, width=10, smooth=1)
        assert picture[4, 3].tolist() == GREEN.tolist()
        assert (picture == RED).all(axis=2).sum() == 0


def test_smooth_pictures_have_the_same_size_and_fill():
    grid = np.stack(np.meshgrid(np.arange(-5, 5, 0.05), np.arange(-5, 5, 0.05)), -1).reshape(-1, 2)
    plane = np.pad(grid, ((0, 0), (0, 1)))
    picture = splat.birdseye(plane, np.tile(GREEN, (len(plane), 1)), half=4, width=40, smooth=3)
    assert picture.shape == (40, 40, 3)
    assert (picture == GREEN).all()


def test_what_lies_behind_an_edge_is_darker():
    x, y = np.meshgrid(np.arange(-5, 5, 0.1), np.arange(-5, 5, 0.1))
    step = np.stack([x, y, np.where(x > 0, 0.0, -3.0)], -1).reshape(-1, 3)
    picture = splat.birdseye(step, np.tile(GREEN, (len(step), 1)), half=4, width=80, smooth=1)
    green = picture[:, 40, 1].astype(int)  # from far ahead (row 0, high) to behind (low)
    assert (green[:39] == 255).all()
    assert green.min() < 230
    assert green.argmin() in (40, 41)
    assert (green[45:] == 255).all()


# --- perspective ----------------------------------------------------------------------------------


def test_places_of_a_pinhole():
    view = View(eye=(0, 0, 0), target=(1, 0, 0), fov=90)
    place, depth, focal = view.project(np.array([(5.0, 0, 0), (5, 5, 0), (5, 0, 2.5)]), 200, 100)
    assert focal == pytest.approx(100)
    np.testing.assert_allclose(
        place, [(100, 50), (0, 50), (100, 0)], atol=1e-12
    )  # ahead, left edge, above
    np.testing.assert_allclose(depth, 5)


def test_ahead_left_and_up():
    cloud = np.array([(20.0, 8, 0), (20, -8, 0), (20, -8, 5)])
    picture = splat.perspective(cloud, np.stack([RED, GREEN, BLUE]), None, 300, 200, smooth=1)
    red, green, blue = (middle(picture, color) for color in (RED, GREEN, BLUE))
    assert red[1] < 150 < green[1]
    assert red[1] + green[1] == pytest.approx(300, abs=1.01)
    assert red[0] == pytest.approx(green[0], abs=0.01)
    assert blue[0] < green[0]


def test_in_perspective_the_nearer_is_seen_and_larger():
    view = View(eye=(0, 0, 0), target=(1, 0, 0), fov=60, point=1.0)
    cloud, colors = np.array([(30.0, 0, 0), (10, 0, 0)]), np.stack([RED, GREEN])
    one, two = (splat.perspective(cloud[[i]], colors[[i]], view, 100, 60, smooth=1) for i in (0, 1))
    both = splat.perspective(cloud, colors, view, 100, 60, smooth=1)
    # 86.6 pixels per radian: 2.9 and 8.7 pixels.
    assert (one == RED).all(axis=2).sum() == 9
    assert (two == GREEN).all(axis=2).sum() == 81
    np.testing.assert_array_equal(both, two)


def test_what_is_behind_the_eye_is_not_seen():
    cloud = np.array([(-99.0, 0, 16), (-24, 0, 16), (-24.0001, 0, 0)])
    assert (splat.perspective(cloud, width=60, height=40) == BACKGROUND).all()


def test_views_that_cannot_be():
    for view in (View(eye=(0, 0, 9), target=(0, 0, 0)), View(fov=180), View(fov=float("nan"))):
        with pytest.raises(ValueError, match="must look sideways"):
            splat.perspective(np.zeros((1, 3)), view=view)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [splat.birdseye, splat.perspective])
def test_nothing_is_background(draw):
    assert (draw(np.zeros((0, 3)), width=40) == BACKGROUND).all()


@pytest.mark.parametrize("draw", [splat.birdseye, splat.perspective])
def test_points_that_are_not_finite_are_left_out(draw):
    cloud = np.random.default_rng(0).uniform(-9, 9, (60, 3))
    broken = cloud.copy()
    broken[::3, 2], broken[1::30, 0] = np.nan, np.inf
    colors = np.tile(RED, (60, 1))
    left = np.isfinite(broken).all(axis=1)
    np.testing.assert_array_equal(draw(broken, width=60), draw(cloud[left], width=60))
    np.testing.assert_array_equal(
        draw(broken, colors, width=60), draw(cloud[left], colors[left], width=60)
    )


@pytest.mark.parametrize("draw", [splat.birdseye, splat.perspective])
def test_height_colours_and_order_of_points(draw):
    rng = np.random.default_rng(0)
    cloud = rng.uniform(-9, 9, (500, 3))
    picture = draw(cloud, width=90)
    np.testing.assert_array_equal(picture, draw(cloud[rng.permutation(500)], width=90))
    span = splat.height_span(cloud)
    colors = splat.height_colors(cloud[:, 2], span)
    np.testing.assert_array_equal(picture, draw(cloud, colors, width=90))
    np.testing.assert_array_equal(picture, draw(cloud, span=span, width=90))
    assert (picture != draw(cloud, span=(20, 30), width=90)).any()


@pytest.mark.parametrize("draw", [splat.birdseye, splat.perspective])
def test_clouds_and_colours_of_other_shapes(draw):
    with pytest.raises(ValueError, match=r"expected \(n, 3\) coordinates, got \(5, 4\)"):
        draw(np.zeros((5, 4)))
    for colors in (np.zeros((4, 3), np.uint8), np.zeros((5, 3))):
        with pytest.raises(ValueError, match=r"expected colours \(5, 3\) uint8"):
            draw(np.zeros((5, 3)), colors)


def test_panels(tmp_path):
    low, high = np.zeros((100, 3)), np.zeros((100, 3))
    low[:, 0], high[:, 1], high[:, 2] = 10, 10, 4
    clouds = [low, high, np.concatenate([low, high])]
    splat.write_panels(tmp_path / "a.png", clouds, "birdseye", width=50, half=20)
    picture = decode_png((tmp_path / "a.png").read_bytes())
    assert picture.shape == (50, 3 * 50 + 2 * 6, 3)
    assert (picture[:, 50:56] == IGNORED).all()
    # One scale of heights: a point has its colour in every panel.
    np.testing.assert_array_equal(picture[10:15, 20:30], picture[10:15, 132:142])
    np.testing.assert_array_equal(picture[20:30, 66:76], picture[20:30, 122:132])
    assert (picture[12, 25] != picture[25, 68]).any()
    splat.write_panels(tmp_path / "b.png", clouds[:1], width=50)
    assert decode_png((tmp_path / "b.png").read_bytes()).shape == (30, 50, 3)


def test_panels_in_a_given_scale_of_heights():
    cloud = np.zeros((50, 3))
    cloud[:, 0], cloud[:, 2] = 10, 2
    for kind, height in (("birdseye", 80), ("perspective", 48)):
        # A second cloud changes nothing in the first picture where the scale is given.
        alone = splat.panels([cloud], kind, width=80, span=(0, 4))
        both = splat.panels([cloud, cloud * [1, 1, 9]], kind, width=80, span=(0, 4))
        assert alone.shape == (height, 80, 3)
        np.testing.assert_array_equal(both[:, :80], alone)
        assert (both[:, 86:] != alone).any()
        assert (splat.panels([cloud, cloud * [1, 1, 9]], kind, width=80)[:, :80] != alone).any()
    picture = splat.panels([cloud], "birdseye", width=80, half=20, span=(0, 4))
    assert picture[20, 40].tolist() == splat.height_colors([2], (0, 4))[0].tolist()
    twice = splat.panels([cloud, cloud], "birdseye", width=80, half=20, span=(0, 4))
    np.testing.assert_array_equal(twice[:, 86:], picture)


def test_few_points_are_drawn_larger():
    sizes = [splat.point_size(count) for count in (10**6, 120_000, 30_000, 4800, 10, 0)]
    assert sizes == pytest.approx([0.07, 0.07, 0.14, 0.35, 0.35, 0.35])
    assert splat.point_size(4800, 20) == pytest.approx(0.14)
    # A square of 1 m is 4 pixels wide where a metre has 4.
    picture = splat.birdseye(np.zeros((1, 3)), RED[None], half=5, width=40, smooth=1, point=1.0)
    assert (picture == RED).all(axis=2).sum() == 16
    # A smaller reach is seen from nearer.
    one = np.array([(5.0, 0, 0)])
    wide, near = (
        (splat.panels([one], "perspective", width=200, half=half) != BACKGROUND).any(2).sum()
        for half in (50, 20)
    )
    assert wide >= 1
    assert near > wide


def test_panels_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="kind='front'"):
        splat.write_panels(tmp_path / "a.png", [np.zeros((1, 3))], "front")
    with pytest.raises(ValueError, match="one height, got \\[\\]"):
        splat.write_panels(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match="one height"):
        splat.side_by_side([np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)])
    assert list(tmp_path.iterdir()) == []
