"""A pair trained on real scans by its shipped configs, and what its evaluation must have seen."""

import json
import sys
from pathlib import Path

import numpy as np

from pointcept_kd.data.semantic_kitti import SemanticKITTIDataset
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.runtime import run_tool
from tools import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def distil(folder, root, monkeypatch, short, teacher, distilled):
    """Train a missing teacher and its student.

    Args:
        folder: of everything that is written.
        root: the real scans.
        short: `(folder, name, base, more)` to the path of a config that is `base` but for its length.
        teacher, distilled: the shipped configs.

    Returns:
        The student's config, and its logged values by tag.
    """
    guest = short(folder, "teacher", teacher, "")
    weight = (folder / "teacher" / "model" / "model_last.pth").as_posix()
    more = f'model = dict(teacher=dict(weight="{weight}", config="{guest.as_posix()}"))'
    config = short(folder, "distilled", distilled, more)
    words = ["train.py", "--config-file", str(config), "--data-root", str(root)]
    monkeypatch.setattr(sys, "argv", words)
    assert run_tool(train.main) == 0
    values = {}
    for entry in read_jsonl(folder / "distilled" / "log.jsonl"):
        values.setdefault(entry["tag"], []).append(entry["value"])
    return config, values


def check_falls(values, tags):
    """Each of these losses ended below where it began."""
    for tag in tags:
        first, last = values[tag][0], values[tag][-1]
        assert np.isfinite([first, last]).all()
        assert last < first, f"{tag} went from {first} to {last}"


def check_evaluation(result, root):
    """Every raw point of the four validation scans has a label of the data set, more often right than by chance."""
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
