"""The command line: training, testing, resuming, missing teachers, bad input."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pointcept_kd.host.checkpoint import load_checkpoint

from .host.tiny import HOOKS, tiny_values, write_config

ROOT = Path(__file__).resolve().parents[1]


def tool(name, *arguments):
    """Run a tool in this process: exit code, stderr."""
    before, errors = sys.argv, io.StringIO()
    sys.argv = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as done,
        ):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    return done.value.code, errors.getvalue()


def error_line(text):
    """The last line, and that it alone is an error and no traceback is there."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert lines == text.splitlines()[-1:]
    return lines[0]


def shell(name, *arguments, cwd, **environment):
    """Run a tool as a user does, from another folder and without an installed package on the path."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_train_then_test_from_another_folder(tmp_path):
    config = write_config(tmp_path / "c.py", save_path="exp/run")  # relative to the working folder
    done = shell(
        "train", "--config-file", config, "--options", "epoch=2", "eval_epoch=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "exp" / "run"
    names = {p.name for p in folder.iterdir()}
    assert {"config.py", "train.log", "log.jsonl", "model"} <= names
    assert load_checkpoint(folder / "model" / "model_last.pth")["epoch"] == 2
    done = shell("test", "--config-file", folder / "config.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "result" / "metrics.json").read_text())
    assert metrics["scans"] == 3
    assert metrics["weight"].endswith("model_best.pth")


def test_two_processes_on_the_cpu_find_all_types(tmp_path):
    config = write_config(tmp_path / "c.py")
    options = ("--options", "epoch=1", "eval_epoch=1", "num_worker=0")
    done = shell("train", "--config-file", config, "--num-gpus", 2, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "exp" / "model" / "model_last.pth")
    assert not any(key.startswith("module.") for key in checkpoint["state_dict"])
    assert "2 x cpu" in (tmp_path / "exp" / "train.log").read_text()


@pytest.mark.parametrize("name", ["train", "test"])
def test_help_has_an_example(name, capsys):
    before = sys.argv
    sys.argv = [name, "--help"]
    try:
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"python tools/{name}.py --config-file configs/kd/" in text


def test_resume_flag_continues_exactly_and_keeps_a_drawn_seed(tmp_path):
    whole = write_config(tmp_path / "a" / "c.py", seed=None)
    assert tool("train", "--config-file", whole)[0] == 0
    reference = load_checkpoint(tmp_path / "a" / "exp" / "model" / "model_last.pth")["state_dict"]

    # A second folder with the first run's dumped config, as a run that was killed before its first checkpoint leaves.
    text = (
        (tmp_path / "a" / "exp" / "config.py")
        .read_text()
        .replace(f"{tmp_path}/a/", f"{tmp_path}/b/")
    )
    config = write_config(tmp_path / "b" / "c.py", seed=None)
    (tmp_path / "b" / "exp" / "model").mkdir(parents=True)
    (tmp_path / "b" / "exp" / "config.py").write_text(text)
    code, printed = tool("train", "--config-file", config, "--resume")
    assert code == 0, printed
    assert "starting from the beginning" in printed
    again = load_checkpoint(tmp_path / "b" / "exp" / "model" / "model_last.pth")["state_dict"]
    assert all(torch.equal(reference[k], again[k]) for k in reference)

    code, printed = tool("train", "--config-file", config, "--resume")
    assert code == 0, printed
    assert "All 3 epochs are done already" in (tmp_path / "b" / "exp" / "train.log").read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("optimzer.lr=0.1",), "did you mean optimizer.lr"),
        (("epoch=3", "eval_epoch=2"), "no multiple of eval_epoch"),
        (("weight=absent.pth",), "absent.pth does not exist"),
        (("model.type=kd.TinyNat",), "nearest: kd.TinyNet"),
        (("data.train.type=kd.TinyScan",), "nearest: kd.TinyScans"),
        (("resume=true",), "set weight="),
        (("batch_size=two",), "batch_size='two'"),
    ],
)
def test_bad_input_is_one_line_exit_two_and_no_folder(tmp_path, options, text):
    config = write_config(tmp_path / "c.py")
    code, printed = tool("train", "--config-file", config, "--options", *options)
    assert code == 2
    assert text in error_line(printed)
    assert not (tmp_path / "exp").exists()


def test_bad_files(tmp_path):
    code, printed = tool("train", "--config-file", tmp_path / "absent.py")
    assert code == 2
    assert "absent.py" in error_line(printed)
    (tmp_path / "broken.py").write_text("model = dict(\n")
    code, printed = tool("train", "--config-file", tmp_path / "broken.py")
    assert code == 2
    assert "broken.py:1" in error_line(printed)
    code, printed = tool(
        "train", "--config-file", write_config(tmp_path / "c.py"), "--num-machines", "2"
    )
    assert code == 2
    assert "--dist-url" in error_line(printed)
    blocked = write_config(tmp_path / "d.py", save_path=str(tmp_path / "c.py" / "exp"))
    code, printed = tool("train", "--config-file", blocked)
    assert code == 2
    assert "cannot create" in error_line(printed)


def test_testing_without_or_with_a_bad_weight(tmp_path):
    config = write_config(tmp_path / "c.py")
    code, printed = tool("test", "--config-file", config)
    assert code == 2
    assert "testing needs a checkpoint" in error_line(printed)
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    code, printed = tool(
        "test", "--config-file", config, "--options", f"weight={tmp_path / 'w.pth'}"
    )
    assert code == 2
    assert "w.pth" in error_line(printed)
    assert not (tmp_path / "exp").exists()


# -------------------------------------------------------------------------------------- teachers


def distilled(tmp_path, teacher):
    student = dict(model=dict(type="kd.TinyNet"))
    return write_config(
        tmp_path / "student" / "c.py",
        model=dict(type="kd.TinyPair", student=student, teacher=teacher),
    )


def teacher_entry(tmp_path, **changes):
    config = write_config(tmp_path / "teacher" / "c.py", hooks=[dict(hook) for hook in HOOKS])
    weight = str(tmp_path / "teacher" / "exp" / "model" / "model_last.pth")
    return {"weight": weight, "config": str(config), **changes}


@pytest.mark.parametrize("named", [False, True])
def test_a_missing_teacher_is_trained_first(tmp_path, named):
    entry = teacher_entry(tmp_path, train_if_missing=True)
    config = distilled(tmp_path, {"big": entry} if named else entry)
    code, printed = tool("train", "--config-file", config)
    assert code == 0, printed
    assert "training it first" in printed
    weight = Path(entry["weight"])
    assert load_checkpoint(weight)["epoch"] == 3
    assert (tmp_path / "student" / "exp" / "model" / "student_last.pth").is_file()
    stamp = weight.stat().st_mtime_ns
    code, printed = tool("train", "--config-file", config)
    assert code == 0, printed
    assert "training it first" not in printed
    assert weight.stat().st_mtime_ns == stamp


def test_a_missing_teacher_that_nobody_trains(tmp_path):
    entry = teacher_entry(tmp_path, train_if_missing=False)
    code, printed = tool("train", "--config-file", distilled(tmp_path, entry))
    assert code == 2
    line = error_line(printed)
    assert entry["weight"] in line
    assert f"python tools/train.py --config-file {entry['config']}" in line
    assert not (tmp_path / "student" / "exp").exists()


def test_a_teacher_that_saves_elsewhere(tmp_path):
    entry = teacher_entry(tmp_path, train_if_missing=True, weight=str(tmp_path / "elsewhere.pth"))
    code, printed = tool("train", "--config-file", distilled(tmp_path, entry))
    assert code == 2
    assert "still does not exist" in error_line(printed)


def test_a_teacher_of_itself(tmp_path):
    config = tmp_path / "student" / "c.py"
    entry = dict(weight=str(tmp_path / "w.pth"), config=str(config), train_if_missing=True)
    code, printed = tool("train", "--config-file", distilled(tmp_path, entry))
    assert code == 2
    assert "teacher of itself" in error_line(printed)


def test_the_tiny_values_cover_what_a_run_needs(tmp_path):
    """Guard of this file's own fixture: the written config reads back to what was given."""
    values = tiny_values(tmp_path)
    namespace = {}
    exec(write_config(tmp_path / "c.py", save_path=str(tmp_path)).read_text(), namespace)
    assert {k: namespace[k] for k in values} == values


def test_a_real_distiller_from_missing_teacher_to_tested_student(tmp_path):
    entry = teacher_entry(tmp_path, train_if_missing=True, model=dict(type="kd.TinyNet"))
    student = dict(model=dict(type="kd.TinyNet", width=4))
    model = dict(
        type="kd.Distiller",
        student=student,
        teacher=entry,
        terms=dict(logits=dict(type="LogitKL", weight=0.5)),
    )
    config = write_config(tmp_path / "student" / "c.py", model=model)
    code, printed = tool("train", "--config-file", config)
    assert code == 0, printed
    folder = tmp_path / "student" / "exp"
    assert "loss_logits" in (folder / "train.log").read_text()
    checkpoint = load_checkpoint(folder / "model" / "model_last.pth")["state_dict"]
    assert all(key.startswith("student.") for key in checkpoint)
    for name in ("model_best", "student_best"):
        Path(entry["weight"]).unlink(missing_ok=True)  # testing a student needs no teacher
        options = ("--options", f"weight={folder / 'model' / name}.pth")
        code, printed = tool("test", "--config-file", config, *options)
        assert code == 0, printed
