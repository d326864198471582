"""The completion tester against scores computed by hand; seeds, batches, processes; distillations; folders; options."""

import csv
import json
import multiprocessing
import statistics
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pointcept_kd.completion.diffusion import DiffusionCompletion
from pointcept_kd.completion.evaluator import READERS, scored_clouds
from pointcept_kd.completion.metrics import CompletionScores
from pointcept_kd.completion.refinement import load_refinement
from pointcept_kd.completion.sampler import crop, inside
from pointcept_kd.completion.tester import CompletionTester, load_completer
from pointcept_kd.data.clouds import write_ply
from pointcept_kd.host import HOOKS, MODELS, TESTERS, InputError, kd, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.runtime import run_tool
from tools import test as test_tool

from .fakes import FakeDenoiser, FakeEncoder

SIZE = dict(cr=0.125, voxel_size=0.8)


@kd.MODELS.register_module(force=True)
class EncoderByName(FakeEncoder):
    """The linear stand-in as configs name it."""


@kd.MODELS.register_module(force=True)
class DenoiserByName(FakeDenoiser):
    """The same for the denoiser, `size` times the identity; it builds on any device."""

    def __init__(self, size=0.3, width=3):
        torch.nn.Module.__init__(self)
        self.point = torch.nn.Parameter(size * torch.eye(width))
        self.time = torch.nn.Parameter(torch.full((3,), size))
        self.scan = torch.nn.Parameter(size * torch.eye(3))
        self.calls = []


PLAIN = dict(
    type="kd.DiffusionCompletion",
    encoder=dict(type="kd.EncoderByName"),
    denoiser=dict(type="kd.DenoiserByName"),
    repeat=3,
    steps=2,
    guidance=2.0,
)


