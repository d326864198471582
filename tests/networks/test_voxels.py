"""Points to cells, the point encoder, and labels and scores of cells."""

import math

import pytest
import torch

from pointcept_kd.host import InputError
from pointcept_kd.networks import voxels
from pointcept_kd.networks.voxels import (
    PointCells,
    PointScores,
    VoxelScores,
    VoxelSegmentor,
    build_partition,
    encode_points,
    point_layers,
    voxel_groups,
)
from pointcept_kd.ops.grid import Groups, Partition, group_rows

STUDENT = dict(low=(3, -math.pi, -3), high=(50, math.pi, 1.5), shape=(480, 360, 32))
PLAIN = [
    dict(type="CrossEntropyLoss", ignore_index=0, weight=[1.0, 0.0, 2.0, 1.0]),
    dict(type="LovaszLoss", mode="multiclass", ignore_index=0),
]


def batch_of(points, ends, segment=None):
    points = torch.as_tensor(points, dtype=torch.float32)
    batch = dict(coord=points[:, :3], feat=points, offset=torch.tensor(ends))
    if segment is not None:
        batch["segment"] = torch.tensor(segment)
    return batch


def test_columns_of_a_point():
    """Offset from the centre, radius, azimuth, height, x, y, strength: the published nine."""
    cells = PointCells(build_partition(STUDENT), 4)
    out = cells(batch_of([[0, 10, 0, 0.25], [60, 0, 2, 0.5]], [1, 2]))
    assert out.indices.tolist() == [[0, 71, 269, 20], [1, 478, 179, 30]]
    assert out.batch_size == 2
    expected = [
        [-0.015658, -0.004375, 0.024194, 10, math.pi / 2, 0, 0, 10, 0.25],
        [10.049061, 0, 0.572581, 60, 0, 2, 60, 0, 0.5],
    ]
    torch.testing.assert_close(out.features, torch.tensor(expected), atol=1e-5, rtol=0)


def test_columns_in_a_cartesian_grid():
    grid = Partition((-10.0, -10.0, -2.0), (10.0, 10.0, 2.0), (20, 20, 4), "cartesian", "n")
    out = PointCells(grid, 5)(batch_of([[3.25, -4.0, 0.6, 0.1, 7]], [1]))
    assert out.indices.tolist() == [[0, 13, 6, 2]]
    expected = [
        [-0.25, -0.5, 0.1, 3.25, -4, 0.6, math.hypot(3.25, 4), math.atan2(-4, 3.25), 0.1, 7]
    ]
    torch.testing.assert_close(out.features, torch.tensor(expected), atol=1e-5, rtol=0)


def test_bad_points():
    cells = PointCells(build_partition(STUDENT), 4)
    with pytest.raises(InputError, match="not finite, first in row 1"):
        cells(batch_of([[1, 2, 3, 0], [1, math.nan, 3, 0]], [2]))
    with pytest.raises(InputError, match="in_channels=4 but `feat` has 5 columns"):
        cells(batch_of([[1, 2, 3, 0, 0]], [1]))
    with pytest.raises(InputError, match="at least 3"):
        PointCells(build_partition(STUDENT), 2)
    with pytest.raises(InputError, match="low < high"):
        build_partition(dict(low=(0, 0, 0), high=(0, 1, 1), shape=(2, 2, 2)))


def test_the_encoder_against_a_loop():
    torch.manual_seed(0)
    layers, compression = point_layers(9, (8, 12, 16), 20, 5)
    layers.double().eval()
    compression.double()
    for module in layers:
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
    features = torch.randn(40, 9, dtype=torch.float64)
    keys = torch.randint(0, 7, (40,))
    groups = group_rows(keys)
    found = encode_points(layers, compression, features, groups)
    for row, key in enumerate(sorted(set(keys.tolist()))):
        rows = torch.stack([layers(features[i : i + 1])[0] for i in range(40) if keys[i] == key])
        torch.testing.assert_close(found[row : row + 1], compression(rows.max(0).values[None]))


def test_blocks_change_nothing(monkeypatch):
    """In evaluation points are encoded block by block; a group may begin in one block and end two later."""
    torch.manual_seed(0)
    layers, compression = point_layers(9, (8, 12, 16), 20, 5)
    layers.eval()
    features = torch.randn(500, 9)
    groups = group_rows(torch.tensor([0] * 1 + [3] * 250 + [4] * 2 + [9] * 247))
    monkeypatch.setattr(voxels, "_BLOCK", 64)
    with torch.no_grad():
        found = encode_points(layers, compression, features, groups)
    whole = encode_points(layers, compression, features, groups)
    assert whole.requires_grad
    torch.testing.assert_close(found, whole.detach(), atol=1e-6, rtol=1e-6)


def test_published_sizes_of_the_encoder():
    for last, compressed, count in ((512, 32, 174_482 + 16_416), (256, 16, 112_802)):
        layers, compression = point_layers(9, (64, 128, 256), last, compressed)
        parameters = [*layers.parameters(), *compression.parameters()]
        assert sum(p.numel() for p in parameters) == count


class First(torch.nn.Module):
    """Hands the first column of every row on."""

    def forward(self, x):
        return x[:, :1]


