"""Completing one's own scans: what is written, what it depends on and what not, scores, bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.completion.distillation import completer_weights, plain_completer
from pointcept_kd.completion.metrics import CompletionScores
from pointcept_kd.data.clouds import read_points
from pointcept_kd.data.completion_pairs import condition_points
from pointcept_kd.data.ply import parse_ply
from pointcept_kd.data.splat import height_colors, height_span
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.config import Config
from tools import complete

from .data.test_pictures import decode_png

ROOT = Path(__file__).resolve().parents[1]
SIZE = dict(cr=0.125, voxel_size=0.4)
TEACHER = dict(
    type="kd.DiffusionCompletion",
    encoder=dict(type="kd.ConditionEncoder", **SIZE),
    denoiser=dict(type="kd.Denoiser", **SIZE),
    repeat=4,
    steps=2,
    guidance=1.0,
)
STUDENT = dict(type="kd.ScoreDistillation", teacher=dict(model=TEACHER, weight="gone.pth"))


def busy(model):
    """A network that sees its condition and the time: before training, signals fade on the way to its head."""
    with torch.no_grad():
        model.denoiser.last[2].weight.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        cloud = torch.from_numpy(street()[:, :3])
        batch = dict(coord=cloud[::10], offset=torch.tensor([len(cloud[::10])]))
        batch |= dict(complete=cloud, complete_offset=torch.tensor([len(cloud)]))
        model.train().losses(batch)
    return model.eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a teacher: config.py and model/model_last.pth."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_run(folder, TEACHER, busy(MODELS.build(TEACHER)).state_dict())
    return folder


def save_run(folder, model, weights, name="model_last.pth", **keys):
    (folder / "model").mkdir(parents=True, exist_ok=True)
    data = dict(num_classes=1, test=dict(type="kd.CompletionDataset", points=800))
    Config(dict(model=model, data=data, save_path=str(folder))).dump(folder / "config.py")
    torch.save(dict(state_dict=weights, **keys), folder / "model" / name)


@pytest.fixture
def run(run_folder, tmp_path, monkeypatch, capsys):
    """Call the tool in an empty folder with the teacher above: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(complete, "WIDTH", 100)

    def call(*words, out="out", weight=run_folder / "model" / "model_last.pth"):
        words = [*words, "--out", out, *(["--weight", weight] if weight else [])]
        code = complete.main([*map(str, words)])
        return code, *capsys.readouterr()

    return call


