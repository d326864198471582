"""Print a config as Python source that reads back to equal values.

The layout is black's: what fits stands on one line, what does not gets one item per line; only long
tables of numbers are packed into rows.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import InputError


def print_source(values: Mapping[str, Any], width: int = 100) -> str:
    """Python source that reads back to equal values, one statement per top-level key.

    Raises:
        InputError: for a key that is no plain name, or a value without a literal form.
    """
    lines = []
    for key, value in values.items():
        if not _is_name(key) or key.startswith("__"):
            raise InputError(f"config key {key!r} cannot be written as a Python name; rename it")
        lines.append(f"{key} = {_print(value, key, 0, len(key) + 3, width)}")
    return "\n".join(lines) + "\n"


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _print(value: Any, at: str, indent: int, used: int, width: int) -> str:
    """Source of a value; `used` columns of its first line are taken already."""
    if not isinstance(value, (Mapping, list, tuple, set)) or not value:
        return _print_scalar(value, at)
    flat = _print_flat(value, at, width - used)
    if flat is not None:
        return flat
    deeper = indent + 4
    pad = "\n" + " " * deeper
    if isinstance(value, Mapping):
        named = all(_is_name(key) for key in value)
        opening, closing = ("dict(", ")") if named else ("{", "}")
        rows = []
        for key, inner in value.items():
            head = f"{key}=" if named else f"{_print_scalar(key, at)}: "
            rows.append(
                head + _print(inner, f"{at}.{key}", deeper, deeper + len(head) + 1, width) + ","
            )
        return opening + pad + pad.join(rows) + "\n" + " " * indent + closing
    opening, closing = {list: "[]", tuple: "()", set: "{}"}[_sequence_type(value, at)]
    items = sorted(value, key=repr) if isinstance(value, set) else value
    texts = [_print(v, f"{at}.{i}", deeper, deeper + 1, width) + "," for i, v in enumerate(items)]
    numbers = all(type(v) in (int, float) for v in items)
    rows = _fill(texts, width - deeper) if numbers else texts
    return opening + pad + pad.join(rows) + "\n" + " " * indent + closing


def _fill(texts: list[str], room: int) -> list[str]:
    """Pack items into rows, so that a long table takes a few lines instead of hundreds."""
    rows = [texts[0]]
    for text in texts[1:]:
        if len(rows[-1]) + 1 + len(text) <= room:
            rows[-1] += " " + text
        else:
            rows.append(text)
    return rows


def _print_flat(value: Any, at: str, room: int) -> str | None:
    """The value on one line, or None if that is longer than the room left."""
    if not isinstance(value, (Mapping, list, tuple, set)) or not value:
        text = _print_scalar(value, at)
        return text if len(text) <= room else None
    parts: list[str] = []
    left = room - 2
    if isinstance(value, Mapping):
        named = all(_is_name(key) for key in value)
        left -= 4 if named else 0
        for key, inner in value.items():
            head = f"{key}=" if named else f"{_print_scalar(key, at)}: "
            text = _print_flat(inner, f"{at}.{key}", left - len(head))
            if text is None:
                return None
            parts.append(head + text)
            left -= len(head) + len(text) + 2
        body = ", ".join(parts)
        text = f"dict({body})" if named else f"{{{body}}}"
    else:
        items = sorted(value, key=repr) if isinstance(value, set) else value
        for i, inner in enumerate(items):
            text = _print_flat(inner, f"{at}.{i}", left)
            if text is None:
                return None
            parts.append(text)
            left -= len(text) + 2
        opening, closing = {list: "[]", tuple: "()", set: "{}"}[_sequence_type(value, at)]
        comma = "," if isinstance(value, tuple) and len(parts) == 1 else ""
        text = opening + ", ".join(parts) + comma + closing
    return text if len(text) <= room else None


def _sequence_type(value: Any, at: str) -> type:
    if type(value) not in (list, tuple, set):
        raise _no_literal(value, at)
    return type(value)


def _print_scalar(value: Any, at: str) -> str:
    if isinstance(value, Mapping):
        return "dict()"
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is str:
        text = repr(value)
        if text[0] == "'" and '"' not in text:
            text = f'"{text[1:-1]}"'
        # A template in a value would be replaced when the file is read: break up its braces.
        return text.replace("{{", r"{\x7b")
    if type(value) is float and not math.isfinite(value):
        return f'float("{value}")'
    if type(value) is bytes:
        return repr(value).replace("{{", r"{\x7b")
    if value is None or type(value) in (bool, int, float, list, tuple):
        return repr(value)
    if type(value) is set:
        return "set()"
    raise _no_literal(value, at)


def _no_literal(value: Any, at: str) -> InputError:
    return InputError(
        f"config key {at} holds {value!r} ({type(value).__name__}), which cannot be written as "
        "Python source; use numbers, strings, lists, tuples and dicts, and classes by their name"
    )
