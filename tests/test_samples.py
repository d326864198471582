"""Real scans, short: teacher, distilled student and evaluation, by the shipped configs and the real reader."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset
from pointcept_kd.host import MODELS
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.runtime import run_tool
from tools import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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


def short(folder, name, base, more=""):
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
    teacher = short(tmp_path, "teacher", "semantic_kitti/semseg-pt-v3m1-0-base_samples.py")
    weight = tmp_path / "teacher" / "model" / "model_last.pth"
    distilled = short(
        tmp_path,
        "distilled",
        "kd/ptv3_to_student_samples.py",
        f'model = dict(teacher=dict(weight="{weight.as_posix()}", config="{teacher.as_posix()}"))',
    )
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config-file", str(distilled), "--data-root", str(root)]
    )
    assert run_tool(train.main) == 0

    values = {}
    for entry in read_jsonl(tmp_path / "distilled" / "log.jsonl"):
        values.setdefault(entry["tag"], []).append(entry["value"])
    for tag in ("train/loss_task", "train/loss_logits", "train/loss_bottleneck"):
        first, last = values[tag][0], values[tag][-1]
        assert last < first, f"{tag} went from {first} to {last}"

    # The evaluation saw every labelled point of the four real validation scans.
    result = tmp_path / "distilled" / "result"
    scans = SemanticKITTIDataset(split="val", data_root=str(root), sequences=["08"], transform=[])
    for i in range(len(scans)):
        scan = scans.get_data(i)
        predicted = np.load(result / f"{scan['name']}_pred.npy")
        assert predicted.shape == scan["segment"].shape
        assert predicted.min() >= 0
        assert predicted.max() < 19
    scores = json.loads((result / "metrics.json").read_text())
    assert scores["scans"] == 4
    assert scores["allAcc"] > 0.1, "well above chance, 1/19"

    # The exported student is a plain network.
    cfg = Config.fromfile(distilled)
    student = MODELS.build(cfg.model.student.model)
    weights = load_checkpoint(tmp_path / "distilled" / "model" / "student_last.pth")["state_dict"]
    student.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(221_115)
