"""The distillation term has the gradient it should, structural losses compare what belongs together."""

import math

import pytest
import torch
from torch import nn

from pointcept_kd.completion.score import (
    curvature,
    key_points,
    normalising_weight,
    point_loss,
    scene_loss,
    score_surrogate,
)
from pointcept_kd.host import InputError

ONE = torch.tensor([40])


def cloud(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


def test_gradient_is_the_stated_difference():
    x = cloud().requires_grad_()
    teacher, watcher = cloud(seed=1).requires_grad_(), cloud(seed=2).requires_grad_()
    loss = score_surrogate(x, teacher, watcher)
    loss.backward()
    torch.testing.assert_close(x.grad, (teacher - watcher).detach() / 120)
    assert teacher.grad is None
    assert watcher.grad is None
    expected = sum(
        (a - b) * c
        for a, b, c in zip(
            teacher.flatten().tolist(), watcher.flatten().tolist(), x.flatten().tolist()
        )
    )
    assert loss.item() == pytest.approx(expected / 120)
    weight = torch.arange(40.0, dtype=torch.float64)[:, None]
    (weighted,) = torch.autograd.grad(score_surrogate(x, teacher, watcher, weight), x)
    torch.testing.assert_close(weighted, weight * x.grad)
    fixed = teacher.detach(), watcher.detach()
    assert torch.autograd.gradcheck(lambda x: score_surrogate(x, *fixed, weight), x)


@pytest.mark.parametrize("seed", range(5))
def test_any_linear_generator_has_a_gradient(seed):
    """The form in which the term cannot be written: the same graph in x_t and x leaves nothing."""
    torch.manual_seed(seed)
    generator = nn.Linear(3, 3)
    x = generator(torch.randn(30, 3))
    e_t, e_a = torch.randn(30, 3), torch.randn(30, 3)
    score_surrogate(x, e_t, e_a).backward()
    assert generator.weight.grad.abs().max() > 1e-4
    assert generator.bias.grad.abs().max() > 1e-4
    x = generator(torch.randn(30, 3))
    x_t = x + 0.5 * torch.randn(30, 3)
    grads = torch.autograd.grad(((e_t - e_a) * (x_t - x)).mean(), list(generator.parameters()))
    assert all(grad.eq(0).all() for grad in grads)


def test_descent_moves_towards_the_teacher():
    """Teacher N(0, 1), student N(2, 1), sigma 1/2: the difference is 0.8 everywhere, so x goes down."""
    sigma = 0.5

    def eps(x, mean):
        return sigma * (x - mean) / (1 + sigma**2)

    shift = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = shift + cloud(2000)
    x_t = (x + sigma * cloud(2000, 1)).detach()
    gap = eps(x_t, 0.0) - eps(x_t, 2.0)
    torch.testing.assert_close(gap, torch.full_like(gap, 0.8))
    score_surrogate(x, eps(x_t, 0.0), eps(x_t, 2.0)).backward()
    assert shift.grad.item() == pytest.approx(0.8)
    # With the watcher kept up to date, descent ends where the two agree.
    mean = 2.0
    for _ in range(200):
        mean -= 0.1 * (eps(torch.tensor(mean), 0.0) - eps(torch.tensor(mean), mean)).item()
    assert abs(mean) < 0.01


def test_no_points_and_other_shapes():
    x = torch.zeros(0, 3, requires_grad=True)
    loss = score_surrogate(x, x, x)
    assert loss.item() == 0
    assert loss.requires_grad
    with pytest.raises(InputError, match="must have one shape"):
        score_surrogate(cloud(3), cloud(3), cloud(4))


def test_normalising_weight_by_hand():
    x = torch.tensor([[0.0, 0, 0], [2, 2, 2], [1, 1, 1]])
    clean = torch.tensor([[1.0, 1, 1], [2, 5, 2], [1, 1, 1]])
    weight = normalising_weight(x, clean, torch.tensor([2, 3]))
    assert weight[:2, 0].tolist() == [1.0, 1.0]  # mean of 1, 1, 1, 0, 3, 0
    assert torch.isfinite(weight).all()


def loop_nearest(p, cloud):
    return min(range(len(cloud)), key=lambda j: math.dist(p, cloud[j]))


def test_scene_losses_are_the_loops():
    x, g = cloud(20).requires_grad_(), cloud(30, 1)
    ends, scenes = torch.tensor([8, 20]), torch.tensor([10, 30])
    chamfer, matched = [], []
    for rows, others in ((slice(0, 8), slice(0, 10)), (slice(8, 20), slice(10, 30))):
        a, b = x[rows].tolist(), g[others].tolist()
        there = [math.dist(p, b[loop_nearest(p, b)]) ** 2 for p in a]
        back = [math.dist(p, a[loop_nearest(p, a)]) ** 2 for p in b]
        chamfer.append(sum(there) / len(a) + sum(back) / len(b))
        matched.append(sum(there) / (3 * len(a)))
    assert scene_loss(x, g, ends, scenes).item() == pytest.approx(sum(chamfer) / 2)
    assert scene_loss(x, g, ends, scenes, "matched").item() == pytest.approx(sum(matched) / 2)
    assert torch.autograd.gradcheck(lambda x: scene_loss(x, g, ends, scenes), x)
    assert torch.autograd.gradcheck(lambda x: scene_loss(x, g, ends, scenes, "matched"), x)


@pytest.mark.parametrize("kind", ["chamfer", "matched"])
def test_order_of_rows_does_not_matter_but_to_rows(kind):
    x = cloud()
    order = torch.randperm(40)
    assert scene_loss(x[order], x, ONE, ONE, kind).item() == 0
    assert scene_loss(x, x, ONE, ONE, "rows").item() == 0
    assert scene_loss(x[order], x, ONE, ONE, "rows").item() > 0.5
    hand = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.tensor([[0.0, 2, 0], [1, 0, 0]])
    two = torch.tensor([2])
    assert scene_loss(*hand, two, two, kind).item() == 0
    assert scene_loss(*hand, two, two, "rows").item() == pytest.approx(10 / 6)


def test_rows_of_a_shuffled_scene_pull_to_its_centre():
    """Why rows are for ablation: the gradient, on average over orders, is towards the mean of the scene."""
    x, g = torch.zeros(1, 3, requires_grad=True), cloud(400).float() + 3
    grads = []
    for row in g:
        (grad,) = torch.autograd.grad(
            scene_loss(x, row[None], torch.tensor([1]), torch.tensor([1]), "rows"), x
        )
        grads.append(grad)
    torch.testing.assert_close(torch.stack(grads).mean(0)[0], -2 / 3 * g.mean(0))


def loop_curvature(points, k):
    values = []
    for p in points.tolist():
        near = sorted(points.tolist(), key=lambda q: math.dist(p, q))[:k]
        near = torch.tensor(near, dtype=torch.float64)
        covariance = torch.cov(near.T, correction=0)
        spectrum = torch.linalg.eigvals(covariance).real.tolist()
        values.append(min(spectrum) / sum(spectrum))
    return values


def test_curvature_is_the_loop():
    points = cloud(30)
    assert curvature(points, 8).tolist() == pytest.approx(loop_curvature(points, 8), abs=1e-9)
    assert curvature(points.float(), 8).dtype == torch.float32
    moved = curvature(3 * points + 100, 8)
    torch.testing.assert_close(moved, curvature(points, 8))


def test_curvature_by_hand():
    corners = torch.tensor([[x, y, z] for x in (0.0, 1) for y in (0, 1) for z in (0, 1)])
    torch.testing.assert_close(curvature(corners, 8), torch.full((8,), 1 / 3))
    flat = torch.cat([cloud(20).float()[:, :2], torch.zeros(20, 1)], 1)
    assert curvature(flat, 6).max() < 1e-12
    assert curvature(torch.ones(5, 3), 3).eq(0).all()
    assert curvature(torch.ones(5, 3), 180).shape == (5,)
    assert curvature(torch.zeros(0, 3)).shape == (0,)
    # Box of edges 1, 2, 4: variances 1/4, 1, 4, so the least is 1/21 of their sum.
    box = corners * torch.tensor([1.0, 2, 4])
    torch.testing.assert_close(curvature(box, 8), torch.full((8,), 1 / 21))


def test_key_points_are_where_a_scene_is_not_flat():
    plane = torch.cat([10 * torch.rand(200, 2), torch.zeros(200, 1)], 1)
    bush = torch.tensor([50.0, 0, 5]) + torch.randn(60, 3)
    rows = key_points(torch.cat([plane, bush]), 260, 50, 20)
    assert len(rows) == len(set(rows.tolist())) == 50
    assert (rows >= 200).all()
    generator = torch.Generator().manual_seed(1)
    first = key_points(bush, 30, 5, 10, generator)
    generator.manual_seed(1)
    assert torch.equal(first, key_points(bush, 30, 5, 10, generator))
    assert len(key_points(bush[:3], 30, 5, 10)) == 3
    with pytest.raises(InputError, match="at least 1 candidate"):
        key_points(bush, 0, 5)


def loop_point_loss(x, g, rows, matched):
    x, g = x.tolist(), g.tolist()
    match = [loop_nearest(g[k], x) if matched else k for k in rows]
    total = 0.0
    for k, a in zip(rows, match):
        for m, b in zip(rows, match):
            total += (math.dist(g[k], g[m]) - math.dist(x[a], x[b])) ** 2
    return total / len(rows) ** 2


@pytest.mark.parametrize("kind", ["matched", "rows"])
def test_point_loss_is_the_loop(kind):
    x, g = cloud().requires_grad_(), cloud(seed=1)
    ends = torch.tensor([15, 40])
    settings = dict(candidates=12, keys=5, neighbours=6, kind=kind)
    seed = torch.Generator().manual_seed(4)
    loss = point_loss(x, g, ends, ends, **settings, generator=seed)
    seed.manual_seed(4)
    values = [
        loop_point_loss(a, b, key_points(b, 12, 5, 6, seed).tolist(), kind == "matched")
        for a, b in ((x[:15], g[:15]), (x[15:], g[15:]))
    ]
    assert loss.item() == pytest.approx(sum(values) / 2)

    def again(x):
        seed.manual_seed(4)
        return point_loss(x, g, ends, ends, **settings, generator=seed)

    assert torch.autograd.gradcheck(again, x)


def test_point_loss_by_hand():
    # Two key points 4 apart; their nearest completed points are 3 apart: mean of 0, 1, 1, 0.
    g = torch.tensor([[0.0, 0, 0], [4, 0, 0]])
    x = torch.tensor([[3.5, 0, 0], [0.5, 0, 0], [100, 0, 0]], requires_grad=True)
    loss = point_loss(x, g, torch.tensor([3]), torch.tensor([2]), 2, 2, 2)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert x.grad[:, 0].tolist() == pytest.approx([-1, 1, 0])


def test_point_loss_of_shuffled_clouds():
    x = cloud(60)
    order, ends = torch.randperm(60), torch.tensor([60])
    settings = dict(candidates=40, keys=20, neighbours=8)
    assert point_loss(x[order], x, ends, ends, **settings).item() == 0
    assert point_loss(x[order], x, ends, ends, **settings, kind="rows").item() > 0.1
    # A tenth and a thirtieth of the scene by default, at least one of each.
    assert point_loss(x[order] * 1.1, x, ends, ends).item() > 0
    assert point_loss(x[:4], x[:4], torch.tensor([4]), torch.tensor([4])).item() == 0


def test_one_counterpart_for_two_key_points_has_a_finite_gradient():
    g = cloud(10)
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    point_loss(x, g, torch.tensor([1]), torch.tensor([10]), 10, 5, 5).backward()
    assert torch.isfinite(x.grad).all()


def test_distances_are_exact_far_from_the_origin():
    g = cloud(40).float() + 80
    exact = cloud(40) + 80
    settings = dict(candidates=40, keys=30, neighbours=8)
    assert point_loss(g, g, ONE, ONE, **settings).item() == 0
    got = point_loss(g + torch.tensor([0.5, 0, 0]), g, ONE, ONE, **settings)
    assert got.item() < (exact.std() * 4).item()


def test_bad_input():
    x = cloud()
    two = torch.tensor([20, 40])
    with pytest.raises(InputError, match="nearest: chamfer"):
        scene_loss(x, x, ONE, ONE, "chamfr")
    with pytest.raises(InputError, match="kind='rows' pairs row with row"):
        scene_loss(x, x, ONE, two, "rows")
    with pytest.raises(InputError, match="kind='rows' pairs row with row"):
        point_loss(x, x[:30], ONE, torch.tensor([30]), kind="rows")
    with pytest.raises(InputError, match="1 completions of 2 scenes"):
        point_loss(x, x, ONE, two)
    with pytest.raises(ValueError, match="1 scans, the other 2"):
        scene_loss(x, x, ONE, two)
