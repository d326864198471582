"""Every shipped config reads, prints back, builds, and says what its family says."""

from pathlib import Path

import pytest
import torch

from pointcept_kd.distillers.taps import Taps
from pointcept_kd.host import MODELS
from pointcept_kd.host.config import RUNTIME_DEFAULTS, Config
from pointcept_kd.host.loader import Compose

from .networks.clouds import cloud

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
    if "teacher" in cfg.model:
        cfg.model.teacher.weight = "random"
    student = cfg.model.student.model if cfg.model.type == "kd.Distiller" else cfg.model
    if student.get("camera"):
        student.camera.update(weight=None, allow_random=True)
    if cfg.model.type == "kd.ImageToLidar":
        if str(cfg.model.image.get("trunk")).startswith("timm:"):
            pytest.importorskip("timm")
        cfg.model.image.update(weight=None, allow_random=True)
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
    if "view" in cfg.model.teacher:
        # Its own view of the same scans: the reader that it was trained with, and no camera. It may have more labels.
        own, source = dict(theirs["train"]), ours["train"].pop("source")
        own.pop("transform")
        assert (source.pop("label_fraction", 1) < 1) == path.stem.endswith("_few")
        assert source == own
        theirs, ours = ({k: d[k] for k in ("num_classes", "names")} for d in (theirs, ours))
    elif "_tiny" in path.stem:
        # The demo's student drives other streets, and its evaluation is on streets that neither trained on.
        drives = set(theirs["train"].pop("sequences")), set(ours["train"].pop("sequences"))
        assert not drives[0] & drives[1]
        assert ours["train"].pop("label_fraction") == 0.01
    if "_trainval" in path.stem:
        # The only configs that learn from the validation scans, and say so; their test set has no labels.
        assert ours["train"].pop("split") == ["train", "val"]
        assert ours["test"].pop("split") == "test"
        theirs["train"].pop("split"), theirs["test"].pop("split")
    assert theirs == ours, "teacher and student see the same data"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_validation_scans_are_not_trained_on(path):
    """The published 3D-to-BEV training had sequence 08 in both."""
    train = Config.fromfile(path).data.train
    train = train.get("source", train)  # of pairs of points and pixels, the reader
    splits = [train.split] if isinstance(train.split, str) else list(train.split)
    if "_trainval" in path.stem:
        assert splits == ["train", "val"]
        return
    assert splits in (["train"], ["training"])
    assert "08" not in [str(name) for name in train.get("sequences") or ()]


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
        ("kd/ptv3_to_student_waymo.py", "waymo/semseg-pt-v3m1-1-student.py"),
        ("kd/cylinder3d_to_polarnet.py", "semantic_kitti/semseg-polarnet-0-base.py"),
        ("kd/cylinder3d_to_polarnet_nuscenes.py", "nuscenes/semseg-polarnet-0-base.py"),
        (
            "kd/cylinder3d_to_polarnet_samples.py",
            "semantic_kitti/semseg-polarnet-0-base_samples.py",
        ),
        ("kd/cylinder3d_to_polarnet_tiny.py", "sim/semseg-polarnet-0-base_tiny.py"),
        ("kd/ptv3_to_polarnet_tiny.py", "sim/semseg-polarnet-1-voxels_tiny.py"),
    ],
)
def test_the_student_alone_has_the_same_recipe(distilled, alone):
    first, second = plain(dict(read(distilled))), plain(dict(read(alone)))
    assert first["model"]["student"]["model"] == second["model"]
    for key in ("model", "save_path"):
        first.pop(key), second.pop(key)
    for key in ("paper_terms", "recommended_terms"):
        first.pop(key, None)
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


def test_the_waymo_sibling_differs_by_its_data():
    head, other = (plain(dict(read(f"kd/ptv3_to_student{tail}.py"))) for tail in ("", "_waymo"))
    for cfg, classes in ((head, 19), (other, 22)):
        for key in ("teacher_model", "student_model", "save_path", "data"):
            cfg.pop(key, None)
        for part in ("student", "teacher"):
            assert cfg["model"][part]["model"].pop("num_classes") == classes
        for key in ("weight", "config"):
            cfg["model"]["teacher"].pop(key)
    assert head == other


BEV = ("logits", "enc2", "enc8", "dec8", "dec2", "labels")


@pytest.mark.parametrize("tail", ["", "_paper", "_nuscenes", "_samples", "_tiny"])
def test_the_terms_of_the_birds_eye_view_pair(tail):
    terms = plain(read(f"kd/cylinder3d_to_polarnet{tail}.py").model.terms)
    assert set(terms) == set(BEV)
    weights = dict.fromkeys(BEV, 2.0) if tail == "_paper" else dict.fromkeys(BEV, 0.2)
    weights.update(logits=1.0, labels=2.0 if tail == "_paper" else 0.05)
    assert {k: v["weight"] for k, v in terms.items()} == weights
    strides = {k: v["student_stride"] for k, v in terms.items() if k != "logits"}
    for name, stride in strides.items():
        assert list(stride) == list(terms[name]["teacher_stride"][:2]), name


@pytest.mark.parametrize(
    ("row", "kept"), [("logits", BEV[:1]), ("voxels", BEV[1:5]), ("labels", BEV[5:])]
)
def test_one_kind_of_term_each(row, kept):
    head = plain(read("kd/cylinder3d_to_polarnet_tiny.py").model.terms)
    terms = plain(read(f"kd/cylinder3d_to_polarnet_tiny_{row}.py").model.terms)
    assert {k: v for k, v in terms.items() if v is not None} == {k: head[k] for k in kept}


