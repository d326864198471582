"""Pre-training from images: pairs of a batch against loops over scans, what is left out, validation, resume."""

import math
import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pointcept_kd.distillers import image_to_lidar, pair_terms
from pointcept_kd.distillers.contrast import class_contrast, pair_infonce
from pointcept_kd.host import MODELS, InputError, comm, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch
from pointcept_kd.host.loader import collate_fn

HEADS = ("final", "final_class_level")
SIZE = (4, 6)


class Points(nn.Module):
    """Features of rows by two linear heads, unit length; rows of negative z are outside of the grid: zeros."""

    def __init__(self, dim=5, heads=HEADS):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(3, dim) for name in heads})

    def forward(self, batch):
        inside = (batch["coord"][:, 2:] >= 0).float()
        batch["coord"] = None  # networks write into their container
        out = {n: nn.functional.normalize(h(batch["feat"])) for n, h in self.heads.items()}
        return {n: v * inside for n, v in out.items()}


class OneHead(Points):
    """The same with one head that is handed out bare."""

    def __init__(self, dim=3):
        super().__init__(dim, ("final",))

    def forward(self, batch):
        return super().forward(batch)["final"]


class Images(nn.Module):
    """Features of pixels by two 1 x 1 convolutions; the frozen part is the picture itself."""

    def __init__(self, dim=5, heads=HEADS):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Conv2d(3, dim, 1) for name in heads})
        self.runs = 0

    def forward(self, images):
        self.runs += 1
        return {n: nn.functional.normalize(h(images), dim=1) for n, h in self.heads.items()}

    def at(self, images, pixels):
        self.runs += 1
        i, r, c = pixels.unbind(1)
        return {
            n: nn.functional.normalize(h(images), dim=1).permute(0, 2, 3, 1)[i, r, c]
            for n, h in self.heads.items()
        }

    def features_at(self, images, pixels):
        i, r, c = pixels.unbind(1)
        return images.permute(0, 2, 3, 1)[i, r, c]


def register():
    MODELS.register_module("TestPoints", module=Points, force=True)
    MODELS.register_module("TestOneHead", module=OneHead, force=True)
    MODELS.register_module("TestImages", module=Images, force=True)


@pytest.fixture(autouse=True)
def networks():
    torch.manual_seed(0)
    register()


def model(student="TestPoints", **terms):
    terms = terms or {
        "pairs": dict(type="kd.PairContrast", weight=0.5),
        "classes": dict(type="kd.ClassContrast", weight=0.5),
    }
    return image_to_lidar.ImageToLidar(dict(type=student), dict(type="TestImages"), terms)


