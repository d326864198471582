"""Datasets, collation and pairwise merging."""

import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pointcept_kd.data.transforms as _transforms  # noqa: F401  (registers the transforms)
from pointcept_kd.host import DATASETS, TRANSFORMS, InputError, kd, one_line
from pointcept_kd.host.loader import (
    Compose,
    ConcatDataset,
    DefaultDataset,
    check_sample,
    collate_fn,
    point_collate_fn,
)

TRAIN = [
    dict(type="GridSample", grid_size=0.5, return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
VAL = [
    dict(type="Copy", keys_dict=dict(segment="origin_segment")),
    dict(type="GridSample", grid_size=0.5, return_grid_coord=True, return_inverse=True),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse", "name"),
        feat_keys=("coord", "strength"),
    ),
]
TEST_CFG = dict(
    voxelize=dict(type="GridSample", grid_size=0.5, mode="test", return_grid_coord=True),
    crop=None,
    post_transform=[
        dict(type="ToTensor"),
        dict(
            type="Collect", keys=("coord", "grid_coord", "index"), feat_keys=("coord", "strength")
        ),
    ],
    aug_transform=[
        [dict(type="RandomScale", scale=[1, 1])],
        [dict(type="RandomScale", scale=[1.5, 1.5]), dict(type="RandomFlip", p=1.1)],
    ],
)


@kd.TRANSFORMS.register_module(force=True)
class Broken:
    """Fails as a transform with a bug would."""

    def __call__(self, data):
        raise ZeroDivisionError("bug")


def write_scan(folder, n, seed=0, **extra):
    rng = np.random.RandomState(seed)
    folder.mkdir(parents=True)
    arrays = dict(
        coord=rng.randn(n, 3),
        strength=rng.rand(n),
        segment=rng.randint(0, 4, (n, 1)).astype(np.int64),
    )
    for key, value in {**arrays, **extra}.items():
        if value is not None:
            np.save(folder / f"{key}.npy", value)
    return folder


@pytest.fixture
def root(tmp_path):
    for i, n in enumerate((40, 1, 25)):
        write_scan(tmp_path / "train" / f"scan{i}", n, i)
    write_scan(tmp_path / "val" / "scan9", 30, 9)
    return tmp_path


# ---- datasets ------------------------------------------------------------------------------------


def test_registered_under_both_names():
    assert DATASETS.get("DefaultDataset") is DATASETS.get("kd.DefaultDataset") is DefaultDataset
    assert DATASETS.get("ConcatDataset") is ConcatDataset


def test_a_sample_is_read_and_typed(root):
    dataset = DefaultDataset("train", str(root), loop=2)
    assert len(dataset) == 6
    assert [dataset.get_data_name(i) for i in range(4)] == ["scan0", "scan1", "scan2", "scan0"]
    data = dataset[3]
    assert data["coord"].dtype == data["strength"].dtype == np.float32
    assert data["strength"].shape == (40, 1)
    assert data["segment"].shape == (40,)
    assert data["segment"].dtype == np.int32
    assert data["name"] == "scan0"
    assert data["split"] == "train"
    saved = np.load(root / "train" / "scan0" / "coord.npy")
    assert np.array_equal(data["coord"], saved.astype(np.float32))
    assert np.array_equal(dataset[-1]["coord"], dataset[5]["coord"])
    with pytest.raises(IndexError):
        dataset[6]
    assert sum(1 for _ in dataset) == 6


def test_missing_labels_are_ignored_ones(root):
    write_scan(root / "bare" / "a", 5, segment=None)
    data = DefaultDataset("bare", str(root), ignore_index=255)[0]
    assert (data["segment"] == 255).all()
    assert (data["instance"] == -1).all()


def test_splits_are_folders_lists_or_json_files(root):
    (root / "few.json").write_text(json.dumps(["val/scan9", "train/scan2"]))
    few = DefaultDataset("few.json", str(root))
    assert [few.get_data_name(i) for i in range(len(few))] == ["scan9", "scan2"]
    both = DefaultDataset(["val", "train"], str(root))
    assert len(both) == 4
    assert both.get_data_name(0) == "scan9"
    assert both[0]["split"] == "val"


def test_cache_reads_once_and_hands_out_copies(root):
    dataset = DefaultDataset("train", str(root), cache=True)
    first = dataset[0]
    first["coord"][:] = 0
    np.save(root / "train" / "scan0" / "coord.npy", np.ones((40, 3)))
    again = dataset[0]["coord"]
    assert again.any()
    assert not (again == 1).all()
    assert (DefaultDataset("train", str(root))[0]["coord"] == 1).all()


def test_train_samples_go_through_the_transforms(root):
    sample = DefaultDataset("train", str(root), transform=TRAIN)[0]
    assert set(sample) == {"coord", "grid_coord", "segment", "offset", "feat"}
    assert sample["feat"].shape == (len(sample["coord"]), 4)
    assert sample["offset"].tolist() == [len(sample["coord"])]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(data_root="nowhere"), "data_root nowhere is no folder; DefaultDataset expects"),
        (dict(split="tset"), "split 'tset': neither a folder nor a JSON file below"),
        (dict(split="empty"), "no samples for split 'empty' of DefaultDataset below"),
        (dict(split="bad.json"), "bad.json: not a JSON file"),
        (dict(split="odd.json"), "odd.json: expected a list of sample folders"),
        (dict(split="gone.json"), "gone.json: entry 1, 'train/x', is no folder"),
        (dict(test_mode=True), "test_mode=True needs test_cfg"),
        (dict(test_mode=True, test_cfg=dict(voxelise=None)), "test_cfg does not take voxelise"),
    ],
)
def test_bad_roots_and_splits(root, change, text):
    (root / "empty").mkdir()
    (root / "bad.json").write_text("[")
    (root / "odd.json").write_text("{}")
    (root / "gone.json").write_text('["train/scan0", "train/x"]')
    with pytest.raises(InputError, match=text) as caught:
        DATASETS.build(
            {**dict(type="DefaultDataset", split="train", data_root=str(root)), **change}
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (dict(coord=None), "no coord.npy"),
        (dict(coord=np.zeros((6, 2))), r"coord is of shape \(6, 2\); expected \(n, 3\)"),
        (dict(coord=np.zeros((0, 3)), strength=None, segment=None), "has no points"),
        (dict(segment=np.zeros(5)), "segment has 5 rows and coord 6; they differ from row 5 on"),
        (
            dict(coord=np.array([[0, 0, 0]] * 4 + [[0, np.nan, 0]] * 2)),
            "coord is not finite in row 4",
        ),
        (dict(strength=np.array([0, 0, np.inf, 0, 0, 0])), "strength is not finite in row 2"),
    ],
)
def test_bad_samples_name_folder_and_row(tmp_path, extra, text):
    folder = write_scan(tmp_path / "train" / "s", 6, **extra)
    with pytest.raises(InputError, match=text) as caught:
        DefaultDataset("train", str(tmp_path))[0]
    assert str(folder) in str(caught.value)


