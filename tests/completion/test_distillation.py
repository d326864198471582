"""The distilling models around linear networks: what is trained, what is frozen, and by which gradient."""

import copy
import math

import pytest
import torch

from pointcept_kd.completion import distillation
from pointcept_kd.completion.diffusion import DiffusionCompletion
from pointcept_kd.completion.distillation import (
    PreferenceAlignment,
    PreferenceDistillation,
    ScoreDistillation,
    load_teacher,
)
from pointcept_kd.completion.preference import quality
from pointcept_kd.completion.schedule import Schedule
from pointcept_kd.completion.score import scene_loss
from pointcept_kd.host import InputError
from pointcept_kd.host.point import offset2batch

from .fakes import FakeDenoiser, FakeEncoder, scans


def teacher(seed=0):
    torch.manual_seed(seed)
    model = DiffusionCompletion(FakeEncoder(), FakeDenoiser(seed), repeat=5, steps=4)
    return dict(model=model, weight="random")


def build(kind, **options):
    if kind is ScoreDistillation:
        options = dict(dict(candidates=20, keys=8, neighbours=8), **options)
    return kind(teacher(), **options).train()


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


KINDS = [ScoreDistillation, PreferenceDistillation]
SCHEDULE = Schedule()


@pytest.mark.parametrize("kind", KINDS)
def test_each_phase_trains_its_own(kind):
    model = build(kind)
    for watcher in model.watchers:  # those of a fresh model see what the teacher sees
        with torch.no_grad():
            watcher.point += 0.1
    outputs = model(scans(), phase="student")
    assert all(value.dim() == 0 for value in outputs.values())
    outputs["loss"].backward()
    assert all(g is None for g in grads(model.watchers.parameters()))
    assert all(g.abs().sum() > 0 for g in grads(model.denoiser.parameters()))
    model.zero_grad()
    outputs = model(scans(), phase="auxiliary")
    outputs["loss"].backward()
    assert all(g is None for g in grads(model.denoiser.parameters()))
    assert all(g.abs().sum() > 0 for g in grads(model.watchers.parameters()))
    for frozen in (model.encoder, model.teacher):
        assert all(g is None for g in grads(frozen.parameters()))
    assert not set(map(id, model.teacher.parameters())) & set(map(id, model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_phase_both_are_trained(kind):
    model = build(kind)
    outputs = model(scans())
    assert {"loss", "loss_auxiliary"} < set(outputs)
    outputs["loss"].backward()
    assert all(g is not None for g in grads(model.denoiser.parameters()))
    assert all(g is not None for g in grads(model.watchers.parameters()))


@pytest.mark.parametrize("kind", [*KINDS, PreferenceAlignment])
def test_frozen_parts_stay_as_they_are(kind):
    model = build(kind)
    before = copy.deepcopy([model.encoder.state_dict(), model.teacher.state_dict()])
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for module in model.modules():
        module.training = True  # as a trainer's global call leaves them
    for _ in range(3):
        optimizer.zero_grad()
        model(scans())["loss"].backward()
        optimizer.step()
        assert not model.encoder.norm.training
        assert not model.teacher.training
    for old, new in zip(before, [model.encoder.state_dict(), model.teacher.state_dict()]):
        for key, value in old.items():
            assert torch.equal(value, new[key]), key
    assert not torch.equal(model.denoiser.point, model.teacher.point)


def test_gradient_probe_of_the_score_term():
    """The student's gradient is the stated difference of scores, brought back through its last call; not zero."""
    model = build(ScoreDistillation, scene_weight=0, point_weight=0)
    with torch.no_grad():
        model.watchers[0].point += 0.1
    seen = {}

    def keep(name, inner):
        def wrapped(*args, **kwargs):
            seen[name] = inner(*args, **kwargs)
            return seen[name]

        return wrapped

    model._completion = keep("x", model._completion)
    model._predict = keep("scores", model._predict)
    outputs = model(scans(), phase="student")
    assert set(outputs) == {"loss", "gap"}
    teacher_eps, watcher_eps = seen["scores"]
    x = seen["x"]
    expected = torch.autograd.grad(
        x, model.denoiser.point, (teacher_eps - watcher_eps) / x.numel(), retain_graph=True
    )
    got = torch.autograd.grad(outputs["loss"], model.denoiser.point)
    torch.testing.assert_close(got, expected)
    assert got[0].abs().max() > 1e-4
    torch.testing.assert_close(outputs["gap"], (teacher_eps - watcher_eps).square().mean())


def test_a_watcher_that_agrees_with_the_teacher_leaves_no_gradient():
    model = build(ScoreDistillation, scene_weight=0, point_weight=0)
    model(scans(), phase="student")["loss"].backward()
    assert all(g.abs().max() < 1e-7 for g in grads(model.denoiser.parameters()))


def test_gradient_probe_of_the_preference_term():
    model = build(PreferenceDistillation, loser_weight=0.7)
    with torch.no_grad():
        model.watchers[0].point += 0.1
        model.watchers[1].time -= 0.1
    kept = []
    pair, predict = model._pair, model._predict
    model._pair = lambda *args: kept.append(pair(*args)) or kept[-1]
    model._predict = lambda *args: kept.append(predict(*args)) or kept[-1]
    loss = model(scans(), phase="student")["loss"]
    (winner, loser, *_), (t_w, better), (t_l, worse) = kept
    n = winner.numel()
    expected = torch.autograd.grad(
        [winner, loser],
        model.denoiser.point,
        [(t_w - better) / n, -0.7 * (t_l - worse) / n],
        retain_graph=True,
    )
    got = torch.autograd.grad(loss, model.denoiser.point)
    torch.testing.assert_close(got, expected)
    assert got[0].abs().max() > 1e-4


@pytest.mark.parametrize(("rank_by", "higher"), [("cd", False), ("jsd", False), ("iou", True)])
@pytest.mark.parametrize("pairing", ["scaled", "independent"])
def test_winners_are_better(rank_by, higher, pairing):
    model = build(PreferenceDistillation, rank_by=rank_by, pairing=pairing, scale=1.5)
    batch = scans((6, 9, 4))
    winner, loser, ends, ranking = model._pair(batch, model._condition(batch))
    metric = distillation.RANKINGS[rank_by][0]
    best, worst = (
        quality(x, batch["complete"], ends, batch["complete_offset"], metric)
        for x in (winner, loser)
    )
    assert ((best >= worst) if higher else (best <= worst)).all()
    first, second, wins = ranking
    assert torch.equal(torch.where(wins, first, second), best)
    assert not torch.equal(winner, loser)
    assert winner.requires_grad
    assert loser.requires_grad


def test_one_last_call_has_a_gradient_and_nothing_is_guided():
    model = build(ScoreDistillation, train_steps=4)
    model.denoiser.calls.clear()
    model(scans(), phase="student")
    assert model.denoiser.calls == [(False, True)] * 3 + [(True, True)]
    model.denoiser.calls.clear()
    model(scans(), phase="auxiliary")
    assert model.denoiser.calls == [(False, False)] * 4  # in evaluation mode
    assert model.denoiser.training


def test_random_stop_visits_the_whole_grid():
    model = build(ScoreDistillation, train_steps=3, random_stop=True)
    counts = set()
    for _ in range(20):
        model.denoiser.calls.clear()
        model(scans(), phase="student")["loss"].backward()
        counts.add(len(model.denoiser.calls))
        assert [grad for grad, _ in model.denoiser.calls].count(True) == 1
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_structural_losses_enter_with_their_weights(kind):
    batch, values = scans(), {}
    sizes = dict(candidates=20, keys=8, neighbours=8)
    for name, weights in dict(none=(0, 0), scene=(2, 0), point=(0, 3), both=(2, 3)).items():
        model = build(kind, scene_weight=weights[0], point_weight=weights[1], **sizes)
        torch.manual_seed(5)
        values[name] = model(batch, phase="student")
    assert "loss_scene" not in values["none"]
    scene, point = values["both"]["loss_scene"], values["both"]["loss_point"]
    assert scene > 0
    assert point > 0
    expected = values["none"]["loss"] + 2 * scene + 3 * point
    torch.testing.assert_close(values["both"]["loss"], expected)
    torch.testing.assert_close(values["scene"]["loss"], values["none"]["loss"] + 2 * scene)


def test_the_structure_compared_is_the_winners():
    model = build(PreferenceDistillation, scene_weight=1.0, scale=1.5)
    kept = []
    pair = model._pair
    model._pair = lambda *args: kept.append(pair(*args)) or kept[-1]
    batch = scans()
    found = model(batch, phase="student")["loss_scene"]
    winner, loser, ends, _ = kept[0]
    wanted, other = (
        scene_loss(x, batch["complete"], ends, batch["complete_offset"]) for x in (winner, loser)
    )
    assert found == wanted
    assert found != other
    # Published: none.
    assert "loss_scene" not in build(PreferenceDistillation)(batch, phase="student")


@pytest.mark.parametrize("process", ["local", "global"])
def test_normalised_score_does_not_follow_the_size_of_the_error(process):
    model = build(
        ScoreDistillation, normalize=True, scene_weight=0, point_weight=0, process=process
    )
    with torch.no_grad():
        model.watchers[0].point += 0.1
    out = model(scans(), phase="student")
    out["loss"].backward()
    assert torch.isfinite(model.denoiser.point.grad).all()
    assert model.denoiser.point.grad.abs().max() > 0
    # What the noise was leaves the points as they were.
    x, ends = torch.randn(15, 3), torch.tensor([6, 15])
    t, e = model._noise(x, ends)
    clean = model._clean(model.noised(x, ends, t, e), e, t, ends)
    torch.testing.assert_close(clean, x, atol=1e-4, rtol=1e-4)


def test_batch_norm_is_frozen_unless_asked():
    class Normed(FakeDenoiser):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, x, offset, t, condition):
            return super().forward(self.norm(x), offset, t, condition)

    guest = DiffusionCompletion(FakeEncoder(), Normed(), repeat=5)
    moved = []
    for freeze in (True, False):
        model = ScoreDistillation(
            dict(model=guest, weight="random"), freeze_bn=freeze, point_weight=0
        ).train()
        model(scans(), phase="auxiliary")
        untouched = model.denoiser.norm.running_mean.eq(0).all()
        assert untouched  # the student only completes in this phase
        model(scans(), phase="student")
        moved.append(not model.denoiser.norm.running_mean.eq(0).all())
        assert model.teacher.norm.running_mean.eq(0).all()
    assert moved == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_that_of_a_plain_model(kind):
    model = build(kind)
    with torch.no_grad():
        model.denoiser.point += 0.1
    plain = DiffusionCompletion(FakeEncoder(), FakeDenoiser(), repeat=5, steps=8, guidance=3.5)
    plain.load_state_dict(model.export_state_dict())
    batch = scans()
    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch))
    assert not any("watch" in key or "teacher" in key for key in model.export_state_dict())
    assert not any("teacher" in key for key in model.state_dict())
    assert any(key.startswith("watchers.") for key in model.state_dict())


