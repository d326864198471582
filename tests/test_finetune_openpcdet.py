"""Fine-tuning in OpenPCDet: what is checked before, what is started, when it is stopped, what is collected.

The checkout is a fake: its train.py takes OpenPCDet's arguments, logs what OpenPCDet logs, and writes where it writes.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pointcept_kd.handoff import kitti
from pointcept_kd.host import InputError
from pointcept_kd.networks import VoxelBackBone8x
from tools import export_openpcdet
from tools import finetune_openpcdet as tool

from .handoff.test_kitti import PUBLISHED, evaluation

TRAIN = '''
import argparse, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("cfg_file", "pretrained_model", "extra_tag", "epochs", "batch_size", "workers", "launcher"):
    parser.add_argument("--" + name)
parser.add_argument("--set", nargs=argparse.REMAINDER)
args = parser.parse_args()
assert "SPCONV_SAVED_WEIGHT_LAYOUT" not in os.environ
assert pathlib.Path(args.cfg_file).is_file()
name = pathlib.Path(args.cfg_file).stem
out = pathlib.Path("..", "output", args.cfg_file.split("/")[1], name, args.extra_tag)
(out / "ckpt").mkdir(parents=True, exist_ok=True)
log = open(out / "train_20240501-100000.log", "w")
def say(*lines):
    for line in lines:
        print("2024-05-01 10:00:00,000   INFO  " + line, file=sys.stderr, flush=True)
        print("2024-05-01 10:00:00,000   INFO  " + line, file=log, flush=True)
mode = pathlib.Path("mode.txt").read_text()
say("args " + " ".join(sys.argv[1:]))
if args.pretrained_model and mode != "silent":
    say("==> Loading parameters from checkpoint " + args.pretrained_model + " to GPU")
    say("==> Checkpoint trained from version: pointcept_kd")
    if mode == "short":
        say("Not updated weight backbone_3d.conv_input.0.weight: torch.Size([16, 3, 3, 3, 4])")
    say("Not updated weight dense_head.conv_cls.weight: torch.Size([18, 512, 1, 1])")
    say("==> Done (loaded " + ("68" if mode == "short" else "72") + "/163)")
if mode == "stale":
    say("==> Loading parameters from checkpoint ../output/ckpt/checkpoint_epoch_3.pth to GPU")
if mode in ("short", "stale", "silent"):
    pathlib.Path("pid.txt").write_text(str(os.getpid()))
    say("**********************Start training kitti_models/x(y)**********************")
    time.sleep(60)  # a training that nobody stops
    pathlib.Path("went_on.txt").touch()
say("**********************Start training kitti_models/x(y)**********************")
if mode == "crash":
    raise RuntimeError("CUDA out of memory")
for i in range(3):
    sys.stderr.write("\\rtrain: %d/3" % i)
epochs = int(args.epochs or 80)
(out / "ckpt" / ("checkpoint_epoch_%d.pth" % epochs)).touch()
say("==> Loading parameters from checkpoint ckpt/checkpoint_epoch_%d.pth to GPU" % epochs, "==> Done (loaded 163/163)")
if mode != "no evaluation":
    shift = int(args.extra_tag[-1])
    text = pathlib.Path("evaluation_%d.txt" % shift).read_text().replace("EPOCH 80", "EPOCH %d" % epochs)
    print(text, file=sys.stderr)
    print(text, file=log, flush=True)
'''  # fmt: skip

GOOD = {
    "packages": {**dict.fromkeys(tool.PACKAGES, "1.0"), "python": "3.8.18", "numpy": "1.23.5", "spconv": "2.3.6"},
    "gpus": ["A100", "A100"],
    "compiled": True,
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like OpenPCDet."""
    root = tmp_path / "OpenPCDet"
    for part in ("pcdet", "tools/cfgs/dataset_configs", "tools/cfgs/kitti_models"):
        (root / part).mkdir(parents=True)
    (root / "pcdet" / "config.py").write_text("")
    (root / "setup.py").write_text("    version = '0.6.0+%s' % get_git_commit_number()\n")
    (root / "tools" / "train.py").write_text(TRAIN)
    (root / "tools" / "mode.txt").write_text("good")
    for i in range(3):
        text = "\n".join(evaluation(80, PUBLISHED, float(i)))
        (root / "tools" / f"evaluation_{i}.txt").write_text(text)
    return root


