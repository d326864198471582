"""Classes on the sphere: Bessel functions and worked values, loops, phases, late classes, resume, several processes."""

import math
import multiprocessing
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from scipy.special import ive

from pointcept_kd.distillers.vmf import (
    REDUCTIONS,
    VonMisesFisher,
    concentration,
    log_bessel,
    log_normaliser,
    vmf_loss,
)
from pointcept_kd.host import InputError, comm, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch

DOUBLE = torch.float64
E1, E2, E3 = torch.eye(3, dtype=DOUBLE)


def unit(n, c=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, c, generator=made, dtype=DOUBLE), dim=1)


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


def series(order, x):
    """log I_order(x), from the power series with every term as a logarithm."""
    logs = [
        (order + 2 * m) * math.log(x / 2) - math.lgamma(m + 1) - math.lgamma(order + m + 1)
        for m in range(4000)
    ]
    most = max(logs)
    return most + math.log(math.fsum(math.exp(v - most) for v in logs))


def test_bessel_by_hand():
    got = log_bessel(31, tensor(42.5, 0.5, 3135.16)) + 31 * tensor(42.5, 0.5, 3135.16).log()
    assert got.tolist() == pytest.approx((28.730857, -121.065396, 3130.062599), abs=1e-6)
    # I_{1/2}(x) = sqrt(2 / (pi x)) sinh x
    x = tensor(0.01, 1, 10, 50)
    expected = (2 / (math.pi * x)).sqrt().log() + x.sinh().log() - 0.5 * x.log()
    torch.testing.assert_close(log_bessel(0.5, x), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("order", [0, 0.5, 3, 15, 31, 63, 127])
def test_bessel_is_the_series_and_that_of_scipy(order):
    values = [10 ** (-3 + k * (3 + math.log10(3000)) / 60) for k in range(61)]
    got = log_bessel(order, tensor(*values)) + order * tensor(*values).log()
    compared = 0
    for x, value in zip(values, got.tolist()):
        if ive(order, x) > 0:  # which underflows for large orders
            assert value == pytest.approx(math.log(ive(order, x)) + x, abs=1e-8)
            compared += 1
    assert compared > 20
    for x, value in list(zip(values, got.tolist()))[::10]:
        assert value == pytest.approx(series(order, x), abs=1e-8)


def test_bessel_at_zero_and_far_out():
    # I_v(x) / x^v -> 1 / (2^v Gamma(v + 1))
    for order in (0, 0.5, 31, 191):
        limit = -order * math.log(2) - math.lgamma(order + 1)
        assert log_bessel(order, tensor(0)).item() == pytest.approx(limit, abs=1e-8)
    for order in (0, 31):
        far = log_bessel(order, torch.tensor([1e4, 1e6]))
        assert far.isfinite().all()
        assert far.dtype == DOUBLE
    x = tensor(0.5, 3, 80).requires_grad_()
    for order in (0, 31):
        assert torch.autograd.gradcheck(partial(log_bessel, order), x)
    with pytest.raises(InputError, match="0 or more"):
        log_bessel(-0.5, x)


def test_normaliser_by_hand():
    kappa = concentration(tensor(0.1, 0.5, 0.9), 64, high=math.inf)
    got = log_normaliser(kappa, 64).tolist()
    assert got == pytest.approx((40.442919, 28.691704, -176.010275), abs=1e-6)
    assert log_normaliser(tensor(0), 64).item() == pytest.approx(40.767720, abs=1e-6)
    # C = 3: kappa / (4 pi sinh kappa)
    x = tensor(0.5, 4, 30)
    torch.testing.assert_close(
        log_normaliser(x, 3), (x / (4 * math.pi * x.sinh())).log(), rtol=0, atol=1e-8
    )
    with pytest.raises(InputError, match="two dimensions"):
        log_normaliser(x, 1)


@pytest.mark.parametrize("dim", [2, 3])
def test_densities_integrate_to_one(dim):
    kappa = tensor(0.3, 2, 9)
    angle = (torch.arange(20000, dtype=DOUBLE) + 0.5) * math.pi / 20000
    shell = 2 if dim == 2 else 2 * math.pi * angle.sin()  # both halves of the circle; parallels
    density = (log_normaliser(kappa, dim)[:, None] + kappa[:, None] * angle.cos()).exp()
    total = (density * shell).sum(1) * math.pi / 20000
    torch.testing.assert_close(total, torch.ones(3, dtype=DOUBLE), rtol=1e-7, atol=0)


def test_concentration_by_hand():
    got = concentration(tensor(0.1, 0.5, 0.9, 0.99), 64, high=math.inf).tolist()
    assert got == pytest.approx((6.463636, 42.5, 299.321053, 3135.160854), abs=1e-6)
    assert concentration(tensor(0.5), 3).item() == pytest.approx(1.833333, abs=1e-6)
    assert concentration(tensor(0, 1, 1.5, 0.99), 64).tolist() == [1e-3, 100, 100, 100]
    assert concentration(tensor(1), 64, high=math.inf).isfinite().all()
    assert concentration(torch.tensor([0.5]), 3).dtype == DOUBLE


@pytest.mark.parametrize(
    ("dim", "r", "root"),
    [
        (3, 0.5, 1.796756),
        (64, 0.1, 6.462704),
        (64, 0.5, 42.402442),
        (64, 0.9, 298.91911),
        (64, 0.99, 3134.6709),
    ],
)
def test_concentration_is_near_the_root(dim, r, root):
    """The root of I_{C/2}(kappa) / I_{C/2 - 1}(kappa) = R, which the estimate approximates."""
    found = tensor(root).requires_grad_()
    (slope,) = torch.autograd.grad(log_normaliser(found, dim).sum(), found)
    assert -slope.item() == pytest.approx(r, abs=1e-6)
    ratio = ive(dim / 2, root) / ive(dim / 2 - 1, root)
    assert -slope.item() == pytest.approx(ratio, abs=1e-9)
    estimate = concentration(tensor(r), dim, high=math.inf).item()
    assert estimate == pytest.approx(root, rel=3e-3 if dim == 64 else 3e-2)


@pytest.mark.parametrize(
    ("cosine", "value"), [(1.0, -71.191704), (0.5, -49.941704), (0.0, -28.691704)]
)
def test_likelihood_by_hand(cosine, value):
    point = torch.zeros(1, 64, dtype=DOUBLE)
    point[0, :2] = tensor(cosine, math.sqrt(1 - cosine**2))
    mu = torch.zeros(1, 64, dtype=DOUBLE)
    mu[0, 0] = 1
    arguments = torch.zeros(1, dtype=torch.int64), mu, tensor(42.5), torch.tensor([True])
    for reduction in REDUCTIONS:
        assert vmf_loss(point, *arguments, reduction).item() == pytest.approx(value, abs=1e-6)
    low = vmf_loss(point.float(), *arguments)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(value, abs=1e-4)


def loop_loss(points, labels, mu, kappa, seen, point_mean=False):
    """Both means of -log K - kappa mu . g, the normaliser by the power series."""
    c = mu.shape[1]
    values = {}
    for g, y in zip(points.tolist(), labels.tolist()):
        if not seen[y]:
            continue
        k = float(kappa[y])
        log_k = (c / 2 - 1) * math.log(k) - c / 2 * math.log(2 * math.pi) - series(c / 2 - 1, k)
        value = -log_k - k * sum(a * b for a, b in zip(g, mu[y].tolist()))
        values.setdefault(y, []).append(value)
    if not values:
        return 0.0
    if point_mean:
        return sum(sum(v) for v in values.values()) / sum(len(v) for v in values.values())
    return sum(sum(v) / len(v) for v in values.values()) / len(values)


def case(n=23):
    labels = torch.randint(4, (n,), generator=torch.Generator().manual_seed(2))
    labels[0] = 5  # one point
    mu, kappa = unit(7, seed=1), tensor(3, 50, 0.01, 9, 9, 20, 1)
    return unit(n), labels, mu, kappa, torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool()


def test_loss_is_the_loop():
    points, *rest = case()
    points.requires_grad_()
    for reduction in REDUCTIONS:
        expected = loop_loss(points, *rest, reduction == "point_mean")
        loss = partial(vmf_loss, reduction=reduction)
        assert loss(points, *rest).item() == pytest.approx(expected, abs=1e-7)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, *rest), points)
        order = torch.randperm(len(points))
        shuffled = loss(points[order], rest[0][order], *rest[1:])
        assert shuffled.item() == pytest.approx(expected, abs=1e-7)


