"""A student with two senses: a point-voxel U-Net and SwiftNet, joined at the four levels of their encoders.

After each level of both encoders the points' features are scattered into the images' maps and joined to them (`L2C`);
those maps go on in the image branch. Then every point reads the joined map where an image shows it, takes a pseudo
feature from its level's `Learner` where none does, and joins what it has to its own feature (`C2L`); that goes on in
the LiDAR branch. So the network runs with any number of images, zero included. The scores of the LiDAR branch are the
result; those of the image decoder, read at the visible points, only help to train.

Sun et al., 2024, "Uni-to-Multi Modal Knowledge Distillation for Bidirectional LiDAR-Camera Semantic Segmentation",
doi 10.1109/TPAMI.2024.3451658.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.criteria import build_criteria

from .fusion_blocks import C2L, L2C, MULTI_VIEWS, CameraViews, Learner, impute, learner_loss
from .image import enlarge
from .point_voxel_unet import PointVoxelUNet
from .swiftnet import LEVELS, SwiftNet

CRITERIA = (
    dict(type="CrossEntropyLoss", ignore_index=-1),
    dict(type="LovaszLoss", mode="multiclass", ignore_index=-1),
)


@kd.MODELS.register_module()
class FusionNet(nn.Module):
    """LiDAR-camera segmentor; with one LiDAR width and 17 classes 35,636,125 parameters, with two 105,132,725.

    Takes a batch dict with what the LiDAR network needs (`grid_coord`, `coord`, `feat`, `offset`) and, where there are
    cameras, `images` (v, 3, h, w) in 0 .. 1 with `image_offset` (b,), `view_point` (m,) rows and `view_image` (m,)
    images of their own scan, `view_uv` (m, 2) places in -1 .. 1 with `view_offset` (b,). Without `images` it runs on
    LiDAR alone, which in evaluation is the same as images that show no point.

    In training it needs `segment` (n,) and returns 0-dim tensors: `loss` and its parts `loss_lidar`, and with a camera
    `loss_pixel` and `loss_learner1` .. `loss_learner4`. In evaluation it returns `seg_logits` (n, K), the LiDAR
    branch's, with a camera also `pix_logits` (k, K) and the rows `pix_point` (k,) they belong to, and `loss`, that of
    `seg_logits` alone, where the batch has labels.

    For taps: `bottleneck` the points' features of level 4 before its `C2L`; `image.0` .. `image.3` what visible points
    read at each level, in the order of `pix_point`, `learners.0` .. the pseudo features of all points, `fused.0` ..
    the points' features after `C2L`; `seg_head` and `pix_head` the scores of both branches.

    Args:
        lidar: config of a `kd.PointVoxelUNet`, or the module.
        camera: config of a `kd.SwiftNet` for as many classes, or the module.
        criteria: list of loss configs for both branches; by default cross-entropy and Lovasz.
        image: False for the LiDAR branch alone; then `camera` is not built.
        l2c, c2l: join the branches in this direction.
        learners: impute what no image shows; False leaves it 0. Without `c2l` there are none.
        multi_view: what a point in several images reads, see `CameraViews`.
        parity: enlarge the decoder's maps to the images' size and score every pixel, then read scores at the points.
            By default the half-size maps are read at the points and these alone scored, in a fraction of the memory;
            the two differ by a second interpolation, and in training by the places that the statistics are of.
        pixel_weight, learner_weight: of those parts of the loss; the latter for each level.
        evaluate_pixels: run the image decoder in evaluation, too.

    Raises:
        InputError: for networks of unlike classes, a camera that is missing, and another `multi_view`.
    """

    def __init__(
        self,
        lidar: Mapping[str, Any] | nn.Module,
        camera: Mapping[str, Any] | nn.Module | None = None,
        criteria: Sequence[Mapping[str, Any]] | None = None,
        image: bool = True,
        l2c: bool = True,
        c2l: bool = True,
        learners: bool = True,
        multi_view: str = "last",
        parity: bool = False,
        pixel_weight: float = 1.0,
        learner_weight: float = 1.0,
        evaluate_pixels: bool = True,
    ) -> None:
        super().__init__()
        if multi_view not in MULTI_VIEWS:
            raise InputError(f"multi_view={multi_view!r}: known are {', '.join(MULTI_VIEWS)}")
        self.lidar: PointVoxelUNet = lidar if isinstance(lidar, nn.Module) else MODELS.build(lidar)
        self.multi_view, self.parity, self.evaluate_pixels = multi_view, parity, evaluate_pixels
        self.pixel_weight, self.learner_weight = pixel_weight, learner_weight
        self.criteria = build_criteria(CRITERIA if criteria is None else criteria)
        self.bottleneck, self.seg_head = nn.Identity(), nn.Identity()
        self.camera: SwiftNet | None = None
        self.l2c = self.c2l = self.learners = None
        if not image:
            return
        if camera is None:
            raise InputError(
                "the camera branch has no config: give camera=dict(...), or image=False"
            )
        self.camera = camera if isinstance(camera, nn.Module) else MODELS.build(camera)
        classes = self.lidar.num_classes, self.camera.classifier.conv.out_channels
        if classes[0] != classes[1]:
            raise InputError(
                f"the LiDAR network has {classes[0]} classes, the camera's {classes[1]}"
            )
        pairs = list(zip(self.lidar.channels[1 : LEVELS + 1], self.camera.channels, strict=True))
        if l2c:
            self.l2c = nn.ModuleList(L2C(c, i, LEVELS - k) for k, (c, i) in enumerate(pairs))
        if c2l:
            self.c2l = nn.ModuleList(C2L(c, i) for c, i in pairs)
            # For taps alone: they pass on what they get.
            self.image = nn.ModuleList(nn.Identity() for _ in pairs)
            self.fused = nn.ModuleList(nn.Identity() for _ in pairs)
        if c2l and learners:
            self.learners = nn.ModuleList(Learner(c, i) for c, i in pairs)
        self.pix_head = nn.Identity()

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss and scores of a batch dict.

        Raises:
            InputError: in training without labels, and for images and views that do not fit.
        """
        labels = batch.get("segment")
        if labels is None and self.training:
            raise InputError("training needs `segment` in the batch; add it to Collect's keys")
        x = self.lidar.start(batch)
        views = maps = None
        if self.camera is not None:
            views = CameraViews.of_batch(batch, len(batch["feat"]), batch["feat"], self.multi_view)
            maps = self.camera.start(views.images)
        skips, sides, misses = [x], [], []
        for level in range(LEVELS):
            x = self.lidar.encode_level(level + 1, x)
            last = level == LEVELS - 1
            if views is None and not last:
                skips.append(x)
                continue
            values = self.lidar.to_points(x)
            if last:
                values = self.bottleneck(values)
            if views is not None:
                maps, side = self._see(level, maps, values, views)
                sides.append(side)
                if self.c2l is not None:
                    values, missed = self._look(level, side, values, views)
                    misses += missed
                    if not last:
                        x = self.lidar.to_voxels(values, x)
            skips.append(x)
        logits = self.seg_head(self.lidar.decode(values, skips))
        if views is None:
            return self._answer(logits, labels)
        pixels = None
        if self.training or self.evaluate_pixels:
            pixels = self.pix_head(self._pixel_scores(sides, views))
        return self._answer(logits, labels, pixels, views.visible, misses)

    def _see(
        self, level: int, maps: Tensor, values: Tensor, views: CameraViews
    ) -> tuple[Tensor, Tensor]:
        """A level of the image branch: what its next one reads, and the joined map that goes sideways."""
        maps, side = self.camera.stage(level + 1, maps)
        if level == LEVELS - 1:
            side = self.camera.pooling(side)
        if self.l2c is not None:
            side = self.l2c[level](side, values, views)
            maps = F.relu(side)
        return maps, side

    def _look(
        self, level: int, side: Tensor, values: Tensor, views: CameraViews
    ) -> tuple[Tensor, list[Tensor]]:
        """Points joined with what they read or impute, and the loss of this level's learner, if there is one."""
        read = self.image[level](views.gather(side))
        missed = []
        if self.learners is not None:
            pseudo = self.learners[level](values)
            if self.training:
                missed.append(learner_loss(pseudo, read, views.visible))
        else:
            pseudo = values.new_zeros((len(values), side.shape[1]))
        return self.fused[level](
            self.c2l[level](values, impute(pseudo, read, views.visible))
        ), missed

    def _pixel_scores(self, sides: Sequence[Tensor], views: CameraViews) -> Tensor:
        """Scores (k, K) of the image branch at the visible points."""
        half = self.camera.decoder(sides[:-1], sides[-1])
        if self.parity:
            whole = enlarge(half, views.images.shape[2:])
            return views.gather(self.camera.classifier(whole))
        return self.camera.classifier.rows(views.gather(half))

    def _answer(
        self,
        logits: Tensor,
        labels: Tensor | None,
        pixels: Tensor | None = None,
        visible: Tensor | None = None,
        misses: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        if not self.training:
            out = {"seg_logits": logits}
            if pixels is not None and visible is not None:
                out.update(pix_logits=pixels, pix_point=visible)
            if labels is not None:
                out["loss"] = self.criteria(logits, labels)
            return out
        parts = {"loss_lidar": self.criteria(logits, labels)}
        total = parts["loss_lidar"]
        if pixels is not None and visible is not None and labels is not None:
            parts["loss_pixel"] = self.criteria(pixels, labels[visible])
            total = total + self.pixel_weight * parts["loss_pixel"]
        for level, missed in enumerate(misses, 1):
            parts[f"loss_learner{level}"] = missed
            total = total + self.learner_weight * missed
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}