def test_an_unreadable_asset_names_its_file(tmp_path):
    folder = write_scan(tmp_path / "train" / "s", 6)
    (folder / "strength.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"strength\.npy: not a readable"):
        DefaultDataset("train", str(tmp_path))[0]


def test_subclass_samples_are_checked_too(root):
    class Short(DefaultDataset):
        def get_data(self, idx):
            return {**super().get_data(idx), "color": np.zeros((3, 3))}

    with pytest.raises(InputError, match="scan0: color has 3 rows and coord 40"):
        Short("train", str(root))[0]
    check_sample(dict(coord=np.zeros((1, 3))), "fine")


def test_errors_in_transforms_keep_their_type(root):
    dataset = DefaultDataset("train", str(root), transform=[dict(type="kd.Broken")])
    with pytest.raises(ZeroDivisionError) as caught:
        dataset[0]
    assert str(caught.value) == "bug"
    notes = getattr(caught.value, "__notes__", ["in transform 0 (Broken) of sample scan0"])
    assert notes == ["in transform 0 (Broken) of sample scan0"]
    far = dict(type="kd.RangeCrop", point_cloud_range=(90, 90, 90, 91, 91, 91))
    with pytest.raises(InputError, match="RangeCrop leaves no point of sample scan0"):
        DefaultDataset("train", str(root), transform=[far])[0]


def test_an_input_error_survives_a_worker_process(root):
    np.save(root / "train" / "scan1" / "coord.npy", np.full((1, 3), np.nan))
    loader = DataLoader(
        DefaultDataset("train", str(root), transform=TRAIN), num_workers=1, collate_fn=collate_fn
    )
    with pytest.raises(InputError) as caught:
        list(loader)
    assert one_line(caught.value).startswith(
        str(root / "train" / "scan1") + ": coord is not finite in row 0"
    )


def test_compose_of_nothing_is_the_identity():
    data = {"a": 1}
    assert Compose(None)(data) is data
    assert Compose([])(data) is data


# ---- test mode -----------------------------------------------------------------------------------


def test_fragments_cover_the_scan_per_augmentation(root):
    keep = [VAL[0], dict(type="GridSample", grid_size=0.25, return_inverse=True)]
    dataset = DefaultDataset("val", str(root), keep, test_mode=True, test_cfg=TEST_CFG, loop=5)
    assert len(dataset) == 1
    item = dataset[0]
    assert set(item) == {"fragment_list", "segment", "name", "origin_segment", "inverse"}
    n = len(item["segment"])
    assert len(item["origin_segment"]) == len(item["inverse"]) == 30
    assert item["inverse"].max() == n - 1
    fragments = item["fragment_list"]
    scales = [round(float(f["coord"].norm(dim=1).max()), 4) for f in fragments]
    large = [f for f, scale in zip(fragments, scales) if scale > min(scales) * 1.2]
    assert 0 < len(large) < len(fragments)
    for group in (large, [f for f in fragments if not any(f is g for g in large)]):
        seen = torch.cat([f["index"] for f in group])
        assert set(seen.tolist()) == set(range(n))
        whole = torch.zeros(n, 3)
        for f in group:
            assert len(f["grid_coord"].unique(dim=0)) == len(f["index"])
            whole[f["index"]] = f["coord"]
        for f in group:  # a point has the same coordinates in every fragment of one augmentation
            assert torch.equal(whole[f["index"]], f["coord"])
    assert collate_fn([item]) == [item]
    assert point_collate_fn([item], mix_prob=1) == [item]


def test_without_voxels_crop_or_augmentation_there_is_one_fragment(root):
    cfg = dict(voxelize=None, crop=None, post_transform=None)
    item = DefaultDataset("val", str(root), test_mode=True, test_cfg=cfg)[0]
    assert set(item) == {"fragment_list", "segment", "name"}
    assert len(item["fragment_list"]) == 1
    assert item["fragment_list"][0]["index"].tolist() == list(range(30))


def test_a_crop_may_return_one_cloud(root):
    cfg = {**TEST_CFG, "crop": dict(type="SphereCrop", point_max=4)}
    item = DefaultDataset("val", str(root), test_mode=True, test_cfg=cfg)[0]
    assert all(len(f["index"]) == len(f["coord"]) <= 4 for f in item["fragment_list"])


def test_origin_labels_need_an_inverse(root):
    dataset = DefaultDataset("val", str(root), VAL[:1], test_mode=True, test_cfg=TEST_CFG)
    with pytest.raises(
        InputError, match="sample scan9: the test transforms keep origin_segment but no"
    ):
        dataset[0]


def test_concatenation(root):
    cfgs = [
        dict(type="DefaultDataset", split=s, data_root=str(root), loop=k)
        for s, k in (("val", 2), ("train", 1))
    ]
    dataset = DATASETS.build(dict(type="ConcatDataset", datasets=cfgs, loop=2))
    names = ["scan9", "scan9", "scan0", "scan1", "scan2"]
    assert len(dataset) == 10
    assert [dataset.get_data_name(i) for i in range(10)] == names * 2
    assert [item["name"] for item in dataset] == names * 2
    with pytest.raises(InputError, match="at least one dataset"):
        ConcatDataset([])


def test_concatenation_nested_looped_and_cached(root):
    def cfg(split, **options):
        return dict(type="DefaultDataset", split=split, data_root=str(root), **options)

    inner = dict(type="ConcatDataset", datasets=[cfg("val"), cfg("train", loop=2)], loop=2)
    dataset = DATASETS.build(
        dict(type="ConcatDataset", datasets=[cfg("val", cache="shared"), inner], loop=3)
    )
    once = ["scan9", *2 * ["scan9", *2 * ["scan0", "scan1", "scan2"]]]
    assert len(dataset) == 3 * len(once) == 45
    assert [dataset.get_data_name(i) for i in range(45)] == once * 3
    for i in (0, 1, 2, 14, 15, 30, 44):
        sample, raw = dataset.load(i), dataset.get_data(i)
        assert sample["name"] == raw["name"] == dataset[i]["name"] == (once * 3)[i]
        assert np.array_equal(sample["coord"], raw["coord"])
    np.save(root / "val" / "scan9" / "coord.npy", np.ones((30, 3)))
    assert not (dataset.load(15)["coord"] == 1).all()  # the first member's cache
    assert (dataset.get_data(15)["coord"] == 1).all()
    assert (dataset.load(1)["coord"] == 1).all()  # the same file through a member without one
    assert dataset[-1]["name"] == "scan2"
    with pytest.raises(IndexError):
        dataset[45]


def test_concatenation_of_test_mode_members(root):
    def cfg(split, loop):
        return dict(
            type="DefaultDataset", split=split, data_root=str(root), loop=loop, test_mode=True,
            test_cfg=TEST_CFG, transform=[dict(type="Copy", keys_dict=dict(segment="origin"))],
        )  # fmt: skip

    dataset = ConcatDataset([cfg("val", 5), cfg("train", 1)])
    assert len(dataset) == 4, "test mode goes through every scan once"
    for i, name in enumerate(("scan9", "scan0", "scan1", "scan2")):
        sample = dataset[i]
        assert sample["name"] == name
        seen = torch.cat([f["index"] for f in sample["fragment_list"]])
        assert seen.unique().tolist() == list(range(len(sample["segment"])))
    batch = collate_fn([dataset[0], dataset[1]])
    assert [scan["name"] for scan in batch] == ["scan9", "scan0"]


def test_concatenation_of_nothing():
    class Empty(torch.utils.data.Dataset):
        def __len__(self):
            return 0

    with pytest.raises(InputError, match="its 2 datasets hold no sample"):
        ConcatDataset([Empty(), Empty()])


# ---- collation -----------------------------------------------------------------------------------


def sample(n, start=0, **extra):
    coord = torch.arange(3 * n, dtype=torch.float32).reshape(n, 3) + start
    return dict(coord=coord, offset=torch.tensor([n]), segment=torch.arange(n), **extra)


def test_rows_are_joined_and_offsets_accumulated():
    parts = [sample(3, name="a"), sample(1, 100, name="b"), sample(2, 200, name="c")]
    batch = collate_fn(parts)
    assert torch.equal(batch["coord"], torch.cat([p["coord"] for p in parts]))
    assert batch["offset"].tolist() == [3, 4, 6]
    assert batch["offset"].dtype == torch.int64
    assert batch["name"] == ["a", "b", "c"]
    assert batch["segment"].tolist() == [0, 1, 2, 0, 0, 1]
    assert parts[1]["offset"].tolist() == [1]


def test_a_batch_of_one_is_the_sample():
    part = sample(1, inverse=torch.tensor([0, 0]))
    batch = collate_fn([part])
    assert all(torch.equal(batch[key], part[key]) for key in part)


def test_several_clouds_per_sample():
    views = [dict(view_offset=torch.tensor([2, 5])), dict(view_offset=torch.tensor([1, 4]))]
    assert collate_fn(views)["view_offset"].tolist() == [2, 5, 6, 9]


def test_inverse_points_to_the_rows_of_its_own_scan(root):
    dataset = DefaultDataset("train", str(root), VAL)
    parts = [dataset[i] for i in range(3)]
    batch = collate_fn(parts)
    starts = [0, *batch["offset"].tolist()]
    expanded = batch["coord"][batch["inverse"]]
    assert torch.equal(expanded, torch.cat([p["coord"][p["inverse"]] for p in parts]))
    assert len(batch["inverse"]) == len(batch["origin_segment"]) == 40 + 1 + 25
    assert batch["inverse"][40] == starts[1]
    assert batch["name"] == ["scan0", "scan1", "scan2"]


def test_inverse_without_row_counts_is_refused():
    parts = [dict(inverse=torch.tensor([0]))] * 2
    with pytest.raises(InputError, match="needs `offset` or `coord`"):
        collate_fn(parts)


def test_correspondences_are_padded():
    a, b = torch.ones(2, 1, 2, dtype=torch.int64), torch.full((3, 3, 2), 7)
    joined = collate_fn([dict(correspondence=a), dict(correspondence=b)])["correspondence"]
    assert joined.shape == (5, 3, 2)
    assert joined[:2].tolist() == [[[1, 1], [-1, -1], [-1, -1]]] * 2
    assert torch.equal(joined[2:], b)


def test_other_values():
    batch = collate_fn(
        [
            dict(
                count=[1, 2],
                words=["x"],
                nested=dict(a=torch.zeros(1)),
                number=3,
                scalar=torch.tensor(1.0),
            ),
            dict(
                count=[3],
                words=["y", "z"],
                nested=dict(a=torch.ones(2)),
                number=4,
                scalar=torch.tensor(2.0),
            ),
        ]
    )
    assert batch["count"].tolist() == [1, 2, 3]
    assert batch["words"] == ["x", "y", "z"]
    assert batch["nested"]["a"].tolist() == [0, 1, 1]
    assert batch["number"].tolist() == [3, 4]
    assert batch["scalar"].tolist() == [1, 2]


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="sample 1 of the batch has no 'feat'"):
        collate_fn([sample(1, feat=torch.zeros(1, 2)), sample(1)])
    with pytest.raises(InputError, match="feat: rows of different shapes"):
        collate_fn([sample(1, feat=torch.zeros(1, 2)), sample(1, feat=torch.zeros(1, 3))])
    with pytest.raises(TypeError):
        collate_fn([])
    with pytest.raises(TypeError):
        point_collate_fn([torch.zeros(1)])


