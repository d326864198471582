"""The one exception a user is meant to read, and its text for a name that nobody knows.

Its text is a single line that says what was wrong, where (file, key, row), what was expected and what to do.
The tools print that line and leave with exit code 2; everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a file, a config or an option that cannot be used as it is."""


def one_line(error: BaseException) -> str:
    """The message of an `InputError`, also of one that a data-loading worker re-raised with its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    prefix, _, rest = last.partition(": ")
    return rest if prefix.endswith("InputError") else last


def check_choice(what: str, name: object, known: Iterable[str]) -> None:
    """Check that a name is one of those known.

    Raises:
        InputError: for one that is not, with the nearest ones.
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, 2, 0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise InputError(f"{what}={name!r} is none of {', '.join(names)}{hint}")