def test_gradient_is_a_pull_by_class():
    points, labels, mu, kappa, seen = case()
    points.requires_grad_()
    (grad,) = torch.autograd.grad(vmf_loss(points, labels, mu, kappa, seen), points)
    counts = labels.bincount(minlength=7)
    classes = int((seen & (counts > 0)).sum())
    for row, y in enumerate(labels.tolist()):
        pull = -kappa[y] * mu[y] / counts[y] / classes * seen[y]
        torch.testing.assert_close(grad[row], pull)
    alone = labels == 3
    one = points[alone].detach().requires_grad_()
    (grad,) = torch.autograd.grad(vmf_loss(one, labels[alone], mu, kappa, seen), one)
    torch.testing.assert_close(grad, (-kappa[3] * mu[3] / alone.sum()).expand_as(grad))


def test_loss_without_points_that_count():
    points, labels, mu, kappa, seen = case()
    points.requires_grad_()
    for reduction in REDUCTIONS:
        for rows, known in ((slice(0, 0), seen), (slice(None), torch.zeros_like(seen))):
            loss = vmf_loss(points[rows], labels[rows], mu, kappa, known, reduction)
            assert loss.item() == 0
            assert torch.autograd.grad(loss, points)[0].eq(0).all()


def statistics(classes=4, dim=3, **settings):
    return VonMisesFisher(classes, dim, **settings)


