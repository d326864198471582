"""What data sets share that wrap a reader with cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import DATASETS, InputError
from pointcept_kd.host.loader import DefaultDataset

from .camera import Camera
from .transforms import INDEX_VALID_KEYS


class CameraSource(DefaultDataset):
    """The samples of a reader, and the choice of its cameras.

    Args:
        source: config of a reader (or the reader); its own transforms are not used.
        cameras: names of those to use, in this order; None: all, in the reader's order.
        blind: take a reader without cameras, too.
        **others: see `DefaultDataset`.

    Raises:
        InputError: for a source without cameras, and for other names than a list of such.
    """

    def __init__(
        self,
        source: Mapping[str, Any] | DefaultDataset,
        cameras: Sequence[str] | None,
        blind: bool = False,
        **others: Any,
    ) -> None:
        self.camera_names = None if cameras is None else list(cameras)
        self.source = DATASETS.build(source) if isinstance(source, Mapping) else source
        needed = ["data_list", "load", *([] if blind else ["cameras", "images"])]
        if not all(hasattr(self.source, name) for name in needed):
            raise InputError(
                f"source {type(self.source).__name__} has no cameras; use a reader such as "
                "kd.SemanticKITTIDataset, kd.NuScenesDataset or kd.KITTIObjectDataset"
            )
        super().__init__(
            split=self.source.split, data_root=self.source.data_root,
            ignore_index=self.source.ignore_index, **others,
        )  # fmt: skip

    @staticmethod
    def check_names(cameras: Sequence[str] | None) -> None:
        """Refuse what is no list of names, before a reader is built."""
        if isinstance(cameras, str) or (cameras is not None and not len(cameras)):
            raise InputError(f"cameras={cameras!r}: expected a list of names, or None for all")

    def get_data_list(self) -> list[Any]:
        """The samples of the source."""
        return self.source.data_list

    def get_data_name(self, idx: int) -> str:
        """The name that the source gives."""
        return self.source.get_data_name(idx)

    def chosen(self, names: Sequence[str]) -> list[int]:
        """Which of a sample's cameras are used.

        Raises:
            InputError: for one that the sample does not have.
        """
        if self.camera_names is None:
            return list(range(len(names)))
        unknown = [name for name in self.camera_names if name not in names]
        if unknown:
            raise InputError(f"cameras: no {', '.join(unknown)}; there are {', '.join(names)}")
        return [list(names).index(name) for name in self.camera_names]

    @staticmethod
    def number(data: dict[str, Any]) -> None:
        """Give every point its `point_id`, which stays with it through all transforms."""
        data["point_id"] = np.arange(len(data["coord"]), dtype=np.int64)
        listed = data.get("index_valid_keys", INDEX_VALID_KEYS)
        data["index_valid_keys"] = list(dict.fromkeys([*listed, "point_id"]))

    @staticmethod
    def check_image(sample: str, camera: Camera, image: NDArray) -> None:
        """Refuse an image of another size than its camera's.

        Raises:
            InputError: with both sizes.
        """
        if image.shape != (camera.height, camera.width, 3):
            raise InputError(
                f"sample {sample}: the image of {camera.name} is of shape {image.shape}, its camera has "
                f"{camera.width} x {camera.height} pixels; copy the image again"
            )
