"""Configs of OpenPCDet's detectors: complete, as published, and as its own reader sees them."""

import math
import os
from pathlib import Path

import pytest

from pointcept_kd.handoff import detectors, yaml_text
from pointcept_kd.networks import UNetV2, VoxelBackBone8x, VoxelResBackBone8x

NAMES = list(detectors.DETECTORS)
# OpenPCDet's own config of each, below tools/cfgs.
THEIRS = {
    "second": "kitti_models/second.yaml",
    "pv_rcnn": "kitti_models/pv_rcnn.yaml",
    "parta2": "kitti_models/PartA2.yaml",
    "voxel_rcnn": "kitti_models/voxel_rcnn_car.yaml",
    "second_iou": "kitti_models/second_iou.yaml",
    "centerpoint": "once_models/centerpoint.yaml",
}


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_text_and_back(name, inline):
    yaml = pytest.importorskip("yaml")
    settings = detectors.config(name, inline=inline)
    text = yaml_text.dump(settings, "two lines\nof comment")
    assert text.startswith("# two lines\n# of comment\nCLASS_NAMES:")
    assert yaml.safe_load(text) == settings
    assert ("_BASE_CONFIG_" in text) == (not inline)


def test_values_that_readers_of_yaml_trip_over():
    yaml = pytest.importorskip("yaml")
    content = {
        "small": 1e-7, "whole": 3.0, "negative": -0.78539816, "big": 1e22, "none": None, "yes": True,
        "words": ["yes", "No", "null", "y", "1", "a: b", "", "#x", "Grün", "smooth-l1", "a/b.yaml"],
        "nested": [[16, 16], []], "empty": {}, "dicts": [{"a": {"b": [1]}, "c": [{"d": 2}]}, {"e": "f"}],
    }  # fmt: skip
    text = yaml_text.dump(content)
    assert yaml.safe_load(text) == content
    assert "small: 0.0000001\n" in text
    assert "smooth-l1, a/b.yaml]" in text
    for bad in ({"a": object()}, {"a": {1, 2}}):
        with pytest.raises(TypeError, match="not written as YAML"):
            yaml_text.dump(bad)
    with pytest.raises(ValueError, match="finite"):
        yaml_text.dump({"a": math.nan})


def test_published_settings():
    second, pv_rcnn = (detectors.config(name, inline=True) for name in ("second", "pv_rcnn"))
    for settings, batch, rate, groups, limit, nms in (
        (second, 4, 0.003, ["Car:20", "Pedestrian:15", "Cyclist:15"], True, 0.01),
        (pv_rcnn, 2, 0.01, ["Car:15", "Pedestrian:10", "Cyclist:10"], False, 0.1),
    ):
        training = settings["OPTIMIZATION"]
        assert (training["BATCH_SIZE_PER_GPU"], training["NUM_EPOCHS"]) == (batch, 80)
        assert (training["LR"], training["WEIGHT_DECAY"]) == (rate, 0.01)
        assert (training["MOMS"], training["PCT_START"]) == ([0.95, 0.85], 0.4)
        assert (training["DIV_FACTOR"], training["GRAD_NORM_CLIP"]) == (10, 10)
        sampling, flip, turn, scale = settings["DATA_CONFIG"]["DATA_AUGMENTOR"]["AUG_CONFIG_LIST"]
        assert sampling["SAMPLE_GROUPS"] == groups
        assert sampling["LIMIT_WHOLE_SCENE"] is limit
        assert flip["ALONG_AXIS_LIST"] == ["x"]
        assert turn["WORLD_ROT_ANGLE"][1] == pytest.approx(math.pi / 4)
        assert scale["WORLD_SCALE_RANGE"] == [0.95, 1.05]
        voxels = settings["DATA_CONFIG"]["DATA_PROCESSOR"][-1]
        assert voxels["MAX_NUMBER_OF_VOXELS"] == {"train": 16000, "test": 40000}
        assert voxels["MAX_POINTS_PER_VOXEL"] == 5
        after = settings["MODEL"]["POST_PROCESSING"]
        assert (after["NMS_CONFIG"]["NMS_THRESH"], after["SCORE_THRESH"]) == (nms, 0.1)


def test_entries():
    for kind in (VoxelBackBone8x, VoxelResBackBone8x, UNetV2):
        assert len(kind().state_dict()) == detectors.ENCODER_ENTRIES[kind.__name__]
    bare = len(VoxelResBackBone8x(use_bias=False).state_dict())
    assert bare == detectors.ENCODER_ENTRIES["VoxelResBackBone8x"] - detectors.RESIDUAL_BIASES
    counts = {
        name: detectors.entries(name, detector.backbones[0])
        for name, detector in detectors.DETECTORS.items()
    }
    assert counts == {
        "second": 163, "pv_rcnn": 367, "parta2": 333, "voxel_rcnn": 257, "second_iou": 189, "centerpoint": 279,
    }  # fmt: skip
    assert detectors.entries("parta2", "VoxelBackBone8x") == 333
    assert detectors.entries("centerpoint", "VoxelBackBone8x") == 209
    assert detectors.entries("centerpoint", "VoxelResBackBone8x", use_bias=False) == 263


def test_grids():
    assert detectors.SPACES["kitti"].shape == (1408, 1600, 40)
    assert detectors.SPACES["once"].shape == (1504, 1504, 40)


def test_encoders_of_a_config():
    assert detectors.config("parta2", "VoxelBackBone8x")["MODEL"]["BACKBONE_3D"] == {
        "NAME": "UNetV2"
    }
    residual = detectors.config("centerpoint", use_bias=False)["MODEL"]["BACKBONE_3D"]
    assert residual == {"NAME": "VoxelResBackBone8x", "USE_BIAS": False}
    with pytest.raises(ValueError, match="second takes VoxelBackBone8x, not UNetV2"):
        detectors.config("second", "UNetV2")


def leaves(value, path=""):
    """Dotted paths and plain values."""
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in leaves(sub, f"{path}.{key}").items()}
    if isinstance(value, list) and any(isinstance(sub, dict) for sub in value):
        return {k: v for i, sub in enumerate(value) for k, v in leaves(sub, f"{path}[{i}]").items()}
    return {path: value}


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_settings_that_openpcdet_has(name, inline, tmp_path, monkeypatch):
    """Read by OpenPCDet's reader, ours says what its own config says."""
    root = Path(os.environ.get("OPENPCDET_ROOT", ""))
    source = root / "pcdet" / "config.py"
    if not source.is_file():
        pytest.skip("OPENPCDET_ROOT does not name a checkout of OpenPCDet")
    pytest.importorskip("yaml")
    easydict = pytest.importorskip("easydict")
    space = {"__file__": str(source)}
    exec(compile(source.read_text(), str(source), "exec"), space)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml_text.dump(detectors.config(name, inline=inline)))
    monkeypatch.chdir(root / "tools")
    ours, theirs = (
        leaves(space["cfg_from_yaml_file"](str(path), easydict.EasyDict()))
        for path in (mine, f"cfgs/{THEIRS[name]}")
    )
    for path in [p for p in (*ours, *theirs) if p.endswith("_BASE_CONFIG_")]:
        ours.pop(path, None)
        theirs.pop(path, None)
    if name == "centerpoint":  # what is left out there, and means the same
        assert ours.pop(".MODEL.BACKBONE_3D.USE_BIAS") is True
        sampling = ".DATA_CONFIG.DATA_AUGMENTOR.AUG_CONFIG_LIST[0]"
        assert ours.pop(f"{sampling}.DATABASE_WITH_FAKELIDAR") is False
    assert ours == theirs
