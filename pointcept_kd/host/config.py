"""`Config`, and what turns a command line into a run: defaults, parser, setup, seeds."""

from __future__ import annotations

import argparse
import copy
import os
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import comm
from .dialect import (
    RESERVED,
    ConfigDict,
    flat_keys,
    merge,
    nearest,
    parse_options,
    read_file,
    run_custom_imports,
    shipped_root,
)
from .errors import InputError
from .pretty import print_source

__all__ = [
    "RUNTIME_DEFAULTS", "Config", "ConfigDict", "build_parser", "default_setup", "fill_defaults",
    "find_config", "parse_options", "set_seed",
]  # fmt: skip

# The runtime keys of Pointcept with its defaults, but no more workers than a laptop has cores and
# no log-in to a service; below them what only this host reads. A config dumped with all of these
# also runs on Pointcept 1.5.2 and later.
RUNTIME_DEFAULTS: dict[str, Any] = {
    "weight": None,
    "resume": False,
    "evaluate": True,
    "test_only": False,
    "seed": None,
    "save_path": "exp/default",
    "num_worker": 2,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "batch_size_val": None,
    "batch_size_test": None,
    "epoch": 100,
    "eval_epoch": 100,
    "clip_grad": None,
    "sync_bn": False,
    "enable_amp": False,
    "amp_dtype": "float16",
    "empty_cache": False,
    "empty_cache_per_epoch": False,
    "find_unused_parameters": False,
    "enable_wandb": False,
    "wandb_project": "pointcept",
    "wandb_key": None,
    "mix_prob": 0,
    "param_dicts": None,
    "hooks": [
        {"type": "CheckpointLoader"},
        {"type": "ModelHook"},
        {"type": "IterationTimer", "warmup_iter": 2},
        {"type": "InformationWriter"},
        {"type": "SemSegEvaluator"},
        {"type": "CheckpointSaver", "save_freq": None},
        {"type": "PreciseEvaluator", "test_last": False},
    ],
    "train": {"type": "DefaultTrainer"},
    "test": {"type": "SemSegTester", "verbose": True},
    "device": None,  # None: CUDA if there is one, else the CPU
    "deterministic": True,
    "global_loss": True,  # means of losses over the points of all processes; False: each process its own, as Pointcept
    "dist_timeout": 60,  # minutes that a message between processes may take
    "log_interval": 10,
}

# Keys that an option may set although most configs leave them out.
OPTIONAL_KEYS = (
    "test.mode", "test.tta", "test.reuse", "test.save_predictions", "test.save_probabilities",
    "test.save_submission", "test.verbose", "custom_imports", "data.val", "data.test",
    "data.train.cache", "data.val.cache", "data.test.cache",
)  # fmt: skip


