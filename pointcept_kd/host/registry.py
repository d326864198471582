"""Registries: a class for every `type` name of a config.

A registry may have children, each with a scope: `type="kd.Distiller"` asks the child `kd`, and a child passes a name
that it does not know on to its parent. The semantics are those of Pointcept's registries, so that one config means
the same on both hosts; unlike there, an unknown name is answered with its nearest neighbours and an exception inside
a constructor keeps its type, its text and its traceback.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .errors import InputError


class Registry:
    """Name to class.

    Args:
        name: what the entries are ("models", "hooks", ...); shown in error messages.
        scope: the word before the dot in a scoped type name; the root's scope may be spelled out too.
        parent: the registry that this one joins as a child under `scope`.
    """

    def __init__(self, name: str, scope: str = "pointcept", parent: Registry | None = None) -> None:
        self.name = name
        self.scope = scope
        self.parent = parent
        self.children: dict[str, Registry] = {}
        self._classes: dict[str, type] = {}
        if parent is not None:
            if scope in parent.children:
                raise KeyError(f"scope {scope!r} exists in the {parent.name} registry already")
            parent.children[scope] = self

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __len__(self) -> int:
        return len(self._classes)

    def __repr__(self) -> str:
        return f"Registry(name={self.name!r}, scope={self.scope!r}, {len(self)} classes)"

    def names(self) -> list[str]:
        """Every name that `build` understands here, children's names with their scope."""
        own = sorted(self._classes)
        return own + [
            f"{scope}.{n}" for scope, child in self.children.items() for n in child.names()
        ]

    def get(self, name: str) -> type | None:
        """The class behind a name, or None. `scope.name` looks into the child of that scope."""
        scope, dot, rest = name.partition(".")
        if dot:
            if scope == self.scope:
                return self.get(rest)
            if scope in self.children:
                return self.children[scope].get(rest)
            return self.parent.get(name) if self.parent is not None else None
        if name in self._classes:
            return self._classes[name]
        return self.parent.get(name) if self.parent is not None else None

    def register_module(
        self,
        name: str | list[str] | None = None,
        force: bool = False,
        module: type | None = None,
    ) -> Any:
        """Register a class, as a decorator or by a call with `module`.

        Registering the same class again changes nothing; a refused name leaves no other one behind.

        Raises:
            TypeError: for anything but a class, or a name that is no string.
            KeyError: for a name with a dot, or one that another class holds while `force` is off.
        """

        def register(cls: type) -> type:
            if not inspect.isclass(cls):
                raise TypeError(f"only classes can be registered, got {cls!r}")
            names = name if isinstance(name, list) else [cls.__name__ if name is None else name]
            for key in names:
                if not isinstance(key, str) or not key:
                    raise TypeError(f"a registered name must be a non-empty string, got {key!r}")
                if "." in key:
                    raise KeyError(
                        f"{key!r}: the part before a dot is a scope; register without a dot"
                    )
                held = self._classes.get(key)
                if held is not None and held is not cls and not force:
                    raise KeyError(f"{key} is registered in the {self.name} registry already")
            self._classes.update(dict.fromkeys(names, cls))
            return cls

        if inspect.isclass(name):
            # Without the parentheses the class itself arrives here and would be lost.
            raise TypeError(f"write @register_module() with parentheses above {name.__name__}")
        return register(module) if module is not None else register

    def resolve(self, kind: str | type) -> type:
        """The class for a `type` entry.

        Raises:
            InputError: for a name that is not registered; the message lists the nearest names.
        """
        if inspect.isclass(kind):
            return kind
        if not isinstance(kind, str):
            raise InputError(f"type must be a name or a class, got {kind!r}")
        found = self.get(kind)
        if found is not None:
            return found
        known = (self.parent or self).names()
        # Own names come first, so that X is offered before a kd.X of the same class.
        bare: dict[str, str] = {}
        for name in known:
            bare.setdefault(name.rpartition(".")[2].lower(), name)
        wanted = kind.rpartition(".")[2].lower()
        near = [bare[n] for n in difflib.get_close_matches(wanted, list(bare), 3, 0.5)]
        if near:
            hint = f"nearest: {', '.join(near)}"
        else:
            hint = (
                f"known: {', '.join(known[:20])}" if known else "it is empty: import what fills it"
            )
        raise InputError(f"{kind!r} is not in the {self.name} registry; {hint}")

    def build(self, cfg: Mapping[str, Any], default_args: Mapping[str, Any] | None = None) -> Any:
        """Build the object a config entry describes.

        Args:
            cfg: has `type`; the remaining entries are keyword arguments.
            default_args: fill keywords that `cfg` lacks.

        Raises:
            InputError: without `type`, for an unknown one, or for keywords that the constructor does not take.
        """
        if not isinstance(cfg, Mapping):
            raise InputError(f"the {self.name} registry builds from a dict, got {cfg!r}")
        if "type" not in cfg:
            raise InputError(
                f"an entry of the {self.name} registry needs a `type`; got keys {sorted(cfg)}"
            )
        kwargs = {**(default_args or {}), **cfg}
        cls = self.resolve(kwargs.pop("type"))
        _check_keywords(cls, kwargs)
        return cls(**kwargs)


def _check_keywords(cls: type, kwargs: Mapping[str, Any]) -> None:
    """Answer a misspelled or missing keyword before the constructor runs, with the nearest accepted one."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return
    params = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in params.values()):
        for key in kwargs:
            if key not in params:
                near = difflib.get_close_matches(key, list(params), 1)
                hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(params)}"
                raise InputError(f"{cls.__name__} does not take {key!r}{hint}")
    for key, p in params.items():
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and key not in kwargs:
            raise InputError(f"{cls.__name__} needs {key!r}, which the config does not give")


def stand_in(root: Registry, child: Registry, name: str) -> Callable[[type], type]:
    """Register a class that has a namesake in Pointcept.

    The name goes into the `kd` child always, and into the root unless the real Pointcept already holds it there.
    """

    def register(cls: type) -> type:
        child.register_module(name, module=cls)
        if root._classes.get(name) is None:
            root.register_module(name, module=cls)
        return cls

    return register
