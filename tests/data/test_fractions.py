"""Lists of scenes and scans: which are in them, the files that are shipped, and readers that keep to them."""

import logging
import pickle
from pathlib import Path

import pytest

from pointcept_kd.data import fractions
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_files import read_infos
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.nuscenes_tables import official_scenes
from pointcept_kd.data.semantic_kitti import SPLITS, SemanticKITTIDataset
from pointcept_kd.host import InputError

from .nuscenes_world import tables
from .nuscenes_world import write as write_world
from .test_semantic_kitti import write as write_scan

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "configs" / "finetune" / "lists"


# Which names are in a list


@pytest.mark.parametrize(("percent", "count"), [(1, 7), (5, 35), (10, 70), (25, 175), (100, 700)])
def test_scenes_by_their_position(percent, count):
    step = fractions.STEPS[percent]
    scenes = [f"scene {position}" for position in range(1, 701)]
    assert fractions.nth_scenes(scenes, step) == [f"scene {i}" for i in range(step, 701, step)]
    assert len(fractions.nuscenes_scenes(step)) == count
    assert set(fractions.nuscenes_scenes(step)) <= set(official_scenes("train"))


def test_the_hundredth_scene_counted_by_hand():
    # 2 + 8 + 16 + 36 + 16 + 2 + 4 + 2 = 86 scenes up to 155, then 157 to 168 (98), 170 and 171.
    assert fractions.nuscenes_scenes(100)[0] == "scene-0171"
    assert fractions.nuscenes_scenes(100)[-1] == official_scenes("train")[-1] == "scene-1110"
    assert fractions.nuscenes_scenes(1) == official_scenes("train")


def test_too_few_scenes_leave_the_richest():
    assert fractions.nth_scenes(["a", "b"], 3) == ["scene-0392"]
    assert fractions.nth_scenes(["a", "b"], 2) == ["b"]
    assert "scene-0392" in official_scenes("train")


def test_scans_from_the_first_on():
    assert fractions.nth_scans(["01_2", "00_1", "01_1", "00_2", "02_1"], 2) == [
        "00_1",
        "01_1",
        "02_1",
    ]
    names = fractions.kitti_scans(100)
    assert len(names) == 192
    assert sum(fractions.KITTI_SCANS.values()) == len(fractions.kitti_scans(1)) == 19130
    assert tuple(fractions.KITTI_SCANS) == SPLITS["train"]
    # Sequence 00 has 4541 scans, so the 46th name is that of 4500, and the next is scan 59 of sequence 01.
    assert names[:2] == ["00_000000", "00_000100"]
    assert names[45:47] == ["00_004500", "01_000059"]


def test_the_parts_to_choose_settings_on():
    train = set(official_scenes("train"))
    assert len(set(fractions.VERIFYING)) == 100
    assert len(fractions.PARAMETRIZING) == 600
    assert set(fractions.VERIFYING) | set(fractions.PARAMETRIZING) == train


@pytest.mark.parametrize("step", [0, -1, True, 1.5])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(InputError, match="step="):
        fractions.nth_scans(["a"], step)


# Files


def test_shipped_lists_are_those_of_the_rules():
    made = fractions.shipped_lists()
    assert {path.name for path in LISTS.iterdir()} == set(made)
    for name, (about, names) in made.items():
        assert fractions.read_list(LISTS / name) == names, name
        assert (LISTS / name).read_text().splitlines()[0] == f"# {about}."
    assert len(made["sim_1pct.txt"][1]) == 2
    assert len(made["sim_10pct.txt"][1]) == 12
    assert made["sim_1pct.txt"][1] == ["00_000000", "05_000000"]


def test_a_list_is_found_beside_the_package_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/finetune/lists/nuscenes_1pct.txt"
    assert len(fractions.read_list(name)) == 7
    fractions.write_list(name, ["mine"], "My own")
    assert fractions.read_list(name) == ["mine"]
    with pytest.raises(InputError, match=r"lists/nuscenes_2pct.txt: there is no such list"):
        fractions.read_list("configs/finetune/lists/nuscenes_2pct.txt")


