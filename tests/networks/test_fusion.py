"""The LiDAR-camera student: published sizes, its flow, any images or none, losses, taps, learning, bad input."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from pointcept_kd.distillers.taps import Taps
from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.hooks import compare, scan_losses
from pointcept_kd.host.point import offset2batch
from pointcept_kd.networks.fusion import CRITERIA, FusionNet
from pointcept_kd.networks.fusion_blocks import CameraViews, impute, learner_loss
from pointcept_kd.networks.layers import BatchNorm
from pointcept_kd.networks.swiftnet import SwiftNet
from pointcept_kd.ops.scatter import segment_mean

CLASSES = 3
CAMERA = dict(
    type="kd.SwiftNet",
    num_classes=CLASSES,
    trunk=dict(depths=(1, 1, 1, 1), width=4, bottleneck=False),
    width=6,
    allow_random=True,
)


class PlainLidar(nn.Module):
    """The interface of `kd.PointVoxelUNet` with means of cells, nearest points and one linear layer per level."""

    def __init__(self, channels=(4, 4, 8, 8, 8)):
        super().__init__()
        self.channels, self.num_classes = channels, CLASSES
        self.stem = nn.Linear(4, channels[0])
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), BatchNorm(b)) for a, b in pairwise(channels)
        )
        self.head = nn.Linear(sum(channels), CLASSES)

    def start(self, batch):
        self.cells = torch.cat([offset2batch(batch["offset"])[:, None], batch["grid_coord"]], 1)
        return 0, self.stem(batch["feat"])

    def _inverse(self, level):
        scan, cells = self.cells[:, :1], self.cells[:, 1:] >> level
        rows, inverse = torch.cat([scan, cells], 1).unique(dim=0, return_inverse=True)
        return inverse, len(rows)

    def encode_level(self, level, x):
        points = self.to_points(x)
        return level, self.levels[level - 1](segment_mean(points, *self._inverse(level)))

    def to_points(self, x):
        return x[1][self._inverse(x[0])[0]] if x[0] else x[1]

    def to_voxels(self, values, x):
        return x[0], segment_mean(values, *self._inverse(x[0]))

    def decode(self, values, skips):
        return self.head(torch.cat([values, *(self.to_points(x) for x in skips[:4])], 1))


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return FusionNet(kwargs.pop("lidar", None) or PlainLidar(), CAMERA, **kwargs)


def moved(model, seed=1):
    """In evaluation, with running statistics and normalisations that are none of the defaults."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.2, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
    return model.eval()


