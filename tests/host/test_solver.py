"""Parameter groups and schedules, against torch's own and against formulas worked by hand."""

import math

import pytest
import torch
from torch import nn

from pointcept_kd.host import InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.solver import (
    CosineScheduler,
    build_optimizer,
    build_scheduler,
    check_schedule,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.block = nn.ModuleDict(dict(attn=nn.Linear(3, 3), cpe=nn.Linear(3, 3)))
        self.frozen_block = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 2)


def names(model, group):
    lookup = {id(p): n for n, p in model.named_parameters()}
    return sorted(lookup[id(p)] for p in group["params"])


def sgd(lr=1.0, groups=1):
    params = [dict(params=[nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(groups)]
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def rates(scheduler, steps, group=0):
    """Learning rate before each of `steps` updates."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[group]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


# --------------------------------------------------------------------------------------- optimisers


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "kd.AdamW"])
def test_one_group_holds_everything(kind):
    model = Net()
    cfg = Config(dict(optimizer=dict(type=kind, lr=0.5, weight_decay=0.01)))
    optimizer = build_optimizer(cfg.optimizer, model)
    assert type(optimizer) is getattr(torch.optim, kind.removeprefix("kd."))
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert names(model, group) == sorted(n for n, _ in model.named_parameters())
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.01)
    assert cfg.optimizer == dict(type=kind, lr=0.5, weight_decay=0.01)


def test_groups_by_keyword():
    model = Net()
    optimizer = build_optimizer(
        dict(type="SGD", lr=1.0, momentum=0.9),
        model,
        [
            dict(keyword="attn", lr=0.1),
            dict(keyword="block", lr=0.2, momentum=0.5, weight_decay=0.3),
        ],
    )
    rest, attn, block = optimizer.param_groups
    assert names(model, rest) == ["head.bias", "head.weight", "stem.bias", "stem.weight"]
    # First match wins: the attention is a block too. The frozen block is nowhere.
    assert names(model, attn) == ["block.attn.bias", "block.attn.weight"]
    assert names(model, block) == ["block.cpe.bias", "block.cpe.weight"]
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.1, 0.2]
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.9, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 0, 0.3]


def test_a_keyword_without_parameters_warns_and_keeps_its_place(capsys):
    optimizer = build_optimizer(
        dict(type="AdamW", lr=1.0), Net(), [dict(keyword="nothing", lr=2.0), dict(keyword="block")]
    )
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 0, 4]
    assert optimizer.param_groups[2]["lr"] == 1.0
    text = capsys.readouterr().err
    assert "WARNING] param_dicts keyword 'nothing' matches no parameter" in text
    assert "'block': 4 tensors, as the rest" in text


@pytest.mark.parametrize(
    ("cfg", "groups", "text"),
    [
        (None, None, "optimizer must be a dict with a type"),
        (dict(lr=1.0), None, "optimizer must be a dict with a type"),
        (dict(type="SDG", lr=1.0), None, "nearest: SGD"),
        (dict(type="AdamW", lr=1.0, weight_dekay=0.1), None, "did you mean weight_decay"),
        (dict(type="AdamW", lr=-1.0), None, "optimizer AdamW: Invalid learning rate"),
        (dict(type="SGD", lr=1.0), [dict(lr=1.0)], r"param_dicts\.0 needs a keyword"),
        (dict(type="SGD", lr=1.0), [dict(keyword="a", wd=1.0)], "does not take 'wd'"),
        (dict(type="SGD", lr=1.0), [dict(keyword="a", lr_scale=1.0)], "does not take 'lr_scale'"),
        (dict(type="SGD", lr=1.0), dict(keyword="a"), "must be a list of dicts"),
    ],
)
def test_bad_optimizers(cfg, groups, text):
    with pytest.raises(InputError, match=text):
        build_optimizer(cfg, Net(), groups)


def test_no_parameters():
    with pytest.raises(InputError, match="no parameters"):
        build_optimizer(dict(type="SGD", lr=1.0), nn.ReLU())


# ---------------------------------------------------------------------------------------- schedules


def test_multi_step():
    cfg = Config(dict(type="MultiStepLR", milestones=[0.25, 0.75], gamma=0.5, total_steps=8))
    found = rates(build_scheduler(cfg, sgd()), 8)
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_multi_step_takes_whole_steps():
    cfg = dict(type="MultiStepLR", milestones=[1 / 3], gamma=0.1, total_steps=10)
    assert rates(build_scheduler(cfg, sgd()), 5) == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_multi_step_with_warmup_by_hand():
    cfg = dict(
        type="MultiStepWithWarmupLR",
        milestones=[0.5, 0.8],
        gamma=0.1,
        warmup_rate=0.4,
        warmup_scale=0.2,
        total_steps=10,
    )
    # From 0.2 to 1 in four steps of 0.2, then whole, then a tenth from step 5, a hundredth from 8.
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert rates(build_scheduler(cfg, sgd()), 10) == pytest.approx(expected)
    cfg["warmup_rate"] = 0
    assert rates(build_scheduler(cfg, sgd()), 2) == pytest.approx([1, 1])


def test_default_warmup():
    scheduler = build_scheduler(
        dict(type="MultiStepWithWarmupLR", milestones=[1.0], total_steps=100), sgd()
    )
    found = rates(scheduler, 7)
    assert found[0] == pytest.approx(1e-6)
    assert found[2] == pytest.approx(1e-6 + (1 - 1e-6) * 2 / 5)
    assert found[5:] == pytest.approx([1, 1])


def test_poly_and_exponential_by_hand():
    found = rates(build_scheduler(dict(type="PolyLR", total_steps=4), sgd()), 7)
    expected = [(1 - s / 5) ** 0.9 for s in range(5)]
    assert found == pytest.approx([*expected, 0, 0])
    found = rates(build_scheduler(dict(type="ExpLR", total_steps=4, gamma=0.16), sgd()), 5)
    # A quarter of the run is the square root of a half of it: 0.16 ** (1/4) = sqrt(0.4).
    root = math.sqrt(0.4)
    assert found == pytest.approx([1, root, 0.4, 0.4 * root, 0.16])


def test_cosine_annealing_is_torchs():
    found = rates(
        build_scheduler(dict(type="CosineAnnealingLR", total_steps=9, eta_min=0.1), sgd()), 10
    )
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * s / 9)) / 2 for s in range(10)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("steps", [5, 30])
def test_one_cycle_is_torchs(steps):
    args = dict(max_lr=[1.0, 0.1], pct_start=0.3, div_factor=10.0, final_div_factor=100.0)
    mine = build_scheduler(dict(type="OneCycleLR", total_steps=steps, **args), sgd(groups=2))
    other = torch.optim.lr_scheduler.OneCycleLR(sgd(groups=2), total_steps=steps, **args)
    for _ in range(steps - 1):
        for a, b in zip(mine.optimizer.param_groups, other.optimizer.param_groups):
            assert (a["lr"], a["momentum"]) == (b["lr"], b["momentum"])
        for scheduler in (mine, other):
            scheduler.optimizer.step()
            scheduler.step()
    assert mine.optimizer.param_groups[0]["lr"] == pytest.approx(1.0 / 10 / 100)


@pytest.mark.parametrize(
    ("steps", "share"), [(1, 1.0), (4, 0.25), (25, 0.04), (10, 0.1), (3, 1 / 3)]
)
def test_one_cycle_with_a_rise_of_one_step(steps, share):
    """Torch divides by zero here; the first step is the start and the second the top."""
    cfg = dict(type="OneCycleLR", max_lr=1.0, total_steps=steps, pct_start=share, div_factor=10.0)
    found = rates(build_scheduler(cfg, sgd()), steps)
    assert all(0 < r <= 1 for r in found)
    if steps > 1:
        assert found[0] == pytest.approx(0.1)
        assert max(found) == found[1]


def test_one_cycle_counts_the_groups():
    cfg = dict(type="OneCycleLR", max_lr=[1.0, 0.1], total_steps=5)
    with pytest.raises(InputError, match="max_lr has 2 entries for 1 parameter groups"):
        build_scheduler(cfg, sgd())


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (None, "scheduler must be a dict with a type"),
        (dict(type="PolyLR"), "total_steps=None must be a whole number"),
        (dict(type="PolyLR", total_steps=0), "total_steps=0 must be a whole number"),
        (dict(type="OneCycle", max_lr=1, total_steps=5), "nearest: OneCycleLR"),
        (dict(type="OneCycleLR", total_steps=5), "needs 'max_lr'"),
        (
            dict(type="OneCycleLR", max_lr=1.0, total_steps=5, pct_start=2.0),
            "scheduler OneCycleLR: ",
        ),
        (dict(type="MultiStepLR", milestones=[30, 60], total_steps=5), "must be fractions"),
        (dict(type="CosineScheduler", base_value=1, final_value=0, total_iters=3), "gives values"),
    ],
)
def test_bad_schedulers(cfg, text):
    with pytest.raises(InputError, match=text):
        build_scheduler(cfg, sgd())


# ----------------------------------------------------------------------------------------- resuming


def entries(total_steps):
    return [
        dict(type="OneCycleLR", max_lr=1.0, total_steps=total_steps),
        dict(type="CosineAnnealingLR", total_steps=total_steps),
        dict(type="MultiStepLR", milestones=[0.5], total_steps=total_steps),
        dict(type="MultiStepWithWarmupLR", milestones=[0.5], total_steps=total_steps),
        dict(type="PolyLR", total_steps=total_steps),
        dict(type="ExpLR", total_steps=total_steps),
    ]


@pytest.mark.parametrize("i", range(6))
def test_resuming_goes_on_exactly(i, tmp_path):
    whole = rates(build_scheduler(entries(10)[i], sgd()), 9)
    optimizer = sgd()
    scheduler = build_scheduler(entries(10)[i], optimizer)
    rates(scheduler, 4)
    states = dict(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
    torch.save(states, tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=False)
    optimizer = sgd()
    scheduler = build_scheduler(entries(10)[i], optimizer)
    check_schedule(state["scheduler"], scheduler)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert rates(scheduler, 5) == whole[4:]


@pytest.mark.parametrize("i", range(6))
def test_resuming_another_length_is_refused(i):
    state = build_scheduler(entries(10)[i], sgd()).state_dict()
    with pytest.raises(
        InputError, match="cannot resume: .*10|cannot resume: .*5.*keep epoch"
    ) as caught:
        check_schedule(state, build_scheduler(entries(20)[i], sgd()))
    assert "\n" not in str(caught.value)
    assert "resume=False" in str(caught.value)


def test_resuming_other_groups_is_refused():
    state = build_scheduler(entries(10)[4], sgd()).state_dict()
    with pytest.raises(InputError, match="1 parameter groups, this run 2"):
        check_schedule(state, build_scheduler(entries(10)[4], sgd(groups=2)))


def test_a_foreign_state_without_a_length_passes():
    scheduler = build_scheduler(entries(10)[4], sgd())
    state = {k: v for k, v in scheduler.state_dict().items() if k != "total_steps"}
    check_schedule(state, build_scheduler(entries(20)[4], sgd()))


# --------------------------------------------------------------------------------- value schedules


def test_cosine_scheduler_by_hand():
    schedule = CosineScheduler(
        1.0, 0.2, 10, start_value=0.4, warmup_iters=3, freeze_value=0.9, freeze_iters=3
    )
    span = [0.2 + 0.4 * (1 + math.cos(math.pi * j / 4)) for j in range(4)]
    expected = [0.4, 0.7, 1.0, *span, 0.9, 0.9, 0.9, 0.2, 0.2]
    assert [schedule.get(i) for i in range(12)] == pytest.approx(expected)
    assert [schedule.step() for _ in range(12)] == pytest.approx(expected)
    assert schedule[1] == pytest.approx(0.7)
    assert schedule.iter == 12
    other = CosineScheduler(1.0, 0.2, 10)
    other.load_state_dict(schedule.state_dict())
    assert other.iter == 12
    schedule.reset()
    assert schedule.step() == 0.4


def test_cosine_scheduler_defaults():
    schedule = CosineScheduler(0.04, 0.2, 100)
    assert schedule.get(0) == pytest.approx(0.04)
    assert schedule.get(50) == pytest.approx(0.12)
    assert schedule.get(100) == schedule.get(1000) == 0.2
    assert CosineScheduler(1, 0, 2, warmup_iters=1).get(0) == 0
    with pytest.raises(InputError, match="longer than total_iters"):
        CosineScheduler(1.0, 0.0, 5, warmup_iters=3, freeze_iters=3)
