"""Several forwards per scan: adding their votes at the points, and augmented views of a validation pipeline.

Fragments (the host's protocol) come from the data set's `test_cfg`. Views need nothing but the validation transforms:
an augmentation is put before the GridSample that makes `inverse`, so that every raw point has one vote per view. Where
there is no GridSample, as for networks that cut cells themselves, a view keeps every point and needs no `inverse`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import InputError
from .loader import Compose, ConcatDataset, DefaultDataset, collate_fn
from .runtime import to_device

Chain = list[dict[str, Any]]  # transform configs


def _turn(quarters: int) -> Chain:
    turn = dict(type="RandomRotateTargetAngle", angle=[quarters / 2], center=[0, 0, 0], p=1)
    return [turn] if quarters else []


def _scales(mirrored: bool) -> list[Chain]:
    flip = [dict(type="RandomFlip", p=1)] if mirrored else []
    return [[dict(type="RandomScale", scale=[s, s]), *flip] for s in (0.9, 0.95, 1, 1.05, 1.1)]


# `turns` is what the host's voting does on SemanticKITTI and Waymo, `scales_flips` what it does on nuScenes.
TTA_SETS: dict[str, list[Chain]] = {
    "turns": [_turn(i) for i in range(4)],
    "turns_flips": [
        [*_turn(i), *flip] for flip in ([], [dict(type="kd.Mirror", axis="y")]) for i in range(4)
    ],
    "scales_flips": _scales(False) + _scales(True),
    # What the cylindrical and the polar networks were published with, every view from the scan as it is.
    "flips": [
        [],
        [dict(type="kd.Mirror", axis="x")],
        [dict(type="kd.Mirror", axis="y")],
        [dict(type="kd.Mirror", axis="x"), dict(type="kd.Mirror", axis="y")],
    ],
}
DEFAULT_TTA = "turns_flips"


def tta_chains(asked: Any) -> list[Chain]:
    """The augmentation chains that `test.tta` means: a name of `TTA_SETS`, or a list of lists of transforms.

    Raises:
        InputError: for anything else.
    """
    asked = DEFAULT_TTA if asked is None else asked
    if isinstance(asked, str) and asked in TTA_SETS:
        return copy.deepcopy(TTA_SETS[asked])
    listed = isinstance(asked, (list, tuple)) and len(asked) > 0
    if not listed or not all(
        isinstance(chain, (list, tuple)) and all(isinstance(step, Mapping) for step in chain)
        for chain in asked
    ):
        raise InputError(
            f"test.tta={asked!r}: use one of {', '.join(TTA_SETS)}, or a list with one list of transforms per pass, "
            "such as [[], [dict(type='RandomFlip', p=1)]]"
        )
    return [[dict(step) for step in chain] for chain in asked]


def leaves(dataset: Any) -> list[Any]:
    """The plain data sets in a concatenation, in order; the data set itself where it is none."""
    if isinstance(dataset, ConcatDataset):
        return [leaf for member in dataset.datasets for leaf in leaves(member)]
    return [dataset]


def leaf_of(dataset: Any, index: int) -> tuple[Any, int]:
    """The plain data set that holds a sample, and the sample's position there."""
    while isinstance(dataset, ConcatDataset):
        dataset, index = dataset._locate(index)
    return dataset, index


def is_voting(entry: Mapping[str, Any] | None) -> bool:
    """Whether the config of a data set, or of a member of a concatenation, asks for fragments."""
    if not isinstance(entry, Mapping):
        return False
    return bool(entry.get("test_mode")) or any(is_voting(e) for e in entry.get("datasets") or ())


class AugmentedViews(Dataset):
    """The scans of a data set, each as several augmented samples of its own transforms.

    Args:
        dataset: a data set with `load` and `transform` (`DefaultDataset`), or a concatenation of such.
        chains: transforms to put before the voxelisation, one list per view.

    An item has `views` (samples with `inverse`, without labels), `target` (raw labels, int64), `name`.

    Raises:
        InputError: for transforms that give no way back to the raw points.
    """

    def __init__(self, dataset: Any, chains: Sequence[Chain]) -> None:
        self.dataset = dataset
        self._leaves = leaves(dataset)
        self._views = [_view_pipelines(leaf, chains) for leaf in self._leaves]

    def get_data_name(self, idx: int) -> str:
        """The scan's name."""
        return self.dataset.get_data_name(idx)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        leaf, position = leaf_of(self.dataset, idx % len(self))
        # By position, not by id(): a loading process has copies of all of them.
        pipelines, whole = next(p for known, p in zip(self._leaves, self._views) if known is leaf)
        raw = leaf.load(position)
        name, points = raw.get("name", f"{idx:06d}"), len(raw["coord"])
        target, views = raw["segment"], []
        for pipeline in pipelines:
            view = pipeline(copy.deepcopy(raw))
            if whole:
                if len(view["coord"]) != points:
                    raise InputError(
                        f"test.mode=tta, scan {name}: the transforms keep {len(view['coord'])} of {points} raw points; "
                        "take out those that drop points, or use test.mode=single"
                    )
                view["inverse"] = torch.arange(points)
            elif "inverse" not in view:
                raise InputError(f"test.mode=tta, scan {name}: add inverse to the keys of Collect")
            if len(view["inverse"]) != points:
                raise InputError(
                    f"test.mode=tta, scan {name}: GridSample saw {len(view['inverse'])} of {points} raw points; take "
                    "out the transforms before it that drop points, or use test.mode=single"
                )
            target = view.get("origin_segment", target)
            dropped = ("segment", "origin_segment", "name")
            views.append({key: value for key, value in view.items() if key not in dropped})
        target = torch.as_tensor(np.asarray(target)).long().reshape(-1)
        return {"views": views, "target": target, "name": name}


