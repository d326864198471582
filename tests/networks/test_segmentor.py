"""Segmentors: what they return when, for backbones of every kind."""

import pytest
import torch
from torch import nn

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.point import Point
from pointcept_kd.networks import DefaultSegmentor, DefaultSegmentorV2

from .clouds import cloud

CRITERIA = [{"type": "CrossEntropyLoss", "loss_weight": 1.0, "ignore_index": -1}]
PTV3 = {
    "type": "PT-v3m1",
    "in_channels": 4,
    "stride": (2,),
    "enc_depths": (1, 1),
    "enc_channels": (8, 16),
    "enc_num_head": (1, 2),
    "enc_patch_size": (16, 16),
    "dec_depths": (1,),
    "dec_channels": (8,),
    "dec_num_head": (1,),
    "dec_patch_size": (16,),
    "enable_flash": False,
}
SPUNET = {
    "type": "SpUNet-v1m1",
    "in_channels": 4,
    "num_classes": 3,
    "base_channels": 8,
    "channels": (8,) * 8,
    "layers": (1,) * 8,
}


def build(kind, **config):
    return MODELS.build({"type": kind, "criteria": CRITERIA, **config})


def models():
    spunet = {**SPUNET, "num_classes": 0}
    return {
        "logits": build("DefaultSegmentor", backbone=SPUNET),
        "point": build("DefaultSegmentorV2", num_classes=3, backbone_out_channels=8, backbone=PTV3),
        "tensor": build(
            "DefaultSegmentorV2", num_classes=3, backbone_out_channels=8, backbone=spunet
        ),
        "encoder": build(
            "DefaultSegmentorV2",
            num_classes=3,
            backbone_out_channels=24,
            backbone={**PTV3, "enc_mode": True},
        ),
    }


@pytest.mark.parametrize("name", ["logits", "point", "tensor", "encoder"])
def test_what_comes_back(name):
    model, batch = models()[name], cloud([50, 30])
    out = model(batch)
    assert out.keys() == {"loss"}
    assert out["loss"].shape == ()
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    out = model(batch)
    assert out.keys() == {"loss", "seg_logits"}
    assert out["seg_logits"].shape == (80, 3)
    expected = nn.functional.cross_entropy(out["seg_logits"], batch["segment"], ignore_index=-1)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    del batch["segment"]
    assert model(batch).keys() == {"seg_logits"}


def test_keys():
    names = models()
    assert all(k.startswith("backbone.") for k in names["logits"].state_dict())
    rest = {k for k in names["point"].state_dict() if not k.startswith("backbone.")}
    assert rest == {"seg_head.weight", "seg_head.bias"}


def test_return_point():
    model, batch = models()["point"].eval(), cloud([50, 30])
    out = model(batch, return_point=True)
    assert isinstance(out["point"], Point)
    assert torch.equal(model.seg_head(out["point"].feat), out["seg_logits"])
    model.train()
    assert model(batch, return_point=True).keys() == {"loss", "point"}


def test_encoder_features_are_handed_down():
    model, batch = models()["encoder"].eval(), cloud([50, 30])
    coarse = model.backbone(batch)
    parent, cell = coarse.pooling_parent, coarse.pooling_inverse
    expected = torch.stack([torch.cat([parent.feat[i], coarse.feat[cell[i]]]) for i in range(80)])
    out = model(batch, return_point=True)
    assert torch.equal(out["point"].feat, expected)
    assert "pooling_parent" not in out["point"]


def test_without_a_head():
    model = build(
        "DefaultSegmentorV2", num_classes=0, backbone_out_channels=8, backbone=PTV3
    ).eval()
    batch = cloud([20])
    del batch["segment"]
    assert model(batch)["seg_logits"].shape == (20, 8)
    assert not any(k.startswith("seg_head") for k in model.state_dict())


def test_frozen_backbone():
    model = build(
        "DefaultSegmentorV2",
        num_classes=3,
        backbone_out_channels=8,
        backbone=PTV3,
        freeze_backbone=True,
    )
    before = model.backbone.embedding.stem.norm.running_mean.clone()
    model(cloud([50]))["loss"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "seg_head.weight",
        "seg_head.bias",
    }
    assert not torch.equal(before, model.backbone.embedding.stem.norm.running_mean), (
        "statistics still move"
    )


class Names(nn.Module):
    """A backbone that shows the condition it was given."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, batch):
        self.seen = batch.get("condition")
        return batch["feat"][:, :3]


def test_the_first_condition_stands_for_the_batch():
    model = DefaultSegmentor(Names(), CRITERIA).eval()
    batch = {**cloud([5]), "condition": ["ScanNet", "S3DIS"]}
    model(batch)
    assert model.backbone.seen == "ScanNet"
    assert batch["condition"] == ["ScanNet", "S3DIS"]
    model({**batch, "condition": "S3DIS"})
    assert model.backbone.seen == "S3DIS"


def test_no_criteria_passes_the_logits_through():
    model = DefaultSegmentorV2(3, 3, Names())
    batch = cloud([5])
    assert torch.equal(model(batch)["loss"], model.seg_head(batch["feat"][:, :3]))


def test_registration_and_bad_config():
    assert (
        MODELS.get("DefaultSegmentorV2")
        is MODELS.get("kd.DefaultSegmentorV2")
        is DefaultSegmentorV2
    )
    assert MODELS.get("DefaultSegmentor") is MODELS.get("kd.DefaultSegmentor") is DefaultSegmentor
    with pytest.raises(InputError, match="PT-v3m1"):
        build(
            "DefaultSegmentorV2",
            num_classes=3,
            backbone_out_channels=8,
            backbone={"type": "PTv3m1"},
        )
    with pytest.raises(InputError, match="enc_depth"):
        build(
            "DefaultSegmentorV2",
            num_classes=3,
            backbone_out_channels=8,
            backbone={**PTV3, "enc_depth": (1,)},
        )
