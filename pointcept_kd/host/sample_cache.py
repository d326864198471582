"""Samples that were read once: in this process's memory, or once for all processes of a machine.

The shared form keeps every sample in a block of `multiprocessing.shared_memory`. Its rules:

* Names follow from user, data root, dataset config and sample, so that all ranks and loading
  processes meet at the same blocks.
* A block starts with a mark that is written last, and its writer holds a record lock, which the
  system releases when the writer dies. A block without the mark is never read and is written anew.
* Whoever builds a dataset holds a lease, a record lock too. The last one to leave frees the blocks.
  What a killed run left behind is freed when the next dataset with a shared cache is built.
* Readers get copies and close the block again: a mapping per sample would use up the file
  descriptors.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import secrets
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from . import shared_blocks as blocks
from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Bytes of the lock file. 0: the lease, and 1 in it once the blocks are freed; 1: set when memory ran
# out; from _SAMPLES on one lock per sample, which needs no content.
_LEASE, _FULL, _SAMPLES = 0, 1, 16


class MemoryCache:
    """Samples of this process; every loading process has its own."""

    def __init__(self) -> None:
        self._samples: dict[int, dict[str, Any]] = {}

    def get(self, position: int) -> dict[str, Any] | None:
        """A copy of a sample, or None."""
        sample = self._samples.get(position)
        return None if sample is None else copy.deepcopy(sample)

    def put(self, position: int, sample: Mapping[str, Any]) -> None:
        """Keep a copy of a sample."""
        self._samples[position] = copy.deepcopy(dict(sample))


class SharedCache:
    """Samples of all processes of this user on this machine that use the same key.

    Args:
        key: what the samples are: equal keys share blocks. See `key_of`.
        size: how many samples there are; positions are 0 to `size - 1`.

    Raises:
        InputError: where the system has no record locks or no place for the lock file.
    """

    def __init__(self, key: str, size: int) -> None:
        if fcntl is None:
            raise InputError(
                "cache='shared' needs record locks, which this system has not; use cache='memory'"
            )
        self.key, self.size = key, size
        lease = _join(key, size)
        self._lock = lease.file
        # Forked loading processes inherit this; `_leave` does nothing in them.
        self._leave = weakref.finalize(self, _leave, lease)

    def __getstate__(self) -> dict[str, Any]:
        return {"key": self.key, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, mostly in another process: there it uses the blocks and holds no lease on them."""
        self.key, self.size = state["key"], state["size"]
        if self.key in _leases and _leases[self.key].pid == os.getpid():
            lease = _join(self.key, self.size)  # a second lock file here would end this one's locks
            self._lock = lease.file
            self._leave = weakref.finalize(self, _leave, lease)
            return
        try:
            self._lock = os.open(_lock_path(self.key), os.O_RDWR)
        except OSError:  # the datasets that held the blocks are gone
            self._lock = None
        else:
            weakref.finalize(self, os.close, self._lock)

    def name(self, position: int) -> str:
        """Name of a sample's block; at most 30 characters, which is what macOS takes."""
        return f"{blocks.PREFIX}{self.key}_{position}"

    def get(self, position: int) -> dict[str, Any] | None:
        """A copy of a sample; None where it is not there or is being written."""
        with self._locked(position, write=False) as locked:
            if not locked:
                return None
            with blocks.opened(self.name(position)) as block:
                return (
                    None
                    if block is None or not blocks.is_ready(block)
                    else blocks.unpack(block.buf)
                )

    def put(self, position: int, sample: Mapping[str, Any]) -> None:
        """Keep a copy of a sample, unless it is there, or is being written, or memory is short.

        Raises:
            InputError: for a sample that holds more than arrays, numbers, strings, and lists and
                dicts of them.
        """
        if self._lock is None or os.pread(self._lock, 1, _FULL) == b"1":
            return
        description, arrays, size = blocks.layout(sample)
        name = self.name(position)
        with self._locked(position, write=True) as locked:
            if not locked:
                return
            with blocks.opened(name) as block:
                if block is not None and blocks.is_ready(block):
                    return
            blocks.unlink(name)  # an unfinished block: its writer held this lock and is dead
            if not blocks.write(name, size, description, arrays):
                self._tell_full(size)
            if os.pread(self._lock, 1, _LEASE) == b"1":
                blocks.unlink(name)  # the blocks were freed while this one was written

    def _tell_full(self, size: int) -> None:
        """Say it once per cache, not once per process."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _FULL)
        try:
            if os.pread(self._lock, 1, _FULL) == b"1":
                return
            os.pwrite(self._lock, b"1", _FULL)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _FULL)
        logger.warning(
            "cache='shared': a sample of %.1f MB does not fit into %s any more (%.0f MB are kept free for batches); "
            "samples that are not in it are read from their files. Make it larger (docker run --shm-size=...) or set "
            "cache=False",
            size / 1e6,
            blocks.FOLDER,
            blocks.kept_free() / 1e6,
        )

    @contextlib.contextmanager
    def _locked(self, position: int, write: bool) -> Iterator[bool]:
        """Hold a sample's lock; False where another process has it. Nobody ever waits."""
        if self._lock is None:
            yield False
            return
        kind = fcntl.LOCK_EX if write else fcntl.LOCK_SH
        try:
            fcntl.lockf(self._lock, kind | fcntl.LOCK_NB, 1, _SAMPLES + position)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _SAMPLES + position)


