"""A segmentor of images: a trunk and a 1 x 1 classifier, trained on a label of every pixel.

It makes image features for image-to-LiDAR pre-training where no weights of a foundation model are at hand: trained on
the weak labels of a data set's images, its trunk becomes that of a `kd.ImageEncoder` (kind "segmentor").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.criteria import build_criteria

from .image import enlarge
from .trunks import ImageModel, build_trunk, load_trunk


@kd.MODELS.register_module()
class ImageSegmentor(ImageModel):
    """Class scores of every pixel: a trunk, a 1 x 1 convolution, bilinear enlargement with aligned corners.

    Takes a batch dict with `images` (v, 3, h, w) float32 in 0 .. 1 and, in training, `weak_labels` (v, h, w) int64: 0
    for none, which counts nowhere, and 1 .. K for the classes 0 .. K - 1. In training it returns `dict(loss)`; in
    evaluation also `seg_logits` (v h w, K), pixels in the order of `weak_labels`, and the loss where there are labels.
    An evaluator finds their labels, -1 for none, in the batch's `segment` (v h w,): `kd.WeakLabelsToSegment` puts them
    there, and with `offset_keys_dict=dict(offset="segment")` in `Collect` the images of a sample are told apart.

    Args:
        num_classes: K.
        trunk, stride: see `trunks.build_trunk`.
        criteria: list of loss configs, applied to the scores of all pixels and their labels with -1 for none; by
            default cross-entropy.
        weight, kind: file that the trunk starts from, see `trunks.load_trunk`; None starts at random.
        freeze_trunk: train the classifier alone, the trunk in evaluation.

    Raises:
        InputError: for no classes, and a trunk or weights that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: str | Mapping[str, Any] = "resnet50",
        stride: int | None = None,
        criteria: Sequence[Mapping[str, Any]] | None = None,
        weight: str | None = None,
        kind: str = "moco_v2",
        freeze_trunk: bool = False,
    ) -> None:
        if num_classes < 1:
            raise InputError(f"num_classes={num_classes}: expected 1 or more")
        super().__init__(build_trunk(trunk, stride))
        if weight is not None:
            load_trunk(self.trunk, weight, kind)
        self.classifier = nn.Conv2d(self.trunk.out_channels, num_classes, 1)
        self.criteria = build_criteria(
            [dict(type="CrossEntropyLoss", ignore_index=-1)] if criteria is None else criteria
        )
        self.frozen = freeze_trunk
        self.trunk.requires_grad_(not freeze_trunk)
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageSegmentor:
        """Training or evaluation; a frozen trunk stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss and scores of a batch dict."""
        images, labels = batch["images"], batch.get("weak_labels")
        size = (len(images), *images.shape[2:])
        if labels is None and self.training:
            raise InputError("training needs `weak_labels` in the batch; add it to Collect's keys")
        if labels is not None and labels.shape != size:
            raise InputError(
                f"weak_labels are {tuple(labels.shape)}, the images {size}: expected one label per pixel"
            )
        maps = enlarge(self.classifier(self.read(images)), images.shape[2:])
        logits = maps.permute(0, 2, 3, 1).flatten(0, 2)
        out = {} if self.training else {"seg_logits": logits}
        if labels is not None:
            highest, classes = int(labels.max()), logits.shape[1]
            if highest > classes or int(labels.min()) < 0:
                raise InputError(
                    f"weak_labels have {int(labels.min())} .. {highest}; num_classes={classes} allows 0 .. {classes}"
                )
            out["loss"] = self.criteria(logits, labels.flatten() - 1)
        return out
