"""Taps: named activations of any network, by module path, without the network knowing.

A tap keeps the *tensor* and the cells it belongs to at the moment its module returns. It never keeps the container:
a point container is mutable, and the object that leaves an encoder is overwritten by the first decoder layer.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError


@dataclass
class Activation:
    """What a tap saw.

    Attributes:
        feat: (n, c) features.
        batch: (n,) int64 scan index of each row, or None where the module returned a plain tensor.
        cells: (n, 3) int64 grid cell of each row at the module's resolution, or None likewise.
    """

    feat: Tensor
    batch: Tensor | None = None
    cells: Tensor | None = None


def _is_point(output: Any) -> bool:
    return isinstance(output, Mapping) and "feat" in output


def _read(output: Any, where: str) -> Activation:
    """The activation inside a module's output: a tensor, a point container or a sparse tensor."""
    if isinstance(output, Tensor):
        return Activation(output)
    if _is_point(output):
        batch, cells = output.get("batch"), output.get("grid_coord")
        return Activation(output["feat"], batch, cells)
    if hasattr(output, "features") and hasattr(output, "indices"):
        indices = output.indices.long()
        return Activation(output.features, indices[:, 0], indices[:, 1:])
    raise InputError(
        f"tap {where}: the module returns {type(output).__name__}; taps read tensors, points and sparse tensors"
    )


def _cut(output: Any, where: str) -> tuple[Any, Activation]:
    """Replace the features in `output` by a detached leaf, so that what follows is differentiable from there only."""
    seen = _read(output, where)
    leaf = seen.feat.detach().requires_grad_()
    if isinstance(output, Tensor):
        output = leaf
    elif _is_point(output):
        output["feat"] = leaf
        if "sparse_conv_feat" in output:
            output["sparse_conv_feat"] = output["sparse_conv_feat"].replace_feature(leaf)
    else:
        output = output.replace_feature(leaf)
    return output, Activation(leaf, seen.batch, seen.cells)


class Taps:
    """Named activations of one network.

    Args:
        network: any module.
        paths: tap name to module path, as `network.named_modules()` spells it (`dict(bottleneck="backbone.enc")`).
        leaves: names whose features are replaced by a detached leaf while recording.

    Raises:
        InputError: for a path that the network does not have; the message lists the nearest ones.
    """

    def __init__(
        self, network: nn.Module, paths: Mapping[str, str], leaves: Collection[str] = ()
    ) -> None:
        modules = dict(network.named_modules())
        for name, path in paths.items():
            if path not in modules:
                near = difflib.get_close_matches(path, list(modules), 3, 0.4)
                raise InputError(
                    f"tap {name}: {type(network).__name__} has no module {path!r}; "
                    f"nearest: {', '.join(near) or ', '.join(list(modules)[1:9])}"
                )
        unknown = set(leaves) - set(paths)
        if unknown:
            raise InputError(f"no tap is called {sorted(unknown)}; taps: {sorted(paths)}")
        self.paths = dict(paths)
        self.leaves = set(leaves)
        self._modules = {name: modules[path] for name, path in paths.items()}

    @contextmanager
    def record(self) -> Iterator[dict[str, Activation]]:
        """Record while the body runs the network once; a module that runs twice leaves its last output.

        Raises:
            InputError: at the end, for a tap whose module did not run.
        """
        seen: dict[str, Activation] = {}

        def hook(name: str, where: str) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                if name in self.leaves:
                    output, seen[name] = _cut(output, where)
                    return output
                seen[name] = _read(output, where)
                return None

            return keep

        handles = [
            module.register_forward_hook(hook(name, f"{name} ({self.paths[name]})"))
            for name, module in self._modules.items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        for name in self.paths:
            if name not in seen:
                raise InputError(
                    f"tap {name}: module {self.paths[name]!r} did not run in this forward"
                )


def full_precision(activation: Activation) -> Activation:
    """The same activation with half-precision features widened to float32, as every term computes in."""
    feat = activation.feat
    if feat.dtype in (torch.float16, torch.bfloat16):
        feat = feat.float()
    return Activation(feat, activation.batch, activation.cells)
