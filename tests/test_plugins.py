"""Installed plugins: classes of another package in a config, and what is said about a plugin that does not load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pointcept_kd
from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint

from .host.tiny import write_config

ROOT = Path(__file__).resolve().parents[1]

TERM = '''
"""A distillation term and a network of a package of its own."""

import torch
from pointcept_kd.distillers.base import Outputs, Term
from pointcept_kd.host import TERMS, kd


def score_distance(student, teacher):
    return (student.softmax(1) - teacher.detach().softmax(1)).square().sum(1).mean()


@TERMS.register_module()
class ScoreDistance(Term):
    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        return score_distance(student["logits"].feat, teacher["logits"].feat)


@kd.MODELS.register_module()
class FromElsewhere(torch.nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))

    def forward(self, batch):
        logits = self.layers(batch["feat"])
        if "segment" not in batch:
            return {"seg_logits": logits}
        loss = torch.nn.functional.cross_entropy(logits, batch["segment"], ignore_index=-1)
        return {"loss": loss} if self.training else {"loss": loss, "seg_logits": logits}
'''


def install(folder, source, name="elsewhere", entry="terms"):
    """What pip leaves of a package with an entry point: its folder and its dist-info."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "parts.py").write_text(source)
    info = folder / f"{name}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(
        f"[pointcept_kd.plugins]\n{entry} = {name}.parts\n\n[console_scripts]\nx = {name}:x\n"
    )
    return folder


def python(*words, site, cwd, **environment):
    """A finished process of a Python that has the folder on its path."""
    path = os.pathsep.join(map(str, (site, ROOT)))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_a_config_names_classes_of_a_plugin(tmp_path):
    site = install(tmp_path / "site", TERM)
    model = dict(
        type="kd.Distiller",
        student=dict(model=dict(type="kd.FromElsewhere", width=6), taps=dict(logits="layers")),
        teacher=dict(
            model=dict(type="kd.FromElsewhere"), taps=dict(logits="layers"), weight="random"
        ),
        terms=dict(mine=dict(type="kd.ScoreDistance", weight=0.5)),
    )
    config = write_config(tmp_path / "run" / "c.py", model=model)
    train = [ROOT / "tools" / "train.py", "--config-file", config]
    done = python(*train, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "exp"
    assert "loss_mine" in (folder / "train.log").read_text()
    weights = load_checkpoint(folder / "model" / "student_last.pth")["state_dict"]
    assert weights["layers.0.weight"].shape == (6, 4)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('built for\\nanother torch')", "RuntimeError: built for another torch"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def half(:", "SyntaxError: "),
        (
            "import torch\nfrom pointcept_kd.host import TERMS\n"
            "TERMS.register_module('LogitKL', module=torch.nn.Identity)",
            "LogitKL is registered in the terms registry already",
        ),
    ],
    ids=["raises", "lacks", "syntax", "taken name"],
)  # fmt: skip
def test_a_broken_plugin_is_named_in_one_line(tmp_path, monkeypatch, capsys, source, reason):
    monkeypatch.syspath_prepend(install(tmp_path, source, name="third_party", entry="mine"))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delitem(sys.modules, "third_party", raising=False)
    with pytest.raises(InputError) as caught:
        pointcept_kd._load_plugins()
    text = str(caught.value)
    named = "plugin 'mine' (third_party.parts) of the package third_party 0.3 cannot be loaded ("
    assert text.startswith(named)
    assert reason in text
    assert text.endswith("or set POINTCEPT_KD_PLUGINS=0")
    assert caught.value.__cause__ is not None
    # Uncaught, it is one line; another error keeps its traceback.
    sys.excepthook(InputError, caught.value, None)
    assert capsys.readouterr().err == f"error: {text}\n"
    sys.excepthook(KeyError, KeyError("other"), None)
    assert "KeyError: 'other'" in capsys.readouterr().err


def test_plugins_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, "raise RuntimeError('no')"))
    monkeypatch.setenv("POINTCEPT_KD_PLUGINS", "0")
    pointcept_kd._load_plugins()
    monkeypatch.setenv("POINTCEPT_KD_PLUGINS", "none")
    with pytest.raises(InputError, match="POINTCEPT_KD_PLUGINS=none: use 0"):
        pointcept_kd._load_plugins()


def test_a_tool_beside_a_broken_plugin(tmp_path):
    site = install(tmp_path / "site", "raise RuntimeError('no')")
    done = python(ROOT / "tools" / "train.py", "--help", site=site, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: plugin 'terms' \(elsewhere\.parts\) .*\n", done.stderr)


def test_the_doctor_sees_plugins(tmp_path):
    site = install(tmp_path / "site", TERM)
    install(site, "raise RuntimeError('no')", name="third", entry="broken")
    done = python("-m", "pointcept_kd", "doctor", site=site, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"ok +terms +elsewhere\.parts of elsewhere 0\.3\n", done.stdout)
    broken = r"PROBLEM +broken +third\.parts of third 0\.3: RuntimeError: no; repair or uninstall"
    assert re.search(broken, done.stdout)
    assert re.search(r"ok +test on cpu ", done.stdout)
    assert "\n1 problem, marked above.\n" in done.stdout
