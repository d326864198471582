"""PLY files against a writer of plain loops; the written ones against a reader of plain loops."""

import struct

import numpy as np
import pytest

from pointcept_kd.data.clouds import read_points, write_ply

from .test_clouds import POINTS, check, error

FORMATS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
CODES = {"float": "f", "double": "d", "uchar": "B", "int": "i", "short": "h", "int8": "b", "float32": "f"}  # fmt: skip


def write(path, form, elements, end="\n"):
    """Elements are (name, [(type, name) or ((length type, type), name)], rows); a list is one value of a row."""
    lines = ["ply", f"format {form} 1.0", "comment made by hand"]
    body = b""
    for name, properties, rows in elements:
        lines.append(f"element {name} {len(rows)}")
        for kind, title in properties:
            words = f"list {kind[0]} {kind[1]}" if isinstance(kind, tuple) else kind
            lines.append(f"property {words} {title}")
        for row in rows:
            words = []
            for (kind, _), value in zip(properties, row):
                pairs = (
                    [(kind[0], len(value)), *((kind[1], v) for v in value)]
                    if isinstance(kind, tuple)
                    else [(kind, value)]
                )
                for code, number in pairs:
                    words.append(str(number))
                    if FORMATS[form]:
                        body += struct.pack(FORMATS[form] + CODES[code], number)
            if not FORMATS[form]:
                body += (" ".join(words) + end).encode()
    path.write_bytes(end.join([*lines, "end_header", ""]).encode() + body)
    return path


XYZI = [("float", "x"), ("float", "y"), ("float", "z"), ("float", "intensity")]
ROWS = [p[:4] for p in POINTS]
FACES = ("face", [(("uchar", "int"), "vertex_indices")], [([0, 1, 2],), ([1, 2, 3],)])
UNEVEN = (
    "face",
    [(("uchar", "int"), "vertex_indices"), ("uchar", "flag")],
    [([0, 1], 3), ([], 4), ([2, 1, 3], 5)],
)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain(tmp_path, form, end):
    check(read_points(write(tmp_path / "a.ply", form, [("vertex", XYZI, ROWS)], end)))


@pytest.mark.parametrize("form", FORMATS)
def test_other_properties_are_skipped(tmp_path, form):
    properties = [
        ("uchar", "red"), ("double", "z"), ("short", "ring"), ("float32", "x"), ("double", "y"),
        ("uchar", "red"), ("double", "scalar_Reflectance"), ("int8", "time"),
    ]  # fmt: skip
    rows = [(255, p[2], p[4], p[0], p[1], 7, p[3], -5) for p in POINTS]
    check(read_points(write(tmp_path / "a.ply", form, [("vertex", properties, rows)])))


@pytest.mark.parametrize("form", FORMATS)
def test_no_intensity(tmp_path, form):
    rows = [p[:3] for p in POINTS]
    got = read_points(write(tmp_path / "a.ply", form, [("vertex", XYZI[:3], rows)]))
    check(got, strength=False)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("faces", [FACES, UNEVEN], ids=["triangles", "uneven"])
@pytest.mark.parametrize("first", [True, False])
def test_other_elements_are_skipped(tmp_path, form, faces, first):
    vertices = ("vertex", XYZI, ROWS)
    edges = ("edge", [("int", "a"), ("short", "b")], [(1, 2), (3, 4)])
    empty = ("nothing", [(("int", "float"), "values")], [])
    elements = [faces, edges, empty, vertices] if first else [vertices, faces, edges, empty]
    check(read_points(write(tmp_path / "a.ply", form, elements)))


@pytest.mark.parametrize("form", ["binary_little_endian", "binary_big_endian"])
def test_lists_of_one_length_among_the_vertices(tmp_path, form):
    properties = [*XYZI[:2], (("uchar", "double"), "normal"), *XYZI[2:]]
    rows = [(p[0], p[1], [0.0, 0.5, 1.0], p[2], p[3]) for p in POINTS]
    path = write(tmp_path / "a.ply", form, [("vertex", properties, rows)])
    check(read_points(path))
    uneven = [(*row[:2], row[2][: i + 1], *row[3:]) for i, row in enumerate(rows[:3])]
    write(path, form, [("vertex", properties, uneven)])
    assert "lists of different lengths" in error(path)


