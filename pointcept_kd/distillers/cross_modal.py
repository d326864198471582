"""From a teacher of one modality to a student of two: features of points through an adapter, on chosen rows.

    L = 1 / (|V| c) sum_{i in V} | A(s_i) - t_i |^2,    A = ReLU( BN( W s + b ) )

The student's features have seen its cameras, the teacher's more sweeps and stronger augmentation; V is all points,
those that a camera sees, those that none sees, or those with a label. With `normalize` both rows are first brought to
[0, 1] by their smallest and largest entry. The adapter belongs to the term and is thrown away with it.

A ReLU behind the adapter, as published, keeps the loss from 0 where the teacher's features are negative;
`activation="none"` leaves it out. Class scores are distilled by `kd.LogitKL`, imputed image features by the student.

Sun et al., 2024, doi:10.1109/TPAMI.2024.3451658.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.point import offset2batch

from .align import align
from .base import Outputs, Term
from .features import feature_mse

ROWS = ("all", "visible", "unseen", "labelled")
ACTIVATIONS = ("relu", "none")


def min_max(features: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Rows brought to [0, 1] by their smallest and largest entry; a row of equal entries becomes 0."""
    low, high = features.amin(1, keepdim=True), features.amax(1, keepdim=True)
    span = high - low
    return (features - low) / span.where(span > 0, torch.ones_like(span))


def chosen_rows(
    batch: Mapping[str, Any], rows: str, count: int, ignore_index: int
) -> Tensor | None:
    """Mask (n,) of the points that count; None for all.

    Args:
        batch: `segment` (n,) for `labelled`; `view_point` (m,) rows of their own scan, `view_offset` and `offset` (b,)
            for `visible` and `unseen`. A batch without `view_point` has no camera: nothing is visible.
        rows: one of `ROWS`.
        count: n.

    Raises:
        InputError: for a batch without labels, or points of views that are not there.
    """
    if rows == "all":
        return None
    if rows == "labelled":
        if "segment" not in batch:
            raise InputError("rows='labelled': the batch has no segment")
        return batch["segment"].reshape(-1) != ignore_index
    seen = torch.zeros(count, dtype=torch.bool, device=batch["offset"].device)
    if "view_point" in batch:
        ends = batch["offset"]
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        scan = offset2batch(batch["view_offset"])
        point = batch["view_point"] + starts[scan]
        if len(point) and bool(((batch["view_point"] < 0) | (point >= ends[scan])).any()):
            raise InputError("view_point names a point that its scan does not have")
        seen[point] = True
    return seen if rows == "visible" else ~seen


@TERMS.register_module()
class AdaptedFeature(Term):
    """Student features of points at one tap, through a learned adapter, towards the teacher's at another.

    Args:
        tap: name of the student's tap, one row per point.
        channels: (student, teacher) widths.
        teacher_tap: name of the teacher's tap; the same name by default.
        rows: which points count, one of `ROWS`.
        activation: behind the adapter, `relu` as published or `none`.
        normalize: compare rows by their place between smallest and largest entry.
        ignore_index: label of points without one.

    Raises:
        InputError: for an unknown choice.
    """

    def __init__(
        self,
        tap: str,
        channels: tuple[int, int] | list[int],
        teacher_tap: str | None = None,
        rows: str = "all",
        activation: str = "relu",
        normalize: bool = False,
        ignore_index: int = -1,
    ) -> None:
        super().__init__()
        check_choice("rows", rows, ROWS)
        check_choice("activation", activation, ACTIVATIONS)
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.rows, self.normalize, self.ignore_index = rows, normalize, ignore_index
        wide, out = channels
        layers = [nn.Linear(wide, out), nn.BatchNorm1d(out)]
        self.adapter = nn.Sequential(*layers, *([nn.ReLU()] if activation == "relu" else []))

    def taps(self) -> tuple[set[str], set[str]]:
        """Taps that this term reads; see `Term.taps`."""
        return {self.tap}, {self.teacher_tap}

    def _adapt(self, features: Tensor) -> Tensor:
        norm = self.adapter[1]
        if len(features) > 1 or not isinstance(norm, nn.BatchNorm1d):
            return self.adapter(features)
        # One row has no variance: it is normalised by those of earlier steps.
        features = self.adapter[0](features)
        features = F.batch_norm(
            features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        return self.adapter[2:](features)

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> Tensor:
        """Compute the term; see `Term`.

        Raises:
            InputError: for features of other widths than `channels` says, or rows that do not match.
        """
        feat_s, feat_t = align(student[self.tap], teacher[self.teacher_tap])
        linear = self.adapter[0]
        for who, feat, width in (
            ("student", feat_s, linear.in_features),
            ("teacher", feat_t, linear.out_features),
        ):
            if feat.shape[1] != width:
                raise InputError(
                    f"AdaptedFeature: the {who} has {feat.shape[1]} channels at its tap, channels says {width}"
                )
        feat_s = self._adapt(feat_s)
        valid = chosen_rows(batch, self.rows, len(feat_s), self.ignore_index)
        if self.normalize:
            feat_s, feat_t = min_max(feat_s), min_max(feat_t)
        return feature_mse(feat_s, feat_t, valid)