def test_bad_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# only a remark\n\n")
    with pytest.raises(InputError, match=r"list\.txt: no names"):
        fractions.read_list(path)
    path.write_text("a\nb\n a \n")
    with pytest.raises(InputError, match=r"'a' is in it 2 times"):
        fractions.read_list(path)
    with pytest.raises(InputError, match="cannot be written"):
        fractions.write_list(path / "below", ["a"], "A file is no folder")


# Readers


@pytest.fixture
def kitti(tmp_path):
    for sequence in ("00", "01", "08"):
        for number in range(3):
            write_scan(tmp_path, sequence, number)
    return tmp_path


def kitti_names(root, names, **options):
    path = root / "list.txt"
    fractions.write_list(path, names, "A test")
    data = SemanticKITTIDataset(
        **{"split": "train", "data_root": str(root), "scans": str(path), **options}
    )
    return [data.get_data_name(i) for i in range(len(data))]


def test_semantic_kitti_keeps_to_its_list(kitti):
    # In the order of the data, whatever that of the list; sequence 05 is not on this disk.
    names = ["01_000001", "00_000002", "05_000000"]
    assert kitti_names(kitti, names) == ["00_000002", "01_000001"]
    assert kitti_names(kitti, names, sequences=["01"]) == ["01_000001"]
    assert kitti_names(kitti, names, loop=2) == ["00_000002", "01_000001"] * 2


def test_semantic_kitti_refuses_a_list_of_other_data(kitti):
    with pytest.raises(
        InputError, match=r"'01_000007' is in the list and not in the data \(1 such"
    ):
        kitti_names(kitti, ["01_000001", "01_000007"])
    with pytest.raises(InputError, match=r"none of its 2 names, '01_000001' the first"):
        kitti_names(kitti, ["01_000001", "05_000000"], split="val")


def test_merged_scans_come_from_outside_of_the_list(kitti):
    """The list says what is learned from; the scans before one are there for its shape, as with all labels."""
    path = kitti / "list.txt"
    fractions.write_list(path, ["00_000002"], "A test")
    data = SemanticKITTIDataset(
        "train", str(kitti), scans=str(path), sweeps=3, sweep_labels="reference"
    )
    assert len(data) == 1
    assert sorted(set(data.get_data(0)["sweep"].tolist())) == [0, 1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(
        root / "raw", tables({"scene-0001": 2, "scene-0002": 1, "scene-0004": 2, "scene-0003": 1})
    )
    write_infos(root / "raw", "v1.0-trainval", root, sweeps=2)
    return root


def nuscenes(root, names, folder, **options):
    path = folder / "list.txt"
    fractions.write_list(path, names, "A test")
    return NuScenesDataset("train", str(root), sweeps=2, scenes=str(path), **options)


def test_nuscenes_keeps_whole_scenes(world, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = nuscenes(world, ["scene-0004", "scene-0001"], tmp_path)
    assert [data.info(i)["token"] for i in range(len(data))] == [
        "sample-0-0", "sample-0-1", "sample-2-0", "sample-2-1",
    ]  # fmt: skip
    assert {data.info(i)["scene_token"] for i in range(4)} == {"scenetoken0", "scenetoken2"}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        data = nuscenes(world, ["scene-0002", "scene-0171"], tmp_path)
    assert len(data) == 1
    assert "1 of its scenes are not in the info files" in caplog.text


def test_nuscenes_refuses_lists_and_info_files_that_do_not_fit(world, tmp_path):
    with pytest.raises(InputError, match=r"none of its 1 names, 'scene-0003' the first"):
        nuscenes(world, ["scene-0003"], tmp_path)  # a scene of the validation split
    path = world / "info" / "nuscenes_infos_2sweeps_train.pkl"
    entries = read_infos(path)
    (tmp_path / "info").mkdir()
    del entries[1]["scene_name"]
    (tmp_path / "info" / path.name).write_bytes(pickle.dumps(entries))
    with pytest.raises(InputError, match=r"1 of 5 entries .* make the info files again"):
        nuscenes(tmp_path, ["scene-0001"], tmp_path)