def test_lists_among_vertices_in_text(tmp_path):
    properties = [*XYZI, (("uchar", "double"), "normal")]
    rows = [(*p[:4], [0.0, 1.0]) for p in POINTS]
    path = write(tmp_path / "a.ply", "ascii", [("vertex", properties, rows)])
    assert "the vertices hold lists" in error(path)


def test_cut_off(tmp_path):
    for form in FORMATS:
        path = write(tmp_path / "a.ply", form, [("vertex", XYZI, ROWS)])
        whole = path.read_bytes()
        path.write_bytes(whole[:-6])
        assert "cut off or damaged" in error(path)
        path.write_bytes(whole[:40])
        assert "the header has no end" in error(path)
    path = write(tmp_path / "a.ply", "binary_big_endian", [UNEVEN, ("vertex", XYZI, ROWS)])
    whole = path.read_bytes()
    start = whole.index(b"end_header\n") + 11
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        assert "cut off or damaged" in error(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("vertex 4", "vertex 5", "cut off or damaged"),
        ("vertex 4", "vertex 999999999999", "cut off or damaged"),
        ("vertex 4", "vertex 99999999999999999999", "expected a whole number"),
        ("vertex 4", "vertex -4", "expected a whole number"),
        ("vertex 4", "vertex", "is not PLY 1.0"),
        ("vertex 4", "points 4", "no element vertex among points"),
        ("vertex 4", "vertex 0", "no points"),
        ("float y", "float v", "no y among its fields x, v, z, intensity"),
        ("float y", "quad y", "header line 'property quad y' is not PLY 1.0"),
        ("float y", "list uchar y", "is not PLY 1.0"),
        ("format", "shape", "is not PLY 1.0"),
        (" 1.0\n", "_pdp 1.0\n", "is not PLY 1.0"),
        ("ply\n", "pol\n", "does not begin with 'ply'"),
        ("end_header", "property float w\nend_header", "cut off or damaged"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_headers_that_lie(tmp_path, form, old, new, said):
    path = write(tmp_path / "a.ply", form, [("vertex", XYZI, ROWS)])
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    assert said in error(path)


def test_a_header_without_format(tmp_path):
    path = write(tmp_path / "a.ply", "ascii", [("vertex", XYZI, ROWS)])
    path.write_bytes(path.read_bytes().replace(b"format ascii 1.0\n", b""))
    assert "no format line" in error(path)


@pytest.mark.parametrize("word", ["ten", "1e", "9" * 100])
def test_words_that_are_no_numbers(tmp_path, word):
    path = write(tmp_path / "a.ply", "ascii", [("vertex", XYZI, ROWS)])
    path.write_bytes(path.read_bytes().replace(b"30.5", word.encode()))
    assert error(path).startswith(f"point 2, x: '{word[:40]}' is no number")


# ------------------------------------------------------------------------------------------ writing


def test_written_files(tmp_path):
    path = tmp_path / "a.ply"
    coord = np.array([p[:3] for p in POINTS])
    rgb = np.array([(0, 128, 255), (1, 2, 3), (4, 5, 6), (7, 8, 9)])
    label, strength = np.array([3, -1, 18, 0]), np.array([[p[3]] for p in POINTS])
    write_ply(path, coord, rgb, label, strength)
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert header.decode().splitlines() == [
        "ply", "format binary_little_endian 1.0", "element vertex 4",
        "property float x", "property float y", "property float z",
        "property uchar red", "property uchar green", "property uchar blue",
        "property float intensity", "property int label",
    ]  # fmt: skip
    expected = [
        struct.pack("<fffBBBfi", *p[:3], *map(int, c), p[3], int(k))
        for p, c, k in zip(POINTS, rgb, label)
    ]
    assert body == b"".join(expected)
    check(read_points(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ply"]
    write_ply(path, coord)
    check(read_points(path), strength=False)


def test_arrays_of_different_lengths(tmp_path):
    with pytest.raises(ValueError, match="label has 3 rows, coord 4"):
        write_ply(tmp_path / "a.ply", np.zeros((4, 3)), label=np.zeros(3, int))
    assert not list(tmp_path.iterdir())
