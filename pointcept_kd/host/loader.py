"""Datasets and collation: from a folder of scans to one batch dictionary.

A sample is a dictionary of numpy arrays. The transforms of a config turn it into tensors, and
`collate_fn` joins several samples along their rows; `offset` (cumulative end rows, int64) says
where each scan ends.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from . import DATASETS, TRANSFORMS, kd, stand_in
from .errors import InputError
from .sample_cache import build_cache

logger = logging.getLogger(__name__)


class Compose:
    """A chain of transforms built from a list of configs; None or an empty list is the identity.

    A transform maps one sample dictionary to another (or, for a fragmenting one, to a list of
    them).
    """

    def __init__(self, cfg: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.cfg = cfg if cfg is not None else []
        self.transforms = [TRANSFORMS.build(entry) for entry in self.cfg]

    def __call__(self, data: Any) -> Any:
        for position, transform in enumerate(self.transforms):
            name = data.get("name", "?") if isinstance(data, Mapping) else "?"
            try:
                data = transform(data)
            except InputError:
                raise
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11+; the type and text stay as they are
                    kind = type(transform).__name__
                    error.add_note(f"in transform {position} ({kind}) of sample {name}")
                raise
        return data


@stand_in(DATASETS, kd.DATASETS, "DefaultDataset")
class DefaultDataset(Dataset):
    """Samples that are folders of `.npy` assets; the base of the LiDAR readers.

    Subclasses replace `get_data_list`, `get_data(idx)` and `get_data_name(idx)`; everything else
    (looping, caching, checking, test-time fragments) works on what those return.

    Args:
        split: a folder below `data_root`, a JSON file there that lists sample folders, or a list of
            such names.
        data_root: where the samples are.
        transform: list of transform configs.
        test_mode: give fragments for voting (see `prepare_test_data`) instead of one sample.
        test_cfg: `voxelize`, `crop`, `post_transform`, `aug_transform`; needed in test mode only.
        cache: keep samples once they were read. False: no; True or "memory": in every loading
            process anew; "shared": once for all processes of this machine (see `sample_cache`).
            Files that change meanwhile are not read again.
        ignore_index: label of points that have none.
        loop: how often the samples are gone through per epoch; 1 in test mode.

    Raises:
        InputError: without data, without samples for the split, or for a sample that cannot be
            used.
    """

    VALID_ASSETS = ("coord", "color", "normal", "strength", "segment", "instance", "pose")

    def __init__(
        self,
        split: str | Sequence[str] = "train",
        data_root: str = "data/dataset",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
    ) -> None:
        super().__init__()
        self.data_root = os.fspath(data_root)
        self.split = split
        self.transform = Compose(transform)
        self.cache = cache
        self.ignore_index = ignore_index
        self.loop = loop if not test_mode else 1
        self.test_mode = test_mode
        self.test_cfg = test_cfg if test_mode else None
        if test_mode:
            self._build_test_transforms()
        if not os.path.isdir(self.data_root):
            raise InputError(
                f"data_root {self.data_root} is no folder; {type(self).__name__} expects its data "
                "there: set data_root (relative paths start at the working directory) or prepare "
                "the data first"
            )
        self.data_list = self.get_data_list()
        if not self.data_list:
            raise InputError(
                f"no samples for split {self.split!r} of {type(self).__name__} below "
                f"{self.data_root}; check data_root and split"
            )
        logger.info(
            "%d x %d samples in %s, split %s",
            len(self.data_list),
            self.loop,
            os.path.basename(os.path.normpath(self.data_root)),
            split,
        )
        self._cache = build_cache(cache, self._identity, len(self.data_list))
        self.__dict__.pop("_arguments", None)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments: they, however a subclass stores them, say what its samples are."""
        dataset = super().__new__(cls)
        dataset._arguments = (args, kwargs)
        return dataset

    def _identity(self) -> dict[str, Any]:
        """What decides the values of `get_data`: class, folder, arguments, sample list."""
        signature = inspect.signature(type(self).__init__)
        given = signature.bind(self, *self._arguments[0], **self._arguments[1]).arguments
        others = ("self", "transform", "test_mode", "test_cfg", "cache", "loop", "data_root")
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "data_root": os.path.realpath(self.data_root),
            "arguments": {key: value for key, value in given.items() if key not in others},
            "samples": [
                os.path.relpath(entry, self.data_root)
                if isinstance(entry, str)
                else self.get_data_name(i)
                for i, entry in enumerate(self.data_list)
            ],
        }

    def _build_test_transforms(self) -> None:
        if not isinstance(self.test_cfg, Mapping):
            raise InputError(
                f"{type(self).__name__}: test_mode=True needs test_cfg with voxelize, crop, "
                f"post_transform and aug_transform, got {self.test_cfg!r}"
            )
        known = ("voxelize", "crop", "post_transform", "aug_transform")
        unknown = sorted(set(self.test_cfg) - set(known))
        if unknown:
            raise InputError(
                f"test_cfg does not take {', '.join(unknown)}; it takes {', '.join(known)}"
            )
        voxelize, crop, post, augment = (self.test_cfg.get(key) for key in known)
        self.test_voxelize = TRANSFORMS.build(voxelize) if voxelize else None
        self.test_crop = TRANSFORMS.build(crop) if crop else None
        self.post_transform = Compose(post)
        self.aug_transform = [Compose(chain) for chain in augment or [[]]]

    def get_data_list(self) -> list[Any]:
        """The sample folders of the split, sorted by name; a JSON file keeps its own order."""
        splits = [self.split] if isinstance(self.split, str) else list(self.split)
        folders: list[str] = []
        for split in splits:
            path = os.path.join(self.data_root, split)
            if os.path.isfile(path):
                folders += self._read_split_file(path)
            elif os.path.isdir(path):
                folders += sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
            else:
                raise InputError(
                    f"split {split!r}: neither a folder nor a JSON file below {self.data_root}"
                )
        return folders

    def _read_split_file(self, path: str) -> list[str]:
        try:
            with open(path, encoding="utf-8") as file:
                entries = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise InputError(
                f"{path}: expected a list of sample folders relative to {self.data_root}"
            )
        folders = [os.path.join(self.data_root, entry) for entry in entries]
        for row, folder in enumerate(folders):
            if not os.path.isdir(folder):
                raise InputError(
                    f"{path}: entry {row}, {entries[row]!r}, is no folder below {self.data_root}"
                )
        return folders

    def get_data(self, idx: int) -> dict[str, Any]:
        """Read one sample: at least `coord` (n, 3) float32, `segment` (n,) int32 and `name`."""
        folder = self.data_list[idx % len(self.data_list)]
        data: dict[str, Any] = {}
        for asset in self.VALID_ASSETS:
            path = os.path.join(folder, f"{asset}.npy")
            if os.path.isfile(path):
                try:
                    data[asset] = np.load(path, allow_pickle=False)
                except (ValueError, OSError, EOFError) as error:
                    raise InputError(f"{path}: not a readable .npy array ({error})") from error
        if "coord" not in data:
            raise InputError(
                f"{folder}: no coord.npy; a sample folder needs it, the other assets are optional"
            )
        rows = len(data["coord"]) if data["coord"].ndim else 0
        for key in ("coord", "color", "normal", "strength"):
            if key in data:
                data[key] = data[key].astype(np.float32)
        if "strength" in data and data["strength"].ndim == 1:
            data["strength"] = data["strength"][:, None]
        for key, missing in (("segment", self.ignore_index), ("instance", -1)):
            if key in data:
                data[key] = data[key].reshape(-1).astype(np.int32)
            else:
                data[key] = np.full(rows, missing, dtype=np.int32)
        data["name"] = self.get_data_name(idx)
        data["split"] = os.path.basename(os.path.dirname(folder))
        return data

    def get_data_name(self, idx: int) -> str:
        """A name that is unique within the split."""
        return os.path.basename(self.data_list[idx % len(self.data_list)])

    def load(self, idx: int) -> dict[str, Any]:
        """A checked sample that the caller may change: from the cache, or from `get_data`."""
        position = idx % len(self.data_list)
        data = self._cache.get(position) if self._cache is not None else None
        if data is not None:
            return data
        data = self.get_data(idx)
        source = self.data_list[position]
        check_sample(data, source if isinstance(source, str) else self.get_data_name(idx))
        if self._cache is not None:
            self._cache.put(position, data)
        return data

    def prepare_train_data(self, idx: int) -> Any:
        """One sample through the transforms; also used for validation."""
        return self.transform(self.load(idx))

    def prepare_test_data(self, idx: int) -> dict[str, Any]:
        """One scan as fragments for voting.

        Returns:
            `fragment_list` (augmentations x voxel fragments, each with `index` into the transformed
            scan), `segment`, `name` and, where the transforms made them, `origin_segment` and
            `inverse` (raw point to row of the scan).
        """
        data = self.transform(self.load(idx))
        name = data.pop("name")
        result = {"segment": data.pop("segment"), "name": name}
        if "origin_segment" in data and "inverse" not in data:
            raise InputError(
                f"sample {name}: the test transforms keep origin_segment but no inverse; "
                "give their GridSample return_inverse=True"
            )
        result.update({key: data.pop(key) for key in ("origin_segment", "inverse") if key in data})
        fragments: list[Any] = []
        for augment in self.aug_transform:
            cloud = augment(copy.deepcopy(data))
            if self.test_voxelize is not None:
                parts = _as_list(self.test_voxelize(cloud))
            else:
                parts = [{**cloud, "index": np.arange(len(cloud["coord"]))}]
            if self.test_crop is not None:
                parts = [piece for part in parts for piece in _as_list(self.test_crop(part))]
            fragments += [self.post_transform(part) for part in parts]
        result["fragment_list"] = fragments
        return result

    def __getitem__(self, idx: int) -> Any:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        idx %= len(self)
        return self.prepare_test_data(idx) if self.test_mode else self.prepare_train_data(idx)

    def __len__(self) -> int:
        return len(self.data_list) * self.loop


