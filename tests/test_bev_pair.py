"""The bird's-eye-view pair on real scans, short: teacher, student, evaluation, by the shipped configs."""

import numpy as np
import pytest
import torch

from pointcept_kd.data.semantic_kitti import LEARNING_MAP_INV
from pointcept_kd.data.submission_writers import write_semantic_kitti
from pointcept_kd.distillers.base import Teacher
from pointcept_kd.host import LOSSES, MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.metrics import confusion, ious

from .real_pairs import CONFIGS, check_evaluation, check_falls, distil

# A ball of 8,000 points of two scans keeps this to seconds; everything else is the shipped config.
SHORT = """
_base_ = ["{base}"]
save_path = "{save}"
epoch = 40
eval_epoch = 2
num_worker = 0
data = dict(
    train=dict(
        sequences=["04", "06"],
        transform=[dict(type="SphereCrop", point_max=8000, mode="center"), *{steps}],
    )
)
{more}
"""


def short(folder, name, base, more):
    steps = Config.fromfile(CONFIGS / base).data.train.transform
    path = folder / f"{name}.py"
    path.write_text(
        SHORT.format(
            base=(CONFIGS / base).as_posix(),
            save=(folder / name).as_posix(),
            steps=[dict(step) for step in steps],
            more=more,
        )
    )
    return path


def test_teacher_student_and_evaluation_on_real_scans(samples, tmp_path, monkeypatch):
    root = samples / "semantickitti"
    distilled, values = distil(
        tmp_path,
        root,
        monkeypatch,
        short,
        "semantic_kitti/semseg-cylinder3d-0-base_samples.py",
        "kd/cylinder3d_to_polarnet_samples.py",
    )
    names = ("task", "logits", "enc2", "enc8", "dec8", "dec2", "labels")
    check_falls(values, [f"train/loss_{name}" for name in names])
    for name in ("enc2", "enc8", "dec8", "dec2", "labels"):
        # Neither side has become constant.
        assert values[f"{name}/deviation_student"][-1] > 0.01
        assert values[f"{name}/deviation_target"][-1] > 0.01

    check_evaluation(tmp_path / "distilled" / "result", root)

    # The exported student is a plain network; it and the teacher know their grids.
    cfg = Config.fromfile(distilled)
    student = MODELS.build(cfg.model.student.model)
    checkpoint = load_checkpoint(tmp_path / "distilled" / "model" / "student_last.pth")
    student.load_state_dict(checkpoint["state_dict"], strict=True)
    assert list(checkpoint["grids"]) == ["backbone.partition"]
    entry = dict(cfg.model.teacher)
    Teacher("same", entry["model"], entry["weight"], entry["taps"])
    entry["model"].backbone.partition.low = (1.0, -3.141592653589793, -3.0)
    with pytest.raises(InputError, match=r"trained on another grid at backbone\.partition: low="):
        Teacher("other", entry["model"], entry["weight"], entry["taps"])


def test_the_published_terms_take_a_step():
    """The taps and terms of `_paper`, with the networks of the demo."""
    cfg = Config.fromfile(CONFIGS / "kd/cylinder3d_to_polarnet_tiny.py")
    paper = Config.fromfile(CONFIGS / "kd/cylinder3d_to_polarnet_paper.py")
    cfg.model.teacher.weight = "random"
    for part in ("student", "teacher"):
        cfg.model[part].taps = paper.model[part].taps
        cfg.model[part].model.backbone.partition.shape = (64, 64, 8)
    cfg.model.student.model.backbone.dense_head = paper.model.student.model.backbone.dense_head
    cfg.model.terms = cfg.bev_paper_terms
    assert {k: v.type for k, v in cfg.model.terms.items()} == {
        k: v.type for k, v in paper.model.terms.items()
    }
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    feat = torch.rand(1200, 4) * torch.tensor([60, 60, 4, 1]) - torch.tensor([30, 30, 2, 0])
    batch = dict(
        coord=feat[:, :3],
        feat=feat,
        segment=torch.randint(-1, 19, (1200,)),
        offset=torch.tensor([500, 1200]),
    )
    out = model(batch)
    assert set(out) == {"loss", "loss_task"} | {
        f"{kind}_{name}" for kind in ("loss", "weighted") for name in paper.model.terms
    }
    assert all(float(v.detach()) >= 0 for v in out.values())
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_cartesian_student_of_the_method_page():
    """Any teacher, any pillars: the page's snippet, with the networks at the size of the demo."""
    cfg = Config.fromfile(CONFIGS / "kd/ptv3_to_polarnet_tiny.py")
    cfg.model.teacher.weight = "random"
    cfg.model.student.model.backbone.partition = dict(
        low=(-51.2, -51.2, -4.0), high=(51.2, 51.2, 2.0), shape=(128, 128, 8), frame="cartesian"
    )
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    grid = torch.randint(0, 200, (900, 3)).unique(dim=0)
    coord = grid * 0.2 - 20
    batch = dict(
        coord=coord,
        grid_coord=grid,
        feat=torch.cat([coord, torch.rand(len(grid), 1)], dim=1),
        segment=torch.randint(-1, 19, (len(grid),)),
        offset=torch.tensor([300, len(grid)]),
    )
    batch["grid_coord"][300:] -= batch["grid_coord"][300:].amin(0)
    out = model(batch)
    out["loss"].backward()
    assert float(out["loss_pillars"]) > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lovasz_and_weighted_cross_entropy_by_hand():
    """Probabilities of three cells of the classes 1, 2, 1; class 0 is not supervised."""
    p = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.4, 0.5], [0.1, 0.3, 0.6]])
    labels = torch.tensor([1, 2, 1])
    lovasz = LOSSES.build(dict(type="LovaszLoss", mode="multiclass", ignore_index=0))
    assert float(lovasz(p.log(), labels)) == pytest.approx((0.483333 + 0.55) / 2, abs=1e-6)
    entropy = LOSSES.build(dict(type="CrossEntropyLoss", ignore_index=0, weight=[0.0, 2.0, 1.0]))
    assert float(entropy(p.log(), labels)) == pytest.approx(0.709476, abs=1e-6)
    for loss in (lovasz, entropy):
        logits = p.log().requires_grad_()
        value = loss(logits, torch.zeros_like(labels))
        value.backward()
        assert float(value.detach()) == 0
        assert logits.grad.isfinite().all()


def test_a_point_called_unlabelled_counts_against_its_class():
    """The published training metric dropped such points from the union and skipped absent classes: 58.3 for 5.3."""
    labels, found = torch.tensor([1, 1, 1, 2, 2, 0]), torch.tensor([1, 1, 0, 2, 1, 2])
    iou, _ = ious(confusion(found, labels, 20, ignore_index=0))
    assert iou[1:3].tolist() == pytest.approx([0.5, 0.5])
    assert float(iou[1:].mean()) == pytest.approx(0.052632, abs=1e-6)


def test_bytes_of_a_submission(tmp_path):
    """Train ids 1, 9, 15 of the published numbering are ours plus one, and raw ids 10, 40, 70 on the disk."""
    path = write_semantic_kitti(tmp_path, "11_000000", np.array([0, 8, 14]), LEARNING_MAP_INV)
    assert path.read_bytes() == bytes.fromhex("0A000000 28000000 46000000")
