"""The linear probe: what it reads, what it changes, and what it refuses."""

import copy

import pytest
import torch

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.metrics import confusion, summary
from pointcept_kd.host.point import Point
from pointcept_kd.networks import LinearProbe

from .clouds import cloud, randomise_norms

CRITERIA = [
    dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
    dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
]
UNET = dict(
    type="kd.ResidualUNet", in_channels=4, num_classes=0, base_channels=4,
    channels=(4, 4, 6, 6, 6, 4, 4, 5), layers=(1,) * 8,
)  # fmt: skip
GRID = dict(
    low=(-3.2, -3.2, -2.0), high=(3.2, 3.2, 2.0), shape=(64, 64, 40), frame="cartesian", spacing="n"
)
BACKBONES = [(UNET, 5)] + [
    (dict(type=f"kd.{name}", in_channels=4, partition=GRID), width)
    for name, width in (("VoxelBackBone8x", 128), ("UNetV2", 16))
]


def batch():
    return cloud((60, 45))


def probe(backbone, width):
    torch.manual_seed(0)
    model = LinearProbe(3, width, backbone, CRITERIA)
    randomise_norms(model.backbone)
    return model


@pytest.mark.parametrize(("backbone", "width"), BACKBONES, ids=lambda v: str(v)[:30])
def test_only_the_layer_learns(backbone, width):
    model, data = probe(backbone, width), batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    losses = []
    for step in range(6):
        model.train()  # what a trainer calls, and the evaluator's opposite
        assert model.training
        assert model.final.training
        assert not any(m.training for m in model.backbone.modules())
        loss = model(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 3:
            model.eval()
            model(data)
            model.backbone.train()  # also one who reaches past the segmentor
            model.train()
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"final.weight", "final.bias"}
    assert any("running_mean" in key for key in after)
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.backbone.parameters())


def test_it_is_a_linear_layer_on_the_features():
    model, data = probe(*BACKBONES[0]), batch()
    features = model.features(data)
    assert not features.requires_grad
    expected = features @ model.final.weight.T + model.final.bias
    model.eval()
    out = model(data)
    torch.testing.assert_close(out["seg_logits"], expected)
    torch.testing.assert_close(out["loss"], build_criteria(CRITERIA)(expected, data["segment"]))
    # In training too: features of a frozen network do not depend on what a batch holds.
    model.train()
    torch.testing.assert_close(model(data)["loss"], out["loss"])
    alone = {k: v for k, v in data.items() if k != "segment"}
    assert set(model.eval()(alone)) == {"seg_logits"}


def test_a_point_is_read_by_its_features():
    class Doubled(torch.nn.Module):
        def forward(self, batch):
            return Point({**batch, "feat": 2 * batch["feat"]})

    model, data = LinearProbe(3, 4, Doubled(), CRITERIA), batch()
    assert torch.equal(model.features(data), 2 * data["feat"])


def test_by_its_registered_name():
    model = MODELS.build(
        dict(type="kd.LinearProbe", num_classes=3, backbone_out_channels=5, backbone=UNET)
    )
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        "final.weight",
        "final.bias",
    }


def test_refusals():
    with pytest.raises(InputError, match="backbone_out_channels=0"):
        LinearProbe(3, 0, torch.nn.Identity(), CRITERIA)
    model = LinearProbe(3, 6, UNET, CRITERIA)
    with pytest.raises(InputError, match=r"gives \(105, 5\) for 105 rows; expected \(105, 6\)"):
        model(batch())
    model = LinearProbe(3, 5, dict(UNET, num_classes=5, class_level=5), CRITERIA)
    with pytest.raises(InputError, match="gives dict for 105 rows"):
        model(batch())


# The criteria and scores of the downstream tasks, worked by hand; class 0 of the labels is the ignored one there, so
# classes and labels are one lower here.


def test_scores_by_hand():
    """Predictions 1 1 2 3 0 2 1 and labels 1 2 2 3 1 0 0 of four classes, 0 ignored: IoU 1/3, 1/2, 1."""
    pred = torch.tensor([1, 1, 2, 3, 0, 2, 1])
    truth = torch.tensor([1, 2, 2, 3, 1, 0, 0])
    scores = summary(confusion(pred, truth, 4, 0))
    assert scores.iou[1:] == pytest.approx([1 / 3, 1 / 2, 1])
    assert sum(scores.iou[1:]) / 3 == pytest.approx(0.611111, abs=1e-6)


def test_the_losses_by_hand():
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 0]])
    labels = torch.tensor([0, 1, 2, 1])
    first, second = (build_criteria([entry])(logits, labels).item() for entry in CRITERIA)
    assert first == pytest.approx(0.436977, abs=1e-6)
    assert second == pytest.approx(0.327276, abs=1e-6)
    assert build_criteria(CRITERIA)(logits, labels).item() == pytest.approx(0.764253, abs=1e-6)
    # Rows without a label take no part.
    more = torch.cat([logits, torch.randn(3, 3)])
    ignored = torch.cat([labels, torch.full((3,), -1)])
    assert build_criteria(CRITERIA)(more, ignored).item() == pytest.approx(0.764253, abs=1e-6)
