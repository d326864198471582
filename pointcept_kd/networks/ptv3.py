"""Point Transformer V3: patch attention along space-filling curves (Wu et al., CVPR 2024, arXiv:2312.10035).

The network of Pointcept's `PT-v3m1`: same arguments, same state-dict keys and shapes, same results, so weights travel
in both directions. Differences, all deliberate:

* patches do not depend on the other scans of a batch (see `pointcept_kd.ops.attention`);
* the order of the curves is shuffled in training only, unless `shuffle_orders_in_eval` asks for it;
* a level that holds a single cell trains (see `BatchNorm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd, stand_in
from pointcept_kd.host.point import Point, PointModule, PointSequential, batch2offset
from pointcept_kd.ops.attention import patch_attention, relative_position_bias
from pointcept_kd.ops.curves import ORDERS
from pointcept_kd.ops.scatter import segment_max, segment_mean
from pointcept_kd.ops.sparse import SubMConv3d

from .layers import BatchNorm, DropPath, Linear, check_features, ramp

NormLayer = Callable[[int], nn.Module]


class PDNorm(PointModule):
    """Prompt-driven norm: one norm per data set, and a scale and shift from a context vector (arXiv:2308.09718).

    Args:
        channels: width of `feat`.
        norm: makes a norm of that width.
        conditions: names of the data sets; a batch names its own in `condition`.
        decouple: one norm per condition, else one for all.
        adaptive: feat * (1 + scale) + shift, from the batch's `context` (1 or n, context_channels).
    """

    def __init__(
        self,
        channels: int,
        norm: NormLayer,
        conditions: Sequence[str],
        decouple: bool = True,
        adaptive: bool = False,
        context_channels: int = 256,
    ) -> None:
        super().__init__()
        self.conditions = tuple(conditions)
        self.norm = (
            nn.ModuleList(norm(channels) for _ in conditions) if decouple else norm(channels)
        )
        if adaptive:
            self.modulation = nn.Sequential(nn.SiLU(), Linear(context_channels, 2 * channels))
        self.decouple, self.adaptive = decouple, adaptive

    def forward(self, point: Point) -> Point:
        """Normalise `feat` by the batch's condition."""
        norm = self.norm
        if self.decouple:
            name = point.get("condition")
            name = name if name is None or isinstance(name, str) else name[0]
            if name not in self.conditions:
                raise InputError(
                    f"the batch has condition {name!r}; prompt-driven norm was built for {', '.join(self.conditions)} "
                    "(pdnorm_conditions); collect `condition` in the data set or switch pdnorm_bn and pdnorm_ln off"
                )
            norm = norm[self.conditions.index(name)]
        feat = norm(point["feat"])
        if self.adaptive:
            if "context" not in point:
                raise InputError(
                    "pdnorm_adaptive needs a `context` in the batch; collect it or switch this off"
                )
            shift, scale = self.modulation(point["context"]).chunk(2, 1)
            feat = feat * (1.0 + scale) + shift
        point["feat"] = feat
        if "sparse_conv_feat" in point:
            point["sparse_conv_feat"] = point["sparse_conv_feat"].replace_feature(feat)
        return point


class RelativePosition(nn.Module):
    """Table of learned biases for the offset between two points of a patch, in voxels along each axis."""

    def __init__(self, patch_size: int, heads: int) -> None:
        super().__init__()
        bound = int((4 * patch_size) ** (1 / 3) * 2)
        self.rpe_table = nn.Parameter(torch.zeros(3 * (2 * bound + 1), heads))
        nn.init.trunc_normal_(self.rpe_table, std=0.02)


