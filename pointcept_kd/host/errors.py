"""The one exception a user is meant to read.

Its text is a single line that says what was wrong, where (file, key, row), what was expected and what to do.
The tools print that line and leave with exit code 2; everything else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input: a file, a config or an option that cannot be used as it is."""


def one_line(error: BaseException) -> str:
    """The message of an `InputError`, also of one that a data-loading worker re-raised with its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    prefix, _, rest = last.partition(": ")
    return rest if prefix.endswith("InputError") else last
