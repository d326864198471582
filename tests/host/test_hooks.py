"""Hooks: order, loading, logging, evaluation, saving, testing at the end."""

import gc
import os

import pytest
import torch

from pointcept_kd.host import HOOKS, InputError, kd
from pointcept_kd.host.checkpoint import load_checkpoint, save_atomic
from pointcept_kd.host.hooks import (
    CheckpointLoader,
    CheckpointSaver,
    GarbageHandler,
    HookBase,
    SemSegEvaluator,
    compare,
    progress,
)
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.trainer import Trainer

from . import tiny
from .tiny import tiny_config

POINTS = ("before_train", "before_epoch", "before_step", "after_step", "after_epoch", "after_train")


def run(path, **changes):
    trainer = Trainer(tiny_config(path, **changes))
    trainer.train()
    return trainer


def test_host_names_in_both_scopes():
    for name in (
        "CheckpointLoader", "ModelHook", "IterationTimer", "InformationWriter", "SemSegEvaluator", "CheckpointSaver",
        "PreciseEvaluator", "GarbageHandler", "WeightDecaySchedular",
    ):  # fmt: skip
        assert HOOKS.get(name) is not None
        assert HOOKS.get(f"kd.{name}") is not None


def test_hooks_are_called_in_list_order_at_every_point(tmp_path):
    calls = []

    class Recorder(HookBase):
        def __init__(self, name):
            self.name = name

    for point in POINTS:
        setattr(
            Recorder,
            point,
            lambda self, point=point: calls.append((point, self.name, self.trainer.epoch)),
        )
    kd.HOOKS.register_module("Recorder", force=True, module=Recorder)
    recorders = [dict(type="kd.Recorder", name=name) for name in "ab"]
    run(tmp_path, hooks=recorders, epoch=2, eval_epoch=2)  # 3 iterations per epoch
    steps = [("before_step", n) for n in "ab"] + [("after_step", n) for n in "ab"]
    epoch = [("before_epoch", n) for n in "ab"] + 3 * steps + [("after_epoch", n) for n in "ab"]
    expected = [(*c, 0) for c in [("before_train", n) for n in "ab"] + epoch]
    expected += [(*c, 1) for c in epoch + [("after_train", n) for n in "ab"]]
    assert calls == expected


def test_a_model_that_is_a_hook_is_called(tmp_path):
    class Listening(tiny.TinyNet, HookBase):
        calls = ()

        def after_step(self):
            self.calls += (self.trainer.comm_info["iter"],)

    kd.MODELS.register_module("Listening", force=True, module=Listening)
    trainer = run(tmp_path, model=dict(type="kd.Listening"), epoch=1, eval_epoch=1)
    assert trainer.model.calls == (0, 1, 2)


def test_a_failing_hook_keeps_its_exception_and_is_logged(tmp_path):
    class Fails(HookBase):
        def after_epoch(self):
            raise OverflowError("the hook broke")

    kd.HOOKS.register_module("Fails", force=True, module=Fails)
    with pytest.raises(OverflowError, match="the hook broke"):
        run(tmp_path, hooks=[dict(type="kd.Fails")])
    assert "OverflowError: the hook broke" in (tmp_path / "train.log").read_text()


# ---------------------------------------------------------------------------------------- writer


def test_lines_and_scalars(tmp_path):
    run(tmp_path, epoch=2, eval_epoch=2)
    text = (tmp_path / "train.log").read_text()
    for part in (
        "Train: [2/2][3/3] Data ",
        "Batch ",
        "Remain 0:00:00",
        "loss: ",
        "loss_part: ",
        "Lr: ",
    ):
        assert part in text
    rows = read_jsonl(tmp_path / "log.jsonl")
    steps = {}
    for row in rows:
        steps.setdefault(row["tag"], []).append(row["step"])
    for tag in ("params/lr", "train_batch/loss", "train_batch/loss_part"):
        assert steps[tag] == [1, 2, 3, 4, 5, 6]
    for tag in (
        "train/loss",
        "train/loss_part",
        "val/loss",
        "val/mIoU",
        "val/mAcc",
        "val/allAcc",
        "val/mIoU_present",
    ):
        assert steps[tag] == [1, 2]
    means = [row["value"] for row in rows if row["tag"] == "train/loss"]
    singles = [row["value"] for row in rows if row["tag"] == "train_batch/loss"]
    assert means == pytest.approx([sum(singles[:3]) / 3, sum(singles[3:]) / 3], rel=1e-6)


