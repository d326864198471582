"""A teacher's answers, computed once: one pass over the scans as the fixed transform shows them, kept on disk.

Training asks the same teacher about the same scans in every epoch. With a cache it answers once per scan, on a fixed
view (by default that of validation). Every augmented training view finds its answers by the rows that its points had in
the scan: a point gets the logits of its voxel in the fixed view, a pooled cell the mean over its points. So the teacher
no longer sees the student's augmentation; what it says about a point stays the same through all epochs.

A cache is a folder: `cache.json` says what made it, `<scan>.npz` holds one scan, in half precision:

    name            the scan's name
    check           checksum of the scan's coordinates and features
    inverse         (raw,) int32, voxel of each point of the scan
    <tap>.feat      (m, c) float16
    <tap>.rows      (voxels,) int32, row of each voxel at a pooled tap
    <tap>.level     how often the grid was halved at that tap
"""

import copy
import io
import json
import logging
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from pointcept_kd.host import DATASETS, InputError, comm
from pointcept_kd.host.batches import SeededBatches
from pointcept_kd.host.checkpoint import write_atomic
from pointcept_kd.host.hooks import progress
from pointcept_kd.host.loader import collate_fn
from pointcept_kd.host.point import offset2batch
from pointcept_kd.host.results import weights_fingerprint
from pointcept_kd.host.runtime import to_device
from pointcept_kd.ops.grid import CellKeys, unique_cells

from .taps import Activation

FORMAT = 1
_LARGEST = float(np.finfo(np.float16).max)
# What a training batch must carry so that its rows are found again, besides what it has.
_NEEDED = ("raw_index", "raw_check", "name")

logger = logging.getLogger("pointcept_kd")


def with_point_index(dataset: Mapping[str, Any], who: str = "teacher_cache") -> dict[str, Any]:
    """A dataset's config whose samples carry `raw_index`, `raw_check`, `raw_count` and `name`.

    `kd.PointIndex` goes to the front of the transforms, and the keys into `Collect`. Members of a concatenated dataset
    are changed likewise.

    Raises:
        InputError: for transforms without a `Collect`.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(dataset))
    if "datasets" in changed:
        changed["datasets"] = [with_point_index(entry, who) for entry in changed["datasets"]]
        return changed
    chain = [dict(entry) for entry in changed.get("transform") or []]
    collect = [entry for entry in chain if entry.get("type") in ("Collect", "kd.Collect")]
    if len(collect) != 1:
        raise InputError(
            f"{who} needs transforms with one Collect, {changed.get('type')} has {len(collect)}: "
            "its samples must carry the rows that their points had in the scan"
        )
    keys = collect[0]["keys"]
    keys = [keys] if isinstance(keys, str) else list(keys)
    collect[0]["keys"] = list(dict.fromkeys([*keys, *_NEEDED]))
    offsets = dict(collect[0].get("offset_keys_dict") or {"offset": "coord"})
    # Not called an offset: mixing scenes merges offsets, and the scans of a mixed scene are looked up one by one.
    collect[0]["offset_keys_dict"] = {**offsets, "raw_count": "raw_index"}
    if not any(entry.get("type") == "kd.PointIndex" for entry in chain):
        chain.insert(0, {"type": "kd.PointIndex"})
    changed["transform"] = chain
    return changed


def fixed_view(
    dataset: Mapping[str, Any], transform: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The config of the training scans under the fixed transform, each once, with `inverse`."""
    changed: dict[str, Any] = {**copy.deepcopy(dict(dataset)), "loop": 1}
    if "datasets" in changed:
        changed["datasets"] = [fixed_view(entry, transform) for entry in changed["datasets"]]
        return changed
    changed["transform"] = copy.deepcopy(list(transform))
    changed = with_point_index(changed)
    collect = next(e for e in changed["transform"] if e["type"] in ("Collect", "kd.Collect"))
    collect["keys"] = list(dict.fromkeys([*collect["keys"], "inverse", "grid_coord"]))
    return changed