def _view_pipelines(dataset: Any, chains: Sequence[Chain]) -> tuple[list[Compose], bool]:
    """One pipeline per view, and whether they keep the raw points as they are: no GridSample."""
    kind = type(dataset).__name__
    steps = getattr(dataset, "transform", None)
    if not isinstance(dataset, DefaultDataset) or not isinstance(steps, Compose):
        raise InputError(
            f"test.mode=tta needs a data set that reads raw scans by `load` and has a list of transforms; {kind} has "
            "not: derive it from DefaultDataset, or use another mode"
        )
    if type(dataset).prepare_train_data is not DefaultDataset.prepare_train_data:
        raise InputError(
            f"test.mode=tta: {kind} prepares its samples in its own way (prepare_train_data), which augmented views "
            "would pass by; use another mode"
        )
    voxels = [i for i, t in enumerate(steps.transforms) if hasattr(t, "return_inverse")]
    cfg = [dict(step) for step in steps.cfg]
    if not voxels:
        ends = (i for i, step in enumerate(cfg) if step["type"] in ("ToTensor", "Collect"))
        at = next(ends, len(cfg))
        return [Compose([*cfg[:at], *chain, *cfg[at:]]) for chain in chains], True
    if not any(steps.transforms[i].return_inverse for i in voxels):
        raise InputError(
            f"test.mode=tta: the transforms of {kind} have no GridSample with return_inverse=True, so predictions have "
            "no way back to the raw points; add it, and collect inverse"
        )
    if len(voxels) > 1:
        raise InputError(
            f"test.mode=tta: the transforms of {kind} have {len(voxels)} GridSamples, and `inverse` leads back through "
            "one only; keep one"
        )
    if getattr(steps.transforms[voxels[0]], "mode", "train") != "train":
        raise InputError(
            f"test.mode=tta: GridSample of {kind} has mode='test', which gives fragments; use mode='train' in data.val"
        )
    at = voxels[0]
    return [Compose([*cfg[:at], *chain, *cfg[at:]]) for chain in chains], False


class Votes:
    """Class probabilities added up over the rows of one scan.

    Args:
        rows: points of the scan.
        classes: of the network.
        device: where the sums are kept, in float32.
    """

    def __init__(self, rows: int, classes: int, device: torch.device) -> None:
        self.scores = torch.zeros(rows, classes, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)

    def add(self, index: Tensor, chances: Tensor) -> None:
        """Add `chances` (m, K) at the rows `index` (m,) int64."""
        self.scores.index_add_(0, index, chances)
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def add_all(self, chances: Tensor) -> None:
        """Add one vote (rows, K) for every row."""
        self.scores += chances
        self.counts += 1


def _forwards(
    samples: Sequence[Mapping[str, Any]],
    network: Callable[[Any], Tensor],
    device: torch.device,
    batch_size: int,
    withheld: str,
) -> Iterator[tuple[list[Mapping[str, Any]], Tensor, dict[str, Any]]]:
    """Samples, class probabilities of their joined rows and the batch, `batch_size` samples at a time."""
    for start in range(0, len(samples), batch_size):
        group = list(samples[start : start + batch_size])
        batch = to_device(collate_fn(group), device)
        seen = {key: value for key, value in batch.items() if key != withheld}
        yield group, network(seen).float().softmax(1), batch


def vote_fragments(
    sample: Mapping[str, Any],
    network: Callable[[Any], Tensor],
    classes: int,
    device: torch.device,
    batch_size: int,
) -> Votes:
    """Votes of all fragments of a scan, at the rows of the scan that they were cut from.

    Args:
        sample: `segment` (n,), `fragment_list` of samples with `index` (m,), `name`.
        network: batch to logits (rows, K).
        batch_size: fragments in one forward.

    Raises:
        InputError: for a fragment without a usable `index`.
    """
    rows, name = len(sample["segment"]), sample["name"]
    votes = Votes(rows, classes, device)
    for number, fragment in enumerate(sample["fragment_list"]):
        index = fragment.get("index")
        if index is None:
            raise InputError(
                f"scan {name}: fragment {number} has no `index`; add index to Collect in test_cfg.post_transform"
            )
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= rows):
            raise InputError(
                f"scan {name}: fragment {number} points to row {int(index.max())} of {rows}; the transforms of the "
                "test set must not drop points after `segment` was taken"
            )
    for group, chances, batch in _forwards(
        sample["fragment_list"], network, device, batch_size, "index"
    ):
        # `index` counts rows of the scan, not of the batch, and so needs no shift. One fragment holds a row once, so
        # adding fragment by fragment gives the same sums on every run, also on a GPU.
        sizes = [len(fragment["index"]) for fragment in group]
        for index, part in zip(batch["index"].split(sizes), chances.split(sizes)):
            votes.add(index, part)
    return votes


def vote_views(
    sample: Mapping[str, Any],
    network: Callable[[Any], Tensor],
    classes: int,
    device: torch.device,
    batch_size: int,
) -> Votes:
    """One vote of every view for every raw point, through the view's `inverse`; see `vote_fragments`."""
    points = len(sample["target"])
    votes = Votes(points, classes, device)
    for _, chances, batch in _forwards(sample["views"], network, device, batch_size, "inverse"):
        for inverse in batch["inverse"].split(points):
            votes.add_all(chances[inverse])
    return votes
