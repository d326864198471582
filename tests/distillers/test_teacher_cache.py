"""The teacher's cache: what it hands out against the live teacher, what makes it stale, what it refuses."""

import copy
import json

import numpy as np
import pytest
import torch

from pointcept_kd.distillers.base import Distiller, Teacher
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.distillers.teacher_cache import (
    TeacherCache,
    fixed_view,
    locate,
    pool,
    with_point_index,
)
from pointcept_kd.host import DATASETS, MODELS, TERMS, TRAINERS, InputError
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import collate_fn, point_collate_fn
from tests.distillers.test_base import Segmentor, TaskGradient, guest, net
from tests.host.tiny import HOOKS

CPU = torch.device("cpu")
GRID = dict(type="GridSample", grid_size=0.5, mode="train", return_grid_coord=True)
FIXED = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(**GRID, return_inverse=True),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse"),
        feat_keys=("coord", "strength"),
    ),
]
COLLECT = dict(
    type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")
)
SAME = [GRID, dict(type="ToTensor"), COLLECT]
AUGMENTED = [
    dict(type="RandomDropout", dropout_ratio=0.3, dropout_application_ratio=1.0),
    dict(type="RandomRotate", angle=[0.5, 0.5], axis="z", center=[0, 0, 0], always_apply=True),
    *SAME,
]
NETWORK = dict(
    type="DefaultSegmentorV2",
    num_classes=4,
    backbone_out_channels=8,
    backbone=dict(
        type="PT-v3m1",
        in_channels=4,
        order=("z", "hilbert"),
        stride=(2, 2),
        enc_depths=(1, 1, 1),
        enc_channels=(8, 8, 16),
        enc_num_head=(1, 1, 2),
        enc_patch_size=(16, 16, 16),
        dec_depths=(1, 1),
        dec_channels=(8, 8),
        dec_num_head=(1, 1),
        dec_patch_size=(16, 16),
        drop_path=0.3,
        enable_flash=False,
    ),
    criteria=[dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1)],
)
TAPS = dict(bottleneck="backbone.enc", decoder="backbone.dec.dec1", finest="backbone.dec")


