"""What the readers share: files by bytes written here, tables by plain loops, every refusal by its words."""

import logging
import math
import pickle
import struct

import numpy as np
import pytest

from pointcept_kd.data import scans
from pointcept_kd.host import InputError


def test_points_and_values_are_what_was_packed(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<6f", 1, 2, 3, math.nan, 5, -0.5))
    points = scans.read_points(path, 3, "test scan")
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, [[1, 2, 3], [math.nan, 5, -0.5]])
    path.write_bytes(struct.pack("<3I", 1, 1 << 31, 70000))
    values = scans.read_values(path, "<u4", 3)
    assert values.dtype == np.uint32
    assert values.tolist() == [1, 1 << 31, 70000]
    values[0] = 7  # the caller's own
    assert scans.read_values(path, np.uint8, None).tolist() == list(path.read_bytes())


@pytest.mark.parametrize(
    ("content", "read", "text"),
    [
        (None, lambda p: scans.read_bytes(p), r"cannot be read \(No such file"),
        (b"", lambda p: scans.read_points(p, 4, "test scan"), "the scan has no points"),
        (
            b"0" * 33,
            lambda p: scans.read_points(p, 4, "test scan"),
            "33 bytes are no whole number of points of 16 bytes; the file is cut off or no test scan",
        ),
        (b"0" * 8, lambda p: scans.read_values(p, "<u4", 3), "8 bytes .* expected 12 for 3 points"),
        (b"0" * 7, lambda p: scans.read_values(p, "<u2", None), "7 bytes .* expected 2 bytes each"),
        (b"\xff\xfe", lambda p: scans.read_rows(p), "not a text file"),
        (b"0", lambda p: scans.numbers_of_row(p, 4, " 1 x\n", 2), "row 4 .* 2 finite .* '1 x'"),
    ],
)
def test_refusals_name_the_file(tmp_path, content, read, text):
    path = tmp_path / "some.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"some\.file: .*{text}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_rows_keep_their_numbers(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\nP: 1 2\n  \t\r\nlast")
    assert scans.read_rows(path) == [(1, "P: 1 2"), (3, "last")]


@pytest.mark.parametrize("words", ["1 2", "1 2 3 4", "1 2 nan", "1 2 -inf", "1 2 x", ""])
def test_anything_but_three_finite_numbers_is_none(words):
    assert scans.finite_numbers(words.split(), 3) is None


def test_finite_numbers():
    np.testing.assert_array_equal(scans.finite_numbers(["1e2", "-3", ".5"], 3), [100, -3, 0.5])


def test_classes_against_a_loop():
    train_ids = {0: -1, 3: 0, 7: 2, 200: 1}
    table = scans.class_table(train_ids, 256)
    ids = np.random.default_rng(0).choice(list(train_ids), 50).astype(np.uint8)
    mapped = scans.map_classes(ids, table, "listed", ignore_index=99)
    assert mapped.dtype == np.int32
    assert mapped.tolist() == [99 if train_ids[i] < 0 else train_ids[i] for i in ids.tolist()]
    ids[[4, 9]] = 5, 6
    with pytest.raises(ValueError, match=r"^class id 5 in row 4 is not listed \(2 such points\)$"):
        scans.map_classes(ids, table, "listed", -1)


def test_a_file_is_named_once():
    with (
        pytest.raises(InputError, match="^a.label: no class; .*another data set"),
        scans.in_file("a.label"),
    ):
        raise ValueError("no class")
    with pytest.raises(InputError, match="^a.label: cut off$"), scans.in_file("a.label"):
        raise InputError("a.label: cut off")
    with pytest.raises(KeyError), scans.in_file("a.label"):
        raise KeyError("not about the content")


def test_rows_that_are_not_finite():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    for drop in (True, False):
        assert np.array_equal(values[scans.finite_rows("a.bin", values, drop)], values)
    assert scans.nonfinite_problems("a.bin", values) == []
    values[1, 2], values[3, 0] = np.nan, np.inf
    assert values[scans.finite_rows("a.bin", values, True), 0].tolist() == [0, 6]
    with pytest.raises(
        InputError, match=r"a.bin: row 1 is not finite \[3.0, 4.0, nan\], 2 of 4 points; wash it"
    ):
        scans.finite_rows("a.bin", values, False, remedy="wash it")
    assert scans.nonfinite_problems("a.bin", values) == [
        "a.bin: 2 points are not finite, the first in row 1"
    ]
    with pytest.raises(InputError, match="a.bin: all 1 points are not finite"):
        scans.finite_rows("a.bin", values[1:2], True)


def test_choices():
    scans.require_choice("nonfinite", "drop", scans.NONFINITE)
    with pytest.raises(InputError, match="^nonfinite=True: use 'error' or 'drop'$"):
        scans.require_choice("nonfinite", True, scans.NONFINITE)


def test_a_warning_is_given_once_in_every_process(caplog):
    warn = scans.WarnOnce(logging.getLogger("a.reader"))
    elsewhere = pickle.loads(pickle.dumps(warn))
    for case in (warn, warn, elsewhere):
        case("%s is missing, so %s", "x", "y")
    assert [r.getMessage() for r in caplog.records] == ["x is missing, so y"] * 2
    assert {r.name for r in caplog.records} == {"a.reader"}