def street(points=3000, seed=0):
    """Ground, a wall and a post around a sensor; x, y, z, intensity."""
    rng = np.random.default_rng(seed)
    ground = np.c_[rng.uniform(-20, 20, (points, 2)), rng.normal(-1.7, 0.02, points)]
    along, up = rng.uniform((-20, -1.7), (20, 3), (points // 4, 2)).T
    wall = np.c_[along, np.full(points // 4, 9.0), up]
    post = np.c_[np.full(60, 6.0), np.full(60, -4.0), np.linspace(-1.7, 4, 60)]
    cloud = np.concatenate([ground, wall, post])
    return np.c_[cloud, rng.uniform(0, 1, len(cloud))].astype("<f4")


def ply(name, out="out"):
    path = Path(out, f"{name}.ply")
    return parse_ply(path, path.read_bytes())


def summary(name, out="out"):
    return json.loads(Path(out, f"{name}.json").read_text())


def written(out="out"):
    """All that is written, but the JSON files, which hold seconds."""
    files = [p for p in Path(out).rglob("*") if p.is_file() and p.suffix != ".json"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


# --- what is written ------------------------------------------------------------------------------


def test_the_files_of_a_scan(run, run_folder):
    rows = street()
    rows[5, 0] = np.nan
    rows[6, :3] = (90, 0, 0)
    rows.tofile("scan.bin")
    code, out, err = run("scan.bin")
    assert (code, err) == (0, "")
    assert "2 steps, guidance 1, 2 network calls per scan" in out
    assert "1 scan completed; see out" in out
    facts = summary("scan")
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "scan.json", "scan.ply", "scan_birdseye.png", "scan_perspective.png",
    ]  # fmt: skip
    vertices = ply("scan")
    coord = read_points("out/scan.ply")["coord"]
    assert len(coord) == len(vertices) == facts["completed"] > 100
    assert vertices.dtype.names == ("x", "y", "z", "red", "green", "blue")
    # Colours are of heights, on the scale of the scan.
    near = np.delete(rows, [5, 6], 0)[:, :3]
    span = height_span(near)
    seen = np.stack([vertices[c] for c in ("red", "green", "blue")], 1)
    np.testing.assert_array_equal(seen, height_colors(coord[:, 2], span))
    # The heights and the range of the scan bound the completion.
    assert coord[:, 2].max() < 4
    assert np.linalg.norm(coord, axis=1).max() < 50
    for kind, height in (("birdseye", 100), ("perspective", 60)):
        picture = decode_png(Path(f"out/scan_{kind}.png").read_bytes())
        assert picture.shape == (height, 2 * 100 + 6, 3)
        assert len(np.unique(picture[:, :100].reshape(-1, 3), axis=0)) > 50
        assert len(np.unique(picture[:, 106:].reshape(-1, 3), axis=0)) > 50
    own = np.linalg.norm(near, axis=1)
    assert facts == {
        "file": str(Path("scan.bin").resolve()),
        "points": len(rows),
        "not_finite": 1,
        "within_range": int(((own > 3.5) & (own < 50)).sum()),
        "condition": 80,  # a tenth of the config's points
        "sampled": 320,
        "completed": len(coord),
        "refined": None,
        "remark": "",
        "steps": 2,
        "guidance": 1.0,
        "network_calls": 2,
        "seed": 0,
        "solver": "sde",
        "process": "local",
        "seconds": facts["seconds"],
        "target": None,
        "scores": None,
        "device": "cpu",
        "threads": 1,
        "config": str(run_folder / "config.py"),
        "weight": str(run_folder / "model" / "model_last.pth"),
        "refine": None,
    }
    assert list(facts["seconds"]) == ["read", "pre", "sample", "post", "write"]
    assert min(facts["seconds"].values()) >= 0
    assert facts["seconds"]["sample"] > 0


def test_completing_is_what_the_network_does(run, run_folder):
    rows = street()
    rows.tofile("scan.bin")
    assert run("scan.bin", "--no-png")[0] == 0
    network = MODELS.build(TEACHER).eval()
    network.load_state_dict(torch.load(run_folder / "model" / "model_last.pth")["state_dict"])
    coord = torch.from_numpy(condition_points(rows, 80))
    expected = network({"coord": coord, "offset": torch.tensor([80]), "name": ["scan"]})
    np.testing.assert_array_equal(
        read_points("out/scan.ply")["coord"], expected["completed"].numpy()
    )


def test_less_is_written_where_it_is_asked(run):
    street().tofile("scan.bin")
    assert run("scan.bin", "--no-ply", "--no-png")[0] == 0
    assert [p.name for p in Path("out").iterdir()] == ["scan.json"]


# --- what the result depends on -------------------------------------------------------------------


def test_twice_the_same_whatever_else_is_completed(run):
    Path("a").mkdir()
    Path("b").mkdir()
    for number in range(2):
        street(seed=number).tofile(f"a/{number}.bin")
    street(seed=5).tofile("b/1.bin")
    assert run("a")[0] == 0
    together = written()
    assert len(together) == 6
    assert run("a", out="again")[0] == 0
    assert written("again") == together
    assert run("a/1.bin", "a/0.bin", out="turned")[0] == 0
    assert written("turned") == together
    assert run("a/1.bin", out="alone")[0] == 0
    assert written("alone").items() <= together.items()
    # Another scan of the same name gets a longer name and no other noise.
    assert run("b/1.bin", "a/1.bin", "--no-png", out="alike")[0] == 0
    found = {name[-7:]: content for name, content in written("alike").items()}
    assert found["a_1.ply"] == together["1.ply"]
    assert found["b_1.ply"] != together["1.ply"]


def test_any_number_of_threads(run):
    street().tofile("scan.bin")
    before = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            assert run("scan.bin", "--points", 2000, "--no-png", out=f"{number}")[0] == 0
            assert torch.get_num_threads() == number
            results.append(written(f"{number}"))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_options_that_change_the_result(run):
    rows = street()
    rows.tofile("scan.bin")
    own = np.linalg.norm(rows[:, :3], axis=1)
    near = int(((own > 3.5) & (own < 12)).sum())
    changes = [
        ([], {}),
        (["--steps", 3], {"steps": 3, "network_calls": 3}),
        (["--guidance", 1.5], {"guidance": 1.5, "network_calls": 4}),
        (["--seed", 7], {"seed": 7}),
        (["--points", 1200], {"condition": 300, "sampled": 1200}),
        (["--options", "+model.sampling.solver=ode"], {"solver": "ode"}),
        (["--options", "+data.test.radius=12"], {"within_range": near}),
    ]
    facts = []
    for number, (words, _) in enumerate(changes):
        assert run("scan.bin", "--no-png", *words, out=f"{number}")[0] == 0
        facts.append(summary("scan", f"{number}"))
        for key in ("seconds", "completed"):
            del facts[-1][key]
    for got, (_, said) in zip(facts, changes):
        assert got == {**facts[0], **said}
    assert len({written(f"{number}")["scan.ply"] for number in range(7)}) == 7


def test_refined(run, tmp_path):
    street().tofile("scan.bin")
    refiner = dict(type="kd.CompletionRefinement", network=dict(type="kd.Refiner", **SIZE))
    save_run(tmp_path / "r", refiner, MODELS.build(refiner).state_dict())
    weight = tmp_path / "r" / "model" / "model_last.pth"
    run("scan.bin", "--no-png")
    code, out, _ = run("scan.bin", "--no-png", "--refine", weight, "--seed", 0, out="fine")
    assert code == 0
    facts, plain = summary("scan", "fine"), read_points("out/scan.ply")["coord"]
    assert facts["completed"] == len(plain)
    assert facts["refined"] == 6 * len(plain)
    assert facts["refine"] == str(weight)
    assert list(facts["seconds"]) == ["read", "pre", "sample", "post", "refine", "write"]
    assert f"{6 * len(plain)} refined" in out
    moved = read_points("fine/scan.ply")["coord"]
    offsets = moved - np.repeat(plain, 6, axis=0)
    assert 0 < np.abs(offsets).max() <= 1 + 1e-5
    assert np.abs(offsets).max(1).min() > 0


# --- scores ---------------------------------------------------------------------------------------


def test_scores_against_true_clouds(run):
    Path("in").mkdir()
    Path("true").mkdir()
    clouds = {}
    for number in range(2):
        street(seed=number).tofile(f"in/{number}.bin")
        clouds[str(number)] = street(6000, seed=10 + number)[:, :3]
        np.save(f"true/{number}.npy", clouds[str(number)])
    code, out, _ = run("in", "--target", "true")
    assert code == 0
    expected = CompletionScores()
    for name, cloud in clouds.items():
        row = expected.add(name, read_points(f"out/{name}.ply")["coord"], cloud)
        facts = summary(name)
        assert facts["scores"] == json.loads(json.dumps(row.as_dict()))
        assert {"cd", "jsd_3d", "jsd_bev", "iou_0.5", "iou_0.2", "iou_0.1"} < {*facts["scores"]}
        assert facts["target"] == f"true/{name}.npy"
        assert f"{name}: CD {row.values['cd']:.4f} m, JSD" in out
        picture = decode_png(Path(f"out/{name}_birdseye.png").read_bytes())
        assert picture.shape == (100, 3 * 100 + 12, 3)
        assert (picture[:, 212:] > 60).any(2).sum() > 100
    assert f"all 2: {expected.summary().headline}" in out
    # A file for a single scan; nothing else changes.
    before = Path("out/1.ply").read_bytes()
    assert run("in/1.bin", "--target", "true/1.npy", "--no-png", out="one")[0] == 0
    assert summary("1", "one")["scores"] == summary("1")["scores"]
    assert Path("one/1.ply").read_bytes() == before
    words = ["--target", "true", "--options", "+data.test.radius=12", "+model.max_range=12.0"]
    assert run("in/1.bin", *words, "--no-png", out="near")[0] == 0
    cloud = clouds["1"][np.linalg.norm(clouds["1"], axis=1) < 12]
    row = CompletionScores().add("1", read_points("near/1.ply")["coord"], cloud)
    assert summary("1", "near")["scores"] == json.loads(json.dumps(row.as_dict()))


def test_targets_that_are_not_there(run):
    Path("in").mkdir()
    Path("true").mkdir()
    for number in range(3):
        street(seed=number).tofile(f"in/{number}.bin")
    np.save("true/0.npy", street()[:, :3])
    np.save("true/2.npy", street()[:, :3])
    street().tofile("true/2.bin")
    code, _, err = run("in", "--target", "true", "--no-png", "--no-ply")
    assert code == 1
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("in/1.bin: no target 1 (.bin, .npy, .ply, .pcd) in true")
    assert "in/2.bin: true/2.bin and true/2.npy are two targets" in lines[1]
    assert lines[2:] == ["2 of 3 scans failed, see above"]
    with pytest.raises(InputError, match="one file for 3 scans"):
        run("in", "--target", "true/0.npy")
    with pytest.raises(InputError, match="there is no such file or folder"):
        run("in", "--target", "nowhere")


# --- bad input ------------------------------------------------------------------------------------


def test_bad_scans_among_good_ones(run):
    good = street()
    good.tofile("good.bin")
    Path("cut.bin").write_bytes(good.tobytes()[:-3])
    Path("nonsense.npy").write_bytes(b"nonsense")
    np.save("nan.npy", np.full((9, 3), np.nan))
    np.save("close.npy", good[:, :3] / 100)
    np.save("map.npy", good[:, :3] + np.array([4e5, 5e6, 0]))
    np.save("flat.npy", good[:, :3] * np.array([1, 1, 0]))
    scans = ["cut.bin", "nonsense.npy", "nan.npy", "close.npy", "good.bin", "map.npy", "flat.npy"]
    code, out, err = run(*scans, "--no-png")
    assert code == 1
    expected = (
        "cut.bin: 60957 bytes are no whole number",
        "nonsense.npy: not a readable .npy array",
        "nan.npy: none of its 9 points is finite",
        "close.npy: none of 3810 points lies 3.5 to 50 m from the sensor",
        "map.npy: none of 3810 points lies 3.5 to 50 m from the sensor; its points lie around",
        "flat.npy: none of the 320 completed points lies within 50 m",
    )
    lines = err.splitlines()
    assert lines.pop() == "6 of 7 scans failed, see above"
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("error: ")
        assert f"/{text}" in line
    assert "1 scan completed" in out
    assert {p.stem for p in Path("out").iterdir()} == {"good"}
    assert run("cut.bin")[0] == 2


def test_a_network_that_leaves_every_bound(run, run_folder):
    street().tofile("scan.bin")
    content = torch.load(run_folder / "model" / "model_last.pth")
    content["state_dict"]["denoiser.last.2.bias"] += 1e9
    torch.save(content, "wild.pth")
    code, _, err = run("scan.bin", "--config-file", run_folder / "config.py", weight="wild.pth")
    assert code == 2
    assert "scan.bin: sampling went astray (" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.bin"], "there is no such file or folder"),
        (["scan.bin", "--steps", 0], "--steps 0: expected 1 to 999"),
        (["scan.bin", "--steps", 1000], "expected 1 to 999"),
        (["scan.bin", "--points", 7], "--points 7: expected 8 or more"),
        (["scan.bin", "--guidance", "nan"], "expected a number"),
        (["scan.bin", "--seed", -1], "--seed -1: expected 0 to"),
        (["scan.bin", "--threads", 0], "--threads 0: expected 1 or more"),
        (["scan.bin", "--device", "abacus"], "is no device"),
        (["scan.bin", "--refine", "no.pth"], "no.pth does not exist"),
        (["scan.bin", "--options", "model.stepz=3"], "stepz"),
        (["scan.bin", "--weight", "no.pth"], "no.pth"),
    ],
)
def test_bad_options(run, words, said):
    street().tofile("scan.bin")
    with pytest.raises(InputError) as caught:
        run(*words, **({"weight": None} if "--weight" in words else {}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_networks_of_another_kind(run):
    street().tofile("scan.bin")
    for model, said in (
        (dict(type="kd.Refiner"), "kd.Refiner completes no scans"),
        (None, "no model completes no scans"),
    ):
        Config(dict(model=model, data=dict(num_classes=1))).dump("c.py")
        torch.save(dict(state_dict={}), "w.pth")
        with pytest.raises(InputError, match=said):
            run("scan.bin", "--config-file", "c.py", weight="w.pth")


# --- which network --------------------------------------------------------------------------------


def test_the_student_of_a_distillation(run, run_folder, tmp_path):
    """Its weights from any of its files, its settings, and the same as a plain network that has both."""
    street().tofile("scan.bin")
    torch.manual_seed(1)
    for ema in (0.0, 0.9):
        options = dict(STUDENT, ema=ema, steps=3, repeat=5, guidance=1.0)
        options["sampling"] = dict(solver="ode")
        random = {**options, "teacher": dict(STUDENT["teacher"], weight="random")}
        model = MODELS.build(random)
        with torch.no_grad():
            if ema:
                model.average.last[2].bias += 0.2
            model.watchers[0].last[2].bias += 0.3
        folder = tmp_path / f"s{ema}"
        save_run(folder, options, model.export_state_dict(), "student_last.pth")
        save_run(folder, options, model.state_dict(), grids={})
        results = []
        for name in ("student_last.pth", "model_last.pth"):
            assert run("scan.bin", "--no-png", weight=folder / "model" / name, out=name)[0] == 0
            results.append(written(name))
            facts = summary("scan", name)
            assert (facts["steps"], facts["solver"], facts["sampled"]) == (3, "ode", 400)
        assert results[0] == results[1]
    plain = dict(TEACHER, steps=3, repeat=5, sampling=dict(solver="ode"))
    save_run(tmp_path / "p", plain, model.export_state_dict())
    weight = tmp_path / "p" / "model" / "model_last.pth"
    assert run("scan.bin", "--no-png", weight=weight, out="plain")[0] == 0
    assert written("plain") == results[0]
    # The teacher's checkpoint by the student's config: few steps without distillation.
    assert run("scan.bin", "--no-png", "--config-file", folder / "config.py", out="teacher")[0] == 0
    assert written("teacher") != results[0]
    assert summary("scan", "teacher")["steps"] == 3


def test_an_aligned_teacher(tmp_path):
    options = dict(type="kd.PreferenceAlignment", teacher=dict(model=TEACHER, weight="gone.pth"))
    plain = plain_completer(options, "c.py")
    assert (plain["type"], plain["steps"], plain["guidance"]) == ("kd.DiffusionCompletion", 2, 1.0)
    MODELS.build(plain).load_state_dict(
        completer_weights(
            MODELS.build({**options, "teacher": dict(options["teacher"], weight="random")}).state_dict()
        )
    )  # fmt: skip


def test_released_weights_say_their_network(run, run_folder):
    street().tofile("scan.bin")
    content = torch.load(run_folder / "model" / "model_last.pth")
    torch.save({**content, "model_config": TEACHER}, "released.pth")
    assert run("scan.bin", "--points", 800, "--no-png", weight="released.pth")[0] == 0
    facts = summary("scan")
    assert facts["config"] is None
    assert (facts["condition"], facts["steps"]) == (200, 2)
    with pytest.raises(InputError, match="need a --config-file"):
        run("scan.bin", "--options", "model.steps=3", weight="released.pth")


def test_the_points_of_a_config():
    of = complete.condition_of
    assert of(dict(test=dict(points=4000)), None, 5) == (400, 50)
    assert of(dict(test=dict(points=4000, condition=90, radius=20)), None, 10) == (90, 20)
    assert of(dict(val=dict(points=50), test=None), None, 10) == (5, 50)
    assert of(dict(test=dict(points=50, radius=20)), 4000, 5) == (800, 20)
    assert of(None, 4009, 10) == (400, 50)
    assert of(None, None, 10) == (18_000, 50)


def test_the_network_that_was_trained_last(run, run_folder, monkeypatch):
    street().tofile("scan.bin")
    monkeypatch.setattr(complete, "ROOT", Path("nowhere"))
    with pytest.raises(InputError, match=r"train a teacher with `python tools/train.py"):
        run("scan.bin", weight=None)
    refiner = dict(type="kd.CompletionRefinement", network=dict(type="kd.Refiner", **SIZE))
    runs = Path("exp/sim_tiny")
    for name in ("completion_teacher", "completion_score", "completion_begun"):
        shutil.copytree(run_folder, runs / name)
    shutil.rmtree(runs / "completion_begun" / "model")
    save_run(runs / "completion_refiner", refiner, {})
    now = time.time()
    for age, name in enumerate(["completion_refiner", "completion_score", "completion_teacher"]):
        os.utime(runs / name / "model" / "model_last.pth", (now - age, now - age))
    chosen = complete.choose(None, None)
    last = runs / "completion_score"
    assert chosen == (str(last / "config.py"), str(last / "model" / "model_last.pth"))
    os.utime(runs / "completion_teacher" / "model" / "model_last.pth", (now + 9, now + 9))
    assert "completion_teacher" in complete.choose(None, None)[1]
    assert run("scan.bin", "--no-png", "--no-ply", weight=None)[0] == 0
    config = run_folder / "config.py"
    assert complete.choose(str(config), None)[1] == str(run_folder / "model" / "model_last.pth")


def test_as_a_command(run_folder, tmp_path):
    street().tofile(tmp_path / "scan.bin")
    weight = run_folder / "model" / "model_last.pth"
    command = [sys.executable, str(ROOT / "tools" / "complete.py"), "scan.bin", "--weight", str(weight)]  # fmt: skip
    done = subprocess.run([*command, "--no-png"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exp" / "complete" / "scan.ply").is_file()