class Config:
    """A config with attribute and item access: `cfg.model.backbone`, `cfg["model"]["backbone"]`.

    Nested dicts are `ConfigDict`s, also those assigned later. A missing key raises AttributeError
    or KeyError naming the nearest one. Reading, merging and printing follow Pointcept's dialect.

    Args:
        values: the content; copied.
        text: the source that it was read from.
        filename: the file that it was read from.
    """

    def __init__(
        self,
        values: Mapping[str, Any] | None = None,
        text: str = "",
        filename: str | Path | None = None,
    ) -> None:
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise InputError(f"a Config holds a dict, got {values!r}")
        for key in RESERVED:
            if key in values:
                raise InputError(f"config key {key!r} is a reserved name; choose another")
        object.__setattr__(self, "_values", ConfigDict(dict(values)))
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_filename", None if filename is None else str(filename))

    @classmethod
    def fromfile(cls, path: str | Path, import_custom_modules: bool = True) -> Config:
        """Read a config file with its bases, and import what its `custom_imports` lists.

        Raises:
            InputError: for a missing or malformed file; the message has file, line and remedy.
        """
        values, text = read_file(Path(path))
        if import_custom_modules:
            run_custom_imports(values.get("custom_imports"), str(path))
        return cls(values, text, path)

    @property
    def filename(self) -> str | None:
        """The file this was read from."""
        return self._filename

    @property
    def text(self) -> str:
        """The source of that file and of its bases, each under its path."""
        return self._text

    @property
    def pretty_text(self) -> str:
        """The merged config as Python source; reading it back gives an equal config."""
        return print_source(self._values)

    def dump(self, path: str | Path) -> None:
        """Write `pretty_text` to a file.

        Raises:
            InputError: for a value without a literal form, or a path that cannot be written.
        """
        text = self.pretty_text
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot write the config ({error.strerror})") from error

    def merge_from_dict(self, options: Mapping[str, Any], allow_new: bool = False) -> None:
        """Set dotted keys: `{"data.train.transform.2.grid_size": 0.1}`; digits index lists.

        Args:
            options: dotted key to value, as `parse_options` gives it; dicts merge, all else
                replaces. A `+` before a key adds one that does not exist yet.
            allow_new: take unknown keys without the `+`.

        Raises:
            InputError: for an unknown key, with the nearest known one; nothing is changed then.
        """
        merged: Any = self._values
        for dotted, value in options.items():
            key = dotted.removeprefix("+")
            parts = key.split(".")
            optional = [*RUNTIME_DEFAULTS, *OPTIONAL_KEYS]
            if not (allow_new or key != dotted or key in optional or _has(merged, parts)):
                hint = nearest(key, [*flat_keys(merged), *optional])
                raise InputError(
                    f"option {key}: the config has no such key{hint}"
                    f"{' Or' if hint else ';'} write +{key}=... to add it on purpose"
                )
            for part in reversed(parts):
                value = {part: value}
            merged = merge(value, merged, where=f"option {key}", options=True)
        object.__setattr__(self, "_values", ConfigDict(merged))

    def to_dict(self) -> dict[str, Any]:
        """A deep copy in plain dicts."""
        return _plain(self._values)

    def __getattr__(self, name: str) -> Any:
        # Unpickling and copying look names up before there is a content.
        if name.startswith("__") or "_values" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._values, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RESERVED:
            raise AttributeError(f"{name} is read-only")
        setattr(self._values, name, value)

    def __delattr__(self, name: str) -> None:
        if name not in self._values:
            raise AttributeError(f"the config has no key {name!r}{nearest(name, self._values)}")
        del self._values[name]

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        other = other._values if isinstance(other, Config) else other
        return self._values == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Config ({self._filename or 'no file'}): {dict(self._values)!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self._values), self._text, self._filename)

    def __copy__(self) -> Config:
        return Config(self._values, self._text, self._filename)

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return Config(copy.deepcopy(self._values, memo), self._text, self._filename)


# What takes a dict (a registry's `build`, `merge_from_dict`) takes a Config as well.
Mapping.register(Config)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner) for inner in value)
    return copy.deepcopy(value)


def _has(values: Any, parts: Sequence[str]) -> bool:
    """Whether the dotted key exists; an index outside its list passes, to be answered as such."""
    for part in parts:
        if isinstance(values, (list, tuple)):
            if not part.isdigit() or int(part) >= len(values):
                return True
            values = values[int(part)]
        elif isinstance(values, Mapping) and part in values:
            values = values[part]
        else:
            return False
    return True


def fill_defaults(cfg: Any) -> Any:
    """Give the runtime keys that a config leaves out their defaults; returns the config."""
    for key, value in RUNTIME_DEFAULTS.items():
        if key not in cfg:
            cfg[key] = copy.deepcopy(value)
    return cfg


# ------------------------------------------------------------------------------------- command line