@kd.DATASETS.register_module(force=True)
class TinyPairs(torch.utils.data.Dataset):
    """Scans and the scenes around them; no two have equally many points."""

    def __init__(self, count=5, drives=1, split="val"):
        self.names = [f"{8 + i % drives:02d}/{i // drives:06d}" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def get_data_name(self, index):
        return self.names[index]

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        coord = torch.from_numpy(rng.uniform(-8, 8, (30 + index, 3))).float()
        target = torch.cat([coord, coord + 0.3])[: 55 + index]
        ends = dict(offset=torch.tensor([len(coord)]), target_offset=torch.tensor([len(target)]))
        return dict(coord=coord, target=target, name=self.names[index], **ends)


def config(path, **changes):
    values = dict(
        save_path=str(path),
        device="cpu",
        num_worker=0,
        batch_size=2,
        model=PLAIN,
        data=dict(test=dict(type="kd.TinyPairs", split="val")),
    )
    return Config({**values, **changes})


def fake(**options):
    settings = dict(repeat=3, steps=2, guidance=2.0)
    return DiffusionCompletion(FakeEncoder(), FakeDenoiser(), **{**settings, **options}).eval()


def by_hand(model, steps, seed, guidance=None, refiner=None, count=5, **scoring):
    """Scores and clouds of the data set, scan by scan."""
    scores, clouds, data = CompletionScores(**scoring), [], TinyPairs(count)
    for index in range(count):
        scan = data[index]
        coord, ends = scan["coord"], scan["offset"]
        noise = zlib.crc32(scan["name"].encode(), seed)
        points, rows = model.complete(coord, ends, [noise], steps, guidance)
        points, rows = crop(points, rows, inside(points, rows, coord, ends, model.max_range))
        if refiner is not None:
            points, rows = refiner.refine(points, rows)
        clouds.append(points.numpy())
        scores.add(scan["name"], clouds[-1], scan["target"])
    return scores, clouds


def results(path):
    """What a test left: metrics.json, and the lines of scans.csv."""
    with open(path / "result" / "scans.csv") as file:
        lines = list(csv.DictReader(file))
    return json.loads((path / "result" / "metrics.json").read_text()), lines


def timeless(found):
    """Results without what depends on the clock and the machine."""
    content, lines = json.loads(json.dumps(found))
    content.pop("made_with")
    for row in content["rows"]:
        for key in ("seconds", "timed"):
            row.pop(key)
    return content, [
        {k: v for k, v in line.items() if not k.startswith("seconds_")} for line in lines
    ]


def test_scores_by_hand(tmp_path):
    model = fake()
    scoring = dict(legacy=True, emd_points=10)
    made = CompletionTester(
        config(tmp_path), model=model, steps=[3, 1], seeds=[0, 5], guidance=3.5, **scoring
    ).test()
    content, lines = results(tmp_path)
    assert content == json.loads(json.dumps(made))
    assert [(row["steps"], row["calls"]) for row in content["rows"]] == [(3, 6), (1, 2)]
    assert len(lines) == 20
    for row in content["rows"]:
        scores = {s: by_hand(model, row["steps"], s, 3.5, **scoring)[0] for s in (0, 5)}
        values = {seed: s.summary().values() for seed, s in scores.items()}
        assert values[0] != values[5]
        for key in values[0]:
            pair = [values[0][key], values[5][key]]
            assert row["mean"][key] == pytest.approx(statistics.fmean(pair), rel=1e-12)
            spread = abs(pair[0] - pair[1]) / 2**0.5
            assert row["std"][key] == pytest.approx(spread, rel=1e-6, abs=1e-12)
        for seed, score in scores.items():
            assert row["seeds"][str(seed)] == json.loads(json.dumps(score.as_dict(rows=False)))
            own = [
                line
                for line in lines
                if (line["steps"], line["seed"]) == (str(row["steps"]), str(seed))
            ]
            wanted = sorted(score.rows, key=lambda scan: scan.name)
            assert [line["name"] for line in own] == [scan.name for scan in wanted]
            for line, scan in zip(own, wanted):
                for key, value in scan.as_dict().items():
                    if key != "name":
                        assert float(line[key]) == value
    settings = content["settings"]
    assert (settings["guidance"], settings["seeds"]) == (3.5, [0, 5])
    assert content["scans"] == 5
    assert "data.test, split val" in content["protocol"]


def test_by_default_the_scores_of_validation(tmp_path):
    model = fake()
    scores = CompletionScores()
    data = TinyPairs()
    for index in range(5):
        batch = collate_fn([data[index]])
        with torch.no_grad():
            for name, cloud, target in scored_clouds(model(batch), batch):
                scores.add(name, cloud, target)
    made = CompletionTester(config(tmp_path), model=model).test()
    assert made["rows"][0]["steps"] == 2
    assert made["rows"][0]["mean"] == scores.summary().values()
    assert set(made["rows"][0]["std"].values()) == {0.0}


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_change_nothing(tmp_path, batch_size):
    found = []
    for size in (1, batch_size):
        cfg = config(tmp_path / str(size), batch_size_test_per_gpu=size)
        tester = CompletionTester(cfg, model=fake(), seeds=[0, 1])
        assert len(tester.test_loader) == -(-5 // size)
        tester.test()
        found.append(timeless(results(tmp_path / str(size))))
    assert found[0] == found[1]


def test_the_table_in_the_log(tmp_path, caplog):
    made = CompletionTester(
        config(tmp_path), model=fake(), steps=[2, 1], seeds=[0, 1], verbose=True
    ).test()
    lines = [record.getMessage() for record in caplog.records]
    at = next(i for i, line in enumerate(lines) if line.split()[:3] == ["steps", "calls", "cd"])
    for row, line in zip(made["rows"], lines[at + 1 :]):
        cells = line.split()
        assert cells[:2] == [str(row["steps"]), str(2 * row["steps"])]
        assert cells[2:5] == [f"{row['mean']['cd']:.4f}", "±", f"{row['std']['cd']:.4f}"]
        assert cells[-1] == f"{row['seconds']['total']:.3f}"
    told = [line for line in lines if line.startswith("Test: 08/000003 [4]")]
    assert len(told) == 4
    assert "1 steps, noise seed 1" in told[-1]


def test_seconds_after_the_warm_up(tmp_path):
    model = fake()
    made = CompletionTester(config(tmp_path), model=model, seeds=[0, 1], warmup=3).test()
    row = made["rows"][0]
    assert row["timed"] == 4  # two scans, two seeds
    assert list(row["seconds"]) == ["encode", "sample", "post", "total"]
    assert all(value > 0 for value in row["seconds"].values())
    _, lines = results(tmp_path)
    late = [line for line in lines if line["name"] in ("08/000003", "08/000004")]
    for part in ("encode", "sample", "post"):
        median = statistics.median(float(line[f"seconds_{part}"]) for line in late)
        assert row["seconds"][part] == pytest.approx(median, abs=2e-6)
    assert not model.encoder._forward_hooks  # the clock is gone
    made = CompletionTester(config(tmp_path), model=model, warmup=5).test()
    assert (made["rows"][0]["seconds"], made["rows"][0]["timed"]) == ({}, 0)


def test_an_empty_completion_is_told(tmp_path, caplog):
    made = CompletionTester(config(tmp_path), model=fake(max_range=1e-3)).test()
    assert made["rows"][0]["mean"]["cd"] is None
    assert "5 completions have no points" in caplog.text
    assert any(" inf " in record.getMessage() for record in caplog.records)


# --- refined and finished clouds ------------------------------------------------------------------


def write_refiner(folder):
    torch.manual_seed(3)
    entry = dict(type="kd.CompletionRefinement", network=dict(type="kd.Refiner", **SIZE))
    (folder / "model").mkdir(parents=True)
    state = MODELS.build(entry).state_dict()
    torch.save(dict(state_dict=state), folder / "model" / "model_last.pth")
    Config(dict(model=entry)).dump(folder / "config.py")
    return str(folder / "model" / "model_last.pth")


def test_refined_clouds(tmp_path):
    model, weight = fake(), write_refiner(tmp_path / "refiner")
    made = CompletionTester(
        config(tmp_path), model=model, refine=weight, save_predictions=True, warmup=0
    ).test()
    scores, clouds = by_hand(model, 2, 0, refiner=load_refinement(weight))
    assert made["rows"][0]["mean"] == scores.summary().values()
    assert list(made["rows"][0]["seconds"]) == ["encode", "sample", "post", "refine", "total"]
    assert made["refine"] == weight
    saved = np.load(tmp_path / "result" / "08_000004.npy")
    assert saved.dtype == np.float32
    assert np.array_equal(saved, clouds[4])


@pytest.mark.parametrize("change", [None, "short", "bin", "ply"])
def test_finished_clouds_score_as_they_did(tmp_path, change, monkeypatch):
    monkeypatch.setitem(READERS, ".ply", test_tool.read_ply)
    made = CompletionTester(config(tmp_path), model=fake(), save_predictions=True).test()
    folder = tmp_path / "clouds"
    folder.mkdir()
    for path in (tmp_path / "result").glob("*.npy"):
        if change == "ply":
            cloud = np.load(path)
            write_ply(folder / f"{path.stem}.ply", cloud, np.zeros(cloud.shape, np.uint8))
        elif change == "bin":
            np.pad(np.load(path), ((0, 0), (0, 1))).tofile(folder / f"{path.stem}.bin")
        else:
            path.rename(folder / (path.name.partition("_")[2] if change else path.name))
    again = CompletionTester(config(tmp_path / "again"), folder=str(folder)).test()
    assert again["rows"][0]["mean"] == made["rows"][0]["mean"]
    assert again["rows"][0]["steps"] is None
    assert again["weight"] is None
    _, lines = results(tmp_path / "again")
    assert [line["name"] for line in lines] == TinyPairs().names


def test_a_folder_that_lacks_a_cloud(tmp_path):
    np.save(tmp_path / "08_000000.npy", np.zeros((4, 3)))
    with pytest.raises(InputError, match=r"no cloud of scan 08/000001, expected 08_000001 with"):
        CompletionTester(config(tmp_path), folder=str(tmp_path))
    # 000000 is the name of a scan in each of two drives.
    (tmp_path / "08_000000.npy").rename(tmp_path / "000000.npy")
    cfg = config(tmp_path, data=dict(test=dict(type="kd.TinyPairs", count=2, drives=2)))
    with pytest.raises(InputError, match="no cloud of scan 08/000000"):
        CompletionTester(cfg, folder=str(tmp_path))
    with pytest.raises(InputError, match="scores finished clouds; leave out steps"):
        CompletionTester(config(tmp_path), folder=str(tmp_path), steps=4)


# --- weights --------------------------------------------------------------------------------------


def distilled(kind, **options):
    return dict(type=kind, teacher=dict(model=PLAIN, weight="not looked at"), **options)


def trained(kind, path, **options):
    """A distillation whose student and average have left the teacher, and its two files."""
    model = MODELS.build(
        {**distilled(kind, **options), "teacher": dict(model=PLAIN, weight="random")}
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for network in (model.denoiser, getattr(model, "average", None)):
            for p in network.parameters() if network is not None else ():
                p += 0.05 * torch.randn(p.shape, generator=generator)
    torch.save(dict(epoch=3, state_dict=model.state_dict()), path / "model_last.pth")
    torch.save(dict(epoch=3, state_dict=model.export_state_dict()), path / "student_last.pth")
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "options", "steps", "guidance"),
    [
        ("kd.ScoreDistillation", dict(steps=1, guidance=1.5), 1, 1.5),
        ("kd.ScoreDistillation", dict(ema=0.5), 8, 3.5),
        ("kd.PreferenceDistillation", dict(steps=1), 1, 3.5),
        ("kd.PreferenceAlignment", dict(max_range=7.0), 2, 2.0),
    ],
)
def test_of_a_distillation_the_student_alone(tmp_path, kind, options, steps, guidance):
    model = trained(kind, tmp_path, **options)
    for name in ("model_last.pth", "student_last.pth"):
        path = str(tmp_path / name)
        cfg = config(tmp_path, model=distilled(kind, **options), weight=path)
        tester = CompletionTester(cfg, steps=1)
        assert type(tester.model) is DiffusionCompletion
        assert (tester.model.steps, tester.model.guidance) == (steps, guidance)
        assert tester.model.max_range == model.max_range
        for key, value in model.completing.state_dict().items():
            assert torch.equal(tester.model.denoiser.state_dict()[key], value)
    scores = by_hand(model, 1, 0)[0]
    assert tester.test()["rows"][0]["mean"] == scores.summary().values()


def test_an_aligned_teacher_teaches(tmp_path):
    aligned = trained("kd.PreferenceAlignment", tmp_path)
    for name in ("model_last.pth", "student_last.pth"):
        entry = dict(model=PLAIN, weight=str(tmp_path / name))
        student = MODELS.build(dict(type="kd.ScoreDistillation", teacher=entry))
        for key, value in aligned.denoiser.state_dict().items():
            assert torch.equal(student.teacher.state_dict()[key], value)
            assert torch.equal(student.denoiser.state_dict()[key], value)


CONFIGS = Path(__file__).resolve().parents[2] / "configs/completion"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("teacher_*.py")), ids=lambda p: p.stem)
def test_the_teachers_of_the_configs(path):
    cfg = Config.fromfile(path)
    assert cfg.test.type == "kd.CompletionTester"
    if "teacher" not in cfg.model:
        return
    entry = cfg.model.teacher
    teacher = Config.fromfile(CONFIGS.parents[1] / entry.config)
    assert entry.weight == f"{teacher.save_path}/model/model_last.pth"
    assert entry.model == teacher.model
    assert cfg.data == teacher.data
    if path.stem.startswith("teacher_to"):
        # The aligned teacher may stand in for the plain one.
        aligned = Config.fromfile(
            path.with_name("teacher_dpo" + "_tiny" * ("_tiny" in path.stem) + ".py")
        )
        assert aligned.model.teacher.model == entry.model
        assert aligned.data == cfg.data


