"""Maps on disk: points in tiles of 25 m, so that what lies around a pose is read without reading the rest.

    SEQUENCE/map_tiles/points.npy   (n, 3) float32, world frame, metres, tile after tile, in a tile first seen first
                      /labels.npy   (n,) uint16, raw class of each point; only where asked for
                      /tiles.npy    (k, 4) int64: tile x, tile y, begin, end; rows of points.npy, by tile
                      /meta.json    version, tile, points, and what the map was made of

The arrays are mapped into memory, not read: a crop costs the tiles that it touches, and processes share their pages.
A map is written under another name and renamed, so it is there completely or not at all. A plain `map_clean.npy`
(n, 3), as earlier completion projects store it, is read too; it has no tiles, so each crop passes over all of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointcept_kd.host import InputError

FOLDER = "map_tiles"
PLAIN = "map_clean.npy"
VERSION = 1  # raised whenever files of another kind are written
TILE = 25.0  # metres
_CHUNK = 1 << 20  # points worked on at a time

_REBUILD = "build it again with: python tools/prepare_data.py maps"


def squared_distances(points: NDArray, centre: ArrayLike) -> NDArray:
    """Squared distances (n,) float64 of points (n, 3) from a centre (3,)."""
    total = np.zeros(len(points))
    for axis, middle in enumerate(np.asarray(centre, np.float64)):
        term = points[:, axis].astype(
            np.float64
        )  # by columns: far faster than a trailing axis of 3
        term -= middle
        term *= term
        total += term
    return total


# ------------------------------------------------------------------------------------------- writing


class TileWriter:
    """Writes a map whose points come in any order, with little memory; use it in a `with` statement.

    Args:
        folder: the sequence's folder; `map_tiles` appears in it when `finish` returns.
        labelled: whether points have labels.

    Points are appended to a file as they come and sorted into their tiles at the end, in pieces.
    """

    def __init__(self, folder: str | os.PathLike[str], labelled: bool = False) -> None:
        self.folder, self.labelled = Path(folder), labelled
        self.points = 0
        self._counts: dict[tuple[int, int], int] = {}
        self._hidden = self.folder / f".{FOLDER}.{os.getpid()}.tmp"

    def __enter__(self) -> TileWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{FOLDER}.*.tmp"):  # of runs that were killed
            shutil.rmtree(left, ignore_errors=True)
        self._hidden.mkdir()
        self._points = open(self._hidden / "points.raw", "wb")
        self._labels = open(self._hidden / "labels.raw", "wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._points.close()
        self._labels.close()
        shutil.rmtree(self._hidden, ignore_errors=True)  # gone already after `finish`

    def add(self, points: NDArray, labels: NDArray | None = None) -> None:
        """Append points (k, 3) float32 and, where labelled, their classes (k,)."""
        self._points.write(np.ascontiguousarray(points, "<f4").tobytes())
        if self.labelled:
            self._labels.write(np.ascontiguousarray(labels, "<u2").tobytes())
        self.points += len(points)
        tiles, counts = np.unique(_pack(_tiles_of(points)), return_counts=True)
        for key, count in zip(_unpack(tiles).tolist(), counts.tolist()):
            self._counts[tuple(key)] = self._counts.get(tuple(key), 0) + count

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Sort the points into tiles and put the map in its place; `meta` is kept with it.

        Raises:
            InputError: for a map without points.
        """
        if not self.points:
            raise InputError(f"{self.folder}: no point is left for the map; check its labels")
        self._points.close()
        self._labels.close()
        table = np.array([(*t, c) for t, c in sorted(self._counts.items())], np.int64)
        ends = table[:, 2].cumsum()
        begins = ends - table[:, 2]
        self._sort(_pack(table[:, :2]), begins.copy())
        rows = np.column_stack([table[:, :2], begins, ends])
        np.save(self._hidden / "tiles.npy", rows)
        text = {"version": VERSION, "tile": TILE, "points": self.points, **meta}
        text["labelled"] = self.labelled
        (self._hidden / "meta.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        target, old = self.folder / FOLDER, self.folder / f".{FOLDER}.{os.getpid()}.old.tmp"
        if target.exists():
            os.replace(target, old)
        os.replace(self._hidden, target)
        shutil.rmtree(old, ignore_errors=True)

    def _sort(self, keys: NDArray, cursor: NDArray) -> None:
        raw = np.memmap(self._hidden / "points.raw", "<f4", "r", shape=(self.points, 3))
        target = np.lib.format.open_memmap(
            self._hidden / "points.npy", "w+", np.float32, (self.points, 3)
        )
        outputs = [(raw, target)]
        if self.labelled:
            labels = np.memmap(self._hidden / "labels.raw", "<u2", "r", shape=(self.points,))
            into = np.lib.format.open_memmap(
                self._hidden / "labels.npy", "w+", np.uint16, (self.points,)
            )
            outputs.append((labels, into))
        for start in range(0, self.points, _CHUNK):
            part = np.asarray(raw[start : start + _CHUNK])
            tile = np.searchsorted(keys, _pack(_tiles_of(part)))
            order = np.argsort(tile, kind="stable")  # in a tile they stay first seen first
            tile = tile[order]
            heads = np.flatnonzero(np.diff(tile, prepend=-1))
            for head, tail in zip(heads, [*heads[1:], len(tile)]):
                at = cursor[tile[head]]
                rows = start + order[head:tail]
                for source, into in outputs:
                    into[at : at + tail - head] = source[rows]
                cursor[tile[head]] += tail - head
        for source, into in outputs:
            into.flush()
            source._mmap.close()
        for name in ("points.raw", "labels.raw"):
            (self._hidden / name).unlink()


def _tiles_of(points: NDArray) -> NDArray:
    return np.floor(points[:, :2].astype(np.float64) / TILE).astype(np.int64)


def _pack(tiles: NDArray) -> NDArray:
    return (tiles[:, 0] << 32) + tiles[:, 1]


def _unpack(keys: NDArray) -> NDArray:
    y = ((keys & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return np.column_stack([(keys - y) >> 32, y])


# ------------------------------------------------------------------------------------------- reading


class Map:
    """A map on disk; arrays are mapped when first needed, in every process anew.

    Attributes:
        meta: what `meta.json` says; empty for a plain array.
        tiles: (k, 4) int64: tile x, tile y, begin, end; None for a plain array.

    Raises:
        InputError: for files that are missing, damaged, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta: dict[str, Any] = {}
        self.tiles: NDArray | None = None
        self._arrays: dict[str, NDArray] = {}
        if self.path.is_dir():
            self.meta = _read_meta(self.path)
            self.tiles = _load(self.path / "tiles.npy", (None, 4))
            rows = len(self.points)
            ends = self.tiles[:, 3]
            chained = np.array_equal(self.tiles[1:, 2], ends[:-1])
            if not len(ends) or ends[-1] != rows or not chained or rows != self.meta["points"]:
                raise InputError(
                    f"{self.path}: tiles and points do not belong together; {_REBUILD}"
                )
        elif self.points.dtype.kind != "f":
            raise InputError(
                f"{self.path}: expected points (n, 3) of floats, not {self.points.dtype}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would travel to a loading process as a copy of the whole map.
        return {**self.__dict__, "_arrays": {}}

    def _array(self, name: str, shape: tuple[int | None, ...]) -> NDArray:
        if name not in self._arrays:
            path = self.path / name if self.path.is_dir() else self.path
            self._arrays[name] = _load(path, shape, mapped=True)
        return self._arrays[name]

    @property
    def points(self) -> NDArray:
        """(n, 3), world frame, metres; mapped."""
        return self._array("points.npy", (None, 3))

    @property
    def labels(self) -> NDArray | None:
        """(n,) uint16 raw classes, mapped; None where the map has none."""
        return self._array("labels.npy", (None,)) if self.meta.get("labelled") else None

    def _ranges(self, centre: NDArray, radius: float) -> Iterator[tuple[int, int]]:
        if self.tiles is None:
            for begin in range(0, len(self.points), _CHUNK):
                yield begin, min(begin + _CHUNK, len(self.points))
            return
        low = self.tiles[:, :2] * self.meta["tile"]
        near = np.clip(centre[:2], low, low + self.meta["tile"])
        # A little more than the radius: points were sorted by the same division, but with rounding.
        close = ((near - centre[:2]) ** 2).sum(axis=1) <= (radius + 1e-3) ** 2
        for begin, end in self.tiles[close, 2:].tolist():
            yield begin, end

    def rows_within(self, centre: ArrayLike, radius: float) -> NDArray:
        """Rows (m,) int64 of the points nearer than `radius` metres to a centre (3,), ascending."""
        middle, points = np.asarray(centre, np.float64), self.points
        rows = [
            begin + np.flatnonzero(squared_distances(points[begin:end], middle) < radius * radius)
            for begin, end in self._ranges(middle, radius)
        ]
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def around(self, pose: NDArray, radius: float) -> NDArray:
        """Points (m, 3) float32 nearer than `radius` metres to a pose (4, 4), in the frame of that pose."""
        middle, points = np.asarray(pose, np.float64)[:3, 3], self.points
        turn = np.linalg.inv(pose)[:3, :3].T
        parts = [np.empty((0, 3), np.float32)]
        for begin, end in self._ranges(middle, radius):
            part = points[begin:end]
            part = part[squared_distances(part, middle) < radius * radius].astype(np.float64)
            for axis in range(3):
                part[:, axis] -= middle[axis]
            parts.append((part @ turn).astype(np.float32))
        return np.concatenate(parts)


def _load(path: Path, shape: tuple[int | None, ...], mapped: bool = False) -> NDArray:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable array ({error}); {_REBUILD}") from error
    if array.ndim != len(shape) or any(
        b is not None and a != b for a, b in zip(array.shape, shape)
    ):
        raise InputError(f"{path}: expected shape {shape}, found {array.shape}; {_REBUILD}")
    return array


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["version"], float(meta["tile"]), int(meta["points"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a description of a map; {_REBUILD}") from error
    if version[0] != VERSION:
        raise InputError(f"{path}: version {version[0]}, this is {VERSION}; {_REBUILD}")
    return meta
