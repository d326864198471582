"""Bad input through the training tool: one clear line, exit code 2, no checkpoint; odd but legal input trains."""

import sys

import numpy as np
import pytest
import torch

from pointcept_kd.host.checkpoint import load_checkpoint
from pointcept_kd.host.runtime import run_tool
from tools import train

CONFIG = """
model = dict(
    type="DefaultSegmentorV2", num_classes=19, backbone_out_channels=8,
    backbone=dict(
        type="PT-v3m1", in_channels=4, order=("z", "hilbert"), stride=(2,),
        enc_depths=(1, 1), enc_channels=(8, 8), enc_num_head=(1, 1), enc_patch_size=(16, 16),
        dec_depths=(1,), dec_channels=(8,), dec_num_head=(1,), dec_patch_size=(16,),
        enable_flash=False,
    ),
    criteria=[
        dict(type="CrossEntropyLoss", ignore_index=-1),
        dict(type="LovaszLoss", mode="multiclass", ignore_index=-1),
    ],
)
_scan = dict(type="SemanticKITTIDataset", data_root="ROOT")
_steps = [
    dict(type="GridSample", grid_size=GRID, mode="train", return_grid_coord=True),
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
data = dict(
    num_classes=19, ignore_index=-1, names=[str(i) for i in range(19)],
    train=dict(split="train", transform=_steps, **_scan),
    val=dict(split="val", transform=_steps, **_scan),
)
optimizer = dict(type="AdamW", lr=1e-3)
scheduler = dict(type="OneCycleLR", max_lr=1e-3)
seed, epoch, eval_epoch, batch_size, num_worker, evaluate = 1, 1, 1, 2, 0, False
hooks = [
    dict(type="CheckpointLoader"), dict(type="InformationWriter"), dict(type="CheckpointSaver"),
]
save_path = "SAVE"
"""


class Run:
    """Two small scans in SemanticKITTI's layout and a config that trains on them."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.sequence = folder / "kitti" / "dataset" / "sequences" / "00"
        self.save = folder / "exp"
        self.grid = 0.5
        for name in ("velodyne", "labels"):
            (self.sequence / name).mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(2):
            points = rng.uniform(-5, 5, (200, 4)).astype(np.float32)
            self.write(number, points, np.full(200, 40, np.uint32))

    def bin(self, number):
        return self.sequence / "velodyne" / f"{number:06d}.bin"

    def write(self, number, points, labels=None):
        np.asarray(points, np.float32).tofile(self.bin(number))
        if labels is not None:
            path = self.sequence / "labels" / f"{number:06d}.label"
            np.asarray(labels, np.uint32).tofile(path)

    def __call__(self, *options):
        text = CONFIG.replace("ROOT", str(self.folder / "kitti"))
        text = text.replace("SAVE", str(self.save)).replace("GRID", str(self.grid))
        (self.folder / "config.py").write_text(text)
        argv = ["train.py", "--config-file", str(self.folder / "config.py")]
        argv += ["--options", *options] if options else []
        self.monkeypatch.setattr(sys, "argv", argv)
        code = run_tool(train.main)
        return code, self.capsys.readouterr().err

    def refuses(self, *options):
        """The one line of a refusal, which leaves no checkpoint and no temporary file behind."""
        code, err = self(*options)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert not list(self.folder.rglob("*.pth"))
        assert not list(self.folder.rglob("*.tmp"))
        return lines[0]

    def trains(self, *options):
        code, err = self(*options)
        assert code == 0, err
        weights = load_checkpoint(self.save / "model" / "model_last.pth")["state_dict"]
        assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    return Run(tmp_path, monkeypatch, capsys)


def test_the_run_itself_works(run):
    run.trains()


def test_truncated_scan(run):
    content = run.bin(1).read_bytes()
    run.bin(1).write_bytes(content[:-5])
    assert "000001.bin" in run.refuses()


def test_truncated_scan_in_a_worker(run):
    run.bin(1).write_bytes(run.bin(1).read_bytes()[:-5])
    assert "000001.bin" in run.refuses("num_worker=1")


def test_labels_unlike_points(run):
    run.write(0, np.ones((200, 4)), np.full(199, 40))
    assert "expected 800 for 200 points" in run.refuses()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_no_numbers(run, value):
    points = np.ones((200, 4))
    points[17, 1] = value
    run.write(0, points)
    line = run.refuses()
    assert "000000.bin" in line
    assert "17" in line


def test_empty_scan(run):
    run.write(0, np.zeros((0, 4)), np.zeros(0))
    assert "000000.bin" in run.refuses()


def test_one_point_scans_train(run):
    for number in range(2):
        run.write(number, [[1.0, 2.0, 3.0, 0.5]], [40])
    run.trains()


def test_all_labels_ignored_trains(run):
    for number in range(2):
        run.write(number, np.random.default_rng(number).normal(size=(50, 4)), np.zeros(50))
    run.trains()


def test_cloud_too_large_for_the_codes(run):
    points = np.ones((200, 4))
    points[0, 0] = 1e5
    run.write(0, points)
    run.grid = 0.01
    line = run.refuses()
    assert "grid_size" in line


def test_unknown_key(run):
    line = run.refuses("epochs=3")
    assert "did you mean epoch" in line
    assert not run.save.exists()


def test_unknown_type(run):
    line = run.refuses("model.backbone.type=PTv3m1")
    assert "PT-v3m1" in line
    assert not run.save.exists()


def test_checkpoint_of_another_width(run):
    run.trains()
    last = run.save / "model" / "model_last.pth"
    kept = run.folder / "other.weights"
    last.rename(kept)
    line = run.refuses(
        f"weight={kept}", "model.backbone.enc_channels=[16,8]", f"save_path={run.folder / 'new'}"
    )
    assert "another width" in line
    assert not (run.folder / "new").exists()


def test_corrupted_checkpoint(run):
    run.trains()
    last = run.save / "model" / "model_last.pth"
    kept = run.folder / "cut.weights"
    kept.write_bytes(last.read_bytes()[:-1000])
    last.unlink()
    line = run.refuses(f"weight={kept}", f"save_path={run.folder / 'new'}")
    assert "cut.weights" in line
    assert not (run.folder / "new").exists()


def test_missing_folder(run):
    line = run.refuses(f"data.train.data_root={run.folder / 'nowhere'}")
    assert "nowhere" in line
    assert "prepare_data.py simulate" in line
    assert not run.save.exists()


def test_output_folder_that_cannot_be_written(run):
    (run.folder / "file").write_text("")
    line = run.refuses(f"save_path={run.folder / 'file' / 'exp'}")
    assert "save_path" in line


def test_zero_workers_train_in_the_process(run):
    run.trains("num_worker=0")


def test_negative_workers(run):
    assert "num_worker=-1" in run.refuses("num_worker=-1")
