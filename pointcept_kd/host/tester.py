"""Test a segmentation network: one forward per scan, or voting over fragments.

`single` runs the validation pipeline once per scan and expands voxel predictions to raw points through `inverse`.
`fragments` is the host's protocol: every augmented copy of a scan is cut into fragments that together cover each of its
points, and the class probabilities of all fragments are added. The two give different mIoUs; the log says which.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import DATASETS, MODELS, TESTERS, comm, kd, stand_in
from .batches import EpochBatchSampler, build_loader, first
from .checkpoint import load_checkpoint, load_into, student_weights, unwrap, write_atomic
from .config import default_setup
from .errors import InputError
from .hooks import compare, progress
from .loader import collate_fn
from .log import get_root_logger
from .metrics import Scores, class_names, confusion, summary
from .runtime import complete, device_of, require, to_device

MODES = ("single", "fragments")


def plain_model(model_cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the network to test: a distiller's student, else the model itself."""
    student = model_cfg.get("student")
    return student.get("model", student) if isinstance(student, Mapping) else model_cfg


@stand_in(TESTERS, kd.TESTERS, "SemSegTester")
class SemSegTester:
    """Predict, score and write the predictions of a split.

    Writes `result/{name}_pred.npy` (int64, one class per raw point) and `result/metrics.json` below `save_path`; always
    predicts anew. A dataset with `write_submission(name, pred, folder)` also gets its scans for `result/submit`.

    Args:
        cfg: the run's config.
        model: the network; None builds it from `cfg.model` (of a distiller, the student) and loads `cfg.weight`.
        test_loader: batches to test on instead of those of the config.
        verbose: one line per scan.
        mode: "single" or "fragments"; None takes fragments where `data.test` is in test mode.

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
    ) -> None:
        self.cfg = cfg
        if model is None:
            complete(cfg)
            default_setup(cfg)
        require(cfg, "model", "data.num_classes", "save_path")
        self.logger, self.device, self.verbose = get_root_logger(), device_of(cfg), verbose
        data = cfg["data"]
        self.classes, self.ignore = data["num_classes"], data.get("ignore_index", -1)
        self.names = class_names(data)
        self.mode, entry = self._choose(mode)
        self.model = self.build_model() if model is None else unwrap(model)
        self.test_loader = test_loader or self.build_test_loader(entry)

    def _choose(self, mode: str | None) -> tuple[str, Mapping[str, Any]]:
        """The mode, and the dataset entry that fits it."""
        data = self.cfg["data"]
        test = data.get("test")
        voting = bool(test and test.get("test_mode"))
        mode = mode or ("fragments" if voting else "single")
        if mode not in MODES:
            raise InputError(f"test.mode={mode!r}: use one of {', '.join(MODES)}")
        if mode == "fragments" and not voting:
            raise InputError(
                "test.mode=fragments needs data.test with test_mode=True and test_cfg: add them, or use mode=single"
            )
        entry = (
            test if test is not None and (mode == "fragments" or not voting) else data.get("val")
        )
        if entry is None:
            raise InputError(
                "test.mode=single needs data.test without test_mode, or data.val: add one"
            )
        return mode, entry

    def build_model(self) -> nn.Module:
        """The plain network with the weights of `cfg.weight`, which must match it exactly."""
        weight = self.cfg.get("weight")
        if weight is None:
            raise InputError(
                "testing needs a checkpoint: give --options weight=SAVE_PATH/model/model_best.pth"
            )
        checkpoint = load_checkpoint(weight)
        model = MODELS.build(plain_model(self.cfg["model"]))
        report = load_into(
            model, student_weights(checkpoint["state_dict"]), strict=True, source=weight
        )
        self.logger.info(f"Weight {weight} of epoch {checkpoint.get('epoch', 'unknown')}: {report}")
        return model.to(self.device)

    def build_test_loader(self, entry: Mapping[str, Any]) -> Any:
        """Batches in order; voting takes one scan at a time."""
        dataset = DATASETS.build(entry)
        if len(dataset) == 0:
            raise InputError("the test set has no samples: check its data_root and split")
        voting = self.mode == "fragments"
        sampler = EpochBatchSampler(
            len(dataset),
            1 if voting else self.cfg.get("batch_size_test_per_gpu") or 1,
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
            `mIoU`, `mIoU_present`, `mAcc`, `allAcc`, `classes` by name, `points`, `scans`, `mode`, `protocol`.
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
        submit = getattr(self._dataset(), "write_submission", None)
        matrices: dict[str, Tensor] = {}
        compared, start = "", time.perf_counter()
        for name, pred, target, where in self._predictions():
            compared = where
            matrix = confusion(pred, target, self.classes, self.ignore).cpu()
            matrices[name] = matrix
            rows = pred.cpu().numpy().astype(np.int64)
            write_atomic(
                folder / f"{_file_name(name)}_pred.npy", lambda file, rows=rows: np.save(file, rows)
            )
            if submit is not None:
                submit(name, rows, folder / "submit")
            if self.verbose:
                spent, start = time.perf_counter() - start, time.perf_counter()
                self.logger.info(
                    f"Test: {name} [{len(matrices)}] {len(rows)} points {spent:.2f} s, "
                    f"accuracy {summary(matrix).all_acc:.4f}"
                )
        # By name: a scan that two processes saw counts once.
        everywhere: dict[str, Tensor] = {}
        for part in comm.all_gather((matrices, compared)):
            everywhere.update(part[0])
            compared = compared or part[1]
        total = sum(everywhere.values(), torch.zeros(self.classes, self.classes, dtype=torch.int64))
        return self._report(summary(total), len(everywhere), compared, folder)

    def _dataset(self) -> Any:
        dataset = getattr(self.test_loader, "dataset", None)
        return getattr(dataset, "dataset", dataset)

    def _predictions(self) -> Iterator[tuple[str, Tensor, Tensor, str]]:
        """Name, predictions, labels and where they are compared, scan by scan."""
        loader = progress(self.test_loader, len(self.test_loader), "Test")
        if self.mode == "fragments":
            for sample in loader:
                yield self._vote(sample)
            return
        sampler = getattr(self.test_loader, "batch_sampler", None)
        tickets = iter(sampler) if isinstance(sampler, EpochBatchSampler) else None
        for count, batch in enumerate(loader):
            names = self.test_loader.dataset.names(next(tickets)) if tickets is not None else None
            batch = to_device(batch, self.device)
            pred, target, compared = compare(self.model(batch)["seg_logits"], batch)
            ends = self._raw_ends(batch)
            names = batch.get("name") or names or [f"{count:06d}_{i}" for i in range(len(ends) - 1)]
            for name, (a, b) in zip(names, pairwise(ends)):
                yield name, pred[a:b], target[a:b], compared

    @staticmethod
    def _raw_ends(batch: Mapping[str, Any]) -> list[int]:
        """0 and the end row of each scan among the predictions."""
        offset = batch["offset"]
        if "inverse" not in batch:
            return [0, *offset.tolist()]
        scan = torch.bucketize(batch["inverse"], offset, right=True)
        return [0, *torch.bincount(scan, minlength=len(offset)).cumsum(0).tolist()]

    def _vote(self, sample: Mapping[str, Any]) -> tuple[str, Tensor, Tensor, str]:
        """Add the class probabilities of all fragments of one scan at the points they came from."""
        sample = sample[0] if isinstance(sample, list) else sample
        target = torch.as_tensor(sample["segment"]).long().reshape(-1)
        scores = torch.zeros(len(target), self.classes, device=self.device)
        for fragment in sample["fragment_list"]:
            batch = to_device(collate_fn([fragment]), self.device)
            index = batch.pop("index")
            logits = self.model(batch)["seg_logits"]
            scores.index_add_(0, index, logits.float().softmax(1))
        pred, compared = scores.argmax(1), "at the voted points"
        if "origin_segment" in sample:
            inverse = torch.as_tensor(sample["inverse"]).long().to(self.device)
            target = torch.as_tensor(sample["origin_segment"]).long().reshape(-1)
            pred, compared = (
                pred[inverse],
                "at raw points through inverse, after voting over fragments",
            )
        return sample["name"], pred, target.to(self.device), compared

    def _report(self, scores: Scores, scans: int, compared: str, folder: Path) -> dict[str, Any]:
        log = self.logger.info
        metrics = {
            **scores.as_dict(self.names),
            "scans": scans,
            "mode": self.mode,
            "protocol": scores.protocol(compared),
            "weight": self.cfg.get("weight"),
        }
        if scores.points:
            log(
                f"Test result ({self.mode}, {scans} scans): mIoU/mAcc/allAcc {scores.headline} "
                f"({scores.protocol(compared)})"
            )
            width = max(len(name) for name in self.names)
            log(f"{'class':<{width}}     IoU     acc")
            for name, iou, acc, present in zip(self.names, scores.iou, scores.acc, scores.present):
                log(f"{name:<{width}}  {iou:.4f}  {acc:.4f}{'' if present else '  (absent)'}")
        else:
            log(
                f"Test result ({self.mode}, {scans} scans): no labels in this split; predictions are in {folder}"
            )
        if comm.is_main_process():
            text = json.dumps(metrics, indent=1).encode()
            write_atomic(folder / "metrics.json", lambda file: file.write(text))
        log("<<<<<<<<<<<<<<<<< End Testing <<<<<<<<<<<<<<<<<")
        return metrics


def _file_name(name: str) -> str:
    """A scan's name as a file name: readers of several folders may put slashes into it."""
    return str(name).replace("/", "_").replace("\\", "_")
