"""Labelling one's own scans: what comes out, for which rows, and what is said about bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.data import semantic_kitti
from pointcept_kd.data.clouds import read_points
from pointcept_kd.data.ply import parse_ply
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import Compose, collate_fn
from tools import infer

ROOT = Path(__file__).resolve().parents[1]
STEPS = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(type="GridSample", grid_size=0.2, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment", "name"), feat_keys=("coord", "strength")),
]  # fmt: skip


class Quadrants(torch.nn.Module):
    """Class 0 to 3 by the signs of x and y, at the places of the voxels' points; the labels must be absent."""

    def __init__(self, classes=4):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(classes))

    def forward(self, batch):
        assert not {"segment", "origin_segment", "inverse"} & set(batch)
        kind = (batch["coord"][:, 0] < 0).long() * 2 + (batch["coord"][:, 1] < 0).long()
        return {
            "seg_logits": torch.nn.functional.one_hot(kind, len(self.bias)) * 4.0 + self.bias,
            "feat": batch["feat"],
        }


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the tool below an empty folder with the network above: exit code, stdout, stderr."""
    monkeypatch.setattr(MODELS, "_classes", {**MODELS._classes, "Quadrants": Quadrants})
    monkeypatch.chdir(tmp_path)

    def call(*arguments, steps=STEPS, weight="w.pth", classes=4, **data):
        model = dict(type="Quadrants", classes=classes)
        values = dict(
            model=model,
            data=dict(num_classes=classes, val=dict(type="Nobody", transform=steps), **data),
        )
        Config(values).dump("c.py")
        torch.save({"state_dict": Quadrants(classes).state_dict()}, "w.pth")
        words = [*map(str, arguments), "--config-file", "c.py", "--out", "out"]
        code = infer.main([*words, *(["--weight", weight] if weight else [])])
        return code, *capsys.readouterr()

    return call


def cloud(points=400, seed=0):
    """Points that keep a voxel's distance from the borders between the quadrants."""
    generator = np.random.default_rng(seed)
    rows = generator.uniform(0.3, 8, (points, 4)).astype(np.float32)
    rows[:, :2] *= generator.choice([-1, 1], (points, 2))
    rows[:, 3] /= 8
    return rows


def quadrant(rows):
    return [(2 if x < 0 else 0) + (1 if y < 0 else 0) for x, y, *_ in rows]


def test_every_row_of_the_file_gets_its_class(run):
    rows = cloud()
    rows[7, 0] = rows[8, 3] = np.nan
    np.save("scan.npy", rows)
    code, out, err = run("scan.npy")
    assert (code, err) == (0, "")
    assert "scan: 400 points in " in out
    expected = quadrant(rows)
    expected[7] = expected[8] = -1
    got = np.load("out/scan.npy")
    assert got.dtype == np.int32
    assert got.tolist() == expected
    summary = json.loads(Path("out/scan.json").read_text())
    assert (summary["points"], summary["not_finite"], summary["not_labelled"]) == (400, 2, 2)
    points = [entry["points"] for entry in summary["classes"].values()]
    assert points == sorted(points, reverse=True)
    assert {e["id"]: e["points"] for e in summary["classes"].values()} == {
        k: expected.count(k) for k in range(4)
    }
    assert sorted(p.name for p in Path("out").iterdir()) == [
        f"scan.{suffix}" for suffix in ("json", "npy", "ply", "png")
    ]


