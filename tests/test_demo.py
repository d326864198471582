"""The demo: what it skips, resumes, starts anew or refuses, and the numbers that reach its files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pointcept_kd.data.semantic_kitti import CLASS_NAMES, LEARNING_MAP_INV
from pointcept_kd.host import InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.dialect import parse_options
from tools import benchmark, demo

MIOU = {"teacher": 0.6, "student": 0.4, "distilled": 0.45}


@pytest.fixture
def data(tmp_path):
    """Three validation scans and a scan of each training sequence in SemanticKITTI's layout."""
    rng = np.random.default_rng(0)
    training = [f"{i:02d}/000000" for i in range(6)]
    for name in (*training, "08/000000", "08/000001", "08/000002"):
        sequence, number = name.split("/")
        folder = tmp_path / "data" / "dataset" / "sequences" / sequence
        for part in ("velodyne", "labels"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        points = rng.uniform(-20, 20, (50, 4)).astype("<f4")
        points.tofile(folder / "velodyne" / f"{number}.bin")
        raw = np.array([LEARNING_MAP_INV[int(k)] for k in rng.integers(-1, 19, 50)], "<u4")
        raw.tofile(folder / "labels" / f"{number}.label")
    return tmp_path / "data"


class Trainings:
    """Stands in for `demo.call`: writes what a training leaves behind, and keeps the commands."""

    def __init__(self, monkeypatch):
        self.commands, self.code, self.leave_scores = [], 0, True
        monkeypatch.setattr(demo, "call", self)
        monkeypatch.setattr(demo.benchmark, "commit", lambda: "abc123")

    def __call__(self, command):
        self.commands.append(command)
        options = parse_options(command[command.index("--options") + 1 :])
        if self.code:
            return self.code
        folder = demo.Path(options["save_path"])
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / demo.LAST).write_bytes(b"weights")
        if self.leave_scores:
            self.write_scores(folder, options["seed"])
        return 0

    def write_scores(self, folder, seed):
        (folder / "result").mkdir(exist_ok=True)
        miou = MIOU[folder.name] + 0.01 * seed
        classes = {name: {"iou": miou, "acc": miou, "present": True} for name in CLASS_NAMES}
        classes["bicycle"]["present"] = False
        metrics = {"mIoU": miou, "scans": 3, "classes": classes}
        (folder / "result" / "metrics.json").write_text(json.dumps(metrics))
        for i in range(3):
            np.save(folder / "result" / f"08_{i:06d}_pred.npy", np.zeros(50, np.int64))
        with open(folder / "log.jsonl", "w") as file:
            for tag, step, value in (
                ("train/loss", 1, 3.0), ("val/mIoU", 1, 0.1), ("train/loss", 1, 2.5),
                ("train/loss", 2, None), ("train_batch/loss", 1, 9.0), ("val/mIoU", 2, miou),
            ):  # fmt: skip
                file.write(json.dumps({"tag": tag, "step": step, "value": value}) + "\n")


@pytest.fixture
def trainings(monkeypatch):
    return Trainings(monkeypatch)


def steps_of(tmp_path, data, seeds=(0,), **extra):
    teacher, students = demo.plan_steps(tmp_path / "out", data, list(seeds), extra)
    return [teacher, *(step for pair in students for step in pair)]


def test_steps_are_the_pair_with_and_without_its_teacher(tmp_path, data):
    teacher, alone, distilled, *others = steps_of(tmp_path, data, (3, 5))
    assert [s.options["seed"] for s in (teacher, alone, distilled, *others)] == [3, 3, 3, 5, 5]
    assert len({s.folder for s in (teacher, alone, distilled, *others)}) == 5
    for step in (distilled, others[1]):
        assert step.options["model.teacher.weight"] == str(teacher.folder / demo.LAST)
    assert "model.teacher.weight" not in alone.options
    for step in (teacher, alone, distilled):
        cfg = demo.read_config(step.config, step.options)
        assert cfg["save_path"] == str(step.folder)
        assert {cfg["data"][s]["data_root"] for s in ("train", "val", "test")} == {str(data)}
        last = [h for h in cfg["hooks"] if h["type"] == "kd.PreciseEvaluator"]
        assert [hook["test_last"] for hook in last] == [True]
        assert (
            parse_options(step.command()[step.command().index("--options") + 1 :]) == step.options
        )


