"""Taps keep tensors and cells, cut graphs where asked, and answer wrong paths with near ones."""

from collections import UserDict
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from pointcept_kd.distillers.taps import Taps, full_precision
from pointcept_kd.host import InputError


class Net(nn.Module):
    """first -> second; `spare` never runs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.spare = nn.Linear(1, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


@dataclass
class Sparse:
    features: torch.Tensor
    indices: torch.Tensor

    def replace_feature(self, features):
        return replace(self, features=features)


class Encoder(nn.Module):
    def forward(self, point):
        point["feat"] = point["feat"] * 2
        return point


class Decoder(nn.Module):
    def forward(self, point):
        point["feat"] = point["feat"] + point["sparse_conv_feat"].features
        point["grid_coord"] = point["grid_coord"] * 0
        return point


class PointNet(nn.Module):
    """A mutable container goes through both halves, as in PTv3."""

    def __init__(self):
        super().__init__()
        self.enc = Encoder()
        self.dec = Decoder()

    def forward(self, point):
        return self.dec(self.enc(point))["feat"]


def make_point():
    feat = torch.arange(6.0).reshape(3, 2)
    batch, cells = torch.tensor([0, 0, 1]), torch.tensor([[0, 0, 0], [1, 2, 3], [4, 5, 6]])
    sparse = Sparse(feat * 2, torch.cat([batch[:, None], cells], 1))
    return {"feat": feat, "batch": batch, "grid_coord": cells, "sparse_conv_feat": sparse}


def test_records_tensors_and_leaves_no_hook():
    net, x = Net(), torch.randn(5, 3)
    taps = Taps(net, {"hidden": "first", "out": "second"})
    with taps.record() as seen:
        y = net(x)
    assert torch.equal(seen["out"].feat, y)
    torch.testing.assert_close(seen["hidden"].feat, net.first(x))
    assert seen["hidden"].feat.requires_grad
    assert seen["hidden"].cells is None
    assert not net.first._forward_hooks


def test_keeps_what_a_mutable_container_held_at_that_moment():
    net, point = PointNet(), make_point()
    feat, cells = point["feat"].clone(), point["grid_coord"].clone()
    with Taps(net, {"bottleneck": "enc"}).record() as seen:
        net(point)
    assert torch.equal(seen["bottleneck"].feat, feat * 2)
    assert torch.equal(seen["bottleneck"].cells, cells)
    assert seen["bottleneck"].batch.tolist() == [0, 0, 1]


def test_a_leaf_cuts_the_graph_and_reaches_both_copies_of_the_features():
    net, point = PointNet(), make_point()
    point["feat"].requires_grad_()
    with Taps(net, {"bottleneck": "enc"}, leaves={"bottleneck"}).record() as seen:
        out = net(point)
    leaf = seen["bottleneck"].feat
    assert leaf.is_leaf
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.full((3, 2), 2.0))
    frozen, x = Net().requires_grad_(False), torch.randn(2, 3)
    with Taps(frozen, {"hidden": "first"}, leaves={"hidden"}).record() as seen:
        frozen(x).sum().backward()
    expected = (frozen.first(x) > 0) * frozen.second.weight.sum(0)
    torch.testing.assert_close(seen["hidden"].feat.grad, expected)
    assert frozen.first.weight.grad is None


def test_reads_sparse_tensors():
    class Wrap(nn.Module):
        def forward(self, x):
            return x

    net = nn.Sequential(Wrap())
    sparse = Sparse(torch.ones(2, 3), torch.tensor([[0, 1, 2, 3], [1, 4, 5, 6]], dtype=torch.int32))
    with Taps(net, {"x": "0"}).record() as seen:
        net(sparse)
    assert seen["x"].batch.tolist() == [0, 1]
    assert seen["x"].cells.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert seen["x"].cells.dtype == torch.int64
    with Taps(net, {"x": "0"}, leaves=["x"]).record() as seen:
        out = net(sparse)
    assert out.features is seen["x"].feat


def test_wrong_paths_are_answered():
    with pytest.raises(InputError, match=r"no module 'frist'; nearest: first"):
        Taps(Net(), {"hidden": "frist"})
    with pytest.raises(InputError, match="no tap is called"):
        Taps(Net(), {"hidden": "first"}, leaves={"other"})
    with (
        pytest.raises(InputError, match="module 'spare' did not run"),
        Taps(net := Net(), {"x": "spare"}).record(),
    ):
        net(torch.zeros(1, 3))

    class Odd(nn.Module):
        def forward(self, x):
            return UserDict()

    net = nn.Sequential(Odd())
    with (
        pytest.raises(InputError, match="returns UserDict"),
        Taps(net, {"x": "0"}).record(),
    ):
        net(torch.zeros(1))
    assert not net[0]._forward_hooks, "hooks are gone after an error too"


def test_full_precision_widens_half_only():
    with Taps(net := Net().bfloat16(), {"x": "second"}).record() as seen:
        net(torch.zeros(1, 3, dtype=torch.bfloat16))
    assert full_precision(seen["x"]).feat.dtype == torch.float32
    seen["x"].feat = seen["x"].feat.double()
    assert full_precision(seen["x"]).feat.dtype == torch.float64
