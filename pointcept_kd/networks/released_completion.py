"""Released weights of LiDiff, its refiner, ScoreLiDAR and Distillation-DPO as weights of this package's networks.

MinkowskiEngine keeps a kernel as (taps, in, out) with x counting fastest, tap = ix + K iy + K^2 iz, and a kernel of one
tap as (in, out). Both it and `ops.sparse` are cross-correlations, its offsets of odd kernels are centred and those of
even ones begin at 0, and its transposed convolutions are the strided ones with input and output exchanged: nothing is
mirrored, (taps, in, out) becomes (out, x, y, z, in) and (in, out) becomes the matrix (out, in) of a linear layer.

Nothing is loaded in part: a key that is not known, one that lacks and one of another shape are errors. The files are
checkpoints of a training program that also pickled its settings; `read_tensors` reads the tensors and runs nothing.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import load_checkpoint

from .denoiser import WIDTHS, ConditionEncoder, Denoiser, Refiner
from .released import ConversionReport, _finish, _meet, _meta, _some

# ------------------------------------------------------------------------------------------------------------- reading


class _Unread:
    """Stands for whatever else a file holds: takes everything, does nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> _Unread:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        return None

    def __call__(self, *_args: Any, **_options: Any) -> _Unread:
        return self

    def __setstate__(self, _state: Any) -> None:
        return None

    def __setitem__(self, _key: Any, _value: Any) -> None:
        return None

    append = extend = add = update = __call__


class _Dict(OrderedDict):
    """`OrderedDict` without the attributes that a file may want to set."""

    def __setstate__(self, _state: Any) -> None:
        return None


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    record: str
    count: int


@dataclass(frozen=True)
class _Stored:
    """A tensor that is still in the file."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, _Storage):
        return _Unread()
    return _Stored(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), _Unread)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, record, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return _Unread()
        return _Storage(dtype, str(record), int(count))


def read_containers(
    path: str | Path, containers: Sequence[str]
) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """The weights in a checkpoint, also of one that pickled objects besides, read without running code from it.

    Names of classes and functions in the file are not looked up; what they would have made is left out. Tensors outside
    of the taken container, such as an optimiser's, are not read. An entry that is no tensor stays what it is.

    Args:
        path: the file.
        containers: keys under which the weights may be; the first that is there is taken.

    Returns:
        the file's dict with tensors unread, the key that was taken, None where the file is weights alone (or of before
        PyTorch 1.6), and the weights.

    Raises:
        InputError: for a missing, damaged or foreign file, and one without weights.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        # Files of PyTorch before 1.6, and what is no checkpoint at all.
        return {}, None, load_checkpoint(path)["state_dict"]
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
            root = name.removesuffix("data.pkl")
            order = f"{root}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers are not in little-endian order")
            with archive.open(name) as file:
                content = _Unpickler(file).load()
            content = content if isinstance(content, dict) else {}
            taken = next((key for key in containers if isinstance(content.get(key), dict)), None)
            weights = content if taken is None else content[taken]
            bare = all(isinstance(value, _Stored) for value in content.values())
            if taken is None and not (content and bare):
                found = _some(sorted(map(str, content))) or "no dict"
                raise InputError(
                    f"{path} has no weights: expected {' or '.join(containers)}, found {found}"
                )
            entries = {
                str(key): _read(archive, root, value) if isinstance(value, _Stored) else value
                for key, value in weights.items()
            }
    except InputError:
        raise
    # A damaged file fails in whatever operation the damaged bytes happen to mean.
    except Exception as error:
        raise InputError(
            f"{path}: not readable as a checkpoint ({type(error).__name__}: {str(error)[:120]}); copy it again"
        ) from error
    return content, taken, entries


def read_tensors(path: str | Path) -> dict[str, Any]:
    """The `state_dict` of a checkpoint; see `read_containers`."""
    return read_containers(path, ("state_dict",))[2]


def _read(archive: zipfile.ZipFile, root: str, stored: _Stored) -> Tensor:
    storage, size, stride = stored.storage, stored.size, stored.stride
    content = bytearray(archive.read(f"{root}data/{storage.record}"))
    if not math.prod(size):
        return torch.empty(size, dtype=storage.dtype)
    last = stored.offset + sum((n - 1) * s for n, s in zip(size, stride))
    numbers = len(content) // storage.dtype.itemsize
    if min(stored.offset, *size, *stride, 0) < 0 or last >= min(numbers, storage.count):
        raise ValueError(f"a tensor {size} lies beyond the end of its numbers")
    flat = torch.frombuffer(content, dtype=storage.dtype)
    return flat.as_strided(size, stride, stored.offset).clone()


# ---------------------------------------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class Layout:
    """A kind of file: its name, prefixes of its encoder, and prefixes of its denoisers by part."""

    title: str
    encoders: tuple[str, ...]
    denoisers: dict[str, tuple[str, ...]]


# Of several prefixes for one thing, the files have one; the order says nothing.
LAYOUTS = {
    "lidiff": Layout(
        "LiDiff", ("partial_enc.", "DM_encoder."), {"teacher": ("model.", "DiffModel.")}
    ),
    "scorelidar": Layout(
        "ScoreLiDAR",
        ("partial_enc.",),
        {"student": ("generator.",), "teacher": ("teacher.",), "auxiliary": ("auxDiff.",)},
    ),
    "distillationdpo": Layout(
        "Distillation-DPO",
        ("partial_enc.",),
        {
            "student": ("generator.",),
            "teacher": ("teacher.",),
            "better": ("auxDiffBetter.",),
            "worse": ("auxDiffWorse.",),
        },
    ),
}
REFINER = ("model_refine.",)


