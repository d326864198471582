"""A network and scans small enough that a whole training run takes a tenth of a second.

Registered under the `kd` scope; configs of subprocesses reach it through `custom_imports`.
"""

import os
import random
import signal

import numpy as np
import torch
from torch import nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.config import Config
from pointcept_kd.host.hooks import HookBase

CLASSES = 4


@kd.MODELS.register_module(force=True)
class TinyNet(nn.Module):
    """Two linear layers with batch normalisation and dropout: it has buffers and draws random numbers."""

    def __init__(self, width=8, dropout=0.2, norm=True, fault=""):
        super().__init__()
        norms = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(4, width), norms, nn.ReLU(), nn.Dropout(dropout))
        self.seg_head = nn.Linear(width, CLASSES)
        self.fault = fault

    def forward(self, batch):
        logits = self.seg_head(self.backbone(batch["feat"]))
        if "segment" not in batch:
            return {"seg_logits": logits}
        loss = nn.functional.cross_entropy(logits, batch["segment"], ignore_index=-1)
        if not self.training:
            return {"loss": loss, "seg_logits": logits}
        if self.fault == "nan":
            loss = loss * float("nan")
        outputs = {"loss": loss, "loss_part": 0.5 * loss.detach()}
        if self.fault == "vector":
            outputs["feature"] = logits
        if self.fault == "no loss":
            del outputs["loss"]
        return outputs


@kd.MODELS.register_module(force=True)
class TinyPair(nn.Module):
    """What the saver and the test tool see of a distiller: a student below, exported under plain keys."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = kd.MODELS.build(student["model"])
        self.adapter = nn.Linear(2, 2)

    def export_state_dict(self):
        return self.student.state_dict()

    def forward(self, batch):
        return self.student(batch)


@kd.DATASETS.register_module(force=True)
class TinyScans(torch.utils.data.Dataset):
    """Scans whose labels follow from their features; training ones are augmented by all three generators."""

    def __init__(self, count=6, points=20, augment=False, raw=False, equal=False, loop=1, fault=""):
        self.count, self.points, self.augment, self.raw = count, points, augment, raw
        self.equal, self.loop, self.fault = equal, loop, fault

    def __len__(self):
        return self.count * self.loop

    def get_data_name(self, index):
        return f"scan/{index % self.count:02d}"

    def __getitem__(self, index):
        index = index % self.count
        if self.fault == "broken":
            raise InputError(f"{self.get_data_name(index)}: the file is cut off; copy it again")
        made = np.random.default_rng(index)
        rows = self.points + (0 if self.equal else index)
        feat = torch.from_numpy(made.normal(size=(rows, 4))).float()
        segment = (feat[:, :2] > 0).long() @ torch.tensor([1, 2])
        segment[0] = -1
        if self.augment:
            feat = feat * random.uniform(0.9, 1.1)
            feat = feat + torch.from_numpy(np.random.normal(0, 0.05, feat.shape)).float()
            feat = feat + 0.05 * torch.randn(4)
        sample = {
            "coord": feat[:, :3].clone(),
            "feat": feat,
            "segment": segment,
            "offset": torch.tensor([rows]),
            "name": self.get_data_name(index),
        }
        if self.raw:
            inverse = torch.from_numpy(made.integers(0, rows, size=2 * rows))
            sample["inverse"] = inverse
            sample["origin_segment"] = segment[inverse]
        return sample


@kd.HOOKS.register_module(force=True)
class KillAt(HookBase):
    """End the process as a power cut would, in the middle of an epoch."""

    def __init__(self, epoch, iteration):
        self.at = (epoch, iteration)

    def after_step(self):
        if (self.trainer.epoch, self.trainer.comm_info["iter"]) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@kd.HOOKS.register_module(force=True)
class DieSaving(HookBase):
    """End the process halfway through writing a checkpoint."""

    def __init__(self, epoch):
        self.epoch = epoch

    def before_epoch(self):
        if self.trainer.epoch != self.epoch:
            return

        def half(obj, file):
            file.write(b"PK half a checkpoint")
            file.flush()
            os._exit(9)

        torch.save = half


HOOKS = [
    dict(type="CheckpointLoader"),
    dict(type="ModelHook"),
    dict(type="IterationTimer", warmup_iter=1),
    dict(type="InformationWriter", log_interval=1),
    dict(type="SemSegEvaluator"),
    dict(type="CheckpointSaver"),
]


def tiny_values(save_path, **changes):
    """A whole config as a dict; `changes` replace top-level keys."""
    values = dict(
        custom_imports=dict(imports=["tests.host.tiny"], allow_failed_imports=False),
        save_path=str(save_path),
        seed=3,
        device="cpu",
        epoch=3,
        eval_epoch=3,
        batch_size=2,
        num_worker=0,
        mix_prob=0.5,
        model=dict(type="kd.TinyNet"),
        optimizer=dict(type="AdamW", lr=0.01),
        scheduler=dict(type="OneCycleLR", max_lr=0.01),
        data=dict(
            num_classes=CLASSES,
            ignore_index=-1,
            names=["a", "b", "c", "d"],
            train=dict(type="kd.TinyScans", count=7, augment=True),
            val=dict(type="kd.TinyScans", count=3, raw=True),
        ),
        hooks=[dict(hook) for hook in HOOKS],
        test=dict(type="kd.SemSegTester", mode="single"),
    )
    return {**values, **changes}


def tiny_config(save_path, **changes):
    """`tiny_values` as a `Config`."""
    return Config(tiny_values(save_path, **changes))


def write_config(path, **changes):
    """`tiny_values` as a config file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    changes.setdefault("save_path", str(path.parent / "exp"))
    path.write_text(Config(tiny_values(**changes)).pretty_text)
    return path
