"""What the readers of LiDAR data sets share: files of points, labels and numbers, and rows that are not finite."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pointcept_kd.host import InputError

NONFINITE = ("error", "drop")  # what a reader may be asked to do with points that are not finite
REPAIR = "repair the file or set nonfinite='drop'"
_UNKNOWN = -2  # in a table of classes: no class of the data set


def require_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a reader's argument that is none of the choices.

    Raises:
        InputError: with the argument and the choices.
    """
    if value not in choices:
        raise InputError(f"{key}={value!r}: use {' or '.join(map(repr, choices))}")


class WarnOnce:
    """A warning for the first of many like cases; every process that loads samples has its own first."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.said = False

    def __call__(self, text: str, *values: object) -> None:
        """Log `text % values`, unless something was logged before."""
        if not self.said:
            self.said = True
            self.logger.warning(text, *values)


# --------------------------------------------------------------------------------------------- files


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Content of a file.

    Raises:
        InputError: for a file that cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_points(path: str | os.PathLike[str], columns: int, kind: str) -> NDArray:
    """Points (n, columns) float32 of a file of little-endian float32. Non-finite values are left in.

    Args:
        kind: what the file should be, for the message: "velodyne scan".

    Raises:
        InputError: for a file that cannot be read, is cut off or holds no point.
    """
    data = read_bytes(path)
    if len(data) % (4 * columns):
        raise InputError(
            f"{path}: {len(data)} bytes are no whole number of points of {4 * columns} bytes; "
            f"the file is cut off or no {kind}, copy it again"
        )
    if not data:
        raise InputError(f"{path}: the scan has no points; copy the file again or remove the scan")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, columns)


def read_values(path: str | os.PathLike[str], dtype: DTypeLike, points: int | None) -> NDArray:
    """Labels (n,) of a file of little-endian `dtype`, as stored there.

    Args:
        points: how many points the scan has; None where that is not known.

    Raises:
        InputError: for a file that cannot be read, or whose length is not that of the scan.
    """
    data, stored = read_bytes(path), np.dtype(dtype)
    width = stored.itemsize
    if len(data) % width or (points is not None and len(data) != width * points):
        expected = (
            f"{width} bytes each" if points is None else f"{width * points} for {points} points"
        )
        raise InputError(
            f"{path}: {len(data)} bytes of labels, expected {expected}; "
            "scan and label file do not belong together or one is cut off"
        )
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="))


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The rows of a text file that are not blank, each with its number from 0.

    Raises:
        InputError: for a file that cannot be read or is no text.
    """
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error.reason})") from error
    return [(row, line) for row, line in enumerate(text.splitlines()) if line.strip()]


def finite_numbers(words: Sequence[str], count: int) -> NDArray | None:
    """Words as float64 (count,); None unless they are so many finite numbers."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def numbers_of_row(path: str | os.PathLike[str], row: int, text: str, count: int) -> NDArray:
    """The numbers (count,) float64 in a row of a text file.

    Raises:
        InputError: for anything but so many finite numbers.
    """
    values = finite_numbers(text.split(), count)
    if values is None:
        raise InputError(
            f"{path}: row {row} should hold {count} finite numbers, got {text.strip()[:60]!r}"
        )
    return values


# -------------------------------------------------------------------------------------------- labels


def class_table(train_ids: Mapping[int, int], size: int) -> NDArray:
    """Raw class id to train id as an array (size,) int32 for `map_classes`, with a mark at all other ids."""
    table = np.full(size, _UNKNOWN, np.int32)
    table[list(train_ids)] = list(train_ids.values())
    return table


def map_classes(ids: NDArray, table: NDArray, listed: str, ignore_index: int) -> NDArray:
    """Raw class ids (n,) to train ids (n,) int32; those below 0 become `ignore_index`.

    Args:
        table: of `class_table`, as long as ids can be high.
        listed: where ids should be, for the message: "in the list".

    Raises:
        ValueError: for ids that the table does not know; the text names the first.
    """
    mapped = table[ids]
    unknown = mapped == _UNKNOWN
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(
            f"class id {int(ids[row])} in row {row} is not {listed} ({int(unknown.sum())} such points)"
        )
    return np.where(mapped < 0, np.int32(ignore_index), mapped)


@contextmanager
def in_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in a ValueError about its content.

    Raises:
        InputError: in place of the ValueError.
    """
    try:
        yield
    except InputError:  # names the file already
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}; the file is damaged or of another data set") from error


# ------------------------------------------------------------------------------ values that are not finite


def finite_rows(
    path: str | os.PathLike[str], values: NDArray, drop: bool, remedy: str = REPAIR
) -> NDArray | slice:
    """What to index the rows of a scan with to keep those that are finite: a mask, or a slice of all.

    Args:
        path: of the scan, for messages.
        values: (n, c) all that was read for its points.
        drop: leave bad rows out; False refuses the scan.
        remedy: what to do about a bad row, for the message.

    Raises:
        InputError: for a row that is not finite, or when all of them would be dropped.
    """
    # Far cheaper than a look at every row, and nearly always the answer.
    if np.isfinite(values).all():
        return slice(None)
    finite = np.isfinite(values).all(1)
    bad = int((~finite).sum())
    if not drop:
        row = int(np.argmin(finite))
        raise InputError(
            f"{path}: row {row} is not finite {values[row].tolist()}, {bad} of {len(values)} points; {remedy}"
        )
    if bad == len(values):
        raise InputError(f"{path}: all {bad} points are not finite; remove the scan")
    return finite


def nonfinite_problems(path: str | os.PathLike[str], values: NDArray) -> list[str]:
    """One line about the rows (n, c) of a file that are not finite; none where all are."""
    bad = ~np.isfinite(values).all(1)
    if not bad.any():
        return []
    return [
        f"{path}: {int(bad.sum())} points are not finite, the first in row {int(np.argmax(bad))}"
    ]


def keep_some_labels(segment: NDArray, share: float, scan: str, ignore_index: int) -> None:
    """Take the labels of all but about `share` of a scan's points away, in place.

    Seeded by the scan's name: which points are labelled is a fact of the data, not of a run.
    """
    if share < 1:
        seed = np.frombuffer(scan.encode(), np.uint8)
        segment[np.random.default_rng(seed).random(len(segment)) >= share] = ignore_index
