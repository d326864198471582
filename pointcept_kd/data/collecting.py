"""Keys and values: copying, renaming classes, and the way from arrays to the tensors of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pointcept_kd.host import TRANSFORMS, InputError, kd, stand_in

from .arrays import INDEX_VALID_KEYS, Data, coord_of, lookup, need


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Copy")
class Copy:
    """Copy values; `keys_dict` maps the key to read to the key to write."""

    def __init__(self, keys_dict: Mapping[str, str] | None = None) -> None:
        default = {"coord": "origin_coord", "segment": "origin_segment"}
        self.keys_dict = default if keys_dict is None else keys_dict

    def __call__(self, data: Data) -> Data:
        for source, target in self.keys_dict.items():
            value = lookup(data, source, "Copy")
            is_tensor = isinstance(value, torch.Tensor)
            data[target] = value.detach().clone() if is_tensor else copy.deepcopy(value)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Update")
class Update:
    """Set literal values, for instance `index_valid_keys` or `grid_size`."""

    def __init__(self, keys_dict: Mapping[str, Any] | None = None) -> None:
        self.keys_dict = {} if keys_dict is None else keys_dict

    def __call__(self, data: Data) -> Data:
        data.update(copy.deepcopy(dict(self.keys_dict)))
        return data


@kd.TRANSFORMS.register_module()
class MapLabels:
    """Give classes other numbers, for data sets or networks of another class list.

    Args:
        mapping: old class to new class; a list names the new class of 0, 1, 2, ...
        default: new class of all labels that `mapping` does not name; None refuses them.
        keys: the label arrays to change. Put the transform first, so that later copies agree.

    Raises:
        InputError: for a mapping that is none, a missing or fractional label array, and with
            `default=None` for a label that has no new class.
    """

    WIDEST = 1 << 24

    def __init__(
        self,
        mapping: Mapping[int, int] | Sequence[int],
        default: int | None = -1,
        keys: str | Sequence[str] = ("segment",),
    ) -> None:
        pairs = dict(mapping) if isinstance(mapping, Mapping) else dict(enumerate(mapping))
        numbers = [*pairs, *pairs.values(), *([] if default is None else [default])]
        need(
            len(pairs) > 0
            and all(isinstance(n, (int, np.integer)) and abs(int(n)) < 2**31 for n in numbers),
            f"MapLabels: mapping and default are whole class numbers, got {mapping!r}, {default!r}",
        )
        self.low = min(pairs)
        span = max(pairs) - self.low + 1
        need(span <= self.WIDEST, f"MapLabels: the old classes span {span} numbers, too many")
        self.default = default
        self.keys = [keys] if isinstance(keys, str) else list(keys)
        # The last entry stands for every label outside the span.
        self.table = np.full(span + 1, 0 if default is None else default, dtype=np.int32)
        self.named = np.zeros(span + 1, dtype=bool)
        rows = np.array(list(pairs)) - self.low
        self.table[rows] = list(pairs.values())
        self.named[rows] = True

    def __call__(self, data: Data) -> Data:
        for key in self.keys:
            labels = lookup(data, key, "MapLabels")
            need(
                isinstance(labels, np.ndarray) and labels.dtype.kind in "iu",
                f"MapLabels: {key} holds no whole numbers; put it before ToTensor",
            )
            rows = labels.astype(np.int64) - self.low
            outside = len(self.table) - 1
            rows[(rows < 0) | (rows > outside)] = outside
            if self.default is None and not self.named[rows].all():
                lost = np.flatnonzero(~self.named[rows].reshape(-1))
                raise InputError(
                    f"MapLabels: class {labels.reshape(-1)[lost[0]]} of {key} in sample "
                    f"{data.get('name', '?')}, row {lost[0]}, has no new class ({len(lost)} such "
                    "points); add it to mapping or set default"
                )
            data[key] = self.table[rows]
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ToTensor")
class ToTensor:
    """Arrays to tensors, through dicts and lists: integers to int64, floats to float32, bool as it is.

    Strings stay; a python (or numpy) number becomes a tensor of one element.

    Raises:
        InputError: for a value of another type, with its key.
    """

    def __call__(self, data: Any) -> Any:
        return self.convert(data, "value")

    def convert(self, value: Any, key: str) -> Any:
        """`value` as a tensor; `key` is for the message."""
        if isinstance(value, (torch.Tensor, str)):
            return value
        if isinstance(value, (bool, int)):
            return torch.tensor([int(value)], dtype=torch.int64)
        if isinstance(value, float):
            return torch.tensor([value], dtype=torch.float32)
        if isinstance(value, np.generic):
            value = np.asarray([value])
        if isinstance(value, np.ndarray):
            for kind, dtype in (("b", np.bool_), ("iu", np.int64), ("f", np.float32)):
                if value.dtype.kind in kind:
                    array = np.ascontiguousarray(value, dtype=dtype)
                    return torch.from_numpy(array if array.flags.writeable else array.copy())
        if isinstance(value, Mapping):
            return {name: self.convert(item, name) for name, item in value.items()}
        if isinstance(value, Sequence):
            return [self.convert(item, key) for item in value]
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(
            f"ToTensor: {key} is a {kind}, which cannot become a tensor; drop it before"
        )


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Collect")
class Collect:
    """Build the dictionary that goes into a batch.

    Args:
        keys: keys to take over.
        offset_keys_dict: name of an offset to the key whose rows it counts; the default is offset:
            coord.
        **groups: `NAME_keys=(...)` concatenates those keys (n, c_i) as float into NAME (n, sum
            c_i), in this order; `feat_keys` makes `feat`.

    Raises:
        InputError: for a missing key, or per-point arrays of different length.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        offset_keys_dict: Mapping[str, str] | None = None,
        **groups: Sequence[str],
    ) -> None:
        self.keys = [keys] if isinstance(keys, str) else list(keys)
        self.offset_keys = {"offset": "coord"} if offset_keys_dict is None else offset_keys_dict
        for name, members in groups.items():
            need(
                name.endswith("_keys") and isinstance(members, (list, tuple)) and len(members) > 0,
                f"Collect: {name}={members!r}; expected NAME_keys=(key, ...), for instance feat_keys",
            )
        self.groups = {
            name.removesuffix("_keys"): list(members) for name, members in groups.items()
        }

    def __call__(self, data: Data) -> Data:
        result = {key: lookup(data, key, "Collect") for key in self.keys}
        self._check_rows(data)
        for name, key in self.offset_keys.items():
            result[name] = torch.tensor([len(lookup(data, key, "Collect"))])
        for name, members in self.groups.items():
            columns = [lookup(data, key, "Collect") for key in members]
            for key, column in zip(members, columns):
                fits = column.ndim == 2 and len(column) == len(columns[0])
                need(
                    fits,
                    f"Collect: {name} joins (n, c) arrays, {key} has shape {tuple(column.shape)} beside "
                    f"{len(columns[0])} rows of {members[0]}",
                )
            result[name] = torch.cat([column.float() for column in columns], dim=1)
        return result

    def _check_rows(self, data: Data) -> None:
        if "coord" not in data:
            return
        for key in set(self.keys) & set(data.get("index_valid_keys", INDEX_VALID_KEYS)):
            if len(data[key]) != len(data["coord"]):
                raise InputError(
                    f"Collect: {key} of sample {data.get('name', '?')} has {len(data[key])} rows, "
                    f"coord {len(data['coord'])}; a transform dropped points without knowing {key}: "
                    "set index_valid_keys with Update at the start"
                )