def test_log_interval_keeps_the_last_line(tmp_path):
    hooks = [dict(type="InformationWriter", log_interval=2)]
    run(tmp_path, hooks=hooks, epoch=1, eval_epoch=1)
    text = (tmp_path / "train.log").read_text()
    assert [f"[{i}/3]" in text for i in (1, 2, 3)] == [False, True, True]


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(progress([1, 2], 2, "Test")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path, epoch=1, eval_epoch=1)
    written = capsys.readouterr().err
    assert "Epoch 1/1" in written
    assert "Evaluation" in written


# ------------------------------------------------------------------------------------- evaluator


def evaluate(path, batch_size, model=None):
    trainer = Trainer(
        tiny_config(path, batch_size_val=batch_size, hooks=[dict(type="SemSegEvaluator")])
    )
    if model is not None:
        trainer.model.load_state_dict(model)
    trainer.hooks[0].eval()
    return trainer


def test_a_batch_of_two_scores_as_two_batches_of_one(tmp_path):
    one = evaluate(tmp_path / "a", 1)
    model = one.model.state_dict()
    for size in (2, 3):
        other = evaluate(tmp_path / str(size), size, model)
        assert other.comm_info["current_metric_value"] == one.comm_info["current_metric_value"]
    assert one.comm_info["current_metric_name"] == "mIoU"


def test_the_metric_against_loops_over_raw_points(tmp_path):
    trainer = evaluate(tmp_path, 2)
    hits, union = [0] * tiny.CLASSES, [0] * tiny.CLASSES
    trainer.model.eval()
    for index in range(3):
        scan = trainer.val_loader.dataset.dataset[index]
        pred = trainer.model(scan)["seg_logits"].argmax(1)
        for row, target in zip(scan["inverse"].tolist(), scan["origin_segment"].tolist()):
            if target == -1:
                continue
            p = int(pred[row])
            hits[target] += p == target
            union[target] += 1
            union[p] += p != target
    expected = sum(h / u if u else 0.0 for h, u in zip(hits, union)) / tiny.CLASSES
    assert trainer.comm_info["current_metric_value"] == pytest.approx(expected)


def test_the_log_line_states_the_protocol(tmp_path):
    data = tiny.tiny_values("")["data"]
    data.update(num_classes=6, names=list("abcdef"))
    data["val"]["raw"] = False

    class Wide(tiny.TinyNet):
        def forward(self, batch):
            outputs = super().forward(batch)
            if "seg_logits" in outputs:
                outputs["seg_logits"] = torch.nn.functional.pad(
                    outputs["seg_logits"], (0, 2), value=-100.0
                )
            return outputs

    kd.MODELS.register_module("Wide", force=True, module=Wide)
    hooks = [dict(type="SemSegEvaluator", write_cls_iou=True)]
    trainer = Trainer(tiny_config(tmp_path, data=data, hooks=hooks, model=dict(type="kd.Wide")))
    trainer.hooks[0].eval()
    trainer.writer.close()
    text = (tmp_path / "train.log").read_text()
    assert "Val result: mIoU/mAcc/allAcc 0." in text
    assert "(all 6 classes, absent = 0; present classes only (4): mIoU" in text
    assert "labels compared at the rows the network saw" in text
    assert "Class_5-f Result: iou/accuracy 0.0000/0.0000 (absent)" in text
    values = {row["tag"]: row["value"] for row in read_jsonl(tmp_path / "log.jsonl")}
    assert values["val/mIoU"] == pytest.approx(values["val/mIoU_present"] * 4 / 6)
    assert "val/cls_3-d IoU" in values


def test_inverse_without_raw_labels_is_refused():
    with pytest.raises(InputError, match="no `origin_segment`"):
        compare(torch.zeros(2, 3), {"inverse": torch.tensor([0, 1, 1])})


def test_no_evaluation_when_switched_off(tmp_path):
    trainer = run(tmp_path, evaluate=False, epoch=1, eval_epoch=1)
    assert trainer.val_loader is None
    assert "current_metric_value" not in trainer.comm_info
    assert os.listdir(tmp_path / "model") == ["model_last.pth"]


# ----------------------------------------------------------------------------------------- saver


class Scripted(SemSegEvaluator):
    """An evaluator whose metric is given."""

    def __init__(self, values):
        self.values = values

    def after_epoch(self):
        self.trainer.comm_info["current_metric_value"] = self.values[self.trainer.epoch]
        self.trainer.comm_info["current_metric_name"] = "mIoU"