def kitti_folder(folder, planes=True):
    frames = {"train": ["000000", "000003"], "val": ["000001"]}
    for part in ("ImageSets", "gt_database", *(f"training/{p}" for p in ("velodyne", "calib"))):
        (folder / part).mkdir(parents=True)
    for split, names in frames.items():
        (folder / "ImageSets" / f"{split}.txt").write_text("\n".join(names) + "\n")
        (folder / f"kitti_infos_{split}.pkl").touch()
        for name in names:
            (folder / "training" / "velodyne" / f"{name}.bin").touch()
            (folder / "training" / "calib" / f"{name}.txt").touch()
    (folder / "kitti_dbinfos_train.pkl").touch()
    (folder / "gt_database" / "000000_Car_0.bin").touch()
    if planes:
        (folder / "training" / "planes").mkdir()
        for name in frames["train"]:
            (folder / "training" / "planes" / f"{name}.txt").touch()
    return folder


@pytest.fixture
def data(tmp_path):
    return kitti_folder(tmp_path / "kitti")


@pytest.fixture
def weights(tmp_path):
    """An export for SECOND."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": VoxelBackBone8x().state_dict(), "grids": {}}, path)
    out = tmp_path / "handoff"
    given = ["--detector", "second", "--out", str(out), "--tag", "t"]
    export_openpcdet.main([str(path), *given])
    return out / "t.pth"


@pytest.fixture
def machine(monkeypatch):
    """GPUs and packages, as the probe would find them."""
    found = json.loads(json.dumps(GOOD))
    monkeypatch.setattr(tool, "probe", lambda *_: found)
    return found


@pytest.fixture
def start(checkout, data, weights):
    def call(*more):
        given = ["--openpcdet-root", str(checkout), "--data-root", str(data)]
        tool.main([str(weights), *given, *more])

    return call


def tag_of(weights):
    return json.loads(weights.with_suffix(".json").read_text())["extra_tag"]


def test_three_runs(start, machine, checkout, data, weights, capsys, monkeypatch):
    monkeypatch.setenv("SPCONV_SAVED_WEIGHT_LAYOUT", "RSKC")
    start("--runs", "3")
    shown = capsys.readouterr().out
    tags = [f"{tag_of(weights)}_{i}" for i in range(3)]
    found = json.loads(weights.with_name("t_kitti.json").read_text())
    assert [run["tag"] for run in found["runs"]] == tags
    assert found["summary"]["mean"]["mAP@40"] == pytest.approx(69.3333, abs=1e-3)
    assert found["summary"]["std"]["mAP@40"] == pytest.approx(1)
    assert found["summary"]["best"]["tag"] == tags[2]
    assert found["runs"][1]["ap"]["Car"]["3d"] == {"easy": 88.0, "moderate": 83.0, "hard": 80.0}
    assert found["openpcdet"]["version"] == "0.6.0"
    assert (found["road_planes"], found["gpus"]) == (True, ["A100"])
    assert found["packages"]["spconv"] == "2.3.6"
    table = weights.with_name("t_kitti.md").read_text()
    assert table.startswith("# second on KITTI val, from t.pth\n")
    assert shown.endswith(table)
    assert "\rtrain: 2/3" in shown
    assert "SPCONV_SAVED_WEIGHT_LAYOUT=RSKC is taken out" in shown
    folder = checkout / "output" / "kitti_models" / "t_second" / tags[0]
    line = (folder / "train_20240501-100000.log").read_text().splitlines()[0]
    assert (
        f"--pretrained_model {weights.resolve()} --extra_tag {tags[0]} --set DATA_CONFIG.DATA_PATH {data}"
        in line
    )
    config = (checkout / "tools" / "cfgs" / "kitti_models" / "t_second.yaml").read_text()
    assert config == weights.with_name("t_second.yaml").read_text()
    # Again: nothing is trained twice. Only the logs: the same table.
    (checkout / "tools" / "train.py").unlink()
    (checkout / "tools" / "train.py").write_text("raise SystemExit(7)")
    start("--runs", "3")
    assert "is complete, its results are in" in capsys.readouterr().out
    assert weights.with_name("t_kitti.md").read_text() == table
    start("--runs", "3", "--collect")
    assert capsys.readouterr().out == table
    with pytest.raises(InputError, match="exit code 7"):
        start("--runs", "4")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("short", "training stopped: OpenPCDet loaded 68/163 entries and not 72/163; not updated: backbone_3d.conv_in"),
        ("stale", r"training stopped: OpenPCDet loads \.\./output/ckpt/checkpoint_epoch_3.pth over the given weights"),
        ("silent", "training stopped: OpenPCDet trains without having loaded the weights"),
        ("crash", "ended with exit code 1"),
        ("no evaluation", "its logs have no R40 of epoch 80"),
    ],
)  # fmt: skip
def test_runs_that_go_wrong(start, machine, checkout, weights, mode, message):
    tools = checkout / "tools"
    (tools / "mode.txt").write_text(mode)
    begin = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        start()
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 50
    assert not (tools / "went_on.txt").exists()
    if (tools / "pid.txt").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tools / "pid.txt").read_text()), 0)
    assert not weights.with_name("t_kitti.json").exists()


def test_from_random_weights(start, machine, checkout, weights):
    start("--scratch", "--epochs", "2")
    found = json.loads(weights.with_name("t_scratch_kitti.json").read_text())
    assert found["weights"] is None
    assert found["epochs"] == 2
    assert found["runs"][0]["tag"] == f"{tag_of(weights)}_scratch_0"
    log = Path(found["runs"][0]["log"]).read_text().splitlines()[0]
    assert "--pretrained_model" not in log
    assert "--epochs 2" in log
    with pytest.raises(InputError, match="has been evaluated after epoch 80"):
        start("--scratch", "--collect")


def test_a_dry_run_writes_nothing(start, checkout, weights, capsys, tmp_path):
    """Without a GPU, too; the machine's own packages are probed."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    start("--dry-run", "--gpus", "2", "--runs", "2", "--batch-size", "8", "--workers", "3")
    shown = capsys.readouterr().out
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert f"cd {checkout.resolve() / 'tools'}\n" in shown
    commands = re.findall(r"^\S+ -m torch.distributed.run .*", shown, re.M)
    assert len(commands) == 2
    for i, line in enumerate(commands):
        assert (
            "--standalone --nproc_per_node=2 train.py --launcher pytorch --cfg_file cfgs/" in line
        )
        assert f"--extra_tag {tag_of(weights)}_{i} --batch_size 8 --workers 3 --set " in line
    assert "OpenPCDet 0.6.0" in shown
    assert "problem: OpenPCDet's CUDA operations are not compiled" in shown
    assert "# each log must say `loaded 72/163`" in shown


