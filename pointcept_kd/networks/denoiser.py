"""The networks of scene completion: encoder of the partial scan, denoiser, refiner (LiDiff, arXiv:2403.13470).

All three begin with the same sparse encoder, strides 1 to 16; denoiser and refiner add a decoder back to the finest
cells. Points are raw metres in the sensor's frame; a cell of 0.05 m has the mean of its points as its feature, and a
point gets the value of its cell.

The denoiser is told what it is to complete by gates. Before each of eight blocks, at place q, the features X become
X * w with

    w = latemp_q( latent_q(F_j), q_temp(emb(t)) )

where F_j is the feature of the nearest cell of the encoded scan and t the time of the point's scan; skip connections
keep X. A gate depends on the scan's cell and the time alone, so it is computed on those cells and gathered, and the
part of it that knows no time is kept with the scan.

State-dict keys are those of the released weights, with `weight` for `kernel`; `released_completion` converts those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.ops.linear import linear
from pointcept_kd.ops.scatter import segment_mean
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)

from .condition import CONDITION_STRIDE, MATCHES, Condition, Voxels, time_embedding, voxelise
from .layers import BatchNorm, Linear

WIDTHS = (32, 32, 64, 128, 256, 256, 128, 96, 96)
NORMALISATIONS = ("batch", "instance", "group")
NULLS = ("cloud", "learned")
STAGES = ("stage1", "stage2", "stage3", "stage4")
UPS = ("up1", "up2", "up3", "up4")
# Place of a gate: level of the cells that it is applied to, and where in WIDTHS its hidden and its last layer look up.
PLACES = {
    "stage1": (0, 4, 0),
    "stage2": (1, 4, 1),
    "stage3": (2, 4, 2),
    "stage4": (3, 4, 3),
    "up1": (4, 4, 4),
    "up2": (3, 5, 5),
    "up3": (2, 6, 6),
    "up4": (1, 7, 7),
}
_TIME_FIRST = "up1"  # the only place whose layer takes (time, scan) and not (scan, time)
_SLOPE = 0.1
_HEAD = 20
_UPSAMPLING = 6  # points that the refiner makes of one
_EPS = 1e-5

Gate = Callable[[str, SparseConvTensor], SparseConvTensor]


class Norm(SparseModule):
    """Normalisation of the features of cells.

    "batch" is over all cells of the batch, with running statistics. "instance" is over the cells of each scan, "group"
    over those and groups of up to 8 channels; they are the same in training and evaluation, and what a scan becomes
    does not depend on its batch.
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.groups = channels if kind == "instance" else math.gcd(8, channels)
        self.bn = BatchNorm(channels, eps=_EPS, momentum=0.1) if kind == "batch" else None
        if self.bn is None:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells and width."""
        if self.bn is not None:
            return x.replace_feature(self.bn(x.features))
        scan = x.indices[:, 0].long()
        away = x.features - self._mean(x.features, scan, x.batch_size)
        spread = self._mean(away.square(), scan, x.batch_size)
        return x.replace_feature(away * (spread + _EPS).rsqrt() * self.weight + self.bias)

    def _mean(self, values: Tensor, scan: Tensor, scans: int) -> Tensor:
        mean = segment_mean(values, scan, scans).unflatten(1, (self.groups, -1))
        return mean.mean(2, keepdim=True).expand_as(mean).flatten(1)[scan]


def _conv_norm_relu(conv: nn.Module, channels: int, kind: str) -> list[nn.Module]:
    return [conv, Norm(channels, kind), nn.ReLU()]


def _conv(in_channels: int, channels: int) -> SubMConv3d:
    return SubMConv3d(in_channels, channels, 3, bias=False)


class _Block(SparseModule):
    """Layers under the name `net`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.net = SparseSequential(*layers)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Apply the layers."""
        return self.net(x)


class Residual(_Block):
    """relu(norm(conv(relu(norm(conv(x))))) + downsample(x)), the last without layers where the width stays."""

    def __init__(self, in_channels: int, channels: int, kind: str) -> None:
        super().__init__(
            [
                *_conv_norm_relu(_conv(in_channels, channels), channels, kind),
                _conv(channels, channels),
                Norm(channels, kind),
            ]
        )
        self.downsample = SparseSequential()
        if in_channels != channels:
            self.downsample.extend(
                [Linear(in_channels, channels, bias=False), Norm(channels, kind)]
            )

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        out = self.net(x)
        return out.replace_feature(F.relu(out.features + self.downsample(x).features))


class _Network(nn.Module):
    """The encoder, and what the three networks have in common."""

    def __init__(self, cr: float, voxel_size: float, normalisation: str, freeze_bn: bool) -> None:
        super().__init__()
        if normalisation not in NORMALISATIONS:
            raise InputError(
                f"normalisation={normalisation!r} is none of {', '.join(NORMALISATIONS)}"
            )
        if not (cr > 0 and int(cr * min(WIDTHS)) >= 1):
            raise InputError(
                f"cr={cr}: at least 1 / {min(WIDTHS)}, so that no layer is without channels"
            )
        if not 0 < voxel_size < float("inf"):
            raise InputError(f"voxel_size={voxel_size}: metres above 0")
        self.voxel_size = float(voxel_size)
        self.kind = normalisation
        self.widths = w = [int(cr * width) for width in WIDTHS]
        self.bn_frozen = False
        self.stem = SparseSequential(
            *_conv_norm_relu(_conv(3, w[0]), w[0], self.kind),
            *_conv_norm_relu(_conv(w[0], w[0]), w[0], self.kind),
        )
        for i, name in enumerate(STAGES):
            down = SparseConv3d(w[i], w[i], 2, stride=2, bias=False, indice_key=f"down{i + 1}")
            self.add_module(
                name,
                SparseSequential(
                    _Block(_conv_norm_relu(down, w[i], self.kind)),
                    Residual(w[i], w[i + 1], self.kind),
                    Residual(w[i + 1], w[i + 1], self.kind),
                ),
            )
        self.freeze_bn(freeze_bn)

    def _add_decoder(self, outputs: int) -> None:
        w = self.widths
        for i, name in enumerate(UPS):
            out, skip = w[5 + i], w[3 - i]
            up = SparseInverseConv3d(w[4 + i], out, 2, f"down{4 - i}", bias=False)
            self.add_module(
                name,
                nn.ModuleList(
                    [
                        _Block(_conv_norm_relu(up, out, self.kind)),
                        SparseSequential(
                            Residual(out + skip, out, self.kind), Residual(out, out, self.kind)
                        ),
                    ]
                ),
            )
        self.last = _mlp(w[8], _HEAD, outputs)

    def freeze_bn(self, frozen: bool = True) -> None:
        """Keep batch normalisation on its running statistics, whatever `train()` is called later."""
        self.bn_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True):
        """Training or evaluation, except for frozen normalisations."""
        super().train(mode)
        if self.bn_frozen:
            self._set_norms(False)
        return self

    def _set_norms(self, training: bool) -> None:
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.train(training)

    def voxelise(self, coord: Tensor, offset: Tensor) -> Voxels:
        """Cells of points; networks with one voxel size can share them, see `condition.voxelise`."""
        return voxelise(coord, offset, self.voxel_size)

    def _cells_of(self, coord: Tensor, offset: Tensor, voxels: Voxels | None) -> Voxels:
        if voxels is None:
            return self.voxelise(coord, offset)
        given = (voxels.voxel_size, len(voxels.inverse), voxels.batch_size)
        if given != (self.voxel_size, len(coord), len(offset)):
            raise InputError(
                f"voxels of {given[1]} points in {given[2]} scans at {given[0]} m do not fit {len(coord)} points in "
                f"{len(offset)} scans at {self.voxel_size} m"
            )
        return voxels

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _stem(self, voxels: Voxels) -> SparseConvTensor:
        x = voxels.tensor
        return self.stem(x.replace_feature(x.features.to(self._dtype)))

    def _encode(self, stem: SparseConvTensor, gate: Gate | None = None) -> list[SparseConvTensor]:
        """Features at strides 1, 2, 4, 8, 16."""
        levels = [stem]
        for name in STAGES:
            x = levels[-1] if gate is None else gate(name, levels[-1])
            levels.append(getattr(self, name)(x))
        return levels

    def _decode(self, levels: list[SparseConvTensor], gate: Gate | None = None) -> SparseConvTensor:
        """Back to stride 1; the skips are the features as they left the encoder, without a gate."""
        x = levels[-1]
        for name, skip in zip(UPS, reversed(levels[:-1])):
            up, blocks = getattr(self, name)
            x = up(x if gate is None else gate(name, x))
            x = blocks(x.replace_feature(torch.cat((x.features, skip.features), dim=1)))
        return x


def _mlp(in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(in_channels, hidden), nn.LeakyReLU(_SLOPE), Linear(hidden, out_channels)
    )


@kd.MODELS.register_module()
class ConditionEncoder(_Network):
    """Partial scans to features at stride 16; 8,497,952 parameters at full width.

    Args:
        cr: multiplier of the widths 32, 32, 64, 128, 256; the result has 256 cr channels.
        voxel_size: edge of a cell in metres.
        normalisation: "batch" as in the released weights; "instance" or "group" see one scan alone and know no
            difference between training and evaluation, see `Norm`.
        freeze_bn: see `freeze_bn()`.

    Raises:
        InputError: for an unknown normalisation, or sizes that are none.
    """

    def __init__(
        self,
        cr: float = 1.0,
        voxel_size: float = 0.05,
        normalisation: str = "batch",
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(cr, voxel_size, normalisation, freeze_bn)

    @property
    def out_channels(self) -> int:
        """Width of a condition's features."""
        return self.widths[4]

    def forward(self, coord: Tensor, offset: Tensor) -> Condition:
        """Encode partial scans, points (m, 3) in metres joined by `offset` (b,).

        Raises:
            InputError: for a scan without points, and for points as in `condition.voxelise`.
        """
        sizes = torch.diff(offset, prepend=offset.new_zeros(1))
        if bool((sizes <= 0).any()):
            scan = int((sizes <= 0).nonzero()[0])
            raise InputError(f"the partial scan {scan} of the batch has no points to complete")
        voxels = self.voxelise(coord, offset)
        x = self._encode(self._stem(voxels))[-1]
        return self._condition(x, self.null_feature())

    def null_feature(self) -> Tensor:
        """What stands for "no scan", (c,): the feature of a single point at the origin.

        Always by running statistics: a cloud of one cell has none of its own, and would spoil those of the layers.
        """
        with self._running_statistics():
            return self._encode(self._stem(self._origin(1)))[-1].features[0]

    def null(self, scans: int) -> Condition:
        """The condition of `scans` scans about which nothing is known."""
        feature = self.null_feature()
        x = self._origin(scans).tensor.replace_feature(feature.expand(scans, -1))
        return self._condition(x, feature).drop()

    def _condition(self, x: SparseConvTensor, null: Tensor) -> Condition:
        cells = x.indices.long()
        corners = torch.cat((cells[:, :1], CONDITION_STRIDE * cells[:, 1:]), dim=1)
        return Condition(corners, x.features, x.batch_size, self.voxel_size, null)

    def _origin(self, scans: int) -> Voxels:
        points = self.stem[0].weight.new_zeros((scans, 3))
        return self.voxelise(points, torch.arange(1, scans + 1, device=points.device))

    @contextmanager
    def _running_statistics(self) -> Iterator[None]:
        norms = [m for m in self.modules() if isinstance(m, BatchNorm) and m.training]
        self._set_norms(False)
        try:
            yield
        finally:
            for norm in norms:
                norm.train()


