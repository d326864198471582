"""Pre-training from images, end to end: simulated streets by the shipped configs, resume in both phases, real scans."""

import sys

import numpy as np
import pytest
import torch

from pointcept_kd.data.streets.cameras import CameraPlan, simulate_cameras
from pointcept_kd.data.synthetic import Plan, simulate
from pointcept_kd.host import DATASETS, HOOKS, MODELS
from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.config import Config
from pointcept_kd.host.hooks import HookBase
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.log import read_jsonl
from pointcept_kd.host.runtime import run_tool
from tools import export_openpcdet, train

from .real_nuscenes import write_real_info
from .real_pairs import CONFIGS

pytest.importorskip("PIL")
SHORT = """
_base_ = ["{base}"]
save_path = "{save}"
epoch = 4
eval_epoch = 4
num_worker = 0
batch_size = 2
data = dict(
    train=dict(source=dict(data_root="{root}", sequences=["00", "01"])),
    val=dict(source=dict(data_root="{root}")),
)
model = dict(image=dict(weight=None, allow_random=True))
{more}
"""


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    out = tmp_path_factory.mktemp("streets") / "sim"
    plan = Plan({"00": 2, "01": 2, "08": 1}, beams=16, columns=256)
    simulate(out, plan, workers=1, progress=False)
    simulate_cameras(out, plan, CameraPlan(width=240, segments=40), workers=1, progress=False)
    return out


@pytest.fixture
def short(streets, tmp_path):
    def write(base, name, more=""):
        path = tmp_path / f"{name}.py"
        save = (tmp_path / name).as_posix()
        base = (CONFIGS / base).as_posix()
        path.write_text(SHORT.format(base=base, save=save, root=streets.as_posix(), more=more))
        return path, tmp_path / name

    return write


def run(monkeypatch, config, *options):
    words = ["train.py", "--config-file", str(config)]
    monkeypatch.setattr(sys, "argv", [*words, *(["--options", *options] if options else [])])
    assert run_tool(train.main) == 0


def values(folder):
    found = {}
    for entry in read_jsonl(folder / "log.jsonl"):
        found.setdefault(entry["tag"], []).append(entry["value"])
    return found


def handed_over(folder, monkeypatch):
    """The encoder goes to OpenPCDet, every entry as it was trained."""
    last = folder / "model" / "model_last.pth"
    words = [str(last), "--detector", "second", "--out", str(folder / "handoff"), "--tag", "mine"]
    monkeypatch.setattr(sys, "argv", ["export_openpcdet.py", *words])
    assert run_tool(export_openpcdet.main) == 0
    given = torch.load(folder / "handoff" / "mine.pth", weights_only=True)["model_state"]
    trained = load_checkpoint(last)["state_dict"]
    assert len(given) == 72
    for key, value in given.items():
        assert torch.equal(value, trained["student.backbone." + key.removeprefix("backbone_3d.")])


@pytest.mark.parametrize("kind", ["ppkt", "slidr", "olivine", "scalr", "olivine_voxelnet"])
def test_every_kind_trains_by_its_config(kind, short, monkeypatch):
    config, folder = short(f"pretrain/{kind}_tiny.py", kind)
    run(monkeypatch, config)
    seen = values(folder)
    assert len(seen["val/loss"]) == 4
    assert all(np.isfinite(v).all() for tag, v in seen.items() if "loss" in tag)
    first = {"slidr": "superpixels", "scalr": "features"}.get(kind, "pairs")
    assert seen[f"train/loss_{first}"][-1] < seen[f"train/loss_{first}"][0]
    saved = load_checkpoint(folder / "model" / "model_last.pth")
    if kind != "olivine_voxelnet":
        cells = dict(voxel_size=0.2, degrees=1.0, coordinates="cylindrical")
        assert saved["voxels"] == cells
    else:
        assert set(saved["grids"]) == {"student.backbone"}
        handed_over(folder, monkeypatch)
    student = MODELS.build(Config.fromfile(config).model.student)
    exported = load_checkpoint(folder / "model" / "student_last.pth")["state_dict"]
    student.load_state_dict(exported)


class Halt(HookBase):
    """Ends a run before an epoch, as a kill would; not one that was resumed."""

    epoch = 0

    def before_epoch(self):
        if self.trainer.epoch == self.epoch and not self.trainer.cfg.resume:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 3])  # before and after the distributions stand
