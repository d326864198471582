"""Checkpoints: atomic writing, safe reading, matching with a report."""

import os
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import (
    check_grids,
    clean_state_dict,
    copy_atomic,
    grids_of,
    load_checkpoint,
    load_into,
    rename_keys,
    save_atomic,
    student_weights,
)
from pointcept_kd.ops.grid import Partition


def net(width=3):
    return nn.Sequential(OrderedDict(backbone=nn.Linear(2, width), seg_head=nn.Linear(width, 2)))


def test_round_trip(tmp_path):
    model = net()
    save_atomic({"epoch": 2, "state_dict": model.state_dict()}, tmp_path / "a.pth")
    copy_atomic(tmp_path / "a.pth", tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        content = load_checkpoint(tmp_path / name)
        assert content["epoch"] == 2
        assert torch.equal(content["state_dict"]["backbone.weight"], model.backbone.weight)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.pth"]


def test_the_hosts_files_with_a_numpy_metric_are_read_safely(tmp_path):
    for i, value in enumerate((np.float64(0.25), np.float32(0.25))):
        torch.save(
            {"state_dict": net().state_dict(), "best_metric_value": value}, tmp_path / f"{i}.pth"
        )
        assert load_checkpoint(tmp_path / f"{i}.pth")["best_metric_value"] == 0.25


def test_numpy_one_module_name_is_read_too(tmp_path):
    # numpy 1 wrote the scalar function under another module name; an uncompressed archive shows it in plain bytes.
    torch.save(
        {"state_dict": net().state_dict(), "m": np.float64(0.25)},
        tmp_path / "new.pth",
        pickle_protocol=2,
    )
    import zipfile

    old = tmp_path / "old.pth"
    with zipfile.ZipFile(tmp_path / "new.pth") as source, zipfile.ZipFile(old, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item.filename, data)
    assert load_checkpoint(old)["m"] == 0.25


def test_bare_and_foreign_layouts(tmp_path):
    state = net().state_dict()
    torch.save(dict(state), tmp_path / "bare.pth")
    torch.save({"model_state": state, "epoch": 1}, tmp_path / "pcdet.pth")
    assert set(load_checkpoint(tmp_path / "bare.pth")["state_dict"]) == set(state)
    assert set(load_checkpoint(tmp_path / "pcdet.pth")["state_dict"]) == set(state)
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"none\.pth has no weights"):
        load_checkpoint(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("exit 3",)


def test_code_is_refused_not_run(tmp_path):
    torch.save({"state_dict": net().state_dict(), "extra": Payload()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="running its code"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_line(tmp_path, share):
    path = tmp_path / "cut.pth"
    save_atomic({"state_dict": net(500).state_dict()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut\.pth") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_noise_missing_and_folder(tmp_path):
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 20)
    for name, text in (
        ("noise.pth", "damaged"),
        ("absent.pth", "does not exist"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=text):
            load_checkpoint(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.pth"
    save_atomic({"state_dict": {"w": torch.ones(1)}}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomic({"bad": lambda: 0}, path)
    assert load_checkpoint(path)["state_dict"]["w"] == 1
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_atomic({}, tmp_path / "file" / "a.pth")


def test_killed_while_saving_keeps_the_previous_file(tmp_path):
    code = (
        "import os, sys, torch\n"
        "from pointcept_kd.host.checkpoint import save_atomic\n"
        "def half(obj, file):\n"
        "    file.write(b'half'); file.flush(); os._exit(9)\n"
        "torch.save = half\n"
        "save_atomic({}, sys.argv[1])\n"
    )
    path = tmp_path / "a.pth"
    save_atomic({"state_dict": {"w": torch.ones(1)}}, path)
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == 9
    assert load_checkpoint(path)["state_dict"]["w"] == 1
    assert (tmp_path / "a.pth.tmp").exists()  # what the kill left is under another name ...
    save_atomic({"state_dict": {"w": torch.zeros(1)}}, path)
    assert os.listdir(tmp_path) == ["a.pth"]  # ... and the next save replaces it


def test_prefixes():
    state = {f"module.student.{k}": v for k, v in net().state_dict().items()} | {
        "module.terms.x": torch.ones(1)
    }
    assert set(clean_state_dict(state, "student.")) == set(net().state_dict())
    assert set(student_weights(state)) == set(net().state_dict())
    assert set(student_weights(net().state_dict())) == set(net().state_dict())
    with pytest.raises(InputError, match=r"no weight starts with 'teacher\.'.*student, terms"):
        clean_state_dict(state, "teacher.")


def test_rename_first_occurrence_only():
    state = {"student.a.student.b": 1, "module.student.c": 2, "d": 3}
    renamed = rename_keys(state, "module.student.", "module.")
    assert renamed == {"a.student.b": 1, "c": 2, "d": 3}
    assert rename_keys(state, "", None) == {"student.a.student.b": 1, "student.c": 2, "d": 3}


def test_report_of_missing_and_unexpected():
    source, target = net(), net()
    state = source.state_dict()
    del state["seg_head.bias"]
    state["extra.weight"] = torch.ones(1)
    before = target.seg_head.bias.clone()
    report = load_into(target, state)
    assert report.missing == ["seg_head.bias"]
    assert report.unexpected == ["extra.weight"]
    assert report.share == 0.75
    assert "3 of 4 weights loaded; 1 missing (seg_head.bias); 1 unexpected (extra.weight)" in str(
        report
    )
    assert torch.equal(target.backbone.weight, source.backbone.weight)
    assert torch.equal(target.seg_head.bias, before)
    with pytest.raises(
        InputError, match=r"exactly: missing seg_head\.bias; unexpected extra\.weight"
    ):
        load_into(target, state, strict=True)


def test_another_width_names_keys_and_shapes_and_loads_nothing():
    target = net(3)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(
        InputError, match=r"another width.*backbone\.weight is \(5, 2\) in the file, \(3, 2\)"
    ):
        load_into(target, net(5).state_dict(), source="f.pth")
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_too_few_matches():
    with pytest.raises(
        InputError, match=r"only 0 of 4.*wants backbone\.weight.*file has other\.backbone\.weight"
    ):
        load_into(net(), {f"other.{k}": v for k, v in net().state_dict().items()})
    half = {k: v for k, v in net().state_dict().items() if k.startswith("backbone")}
    assert load_into(net(), half).share == 0.5
    with pytest.raises(InputError, match="only 2 of 4"):
        load_into(net(), half, min_match=0.6)


class Gridded(torch.nn.Module):
    """Cuts points by a grid of its own."""

    def __init__(self, high=50.0):
        super().__init__()
        self.cells = torch.nn.Module()
        self.cells.partition = Partition((0.0, -3.0, -4.0), (high, 3.0, 2.0), (8, 8, 4))
        self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("prefix", ["", "student."])
def test_weights_of_another_grid_are_refused(tmp_path, prefix):
    model = Gridded()
    grids = {f"{prefix}{path}": grid for path, grid in grids_of(model).items()}
    assert list(grids) == [f"{prefix}cells"]
    save_atomic({"state_dict": model.state_dict(), "grids": grids}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    check_grids(Gridded(), checkpoint)
    check_grids(Gridded(60.0), {"state_dict": {}})  # files that name no grid
    with pytest.raises(InputError, match=r"a\.pth was trained on another grid at cells: high=\[50"):
        check_grids(Gridded(60.0), checkpoint, tmp_path / "a.pth")
