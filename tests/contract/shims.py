"""What lets an unmodified checkout of Pointcept run without CUDA, in tests only.

Pointcept's networks, trainer and tester move everything to CUDA and import packages that a machine without a CUDA
compiler may lack. `install` puts in their place, for this process and the ones forked from it:

* stand-ins for packages that cannot be imported. They can be imported and named; any use raises. Four have the few
  functions that LiDAR segmentation really calls: torch_scatter, timm, tensorboardX and yapf.
* `.cuda()` that leaves tensors, storages and modules where they are, and `torch.histc` for integers.
* spconv's CPU build without its three traps: it asks for a CUDA stream in the backward pass, refuses a bias in
  evaluation, and gives wrong rows with more than one thread.
* what torch has dropped since Pointcept 1.6.0: schedulers that take `verbose`, and `torch.load` of a file with a numpy
  number in it.

Where CUDA is there, only missing packages get stand-ins.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import multiprocessing
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

# Everything beyond torch, numpy, scipy and spconv that Pointcept from 1.5.2 on imports unguarded for the packages of
# LiDAR segmentation. Order matters for a package that imports another: torchvision comes before timm and the like.
PACKAGES = (
    "torch_scatter", "torch_cluster", "torch_geometric", "torchvision", "timm", "transformers", "peft", "wandb",
    "open3d", "pointops", "tensorboardX", "yapf", "h5py", "plyfile",
    "SharedArray", "ocnn",
)  # fmt: skip

# Where `from PACKAGE.SUBMODULE import ...` is all that Pointcept does, importing the package alone proves nothing.
_PROBES = {"timm": "timm.layers", "yapf": "yapf.yapflib.yapf_api", "peft": "peft"}

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_kept: list[Any] = []  # operator libraries end with their Python objects
_said: list[str] = []
_roots: list[str] = []
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, what was there


def install(root: str | Path) -> list[str]:
    """Make `import pointcept` find the checkout at `root` and work here; calling it again changes nothing.

    Returns:
        A line for each thing that was stood in for.

    Raises:
        FileNotFoundError: there is no Pointcept at `root`.
    """
    root = Path(root).resolve()
    if not (root / "pointcept" / "__init__.py").is_file():
        raise FileNotFoundError(f"{root} has no pointcept/__init__.py")
    if str(root) not in sys.path:
        sys.path.append(str(root))  # last: it has folders `tools` and `configs`, too
        _roots.append(str(root))
    if _said:
        return list(_said)
    # Workers of a data loader must inherit all of this.
    if multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("fork")
    for package in PACKAGES:
        reason = _import(package)
        if reason:
            _stand_in(package)
            _said.append(f"{package}: {reason}")
    _said.extend(_age_torch())
    if not torch.cuda.is_available():
        _run_on_cpu()
        _said.append("torch: .cuda() does nothing, histc takes integers, one thread")
        _said.extend(_repair_spconv())
    return list(_said)


def remove() -> None:
    """Put everything back, and forget Pointcept and the stand-ins, so that later tests see the process as it was."""
    while _replaced:
        owner, name, old = _replaced.pop()
        delattr(owner, name) if old is _replaced else setattr(owner, name, old)
    for package in ("pointcept", *_Finder.packages):
        _forget(package)
    _Finder.packages.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    sys.path[:] = [folder for folder in sys.path if folder not in _roots]
    _roots.clear()
    _said.clear()


def _replace(owner: Any, name: str, value: Any) -> None:
    # `_replaced` itself marks a name that the owner only inherits.
    _replaced.append((owner, name, vars(owner).get(name, _replaced)))
    setattr(owner, name, value)


# ---- packages ------------------------------------------------------------------------------------


def _import(package: str) -> str:
    """Why a package cannot be imported; empty where it can."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        importlib.import_module(_PROBES.get(package, package))
        return ""
    except Exception as error:
        if package != "torchvision" or "does not exist" not in str(error):
            _forget(package)
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    # A build for CUDA beside a CPU build of torch: its compiled half is skipped, which declares the operators that its
    # Python half then looks for. Nothing here calls them.
    _forget(package)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)
    try:
        importlib.import_module(package)
    except Exception as error:
        _forget(package)
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    _said.append("torchvision: its operators nms, qnms and roi_align are declared, without code")
    return ""


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]


class _Absent(type):
    """Class of names in a package that is not there: they may be passed about and derived from, not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__name__} was called, and this package is a stand-in"
        )


class _Module(types.ModuleType):
    """A module of a package that is not there."""

    __path__ = ()  # a package, so that modules below it can be asked for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the stood-in packages and all modules below them."""

    packages: ClassVar[set[str]] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(_CONTENTS.get(module.__name__, dict)())


def _stand_in(package: str) -> None:
    if not _Finder.packages:
        # First, because a broken package is found on the path as well.
        sys.meta_path.insert(0, _Finder())
    _Finder.packages.add(package)