def test_the_point_cloud_and_the_picture(run):
    rows = cloud()
    rows[3] = np.inf
    np.save("scan.npy", rows)
    colors = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert run("scan.npy", colors=colors, names=["a", "b", "c", "d"])[0] == 0
    vertices = parse_ply(Path("out/scan.ply"), Path("out/scan.ply").read_bytes())
    kept = np.delete(rows, 3, 0)
    assert vertices["label"].tolist() == quadrant(kept)
    seen = np.stack([vertices[c] for c in ("red", "green", "blue")], 1).tolist()
    assert seen == [colors[k] for k in quadrant(kept)]
    back = read_points("out/scan.ply")
    assert np.array_equal(back["coord"], kept[:, :3])
    assert np.array_equal(back["strength"], kept[:, 3:])
    assert json.loads(Path("out/scan.json").read_text())["classes"]["d"]["color"] == "#0a0b0c"
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the picture")
    pixels = np.asarray(image.open("out/scan.png").convert("RGB"))
    assert pixels.shape == (1000, 1000, 3)
    # 10 pixels a metre, forward up, left left: quadrant 0 (x, y > 0) is upper left.
    for kind, (upper, left) in enumerate([(1, 1), (1, 0), (0, 1), (0, 0)]):
        part = pixels[slice(0, 497) if upper else slice(503, None)]
        part = part[:, slice(0, 497) if left else slice(503, None)].reshape(-1, 3).tolist()
        assert {tuple(c) for c in part} - {(16, 18, 22)} == {tuple(colors[kind])}


def test_points_that_the_transforms_cut_away(run):
    rows = cloud()
    np.save("scan.npy", rows)
    steps = [dict(type="kd.RangeCrop", point_cloud_range=(-6, -8, -9, 5, 4, 9)), *STEPS]
    assert run("scan.npy", "--save-probabilities", steps=steps)[0] == 0
    inside = (rows[:, 0] > -6) & (rows[:, 0] < 5) & (rows[:, 1] > -8) & (rows[:, 1] < 4)
    assert 0 < inside.sum() < 400
    expected = np.where(inside, quadrant(rows), -1)
    assert np.load("out/scan.npy").tolist() == expected.tolist()
    scores = np.load("out/scan_prob.npy")
    assert scores.dtype == np.float16
    assert np.array_equal(scores.any(1), inside)
    assert np.array_equal(scores.argmax(1)[inside], expected[inside])
    assert np.allclose(scores.sum(1)[inside], 1, atol=2e-3)
    summary = json.loads(Path("out/scan.json").read_text())
    assert summary["not_labelled"] == 400 - inside.sum()


@pytest.mark.parametrize(
    "steps",
    [
        [STEPS[2], dict(type="Collect", keys=("coord",), feat_keys=("strength",))],
        [dict(type="ShufflePoint"), *STEPS],
        [dict(type="Update", keys_dict=dict(index_valid_keys=["coord", "strength", "segment"])), *STEPS],
        [*STEPS[:1], dict(STEPS[1], return_inverse=True), *STEPS[2:3],
         dict(type="Collect", keys=("coord", "inverse", "origin_segment"), feat_keys=("coord",))],
    ],
    ids=["no voxels", "shuffled", "own keys", "with inverse"],
)  # fmt: skip
def test_other_pipelines(run, steps):
    rows = cloud()
    np.save("scan.npy", rows)
    assert run("scan.npy", steps=steps)[0] == 0
    assert np.load("out/scan.npy").tolist() == quadrant(rows)


def test_the_same_whatever_else_is_labelled(run):
    Path("in").mkdir()
    for seed in range(3):
        np.save(f"in/{seed}.npy", cloud(seed=seed))
    assert run("in")[0] == 0
    many = {p.name: p.read_bytes() for p in Path("out").glob("*.np?")}
    shutil.rmtree("out")
    assert run("in/2.npy")[0] == 0
    assert Path("out/2.npy").read_bytes() == many["2.npy"]