@kd.MODELS.register_module()
class Denoiser(_Network):
    """Predicts the noise of every point, given the time and an encoded partial scan; 24,174,515 parameters.

    Args:
        cr: multiplier of the widths, the same as the condition encoder's.
        voxel_size: edge of a cell in metres, the same as the condition encoder's.
        match: which cell of the scan belongs to a cell of the cloud: the one with the nearest lower corner ("corner",
            as the released weights were trained) or with the nearest centre ("centre", better for weights of one's
            own: corners of cells of unlike size lie up to 0.4 m beside their centres).
        null: what stands for "no scan": the encoded origin ("cloud", as in the released weights) or a feature of its
            own ("learned", one more entry, `null`).
        normalisation, freeze_bn: see `ConditionEncoder`.

    Raises:
        InputError: for unknown names, or sizes that are none.
    """

    def __init__(
        self,
        cr: float = 1.0,
        voxel_size: float = 0.05,
        match: str = "corner",
        null: str = "cloud",
        normalisation: str = "batch",
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(cr, voxel_size, normalisation, freeze_bn)
        if match not in MATCHES:
            raise InputError(f"match={match!r} is none of {', '.join(MATCHES)}")
        if null not in NULLS:
            raise InputError(f"null={null!r} is none of {', '.join(NULLS)}")
        self.match = match
        w = self.widths
        self.condition_channels = c = w[4]
        for name, (_, hidden, out) in PLACES.items():
            self.add_module(f"latent_{name}", _mlp(c, c, c))
            self.add_module(f"latemp_{name}", _mlp(2 * c, w[hidden], w[out]))
            self.add_module(f"{name}_temp", _mlp(w[8], w[8], c))
            # Gates multiply: begun about 0, as layers are, eight in a row would leave nothing to learn from.
            nn.init.ones_(self.get_submodule(f"latemp_{name}")[2].bias)
        self._add_decoder(3)
        self.register_parameter("null", nn.Parameter(torch.zeros(c)) if null == "learned" else None)
        self.train(self.training)

    def forward(
        self,
        x: Tensor,
        offset: Tensor,
        t: Tensor | int,
        condition: Condition | None,
        voxels: Voxels | None = None,
    ) -> Tensor:
        """Noise (n, 3) of the points x (n, 3), metres, joined by `offset` (b,).

        Args:
            t: int64 (b,), the time of every scan, or one for all.
            condition: of a `ConditionEncoder`; scans that it marks as dropped, and all scans if it is None, get the
                null feature. None needs null="learned", else use the encoder's `null()`.
            voxels: `voxelise(x, offset)` where another network has it already.

        Raises:
            InputError: for shapes or a condition that do not fit the points, and points as in `condition.voxelise`.
        """
        voxels = self._cells_of(x, offset, voxels)
        stem = self._stem(voxels)
        gates = self._gates(voxels, condition, t)
        return self._after_stem(stem, self._gate(voxels, condition, gates), voxels, x)

    def guided(
        self,
        x: Tensor,
        offset: Tensor,
        t: Tensor | int,
        condition: Condition,
        scale: float,
        voxels: Voxels | None = None,
    ) -> Tensor:
        """Classifier-free guidance: e_null + scale (e_condition - e_null), arXiv:2207.12598; arguments as `forward`.

        The same as from two calls; cells, kernel maps and the stem, which has no gate before it, are computed once.
        With scale 1 or 0 only one of the two is run.
        """
        if condition is None:
            raise InputError(
                "guidance is towards a condition; without one call the denoiser itself"
            )
        if scale == 1:
            return self(x, offset, t, condition, voxels)
        voxels = self._cells_of(x, offset, voxels)
        stem = self._stem(voxels)
        gates = self._gates(voxels, condition, t, guided=True)
        nothing = self._after_stem(stem, self._gate(voxels, None, gates), voxels, x)
        if scale == 0:
            return nothing
        told = self._after_stem(stem, self._gate(voxels, condition, gates), voxels, x)
        return nothing + scale * (told - nothing)

    def _after_stem(self, stem: SparseConvTensor, gate: Gate, voxels: Voxels, x: Tensor) -> Tensor:
        out = self._decode(self._encode(stem, gate), gate)
        # Per cell before the points are looked up: the same, with fewer rows.
        return self.last(out.features).to(x.dtype).index_select(0, voxels.inverse)

    def _gate(self, voxels: Voxels, condition: Condition | None, gates: dict[str, Tensor]) -> Gate:
        """Multiply features by the gates of their cells; without a condition by the last b rows, one for each scan."""

        def gate(name: str, x: SparseConvTensor) -> SparseConvTensor:
            table = gates[name]
            if condition is None:
                rows = x.indices[:, 0].long() + (len(table) - voxels.batch_size)
            else:
                rows = voxels.rows_of(condition, x.indices, PLACES[name][0], self.match)
            return x.replace_feature(x.features * table.index_select(0, rows))

        return gate

    def _gates(
        self, voxels: Voxels, condition: Condition | None, t: Tensor | int, guided: bool = False
    ) -> dict[str, Tensor]:
        """Gates by place: (v + b, out) for the cells of the condition and for "no scan" at the time of each scan.

        The last b rows are left out where nothing asks for them.
        """
        scans, device = voxels.batch_size, voxels.inverse.device
        t = torch.as_tensor(t, device=device)
        if t.dim() == 0:
            t = t.expand(scans)
        if t.shape != (scans,):
            raise InputError(f"t must be one time for each of {scans} scans; got {tuple(t.shape)}")
        if condition is not None:
            self._check(condition, scans)
        dropped = condition is None or condition.dropped is not None or guided
        parts = self._scan_parts(condition, dropped)
        cells = 0 if condition is None else len(condition.cells)
        waves = time_embedding(t, self.widths[8]).to(self._dtype)
        gates = {}
        for name in PLACES:
            first, _, second = getattr(self, f"latemp_{name}")
            of_time = linear(getattr(self, f"{name}_temp")(waves), self._half(name, 1), first.bias)
            hidden = []
            if condition is not None:
                hidden.append(parts[name][:cells] + of_time[condition.cells[:, 0].long()])
            if dropped:
                hidden.append(parts[name][cells:] + of_time)
            gates[name] = second(F.leaky_relu(torch.cat(hidden), _SLOPE))
        return gates

    def _check(self, condition: Condition, scans: int) -> None:
        if condition.batch_size != scans:
            raise InputError(
                f"the condition has {condition.batch_size} scans, the points have {scans}"
            )
        if condition.voxel_size != self.voxel_size:
            raise InputError(
                f"the condition has cells of {condition.voxel_size} m, the denoiser of {self.voxel_size} m"
            )
        width = condition.features.shape[1]
        if width != self.condition_channels:
            raise InputError(
                f"the condition has {width} channels, the denoiser takes {self.condition_channels}; give encoder and "
                "denoiser the same cr"
            )
        if not len(condition.cells):
            raise InputError("the condition has no cells: nothing to complete")

    def _half(self, name: str, which: int) -> Tensor:
        """Columns of the first layer of latemp_q that take the scan (0) or the time (1)."""
        weight, c = getattr(self, f"latemp_{name}")[0].weight, self.condition_channels
        first = (which == 0) != (name == _TIME_FIRST)
        return weight[:, :c] if first else weight[:, c:]

    def _scan_parts(self, condition: Condition | None, dropped: bool) -> dict[str, Tensor]:
        """What reaches the hidden layer of the gates from the scan, by place: (v, h), or (v + 1, h) with "no scan".

        Kept with the condition while weights and precision stay the same and nothing asks for gradients. A weight
        that is changed through its `.data` leaves no trace and is not noticed.
        """
        features = [] if condition is None else [condition.features]
        if dropped:
            null = self.null if self.null is not None or condition is None else condition.null
            if null is None:
                raise InputError(
                    "nothing stands for 'no scan' here: use null='learned', or a condition of the encoder, its "
                    "null() or drop()"
                )
            features.append(null[None])
        rows = torch.cat([f.to(self._dtype) for f in features])
        layers = [
            p
            for name in PLACES
            for part in (getattr(self, f"latent_{name}"), getattr(self, f"latemp_{name}")[0])
            for p in part.parameters()
        ]
        kept = condition is not None and not (
            torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in layers))
        )
        kept = kept and not any(p.is_inference() for p in layers)
        if not kept:
            return self._project(rows)
        device = rows.device.type
        state = (
            dropped,
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            None if self.null is None else (self.null.data_ptr(), self.null._version),
            *((p.data_ptr(), p._version) for p in layers),
        )
        known = condition._projected.get(self)
        if known is None or known[0] != state:
            known = (state, self._project(rows))
            condition._projected[self] = known
        return known[1]

    def _project(self, rows: Tensor) -> dict[str, Tensor]:
        return {
            name: linear(getattr(self, f"latent_{name}")(rows), self._half(name, 0))
            for name in PLACES
        }


@kd.MODELS.register_module()
class Refiner(_Network):
    """Six points for every point of a completed scan, each at most 1 m away along every axis; 21,722,926 parameters.

    Args:
        cr, voxel_size, normalisation, freeze_bn: see `ConditionEncoder`.

    Raises:
        InputError: for an unknown normalisation, or sizes that are none.
    """

    def __init__(
        self,
        cr: float = 1.0,
        voxel_size: float = 0.05,
        normalisation: str = "batch",
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(cr, voxel_size, normalisation, freeze_bn)
        self._add_decoder(3 * _UPSAMPLING)
        self.train(self.training)

    def forward(self, coord: Tensor, offset: Tensor, voxels: Voxels | None = None) -> Tensor:
        """Offsets (n, 6, 3), metres in [-1, 1], of the points (n, 3) joined by `offset` (b,).

        Raises:
            InputError: for points as in `condition.voxelise`.
        """
        voxels = self._cells_of(coord, offset, voxels)
        out = self._decode(self._encode(self._stem(voxels)))
        offsets = self.last(out.features).tanh().to(coord.dtype)
        return offsets.index_select(0, voxels.inverse).unflatten(1, (_UPSAMPLING, 3))
