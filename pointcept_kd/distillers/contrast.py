"""Contrast between LiDAR points and camera pixels: losses over pairs, and the draw of pairs they are computed on.

With f_i, p_i the unit features of point and pixel of pair i, y_i the pair's weak label and A_ij = f_i . p_j / tau:

    pairs        L = mean_i  log( sum_j e^A_ij ) - A_ii
    classes      L = mean_i  log( sum_j e^A_ij ) - log( c_i sum_{j: y_j = y_i} e^A_ij ),  c_i = 1 or 1 / |j: y_j = y_i|
    superpixels  L of pairs, over k_s = mean of f over the pairs in superpixel s, q_s = mean of p over all its pixels
    regression   L = mean_i | f_i / |f_i| - t_i / |t_i| |,  or  mean_i 1 - cos( f_i, t_i )

One direction, from points to pixels. Negatives are those of the own process; the mean over i is over all processes. In
the class loss the factor c_i changes the value by a constant and no gradient: the published code has c_i = 1, the paper
the other. It is not the usual supervised contrast, whose mean stands outside of the logarithm.

Pairs for the class loss are drawn with weight 1 / (density of the range * pairs of the class), the density by a
Gaussian kernel of width 1.06 sigma m^(-1/5).

Pairs: Liu et al., 2021, arXiv:2104.04687 (PPKT). Superpixels: Sautier et al., 2022, arXiv:2203.16258 (SLidR). Classes
and draw: Zhang et al., 2024, arXiv:2405.14271 (OLIVINE), eqs. 1, 12, 13. Regression: Puy et al., 2024, arXiv:2310.17504
(ScaLR).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, Integer, Real
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.ops.scatter import segment_count, segment_sum

FORMS = ("sum", "mean")
DISTANCES = ("euclidean", "cosine")
SAMPLERS = ("uniform", "density", "category", "dcas")
# Similarities held at once: 4096 pairs are one block of 64 MB. Further blocks are computed again in backward.
_BLOCK = 2**24
_POOL_EPS = 1e-6
_SHORT = 1e-6  # a feature of less than this length has no direction


def full(x: Tensor) -> Tensor:
    """A tensor in float32 at least: exp(1 / 0.07), summed, is beyond half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _check_pairs(points: Tensor, pixels: Tensor, temperature: float = 1.0) -> None:
    if points.shape != pixels.shape:
        raise InputError(
            f"points and pixels must pair off, got {tuple(points.shape)} and {tuple(pixels.shape)}"
        )
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")


