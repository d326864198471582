"""Distillation between views and modalities: matched rows, adapted features on chosen rows, a teacher left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointcept_kd.distillers import cross_modal, views
from pointcept_kd.distillers.base import Distiller, Outputs
from pointcept_kd.distillers.features import feature_mse
from pointcept_kd.distillers.logits import logit_kl
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.loader import collate_fn


class Net(nn.Module):
    """Class scores of points from a hidden layer; every result depends on one row alone."""

    def __init__(self, width=6, classes=4, drop=0.0):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(drop))
        self.pooled = nn.AdaptiveAvgPool1d(1)
        self.seg_head = nn.Linear(width, classes)

    def forward(self, batch):
        x = self.hidden(batch["feat"])
        self.pooled(x[:2])
        scores = self.seg_head(x)
        out = {"seg_logits": scores}
        if "segment" in batch:
            out["loss"] = F.cross_entropy(scores, batch["segment"], ignore_index=-1)
        return {"loss": out["loss"]} if self.training else out


@pytest.fixture(autouse=True)
def _networks():
    torch.manual_seed(0)
    MODELS.register_module("TestTwoViews", module=Net, force=True)


def scan(student, teacher, match=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    match = torch.randint(0, teacher, (student,), generator=g) if match is None else match
    return {
        "feat": torch.randn(student, 3, generator=g),
        "segment": torch.randint(-1, 4, (student,), generator=g),
        "offset": torch.tensor([student]),
        "teacher_feat": torch.randn(teacher, 3, generator=g),
        "teacher_offset": torch.tensor([teacher]),
        "match": match,
    }


def pair(terms, view="teacher_", **settings):
    return Distiller(
        student=dict(model=dict(type="TestTwoViews"), taps=dict(point="hidden")),
        teacher=dict(
            model=dict(type="TestTwoViews", width=8, drop=0.5),
            weight="random",
            taps=dict(point="hidden", **settings.pop("taps", {})),
            view=view,
        ),
        terms=terms,
        **settings,
    )


FEATURE = dict(type="kd.AdaptedFeature", tap="point", channels=(6, 8))
LOGITS = dict(type="kd.LogitKL", temperature=1.0)


# ------------------------------------------------------------------------------ rows that belong together


def test_match_by_hand():
    # Eight raw points, five of the key frame; the student's voxels stand for raw points 0, 2, 3, 4.
    inverse, stands_for = torch.tensor([0, 0, 1, 2, 1, 3, 3, 0]), torch.tensor([0, 2, 3, 4])
    match = inverse[stands_for]
    alone = {"match": match, "offset": torch.tensor([4]), "teacher_offset": torch.tensor([4])}
    assert views.matched_rows(alone, "teacher_").tolist() == [0, 1, 2, 1]
    second = {
        "match": torch.cat([torch.zeros(3, dtype=torch.long), match]),
        "offset": torch.tensor([3, 7]),
        "teacher_offset": torch.tensor([7, 11]),
    }
    assert views.matched_rows(second, "teacher_").tolist() == [0, 0, 0, 7, 8, 9, 8]


def test_terms_see_the_teacher_row_by_row():
    model = pair(dict(logits=LOGITS, feature=FEATURE))
    scans = [scan(5, 9, seed=1), scan(4, 3, seed=2), scan(6, 6, seed=3)]
    out = model(collate_fn(scans))
    teacher = model.teachers["teacher"].network
    scores, features = [], []
    for one in scans:  # one scan and one point at a time
        seen = teacher({"feat": one["teacher_feat"]})["seg_logits"]
        hidden = teacher.hidden(one["teacher_feat"])
        for row in one["match"].tolist():
            scores.append(seen[row])
            features.append(hidden[row])
    batch = collate_fn(scans)
    model.student.train()
    hidden = model.student.hidden(batch["feat"])
    expected = logit_kl(model.student.seg_head(hidden), torch.stack(scores), temperature=1.0)
    torch.testing.assert_close(out["loss_logits"], expected)
    adapted = model.terms["feature"].adapter(hidden)
    torch.testing.assert_close(out["loss_feature"], feature_mse(adapted, torch.stack(features)))


def test_the_students_coordinates_do_not_matter():
    model = pair(dict(logits=LOGITS, feature=FEATURE))
    batch = collate_fn([scan(5, 9, seed=1)])
    turned = {**batch, "coord": torch.randn(5, 3), "teacher_coord": torch.randn(9, 3)}
    first, second = model(batch), model(turned)
    assert first["loss_logits"] == second["loss_logits"]


def test_the_teacher_is_left_alone():
    model = pair(dict(logits=LOGITS, feature=FEATURE)).train()
    teacher = model.teachers["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        model.train()
        out = model(collate_fn([scan(5, 9, seed=seed), scan(4, 3, seed=seed + 9)]))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert not teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("teacher" in key for key in model.state_dict())
    assert not any("adapter" in key for key in model.export_state_dict())
    assert any("adapter" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(match=torch.tensor([0, 9])), "match names a row"),
        (dict(match=torch.tensor([-1, 0])), "match names a row"),
        (dict(match=torch.tensor([0])), "match has 1 rows"),
        (dict(teacher_offset=torch.tensor([3, 6])), "1 scans and 2"),
    ],
)
def test_rows_that_are_not_there(change, text):
    batch = {**scan(2, 9), **change}
    with pytest.raises(InputError, match=text):
        views.matched_rows(batch, "teacher_")


def test_what_a_view_cannot_do():
    model = pair(dict(logits=LOGITS))
    with pytest.raises(InputError, match="no teacher_offset and no match"):
        model(
            {
                "feat": torch.randn(4, 3),
                "segment": torch.zeros(4).long(),
                "offset": torch.tensor([4]),
            }
        )
    with pytest.raises(InputError, match="tap pooled: 2 rows for 9 points"):
        pair(dict(logits=LOGITS), taps=dict(pooled="pooled"))(collate_fn([scan(5, 9)]))
    with pytest.raises(InputError, match="view of its own, which a cache"):
        pair(dict(logits=LOGITS), teacher_cache="nowhere")
    gradient = dict(type="kd.GradientGuided", tap="point", normalize="minmax")
    with pytest.raises(InputError, match="differentiates teacher teacher, which has a view"):
        pair(dict(gradient=gradient))


# ------------------------------------------------------------------------------ adapted features


def outputs(feat):
    return Outputs(point=Activation(feat))


def plain(**settings):
    """The term with an adapter that changes nothing in evaluation."""
    settings = {"activation": "none", **settings}
    term = cross_modal.AdaptedFeature("point", (2, 2), **settings).eval()
    nn.init.eye_(term.adapter[0].weight)
    nn.init.zeros_(term.adapter[0].bias)
    term.adapter[1].eps = 0.0
    return term


STUDENT = torch.tensor([[1.0, 2], [3, 4], [0, -1]])
TEACHER = torch.tensor([[1.0, 0], [0, 4], [2, 1]])


def test_squared_error_by_hand():
    batch = {"segment": torch.tensor([0, -1, 2]), "offset": torch.tensor([3])}
    values = {
        rows: plain(rows=rows)(outputs(STUDENT), outputs(TEACHER), batch).item()
        for rows in ("all", "labelled", "visible", "unseen")
    }
    # (0 + 4 + 9 + 0 + 4 + 4) / 6 and, without row 1, (4 + 8) / 4; nothing is visible without cameras.
    assert values == pytest.approx({"all": 3.5, "labelled": 3.0, "visible": 0.0, "unseen": 3.5})


def test_min_max_by_hand():
    term = cross_modal.AdaptedFeature("point", (3, 3), activation="none", normalize=True).eval()
    nn.init.eye_(term.adapter[0].weight)
    nn.init.zeros_(term.adapter[0].bias)
    student, teacher = (
        torch.tensor([[1.0, 2, 3], [0, 5, 10]]),
        torch.tensor([[3.0, 2, 1], [0, 1, 4]]),
    )
    value = term(outputs(student), outputs(teacher), {"offset": torch.tensor([2])})
    assert value.item() == pytest.approx(0.34375)
    assert (cross_modal.min_max(torch.full((2, 3), 7.0)) == 0).all()


def test_rows_of_views():
    batch = {
        "offset": torch.tensor([3, 5]),
        "view_point": torch.tensor([2, 0, 1, 1]),
        "view_offset": torch.tensor([2, 4]),
    }
    seen = cross_modal.chosen_rows(batch, "visible", 5, -1)
    assert seen.tolist() == [True, False, True, False, True]
    assert cross_modal.chosen_rows(batch, "unseen", 5, -1).tolist() == (~seen).tolist()
    assert cross_modal.chosen_rows(batch, "all", 5, -1) is None
    with pytest.raises(InputError, match="view_point names a point"):
        cross_modal.chosen_rows(
            {**batch, "view_point": torch.tensor([2, 0, 1, 2])}, "visible", 5, -1
        )
    with pytest.raises(InputError, match="no segment"):
        cross_modal.chosen_rows(batch, "labelled", 5, -1)


def test_adapter_is_linear_norm_and_relu():
    term = cross_modal.AdaptedFeature("point", (3, 5)).train()
    student = torch.randn(40, 3, requires_grad=True)
    teacher = torch.randn(40, 5, requires_grad=True)
    value = term(outputs(student), outputs(teacher), {"offset": torch.tensor([40])})
    x = student @ term.adapter[0].weight.T + term.adapter[0].bias
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(value, (x.clamp(min=0) - teacher).square().mean())
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    # The published pair's adapter.
    term = cross_modal.AdaptedFeature("point", (256, 512))
    assert sum(p.numel() for p in term.parameters()) == 132_608


def test_no_row_and_one_row_are_finite():
    term = cross_modal.AdaptedFeature("point", (2, 2), rows="visible").train()
    student = torch.randn(4, 2, requires_grad=True)
    value = term(outputs(student), outputs(torch.randn(4, 2)), {"offset": torch.tensor([4])})
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()
    assert all((p.grad == 0).all() for p in term.parameters())
    term = cross_modal.AdaptedFeature("point", (2, 2)).train()
    before = term.adapter[1].running_mean.clone()
    value = term(outputs(student[:1]), outputs(torch.randn(1, 2)), {"offset": torch.tensor([1])})
    assert torch.isfinite(value)
    assert torch.equal(before, term.adapter[1].running_mean)


def test_bad_arguments():
    with pytest.raises(InputError, match="rows"):
        cross_modal.AdaptedFeature("point", (2, 2), rows="seen")
    with pytest.raises(InputError, match="activation"):
        cross_modal.AdaptedFeature("point", (2, 2), activation="gelu")
    term = cross_modal.AdaptedFeature("point", (3, 2))
    with pytest.raises(InputError, match="student has 2 channels"):
        term(outputs(STUDENT), outputs(TEACHER), {"offset": torch.tensor([3])})
