"""Point, its serialised orders and sparse tensor, and the dispatch of PointSequential."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pointcept_kd.host import InputError
from pointcept_kd.host.point import (
    Point,
    PointModule,
    PointSequential,
    batch2offset,
    bincount2offset,
    offset2batch,
    offset2bincount,
)
from pointcept_kd.ops.curves import ORDERS, decode
from pointcept_kd.ops.sparse import SubMConv3d


def make_point(counts=(6, 0, 9), channels=3, high=20):
    n = sum(counts)
    return Point(
        feat=torch.randn(n, channels),
        grid_coord=torch.randint(0, high, (n, 3)),
        offset=torch.tensor(counts).cumsum(0),
    )


def test_offset_helpers():
    counts = torch.tensor([2, 0, 3])
    offset = bincount2offset(counts)
    assert offset.tolist() == [2, 2, 5]
    assert torch.equal(offset2bincount(offset), counts)
    assert offset2batch(offset).tolist() == [0, 0, 2, 2, 2]
    assert torch.equal(batch2offset(offset2batch(offset)), offset)
    assert batch2offset(torch.tensor([0, 0]), 3).tolist() == [2, 2, 2]


def test_batch_and_offset_complete_each_other():
    assert Point(offset=torch.tensor([2, 5])).batch.tolist() == [0, 0, 1, 1, 1]
    assert Point({"batch": torch.tensor([0, 0, 1])}).offset.tolist() == [2, 3]
    assert not {"batch", "offset"} & Point(feat=torch.zeros(2, 1)).keys()


def test_the_batch_dict_stays_as_it_is():
    batch = {
        "feat": torch.zeros(3, 1),
        "grid_coord": torch.zeros(3, 3).long(),
        "offset": torch.tensor([3]),
    }
    point = Point(batch)
    point.serialization("z")
    point.feat = point.feat + 1
    assert set(batch) == {"feat", "grid_coord", "offset"}
    assert (batch["feat"] == 0).all()
    assert point["feat"] is point.feat


def test_serialization():
    point = make_point()
    point.serialization(ORDERS)
    n, k = 15, len(ORDERS)
    assert point.order == list(ORDERS)
    assert point.serialized_depth == int(point.grid_coord.max() + 1).bit_length()
    for name in ("serialized_code", "serialized_order", "serialized_inverse"):
        assert point[name].shape == (k, n)
        assert point[name].dtype == torch.int64
    for i, name in enumerate(ORDERS):
        code, order, inverse = (point[f"serialized_{w}"][i] for w in ("code", "order", "inverse"))
        cells, batch = decode(code, point.serialized_depth, name)
        assert torch.equal(cells, point.grid_coord)
        assert torch.equal(batch, point.batch)
        assert (code[order].diff() >= 0).all()
        assert torch.equal(order[inverse], torch.arange(n))
        assert (point.batch[order].diff() >= 0).all(), "scans stay together"


def test_points_of_one_voxel_keep_their_order():
    cells = torch.randint(0, 3, (200, 3))
    point = Point(grid_coord=cells, offset=torch.tensor([200]))
    point.serialization(["hilbert", "z"])
    for code, order in zip(point.serialized_code, point.serialized_order):
        same = code[order].diff() == 0
        assert same.any()
        assert (order.diff()[same] > 0).all()


def test_one_more_than_the_largest_index_sets_the_depth():
    for high, depth in ((0, 1), (1, 2), (6, 3), (7, 4), (65534, 16)):
        point = Point(grid_coord=torch.tensor([[0, high, 0]]), offset=torch.tensor([1]))
        point.serialization("z")
        assert point.serialized_depth == depth
    point.serialization("z-trans", depth=16)
    assert point.order == ["z-trans"]


def test_shuffling_permutes_the_rows_with_the_cpu_generator():
    point = make_point()
    point.serialization(ORDERS)
    torch.manual_seed(3)
    rows = torch.randperm(4)
    torch.manual_seed(3)
    shuffled = Point(point)
    shuffled.serialization(ORDERS, shuffle_orders=True)
    assert rows.tolist() != [0, 1, 2, 3]
    assert shuffled.order == [ORDERS[i] for i in rows]
    for name in ("serialized_code", "serialized_order", "serialized_inverse"):
        assert torch.equal(shuffled[name], point[name][rows])


def test_grid_coord_from_coord():
    coord = torch.tensor([[0.0, 0, 0], [0.31, 0.09, 0.1], [7.0, 7, 7], [7.25, 7, 7]])
    point = Point(coord=coord, grid_size=0.1, offset=torch.tensor([2, 4]))
    point.serialization("z")
    assert point.grid_coord.tolist() == [[0, 0, 0], [3, 0, 1], [0, 0, 0], [2, 0, 0]]
    point = Point(coord=coord, grid_size=torch.tensor([0.1, 0.2]), offset=torch.tensor([2, 4]))
    point.serialization("z")
    assert point.grid_coord[3].tolist() == [1, 0, 0]


def test_patches_are_kept_per_patch_size_and_order():
    point = make_point((30, 5))
    point.serialization(["z", "hilbert"])
    eight = point.patches(8, 0)
    assert point.patches(8, 0) is eight
    assert point.patches(4, 0).longest == 4
    assert eight.longest == 8
    other = point.patches(8, 1)
    assert torch.equal(
        eight.rows, point.serialized_order[0][point.serialized_inverse[1][other.rows]]
    )
    point.serialization(["hilbert"])
    assert torch.equal(point.patches(8, 0).rows, other.rows), (
        "a new serialisation forgets the old patches"
    )


def test_sparsify():
    point = make_point((6, 9, 0))
    point.sparsify()
    sparse = point.sparse_conv_feat
    assert point.sparse_shape == [v + 96 for v in point.grid_coord.amax(0).tolist()]
    assert tuple(sparse.spatial_shape) == tuple(point.sparse_shape)
    assert sparse.batch_size == 3, "the last sample is empty and still counts"
    assert sparse.features is point.feat
    assert torch.equal(
        sparse.indices.long(), torch.cat([point.batch[:, None], point.grid_coord], 1)
    )


def test_bad_input():
    with pytest.raises(InputError, match=r"70000 voxels along an axis.*grid_size"):
        Point(grid_coord=torch.tensor([[0, 0, 69999]]), offset=torch.tensor([1])).serialization("z")
    with pytest.raises(InputError, match="choose from z"):
        make_point().serialization("morton")
    empty = Point(
        feat=torch.zeros(0, 1), grid_coord=torch.zeros(0, 3).long(), offset=torch.tensor([0])
    )
    with pytest.raises(InputError, match="no points"):
        empty.serialization("z")
    with pytest.raises(InputError, match="no points"):
        empty.sparsify()
    with pytest.raises(InputError, match="neither grid_coord nor coord with grid_size"):
        Point(coord=torch.zeros(1, 3), offset=torch.tensor([1])).serialization("z")
    with pytest.raises(InputError, match="offset ends at 3 but grid_coord has 2 rows"):
        Point(grid_coord=torch.zeros(2, 3).long(), offset=torch.tensor([3])).serialization("z")


class Doubler(PointModule):
    """Doubles `feat` alone and leaves a mark."""

    def forward(self, point):
        point.feat = point.feat * 2
        point.mark = True
        return point


def test_dispatch():
    point = make_point(channels=4)
    point.sparsify()
    conv, linear = SubMConv3d(4, 5, 3), nn.Linear(5, 2)
    before = point.sparse_conv_feat
    expected = linear(conv(before).features)
    out = PointSequential(conv, linear, Doubler())(point)
    assert out is point
    assert out.mark is True
    assert torch.equal(out.feat, 2 * expected)
    assert torch.equal(out.sparse_conv_feat.features, expected), (
        "a PointModule minds its own features"
    )


def test_without_a_sparse_tensor():
    out = PointSequential(nn.ReLU())(
        Point(feat=torch.tensor([[-1.0, 2.0]]), offset=torch.tensor([1]))
    )
    assert out.feat.tolist() == [[0.0, 2.0]]
    assert "sparse_conv_feat" not in out


def test_children():
    layers = PointSequential(nn.Linear(2, 3), nn.ReLU(), last=nn.Linear(3, 1))
    layers.add(nn.Sigmoid())
    layers.add(nn.Identity(), "tail")
    assert [name for name, _ in layers.named_children()] == ["0", "1", "last", "3", "tail"]
    assert len(layers) == 5
    assert isinstance(layers[1], nn.ReLU)
    assert isinstance(layers[-1], nn.Identity)
    assert [
        n for n, _ in PointSequential(OrderedDict(a=nn.ReLU(), b=nn.ReLU())).named_children()
    ] == ["a", "b"]
    with pytest.raises(ValueError, match="'tail' is in this PointSequential already"):
        layers.add(nn.ReLU(), "tail")


def test_copies_are_independent():
    point = make_point()
    point.serialization("z")
    for other in (copy.copy(point), Point(point), copy.deepcopy(point)):
        assert isinstance(other, Point)
        other.feat = None
        assert point.feat is not None