def test_a_machine_without_cuda(start, machine, checkout, weights):
    machine["gpus"].clear()
    machine["compiled"] = False
    with pytest.raises(
        InputError, match="no CUDA device .* CUDA alone .and 1 more, see --dry-run"
    ) as error:
        start()
    assert "\n" not in str(error.value)
    assert not (checkout / "output").exists()
    assert not (checkout / "tools" / "cfgs" / "kitti_models" / "t_second.yaml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["gpus"].clear(), "no CUDA device"),
        (lambda m: m["packages"].update(spconv="1.2.1"), "spconv 1.2.1: weights are in the order of 2.2"),
        (lambda m: m["packages"].update(spconv=None, numba=None), "do not import: spconv, numba"),
        (lambda m: m.update(compiled=False), r"not compiled: run `python setup.py develop`"),
    ],
)  # fmt: skip
def test_packages(start, machine, change, message):
    change(machine)
    with pytest.raises(InputError, match=message):
        start()


def test_too_few_gpus_and_a_new_numpy(start, machine, capsys):
    with pytest.raises(InputError, match="--gpus 3: there are 2"):
        start("--gpus", "3")
    machine["packages"]["numpy"] = "1.26.4"
    start("--dry-run")
    assert "warning: numpy 1.26.4: OpenPCDet still names np.int" in capsys.readouterr().out


def test_the_probe(checkout):
    """Of this very interpreter: what it has, and that nothing is compiled."""
    found = tool.probe(sys.executable, checkout)
    assert found["packages"]["torch"] == str(torch.__version__)
    assert found["compiled"] is False
    assert len(found["gpus"]) == torch.cuda.device_count()
    with pytest.raises(InputError, match="--python /no/python does not run"):
        tool.probe("/no/python", checkout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "ImageSets" / "val.txt").unlink(), r"val.txt is missing or empty"),
        (lambda d: (d / "training" / "velodyne" / "000003.bin").unlink(), "lacks 1 of the frames, first 000003.bin"),
        (lambda d: (d / "kitti_infos_val.pkl").unlink(), "lacks kitti_infos_val.pkl: run `python -m pcdet"),
        (lambda d: (d / "gt_database" / "000000_Car_0.bin").unlink(), r"lacks gt_database/\*.bin"),
    ],
)  # fmt: skip
def test_data_that_is_not_complete(start, machine, data, change, message):
    change(data)
    with pytest.raises(InputError, match=message):
        start()


def test_road_planes(start, machine, checkout, data, capsys):
    config = checkout / "tools" / "cfgs" / "kitti_models" / "t_second.yaml"
    (data / "training" / "planes" / "000003.txt").unlink()
    start()
    assert "USE_ROAD_PLANE: False\n" in config.read_text()
    shown = capsys.readouterr().out
    assert "road planes not used" in shown
    assert "road planes are there for some frames only" in shown
    with pytest.raises(InputError, match="USE_ROAD_PLANE 0 times"):
        tool.set_road_plane("CLASS_NAMES: [Car]\n", True)


