"""A call of the denoiser against the published way; the section `network` of `benchmarks/completion.py`.

The opponents are written here from the description of the published networks (LiDiff, arXiv:2403.13470): before each
of eight blocks every cell looks for the nearest cell of the encoded scan, and sends that cell's feature through two
small networks of its own; the scan is encoded again in every call, all ten copies of its points; guidance is two calls,
which cut their points into cells and search their kernel maps each for itself. They use the weights of the denoiser
that they are compared with, and its sparse convolutions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.completion_data import demand, least_cpu_ms, real_scans, simulated_scans
from benchmarks.ops import Row
from pointcept_kd.data.completion_pairs import condition_points
from pointcept_kd.networks.condition import Condition
from pointcept_kd.networks.denoiser import PLACES, ConditionEncoder, Denoiser
from pointcept_kd.networks.layers import BatchNorm
from pointcept_kd.ops.sparse import SparseConvTensor

CUT = 10  # completed points per point of the scan
TIME, SCALE = 999, 3.5
STEPS = 8
CLOSE = 1e-3  # of the largest predicted noise: float32 sums in another order
# Multiplications (10^9) at 180,000 points by the noise: of the convolutions, of gates per row and per cell of the scan.
FULL_SIZE = {1.0: (846, 298, 12.5), 0.1: (340, 187, 12.5)}


def settle(network: torch.nn.Module, run: Callable[[], object]) -> None:
    """Normalise by the statistics of one call, so that the features of random weights neither fade nor explode."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        run()
    network.eval()


class Scene:
    """A scan, its noisy repetition and the networks that see them."""

    def __init__(self, scan: Tensor, noise: float = 1.0, cr: float = 1.0) -> None:
        torch.manual_seed(0)
        self.noise = noise
        self.scan, self.scan_offset = scan, torch.tensor([len(scan)])
        self.repeated = scan.repeat(CUT, 1)
        self.x = self.repeated + noise * torch.randn(len(self.repeated), 3)
        self.offset = torch.tensor([len(self.x)])
        self.t = torch.tensor([TIME])
        self.encoder, self.denoiser = ConditionEncoder(cr), Denoiser(cr)
        settle(self.encoder, lambda: self.encoder(scan, self.scan_offset))
        self.condition = self.encoder(scan, self.scan_offset).detach()
        settle(self.denoiser, lambda: self.denoiser(self.x, self.offset, self.t, self.condition))
        self.nothing = self.encoder.null(1).detach()

    def fresh(self, condition: Condition) -> Condition:
        """The same condition, from which nothing has been computed yet."""
        return Condition(
            condition.cells,
            condition.features,
            condition.batch_size,
            condition.voxel_size,
            condition.null,
        )


# --- the published way ----------------------------------------------------------------------------


