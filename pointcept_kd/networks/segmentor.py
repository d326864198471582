"""Segmentors: a backbone, a head and the training criteria.

In training they return `dict(loss)`; in evaluation `dict(loss, seg_logits)` where the batch has labels, and
`dict(seg_logits)` where it has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, kd, stand_in
from pointcept_kd.host.criteria import build_criteria
from pointcept_kd.host.point import Point


def _build(cfg: Mapping | nn.Module) -> nn.Module:
    return cfg if isinstance(cfg, nn.Module) else MODELS.build(cfg)


class _Segmentor(nn.Module):
    """What both segmentors return."""

    def _answer(self, seg_logits: Tensor, batch: Mapping) -> dict[str, Tensor]:
        if self.training:
            return {"loss": self.criteria(seg_logits, batch["segment"])}
        if "segment" in batch:
            return {"loss": self.criteria(seg_logits, batch["segment"]), "seg_logits": seg_logits}
        return {"seg_logits": seg_logits}


@stand_in(MODELS, kd.MODELS, "DefaultSegmentor")
class DefaultSegmentor(_Segmentor):
    """A backbone that returns logits (n, k) itself, e.g. `SpUNet-v1m1`.

    Args:
        backbone: its config, or the module.
        criteria: list of loss configs.
    """

    def __init__(
        self, backbone: Mapping | nn.Module, criteria: Sequence[Mapping] | None = None
    ) -> None:
        super().__init__()
        self.backbone = _build(backbone)
        self.criteria = build_criteria(criteria)

    def forward(self, batch: Mapping) -> dict[str, Tensor]:
        """Loss and logits of a batch dict."""
        condition = batch.get("condition")
        if condition is not None and not isinstance(condition, str):
            # One batch comes from one data set: the first name stands for all.
            batch = {**batch, "condition": condition[0]}
        return self._answer(self.backbone(batch), batch)


@stand_in(MODELS, kd.MODELS, "DefaultSegmentorV2")
class DefaultSegmentorV2(_Segmentor):
    """A backbone that returns features, as a `Point` or a tensor, and a linear head.

    An encoder-only backbone returns its coarsest Point; its features are then handed down and appended to those of
    every finer level.

    Args:
        num_classes: width of the head; 0 or less for none.
        backbone_out_channels: width of the backbone's features.
        backbone: its config, or the module.
        criteria: list of loss configs.
        freeze_backbone: no gradients for the backbone. As in Pointcept its BatchNorm statistics still move in
            training.
    """

    def __init__(
        self,
        num_classes: int,
        backbone_out_channels: int,
        backbone: Mapping | nn.Module,
        criteria: Sequence[Mapping] | None = None,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.seg_head = (
            nn.Linear(backbone_out_channels, num_classes) if num_classes > 0 else nn.Identity()
        )
        self.backbone = _build(backbone)
        self.criteria = build_criteria(criteria)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False)

    def forward(self, batch: Mapping, return_point: bool = False) -> dict[str, Tensor | Point]:
        """Loss and logits of a batch dict; with `return_point` also the `point` that the head has read."""
        point = self.backbone(Point(batch))
        if isinstance(point, Point):
            while "pooling_parent" in point:
                parent, cell = point.pop("pooling_parent"), point.pop("pooling_inverse")
                parent["feat"] = torch.cat(
                    [parent["feat"], point["feat"].index_select(0, cell)], -1
                )
                point = parent
            feat = point["feat"]
        else:
            feat = point
        out = self._answer(self.seg_head(feat), batch)
        return {**out, "point": point} if return_point else out