def convert_completion(
    state_dict: Mapping[str, Any], kind: str, part: str | None = None
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights of `kd.ConditionEncoder` under `encoder.` and of `kd.Denoiser` under `denoiser.` from a released file's.

    Args:
        state_dict: the weights under the keys of the file, also with `module.` in front.
        kind: "lidiff", "scorelidar" or "distillationdpo".
        part: which of the file's denoisers, see `LAYOUTS`; by default the first, what the file was released for.

    Raises:
        InputError: for an unknown kind or part, for keys and shapes that are not those of the networks, for encoder and
            denoiser of unlike width, and for numbers that are not finite.
    """
    if kind not in LAYOUTS:
        raise InputError(f"kind={kind!r} is none of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    part = part or next(iter(layout.denoisers))
    if part not in layout.denoisers:
        raise InputError(f"part={part!r} is none of {', '.join(layout.denoisers)}")
    wanted = {
        "encoder": (layout.encoders, ConditionEncoder),
        "denoiser": (layout.denoisers[part], Denoiser),
    }
    return _convert(state_dict, f"{layout.title}, {part}", wanted)


def convert_refiner(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Weights of `kd.Refiner` from those of a released file; arguments and errors as `convert_completion`."""
    return _convert(state_dict, "LiDiff's refiner", {"": (REFINER, Refiner)})


def _convert(
    state_dict: Mapping[str, Any],
    title: str,
    wanted: Mapping[str, tuple[tuple[str, ...], type[nn.Module]]],
) -> tuple[dict[str, Tensor], ConversionReport]:
    given = {str(key).removeprefix("module."): value for key, value in state_dict.items()}
    if len(given) < len(state_dict):
        raise InputError("there are entries twice, with and without `module.`")
    report = ConversionReport(title, {})
    weights: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    used: set[str] = set()
    for name, (prefixes, kind) in wanted.items():
        prefix = _prefix(given, prefixes, kind.__name__)
        own = {key.removeprefix(prefix): v for key, v in given.items() if key.startswith(prefix)}
        used.update(prefix + key for key in own)
        factors[name] = _factor(own, prefix)
        report.layout += f"; {kind.__name__} from {prefix} ({len(own)} entries)"
        where = f"{kind.__name__} below {prefix}"
        for key, value in _network(own, kind, factors[name], where, prefix, report).items():
            weights[f"{name}.{key}" if name else key] = value
    if len(set(factors.values())) > 1:
        raise InputError(f"encoder and denoiser have unlike widths: {factors} of the published")
    factor = next(iter(factors.values()))
    report.network = {} if factor == 1 else {"cr": factor}
    report.dropped = [key for key in given if key not in used]
    return _finish(weights), report


def _prefix(given: Mapping[str, Any], prefixes: tuple[str, ...], what: str) -> str:
    """The one of the prefixes that keys begin with."""
    found = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in given)]
    if len(found) != 1:
        tops = dict.fromkeys(f"{key.partition('.')[0]}." for key in given)
        raise InputError(
            f"expected weights of {what} below {' or '.join(prefixes)}"
            + (", not below both; " if found else "; ")
            + f"the keys begin with {_some(list(tops), 8) or 'none'}"
        )
    return found[0]


def _factor(own: Mapping[str, Any], prefix: str) -> float:
    """Multiplier of the published widths, from the first kernel."""
    kernel = own.get("stem.0.kernel")
    if not isinstance(kernel, Tensor) or kernel.dim() != 3:
        if isinstance(own.get("stem.0.weight"), Tensor):
            raise InputError(
                f"{prefix}stem.0.weight stands where a released file has a kernel: converted already"
            )
        raise InputError(f"{prefix}stem.0.kernel is not there as a kernel of three axes")
    return kernel.shape[2] / WIDTHS[0]


def _source(key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Key and shape in a released file of an entry of a network."""
    if len(shape) == 5:
        return f"{key.removesuffix('weight')}kernel", (math.prod(shape[1:4]), shape[4], shape[0])
    if key.endswith(".downsample.0.weight"):
        return f"{key.removesuffix('weight')}kernel", (shape[1], shape[0])
    return key, shape


def _network(
    own: Mapping[str, Any],
    kind: type[nn.Module],
    factor: float,
    where: str,
    prefix: str,
    report: ConversionReport,
) -> dict[str, Tensor]:
    """The entries of one network, in its own order."""
    for key, value in own.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{prefix}{key} is no tensor")
    targets = {key: tuple(value.shape) for key, value in _meta(kind, {"cr": factor}).items()}
    sources = {key: _source(key, shape) for key, shape in targets.items()}
    _meet(own, dict(sources.values()), where)
    weights = {}
    for key, shape in targets.items():
        name, _ = sources[key]
        weights[key] = from_minkowski(own[name]) if name != key else own[name]
        (report.permuted if name != key else report.matched).append(prefix + name)
        if tuple(weights[key].shape) != shape:
            raise InputError(f"{prefix}{name} has no cubic kernel")
    return weights


def from_minkowski(kernel: Tensor) -> Tensor:
    """A kernel of MinkowskiEngine, (taps, in, out) or (in, out), as (out, x, y, z, in) or the matrix (out, in).

    Raises:
        InputError: for a number of taps that no cube has.
    """
    if kernel.dim() == 2:
        return kernel.t()
    taps = kernel.shape[0]
    size = round(taps ** (1 / 3))
    if size**3 != taps:
        raise InputError(f"a kernel of {taps} taps is no cube")
    # The slowest axis comes first: z, y, x.
    return kernel.unflatten(0, (size, size, size)).permute(4, 2, 1, 0, 3)
