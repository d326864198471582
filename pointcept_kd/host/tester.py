"""Test a segmentation network by one of three protocols, which give different mIoUs; log and metrics.json say which.

| mode | passes over a scan | where labels are compared |
|---|---|---|
| `single` | one, the validation pipeline: the protocol of the validation mIoU | raw points, through `inverse` |
| `fragments` | the host's: augmented copies (`test_cfg`), each cut into fragments that cover all points | the same |
| `tta` | one per entry of `test.tta`, the validation pipeline on an augmented copy | the same |

The class probabilities of all passes are added at each point.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import DATASETS, MODELS, TESTERS, comm, kd, pointcept_class, stand_in
from .batches import EpochBatchSampler, build_loader, first
from .checkpoint import (
    check_grids,
    load_checkpoint,
    load_into,
    student_weights,
    unwrap,
    write_atomic,
)
from .config import default_setup
from .errors import InputError
from .hooks import compare, progress
from .loader import collate_fn
from .log import get_root_logger
from .metrics import Scores, class_names, confusion, summary
from .results import Predictions, Submission, file_stems, fingerprint, weights_fingerprint
from .runtime import complete, device_of, require, to_device
from .voting import (
    AugmentedViews,
    Votes,
    is_voting,
    leaf_of,
    leaves,
    tta_chains,
    vote_fragments,
    vote_views,
)

MODES = ("single", "fragments", "tta")


def plain_model(model_cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the network to test: a distiller's student, else the model itself."""
    student = model_cfg.get("student")
    return student.get("model", student) if isinstance(student, Mapping) else model_cfg


@dataclass(frozen=True)
class Scan:
    """A scan of the test set: its name, its name in files, and the data set that it is from."""

    name: str
    stem: str
    dataset: Any


@dataclass(frozen=True)
class Prediction:
    """One scan's classes (n,) int64 and labels (n,), where they are compared, and the votes per row."""

    scan: Scan
    labels: NDArray
    target: Tensor
    compared: str
    votes: list[int]  # fewest and most
    reused: bool = False


def _span(values: list[int]) -> list[int]:
    """The smallest and the largest; nothing of nothing."""
    return [min(values), max(values)] if values else []


