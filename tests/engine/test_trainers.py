"""Training in phases: two optimisers by hand, resuming, and what does not fit."""

import pytest
import torch
from torch import nn

from pointcept_kd.engine import AlternatingTrainer, Joined
from pointcept_kd.host import InputError, kd
from pointcept_kd.host.batches import seed_process
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.hooks import HookBase
from pointcept_kd.host.log import read_jsonl

from ..host.tiny import CLASSES, tiny_config

OPTIMIZER = dict(
    judge=dict(type="SGD", lr=0.1, momentum=0.9, modules=["judge"], clip_grad=0.05),
    student=dict(type="AdamW", lr=0.01, modules=["student", "head"]),
)
SCHEDULER = dict(judge=dict(type="ExpLR", gamma=0.9), student=dict(type="OneCycleLR", max_lr=0.01))


@kd.MODELS.register_module(force=True)
class Opponents(nn.Module):
    """A judge that learns to tell what a student answers, and a student that learns against it."""

    def __init__(self, fault=""):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3))
        self.head = nn.Linear(6, CLASSES)
        self.judge = nn.Linear(CLASSES, 1)
        self.fault = fault
        if fault == "idle":
            self.spare = nn.Linear(2, 2)

    def forward(self, batch, phase=None):
        answer = self.head(self.student(batch["feat"]))
        if not self.training:
            loss = nn.functional.cross_entropy(answer, batch["segment"], ignore_index=-1)
            return {"loss": loss, "seg_logits": answer}
        if phase == "judge":
            loss = (self.judge(answer.detach()) - 1).square().mean()
            return {"loss": loss * float("nan") if self.fault == "nan" else loss}
        task = nn.functional.cross_entropy(answer, batch["segment"], ignore_index=-1)
        return {"loss": task + self.judge(answer).mean(), "loss_task": task}


def run(folder, **changes):
    changes = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER, **changes}
    cfg = tiny_config(
        folder, model=dict(type="kd.Opponents"), train=dict(type="kd.AlternatingTrainer"), **changes
    )
    trainer = AlternatingTrainer(cfg)
    trainer.train()
    return trainer


def weights(folder):
    return load_checkpoint(folder / "model" / "model_last.pth")["state_dict"]


def test_each_phase_by_hand(tmp_path):
    """The same run as two plain optimisers in a loop."""
    trainer = run(tmp_path / "a", evaluate=False)
    cfg = tiny_config(tmp_path / "b", optimizer=OPTIMIZER, scheduler=SCHEDULER, evaluate=False)
    cfg["model"] = dict(type="kd.Opponents")
    plain = AlternatingTrainer(cfg)
    model = plain.model
    judge = torch.optim.SGD(model.judge.parameters(), lr=0.1, momentum=0.9)
    own = [*model.student.parameters(), *model.head.parameters()]
    student = torch.optim.AdamW(own, lr=0.01)
    total = len(plain.train_loader) * 3
    cycle = torch.optim.lr_scheduler.OneCycleLR(student, max_lr=0.01, total_steps=total)
    steps = 0
    for epoch in range(3):
        plain.train_loader.batch_sampler.set_epoch(epoch)
        batches = iter(plain.train_loader)
        seed_process(cfg["seed"], epoch + 1, 0)
        model.train()
        for batch in batches:
            model.zero_grad()
            model(batch, phase="judge")["loss"].backward()
            nn.utils.clip_grad_norm_(model.judge.parameters(), 0.05)
            for group in judge.param_groups:
                group["lr"] = 0.1 * 0.9 ** (steps / total)
            judge.step()
            model.zero_grad()
            model(batch, phase="student")["loss"].backward()
            assert model.judge.weight.grad is not None  # which is not to be used
            student.step()
            cycle.step()
            steps += 1
    found = weights(tmp_path / "a")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-5)
    assert steps == total
    assert list(trainer.optimizer) == ["judge", "student"]


def test_what_is_logged(tmp_path):
    run(tmp_path)
    values = {}
    for entry in read_jsonl(tmp_path / "log.jsonl"):
        values.setdefault(entry["tag"], []).append(entry["value"])
    for i, total in enumerate(values["train/loss"]):
        assert total == pytest.approx(
            values["train/loss_judge"][i] + values["train/loss_student"][i], rel=1e-5
        )
    assert "train/loss_task" in values
    assert "val/mIoU" in values


@kd.HOOKS.register_module(force=True)
class StopAfter(HookBase):
    """Ends the run after an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def after_epoch(self):
        if self.trainer.epoch == self.epoch:
            raise KeyboardInterrupt


def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path):
    run(tmp_path / "whole")
    hooks = [*tiny_config(tmp_path)["hooks"], dict(type="kd.StopAfter", epoch=1)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", hooks=hooks)
    last = str(tmp_path / "parts" / "model" / "model_last.pth")
    run(tmp_path / "parts", resume=True, weight=last)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    with pytest.raises(InputError, match="cannot resume"):
        run(tmp_path / "longer", resume=True, weight=last, epoch=4, eval_epoch=4)
    fewer = {k: v for k, v in OPTIMIZER.items() if k == "student"}
    with pytest.raises(InputError, match=r"no phase trains judge\.weight"):
        run(tmp_path / "fewer", optimizer=fewer, scheduler=dict(student=SCHEDULER["student"]))


def changed(phase, **changes):
    return {k: {**v, **changes} if k == phase else v for k, v in OPTIMIZER.items()}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(optimizer=changed("judge", modules=["jugde"])), "no module 'jugde'; it has student"),
        (dict(optimizer=changed("judge", modules=None)), r"optimizer\.judge: give modules="),
        (
            dict(optimizer=changed("judge", modules=["judge", "head"])),
            r"optimizer\.student: head\.weight is trained by judge already",
        ),
        (dict(optimizer=dict(type="SGD", lr=0.1)), "an entry per phase"),
        (dict(scheduler=dict(student=SCHEDULER["student"])), "the phases are judge, student"),
        (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps must be 1"),
        (dict(model=dict(type="kd.Opponents", fault="idle")), r"no phase trains spare\.weight"),
    ],
)
def test_what_does_not_fit(tmp_path, changes, text):
    values = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER, "model": dict(type="kd.Opponents")}
    with pytest.raises(InputError, match=text):
        AlternatingTrainer(tiny_config(tmp_path / "run", **{**values, **changes}))
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    cfg = tiny_config(
        tmp_path,
        model=dict(type="kd.Opponents", fault="nan"),
        optimizer=OPTIMIZER,
        scheduler=SCHEDULER,
    )
    with pytest.raises(RuntimeError, match="the loss is not finite in epoch 1, iteration 1"):
        AlternatingTrainer(cfg).train()


def test_a_state_of_other_phases_is_refused():
    joined = Joined({"a": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)})
    with pytest.raises(ValueError, match="it has the phases b, the config a"):
        joined.load_state_dict({"b": {}})