def test_a_distiller_itself_is_tested_by_its_average(tmp_path):
    model = trained("kd.ScoreDistillation", tmp_path, ema=0.5, steps=1)
    made = CompletionTester(config(tmp_path), model=model).test()
    assert made["rows"][0]["mean"] == by_hand(model, 1, 0)[0].summary().values()
    hook = HOOKS.build(dict(type="kd.PreciseEvaluator", test_last=True))
    cfg = config(tmp_path / "hook", test=dict(type="kd.CompletionTester", mode="single"))
    hook.trainer = SimpleNamespace(cfg=cfg, model=model, logger=CompletionTester(cfg, model).logger)
    hook.after_train()
    assert results(tmp_path / "hook")[0]["rows"][0]["mean"] == made["rows"][0]["mean"]


def test_weights_that_do_not_fit(tmp_path):
    trained("kd.ScoreDistillation", tmp_path)
    weight = str(tmp_path / "model_last.pth")
    other = {**PLAIN, "denoiser": dict(type="kd.DenoiserByName", width=4)}
    with pytest.raises(InputError, match="a checkpoint of another width"):
        load_completer(other, weight)
    with pytest.raises(InputError, match=r"here: kd\.Refiner completes no scans"):
        load_completer(dict(type="kd.Refiner", **SIZE), weight, "here")
    with pytest.raises(InputError, match="testing needs a checkpoint"):
        CompletionTester(config(tmp_path))
    with pytest.raises(InputError, match="Linear completes no scans"):
        CompletionTester(config(tmp_path), model=torch.nn.Linear(1, 1))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(mode="tta"), r"test\.mode='tta': completion has one mode, single"),
        (dict(steps=0), r"test\.steps=0: expected a whole number from 1 to 999"),
        (dict(steps=[8, 8]), r"test\.steps=\[8, 8\].*different"),
        (dict(steps=[]), r"test\.steps=\[\]"),
        (dict(steps=2.5), r"test\.steps=2\.5"),
        (dict(seeds=-1), r"test\.seeds=-1: expected a whole number from 0"),
        (dict(seeds=[True]), r"test\.seeds=\[True\]"),
        (dict(guidance="much"), r"test\.guidance='much': expected a number"),
        (dict(warmup=-1), r"test\.warmup=-1"),
        (dict(emd_points=-5), r"test\.emd_points=-5"),
        (dict(cells=[0.3]), "cells must divide"),
        (dict(refine="none.pth"), r"none\.pth does not exist"),
        (dict(save_predictions=True, steps=[2, 1]), "2 numbers of steps and 1 seeds: choose one"),
        (dict(save_predictions=True, seeds=[2, 1]), "1 numbers of steps and 2 seeds: choose one"),
        (dict(folder="nowhere"), "nowhere is no folder"),
    ],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(InputError, match=text):
        CompletionTester(config(tmp_path), model=fake(), **options)


