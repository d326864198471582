"""Nested dicts as YAML that people can read and PyYAML reads back as it was."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

# Words that some reader of YAML 1.1 takes for a bool or for nothing.
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")


def dump(content: Mapping[str, Any], header: str = "") -> str:
    """YAML of a dict of dicts, lists, strings, numbers, bools and None.

    Args:
        header: lines of comment at the top, without `#`.

    Raises:
        TypeError: for other values.
        ValueError: for numbers that are not finite.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    _block(content, 0, lines)
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """One value without children."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be written: expected a finite number")
        # PyYAML takes 1e-07 for a string: YAML 1.1 wants a point, so exponents are written out.
        text = format(Decimal(repr(value)), "f")
        return text if "." in text else f"{text}.0"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if plain else json.dumps(value, ensure_ascii=False)
    raise TypeError(f"{value!r} is a {type(value).__name__}, which is not written as YAML")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _inline(value: Any) -> str:
    if _is_list(value):
        return f"[{', '.join(map(_inline, value))}]"
    return scalar(value)


def _block(content: Mapping[str, Any], depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for key, value in content.items():
        name = f"{pad}{scalar(key)}:"
        if isinstance(value, Mapping) and value:
            lines.append(name)
            _block(value, depth + 1, lines)
        elif isinstance(value, Mapping):
            lines.append(f"{name} {{}}")
        elif _is_list(value) and any(isinstance(inner, Mapping) for inner in value):
            lines.append(name)
            for inner in value:
                start = len(lines)
                _block(inner, depth + 2, lines)
                lines[start] = f"{pad}  - {lines[start].lstrip()}"
        else:
            lines.append(f"{name} {_inline(value)}")
