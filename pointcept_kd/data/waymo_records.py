"""Waymo Open Dataset segments (v1.x, `*.tfrecord`), read without TensorFlow: the fields that point clouds need.

A segment file is a sequence of TFRecords, each a serialised `waymo.open_dataset.Frame` (protocol buffers, proto2):

    record      uint64 length | uint32 masked CRC-32C of it | bytes | uint32 masked CRC-32C of them   (little-endian)
    Frame       1 context {1 name, 3 laser_calibrations}, 2 timestamp_micros, 3 pose {1 doubles}, 5 lasers
    calibration 1 name, 2 beam_inclinations, 3 and 4 the lowest and highest, 5 extrinsic {1 doubles}
    laser       1 name, 2 and 3 first and second return
    return      2 range image, 4 pose of each pixel, 6 labels; each a zlib-compressed matrix
    matrix      1 data (float or int32), 2 shape {1 dims}

https://github.com/waymo-research/waymo-open-dataset, `dataset.proto`; TFRecord: TensorFlow's `record_writer`;
wire format: protobuf.dev/programming-guides/encoding; CRC-32C: RFC 3720, appendix B.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

LASERS = {1: "TOP", 2: "FRONT", 3: "SIDE_LEFT", 4: "SIDE_RIGHT", 5: "REAR"}
TOP = 1
_LABELS = "segmentation_label_compressed"
_AGAIN = "the file is damaged or incomplete, download it again"

# ---- CRC-32C
#
# A checksum register is a vector over GF(2), and moving it past k zero bytes is linear. So all words of a message are
# advanced at once, then neighbours are joined in a binary tree: n bytes take log n steps of numpy.


@lru_cache(maxsize=64)
def _advance_tables(level: int) -> NDArray:
    """What each byte of a register (4, 256) becomes after 4 * 2**level zero bytes."""
    if level:
        half = _advance_tables(level - 1)
        return _advance(half.reshape(-1), half).reshape(4, 256)
    value = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(32):
        value = (value >> 1) ^ np.where(value & 1, np.uint32(0x82F63B78), np.uint32(0))
    return value


def _advance(register: NDArray, tables: NDArray) -> NDArray:
    columns = register.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    moved = tables[0][columns[:, 0]]
    for i in (1, 2, 3):
        moved ^= tables[i][columns[:, i]]
    return moved


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of 4 bytes or more.

    Raises:
        ValueError: for fewer bytes.
    """
    if len(data) < 4:
        raise ValueError(f"crc32c takes 4 bytes or more, got {len(data)}")
    missing = -len(data) % 4
    padded = np.zeros(missing + len(data), np.uint8)  # zeros in front change nothing
    padded[missing:] = np.frombuffer(data, np.uint8)
    padded[missing : missing + 4] ^= 0xFF  # the register starts as ones
    words, level = _advance(padded.view("<u4"), _advance_tables(0)), 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        moved = _advance(np.ascontiguousarray(words[::2]), _advance_tables(level))
        words, level = moved ^ words[1::2], level + 1
    return int(words[0]) ^ 0xFFFFFFFF