def data(counts=(9, 6), images=(2, 1), seed=0, seen=0.5, size=(33, 49)):
    """Scans of `counts` points in cells of their own, of which every image shows about `seen`."""
    generator = torch.Generator().manual_seed(seed)
    cells, point, image, views = [], [], [], []
    for n, cameras in zip(counts, images):
        chosen = torch.randperm(8**3, generator=generator)[:n]
        cells.append(torch.stack((chosen // 64, chosen // 8 % 8, chosen % 8), 1))
        shown = (torch.rand(cameras, n, generator=generator) < seen).nonzero()
        image.append(shown[:, 0])
        point.append(shown[:, 1])
        views.append(len(shown))
    cells, n = torch.cat(cells), sum(counts)
    return {
        "grid_coord": cells,
        "coord": cells * 0.1 + 0.05,
        "feat": torch.cat([cells * 0.1, torch.rand(n, 1, generator=generator)], 1),
        "offset": torch.tensor(counts).cumsum(0),
        "segment": torch.randint(-1, CLASSES, (n,), generator=generator),
        "images": torch.rand(sum(images), 3, *size, generator=generator),
        "image_offset": torch.tensor(images).cumsum(0),
        "view_point": torch.cat(point),
        "view_image": torch.cat(image),
        "view_uv": torch.rand(sum(views), 2, generator=generator) * 1.98 - 0.99,
        "view_offset": torch.tensor(views).cumsum(0),
    }


def without_views(batch):
    """Images that show no point."""
    empty = {key: batch[key][:0] for key in ("view_point", "view_image", "view_uv")}
    return {**batch, **empty, "view_offset": torch.zeros_like(batch["view_offset"])}


def without_images(batch):
    """Zero images, as a loader joins scans without any."""
    none = without_views(batch)
    return {
        **none,
        "images": batch["images"][:0],
        "image_offset": torch.zeros_like(batch["image_offset"]),
    }


def lidar_only(batch):
    """No trace of cameras."""
    return {k: v for k, v in batch.items() if not k.startswith(("image", "view"))}


# --- flow -----------------------------------------------------------------------------------------


def test_flow_block_by_block():
    """The levels one after the other, written without the network's own forward."""
    model, batch = moved(network()), data()
    views = CameraViews.of_batch(batch, 15, batch["feat"])
    lidar, camera = model.lidar, model.camera
    with torch.no_grad():
        found = model(batch)
        x = lidar.start(batch)
        skips, sides = [x], []
        maps = camera.start(batch["images"])
        for level in range(4):
            x = lidar.encode_level(level + 1, x)
            points = lidar.to_points(x)
            _, skip = camera.stage(level + 1, maps)
            if level == 3:
                skip = camera.pooling(skip)
            y = model.l2c[level](skip, points, views)
            assert model.l2c[level].scales == 4 - level
            maps = y.relu()
            sides.append(y)
            m = impute(model.learners[level](points), views.gather(y), views.visible)
            points = model.c2l[level](points, m)
            x = lidar.to_voxels(points, x)
            skips.append(x)
        pixels = camera.classifier.rows(views.gather(camera.decoder(sides[:3], sides[3])))
        torch.testing.assert_close(found["seg_logits"], lidar.decode(points, skips))
        torch.testing.assert_close(found["pix_logits"], pixels)
        assert torch.equal(found["pix_point"], views.visible)
    assert 0 < len(views.visible) < 15


def test_images_matter_where_they_show_something():
    model, batch = moved(network()), data()
    with torch.no_grad():
        before = model(batch)["seg_logits"]
        after = model({**batch, "images": 1 - batch["images"]})["seg_logits"]
    assert not torch.allclose(before, after)


def test_no_visible_point_equals_no_images():
    model, batch = moved(network()), data()
    with torch.no_grad():
        scores = [
            model(b) for b in (without_views(batch), without_images(batch), lidar_only(batch))
        ]
    assert scores[0]["seg_logits"].isfinite().all()
    for out in scores:
        assert torch.equal(out["seg_logits"], scores[0]["seg_logits"])
        assert out["pix_logits"].shape == (0, CLASSES)
        assert len(out["pix_point"]) == 0


def test_scans_of_a_batch_do_not_meet():
    """A scan without images beside one with: each gets what it gets alone."""
    model = moved(network())
    batch = data((9, 6), (2, 0))
    first = {k: batch[k][:9] for k in ("grid_coord", "coord", "feat", "segment")}
    second = {k: batch[k][9:] for k in ("grid_coord", "coord", "feat", "segment")}
    first |= {k: batch[k] for k in ("images", "view_point", "view_image", "view_uv")}
    first |= {k: batch[k][:1] for k in ("offset", "image_offset", "view_offset")}
    second["offset"] = torch.tensor([6])
    with torch.no_grad():
        whole = model(batch)["seg_logits"]
        torch.testing.assert_close(whole[:9], model(first)["seg_logits"])
        torch.testing.assert_close(whole[9:], model(second)["seg_logits"])


def test_a_dropped_camera_changes_the_source_of_its_points_alone():
    model, batch = moved(network()), data((9,), (2,), seed=3)
    kept = batch["view_image"] == 0
    dropped = {
        **batch,
        **{key: batch[key][kept] for key in ("view_point", "view_image", "view_uv")},
        "images": batch["images"][:1],
        "image_offset": torch.tensor([1]),
        "view_offset": kept.sum()[None],
    }
    both = batch["view_point"][~kept]
    with torch.no_grad():
        whole, half = (
            Recorder(model)(b, ("image.0", "fused.0", "learners.0")) for b in (batch, dropped)
        )
    # Pseudo features of level 1 do not depend on images; what is joined differs at the dropped camera's points alone.
    torch.testing.assert_close(whole["learners.0"], half["learners.0"])
    changed = (~torch.isclose(whole["fused.0"], half["fused.0"], atol=1e-5)).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) <= set(both.tolist())
    assert len(changed) > 0
    assert len(half["image.0"]) == len(batch["view_point"][kept].unique())


class Recorder:
    """Activations of one forward by module path, through taps."""

    def __init__(self, model):
        self.model = model

    def __call__(self, batch, paths):
        with Taps(self.model, {path: path for path in paths}).record() as seen:
            self.model(batch)
        return {path: activation.feat for path, activation in seen.items()}


def test_taps():
    model, batch = moved(network()), data()
    paths = ["bottleneck", "seg_head", "pix_head"]
    paths += [f"{name}.{i}" for name in ("image", "learners", "fused") for i in range(4)]
    with torch.no_grad():
        seen, out = Recorder(model)(batch, paths), model(batch)
    k = len(out["pix_point"])
    assert torch.equal(seen["seg_head"], out["seg_logits"])
    assert torch.equal(seen["pix_head"], out["pix_logits"])
    assert seen["bottleneck"].shape == (15, 8)
    for i, (points, images) in enumerate(zip((4, 8, 8, 8), (4, 8, 16, 6))):
        assert seen[f"image.{i}"].shape == (k, images)
        assert seen[f"learners.{i}"].shape == (15, images)
        assert seen[f"fused.{i}"].shape == (15, points)
    # The bottleneck is what the last learner reads, not what the last fusion gives.
    torch.testing.assert_close(model.learners[3](seen["bottleneck"]), seen["learners.3"])
    assert not torch.allclose(seen["bottleneck"], seen["fused.3"])


# --- losses ---------------------------------------------------------------------------------------

PARTS = {"loss_lidar", "loss_pixel", *(f"loss_learner{i}" for i in (1, 2, 3, 4))}


def test_losses_of_training():
    model, batch = network(pixel_weight=0.5, learner_weight=2.0).train(), data()
    paths = ["seg_head", "pix_head"] + [f"{n}.{i}" for n in ("image", "learners") for i in range(4)]
    again = copy.deepcopy(model)
    out, seen = model(batch), Recorder(again)(batch, paths)
    assert set(out) == {"loss", *PARTS}
    assert all(value.dim() == 0 for value in out.values())
    criteria, labels = build_criteria(CRITERIA), batch["segment"]
    views = CameraViews.of_batch(batch, 15, batch["feat"])
    parts = {
        "loss_lidar": criteria(seen["seg_head"], labels),
        "loss_pixel": criteria(seen["pix_head"], labels[views.visible]),
    }
    for i in range(4):
        own, read = seen[f"learners.{i}"][views.visible], seen[f"image.{i}"]
        parts[f"loss_learner{i + 1}"] = (own - read).square().mean()
    for name, wanted in parts.items():
        torch.testing.assert_close(out[name], wanted.detach())
    learned = sum(parts[f"loss_learner{i}"] for i in (1, 2, 3, 4))
    total = parts["loss_lidar"] + 0.5 * parts["loss_pixel"] + 2 * learned
    torch.testing.assert_close(out["loss"], total)


def test_learners_teach_the_points_not_the_images():
    model, batch = network().train(), data()
    views = CameraViews.of_batch(batch, 15, batch["feat"])
    with Taps(model, {"p": "learners.0", "i": "image.0"}).record() as seen:
        model(batch)
    learner_loss(seen["p"].feat, seen["i"].feat, views.visible).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.camera.parameters())
    assert model.lidar.stem.weight.grad.any()


def test_losses_of_evaluation():
    """`loss` is that of the scores, so that an evaluator's mean over scans does not depend on batches."""
    model, batch = moved(network()), data()
    with torch.no_grad():
        out = model(batch)
        assert set(out) == {"loss", "seg_logits", "pix_logits", "pix_point"}
        wanted = build_criteria(CRITERIA)(out["seg_logits"], batch["segment"])
        torch.testing.assert_close(out["loss"], wanted)
        losses = scan_losses(model, out, batch)
    assert len(losses) == 2
    pred, target, _ = compare(out["seg_logits"], batch)
    assert pred.shape == target.shape == (15,)
    unlabelled = {k: v for k, v in batch.items() if k != "segment"}
    assert "loss" not in model(unlabelled)
    quiet = moved(network(evaluate_pixels=False))
    assert set(quiet(batch)) == {"loss", "seg_logits"}
    torch.testing.assert_close(quiet(batch)["seg_logits"], out["seg_logits"])


def test_pixels_at_points_and_of_whole_images():
    """Where both grids have a pixel, the two ways agree; elsewhere they differ a little."""
    points, whole = moved(network()), moved(network(parity=True))
    batch = data((12,), (1,), seen=1.0)
    # Enlarging by 2 loses nothing, so the classifier's ReLU makes the difference: it must have something to cut.
    with torch.no_grad():
        half = Recorder(points)(batch, ["camera.decoder"])["camera.decoder"]
    for model in (points, whole):
        model.camera.classifier.norm.running_mean.copy_(half.mean((0, 2, 3)))
    rows, columns = torch.arange(12) % 4 * 4 + 2, torch.arange(12) // 4 * 8 + 2
    nodes = torch.stack([columns / 24 * 2 - 1, rows / 16 * 2 - 1], 1)
    with torch.no_grad():
        for places, close in ((nodes, True), (nodes + 0.7 / 24, False)):
            given = {**batch, "view_uv": places}
            found, wanted = points(given)["pix_logits"], whole(given)["pix_logits"]
            assert torch.allclose(found, wanted, atol=1e-5) == close
            assert (found - wanted).abs().max() < 0.5 * wanted.std()


# --- switches and extremes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches",
    [
        dict(),
        dict(l2c=False),
        dict(c2l=False),
        dict(l2c=False, c2l=False),
        dict(learners=False),
        dict(multi_view="mean"),
        dict(parity=True),
        dict(image=False),
    ],
    ids=str,
)
def test_switches(switches):
    """Every parameter that is there learns, and the parts of the loss are those of the modules that are there."""
    model, batch = network(**switches).train(), data()
    out = model(batch)
    wanted = {"loss", "loss_lidar"}
    if switches.get("image", True):
        wanted.add("loss_pixel")
    if not {"image", "c2l", "learners"} & set(switches):
        wanted |= PARTS
    assert set(out) == wanted
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    missing = {
        "l2c": {"l2c"},
        "c2l": {"c2l", "learners"},
        "learners": {"learners"},
        "image": {"camera", "l2c", "c2l", "learners"},
    }
    gone = set().union(*(missing[key] for key in set(switches) & set(missing)))
    assert names == {"lidar", "camera", "l2c", "c2l", "learners"} - gone
    moved(model)
    with torch.no_grad():
        assert torch.equal(
            model(without_views(batch))["seg_logits"], model(lidar_only(batch))["seg_logits"]
        )


