"""The teacher's loss by hand and in loops; dropping of conditions; the completer around encoder and denoiser."""

import math
import statistics

import pytest
import torch

from pointcept_kd.completion.diffusion import (
    Completer,
    DiffusionCompletion,
    draw_timesteps,
    drop_condition,
    evaluating,
    guide,
    moment_penalty,
    noise_loss,
    noise_mse,
    scan_seeds,
    tile,
)
from pointcept_kd.host import InputError

from .fakes import FakeDenoiser, FakeEncoder, scans


def model(**options):
    options = dict(dict(repeat=5, steps=4, guidance=3.0), **options)
    return DiffusionCompletion(FakeEncoder(), FakeDenoiser(), **options)


def test_regulariser_by_hand():
    e_hat = torch.tensor([[0.5, -0.5, 1.5], [0, 1, -1]], dtype=torch.float64)
    assert 5 * moment_penalty(e_hat).item() == pytest.approx(0.3333565, abs=1e-6)
    assert statistics.stdev(e_hat.flatten().tolist()) == pytest.approx(0.935414, abs=1e-6)
    e = torch.zeros_like(e_hat)
    assert noise_mse(e_hat, e).item() == pytest.approx(4.75 / 6)
    assert noise_loss(e_hat, e).item() == pytest.approx(4.75 / 6 + 0.3333565, abs=1e-6)
    assert noise_loss(e_hat, e, 0).item() == pytest.approx(4.75 / 6)


def test_loss_is_the_loop():
    e_hat, e = torch.randn(2, 30, 3, dtype=torch.float64)
    a, b = e_hat.flatten().tolist(), e.flatten().tolist()
    square = sum((x - y) ** 2 for x, y in zip(a, b)) / len(a)
    mean = sum(a) / len(a)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in a) / (len(a) - 1))
    expected = square + 2.5 * (mean**2 + (deviation - 1) ** 2)
    assert noise_loss(e_hat, e, 2.5).item() == pytest.approx(expected)
    order = torch.randperm(30)
    torch.testing.assert_close(noise_loss(e_hat[order], e[order]), noise_loss(e_hat, e))
    assert noise_mse(e, e).item() == 0
    assert torch.autograd.gradcheck(lambda x: noise_loss(x, e), e_hat.requires_grad_())


def test_a_constant_prediction_has_a_finite_gradient():
    e_hat = torch.zeros(4, 3, requires_grad=True)
    loss = noise_loss(e_hat, torch.ones(4, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1 + 5)
    assert torch.isfinite(e_hat.grad).all()
    none = noise_mse(e_hat[:0], e_hat[:0])
    assert none.item() == 0
    assert none.requires_grad
    with pytest.raises(InputError, match="needs two numbers"):
        moment_penalty(torch.zeros(0, 3))


def test_half_precision_is_compared_in_full():
    e_hat = torch.full((1000, 3), 300.0, dtype=torch.float16)
    assert noise_mse(e_hat, torch.zeros(1000, 3)).item() == pytest.approx(90000)


def test_timesteps_cover_the_schedule():
    t = draw_timesteps(20000, 10, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 1800


def test_dropping_conditions():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drop_condition(4, 0.25, "batch", generator) for _ in range(2000)])
    assert (draws.sum(1) % 4 == 0).all()  # all or none
    assert draws.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not any(drop_condition(1, 0.99, "batch", generator).any() for _ in range(20))
    draws = torch.stack([drop_condition(4, 0.25, "sample", generator) for _ in range(2000)])
    assert draws.float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert set(draws.sum(1).tolist()) >= {0, 1, 2}
    assert drop_condition(1, 1.0, "sample").all()
    with pytest.raises(InputError, match="nearest: batch"):
        drop_condition(2, 0.1, "batches")
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        drop_condition(2, 1.1)


@pytest.mark.parametrize(("scale", "expected"), [(6.0, 13), (3.5, 8), (1.0, 3), (0.0, 1)])
def test_guidance_by_hand(scale, expected):
    e = guide(torch.ones(2, 3), torch.full((2, 3), 3.0), scale)
    assert e.eq(expected).all()