@stand_in(TRANSFORMS, kd.TRANSFORMS, "InstanceParser")
class InstanceParser:
    """Number the instances from 0 and describe each of them.

    Writes `instance` (n,), `instance_centroid` (n, 3), the mean of each point's instance, and
    `bbox` (instances, 8): centre, size, heading 0, class. Points of ignored classes get
    `instance_ignore_index`; classes are counted without the ignored ones below them.
    """

    def __init__(
        self,
        segment_ignore_index: Sequence[int] = (-1, 0, 1),
        instance_ignore_index: int = -1,
    ) -> None:
        self.segment_ignore_index = list(segment_ignore_index)
        self.instance_ignore_index = instance_ignore_index

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "InstanceParser")
        segment = lookup(data, "segment", "InstanceParser").reshape(-1)
        instance = np.array(lookup(data, "instance", "InstanceParser").reshape(-1))
        kept = ~np.isin(segment, self.segment_ignore_index)
        instance[~kept] = self.instance_ignore_index
        _, number, counts = np.unique(instance[kept], return_inverse=True, return_counts=True)
        instance[kept] = number
        centroid = np.full((len(coord), 3), self.instance_ignore_index, dtype=np.float64)
        bbox = np.zeros((len(counts), 8))
        if len(counts):
            rows = np.flatnonzero(kept)
            order = rows[np.argsort(number, kind="stable")]
            starts = np.cumsum(counts) - counts
            points = coord[order]
            low = np.minimum.reduceat(points, starts)
            high = np.maximum.reduceat(points, starts)
            # In double: a sum of thousands of float32 metres loses millimetres.
            mean = np.add.reduceat(points.astype(np.float64), starts) / counts[:, None]
            centroid[rows] = mean[number]
            classes = segment[order[starts]]
            vacant = np.array([index for index in self.segment_ignore_index if index >= 0])
            bbox[:, :3] = (low + high) / 2
            bbox[:, 3:6] = high - low
            bbox[:, 7] = classes - (classes[:, None] > vacant[None]).sum(axis=1)
        data.update(instance=instance, instance_centroid=centroid, bbox=bbox)
        return data
