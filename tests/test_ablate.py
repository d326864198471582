"""The ablation tool: whole trainings of tiny networks, what is kept, what is trained anew, and the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.host import InputError
from tools import ablate, demo

from .host.tiny import HOOKS, tiny_values, write_config
from .test_tools import tool

SCORED = [dict(hook) for hook in HOOKS] + [dict(type="PreciseEvaluator", test_last=False)]
VAL = dict(type="kd.TinyScans", count=3, raw=True)


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Trainings without a new process each, and their commands."""
    commands = []

    def call(command):
        commands.append(command)
        return tool("train", *command[1:])[0] or 0

    monkeypatch.setattr(demo, "call", call)
    monkeypatch.setattr(demo.benchmark, "commit", lambda: "abc123")
    return commands


@pytest.fixture
def rows(tmp_path):
    """A student alone, and the same with a teacher, as `--rows` words."""
    data = dict(tiny_values(tmp_path)["data"], test=VAL)
    common = dict(hooks=SCORED, data=data)
    guest = write_config(
        tmp_path / "teacher.py", model=dict(type="kd.TinyNet", width=16),
        save_path=str(tmp_path / "elsewhere"), **common,
    )  # fmt: skip
    alone = write_config(tmp_path / "alone.py", **common)
    model = dict(
        type="kd.Distiller",
        student=dict(model=dict(type="kd.TinyNet")),
        teacher=dict(
            model=dict(type="kd.TinyNet", width=16),
            weight=str(tmp_path / "elsewhere" / "model" / "model_last.pth"),
            config=str(guest),
            train_if_missing=True,
        ),
        terms=dict(logits=dict(type="kd.LogitKL", weight=1.0)),
    )
    taught = write_config(tmp_path / "taught.py", model=model, **common)
    return [f"no teacher={alone}", str(taught)]


def run(out, rows, *more, seeds=(0, 1)):
    ablate.main(["--out", str(out), "--seeds", *map(str, seeds), "--rows", *rows, *more])
    return json.loads((out / "ablation.json").read_text())


def test_rows_by_seeds(tmp_path, rows, capsys, called):
    out = tmp_path / "out"
    found = run(out, rows)
    capsys.readouterr()
    assert len(called) == 5  # a teacher, two rows, two seeds
    assert [row["label"] for row in found["rows"]] == ["no teacher", "taught"]
    for row, folder in zip(found["rows"], ("no_teacher", "taught")):
        scores = [
            json.loads((out / f"seed_{seed}" / folder / "result" / "metrics.json").read_text())[
                "mIoU"
            ]
            for seed in (0, 1)
        ]
        assert row["miou"] == scores
        assert row["spread"]["mean"] == pytest.approx(np.mean(scores))
        assert row["spread"]["std"] == pytest.approx(np.std(scores, ddof=1))
        assert set(row["iou"]) == set("abcd")
    first, second = found["rows"]
    gains = np.subtract(second["miou"], first["miou"])
    assert second["gains"] == pytest.approx(gains)
    assert second["gain"]["std"] == pytest.approx(np.std(gains, ddof=1))
    assert first["gains"] == [0, 0]
    # Both distilled runs had the one teacher, not that of its config.
    weight = out / "teachers" / "teacher" / demo.LAST
    assert weight.is_file()
    assert sum(f"model.teacher.weight={weight}" in command for command in called) == 2
    assert not (tmp_path / "elsewhere").exists()

    lines = (out / "ablation.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == [
        "row", "seed 0", "seed 1", "mean", "sd", "smallest to largest", "gain over no teacher", "sd of the gain",
    ]  # fmt: skip
    assert cells[2][:3] == ["no teacher", *(f"{100 * score:.1f}" for score in first["miou"])]
    assert cells[3][3] == f"{100 * second['spread']['mean']:.1f}"
    assert cells[3][7] == f"{100 * second['gain']['std']:.1f}"
    assert {len(row) for row in cells} == {8}
    text = "\n".join(lines)
    assert "commit abc123" in text
    assert "3 scans" in text
    assert "trained once, with seed 0" in text


