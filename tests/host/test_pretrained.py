"""Starting from a pre-trained backbone: what is loaded, what is refused, and what a resumed run does."""

import pytest
import torch
from torch import nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.pretrained import check_voxels, load_backbone
from pointcept_kd.host.solver import build_optimizer, build_scheduler
from pointcept_kd.host.trainer import Trainer

from .tiny import CLASSES, HOOKS, tiny_config

CELLS = dict(voxel_size=0.1, degrees=1.0, coordinates="cylindrical")


class Backbone(nn.Module):
    def __init__(self, head=CLASSES, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU())
        self.final = nn.Linear(width, head)

    def forward(self, batch):
        return self.final(self.stem(batch["feat"]))


@kd.MODELS.register_module(force=True)
class PretrainedSegmentor(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.backbone = Backbone(width=width)

    def forward(self, batch):
        logits = self.backbone(batch)
        loss = nn.functional.cross_entropy(logits, batch["segment"], ignore_index=-1)
        return {"loss": loss} if self.training else {"loss": loss, "seg_logits": logits}


def pretrained(width=8, head=32, seed=5):
    """The state dict of a pre-training: a student with two heads, and an image head."""
    torch.manual_seed(seed)
    student = Backbone(head, width)
    student.final_class_level = nn.Linear(width, head)
    student.stem[1].running_mean.normal_()
    state = {f"student.{key}": value for key, value in student.state_dict().items()}
    return {**state, "image.heads.final.weight": torch.randn(32, 3)}


STEM = [
    "stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias", "stem.1.running_mean", "stem.1.running_var",
    "stem.1.num_batches_tracked",
]  # fmt: skip


def test_all_but_the_heads_is_loaded():
    backbone, state = Backbone(), pretrained()
    head = backbone.final.weight.clone()
    loaded, skipped = load_backbone(backbone, state)
    assert loaded == STEM
    assert skipped == [
        "final.weight", "final.bias", "final_class_level.weight", "final_class_level.bias",
    ]  # fmt: skip
    own = backbone.state_dict()
    for key in STEM:
        assert torch.equal(own[key], state[f"student.{key}"]), key
    assert torch.equal(backbone.final.weight, head)


def test_a_head_of_the_same_width_is_not_loaded_either():
    backbone = Backbone()
    head = backbone.final.weight.clone()
    load_backbone(backbone, pretrained(head=CLASSES))
    assert torch.equal(backbone.final.weight, head)


def test_weights_under_other_names():
    plain = {key.removeprefix("student."): value for key, value in pretrained().items()}
    del plain["image.heads.final.weight"]
    assert load_backbone(Backbone(), plain)[0] == STEM
    # The form of an encoder inside an embedding, with heads beside it.
    deeper = {f"student.backbone.{key}": value for key, value in plain.items()}
    deeper["student.final.weight"] = torch.zeros(3, 3)
    for prefix in ("backbone.", "student.backbone."):
        assert load_backbone(Backbone(), deeper, prefix)[0] == STEM


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("student.stem.0.bias"), r"of its 7 weights 1 missing in the file \(stem\.0\.bias\)"),
        (lambda s: s.pop("student.stem.1.running_var"), r"1 missing in the file \(stem\.1\.running_var\)"),
        (lambda s: s.update({"student.stem.0.weight": torch.zeros(8, 3)}), r"1 of another shape \(stem\.0\.weight\)"),
        (lambda s: s.update({"student.stem.0.bias": "no tensor"}), r"1 of another shape \(stem\.0\.bias\)"),
        (lambda s: s.update({"student.block9.weight": torch.zeros(2)}), r"1 without a place .*\(block9\.weight\)"),
        (lambda s: [s.pop(f"student.{key}") for key in STEM], "7 missing in the file"),
    ],
)  # fmt: skip
def test_a_part_of_a_backbone_is_refused(change, words):
    backbone, state = Backbone(), pretrained()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=words):
        load_backbone(backbone, state, source="file.pth")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_wrong_prefix_is_refused():
    with pytest.raises(InputError, match="no weight starts with 'encoder.'"):
        load_backbone(Backbone(), pretrained(), "encoder.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(voxel_size=0.2), r"other voxels: voxel_size=0.2 \(here 0.1\)"),
        (dict(degrees=0.5), r"degrees=0.5 \(here 1.0\)"),
        (dict(coordinates="cartesian"), r"coordinates='cartesian' \(here 'cylindrical'\)"),
        (dict(voxel_size=0.2, degrees=2.0), r"voxel_size=0.2 \(here 0.1\), degrees=2.0"),
    ],
)
def test_other_voxels_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        check_voxels({**CELLS, **change}, CELLS)