def test_names_of_scans(run, tmp_path):
    for name in ("07/velodyne/000000.bin", "08/velodyne/000000.bin", "x/deep/a.pcd.bin", "x/b.npy"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        width = 5 if "pcd" in name else 4
        rows = np.c_[cloud(40), np.arange(40) % 32].astype("<f4")[:, :width]
        rows.tofile(name) if name.endswith("bin") else np.save(name, rows)
    Path("x/readme.txt").touch()
    Path("x/.hidden.npy").touch()
    files = ["07/velodyne/000000.bin", "08/velodyne/000000.bin", "x", "x/b.npy"]
    code, _, err = run(*files, "--no-ply", "--no-png")
    assert (code, err) == (0, "")
    found = {str(p.relative_to("out")) for p in Path("out").rglob("*.npy")}
    assert found == {
        "07_velodyne_000000.npy", "08_velodyne_000000.npy", "deep/a.npy", "b.npy",
    }  # fmt: skip
    # What was written below a folder of scans is not taken for scans.
    shutil.move("out", "x/out")
    assert len(infer.find_scans(["x"], tmp_path / "x" / "out")) == 2


def test_one_bad_file_among_many(run):
    np.save("a.npy", cloud())
    Path("b.npy").write_bytes(b"nonsense")
    np.save("c.npy", cloud()[:, :2])
    np.save("d.npy", cloud())
    code, out, err = run("a.npy", "b.npy", "c.npy", "d.npy")
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("error: ")
    assert "b.npy: not a readable .npy array" in lines[0]
    assert "c.npy: an array (400, 2)" in lines[1]
    assert lines[2] == "2 of 4 scans failed, see above"
    assert "2 scans labelled" in out
    assert {p.stem for p in Path("out").iterdir()} == {"a", "d"}
    assert run("b.npy")[0] == 2


def test_intensities(run):
    rows = cloud()
    np.save("none.npy", rows[:, :3])
    np.save("unit.npy", rows)
    np.save("byte.npy", rows * [1, 1, 1, 255])
    np.save("word.npy", rows * [1, 1, 1, 65535])
    for name, options, said, how in [
        ("none", (), "warning: ", "none in the file; 0.3 everywhere"),
        ("none", ("--strength", 0.5), "warning: ", "none in the file; 0.5 everywhere"),
        ("unit", (), "", "as in the file"),
        ("byte", (), "note: ", "divided by 255"),
        ("word", (), "note: ", "divided by 65535"),
        ("word", ("--intensity-scale", 1000), "note: ", "divided by 1000"),
        ("byte", ("--intensity-scale", 1), "", "as in the file"),
    ]:
        code, _, err = run(f"{name}.npy", *options)
        assert code == 0
        assert err.startswith(said)
        assert len(err.splitlines()) == bool(said)
        assert json.loads(Path(f"out/{name}.json").read_text())["strength"] == how
    for top, scale in ((1.0, 1), (200.0, 255), (60000.0, 65535)):
        got = infer.unit_strength(np.array([[0.0], [top]], np.float32), 2, None, 0.3)[0]
        assert got.tolist() == [[0.0], [np.float32(top) / np.float32(scale)]]
    assert infer.unit_strength(None, 2, None, 0.25)[0].tolist() == [[0.25], [0.25]]


def test_points_in_map_coordinates(run):
    np.save("map.npy", cloud() + np.array([4e5, 5e6, 100, 0]))
    code, _, err = run("map.npy")
    assert code == 0
    assert err.startswith("warning: ")
    assert "expected metres around the sensor" in err


def test_semantic_kitti_labels(run):
    rows = cloud()
    rows[5, 2] = np.nan
    np.save("scan.npy", rows)
    names = list(semantic_kitti.CLASS_NAMES)
    assert run("scan.npy", "--format", "label", classes=19, names=names)[0] == 0
    raw = np.frombuffer(Path("out/scan.label").read_bytes(), "<u4")
    expected = [(10, 11, 15, 18)[k] for k in quadrant(rows)]
    expected[5] = 0
    assert raw.tolist() == expected
    assert not Path("out/scan.npy").exists()
    with pytest.raises(InputError, match="not SemanticKITTI's 19"):
        run("scan.npy", "--format", "label")


@pytest.mark.parametrize("count", [1, 2, 4, 13, 19, 23, 40])
def test_colors(count):
    colors = infer.class_colors(None, count)
    assert colors.shape == (count, 3)
    assert colors.dtype == np.uint8
    assert len({tuple(c) for c in colors.tolist()}) == count
    assert np.array_equal(colors, infer.class_colors(None, count))


def test_a_network_of_more_classes_than_the_config_says(run):
    np.save("scan.npy", cloud())
    values = dict(model=dict(type="Quadrants", classes=4), data=dict(val=dict(transform=STEPS)))
    Config(values).dump("bare.py")
    torch.save({"state_dict": Quadrants(4).state_dict()}, "w.pth")
    assert infer.main(["scan.npy", "--config-file", "bare.py", "--weight", "w.pth"]) == 0
    summary = json.loads(Path("exp/infer/scan.json").read_text())
    assert sorted(summary["classes"]) == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["nothing.npy"], {}, "there is no such file or folder"),
        (["empty"], {}, "no .bin, .npy, .ply, .pcd in this folder"),
        (["scan.npy", "--intensity-scale", "0"], {}, "expected a positive number"),
        (["scan.npy", "--strength", "nan"], {}, "expected a number from 0 to 1"),
        (["scan.npy", "--device", "abacus"], {}, "is no device"),
        (["scan.npy", "--options", "data.val.transform.9.p=1"], {}, "transform"),
        (["scan.npy"], {"weight": "missing.pth"}, "missing.pth does not exist"),
        (["scan.npy"], {"colors": [[1, 2, 3]]}, "expected 4 times three whole numbers"),
        (["scan.npy"], {"names": ["a"]}, "data.names has 1 entries"),
        (["scan.npy"], {"steps": []}, "no data.val with a transform"),
        (["scan.npy"], {"weight": None}, "no checkpoint in exp/default/model"),
    ],
)  # fmt: skip
def test_bad_input(run, words, changes, said):
    np.save("scan.npy", cloud())
    Path("empty").mkdir()
    with pytest.raises(InputError) as caught:
        run(*words, **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([dict(type="GridSample", mode="test")], "cuts scans into fragments"),
        ([dict(type="ToTensor"), dict(type="Collect", keys=("coord", "color"))], "'color'"),
    ],
)
def test_pipelines_that_need_more_than_a_point_cloud(run, steps, said):
    np.save("scan.npy", cloud())
    code, _, err = run("scan.npy", steps=steps)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert "scan.npy: " in err