def test_data_that_is_none_of_completions(tmp_path):
    batch = collate_fn([TinyPairs()[0]])
    without = [{k: v for k, v in batch.items() if not k.startswith("coord")}]
    with pytest.raises(InputError, match="gives no `coord` and `offset`"):
        CompletionTester(config(tmp_path), model=fake(), test_loader=without).test()
    without = [{k: v for k, v in batch.items() if not k.startswith("target")}]
    with pytest.raises(InputError, match="the batch has no `complete`"):
        CompletionTester(config(tmp_path), model=fake(), test_loader=without).test()
    made = CompletionTester(config(tmp_path), model=fake(), test_loader=[batch]).test()
    assert (made["scans"], made["data"]) == (1, "a given loader")


def test_the_tool(tmp_path, monkeypatch, capsys):
    trained("kd.ScoreDistillation", tmp_path)
    file = tmp_path / "config.py"
    text = "_base_ = ['configs/completion/teacher_to_score_student_tiny.py']\n"
    model = distilled("kd.ScoreDistillation")
    file.write_text(
        f"{text}save_path = {str(tmp_path / 'run')!r}\ncustom_imports = None\n"
        f"model = dict(_delete_=True, **{model!r})\n"
        "data = dict(test=dict(_delete_=True, type='kd.TinyPairs'))\n"
    )

    def run(*arguments):
        call = ["test.py", "--config-file", str(file), *arguments]
        monkeypatch.setattr(sys, "argv", call)
        return run_tool(test_tool.main)

    weight = f"weight={tmp_path / 'model_last.pth'}"
    options = ("--options", weight, "test.steps=[2,1]", "test.seeds=[0,3]", "test.guidance=1.0")
    assert run("--mode", "single", *options) == 0
    content, lines = results(tmp_path / "run")
    assert [(row["steps"], row["calls"]) for row in content["rows"]] == [(2, 2), (1, 1)]
    assert len(lines) == 2 * 2 * 5
    assert run("--mode", "tta", *options) == 2
    assert "completion has one mode" in capsys.readouterr().err
    assert run("--options", weight, "test.step=8") == 2
    assert "did you mean test.steps" in capsys.readouterr().err


def test_registered():
    assert TESTERS.get("kd.CompletionTester") is CompletionTester


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and forks"
)
def test_two_processes_test_as_one(tmp_path, monkeypatch):
    multiprocessing.set_forkserver_preload([__name__])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = []
    for world in (1, 2):
        runtime.launch(both_kinds, world, config(tmp_path / str(world)))
        parts = [tmp_path / str(world) / kind for kind in ("model", "folder")]
        found.append([timeless(results(part)) for part in parts])
        clouds = sorted((parts[0] / "result").glob("*.npy"))
        found[-1].append([np.load(cloud).tolist() for cloud in clouds])
        for content, _ in found[-1][:2]:
            content.pop("folder")
    assert found[0] == found[1]
    assert len(found[0][2]) == 5


def both_kinds(cfg):
    """What every process runs: a test of a network, then one of the clouds that it left."""
    torch.set_num_threads(1)
    root = cfg["save_path"]
    cfg["save_path"] = f"{root}/model"
    CompletionTester(cfg, model=fake(), save_predictions=True).test()
    cfg["save_path"] = f"{root}/folder"
    CompletionTester(cfg, folder=f"{root}/model/result").test()
