"""A PolarNet as an ONNX file: its evaluation of one scan, from points with their cells to scores and labels of points.

Inputs, with any number n >= 1 of points of one scan:

    features   (n, c) float32   what `PointCells` gives, c = 9 for points with a strength
    cells      (n, 3) int64     cell of every point along the three axes of the partition

Outputs:

    scores     (n, k) float32   without the class "unlabelled", where the network has one
    labels     (n,) int64       the highest score, 0 .. k - 1

The partition itself stays outside, because it needs float64. Its numbers are in the file's metadata, each as JSON, and
the inputs follow from x, y, z, strength (float32) so:

    1. position p in the frame: cylindrical, float32: (sqrt(x x + y y), atan2(y, x), z); Cartesian: (x, y, z).
    2. size of a cell, float64: (high - low) / (shape - 1) for spacing `n_minus_1`, (high - low) / shape for `n`.
    3. cell, float64: floor((min(max(p, low), high) - low) / size), as an integer; divide, do not multiply by the
       inverse. For spacing `n`, the azimuth's cell modulo its number of cells and the others at most shape - 1.
    4. features: p - ((cell + 0.5) size + low), computed in float64 and rounded to float32 (of the azimuth of a full
       circle the short way round); p; then x, y (cylindrical)
       or sqrt(x x + y y), atan2(y, x) (Cartesian); then the strength and whatever columns of `feat` follow.

The pillar maximum is written in one of two ways. `roi`: points are sorted by pillar, and MaxRoiPool takes the maximum
of each run; right in onnxruntime on the CPU with any number of threads. `scatter`: ScatterND with reduction "max", no
sort; for runtimes that know neither a long TopK nor MaxRoiPool. onnxruntime's CPU kernel runs that one over several
threads without a lock and loses maxima (seen in 1.31): give it one thread there.

Needs the package onnx. Batch normalisations are folded into their neighbours unless asked not to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import write_atomic
from pointcept_kd.ops.grid import Partition

from .polarnet import SLOPE, DoubleConv, PolarNet, RingConv, Up

OPSET = 18
POOLINGS = ("roi", "scatter")
INSTALL = "pip install 'pointcept_kd[onnx]'"


def require_onnx(name: str = "onnx") -> Any:
    """The package `onnx` or `onnxruntime`.

    Raises:
        InputError: where it is missing, saying how to install it.
    """
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(f"this needs the package {name}: {INSTALL}") from error


def column_names(partition: Partition, in_channels: int) -> list[str]:
    """What the columns of `features` are."""
    cylindrical = partition.frame == "cylindrical"
    own = ("radius", "azimuth", "z") if cylindrical else ("x", "y", "z")
    other = ("x", "y") if cylindrical else ("radius", "azimuth")
    extra = ["strength", *(f"feat_{i}" for i in range(4, in_channels))][: in_channels - 3]
    return [*(f"{name} - centre" for name in own), *own, *other, *extra]


class _Graph:
    """Nodes and constants of a graph under construction; values are their names."""

    def __init__(self, onnx: Any, fold: bool) -> None:
        self.onnx = onnx
        self.fold = fold
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """A node with one output, called `name`."""
        out = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [out], out, **attributes))
        return out

    def add_two(self, kind: str, *inputs: str, **attributes: Any) -> tuple[str, str]:
        """A node with two outputs."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        outs = (f"{name}_a", f"{name}_b")
        self.nodes.append(
            self.onnx.helper.make_node(kind, list(inputs), list(outs), name, **attributes)
        )
        return outs

    def constant(self, value: Any, name: str | None = None) -> str:
        """Weights, or integers (int64); small equal ones are kept once."""
        if isinstance(value, Tensor):
            value = value.detach().float().cpu().numpy()
        array = np.asarray(value)
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
            name = name or f"int_{'_'.join(map(str, array.ravel()))}_{array.ndim}"
        name = name or f"const_{len(self.constants)}"
        if name not in self.constants:
            array = np.ascontiguousarray(array).reshape(array.shape)
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        """x[start:end] along an axis."""
        return self.add("Slice", x, *(self.constant([i]) for i in (start, end, axis)))

    def norm(self, x: str, norm: Any, name: str) -> str:
        """Batch normalisation of axis 1 as a node of its own."""
        parts = dict(w=norm.weight, b=norm.bias, m=norm.running_mean, v=norm.running_var)
        inputs = [self.constant(value, f"{name}.{key}") for key, value in parts.items()]
        return self.add("BatchNormalization", x, *inputs, epsilon=norm.eps)

    # ------------------------------------------------------------------------------ point encoder

    def linear(self, x: str, weight: Tensor, bias: Tensor, name: str) -> str:
        """Rows x (n, i) to (n, o)."""
        w, b = self.constant(weight, f"{name}.weight"), self.constant(bias, f"{name}.bias")
        return self.add("Gemm", x, w, b, transB=1)

    def encoder(self, x: str, layers: nn.Sequential) -> str:
        """All but the last linear layer of the point encoder: rows (n, c) to (n, c')."""
        # What is still to be multiplied with and added to the columns of x.
        scale, shift = _affine(layers[0])
        if not self.fold:
            x, scale, shift = self.norm(x, layers[0], "points.norm"), scale * 0 + 1, shift * 0
        for i in range(1, len(layers) - 1, 3):
            linear, norm = layers[i], layers[i + 1]
            weight, bias = linear.weight.double(), linear.bias.double()
            weight, bias = weight * scale, bias + weight @ shift
            scale, shift = torch.ones(len(bias)).to(weight), torch.zeros(len(bias)).to(weight)
            if self.fold:
                gain, offset = _affine(norm)
                weight, bias = weight * gain[:, None], bias * gain + offset
            x = self.linear(x, weight, bias, f"points.{i}")
            if not self.fold:
                x = self.norm(x, norm, f"points.{i}.norm")
            x = self.add("Relu", x)
        return x

    # -------------------------------------------------------------------------------------- U-Net

    def ring_conv(self, x: str, layer: RingConv, name: str) -> str:
        """`RingConv` over (1, c, r, p)."""
        conv, norm = layer[0], layer[1]
        weight, bias = layer.folded() if self.fold else (conv.weight, conv.bias)
        if layer.ring:
            x = self.add("Concat", self.slice(x, -1, 2**31, 3), x, self.slice(x, 0, 1, 3), axis=3)
        w, b = self.constant(weight, f"{name}.weight"), self.constant(bias, f"{name}.bias")
        side = 0 if layer.ring else 1
        x = self.add("Conv", x, w, b, kernel_shape=[3, 3], pads=[1, side, 1, side])
        if not self.fold:
            x = self.norm(x, norm, f"{name}.norm")
        return self.add("LeakyRelu", x, alpha=SLOPE)

    def double_conv(self, x: str, block: DoubleConv, name: str) -> str:
        """`DoubleConv`."""
        x = self.ring_conv(x, block.conv1, f"{name}.conv1")
        return self.ring_conv(x, block.conv2, f"{name}.conv2")

    def up(
        self, coarse: str, fine: str, block: Up, sizes: Sequence[Sequence[int]], name: str
    ) -> str:
        """`Up`; sizes: (r, p) of the coarse and of the fine map."""
        scales = self.constant(np.array([1, 1, 2, 2], np.float32), "double")
        x = self.add(
            "Resize",
            coarse,
            "",
            scales,
            mode="linear",
            coordinate_transformation_mode="align_corners",
        )
        high, wide = (f - 2 * c for c, f in zip(*sizes))
        if high or wide:
            before = (high // 2, wide // 2)
            pads = [0, 0, *before, 0, 0, high - before[0], wide - before[1]]
            x = self.add("Pad", x, self.constant(pads))
        return self.double_conv(self.add("Concat", fine, x, axis=1), block.conv, name)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch normalisation in evaluation, float64."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _pillars(graph: _Graph, network: PolarNet, pooling: str) -> tuple[str, str, str]:
    """Pillar features (q, compressed), their keys (q,) int64 ascending, and the row (n,) of every point's pillar."""
    shape = network.partition.partition.shape
    add, constant = graph.add, graph.constant
    last = network.PPmodel[-1]
    squeeze = network.fea_compression[0]
    cells = "cells"
    radial = add("Mul", graph.slice(cells, 0, 1, 1), constant([shape[1]]))
    keys = add("Squeeze", add("Add", radial, graph.slice(cells, 1, 2, 1)), constant([1]))
    if pooling == "roi":
        count = add("Shape", keys)
        ranked, order = graph.add_two("TopK", keys, count, largest=0, sorted=1)
        before = add("Concat", constant([-1]), graph.slice(ranked, 0, -1, 0), axis=0)
        new = add("Cast", add("Not", add("Equal", ranked, before)), to=_INT64)
        begin = add("Squeeze", add("NonZero", new), constant([0]))
        occupied = add("Gather", ranked, begin)
        place = add("Sub", add("CumSum", new, constant(0)), constant([1]))
        row = add("ScatterElements", place, order, place, axis=0)
        # One row of pixels, a region per pillar: (scan, first, row, last, row) inclusive.
        end = add(
            "Sub", add("Concat", graph.slice(begin, 1, 2**31, 0), count, axis=0), constant([1])
        )
        zero = add("Mul", begin, constant([0]))
        bounds = [add("Unsqueeze", b, constant([1])) for b in (zero, begin, zero, end, zero)]
        regions = add("Cast", add("Concat", *bounds, axis=1), to=_FLOAT)
        hidden = graph.encoder(add("Gather", "features", order), network.PPmodel)
        weight = constant(last.weight, "points.last.weight")
        # (channels, n): regions are along the last axis.
        image = add("Gemm", weight, hidden, transB=1)
        image = add("Unsqueeze", image, constant([0, 2]))
        pooled = add("MaxRoiPool", image, regions, pooled_shape=[1, 1])
        pooled = add("Flatten", pooled, axis=1)
    else:
        grid = constant([shape[0] * shape[1]])
        zeros = add("Expand", constant([0]), grid)
        ones = add("Expand", constant([1]), add("Shape", keys))
        taken = add("ScatterElements", zeros, keys, ones, axis=0, reduction="max")
        occupied = add("Squeeze", add("NonZero", taken), constant([0]))
        places = add("Sub", add("CumSum", taken, constant(0)), constant([1]))
        row = add("Gather", places, keys)
        hidden = graph.encoder("features", network.PPmodel)
        weight = constant(last.weight.T, "points.last.weight")
        encoded = add("MatMul", hidden, weight)
        wide = constant([last.out_features])
        size = add("Concat", add("Shape", occupied), wide, axis=0)
        lowest = constant(np.array([np.finfo(np.float32).min], np.float32), "lowest")
        base = add("Expand", lowest, size)
        index = add("Unsqueeze", row, constant([1]))
        pooled = add("ScatterND", base, index, encoded, reduction="max")
    # The bias of the last layer moves behind the maximum, into the compression.
    bias = squeeze.bias.double() + squeeze.weight.double() @ last.bias.double()
    features = add("Relu", graph.linear(pooled, squeeze.weight, bias, "compression"))
    return features, occupied, row


def _unet(graph: _Graph, network: PolarNet, features: str, occupied: str) -> str:
    """Rows (r * p, base) of the last map, from the features of the occupied pillars."""
    r, p, _ = network.partition.partition.shape
    unet = network.network
    add, constant = graph.add, graph.constant
    first, double = unet.inc.conv[0], unet.inc.conv[1]
    width = first.num_features
    empty = torch.zeros(width)
    if graph.fold:
        # The first normalisation, at the occupied pillars; empty ones all become the same.
        scale, empty = _affine(first)
        features = add("Mul", features, constant(scale, "map.scale"))
        features = add("Add", features, constant(empty, "map.shift"))
    base = add("Expand", constant(empty[None], "map.empty"), constant([r * p, width]))
    index = add("Unsqueeze", occupied, constant([1]))
    x = add("ScatterND", base, index, features)
    x = add("Reshape", add("Transpose", x, perm=[1, 0]), constant([1, width, r, p]))
    if not graph.fold:
        x = graph.norm(x, first, "map.norm")
    maps, sizes = [graph.double_conv(x, double, "inc")], [(r, p)]
    for i in range(1, 5):
        x = add("MaxPool", maps[-1], kernel_shape=[2, 2], strides=[2, 2])
        down = getattr(unet, f"down{i}").mpconv[1]
        maps.append(graph.double_conv(x, down, f"down{i}"))
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    x = maps[4]
    for i in range(1, 5):
        both = sizes[5 - i], sizes[4 - i]
        x = graph.up(x, maps[4 - i], getattr(unet, f"up{i}"), both, f"up{i}")
    x = add("Reshape", x, constant([-1, r * p]))
    return add("Transpose", x, perm=[1, 0])


def build_graph(
    network: PolarNet,
    void_class: bool = True,
    opset: int = OPSET,
    pooling: str = "roi",
    fold: bool = True,
    metadata: dict[str, Any] | None = None,
) -> Any:
    """The `onnx.ModelProto` of a network in evaluation.

    Args:
        network: any `PolarNet`, on any device; it is not changed.
        void_class: the network has a class 0 "unlabelled", which is left out of the scores.
        opset: version of the operators, 18 or later.
        pooling: `roi` or `scatter`, see the module.
        fold: batch normalisations become part of the layers around them.
        metadata: more entries, written as JSON.

    Raises:
        InputError: for arguments that make no graph, or without the package onnx.
    """
    onnx = require_onnx()
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise InputError(f"opset {opset}: expected {OPSET} to {newest}, which this onnx knows")
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
    kept = network.num_classes - bool(void_class)
    if kept < 1:
        raise InputError("the network has no class besides 'unlabelled'; give void_class=False")
    graph = _Graph(onnx, fold)
    add, constant = graph.add, graph.constant
    grid, conv = network.partition.partition, network.network.outc.conv
    heights = grid.shape[2]
    with torch.no_grad():
        features, occupied, row = _pillars(graph, network, pooling)
        maps = _unet(graph, network, features, occupied)
        # Scores of all voxels of the occupied pillars, then of the points' voxels.
        weight = conv.weight.view(heights, network.num_classes, -1)[:, -kept:].flatten(0, 1)
        bias = conv.bias.view(heights, network.num_classes)[:, -kept:].flatten()
        columns = graph.linear(add("Gather", maps, occupied), weight, bias, "head")
    columns = add("Reshape", columns, constant([-1, heights, kept]))
    height = graph.slice("cells", 2, 3, 1)
    voxel = add("Concat", add("Unsqueeze", row, constant([1])), height, axis=1)
    add("GatherND", columns, voxel, name="scores")
    add("ArgMax", "scores", name="labels", axis=1, keepdims=0)

    helper = onnx.helper
    width = network.partition.out_channels
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "PolarNet",
            [
                helper.make_tensor_value_info("features", _FLOAT, ["n", width]),
                helper.make_tensor_value_info("cells", _INT64, ["n", 3]),
            ],
            [
                helper.make_tensor_value_info("scores", _FLOAT, ["n", kept]),
                helper.make_tensor_value_info("labels", _INT64, ["n"]),
            ],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        producer_name="pointcept_kd",
    )
    # The newest version of the container is refused by runtimes that know the operators.
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    facts = {
        "low": list(grid.low),
        "high": list(grid.high),
        "shape": list(grid.shape),
        "frame": grid.frame,
        "spacing": grid.spacing,
        "cell_size": list(grid.cell_size),
        "features": column_names(grid, network.partition.in_channels),
        "void_class": 0 if void_class else None,
        "pooling": pooling,
        **(metadata or {}),
    }
    helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def export_onnx(network: PolarNet, path: str | Path, **settings: Any) -> Any:
    """Write `build_graph` of a network to a file, whole or not at all, and return it."""
    model = build_graph(network, **settings)
    content = model.SerializeToString()
    write_atomic(Path(path), lambda file: file.write(content))
    return model


def session(model: str | Path | bytes, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU; `threads` None for as many as the machine has cores."""
    runtime = require_onnx("onnxruntime")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    content = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


# Numbers of the types in the format.
_FLOAT, _INT64 = 1, 7