class _OptionsAction(argparse.Action):
    """Collect `k=v` words, also of a repeated `--options`, into one dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        options = {**(getattr(namespace, self.dest) or {}), **parse_options(values)}
        setattr(namespace, self.dest, options)


def build_parser(
    description: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The arguments that the train and test tools share; the caller may add its own."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", default="", help="config, a Python file")
    add(
        "--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (default 1)"
    )
    add("--num-machines", type=int, default=1, metavar="N", help="machines in the run (default 1)")
    add(
        "--machine-rank", type=int, default=0, metavar="I", help="index of this machine (default 0)"
    )
    add("--dist-url", default="auto", metavar="URL", help="meeting point, tcp://host:port or auto")
    add(
        "--options",
        nargs="+",
        action=_OptionsAction,
        default=None,
        metavar="KEY=VALUE",
        help="change config keys, for example epoch=2 data.train.transform.0.p=1; "
        "+key=value adds a new one",
    )
    return parser


def find_config(name: str | Path) -> Path:
    """The config file that a `--config-file` means.

    The name itself; else in the `configs` folder of the working folder or of the package; each
    also with its first dash read as a path separator (`kd-street` for `kd/street.py`) and with
    `.py` added.

    Raises:
        InputError: for a name that leads to no file, listing the nearest ones.
    """
    if not str(name):
        raise InputError(
            "no config given; name one with --config-file, for example configs/kd/NAME.py"
        )
    given = Path(name).expanduser()
    split = Path(str(given).replace("-", os.sep, 1))
    checkout = shipped_root()
    places = [Path(), Path("configs"), checkout, checkout / "configs"]
    for place in places:
        for spelling in (given, split):
            for path in (place / spelling, place / spelling.with_name(spelling.name + ".py")):
                if path.is_file():
                    return path
    folder = next((p for p in (Path("configs"), checkout / "configs") if p.is_dir()), None)
    known = (
        sorted(str(p) for p in folder.rglob("*.py")) if folder and not given.is_absolute() else []
    )
    if known:
        by_stem = {Path(p).stem: p for p in known}
        close = nearest(given.stem, by_stem, start="")[:-1]
        if close:
            raise InputError(f"{name}: there is no such config file; nearest: {by_stem[close]}")
    return given


def _check_count(cfg: Any, key: str, low: int = 1) -> None:
    value = cfg.get(key)
    if type(value) is not int or value < low:
        raise InputError(f"{key}={value!r} must be a whole number, {low} or more")


def default_setup(cfg: Any) -> Any:
    """Fill what depends on the number of processes, and seed this one; call it after they have met.

    Adds `num_worker_per_gpu`, `batch_size_per_gpu`, `batch_size_val_per_gpu` and
    `batch_size_test_per_gpu`. The first process's seed holds for all.

    Raises:
        InputError: for a batch size that does not divide among the processes.
    """
    world = comm.get_world_size()
    if cfg.get("num_worker") is None:
        cfg.num_worker = os.cpu_count() or 1
    _check_count(cfg, "num_worker", low=0)
    # Asking for workers at all means at least one in every process.
    cfg.num_worker_per_gpu = max(cfg.num_worker // world, min(cfg.num_worker, 1))
    for key in ("batch_size", "batch_size_val", "batch_size_test"):
        if key != "batch_size" and cfg.get(key) is None:
            cfg[f"{key}_per_gpu"] = 1
            continue
        _check_count(cfg, key)
        if cfg[key] % world != 0:
            raise InputError(
                f"{key}={cfg[key]} must be a multiple of the {world} processes; "
                f"set {key}={-(-cfg[key] // world) * world}"
            )
        cfg[f"{key}_per_gpu"] = cfg[key] // world
    drawn = secrets.randbelow(2**31) if cfg.get("seed") is None else cfg.seed
    cfg.seed = comm.broadcast(drawn)
    offset = comm.get_rank() * cfg.num_worker_per_gpu
    set_seed(cfg.seed + offset, cfg.get("deterministic", True))
    return cfg


# -------------------------------------------------------------------------------------------- seeds


def set_seed(seed: int | None, deterministic: bool = True) -> int:
    """Seed Python, NumPy and PyTorch (CPU and CUDA); returns the seed.

    Args:
        seed: None draws one.
        deterministic: also make cuDNN choose its algorithms the same way every time.
    """
    seed = secrets.randbelow(2**31) if seed is None else int(seed)
    os.environ["PYTHONHASHSEED"] = str(seed % 2**32)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return seed
