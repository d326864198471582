"""The models of this room around the sparse networks that configs give them, in their smallest size."""

import pytest
import torch

import pointcept_kd.networks.denoiser  # noqa: F401  registers encoder and denoiser
from pointcept_kd.host import MODELS

SIZE = dict(cr=0.125, voxel_size=0.4)


def config(**options):
    return dict(
        type="kd.DiffusionCompletion",
        encoder=dict(type="kd.ConditionEncoder", **SIZE),
        denoiser=dict(type="kd.Denoiser", **SIZE),
        steps=2,
        repeat=4,
        **options,
    )


def batch():
    clouds = [torch.rand(n, 3) * torch.tensor([8.0, 8, 2]) for n in (60, 80, 240, 320)]
    return dict(
        coord=torch.cat(clouds[:2]),
        offset=torch.tensor([60, 140]),
        complete=torch.cat(clouds[2:]),
        complete_offset=torch.tensor([240, 560]),
        name=["first", "second"],
    )


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_teacher(drop, mode):
    model = MODELS.build(config(drop=drop, drop_mode=mode)).train()
    model(batch())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    seen = model.encoder.stage4[1].net[0].weight.grad
    assert seen is not None  # the null feature is the encoder's, too


def test_a_scan_does_not_depend_on_its_batch():
    model = MODELS.build(config()).eval()
    both = batch()
    joined = model(both)
    end = int(joined["completed_offset"][0])
    alone = model(
        {**both, "coord": both["coord"][60:], "offset": torch.tensor([80]), "name": ["second"]}
    )
    assert len(alone["completed"]) > 0
    assert torch.equal(alone["completed"], joined["completed"][end:])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("kd.ScoreDistillation", dict(neighbours=10, ema=0.9)),
        ("kd.PreferenceDistillation", dict(rank_by="iou", pairing="independent")),
        ("kd.PreferenceAlignment", dict(pair_steps=1)),
    ],
)
def test_distillation_from_a_checkpoint(kind, options, tmp_path):
    teacher = MODELS.build(config())
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / "teacher.pth")
    model = MODELS.build(
        dict(
            type=kind, teacher=dict(model=config(), weight=str(tmp_path / "teacher.pth")), **options
        )
    ).train()
    for key, value in teacher.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key])
    if hasattr(model, "watchers"):
        with torch.no_grad():
            model.watchers[0].last[2].bias += 0.5
    model(batch())["loss"].backward()
    assert model.denoiser.last[2].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.encoder.parameters())
    # What is exported is a plain model again.
    plain = MODELS.build(config())
    plain.load_state_dict(model.export_state_dict())
    one = {**batch(), "name": ["a", "b"]}
    sampled = dict(steps=1, guidance=2.0)
    torch.testing.assert_close(
        plain.eval().complete(one["coord"], one["offset"], **sampled)[0],
        model.eval().complete(one["coord"], one["offset"], **sampled)[0],
    )