@pytest.mark.parametrize("change", [dict, without_views, without_images, lidar_only])
@pytest.mark.parametrize("counts", [(9, 6), (1,)])
@pytest.mark.parametrize("ignored", [False, True])
def test_extremes_are_finite(change, counts, ignored):
    model = network().train()
    batch = change(data(counts, (2, 0)[: len(counts)], seen=1.0, size=(32, 32)))
    if ignored:
        batch["segment"] = torch.full_like(batch["segment"], -1)
    for _ in range(2):
        out = model(batch)
        assert set(out) == {"loss", *PARTS}
        assert all(value.isfinite() for value in out.values())
        model.zero_grad()
        out["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    if change is not dict:
        assert all(out[f"loss_learner{i}"] == 0 for i in (1, 2, 3, 4))
        assert out["loss_pixel"] == 0
    if change in (without_images, lidar_only):
        assert not any(p.grad.any() for p in (*model.camera.parameters(), *model.l2c.parameters()))
    if ignored:
        assert out["loss_lidar"] == 0
    with torch.no_grad():
        assert model.eval()(batch)["seg_logits"].isfinite().all()


# --- with the LiDAR network -----------------------------------------------------------------------

LIDAR = dict(
    type="kd.PointVoxelUNet",
    num_classes=CLASSES,
    channels=(8, 16, 16, 16, 16, 16, 16, 8, 8),
    depth=1,
    head_size=8,
    voxel_size=0.1,
    dropout=0.0,
    drop_path=0.0,
)


@pytest.mark.parametrize(
    ("width", "lidar", "total", "adapter"),
    [(1, 23_033_729, 35_768_733, 132_608), (2, 91_674_353, 105_396_405, 263_680)],
)
def test_sizes_are_the_published_ones(width, lidar, total, adapter):
    """The published totals count an adapter of distillation, which is not part of the network."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        model = FusionNet(
            dict(type="kd.PointVoxelUNet", num_classes=17, width=width),
            dict(type="kd.SwiftNet", num_classes=17, allow_random=True),
        )
    assert count(model.lidar) == lidar
    assert count(model.camera) == 11_796_796
    if width == 1:
        assert count(model.l2c) == 12_209 + 47_969 + 190_145 + 78_689
        assert count(model.c2l) == 5_209 + 20_145 + 79_201 + 190_401
        assert count(model.learners) == 6_528 + 25_344 + 99_840 + 49_920
    assert count(model) == total - adapter


def test_the_lidar_branch_alone():
    """Without images it is the LiDAR network; joined in no direction its scores are that network's."""
    batch = data()
    alone = moved(network(lidar=LIDAR, image=False))
    apart = moved(network(lidar=LIDAR, l2c=False, c2l=False))
    apart.lidar.load_state_dict(alone.lidar.state_dict())
    with torch.no_grad():
        wanted = alone.lidar(batch)
        assert torch.equal(alone(batch)["seg_logits"], wanted)
        assert torch.equal(apart(batch)["seg_logits"], wanted)
        joined = moved(network(lidar=LIDAR))
        joined.lidar.load_state_dict(alone.lidar.state_dict())
        assert not torch.allclose(joined(batch)["seg_logits"], wanted)


def test_no_visible_point_equals_no_images_with_the_lidar_network():
    model, batch = moved(network(lidar=LIDAR)), data()
    with torch.no_grad():
        scores = [
            model(b)["seg_logits"]
            for b in (without_views(batch), without_images(batch), lidar_only(batch), batch)
        ]
    assert all(torch.equal(x, scores[0]) for x in scores[1:3])
    assert not torch.allclose(scores[3], scores[0])


@pytest.mark.parametrize("change", [dict, without_views, lidar_only])
@pytest.mark.parametrize("counts", [(9, 6), (1,)])
def test_extremes_with_the_lidar_network(change, counts):
    model = network(lidar={**LIDAR, "dropout": 0.3, "drop_path": 0.3}).train()
    out = model(change(data(counts, (2, 0)[: len(counts)], seen=1.0, size=(32, 32))))
    assert all(value.isfinite() for value in out.values())
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("change", [dict, lidar_only])
def test_half_precision(change):
    model = network(lidar=LIDAR).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(change(data()))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in out.values())
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    moved(model)
    with torch.no_grad():
        wanted = model(change(data()))["seg_logits"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(change(data()))["seg_logits"]
    torch.testing.assert_close(found.float(), wanted, atol=0.05 * float(wanted.std()), rtol=0.05)


def fitted(steps=30, **switches):
    """Reports of training on labels that the image alone knows: its left half is red and shows points of class 1."""
    model = network(seed=5, **switches).train()
    batch = data((40,), (1,), seed=5, seen=0.8)
    batch["images"][:, 0, :, :24], batch["images"][:, 0, :, 24:] = 1.0, 0.0
    left = torch.zeros(40, dtype=torch.bool)
    left[batch["view_point"][batch["view_uv"][:, 0] < 0]] = True
    batch["segment"] = left.long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    reports = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(batch)
        reports.append({k: v.item() for k, v in out.items()})
        out["loss"].backward()
        optimizer.step()
    return reports


def test_learns_from_images():
    joined, alone = fitted(), fitted(image=False)
    for name in ("loss_lidar", "loss_pixel"):
        assert joined[-1][name] < 0.2 * joined[0][name]
    for level in (1, 2):
        assert joined[-1][f"loss_learner{level}"] < 0.7 * joined[0][f"loss_learner{level}"]
    assert alone[-1]["loss_lidar"] > 4 * joined[-1]["loss_lidar"]


def test_state_dict_has_no_taps():
    names = {key.split(".")[0] for key in network().state_dict()}
    assert names == {"lidar", "camera", "l2c", "c2l", "learners"}


def test_bad_input():
    with pytest.raises(InputError, match="camera branch has no config"):
        FusionNet(PlainLidar())
    with pytest.raises(InputError, match="3 classes, the camera's 4"):
        FusionNet(PlainLidar(), {**CAMERA, "num_classes": 4})
    with pytest.raises(InputError, match="multi_view='first'"):
        network(multi_view="first")
    batch = data()
    with pytest.raises(InputError, match="training needs `segment`"):
        network().train()({k: v for k, v in batch.items() if k != "segment"})
    with pytest.raises(InputError, match="`images` but no view_uv"):
        network()({k: v for k, v in batch.items() if k != "view_uv"})
    assert isinstance(MODELS.build(CAMERA), SwiftNet)