def _plain(value: Any) -> Any:
    """Nested configs as JSON gives them back."""
    return json.loads(
        json.dumps(value, default=lambda v: dict(v) if isinstance(v, Mapping) else list(v))
    )


class TeacherCache:
    """The cached answers of one teacher.

    Args:
        folder: where the files are; made when the first scan is written.
        network: the teacher's network, for its digest.
        model: its config.
        taps: tap name to module path.
        transform: the fixed transform.

    Raises:
        InputError: for a folder that another teacher, transform or version of the format filled.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        network: nn.Module,
        model: Mapping[str, Any],
        taps: Mapping[str, str],
        transform: Sequence[Mapping[str, Any]],
    ) -> None:
        self.folder = Path(folder)
        self.taps = sorted(taps)
        self.fingerprint = {
            "format": FORMAT,
            "model": _plain(model),
            "weights": weights_fingerprint(network),
            "taps": _plain(dict(sorted(taps.items()))),
            "transform": _plain(list(transform)),
        }
        self._check_card()

    @property
    def _card(self) -> Path:
        return self.folder / "cache.json"

    def _check_card(self) -> None:
        if not self._card.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(
                    f"teacher_cache={self.folder} exists and is no cache (it has no cache.json): give an empty folder"
                )
            return
        try:
            found = json.loads(self._card.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._card} cannot be read ({error}): delete {self.folder}"
            ) from error
        found = found if isinstance(found, dict) else {}
        differ = [key for key, value in self.fingerprint.items() if found.get(key) != value]
        if differ:
            raise InputError(
                f"teacher_cache={self.folder} is stale: it was made with other {', '.join(differ)}; "
                "delete it or give another folder"
            )

    def path(self, name: str) -> Path:
        """The file of a scan; names that need escaping keep a checksum, so that two never share a file."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        if safe != name:
            safe = f"{safe}-{zlib.crc32(name.encode()):08x}"
        return self.folder / f"{safe}.npz"

    def write(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Store one scan, whole or not at all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"teacher_cache={self.folder} cannot be made ({error.strerror}): give another folder"
            ) from error
        if not self._card.is_file():
            text = json.dumps(self.fingerprint, indent=1).encode()
            write_atomic(self._card, lambda file: file.write(text))
        buffer = io.BytesIO()
        np.savez(buffer, name=np.array(name), **arrays)
        write_atomic(self.path(name), lambda file: file.write(buffer.getbuffer()))

    def read(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one scan.

        Raises:
            InputError: for a file that is missing, damaged or another scan's.
        """
        path = self.path(name)
        try:
            with np.load(path, allow_pickle=False) as opened:
                arrays = {key: opened[key] for key in opened.files}
            found = str(arrays.pop("name"))
        except FileNotFoundError as error:
            raise InputError(
                f"teacher_cache={self.folder} has no {path.name}: the scan was not in the fixed pass; start again"
            ) from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it, it is computed again"
            ) from error
        if found != name:
            raise InputError(f"{path} holds scan {found}, not {name}: delete {self.folder}")
        return arrays

    # -- filling -------------------------------------------------------------------------------

    def record(self, batch: Mapping[str, Any], outputs: Mapping[str, Activation]) -> dict[str, Any]:
        """What is stored of one scan.

        Args:
            batch: one scan in the fixed view, with `inverse` and `grid_coord`.
            outputs: the teacher's activations on it.

        Raises:
            InputError: for a tap whose rows are neither the voxels nor cells of a halved grid, and for values that
                half precision cannot hold.
        """
        grid = batch["grid_coord"]
        arrays: dict[str, Any] = {
            "check": np.int64(int(batch["raw_check"])),
            "inverse": batch["inverse"].cpu().numpy().astype(np.int32),
        }
        for tap in self.taps:
            seen = outputs[tap]
            if not bool((seen.feat.abs() <= _LARGEST).all()):
                raise InputError(
                    f"teacher_cache: tap {tap} has values beyond half precision (65504) or not finite: tap it after "
                    "its normalisation, or train without teacher_cache"
                )
            arrays[f"{tap}.feat"] = seen.feat.detach().cpu().numpy().astype(np.float16)
            found = locate(grid, seen)
            if found is None:
                raise InputError(
                    f"teacher_cache: the {len(seen.feat)} rows of tap {tap} are neither the {len(grid)} voxels nor "
                    "cells of the grid halved some times: drop the tap, or train without teacher_cache"
                )
            rows, level = found
            if rows is not None:
                arrays[f"{tap}.rows"] = rows.cpu().numpy().astype(np.int32)
                arrays[f"{tap}.level"] = np.int64(level)
        return arrays

    def fill(
        self, teacher: Any, dataset: Mapping[str, Any], device: torch.device, workers: int
    ) -> None:
        """Compute the scans that are not there yet; every process of a run takes its share.

        Args:
            teacher: the teacher, on its device.
            dataset: config of the scans in the fixed view, see `fixed_view`.
            workers: loading processes.

        Raises:
            InputError: for two scans of one name, or a scan that has changed since it was cached.
        """
        scans = DATASETS.build(dataset)
        names = [str(scans.get_data_name(i)) for i in range(len(scans))]
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(
                f"teacher_cache finds scans by name, and two are called {twice}: rename one"
            )
        missing = [i for i, name in enumerate(names) if not self.path(name).is_file()]
        own = missing[comm.get_rank() :: comm.get_world_size()]
        logger.info(
            f"Teacher cache {self.folder}: {len(names) - len(missing)} scans are there, {len(missing)} to compute"
        )
        # Every process has looked before one of them writes.
        comm.synchronize()
        start = time.perf_counter()
        loader = torch.utils.data.DataLoader(
            # Seeded by name: the fixed view of a scan is the same in every run.
            SeededBatches(scans, collate_fn, 0),
            batch_sampler=[[(0, zlib.crc32(names[i].encode()), i)] for i in own],
            collate_fn=_as_is,
            num_workers=min(workers, len(own)),
        )
        for batch in progress(loader, len(own), "Teacher cache"):
            _need_view(batch)
            batch = to_device(batch, device)
            with torch.no_grad():
                outputs = teacher.run(batch)
            self.write(batch["name"][0], self.record(batch, outputs))
        comm.synchronize()
        if missing:
            logger.info(f"Teacher cache: filled in {time.perf_counter() - start:.1f} s")

    # -- reading -------------------------------------------------------------------------------

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Activation]:
        """The teacher's activations for the rows of a training batch.

        Taps at the voxels come row by row; pooled taps on the cells that the batch's grid has at their level, each the
        mean over its points.

        Raises:
            InputError: for a batch without `kd.PointIndex`'s keys, or a scan that is not the cached one.
        """
        lacking = [key for key in (*_NEEDED, "raw_count") if key not in batch]
        if lacking:
            raise InputError(
                f"teacher_cache: the batch has no {', '.join(lacking)}; put kd.PointIndex first into the transforms "
                "and collect its keys, as tools/train.py does by itself"
            )
        device, grid = batch["grid_coord"].device, batch["grid_coord"]
        of_scan = offset2batch(batch["offset"])
        checks = [int(value) for value in batch["raw_check"].tolist()]
        scans = []
        for name, check, rows in zip(batch["name"], checks, self._split(batch)):
            arrays = self.read(name)
            if int(arrays["check"]) != check:
                raise InputError(
                    f"teacher_cache={self.folder} is stale: scan {name} has changed since it was cached; delete "
                    f"{self.path(name).name} there"
                )
            scans.append((arrays, arrays["inverse"][rows]))
        outputs = {}
        for tap in self.taps:
            if f"{tap}.rows" not in scans[0][0]:
                feat = np.concatenate([arrays[f"{tap}.feat"][voxel] for arrays, voxel in scans])
                outputs[tap] = Activation(torch.from_numpy(feat).to(device).float())
                continue
            level = int(scans[0][0][f"{tap}.level"])
            tables = [arrays[f"{tap}.feat"] for arrays, _ in scans]
            starts = accumulate((len(table) for table in tables), initial=0)
            points = [
                arrays[f"{tap}.rows"][voxel].astype(np.int64) + start
                for (arrays, voxel), start in zip(scans, starts)
            ]
            outputs[tap] = pool(
                torch.from_numpy(np.concatenate(tables)).to(device).float(),
                torch.from_numpy(np.concatenate(points)).to(device),
                of_scan,
                grid >> level,
            )
        return outputs

    @staticmethod
    def _split(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Rows in the scan of the points of each scan; mixed scenes hold several scans each."""
        index, start = batch["raw_index"].cpu().numpy(), 0
        for count in batch["raw_count"].tolist():
            yield index[start : start + count]
            start += count


def locate(grid: Int[Tensor, "n 3"], seen: Activation) -> tuple[Tensor | None, int] | None:
    """How the rows of an activation follow from the voxels of one scan.

    Returns:
        (None, 0) where they are the voxels in their order; (row of each voxel, level) where they are the cells of
        `grid >> level`; None otherwise.
    """
    if seen.cells is None:
        return (None, 0) if len(seen.feat) == len(grid) else None
    if len(seen.feat) == len(grid) and torch.equal(seen.cells, grid):
        return None, 0
    for level in range(16):
        cells = grid >> level
        both = torch.cat([cells, seen.cells])
        zeros = both.new_zeros(len(both))
        keys = CellKeys.fit(zeros, both).pack(zeros, both)
        unique, _, counts = unique_cells(keys[len(grid) :])
        if bool((counts > 1).any()):
            return None
        of_voxel = keys[: len(grid)]
        place = torch.searchsorted(unique, of_voxel).clamp_(max=len(unique) - 1)
        if bool((unique[place] == of_voxel).all()) and len(torch.unique(place)) == len(unique):
            return torch.argsort(keys[len(grid) :])[place], level
    return None


def pool(table: Tensor, rows: Tensor, batch: Tensor, cells: Tensor) -> Activation:
    """Mean of `table[rows]` over the points of each cell, without making that array.

    Args:
        table: (m, c) features.
        rows: (n,) row of the table for each point.
        batch, cells: (n,), (n, 3) where each point lies.

    Returns:
        features, scan and cell of every occupied cell.
    """
    keys = CellKeys.fit(batch, cells)
    unique, cell_of, counts = unique_cells(keys.pack(batch, cells))
    # A cell's points share few rows of the table: add each once, with its number of points.
    pairs, _, times = unique_cells(cell_of * len(table) + rows)
    cell, row = pairs // len(table), pairs % len(table)
    share = times.to(table.dtype) / counts[cell].to(table.dtype)
    feat = table.new_zeros(len(unique), table.shape[1])
    feat.index_add_(0, cell, table[row] * share[:, None])
    of_scan, where = keys.unpack(unique)
    return Activation(feat, of_scan, where)


def _as_is(batch: Any) -> Any:
    return batch


def _need_view(batch: Mapping[str, Any]) -> None:
    for key in ("inverse", "grid_coord", *_NEEDED):
        if key not in batch:
            raise InputError(
                f"teacher_cache: the fixed transform makes no {key}; its GridSample needs return_inverse=True and "
                "return_grid_coord=True, and it needs a Collect"
            )
    if len(batch["inverse"]) and int(batch["inverse"].max()) >= len(batch["grid_coord"]):
        raise InputError(
            "teacher_cache: the fixed transform drops points after its GridSample; it must keep them"
        )
