"""The losses of image-to-LiDAR pre-training as registered terms; formulas in `contrast` and `vmf`.

A term takes the `Pairs` of a batch, features of points and of the pixels that show them, and returns a 0-dim tensor.
Its weight stays in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pointcept_kd.host import TERMS, InputError
from pointcept_kd.host.errors import check_choice

from .contrast import (
    DISTANCES,
    FORMS,
    SAMPLERS,
    class_contrast,
    cosine_regression,
    draw_pairs,
    draw_weighted_pairs,
    full,
    mean_log_positives,
    pair_infonce,
    pair_weights,
    superpixel_infonce,
)
from .vmf import VonMisesFisher

BACKGROUNDS = ("as_class", "ignore")


class Pairs:
    """The point-pixel pairs of a batch and what networks say about their two sides.

    Args:
        points: features (m, c) of the pairs' points by name of the head, with graph.
        image: what to ask for features of pixels, `kd.ImageEncoder` or its like.
        images: (v, 3, h, w) of the whole batch, values in 0 .. 1.
        pixels: (m, 3) image of the batch, row, column.
        labels: (m,) weak label, 0 for none.
        ranges: (m,) horizontal distances of the points from the sensor, metres.
        superpixels: (v, h, w) numbers within the image, where there are such.
        generator: of all draws; None for torch's default.
    """

    def __init__(
        self,
        points: Mapping[str, Tensor],
        image: Any,
        images: Tensor,
        pixels: Tensor,
        labels: Tensor,
        ranges: Tensor,
        superpixels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._points, self._image, self._images = points, image, images
        self.place, self.labels, self.ranges = pixels, labels, ranges
        self._superpixels, self.generator = superpixels, generator
        self._made: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.place)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def nothing(self) -> Tensor:
        """0, connected to the 3-D network."""
        return sum(full(value[:0]).sum() for value in self._points.values())  # type: ignore[return-value]

    @staticmethod
    def _head(features: Mapping[str, Tensor], head: str, of: str) -> Tensor:
        if head not in features:
            raise InputError(f"the {of} has no head {head!r}, only {', '.join(features) or 'none'}")
        return features[head]

    def points(self, head: str) -> Tensor:
        """Features (m, c) of the pairs' points."""
        return self._head(self._points, head, "3-D network")

    def pixels(self, head: str) -> Tensor:
        """Features (m, c) of the pairs' pixels, of length 1."""
        if "maps" in self._made:  # at hand already
            image, row, column = self.place.unbind(1)
            return self.maps(head).permute(0, 2, 3, 1)[image, row, column]
        made = self._once("at", lambda: self._image.at(self._images, self.place))
        return self._head(made, head, "image encoder")

    def maps(self, head: str) -> Tensor:
        """Features (v, c, h, w) of all pixels, of length 1."""
        made = self._once("maps", lambda: self._image(self._images))
        return self._head(made, head, "image encoder")

    def targets(self) -> Tensor:
        """Features (m, c) that the frozen trunk has at the pairs' pixels, of any length."""
        return self._once("targets", lambda: self._image.features_at(self._images, self.place))

    def draw(self, count: int) -> Tensor:
        """Rows of `count` pairs without preference; all where there are fewer."""
        if len(self) < 2:  # nothing to contrast: the loss is 0, and stays connected
            return torch.arange(len(self), device=self.place.device)
        return draw_pairs(len(self), count, self.generator).to(self.place.device)

    @property
    def superpixels(self) -> Tensor:
        """(v, h, w) superpixels of all pixels.

        Raises:
            InputError: for a batch without.
        """
        if self._superpixels is None:
            raise InputError(
                "the batch has no superpixels: set superpixels=True in kd.PointPixelDataset and collect them"
            )
        return self._superpixels


class PairTerm(nn.Module):
    """One loss of pre-training: `forward(pairs)` returns a 0-dim tensor, a mean that does not grow with the batch.

    Attributes:
        head: the features that it reads.
        needs_maps: features of all pixels are wanted, not those of pairs alone.
        in_validation: the loss is part of the validation loss.
    """

    head: str = "final"
    needs_maps = False
    in_validation = True

    def set_total_steps(self, total: int) -> None:
        """Told once, before the first of so many training steps."""

    def watched(self) -> dict[str, Tensor]:
        """What to log of the last step beside the loss, once per epoch: 0-dim tensors by name."""
        return {}