def scan(points=9, images=2, pairs=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    coord = torch.randn(points, 3, generator=g)
    coord[:, 2].abs_()
    place = torch.stack(
        [torch.randint(0, high, (pairs,), generator=g) for high in (images, *SIZE)], 1
    )
    return {
        "coord": coord,
        "feat": torch.randn(points, 3, generator=g),
        "offset": torch.tensor([points]),
        "images": torch.rand(images, 3, *SIZE, generator=g),
        "image_offset": torch.tensor([images]),
        "pair_point": torch.randint(0, points, (pairs,), generator=g),
        "pair_pixel": place,
        "pair_label": torch.randint(0, 4, (pairs,), generator=g),
        "pair_offset": torch.tensor([pairs]),
        "superpixels": torch.randint(0, 5, (images, *SIZE), generator=g),
    }


def both_sides(net, scans, head):
    """Features of all pairs, scan after scan and pair after pair."""
    points, pixels, labels = [], [], []
    for one in scans:
        p = net.student(dict(one))[head]
        q = net.image(one["images"])[head]
        for i in range(len(one["pair_point"])):
            image, row, column = one["pair_pixel"][i].tolist()
            points.append(p[one["pair_point"][i]])
            pixels.append(q[image, :, row, column])
            labels.append(int(one["pair_label"][i]))
    return torch.stack(points), torch.stack(pixels), torch.tensor(labels)


def test_loss_of_a_batch_is_that_of_its_pairs_scan_by_scan():
    net = model()
    scans = [scan(seed=1), scan(points=5, images=3, pairs=4, seed=2), scan(pairs=2, seed=3)]
    out = net(collate_fn(scans))
    points, pixels, _ = both_sides(net, scans, "final")
    # All pairs are drawn, so their order, which the draw decides, changes nothing.
    assert out["loss_pairs"].item() == pytest.approx(pair_infonce(points, pixels).item(), rel=1e-5)
    points, pixels, labels = both_sides(net, scans, "final_class_level")
    wanted = class_contrast(points, pixels, labels)
    assert out["loss_classes"].item() == pytest.approx(wanted.item(), rel=1e-5)
    total = 0.5 * out["loss_pairs"] + 0.5 * out["loss_classes"]
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    out["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_one_run_of_the_image_network_serves_all_terms():
    net = model(
        pairs=dict(type="kd.PairContrast"),
        classes=dict(type="kd.ClassContrast"),
    )
    net(collate_fn([scan()]))
    assert net.image.runs == 1
    net = model(
        pairs=dict(type="kd.PairContrast"), pieces=dict(type="kd.SuperpixelContrast", per_image=5)
    )
    one = collate_fn([scan()])
    out = net(one)
    assert net.image.runs == 1
    points, pixels, _ = both_sides(net, [scan()], "final")
    assert out["loss_pairs"].item() == pytest.approx(pair_infonce(points, pixels).item(), rel=1e-5)


def test_superpixels_pool_over_pairs_and_over_all_pixels():
    net = model(pieces=dict(type="kd.SuperpixelContrast", per_image=5, temperature=0.5))
    scans = [scan(seed=4), scan(images=1, seed=5)]
    out = net(collate_fn(scans))
    means = []
    for one in scans:
        p, q = net.student(dict(one))["final"], net.image(one["images"])["final"]
        for image in range(len(q)):
            for piece in range(5):
                rows = [
                    p[one["pair_point"][i]]
                    for i, (v, r, c) in enumerate(one["pair_pixel"].tolist())
                    if v == image and one["superpixels"][v, r, c] == piece
                ]
                if rows:
                    inside = one["superpixels"][image] == piece
                    means.append((sum(rows) / len(rows), q[image][:, inside].mean(1)))
    k, q = (torch.stack(side) for side in zip(*means))
    assert out["loss"].item() == pytest.approx(pair_infonce(k, q, 0.5).item(), rel=1e-4)


def test_regression_onto_the_frozen_features():
    net = model("TestOneHead", direct=dict(type="kd.FeatureRegression"))
    one = scan(seed=6)
    out = net(collate_fn([one]))
    apart = []
    features = net.student(dict(one))
    for row, (v, r, c) in zip(one["pair_point"].tolist(), one["pair_pixel"].tolist()):
        f, t = features[row], one["images"][v, :, r, c]
        apart.append((f / f.norm() - t / t.norm()).norm())
    assert out["loss"].item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-5)


def test_draws_take_so_many_pairs_and_follow_the_seed():
    net = model(pairs=dict(type="kd.PairContrast", num_pairs=3))
    batch = collate_fn([scan(pairs=40, seed=s) for s in (1, 2)])
    points, pixels, _ = both_sides(net, [scan(pairs=40, seed=s) for s in (1, 2)], "final")
    everything = pair_infonce(points, pixels).item()
    torch.manual_seed(3)
    first = net(batch)["loss"].item()
    second = net(batch)["loss"].item()
    torch.manual_seed(3)
    again = net(batch)["loss"].item()
    assert first == again != second
    assert everything not in (first, second)


# ------------------------------------------------------------------------------ what is left out


def test_points_outside_of_the_grid_leave_no_pair():
    one = scan(pairs=12, seed=7)
    outside = one["coord"].clone()
    outside[:4, 2] = -1.0
    one["coord"] = outside
    kept = one["pair_point"] >= 4
    assert 0 < kept.sum() < len(kept)
    net = model()
    out = net(collate_fn([one]))
    fewer = {
        k: v[kept] if k.startswith("pair_") and k != "pair_offset" else v for k, v in one.items()
    }
    fewer["pair_offset"] = kept.sum()[None]
    torch.testing.assert_close(out["loss"], net(collate_fn([fewer]))["loss"])
    assert int(net.skipped_pairs) == int((~kept).sum())
    assert int(net.skipped_batches) == 0


def test_not_a_number_is_not_left_out():
    one = scan()
    one["feat"][int(one["pair_point"][0])] = math.nan
    assert not torch.isfinite(model()(collate_fn([one]))["loss"])


@pytest.mark.parametrize("pairs", [0, 1])
def test_batches_without_pairs_are_counted_and_move_nothing(pairs):
    net = model(
        pairs=dict(type="kd.PairContrast"),
        classes=dict(type="kd.ClassContrast"),
        pull=dict(type="kd.ClassDistributions", classes=3, dim=5, warmup_steps=1),
        pieces=dict(type="kd.SuperpixelContrast", per_image=5),
    )
    net(collate_fn([scan()]))  # statistics, so that the pull has begun
    seen = int(net.skipped_images)
    out = net(collate_fn([scan(pairs=pairs)]))
    assert all(torch.isfinite(value) for value in out.values())
    assert out["loss_pairs"] == 0 == out["loss_pieces"]
    out["loss"].backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert int(net.skipped_batches) == 1
    assert int(net.skipped_images) - seen == (2 if pairs == 0 else 1)


def test_an_image_without_pairs_is_counted_and_changes_nothing():
    net = model()
    one = scan(images=1, seed=8)
    alone = net(collate_fn([one]))["loss"]
    beside = {**one, "images": torch.cat([one["images"], torch.rand(1, 3, *SIZE)])}
    beside["image_offset"] = torch.tensor([2])
    assert int(net.skipped_images) == 0
    torch.testing.assert_close(net(collate_fn([beside]))["loss"], alone)
    assert int(net.skipped_images) == 1


# ------------------------------------------------------------------------------ phases


def pulled(**more):
    return model(
        classes=dict(type="kd.ClassContrast"),
        pull=dict(type="kd.ClassDistributions", classes=3, dim=5, **(more or {"warmup_steps": 3})),
    )


def test_validation_is_repeatable_and_without_the_pull():
    net = pulled()
    batch = collate_fn([scan(pairs=30)])
    for _ in range(4):
        net(batch)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.eval()
    first, second = net(batch), net(batch)
    assert set(first) == {"loss", "loss_classes"}
    assert first["loss"] == second["loss"] == first["loss_classes"]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_before_at_and_after_the_switch_is_exact(stop):
    batches = [collate_fn([scan(pairs=20, seed=s), scan(pairs=9, seed=s + 50)]) for s in range(7)]

    def steps(net, optimizer, rows):
        losses = []
        for i in rows:
            torch.manual_seed(i)
            loss = net(batches[i])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def fresh():
        torch.manual_seed(9)
        net = pulled()
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    whole = steps(*fresh(), range(7))
    net, optimizer = fresh()
    steps(net, optimizer, range(stop))
    saved = {k: v.clone() for k, v in net.state_dict().items()}, optimizer.state_dict()
    torch.manual_seed(77)
    net = pulled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert steps(net, optimizer, range(stop, 7)) == whole[stop:]


class Trainer:
    max_epoch = 4
    train_loader = range(5)


def test_terms_hear_how_long_the_training_is():
    net = pulled(warmup_steps=None, warmup_fraction=0.25)
    with pytest.raises(InputError, match="set_total_steps"):
        net(collate_fn([scan()]))
    net.trainer = Trainer()
    net.before_train()
    assert int(net.terms["pull"].vmf.warmup) == 5


def test_background_may_be_left_out():
    one = scan(pairs=30)
    labelled = one["pair_label"] > 0
    fewer = {
        k: v[labelled] if k.startswith("pair_") and k != "pair_offset" else v
        for k, v in one.items()
    }
    fewer["pair_offset"] = labelled.sum()[None]
    net = model(classes=dict(type="kd.ClassContrast", background="ignore"))
    torch.testing.assert_close(
        net(collate_fn([one]))["loss"], net(collate_fn([fewer]))["loss"], rtol=1e-5, atol=1e-6
    )
    as_class = model(classes=dict(type="kd.ClassContrast"))
    as_class.load_state_dict(net.state_dict())
    assert abs(as_class(collate_fn([one]))["loss"] - net(collate_fn([one]))["loss"]) > 1e-3


def test_a_class_that_appears_late_or_once_is_finite():
    net = pulled(warmup_steps=2)
    early = scan(pairs=20, seed=1)
    early["pair_label"] = early["pair_label"].clamp(max=2)
    late = scan(pairs=20, seed=2)
    late["pair_label"][:] = 1
    late["pair_label"][0] = 3  # one point of a class never seen before
    for one in (early, early, early, late, late):
        out = net(collate_fn([one]))
        assert all(torch.isfinite(v) for v in out.values())
        out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------ several processes


def train_apart(cfg):
    """Rank 1 has no pair in one batch, one in another, and never class 3, which rank 0 shows late."""
    register()
    torch.manual_seed(0)
    terms = dict(type="kd.ClassDistributions", classes=3, dim=5, warmup_steps=3)
    net = DistributedDataParallel(
        model(pairs=dict(type="kd.PairContrast"), classes=dict(type="kd.ClassContrast"), pull=terms)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    rank = comm.get_rank()
    for step in range(6):
        pairs = 20 if rank == 0 else (12, 0, 1, 12, 12, 0)[step]
        one = scan(pairs=pairs, seed=10 * step + rank)
        if rank or step < 4:
            one["pair_label"].clamp_(max=2)
        with joint_batch():
            out = net(collate_fn([one]))
        assert all(torch.isfinite(value) for value in out.values()), (step, out)
        assert (out["loss_pull"] != 0) == (step >= 3)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    state = torch.cat([v.double().flatten() for v in net.module.state_dict().values()])
    assert torch.isfinite(state).all()
    both = [torch.empty_like(state) for _ in range(2)]
    dist.all_gather(both, state)
    assert torch.equal(*both), "parameters, statistics and counters are those of both"
    assert int(net.module.skipped_batches) == 3
    assert net.module.terms["pull"].vmf.seen.tolist() == [True, True, True, False]


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and fork"
)
def test_processes_without_pairs_or_classes(monkeypatch):
    multiprocessing.set_forkserver_preload(["tests.distillers.test_image_to_lidar"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(train_apart, 2, Config({"device": "cpu"}))


# ------------------------------------------------------------------------------ what is watched


def test_other_form_of_the_class_contrast_is_watched():
    net = model(classes=dict(type="kd.ClassContrast"))
    out = net(collate_fn([scan(pairs=30)]))
    points, pixels, labels = both_sides(net, [scan(pairs=30)], "final_class_level")
    wanted = class_contrast(points, pixels, labels, form="mean")
    assert net.terms["classes"].watched()["as_mean"].item() == pytest.approx(
        wanted.item(), rel=1e-5
    )
    assert out["loss"].item() < wanted.item()


def test_student_is_exported_under_its_own_keys():
    net = model()
    assert set(net.export_state_dict()) == set(net.student.state_dict())


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(pair_point=torch.tensor([9])), "names a point"),
        (dict(pair_point=torch.tensor([-1])), "names a point"),
        (dict(pair_pixel=torch.tensor([[2, 0, 0]])), "names a image|names an image"),
        (dict(pair_offset=torch.tensor([2])), "pair_offset ends at 2"),
    ],
)
def test_pairs_that_are_not_there(change, text):
    one = scan(pairs=1)
    # A second scan follows: a row too far would silently be one of its rows.
    batch = collate_fn([{**one, **change}, scan(pairs=0)])
    with pytest.raises(InputError, match=text):
        model()(batch)


