"""Every shipped config reads, prints back, builds, and says what its family says."""

from pathlib import Path

import pytest
import torch

from pointcept_kd.host import MODELS
from pointcept_kd.host.config import RUNTIME_DEFAULTS, Config
from pointcept_kd.host.loader import Compose

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.parent.name != "_base_")
IDS = [str(p.relative_to(ROOT / "configs")) for p in FILES]


def read(name):
    return Config.fromfile(ROOT / "configs" / name)


def plain(value):
    """Containers of a config as plain dicts and lists, to compare."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_reads_and_prints_back(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / "config.py")
    again = Config.fromfile(tmp_path / "config.py")
    assert plain(dict(again)) == plain(dict(cfg))
    missing = set(RUNTIME_DEFAULTS) - set(cfg) - {"deterministic"}
    assert not missing, f"every runtime key is spelled out: {missing}"
    assert cfg.enable_wandb is False
    assert cfg.epoch % cfg.eval_epoch == 0
    assert not Path(cfg.save_path).is_absolute()
    for split in ("train", "val", "test"):
        Compose(cfg.data[split].transform)
    assert len(cfg.data.names) == cfg.data.num_classes


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_model_builds(path):
    cfg = Config.fromfile(path)
    if cfg.model.type == "kd.Distiller":
        cfg.model.teacher.weight = "random"
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "kd"], ids=lambda p: p.name)
def test_the_teacher_is_the_one_its_config_trains(path):
    cfg = Config.fromfile(path)
    teacher = Config.fromfile(ROOT / cfg.model.teacher.config)
    assert plain(teacher.model) == plain(cfg.model.teacher.model)
    assert str(cfg.model.teacher.weight).startswith(teacher.save_path + "/model/")
    theirs, ours = plain(teacher.data), plain(cfg.data)
    if path.stem.endswith("_tiny"):
        # The demo's student drives other streets, and its evaluation is on streets that neither trained on.
        drives = set(theirs["train"].pop("sequences")), set(ours["train"].pop("sequences"))
        assert not drives[0] & drives[1]
        assert ours["train"].pop("label_fraction") == 0.01
    assert theirs == ours, "teacher and student see the same data"


@pytest.mark.parametrize(
    ("distilled", "alone"),
    [
        ("kd/ptv3_to_student.py", "sim/semseg-pt-v3m1-1-student.py"),
        ("kd/ptv3_to_student_tiny.py", "sim/semseg-pt-v3m1-1-student_tiny.py"),
        (
            "kd/ptv3_to_student_semantic_kitti.py",
            "semantic_kitti/semseg-pt-v3m1-1-student.py",
        ),
        (
            "kd/ptv3_to_student_samples.py",
            "semantic_kitti/semseg-pt-v3m1-1-student_samples.py",
        ),
        ("kd/ptv3_to_student_own_data.py", "own_data/semseg-pt-v3m1-1-student.py"),
        ("kd/ptv3_to_student_nuscenes.py", "nuscenes/semseg-pt-v3m1-1-student.py"),
    ],
)
def test_the_student_alone_has_the_same_recipe(distilled, alone):
    first, second = plain(dict(read(distilled))), plain(dict(read(alone)))
    assert first["model"]["student"]["model"] == second["model"]
    for key in ("model", "save_path"):
        first.pop(key), second.pop(key)
    assert first == second


def test_the_semantic_kitti_child_differs_by_its_data():
    head, child = (
        plain(dict(read(f"kd/ptv3_to_student{tail}.py"))) for tail in ("", "_semantic_kitti")
    )
    for cfg in (head, child):
        cfg.pop("save_path")
        for key in ("weight", "config"):
            cfg["model"]["teacher"].pop(key)
        for split in ("train", "val", "test"):
            cfg["data"][split].pop("data_root")
            assert cfg["data"][split].pop("type").endswith("SemanticKITTIDataset")
    assert head == child


def test_the_nuscenes_sibling_differs_by_its_data():
    head, other = (plain(dict(read(f"kd/ptv3_to_student{tail}.py"))) for tail in ("", "_nuscenes"))
    for cfg, classes in ((head, 19), (other, 16)):
        for key in ("teacher_model", "student_model", "save_path"):
            cfg.pop(key, None)
        for split in ("train", "val", "test"):
            for key in ("type", "data_root", "sweeps"):
                cfg["data"][split].pop(key, None)
        assert cfg["data"].pop("num_classes") == len(cfg["data"].pop("names")) == classes
        for part in ("student", "teacher"):
            assert cfg["model"][part]["model"].pop("num_classes") == classes
        for key in ("weight", "config"):
            cfg["model"]["teacher"].pop(key)
    assert head == other


def test_own_data_is_said_in_one_place():
    cfg = read("kd/ptv3_to_student_own_data.py")
    nets = cfg.model.student.model, cfg.model.teacher.model
    assert {net.num_classes for net in nets} == {cfg.data.num_classes} == {len(cfg.data.names)}
    assert cfg.data.train.data_root == cfg.data.val.data_root == cfg.data.test.data_root


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("semantic_kitti/semseg-pt-v3m1-0-base.py", 46_159_507),
        ("semantic_kitti/semseg-pt-v3m1-1-student.py", 2_777_539),
        ("nuscenes/semseg-pt-v3m1-0-base.py", 46_159_312),
        ("nuscenes/semseg-pt-v3m1-1-student.py", 2_777_344),
        ("waymo/semseg-pt-v3m1-0-base.py", 46_159_702),
        ("waymo/semseg-pt-v3m1-1-student.py", 2_777_734),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = MODELS.build(read(name).model)
    assert sum(p.numel() for p in model.parameters()) == parameters