def masked_crc(data: bytes | memoryview) -> int:
    """The checksum as TFRecords store it: turned by 15 bits, plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each record of a TFRecord file, checksums verified.

    Raises:
        InputError: for a file that cannot be read, is cut off or whose checksums differ, with the record.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            total, number = os.fstat(file.fileno()).st_size, 0
            while head := file.read(12):
                where = f"{path}: record {number} at byte {file.tell() - len(head)}"
                if len(head) < 12:
                    raise InputError(f"{where}: {len(head)} bytes, expected 12 or more; {_AGAIN}")
                length, crc = struct.unpack("<QI", head)
                if masked_crc(head[:8]) != crc:
                    what = (
                        "no TFRecord file (compressed ones are not read), or " if not number else ""
                    )
                    raise InputError(f"{where}: checksum of the length differs; {what}{_AGAIN}")
                if file.tell() + length + 4 > total:
                    rest = total - file.tell()
                    raise InputError(
                        f"{where}: cut off, {rest} of {length + 4} bytes are there; {_AGAIN}"
                    )
                data = memoryview(file.read(length + 4))
                if length < 4 or masked_crc(data[:-4]) != int.from_bytes(data[-4:], "little"):
                    raise InputError(f"{where}: checksum of its {length} bytes differs; {_AGAIN}")
                yield number, data[:-4]
                number += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


# ---- protocol buffers


def fields(message: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Field number, wire type and value: an int for varints, else the bytes.

    Raises:
        ValueError: for bytes that are no message.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(message, position)
        else:
            if wire == 2:
                size, position = _varint(message, position)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {position} is no part of a Frame")
            value, position = message[position : position + size], position + size
            if position > end:
                raise ValueError(f"field {number} ends {position - end} bytes after its message")
        yield number, wire, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError(f"no number at byte {position}")
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _table(message: memoryview) -> dict[int, list[Any]]:
    table = defaultdict(list)
    for number, _, value in fields(message):
        table[number].append(value)
    return table


def varints(data: bytes | memoryview) -> NDArray:
    """Packed varints as int64 (n,); negative ones take ten bytes.

    Raises:
        ValueError: when the last one is cut off or one is longer than ten bytes.
    """
    raw = np.frombuffer(data, np.uint8)
    last = raw < 0x80
    if last.all():
        return raw.astype(np.int64)
    if not last[-1]:
        raise ValueError("packed numbers end within one")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 10:
        raise ValueError("a packed number is longer than ten bytes")
    place = (np.arange(len(raw)) - np.repeat(starts, sizes)).astype(np.uint64)
    parts = (raw & np.uint8(0x7F)).astype(np.uint64) << (np.uint64(7) * place)
    return np.bitwise_or.reduceat(parts, starts).view(np.int64)


def _numbers(values: list[Any], dtype: str) -> NDArray:
    """Repeated fixed-width numbers; packed or one by one, their bytes are the same."""
    data = b"".join(values) if all(not isinstance(v, int) for v in values) else b"?"
    if len(data) % np.dtype(dtype).itemsize:
        raise ValueError(f"{len(data)} bytes are no whole number of {dtype}")
    return np.frombuffer(data, dtype)


def _integers(values: list[Any]) -> NDArray:
    parts = [np.array([v]) if isinstance(v, int) else varints(v) for v in values]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def matrix(compressed: bytes | memoryview, kind: str) -> NDArray:
    """A zlib-compressed MatrixFloat ("<f4") or MatrixInt32 ("int") as an array of its shape.

    Raises:
        ValueError: for anything else, or a shape that its numbers do not fill.
    """
    try:
        table = _table(memoryview(zlib.decompress(compressed)))
    except zlib.error as error:
        raise ValueError(f"not zlib-compressed ({error})") from error
    data = _integers(table[1]) if kind == "int" else _numbers(table[1], kind)
    shape = _integers(_table(table[2][0])[1]) if table[2] else np.empty(0, np.int64)
    if len(shape) == 0 or (shape <= 0).any() or int(np.prod(shape)) != len(data):
        raise ValueError(f"{len(data)} numbers do not fill a matrix of shape {shape.tolist()}")
    return data.reshape(shape)


# ---- frames


@dataclass
class Laser:
    """One of the five sensors in a frame; images are decompressed when asked for.

    `inclinations` (rows,) radians, lowest first, or None where they are evenly spread over `span`; `extrinsic` (4, 4)
    sensor to vehicle; `images`, `labels` compressed, one or two returns, empty bytes where there are none.
    """

    name: int
    extrinsic: NDArray
    inclinations: NDArray | None
    span: tuple[float, float]
    images: list[memoryview]
    labels: list[memoryview]
    pixel_pose: memoryview | None


class Frame:
    """One record: `context` and `timestamp` at once, everything else when asked for.

    Args:
        message: the record's bytes.
        where: file and record, for messages.

    Raises:
        InputError: for a record that is no Frame or lacks a field; the text names it.
    """

    def __init__(self, message: memoryview, where: str) -> None:
        self.where = where
        self._fields = self._read("Frame", message)
        self._context = self._read("context", self._one(self._fields, 1, "context"))
        self.timestamp: int = self._one(self._fields, 2, "timestamp_micros", int)
        try:
            self.context = bytes(self._one(self._context, 1, "context.name")).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"context.name is no text ({error})") from error
        if not self.context or "/" in self.context:
            raise self.fail(f"context.name is {self.context!r}, no name")

    @property
    def labelled(self) -> bool:
        """Whether a laser has segmentation labels."""
        lasers = (self._read("laser", laser) for laser in self._fields[5])
        returns = (self._read("return", r) for laser in lasers for r in (*laser[2], *laser[3]))
        return any(len(self._last(r, 6, _LABELS)) > 0 for r in returns)

    def pose(self) -> NDArray:
        """Vehicle to world (4, 4) float64."""
        return self._transform(self._one(self._fields, 3, "pose"), "pose")

    def lasers(self) -> list[Laser]:
        """The sensors with a calibration, by name (TOP first)."""
        found = {}
        for entry in self._fields[5]:
            table = self._read("laser", entry)
            found[self._name(table, "laser.name")] = table
        result = []
        for entry in self._context[3]:
            table = self._read("laser calibration", entry)
            name = self._name(table, "laser_calibrations.name")
            if name not in found:
                self._missing(f"laser {LASERS.get(name, name)}")
            result.append(self._laser(name, table, found[name]))
        if not result:
            self._missing("context.laser_calibrations")
        return sorted(result, key=lambda laser: laser.name)

    def _laser(self, name: int, calibration: dict, laser: dict) -> Laser:
        label = LASERS.get(name, str(name))
        what = f"the calibration of {label}"
        table = self._try(_numbers, calibration[2], "<f8", what=what)
        span = (0.0, 0.0)
        if not len(table):
            ends = [self._one(calibration, i, f"beam_inclination of {label}") for i in (3, 4)]
            span = tuple(float(self._try(_numbers, [end], "<f8", what=what)[0]) for end in ends)
        extrinsic = self._one(calibration, 5, f"extrinsic of {label}")
        returns = [self._read(f"return of {label}", r) for i in (2, 3) for r in laser[i]]
        if not returns:
            self._missing(f"ri_return1 of {label}")
        images = [self._one(r, 2, f"range_image_compressed of {label}") for r in returns]
        pixels = None
        if name == TOP:
            pixels = self._one(returns[0], 4, f"range_image_pose_compressed of {label}")
        return Laser(
            name=name,
            extrinsic=self._transform(extrinsic, f"extrinsic of {label}"),
            inclinations=table if len(table) else None,
            span=span,
            images=images,
            labels=[self._last(r, 6, _LABELS) for r in returns],
            pixel_pose=pixels,
        )

    def image(self, compressed: memoryview, kind: str, what: str) -> NDArray:
        """A decompressed matrix (rows, columns, channels); see `matrix`."""
        return self._try(matrix, compressed, kind, what=what)

    def fail(self, text: str) -> InputError:
        """The error to raise about this record."""
        return InputError(f"{self.where}: {text}; {_AGAIN}")

    def _transform(self, message: memoryview, what: str) -> NDArray:
        numbers = self._try(_numbers, self._read(what, message)[1], "<f8", what=what)
        if len(numbers) != 16 or not np.isfinite(numbers).all():
            raise self.fail(f"{what} has {len(numbers)} numbers, expected 16 finite ones")
        return numbers.reshape(4, 4).astype(np.float64)

    def _read(self, what: str, message: memoryview) -> dict[int, list[Any]]:
        return self._try(_table, message, what=what)

    def _try(self, function: Any, *args: Any, what: str) -> Any:
        try:
            return function(*args)
        except (ValueError, TypeError) as error:
            raise self.fail(f"{what} cannot be read: {error}") from error

    def _one(
        self, table: dict[int, list[Any]], number: int, what: str, kind: type = memoryview
    ) -> Any:
        if not table[number]:
            self._missing(what)
        return self._last(table, number, what, kind)

    def _last(
        self, table: dict[int, list[Any]], number: int, what: str, kind: type = memoryview
    ) -> Any:
        """The value that counts where a field is repeated; empty bytes where it is not there."""
        value = table[number][-1] if table[number] else memoryview(b"")
        if not isinstance(value, kind):
            raise self.fail(f"{what} is of another type")
        return value

    def _name(self, table: dict[int, list[Any]], what: str) -> int:
        return self._one(table, 1, what, int)

    def _missing(self, what: str) -> None:
        raise InputError(
            f"{self.where}: no {what}; expected a Frame of the perception data set, v1.x with LiDAR"
        )


def read_frames(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """The frames of a segment file.

    Raises:
        InputError: see `read_records` and `Frame`; also for a file without a record.
    """
    number = -1
    for number, message in read_records(path):
        yield Frame(message, f"{path}: record {number}")
    if number < 0:
        raise InputError(f"{path}: the file is empty; download it again")
