"""Pairs through every transform: worked places, plain loops, and one property over all of them together."""

import random

import numpy as np
import pytest
import torch

from pointcept_kd.data import pair_transforms
from pointcept_kd.data.pair_transforms import (
    CropImages,
    DropCuboid,
    FlipImages,
    PairsToRows,
    ResizeImages,
    ShuffleImages,
    moved_pixels,
    resized_image,
    resized_map,
    rows_of_ids,
)
from pointcept_kd.data.pixel_pairs import PointPixelDataset
from pointcept_kd.data.transforms import (
    Collect,
    RandomDropout,
    RandomFlip,
    RandomRotate,
    RandomScale,
    RangeCrop,
    ShufflePoint,
    ToTensor,
)
from pointcept_kd.data.voxel_sample import VoxelSample, voxel_cells
from pointcept_kd.host import TRANSFORMS, InputError
from pointcept_kd.host.loader import collate_fn

from .pair_scene import Scene, read_place, telling_image

COLLECT = {
    "keys": ("coord", "grid_coord", "images", "pair_point", "pair_pixel", "pair_label", "name"),
    "feat_keys": ("strength",),
    "offset_keys_dict": {"offset": "coord", "pair_offset": "pair_point", "image_offset": "images"},
}


@pytest.fixture
def scenes(tmp_path):
    return PointPixelDataset(Scene(tmp_path, blind=[1]), superpixels=True, maps=True)


def numbered(data):
    """The sample with every pair's own number for its label."""
    data["pair_label"] = np.arange(len(data["pair_point"]))
    return data


def tiny(pixels, shape=(900, 1600), points=None):
    """A sample of one image with these pixels; one point each unless `points` are given."""
    count = len(pixels)
    points = np.arange(count) if points is None else np.array(points)
    total = max(points.max(initial=0) + 1, 1)
    return {
        "coord": np.random.default_rng(0).normal(size=(total, 3)).astype(np.float32),
        "point_id": np.arange(total),
        "index_valid_keys": ["coord", "point_id"],
        "images": [np.zeros((*shape, 3), np.uint8)],
        "pair_point": points,
        "pair_pixel": np.array([(0, *p) for p in pixels], int).reshape(-1, 3),
        "pair_label": np.arange(count),
    }


# ------------------------------------------------------------------------------------------- crop and flip


def cropped(data, box, size=(224, 416), **options):
    crop = CropImages(size, **options)
    crop.box = lambda height, width: box
    return crop(data)


def test_worked_crop_and_flip():
    pixels = [(437, 812), (100, 200), (699, 1399), (700, 300)]
    done = cropped(tiny(pixels), (100, 200, 600, 1200), tries=1)
    assert done["pair_pixel"].tolist() == [[0, 126, 212], [0, 0, 0]]
    assert done["pair_label"].tolist() == [0, 1]
    assert done["images"][0].shape == (224, 416, 3)
    done = FlipImages(p=1)(done)
    assert done["pair_pixel"].tolist() == [[0, 126, 203], [0, 0, 415]]


def test_halves_go_to_even():
    # Half the size: odd rows end in .5.
    places, inside = moved_pixels(np.array([[1, 3], [3, 5], [5, 7]]), (0, 0, 20, 20), (10, 10))
    assert places.tolist() == [[0, 2], [2, 2], [2, 4]]
    assert inside.all()


def test_pixels_by_plain_loops():
    rng = np.random.default_rng(5)
    for _ in range(20):
        box = (*rng.integers(0, 30, 2), *rng.integers(20, 90, 2))
        size = tuple(rng.integers(10, 100, 2))
        pixels = rng.integers(0, 120, (50, 2))
        places, inside = moved_pixels(pixels, box, size)
        for pixel, place, kept in zip(pixels.tolist(), places.tolist(), inside, strict=True):
            exact = [(pixel[i] - int(box[i])) * int(size[i]) / int(box[i + 2]) for i in (0, 1)]
            assert place == [round(v) for v in exact]  # python rounds halves to even too
            assert kept == all(0 <= p < s for p, s in zip(place, size, strict=True))


