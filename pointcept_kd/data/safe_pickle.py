"""Pickle files that hold containers, numbers and numpy arrays, read without running code from them.

A pickle may name any function and have it called. Here only the names that numpy writes for arrays, scalars and dtypes
are known, and each stands for a function of this module, so that an info file from the internet can do no more than be
wrong.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pointcept_kd.host import InputError


def _empty(_kind: Any, _shape: Any, _code: Any) -> NDArray:
    # Shape, dtype and content follow as a state, which numpy checks.
    return np.empty(0, np.int8)


def _from_buffer(
    data: Any, dtype: DTypeLike, shape: Any, order: str, axis_order: Any = None
) -> NDArray:
    array = np.frombuffer(data, dtype)
    if axis_order is None:
        return array.reshape(shape, order=order)
    return array.reshape(shape, order="C").transpose(np.argsort(axis_order))


def _scalar(dtype: DTypeLike, data: Any = None) -> Any:
    return np.frombuffer(data, dtype, 1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # How protocol 2 writes bytes; other encodings would import their module.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # how protocols below 3 write empty bytes


class _Marker:
    """Stands for `numpy.ndarray`, which is only ever handed to `_reconstruct`."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Marker,
    ("numpy", "dtype"): np.dtype,
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2 and since
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _empty
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):  # Python 3 and protocols below 3
    for _type in (set, frozenset, bytearray, complex):
        _KNOWN[_module, _type.__name__] = _type
    _KNOWN[_module, "bytes"] = _no_bytes


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is no plain value"
            ) from None


def load_plain(path: str | os.PathLike[str]) -> Any:
    """The content of a pickle file of dicts, lists, tuples, sets, strings, numbers and numpy arrays.

    Raises:
        InputError: for a file that cannot be read, is no pickle, is cut off, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory, or damaged") from error
    # A damaged pickle fails in whatever operation the damaged bytes happen to mean.
    except Exception as error:
        raise InputError(
            f"{path}: not readable as a pickle of plain values and numpy arrays ({error}); "
            "make the file again, or copy it again"
        ) from error