@pytest.mark.parametrize("corrected", [False, True])
def test_running_statistics_by_hand(corrected):
    model = statistics(alpha=0.9, bias_correction=corrected)
    loss = model(torch.stack([E1, E2, E3]), torch.tensor([1, 1, 2]))
    assert loss.item() == 0
    torch.testing.assert_close(model.z[1], tensor(0.05, 0.05, 0))
    assert model.seen.tolist() == [False, True, True, False]
    r = (0.7071068, 1.0) if corrected else (0.0707107, 0.1)
    assert model.lengths[1:3].tolist() == pytest.approx(r, abs=1e-7)
    kappa = (3.535534, 100.0) if corrected else (0.212843, 0.302020)
    assert model.kappa[1:3].tolist() == pytest.approx(kappa, abs=1e-6)
    half = math.sqrt(0.5)
    torch.testing.assert_close(model.directions[1], tensor(half, half, 0))
    assert model.directions[0].eq(0).all()
    for value in (model.z, model.lengths, model.directions, model.kappa):
        assert value.isfinite().all()
    # Every later call is beyond the first phase, and the unseen class does not count.
    model.step.fill_(model.warmup)
    points = unit(3, 3).requires_grad_()
    loss = model(points, torch.tensor([1, 3, 3]))
    (grad,) = torch.autograd.grad(loss, points)
    torch.testing.assert_close(grad[0], -model.kappa[1] * model.directions[1])
    assert grad[1:].eq(0).all()


def test_ten_thousand_steps_of_a_constant_mean():
    model = statistics(1, 64, bias_correction=False)
    assert model.alpha == 1 - 1 / 10_000
    mean = torch.zeros(1, 64)
    mean[0, 3] = 0.99
    labels = torch.zeros(1, dtype=torch.int64)
    for _ in range(10_000):
        model.update(mean, labels)
    assert model.lengths.item() == pytest.approx(0.625818, abs=1e-6)
    assert model.kappa.item() == pytest.approx(65.434484, abs=2e-5)
    model.bias_correction = True
    model.kappa_max = math.inf
    assert model.lengths.item() == pytest.approx(0.99, abs=1e-6)
    assert model.kappa.item() == pytest.approx(3135.160854, rel=1e-5)


