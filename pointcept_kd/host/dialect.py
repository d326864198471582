"""The config dialect: Python files that inherit by `_base_` and are changed by options.

`Config` in `config.py` is the class to use; here are its parts: reading and merging files, and
reading `key=value` options. The meaning of a file is Pointcept's; the differences are that a
mistake is answered with file, line and nearest name, and that `_delete_` reaches no constructor.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import inspect
import re
import traceback
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import addict

from .errors import InputError

RESERVED = ("filename", "text", "pretty_text")
_BASE, _DELETE, _DEPRECATION = "_base_", "_delete_", "_deprecation_"
_BASE_REFERENCE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_TEMPLATE_WORD = re.compile(
    r"\{\{\s*(fileDirname|fileBasename|fileBasenameNoExtension|fileExtname)\s*\}\}"
)


class ConfigDict(addict.Dict):
    """A dict with attribute access; dicts put into it become `ConfigDict`s.

    A missing key raises KeyError or AttributeError naming the nearest key; reading creates nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for key, value in dict(*args, **kwargs).items():
            dict.__setitem__(self, key, _wrap(value))

    def __missing__(self, name: Any) -> Any:
        raise KeyError(f"{name}{nearest(name, self)}")

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the config has no key {name!r} here{nearest(name, self)}")

    def __setitem__(self, name: Any, value: Any) -> None:
        super().__setitem__(name, value if isinstance(value, ConfigDict) else _wrap(value))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _wrap(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with every dict a `ConfigDict`."""
    if isinstance(value, Mapping):
        return ConfigDict(value)
    if type(value) in (list, tuple):
        return type(value)([_wrap(inner) for inner in value])
    return value


def nearest(name: Any, known: Iterable[Any], start: str = "; did you mean ") -> str:
    """`; did you mean X?` for the name closest to a misspelled one, or nothing."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], 1)
    return f"{start}{close[0]}?" if close else ""


# ---------------------------------------------------------------------------------------- reading


def read_file(path: Path, parents: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """The merged dict of a config file with its bases, and the source text of all of them.

    Raises:
        InputError: for a file that is missing, not Python, or against a rule of the dialect.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"{path}: there is no such config file{_neighbours(path)}")
    if path.suffix != ".py":
        raise InputError(f"{path}: configs are Python files, this one ends in {path.suffix!r}")
    if path.resolve() in parents:
        chain = " -> ".join(p.name for p in (*parents, path))
        raise InputError(f"{path}: `_base_` leads back to the file itself ({chain})")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error

    code, references = _replace_templates(source, path)
    try:
        tree = ast.parse(code, filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InputError(f"{path}:{line}: not valid Python: {one_message(error)}") from error

    base: dict[str, Any] = {}
    texts = [f"{path}\n{source}"]
    owner: dict[str, Path] = {}
    for base_path in _base_paths(tree, path):
        found, text = read_file(base_path, (*parents, path.resolve()))
        texts.insert(-1, text)
        for key, value in found.items():
            if key in owner:
                raise InputError(
                    f"{path}: two bases define {key!r}: {owner[key]} and {base_path}; "
                    "only one of them may"
                )
            owner[key], base[key] = base_path, value

    own = _run(tree, path, _resolve(references, tree, base, path), base)
    own.pop(_BASE, None)
    _warn_if_deprecated(own.pop(_DEPRECATION, None), path)
    return merge(own, base, where=str(path)), "\n".join(texts)


def _neighbours(path: Path) -> str:
    """The names beside a missing path that look like it."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir():
            missing, folder = folder, folder.parent
        close = difflib.get_close_matches(missing.name, [p.name for p in folder.iterdir()], 3, 0.5)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        return f"; the folder {folder} has no {missing.name}{hint}"
    names = sorted(p.name for p in folder.glob("*.py"))
    close = difflib.get_close_matches(path.name, names, 3, 0.4) or names[:5]
    return f"; nearest there: {', '.join(close)}" if close else "; that folder holds no config"


def one_message(error: BaseException) -> str:
    """An exception's own message on one line; its type's name if it has none."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _replace_templates(source: str, path: Path) -> tuple[str, dict[str, str]]:
    """Put the file's name parts into the source, and a stand-in name for every base reference."""
    words = {
        "fileDirname": path.parent.as_posix(),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }
    source = _TEMPLATE_WORD.sub(lambda m: words[m.group(1)], source)
    references: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        # Two leading underscores keep the stand-in out of the config's keys.
        name = f"__base_reference_{len(references)}__"
        references[name] = match.group(1)
        return name

    return _BASE_REFERENCE.sub(stand_in, source), references


def _base_paths(tree: ast.Module, path: Path) -> list[Path]:
    paths: list[str] = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == _BASE for t in targets):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = None
            paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
                raise InputError(
                    f"{path}:{node.lineno}: `_base_` must be a path or a list of paths, written out"
                )
    return [_base_path(path.parent, p) for p in paths]


def _base_path(folder: Path, name: str) -> Path:
    """A base beside the config; one that begins with `configs/` may also be one that comes with this package."""
    beside, shipped = folder / name, shipped_root() / name
    known = Path(name).parts[:1] == ("configs",) and not beside.is_file() and shipped.is_file()
    return shipped if known else beside


def shipped_root() -> Path:
    """The folder that holds the `configs` of this package: the checkout, or a part of an installed package."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_share"
    return inside if inside.is_dir() else package.parent


def _resolve(
    references: dict[str, str], tree: ast.Module, base: dict[str, Any], path: Path
) -> dict[str, Any]:
    """The values of the base references that the code (not only a comment) uses."""
    values: dict[str, Any] = {}
    for node in ast.walk(tree) if references else ():
        if isinstance(node, ast.Name) and node.id in references:
            dotted, value = references[node.id], base
            for part in dotted.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    known = list(flat_keys(base))
                    hint = nearest(dotted, known)
                    raise InputError(f"{path}:{node.lineno}: the bases have no {dotted!r}{hint}")
                value = value[part]
            values[node.id] = copy.deepcopy(value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            quoted = next((name for name in references if name in node.value), None)
            if quoted and not _is_docstring(node, tree):
                bare = f"{{{{ _base_.{references[quoted]} }}}}"
                raise InputError(f"{path}:{node.lineno}: write {bare} without quotes around it")
    return values


def _is_docstring(node: ast.Constant, tree: ast.Module) -> bool:
    return any(isinstance(n, ast.Expr) and n.value is node for n in tree.body)


def _run(
    tree: ast.Module, path: Path, values: dict[str, Any], base: dict[str, Any]
) -> dict[str, Any]:
    """Execute a config and collect its keys: public names that hold data, not code."""
    scope: dict[str, Any] = {"__file__": str(path), "__name__": "__config__", **values}
    try:
        exec(compile(tree, str(path), "exec"), scope)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else 1
        hint = ""
        if isinstance(error, NameError) and error.name:
            if error.name in base:
                hint = f"; a value of a base is written {{{{ _base_.{error.name} }}}}"
            else:
                hint = nearest(error.name, [k for k in scope if not k.startswith("__")])
        message = f"{type(error).__name__}: {one_message(error)}{hint}"
        raise InputError(f"{path}:{line}: {message}") from error
    own = {
        key: value
        for key, value in scope.items()
        if not key.startswith("__") and not _is_code(value) and not _is_future(value)
    }
    for key in own:
        if key in RESERVED:
            raise InputError(f"{path}: {key!r} is a reserved name; choose another key")
        if key == _DELETE:
            raise InputError(f"{path}: `_delete_` belongs inside the dict that it replaces")
    return own


def _is_code(value: Any) -> bool:
    return isinstance(value, types.ModuleType) or inspect.isclass(value) or inspect.isroutine(value)


def _is_future(value: Any) -> bool:
    return type(value).__module__ == "__future__"


def _warn_if_deprecated(notice: Any, path: Path) -> None:
    if notice is None:
        return
    notice = notice if isinstance(notice, Mapping) else {}
    text = f"{path} is deprecated"
    if "expected" in notice:
        text += f"; use {notice['expected']} instead"
    if "reference" in notice:
        text += f"; see {notice['reference']}"
    warnings.warn(text, DeprecationWarning, stacklevel=2)


def run_custom_imports(settings: Any, where: str) -> None:
    """Import the modules in a config's `custom_imports`, so that they register their classes.

    Raises:
        InputError: for a malformed entry, or a module that cannot be imported while
            `allow_failed_imports` is off.
    """
    if not settings:
        return
    if not isinstance(settings, Mapping) or not set(settings) <= {
        "imports",
        "allow_failed_imports",
    }:
        raise InputError(
            f"{where}: custom_imports must be dict(imports=[...], allow_failed_imports=False), "
            f"got {settings!r}"
        )
    names = settings.get("imports") or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{where}: custom_imports.imports holds {name!r}, not a module's name")
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f"{where}: custom_imports cannot import {name!r} ({one_message(error)})"
            if not settings.get("allow_failed_imports", False):
                raise InputError(
                    f"{message}; install it, or set allow_failed_imports=True"
                ) from error
            warnings.warn(message, UserWarning, stacklevel=2)


# ---------------------------------------------------------------------------------------- merging


def merge(
    child: Mapping[str, Any], base: Any, where: str, options: bool = False, at: str = ""
) -> Any:
    """The child over the base: dicts merge key by key, everything else replaces.

    `_delete_=True` in a child's dict drops the base's dict first; the marker itself never stays.

    Args:
        child: what to put over.
        base: a dict, or with `options` also a list or tuple, whose items digit strings name.
        where: the file or option that the child comes from, for messages.
        options: the child comes from the command line.
        at: dotted key of the place in the config.

    Raises:
        InputError: for a dict over something that is no dict, or an index outside its list.
    """
    if options and isinstance(base, (list, tuple)):
        items = list(base)
        for key, value in child.items():
            if not key.isdigit() or int(key) >= len(items):
                raise InputError(
                    f"{where}: {at} is a list of {len(items)}; {key!r} is not an index in it"
                )
            spot = f"{at}.{key}"
            nested = isinstance(value, Mapping)
            over = merge(value, items[int(key)], where, True, spot) if nested else _clean(value)
            items[int(key)] = over
        return type(base)(items)
    if not isinstance(base, Mapping):
        raise InputError(
            f"{where}: {at} is {base!r} below and a dict here; "
            f"a dict replaces it only with _delete_=True inside"
        )
    merged = dict(base)
    for key, value in child.items():
        if key == _DELETE:
            continue
        replace = not isinstance(value, Mapping) or key not in base or value.get(_DELETE, False)
        spot = f"{at}.{key}" if at else str(key)
        merged[key] = _clean(value) if replace else merge(value, base[key], where, options, spot)
    return merged


def _clean(value: Any) -> Any:
    """A copy without any `_delete_`."""
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items() if k != _DELETE}
    if type(value) in (list, tuple):
        return type(value)(_clean(v) for v in value)
    return value


def flat_keys(value: Any, at: str = "") -> Iterable[str]:
    """Every dotted key of nested dicts, lists and tuples."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return
    for key, inner in items:
        spot = f"{at}.{key}" if at else str(key)
        yield spot
        yield from flat_keys(inner, spot)


# ---------------------------------------------------------------------------------------- options


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Options `a.b=value` as a flat dict of dotted keys.

    A value is an int, a float, `true`/`false`, `none`, a list (`1,2` or `[1,2]`) or a tuple
    (`(1,2)`), possibly nested, or else a string; quotes force a string.

    Raises:
        InputError: for a pair without `=`, an empty key, or brackets that do not match.
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not all(key.removeprefix("+").split(".")):
            raise InputError(f"option {pair!r} must read key=value, for example batch_size=4")
        options[key] = _parse_value(text.strip(), pair)
    return options


def _parse_value(text: str, pair: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1]
    parts = _split(text, pair)
    if len(parts) > 1:
        return [_parse_value(part, pair) for part in parts if part]
    if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")):
        inner = _split(text[1:-1], pair)
        items = [_parse_value(part, pair) for part in inner if part]
        return items if text[0] == "[" else tuple(items)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    words = {"true": True, "false": False, "none": None}
    return words.get(text.lower(), text)


def _split(text: str, pair: str) -> list[str]:
    """The pieces between the commas that are outside brackets and quotes."""
    pieces, open_brackets, quote, start = [], [], "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and text[:i].rstrip()[-1:] in ("", "[", "(", ","):
            quote = letter
        elif letter in "[(":
            open_brackets.append("])"["[(".index(letter)])
        elif letter in "])":
            if not open_brackets or open_brackets.pop() != letter:
                raise InputError(f"option {pair!r}: brackets do not match")
        elif letter == "," and not open_brackets:
            pieces.append(text[start:i].strip())
            start = i + 1
    if open_brackets:
        raise InputError(f"option {pair!r}: brackets do not match")
    return [*pieces, text[start:].strip()]