SETS = ["", "_nuscenes", "_semantic_kitti", "_waymo", "_tiny"]
TYPES = dict(logits="kd.LogitKL", gradient="kd.GradientGuided", topology="kd.Topology")


def terms_of(name):
    """Terms that are on, with their weights, and the whole entry of the topology term."""
    entries = {k: v for k, v in read(f"kd/{name}.py").model.terms.items() if v is not None}
    on = {k: v["weight"] for k, v in entries.items() if v["weight"]}
    assert all(entries[k]["type"] == TYPES[k] for k in on if k != "pseudo")
    return on, plain(entries.get("topology"))


@pytest.mark.parametrize("tail", SETS)
def test_the_four_losses_and_their_siblings(tail):
    on, _ = terms_of(f"ptv3_to_student{tail}")
    assert set(on) == {"logits", "pseudo"} if tail == "_tiny" else set(on) == set(TYPES)
    paper, topology = terms_of(f"ptv3_to_student{tail}_paper")
    assert paper == dict(logits=0.3, gradient=10.0, topology=0.1)
    assert (topology["distance"], topology["scale"]) == (dict(h0="chamfer", h1="chamfer"), "none")
    recommended, topology = terms_of(f"ptv3_to_student{tail}_recommended")
    assert set(recommended) == set(TYPES)
    assert (topology["distance"], topology["scale"]) == (dict(h0="w2", h1="chamfer"), "mean")
    # One choice for all data sets.
    assert recommended == terms_of("ptv3_to_student_recommended")[0]


@pytest.mark.parametrize("tail", SETS)
def test_fewer_terms_change_nothing_else(tail):
    head = plain(dict(read(f"kd/ptv3_to_student{tail}_recommended.py")))
    rows = dict(logits={"logits"})
    if tail in ("", "_tiny"):
        rows.update(gradient={"logits", "gradient"}, topology={"logits", "topology"})
    for row, names in rows.items():
        cfg = plain(dict(read(f"kd/ptv3_to_student{tail}_{row}.py")))
        terms = cfg["model"].pop("terms")
        expected = head["model"]["terms"]
        assert {k: v for k, v in terms.items() if v is not None} == {k: expected[k] for k in names}
        assert cfg.pop("save_path").endswith(f"/ptv3_to_student_{row}")
        rest = {k: v for k, v in head.items() if k != "save_path"}
        rest["model"] = {k: v for k, v in head["model"].items() if k != "terms"}
        assert cfg == rest


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
        ("semantic_kitti/semseg-cylinder3d-0-base.py", 55_853_366),
        ("semantic_kitti/semseg-polarnet-0-base.py", 13_644_530),
    ],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = MODELS.build(read(name).model)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("part", "widths"), [("teacher", (512, 256)), ("student", (128, 128))], ids=lambda v: str(v)
)
def test_the_bottleneck_of_the_published_pair(part, widths):
    """`enc_out` is what the encoder returns, `dec_in` its projection before it is spread over the finer cells."""
    cfg = read("kd/ptv3_to_student.py")
    assert cfg.model[part].taps == dict(enc_out="backbone.enc")
    network = MODELS.build(cfg.model[part].model).eval()
    taps = Taps(network, dict(enc_out="backbone.enc", dec_in="backbone.dec.dec3.up.proj"))
    with torch.no_grad(), taps.record() as seen:
        network(cloud((150, 90), high=60))
    batch, cells = seen["enc_out"].batch, seen["enc_out"].cells
    assert (seen["enc_out"].feat.shape, seen["dec_in"].feat.shape) == (
        (len(cells), widths[0]),
        (len(cells), widths[1]),
    )
    assert torch.equal(seen["dec_in"].batch, batch)
    assert torch.equal(seen["dec_in"].cells, cells)
    assert int(cells.max()) == 3  # 60 voxels, halved four times


@pytest.mark.parametrize("kind", ["ppkt", "slidr", "olivine", "scalr"])
def test_tiny_pre_training_has_the_terms_of_the_published_one(kind):
    def terms(path):
        found = plain(read(f"pretrain/{path}.py").model.terms)
        return {name: (term["type"], term.get("weight", 1.0)) for name, term in found.items()}

    assert terms(f"{kind}_tiny") == terms(f"{kind}_sr_unet34")
    if kind in ("slidr", "olivine"):
        assert terms(f"{kind}_voxelnet") == terms(f"{kind}_sr_unet34")


@pytest.mark.parametrize("tail", ["sr_unet34", "tiny"])
def test_methods_of_pre_training_differ_by_terms_and_heads_alone(tail):
    ppkt, olivine = (
        plain(dict(read(f"pretrain/{kind}_{tail}.py"))) for kind in ("ppkt", "olivine")
    )
    for cfg in (ppkt, olivine):
        assert cfg["model"].pop("terms")
        cfg["model"]["student"].pop("class_level", None)
        cfg["model"]["image"].pop("heads")
        cfg.pop("save_path")
    assert ppkt == olivine


def test_pre_training_at_the_published_size():
    cfg = read("pretrain/olivine_sr_unet34.py")
    cfg.model.image.update(weight=None, allow_random=True)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.student.parameters()) == 37_855_392
    trained = [p for p in model.image.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 131_136
    frozen = [p for p in model.image.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 23_508_032
    terms = cfg.model.terms
    assert [terms[name].weight for name in ("pairs", "classes", "distributions")] == [0.5, 0.5, 1.0]
    assert terms.distributions.warmup_steps == 10_000
    assert (cfg.optimizer.lr, cfg.optimizer.dampening, cfg.batch_size) == (0.5, 0.1, 16)