def stream(steps, classes=4, dim=3):
    """Batches of different sizes: the last class comes late, and the small ones lack classes that were there before."""
    for step in range(steps):
        n = (7, 2, 6, 5)[step % 4]
        labels = torch.arange(n) % (classes - (step < steps // 2))
        yield unit(n, dim, seed=step).float(), labels


def test_statistics_are_the_loop():
    model, alpha = statistics(warmup_steps=8, warmup_fraction=None), 1 - 1 / 8
    z = [[0.0] * 3 for _ in range(4)]
    updates = [0] * 4
    for points, labels in stream(8):
        model(points, labels)
        for k in range(4):
            rows = [p for p, y in zip(points.tolist(), labels.tolist()) if y == k]
            if rows:
                mean = [sum(column) / len(rows) for column in zip(*rows)]
                z[k] = [alpha * a + (1 - alpha) * b for a, b in zip(z[k], mean)]
                updates[k] += 1
    torch.testing.assert_close(model.z, torch.tensor(z, dtype=DOUBLE), rtol=1e-12, atol=1e-14)
    assert model.updates.tolist() == updates
    assert updates[3] < updates[0]


def test_phases():
    model = statistics(warmup_steps=3)
    points, labels = unit(6, 3).float().requires_grad_(), torch.arange(6) % 2
    model.eval()
    assert model(points, labels).item() == 0
    assert model.step == 0
    assert model.z.eq(0).all()
    model.train()
    for step in range(1, 4):
        loss = model(points, labels)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, points)[0].eq(0).all()
        assert model.updates.tolist() == [step, step, 0, 0]
        assert not model.z.requires_grad
    z = model.z.clone()
    # Class 2 comes too late: no NaN, no part.
    late = torch.tensor([0, 1, 2, 2, 2, 2])
    for _ in range(2):
        loss = model(points, late)
        (grad,) = torch.autograd.grad(loss, points)
        assert loss.isfinite()
        assert grad[:2].abs().amin(0).max() > 0
        assert grad[2:].eq(0).all()
        torch.testing.assert_close(loss, model(points[:2], late[:2]))
    assert torch.equal(model.z, z)
    assert model.updates.tolist() == [3, 3, 0, 0]
    step = model.step.clone()
    model.eval()
    torch.testing.assert_close(model(points, late), loss)
    assert torch.equal(model.step, step)
    only_late = model(points[2:], late[2:])
    assert only_late.item() == 0
    assert torch.autograd.grad(only_late, points)[0].eq(0).all()
    empty = model(points[:0], late[:0])
    assert empty.item() == 0
    assert empty.requires_grad


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_one_point_and_cancelling_points_are_finite(steps, corrected):
    """R is 1, or 0, after one step with alpha 0, or corrected."""
    model = statistics(warmup_steps=steps, bias_correction=corrected, kappa_max=1e12)
    points = torch.stack([E1, E2, -E2]).float().requires_grad_()
    labels = torch.tensor([0, 1, 1])
    for _ in range(steps + 1):
        loss = model(points, labels)
    (grad,) = torch.autograd.grad(loss, points)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert model.kappa.isfinite().all()
    assert grad[1:].eq(0).all()


def run(model, batches):
    losses = []
    for points, labels in batches:
        points = points.clone().requires_grad_()
        loss = model(points, labels)
        losses += [loss.detach(), *torch.autograd.grad(loss, points)]
    return losses


@pytest.mark.parametrize("stop", [2, 5, 6, 9])
def test_resume_is_exact_in_both_phases(stop, tmp_path):
    settings = dict(warmup_steps=None, warmup_fraction=0.5)
    batches = list(stream(12))
    whole = statistics(**settings)
    whole.set_total_steps(12)
    expected = run(whole, batches)
    first = statistics(**settings)
    first.set_total_steps(12)
    run(first, batches[:stop])
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second = statistics(**settings)
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    second.set_total_steps(400)  # a longer run: the phase that has begun goes on
    tail = run(second, batches[stop:])
    assert any(value.any() for value in tail)
    for a, b in zip(tail, expected[2 * stop :], strict=True):
        assert torch.equal(a, b)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert set(whole.state_dict()) == {"z", "updates", "step", "warmup"}


def test_steps_from_a_fraction():
    model = statistics(warmup_steps=None, warmup_fraction=0.25)
    with pytest.raises(InputError, match="set_total_steps"):
        model(unit(2, 3), torch.tensor([0, 1]))
    model.set_total_steps(100)
    assert int(model.warmup) == 25
    assert model.alpha == pytest.approx(0.96)
    model.set_total_steps(1)
    assert int(model.warmup) == 1
    fixed = statistics(warmup_steps=7)
    fixed.set_total_steps(100)
    assert int(fixed.warmup) == 7


def test_ignored_class_has_no_statistics_and_no_pull():
    plain, model = statistics(warmup_steps=2), statistics(warmup_steps=2, ignore=0)
    labels = torch.tensor([0, 1, 0, 2, 1], dtype=torch.uint8)
    points = unit(5, 3).float().requires_grad_()
    kept = labels != 0
    for _ in range(3):
        expected, loss = plain(points[kept], labels[kept]), model(points, labels)
    torch.testing.assert_close(loss, expected)
    assert loss.item() != 0
    assert model.seen.tolist() == [False, True, True, False]
    assert torch.equal(model.z, plain.z)
    (grad,) = torch.autograd.grad(loss, points)
    assert grad[~kept].eq(0).all()


def test_half_precision_features():
    model = statistics(warmup_steps=1, dim=64)
    points = unit(40, 64).to(torch.bfloat16).requires_grad_()
    labels = torch.arange(40) % 3
    with torch.autocast("cpu", torch.bfloat16):
        assert model(points, labels).dtype == torch.float32
        loss = model(points, labels)
    assert loss.dtype == torch.float32
    wide = model(points.detach().double(), labels)
    assert loss.item() == pytest.approx(wide.item(), rel=1e-6)
    assert model.z.dtype == DOUBLE
    model.float()(points, labels)


def test_descent_gathers_a_class_around_its_direction():
    model = statistics(1, 6, warmup_steps=1, kappa_max=5.0)
    labels = torch.zeros(30, dtype=torch.int64)
    raw = (unit(30) + tensor(1, 0, 0, 0, 0, 0)).requires_grad_()
    model(torch.nn.functional.normalize(raw, dim=1), labels)
    before = (torch.nn.functional.normalize(raw, dim=1) @ model.directions.T).mean().item()
    optimiser = torch.optim.SGD([raw], lr=1.0)
    for _ in range(30):
        optimiser.zero_grad()
        model(torch.nn.functional.normalize(raw, dim=1), labels).backward()
        optimiser.step()
    after = (torch.nn.functional.normalize(raw, dim=1) @ model.directions.T).mean().item()
    assert after > before + 0.05
    assert after > 0.95


def test_bad_input():
    for bad, message in (
        (dict(warmup_steps=None), "one of warmup_steps"),
        (dict(warmup_fraction=0.5), "one of warmup_steps"),
        (dict(warmup_steps=0), "1 or more"),
        (dict(warmup_steps=None, warmup_fraction=1.5), "lie in"),
        (dict(alpha=1.0), "alpha must lie"),
        (dict(classes=0), "a class and two dimensions"),
        (dict(dim=1), "a class and two dimensions"),
        (dict(kappa_max=0.0), "kappa_max"),
        (dict(reduction="class"), "nearest: class_mean"),
    ):
        with pytest.raises(InputError, match=message):
            statistics(**bad)
    model = statistics()
    with pytest.raises(InputError, match=r"classes are 0 \.\. 3, labels 0 \.\. 4"):
        model(unit(2, 3), torch.tensor([0, 4]))
    with pytest.raises(InputError, match=r"labels -1 \.\. 0"):
        model(unit(2, 3), torch.tensor([0, -1]))
    with pytest.raises(InputError, match="3 labels for features"):
        model(unit(2, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="of width 3"):
        model(unit(2, 4), torch.tensor([0, 1]))
    assert model.step == 0
    with pytest.raises(InputError, match="nearest: point_mean"):
        vmf_loss(*case(), "points_mean")


# Class 3 is in no share but the first's, class 1 in none but the second's; in one batch a process has no points.
SHARES = ((slice(0, 5), slice(5, 12)), (slice(0, 12), slice(12, 12)))
JOINT_LABELS = torch.tensor([3, 0, 0, 2, 3, 1, 1, 0, 2, 0, 1, 0])


def check(cfg):
    rank, world = comm.get_rank(), comm.get_world_size()
    for reduction in REDUCTIONS:
        settings = dict(classes=5, dim=6, warmup_steps=4, reduction=reduction)
        whole, mine = VonMisesFisher(**settings), VonMisesFisher(**settings)
        for step in range(8):
            points, rows = unit(12, seed=step), SHARES[step % 2][rank]
            everything = points.clone().requires_grad_()
            expected = whole(everything, JOINT_LABELS)
            expected.backward()
            share = points[rows].clone().requires_grad_()
            with joint_batch():
                value = mine(share, JOINT_LABELS[rows])
            value.backward()
            assert (value != 0) == (step >= 4)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                share.grad, world * everything.grad[rows], rtol=1e-10, atol=1e-14
            )
            torch.testing.assert_close(mine.z, whole.z, rtol=1e-12, atol=1e-15)
            assert torch.equal(mine.updates, whole.updates)
            # To the last bit the same in both, so that they cannot drift apart.
            others = [torch.empty_like(mine.z) for _ in range(world)]
            dist.all_gather(others, mine.z)
            assert torch.equal(*others)
        assert mine.seen.tolist() == [True, True, True, True, False]
        # Statistics are of all processes also where losses are not.
        alone = VonMisesFisher(**settings)
        for step in range(4):
            rows = SHARES[step % 2][rank]
            alone(unit(12, seed=step)[rows], JOINT_LABELS[rows])
        torch.testing.assert_close(alone.z, whole.z, rtol=1e-12, atol=1e-15)
        assert torch.equal(alone.updates, whole.updates)


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and fork"
)
def test_processes_make_one_batch(monkeypatch):
    multiprocessing.set_forkserver_preload(["tests.distillers.test_vmf"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(check, 2, Config({"device": "cpu"}))