def test_images_by_plain_loops():
    rng = np.random.default_rng(6)
    image = rng.integers(0, 256, (31, 47, 3)).astype(np.uint8)
    box, size = (4, 7, 20, 33), (12, 29)
    done = resized_image(image, box, size, antialias=False)
    assert done.dtype == np.uint8
    part = image[4:24, 7:40].astype(float)
    for r in range(12):
        for c in range(29):
            y = min(max((r + 0.5) * 20 / 12 - 0.5, 0), 19)
            x = min(max((c + 0.5) * 33 / 29 - 0.5, 0), 32)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 19), min(x0 + 1, 32)
            fy, fx = y - y0, x - x0
            value = (
                (1 - fy) * ((1 - fx) * part[y0, x0] + fx * part[y0, x1])
                + fy * ((1 - fx) * part[y1, x0] + fx * part[y1, x1])
            )  # fmt: skip
            assert np.abs(done[r, c] - value).max() <= 1.01
    # Averaging over what a pixel covers: stripes of one pixel turn grey.
    stripes = np.zeros((40, 400, 3), np.uint8)
    stripes[:, ::2] = 200
    grey = resized_image(stripes, (0, 0, 40, 400), (40, 50), antialias=True)
    assert np.abs(grey[:, 3:-3].astype(int) - 100).max() < 8
    whole = resized_image(image, (0, 0, 31, 47), (31, 47), antialias=False)
    np.testing.assert_array_equal(whole, image)
    assert not np.shares_memory(whole, image)


def test_maps_by_plain_loops():
    values = np.arange(31 * 47).reshape(31, 47)
    done = resized_map(values, (4, 7, 20, 33), (12, 29))
    for r in range(12):
        for c in range(29):
            assert done[r, c] == values[4 + int(r * 20 / 12), 7 + int(c * 33 / 29)]