def _mean_of_rows(loss: Callable[[Tensor, slice], Tensor], points: Tensor, keys: Tensor) -> Tensor:
    """Mean of `loss(rows of points, their places)` over the rows of all processes, in blocks of `_BLOCK` numbers."""
    n = len(points)
    with torch.autocast(points.device.type, enabled=False):
        points = full(points)
        if not n:
            # Through both, as the heads of both sides wait for their gradients.
            return joint_mean(points.sum() + keys.sum(), 0)
        length = max(1, _BLOCK // len(keys))
        places = [slice(begin, min(begin + length, n)) for begin in range(0, n, length)]
        if len(places) == 1:
            rows = loss(points, places[0])
        else:
            rows = torch.cat(
                [
                    checkpoint(
                        loss, points[place], place, use_reentrant=False, preserve_rng_state=False
                    )
                    for place in places
                ]
            )
        return joint_mean(rows.mean(), n)


def pair_infonce(
    points: Float[Tensor, "n c"], pixels: Float[Tensor, "m c"], temperature: float = 0.07
) -> Float[Tensor, ""]:
    """InfoNCE of pairs: every point is to find its own pixel among those of all pairs.

    Args:
        points, pixels: features of the pairs, of unit length as a rule; row i of one belongs to row i of the other.
        temperature: tau > 0.

    Returns:
        The loss in nats, log n for features that say nothing; 0, still connected, for fewer than two pairs.

    Raises:
        InputError: for shapes that differ, or a temperature that is not positive.
    """
    _check_pairs(points, pixels, temperature)
    keys = full(pixels)

    def loss(rows: Tensor, place: slice) -> Tensor:
        target = torch.arange(place.start, place.stop, device=rows.device)
        return F.cross_entropy(rows @ keys.T / temperature, target, reduction="none")

    return _mean_of_rows(loss, points, keys)


def _labelled(labels: Tensor, ignore: int | None) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore


def _check_labels(labels: Tensor, rows: int) -> None:
    if len(labels) != rows:
        raise InputError(f"{len(labels)} labels for {rows} pairs")


def class_contrast(
    points: Float[Tensor, "n c"],
    pixels: Float[Tensor, "m c"],
    labels: Integer[Tensor, " k"],
    temperature: float = 0.07,
    form: str = "sum",
    ignore: int | None = None,
) -> Float[Tensor, ""]:
    """Weakly supervised contrast: every point is to find any pixel of its class among those of all pairs.

    Args:
        points, pixels: features of the pairs, of unit length as a rule; row i of one belongs to row i of the other.
        labels: weak label of each pair, any integers.
        temperature: tau > 0.
        form: `sum` over the pixels of the class, as the published code has it, or their `mean`, as the paper has it.
            Equal gradients; the mean is larger by `mean_log_positives`.
        ignore: pairs of this label do not take part, on either side.

    Returns:
        The loss in nats; 0, still connected, without pairs. With `sum`, 0 also where all pairs are of one class.

    Raises:
        InputError: for shapes that differ, a temperature that is not positive, or an unknown form.
    """
    _check_pairs(points, pixels, temperature)
    _check_labels(labels, len(points))
    check_choice("form", form, FORMS)
    if ignore is not None:
        taken = _labelled(labels, ignore)
        points, pixels, labels = points[taken], pixels[taken], labels[taken]
    keys = full(pixels)

    def loss(rows: Tensor, place: slice) -> Tensor:
        logits = rows @ keys.T / temperature
        same = labels[place, None] == labels
        positive = logits.masked_fill(~same, -math.inf).logsumexp(1)
        if form == "mean":
            positive = positive - same.sum(1).to(logits.dtype).log()
        return logits.logsumexp(1) - positive

    return _mean_of_rows(loss, points, keys)


@torch.no_grad()
def mean_log_positives(
    labels: Integer[Tensor, " n"], ignore: int | None = None
) -> Float[Tensor, ""]:
    """Mean over pairs of log |{j: y_j = y_i}|: what form `mean` of `class_contrast` has more than `sum`; float32."""
    kept = labels[_labelled(labels, ignore)]
    counts = kept.unique(return_counts=True)[1].double()
    mean = (counts * counts.log()).sum() / max(1, len(kept))
    return joint_mean(mean, len(kept)).float()


def superpixel_means(
    points: Float[Tensor, "m c"],
    pair_pixel: Integer[Tensor, "k 3"],
    pixels: Float[Tensor, "i c h w"],
    segments: Integer[Tensor, "j y x"],
    per_image: int = 150,
) -> tuple[Float[Tensor, "s c"], Float[Tensor, "s c"], Int64[Tensor, " s"]]:
    """Mean features of points and of pixels in every superpixel with a pair, not brought to unit length.

    Args:
        points: features of the pairs.
        pair_pixel: (image, row, column) of each pair.
        pixels: features of all pixels of all images.
        segments: number of the superpixel of each pixel within its image, 0 .. per_image - 1.
        per_image: numbers that an image may use; an image need not use all.

    Returns:
        Means over pairs, means over pixels (both with 1e-6 added to the count, in float32 at least), and the
        superpixels that they belong to, as image * per_image + number, in ascending order.

    Raises:
        InputError: for a number of a superpixel outside 0 .. per_image - 1, which would run into the next image;
            shapes that do not fit; pairs outside of the images.
    """
    if segments.shape != (len(pixels), *pixels.shape[2:]):
        raise InputError(
            f"superpixels {tuple(segments.shape)} do not fit pixel features {tuple(pixels.shape)}"
        )
    if len(pair_pixel) != len(points):
        raise InputError(f"{len(pair_pixel)} pixels for {len(points)} points")
    if segments.numel():
        low, high = (int(v) for v in torch.aminmax(segments))
        if low < 0 or high >= per_image:
            raise InputError(
                f"superpixels of an image are 0 .. {per_image - 1}; found {low} .. {high}"
            )
    pair_pixel = pair_pixel.long()
    limits = torch.tensor(segments.shape, device=pair_pixel.device)
    if not bool(((pair_pixel >= 0) & (pair_pixel < limits)).all()):
        raise InputError(f"a pair lies outside of the images {tuple(segments.shape)}")
    image, row, column = pair_pixel.unbind(1)
    total = len(segments) * per_image
    place = image * per_image + segments[image, row, column].long()
    count = segment_count(place, total)
    kept = count.nonzero()[:, 0]
    of_points = segment_sum(full(points), place, total)[kept]
    of_points = of_points / (count[kept, None] + _POOL_EPS)
    of_pixels = []
    for feature, segment in zip(pixels, segments):  # one image's pixels in rows at a time
        index = segment.flatten().long()
        size = segment_count(index, per_image)[:, None] + _POOL_EPS
        of_pixels.append(segment_sum(full(feature).flatten(1).T, index, per_image) / size)
    return of_points, torch.cat(of_pixels)[kept] if of_pixels else of_points, kept


def superpixel_infonce(
    points: Float[Tensor, "m c"],
    pair_pixel: Integer[Tensor, "k 3"],
    pixels: Float[Tensor, "i c h w"],
    segments: Integer[Tensor, "j y x"],
    per_image: int = 150,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """`pair_infonce` between the `superpixel_means` of points and of pixels; 0, still connected, without pairs."""
    with torch.autocast(points.device.type, enabled=False):
        of_points, of_pixels, _ = superpixel_means(points, pair_pixel, pixels, segments, per_image)
        return pair_infonce(of_points, of_pixels, temperature)


def cosine_regression(
    points: Float[Tensor, "n c"], targets: Float[Tensor, "m c"], distance: str = "euclidean"
) -> Float[Tensor, ""]:
    """Mean distance between the directions of points' and pixels' features, without negatives.

    Args:
        points: features of the pairs, with graph, of any length.
        targets: features of their pixels, of any length; constants here.
        distance: `euclidean`: |f/|f| - t/|t||, the root of 2 - 2 cos, as ScaLR trains; or `cosine`: 1 - cos, whose pull
            fades as the two agree.

    Returns:
        The loss; pairs where either feature is shorter than 1e-6 do not count. 0, still connected, without pairs.

    Raises:
        InputError: for shapes that differ, or an unknown distance.
    """
    _check_pairs(points, targets)
    check_choice("distance", distance, DISTANCES)
    points, targets = full(points), full(targets).detach()
    length, wanted = points.norm(dim=1), targets.norm(dim=1)
    taken = (length > _SHORT) & (wanted > _SHORT)
    here, there = points[taken] / length[taken, None], targets[taken] / wanted[taken, None]
    if distance == "euclidean":
        rows = (here - there).norm(dim=1)
    else:
        # As 1 - cos loses half of the digits where the two agree.
        rows = (here - there).square().sum(1) / 2
    return joint_mean(rows.mean() if len(rows) else rows.sum(), len(rows))


@torch.no_grad()
def range_density(ranges: Real[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Density of the ranges at each of them: a Gaussian kernel of width 1.06 sigma m^(-1/5), sigma unbiased; float64.

    Args:
        ranges: of the pairs' points, as bins or metres. Time and memory follow the square of the number of different
            values, so they are to be rounded.

    Returns:
        (m,) in 1 / unit of the ranges; the kernel has width 1 where all ranges are equal.

    Raises:
        InputError: for a range that is not finite.
    """
    exact = ranges.double()
    if not bool(exact.isfinite().all()):
        raise InputError("a range is not finite")
    values, place, counts = exact.unique(return_inverse=True, return_counts=True)
    m = len(exact)
    width = 1.06 * float(exact.std()) * m**-0.2 if len(values) > 1 else 1.0
    scaled, share = values / width, counts.double() / (max(1, m) * width * math.sqrt(2 * math.pi))
    parts = [
        (-0.5 * (part[:, None] - scaled).square()).exp() @ share
        for part in scaled.split(max(1, _BLOCK // 4 // max(1, len(values))))
    ]
    return torch.cat(parts)[place] if parts else exact


@torch.no_grad()
def pair_weights(
    ranges: Real[Tensor, " m"],
    labels: Integer[Tensor, " k"],
    sampler: str = "dcas",
    ignore: int | None = None,
) -> Float[Tensor, " m"]:
    """Probability of each pair to be drawn first, for the class loss; float64.

    Args:
        ranges: of the pairs' points, in bins or rounded metres.
        labels: weak label of each pair, any integers.
        sampler: `dcas`: 1 / (density of the range * pairs of the class); `density` or `category`: one of the two
            factors; `uniform`.
        ignore: pairs of this label have probability 0 and shape neither density nor counts.

    Returns:
        (m,) adding up to 1; all 0 where no pair counts.

    Raises:
        InputError: for an unknown sampler, labels of another number, or ranges that are not finite.
    """
    check_choice("sampler", sampler, SAMPLERS)
    _check_labels(labels, len(ranges))
    taken = _labelled(labels, ignore)
    labels = labels[taken]
    weight = torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    if sampler in ("density", "dcas"):
        weight /= range_density(ranges[taken])
    if sampler in ("category", "dcas"):
        _, place, counts = labels.unique(return_inverse=True, return_counts=True)
        weight /= counts[place]
    out = torch.zeros(len(ranges), dtype=torch.float64, device=labels.device)
    out[taken] = weight / weight.sum()
    return out


def draw_pairs(
    size: int, count: int = 4096, generator: torch.Generator | None = None
) -> Int64[Tensor, " n"]:
    """Rows of `count` of `size` pairs, all of them if there are fewer: uniform, none twice, on the CPU.

    Raises:
        InputError: for fewer than two pairs, which have nothing to contrast, or a count below two.
    """
    if size < 2 or count < 2:
        raise InputError(f"a contrast needs two pairs or more, got {size} and a draw of {count}")
    return torch.randperm(size, generator=generator)[:count]


@torch.no_grad()
def draw_weighted_pairs(
    weights: Float[Tensor, " m"], count: int = 4096, generator: torch.Generator | None = None
) -> Int64[Tensor, " n"]:
    """Rows of `count` pairs drawn one after the other by weight, none twice; all with a weight if there are fewer.

    Args:
        weights: 0 or more, of any sum; any number of them (`torch.multinomial` takes 2**24).
        count: pairs to draw.
        generator: on the CPU, where the draw is made for equal draws on all devices.

    Returns:
        Rows on the device of `weights`, in the order of the draw; none where all weights are 0.

    Raises:
        InputError: for weights below 0 or not finite, or a count below two.

    Efraimidis & Spirakis, 2006, "Weighted random sampling with a reservoir".
    """
    if count < 2:
        raise InputError(f"a contrast needs two pairs or more, got a draw of {count}")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise InputError("weights of pairs must be finite and not negative")
    rows = weights.nonzero()[:, 0]
    arrival = torch.empty(len(rows), dtype=torch.float64).exponential_(generator=generator)
    arrival = arrival.to(rows.device) / weights[rows].double()
    return rows[arrival.topk(min(count, len(rows)), largest=False).indices]