def test_what_is_finished_is_kept(tmp_path, rows, capsys, called):
    out = tmp_path / "out"
    before = run(out, rows, seeds=(0,))
    assert len(called) == 3
    table = (out / "ablation.md").read_text()
    assert "sd" not in table.splitlines()[0]
    assert "One seed" in table
    # Another seed trains its own rows alone; a lost result is made again.
    more = run(out, rows, seeds=(0, 1))
    assert len(called) == 5
    assert [row["miou"][0] for row in more["rows"]] == [row["miou"][0] for row in before["rows"]]
    (out / "seed_1" / "taught" / "result" / "metrics.json").unlink()
    again = run(out, rows, seeds=(0, 1))
    assert len(called) == 6
    assert [row["miou"] for row in again["rows"]] == [row["miou"] for row in more["rows"]]
    # Other settings are other runs, the teacher's too.
    run(out, rows, "--options", "optimizer.lr=0.02", seeds=(0,))
    assert len(called) == 9
    assert "settings or data changed" in capsys.readouterr().out


def test_a_given_teacher_is_not_trained(tmp_path, rows, capsys, called):
    first = run(tmp_path / "first", rows, seeds=(0,))
    weight = tmp_path / "kept.pth"
    weight.write_bytes((tmp_path / "first" / "teachers" / "teacher" / demo.LAST).read_bytes())
    out, given = tmp_path / "out", ["--teacher-weight", str(weight)]
    found = run(out, rows, *given, seeds=(0,))
    assert len(called) == 5
    assert not (out / "teachers").exists()
    assert [row["miou"] for row in found["rows"]] == [row["miou"] for row in first["rows"]]
    assert f"Teacher: {weight}." in (out / "ablation.md").read_text()
    run(out, rows, *given, seeds=(0,))
    assert len(called) == 5
    content = torch.load(weight, weights_only=False)
    content["epoch"] = 99
    torch.save(content, weight)  # the file is known by its content
    run(out, rows, *given, seeds=(0,))
    assert len(called) == 6


def test_the_default_rows_are_the_ablation():
    assert list(ablate.ROWS) == [
        "student alone", "logits", "logits + gradient", "logits + topology", "all four",
    ]  # fmt: skip
    terms = []
    for config in list(ablate.ROWS.values())[1:]:
        entries = demo.read_config(config)["model"]["terms"]
        terms.append({name for name, entry in entries.items() if entry and entry["weight"]})
    assert terms == [
        {"logits"}, {"logits", "gradient"}, {"logits", "topology"}, {"logits", "gradient", "topology"},
    ]  # fmt: skip


def test_default_rows_are_planned_on_one_teacher_and_one_folder(tmp_path):
    plan = ablate.Plan(tmp_path / "out", ablate.ROWS, (0, 1, 2), tmp_path / "streets")
    steps = plan.steps()
    assert len(steps) == 1 + 3 * 5
    assert len({step.folder for step in steps}) == 16
    (teacher,) = plan.teachers
    assert teacher is steps[0]
    for step in steps:
        cfg = demo.read_config(step.config, step.options)
        assert {
            split["data_root"] for k, split in cfg["data"].items() if k in ("train", "val", "test")
        } == {str(tmp_path / "streets")}
        if "teacher" in cfg["model"]:
            assert cfg["model"]["teacher"]["weight"] == str(teacher.folder / demo.LAST)
    seeds = [step.options["seed"] for step in steps]
    assert seeds == [0] + [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1", "1"], "different whole numbers"),
        (["--seeds", "-1"], "different whole numbers"),
        (["--options", "seed=3"], "use --seeds"),
        (["--options", "data.val.data_root=x"], "--data-root"),
        (["--options", "epochs=3"], "epoch"),
        (["--rows", "a=x.py", "a=y.py"], "a label of its own"),
        (["--rows", "=x.py"], "a label of its own"),
        (["--rows", "a b={}", "a-b={}"], "differ by signs alone"),
        (["--teacher-weight", "nowhere.pth"], "nowhere.pth: cannot be read"),
    ],
)
def test_bad_arguments(tmp_path, rows, monkeypatch, arguments, words, called):
    monkeypatch.chdir(tmp_path)
    config = Path(rows[1])
    arguments = [a.format(config) for a in arguments]
    if "--rows" not in arguments:
        arguments += ["--rows", *rows]
    with pytest.raises(InputError, match=words):
        ablate.main(["--out", "out", *arguments])
    assert called == []
    assert not (tmp_path / "out").exists()


def test_a_config_without_scores_is_refused(tmp_path):
    config = write_config(tmp_path / "c.py")
    with pytest.raises(InputError, match="PreciseEvaluator"):
        ablate.main(["--out", str(tmp_path / "out"), "--rows", str(config)])
