"""PCD files (Point Cloud Data 0.7): ascii, binary, and binary_compressed, which is LZF.

https://pointclouds.org/documentation/tutorials/pcd_file_format.html; LZF: M. Lehmann, liblzf.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .headers import COPY_AGAIN, header_line, table, unique, whole_number

_TYPES = {
    **{("F", size): f"<f{size}" for size in (4, 8)},
    **{("I", size): f"<i{size}" for size in (1, 2, 4, 8)},
    **{("U", size): f"<u{size}" for size in (1, 2, 4, 8)},
}


def parse_pcd(path: Path, data: bytes) -> NDArray:
    """The points of a PCD file as a structured array; a field of count 3 becomes `name#0`, `name#1`, `name#2`.

    Raises:
        InputError: for a damaged file.
    """
    header, start = _header(path, data)
    points = whole_number(path, header["POINTS"][0], "POINTS")
    fields = _fields(path, header)
    kind = header["DATA"][0].lower()
    columns = [
        (name if count == 1 else f"{name}#{i}", form)
        for name, form, count in fields
        for i in range(count)
    ]
    body = data[start:]
    if kind == "ascii":
        names = [name for name, _ in columns]
        return table(path, body.split(), names, points)
    packed = np.dtype(columns)
    size = points * packed.itemsize
    if kind == "binary":
        if len(body) < size:
            raise InputError(
                f"{path}: {points} points need {size} bytes, the file has {len(body)}; {COPY_AGAIN}"
            )
        return np.frombuffer(body, packed, points)
    if kind != "binary_compressed":
        raise InputError(f"{path}: DATA {kind}; expected ascii, binary or binary_compressed")
    raw = _unpacked(path, body, size)
    # Compressed, all points' values of one field stand together; a field of count 3 keeps its three side by side.
    rows, begin = np.empty(points, packed), 0
    for name, form, count in fields:
        block = np.frombuffer(raw, form, points * count, begin).reshape(points, count)
        begin += block.nbytes
        for i in range(count):
            rows[name if count == 1 else f"{name}#{i}"] = block[:, i]
    return rows


def _header(path: Path, data: bytes) -> tuple[dict[str, list[str]], int]:
    header: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in header:
        words, start = header_line(path, data, start)
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    if "POINTS" not in header and "WIDTH" in header and "HEIGHT" in header:
        sides = [whole_number(path, (header[key] or [""])[0], key) for key in ("WIDTH", "HEIGHT")]
        header["POINTS"] = [str(sides[0] * sides[1])]
    for key in ("FIELDS", "SIZE", "TYPE", "POINTS", "DATA"):
        if not header.get(key):
            raise InputError(f"{path}: the header has no {key} line; it is no PCD 0.7 file")
    return header, start


def _fields(path: Path, header: dict[str, list[str]]) -> list[tuple[str, str, int]]:
    """(name, dtype, count) of every field."""
    names = unique(header["FIELDS"])
    counts = header.get("COUNT") or ["1"] * len(names)
    lists = {key: header[key] for key in ("SIZE", "TYPE")} | {"COUNT": counts}
    for key, words in lists.items():
        if len(words) != len(names):
            raise InputError(
                f"{path}: {len(names)} FIELDS but {len(words)} entries under {key}; correct the header"
            )
    fields = []
    for name, size, kind, count in zip(names, header["SIZE"], header["TYPE"], counts):
        form = _TYPES.get((kind.upper(), whole_number(path, size, f"SIZE of {name}", 1)))
        if form is None:
            raise InputError(
                f"{path}: field {name} has TYPE {kind} and SIZE {size}; expected F 4 8, or I, U with 1 2 4 8"
            )
        fields.append((name, form, whole_number(path, count, f"COUNT of {name}", 1, 4096)))
    return fields


def _unpacked(path: Path, body: bytes, size: int) -> bytes:
    if len(body) < 8:
        raise InputError(f"{path}: ends before its points; {COPY_AGAIN}")
    packed, full = (int(value) for value in np.frombuffer(body, "<u4", 2))
    if len(body) < 8 + packed or full != size:
        raise InputError(
            f"{path}: its points should be {size} bytes in {packed} compressed ones, found {full} in {len(body) - 8}; "
            f"{COPY_AGAIN}"
        )
    try:
        return lzf_decompress(body[8 : 8 + packed], full)
    except ValueError as error:
        raise InputError(f"{path}: {error}; {COPY_AGAIN}") from error


def lzf_decompress(data: bytes, size: int) -> bytes:
    """Unpack LZF: a control byte below 32 announces that many + 1 literal bytes, any other a copy of earlier output.

    A copy's length is the upper three bits + 2, of which 7 means that another byte is added; its distance is the lower
    five bits and the following byte, + 1. Copies may reach into themselves.

    Args:
        size: the number of bytes that come out.

    Raises:
        ValueError: for data that end early, reach before their beginning or give another number of bytes.
    """
    out, at, end = bytearray(), 0, len(data)
    try:
        while at < end:
            control = data[at]
            at += 1
            if control < 32:
                if at + control + 1 > end:
                    raise IndexError
                out += data[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            distance = ((control & 31) << 8 | data[at]) + 1
            at += 1
            length += 2
            begin = len(out) - distance
            if begin < 0:
                raise ValueError("its LZF data refer to bytes before their beginning")
            # What is copied may be part of what is being written: then it repeats.
            piece = out[begin : begin + length]
            out += (piece * (length // len(piece) + 1))[:length]
            if len(out) > size:
                break
    except IndexError:
        raise ValueError("its LZF data end early") from None
    if len(out) != size:
        raise ValueError(f"its LZF data give {len(out)} bytes or more instead of {size}")
    return bytes(out)