def test_a_run_is_known_by_settings_data_and_teacher(tmp_path, data):
    before = [s.fingerprint for s in steps_of(tmp_path, data)]
    assert before == [s.fingerprint for s in steps_of(tmp_path, data)]
    assert len(set(before)) == 3
    for after in (steps_of(tmp_path, data, batch_size=4), steps_of(tmp_path, data, (1,))):
        assert not {s.fingerprint for s in after} & set(before)
    (data / "dataset/sequences/00/velodyne/000001.bin").write_bytes(b"0" * 16)
    assert not {s.fingerprint for s in steps_of(tmp_path, data)} & set(before)


def test_seeds_share_the_first_ones_teacher(tmp_path, data):
    one, several = steps_of(tmp_path, data), steps_of(tmp_path, data, (0, 1))
    assert [s.fingerprint for s in one] == [s.fingerprint for s in several[:3]]


def test_a_finished_run_is_kept_and_a_changed_one_trained_anew(tmp_path, data, trainings, capsys):
    step, *_ = steps_of(tmp_path, data)
    demo.run_step(step, "teacher")
    demo.run_step(step, "teacher")
    assert len(trainings.commands) == 1
    assert "finished by commit abc123" in capsys.readouterr().out
    (step.folder / "stale").touch()
    changed, *_ = steps_of(tmp_path, data, batch_size=4)
    demo.run_step(changed, "teacher")
    assert len(trainings.commands) == 2
    assert "--resume" not in trainings.commands[1]
    assert not (step.folder / "stale").exists()


def test_an_interrupted_run_goes_on(tmp_path, data, trainings, monkeypatch):
    step, *_ = steps_of(tmp_path, data)

    def killed(_):
        (step.folder / "model").mkdir()
        (step.folder / demo.LAST).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.run_step(step, "teacher")
    assert not step.finished()
    monkeypatch.setattr(demo, "call", trainings)
    demo.run_step(step, "teacher")
    assert "--resume" in trainings.commands[0]
    assert step.finished()
    assert step.state()["seconds"] > 0


def test_a_run_without_its_checkpoint_or_scores_is_not_finished(tmp_path, data, trainings):
    step, *_ = steps_of(tmp_path, data)
    demo.run_step(step, "teacher")
    (step.folder / "result" / "metrics.json").write_text("{")
    assert not step.finished()
    demo.run_step(step, "teacher")
    (step.folder / demo.LAST).unlink()
    assert not step.finished()


def test_failures_are_one_line(tmp_path, data, trainings):
    step, *_ = steps_of(tmp_path, data)
    trainings.code = 2
    with pytest.raises(InputError, match="Teacher: training ended with exit code 2"):
        demo.run_step(step, "teacher")
    assert not step.folder.exists()
    trainings.code, trainings.leave_scores = 0, False
    with pytest.raises(InputError, match=r"metrics.json was not written"):
        demo.run_step(step, "teacher")
    other = steps_of(tmp_path, data)[1]
    other.folder.mkdir(parents=True)
    (other.folder / "thesis.txt").touch()
    with pytest.raises(InputError, match="did not make"):
        demo.run_step(other, "student")
    assert (other.folder / "thesis.txt").exists()


@pytest.mark.parametrize("value", ["exp/demo", "1e3", "a,b", "none", "[x", 3, True, 0.5])
def test_option_values_survive_the_command_line(value):
    assert parse_options([f"key={demo._quoted('key', value)}"]) == {"key": value}


def test_iou_is_averaged_over_the_seeds_that_have_the_class():
    def scores(a, b):
        values = {"x": a, "y": b}
        return {
            "classes": {n: {"iou": v or 0.0, "present": v is not None} for n, v in values.items()}
        }

    assert demo.merged_iou([scores(0.2, None), scores(0.4, None)], ["x", "y"]) == [
        pytest.approx(0.3),
        None,
    ]
    assert demo.merged_iou([scores(0.2, None), scores(0.4, 0.5)], ["x", "y"])[1] == 0.5


def test_streets_that_are_there_are_taken_as_they_are(data, capsys):
    demo.prepare_streets(data)
    assert "as they are" in capsys.readouterr().out
    assert not (data / "dataset.json").exists()


