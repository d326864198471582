"""What the text headers and text tables of point cloud files have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

COPY_AGAIN = "the file is cut off or damaged, copy it again"


def table(path: Path, words: list[bytes], names: list[str], rows: int) -> NDArray:
    """Text words, row by row, as a structured array of float64.

    Raises:
        InputError: for too few words, or one that is no number, with its row.
    """
    width = len(names)
    if len(words) < rows * width:
        raise InputError(
            f"{path}: {len(words)} numbers for {rows} points of {width} values, expected {rows * width}; {COPY_AGAIN}"
        )
    words = words[: rows * width]
    try:
        # An array of words is as wide as its longest one.
        if max(map(len, words), default=0) > 64:
            raise ValueError
        values = np.array(words).astype(np.float64) if words else np.empty(0)
    except ValueError as error:
        bad = next(i for i, word in enumerate(words) if not _is_number(word))
        raise InputError(
            f"{path}: point {bad // width}, {names[bad % width]}: {words[bad].decode(errors='replace')[:40]!r} is no "
            "number; correct the file"
        ) from error
    return values.view([(name, np.float64) for name in names])


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return len(word) <= 64


def unique(names: list[str]) -> list[str]:
    """Names that may stand together in a dtype: of equal ones (`_` for padding) the later get a number."""
    return [f"{name} {i}" if name in names[:i] else name for i, name in enumerate(names)]


def header_line(path: Path, data: bytes, start: int) -> tuple[list[str], int]:
    """The words of one header line, and where the next line starts."""
    end = data.find(b"\n", start)
    if end < 0 or end - start > 4096:
        raise InputError(f"{path}: the header has no end; {COPY_AGAIN}")
    return data[start:end].decode("latin-1").split(), end + 1


def whole_number(path: Path, word: str, what: str, low: int = 0, high: int = 2**40) -> int:
    """A whole number of a header.

    Raises:
        InputError: for anything else, or one outside `low`..`high`.
    """
    if not word.isdecimal() or len(word) > 18 or not low <= int(word) <= high:
        raise InputError(
            f"{path}: {what} is {word[:40]!r}; expected a whole number from {low} to {high}"
        )
    return int(word)
