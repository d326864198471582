"""farthest_point_sampling: a loop as oracle, with fpsample and without."""

import numpy as np
import pointops
import pytest
import torch
from pointops import _brute, _cpu, sampling

from . import oracles


@pytest.fixture(params=["numpy", "fpsample", "torch"])
def sample(request, monkeypatch):
    """One of the implementations behind the same function."""
    if request.param == "fpsample":
        pytest.importorskip("fpsample", reason="fpsample is not installed (extra fast)")
        loop = _cpu._farthest_loop

        def only_for_one(cloud, count):
            assert len(cloud) == 1, "fpsample has to answer itself, without a quiet fall back"
            return loop(cloud, count)

        monkeypatch.setattr(_cpu, "_farthest_loop", only_for_one)
    elif request.param == "numpy":
        monkeypatch.setattr(_cpu, "_optional", lambda name: None)
    else:
        monkeypatch.setattr(sampling, "backend", lambda points: _brute)
    return request.param


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([40, 30], [10, 7]),
        ([2, 25, 2], [2, 25, 1]),
        ([0, 20, 5], [0, 6, 0]),
        ([64], [64]),
        ([0], [0]),
    ],
)
def test_samples_are_those_of_the_loop(sample, lengths, counts):
    offset, new_offset = (torch.tensor(v).cumsum(0).int() for v in (lengths, counts))
    xyz = torch.randn(sum(lengths), 3)
    picks = pointops.farthest_point_sampling(xyz, offset, new_offset)
    assert picks.dtype == torch.int32
    assert picks.tolist() == oracles.farthest(xyz, offset.tolist(), new_offset.tolist())


@pytest.mark.parametrize("stretch", [(1, 1, 1), (30, 0.1, 5), (0, 1, 0)])
@pytest.mark.parametrize("n", [3, 50, 3000])
def test_start_is_the_first_row_in_clouds_of_any_shape(sample, stretch, n):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        xyz = torch.randn(n, 3, generator=g) * torch.tensor(stretch)
        count = min(n, 40)
        picks = pointops.farthest_point_sampling(xyz, torch.tensor([n]), torch.tensor([count]))
        assert picks[0] == 0
        # Every pick is as far from the earlier ones as any point is.
        reach = torch.cdist(xyz[picks[:1].long()], xyz)[0]
        for pick in picks[1:].long():
            assert reach[pick] >= reach.max() * (1 - 1e-5)
            reach = torch.minimum(reach, torch.cdist(xyz[pick[None]], xyz)[0])


def test_more_samples_than_points_repeat_the_first(sample):
    xyz = torch.randn(9, 3)
    picks = pointops.farthest_point_sampling(xyz, torch.tensor([1, 9]), torch.tensor([3, 14]))
    assert picks[:3].tolist() == [0, 0, 0]
    assert sorted(picks[3:11].tolist()) == list(range(1, 9))
    assert picks[3] == 1
    assert picks[11:].tolist() == [1, 1, 1]


def test_every_place_is_taken_before_one_comes_twice(sample):
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    xyz = torch.cat((grid, grid))
    picks = pointops.farthest_point_sampling(xyz, torch.tensor([54]), torch.tensor([54])).long()
    assert len(xyz[picks[:27]].unique(dim=0)) == 27
    if sample != "fpsample":  # there, ties fall as its tree has it
        assert picks.tolist() == oracles.farthest(xyz, [54], [54])
        assert (picks[27:] == 0).all()


def test_one_place_many_times(sample):
    picks = pointops.farthest_point_sampling(
        torch.ones(20, 3), torch.tensor([20]), torch.tensor([4])
    )
    assert picks[0] == 0
    assert len(picks) == 4


def test_columns_after_the_third_are_not_looked_at(sample):
    wide = torch.randn(60, 6)  # Pointcept's ModelNet gives positions and normals in one tensor
    ends = torch.tensor([60]), torch.tensor([10])
    picks = pointops.farthest_point_sampling(wide, *ends)
    assert picks.tolist() == oracles.farthest(wide[:, :3], [60], [10])


def test_double_is_sampled_in_double(monkeypatch):
    # 1 + 1e-9 is 1 in float32: only in float64 is row 2 the farther one.
    xyz = torch.tensor([[0, 0, 0], [1, 0, 0], [-1 - 1e-9, 0, 0]], dtype=torch.float64)
    picks = pointops.farthest_point_sampling(xyz, torch.tensor([3]), torch.tensor([2]))
    assert picks.tolist() == [0, 2]


def test_a_start_elsewhere_is_not_taken_over(monkeypatch):
    pytest.importorskip("fpsample", reason="fpsample is not installed (extra fast)")
    xyz = torch.randn(500, 3)
    right = pointops.farthest_point_sampling(xyz, torch.tensor([500]), torch.tensor([20]))
    place = _cpu._place_of_first(xyz.numpy(), 3)
    monkeypatch.setattr(_cpu, "_place_of_first", lambda cloud, height: (place + 1) % 500)
    again = pointops.farthest_point_sampling(xyz, torch.tensor([500]), torch.tensor([20]))
    np.testing.assert_array_equal(right, again)


@pytest.mark.parametrize(
    ("offset", "new_offset", "message"),
    [
        ([0, 6], [1, 3], "scan 0 is empty, but 1 samples"),
        ([3, 6], [3], "offset has 2 scans, new_offset has 1"),
        ([3, 6], [3, 2], "new_offset must not decrease"),
        ([3, 5], [1, 2], "ends at 5, but there are 6"),
    ],
)
def test_bad_input_is_named(offset, new_offset, message):
    with pytest.raises(ValueError, match=message):
        pointops.farthest_point_sampling(
            torch.rand(6, 3), torch.tensor(offset), torch.tensor(new_offset)
        )


@pytest.mark.parametrize("shape", [(6, 2), (6,), (2, 3, 3)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"xyz must be floating point and \(n, 3\)"):
        pointops.farthest_point_sampling(torch.rand(shape), torch.tensor([6]), torch.tensor([2]))