def test_boxes_have_their_area_and_aspect():
    crop = CropImages(area=(0.3, 0.5), aspect=(14 / 9, 17 / 9))
    boxes = np.array([crop.box(900, 1600) for _ in range(300)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 900).all()
    assert (left + width <= 1600).all()
    share, aspect = height * width / (900 * 1600), width / height
    assert share.min() > 0.298
    assert share.max() < 0.502
    assert share.min() < 0.32
    assert share.max() > 0.48
    assert aspect.min() > 1.54
    assert aspect.max() < 1.90
    assert top.max() > 200
    assert left.max() > 300
    assert top.min() < 30
    assert left.min() < 60


def test_boxes_where_no_draw_fits():
    # 375 x 1242 is too wide for a third of its area at 16/9 .. 17/9 and nine tenths of it at once.
    crop = CropImages(area=(0.9, 1.0), aspect=(16 / 9, 17 / 9))
    assert crop.box(375, 1242) == (0, (1242 - 708) // 2, 375, 708)
    assert crop.box(1600, 900) == ((1600 - 506) // 2, 0, 506, 900)


def test_a_crop_that_loses_too_much_is_drawn_again():
    boxes = [(0, 0, 100, 160), (400, 800, 100, 160), (800, 1400, 100, 160)]
    drawn = []

    def draw(height, width):
        drawn.append(boxes[len(drawn) % 3])
        return drawn[-1]

    # Pixels around the second box; the others hold few of them.
    pixels = [(440 + i // 10, 860 + i % 10) for i in range(100)] + [(5, 5)] * 2
    crop = CropImages(tries=10)
    crop.box = draw
    done = crop(tiny(pixels))
    assert len(drawn) == 2
    assert len(done["pair_pixel"]) == 100
    # 40 pixels of three places are too few anywhere; the best of all draws is taken.
    drawn.clear()
    pixels = [(5, 5)] * 10 + [(450, 900)] * 17 + [(850, 1500)] * 13
    done = crop(tiny(pixels))
    assert len(drawn) == 10
    assert len(done["pair_pixel"]) == 17
    # With an absolute number, less than three quarters is enough.
    drawn.clear()
    few = CropImages(tries=10, least_pairs=9)
    few.box = draw
    assert len(few(tiny(pixels))["pair_pixel"]) == 10
    assert len(drawn) == 1
    drawn.clear()
    few.least_pairs = 10  # more than, not as many as
    assert len(few(tiny(pixels))["pair_pixel"]) == 17
    assert len(drawn) == 2


def test_an_image_without_pairs_is_cropped_too():
    data = tiny([])
    done = CropImages()(data)
    assert done["images"][0].shape == (224, 416, 3)
    assert done["pair_pixel"].shape == (0, 3)
    assert done["pair_point"].shape == (0,)
    # Nothing can be lost, so the first draw is taken.
    drawn = []
    crop = CropImages(tries=10)
    crop.box = lambda height, width: drawn.append(1) or (0, 0, 600, 1200)
    crop(tiny([]))
    assert len(drawn) == 1


def test_of_equal_draws_the_first_is_taken():
    boxes = iter([(0, 0, 100, 160), (800, 1400, 100, 160)])
    crop = CropImages(tries=2)
    crop.box = lambda height, width: next(boxes)
    done = crop(tiny([(5, 5), (5, 6), (850, 1500), (850, 1501)]))
    assert done["pair_label"].tolist() == [0, 1]


def test_pairs_of_lost_points_do_not_count_for_the_crop():
    pixels = [(5, 5)] * 90 + [(850, 1500)] * 10
    data = tiny(pixels)
    for key in ("coord", "point_id"):
        data[key] = data[key][90:]
    crop = CropImages(tries=2)
    boxes = iter([(0, 0, 100, 160), (800, 1400, 100, 160)])
    crop.box = lambda height, width: next(boxes)
    assert crop(data)["pair_label"].tolist() == list(range(90, 100))


def test_whole_images_keep_all_pairs(scenes):
    data = numbered(scenes.get_data(0))
    before = data["pair_pixel"].copy()
    done = ResizeImages((30, 50))(dict(data))
    shapes = [image.shape for image in data["images"]]
    for (number, row, column), place in zip(before, done["pair_pixel"], strict=True):
        height, width = shapes[number][:2]
        expected = [number, min(round(row * 30 / height), 29), min(round(column * 50 / width), 49)]
        assert place.tolist() == expected
    assert all(i.shape == (30, 50, 3) for i in done["images"])
    assert all(m.shape == (30, 50) for m in done["superpixels"] + done["weak_labels"])
    assert (before[:, 1] * 30 / 90).round().max() == 30  # some would be one row below the image
    np.testing.assert_array_equal(data["pair_pixel"], before)


def test_every_image_is_flipped_by_itself(scenes):
    data = scenes.get_data(0)
    seen = set()
    for _ in range(40):
        done = FlipImages(0.5)(dict(data))
        turned = []
        for number, (old, new) in enumerate(zip(data["images"], done["images"], strict=True)):
            turned.append(not np.array_equal(old, new))
            if turned[-1]:
                np.testing.assert_array_equal(old[:, ::-1], new)
                np.testing.assert_array_equal(
                    data["superpixels"][number][:, ::-1], done["superpixels"][number]
                )
        seen.add(tuple(turned))
        place = done["pair_pixel"]
        values = [done["superpixels"][n][r, c] for n, r, c in place]
        np.testing.assert_array_equal(read_place(values), data["pair_pixel"])
    assert len(seen) == 8
    assert all(a is b for a, b in zip(FlipImages(0)(dict(data))["images"], data["images"]))


def test_cameras_change_places(scenes):
    data = scenes.get_data(0)
    seen = set()
    for _ in range(60):
        done = ShuffleImages()(dict(data))
        order = tuple(int(image[0, 0, 2]) // 60 for image in done["images"])
        seen.add(order)
        assert [order[n] for n in done["pair_pixel"][:, 0]] == data["pair_pixel"][:, 0].tolist()
        np.testing.assert_array_equal(done["pair_pixel"][:, 1:], data["pair_pixel"][:, 1:])
        for key in ("superpixels", "weak_labels"):
            for new, old in enumerate(order):
                np.testing.assert_array_equal(done[key][new], data[key][old])
    assert len(seen) == 6


# ------------------------------------------------------------------------------------------- cuboid


def grid_scene(pairs_per_image):
    """A line of points at x = 0 .. 100, y and z within 1 m; images see the first points."""
    data = tiny([])
    x = np.arange(101.0)
    data["coord"] = np.stack([x, x % 2, x // 2 % 2], 1).astype(np.float32)
    data["point_id"] = np.arange(101)
    data["images"] = [np.zeros((4, 4, 3), np.uint8)] * len(pairs_per_image)
    data["pair_point"] = np.concatenate([np.arange(n) for n in pairs_per_image])
    numbers = np.repeat(np.arange(len(pairs_per_image)), pairs_per_image)
    data["pair_pixel"] = np.stack([numbers, 0 * numbers, 0 * numbers], 1)
    data["pair_label"] = np.arange(len(numbers))
    return data


def draw_cuboid(monkeypatch, share, centre):
    monkeypatch.setattr(np.random, "uniform", lambda low, high: share)
    monkeypatch.setattr(np.random, "randint", lambda high: centre)


def test_points_strictly_inside_go(monkeypatch):
    # Around x = 50, y = 0, z = 1: 20 m long, and 0.2 m in y and z, so that only x = 50 + 4 k stays inside.
    draw_cuboid(monkeypatch, 0.2, 50)
    data = DropCuboid(0.2, least_pairs=5)(grid_scene([60, 30]))
    gone = [42, 46, 50, 54, 58]  # not 40 and 60 ... nor any at exactly 10 m
    assert sorted(set(range(101)) - set(data["point_id"].tolist())) == gone
    assert data["pair_point"].tolist() == [p for p in range(60) if p not in gone] + list(range(30))
    assert data["pair_label"].tolist() == [p for p in range(90) if p not in gone]
    assert len(data["coord"]) == 96


def test_a_point_on_the_border_stays(monkeypatch):
    # 0.08 of 100 m: 46 and 54 lie exactly on it.
    draw_cuboid(monkeypatch, 0.08, 50)
    data = DropCuboid(0.2, least_pairs=5)(grid_scene([60]))
    assert sorted(set(range(101)) - set(data["point_id"].tolist())) == [50]


@pytest.mark.parametrize(
    ("pairs", "least", "dropped"),
    [
        ([60, 70], 55, True),  # 55 and 65 are left
        ([60, 70], 56, False),  # 55 are too few
        ([30, 101], 90, True),  # the first has 30 before and after
        ([45, 101], 90, False),  # it has few and would lose one of them
        ([0, 101], 90, True),  # an image without pairs blocks nothing
        ([0, 0], 90, True),
    ],
)
def test_images_keep_their_pairs(monkeypatch, pairs, least, dropped):
    draw_cuboid(monkeypatch, 0.2, 50)
    before = grid_scene(pairs)
    data = DropCuboid(0.2, least)(dict(before))
    assert (len(data["coord"]) < 101) == dropped
    if not dropped:
        np.testing.assert_array_equal(data["pair_point"], before["pair_point"])
        np.testing.assert_array_equal(data["coord"], before["coord"])


def test_some_point_is_always_left():
    data = tiny([(1, 1)])
    data["coord"], data["point_id"] = np.zeros((1, 3), np.float32), np.zeros(1, int)
    data["coord"] = np.float32([[0, 0, 0], [1e-3, 1e-3, 1e-3], [1, 1, 1]])
    data["point_id"] = np.arange(3)
    for _ in range(50):
        assert len(DropCuboid(1.0, 0)(dict(data))["coord"]) >= 1


def test_share_of_the_cuboid():
    rng = np.random.default_rng(0)
    coord = rng.uniform(-1, 1, (20000, 3)).astype(np.float32) * np.float32([50, 20, 2])
    base = tiny([])
    lost = []
    for _ in range(60):
        data = DropCuboid(0.2)({**base, "coord": coord, "point_id": np.arange(20000)})
        lost.append(20000 - len(data["coord"]))
        gone = np.setdiff1d(np.arange(20000), data["point_id"])
        if len(gone):
            assert (np.ptp(coord[gone], axis=0) < 0.2 * np.ptp(coord, axis=0)).all()
    assert max(lost) > 0.003 * 20000
    assert min(lost) < 0.0005 * 20000


# ------------------------------------------------------------------------------------------- rows


def test_ids_become_rows():
    data = tiny([(0, 0)] * 6, shape=(2, 3), points=[5, 1, 3, 5, 0, 4])
    order = np.array([5, 3, 0])
    data["coord"], data["point_id"] = data["coord"][order], order
    data["images"] = [np.full((2, 3, 3), 51, np.uint8), np.full((2, 3, 3), 255, np.uint8)]
    data["superpixels"] = [np.zeros((2, 3), np.uint8)] * 2
    done = PairsToRows()(data)
    assert done["pair_point"].tolist() == [0, 1, 0, 2]
    assert done["pair_label"].tolist() == [0, 2, 3, 4]
    assert done["images"].dtype == np.float32
    assert done["images"].shape == (2, 3, 2, 3)
    assert np.allclose(done["images"][0], 0.2)
    assert (done["images"][1] == 1).all()
    assert done["superpixels"].dtype == np.int64
    assert done["superpixels"].shape == (2, 2, 3)


def test_channels_come_first():
    data = tiny([])
    data["images"] = [telling_image(1, 4, 5)]
    done = PairsToRows()(data)
    assert done["images"][0, :, 3, 4] * 255 == pytest.approx([6, 4, 60])


def test_rows_of_ids():
    assert rows_of_ids(np.array([7, 2, 7]), np.array([2, 7, 3, 9])).tolist() == [1, 0, -1, -1]
    assert rows_of_ids(np.array([4]), np.empty(0, int)).tolist() == []


def test_a_point_that_a_transform_repeated_has_one_row():
    data = tiny([(0, 0), (1, 1)])
    rows = np.array([1, 0, 1])
    data["coord"], data["point_id"] = data["coord"][rows], data["point_id"][rows]
    assert PairsToRows()(data)["pair_point"].tolist() == [1, 0]


# ------------------------------------------------------------------------------------------- all together


class Remember:
    """Keep the ids of the points, for looking them up after the voxels."""

    def __call__(self, data):
        data["ids_before"] = data["point_id"].copy()
        data["coord_before"] = data["coord"].copy()
        return data


@pytest.mark.parametrize("seed", range(8))
def test_every_pair_joins_its_point_and_the_pixel_that_shows_it(scenes, monkeypatch, seed):
    np.random.seed(seed)
    boxes = []
    resize = pair_transforms._resize
    monkeypatch.setattr(
        pair_transforms, "_resize", lambda d, b, s, a: (boxes.extend(b), resize(d, b, s, a))
    )
    size = (48, 84)
    chain = [
        ShuffleImages(), RandomRotate(angle=(-1, 1), p=1), RandomFlip(p=0.5), RandomScale((0.9, 1.1)),
        RandomDropout(0.2, 1.0), DropCuboid(0.4, least_pairs=100), ShufflePoint(),
        RangeCrop((-30, -30, -4, 30, 30, 4)), CropImages(size, least_pairs=400, antialias=bool(seed % 2)),
        FlipImages(), Remember(), VoxelSample(0.5, 2.0, return_inverse=True), PairsToRows(),
    ]  # fmt: skip
    start = numbered(scenes.get_data(0))
    weak = scenes.source.weak_labels(0)
    data = {k: list(v) if isinstance(v, list) else v for k, v in start.items()}
    for transform in chain:
        data = transform(data)
    numbers = data["pair_label"]
    points, pixels = start["pair_point"][numbers], start["pair_pixel"][numbers]
    assert len(numbers) > 300
    assert len(np.unique(numbers)) == len(numbers)

    # The point: the row is that of the voxel that the pair's own point fell into.
    row_before = {p: i for i, p in enumerate(data["ids_before"].tolist())}
    rows = data["inverse"][[row_before[p] for p in points.tolist()]]
    np.testing.assert_array_equal(data["pair_point"], rows)
    own = voxel_cells(data["coord_before"][[row_before[p] for p in points.tolist()]], 0.5, 2.0)
    np.testing.assert_array_equal(data["grid_coord"][data["pair_point"]], own)
    # Most pairs of a sparse cloud still have their own point, known by its strength.
    assert (data["strength"][data["pair_point"], 0] == points).mean() > 0.3

    # The pixel: image, maps and place agree with where the pair's point was seen.
    camera, row, column = data["pair_pixel"].T
    where = read_place(data["superpixels"][camera, row, column])
    order = read_place(data["superpixels"][:, 0, 0])[:, 0]
    np.testing.assert_array_equal(where[:, 0], pixels[:, 0])
    box_of = np.array([boxes[i] for i in range(3)])[camera]
    step = box_of[:, 2:] / size  # source pixels per pixel of the result
    # Rounding moves a place by half a pixel of the result, the map's floor by less than one of the source; in a
    # flipped image the floor is taken from the other side, up to a whole step away.
    assert (np.abs(where[:, 1] - pixels[:, 1]) <= 0.5 * step[:, 0] + 1).all()
    assert (np.abs(where[:, 2] - pixels[:, 2]) <= 0.5 * step[:, 1] + 1).all()
    colour = data["images"][camera, :, row, column] * 255
    assert np.abs(colour[:, 0] / 2 - pixels[:, 1]).max() < 0.5 * step[:, 0].max() + 2
    assert np.abs(colour[:, 1] - pixels[:, 2]).max() < 0.5 * step[:, 1].max() + 2
    np.testing.assert_allclose(colour[:, 2], 60 * pixels[:, 0], atol=1e-3)
    np.testing.assert_array_equal(
        data["weak_labels"][camera, row, column],
        [weak[c][r, k] for c, r, k in where],
    )

    # None is missing: exactly the pairs with a point and a place in the part of their image are left.
    place_of = np.argsort(order)
    alive = []
    for number, (point, (image, r, c)) in enumerate(
        zip(start["pair_point"].tolist(), start["pair_pixel"].tolist(), strict=True)
    ):
        top, left, height, width = boxes[place_of[image]]
        shown = (
            0 <= round((r - top) * size[0] / height) < size[0]
            and 0 <= round((c - left) * size[1] / width) < size[1]
        )
        if point in row_before and shown:
            alive.append(number)
    assert numbers.tolist() == alive
    # Labels of the scene are carried like these numbers.
    assert len(boxes) == 3


CHAIN = [
    {"type": "kd.ShuffleImages"},
    {"type": "RandomRotate", "p": 1},
    {"type": "kd.DropCuboid", "least_pairs": 50},
    {"type": "kd.CropImages", "size": (24, 42)},
    {"type": "kd.FlipImages"},
    {"type": "kd.VoxelSample", "voxel_size": 0.5},
    {"type": "kd.PairsToRows"},
    {"type": "ToTensor"},
]


def test_scans_with_different_numbers_of_pairs_make_a_batch(tmp_path):
    source = Scene(tmp_path, count=3, blind=[1])
    data = PointPixelDataset(
        source,
        superpixels=True,
        maps=True,
        transform=[
            *CHAIN,
            {
                "type": "Collect",
                **COLLECT,
                "keys": (*COLLECT["keys"], "superpixels", "weak_labels"),
            },
        ],
    )
    samples = [data[i] for i in range(3)]
    batch = collate_fn(samples)
    assert batch["images"].shape == (9, 3, 24, 42)
    assert batch["images"].dtype == torch.float32
    assert batch["image_offset"].tolist() == [3, 6, 9]
    assert batch["superpixels"].shape == batch["weak_labels"].shape == (9, 24, 42)
    assert batch["superpixels"].dtype == batch["weak_labels"].dtype == torch.int64
    ends = batch["pair_offset"].tolist()
    assert ends[0] == ends[1] < ends[2]  # the blind scan has no pairs
    assert len(batch["pair_point"]) == len(batch["pair_pixel"]) == len(batch["pair_label"])
    assert batch["pair_point"].dtype == batch["pair_pixel"].dtype == torch.int64
    assert batch["offset"][-1] == len(batch["feat"]) == len(batch["grid_coord"])
    assert batch["name"] == ["scan0", "scan1", "scan2"]
    start = 0
    for sample, end in zip(samples, ends, strict=True):
        # Rows and images are those of the scan itself.
        rows, pixels = batch["pair_point"][start:end], batch["pair_pixel"][start:end]
        torch.testing.assert_close(rows, sample["pair_point"])
        torch.testing.assert_close(pixels, sample["pair_pixel"])
        if len(rows):
            assert rows.min() >= 0
            assert rows.max() < len(sample["coord"])
            assert (pixels.amax(0) < torch.tensor([3, 24, 42])).all()
            assert pixels.min() >= 0
        start = end


def test_equal_seeds_give_equal_samples(tmp_path):
    data = PointPixelDataset(
        Scene(tmp_path), transform=[*CHAIN, {"type": "Collect", **COLLECT}], cache="memory"
    )
    made = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        torch.manual_seed(99)
        random.seed(seed)
        made.append(data[0])
    for key in ("coord", "images", "pair_point", "pair_pixel", "pair_label"):
        assert torch.equal(made[0][key], made[1][key])
    assert not torch.equal(made[0]["images"], made[2]["images"])


def test_no_input_is_written_to(scenes):
    data = scenes.get_data(0)
    arrays = {k: v for k, v in data.items() if isinstance(v, np.ndarray)}
    lists = {k: list(v) for k, v in data.items() if isinstance(v, list)}
    before = {k: v.copy() for k, v in arrays.items()}
    images = [image.copy() for image in data["images"]]
    work = dict(data)
    for transform in (
        ShuffleImages(), DropCuboid(0.5, 1), CropImages((20, 40)), ResizeImages((10, 20)), FlipImages(1), PairsToRows()
    ):  # fmt: skip
        work = transform(work)
    for key, value in before.items():
        np.testing.assert_array_equal(arrays[key], value)
    assert all(
        a is b for k in ("images", "superpixels") for a, b in zip(lists[k], data[k], strict=True)
    )
    assert all(np.array_equal(a, b) for a, b in zip(images, data["images"], strict=True))


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DropCuboid(1.5), "max_share is in"),
        (lambda: CropImages((224,)), "size is the height and width"),
        (lambda: CropImages((224, 0)), "size is the height and width"),
        (lambda: CropImages(area=(0.5, 1.2)), "a share of the image"),
        (lambda: CropImages(area=(0.5, 0.2)), "two positive limits"),
        (lambda: CropImages(aspect=(0, 2)), "two positive limits"),
        (lambda: CropImages(tries=0), "tries is 1 or more"),
        (lambda: CropImages(least_share=2), "least_share is in"),
        (lambda: FlipImages(-1), "p is in"),
        (lambda: ResizeImages((1.5, 2)), "size is the height and width"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_images_of_different_sizes_make_no_array(scenes):
    with pytest.raises(InputError, match="scan0 has images of 2 sizes.*CropImages"):
        PairsToRows()(scenes.get_data(0))


@pytest.mark.parametrize("name", ["ShuffleImages", "CropImages", "FlipImages", "ResizeImages"])
def test_after_rows_it_is_too_late(scenes, name):
    transform = TRANSFORMS.build({"type": f"kd.{name}"})
    data = PairsToRows()(ResizeImages((20, 40))(scenes.get_data(0)))
    with pytest.raises(InputError, match="before PairsToRows"):
        transform(data)
    with pytest.raises(InputError, match="no 'images'"):
        transform({"coord": np.zeros((1, 3))})


@pytest.mark.parametrize("key", ["point_id", "pair_point"])
def test_rows_need_ids(scenes, key):
    data = ResizeImages((20, 40))(scenes.get_data(0))
    del data[key]
    with pytest.raises(InputError, match=f"no '{key}'"):
        PairsToRows()(data)


def test_collect_takes_what_the_rows_made(scenes):
    data = scenes.get_data(2)
    for transform in (ResizeImages((20, 40)), VoxelSample(0.5), PairsToRows(), ToTensor()):
        data = transform(data)
    done = Collect(**COLLECT)(data)
    assert done["pair_offset"].tolist() == [len(done["pair_point"])]
    assert done["image_offset"].tolist() == [3]
