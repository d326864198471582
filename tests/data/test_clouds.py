"""Point cloud files: every format against a writer of plain loops, and what is said about bad files."""

import struct

import numpy as np
import pytest

from pointcept_kd.data.clouds import read_points
from pointcept_kd.host import InputError

# What every file below holds: x, y, z, intensity, and the laser that saw the point.
POINTS = [
    (1.5, -2.25, 0.125, 0.5, 3),
    (-4.0, 8.0, -1.75, 0.25, 0),
    (30.5, -0.5, 2.0, 0.0, 31),
    (0.0, 16.0, -0.0625, 1.0, 7),
]


def check(got, points=POINTS, strength=True):
    """Exactly these points; all numbers above are exact in float32."""
    assert got["coord"].dtype == np.float32
    assert got["coord"].tolist() == [list(p[:3]) for p in points]
    if strength:
        assert got["strength"].dtype == np.float32
        assert got["strength"].tolist() == [[p[3]] for p in points]
    else:
        assert got["strength"] is None


def error(path, **options):
    """The one line said about a bad file; it begins with the file."""
    with pytest.raises(InputError) as caught:
        read_points(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def write_bin(path, points, columns):
    path.write_bytes(b"".join(struct.pack("<f", v) for p in points for v in p[:columns]))
    return path


# --------------------------------------------------------------------------------------------- .bin


@pytest.mark.parametrize("count", [1, 3, 4])
def test_kitti_rows(tmp_path, count):
    check(read_points(write_bin(tmp_path / "a.bin", POINTS[:count], 4)), POINTS[:count])


@pytest.mark.parametrize("name", ["a.pcd.bin", "a.bin"])
@pytest.mark.parametrize("repeat", [1, 4])  # 4 x 4 points also make whole rows of 4 values
def test_nuscenes_rows(tmp_path, name, repeat):
    check(read_points(write_bin(tmp_path / name, POINTS * repeat, 5)), POINTS * repeat)


def test_five_points_of_four_values_are_no_four_points_of_five(tmp_path):
    points = [*POINTS, (2.0, 2.0, 2.0, 0.75, 1)]
    check(read_points(write_bin(tmp_path / "a.bin", points, 4)), points)


def test_columns_given(tmp_path):
    six = [(*p[:4], -1.0, 0.5) for p in POINTS]
    check(read_points(write_bin(tmp_path / "a.bin", six, 6), columns=6))
    check(read_points(write_bin(tmp_path / "b.bin", POINTS, 3), columns=3), strength=False)


def test_columns_that_cannot_be_guessed(tmp_path):
    # 20 points of 6 values: rows of 4 and of 5 would be whole, but have coordinates for intensities.
    six = [(1.0, -1.0, 2.0, 0.5, -3.0, -4.0)] * 20
    path = write_bin(tmp_path / "a.bin", six, 6)
    assert "--columns N" in error(path)
    assert len(read_points(path, columns=6)["coord"]) == 20


@pytest.mark.parametrize(("name", "size"), [("a.bin", 30), ("a.bin", 4), ("a.pcd.bin", 48)])
def test_a_size_that_fits_no_rows(tmp_path, name, size):
    path = tmp_path / name
    path.write_bytes(bytes(size))
    assert f"{size} bytes are no whole number of points" in error(path)


def test_columns_that_do_not_fit(tmp_path):
    path = write_bin(tmp_path / "a.bin", POINTS, 4)
    assert "no whole number of points of 7" in error(path, columns=7)
    assert "no x, y, z" in error(path, columns=2)


def test_real_scans(samples, tmp_path):
    kitti = sorted(samples.glob("semantickitti/dataset/sequences/*/velodyne/*.bin"))
    assert {len(read_points(path)["coord"]) * 16 == path.stat().st_size for path in kitti} == {True}
    path = next(samples.glob("nuscenes/samples/LIDAR_TOP/*.pcd.bin"))
    plain = tmp_path / "a.bin"  # its size fits rows of 4 and of 5, and no name says which
    plain.write_bytes(path.read_bytes())
    for file in (path, plain):
        got = read_points(file)
        assert len(got["coord"]) == 34688
        assert got["strength"].max() == 255


# --------------------------------------------------------------------------------------------- .npy


@pytest.mark.parametrize("width", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_arrays(tmp_path, width, dtype):
    path = tmp_path / "a.npy"
    np.save(path, np.array([p[:width] for p in POINTS], dtype))
    check(read_points(path), strength=width > 3)


def test_fortran_order_and_integers(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.asfortranarray([[1, 2, 3, 4], [5, 6, 7, 8]]))
    got = read_points(path)
    assert got["coord"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert got["strength"].tolist() == [[4], [8]]


def test_structured_arrays(tmp_path):
    names = ["ring", "Z", "Y", "x", "scalar_Intensity"]
    rows = np.array([(p[4], p[2], p[1], p[0], p[3]) for p in POINTS], [(n, "f4") for n in names])
    path = tmp_path / "a.npy"
    np.save(path, rows)
    check(read_points(path))
    np.save(path, rows[["ring", "Z", "Y", "x"]])
    check(read_points(path), strength=False)
    np.save(path, rows[["ring", "Y", "x"]])
    assert "no z among its fields ring, Y, x" in error(path)


@pytest.mark.parametrize(
    "array",
    [np.zeros(4), np.zeros((4, 2)), np.zeros((2, 4, 3)), np.zeros((4, 3), complex), np.array([["a"] * 3])],
    ids=lambda array: f"{array.shape}{array.dtype.kind}",
)  # fmt: skip
def test_arrays_of_another_shape(tmp_path, array):
    path = tmp_path / "a.npy"
    np.save(path, array)
    assert "expected numbers (n, 3) or (n, 4)" in error(path)


def test_arrays_that_are_none(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 3)))
    path.write_bytes(path.read_bytes()[:-8])
    assert "not a readable .npy array" in error(path)
    path.write_bytes(b"not an array at all")
    assert "not a readable .npy array" in error(path)
    np.save(path, np.array([{}], object), allow_pickle=True)
    assert "not a readable .npy array" in error(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros((4, 3)))
    assert "archive of several arrays" in error(path)
    np.save(path, np.zeros(3, [(axis, "f4", (2,)) for axis in "xyz"]))
    assert "expected one number per point" in error(path)


# ------------------------------------------------------------------------------------- every format


def test_points_that_are_not_finite_are_dropped(tmp_path):
    rows = np.array([p[:4] for p in POINTS] * 2)
    rows[1, 2], rows[4, 0], rows[6, 3], rows[7, 1] = np.nan, np.inf, -np.inf, 1e39
    path = tmp_path / "a.npy"
    np.save(path, rows)
    got = read_points(path)
    assert got["dropped"] == 4
    assert got["kept"].tolist() == [True, False, True, True, False, True, False, False]
    check(got, [POINTS[0], POINTS[2], POINTS[3], POINTS[1]])
    np.save(path, np.full((5, 3), np.nan))
    assert "none of its 5 points is finite" in error(path)


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".ply", ".pcd"])
def test_files_without_content(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert "cannot be read (No such file or directory)" in error(path)
    path.touch()
    assert "the file is empty" in error(path)


def test_arrays_without_points(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((0, 4)))
    assert "no points" in error(path)


@pytest.mark.parametrize("name", ["a.las", "a", "a.label"])
def test_files_of_another_kind(tmp_path, name):
    assert "unknown kind of point cloud" in error(tmp_path / name)