def test_voxels_that_fit():
    check_voxels(CELLS, dict(CELLS))
    check_voxels(None, CELLS)
    check_voxels(CELLS, None)
    # Cartesian cells have no angle.
    square = dict(CELLS, coordinates="cartesian")
    check_voxels(square, dict(square, degrees=7.0))


# As a hook


def config(folder, **changes):
    hook = dict(type="kd.PretrainedBackbone", **changes.pop("hook", {}))
    changes.setdefault("model", dict(type="kd.PretrainedSegmentor"))
    return tiny_config(
        folder / "run", hooks=[hook, *(dict(h) for h in HOOKS[1:])], mix_prob=0, **changes
    )


@pytest.fixture
def weight(tmp_path):
    path = tmp_path / "pretrained.pth"
    torch.save({"state_dict": pretrained(), "voxels": CELLS, "epoch": 9}, path)
    return str(path)


def test_a_run_starts_from_the_backbone(tmp_path, weight):
    trainer = Trainer(config(tmp_path, weight=weight))
    given = load_checkpoint(weight)["state_dict"]
    for key in STEM:
        assert torch.equal(trainer.model.backbone.state_dict()[key], given[f"student.{key}"]), key
    trainer.train()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "7 of 7 weights of backbone loaded: stem.0.weight" in log
    assert "Left out: final.weight, final.bias, final_class_level.weight" in log
    assert trainer.start_epoch == 0


def test_a_resumed_run_goes_on_with_its_own(tmp_path, weight):
    whole = Trainer(config(tmp_path / "whole", weight=weight))
    whole.train()
    cut = Trainer(config(tmp_path / "cut", weight=weight))
    cut.max_epoch = 1
    cut.train()
    last = str(tmp_path / "cut" / "run" / "model" / "model_last.pth")
    again = Trainer(config(tmp_path / "cut", weight=last, resume=True))
    assert again.start_epoch == 1
    again.train()
    expected = whole.model.state_dict()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    # With `required` too, which asks for nothing but a start.
    Trainer(config(tmp_path / "cut", weight=last, resume=True, hook=dict(required=True)))


def test_without_a_weight(tmp_path):
    trainer = Trainer(config(tmp_path))
    trainer.train()
    assert "starts as initialised" in (tmp_path / "run" / "train.log").read_text()
    with pytest.raises(InputError, match="give its checkpoint by --options weight=FILE"):
        Trainer(config(tmp_path / "other", hook=dict(required=True)))
    assert not (tmp_path / "other").exists()


def test_what_stops_a_run_before_it_begins(tmp_path, weight):
    with pytest.raises(InputError, match="stem.0.weight"):
        Trainer(config(tmp_path, weight=weight, model=dict(type="kd.PretrainedSegmentor", width=9)))
    with pytest.raises(
        InputError, match="into='encoder': the model has no such module but backbone"
    ):
        Trainer(config(tmp_path, weight=weight, hook=dict(into="encoder")))
    cfg = config(tmp_path, weight=weight)
    cfg["data"]["train"]["transform"] = [dict(type="kd.VoxelSample", voxel_size=0.2)]
    hook = kd.HOOKS.build(dict(type="PretrainedBackbone"))
    hook.trainer = type("Trainer", (), {"cfg": cfg, "model": kd.MODELS.build(cfg["model"])})
    with pytest.raises(
        InputError, match=r"pretrained.pth was trained on other voxels: voxel_size=0.1"
    ):
        hook.check()
    assert not (tmp_path / "run").exists()


# Rates


def test_the_head_has_a_rate_of_its_own():
    model = kd.MODELS.build(dict(type="PretrainedSegmentor"))
    optimizer = build_optimizer(
        dict(type="SGD", lr=0.02, momentum=0.9, dampening=0.1, weight_decay=1e-4),
        model,
        [dict(keyword="final", lr=2.0)],
    )
    rest, head = optimizer.param_groups
    assert (rest["lr"], head["lr"]) == (0.02, 2.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.backbone.final.parameters()}
    assert len(rest["params"]) == 4
    assert all(group["dampening"] == 0.1 for group in optimizer.param_groups)
    schedule = build_scheduler(dict(type="kd.EpochCosineLR", epochs=2, total_steps=6), optimizer)
    rates = []
    for _ in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([0.02 * f, 2.0 * f]) for f in (1, 1, 1, 0.5, 0.5, 0.5)]


def test_the_cosine_by_epochs_is_torchs():
    weight = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.SGD([weight], lr=0.5) for _ in range(2))
    schedule = build_scheduler(dict(type="kd.EpochCosineLR", epochs=7, total_steps=21), ours)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 7)
    for step in range(21):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        ours.step()
        schedule.step()
        if step % 3 == 2:
            theirs.step()
            reference.step()
    with pytest.raises(InputError, match="epochs=0"):
        build_scheduler(dict(type="kd.EpochCosineLR", epochs=0, total_steps=6), ours)
