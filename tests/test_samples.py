"""Real scans, short: teacher, distilled student and evaluation, by the shipped configs and the real reader."""

import pytest

from pointcept_kd.host import MODELS
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config

from .real_pairs import CONFIGS, check_evaluation, check_falls, distil

# 1 m voxels and two scans keep this to seconds; everything else is the shipped config.
SHORT = """
_base_ = ["{base}"]
save_path = "{save}"
epoch = 8
eval_epoch = 2
num_worker = 0
data = dict(
    train=dict(sequences=["04", "06"], transform={train}),
    val=dict(transform={val}),
    test=dict(transform={val}),
)
{more}
"""


def short(folder, name, base, more):
    def coarse(steps):
        return [dict(s, grid_size=1.0) if s["type"] == "GridSample" else dict(s) for s in steps]

    data = Config.fromfile(CONFIGS / base).data
    path = folder / f"{name}.py"
    text = SHORT.format(
        base=(CONFIGS / base).as_posix(),
        save=(folder / name).as_posix(),
        train=coarse(data.train.transform),
        val=coarse(data.val.transform),
        more=more,
    )
    path.write_text(text)
    return path


def test_teacher_student_and_evaluation_on_real_scans(samples, tmp_path, monkeypatch):
    root = samples / "semantickitti"
    distilled, values = distil(
        tmp_path,
        root,
        monkeypatch,
        short,
        "semantic_kitti/semseg-pt-v3m1-0-base_samples.py",
        "kd/ptv3_to_student_samples.py",
    )
    check_falls(values, ["train/loss_task", "train/loss_logits", "train/loss_bottleneck"])
    check_evaluation(tmp_path / "distilled" / "result", root)

    # The exported student is a plain network.
    cfg = Config.fromfile(distilled)
    student = MODELS.build(cfg.model.student.model)
    weights = load_checkpoint(tmp_path / "distilled" / "model" / "student_last.pth")["state_dict"]
    student.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(221_115)