# ---- stand-ins that work -------------------------------------------------------------------------


def segment_csr(
    src: torch.Tensor, indptr: torch.Tensor, out: None = None, reduce: str = "sum"
) -> torch.Tensor:
    """Reduce the rows of `src` between neighbouring entries of `indptr`; an empty range gives 0."""
    if out is not None or indptr.dim() != 1:
        raise RuntimeError("this stand-in of torch_scatter reduces along dim 0 into a new tensor")
    lengths = indptr.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    covered = src[int(indptr[0]) : int(indptr[-1])]
    where = rows.view(-1, *[1] * (src.dim() - 1)).expand_as(covered)
    mode = {"sum": "sum", "add": "sum", "mean": "mean", "max": "amax", "min": "amin"}[reduce]
    result = src.new_zeros(len(lengths), *src.shape[1:])
    return result.scatter_reduce(0, where, covered, mode, include_self=False)


def scatter_min(
    src: torch.Tensor, index: torch.Tensor, dim: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum of the rows of `src` with the same index, and the row that each came from."""
    if dim != 0 or index.dim() != 1:
        raise RuntimeError("this stand-in of torch_scatter reduces rows by one index each")
    where = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    size = int(index.max()) + 1
    least = src.new_zeros(size, *src.shape[1:])
    least = least.scatter_reduce(0, where, src, "amin", include_self=False)
    row = torch.arange(len(src)).view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    row = torch.where(src == least[index], row, len(src))
    first = torch.full_like(least, len(src), dtype=torch.long)
    return least, first.scatter_reduce(0, where, row, "amin")


class DropPath(torch.nn.Module):
    """Leave out whole samples of a residual branch in training; the rest is scaled up."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if self.scale_by_keep and keep else mask)


def _timm() -> dict[str, Any]:
    return dict(DropPath=DropPath, trunc_normal_=torch.nn.init.trunc_normal_)


def _tensorboard() -> dict[str, Any]:
    from torch.utils.tensorboard import SummaryWriter

    return dict(SummaryWriter=SummaryWriter)


def _yapf() -> dict[str, Any]:
    def FormatCode(text: str, **options: Any) -> tuple[str, bool]:
        """The text as it is, and that it did not change."""
        return text, False

    return dict(FormatCode=FormatCode)


_CONTENTS = {
    "torch_scatter": lambda: dict(segment_csr=segment_csr, scatter_min=scatter_min),
    "timm.layers": _timm,
    "timm.models.layers": _timm,
    "tensorboardX": _tensorboard,
    "yapf.yapflib.yapf_api": _yapf,
}


# ---- torch and spconv ----------------------------------------------------------------------------


def _age_torch() -> list[str]:
    """Let torch take what Pointcept before 1.6.1 gives it."""
    scalar = np.float64(0).__reduce__()[0]
    # The classes of the best metric in a checkpoint; nothing in a file becomes able to run code.
    torch.serialization.add_safe_globals(
        [scalar, np.dtype, type(np.dtype("f4")), type(np.dtype("f8"))]
    )
    said = ["torch: load accepts numpy's numbers"]
    schedulers = torch.optim.lr_scheduler
    if "verbose" in inspect.signature(schedulers.OneCycleLR).parameters:
        return said
    for name in ("LambdaLR", "MultiStepLR", "CosineAnnealingLR", "OneCycleLR"):
        kind = getattr(schedulers, name)
        _replace(kind, "__init__", _without_verbose(kind.__init__))
    return [*said, "torch: schedulers take `verbose`, and do not look at it"]


def _without_verbose(init: Any) -> Any:
    @functools.wraps(init)
    def quiet(self: Any, *args: Any, verbose: Any = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

    return quiet


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _run_on_cpu() -> None:
    torch.set_num_threads(1)
    for kind in (torch.Tensor, torch.nn.Module, torch.UntypedStorage, torch.TypedStorage):
        _replace(kind, "cuda", _stay)
    plain = torch.histc

    def histc(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point() or input.is_cuda:
            return plain(input, *args, **kwargs)
        return plain(input.double(), *args, **kwargs).to(input.dtype)

    _replace(torch, "histc", histc)


def _repair_spconv() -> list[str]:
    if importlib.util.find_spec("spconv") is None:
        return []
    from spconv.pytorch import conv, cppcore, ops

    # The number is passed on, and CPU kernels do not look at it.
    for module in (ops, cppcore):
        _replace(module, "get_current_stream", lambda: 0)
    plain = conv.SparseConvolution._conv_forward

    def _conv_forward(
        self: Any, training: bool, input: Any, weight: Any, bias: Any, *a: Any, **k: Any
    ) -> Any:
        # In its training form the bias is a plain addition, which a CPU can do as well.
        return plain(self, training or bias is not None, input, weight, bias, *a, **k)

    _replace(conv.SparseConvolution, "_conv_forward", _conv_forward)
    return ["spconv: stream 0, and the bias is added in evaluation as in training"]
