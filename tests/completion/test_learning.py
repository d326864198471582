"""Learning end to end: a small diffusion teacher on drives along a street, and a student that needs fewer steps."""

import copy

import numpy as np
import pytest
import torch

import pointcept_kd.networks.denoiser  # noqa: F401  registers encoder and denoiser
from pointcept_kd.completion.diffusion import scan_seeds
from pointcept_kd.completion.metrics import CompletionScores
from pointcept_kd.data.completion_pairs import CompletionDataset
from pointcept_kd.data.maps import build_sequence
from pointcept_kd.host import MODELS
from pointcept_kd.host.loader import collate_fn

from ..data.map_oracles import drive, write_sequence

POINTS, RADIUS = 400, 20.0
SIZE = dict(cr=0.25, voxel_size=0.4)
TEACHER = dict(
    type="kd.DiffusionCompletion",
    encoder=dict(type="kd.ConditionEncoder", **SIZE),
    denoiser=dict(type="kd.Denoiser", match="centre", null="learned", **SIZE),
    drop_mode="sample",
    reg_weight=0.0,
    guidance=1.0,
    sampling=dict(start=250, start_scale="sigma_T"),
    max_range=RADIUS,
)
STUDENTS = {
    "score": dict(type="kd.ScoreDistillation"),
    "preference": dict(type="kd.PreferenceDistillation", scene_weight=0.5, point_weight=0.01),
}


def pairs(root, split, keys):
    offsets = {"offset" if key == "coord" else f"{key}_offset": key for key in keys}
    collect = dict(type="Collect", keys=(*keys, "name"), offset_keys_dict=offsets)
    return CompletionDataset(
        split=split,
        data_root=str(root),
        points=POINTS,
        radius=RADIUS,
        test_mode=split == "val",
        augment=split == "train",
        sequences=["00", "01"] if split == "train" else ["08"],
        transform=[dict(type="ToTensor"), collect],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training pairs, and scans of a third street to complete."""
    root = tmp_path_factory.mktemp("streets")
    for seed, name in enumerate(("00", "01", "08")):
        folder = write_sequence(root, name, *drive(count=8, points=1500, seed=seed))
        build_sequence(folder, folder)
    return pairs(root, "train", ("coord", "complete")), pairs(root, "val", ("coord", "target"))


def batch_of(train, rng):
    np.random.seed(rng.integers(2**31))
    return collate_fn([train[int(i)] for i in rng.integers(len(train), size=2)])


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = MODELS.build(TEACHER).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch_of(data[0], rng))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Noise normal to ground and walls can be told, noise along them cannot.
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:5])
    return model.eval()


def distances(model, data, steps):
    """Chamfer distance in metres of the scans of the third street, mean."""
    model.eval()
    scores = CompletionScores(cells=(0.5,))
    for index in range(0, len(data), 3):
        batch = collate_fn([data[index]])
        points, _ = model.complete(
            batch["coord"], batch["offset"], scan_seeds(batch["name"]), steps=steps
        )
        scores.add(batch["name"][0], points.numpy(), batch["target"].numpy())
    return scores.summary().values()["cd"]


@pytest.mark.parametrize("kind", ["score", pytest.param("preference", marks=pytest.mark.slow)])
def test_a_student_beats_its_teacher_at_equal_steps(kind, teacher, data):
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model = MODELS.build(
        dict(
            teacher=dict(model=copy.deepcopy(teacher), weight="random"),
            train_steps=4,
            random_stop=True,
            steps=4,
            guidance=1.0,
            **STUDENTS[kind],
        )
    )
    before = [distances(model, data[1], steps) for steps in (4, 1)]
    assert before == [distances(teacher, data[1], steps) for steps in (4, 1)]
    model.train()
    learners = {
        "auxiliary": torch.optim.Adam(model.watchers.parameters(), lr=1e-4),
        "student": torch.optim.Adam(model.denoiser.parameters(), lr=5e-4),
    }
    for _ in range(16):
        batch = batch_of(data[0], rng)
        for phase, optimizer in learners.items():
            optimizer.zero_grad()
            model(batch, phase=phase)["loss"].backward()
            optimizer.step()
    after = [distances(model, data[1], steps) for steps in (4, 1)]
    assert all(new < 0.98 * old for new, old in zip(after, before)), (before, after)