def test_running_average_of_the_student():
    model = build(ScoreDistillation, ema=0.75)
    batch, start = scans(), model.denoiser.point.detach().clone()
    with torch.no_grad():
        model.denoiser.point += 1
    model(batch, phase="auxiliary")
    assert torch.equal(model.average.point, start)  # the student has not been trained
    model(batch, phase="student")["loss"].backward()
    torch.testing.assert_close(model.average.point, start + 0.25)
    model(batch, phase="student")
    torch.testing.assert_close(model.average.point, start + 0.25 + 0.75 * 0.25)
    assert model.average.point.grad is None
    assert not any(parameter.requires_grad for parameter in model.average.parameters())
    plain = DiffusionCompletion(FakeEncoder(), FakeDenoiser(), repeat=5, steps=8, guidance=3.5)
    plain.load_state_dict(model.export_state_dict())
    assert torch.equal(plain.denoiser.point, model.average.point)
    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch))
    assert build(ScoreDistillation).average is None


def test_settings_come_from_the_teacher():
    entry = teacher()
    entry["model"].process = "global"
    model = ScoreDistillation(entry)
    assert (model.process, model.repeat, model.steps, model.guidance) == ("global", 5, 8, 3.5)
    assert model.schedule is not None
    assert ScoreDistillation(entry, process="local").process == "local"
    assert model.to(torch.float64).teacher.point.dtype == torch.float64


