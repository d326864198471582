"""Linear probing: how much of the classes a linear layer reads from a network that no longer changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.point import Point

from .segmentor import _build, _Segmentor


@kd.MODELS.register_module()
class LinearProbe(_Segmentor):
    """A backbone as it is, with one linear layer behind it that is trained.

    The backbone has no gradients and stays in evaluation, so that its BatchNorm statistics keep still too; in training
    it runs without a graph.

    Takes and returns what `DefaultSegmentor` does.

    Args:
        num_classes: width of the layer, `final`.
        backbone_out_channels: width of the backbone's features: 96 of `kd.ResidualUNet(num_classes=0)`, 128 of
            `kd.VoxelBackBone8x`, 16 of `kd.UNetV2`.
        backbone: its config, or the module: it returns features of the batch's rows, as a tensor or a `Point`.
        criteria: list of loss configs.

    Raises:
        InputError: for features that are not one row of that width for each of the batch.
    """

    def __init__(
        self,
        num_classes: int,
        backbone_out_channels: int,
        backbone: Mapping | nn.Module,
        criteria: Sequence[Mapping] | None = None,
    ) -> None:
        super().__init__()
        if min(num_classes, backbone_out_channels) < 1:
            raise InputError(
                f"num_classes={num_classes}, backbone_out_channels={backbone_out_channels}: expected 1 or more"
            )
        self.final = nn.Linear(backbone_out_channels, num_classes)
        self.backbone = _build(backbone).requires_grad_(False)
        self.criteria = build_criteria(criteria)
        self.train(self.training)

    def train(self, mode: bool = True) -> LinearProbe:
        """Training or evaluation of the layer; the backbone stays in evaluation."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, batch: Mapping) -> Tensor:
        """What the layer reads, (n, backbone_out_channels), without a graph."""
        with torch.no_grad():
            found = self.backbone(batch)
        if isinstance(found, Point):
            found = found["feat"]
        rows, width = len(batch["feat"]), self.final.in_features
        if not isinstance(found, Tensor) or found.shape != (rows, width):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"the backbone gives {shape} for {rows} rows; expected ({rows}, {width}): set backbone_out_channels, "
                "and take the backbone without a head and at the resolution of its input"
            )
        return found

    def forward(self, batch: Mapping) -> dict[str, Tensor]:
        """Loss and logits of a batch dict."""
        return self._answer(self.final(self.features(batch)), batch)