def test_the_students_that_are_found(run, monkeypatch):
    np.save("scan.npy", cloud())
    monkeypatch.setattr(infer, "ROOT", Path("nowhere"))
    with pytest.raises(InputError, match="make demo"):
        infer.main(["scan.npy"])
    run("scan.npy")
    for folder in ("exp/demo/seed_0/distilled", "exp/mine"):
        Path(folder, "model").mkdir(parents=True)
        shutil.copy("c.py", Path(folder, "config.py"))
        shutil.copy("w.pth", Path(folder, "model", "student_best.pth"))
        shutil.copy("w.pth", Path(folder, "model", "model_last.pth"))
    chosen = infer.choose(None, None)
    assert chosen == (
        "exp/demo/seed_0/distilled/config.py",
        "exp/demo/seed_0/distilled/model/student_best.pth",
    )
    assert infer.main(["scan.npy"]) == 0
    weight = "exp/mine/model/model_last.pth"
    assert infer.choose(None, weight) == ("exp/mine/config.py", weight)
    Config({"save_path": "exp/mine"}).dump("c.py")
    assert infer.choose("c.py", None) == ("c.py", "exp/mine/model/student_best.pth")
    found = infer.choose("c.py", None, {"save_path": "exp/demo/seed_0/distilled"})
    assert found[1] == "exp/demo/seed_0/distilled/model/student_best.pth"
    with pytest.raises(InputError, match="--config-file"):
        infer.choose(None, "w.pth")


