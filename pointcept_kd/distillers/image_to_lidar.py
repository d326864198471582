"""Pre-training of a 3-D network from camera images: no 3-D labels, a frozen image network as teacher.

    L = sum_j w_j L_j( features of points, features of the pixels that show them )

The 3-D network and the heads of the image network learn; the image network's trunk does not. Afterwards the image
network and all heads are dropped, and the 3-D network starts segmentation or detection.

PPKT: Liu et al., 2021, arXiv:2104.04687. SLidR: Sautier et al., 2022, arXiv:2203.16258. OLIVINE: Zhang et al., 2024,
arXiv:2405.14271. ScaLR: Puy et al., 2024, arXiv:2310.17504. They differ in their terms alone, see `pair_terms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, comm, kd
from pointcept_kd.host.checkpoint import unwrap
from pointcept_kd.host.hooks import HookBase, progress
from pointcept_kd.host.joint import joint_batch, joint_sum
from pointcept_kd.host.point import offset2batch
from pointcept_kd.host.runtime import to_device

from .base import log_watched
from .contrast import full
from .pair_terms import Pairs, PairTerm, build_terms

SHORTEST = 1e-6  # a feature of less than this length says nothing: its point lies outside of the network's grid
_LEFT_OUT = (
    "images without a pair",
    "batches with fewer than two pairs",
    "pairs outside of the network's grid",
)
_NEEDED = ("coord", "offset", "images", "image_offset", "pair_point", "pair_pixel", "pair_offset")


def _shifted(rows: Tensor, scan: Tensor, ends: Tensor, what: str) -> Tensor:
    """Numbers within a scan as numbers within the batch.

    Raises:
        InputError: for a number that its scan does not have.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    moved = rows + starts[scan]
    if len(rows) and bool(((rows < 0) | (moved >= ends[scan])).any()):
        raise InputError(
            f"a pair names a {what} that its scan does not have: put kd.PairsToRows behind all transforms that drop "
            "points or images"
        )
    return moved


