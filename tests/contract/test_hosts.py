"""This package on the real Pointcept: one config on both hosts, each other's tools, parts and files, spawned processes.

Every run is a process of its own, as a user starts it; see `shims.py` for what makes it possible without CUDA.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcept_kd.host.checkpoint import load_checkpoint

from . import scenes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.pointcept

OURS = dict(
    custom_imports=dict(imports=["pointcept_kd"], allow_failed_imports=False),
    hooks=[
        dict(type="kd.CheckpointLoader"),
        dict(type="kd.ModelHook"),
        dict(type="kd.IterationTimer", warmup_iter=1),
        dict(type="kd.InformationWriter"),
        dict(type="kd.SemSegEvaluator"),
        dict(type="kd.CheckpointSaver", save_freq=None),
        dict(type="kd.PreciseEvaluator", test_last=False),
    ],
    train=dict(type="kd.Trainer"),
    test=dict(type="kd.SemSegTester", verbose=True),
    device="cpu",
)


def start(*words, host="pointcept", fails=False):
    """Run a script; on Pointcept's host with its shims. Its stderr."""
    env = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    env.update(OMP_NUM_THREADS="1", POINTCEPT_KD_HOST=host, PYTHONPATH=str(ROOT))
    runner = ["-W", "ignore", "-m", "tests.contract.run"]
    if host == "builtin":
        env.pop("POINTCEPT_ROOT")
        runner = []
    done = subprocess.run(
        [sys.executable, *runner, *map(str, words)], cwd=ROOT, env=env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    text = done.stderr + done.stdout
    assert (done.returncode != 0) == fails, text[-4000:]
    return text


def theirs(script):
    return Path(os.environ["POINTCEPT_ROOT"]) / "tools" / script


def their_test():
    """The words that start Pointcept's `tools/test.py`."""
    hooks = Path(os.environ["POINTCEPT_ROOT"]) / "pointcept" / "engines" / "hooks" / "misc.py"
    circular = "\nfrom pointcept.engines.test import" in hooks.read_text()
    return [*["tests/contract/models_first.py"] * circular, theirs("test.py")]


@pytest.fixture(scope="module")
def old():
    """Whether `GridSample` must be told which arrays to take along, as before 1.6.0."""
    text = (Path(os.environ["POINTCEPT_ROOT"]) / "pointcept/datasets/transform.py").read_text()
    return "index_valid_keys" not in text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with samples in `data`, and with one of each split in `one`."""
    folder = tmp_path_factory.mktemp("hosts")
    scenes.write_folders(folder / "data")
    scenes.write_folders(folder / "one", train=1, val=1)
    return folder


def config(place, name, old, backbone="PT-v3m1", data="data", **changes):
    """A config file that saves below `place/name`."""
    return scenes.write_config(
        place / f"{name}.py", place / data, place / name, name=backbone, keys=old, **changes
    )


@pytest.fixture(scope="module")
def stock(place, old):
    """What Pointcept's own tools leave of a run of each network: folders by backbone."""
    for backbone in ("PT-v3m1", "SpUNet-v1m1"):
        start(
            theirs("train.py"), "--config-file", config(place, f"stock_{backbone}", old, backbone)
        )
    return {
        backbone: place / f"stock_{backbone}" / "model" for backbone in ("PT-v3m1", "SpUNet-v1m1")
    }


def scalars(folder):
    """(tag, step) to value, of a run of our trainer."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return {(e["tag"], e["step"]): e["value"] for e in map(json.loads, lines)}


@pytest.mark.parametrize("backbone", ["PT-v3m1", "SpUNet-v1m1"])
def test_one_config_on_both_hosts(place, old, stock, backbone):
    seen, files = {}, {}
    # From one file, as the hosts draw their first weights in another order.
    weight = str(stock[backbone] / "model_last.pth")
    model = scenes.model(backbone)
    if backbone == "PT-v3m1":
        # Their pooling permutes several curves whatever `shuffle_orders` says.
        model["backbone"]["order"] = ["hilbert"]
    for host in ("pointcept", "builtin"):
        name = f"both_{backbone}_{host}"
        # Plain steps: AdamW would make a full one of every rounding error near 0.
        sgd = dict(type="SGD", lr=2e-3, momentum=0.9, weight_decay=1e-4)
        # One scan, four times: they list folders in the order of the file system.
        named = old and host == "pointcept"
        file = config(place, name, named, backbone, data="one", epoch=4, **OURS, weight=weight, model=model,
                      optimizer=sgd)  # fmt: skip
        script = ["tests/contract/no_cuda.py"] if host == "pointcept" else []
        text = start(*script, ROOT / "tools" / "train.py", "--config-file", file, host=host)
        assert ("Host: Pointcept" in text) == (host == "pointcept")
        seen[host] = scalars(place / name)
        files[host] = load_checkpoint(place / name / "model" / "model_last.pth")
        result = json.loads((place / name / "result" / "metrics.json").read_text())
        seen[host]["test", 1] = result["mIoU"]
        assert result["mode"] == "fragments"
    one, two = seen.values()
    assert one.keys() == two.keys()
    assert ("train_batch/loss", 2) in one
    for key, value in one.items():
        # Same scans, same draws, same network: what remains is rounding, which may move a point between two classes.
        wide = 5e-3 if "IoU" in key[0] or "Acc" in key[0] or key[0] == "test" else 1e-5
        assert value == pytest.approx(two[key], abs=wide), key
    one, two = files.values()
    assert one.keys() == two.keys()
    assert one["epoch"] == two["epoch"] == 1
    assert list(one["state_dict"]) == list(two["state_dict"])
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][key], rtol=1e-4, atol=1e-5)
    assert len(one["optimizer"]["state"]) == len(two["optimizer"]["state"])


@pytest.mark.parametrize("backbone", ["PT-v3m1", "SpUNet-v1m1"])
def test_checkpoints_load_strictly_in_both_directions(place, old, stock, backbone):
    # Theirs in ours: the built-in host's loader and its own network, resuming after the first of two epochs.
    name = f"resumed_{backbone}"
    weight = str(stock[backbone] / "model_last.pth")
    file = config(place, name, False, backbone, **OURS, weight=weight)
    text = start(ROOT / "tools" / "train.py", "--config-file", file, "--options", "epoch=2", "eval_epoch=2",
                 "+hooks.0.strict=True", host="builtin")  # fmt: skip
    assert re.search(r"(\d+) of \1 weights loaded; 0 missing; 0 unexpected", text)
    # Ours in theirs: the stock tester loads strictly.
    ours = place / name / "model" / "model_best.pth"
    plain = config(place, f"tested_{backbone}", old, backbone, weight=str(ours))
    text = start(*their_test(), "--config-file", plain)
    assert "Val result" in text


def distil(**changes):
    """Their PT-v3m1 teaches our student of other widths and of the class `kd.PT-v3m1`."""
    student = scenes.model("PT-v3m1")
    narrow = dict(enc_channels=[8, 16, 16], dec_channels=[8, 16])
    student["backbone"].update(type="kd.PT-v3m1", **narrow)
    student.update(type="kd.DefaultSegmentorV2", backbone_out_channels=8)
    tap = dict(bottleneck="backbone.enc")
    return dict(
        type="kd.Distiller",
        student=dict(model=student, taps=tap),
        teacher=dict(model=scenes.model("PT-v3m1"), taps=tap, **changes),
        terms=dict(
            logits=dict(type="LogitKL", temperature=2.0),
            bottleneck=dict(type="FeatureMatch", tap="bottleneck", channels=(16, 32), distance="cosine"),
        ),
    )  # fmt: skip


def test_their_tools_train_our_distiller_and_test_its_student(place, old, stock):
    """The stock trainer, hooks, teacher network and tester around our distiller and student."""
    model = distil(weight=str(stock["PT-v3m1"] / "model_best.pth"))
    imports = OURS["custom_imports"]
    hooks = [dict(type="CheckpointLoader"), dict(type="ModelHook"), dict(type="IterationTimer", warmup_iter=1),
             dict(type="InformationWriter"), dict(type="SemSegEvaluator"), dict(type="kd.CheckpointSaver")]  # fmt: skip
    file = config(place, "stock_distils", old, model=model, custom_imports=imports, hooks=hooks)
    text = start(theirs("train.py"), "--config-file", file)
    assert "loss_logits:" in text
    assert "loss_bottleneck:" in text
    folder = place / "stock_distils" / "model"
    whole = load_checkpoint(folder / "model_last.pth")["state_dict"]
    assert all(key.startswith(("student.", "terms.")) for key in whole)
    student = load_checkpoint(folder / "student_best.pth")["state_dict"]
    assert {key.removeprefix("student.") for key in whole if key.startswith("student.")} == set(
        student
    )

    # The student is a plain segmentor: their network, their tester, without this package.
    theirs_alone = model["student"]["model"]
    theirs_alone["backbone"]["type"], theirs_alone["type"] = "PT-v3m1", "DefaultSegmentorV2"
    weight = str(folder / "student_best.pth")
    plain = config(place, "stock_tests", old, model=theirs_alone, weight=weight)
    text = start(*their_test(), "--config-file", plain)
    assert "pointcept_kd" not in plain.read_text()
    assert "Val result" in text
    # Our tester with our network, by the same protocol.
    ours = config(
        place, "ours_tests", False, model=theirs_alone, weight=weight,
        **{k: v for k, v in OURS.items() if k != "hooks"},
    )  # fmt: skip
    start(ROOT / "tools" / "test.py", "--config-file", ours, host="builtin")
    for index in range(2):
        one, two = (
            np.load(next((place / name / "result").glob(f"*val{index}_pred.npy")))
            for name in ("stock_tests", "ours_tests")
        )
        assert one.shape == two.shape
        assert (one == two).mean() > 0.995


def test_their_tool_takes_our_trainer_and_hooks(place, old, stock):
    model = distil(weight=str(stock["PT-v3m1"] / "model_best.pth"))
    file = config(place, "ours_in_theirs", old, model=model, **OURS)
    text = start("tests/contract/no_cuda.py", theirs("train.py"), "--config-file", file)
    assert "Host: Pointcept" in text
    assert ("train_batch/loss_logits", 2) in scalars(place / "ours_in_theirs")
    assert (place / "ours_in_theirs" / "result" / "metrics.json").is_file()


def test_their_hooks_serve_our_trainer(place, old):
    changes = dict(train=OURS["train"], custom_imports=OURS["custom_imports"], device="cpu")
    file = config(place, "their_hooks", old, **changes)
    text = start(ROOT / "tools" / "train.py", "--config-file", file)
    assert "Val result" in text
    assert ("val/mIoU", 1) in scalars(place / "their_hooks")


SPAWNED = '''
"""What two spawned processes know; started by a test."""
import json, os, sys
sys.path.insert(0, ROOT)
from tests.contract import shims
shims.install(os.environ["POINTCEPT_ROOT"])
import pointcept_kd
from pointcept_kd.host import HOST, MODELS, comm, kd
from pointcept_kd.host.runtime import launch

def main(cfg):
    import pointcept.models.builder as builder
    own = [kind.__module__ for kind in map(MODELS.get, ("PT-v3m1", "kd.PT-v3m1"))]
    found = builder.MODELS.get("kd.Distiller") is kd.MODELS.get("Distiller")
    with open(f"{cfg['out']}.{comm.get_rank()}", "w") as file:
        json.dump([HOST, comm.get_world_size(), own, found], file)

if __name__ == "__main__":
    launch(main, 2, dict(device="cpu", out=sys.argv[1]))
'''


def test_spawned_processes_find_all_types(place):
    script = place / "spawned.py"
    script.write_text(SPAWNED.replace("ROOT)", f"{str(ROOT)!r})", 1))
    start(script, place / "types")
    for rank in range(2):
        found = json.loads(Path(f"{place / 'types'}.{rank}").read_text())
        own = found[2]
        assert own[0].startswith("pointcept.models.point_transformer_v3")
        assert own[1] == "pointcept_kd.networks.ptv3"
        assert (found[0], found[1], found[3]) == ("pointcept", 2, True)


def test_their_dialect_reads_our_configs(place, old):
    """Our configs mean the same to their `Config`."""
    script = place / "read.py"
    script.write_text(
        "import sys, json\nfrom pointcept.utils.config import Config\n"
        "cfg = Config.fromfile(sys.argv[1])\n"
        "print('@' + json.dumps(cfg._cfg_dict.to_dict(), sort_keys=True, default=list))\n"
    )
    from pointcept_kd.host.config import Config

    for name in ("kd/ptv3_to_student.py", "kd/ptv3_to_student_nuscenes.py"):
        path = ROOT / "configs" / name
        line = next(x for x in start(script, path).splitlines() if x.startswith("@"))
        ours = json.loads(json.dumps(Config.fromfile(path).to_dict(), default=list))
        assert json.loads(line[1:]) == ours


DOCUMENTED = """
import json, sys
from pointcept.models.builder import build_model
from pointcept.utils.config import Config

cfg = Config.fromfile(sys.argv[1])
for part in (cfg.model.student, cfg.model.teacher):
    part.model.backbone.enable_flash = False
cfg.model.teacher.weight = "random"
model = build_model(cfg.model)
kinds = [type(net).__module__ for net in (model, model.student.backbone, model.teachers["teacher"].network.backbone)]
print("@" + json.dumps(dict(kinds=kinds, cfg=cfg._cfg_dict.to_dict()), default=list))
"""


def test_the_documented_config_builds(place, old):
    if old:
        pytest.skip("the documented base config has names of 1.6 and newer")
    page = (ROOT / "docs" / "on_pointcept.md").read_text()
    text = page.split("```python\n")[1].split("```")[0]
    base = Path(os.environ["POINTCEPT_ROOT"]).resolve() / "configs"
    file = place / "documented.py"
    file.write_text(text.replace('"../nuscenes', f'"{base}/nuscenes'))
    script = place / "documented_build.py"
    script.write_text(DOCUMENTED)
    line = next(x for x in start(script, file).splitlines() if x.startswith("@"))
    found = json.loads(line[1:])
    distiller, *networks = found["kinds"]
    assert distiller == "pointcept_kd.distillers.base"
    assert all(name.startswith("pointcept.models.point_transformer_v3") for name in networks)
    # Our dialect reads it, too.
    from pointcept_kd.host.config import Config

    names = Config.fromfile(file).model.terms
    assert set(names) == set(found["cfg"]["model"]["terms"]) == {"logits", "bottleneck"}
