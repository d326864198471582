"""A LiDAR teacher and a LiDAR-camera student: the shipped configs, the real key frame, any subset of the cameras."""

import copy

import numpy as np
import pytest
import torch

from pointcept_kd.host import DATASETS, MODELS
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.solver import build_scheduler

from .real_nuscenes import write_real_info
from .real_pairs import CONFIGS

VIEWS = ("images", "image_offset", "view_point", "view_image", "view_uv", "view_offset")


def network(name):
    """The model of a config with a random teacher and a random image trunk."""
    model = copy.deepcopy(Config.fromfile(CONFIGS / name).model)
    student = model.student.model if "student" in model else model
    if "teacher" in model:
        model.teacher.weight = "random"
    if student.get("camera"):
        student.camera.update(weight=None, allow_random=True)
    return MODELS.build(model)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fusion/semseg-sphereformer-0-base.py", 91_674_353 - 193),
        ("fusion/semseg-lidar-1-student.py", 23_033_729 - 97),
        ("kd/sphereformer_to_fusion.py", 35_768_733 - 97 - 128),
        ("kd/sphereformer_to_fusion_b.py", 105_396_405 - 193 - 128),
    ],
)
def test_published_sizes(name, parameters):
    """Published with 17 classes, 0 for noise; here with 16: a row less in the heads, of 96 w + 1 and of 128."""
    with torch.device("meta"):
        model = network(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_weights_of_the_terms():
    star, b = (
        Config.fromfile(CONFIGS / f"kd/{n}.py").model.terms
        for n in ("sphereformer_to_fusion", "sphereformer_to_fusion_b")
    )
    assert [star[name].weight for name in ("logits", "bottleneck")] == [1.0, 1.0]
    assert [b[name].weight for name in ("logits", "bottleneck")] == [2.0, 2.0]
    assert star.logits.temperature == b.logits.temperature == 1.0


def test_published_schedule():
    settings = Config.fromfile(CONFIGS / "kd/sphereformer_to_fusion.py").scheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_scheduler(dict(settings, total_steps=87_950), optimizer)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in (0, 249, 250)] == pytest.approx([0.004, 1.0, 1.0])
    assert factor(44_225) == pytest.approx(0.5)
    alone = build_scheduler(dict(settings, total_steps=87_950, warmup_steps=0), optimizer)
    assert alone.lr_lambdas[0](0) == 1.0


# ------------------------------------------------------------------------------ the real key frame


@pytest.fixture(scope="module")
def key_frame(samples, tmp_path_factory):
    """Two views of the real key frame, six cameras, by the tiny configs' pipeline on coarser voxels."""
    root = tmp_path_factory.mktemp("real")
    write_real_info(samples, root)
    cfg = Config.fromfile(CONFIGS / "kd/sphereformer_to_fusion_tiny.py").data.train
    transform = copy.deepcopy(cfg.transform)
    for voxels in (transform[0]["student_voxel"],):
        voxels["voxel_size"] = 0.5
    source = dict(type="kd.NuScenesDataset", data_root=str(root), split="val")
    dataset = DATASETS.build(
        dict(cfg, source=source, transform=transform, keep=None, image_size=(112, 200))
    )
    np.random.seed(0)
    batch = collate_fn([dataset[0]])
    # The key frame has no labels: height above ground stands in for them.
    batch["segment"] = (batch["coord"][:, 2] > -1).long()
    return batch