# ---- merging in pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "merged"),
    [([4], [4]), ([4, 2], [6]), ([4, 2, 3], [6, 9]), ([4, 2, 3, 1], [6, 10]), ([1] * 5, [2, 4, 5])],
)
def test_neighbours_are_merged(counts, merged):
    parts = [sample(n, 10 * i) for i, n in enumerate(counts)]
    plain, batch = point_collate_fn(parts), point_collate_fn(parts, mix_prob=1)
    assert batch["offset"].tolist() == merged
    assert torch.equal(batch["coord"], plain["coord"])
    assert plain["offset"].tolist() == np.cumsum(counts).tolist()


def test_the_gate_is_one_python_draw():
    parts = [sample(2), sample(2)]
    random.seed(3)
    draws = [random.random() for _ in range(20)]
    random.seed(3)
    merged = [len(point_collate_fn(parts, mix_prob=0.4)["offset"]) == 1 for _ in range(20)]
    assert merged == [draw < 0.4 for draw in draws]
    assert 0 < sum(merged) < 20
    random.seed(3)
    point_collate_fn(parts)
    assert random.random() == draws[1]


def test_grid_coord_is_made_anew_for_merged_scans():
    size = torch.tensor([0.5])
    low = torch.tensor([[-1.0, 0, 0], [2.0, 1, 0.6]])
    high = torch.tensor([[3.0, 0, -0.1]])
    cells = torch.zeros(2, 3, dtype=torch.int64)

    def make(coord):
        rows = len(coord)
        return dict(
            coord=coord, grid_coord=cells[:rows], offset=torch.tensor([rows]), grid_size=size
        )

    batch = point_collate_fn([make(low), make(high), make(low)], mix_prob=1)
    assert batch["grid_coord"].tolist() == [[0, 0, 1], [6, 2, 2], [8, 0, 0], [0, 0, 0], [6, 2, 1]]
    assert batch["grid_coord"].dtype == torch.int64
    assert batch["grid_size"].tolist() == [0.5, 0.5]
    other = {**make(high), "grid_size": torch.tensor([0.25])}
    with pytest.raises(InputError, match="different grid_size"):
        point_collate_fn([make(low), other], mix_prob=1)


