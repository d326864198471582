"""Several augmented views of one cloud, for self-supervised training.

Views are made of copies of chosen keys and go back into the sample under prefixed keys, with their
own offsets where several views are joined.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from pointcept_kd.host import TRANSFORMS, kd, stand_in
from pointcept_kd.host.loader import Compose

from .arrays import Array, Data, coord_of, lookup, need

Chain = Sequence[dict[str, Any]] | None


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ContrastiveViewsGenerator")
class ContrastiveViewsGenerator:
    """Two views: every key the chain leaves behind, as `view1_KEY` and `view2_KEY`.

    Args:
        view_keys: keys a view starts with. `index_valid_keys` goes along where the sample has it.
        view_trans_cfg: transforms of one view, run for the first, then for the second.
    """

    def __init__(
        self,
        view_keys: Sequence[str] = ("coord", "color", "normal", "origin_coord"),
        view_trans_cfg: Chain = None,
    ) -> None:
        self.view_keys = list(view_keys)
        self.view_trans = Compose(view_trans_cfg)

    def __call__(self, data: Data) -> Data:
        starts = []
        for _ in range(2):
            start = {
                key: lookup(data, key, "ContrastiveViewsGenerator").copy() for key in self.view_keys
            }
            if "index_valid_keys" in data:
                start["index_valid_keys"] = list(data["index_valid_keys"])
            starts.append(start)
        for number, start in enumerate(starts, 1):
            data.update({f"view{number}_{key}": v for key, v in self.view_trans(start).items()})
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "MultiViewGenerator")
class MultiViewGenerator:
    """Big ("global") and small ("local") views of one cloud, joined under `global_KEY`, `local_KEY`.

    A view is the points nearest to a centre. The first global view lies around a random point (or
    around the points seen by images); the centres of all others are points of it, those of local
    views points no earlier local view has covered. `global_offset` and `local_offset` hold the
    cumulative ends of the views.

    Args:
        global_view_num: number of global views.
        global_view_scale: bounds of a global view's share of the points.
        local_view_num: number of local views.
        local_view_scale: bounds of a local view's share.
        global_shared_transform: transforms of the cloud that global views are cut from.
        global_transform: transforms of each global view.
        local_transform: transforms of each local view, which is cut from the cloud as it came.
        max_size: shares are of this many points at most.
        enc2d_max_size: points of the first global view when there are images.
        enc2d_scale: taken for compatibility; has no effect.
        center_height_scale: the first centre lies between these parts of the height.
        shared_global_view: all global views hold the same points.
        view_keys: per-point keys of a view, `coord` among them.
        static_view_keys: keys a view takes over whole, for its transforms.
        if_frame_selected: local views keep points of one sweep of `frame_pcd_offset` only.
    """

    def __init__(
        self,
        global_view_num: int = 2,
        global_view_scale: Sequence[float] = (0.4, 1.0),
        local_view_num: int = 4,
        local_view_scale: Sequence[float] = (0.1, 0.4),
        global_shared_transform: Chain = None,
        global_transform: Chain = None,
        local_transform: Chain = None,
        max_size: int = 65536,
        enc2d_max_size: int = 102400,
        enc2d_scale: Sequence[float] = (0.8, 1),
        center_height_scale: Sequence[float] = (0, 1),
        shared_global_view: bool = False,
        view_keys: Sequence[str] = ("coord", "origin_coord", "color", "normal", "correspondence"),
        static_view_keys: Sequence[str] = ("name", "img_num"),
        if_frame_selected: bool = False,
    ) -> None:
        need("coord" in view_keys, f"MultiViewGenerator: view_keys need coord, got {view_keys!r}")
        need(
            global_view_num >= 1 and local_view_num >= 1,
            "MultiViewGenerator: at least one global and one local view",
        )
        self.global_view_num = global_view_num
        self.global_view_scale = global_view_scale
        self.local_view_num = local_view_num
        self.local_view_scale = local_view_scale
        self.global_shared_transform = Compose(global_shared_transform)
        self.global_transform = Compose(global_transform)
        self.local_transform = Compose(local_transform)
        self.max_size = max_size
        self.enc2d_max_size = enc2d_max_size
        self.center_height_scale = center_height_scale
        self.shared_global_view = shared_global_view
        self.view_keys = list(view_keys)
        self.static_view_keys = list(static_view_keys)
        self.if_frame_selected = if_frame_selected

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "MultiViewGenerator")
        point = self.global_shared_transform(copy.deepcopy(data))
        if "correspondence" in data:
            size = min(self.enc2d_max_size, len(point["coord"]))
            major = self.view(point, self.seen_center(coord, data), size)
            self._keep_seen_images(data, point, major)
        else:
            center = self.random_center(coord)
            major = self.view(point, center, self.size(len(point["coord"]), self.global_view_scale))
        spots = major["coord"]
        wide = [major]
        for _ in range(self.global_view_num - 1):
            if self.shared_global_view:
                wide.append(copy.deepcopy(major))
                continue
            center = spots[np.random.randint(len(spots))]
            wide.append(
                self.view(point, center, self.size(len(point["coord"]), self.global_view_scale))
            )
        small = self._local_views(data, coord, major)
        result = {
            **self._join("global", wide, self.global_transform),
            **self._join("local", small, self.local_transform),
        }
        data.update(result)
        return data

    def random_center(self, coord: Array) -> Array:
        """A point (3,) between the two heights."""
        z = coord[:, 2]
        low, high = (z.min() + (z.max() - z.min()) * part for part in self.center_height_scale)
        rows = np.flatnonzero((z >= low) & (z <= high))
        need(
            len(rows) > 0,
            f"MultiViewGenerator: no point between the heights {low:.2f} m and {high:.2f} m of "
            f"center_height_scale {self.center_height_scale}",
        )
        return coord[np.random.choice(rows)]

    def seen_center(self, coord: Array, data: Data) -> Array:
        """Mean of the points that have a match in every image; a random point if none has."""
        matches = data["correspondence"].reshape(len(coord), -1)
        seen = coord[np.all(matches != -1, axis=1)]
        return np.mean(seen, axis=0) if len(seen) else self.random_center(coord)

    def size(self, points: int, scale: Sequence[float]) -> int:
        """Number of points of a view, drawn again while it is 0 (ten times at most)."""
        most = min(self.max_size, points)
        for _ in range(10):
            size = int(np.random.uniform(*scale) * most)
            if size > 0:
                return size
        return min(most, max(10, int(scale[-1] * most)))

    def view(self, point: Data, center: Array, size: int, one_frame: bool = False) -> Data:
        """The `size` points nearest to the centre; `index` says which they are."""
        index = np.argsort(np.sum(np.square(point["coord"] - center), axis=1))[:size]
        if one_frame and "frame_pcd_offset" in point:
            index = self._of_one_frame(index, point["frame_pcd_offset"])
        view: Data = {"index": index}
        for key in self.view_keys:
            view[key] = lookup(point, key, "MultiViewGenerator")[index]
        for key in self.static_view_keys:
            if key in point:
                view[key] = point[key]
        if "index_valid_keys" in point:
            view["index_valid_keys"] = list(point["index_valid_keys"])
        return view

    @staticmethod
    def _of_one_frame(index: Array, frames: Any) -> Array:
        """Those rows of `index` that belong to one random sweep which has any of them.

        Their order is that of a python set, as in Pointcept: of no meaning, but reproducible.
        """
        rows = set(index)
        for _ in range(10):
            number = np.random.randint(0, len(frames)) if len(frames) > 1 else 0
            chosen = list(rows & set(frames[number]))
            if chosen:
                return np.array(chosen)
        for number in random.sample(range(len(frames)), len(frames)):
            chosen = list(rows & set(frames[number]))
            if chosen:
                return np.array(chosen)
        return index

    @staticmethod
    def _keep_seen_images(data: Data, point: Data, major: Data) -> None:
        """Drop the images in which the first view has no point."""
        seen = np.flatnonzero(np.any(major["correspondence"] != -1, axis=(0, 2)))
        matches = data["correspondence"][:, seen]
        data["correspondence"] = point["correspondence"] = matches
        major["correspondence"] = major["correspondence"][:, seen]
        data["img_num"] = len(seen)
        if "images" in data:
            data["images"] = data["images"][seen]

    def _local_views(self, data: Data, coord: Array, major: Data) -> list[Data]:
        covered = np.zeros(len(major["index"]), dtype=bool)
        views = []
        for _ in range(self.local_view_num):
            if covered.all():
                covered[:] = False
            center = major["coord"][np.random.choice(np.flatnonzero(~covered))]
            size = self.size(len(coord), self.local_view_scale)
            views.append(self.view(data, center, size, self.if_frame_selected))
            covered |= np.isin(major["index"], views[-1]["index"])
        return views

    def _join(self, name: str, views: list[Data], chain: Compose) -> Data:
        made = []
        for view in views:
            del view["index"]
            made.append(chain(view))
        joined: Data = {
            f"{name}_{key}": np.concatenate([view[key] for view in made]) for key in self.view_keys
        }
        joined[f"{name}_offset"] = np.cumsum([len(view["coord"]) for view in made])
        return joined