@stand_in(DATASETS, kd.DATASETS, "ConcatDataset")
class ConcatDataset(Dataset):
    """Several datasets one after the other, each with its own transforms, cache and loop.

    Args:
        datasets: dataset configs (or datasets, also further `ConcatDataset`s).
        loop: how often the whole is gone through per epoch.

    Raises:
        InputError: for an empty list, or members without a single sample.
    """

    def __init__(self, datasets: Sequence[Any], loop: int = 1) -> None:
        super().__init__()
        if not datasets:
            raise InputError("ConcatDataset needs at least one dataset, got an empty list")
        self.datasets = [DATASETS.build(d) if isinstance(d, Mapping) else d for d in datasets]
        self.loop = loop
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))
        if not self._ends[-1]:
            raise InputError(f"ConcatDataset: its {len(self.datasets)} datasets hold no sample")

    def _locate(self, idx: int) -> tuple[Any, int]:
        position = idx % self._ends[-1]
        which = bisect_right(self._ends, position)
        return self.datasets[which], position - (self._ends[which - 1] if which else 0)

    def get_data_name(self, idx: int) -> str:
        """The name that the dataset holding this sample gives it."""
        dataset, position = self._locate(idx)
        return dataset.get_data_name(position)

    def get_data(self, idx: int) -> dict[str, Any]:
        """The raw sample, read by the dataset that holds it."""
        dataset, position = self._locate(idx)
        return dataset.get_data(position)

    def load(self, idx: int) -> dict[str, Any]:
        """A checked sample that the caller may change, through the cache of its dataset."""
        dataset, position = self._locate(idx)
        return dataset.load(position)

    def __getitem__(self, idx: int) -> Any:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        dataset, position = self._locate(idx % len(self))
        return dataset[position]

    def __len__(self) -> int:
        return self._ends[-1] * self.loop