def test_forward_and_backward_on_the_real_key_frame(key_frame):
    torch.manual_seed(0)
    model = network("kd/sphereformer_to_fusion_tiny.py").train()
    assert len(key_frame["images"]) == 6
    assert len(key_frame["view_image"].unique()) == 6
    seen = len(key_frame["view_point"].unique()) / len(key_frame["coord"])
    assert 0.9 < seen < 1, "the six look all around, but not down at the car"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
    losses = []
    for _ in range(4):
        out = model(dict(key_frame))
        assert all(torch.isfinite(value) for value in out.values()), out
        optimizer.zero_grad()
        out["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        losses.append(out)
    for name in ("loss", "loss_task"):
        assert losses[-1][name] < losses[0][name], name


def test_any_subset_of_the_cameras(key_frame):
    torch.manual_seed(0)
    model = network("fusion/semseg-fusion-1-student_tiny.py").eval()
    batch = {k: v for k, v in key_frame.items() if not k.startswith(("teacher_", "match"))}
    every = model(dict(batch))["seg_logits"]
    blind = model({k: v for k, v in batch.items() if k not in VIEWS})["seg_logits"]
    assert torch.isfinite(every).all()
    assert torch.isfinite(blind).all()
    assert not torch.allclose(every, blind)
    rows = batch["view_image"] == 2
    one = {
        **batch,
        "images": batch["images"][2:3],
        "image_offset": torch.tensor([1]),
        "view_image": torch.zeros(int(rows.sum()), dtype=torch.long),
        "view_offset": rows.sum()[None],
        **{key: batch[key][rows] for key in ("view_point", "view_uv")},
    }
    assert torch.isfinite(model(one)["seg_logits"]).all()
    # No camera at all, but the keys of such: as without them.
    none = {
        **batch,
        "images": batch["images"][:0],
        "image_offset": torch.tensor([0]),
        **{key: batch[key][:0] for key in ("view_point", "view_image", "view_uv")},
        "view_offset": torch.tensor([0]),
    }
    assert torch.equal(model(none)["seg_logits"], blind)


@pytest.mark.parametrize("what", ["no view", "no label", "one voxel", "blind camera", "no camera"])
def test_nothing_is_not_finite(key_frame, what):
    torch.manual_seed(0)
    model = network("kd/sphereformer_to_fusion_tiny.py").train()
    batch = dict(key_frame)
    views = ("view_point", "view_image", "view_uv")
    if what == "no view":
        batch.update({key: batch[key][:0] for key in views}, view_offset=torch.tensor([0]))
    elif what == "no label":
        batch["segment"] = torch.full_like(batch["segment"], -1)
    elif what == "one voxel":
        one = {k: batch[k][:1] for k in ("coord", "grid_coord", "feat", "segment", "match")}
        rows = batch["view_point"] == 0
        batch.update(one, offset=torch.tensor([1]), view_offset=rows.sum()[None])
        batch.update({key: batch[key][rows] for key in views})
    elif what == "blind camera":
        rows = batch["view_image"] != 3
        batch.update({key: batch[key][rows] for key in views}, view_offset=rows.sum()[None])
    else:
        batch.update({key: batch[key][:0] for key in views}, view_offset=torch.tensor([0]))
        batch.update(images=batch["images"][:0], image_offset=torch.tensor([0]))
    out = model(batch)
    assert all(torch.isfinite(value) for value in out.values()), out
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_a_step_on_a_real_semantic_kitti_scan(samples, tmp_path):
    (tmp_path / "scans.txt").write_text("00_000009\n")
    root = samples / "semantickitti"
    cfg = Config.fromfile(CONFIGS / "kd/sphereformer_to_fusion_semantic_kitti.py").data.train
    transform = copy.deepcopy(cfg.transform)
    transform[0]["student_voxel"]["voxel_size"] = 0.5
    source = {**cfg.source, "data_root": str(root)}
    # Only the first scan has its image: of later ones, merged with past scans, the teacher's view is looked at.
    later = DATASETS.build({**source, "scans": str(tmp_path / "scans.txt"), "sweeps": 9})[0]
    assert len(np.unique(later["sweep"])) == 4, "scans 9, 5, 2 and 1"
    (tmp_path / "scans.txt").write_text("00_000000\n")
    dataset = DATASETS.build(
        dict(cfg, source={**source, "scans": str(tmp_path / "scans.txt")}, transform=transform)
    )
    np.random.seed(0)
    batch = collate_fn([dataset[0]])
    assert batch["images"].shape == (1, 3, 192, 640)
    seen = len(batch["view_point"]) / len(batch["coord"])
    assert 0.05 < seen < 0.3, "the camera looks ahead"
    assert len(batch["segment"].unique()) > 8
    model = copy.deepcopy(Config.fromfile(CONFIGS / "kd/sphereformer_to_fusion_tiny.py").model)
    model.teacher.weight = "random"
    for branch in (
        model.teacher.model.backbone,
        model.student.model.lidar,
        model.student.model.camera,
    ):
        branch.num_classes = 19
    torch.manual_seed(0)
    network = MODELS.build(model).train()
    out = network(batch)
    out["loss"].backward()
    assert all(torch.isfinite(value) for value in out.values())
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