def test_missing_entries_are_named():
    batch = collate_fn([scan()])
    del batch["image_offset"], batch["pair_point"]
    with pytest.raises(InputError, match="no image_offset, pair_point"):
        model()(batch)
    batch = collate_fn([scan()])
    del batch["superpixels"]
    with pytest.raises(InputError, match="no superpixels"):
        model(pieces=dict(type="kd.SuperpixelContrast"))(batch)


def test_missing_labels_are_none():
    batch = collate_fn([scan()])
    del batch["pair_label"]
    assert model(classes=dict(type="kd.ClassContrast"))(batch)["loss"].item() == 0


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        (dict(a=None), "learns nothing"),
        (dict(a=dict(type="kd.PairContrast", weight=0)), "learns nothing"),
        (dict(a=dict(type="kd.LogitKL")), "no loss between points and pixels"),
        (dict(a=dict(type="kd.ClassContrast", sampler="even")), "sampler"),
        (dict(a=dict(type="kd.ClassContrast", background="yes")), "background"),
        (dict(a=dict(type="kd.ClassContrast", range_cell=0.0)), "range_cell"),
        (dict(a=dict(type="kd.FeatureRegression", distance="l7")), "distance"),
    ],
)
def test_bad_terms(terms, text):
    with pytest.raises(InputError, match=text):
        model(**terms)


def test_unknown_heads_are_named():
    with pytest.raises(InputError, match="no head 'none', only final, final_class_level"):
        model(pairs=dict(type="kd.PairContrast", head="none"))(collate_fn([scan()]))
    with pytest.raises(InputError, match="image encoder has no head"):
        pair_terms.Pairs({"x": torch.ones(1, 2)}, Images(), torch.rand(1, 3, *SIZE),
                         torch.zeros(1, 3, dtype=torch.long), torch.zeros(1), torch.zeros(1)).pixels("x")  # fmt: skip
