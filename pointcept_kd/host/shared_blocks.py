"""Blocks of shared memory that hold one sample each, for `sample_cache`.

A block is a mark that is written last, the length of a description, the description (JSON) and the arrays it names.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from .errors import InputError

PREFIX = "pkd_"
FOLDER = "/dev/shm"  # where Linux keeps shared memory; other systems keep it out of sight
_READY = b"pkdready"
_HEADER = 16  # the mark, then the length of the description
_ALIGN = 64


def write(name: str, size: int, description: bytes, arrays: list[Any]) -> bool:
    """Write a block; False where there is no room for it."""
    if _room() < size:
        return False
    try:
        with opened(name, size) as block:
            if block is None:
                return True
            if not reserve(name, size):
                unlink(name)
                return False
            buffer = block.buf
            buffer[8:_HEADER] = len(description).to_bytes(8, "little")
            buffer[_HEADER : _HEADER + len(description)] = description
            for offset, array in arrays:
                np.ndarray(array.shape, array.dtype, buffer, offset)[...] = array
            buffer[:8] = _READY
    except BaseException:
        unlink(name)
        raise
    return True


def free(key: str, size: int) -> None:
    """Unlink every block of a key; `size` samples where blocks cannot be listed."""
    prefix = f"{PREFIX}{key}_"
    if os.path.isdir(FOLDER):
        names = [name for name in os.listdir(FOLDER) if name.startswith(prefix)]
    else:
        names = [f"{prefix}{position}" for position in range(size)]
    for name in names:
        unlink(name)


def unlink(name: str) -> None:
    """Take a block's name away; processes that have it mapped keep it until they close it."""
    if os.path.isdir(FOLDER):  # by path: a block of size 0 cannot be mapped
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(FOLDER, name))
        return
    with _untracked(), opened(name) as block:
        if block is not None:
            block.unlink()


@contextlib.contextmanager
def _untracked() -> Iterator[None]:
    """Keep our blocks from Python's resource tracker.

    Up to Python 3.12 it also registers blocks that were only attached to, and unlinks them when the
    first such process ends.
    """
    kept = resource_tracker.register, resource_tracker.unregister

    def passing(call: Any) -> Any:
        def guarded(name: str, kind: str) -> None:
            if kind != "shared_memory" or not name.lstrip("/").startswith(PREFIX):
                call(name, kind)

        return guarded

    resource_tracker.register, resource_tracker.unregister = map(passing, kept)
    try:
        yield
    finally:
        resource_tracker.register, resource_tracker.unregister = kept


@contextlib.contextmanager
def opened(name: str, size: int = 0) -> Iterator[SharedMemory | None]:
    """A block, created where `size` is given; None where it is not there, or has no size yet."""
    block = None
    with contextlib.suppress(OSError, ValueError):
        if sys.version_info >= (3, 13):
            block = SharedMemory(name, create=size > 0, size=size, track=False)
        else:
            with _untracked():
                block = SharedMemory(name, create=size > 0, size=size)
    try:
        yield block
    finally:
        if block is not None:
            with contextlib.suppress(BufferError):  # an exception's traceback still holds a view
                block.close()


def is_ready(block: SharedMemory) -> bool:
    """Whether a block was written to its end."""
    return bytes(block.buf[:8]) == _READY


def kept_free() -> int:
    """Bytes left to others: loading processes hand their batches over in the same memory."""
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return 0
    return max(256 << 20, status.f_blocks * status.f_frsize // 10)


def _room() -> float:
    """Bytes that may still be taken. A tmpfs that is full kills whoever writes to it (SIGBUS)."""
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return float("inf")
    return status.f_bavail * status.f_frsize - kept_free()


def reserve(name: str, size: int) -> bool:
    """Have the system set the memory aside: another program may have taken it since `_room`."""
    if not (hasattr(os, "posix_fallocate") and os.path.isdir(FOLDER)):
        return True
    try:
        file = os.open(os.path.join(FOLDER, name), os.O_RDWR)
    except OSError:
        return True  # shared memory is kept elsewhere
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def layout(sample: Mapping[str, Any]) -> tuple[bytes, list[tuple[int, Any]], int]:
    """Description (JSON), arrays with their byte offsets, and size of the block of a sample."""
    arrays: list[Any] = []
    try:
        tree = _describe(dict(sample), "", arrays)
    except TypeError as error:
        raise InputError(
            f"sample {sample.get('name', '?')}: {error}; cache='shared' keeps arrays, numbers, strings, "
            "and lists and dicts of them: use cache='memory'"
        ) from error
    places, end = [], 0
    for array in arrays:
        places.append(end)
        end += _aligned(array.nbytes)
    description = json.dumps([tree, places]).encode()
    start = _aligned(_HEADER + len(description))
    return description, [(start + p, a) for p, a in zip(places, arrays)], start + end


def _describe(value: Any, key: str, arrays: list[Any]) -> list[Any]:
    """A value as a tree for JSON; its arrays are appended to `arrays`."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "?biufcSUmM":
        arrays.append(np.asarray(value))
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return [kind, len(arrays) - 1, value.dtype.str, list(value.shape)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    if isinstance(value, Mapping):
        return ["dict", [[k, _describe(v, f"{key}[{k!r}]", arrays)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_describe(v, f"{key}[{i}]", arrays) for i, v in enumerate(value)]]
    raise TypeError(f"{key} is a {type(value).__name__}")


def unpack(buffer: memoryview) -> dict[str, Any]:
    """The sample of a block, as copies."""
    length = int.from_bytes(buffer[8:_HEADER], "little")
    tree, places = json.loads(bytes(buffer[_HEADER : _HEADER + length]))
    start = _aligned(_HEADER + length)
    return _build(tree, buffer, [start + place for place in places])


def _build(node: list[Any], buffer: memoryview, places: list[int]) -> Any:
    kind, value = node[:2]
    if kind in ("array", "scalar"):
        view = np.ndarray(node[3], node[2], buffer, places[value])
        return view.copy() if kind == "array" else view[()]
    if kind == "dict":
        return {k: _build(v, buffer, places) for k, v in value}
    if kind in ("list", "tuple"):
        parts = [_build(v, buffer, places) for v in value]
        return parts if kind == "list" else tuple(parts)
    return value


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
