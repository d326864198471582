"""pointcept_kd: distil big LiDAR networks into small ones.

Importing the package registers every class of its rooms, and those of installed plugins (packages with an entry point
in the group `pointcept_kd.plugins`), so that configs can name them. POINTCEPT_KD_PLUGINS=0 leaves the plugins out.

The command `pointcept-kd` (also `python -m pointcept_kd`) only starts a tool in a process of its own, so in its own one
the rooms, and with them torch, are not imported.
"""

import os
import sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the command and not one of the tools that it starts."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if program == "-m":  # Python is still looking for the module to run
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1 :][:1] == [__name__]
    return os.path.basename(program).removesuffix(".exe") == "pointcept-kd"


def _load_plugins() -> None:
    """Import what other packages register.

    Raises:
        InputError: for a plugin that cannot be imported; as an uncaught error it is shown as that one line.
    """
    from importlib.metadata import entry_points

    wanted = os.environ.get("POINTCEPT_KD_PLUGINS", "1")
    if wanted not in ("0", "1"):
        raise host.InputError(
            f"POINTCEPT_KD_PLUGINS={wanted}: use 0 (no plugins) or 1 (all that are installed)"
        )
    for plugin in entry_points(group="pointcept_kd.plugins") if wanted == "1" else ():
        try:
            plugin.load()
        except Exception as error:
            package = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            refused = host.InputError(
                f"plugin {plugin.name!r} ({plugin.value}) of the package {package} cannot be loaded ({reason}): repair "
                "or uninstall that package, or set POINTCEPT_KD_PLUGINS=0"
            )
            _show_as_one_line(refused)
            raise refused from error


def _show_as_one_line(refused: Exception) -> None:
    # The tools import this package before anything of theirs could catch the error.
    shown = sys.excepthook

    def hook(kind, error, trace):
        if error is refused:
            print(f"error: {error}", file=sys.stderr)
        else:
            shown(kind, error, trace)

    sys.excepthook = hook


if _is_command():
    __all__ = ["__version__"]
else:
    try:
        from . import completion, data, distillers, engine, host, networks, ops
    except ValueError as _error:
        # A host that cannot be had: its own class of errors cannot be imported without it.
        if type(_error).__name__ == "InputError":
            _show_as_one_line(_error)
        raise
    from .host import trainer as _trainer  # noqa: F401  registers trainers, hooks and testers

    _load_plugins()

    __all__ = [
        "__version__",
        "completion",
        "data",
        "distillers",
        "engine",
        "host",
        "networks",
        "ops",
    ]