# ----------------------------------------------------------------------------------- a real network


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The demo's distiller config and a checkpoint with a student's weights as a distiller writes them."""
    folder = tmp_path_factory.mktemp("student")
    config = ROOT / "configs" / "kd" / "ptv3_to_student_tiny.py"
    torch.manual_seed(0)
    network = MODELS.build(Config.fromfile(config)["model"]["student"]["model"])
    weights = {f"student.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, folder / "model.pth")
    return config, folder / "model.pth"


def test_the_same_labels_as_the_tester(student, tmp_path, monkeypatch, samples):
    from pointcept_kd.host import TESTERS
    from pointcept_kd.host.runtime import complete

    config, weight = student
    folder = tmp_path / "dataset" / "sequences" / "08" / "velodyne"
    folder.mkdir(parents=True)
    source = samples / "semantickitti" / "dataset" / "sequences" / "08" / "velodyne" / "000000.bin"
    rows = np.fromfile(source, "<f4").reshape(-1, 4)[::6]
    rows.tofile(folder / "000000.bin")
    monkeypatch.chdir(tmp_path)
    words = ["--config-file", str(config), "--weight", str(weight), "--out", "out"]
    # One point per voxel is drawn; where each voxel has one point, nothing is.
    option = "data.val.transform.1.grid_size=0.005"
    assert infer.main([str(folder / "000000.bin"), *words, "--options", option]) == 0
    cfg = infer.read_config(config, data_root=str(tmp_path))
    for split in ("val", "test"):
        cfg["data"][split]["transform"][1]["grid_size"] = 0.005
    cfg.weight, cfg.save_path, cfg.seed, cfg.num_worker = str(weight), "exp", 0, 0
    TESTERS.build({"type": "kd.SemSegTester", "cfg": complete(cfg), "mode": "single"}).test()
    expected = np.load("exp/result/08_000000_pred.npy")
    got = np.load("out/000000.npy")
    # A few voxels hold two points, of which chance draws one, and PTv3 shuffles its serialised orders.
    assert (got == expected).mean() > 0.95
    assert load_checkpoint(weight)["epoch"] == 1


def test_from_another_folder(student, tmp_path):
    weight = student[1]
    np.save(tmp_path / "scan.npy", cloud(2000))
    command = [sys.executable, str(ROOT / "tools" / "infer.py"), "scan.npy", "--weight", str(weight)]  # fmt: skip
    done = subprocess.run(
        [*command, "--config-file", "configs/kd/ptv3_to_student_tiny.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(np.load(tmp_path / "exp" / "infer" / "scan.npy")) == 2000


def test_a_lidar_camera_network_without_images(tmp_path, monkeypatch, capsys):
    """A student of two senses labels a bare scan as it labels one that no camera sees."""
    cfg = Config.fromfile(ROOT / "configs/kd/sphereformer_to_fusion_tiny.py")
    torch.manual_seed(0)
    network = MODELS.build(cfg.model.student.model).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "student.pth")
    rows = cloud()
    np.save(tmp_path / "scan.npy", rows)
    monkeypatch.chdir(tmp_path)
    words = ["scan.npy", "--weight", "student.pth", "--out", "out", "--no-ply", "--no-png"]
    config = str(ROOT / "configs/kd/sphereformer_to_fusion_tiny.py")
    assert infer.main([*words, "--config-file", config]) == 0, capsys.readouterr().err
    sample = dict(coord=rows[:, :3], strength=rows[:, 3:], segment=np.zeros(len(rows), np.int32))
    steps = [s for s in cfg.data.val.transform if s.type not in ("Copy", "kd.ViewsToRows")]
    keys = ("coord", "grid_coord", "inverse")
    collect = dict(type="Collect", keys=keys, feat_keys=("coord", "strength"))
    batch = collate_fn([Compose([*steps[:-1], collect])(sample)])
    with torch.no_grad():
        labels = network(batch)["seg_logits"].argmax(1)[batch["inverse"]]
    got = np.load("out/scan.npy")
    assert len(set(got.tolist())) > 1
    np.testing.assert_array_equal(got, labels.numpy())
