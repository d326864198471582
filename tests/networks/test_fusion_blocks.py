"""Views, gather, scatter, gates and imputation: by hand, against plain loops, and with nothing to see."""

import math

import pytest
import torch

from benchmarks import fusion
from pointcept_kd.host import InputError
from pointcept_kd.networks.fusion_blocks import (
    C2L,
    L2C,
    CameraViews,
    Learner,
    impute,
    learner_loss,
    scaled,
)

NONE = torch.zeros(0, dtype=torch.int64)


def count(module):
    return sum(p.numel() for p in module.parameters())


def views_of(triples, images, points, multi_view="last", dtype=torch.float32):
    """Views from (point, image, (n_x, n_y))."""
    point = torch.tensor([t[0] for t in triples], dtype=torch.int64)
    image = torch.tensor([t[1] for t in triples], dtype=torch.int64)
    uv = torch.tensor([t[2] for t in triples], dtype=dtype).view(-1, 2)
    return CameraViews(torch.zeros(images, 3, 32, 32), point, image, uv, points, multi_view)


def random_views(images=3, points=11, m=17, seed=0, **kwargs):
    """Pairs of a point and an image, each at most once, in any order."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(images * points, generator=generator)[:m].tolist()
    places = (torch.rand(m, 2, generator=generator) * 1.98 - 0.99).tolist()
    triples = [(p % points, p // points, uv) for p, uv in zip(pairs, places)]
    return triples, views_of(triples, images, points, **kwargs)


# --- gather ---------------------------------------------------------------------------------------


def test_gather_by_hand():
    rows = torch.arange(3.0)[:, None] * 10 + torch.arange(5.0)
    places = [(0, 0), (0.5, 0), (0.25, -0.5), (-0.99, 0.99), (-0.5, 0.5)]
    views = views_of([(i, 0, uv) for i, uv in enumerate(places)], 1, 5)
    assert views.visible.tolist() == [0, 1, 2, 3, 4]
    found = views.gather(rows[None, None])[:, 0]
    torch.testing.assert_close(found, torch.tensor([12, 13, 7.5, 19.92, 16]))


def bilinear(values, n_x, n_y):
    """One place of a map (c, i, j)."""
    rows, columns = values.shape[1:]
    y, x = (n_y + 1) / 2 * (rows - 1), (n_x + 1) / 2 * (columns - 1)
    out = 0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            if share > 0 and row < rows and column < columns:
                out = out + share * values[:, row, column]
    return out


@pytest.mark.parametrize("multi_view", ["last", "mean"])
def test_gather_against_loops(multi_view):
    triples, views = random_views(multi_view=multi_view, dtype=torch.float64)
    maps = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    found = dict(zip(views.visible.tolist(), views.gather(maps)))
    assert len(found) == len(views.visible) < len(triples)
    for point in range(11):
        seen = sorted((image, uv) for p, image, uv in triples if p == point)
        assert bool(seen) == (point in found)
        if seen:
            read = [bilinear(maps[image], *uv) for image, uv in seen]
            wanted = read[-1] if multi_view == "last" else sum(read) / len(read)
            torch.testing.assert_close(found[point], wanted)


def test_a_point_in_two_images_reads_the_last_one():
    """Whatever the order of the views; and of the first one once the other is gone."""
    maps = torch.tensor([5.0, 7.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    one = [(0, 0, (0.1, 0.2)), (0, 1, (-0.3, 0.4)), (1, 0, (0, 0))]
    for triples in (one, one[::-1]):
        views = views_of(triples, 2, 2)
        assert dict(zip(views.visible.tolist(), views.gather(maps)[:, 0].tolist())) == {0: 7, 1: 5}
    mean = views_of(one, 2, 2, "mean")
    assert mean.gather(maps)[:, 0].tolist() == [6, 5]
    assert views_of(one[::2], 2, 2).gather(maps)[:, 0].tolist() == [5, 5]


# --- scatter --------------------------------------------------------------------------------------

THREE = [(0, 0, (0, 0)), (1, 0, (0.2, 0.1)), (2, 0, (0.5, -0.5))]


def test_scatter_by_hand():
    views = views_of(THREE, 1, 3)
    values = torch.tensor([[1.0], [3.0], [10.0]])
    wanted = torch.zeros(3, 5)
    wanted[1, 2], wanted[0, 3] = 2, 10
    torch.testing.assert_close(views.scatter(values, (3, 5))[0, 0], wanted)
    two = torch.tensor(
        [[0, 1.166667, 2.333333, 6.166667, 0], [0, 0.583333, 2.166667, 0.583333, 0], [0] * 5]
    )
    torch.testing.assert_close(views.scatter(values, (3, 5), 2)[0, 0], two, atol=1e-6, rtol=1e-6)
    assert [scaled(45, s) for s in (1, 2)] == [45, 23]
    assert [scaled(180, s) for s in (1, 2, 4, 8)] == [180, 90, 45, 23]
    assert scaled(2, 8) == 1


def test_scatter_against_loops():
    triples, views = random_views(images=3, points=40, m=90, dtype=torch.float64)
    values = torch.randn(40, 2, dtype=torch.float64)
    height, width = 6, 9
    total = torch.zeros(3, 2, height, width, dtype=torch.float64)
    for scale in (1, 2, 4):
        i, j = scaled(height, scale), scaled(width, scale)
        for image in range(3):
            cells = {}
            for point, own, (n_x, n_y) in triples:
                if own == image:
                    cell = math.floor((n_y + 1) / 2 * (i - 1)), math.floor((n_x + 1) / 2 * (j - 1))
                    cells.setdefault(cell, []).append(values[point])
            grid = torch.zeros(2, i, j, dtype=torch.float64)
            for (row, column), found in cells.items():
                grid[:, row, column] = sum(found) / len(found)
            for row in range(height):
                for column in range(width):
                    place = 2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1
                    total[image, :, row, column] += bilinear(grid, *place) / 3
    torch.testing.assert_close(views.scatter(values, (height, width), 3), total)


def test_images_without_points_stay_empty():
    views = views_of(THREE, 3, 3)
    maps = views.scatter(torch.rand(3, 4), (8, 9), 3)
    assert maps[0].any()
    assert not maps[1:].any()


def test_gradients_of_gather_and_scatter():
    _, views = random_views(points=5, images=2, m=7, dtype=torch.float64)
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: views.scatter(x, (3, 4), 2), values)
    assert torch.autograd.gradcheck(views.gather, maps)


def test_opponents_of_the_benchmark_compute_the_same():
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [9, 9, 1]
    )
    views, places, seen = fusion.setting(points, 250)
    assert 0 < len(views.visible) < 250
    assert int((seen.sum(0) > 1).sum()) > 0
    maps, values = torch.randn(6, 4, 9, 16), torch.randn(250, 3)
    wanted = torch.zeros(250, 4).index_copy(0, views.visible, views.gather(maps))
    torch.testing.assert_close(fusion.gather_everywhere(maps, places, seen), wanted)
    found = fusion.scatter_by_camera(values, places, seen, (9, 16), 3)
    torch.testing.assert_close(found, views.scatter(values, (9, 16), 3))


# --- views of a batch -----------------------------------------------------------------------------


def batch(**changes):
    """Two scans of 3 and 2 points; one and two images."""
    return {
        "offset": torch.tensor([3, 5]),
        "images": torch.rand(3, 3, 32, 32),
        "image_offset": torch.tensor([1, 3]),
        "view_point": torch.tensor([0, 2, 0, 0, 1]),
        "view_image": torch.tensor([0, 0, 0, 1, 1]),
        "view_uv": torch.linspace(-0.9, 0.9, 10).view(5, 2),
        "view_offset": torch.tensor([2, 5]),
        **changes,
    }


def test_numbers_of_scans_become_numbers_of_the_batch():
    views = CameraViews.of_batch(batch(), 5, torch.zeros(1))
    assert views.point.tolist() == [0, 2, 3, 3, 4]
    assert views.image.tolist() == [0, 0, 1, 2, 2]
    assert views.visible.tolist() == [0, 2, 3, 4]


def test_a_scan_without_images():
    views = CameraViews.of_batch(
        batch(
            images=torch.rand(2, 3, 32, 32),
            image_offset=torch.tensor([0, 2]),
            view_offset=torch.tensor([0, 5]),
            view_point=torch.tensor([0, 1, 0, 0, 1]),
        ),
        5,
        torch.zeros(1),
    )
    assert views.point.tolist() == [3, 4, 3, 3, 4]
    assert views.visible.tolist() == [3, 4]


@pytest.mark.parametrize("size", [(0, 3, 0, 0), (0, 3, 48, 64), None])
def test_no_images(size):
    given = batch(
        image_offset=torch.tensor([0, 0]),
        view_offset=torch.tensor([0, 0]),
        view_point=NONE,
        view_image=NONE,
        view_uv=torch.zeros(0, 2),
        images=torch.zeros(size) if size else None,
    )
    for data in (given, {"offset": given["offset"]}) if size is None else (given,):
        views = CameraViews.of_batch(data, 5, torch.zeros(1))
        assert views.gather(torch.zeros(0, 4, 6, 8)).shape == (0, 4)
        assert views.scatter(torch.rand(5, 4), (6, 8), 2).shape == (0, 4, 6, 8)
        assert len(views.images) == len(views.visible) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(view_point=torch.tensor([0, 3, 0, 0, 1])), "view_point has numbers that its scan"),
        (dict(view_point=torch.tensor([0, -1, 0, 0, 1])), "view_point has numbers that its scan"),
        (dict(view_image=torch.tensor([0, 1, 0, 0, 1])), "view_image has numbers that its scan"),
        (dict(view_uv=torch.ones(5, 2)), "not between -1 and 1"),
        (dict(view_uv=torch.full((5, 2), torch.nan)), "not between -1 and 1"),
        (dict(view_uv=torch.zeros(5, 3)), "do not fit"),
        (dict(image_offset=torch.tensor([1, 2])), r"image_offset is \[1, 2\].*the last 3"),
        (dict(view_offset=torch.tensor([5])), r"view_offset is \[5\]: expected 2"),
        (dict(images=torch.rand(3, 32, 32)), r"expected \(v, 3, h, w\)"),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(InputError, match=message):
        CameraViews.of_batch(batch(**change), 5, torch.zeros(1))


def test_more_bad_input():
    given = batch()
    del given["view_uv"], given["view_offset"]
    with pytest.raises(InputError, match="no view_uv, view_offset"):
        CameraViews.of_batch(given, 5, torch.zeros(1))
    with pytest.raises(InputError, match="multi_view='first'"):
        views_of(THREE, 1, 3, "first")
    with pytest.raises(InputError, match=r"view_point has numbers outside of 0 \.\. 1"):
        views_of(THREE, 1, 2)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "to_image", "to_points", "learner"),
    [
        (1, [12_209, 47_969, 190_145, 78_689], [5_209, 20_145, 79_201, 190_401], [6_528, 25_344, 99_840, 49_920]),
        (2, [14_769, 58_209, 231_105, 119_649], None, None),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(width, to_image, to_points, learner):
    pairs = list(zip((32 * width, 64 * width, 128 * width, 256 * width), (64, 128, 256, 128)))
    assert [count(L2C(c, i, 1)) for c, i in pairs] == to_image
    if to_points:
        assert [count(C2L(c, i)) for c, i in pairs] == to_points
        assert [count(Learner(c, i)) for c, i in pairs] == learner


def test_gates_are_half_open_without_a_score():
    torch.manual_seed(0)
    down, up = L2C(8, 6, 2), C2L(8, 6)
    for block in (down, up):
        torch.nn.init.zeros_(block.score.weight)
        torch.nn.init.zeros_(block.score.bias)
    assert (down.gate(torch.randn(2, 6, 4, 5), torch.randn(2, 8, 4, 5)) == 0.5).all()
    assert (up.gate(torch.randn(7, 8), torch.randn(7, 6)) == 0.5).all()


def statistics(module, seed):
    """The module in evaluation in float64, with running statistics that are none of the defaults."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def normed(bn, x):
    return (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def of(layer, x):
    """A linear layer, or a 1 x 1 convolution at one place."""
    return layer.weight.flatten(1) @ x + layer.bias


def test_camera_to_lidar_point_by_point():
    block = statistics(C2L(8, 6), 1)
    values, seen = torch.randn(5, 8).double(), torch.randn(5, 6).double()
    found = block(values, seen)
    for f, m, out in zip(values, seen, found):
        mixed = of(block.from_image, normed(block.norm, m).relu()) + of(block.from_points, f)
        gate = of(block.score, mixed.tanh()).sigmoid()
        taken = gate * normed(block.bring[1], of(block.bring[0], m)).relu()
        wanted = normed(block.merge[1], of(block.merge[0], torch.cat([f, taken]))).relu()
        torch.testing.assert_close(out, wanted)


def test_lidar_to_camera_place_by_place():
    block = statistics(L2C(8, 6, 2), 2)
    _, views = random_views(points=30, m=50, dtype=torch.float64)
    values, maps = torch.randn(30, 8).double(), torch.randn(3, 6, 4, 5).double()
    found, scattered = block(maps, values, views), views.scatter(values, (4, 5), 2)
    negative = False
    for v in range(3):
        for row in range(4):
            for column in range(5):
                s, m = maps[v, :, row, column], scattered[v, :, row, column]
                mixed = of(block.from_image, s) + of(block.from_points, m)
                gate = of(block.score, mixed.tanh()).sigmoid()
                taken = gate * normed(block.bring[1], of(block.bring[0], m)).relu()
                wanted = normed(block.merge[1], of(block.merge[0], torch.cat([s, taken])))
                torch.testing.assert_close(found[v, :, row, column], wanted)
                negative |= bool((wanted < 0).any())
    assert negative  # the ReLU is not in the block


def test_learner_and_imputation():
    learner = statistics(Learner(4, 6), 3)
    values, visible = torch.randn(5, 4).double(), torch.tensor([3, 1])
    pseudo, seen = learner(values), torch.randn(2, 6).double()
    for f, out in zip(values, pseudo):
        hidden = normed(learner[1], of(learner[0], f)).relu()
        torch.testing.assert_close(out, normed(learner[4], of(learner[3], hidden)))
    whole = impute(pseudo, seen, visible)
    assert torch.equal(whole[[0, 2, 4]], pseudo[[0, 2, 4]])
    assert torch.equal(whole[[3, 1]], seen)


def test_learner_loss_by_hand_and_by_loops():
    pseudo = torch.tensor([[1.0, 2], [0, 0], [3, -1]])
    seen, visible = torch.tensor([[3.0, 1], [1, 1]]), torch.tensor([2, 0])
    # Point 2: 0 and 4; point 0: 0 and 1.
    assert learner_loss(pseudo, seen, visible).item() == pytest.approx(5 / 4)
    pseudo, seen = torch.randn(9, 4).double(), torch.randn(5, 4).double()
    visible = torch.tensor([8, 0, 3, 5, 2])
    terms = [(pseudo[p, c] - seen[r, c]) ** 2 for r, p in enumerate(visible) for c in range(4)]
    torch.testing.assert_close(learner_loss(pseudo, seen, visible), sum(terms) / 20)


def test_gradients_of_the_learner_loss():
    """Into the pseudo features of visible points alone, not into the images; zero and no NaN without points."""
    pseudo = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([3, 1])
    learner_loss(pseudo, seen, visible).backward()
    assert seen.grad is None
    assert pseudo.grad[[3, 1]].all()
    assert not pseudo.grad[[0, 2]].any()
    assert torch.autograd.gradcheck(lambda x: learner_loss(x, seen.detach(), visible), pseudo)
    pseudo.grad = None
    none = learner_loss(pseudo, seen[:0], visible[:0])
    none.backward()
    assert none.item() == 0
    assert pseudo.grad is not None
    assert not pseudo.grad.any()


def test_gradients_of_the_blocks():
    torch.manual_seed(4)
    _, views = random_views(points=5, images=2, m=7, dtype=torch.float64)
    down, up = statistics(L2C(4, 4, 2), 5), statistics(C2L(4, 4), 6)
    values = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def both(values, maps):
        fused = down(maps, values, views)
        return up(values, impute(torch.tanh(values), views.gather(fused), views.visible))

    assert torch.autograd.gradcheck(both, (values, maps))


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("seen", [False, True])
def test_nothing_to_see_is_finite(images, points, seen):
    torch.manual_seed(7)
    views = views_of([(0, 0, (0.3, 0.2))] if seen and images else [], images, points)
    down, up, learner = L2C(8, 4, 3).train(), C2L(8, 4).train(), Learner(8, 4).train()
    values = torch.randn(points, 8, requires_grad=True)
    maps = torch.randn(images, 4, 5, 6, requires_grad=True)
    fused = down(maps, values, views)
    pseudo, read = learner(values), views.gather(fused)
    out = up(values, impute(pseudo, read, views.visible))
    loss = learner_loss(pseudo, read, views.visible)
    (out.sum() + loss).backward()
    for block in (down, up, learner):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        assert all(b.isfinite().all() for b in block.buffers())
    assert out.isfinite().all()
    assert values.grad.isfinite().all()
    assert (loss.item() == 0) == (not (seen and images))
    if not images:
        assert not any(p.grad.any() for p in down.parameters())
