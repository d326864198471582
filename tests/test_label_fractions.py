"""The tool of the fraction table: which trainings it plans, what it keeps, the table, its lists, and its refusals."""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.data import fractions
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint, voxels_of
from pointcept_kd.host.pretrained import load_backbone
from pointcept_kd.host.runtime import read_config
from tools import demo, label_fractions

from .test_tools import tool

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = label_fractions.FAMILIES
CONFIGS = sorted(
    {
        config
        for family in FAMILIES.values()
        for mode in label_fractions.MODES
        for start in ("random", "given")
        for percent in family.percents()
        if (config := family.config(mode, start, percent))
    }
)


@pytest.fixture
def called(monkeypatch):
    """Trainings without a new process each, and their commands."""
    commands = []

    def call(command):
        commands.append(command)
        code, errors = tool("train", *command[1:])
        print(errors, file=sys.stderr)
        return code or 0

    monkeypatch.setattr(demo, "call", call)
    monkeypatch.setattr(demo.benchmark, "commit", lambda: "abc123")
    return commands


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Two training scans and one to validate on, with points in a thick disc."""
    root, generator = tmp_path_factory.mktemp("streets"), np.random.default_rng(0)
    for name in ("00/000000", "00/000001", "08/000000"):
        sequence, number = name.split("/")
        folder = root / "dataset" / "sequences" / sequence
        for part in ("velodyne", "labels"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        points = generator.uniform((-6, -6, -2, 0), (6, 6, 2, 1), (300, 4)).astype("<f4")
        labels = np.where(points[:, 2] > 0, 50, 40).astype("<u4")
        (folder / "velodyne" / f"{number}.bin").write_bytes(points.tobytes())
        (folder / "labels" / f"{number}.label").write_bytes(labels.tobytes())
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint as pre-training leaves it, of the tiny network."""
    torch.manual_seed(4)
    entry = dict(read_config(FAMILIES["tiny"].config("probe", "random", 100))["model"]["backbone"])
    network = MODELS.build({**entry, "num_classes": 32, "class_level": 32})
    state = {f"student.{key}": value for key, value in network.state_dict().items()}
    cells = dict(voxel_size=0.2, degrees=1.0, coordinates="cylindrical")
    path = tmp_path_factory.mktemp("pretrained") / "model_last.pth"
    torch.save({"state_dict": {**state, "image.scale": torch.ones(1)}, "voxels": cells}, path)
    return path


def run(out, streets, *more):
    label_fractions.main(
        ["--out", str(out), "--data-root", str(streets), "--seeds", "0", *more, "--options", "epoch=1", "device=cpu"]
    )  # fmt: skip
    return json.loads((out / "label_fractions.json").read_text())


def test_the_table(tmp_path, streets, backbone, capsys, called):
    out = tmp_path / "out"
    given = ["--pretrained", f"seen={backbone}", "--fractions", "1", "100"]
    found = run(out, streets, *given)
    capsys.readouterr()
    assert len(called) == 8  # two modes, two fractions, two backbones
    cells = {(c["weights"], c["mode"], c["percent"]): c for c in found["cells"]}
    assert len(cells) == 8
    for (start, mode, percent), cell in cells.items():
        folder = out / "seed_0" / f"{mode}_{percent}pct_{start}"
        score = json.loads((folder / "result" / "metrics.json").read_text())["mIoU"]
        assert cell["miou"] == [score]
        assert cell["spread"]["mean"] == pytest.approx(score)
        alone = cells["random", mode, percent]["miou"][0]
        assert cell["gains"] == [pytest.approx(score - alone)]
        log = (folder / "train.log").read_text()
        assert f"{1 if percent == 1 else 2} scans" in log or "iterations per epoch" in log
        state = load_checkpoint(folder / demo.LAST)["state_dict"]
        pretrained = load_checkpoint(backbone)["state_dict"]
        key = "backbone.conv0p1s1.weight"
        same = torch.equal(state[key], pretrained[f"student.{key.removeprefix('backbone.')}"])
        # Probing leaves the backbone as it was given, fine-tuning does not.
        assert same == (start == "seen" and mode == "probe")
        assert ("weights of backbone loaded" in log) == (start == "seen")
    lines = (out / "label_fractions.md").read_text().splitlines()
    assert lines[0] == "| weights | probe, 1 % | probe, 100 % | finetune, 1 % | finetune, 100 % |"
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [
        "random",
        "seen",
        "seen - random",
    ]
    assert f"{100 * cells['seen', 'finetune', 1]['miou'][0]:.1f}" in lines[3]
    text = "\n".join(lines)
    assert "commit abc123" in text
    assert f"seen: {backbone}." in text

    # Finished cells are kept; another checkpoint of the same name is another run.
    assert run(out, streets, *given)["cells"] == found["cells"]
    assert len(called) == 8
    content = torch.load(backbone)
    content["epoch"] = 99
    other = tmp_path / "other.pth"
    torch.save(content, other)
    run(
        out, streets, "--pretrained", f"seen={other}", "--fractions", "1", "100", "--modes", "probe"
    )
    assert len(called) == 10