@pytest.fixture
def root(tmp_path):
    """Four scans of one point per voxel, so that no voxel has to choose."""
    rng = np.random.default_rng(0)
    for i in range(4):
        folder = tmp_path / "data" / "train" / f"scan{i}"
        folder.mkdir(parents=True)
        picks = rng.permutation(12**3)[: 150 + 20 * i]
        cells = np.stack([picks // 144, picks // 12 % 12, picks % 12], 1)
        coord = (cells + rng.uniform(0.2, 0.8, cells.shape)) * 0.5
        np.save(folder / "coord.npy", coord.astype(np.float32))
        np.save(folder / "strength.npy", rng.random((len(coord), 1)).astype(np.float32))
        np.save(folder / "segment.npy", rng.integers(-1, 4, len(coord)))
    return tmp_path / "data"


def scans(root, transform, **more):
    return dict(
        type="DefaultDataset", split="train", data_root=str(root), transform=transform, **more
    )


def make_teacher(taps=TAPS, seed=0):
    torch.manual_seed(seed)
    return Teacher("teacher", NETWORK, weight="random", taps=taps)


def cache_of(folder, teacher, transform=FIXED):
    return TeacherCache(folder, teacher.network, teacher.model, teacher.paths, transform)


def filled(tmp_path, root, teacher):
    cache = cache_of(tmp_path / "cache", teacher)
    cache.fill(teacher, fixed_view(scans(root, SAME, loop=3), FIXED), CPU, 0)
    return cache


def batch_of(root, transform, members=(0, 1), mix=0):
    torch.manual_seed(0)
    dataset = DATASETS.build(with_point_index(scans(root, transform)))
    samples = [dataset[i] for i in members]
    return point_collate_fn(samples, mix_prob=mix)


def test_without_augmentation_it_is_the_teacher_in_half_precision(tmp_path, root):
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    batch = batch_of(root, SAME)
    live, stored = teacher.run(batch), cache(batch)
    assert set(stored) == {"logits", *TAPS}
    for name in ("logits", "finest"):
        torch.testing.assert_close(stored[name].feat, live[name].feat, rtol=1e-3, atol=1e-3)
    for name in ("bottleneck", "decoder"):
        # The live rows are in the order of a curve; the cached ones are sorted by scan and cell.
        a, b = live[name], stored[name]
        order = np.lexsort(torch.cat([a.cells.T.flip(0), a.batch[None]]).numpy())
        assert torch.equal(a.cells[order], b.cells)
        assert torch.equal(a.batch[order], b.batch)
        torch.testing.assert_close(b.feat, a.feat[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mix", [0, 1])
def test_augmented_views_find_their_rows(tmp_path, root, mix):
    """Against loops over points, with the answers of the network run on the fixed view of each scan."""
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    batch = batch_of(root, AUGMENTED, members=(2, 0, 1), mix=mix)
    assert len(batch["offset"]) == (2 if mix else 3)
    stored = cache(batch)
    fixed = DATASETS.build(fixed_view(scans(root, SAME), FIXED))
    by_name = {fixed.get_data_name(i): collate_fn([fixed[i]]) for i in range(4)}
    answers = {name: teacher.run(view) for name, view in by_name.items()}
    ends = batch["offset"].tolist()
    scene = [next(s for s, end in enumerate(ends) if i < end) for i in range(ends[-1])]
    cells: dict[tuple, list] = {}
    row = 0
    for name, count in zip(batch["name"], batch["raw_count"].tolist()):
        view, answer = by_name[name], answers[name]
        deep = answer["bottleneck"]
        place = {tuple(cell): i for i, cell in enumerate(deep.cells.tolist())}
        for raw in batch["raw_index"][row : row + count].tolist():
            voxel = int(view["inverse"][raw])
            expected = answer["logits"].feat[voxel]
            torch.testing.assert_close(stored["logits"].feat[row], expected, rtol=1e-3, atol=1e-3)
            source = place[tuple((view["grid_coord"][voxel] // 4).tolist())]
            target = (scene[row], *(batch["grid_coord"][row] // 4).tolist())
            cells.setdefault(target, []).append(deep.feat[source])
            row += 1
    assert row == len(batch["coord"])
    found = stored["bottleneck"]
    keys = [(b, *c) for b, c in zip(found.batch.tolist(), found.cells.tolist())]
    assert sorted(keys) == sorted(cells)
    for key, feat in zip(keys, found.feat):
        torch.testing.assert_close(feat, torch.stack(cells[key]).mean(0), rtol=2e-3, atol=2e-3)


def test_pool_by_hand():
    table = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    cells = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]])
    seen = pool(table, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 0]), cells)
    torch.testing.assert_close(seen.feat, torch.tensor([[7 / 3, 4 / 3], [3.0, 2.0]]))
    assert seen.cells.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_locate_by_hand():
    grid = torch.tensor([[0, 0, 0], [1, 0, 0], [5, 4, 0]])
    feat = torch.zeros(2, 1)
    rows, level = locate(grid, Activation(feat, None, torch.tensor([[1, 1, 0], [0, 0, 0]])))
    assert (rows.tolist(), level) == ([1, 1, 0], 2)
    assert locate(grid, Activation(torch.zeros(3, 1))) == (None, 0)
    assert locate(grid, Activation(torch.zeros(2, 1))) is None
    # Another grid, and a cell that occurs twice.
    assert locate(grid, Activation(feat, None, torch.tensor([[9, 9, 9], [0, 0, 0]]))) is None
    assert locate(grid, Activation(feat, None, torch.tensor([[0, 0, 0], [0, 0, 0]]))) is None


def test_a_second_pass_computes_only_what_is_missing(tmp_path, root):
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    files = sorted(p.name for p in cache.folder.glob("*.npz"))
    assert files == [f"scan{i}.npz" for i in range(4)]
    before = {p.name: p.read_bytes() for p in cache.folder.glob("*.npz")}
    (cache.folder / "scan1.npz").unlink()
    ran = []
    again = make_teacher()
    run, again.run = again.run, lambda batch: ran.append(batch["name"]) or run(batch)
    cache_of(cache.folder, again).fill(again, fixed_view(scans(root, SAME), FIXED), CPU, 0)
    assert ran == [["scan1"]]
    # The same view whichever scans are computed along with it: seeded by name.
    with np.load(cache.folder / "scan1.npz") as new:
        (tmp_path / "old.npz").write_bytes(before["scan1.npz"])
        with np.load(tmp_path / "old.npz") as old:
            assert all(np.array_equal(old[key], new[key]) for key in old.files)


@pytest.mark.parametrize("change", ["weights", "model", "taps", "transform", "format"])
def test_a_stale_cache_is_refused(tmp_path, root, change):
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    transform = copy.deepcopy(FIXED)
    if change == "weights":
        teacher.network.seg_head.bias[0] += 1
    elif change == "model":
        teacher.model = {**NETWORK, "num_classes": 4, "freeze_backbone": False}
    elif change == "taps":
        teacher = make_teacher(dict(bottleneck="backbone.enc"))
    elif change == "transform":
        transform[1]["grid_size"] = 0.25
    else:
        card = json.loads((cache.folder / "cache.json").read_text())
        (cache.folder / "cache.json").write_text(json.dumps({**card, "format": 0}))
    with pytest.raises(InputError, match=f"is stale: it was made with other {change}; delete it"):
        cache_of(cache.folder, teacher, transform)


def test_a_changed_scan_is_refused(tmp_path, root):
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    path = root / "train" / "scan0" / "strength.npy"
    np.save(path, np.load(path) * 0.5)
    with pytest.raises(InputError, match=r"stale: scan scan0 has changed .* delete scan0.npz"):
        cache(batch_of(root, SAME))
    # Labels are no part of what the teacher sees.
    path = root / "train" / "scan1" / "segment.npy"
    np.save(path, np.load(path) * 0)
    assert set(cache(batch_of(root, SAME, members=(1,)))) == {"logits", *TAPS}


def test_files_that_cannot_be_used(tmp_path, root):
    teacher = make_teacher()
    cache = filled(tmp_path, root, teacher)
    batch = batch_of(root, SAME, members=(0,))
    good = cache.path("scan0").read_bytes()
    cache.path("scan0").write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"scan0.npz is damaged .* delete it"):
        cache(batch)
    cache.path("scan0").write_bytes(cache.path("scan1").read_bytes())
    with pytest.raises(InputError, match=r"holds scan scan1, not scan0"):
        cache(batch)
    cache.path("scan0").unlink()
    with pytest.raises(InputError, match=r"has no scan0.npz: the scan was not in the fixed pass"):
        cache(batch)
    with pytest.raises(InputError, match=r"the batch has no raw_index, raw_check, name, raw_count"):
        cache({key: value for key, value in batch.items() if "raw" not in key and key != "name"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no cache"):
        cache_of(tmp_path / "full", teacher)


def test_names_of_files(tmp_path):
    cache = cache_of(tmp_path / "cache", make_teacher())
    names = ["a", "a/b", "a_b", "a b", "ä/b", "../a"]
    paths = [cache.path(name) for name in names]
    assert len(set(paths)) == len(names)
    assert all(path.parent == cache.folder for path in paths)


def test_what_half_precision_cannot_hold(tmp_path, root):
    teacher = make_teacher()
    teacher.network.seg_head.bias[0] += 1e6
    with pytest.raises(InputError, match=r"tap logits has values beyond half precision"):
        filled(tmp_path, root, teacher)
    assert not list((tmp_path / "cache").glob("*.npz"))


def test_two_scans_of_one_name(tmp_path, root):
    teacher = make_teacher()
    both = dict(type="ConcatDataset", datasets=[scans(root, SAME), scans(root, SAME)])
    with pytest.raises(InputError, match="two are called scan0"):
        cache_of(tmp_path / "cache", teacher).fill(teacher, fixed_view(both, FIXED), CPU, 0)


def test_transforms_that_do_not_fit(tmp_path, root):
    teacher = make_teacher()
    cache = cache_of(tmp_path / "cache", teacher)
    with pytest.raises(InputError, match="needs transforms with one Collect"):
        with_point_index(scans(root, [GRID]))
    with pytest.raises(InputError, match="inverse"):
        cache.fill(teacher, fixed_view(scans(root, SAME), SAME), CPU, 0)


def config(tmp_path, root, **model):
    pair = dict(
        type="kd.Distiller",
        student=dict(model=NETWORK, taps=dict(bottleneck="backbone.enc")),
        teacher=dict(model=NETWORK, weight="random", taps=dict(bottleneck="backbone.enc")),
        terms=dict(
            logits=dict(type="kd.LogitKL"),
            bottleneck=dict(type="kd.FeatureMatch", tap="bottleneck"),
        ),
        teacher_cache=str(tmp_path / "cache"),
    )
    return Config(
        dict(
            save_path=str(tmp_path / "exp"),
            seed=3,
            device="cpu",
            epoch=4,
            eval_epoch=2,
            batch_size=2,
            num_worker=0,
            mix_prob=0.5,
            evaluate=False,
            model={**pair, **model},
            optimizer=dict(type="AdamW", lr=0.01),
            scheduler=dict(type="OneCycleLR", max_lr=0.01),
            data=dict(
                num_classes=4,
                names=["a", "b", "c", "d"],
                train=scans(root, AUGMENTED),
                val=scans(root, FIXED),
            ),
            hooks=[dict(hook) for hook in HOOKS if hook["type"] != "SemSegEvaluator"],
        )
    )


def build(cfg):
    return TRAINERS.build(dict(type="kd.Trainer", cfg=cfg))


def test_training_runs_the_teacher_once_per_scan(tmp_path, root):
    trainer = build(config(tmp_path, root))
    teacher = trainer.model.teachers["teacher"]
    ran = []
    teacher.network.register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert len(ran) == 4
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 4
    values = trainer.comm_info["model_output_dict"]
    assert {"loss_logits", "loss_bottleneck"} < set(values)
    assert all(np.isfinite(v.item()) for v in values.values())
    # The untrained teacher of a run with another seed is another teacher: refused before anything is written.
    other = config(tmp_path, root)
    other.seed, other.save_path = 4, str(tmp_path / "other")
    with pytest.raises(InputError, match="stale: it was made with other weights"):
        build(other)
    assert not (tmp_path / "other").exists()


def test_settings_that_cannot_be(tmp_path, root):
    with pytest.raises(InputError, match="expected a folder, or dict"):
        build(config(tmp_path, root, teacher_cache=dict(place="x")))
    cfg = config(tmp_path, root)
    cfg.hooks = [hook for hook in cfg.hooks if hook["type"] != "ModelHook"]
    with pytest.raises(InputError, match=r"hook ModelHook, which the config's hooks lack"):
        build(cfg).train()


def test_a_term_that_differentiates_the_teacher(tmp_path):
    MODELS.register_module("TestSegmentor", module=Segmentor, force=True)
    TERMS.register_module("TestTaskGradient", module=TaskGradient, force=True)
    with pytest.raises(InputError, match="differentiates the teacher, which a cache cannot answer"):
        Distiller(
            student=dict(model=net(), taps=dict(hidden="backbone.0")),
            teacher=guest(taps=dict(hidden="backbone.0")),
            terms=dict(gradient=dict(type="TestTaskGradient")),
            teacher_cache=str(tmp_path),
        )