def test_folders_that_are_not_fresh(start, machine, checkout, weights):
    stale = checkout / "output" / "kitti_models" / "t_second" / f"{tag_of(weights)}_0" / "ckpt"
    stale.mkdir(parents=True)
    (stale / "checkpoint_epoch_3.pth").touch()
    with pytest.raises(
        InputError, match="checkpoints of an unfinished run, which OpenPCDet would go on from"
    ):
        start()
    start("--tag", "other")
    with pytest.raises(InputError, match="expected letters, digits"):
        start("--tag", "a b")
    config = checkout / "tools" / "cfgs" / "kitti_models" / "t_second.yaml"
    config.write_text("CLASS_NAMES: [Car]\n")
    with pytest.raises(InputError, match="is a config of someone else"):
        start("--tag", "third")
    assert config.read_text() == "CLASS_NAMES: [Car]\n"


def test_exports_that_do_not_fit(start, machine, checkout, weights, tmp_path):
    report = weights.with_suffix(".json")
    kept = json.loads(report.read_text())

    def refused(message, **changes):
        report.write_text(json.dumps({**kept, **changes}))
        with pytest.raises(InputError, match=message):
            start()

    refused("is not the file that .* is about", sha256="0" * 64)
    refused(
        "centerpoint has no config for KITTI; .*t.txt has the commands",
        detector="centerpoint",
        data="once",
    )
    refused("no.yaml, which .* names, does not exist", config="no.yaml")
    report.write_text(json.dumps({"backbone": "VoxelBackBone8x"}))
    with pytest.raises(InputError, match="is no report of tools/export_openpcdet.py"):
        start()
    report.unlink()
    with pytest.raises(InputError, match=r"t.json does not exist: give the .pth"):
        start()


def test_checkouts_that_do_not_fit(checkout, tmp_path):
    with pytest.raises(InputError, match="no checkout of OpenPCDet, tools/train.py is missing"):
        tool.check_checkout(tmp_path)
    assert tool.check_checkout(checkout)["commit"] is None
    for text, message in (
        ("version = '0.5.2+%s'", "OpenPCDet 0.5 .* older than 0.6"),
        ("", "names no version"),
    ):
        (checkout / "setup.py").write_text(text)
        with pytest.raises(InputError, match=message):
            tool.check_checkout(checkout)


def test_options(start, machine, weights, monkeypatch):
    with pytest.raises(InputError, match="--batch-size 0: expected at least 1"):
        start("--batch-size", "0")
    monkeypatch.delenv("OPENPCDET_ROOT", raising=False)
    with pytest.raises(InputError, match="give a checkout of OpenPCDet by --openpcdet-root"):
        tool.main([str(weights)])


def test_the_real_checkout(weights, machine, capsys):
    """A dry run against OpenPCDet itself: its version is found, and the arguments are ones that its train.py takes."""
    root = Path(os.environ.get("OPENPCDET_ROOT", ""))
    if not (root / "pcdet" / "models" / "detectors").is_dir():
        pytest.skip("OPENPCDET_ROOT does not name a checkout of OpenPCDet")
    tool.main([str(weights), "--openpcdet-root", str(root), "--dry-run", "--epochs", "1"])
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if " train.py " in line)
    known = set(re.findall(r"add_argument\('(--\w+)'", (root / "tools" / "train.py").read_text()))
    assert set(re.findall(r"--\w+", line)) <= known
    assert re.search(r"OpenPCDet 0\.\d+\.\d+ at ", shown)
    # What the watch looks for is what these files write.
    loader = (root / "pcdet" / "models" / "detectors" / "detector3d_template.py").read_text()
    for words in (
        "Loading parameters from checkpoint %s to %s",
        "Not updated weight %s: %s",
        "Done (loaded %d/%d)",
    ):
        assert words in loader
    assert "Start training %s/%s(%s)" in (root / "tools" / "train.py").read_text()


def test_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "pointcept_kd", "finetune-openpcdet", "no.pth", "--openpcdet-root", "."],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: no.pth does not exist: give the .pth of .*\n", done.stderr)


def test_the_watch_is_given_the_report(weights):
    """The line that is asked for is the export's."""
    report = tool.read_export(weights).report
    watch = kitti.LoadWatch("x", (report["n_matched"], report["n_detector"]))
    assert watch.feed(f"==> Done ({report['expected_log_line']})") is None
    assert watch.loaded