def test_scans_are_tiled_as_blocks():
    points, ends = tile(torch.arange(9.0).view(3, 3), torch.tensor([1, 3]), 2)
    assert points[:, 0].tolist() == [0, 0, 3, 6, 3, 6]
    assert ends.tolist() == [2, 6]
    with pytest.raises(InputError, match="repeated once at least"):
        tile(points, ends, 0)


def test_seeds_follow_names():
    assert scan_seeds(["a", "b"]) == scan_seeds(["b", "a"])[::-1]
    assert len(set(scan_seeds([f"{i:06}" for i in range(500)]))) == 500
    # torch's generator on the CPU drops all but the lower 32 bits of a seed: only draws tell seeds apart.
    seeds = [scan_seeds(["08/000000"], seed)[0] for seed in range(50)]
    drawn = {torch.rand(1, generator=torch.Generator().manual_seed(s)).item() for s in seeds}
    assert len(drawn) == 50


def test_training_returns_scalars_and_trains_both_networks():
    teacher = model(drop=0.0).train()
    out = teacher(scans())
    assert set(out) == {"loss", "loss_noise", "loss_moments"}
    assert all(value.dim() == 0 for value in out.values())
    assert out["loss"].item() == pytest.approx(
        out["loss_noise"].item() + 5 * out["loss_moments"].item(), rel=1e-5
    )
    out["loss"].backward()
    for name, parameter in teacher.named_parameters():
        if "norm" not in name:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_dropped_condition_is_not_seen(mode):
    teacher = model(drop=1.0, drop_mode=mode).train()
    teacher(scans())["loss"].backward()
    assert teacher.denoiser.scan.grad.eq(0).all()
    assert teacher.denoiser.point.grad.abs().sum() > 0


def test_completions_do_not_depend_on_the_batch():
    teacher = model().eval()
    both, first, second = scans((6, 9)), scans((6, 9)), scans((6, 9))
    for batch, rows, number in ((first, slice(0, 6), 0), (second, slice(6, 15), 1)):
        batch.update(
            coord=both["coord"][rows],
            offset=torch.tensor([rows.stop - rows.start]),
            name=[both["name"][number]],
        )
    joined = teacher(both)
    alone = [teacher(batch) for batch in (second, first)][::-1]
    ends = joined["completed_offset"].tolist()
    assert [len(part["completed"]) for part in alone] == [ends[0], ends[1] - ends[0]]
    assert torch.equal(torch.cat([part["completed"] for part in alone]), joined["completed"])
    assert torch.equal(teacher(both)["completed"], joined["completed"])


def test_completion_settings():
    teacher = model().eval()
    batch = scans()
    points, ends = teacher.complete(batch["coord"], batch["offset"], seeds=[1, 2])
    assert points.shape == (75, 3)
    assert ends.tolist() == [30, 75]
    assert not points.requires_grad
    assert len(teacher.denoiser.calls) == 16  # of two scans, two for each of four steps: guidance
    teacher.denoiser.calls.clear()
    unguided = teacher.complete(batch["coord"], batch["offset"], [1, 2], steps=2, guidance=1.0)[0]
    assert len(teacher.denoiser.calls) == 4
    assert not torch.equal(unguided, points)
    other = model(sampling=dict(solver="ode"), process="global").eval()
    assert other.complete(batch["coord"], batch["offset"])[0].shape == (75, 3)


def test_evaluating_puts_every_mode_back():
    network = model().train()
    network.encoder.eval()
    before = [part.training for part in network.modules()]
    with evaluating(network):
        assert not any(part.training for part in network.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in network.modules()] == before


def test_bad_input():
    with pytest.raises(InputError, match="sampling does not know guidance"):
        model(sampling=dict(guidance=2))
    with pytest.raises(InputError, match=r"drop must lie in \[0, 1\]"):
        model(drop=2)
    with pytest.raises(InputError, match="process='both'"):
        model(process="both")
    with pytest.raises(InputError, match="only completes"):
        Completer(FakeEncoder(), FakeDenoiser()).train()(scans())
