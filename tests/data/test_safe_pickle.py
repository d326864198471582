"""Plain content comes back as it was; everything else is refused before it runs."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data.safe_pickle import load_plain
from pointcept_kd.host import InputError

CONTENT = {
    "text": ["a", b"bytes", "ä", None, True, 1, -(1 << 70), 1.5, (1, 2), {3}, frozenset([4]), 1j],
    "ordered": OrderedDict(b=1, a=2),
    "matrix": np.arange(12.0).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": np.empty((0, 9)),
    "names": np.array(["car", "bus"]),
    "objects": np.array([[1, 2], "three", None], dtype=object),
    "swapped": np.arange(3, dtype=">i2"),
    "scalars": [np.float64(1.5), np.int64(7), np.bool_(True), np.str_("x"), np.float32(0.1)],
    "dtype": np.dtype("f4"),
    "records": np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
}


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tolist() == b.tolist()
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    same(load_plain(path), pickle.loads(path.read_bytes()))


def test_arrays_can_be_changed(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(np.zeros(3), 4))
    array = load_plain(path)
    array[0] = 1
    assert array.tolist() == [1, 0, 0]


def test_files_of_older_numpy(tmp_path):
    path = tmp_path / "a.pkl"
    content = pickle.dumps([np.arange(3.0), np.float32(2)], 2)
    older = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(older)
    assert older != content
    assert load_plain(path)[0].tolist() == [0, 1, 2]


class Calls:
    """Unpickled as a call of whatever it was made with."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ["touch {}"], r"posix\.system|nt\.system"),
        (eval, ["open('{}', 'w')"], r"builtins\.eval"),
        (open, ["{}", "w"], r"io\.open|_io\.open|builtins\.open"),
        (Path.touch, ["{}"], r"getattr|pathlib"),
        (np.load, ["{}"], r"numpy.*load"),
        (np.ndarray, [(3,), object, b"x" * 24], "not readable"),
    ],
)
def test_code_does_not_run(tmp_path, function, arguments, name):
    path, trace = tmp_path / "a.pkl", tmp_path / "trace"
    filled = [a.format(trace) if isinstance(a, str) else a for a in arguments]
    path.write_bytes(pickle.dumps([1, Calls(function, *filled)], 4))
    with pytest.raises(InputError, match=name) as caught:
        load_plain(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_other_encodings_are_no_way_out(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(InputError, match="encoding 'rot13'"):
        load_plain(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"no pickle", pickle.dumps(list(range(999)))[:-9], b"."]
)
def test_damaged_files(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pkl: not readable as a pickle"):
        load_plain(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_plain(tmp_path / "none.pkl")