def build_cache(
    cache: Any, parts: Callable[[], Mapping[str, Any]], size: int
) -> MemoryCache | SharedCache | None:
    """The cache that a dataset's `cache` argument asks for.

    Args:
        cache: False or None; True or "memory"; "shared".
        parts: gives what makes the samples what they are, for `key_of`.
        size: how many samples there are.

    Raises:
        InputError: for another value, or where sharing is not possible.
    """
    if cache is None or cache is False:
        return None
    if cache is True or cache == "memory":
        return MemoryCache()
    if cache == "shared":
        return SharedCache(key_of(parts()), size)
    raise InputError(
        f"cache={cache!r}: use False (read files every time), 'memory' (a copy in every loading "
        "process) or 'shared' (one copy for all processes of this machine)"
    )


def key_of(parts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal where user and parts are.

    A value that is no plain data gets digits of its own, so that nothing is shared by mistake.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    text = json.dumps([user, _plain(parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {"dict": sorted((str(k), json.dumps(_plain(v))) for k, v in value.items())}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(_plain(v)) for v in value)}
    if isinstance(value, (list, tuple, range)):
        return [_plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"array": [str(value.dtype), list(value.shape), content]}
    return {"unknown": secrets.token_hex(16)}


# ---- the lease -----------------------------------------------------------------------------------


class _Lease:
    """This process's share in a key; users are its datasets."""

    def __init__(self, key: str, size: int) -> None:
        self.key, self.size, self.pid, self.users = key, size, os.getpid(), 0
        path = _lock_path(key)
        while True:
            try:
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                self.file = os.open(path, flags, 0o600)
            except OSError as error:
                raise InputError(
                    f"cache='shared': {path} cannot be opened ({error.strerror}); use cache='memory'"
                ) from error
            first = _try_exclusive(self.file)
            if not first:
                fcntl.lockf(self.file, fcntl.LOCK_SH, 1, _LEASE)
            if _is_linked(self.file, path):
                break
            os.close(self.file)  # the last owner left in between and took the file away
        if first:
            os.ftruncate(self.file, 0)
            blocks.free(key, size)
            fcntl.lockf(self.file, fcntl.LOCK_SH, 1, _LEASE)

    def close(self) -> None:
        """Free the blocks, unless another process holds a lease."""
        if _try_exclusive(self.file):
            # Loading processes that still write see this mark and take their block back.
            os.pwrite(self.file, b"1", _LEASE)
            blocks.free(self.key, self.size)
            with contextlib.suppress(OSError):
                os.unlink(_lock_path(self.key))
        os.close(self.file)


_leases: dict[str, _Lease] = {}


def _join(key: str, size: int) -> _Lease:
    lease = _leases.get(key)
    if lease is None or lease.pid != os.getpid():
        _sweep()
        lease = _leases[key] = _Lease(key, size)
    lease.users += 1
    return lease


def _leave(lease: _Lease) -> None:
    if lease.pid != os.getpid():
        return
    lease.users -= 1
    if lease.users == 0:
        _leases.pop(lease.key, None)
        lease.close()


def _sweep() -> None:
    """Free what killed processes left: blocks of this user whose lease nobody holds."""
    mine = set()
    for entry in os.scandir(blocks.FOLDER) if os.path.isdir(blocks.FOLDER) else ():
        match = re.fullmatch(blocks.PREFIX + r"([0-9a-f]{16})(_\d+|\.lock)", entry.name)
        with contextlib.suppress(OSError):
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                mine.add(match[1])
    # Closing a lock file would drop this process's own locks on it, so its own keys are left alone.
    for key in mine - set(_leases):
        path = _lock_path(key)
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            try:
                if _try_exclusive(file) and _is_linked(file, path):
                    os.pwrite(file, b"1", _LEASE)
                    blocks.free(key, 0)
                    os.unlink(path)
            finally:
                os.close(file)


def _lock_path(key: str) -> str:
    folder = blocks.FOLDER if os.path.isdir(blocks.FOLDER) else tempfile.gettempdir()
    return os.path.join(folder, f"{blocks.PREFIX}{key}.lock")


def _try_exclusive(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LEASE)
    except OSError:
        return False
    return True


def _is_linked(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
