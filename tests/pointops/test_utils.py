"""The grouped queries and the offset helpers."""

import inspect

import pointops
import pytest
import torch

from . import oracles


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(sum(lengths), 3, generator=g), torch.tensor(lengths).cumsum(0).int()


def test_knn_query_and_group_is_the_two_calls():
    (xyz, offset), (new_xyz, new_offset) = batch([6, 2]), batch([3, 2], 1)
    feat = torch.rand(8, 4)
    out, idx = pointops.knn_query_and_group(
        feat, xyz, offset, new_xyz, new_offset, nsample=3, with_xyz=True
    )
    assert torch.equal(idx, pointops.knn_query(3, xyz, offset, new_xyz, new_offset)[0])
    assert torch.equal(out, pointops.grouping(idx, feat, xyz, new_xyz, True))
    again, same = pointops.knn_query_and_group(feat, xyz, new_xyz=new_xyz, idx=idx)
    assert same is idx
    assert torch.equal(again, out[..., 3:])
    assert (out[3:, 2] == 0).all()  # the second scan has two points only


def test_ball_query_and_group_is_the_two_calls():
    xyz, offset = batch([6, 2])
    feat = torch.rand(8, 4)
    out, idx = pointops.ball_query_and_group(
        feat, xyz, offset, max_radio=0.5, min_radio=0.1, nsample=3, with_xyz=True
    )
    assert torch.equal(idx, pointops.ball_query(3, 0.5, 0.1, xyz, offset)[0])
    assert torch.equal(out, pointops.grouping(idx, feat, xyz, None, True))


@pytest.mark.parametrize("lengths", [[9, 12], [4, 1], [2, 7]])
@pytest.mark.parametrize("dilation", [0, 1])
@pytest.mark.parametrize("nsample", [1, 3])
def test_query_and_group_takes_every_so_many(lengths, dilation, nsample):
    (xyz, offset), (new_xyz, new_offset) = batch(lengths), batch([3, 2], 1)
    ends, new_ends = offset.tolist(), new_offset.tolist()
    feat = torch.rand(len(xyz), 2)
    out, idx = pointops.query_and_group(
        nsample, xyz, new_xyz, feat, None, offset, new_offset, dilation
    )
    assert out.shape == (5, nsample, 5)
    assert idx.dtype == torch.int32
    for row in range(5):
        near = oracles.by_distance(row, new_xyz, new_ends, xyz, ends)
        wanted = 1 + (nsample - 1) * (dilation + 1)
        for slot in range(nsample):
            place = slot * (dilation + 1)
            if len(near) < wanted:
                place = int(slot * (len(near) - 1) / (nsample - 1) + 1e-9)
            i = near[place][1]
            assert idx[row, slot] == i
            torch.testing.assert_close(out[row, slot, :3], xyz[i] - new_xyz[row])
            assert torch.equal(out[row, slot, 3:], feat[i])


def test_query_and_group_in_its_other_forms():
    xyz, offset = batch([5, 6])
    feat = torch.rand(11, 2)
    arguments = (3, xyz, None, feat, None, offset, None)
    out, idx = pointops.query_and_group(*arguments)
    assert torch.equal(pointops.query_and_group(*arguments, with_feat=False), idx)
    assert torch.equal(pointops.query_and_group(*arguments, with_xyz=False)[0], out[..., 3:])
    assert torch.equal(idx, pointops.knn_query(3, xyz, offset)[0])
    idx[2, 1] = -1
    given, same = pointops.query_and_group(3, xyz, xyz, feat, idx, offset, offset)
    assert same is idx
    assert (given[2, 1] == 0).all()
    assert torch.equal(given[3:], out[3:])


def test_query_and_group_beside_an_empty_scan():
    (xyz, offset), (new_xyz, new_offset) = batch([0, 4]), batch([2, 2], 1)
    out, idx = pointops.query_and_group(2, xyz, new_xyz, torch.ones(4, 1), None, offset, new_offset)
    assert (idx[:2] == -1).all()
    assert (out[:2] == 0).all()
    assert (out[2:, :, 3] == 1).all()


@pytest.mark.parametrize("lengths", [[3, 2], [1], [2, 0, 3], [0, 2], []])
def test_offsets_and_batches(lengths):
    offset = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    scans = [scan for scan, n in enumerate(lengths) for _ in range(n)]
    batch = pointops.offset2batch(offset)
    assert batch.dtype == torch.int64
    assert batch.tolist() == scans
    back = pointops.batch2offset(batch)
    assert back.dtype == torch.int32
    assert back.tolist() == offset.tolist()


def test_batch_in_any_order():
    assert pointops.batch2offset(torch.tensor([2, 0, 2])).tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pointops.batch2offset(torch.tensor([0, -1])), "batch must be 0 or more, got -1"),
        (lambda: pointops.batch2offset(torch.rand(3)), "batch must be a vector of whole numbers"),
        (lambda: pointops.offset2batch(torch.tensor([3, 2])), "offset must not decrease"),
        (
            lambda: pointops.knn_query_and_group(torch.rand(3, 1), torch.rand(3, 3)),
            "give idx, or nsample and offset",
        ),
        (
            lambda: pointops.ball_query_and_group(
                torch.rand(3, 1), torch.rand(3, 3), torch.tensor([3]), nsample=2
            ),
            "give idx, or nsample, offset and max_radio",
        ),
        (
            lambda: pointops.query_and_group(
                2, torch.rand(3, 3), None, torch.rand(3, 1), None, torch.tensor([3]), None, -1
            ),
            "dilation must not be negative",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_parameters_and_defaults_are_those_of_pointcept():
    ball = "nsample max_radius min_radius xyz offset new_xyz=None new_offset=None"
    group = "feat xyz offset=None new_xyz=None new_offset=None idx=None"
    parameters = {
        "knn_query": "nsample xyz offset new_xyz=None new_offset=None",
        "ball_query": ball,
        "random_ball_query": ball,
        "farthest_point_sampling": "xyz offset new_offset",
        "grouping": "idx feat xyz new_xyz=None with_xyz=False",
        "grouping2": "input idx",
        "interpolation": "xyz new_xyz feat offset new_offset k=3",
        "interpolation2": "xyz new_xyz input offset new_offset k=3",
        "subtraction": "input1 input2 idx",
        "aggregation": "input position weight idx",
        "attention_relation_step": "query key weight index_target index_refer",
        "attention_fusion_step": "weight value index_target index_refer",
        "query_and_group": "nsample xyz new_xyz feat idx offset new_offset dilation=0 "
        "with_feat=True with_xyz=True",
        "knn_query_and_group": f"{group} nsample=None with_xyz=False",
        "ball_query_and_group": f"{group} max_radio=None min_radio=0 nsample=None with_xyz=False",
        "offset2batch": "offset",
        "batch2offset": "batch",
    }
    assert set(pointops.__all__) == set(parameters)
    for name, wanted in parameters.items():
        found = inspect.signature(getattr(pointops, name)).parameters.values()
        assert [str(p.replace(annotation=p.empty)) for p in found] == wanted.split()
