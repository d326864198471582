"""Between points and the images that show them: gather, scatter, gated fusion both ways, imputation.

Points are rows of a batch, f their features (n, c). Images have maps S (v, i, h, w). A view is a pair of a point and an
image that shows it, with the place (n_x, n_y) in -1 .. 1 of the point in it: -1 and 1 are the centres of the first and
of the last pixel, at every resolution, so that all maps are read and written with aligned corners.

    LiDAR to camera, `L2C`                                 camera to LiDAR, `C2L`
    M  = scatter(f)                                        m  = gather(Y) where seen, else learner(f)
    g  = sigmoid(w . tanh(W1 S + W2 M))                    a  = sigmoid(w . tanh(W1 relu(bn(m)) + W2 f))
    M' = g relu(bn(W M))                                   m' = a relu(bn(W m))
    Y  = bn(W' [S, M'])                                    f' = relu(bn(W' [f, m']))

Sun et al., 2024, "Uni-to-Multi Modal Knowledge Distillation for Bidirectional LiDAR-Camera Semantic Segmentation",
doi 10.1109/TPAMI.2024.3451658.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pointcept_kd.host import InputError
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.scatter import segment_mean

from .image import enlarge
from .layers import BatchNorm, Linear
from .swiftnet import SMALLEST, Norm2d

MULTI_VIEWS = ("last", "mean")
_VIEWS = ("view_point", "view_image", "view_uv", "view_offset")


class CameraViews:
    """The images of a batch and which points they show.

    Args:
        images: (v, 3, h, w) values in 0 .. 1; v may be 0.
        point: (m,) rows of the points in the batch.
        image: (m,) images in the batch.
        uv: (m, 2) places (n_x, n_y), above -1 and below 1.
        points: n.
        multi_view: what a point in several images reads: "last", from the image with the highest number; "mean", the
            mean over them.

    Attributes:
        visible: (k,) rows of the points that at least one image shows, each once; `gather` gives rows in this order.

    Raises:
        InputError: for another `multi_view`, entries of unlike length, points, images or places that do not exist.
    """

    def __init__(
        self,
        images: Tensor,
        point: Tensor,
        image: Tensor,
        uv: Tensor,
        points: int,
        multi_view: str = "last",
    ) -> None:
        if multi_view not in MULTI_VIEWS:
            raise InputError(f"multi_view={multi_view!r}: known are {', '.join(MULTI_VIEWS)}")
        if point.shape != image.shape or uv.shape != (len(point), 2):
            raise InputError(
                f"view_point {tuple(point.shape)}, view_image {tuple(image.shape)} and view_uv {tuple(uv.shape)} do "
                "not fit: expected (m,), (m,) and (m, 2)"
            )
        for name, rows, size in (
            ("view_point", point, points),
            ("view_image", image, len(images)),
        ):
            if len(rows) and bool(((rows < 0) | (rows >= size)).any()):
                raise InputError(
                    f"{name} has numbers outside of 0 .. {size - 1}: transforms that drop points or images must drop "
                    "their views"
                )
        if not bool((uv.abs() < 1).all()):
            raise InputError("view_uv has places that are not between -1 and 1, or not finite")
        self.images, self.points, self.multi_view = images, points, multi_view
        order = torch.sort(image.long(), stable=True).indices
        self.point, self.image, self.uv = point.long()[order], image.long()[order], uv[order]
        if multi_view == "last":
            # Views are sorted by image, so the last one of a point is that of its last image.
            number = torch.arange(len(order), device=point.device)
            last = number.new_full((points,), -1).scatter_reduce_(0, self.point, number, "amax")
            self._read = last[last >= 0].sort().values
            self.visible = self.point[self._read]
            self._inverse: Tensor | None = None
        else:
            self._read = torch.arange(len(order), device=point.device)
            self.visible, self._inverse = self.point.unique(return_inverse=True)
        self._per_image = torch.bincount(self.image[self._read], minlength=len(images)).tolist()

    @classmethod
    def of_batch(
        cls, batch: Mapping[str, Any], points: int, like: Tensor, multi_view: str = "last"
    ) -> CameraViews:
        """The views of a batch dict, whose numbers count from the start of each scan.

        Args:
            batch: `offset` (b,) and, where there are cameras, `images` (v, 3, h, w) with `image_offset` (b,),
                `view_point` (m,), `view_image` (m,), `view_uv` (m, 2) with `view_offset` (b,). Without `images` there
                are none, and views are not looked at.
            points: n.
            like: a tensor of the device and type that empty images get.

        Raises:
            InputError: for missing entries, and those that do not fit each other.
        """
        if batch.get("images") is None:
            none = torch.zeros(0, dtype=torch.int64, device=like.device)
            images = like.new_zeros((0, 3, SMALLEST, SMALLEST))
            return cls(images, none, none, like.new_zeros((0, 2)), points, multi_view)
        missing = [key for key in ("image_offset", *_VIEWS) if key not in batch]
        if missing:
            raise InputError(f"the batch has `images` but no {', '.join(missing)}")
        images, ends = batch["images"], batch["offset"]
        if images.dim() != 4 or images.shape[1] != 3:
            raise InputError(f"images are {tuple(images.shape)}: expected (v, 3, h, w)")
        if not len(images):
            # Their size says nothing, and may be none.
            images = images.new_zeros((0, 3, SMALLEST, SMALLEST))
        image_ends, view_ends = batch["image_offset"], batch["view_offset"]
        for key, given, size in (
            ("image_offset", image_ends, len(images)),
            ("view_offset", view_ends, len(batch["view_point"])),
        ):
            if given.shape != ends.shape or int(given[-1]) != size:
                raise InputError(
                    f"{key} is {given.tolist()}: expected {len(ends)} cumulative ends, the last {size}"
                )
        scan = offset2batch(view_ends)
        rows = []
        for key, last in (("view_point", ends), ("view_image", image_ends)):
            own, start = batch[key], torch.cat([last.new_zeros(1), last[:-1]])
            moved = own + start[scan]
            if len(own) and bool(((own < 0) | (moved >= last[scan])).any()):
                raise InputError(
                    f"{key} has numbers that its scan does not have: transforms that drop points or images must drop "
                    "their views"
                )
            rows.append(moved)
        return cls(images, *rows, batch["view_uv"], points, multi_view)

    def gather(self, maps: Float[Tensor, "v c i j"]) -> Float[Tensor, "k c"]:
        """What the visible points read from maps of the images, bilinear with aligned corners."""
        values = sample(maps, self.uv[self._read], self._per_image)
        if self._inverse is None:
            return values
        return segment_mean(values, self._inverse, len(self.visible))

    def scatter(
        self, values: Float[Tensor, "n c"], size: Sequence[int], scales: int = 1
    ) -> Float[Tensor, "v c h w"]:
        """Maps of all images from features of the points that they show, whichever image those read from.

        At the scales 1, 1/2, 1/4, ... of `size` a cell has the mean of the points in it, or 0; the scales are enlarged
        to `size` and averaged. A place n lies in the cell floor((n + 1) / 2 * (cells - 1)).

        Args:
            values: of all points.
            size: height and width of the maps.
            scales: how many.
        """
        height, width = size
        count = len(self.images)
        values = values.float() if values.element_size() == 2 else values
        place = (self.uv.to(values.dtype) + 1) / 2
        total: Tensor | None = None
        for scale in reversed(range(scales)):
            i, j = scaled(height, 2**scale), scaled(width, 2**scale)
            column = (place[:, 0] * (j - 1)).floor().long()
            row = (place[:, 1] * (i - 1)).floor().long()
            cell, order = torch.sort((self.image * i + row) * j + column)
            ends = torch.bincount(cell, minlength=count * i * j).cumsum(0)
            # A bag per cell: means are taken where the rows lie, without a copy of them for every view.
            means = F.embedding_bag(
                self.point[order],
                values,
                F.pad(ends, (1, 0)),
                mode="mean",
                include_last_offset=True,
            )
            maps = means.view(count, i, j, values.shape[1]).permute(0, 3, 1, 2)
            maps = enlarge(maps, size) if scale else maps
            total = maps if total is None else total.add_(maps)
        assert total is not None  # scales are 1 or more
        return total.div_(scales) if scales > 1 else total


def scaled(size: int, scale: int) -> int:
    """Cells along a side of a map at 1 / `scale`: halves are rounded up; at least 1."""
    return max(1, round(size / scale + 0.01))


def sample(
    maps: Float[Tensor, "v c i j"], uv: Float[Tensor, "k 2"], per_image: Sequence[int]
) -> Float[Tensor, "k c"]:
    """Maps at places: the first `per_image[0]` ones in the first map, and so on.

    Args:
        maps: of all images.
        uv: (n_x, n_y), from -1, the first cell, to 1, the last.
        per_image: places in each; their sum is k.

    Returns: at least float32.
    """
    # Half precision would move the places by more than a pixel.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # Without a place the result is empty and still connected to the maps.
    parts = [maps[:0, :, 0, 0]]
    if any(per_image):
        for image, places in zip(maps.unbind(0), uv.split(list(per_image))):
            if len(places):
                grid = places[None, None].to(maps.dtype)
                parts.append(F.grid_sample(image[None], grid, align_corners=True)[0, :, 0].t())
    return torch.cat(parts)


class L2C(nn.Module):
    """LiDAR to camera: points scattered into the images' maps, gated, and joined to them.

    Args:
        points: c, channels of the points.
        images: i, channels of the maps; the gate has a quarter of them inside.
        scales: see `CameraViews.scatter`.
    """

    def __init__(self, points: int, images: int, scales: int) -> None:
        super().__init__()
        hidden = max(1, images // 4)
        self.scales = scales
        self.from_image = nn.Conv2d(images, hidden, 1)
        self.from_points = nn.Conv2d(points, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 1)
        self.bring = nn.Sequential(nn.Conv2d(points, images, 1), Norm2d(images))
        self.merge = nn.Sequential(nn.Conv2d(2 * images, images, 1), Norm2d(images))

    def gate(self, maps: Tensor, scattered: Tensor) -> Float[Tensor, "v 1 h w"]:
        """How much of the points each place takes, 0 .. 1."""
        mixed = torch.tanh(self.from_image(maps) + self.from_points(scattered))
        return torch.sigmoid(self.score(mixed))

    def forward(
        self, maps: Float[Tensor, "v i h w"], values: Float[Tensor, "n c"], views: CameraViews
    ) -> Float[Tensor, "v i h w"]:
        """The fused maps, before a ReLU."""
        scattered = views.scatter(values, maps.shape[2:], self.scales).to(maps.dtype)
        taken = self.gate(maps, scattered) * F.relu(self.bring(scattered))
        return self.merge(torch.cat([maps, taken], 1))


class C2L(nn.Module):
    """Camera to LiDAR: image features of points, gated, and joined to the points' own.

    Args:
        points: c, channels of the points; the gate has a quarter of them inside.
        images: i, channels of the image features.
    """

    def __init__(self, points: int, images: int) -> None:
        super().__init__()
        hidden = max(1, points // 4)
        self.norm = BatchNorm(images)
        self.from_image = Linear(images, hidden)
        self.from_points = Linear(points, hidden)
        self.score = Linear(hidden, 1)
        self.bring = nn.Sequential(Linear(images, points), BatchNorm(points))
        self.merge = nn.Sequential(Linear(2 * points, points), BatchNorm(points))

    def gate(self, values: Tensor, seen: Tensor) -> Float[Tensor, "n 1"]:
        """How much of its image feature each point takes, 0 .. 1."""
        mixed = torch.tanh(self.from_image(F.relu(self.norm(seen))) + self.from_points(values))
        return torch.sigmoid(self.score(mixed))

    def forward(
        self, values: Float[Tensor, "n c"], seen: Float[Tensor, "n i"]
    ) -> Float[Tensor, "n c"]:
        """Points and their image features, read or imputed, to the fused points."""
        taken = self.gate(values, seen) * F.relu(self.bring(seen))
        return F.relu(self.merge(torch.cat([values, taken], 1)))


class Learner(nn.Sequential):
    """Imputation: what an image would have shown of a point, from the point's own feature.

    Two linear layers, each with BatchNorm, ReLU between.

    Args:
        points: channels of the points.
        images: channels of the image features.
    """

    def __init__(self, points: int, images: int) -> None:
        super().__init__(
            Linear(points, images),
            BatchNorm(images),
            nn.ReLU(),
            Linear(images, images),
            BatchNorm(images),
        )


def impute(
    pseudo: Float[Tensor, "n i"], seen: Float[Tensor, "k i"], visible: Int[Tensor, " k"]
) -> Float[Tensor, "n i"]:
    """Image features where there are some, pseudo features elsewhere.

    Args:
        pseudo: of all points.
        seen: read from images.
        visible: rows that `seen` belongs to, each once.
    """
    return pseudo.index_copy(0, visible, seen.to(pseudo.dtype))


def learner_loss(
    pseudo: Float[Tensor, "n i"], seen: Float[Tensor, "k i"], visible: Int[Tensor, " k"]
) -> Float[Tensor, ""]:
    """Mean over visible points and channels of (pseudo - seen)^2, without gradient into `seen`; 0 without such points.

    Args: as in `impute`.
    """
    own = pseudo[visible].float() if pseudo.element_size() == 2 else pseudo[visible]
    squares = (own - seen.detach().to(own.dtype)).square()
    return joint_mean(squares.sum() / max(squares.numel(), 1), squares.numel())
