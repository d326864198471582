"""PLY files (Polygon File Format 1.0, G. Turk, 1994): the vertices in, coloured points out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import write_atomic

from .headers import COPY_AGAIN, header_line, table, unique, whole_number

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
    "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8",
}  # fmt: skip
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass
class _Element:
    """One element of a PLY header: its properties are (name, type of a list's length or None, type)."""

    name: str
    count: int
    properties: list[tuple[str, str | None, str]]

    @property
    def has_lists(self) -> bool:
        return any(length is not None for _, length, _ in self.properties)


def parse_ply(path: Path, data: bytes) -> NDArray:
    """The vertices of a PLY file as a structured array, without lists.

    Raises:
        InputError: for a damaged file, or one without vertices.
    """
    order, elements, start = _header(path, data)
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise InputError(
            f"{path}: no element vertex among {', '.join(names) or 'none'}; no point cloud"
        )
    position = names.index("vertex")
    if not order:
        return _text(path, data[start:], elements, position)
    for element in elements[:position]:
        start = _rows(path, data, start, element, order)[1]
    return _rows(path, data, start, elements[position], order)[0]


def _header(path: Path, data: bytes) -> tuple[str, list[_Element], int]:
    if data[:3] != b"ply":
        raise InputError(f"{path}: does not begin with 'ply'; it is no PLY file")
    order, elements, start = None, [], 0
    while True:
        words, start = header_line(path, data, start)
        kind = words[0] if words else "comment"
        if kind == "end_header":
            break
        try:
            if kind == "format":
                order = _ORDERS[words[1]]
            elif kind == "element":
                elements.append(
                    _Element(words[1], whole_number(path, words[2], f"the count of {words[1]}"), [])
                )
            elif kind == "property" and words[1] == "list":
                entry = (words[4], _TYPES[words[2]], _TYPES[words[3]])
                elements[-1].properties.append(entry)
            elif kind == "property":
                elements[-1].properties.append((words[2], None, _TYPES[words[1]]))
            elif kind not in ("ply", "comment", "obj_info"):
                raise KeyError(kind)
        except (IndexError, KeyError) as error:
            raise InputError(
                f"{path}: header line {' '.join(words)[:80]!r} is not PLY 1.0"
            ) from error
    if order is None:
        raise InputError(f"{path}: the header has no format line; {COPY_AGAIN}")
    return order, elements, start


def _text(path: Path, body: bytes, elements: list[_Element], position: int) -> NDArray:
    vertex = elements[position]
    names = unique([name for name, _, _ in vertex.properties])
    if vertex.has_lists:
        raise InputError(f"{path}: the vertices hold lists; convert it to binary PLY, or without them")  # fmt: skip
    if position:
        # Elements before the vertices may hold lists, so only their lines can be counted.
        skipped = sum(element.count for element in elements[:position])
        lines = [line for line in body.splitlines() if line.strip()]
        body = b"\n".join(lines[skipped : skipped + vertex.count])
    # Not more words than the vertices have: what follows may be long.
    words = body.split(None, vertex.count * len(names))
    return table(path, words, names, vertex.count)


def _rows(
    path: Path, data: bytes, start: int, element: _Element, order: str
) -> tuple[NDArray, int]:
    """The rows of a binary element as a structured array without its lists, and where the next element starts."""
    if not element.properties:
        return np.empty(0), start
    names = unique([name for name, _, _ in element.properties])
    lengths = {}
    if element.has_lists and element.count:
        first = _row(path, data, start, element, order)
        lengths = {index: length for index, (_, length) in enumerate(first) if length is not None}
    fields: list[tuple[Any, ...]] = []
    for index, (name, (_, counted, kind)) in enumerate(zip(names, element.properties)):
        if counted is not None:
            fields.append((f"length {index}", order + counted))
            fields.append((f"list {index}", order + kind, (lengths.get(index, 0),)))
        else:
            fields.append((name, order + kind))
    dtype = np.dtype(fields)
    size = dtype.itemsize * element.count
    if start + size <= len(data):
        rows = np.frombuffer(data, dtype, element.count, start)
        # Almost always all lists are as long as the first one.
        if all((rows[f"length {index}"] == length).all() for index, length in lengths.items()):
            return rows, start + size
    elif not lengths:
        raise InputError(
            f"{path}: {element.count} {element.name} rows need {size} bytes, the file has {len(data) - start} left; "
            f"{COPY_AGAIN}"
        )
    if element.name == "vertex":
        raise InputError(
            f"{path}: the vertices hold lists of different lengths, or the file is cut off; convert it without them"
        )
    for _ in range(element.count):
        start = _row(path, data, start, element, order)[-1][0]
    return np.empty(0, dtype), start


def _row(
    path: Path, data: bytes, start: int, element: _Element, order: str
) -> list[tuple[int, int | None]]:
    """(end, length of the list or None) of every property of the row at `start`."""
    ends: list[tuple[int, int | None]] = []
    for _, counted, kind in element.properties:
        length = None
        if counted is not None:
            begin, start = start, start + np.dtype(counted).itemsize
            if start > len(data):
                raise InputError(f"{path}: ends within the element {element.name}; {COPY_AGAIN}")
            length = int(np.frombuffer(data, order + counted, 1, begin)[0])
        start += np.dtype(kind).itemsize * (1 if length is None else max(length, 0))
        if start > len(data) or (length is not None and length < 0):
            raise InputError(f"{path}: ends within the element {element.name}; {COPY_AGAIN}")
        ends.append((start, length))
    return ends


def write_ply(
    path: str | os.PathLike[str],
    coord: NDArray,
    rgb: NDArray | None = None,
    label: NDArray | None = None,
    strength: NDArray | None = None,
) -> None:
    """Write a binary little-endian PLY under a temporary name and rename it.

    Args:
        coord: (n, 3) metres, stored as float32.
        rgb: (n, 3) integers in [0, 255]: `red`, `green`, `blue`.
        label: (n,) integers: `label`, int32.
        strength: (n,) or (n, 1): `intensity`, float32.

    Raises:
        ValueError: for arrays of different lengths.
        InputError: where the file system refuses.
    """
    coord = np.asarray(coord)
    parts: list[tuple[str, str, str, NDArray]] = [
        (axis, "float", "<f4", coord[:, i]) for i, axis in enumerate("xyz")
    ]
    if rgb is not None:
        rgb = np.asarray(rgb)
        names = ("red", "green", "blue")
        parts += [(name, "uchar", "u1", rgb[:, i]) for i, name in enumerate(names)]
    if strength is not None:
        parts.append(("intensity", "float", "<f4", np.asarray(strength).reshape(-1)))
    if label is not None:
        parts.append(("label", "int", "<i4", np.asarray(label)))
    for name, _, _, values in parts:
        if len(values) != len(coord):
            raise ValueError(f"{path}: {name} has {len(values)} rows, coord {len(coord)}")
    rows = np.empty(len(coord), np.dtype([(name, form) for name, _, form, _ in parts]))
    for name, _, _, values in parts:
        rows[name] = values
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(rows)}",
        *(f"property {kind} {name}" for name, kind, _, _ in parts),
        "end_header",
    ]
    header = ("\n".join(lines) + "\n").encode()

    def write(file: Any) -> None:
        file.write(header)
        file.write(rows.tobytes())

    write_atomic(path, write)