def test_missing_streets_are_simulated(tmp_path, monkeypatch):
    calls = []
    done = SimpleNamespace(written=3, kept=0, seconds=1.0)
    monkeypatch.setattr(
        demo.synthetic, "simulate", lambda out, plan, note: calls.append((out, plan)) or done
    )
    command = demo.prepare_streets(tmp_path / "new")
    assert calls == [(tmp_path / "new", demo.synthetic.PRESETS["demo"])]
    assert command.startswith("python tools/prepare_data.py simulate --out ")


def fake_compare(entries, **_):
    sizes = [(2_000_000, 4e9, 200.0), (200_000, 1e9, 50.0), (200_000, 1e9, 51.0)]
    return [dict(zip(("parameters", "macs", "latency_ms"), row)) for _, row in zip(entries, sizes)]


def test_main_writes_table_results_and_report(tmp_path, data, trainings, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "compare", fake_compare)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(data), "--seeds", "0", "1"]
    demo.main(arguments)
    text = capsys.readouterr().out
    assert len(trainings.commands) == 5
    assert "Distillation lifted the student from 40.5 % to 45.5 % mIoU (+5.0 points" in text
    assert "10× fewer" in text
    assert str(out / "report.html") in text
    results = json.loads((out / "results.json").read_text())
    assert [row["seed"] for row in results["seeds"]] == [0, 1]
    assert [row["gain"] for row in results["seeds"]] == pytest.approx([0.05, 0.05])
    assert results["networks"]["student_alone"]["miou"]["mean"] == pytest.approx(0.405)
    assert results["networks"]["distilled_student"]["latency_s"] == pytest.approx(0.051)
    assert results["networks"]["teacher"]["iou"]["bicycle"] is None
    assert results["checkpoint"] == "model_last.pth"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert "08_000001, networks of seed 0" in page
    # The second call trains and measures nothing.
    monkeypatch.setattr(benchmark, "compare", lambda *_, **__: pytest.fail("measured again"))
    demo.main(arguments)
    assert len(trainings.commands) == 5


def test_curves_keep_the_later_of_two_entries():
    entries = [
        {"tag": "train/loss", "step": 2, "value": 1.0},
        {"tag": "train/loss", "step": 1, "value": 3.0},
        {"tag": "train/loss", "step": 1, "value": 2.5},
        {"tag": "val/loss", "step": 1, "value": 9.0},
    ]
    assert demo.curve(entries, "train/loss") == [(1, 2.5), (2, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1", "1"], "different whole numbers"),
        (["--options", "seed=3"], "use --seeds"),
        (["--options", "batchsize=3"], "batch_size"),
    ],
)
def test_bad_arguments(tmp_path, data, trainings, arguments, words):
    with pytest.raises(InputError, match=words):
        demo.main(["--out", str(tmp_path / "out"), "--data", str(data), *arguments])
    assert trainings.commands == []
    assert not (tmp_path / "out").exists()


def test_a_config_without_scores_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.setattr(demo, "read_config", lambda *_: Config({"hooks": []}))
    with pytest.raises(InputError, match="PreciseEvaluator"):
        demo.plan_steps(tmp_path / "out", data, [0])


@pytest.mark.slow
def test_the_whole_demo_in_small(tmp_path, capsys):
    pytest.importorskip("embreex", reason="simulating streets needs embreex")
    data, out = tmp_path / "sim", tmp_path / "out"
    plan = demo.synthetic.plan_from("demo", ["00", "08"], 4)
    demo.synthetic.simulate(data, plan, workers=1, progress=False)
    arguments = ["--out", str(out), "--data", str(data), "--options"]
    demo.main([*arguments, "epoch=1", "eval_epoch=1", "num_worker=0"])
    results = json.loads((out / "results.json").read_text())
    networks = results["networks"]
    assert networks["teacher"]["parameters"] > networks["student_alone"]["parameters"]
    for key in ("parameters", "macs"):
        assert networks["student_alone"][key] == networks["distilled_student"][key] > 0
    assert all(0 <= run["miou"]["mean"] <= 1 for run in networks.values())
    assert (out / "report.html").stat().st_size > 50_000