def test_other_voxels_are_refused_by_the_training(tmp_path, streets, backbone, capfd, called):
    content = torch.load(backbone)
    content["voxels"]["degrees"] = 0.5
    path = tmp_path / "other.pth"
    torch.save(content, path)
    whole = ["--fractions", "100", "--modes", "probe"]
    with pytest.raises(InputError, match="other, probe, 100 %: training ended with exit code 2"):
        run(tmp_path / "out", streets, "--pretrained", f"other={path}", *whole)
    assert "degrees=0.5 (here 1.0)" in capfd.readouterr().err


def test_several_seeds_in_the_table():
    rows = []
    for start, scores in (("random", (0.1, 0.3)), ("seen", (0.4, 0.4))):
        gains = [a - b for a, b in zip(scores, (0.1, 0.3))]
        spread = label_fractions.report.spread
        rows.append(
            dict(weights=start, mode="probe", percent=1, miou=scores, spread=spread(scores), gains=gains,
                 gain=spread(gains))
        )  # fmt: skip
    lines = label_fractions.markdown(rows, (0, 1), ["Said."]).splitlines()
    assert lines[2:5] == [
        "| random | 20.0 ± 14.1 |",
        "| seen | 40.0 ± 0.0 |",
        "| seen - random | +20.0 ± 14.1 |",
    ]
    assert lines[6:] == [
        "| weights | mode | labels | seed 0 | seed 1 |",
        "| --- | --- | --- | --- | --- |",
        "| random | probe | 1 % | 10.0 | 30.0 |",
        "| seen | probe | 1 % | 40.0 | 40.0 |",
        "",
        "Said.",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_has_a_config_that_says_its_fraction(name, tmp_path):
    family = FAMILIES[name]
    for percent in family.percents():
        for mode in label_fractions.MODES:
            for start in ("random", "given"):
                config = family.config(mode, start, percent)
                if config is None:
                    assert (mode, name) in {("probe", "nuscenes"), ("probe", "semantic_kitti")}
                    continue
                cfg = read_config(config)
                train = cfg["data"]["train"]
                listed = train.get("scans") or train.get("scenes")
                if percent == 100:
                    assert listed is None
                else:
                    short = {"tiny": "sim"}.get(name, name)
                    assert listed == f"configs/finetune/lists/{short}_{percent}pct.txt"
                    assert fractions.read_list(ROOT / listed)
                assert not any(
                    cfg["data"][s].get(k) for s in ("val", "test") for k in ("scans", "scenes")
                )
                assert (cfg["model"]["type"] == "kd.LinearProbe") == (mode == "probe")
                hook = cfg["hooks"][0]
                asked = hook["type"] == "kd.PretrainedBackbone" and hook.get("required", False)
                assert asked == (mode == "finetune" and start == "given")


def test_the_published_recipes():
    for percent in FAMILIES["nuscenes"].percents():
        for start, rates in (("random", [0.05]), ("given", [0.02, 2.0])):
            cfg = read_config(FAMILIES["nuscenes"].config("finetune", start, percent))
            assert [cfg["optimizer"]["lr"], *(g["lr"] for g in cfg["param_dicts"] or ())] == rates
            assert cfg["epoch"] == cfg["scheduler"]["epochs"] == (100 if percent == 1 else 50)
            assert cfg["batch_size"] == 16
    for start, rates in (("random", [0.05]), ("given", [0.05, 2.0])):
        cfg = read_config(FAMILIES["semantic_kitti"].config("finetune", start, 1))
        assert [cfg["optimizer"]["lr"], *(g["lr"] for g in cfg["param_dicts"] or ())] == rates
        assert (cfg["batch_size"], cfg["epoch"], cfg["scheduler"]["epochs"]) == (10, 100, 100)
        assert cfg["model"]["backbone"]["num_classes"] == 19
    probe = read_config(FAMILIES["nuscenes"].config("probe", "given", 100))
    assert (probe["optimizer"]["lr"], probe["param_dicts"]) == (0.05, None)
    for config in CONFIGS:
        cfg = read_config(config)
        if "_tiny" not in config:
            rest = {k: v for k, v in cfg["optimizer"].items() if k != "lr"}
            assert rest == dict(type="SGD", momentum=0.9, dampening=0.1, weight_decay=1e-4)
            assert cfg["scheduler"]["type"] == "kd.EpochCosineLR"
        names = [entry["type"] for entry in cfg["model"]["criteria"]]
        assert names == ["CrossEntropyLoss", "LovaszLoss"]
        assert all(entry["ignore_index"] == -1 for entry in cfg["model"]["criteria"])


@pytest.mark.parametrize("mode", label_fractions.MODES)
def test_tiny_steps_do_not_depend_on_the_fraction(mode):
    steps = set()
    for percent, scans in ((1, 2), (10, 12), (100, 120)):
        for start in ("random", "given"):
            cfg = read_config(FAMILIES["tiny"].config(mode, start, percent))
            steps.add(cfg["epoch"] * scans // cfg["batch_size"])
            assert cfg["eval_epoch"] == 1
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("before", "family"),
    [("olivine_tiny", "tiny"), ("olivine_sr_unet34", "nuscenes"), ("olivine_sr_unet34", "semantic_kitti")],
)  # fmt: skip
def test_what_pretraining_leaves_fits(before, family):
    """The shipped pre-training's network goes into that of every cell, on the same voxels."""
    pretraining = read_config(f"configs/pretrain/{before}.py")
    with torch.device("meta"):
        student = MODELS.build(pretraining["model"]["student"])
    state = {f"student.{key}": value for key, value in student.state_dict().items()}
    for mode in label_fractions.MODES:
        for percent in FAMILIES[family].percents():
            config = FAMILIES[family].config(mode, "given", percent)
            if config is None:
                continue
            cfg = read_config(config)
            assert voxels_of(cfg) == voxels_of(pretraining) is not None, config
            for split in ("val", "test"):
                assert voxels_of({"data": {"train": cfg["data"][split]}}) == voxels_of(cfg)
            with torch.device("meta"):
                model = MODELS.build(cfg["model"])
            loaded, skipped = load_backbone(model.backbone, state)
            assert len(loaded) + len(skipped) == len(state)
            assert {key.partition(".")[0] for key in skipped} == {"final", "final_class_level"}


# Trainings at a time


def steps_of(tmp_path, monkeypatch, script, count=4):
    """Steps whose training is a small script: it gets the folder."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").write_text(script)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    return [
        demo.Step(f"step {i}", "c.py", tmp_path / f"run_{i}", {"seed": i, "save_path": str(tmp_path / f"run_{i}")})
        for i in range(count)
    ]  # fmt: skip


WRITE = """
import os, pathlib, sys, time
folder = pathlib.Path(next(w for w in sys.argv if w.startswith("save_path=")).partition("=")[2])
(folder / "model").mkdir(parents=True)
(folder / "result").mkdir()
(folder / "began").write_text(os.environ["OMP_NUM_THREADS"])
time.sleep(WAIT)
(folder / "model" / "model_last.pth").write_text("")
(folder / "result" / "metrics.json").write_text('{"mIoU": 0.5}')
"""


def test_jobs_run_beside_each_other(tmp_path, monkeypatch, capsys):
    steps = steps_of(tmp_path, monkeypatch, WRITE.replace("WAIT", "0.5"), 2)
    start = time.perf_counter()
    label_fractions.run_all(steps, 2)
    assert time.perf_counter() - start < 0.95
    assert all(step.finished() for step in steps)
    assert (steps[0].folder / "began").read_text() == str(
        max(1, label_fractions.workers.usable_cores() // 2)
    )


def test_a_failure_ends_the_others(tmp_path, monkeypatch, capfd):
    script = "import sys\nif 'seed=0' in sys.argv:\n    sys.exit('out of luck')\n"
    steps = steps_of(tmp_path, monkeypatch, script + WRITE.replace("WAIT", "30"))
    start = time.perf_counter()
    with pytest.raises(InputError, match="step 0: training ended with exit code 1"):
        label_fractions.run_all(steps, 2)
    assert time.perf_counter() - start < 10
    assert "out of luck" in capfd.readouterr().err
    assert not any(step.finished() for step in steps)
    assert not (tmp_path / "run_3").exists()


def test_an_ended_caller_starts_nothing(tmp_path):
    caller = label_fractions.Caller(1)
    process = threading.Thread(target=lambda: None)
    process.start()
    with pytest.raises(KeyboardInterrupt), caller.ended():
        raise KeyboardInterrupt
    assert caller(["tools/train.py"]) == 130
    process.join()


# Lists


def test_lists_are_written(tmp_path, streets, capsys):
    label_fractions.main(["--write-lists", str(tmp_path / "shipped")])
    names = {path.name for path in (ROOT / "configs" / "finetune" / "lists").iterdir()}
    assert {path.name for path in (tmp_path / "shipped").iterdir()} == names
    for name in names:
        shipped = ROOT / "configs" / "finetune" / "lists" / name
        assert (tmp_path / "shipped" / name).read_text() == shipped.read_text()
    label_fractions.main(["--write-lists", str(tmp_path / "own"), "--data-root", str(streets)])
    assert fractions.read_list(tmp_path / "own" / "sim_1pct.txt") == ["00_000000"]
    assert fractions.read_list(tmp_path / "own" / "sim_100pct.txt") == ["00_000000", "00_000001"]
    assert str(tmp_path / "own" / "sim_1pct.txt") in capsys.readouterr().out


def test_lists_in_the_order_of_a_table(tmp_path):
    names = fractions.nuscenes_scenes(1)[::-1]
    folder = tmp_path / "raw" / "v1.0-trainval"
    folder.mkdir(parents=True)
    table = [{"name": name} for name in ["scene-0003", *names]]  # the first one is of val
    (folder / "scene.json").write_text(json.dumps(table))
    label_fractions.write_lists(tmp_path / "out", "nuscenes", tmp_path)
    assert fractions.read_list(tmp_path / "out" / "nuscenes_1pct.txt") == names[99::100]
    (folder / "scene.json").write_text("[1]")
    with pytest.raises(InputError, match="scene.json: cannot be read as the table of scenes"):
        label_fractions.write_lists(tmp_path / "out", "nuscenes", tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretrained", "x"], "a name of its own"),
        (["--pretrained", "random=x.pth"], "a name of its own other than 'random'"),
        (["--pretrained", "a b=x.pth", "a-b=y.pth"], "a name of its own"),
        (["--pretrained", "a=nowhere.pth"], "nowhere.pth: cannot be read"),
        (["--seeds", "1", "1"], "--seeds 1 1: give each once"),
        (["--seeds", "-1"], "seeds are 0 or more"),
        (["--jobs", "0"], "jobs 1 or more"),
        (["--options", "weight=x"], "use --seeds, --out, --pretrained"),
        (["--fractions", "7"], "no config for probe and finetune at 7 %"),
        (["--family", "nuscenes", "--modes", "probe", "--fractions", "1"], "probing has 100 %"),
        (["--family", "semantic_kitti", "--modes", "probe"], "probing has none"),
        (["--options", "epochs=3"], "epoch"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, words, called):
    with pytest.raises(InputError, match=words):
        label_fractions.main(
            ["--out", str(tmp_path / "out"), "--data-root", str(tmp_path), *arguments]
        )
    assert called == []
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_for_every_seed(tmp_path, streets, backbone):
    for seed in (0, 2):
        content = {**torch.load(backbone), "epoch": seed}
        (tmp_path / str(seed)).mkdir()
        torch.save(content, tmp_path / str(seed) / "a.pth")

    def grid(seeds):
        given = {"own": str(tmp_path / "{seed}" / "a.pth"), "one": str(backbone)}
        return label_fractions.Grid(
            tmp_path / "out", FAMILIES["tiny"], given, [1], ["finetune"], seeds, streets
        )

    cells = {cell.start: steps for cell, steps in grid([0, 2]).cells.items()}
    assert [step.options["weight"] for step in cells["own"]] == [
        str(tmp_path / seed / "a.pth") for seed in ("0", "2")
    ]
    assert {step.options["weight"] for step in cells["one"]} == {str(backbone)}
    assert len({step.fingerprint for step in cells["own"]}) == 2
    with pytest.raises(InputError, match=r"1/a\.pth: cannot be read"):
        grid([0, 1])