def emb(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time, (1, width)."""
    half = width // 2
    f = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angle = t.double()[:, None] * f
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()


def nearest(cells: Tensor, stride: int, known: Tensor) -> Tensor:
    """Row of the nearest known corner for every cell: all distances, block by block, exact for whole numbers."""
    corners, known = (stride * cells).double(), known.double()
    best = []
    for part in corners.split(2048):
        square = (part * part).sum(1)[:, None] + (known * known).sum(1) - 2 * part @ known.T
        best.append(torch.from_numpy(square.numpy().argmin(axis=1)))  # the first among equals
    return torch.cat(best)


def search_per_row(scene: Scene, inputs: dict[str, SparseConvTensor]) -> list[Tensor]:
    """The matches of `gates_per_row` alone."""
    known = scene.condition.cells[:, 1:]
    return [
        nearest(x.indices[:, 1:].long(), 2 ** PLACES[name][0], known) for name, x in inputs.items()
    ]


def gates_per_row(
    denoiser: Denoiser, condition: Condition, t: Tensor
) -> Callable[[str, SparseConvTensor], SparseConvTensor]:
    """Gates as published, for one scan: a match and two small networks for every row at every place."""
    parts = dict(denoiser.named_modules())

    def through(name: str, x: Tensor) -> Tensor:
        first, last = parts[f"{name}.0"], parts[f"{name}.2"]
        hidden = F.leaky_relu(F.linear(x, first.weight, first.bias), 0.1)
        return F.linear(hidden, last.weight, last.bias)

    def gate(name: str, x: SparseConvTensor) -> SparseConvTensor:
        stride = 2 ** PLACES[name][0]
        rows = nearest(x.indices[:, 1:].long(), stride, condition.cells[:, 1:])
        of_scan = through(f"latent_{name}", condition.features[rows])
        of_time = through(f"{name}_temp", emb(t, denoiser.widths[8])).expand(len(rows), -1)
        both = (of_time, of_scan) if name == "up1" else (of_scan, of_time)
        return x.replace_feature(x.features * through(f"latemp_{name}", torch.cat(both, dim=1)))

    return gate


def call_per_row(scene: Scene, condition: Condition) -> Tensor:
    """One call with gates per row."""
    net = scene.denoiser
    voxels = net.voxelise(scene.x, scene.offset)
    gate = gates_per_row(net, condition, scene.t)
    return net._after_stem(net._stem(voxels), gate, voxels, scene.x)


def step_as_published(scene: Scene) -> Tensor:
    """The guided prediction of a step: two calls, each with its encoded cloud, cells, maps and gates per row."""
    told = call_per_row(scene, scene.encoder(scene.repeated, scene.offset))
    nothing = call_per_row(scene, scene.encoder.null(1))
    return nothing + SCALE * (told - nothing)


# --- ours -----------------------------------------------------------------------------------------


def one_call(scene: Scene, condition: Condition) -> Tensor:
    """The conditional prediction."""
    return scene.denoiser(scene.x, scene.offset, scene.t, condition)


def guided(scene: Scene) -> Tensor:
    """The guided prediction of a step."""
    return scene.denoiser.guided(scene.x, scene.offset, scene.t, scene.condition, SCALE)


def two_calls(scene: Scene) -> Tensor:
    """The same by two calls of our denoiser."""
    told, nothing = (one_call(scene, c) for c in (scene.condition, scene.nothing))
    return nothing + SCALE * (told - nothing)


def recorded(scene: Scene) -> dict[str, SparseConvTensor]:
    """What the gates of one call get, by place."""
    net, inputs = scene.denoiser, dict[str, SparseConvTensor]()
    voxels = net.voxelise(scene.x, scene.offset)
    ours = net._gate(voxels, scene.condition, net._gates(voxels, scene.condition, scene.t))

    def gate(name: str, x: SparseConvTensor) -> SparseConvTensor:
        inputs[name] = x
        return ours(name, x)

    net._after_stem(net._stem(voxels), gate, voxels, scene.x)
    return inputs


def gates_per_cell(
    scene: Scene, condition: Condition, inputs: dict[str, SparseConvTensor]
) -> list[Tensor]:
    """All gated features, ours; the search's results are not kept from an earlier call."""
    net = scene.denoiser
    voxels = net.voxelise(scene.x, scene.offset)
    gate = net._gate(voxels, condition, net._gates(voxels, condition, scene.t))
    return [gate(name, x).features for name, x in inputs.items()]


# --- the clock ------------------------------------------------------------------------------------


def same_noise(a: Tensor, b: Tensor, what: str) -> float:
    """The largest difference as a share of the largest value; SystemExit if it is no rounding."""
    share = float((a - b).abs().max() / b.abs().max())
    demand(share < CLOSE, what)
    return share


def arithmetic(scene: Scene, inputs: dict[str, SparseConvTensor]) -> tuple[float, float]:
    """Multiplications (10^9) of the gates per row and per cell of the scan."""
    cells, total = len(scene.condition.cells), [0, 0]
    for name, x in inputs.items():
        parts = [getattr(scene.denoiser, f"{kind}_{name}") for kind in ("latent", "latemp")]
        each = sum(p.weight.numel() for part in parts for p in (part[0], part[2]))
        total[0] += each * len(x.features)
        total[1] += each * cells
    return total[0] / 1e9, total[1] / 1e9


@torch.no_grad()
def time_gates(scene: Scene, turns: int) -> list[Row]:
    """All gates of a call, and the call."""
    inputs = recorded(scene)
    rowwise = gates_per_row(scene.denoiser, scene.condition, scene.t)

    def plainly() -> list[Tensor]:
        return [rowwise(name, x).features for name, x in inputs.items()]

    for ours, theirs in zip(gates_per_cell(scene, scene.condition, inputs), plainly()):
        same_noise(ours, theirs, "gated features")
    worst = same_noise(
        one_call(scene, scene.condition), call_per_row(scene, scene.condition), "predictions"
    )
    least = least_cpu_ms(
        {
            "first": lambda: gates_per_cell(scene, scene.fresh(scene.condition), inputs),
            "again": lambda: gates_per_cell(scene, scene.condition, inputs),
            "cells": lambda: scene.denoiser.voxelise(scene.x, scene.offset),
            "rows": plainly,
            "search": lambda: search_per_row(scene, inputs),
            "call": lambda: one_call(scene, scene.condition),
            "call rows": lambda: call_per_row(scene, scene.condition),
        },
        turns,
    )
    # Cutting the points into cells stands in both routes of a call and in none of the gates.
    first, again = (least[key] - least["cells"] for key in ("first", "again"))
    rows, cells = arithmetic(scene, inputs)
    convolutions, full_rows, full_cells = FULL_SIZE[scene.noise]
    of_gates = {
        "by multiplications": rows / cells,
        "so at 180,000 points": full_rows / full_cells,
    }
    of_call = {
        "by multiplications": None,
        "so at 180,000 points": (convolutions + full_rows) / (convolutions + full_cells),
    }
    found = [
        ("gates, first call of a scan", first, least["rows"], of_gates, None),
        ("gates, later calls", again, least["rows"], of_gates, None),
        ("whole call", least["call"], least["call rows"], of_call, worst),
    ]
    return [
        {
            "what": what,
            "rows": sum(len(x.features) for x in inputs.values()),
            "cells": len(scene.condition.cells),
            "ours ms": ours,
            "per row ms": theirs,
            "its search ms": least["search"],
            "per row / ours": theirs / ours,
            **expected,
            "difference": off,
        }
        for what, ours, theirs, expected, off in found
    ]


@torch.no_grad()
def time_condition(scene: Scene, turns: int) -> list[Row]:
    """The encoded scan of a whole sampling."""
    once = scene.encoder(scene.scan, scene.scan_offset)
    often = scene.encoder(scene.repeated, scene.offset)
    demand(torch.equal(once.cells, often.cells), "cells of the condition")
    worst = same_noise(once.features, often.features, "conditions")
    least = least_cpu_ms(
        {
            "once": lambda: scene.encoder(scene.scan, scene.scan_offset),
            "often": lambda: scene.encoder(scene.repeated, scene.offset),
        },
        turns,
    )
    calls = 2 * STEPS
    return [
        {
            "scan": len(scene.scan),
            "cells": len(once.cells),
            "ours, once ms": least["once"],
            "tenfold cloud, once ms": least["often"],
            "tenfold / ours": least["often"] / least["once"],
            f"{calls} calls ms": calls * least["often"],
            f"{calls} calls / ours": calls * least["often"] / least["once"],
            "difference": worst,
        }
    ]


@torch.no_grad()
def time_guidance(scene: Scene, turns: int) -> list[Row]:
    """A guided step by our denoiser, fused and in two calls, and as published."""
    worst = [same_noise(guided(scene), two_calls(scene), "guided predictions")]
    worst.append(same_noise(guided(scene), step_as_published(scene), "steps"))
    least = least_cpu_ms(
        {
            "guided": lambda: guided(scene),
            "two": lambda: two_calls(scene),
            "one": lambda: one_call(scene, scene.condition),
            "published": lambda: step_as_published(scene),
        },
        turns,
    )
    ours = least["guided"]
    found = [
        ("one call without guidance", least["one"], None),
        ("two calls", least["two"], worst[0]),
        ("two calls as published, encoder and gates per row", least["published"], worst[1]),
    ]
    return [
        {"against": name, "ours ms": ours, "ms": spent, "ratio": spent / ours, "difference": off}
        for name, spent, off in found
    ]


def load_scan(condition: int) -> tuple[Tensor, str]:
    """A scan as the networks get it, (M, 3), and where it comes from."""
    scans, source = real_scans(), "SemanticKITTI sequence 00"
    if not scans:
        scans, source = simulated_scans(1)
    return torch.from_numpy(condition_points(scans[0].scan, condition)), source


def network_section(seconds: float, quick: bool, points: int) -> tuple[dict[str, list[Row]], str]:
    """Tables by title, and where the scan comes from."""
    scan, source = load_scan(max(points // CUT, 1))
    turns = 1 if quick else 2
    tables = {}
    for noise in (1.0,) if quick else (1.0, 0.1):
        scene = Scene(scan, noise)
        tables[f"Gates, noise {noise:g} m"] = time_gates(scene, turns)
        if noise == 1:
            tables["Condition"] = time_condition(scene, 3)
            tables["Guidance"] = time_guidance(scene, turns)
    about = f"{source}: {len(scan)} points of a scan, {len(scan) * CUT} to denoise"
    return tables, f"{about}; full width, random weights"