def test_a_killed_run_goes_on_exactly(stop, short, monkeypatch):
    config, whole = short("pretrain/olivine_tiny.py", "whole")
    run(monkeypatch, config)
    config, broken = short("pretrain/olivine_tiny.py", "broken")
    HOOKS.register_module("TestHalt", module=Halt, force=True)
    monkeypatch.setattr(Halt, "epoch", stop)
    config.write_text(
        config.read_text()
        + 'hooks = [dict(type="kd.CheckpointLoader"), dict(type="kd.ModelHook"), dict(type="kd.InformationWriter"), '
        'dict(type="kd.PairLossEvaluator"), dict(type="kd.CheckpointSaver"), dict(type="TestHalt")]\n'
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-file", str(config)])
    with pytest.raises(KeyboardInterrupt):
        train.main()
    last = broken / "model" / "model_last.pth"
    assert load_checkpoint(last)["epoch"] == stop
    run(monkeypatch, config, "resume=True", f"weight={last.as_posix()}")
    expected = load_checkpoint(whole / "model" / "model_last.pth")["state_dict"]
    got = load_checkpoint(last)["state_dict"]
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert int(got["terms.distributions.vmf.step"]) == 8
    assert int(got["terms.distributions.vmf.warmup"]) == 4
    assert values(broken)["val/loss"][-1] == values(whole)["val/loss"][-1]


# ------------------------------------------------------------------------------------ real scans

CROP = dict(size=(96, 320), area=(0.9, 1.0), least_pairs=64)
COLLECT = dict(
    type="Collect",
    keys=("coord", "grid_coord", "images", "pair_point", "pair_pixel", "pair_label", "name"),
    feat_keys=("strength",),
    offset_keys_dict=dict(offset="coord", pair_offset="pair_point", image_offset="images"),
)


def steps(aspect):
    """The shipped pipeline with coarser cells, so that a step takes seconds."""
    return [
        dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
        dict(type="RandomFlip", p=0.5),
        dict(type="kd.ShuffleImages"),
        dict(type="kd.DropCuboid", max_share=0.2, least_pairs=64),
        dict(type="kd.CropImages", aspect=aspect, **CROP),
        dict(type="kd.FlipImages", p=0.5),
        dict(type="kd.VoxelSample", voxel_size=0.5, degrees=1.0),
        dict(type="kd.PairsToRows"),
        dict(type="ToTensor"),
        COLLECT,
    ]


def descend(source, labels, aspect, config):
    """Three steps on one batch of all samples with equal draws: the batch, the network, the losses."""
    dataset = DATASETS.build(
        dict(type="kd.PointPixelDataset", source=source, labels=labels, transform=steps(aspect))
    )
    model = Config.fromfile(CONFIGS / "pretrain" / config).model
    model.image.update(weight=None, allow_random=True)
    torch.manual_seed(0)
    network = MODELS.build(model).train()
    for term in network.terms.values():
        term.set_total_steps(4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    np.random.seed(0)
    batch = collate_fn([dataset[i] for i in range(len(dataset))])
    losses = []
    for _ in range(3):
        torch.manual_seed(1)
        out = network(dict(batch))
        optimizer.zero_grad()
        out["loss"].backward()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        losses.append({key: value.item() for key, value in out.items()})
    return batch, network, losses


def test_a_step_on_the_real_semantic_kitti_frames(samples, tmp_path):
    listed = [f"{name}_000000" for name in ("00", "04", "06", "07")]
    (tmp_path / "frames.txt").write_text("\n".join(listed) + "\n")
    source = dict(
        type="kd.SemanticKITTIDataset",
        data_root=str(samples / "semantickitti"),
        split="train",
        scans=str(tmp_path / "frames.txt"),
    )
    batch, network, losses = descend(source, "segment", (2.9, 3.7), "olivine_tiny.py")
    assert len(batch["images"]) == 4
    pairs = torch.diff(batch["pair_offset"], prepend=torch.zeros(1, dtype=torch.long))
    assert pairs.min() > 2000, "each camera sees a fifth of its scan"
    assert len(batch["pair_label"].unique()) > 10
    assert losses[-1]["loss_pairs"] < losses[0]["loss_pairs"]
    assert losses[-1]["loss_classes"] < losses[0]["loss_classes"]
    # The distributions stood after two steps.
    assert losses[1]["loss_distributions"] == 0 > losses[2]["loss_distributions"]
    assert int(network.skipped_images) == int(network.skipped_batches) == 0


def test_a_step_on_the_real_nuscenes_key_frame(samples, tmp_path):
    write_real_info(samples, tmp_path)
    source = dict(type="kd.NuScenesDataset", data_root=str(tmp_path), split="val")
    batch, network, losses = descend(source, None, (14 / 9, 17 / 9), "ppkt_tiny.py")
    assert batch["images"].shape == (6, 3, 96, 320)
    assert len(batch["pair_pixel"][:, 0].unique()) == 6
    assert losses[-1]["loss_pairs"] < losses[0]["loss_pairs"]
    assert int(network.skipped_images) == 0