class GaussianDenoiser(torch.nn.Module):
    """The exact prediction where clean points are N(mean, 1/4), whatever the scan."""

    def __init__(self, mean):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))

    def forward(self, x, offset, t, condition):
        sigma = SCHEDULE.sigma(t)[offset2batch(offset), None]
        return sigma * (x - self.mean) / (0.25 + sigma**2)


def test_the_student_ends_where_the_teachers_points_are():
    """One step of the teacher overshoots 4.6 times; its distilled copy meets the mean in one step."""
    target = torch.tensor([1.0, -1, 0.5])
    guest = DiffusionCompletion(FakeEncoder(), GaussianDenoiser(target.tolist()), repeat=1)
    model = ScoreDistillation(
        dict(model=guest, weight="random"), scene_weight=0, point_weight=0
    ).train()
    batch = scans((60, 60), times=1)
    batch["coord"] = torch.zeros(120, 3)

    def mean():
        with torch.no_grad():
            x = model._completion(batch["coord"], batch["offset"], None)
        return x.mean(0)

    assert (mean() - target).norm() > 4
    optimizers = {
        "auxiliary": torch.optim.Adam(model.watchers.parameters(), lr=0.3),
        "student": torch.optim.Adam(model.denoiser.parameters(), lr=0.02),
    }
    for _ in range(120):
        for phase, optimizer in optimizers.items():
            optimizer.zero_grad()
            model(batch, phase=phase)["loss"].backward()
            optimizer.step()
    assert sum((mean() - target).norm().item() for _ in range(20)) / 20 < 0.5