@stand_in(TESTERS, kd.TESTERS, "SemSegTester")
class SemSegTester(pointcept_class(TESTERS, "SemSegTester")):
    """Predict, score and write the predictions of a split.

    Writes `result/{name}_pred.npy` (int64, one class per raw point), `result/metrics.json` and, for data sets with
    `write_submission(name, pred, folder)`, `result/submit` below `save_path`; see `results.py`.

    Args:
        cfg: the run's config.
        model: the network; None builds it from `cfg.model` (of a distiller, the student) and loads `cfg.weight`.
        test_loader: batches to test on instead of those of the config.
        verbose: one line per scan.
        mode: "single", "fragments" or "tta"; None takes fragments where `data.test` is in test mode, else single.
        tta: for mode tta, a name of `voting.TTA_SETS` or a list with one list of transforms per pass.
        reuse: take over predictions that an earlier test with the same weights and settings left; False predicts all.
        save_predictions: write `{name}_pred.npy`.
        save_probabilities: also write `{name}_prob.npy`, (n, K) float16.
        save_submission: None writes one where the data set can, True insists on it, False writes none.

    `batch_size_test` is the number of scans (single), fragments or views in one forward, over all processes.

    Raises:
        InputError: for a bad mode, weight, dataset or output folder.
    """

    def __init__(
        self,
        cfg: Any,
        model: nn.Module | None = None,
        test_loader: Any = None,
        verbose: bool = False,
        mode: str | None = None,
        tta: Any = None,
        reuse: bool = False,
        save_predictions: bool = True,
        save_probabilities: bool = False,
        save_submission: bool | None = None,
    ) -> None:
        self.cfg = cfg
        if model is None:
            if cfg.get("seed") is None:
                cfg["seed"] = 0  # a drawn one would make every test another one
            complete(cfg)
            default_setup(cfg)
        require(cfg, "model", "data.num_classes", "save_path")
        if reuse and test_loader is not None:
            raise InputError("test.reuse=True works with the data of the config, not with a loader")
        if save_probabilities and not save_predictions:
            raise InputError("test.save_probabilities=True needs test.save_predictions=True")
        self.logger, self.device, self.verbose = get_root_logger(), device_of(cfg), verbose
        data = cfg["data"]
        self.classes, self.ignore = data["num_classes"], data.get("ignore_index", -1)
        self.names = class_names(data)
        self.reuse, self.save_submission = reuse, save_submission
        self.save_predictions, self.save_probabilities = save_predictions, save_probabilities
        self.mode, self.entry, self.source = self._choose(mode)
        if tta is not None and self.mode != "tta":
            raise InputError(f"test.tta is for test.mode=tta, the mode is {self.mode}")
        self.chains = tta_chains(tta) if self.mode == "tta" else []
        self.batch_size = cfg.get("batch_size_test_per_gpu") or 1
        self.model = self.build_model() if model is None else unwrap(model)
        self._own_loader = test_loader is None
        self.test_loader = test_loader or self.build_test_loader(self.entry)
        self._stems = self._all_stems()

    def _choose(self, mode: str | None) -> tuple[str, Mapping[str, Any], str]:
        """The mode, the dataset entry that fits it, and in words where it is from."""
        data = self.cfg["data"]
        test, val = data.get("test"), data.get("val")
        voting = is_voting(test)
        mode = mode or ("fragments" if voting else "single")
        if mode not in MODES:
            raise InputError(f"test.mode={mode!r}: use one of {', '.join(MODES)}")
        if mode == "fragments":
            if not voting:
                raise InputError(
                    "test.mode=fragments needs data.test with test_mode=True and test_cfg: add them, or use "
                    "mode=single or mode=tta"
                )
            entry, source = test, "data.test"
        elif test is not None and not voting:
            entry, source = test, "data.test"
        elif val is None:
            raise InputError(
                f"test.mode={mode} needs data.test without test_mode, or data.val: add one"
            )
        elif test is not None and "transform" in val and test.get("type") == val.get("type"):
            # The scans that the config wants tested, by the pipeline of validation.
            kept = {k: v for k, v in test.items() if k != "test_cfg"}
            entry = {**kept, "test_mode": False, "transform": val["transform"]}
            source = "data.test through the transforms of data.val"
        else:
            entry, source = val, "data.val"
        split = entry.get("split")
        return mode, entry, source + (f", split {split}" if split is not None else "")

    def build_model(self) -> nn.Module:
        """The plain network with the weights of `cfg.weight`, which must match it exactly."""
        weight = self.cfg.get("weight")
        if weight is None:
            raise InputError(
                "testing needs a checkpoint: give --options weight=SAVE_PATH/model/model_best.pth"
            )
        checkpoint = load_checkpoint(weight)
        model = MODELS.build(plain_model(self.cfg["model"]))
        check_grids(model, checkpoint, weight)
        report = load_into(
            model, student_weights(checkpoint["state_dict"]), strict=True, source=weight
        )
        self.logger.info(f"Weight {weight} of epoch {checkpoint.get('epoch', 'unknown')}: {report}")
        return model.to(self.device)

    def build_test_loader(self, entry: Mapping[str, Any]) -> Any:
        """Batches in order, each scan once; voting takes one scan at a time."""
        entry = {**entry, "loop": 1} if "loop" in entry else entry
        dataset = DATASETS.build(entry)
        if len(dataset) == 0:
            raise InputError("the test set has no samples: check its data_root and split")
        if self.mode == "tta":
            dataset = AugmentedViews(dataset, self.chains)
        voting = self.mode != "single"
        sampler = EpochBatchSampler(
            len(dataset),
            1 if voting else self.batch_size,
            shuffle=False,
            seed=self.cfg["seed"],
            rank=comm.get_rank(),
            world=comm.get_world_size(),
            even=False,
        )
        workers = self.cfg.get("num_worker_per_gpu", 0)
        return build_loader(
            dataset, sampler, self.cfg["seed"], workers, first if voting else collate_fn
        )

    @torch.no_grad()
    def test(self) -> dict[str, Any]:
        """Run over the split.

        Returns:
            `mIoU`, `mIoU_present`, `mAcc`, `allAcc`, `classes` by name, `points`, `scans`, `mode`, `protocol`, `data`,
            `votes_per_point` (fewest and most), `reused`, `submission` (its folder or None), `weight`.
        """
        folder = Path(self.cfg["save_path"]) / "result"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"save_path={self.cfg['save_path']}: cannot create {folder} ({error.strerror}); choose another"
            ) from error
        self.logger.info(f">>>>>>>>>>>>>>>> Start Testing (mode {self.mode}) >>>>>>>>>>>>>>>>")
        self.model.eval()
        kept = self._predictions_in(folder)
        submission = Submission(folder, leaves(self._dataset()), self.save_submission)
        if comm.is_main_process():
            kept.prepare()
            submission.prepare()
            # An interrupted test must not leave the scores of another one beside its predictions.
            (folder / "metrics.json").unlink(missing_ok=True)
        kept.share()

        matrices: dict[str, Tensor] = {}
        votes: list[int] = []
        compared, taken, start = "", 0, time.perf_counter()
        try:
            for found in self._predict(kept):
                scan, rows, compared = found.scan, found.labels, found.compared
                pred = torch.from_numpy(rows).to(found.target.device)
                matrices[scan.stem] = confusion(pred, found.target, self.classes, self.ignore).cpu()
                votes, taken = _span(votes + found.votes), taken + found.reused
                submission.add(scan.dataset, scan.name, rows)
                if self.verbose:
                    spent, start = time.perf_counter() - start, time.perf_counter()
                    scores = summary(matrices[scan.stem])
                    self.logger.info(
                        f"Test: {scan.name} [{len(matrices)}] {len(rows)} points {spent:.2f} s, "
                        + (f"accuracy {scores.all_acc:.4f}" if scores.points else "no labels")
                    )
        finally:
            kept.flush()
        kept.finish()
        submitted = submission.finish()

        # By name: a scan that two processes saw counts once.
        everywhere: dict[str, Tensor] = {}
        parts = comm.all_gather((matrices, compared, votes, taken))
        for part in parts:
            everywhere.update(part[0])
            compared = compared or part[1]
        total = sum(everywhere.values(), torch.zeros(self.classes, self.classes, dtype=torch.int64))
        facts = {
            "scans": len(everywhere),
            "mode": self.mode,
            "data": self.source if self._own_loader else "a given loader",
            "votes_per_point": _span([v for part in parts for v in part[2]]),
            "reused": sum(part[3] for part in parts),
            "submission": submitted,
            "weight": self.cfg.get("weight"),
        }
        return self._report(summary(total), facts, compared, folder)

    # ------------------------------------------------------------------------------- what is tested

    def _dataset(self) -> Any:
        """The data set under test, without what the loader and the views put around it."""
        dataset = getattr(self.test_loader, "dataset", None)
        dataset = getattr(dataset, "dataset", dataset)
        return dataset.dataset if isinstance(dataset, AugmentedViews) else dataset

    def _all_stems(self) -> list[str]:
        """File names of all scans by index; empty where the data set cannot name them."""
        named = getattr(self._dataset(), "get_data_name", None)
        if not self._own_loader or named is None:
            return []
        return file_stems([str(named(i)) for i in range(len(self._dataset()))])

    def _scans(self, tickets: Any, names: list[str] | None, seen: int, count: int) -> list[Scan]:
        """The scans of a batch: by their indices where the loader gives them, else by the batch's names."""
        dataset = self._dataset()
        scans = []
        for i in range(count):
            if tickets is None:
                name, owner = names[i] if names else f"{seen + i:06d}", dataset
                stem = file_stems([name])[0]
            else:
                index = tickets[i][2]
                owner, _ = leaf_of(dataset, index)
                name = str(dataset.get_data_name(index)) if self._stems else f"{index:06d}"
                name = names[i] if names else name
                stem = self._stems[index] if self._stems else file_stems([name])[0]
            scans.append(Scan(str(name), stem, owner))
        return scans

    def _predictions_in(self, folder: Path) -> Predictions:
        """The files of this test, with the digests that decide whether earlier ones still hold."""
        made_with = None
        if self._own_loader:
            pipeline = {k: v for k, v in self.entry.items() if k not in ("cache", "loop")}
            made_with = {
                "weights": weights_fingerprint(self.model),
                "model": fingerprint(plain_model(self.cfg["model"])),
                "data": fingerprint(pipeline),
                "test settings": fingerprint([self.mode, self.chains, self.cfg.get("seed")]),
            }
        return Predictions(
            folder, made_with, self.save_predictions, self.save_probabilities, self.reuse
        )

    # ----------------------------------------------------------------------------------- predicting

    def _predict(self, kept: Predictions) -> Iterator[Prediction]:
        """Predictions scan by scan: taken over where `kept` has them, else made and written."""
        loader = progress(self.test_loader, len(self.test_loader), "Test")
        sampler = getattr(self.test_loader, "batch_sampler", None)
        tickets = iter(sampler) if isinstance(sampler, EpochBatchSampler) else None
        seen = 0
        for item in loader:
            asked = next(tickets) if tickets is not None else None
            if self.mode == "single":
                found = self._single(item, asked, seen, kept)
            else:
                item = item[0] if isinstance(item, list) else item
                found = [self._voted(item, self._scans(asked, [item["name"]], seen, 1)[0], kept)]
            seen += len(found)
            yield from found

    def _network(self, batch: Mapping[str, Any]) -> Tensor:
        # Without labels the network computes no loss, which for Lovasz takes longer than a small student.
        return self.model({k: v for k, v in batch.items() if k != "segment"})["seg_logits"]

    def _single(
        self, batch: Mapping[str, Any], tickets: Any, seen: int, kept: Predictions
    ) -> list[Prediction]:
        """One forward for a batch of scans."""
        batch = to_device(batch, self.device)
        ends = self._raw_ends(batch)
        scans = self._scans(tickets, batch.get("name"), seen, len(ends) - 1)
        old = [kept.find(s.stem, b - a) for s, (a, b) in zip(scans, pairwise(ends))]
        if all(old):
            nothing = torch.zeros(int(batch["offset"][-1]), 1, device=self.device)
            _, target, compared = compare(nothing, batch)  # for the labels alone
            return [
                Prediction(s, was[0], target[a:b], compared, [1, 1], reused=True)
                for s, was, (a, b) in zip(scans, old, pairwise(ends))
            ]
        logits = self._network(batch)
        pred, target, compared = compare(logits, batch)
        labels, found = pred.cpu().numpy().astype(np.int64), []
        for scan, (a, b) in zip(scans, pairwise(ends)):
            chances = None
            if self.save_probabilities:
                rows = batch["inverse"][a:b] if "inverse" in batch else slice(a, b)
                chances = logits[rows].float().softmax(1).half().cpu().numpy()
            kept.put(scan.stem, labels[a:b], chances, [1, 1])
            found.append(Prediction(scan, labels[a:b], target[a:b], compared, [1, 1]))
        return found

    @staticmethod
    def _raw_ends(batch: Mapping[str, Any]) -> list[int]:
        """0 and the end row of each scan among the predictions."""
        offset = batch["offset"]
        if "inverse" not in batch:
            return [0, *offset.tolist()]
        scan = torch.bucketize(batch["inverse"], offset, right=True)
        return [0, *torch.bincount(scan, minlength=len(offset)).cumsum(0).tolist()]

    def _voted(self, sample: Mapping[str, Any], scan: Scan, kept: Predictions) -> Prediction:
        """The votes of all fragments or views of one scan."""
        inverse = None
        if self.mode == "tta":
            compared, target = "at raw points through inverse", sample["target"]
            vote: Callable[..., Votes] = vote_views
        else:
            vote, compared, target = vote_fragments, "at the voted points", sample["segment"]
            if "origin_segment" in sample:
                inverse = torch.as_tensor(sample["inverse"]).long()
                compared, target = "at raw points through inverse", sample["origin_segment"]
        target = torch.as_tensor(target).long().reshape(-1)
        old = kept.find(scan.stem, len(target))
        if old is not None:
            return Prediction(scan, old[0], target, compared, old[1], reused=True)
        votes = vote(sample, self._network, self.classes, self.device, self.batch_size)
        counts, scores = votes.counts, votes.scores
        if inverse is not None:
            inverse = inverse.to(self.device)
            counts, scores = counts[inverse], scores[inverse]
        missed = int((counts == 0).sum())
        if missed:
            row = int((counts == 0).nonzero()[0])
            raise InputError(
                f"scan {scan.name}: {missed} of {len(counts)} points, the first in row {row}, are in none of the "
                f"{len(sample['fragment_list'])} fragments; use GridSample mode='test' in test_cfg.voxelize without a "
                "crop that drops points"
            )
        labels, chances = scores.argmax(1).cpu().numpy().astype(np.int64), None
        if self.save_probabilities:
            chances = (scores / counts[:, None]).half().cpu().numpy()
        span = [int(counts.min()), int(counts.max())]
        kept.put(scan.stem, labels, chances, span)
        return Prediction(scan, labels, target, compared, span)

    # ------------------------------------------------------------------------------------ reporting

    def _report(
        self, scores: Scores, facts: dict[str, Any], compared: str, folder: Path
    ) -> dict[str, Any]:
        log = self.logger.info
        votes = facts["votes_per_point"] or ["?"]
        span = f"{votes[0]}" if votes[0] == votes[-1] else f"{votes[0]} to {votes[-1]}"
        how = {
            "single": "one pass per scan, as in validation",
            "fragments": f"after voting over fragments, {span} votes per point",
            "tta": f"mean of {len(self.chains)} augmented passes per scan",
        }[self.mode]
        protocol = scores.protocol(f"{compared}, {how}")
        metrics = {**scores.as_dict(self.names), **facts, "protocol": protocol}
        scans = f"{facts['scans']} scans of {facts['data']}"
        if facts["reused"]:
            log(f"{facts['reused']} of {facts['scans']} predictions taken over from {folder}")
        if scores.points:
            log(
                f"Test result ({self.mode}, {scans}): mIoU/mAcc/allAcc {scores.headline} ({protocol})"
            )
            width = max(len(name) for name in self.names)
            log(f"{'class':<{width}}     IoU     acc")
            for name, iou, acc, present in zip(self.names, scores.iou, scores.acc, scores.present):
                log(f"{name:<{width}}  {iou:.4f}  {acc:.4f}{'' if present else '  (absent)'}")
        else:
            log(
                f"Test result ({self.mode}, {scans}): no labels in this split ({how}); results are in {folder}"
            )
        if facts["submission"]:
            log(f"Submission in {facts['submission']}")
        if comm.is_main_process():
            text = json.dumps(metrics, indent=1).encode()
            write_atomic(folder / "metrics.json", lambda file: file.write(text))
        log("<<<<<<<<<<<<<<<<< End Testing <<<<<<<<<<<<<<<<<")
        return metrics
