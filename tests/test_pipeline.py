"""The pipeline benchmark: its baseline makes our arrays, its rows are complete."""

import copy

import numpy as np
import pytest
import torch

from benchmarks import pipeline
from pointcept_kd.host.config import Config
from pointcept_kd.host.loader import Compose


def configs():
    return Config.fromfile(
        str(pipeline.ROOT / "configs/_base_/semantic_kitti.py")
    ).data.train.transform


def sheet(n=800):
    rng = np.random.RandomState(0)
    return dict(
        coord=(rng.randn(n, 3) * [0.5, 0.5, 0.1]).astype(np.float32),
        strength=rng.rand(n, 1).astype(np.float32),
        segment=rng.randint(-1, 19, n).astype(np.int32),
        name="sheet",
    )


@pytest.mark.parametrize("value", range(6))
def test_the_textbook_makes_our_tensors(value):
    pipeline.seed(value)
    ours = Compose(configs())(sheet())
    pipeline.seed(value)
    plain = pipeline.run_all(pipeline.textbook(configs()), sheet())
    assert set(ours) == set(plain)
    assert 100 < len(ours["coord"]) < 800
    for key, tensor in ours.items():
        assert tensor.dtype == plain[key].dtype
        assert torch.equal(tensor, plain[key]), key


def test_differing_results_stop_the_benchmark():
    one, other = dict(coord=torch.zeros(3)), dict(coord=torch.ones(3))
    pipeline.same(dict(ours=one, textbook=copy.deepcopy(one)), "scan")
    with pytest.raises(SystemExit, match="coord of ours and textbook differ"):
        pipeline.same(dict(ours=one, textbook=other), "scan")


def test_pointcept_is_skipped_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("POINTCEPT_ROOT", raising=False)
    assert pipeline.pointcept_compose() == (None, "POINTCEPT_ROOT is not set")
    monkeypatch.setenv("POINTCEPT_ROOT", str(tmp_path))
    assert pipeline.pointcept_compose()[1].endswith("has no pointcept/datasets/transform.py")


def test_rows(monkeypatch, tmp_path):
    """A short run on a simulated scan."""
    monkeypatch.setenv("POINTCEPT_KD_SAMPLES", str(tmp_path))
    monkeypatch.delenv("POINTCEPT_ROOT", raising=False)
    monkeypatch.setattr(pipeline, "scene", lambda: (torch.from_numpy(sheet(4000)["coord"]), ""))
    report = pipeline.measure(0.0)
    kitti, frame = report["From disk to tensors"]
    assert (kitti["points"], frame["points"]) == (4000, 1000)
    for row in (kitti, frame):
        assert 0 < row["ours min ms"] <= row["ours median ms"]
        ratio = row["textbook min ms"] / row["ours min ms"]
        assert row["textbook / ours"] == pytest.approx(ratio)
    steps = [row["step"] for row in report["Step by step"]]
    assert steps == ["read", *(cfg["type"] for cfg in configs())]
    assert report["environment"]["threads"] == 1
    assert report["environment"]["Pointcept"].startswith("skipped: ")
