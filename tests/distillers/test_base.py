"""The distiller around small networks: what it returns, what it leaves alone, what it saves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pointcept_kd.distillers.base import Distiller, Term
from pointcept_kd.distillers.logits import logit_kl
from pointcept_kd.host import MODELS, TERMS, InputError


class Segmentor(nn.Module):
    """A segmentor by the host's rules: a loss in training, scores in evaluation."""

    def __init__(self, width=8, classes=4, drop=0.0):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(drop)
        )
        self.seg_head = nn.Linear(width, classes)
        self.shuffle_orders = True

    def forward(self, input_dict):
        scores = self.seg_head(self.backbone(input_dict["feat"]))
        if "segment" not in input_dict:
            return {"seg_logits": scores}
        loss = nn.functional.cross_entropy(scores, input_dict["segment"], ignore_index=-1)
        return {"loss": loss} if self.training else {"loss": loss, "seg_logits": scores}


class TaskGradient(Term):
    """Reads the gradient of each network's task loss at its tap."""

    needs_teacher_grad = True

    def taps(self):
        return {"hidden"}, {"hidden"}

    def forward(self, student, teacher, batch):
        (of_teacher,) = torch.autograd.grad(teacher.loss, teacher["hidden"].feat)
        (of_student,) = torch.autograd.grad(student.loss, student["hidden"].feat, retain_graph=True)
        weights = of_student.abs().mean(0), of_teacher.abs().mean(0)
        maps = student["hidden"].feat @ weights[0], teacher["hidden"].feat.detach() @ weights[1]
        return (maps[0] - maps[1]).square().mean()


@pytest.fixture(autouse=True)
def _register():
    MODELS.register_module("TestSegmentor", module=Segmentor, force=True)
    TERMS.register_module("TestTaskGradient", module=TaskGradient, force=True)


def net(**kwargs):
    return dict(type="TestSegmentor", **kwargs)


def guest(taps=None, weight="random", **kwargs):
    return dict(model=net(width=16, drop=0.5, **kwargs), weight=weight, taps=taps or {})


def make(terms, student=None, teacher=None, **kwargs):
    return Distiller(
        student=student or dict(model=net()), teacher=teacher or guest(), terms=terms, **kwargs
    )


def batch(n=12):
    return {"feat": torch.randn(n, 3), "segment": torch.randint(0, 4, (n,))}


LOGITS = dict(type="LogitKL", temperature=2.0, weight=0.3)
HIDDEN = {"hidden": "backbone"}
MATCH = dict(type="kd.FeatureMatch", tap="hidden", channels=(8, 16), weight=2.0)


def test_total_is_the_weighted_sum_and_everything_is_a_scalar():
    model = make(
        dict(logits=LOGITS, hidden=MATCH),
        student=dict(model=net(), taps=HIDDEN),
        teacher=guest(HIDDEN),
        task_weight=0.5,
    )
    out = model(batch())
    assert set(out) == {
        "loss", "loss_task", "loss_logits", "weighted_logits", "loss_hidden", "weighted_hidden",
    }  # fmt: skip
    assert all(v.dim() == 0 for v in out.values())
    expected = 0.5 * out["loss_task"] + 0.3 * out["loss_logits"] + 2.0 * out["loss_hidden"]
    torch.testing.assert_close(out["loss"], expected)
    assert out["loss"].requires_grad
    assert not out["loss_logits"].requires_grad


def test_logit_term_sees_both_networks():
    model = make(dict(logits=LOGITS))
    data = batch()
    teacher = model.teachers["teacher"].network
    scores_t = teacher({"feat": data["feat"]})["seg_logits"]
    scores_s = model.student.seg_head(model.student.backbone(data["feat"]))
    torch.testing.assert_close(
        model(data)["loss_logits"], logit_kl(scores_s, scores_t, temperature=2.0)
    )