def check_sample(data: Mapping[str, Any], source: str) -> None:
    """Refuse a raw sample that would only fail, or train on rubbish, later.

    Args:
        data: arrays of one scan; `coord` (n, 3) is needed, the other per-point arrays are checked
            where present.
        source: the file or folder, for the message.

    Raises:
        InputError: no points, arrays of different length, or a value that is not finite, with file
            and row.
    """
    coord = data.get("coord")
    if coord is None or coord.ndim != 2 or coord.shape[1] != 3:
        found = "missing" if coord is None else f"of shape {tuple(coord.shape)}"
        raise InputError(f"{source}: coord is {found}; expected (n, 3)")
    if len(coord) == 0:
        raise InputError(
            f"{source}: the scan has no points; remove it from the split or prepare it again"
        )
    for key in ("coord", "color", "normal", "strength", "segment", "instance"):
        if key not in data:
            continue
        array = data[key]
        if len(array) != len(coord):
            row = min(len(array), len(coord))
            raise InputError(
                f"{source}: {key} has {len(array)} rows and coord {len(coord)}; they differ from "
                f"row {row} on, expected one row per point"
            )
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
            raise InputError(f"{source}: {key} is not finite in row {row} ({array[row].tolist()})")


def _as_list(value: Any) -> list[Any]:
    """What a fragmenting transform returned as a list: a crop may return one cloud, not several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def collate_fn(batch: Sequence[Any]) -> Any:
    """Join samples into one batch.

    Tensors are concatenated along their rows, strings become a list, `*offset*` keys are
    accumulated over the batch, `*correspondence*` keys (n, images, 2) are padded with -1 to the
    largest image count, and `inverse` is moved by the first row of its scan, so that it indexes the
    joined rows. Samples in fragments stay a list of samples.

    Args:
        batch: samples with equal keys; or tensors, strings, numbers.

    Raises:
        InputError: for samples that lack a key of the first one or whose shapes do not fit.
    """
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) == 0:
        raise TypeError(f"collate_fn joins a non-empty list of samples, got {type(batch).__name__}")
    if not isinstance(batch[0], Mapping):
        return _join(batch, "value")
    if "fragment_list" in batch[0]:
        return list(batch)
    for position, sample in enumerate(batch):
        missing = [key for key in batch[0] if key not in sample]
        if missing:
            raise InputError(
                f"sample {position} of the batch has no {missing[0]!r}, sample 0 has; "
                "collect the same keys in every dataset"
            )
    joined = {}
    for key in batch[0]:
        values = [sample[key] for sample in batch]
        if "offset" in key:
            counts = [torch.diff(v, prepend=v.new_zeros(1)) for v in values]
            joined[key] = torch.cat(counts).cumsum(0)
        elif "correspondence" in key:
            joined[key] = _join(_pad_images(values), key)
        elif key == "inverse" and len(batch) > 1:
            starts = [0, *accumulate(_row_count(sample) for sample in batch)]
            joined[key] = torch.cat([value + start for value, start in zip(values, starts)])
        else:
            joined[key] = _join(values, key)
    return joined


def _row_count(sample: Mapping[str, Any]) -> int:
    if "offset" in sample:
        return int(sample["offset"][-1])
    if "coord" in sample:
        return len(sample["coord"])
    raise InputError(
        "a batch with `inverse` needs `offset` or `coord` too; add coord to the keys of Collect"
    )


def _pad_images(values: Sequence[Tensor]) -> list[Tensor]:
    most = max(value.shape[1] for value in values)
    pad = torch.nn.functional.pad
    return [pad(value, (0, 0, 0, most - value.shape[1]), value=-1) for value in values]


def _join(values: Sequence[Any], key: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim == 0:
            return torch.stack(list(values))
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(shapes) > 1:
            raise InputError(
                f"{key}: rows of different shapes in one batch, {sorted(shapes)}; expected equal "
                "ones"
            )
        return torch.cat(list(values))
    if isinstance(first, str):
        return list(values)
    if isinstance(first, Mapping):
        return collate_fn(values)
    if isinstance(first, (list, tuple)):
        flat = [item for value in values for item in value]
        return (
            torch.tensor(flat) if flat and all(isinstance(item, Number) for item in flat) else flat
        )
    return default_collate(list(values))


def point_collate_fn(batch: Sequence[Mapping[str, Any]], mix_prob: float = 0) -> Any:
    """`collate_fn`, then with probability `mix_prob` merge neighbouring scans in pairs.

    Merging (Mix3D, Nekrasov et al. 2021, arXiv:2110.02210) only removes the first end row of each
    pair: rows keep their places, an odd last scan stays alone, `name` keeps one entry per original
    scan. Instance ids of the second scan follow those of the first. With `grid_size` in the batch,
    `grid_coord` is computed anew from `coord`, so that both scans share one grid; without it, each
    keeps its own cells. The gate is one draw of `random.random()` per call, also for `mix_prob=0`.

    Raises:
        InputError: for batches that cannot be merged: with images, several clouds per sample, or
            unequal grid sizes.
    """
    if len(batch) == 0 or not isinstance(batch[0], Mapping):
        raise TypeError("point_collate_fn joins a non-empty list of sample dictionaries")
    joined = collate_fn(batch)
    if random.random() < mix_prob and isinstance(joined, dict):
        _merge_pairs(joined, len(batch))
    return joined


def _merge_pairs(batch: dict[str, Any], scans: int) -> None:
    if "images" in batch or "img_num" in batch:
        raise InputError("scans with images cannot be merged in pairs; set mix_prob=0")
    if "offset" not in batch:
        raise InputError(
            "scans cannot be merged in pairs without `offset`; keep Collect's offset_keys_dict"
        )
    offset_keys = [key for key in batch if "offset" in key]
    for key in offset_keys:
        if len(batch[key]) != scans:
            raise InputError(
                f"{key}: {len(batch[key])} clouds from {scans} samples cannot be merged in pairs; "
                "set mix_prob=0"
            )
    if "instance" in batch:
        batch["instance"] = _renumber_instances(batch["instance"], batch["offset"])
    for key in offset_keys:
        batch[key] = torch.cat([batch[key][1:-1:2], batch[key][-1:]])
    size = batch.get("grid_size")
    if isinstance(size, Tensor):
        if (size != size[:1]).any():
            raise InputError(
                f"scans of different grid_size {size.tolist()} cannot be merged; set mix_prob=0"
            )
        if len(size) == scans:
            batch["grid_size"] = size[::2]
        if "grid_coord" in batch:
            cells = torch.floor(batch["coord"] / size[0]).to(torch.int64)
            bounds = [0, *batch["offset"].tolist()]
            batch["grid_coord"] = torch.cat(
                [cells[a:b] - cells[a:b].amin(dim=0) for a, b in pairwise(bounds)]
            )


def _renumber_instances(instance: Tensor, offset: Tensor) -> Tensor:
    """Move the ids of every second scan behind those of the first; -1 stays -1."""
    bounds = [0, *offset.tolist()]
    instance = instance.clone()
    for i in range(1, len(bounds) - 1, 2):
        first, second = instance[bounds[i - 1] : bounds[i]], instance[bounds[i] : bounds[i + 1]]
        if len(first) and len(second):
            second[second != -1] += max(int(first.max()), -1) + 1
    return instance
