"""A voxel teacher and a bird's-eye student of a few hundred weights, on one small grid, for the terms between such."""

import torch
from torch import nn

from pointcept_kd.distillers.base import Distiller
from pointcept_kd.host import MODELS
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.scatter import segment_mean
from pointcept_kd.ops.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d

GRID = (
    10,
    9,
    8,
)  # cells of size 1; the odd axis makes the map of stride 2 narrower than the teacher's level
CLASSES = 4
TAPS_S = dict(cells="partition", fine="up", coarse="down", dense="outc")
TAPS_T = dict(cells="partition", fine="up", coarse="pool", voxels="score")


class Cells(nn.Module):
    """A row per point: position within its cell of the given size, and the cell."""

    def __init__(self, size=1.0):
        super().__init__()
        self.size = size
        self.shape = [round(n / size) for n in GRID]

    def forward(self, batch):
        scaled = batch["coord"] / self.size
        cells = scaled.floor().long()
        indices = torch.cat([offset2batch(batch["offset"])[:, None], cells], 1)
        return SparseConvTensor(scaled - cells, indices, self.shape, len(batch["offset"]))


class Network(nn.Module):
    """Scores of points and, where there are labels, their cross-entropy."""

    def forward(self, batch):
        scores = self.seg_head(self.scores(batch))
        if "segment" not in batch:
            return {"seg_logits": scores}
        loss = nn.functional.cross_entropy(scores, batch["segment"], ignore_index=-1)
        return {"loss": loss} if self.training else {"loss": loss, "seg_logits": scores}


class Pillars(Network):
    """Mean of a pillar's points, a two-level convolutional network, one score per class and height."""

    def __init__(self, width=6, size=1.0):
        super().__init__()
        self.partition = Cells(size)
        self.inc = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(3 * width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.outc = nn.Conv2d(width, self.partition.shape[2] * CLASSES, 1)
        self.seg_head = nn.Identity()

    def scores(self, batch):
        points = self.partition(batch)
        h, w, z = points.spatial_shape
        b, i, j, k = points.indices.unbind(1)
        rows = segment_mean(points.features, (b * h + i) * w + j, points.batch_size * h * w)
        x = self.inc(rows.view(-1, h, w, 3).permute(0, 3, 1, 2))
        wide = nn.functional.interpolate(self.down(x), (h, w))
        out = self.outc(self.up(torch.cat([x, wide], 1)))
        return out.view(-1, z, CLASSES, h, w)[b, k, :, i, j]


class Voxels(Network):
    """Mean of a voxel's points, a two-level sparse network, scores of voxels."""

    def __init__(self, width=5):
        super().__init__()
        self.partition = Cells()
        self.stem = SubMConv3d(3, width, 3)
        self.pool = SparseConv3d(width, 7, 3, stride=2, padding=1, indice_key="pool")
        self.up = SparseInverseConv3d(7, width, 3, "pool")
        self.norm = nn.BatchNorm1d(width)
        self.score = SubMConv3d(width, CLASSES, 1)
        self.seg_head = nn.Identity()

    def scores(self, batch):
        points = self.partition(batch)
        indices, inverse = points.indices.unique(dim=0, return_inverse=True)
        rows = segment_mean(points.features, inverse, len(indices))
        x = SparseConvTensor(rows, indices, points.spatial_shape, points.batch_size)
        x = self.up(self.pool(self.stem(x)))
        return self.score(x.replace_feature(self.norm(x.features))).features[inverse]


MODELS.register_module("TestPillars", module=Pillars, force=True)
MODELS.register_module("TestVoxels", module=Voxels, force=True)


def pair(terms, size=1.0):
    """A `Distiller` around the two; `size` of the student's cells."""
    return Distiller(
        student=dict(model=dict(type="TestPillars", size=size), taps=TAPS_S),
        teacher=dict(model=dict(type="TestVoxels"), weight="random", taps=TAPS_T),
        terms=terms,
    )


def scans(*counts):
    """A batch of labelled scans of so many points, one in five of them unlabelled."""
    total = sum(counts)
    coord = torch.rand(total, 3) * torch.tensor(GRID)
    labels = torch.randint(0, CLASSES, (total,))
    labels[::5] = -1
    return dict(
        coord=coord, feat=coord, segment=labels, grid_coord=coord.floor().long(),
        offset=torch.tensor(counts).cumsum(0),
    )  # fmt: skip


def check_one_step(term):
    """One step of training: the teacher stays to the last bit, the student and the term's adapter move.

    Returns:
        The loss and the distiller.
    """
    model = pair(dict(x=term)).train()
    teacher = model.teachers["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    out = model(scans(90, 60))
    out["loss"].backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and id(p) not in held for p in teacher.parameters())
    assert not any("teacher" in key for key in model.state_dict())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    still = [k for k, p in model.named_parameters() if torch.equal(p, student[k])]
    # A bias before batch normalisation, and the height table's bins without tokens, have no say.
    assert all("bias" in k or "height" in k for k in still), still
    assert set(model.eval()(scans(20))) == {"loss", "seg_logits"}
    return out["loss_x"], model