class PatchAttention(PointModule):
    """Multi-head attention inside the patches of one serialised order."""

    def __init__(
        self,
        channels: int,
        heads: int,
        patch_size: int,
        order_index: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        enable_rpe: bool = False,
        enable_flash: bool = True,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.patch_size, self.order_index = heads, patch_size, order_index
        self.scale = qk_scale or (channels // heads) ** -0.5
        self.attn_drop, self.enable_flash, self.upcast = attn_drop, enable_flash, upcast
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe = RelativePosition(patch_size, heads) if enable_rpe else None

    def forward(self, point: Point) -> Point:
        """Replace `feat` by its attention result."""
        feat = point["feat"]
        bias = None
        if self.rpe is not None:
            bias = partial(relative_position_bias, point["grid_coord"], table=self.rpe.rpe_table)
        out = patch_attention(
            self.qkv(feat).view(feat.shape[0], 3, self.heads, -1),
            point.patches(self.patch_size, self.order_index),
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
            bias=bias,
            enable_flash=self.enable_flash,
            upcast=self.upcast,
        )
        point["feat"] = self.proj_drop(self.proj(out.flatten(1)))
        return point


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, channels: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows (n, c) to rows (n, c)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(PointModule):
    """Position encoding by convolution, attention and MLP, each added to what came in."""

    def __init__(
        self,
        channels: int,
        attn: PatchAttention,
        norm: NormLayer,
        mlp_ratio: float = 4,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        pre_norm: bool = True,
        cpe_key: str | None = None,
        legacy_cpe: bool = False,
    ) -> None:
        super().__init__()
        self.pre_norm, self.legacy_cpe = pre_norm, legacy_cpe
        self.cpe = PointSequential(
            SubMConv3d(channels, channels, 3, bias=True, indice_key=cpe_key),
            Linear(channels, channels),
            norm(channels),
        )
        self.norm1 = PointSequential(norm(channels))
        self.attn = attn
        self.norm2 = PointSequential(norm(channels))
        self.mlp = PointSequential(MLP(channels, int(channels * mlp_ratio), proj_drop))
        self.drop_path = PointSequential(DropPath(drop_path))

    def forward(self, point: Point) -> Point:
        """Update `feat` and, at the end, `sparse_conv_feat`."""
        # The convolution of `cpe` reads the sparse tensor, not `feat`: whatever was left there last.
        kept = point["feat"]
        point = self.cpe(point)
        point["feat"] = kept + point["feat"]
        point = self._residual(point, self.norm1, self.attn)
        point = self._residual(point, self.norm2, self.mlp)
        # Up to Pointcept 1.5.1 this refresh was lost and the next block convolved what the MLP branch had left.
        # Weights trained there need that data flow.
        if not self.legacy_cpe:
            point["sparse_conv_feat"] = point["sparse_conv_feat"].replace_feature(point["feat"])
        return point

    def _residual(self, point: Point, norm: PointSequential, branch: PointModule) -> Point:
        kept = point["feat"]
        if self.pre_norm:
            point = norm(point)
        point = self.drop_path(branch(point))
        point["feat"] = kept + point["feat"]
        return point if self.pre_norm else norm(point)


class SerializedPooling(PointModule):
    """Join the points of each cube of side `stride` by dropping code bits."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormLayer,
        shuffle_orders: bool = True,
        shuffle_orders_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.shuffle_orders, self.shuffle_orders_in_eval = shuffle_orders, shuffle_orders_in_eval
        self.proj = Linear(in_channels, out_channels)
        self.norm = PointSequential(norm(out_channels))
        self.act = PointSequential(nn.GELU())

    def forward(self, point: Point) -> Point:
        """A new Point of cells; `pooling_parent` is the old one, `pooling_inverse` (n,) the cell of each point."""
        levels = self.stride.bit_length() - 1
        if levels > point["serialized_depth"]:
            levels = 0
        code = point["serialized_code"] >> 3 * levels
        # Points in the first order have ascending codes, so a cell begins where the code changes.
        order = point["serialized_order"][0]
        ascending = code[0][order]
        begins = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=begins[1:])
        head = order[begins]
        cell = torch.empty_like(order)
        cell[order] = torch.cumsum(begins, 0) - 1

        size = head.shape[0]
        batch = point["batch"][head]
        pooled = Point(
            feat=segment_max(self.proj(point["feat"]), cell, size),
            grid_coord=point["grid_coord"][head] >> levels,
            batch=batch,
            offset=batch2offset(batch, point["offset"].shape[0]),
            order=list(point["order"]),
            serialized_depth=point["serialized_depth"] - levels,
            **{key: point[key] for key in ("condition", "context") if key in point},
        )
        if "coord" in point:
            pooled["coord"] = segment_mean(point["coord"], cell, size)
        pooled.sort_codes(code[:, head], _shuffles(self))
        pooled["pooling_parent"], pooled["pooling_inverse"] = point, cell
        pooled = self.act(self.norm(pooled))
        pooled.sparsify()
        return pooled


class SerializedUnpooling(PointModule):
    """Back to the points before a pooling: the sum of both levels, each projected."""

    def __init__(
        self, in_channels: int, skip_channels: int, out_channels: int, norm: NormLayer
    ) -> None:
        super().__init__()
        self.proj = PointSequential(
            Linear(in_channels, out_channels), norm(out_channels), nn.GELU()
        )
        self.proj_skip = PointSequential(
            Linear(skip_channels, out_channels), norm(out_channels), nn.GELU()
        )

    def forward(self, point: Point) -> Point:
        """The Point of the finer level."""
        parent, cell = point.pop("pooling_parent"), point.pop("pooling_inverse")
        point = self.proj(point)
        parent = self.proj_skip(parent)
        # The sum goes into `feat` alone. The sparse tensor keeps the skip branch, so the first position encoding of a
        # decoder stage convolves that. Every release of the original does this and its weights are trained with it.
        parent["feat"] = parent["feat"] + point["feat"].index_select(0, cell)
        return parent


class Embedding(PointModule):
    """Submanifold convolution 5 x 5 x 5, norm, GELU."""

    def __init__(self, in_channels: int, channels: int, norm: NormLayer) -> None:
        super().__init__()
        self.stem = PointSequential(
            conv=SubMConv3d(in_channels, channels, 5, bias=False, padding=1, indice_key="stem"),
            norm=norm(channels),
            act=nn.GELU(),
        )

    def forward(self, point: Point) -> Point:
        """Replace `feat` (n, in) by (n, channels)."""
        return self.stem(point)


@stand_in(MODELS, kd.MODELS, "PT-v3m1")
class PointTransformerV3(PointModule):
    """Point Transformer V3, mode 1.

    Takes a batch dict with `feat` (n, in_channels), `grid_coord` (n, 3) and `offset` or `batch`; returns the Point of
    the finest level, rows in input order, `feat` (n, dec_channels[0]). With `enc_mode` returns the coarsest Point,
    which leads back to the finer ones through `pooling_parent` and `pooling_inverse`.

    Args up to `pdnorm_conditions` are Pointcept's, in its order. `enable_flash` uses flash-attn where it is installed
    and the data is on CUDA, and PyTorch's attention elsewhere. `upcast_attention` and `upcast_softmax`: compute
    attention in float32.

    Args:
        legacy_cpe: data flow of Pointcept up to 1.5.1, for weights trained there. They load without an error in either
            mode but predict well in this one only.
        shuffle_orders_in_eval: shuffle in evaluation as well, as Pointcept does; then no two evaluations are equal.
        cls_mode: former name of `enc_mode`.

    Raises:
        InputError: for arguments that do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 6,
        order: str | Sequence[str] = ("z", "z-trans"),
        stride: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (2, 2, 2, 6, 2),
        enc_channels: Sequence[int] = (32, 64, 128, 256, 512),
        enc_num_head: Sequence[int] = (2, 4, 8, 16, 32),
        enc_patch_size: Sequence[int] = (48, 48, 48, 48, 48),
        dec_depths: Sequence[int] = (2, 2, 2, 2),
        dec_channels: Sequence[int] = (64, 64, 128, 256),
        dec_num_head: Sequence[int] = (4, 4, 8, 16),
        dec_patch_size: Sequence[int] = (48, 48, 48, 48),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.3,
        pre_norm: bool = True,
        shuffle_orders: bool = True,
        enable_rpe: bool = False,
        enable_flash: bool = True,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        enc_mode: bool = False,
        pdnorm_bn: bool = False,
        pdnorm_ln: bool = False,
        pdnorm_decouple: bool = True,
        pdnorm_adaptive: bool = False,
        pdnorm_affine: bool = True,
        pdnorm_conditions: Sequence[str] = ("ScanNet", "S3DIS", "Structured3D"),
        *,
        legacy_cpe: bool = False,
        shuffle_orders_in_eval: bool = False,
        cls_mode: bool | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.order = [order] if isinstance(order, str) else list(order)
        self.enc_mode = enc_mode if cls_mode is None else cls_mode
        self.shuffle_orders = shuffle_orders
        self.shuffle_orders_in_eval = shuffle_orders_in_eval
        _check_order(self.order)
        _check_stages(
            "enc", len(stride) + 1, enc_depths, enc_channels, enc_num_head, enc_patch_size
        )
        if not self.enc_mode:
            _check_stages(
                "dec", len(stride), dec_depths, dec_channels, dec_num_head, dec_patch_size
            )
        for step in stride:
            if step < 1 or step & (step - 1):
                raise InputError(
                    f"stride={tuple(stride)}: pooling drops code bits, so each must be a power of two"
                )

        def wrap(norm: NormLayer, prompted: bool) -> NormLayer:
            if not prompted:
                return norm
            return partial(
                PDNorm,
                norm=norm,
                conditions=pdnorm_conditions,
                decouple=pdnorm_decouple,
                adaptive=pdnorm_adaptive,
            )

        batch_norm = partial(
            BatchNorm, eps=1e-3, momentum=0.01, affine=pdnorm_affine or not pdnorm_bn
        )
        batch_norm = wrap(batch_norm, pdnorm_bn)
        layer_norm = wrap(
            partial(nn.LayerNorm, elementwise_affine=pdnorm_affine or not pdnorm_ln), pdnorm_ln
        )

        def block(
            channels: int, heads: int, patch: int, number: int, stage: int, drop: float
        ) -> Block:
            attn = PatchAttention(
                channels,
                heads,
                patch,
                number % len(self.order),
                qkv_bias,
                qk_scale,
                attn_drop,
                proj_drop,
                enable_rpe,
                enable_flash,
                upcast_attention or upcast_softmax,
            )
            return Block(
                channels,
                attn,
                layer_norm,
                mlp_ratio,
                proj_drop,
                drop,
                pre_norm,
                f"stage{stage}",
                legacy_cpe,
            )

        self.embedding = Embedding(in_channels, enc_channels[0], batch_norm)
        self.enc = PointSequential()
        drops = ramp(drop_path, sum(enc_depths))
        for s, depth in enumerate(enc_depths):
            stage = PointSequential()
            if s > 0:
                pool = SerializedPooling(
                    enc_channels[s - 1],
                    enc_channels[s],
                    stride[s - 1],
                    batch_norm,
                    shuffle_orders,
                    shuffle_orders_in_eval,
                )
                stage.add(pool, "down")
            for i in range(depth):
                drop = drops[sum(enc_depths[:s]) + i]
                stage.add(
                    block(enc_channels[s], enc_num_head[s], enc_patch_size[s], i, s, drop),
                    f"block{i}",
                )
            self.enc.add(stage, f"enc{s}")

        if not self.enc_mode:
            self.dec = PointSequential()
            drops = ramp(drop_path, sum(dec_depths))
            below = enc_channels[-1]
            for s in reversed(range(len(dec_depths))):
                start = sum(dec_depths[:s])
                stage = PointSequential(
                    up=SerializedUnpooling(below, enc_channels[s], dec_channels[s], batch_norm)
                )
                for i, drop in enumerate(reversed(drops[start : start + dec_depths[s]])):
                    stage.add(
                        block(dec_channels[s], dec_num_head[s], dec_patch_size[s], i, s, drop),
                        f"block{i}",
                    )
                self.dec.add(stage, f"dec{s}")
                below = dec_channels[s]

    def forward(self, batch: dict) -> Point:
        """Run the network; `batch` itself is left as it is."""
        check_features(batch, self.in_channels)
        point = Point(batch)
        point.serialization(self.order, shuffle_orders=_shuffles(self))
        point.sparsify()
        point = self.enc(self.embedding(point))
        return point if self.enc_mode else self.dec(point)


def _shuffles(module: PointTransformerV3 | SerializedPooling) -> bool:
    """Whether this pass permutes the orders."""
    return module.shuffle_orders and (module.training or module.shuffle_orders_in_eval)


def _check_order(order: list[str]) -> None:
    unknown = [name for name in order if name not in ORDERS]
    if unknown or not order:
        raise InputError(f"order={order}: choose one or more of {', '.join(ORDERS)}")


def _check_stages(
    side: str, stages: int, depths: Sequence, channels: Sequence, heads: Sequence, patches: Sequence
) -> None:
    """One entry per stage everywhere, and channels that the heads divide."""
    given = {"depths": depths, "channels": channels, "num_head": heads, "patch_size": patches}
    for name, values in given.items():
        if len(values) != stages:
            raise InputError(
                f"{side}_{name}={tuple(values)}: expected {stages} entries, one per stage, as `stride` says"
            )
    for width, head in zip(channels, heads):
        if width % head:
            raise InputError(
                f"{side}_channels={tuple(channels)}: {width} is not divisible by its {head} heads"
            )
