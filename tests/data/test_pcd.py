"""PCD files against a writer of plain loops, and LZF against a packer written from its description."""

import struct

import numpy as np
import pytest

from pointcept_kd.data.clouds import read_points
from pointcept_kd.data.pcd import lzf_decompress

from .test_clouds import POINTS, check, error

CODES = {
    "F4": "f", "F8": "d", "U1": "B", "U2": "H", "U4": "I", "U8": "Q", "I1": "b", "I2": "h", "I4": "i", "I8": "q",
}  # fmt: skip
KINDS = ("ascii", "binary", "binary_compressed")


def lzf(data: bytes) -> bytes:
    """Pack greedily: the longest repetition of at least three bytes within reach, else a literal byte."""
    out, literal, at = b"", b"", 0

    def flush():
        nonlocal out, literal
        while literal:
            piece, literal = literal[:32], literal[32:]
            out += bytes([len(piece) - 1]) + piece

    while at < len(data):
        best, distance = 0, 0
        for back in range(1, min(at, 8192) + 1):
            length = 0
            while (
                length < 264
                and at + length < len(data)
                and data[at + length] == data[at - back + length]
            ):
                length += 1
            if length > best:
                best, distance = length, back
        if best < 3:
            literal += data[at : at + 1]
            at += 1
            continue
        flush()
        high, low = divmod(distance - 1, 256)
        if best - 2 < 7:
            out += bytes([(best - 2) << 5 | high, low])
        else:
            out += bytes([7 << 5 | high, best - 2 - 7, low])
        at += best
    flush()
    return out


def write(path, kind, fields, points, packed=lzf, **changes):
    """Fields are (name, type, count); a field of a larger count is a tuple in the row."""
    header = {
        "VERSION": "0.7",
        "FIELDS": " ".join(name for name, _, _ in fields),
        "SIZE": " ".join(form[1] for _, form, _ in fields),
        "TYPE": " ".join(form[0] for _, form, _ in fields),
        "COUNT": " ".join(str(count) for _, _, count in fields),
        "WIDTH": str(len(points)),
        "HEIGHT": "1",
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": str(len(points)),
        "DATA": kind,
        **changes,
    }
    rows = [[v if isinstance(v, tuple) else (v,) for v in point] for point in points]
    cells = [
        [b"".join(struct.pack("<" + CODES[form], x) for x in v) for (_, form, _), v in zip(fields, row)]
        for row in rows
    ]  # fmt: skip
    if kind == "ascii":
        body = "".join(" ".join(str(x) for v in row for x in v) + "\n" for row in rows).encode()
    elif kind == "binary":
        body = b"".join(b"".join(row) for row in cells)
    else:
        raw = b"".join(row[i] for i in range(len(fields)) for row in cells)
        small = packed(raw)
        body = struct.pack("<II", len(small), len(raw)) + small
    lines = [f"{key} {value}" for key, value in header.items() if value is not None]
    path.write_bytes("\n".join(["# .PCD v0.7", *lines, ""]).encode() + body)
    return path


