"""Labels of pixels as labels that an evaluator compares."""

import numpy as np
import pytest
import torch

from pointcept_kd.data.image_labels import WeakLabelsToSegment
from pointcept_kd.host import InputError
from pointcept_kd.host.loader import Compose

LABELS = [[[0, 3], [1, 0]], [[2, 2], [0, 1]]]


@pytest.mark.parametrize("make", [lambda x: np.array(x, np.uint8), torch.tensor])
def test_all_pixels_in_order(make):
    given = make(LABELS)
    data = Compose([dict(type="kd.WeakLabelsToSegment")])(dict(weak_labels=given, name="a"))
    assert type(data["segment"]) is type(given)
    assert data["segment"].dtype in (np.int64, torch.int64)
    assert data["segment"].tolist() == [-1, 2, 0, -1, 1, 1, -1, 0]
    assert data["weak_labels"].tolist() == LABELS


def test_points_leave_the_sample():
    """Else `Collect` would compare the number of pixels with that of points."""
    points = dict(coord=np.zeros((3, 3)), segment=np.zeros(3), point_id=np.arange(3))
    given = dict(
        points, weak_labels=np.array(LABELS), index_valid_keys=["coord", "segment", "point_id"]
    )
    chain = [
        dict(type="kd.WeakLabelsToSegment"),
        dict(type="ToTensor"),
        dict(
            type="Collect",
            keys=("weak_labels", "segment"),
            offset_keys_dict=dict(offset="segment"),
        ),
    ]
    data = Compose(chain)(given)
    assert set(data) == {"weak_labels", "segment", "offset"}
    assert data["offset"].tolist() == [8]
    assert len(data["segment"]) == 8


def test_bad_input():
    with pytest.raises(InputError, match="weak_labels"):
        WeakLabelsToSegment()(dict(segment=np.zeros(3)))