# --- alignment of the teacher -----------------------------------------------------------------


def test_alignment_starts_at_the_reference():
    model = build(PreferenceAlignment, pair_steps=2)
    out = model(scans())
    assert out["loss"].item() == pytest.approx(math.log(2), abs=1e-4)
    assert out["margin"].item() == pytest.approx(0, abs=1e-3)
    out["loss"].backward()
    assert all(g.abs().sum() > 0 for g in grads(model.denoiser.parameters()))


def test_alignment_learns_to_prefer():
    model = build(PreferenceAlignment, beta=5.0)
    batch = scans()
    torch.manual_seed(1)
    batch.update(
        winner=torch.randn(60, 3) + 2,
        loser=torch.randn(60, 3) - 2,
        winner_offset=torch.tensor([24, 60]),
        loser_offset=torch.tensor([24, 60]),
    )
    optimizer = torch.optim.Adam(model.denoiser.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    outs = [model(batch) for _ in range(20)]
    assert sum(out["loss"].item() for out in outs) / 20 < 0.8 * math.log(2)
    assert sum(out["accuracy"].item() for out in outs) / 20 > 0.7
    batch["loser_offset"] = torch.tensor([20, 60])
    with pytest.raises(InputError, match="equally many points"):
        model(batch)


def test_bad_input():
    with pytest.raises(InputError, match="the teacher has no weight"):
        ScoreDistillation(dict(model=teacher()["model"]))
    with pytest.raises(InputError, match="it must complete scans"):
        load_teacher(torch.nn.Linear(3, 3), "random")
    with pytest.raises(InputError, match="schedule is the teacher's"):
        ScoreDistillation(teacher(), schedule=dict(kind="cosine"))
    with pytest.raises(InputError, match="nearest: jsd"):
        PreferenceDistillation(teacher(), rank_by="jsdd")
    with pytest.raises(InputError, match="nearest: logistic"):
        PreferenceDistillation(teacher(), form="logistc")
    with pytest.raises(InputError, match="nearest: matched"):
        ScoreDistillation(teacher(), point="match")
    with pytest.raises(InputError, match="ema must lie in"):
        ScoreDistillation(teacher(), ema=1.0)
    with pytest.raises(InputError, match="train_steps must lie in"):
        ScoreDistillation(teacher(), train_steps=0)
    with pytest.raises(InputError, match="beta must be positive"):
        PreferenceAlignment(teacher(), beta=0)
    with pytest.raises(InputError, match="nearest: student"):
        build(ScoreDistillation)(scans(), phase="students")
    with pytest.raises(InputError, match="does not exist"):
        load_teacher(teacher()["model"], "missing.pth")