def test_the_teacher_is_a_guest():
    model = make(dict(logits=LOGITS))
    teacher = model.teachers["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model.train()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(batch())["loss"].backward()
        optimizer.step()
    assert not teacher.training
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any("teacher" in key for key in model.state_dict())
    assert teacher.shuffle_orders is False
    assert model.student.shuffle_orders is True
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_teacher_follows_device_and_dtype():
    model = make(dict(logits=LOGITS)).double()
    assert next(model.teachers["teacher"].network.parameters()).dtype == torch.float64
    model.to("meta")
    assert next(model.teachers["teacher"].network.parameters()).device.type == "meta"


def test_evaluation_is_the_students():
    model = make(dict(logits=LOGITS)).eval()
    data = batch()
    ours, alone = model(data), model.student(data)
    assert set(ours) == {"loss", "seg_logits"}
    assert torch.equal(ours["seg_logits"], alone["seg_logits"])
    assert set(model({"feat": data["feat"]})) == {"seg_logits"}


def test_the_export_loads_strictly_into_the_plain_student():
    model = make(dict(hidden=MATCH), dict(model=net(), taps=HIDDEN), guest(HIDDEN))
    plain = Segmentor()
    plain.load_state_dict(model.export_state_dict(), strict=True)
    data = batch()
    assert torch.equal(plain.eval()(data)["seg_logits"], model.eval()(data)["seg_logits"])
    assert any(key.startswith("terms.hidden.adapter") for key in model.state_dict())


def test_teacher_weights_from_every_kind_of_file(tmp_path):
    source = Segmentor(width=16)
    plain = source.state_dict()
    files = {
        "raw": plain,
        "trained": {"epoch": 3, "state_dict": plain},
        "parallel": {"state_dict": {f"module.{k}": v for k, v in plain.items()}},
        "distilled": {
            "state_dict": {f"student.{k}": v for k, v in plain.items()}
            | {"terms.x.w": plain["seg_head.bias"]}
        },
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        model = make(dict(logits=LOGITS), teacher=guest(weight=str(path)))
        loaded = model.teachers["teacher"].network.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in plain.items()), name


def test_teacher_weights_that_do_not_fit_are_refused(tmp_path):
    short = Segmentor(width=16).state_dict()
    del short["seg_head.bias"]
    torch.save({"state_dict": short}, tmp_path / "short.pth")
    torch.save({"state_dict": Segmentor(width=4).state_dict()}, tmp_path / "narrow.pth")
    for name, says in (
        ("short", "seg_head.bias"),
        ("narrow", "another width"),
        ("no", "does not exist"),
    ):
        with pytest.raises(InputError, match=says):
            make(dict(logits=LOGITS), teacher=guest(weight=str(tmp_path / f"{name}.pth")))
    with pytest.raises(InputError, match="teacher teacher has no weight"):
        make(dict(logits=LOGITS), teacher=guest(weight=None))


def test_several_teachers():
    teachers = dict(first=guest(), second=guest())
    terms = dict(a=dict(type="LogitKL"), b=dict(type="LogitKL", teacher="second"))
    model = make(terms, teacher=teachers)
    data = batch()
    out = model(data)
    assert out["loss_a"] != out["loss_b"]
    terms["b"]["teacher"] = "third"
    with pytest.raises(InputError, match="no teacher 'third'"):
        make(terms, teacher=teachers)


def test_terms_can_be_switched_off():
    model = make(dict(a=dict(type="LogitKL", weight=0.0), b=None, c=LOGITS))
    assert list(model.terms) == ["c"]
    alone = make({})
    out = alone(batch())
    torch.testing.assert_close(out["loss"], out["loss_task"])


def test_a_term_that_needs_the_teachers_gradient():
    model = make(
        dict(map=dict(type="TestTaskGradient")), dict(model=net(), taps=HIDDEN), guest(HIDDEN)
    )
    data = batch()
    model(data)["loss"].backward()
    teacher = model.teachers["teacher"].network
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.student.parameters())
    # The teacher's tap is a leaf with the loss's gradient: check against the closed form of cross entropy.
    outputs = model.teachers["teacher"](data)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs["hidden"].feat)
    probability = outputs["logits"].feat.softmax(1)
    truth = nn.functional.one_hot(data["segment"], 4)
    expected = (probability - truth) / 12 @ teacher.seg_head.weight
    torch.testing.assert_close(gradient, expected)


def test_terms_run_in_float32_under_autocast():
    model = make(dict(logits=LOGITS, hidden=MATCH), dict(model=net(), taps=HIDDEN), guest(HIDDEN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch())
    assert out["loss_logits"].dtype == torch.float32
    assert out["loss_hidden"].dtype == torch.float32
    out["loss"].backward()


def test_taps_that_a_term_misses_are_named():
    with pytest.raises(InputError, match="reads tap hidden of the student"):
        make(dict(hidden=MATCH))
    with pytest.raises(InputError, match="reads tap hidden of the teacher"):
        make(dict(hidden=MATCH), dict(model=net(), taps=HIDDEN))
    with pytest.raises(InputError, match="nearest: backbone"):
        make({}, dict(model=net(), taps=dict(x="backbon")))


def test_the_batch_is_left_alone():
    model = make(dict(logits=LOGITS))
    data = batch()
    keys = set(data)
    model(data)
    assert set(data) == keys


class Watching(Term):
    """Has something to say once per epoch."""

    def forward(self, student, teacher, batch):
        self.seen = student["logits"].feat.detach().std()
        return student["logits"].feat.square().mean()

    def watched(self):
        return {"deviation": self.seen}


def test_what_terms_watch_is_logged_once_per_epoch():
    TERMS.register_module("TestWatching", module=Watching, force=True)
    model = make(dict(watch=dict(type="TestWatching"), kl=dict(type="kd.LogitKL"))).train()
    model(batch())
    lines, scalars = [], []
    model.trainer = SimpleNamespace(
        epoch=2,
        logger=SimpleNamespace(info=lines.append),
        writer=SimpleNamespace(add_scalar=lambda *args: scalars.append(args)),
    )
    model.after_epoch()
    seen = float(model.terms["watch"].seen)
    assert lines == [f"Term watch: deviation {seen:.4g}"]
    assert scalars == [("watch/deviation", seen, 3)]
