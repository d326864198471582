"""The LiDAR-camera pair learns: four simulated scans by heart, and what learners are for."""

import copy
import importlib.util

import pytest
import torch

from pointcept_kd.data import synthetic
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.streets.nuscenes_layout import VERSION, RigPlan, simulate_nuscenes
from pointcept_kd.host import DATASETS, MODELS
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import collate_fn

from .real_pairs import CONFIGS

CONFIG = CONFIGS / "kd/sphereformer_to_fusion_tiny.py"
VOXEL = 0.8  # metres
PLAN = synthetic.Plan({"00": 2, "01": 2}, beams=16, columns=128, spacing=6.0, seed=3)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embreex") is None or importlib.util.find_spec("PIL") is None,
    reason="the extras `sim` and `images` are not installed",
)


def read():
    cfg = copy.deepcopy(Config.fromfile(CONFIG))
    for network in (cfg.model.teacher.model.backbone, cfg.model.student.model.lidar):
        network.update(head_size=8, voxel_size=VOXEL, drop_path=0.0, dropout=0.0)
        network.channels = (16, 32, 32, 48, 64, 48, 32, 32, 32)
    # A ReLU behind the adapter would keep the features apart for good.
    cfg.model.terms.bottleneck.update(channels=(64, 64), activation="none")
    return cfg


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two views of four key frames, with two cameras."""
    out = tmp_path_factory.mktemp("streets")
    rig = RigPlan(sweeps=2, width=96, segments=24)
    simulate_nuscenes(out, PLAN, rig, workers=1, progress=False)
    write_infos(out / "raw", VERSION, out, with_camera=True)
    cfg = read().data.train
    cfg.update(image_size=(56, 96), keep=None, cameras=["CAM_FRONT", "CAM_BACK"])
    cfg.source.data_root = str(out)
    cfg.transform[0].student_voxel.voxel_size = VOXEL
    dataset = DATASETS.build(cfg)
    return collate_fn([dataset[i] for i in range(4)])


def train(model, batch, steps, rate=0.01):
    """The losses of every step on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.2
    )
    losses = []
    for _ in range(steps):
        out = model(dict(batch))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        schedule.step()
        losses.append({name: float(value.detach()) for name, value in out.items()})
    return losses


@pytest.fixture(scope="module")
def teacher(scans):
    """A LiDAR network that knows the four scans, its weights in a file of their own."""
    torch.manual_seed(0)
    model = MODELS.build(read().model.teacher.model).train()
    batch = {
        key: scans[f"teacher_{key}"]
        for key in ("coord", "grid_coord", "feat", "offset")
    }  # fmt: skip
    batch["segment"] = torch.full((len(batch["coord"]),), -1)
    batch["segment"][scans["match"]] = scans["segment"]
    losses = train(model, batch, 30)
    assert losses[-1]["loss"] < 0.1 * losses[0]["loss"]
    return model.eval()


def pair(teacher, **student):
    torch.manual_seed(0)
    cfg = read().model
    cfg.teacher.weight = "random"
    cfg.student.model.update(student)
    model = MODELS.build(cfg).train()
    model.teachers["teacher"].network.load_state_dict(teacher.state_dict())
    return model


@torch.no_grad()
def miou(model, scans, cameras=True):
    """Mean over the classes that are there, 0 to 1."""
    away = ("teacher_", "match", *(() if cameras else ("images", "image_", "view_")))
    batch = {key: value for key, value in scans.items() if not key.startswith(away)}
    pred = model.eval().student(batch)["seg_logits"].argmax(1)
    known = scans["segment"] >= 0
    pred, target = pred[known], scans["segment"][known]
    found = [(pred == c) & (target == c) for c in target.unique()]
    either = [(pred == c) | (target == c) for c in target.unique()]
    return float(torch.stack([a.sum() / b.sum() for a, b in zip(found, either)]).mean())


@pytest.mark.slow
def test_four_scans_by_heart_with_and_without_learners(scans, teacher):
    assert scans["images"].shape == (8, 3, 56, 96)
    seen = len(scans["view_point"].unique()) / len(scans["coord"])
    assert 0.1 < seen < 0.4, "two of six cameras"
    lost = []
    for learners in (True, False):
        model = pair(teacher, learners=learners)
        losses = train(model, scans, 150)
        # Of the teacher's class scores something remains: it saw points that the student did not, and is less sure.
        shares = {name: losses[-1][name] / losses[0][name] for name in losses[0]}
        assert max(shares["loss"], shares["loss_task"]) < 0.2, shares
        assert max(shares["loss_logits"], shares["loss_bottleneck"]) < 0.75, shares
        both = miou(model, scans)
        assert both > 0.95
        lost.append(both - miou(model, scans, cameras=False))
        print(f"{learners=}: mIoU {100 * both:.1f}, without cameras {100 * lost[-1]:.1f} less")
    # Learners make up for cameras that are gone.
    assert lost[0] < 0.5 * lost[1]