def test_grid_coord_stays_without_a_grid_size(root):
    dataset = DefaultDataset("train", str(root), TRAIN)
    parts = [dataset[0], dataset[2]]
    batch = point_collate_fn(parts, mix_prob=1)
    assert torch.equal(batch["grid_coord"], torch.cat([p["grid_coord"] for p in parts]))
    assert len(batch["offset"]) == 1


def test_inverse_and_origin_stay_consistent_when_merged(root):
    dataset = DefaultDataset("train", str(root), VAL)
    parts = [dataset[0], dataset[2]]
    batch = point_collate_fn(parts, mix_prob=1)
    expected = torch.cat([p["coord"][p["inverse"]] for p in parts])
    assert torch.equal(batch["coord"][batch["inverse"]], expected)


def test_instances_of_merged_scans_stay_apart():
    ids = [[0, 1, -1], [0, -1, 2], [1, 0, 0], [-1, -1, -1], [5, 5, 5]]
    parts = [sample(3, instance=torch.tensor(i)) for i in ids]
    batch = point_collate_fn(parts, mix_prob=1)
    assert batch["instance"].tolist() == [0, 1, -1, 2, -1, 4, 1, 0, 0, -1, -1, -1, 5, 5, 5]
    assert parts[1]["instance"].tolist() == ids[1]
    swapped = point_collate_fn(parts[3:4] + parts[:1], mix_prob=1)
    assert swapped["instance"].tolist() == [-1, -1, -1, 0, 1, -1]


def test_what_cannot_be_merged():
    with pytest.raises(InputError, match="images cannot be merged"):
        point_collate_fn([sample(1, img_num=torch.tensor([1]))] * 2, mix_prob=1)
    with pytest.raises(InputError, match="view_offset: 4 clouds from 2 samples"):
        point_collate_fn([sample(3, view_offset=torch.tensor([1, 3]))] * 2, mix_prob=1)
    with pytest.raises(InputError, match="without `offset`"):
        point_collate_fn([dict(coord=torch.zeros(1, 3))] * 2, mix_prob=1)


def test_batches_from_workers_equal_batches_made_here(root):
    dataset = DefaultDataset("train", str(root), VAL)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate_fn)
    shapes = [(batch["offset"].numel(), len(batch["inverse"])) for batch in loader]
    assert shapes == [(2, 41), (1, 25)]
    assert TRANSFORMS.get("GridSample") is not None
