"""Sparse U-Net: residual blocks of submanifold convolutions on four levels (MinkUNet, arXiv:1904.08755).

The network of Pointcept's `SpUNet-v1m1`: same arguments, same state-dict keys and shapes, same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd, stand_in
from pointcept_kd.host.point import Point
from pointcept_kd.ops.scatter import segment_mean
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)

from .layers import BatchNorm, check_features

_norm = partial(BatchNorm, eps=1e-3, momentum=0.01)


class ResidualBlock(SparseModule):
    """relu(bn(conv(relu(bn(conv(x))))) + proj(x)); `proj` has parameters only where the width changes."""

    def __init__(self, in_channels: int, channels: int, key: str) -> None:
        super().__init__()
        self.proj = SparseSequential(
            *(
                [nn.Identity()]
                if in_channels == channels
                else [SubMConv3d(in_channels, channels, 1, bias=False), _norm(channels)]
            )
        )
        self.conv1 = SubMConv3d(in_channels, channels, 3, bias=False, padding=1, indice_key=key)
        self.bn1 = _norm(channels)
        self.relu = nn.ReLU()
        self.conv2 = SubMConv3d(channels, channels, 3, bias=False, padding=1, indice_key=key)
        self.bn2 = _norm(channels)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        out = self.conv1(x)
        out = self.conv2(out.replace_feature(self.relu(self.bn1(out.features))))
        return out.replace_feature(self.relu(self.bn2(out.features) + self.proj(x).features))


@stand_in(MODELS, kd.MODELS, "SpUNet-v1m1")
class SpUNetBase(nn.Module):
    """Sparse U-Net.

    Takes a batch dict with `grid_coord` (n, 3), `feat` (n, in_channels) and `offset`; returns (n, num_classes), or
    (n, channels[-1]) if `num_classes` is 0 or less. With `enc_mode` there is no decoder and the result is the mean
    over the coarsest cells of each sample, (b, num_classes) or (b, channels[3]).

    Args:
        in_channels: width of `feat`.
        num_classes: width of the final layer; 0 or less for none.
        base_channels: width of the finest level.
        channels: widths of the encoder's levels from fine to coarse, then of the decoder's from coarse to fine.
        layers: residual blocks of the same.
        enc_mode: encoder only.
        cls_mode: former name of `enc_mode`.

    Raises:
        InputError: for `channels` or `layers` that do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        base_channels: int = 32,
        channels: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        layers: Sequence[int] = (2, 3, 4, 6, 2, 2, 2, 2),
        enc_mode: bool = False,
        *,
        cls_mode: bool | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != len(layers) or len(channels) % 2 or not channels:
            raise InputError(
                f"channels={tuple(channels)}, layers={tuple(layers)}: expected equally many entries, first the "
                "encoder's levels, then as many of the decoder"
            )
        self.in_channels = in_channels
        self.enc_mode = enc_mode if cls_mode is None else cls_mode
        self.levels = len(channels) // 2
        self.conv_input = SparseSequential(
            SubMConv3d(in_channels, base_channels, 5, bias=False, padding=1, indice_key="stem"),
            _norm(base_channels),
            nn.ReLU(),
        )
        # In Pointcept's order: an optimiser's state in a checkpoint goes by the number of the parameter.
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        finer = base_channels
        for s in range(self.levels):
            width = channels[s]
            self.down.append(
                SparseSequential(
                    SparseConv3d(
                        finer, width, 2, stride=2, bias=False, indice_key=f"spconv{s + 1}"
                    ),
                    _norm(width),
                    nn.ReLU(),
                )
            )
            self.enc.append(_stage(width, width, layers[s], f"subm{s + 1}"))
            if not self.enc_mode:
                # The decoder's level s comes from the level below it, and joins the encoder's at its own scale.
                out, below = channels[-1 - s], channels[-2 - s]
                self.up.append(
                    SparseSequential(
                        SparseInverseConv3d(below, out, 2, f"spconv{s + 1}", bias=False),
                        _norm(out),
                        nn.ReLU(),
                    )
                )
                self.dec.append(_stage(out + finer, out, layers[-1 - s], f"subm{s}"))
            finer = width
        last = channels[self.levels - 1] if self.enc_mode else channels[-1]
        self.final = (
            SubMConv3d(last, num_classes, 1, bias=True) if num_classes > 0 else nn.Identity()
        )
        self.apply(_initialise)

    def forward(self, batch: dict) -> Tensor:
        """Run the network; rows in input order."""
        check_features(batch, self.in_channels)
        point = Point(batch)
        point.sparsify()
        x = self.conv_input(point["sparse_conv_feat"])
        skips = [x]
        for down, enc in zip(self.down, self.enc):
            x = enc(down(x))
            skips.append(x)
        if self.enc_mode:
            x = self.final(x)
            return segment_mean(x.features, x.indices[:, 0].long(), x.batch_size)
        skips.pop()
        for up, dec, skip in reversed(list(zip(self.up, self.dec, skips))):
            x = up(x)
            x = dec(x.replace_feature(torch.cat([x.features, skip.features], 1)))
        return self.final(x).features


def _stage(in_channels: int, channels: int, depth: int, key: str) -> SparseSequential:
    stage = SparseSequential()
    for i in range(depth):
        stage.add_module(
            f"block{i}", ResidualBlock(in_channels if i == 0 else channels, channels, key)
        )
    return stage


def _initialise(module: nn.Module) -> None:
    """Truncated normal for linear and submanifold layers; the other convolutions keep their uniform draw."""
    if isinstance(module, (nn.Linear, SubMConv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