kd.HOOKS.register_module("Scripted", force=True, module=Scripted)


def test_last_best_and_numbered_files(tmp_path):
    hooks = [
        dict(type="kd.Scripted", values=[0.2, 0.5, 0.4]),
        dict(type="CheckpointSaver", save_freq=2),
    ]
    run(tmp_path, hooks=hooks)
    folder = tmp_path / "model"
    assert sorted(os.listdir(folder)) == ["epoch_2.pth", "model_best.pth", "model_last.pth"]
    best, last = (
        load_checkpoint(folder / "model_best.pth"),
        load_checkpoint(folder / "model_last.pth"),
    )
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert best["best_metric_value"] == last["best_metric_value"] == 0.5
    keys = {"epoch", "state_dict", "optimizer", "scheduler", "scaler", "best_metric_value"}
    assert set(last) == keys
    assert type(last["best_metric_value"]) is float
    assert last["scaler"] is None
    assert set(last["state_dict"]) == set(tiny.TinyNet().state_dict())


def test_the_best_metric_survives_resuming(tmp_path):
    hooks = [dict(type="CheckpointLoader"), dict(type="kd.Scripted", values=[0.6, 0.2, 0.5])]
    hooks.append(dict(type="CheckpointSaver", save_freq=1))
    run(tmp_path, hooks=hooks)
    trainer = run(
        tmp_path, hooks=hooks, resume=True, weight=str(tmp_path / "model" / "epoch_1.pth")
    )
    assert trainer.best_metric_value == 0.6
    assert load_checkpoint(tmp_path / "model" / "model_best.pth")["epoch"] == 1


def test_without_an_evaluator_no_best_file_is_written(tmp_path):
    run(tmp_path, hooks=[dict(type="CheckpointSaver")], epoch=1, eval_epoch=1)
    assert os.listdir(tmp_path / "model") == ["model_last.pth"]
    assert "No evaluator stands before CheckpointSaver" in (tmp_path / "train.log").read_text()


def test_the_best_file_is_there_before_the_last_one_says_so(tmp_path, monkeypatch):
    from pointcept_kd.host import hooks as module

    written = []
    monkeypatch.setattr(module, "save_atomic", lambda obj, path: written.append(path.name))
    monkeypatch.setattr(module, "copy_atomic", lambda source, path: written.append(path.name))
    CheckpointSaver._write({}, tmp_path, ["model_best.pth", "epoch_1.pth", "model_last.pth"])
    assert written == ["model_best.pth", "epoch_1.pth", "model_last.pth"]


PAIR = dict(
    type="kd.TinyPair", student=dict(model=dict(type="kd.TinyNet")), teacher=dict(weight="random")
)


def test_a_distillers_student_is_exported_with_plain_keys(tmp_path):
    trainer = run(tmp_path, model=PAIR)
    folder = tmp_path / "model"
    names = ["model_best.pth", "model_last.pth", "student_best.pth", "student_last.pth"]
    assert sorted(os.listdir(folder)) == names
    student = load_checkpoint(folder / "student_last.pth")
    assert set(student) == {"epoch", "state_dict"}
    assert set(student["state_dict"]) == set(tiny.TinyNet().state_dict())
    assert torch.equal(
        student["state_dict"]["seg_head.weight"], trainer.model.student.seg_head.weight
    )
    assert "adapter.weight" in load_checkpoint(folder / "model_last.pth")["state_dict"]
    epochs = [
        load_checkpoint(folder / f"{kind}_best.pth")["epoch"] for kind in ("model", "student")
    ]
    assert epochs[0] == epochs[1]


# ---------------------------------------------------------------------------------------- loader


def loaded(path, weight, **arguments):
    changes = {k: arguments.pop(k) for k in ("resume", "model") if k in arguments}
    hooks = [dict(type="CheckpointLoader", **arguments)]
    return Trainer(tiny_config(path, weight=str(weight), hooks=hooks, **changes))


def test_loading_with_renamed_keys(tmp_path):
    source = tiny.TinyNet()
    state = {f"module.student.{k}": v for k, v in source.state_dict().items()}
    save_atomic({"epoch": 1, "state_dict": state}, tmp_path / "d.pth")
    trainer = loaded(
        tmp_path / "exp", tmp_path / "d.pth", keywords="module.student.", replacement="module."
    )
    assert torch.equal(trainer.model.seg_head.weight, source.seg_head.weight)
    trainer.call_hooks("before_train")
    assert "weights loaded" in (tmp_path / "exp" / "train.log").read_text()