@kd.MODELS.register_module()
class ImageToLidar(nn.Module, HookBase):
    """A 3-D network that learns the features of pixels.

    Takes a batch dict with what the 3-D network needs (`coord` (n, 3), `feat`, `offset`, ...), `images` (v, 3, h, w)
    in 0 .. 1 with `image_offset` (b,), and pairs: `pair_point` (m,) rows of their own scan, `pair_pixel` (m, 3) image
    of their scan, row, column, `pair_label` (m,) weak labels, 0 for none (may be missing), `pair_offset` (b,);
    `superpixels` (v, h, w) where a term wants them.

    Returns `loss` and `loss_<term>` as 0-dim tensors. In evaluation the terms of the validation loss alone, weighted as
    in training, and with draws that are the same every time.

    Images without a pair, batches with fewer than two and pairs whose point lies outside of the network's grid do no
    harm: they are left out and counted, in the buffers `skipped_images`, `skipped_batches` and `skipped_pairs`.

    Args:
        student: config of the 3-D network; returns features (n, c), or a dict of such by head.
        image: config of the image network, see `kd.ImageEncoder`.
        terms: name to `dict(type=..., weight=1.0, ...)`, see `pair_terms`; None in place of a dict drops an inherited
            term.

    Raises:
        InputError: for terms that are none, or without any.
    """

    skipped_images: Tensor
    skipped_batches: Tensor
    skipped_pairs: Tensor

    def __init__(
        self, student: Mapping[str, Any], image: Mapping[str, Any], terms: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.student: nn.Module = MODELS.build(student)
        self.image: nn.Module = MODELS.build(image)
        self.terms, self.weights = build_terms(terms)
        for name in ("skipped_images", "skipped_batches", "skipped_pairs"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    # -- called by the trainer -----------------------------------------------------------------

    def before_train(self) -> None:
        """Tell the terms how long the training is."""
        total = len(self.trainer.train_loader) * self.trainer.max_epoch
        for term in self._terms().values():
            term.set_total_steps(total)

    def after_epoch(self) -> None:
        """Log what the terms watch and what was left out."""
        log_watched(self.trainer, self._terms())
        left_out = [f"{int(n)} {what}" for n, what in zip(self._counters(), _LEFT_OUT) if int(n)]
        if left_out:
            self.trainer.logger.info(f"Left out so far: {', '.join(left_out)}")

    def _terms(self) -> dict[str, PairTerm]:
        return {name: term for name, term in self.terms.items() if isinstance(term, PairTerm)}

    # -- running -------------------------------------------------------------------------------

    def export_state_dict(self) -> dict[str, Tensor]:
        """The 3-D network's weights alone, under its own keys."""
        return self.student.state_dict()

    def pairs(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> Pairs:
        """Run the 3-D network and join what belongs together.

        Raises:
            InputError: for a batch that lacks an entry, and pairs that name rows which are not there.
        """
        missing = [key for key in _NEEDED if key not in batch]
        if missing:
            raise InputError(
                f"the batch has no {', '.join(missing)}: read it with kd.PointPixelDataset, end its transforms with "
                "kd.PairsToRows and collect these keys"
            )
        features = self.student(dict(batch))
        if isinstance(features, Tensor):
            features = {"final": features}
        scan = offset2batch(batch["pair_offset"])
        if len(scan) != len(batch["pair_point"]):
            raise InputError(
                f"pair_offset ends at {len(scan)}, pair_point has {len(batch['pair_point'])} rows"
            )
        row = _shifted(batch["pair_point"], scan, batch["offset"], "point")
        pixel = batch["pair_pixel"].clone()
        pixel[:, 0] = _shifted(pixel[:, 0], scan, batch["image_offset"], "image")
        label = batch.get("pair_label")
        label = torch.zeros_like(row) if label is None else label

        points = {name: value[row] for name, value in features.items()}
        known = torch.ones_like(row, dtype=torch.bool)
        for value in points.values():
            # Not `>=`: what is not a number must reach the loss, where the trainer sees it.
            known &= ~(full(value.detach()).norm(dim=1) < SHORTEST)
        if self.training:
            self._count(pixel[known, 0], len(batch["images"]), known)
        return Pairs(
            {name: value[known] for name, value in points.items()},
            self.image,
            batch["images"],
            pixel[known],
            label[known],
            batch["coord"][row[known], :2].norm(dim=1),
            batch.get("superpixels"),
            generator,
        )

    @torch.no_grad()
    def _count(self, image: Tensor, images: int, known: Tensor) -> None:
        """Add what this batch leaves out, in all processes, to the counters."""
        empty = (torch.bincount(image, minlength=images) == 0).sum()
        left_out = torch.stack([empty, (known.sum() < 2).long(), (~known).sum()])
        with joint_batch():  # counters are buffers, of which every process gets those of the first
            left_out = joint_sum(left_out)
        for counter, count in zip(self._counters(), left_out, strict=True):
            counter += count

    def _counters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.skipped_images, self.skipped_batches, self.skipped_pairs

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses; errors as `pairs` and as the terms raise."""
        terms = {k: t for k, t in self._terms().items() if self.training or t.in_validation}
        generator = None if self.training else torch.Generator().manual_seed(0)
        pairs = self.pairs(batch, generator)
        if wanted := [t for t in terms.values() if t.needs_maps]:
            pairs.maps(wanted[0].head)  # one run of the image network serves all terms
        losses = {name: term(pairs) for name, term in terms.items()}
        total = pairs.nothing()
        for name, loss in losses.items():
            total = total + self.weights[name] * loss
        return {"loss": total, **{f"loss_{name}": value for name, value in losses.items()}}


@kd.HOOKS.register_module()
class PairLossEvaluator(HookBase):
    """The validation losses of pre-training after every epoch, means over scans.

    Leaves the negative loss as the metric for the saver.
    """

    def after_epoch(self) -> None:
        if self.trainer.cfg.get("evaluate", True):
            self.eval()

    @torch.no_grad()
    def eval(self) -> dict[str, float]:
        """Evaluate now; returns the means over the scans of all processes."""
        trainer, loader = self.trainer, self.trainer.val_loader
        model = unwrap(trainer.model)  # no wrapper: processes may have different numbers of batches
        comm.share_buffers(model)
        model.eval()
        trainer.logger.info(">>>>>>>>>>>>>>>> Start Evaluation >>>>>>>>>>>>>>>>")
        own: list[tuple[int, dict[str, float]]] = []
        for batch in progress(loader, len(loader), "Evaluation"):
            batch = to_device(batch, trainer.device)
            losses = {key: float(value) for key, value in model(batch).items()}
            own.append((len(batch["offset"]), losses))
        rows = [row for part in comm.all_gather(own) for row in part]
        scans = sum(count for count, _ in rows)
        means = {
            key: math.fsum(count * losses[key] for count, losses in rows) / max(1, scans)
            for key in (rows[0][1] if rows else {"loss": 0.0})
        }
        text = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
        trainer.logger.info(f"Val result: {text} ({scans} scans)")
        if trainer.writer is not None:
            for key, value in means.items():
                trainer.writer.add_scalar(f"val/{key}", value, trainer.epoch + 1)
        trainer.logger.info("<<<<<<<<<<<<<<<<< End Evaluation <<<<<<<<<<<<<<<<<")
        trainer.comm_info["current_metric_value"] = -means["loss"]
        trainer.comm_info["current_metric_name"] = "-loss"
        return means