def test_the_cap_draws_among_all_points_of_a_group():
    keys = torch.tensor([5] * 10 + [2] * 3)
    values = torch.arange(13.0)[:, None]
    groups = group_rows(keys)
    torch.manual_seed(0)
    drawn = set()
    for _ in range(300):
        out = encode_points(First(), torch.nn.Identity(), values, groups, cap=4)
        assert out[0, 0] == 12  # a group under the cap keeps all
        drawn.add(int(out[1, 0]))
    # The maximum of 4 of the values 0 .. 9 is 3 at least; each of 3 .. 9 comes up.
    assert drawn >= set(range(5, 10))
    assert min(drawn) >= 3
    full = encode_points(First(), torch.nn.Identity(), values, groups, cap=10)
    assert full[:, 0].tolist() == [12, 9]


class Scorer(torch.nn.Module):
    """Cells of 1 m along x; scores are learned per cell."""

    def __init__(self, classes, cells=4):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.arange(cells * classes).view(cells, classes).float())

    def forward(self, batch):
        groups: Groups = group_rows(batch["coord"][:, 0].long())
        indices = torch.zeros(len(groups.keys), 4, dtype=torch.int64)
        indices[:, 1] = groups.keys
        return VoxelScores(self.scores[groups.keys], indices, groups.inverse)


def points_at(xs):
    return [[x, 0, 0, 0] for x in xs]


def test_cells_are_trained_on_their_majority_label():
    model = VoxelSegmentor(Scorer(4), PLAIN)
    # Cell 0: two of class 1 (label 2 with the void class first), one of 0. Cell 1: a tie of "no label" and 2 goes to
    # the smaller. Cell 2: a tie of 0 and 1 likewise.
    batch = batch_of(points_at([0.1, 0.2, 0.3, 1.1, 1.2, 2.1, 2.2]), [7], [1, 1, 0, -1, 2, 1, 0])
    scores = model.backbone(batch)
    assert model.labels(scores, batch["segment"]).tolist() == [2, 0, 1]
    lenient = VoxelSegmentor(Scorer(4), PLAIN, vote_labelled=True)
    assert lenient.labels(scores, batch["segment"]).tolist() == [2, 3, 1]
    bare = VoxelSegmentor(Scorer(3), PLAIN, void_class=False)
    assert bare.labels(bare.backbone(batch), batch["segment"]).tolist() == [1, -1, 0]


def test_the_loss_by_hand():
    """Cross entropy of cells (classes 2 and 1, weights 2 and 0) plus Lovász over both."""
    model = VoxelSegmentor(Scorer(4), PLAIN).train()
    with torch.no_grad():
        model.backbone.scores.zero_()
    batch = batch_of(points_at([0.1, 0.2, 1.1]), [3], [1, 1, 0])
    out = model(batch)
    assert set(out) == {"loss"}
    # All scores equal: every probability is 1/4, the weighted mean of -ln 1/4 is ln 4. Lovász: for each class one cell
    # is foreground with error 3/4, the other background with 1/4; the Jaccard loss is 1 from the first step on: 3/4.
    assert float(out["loss"].detach()) == pytest.approx(math.log(4) + 0.75, abs=1e-6)
    out["loss"].backward()
    assert model.backbone.scores.grad[2:].abs().sum() == 0


def test_without_any_label_the_loss_is_zero_and_differentiable():
    model = VoxelSegmentor(Scorer(4), PLAIN).train()
    out = model(batch_of(points_at([0.1, 1.1]), [2], [-1, -1]))
    assert float(out["loss"].detach()) == 0
    out["loss"].backward()
    assert model.backbone.scores.grad.isfinite().all()


def test_points_get_the_scores_of_their_cell_without_the_void_class():
    model = VoxelSegmentor(Scorer(4), PLAIN).eval()
    batch = batch_of(points_at([2.5, 0.1, 2.1]), [3], [0, 0, 0])
    out = model(batch)
    assert out["seg_logits"].tolist() == [[9, 10, 11], [1, 2, 3], [9, 10, 11]]
    assert "loss" in out
    del batch["segment"]
    assert set(model(batch)) == {"seg_logits"}
    scores = model.backbone(batch)
    assert PointScores(False)(scores).shape == (3, 4)


def test_labels_of_other_points_are_refused_in_training():
    model = VoxelSegmentor(Scorer(4), PLAIN)
    with pytest.raises(InputError, match="`segment`"):
        model(batch_of(points_at([0.1]), [1]))
    with pytest.raises(InputError, match="2 labels for 1 points"):
        model(batch_of(points_at([0.1]), [1], [0, 1]))


def test_voxels_are_ascending_and_lead_back_to_points():
    grid = build_partition(STUDENT)
    torch.manual_seed(0)
    points = torch.randn(300, 4) * 8
    cells = PointCells(grid, 4)(batch_of(points, [100, 300]))
    groups, indices = voxel_groups(cells, grid)
    assert torch.equal(indices[groups.inverse], cells.indices)
    rows = indices.tolist()
    assert rows == sorted(rows)
    assert len(set(map(tuple, rows))) == len(rows)