@pytest.mark.parametrize("case", ["missing", "corrupt", "width", "foreign", "not resumable"])
def test_a_weight_that_cannot_be_used_stops_before_anything_is_written(tmp_path, case):
    path, exp = tmp_path / "w.pth", tmp_path / "exp"
    width = 16 if case == "width" else 8
    state = tiny.TinyNet(width=width).state_dict()
    if case == "foreign":
        state = {f"encoder.{k}": v for k, v in state.items()}
    if case != "missing":
        save_atomic({"state_dict": state}, path)
    if case == "corrupt":
        path.write_bytes(path.read_bytes()[:300])
    text = {
        "missing": "does not exist",
        "corrupt": "cut off or damaged",
        "width": r"another width.*backbone\.0\.weight is \(16, 4\) in the file, \(8, 4\) in the model",
        "foreign": "matches only 0 of",
        "not resumable": "has no epoch, optimizer, scheduler",
    }[case]
    with pytest.raises(InputError, match=text):
        loaded(exp, path, resume=case == "not resumable")
    assert not exp.exists()


def test_resuming_with_another_schedule_or_optimizer(tmp_path):
    run(tmp_path / "a")
    last = str(tmp_path / "a" / "model" / "model_last.pth")
    with pytest.raises(InputError, match="cannot resume.*total_steps"):
        Trainer(tiny_config(tmp_path / "b", resume=True, weight=last, epoch=5, eval_epoch=5))
    groups = [dict(keyword="seg_head", lr=0.01)]
    with pytest.raises(InputError, match="param"):
        Trainer(tiny_config(tmp_path / "b", resume=True, weight=last, param_dicts=groups))
    assert not (tmp_path / "b").exists()


def test_a_loader_without_check_still_loads(tmp_path):
    source = tiny.TinyNet()
    save_atomic({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    trainer = Trainer(tiny_config(tmp_path / "exp", hooks=[]))
    trainer.cfg.weight = str(tmp_path / "w.pth")
    hook = CheckpointLoader()
    hook.trainer = trainer
    hook.before_train()
    assert torch.equal(trainer.model.seg_head.weight, source.seg_head.weight)


# ----------------------------------------------------------------------------- precise and others


def test_precise_evaluation_uses_the_best_checkpoint(tmp_path):
    hooks = [dict(type="kd.Scripted", values=[0.9, 0.1, 0.1]), dict(type="CheckpointSaver")]
    trainer = run(tmp_path, hooks=[*hooks, dict(type="PreciseEvaluator")])
    best = load_checkpoint(tmp_path / "model" / "model_best.pth")["state_dict"]
    assert torch.equal(trainer.model.seg_head.weight, best["seg_head.weight"])
    assert "of epoch 1" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "result" / "metrics.json").is_file()


def test_precise_evaluation_without_a_best_checkpoint(tmp_path):
    hooks = [dict(type="CheckpointSaver"), dict(type="PreciseEvaluator")]
    trainer = run(tmp_path, hooks=hooks, evaluate=False)
    last = load_checkpoint(tmp_path / "model" / "model_last.pth")["state_dict"]
    assert torch.equal(trainer.model.seg_head.weight, last["seg_head.weight"])
    text = (tmp_path / "train.log").read_text()
    assert text.count("testing the model of the last epoch") == 1


def test_weight_decay_follows_a_cosine(tmp_path):
    hooks = [dict(type="WeightDecaySchedular", base_value=0.04, final_value=0.2)]
    run(tmp_path, hooks=hooks, epoch=2, eval_epoch=2)
    values = [
        row["value"] for row in read_jsonl(tmp_path / "log.jsonl") if row["tag"] == "params/wd"
    ]
    import math

    expected = [0.2 + 0.5 * (0.04 - 0.2) * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert values == pytest.approx(expected)


def test_garbage_is_collected_at_intervals(tmp_path):
    states = []

    class Watch(HookBase):
        def before_step(self):
            states.append(gc.isenabled())

    kd.HOOKS.register_module("Watch", force=True, module=Watch)
    try:
        run(
            tmp_path,
            hooks=[dict(type="GarbageHandler", interval=2), dict(type="kd.Watch")],
            epoch=1,
            eval_epoch=1,
        )
        assert states == [False] * 3
        assert gc.isenabled()
    finally:
        gc.enable()
    assert GarbageHandler().interval == 150