@TERMS.register_module()
class PairContrast(PairTerm):
    """`pair_infonce` between pairs drawn without preference (PPKT; OLIVINE's pair level).

    Args:
        head: of both networks.
        num_pairs: drawn from the batch; all where it has fewer.
        temperature: tau.
    """

    def __init__(
        self, head: str = "final", num_pairs: int = 4096, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.head, self.num_pairs, self.temperature = head, num_pairs, temperature

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss in nats; 0, still connected, for fewer than two pairs."""
        points, pixels = pairs.points(self.head), pairs.pixels(self.head)
        rows = pairs.draw(self.num_pairs)
        return pair_infonce(points[rows], pixels[rows], self.temperature)


@TERMS.register_module()
class ClassContrast(PairTerm):
    """`class_contrast` between pairs drawn with `pair_weights` (OLIVINE's class level).

    Args:
        head: of both networks.
        num_pairs, temperature: see `PairContrast`.
        sampler: see `pair_weights`.
        form: see `class_contrast`.
        background: whether label 0, no label, is a class like others (`as_class`, as published) or left out (`ignore`).
        range_cell: metres to which ranges are rounded down for their density: 0.1, the published grid's.
    """

    def __init__(
        self,
        head: str = "final_class_level",
        num_pairs: int = 4096,
        temperature: float = 0.07,
        sampler: str = "dcas",
        form: str = "sum",
        background: str = "as_class",
        range_cell: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("form", form, FORMS)
        check_choice("background", background, BACKGROUNDS)
        if not range_cell > 0:
            raise InputError(f"range_cell={range_cell}: expected metres above 0")
        self.head, self.num_pairs, self.temperature = head, num_pairs, temperature
        self.sampler, self.form, self.range_cell = sampler, form, range_cell
        self.ignore = 0 if background == "ignore" else None
        self._other_form: Tensor | None = None

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss in nats; 0, still connected, without pairs."""
        points, pixels = pairs.points(self.head), pairs.pixels(self.head)
        cells = torch.floor(pairs.ranges / self.range_cell)
        weights = pair_weights(cells, pairs.labels, self.sampler, self.ignore)
        rows = draw_weighted_pairs(weights, self.num_pairs, pairs.generator)
        labels = pairs.labels[rows]
        loss = class_contrast(
            points[rows], pixels[rows], labels, self.temperature, self.form, self.ignore
        )
        apart = mean_log_positives(labels, self.ignore)
        self._other_form = loss.detach() + (apart if self.form == "sum" else -apart)
        return loss

    def watched(self) -> dict[str, Tensor]:
        """The value that the other form would have."""
        name = FORMS[1] if self.form == FORMS[0] else FORMS[0]
        return {} if self._other_form is None else {f"as_{name}": self._other_form}


@TERMS.register_module()
class ClassDistributions(PairTerm):
    """`vmf.VonMisesFisher` over the features of all pairs' points (OLIVINE's semantic consistency).

    Not part of the validation loss: it begins in the middle of a training.

    Args:
        classes: weak classes without the background; labels are 0 .. classes.
        dim: width of the head.
        head: of the 3-D network.
        background: see `ClassContrast`.
        **settings: of `VonMisesFisher`.
    """

    in_validation = False

    def __init__(
        self,
        classes: int,
        dim: int = 64,
        head: str = "final_class_level",
        background: str = "as_class",
        **settings: Any,
    ) -> None:
        super().__init__()
        check_choice("background", background, BACKGROUNDS)
        self.head = head
        ignore = 0 if background == "ignore" else None
        self.vmf = VonMisesFisher(classes + 1, dim, ignore=ignore, **settings)

    def set_total_steps(self, total: int) -> None:
        """See `VonMisesFisher.set_total_steps`."""
        self.vmf.set_total_steps(total)

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss in nats, 0 before the statistics stand."""
        return self.vmf(full(pairs.points(self.head)), pairs.labels)

    def watched(self) -> dict[str, Tensor]:
        """How many classes have a distribution, and their mean concentration."""
        seen = self.vmf.seen
        mean = self.vmf.kappa[seen].mean() if bool(seen.any()) else self.vmf.z.new_zeros(())
        return {"seen": seen.sum(), "kappa": mean}


@TERMS.register_module()
class SuperpixelContrast(PairTerm):
    """`superpixel_infonce` (SLidR).

    Args:
        head: of both networks.
        per_image: the most superpixels of an image.
        temperature: tau.
    """

    needs_maps = True

    def __init__(
        self, head: str = "final", per_image: int = 150, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.head, self.per_image, self.temperature = head, per_image, temperature

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss in nats; 0, still connected, without pairs."""
        return superpixel_infonce(
            pairs.points(self.head), pairs.place, pairs.maps(self.head), pairs.superpixels,
            self.per_image, self.temperature,
        )  # fmt: skip


@TERMS.register_module()
class FeatureRegression(PairTerm):
    """`cosine_regression` of points' features onto those of the frozen trunk (ScaLR).

    Args:
        head: of the 3-D network, as wide as the trunk's features.
        num_pairs: drawn from the batch; 0 takes all.
        distance: see `cosine_regression`.
    """

    def __init__(
        self, head: str = "final", num_pairs: int = 0, distance: str = "euclidean"
    ) -> None:
        super().__init__()
        check_choice("distance", distance, DISTANCES)
        self.head, self.num_pairs, self.distance = head, num_pairs, distance

    def forward(self, pairs: Pairs) -> Tensor:
        """The mean distance; 0, still connected, without pairs."""
        points, targets = pairs.points(self.head), pairs.targets()
        if self.num_pairs:
            rows = pairs.draw(self.num_pairs)
            points, targets = points[rows], targets[rows]
        return cosine_regression(points, targets, self.distance)


def build_terms(terms: Mapping[str, Any]) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Terms and their weights from a config, name to `dict(type=..., weight=1.0, ...)`; None drops an inherited one.

    Raises:
        InputError: for a type that is no term of pairs, and without any term.
    """
    built, weights = nn.ModuleDict(), {}
    for name, entry in terms.items():
        arguments = dict(entry or {})
        weight = float(arguments.pop("weight", 1.0))
        if entry is None or weight == 0.0:
            continue
        term = TERMS.build(arguments)
        if not isinstance(term, PairTerm):
            raise InputError(
                f"term {name}: {entry['type']} is no loss between points and pixels; use kd.PairContrast, "
                "kd.ClassContrast, kd.ClassDistributions, kd.SuperpixelContrast or kd.FeatureRegression"
            )
        built[name], weights[name] = term, weight
    if not built:
        raise InputError("pre-training without terms learns nothing: give at least one")
    return built, weights