XYZI = [("x", "F4", 1), ("y", "F4", 1), ("z", "F4", 1), ("intensity", "F4", 1)]
ROWS = [p[:4] for p in POINTS]
MIXED = [
    ("_", "U1", 3), ("z", "F8", 1), ("ring", "U2", 1), ("x", "F4", 1), ("_", "U1", 1), ("y", "F8", 1),
    ("descriptor", "F4", 2), ("Intensity", "U1", 1), ("t", "I8", 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_plain(tmp_path, kind):
    check(read_points(write(tmp_path / "a.pcd", kind, XYZI, ROWS)))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_types_sizes_and_counts(tmp_path, kind):
    rows = [((1, 2, 3), p[2], p[4], p[0], 9, p[1], (0.5, -1.0), p[4] * 8, -(2**40)) for p in POINTS]
    got = read_points(write(tmp_path / "a.pcd", kind, MIXED, rows))
    check(got, [(*p[:3], p[4] * 8) for p in POINTS])


@pytest.mark.parametrize("kind", KINDS)
def test_no_intensity_and_no_count(tmp_path, kind):
    path = write(tmp_path / "a.pcd", kind, XYZI[:3], [p[:3] for p in POINTS], COUNT=None)
    check(read_points(path), strength=False)


def test_an_organised_cloud_with_holes(tmp_path):
    rows = [POINTS[0][:4], (float("nan"),) * 4, POINTS[1][:4], POINTS[2][:4]]
    for kind in KINDS:
        path = write(
            tmp_path / "a.pcd", kind, XYZI, rows, WIDTH="2", HEIGHT="2", POINTS=None, VERSION=".7"
        )
        got = read_points(path)
        check(got, POINTS[:3])
        assert got["kept"].tolist() == [True, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"POINTS": "5"}, "cut off or damaged"),
        ({"POINTS": "999999999999"}, "cut off or damaged"),
        ({"POINTS": "four"}, "POINTS is 'four'"),
        ({"POINTS": None, "WIDTH": None}, "no POINTS line"),
        ({"FIELDS": "x y depth intensity"}, "no z among its fields"),
        ({"FIELDS": "x y z"}, "3 FIELDS but 4 entries under SIZE"),
        ({"FIELDS": None}, "no FIELDS line"),
        ({"TYPE": "F F F"}, "4 FIELDS but 3 entries under TYPE"),
        ({"SIZE": "4 4 4 3"}, "field intensity has TYPE F and SIZE 3"),
        ({"COUNT": "1 1 1 0"}, "COUNT of intensity is '0'"),
        ({"COUNT": "1 1 1 99999999"}, "COUNT of intensity is '99999999'"),
        ({"COUNT": "1 1 1 2"}, "cut off or damaged"),
        ({"DATA": None}, "no end"),
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, kind, changes, said):
    path = write(tmp_path / "a.pcd", kind, XYZI, ROWS, **changes)
    assert said in error(path)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_everywhere(tmp_path, kind):
    path = write(tmp_path / "a.pcd", kind, XYZI, ROWS)
    whole = path.read_bytes()
    # A text file without its last line end is whole, and half of a last number is a number.
    last = len(whole) - (5 if kind == "ascii" else 0)
    for length in range(1, last):
        path.write_bytes(whole[:length])
        error(path)


def test_no_points_and_another_form(tmp_path):
    assert "no points" in error(write(tmp_path / "a.pcd", "binary", XYZI, []))
    path = write(tmp_path / "a.pcd", "binary", XYZI, ROWS, DATA="zipped")
    assert "DATA zipped; expected ascii, binary or binary_compressed" in error(path)


# --------------------------------------------------------------------------------------------- LZF


def test_lzf_by_hand():
    assert lzf_decompress(bytes([2]) + b"abc", 3) == b"abc"
    # Four literals; a copy of 3 from distance 4; a copy of 1 + 7 + 2 = 10 from distance 1, into itself.
    packed = bytes([3]) + b"abcd" + bytes([1 << 5, 3]) + bytes([7 << 5, 1, 0])
    assert lzf_decompress(packed, 17) == b"abcdabc" + b"c" * 10


@pytest.mark.parametrize("seed", range(6))
def test_lzf_gives_back_what_was_packed(seed):
    generator = np.random.default_rng(seed)
    symbols = [1, 2, 3, 20, 256, 7][seed]
    data = generator.integers(0, symbols, 700).astype(np.uint8).tobytes()
    far = data + bytes(generator.integers(0, 256, 300).astype(np.uint8)) + data
    packed = lzf(far)
    assert lzf_decompress(packed, len(far)) == far
    with pytest.raises(ValueError, match="end early|instead of"):
        lzf_decompress(packed[:-1], len(far))
    with pytest.raises(ValueError, match="instead of"):
        lzf_decompress(packed, len(far) + 1)


def test_lzf_from_a_great_distance():
    data = b"needle" + bytes(range(256)) * 30 + b"needle"
    assert lzf_decompress(lzf(data), len(data)) == data


def test_lzf_that_is_damaged(tmp_path):
    with pytest.raises(ValueError, match="before their beginning"):
        lzf_decompress(bytes([0]) + b"a" + bytes([1 << 5, 1]), 4)
    path = write(tmp_path / "a.pcd", "binary_compressed", XYZI, ROWS, lambda raw: bytes([255] * 40))
    assert "before their beginning" in error(path)
