"""Clouds, sample folders and configs that Pointcept and this package read alike."""

from __future__ import annotations

import pprint
from pathlib import Path

import numpy as np
import torch

CLASSES = 4


def cloud(seed=0, points=900, extent=6.0):
    """A rough ground with a wall: `coord` (N, 3) in metres, `strength` (N, 1), `segment` (N,) with some -1."""
    draw = np.random.default_rng(seed)
    coord = draw.uniform(-extent, extent, (points, 3))
    wall = draw.random(points) < 0.4
    coord[:, 2] = np.where(wall, draw.uniform(-1, 2, points), draw.normal(-1, 0.05, points))
    coord[wall, 1] = draw.normal(2, 0.1, wall.sum())
    strength = np.clip(0.3 + 0.4 * wall + draw.normal(0, 0.1, points), 0, 1)
    segment = 2 * wall + (coord[:, 0] > 0)
    segment[draw.random(points) < 0.03] = -1
    return dict(
        coord=coord.astype(np.float32),
        strength=strength.astype(np.float32)[:, None],
        segment=segment.astype(np.int32),
    )


def batch(clouds, grid_size=0.25):
    """Voxelise clouds and join them as a loader would: coord, grid_coord, feat, segment, offset; int64 and float32."""
    parts = []
    for sample in clouds:
        cell = np.floor(sample["coord"] / grid_size).astype(np.int64)
        cell -= cell.min(0)
        _, first = np.unique(cell, axis=0, return_index=True)
        first = np.random.default_rng(len(first)).permutation(first)
        parts.append({key: value[first] for key, value in sample.items()} | {"cell": cell[first]})
    joined = {
        key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]
    }
    return dict(
        coord=joined["coord"],
        grid_coord=joined["cell"],
        feat=torch.cat([joined["coord"], joined["strength"]], 1),
        segment=joined["segment"].long(),
        offset=torch.tensor([len(part["coord"]) for part in parts]).cumsum(0),
    )


def write_folders(root, train=4, val=2, points=900):
    """Samples in the folder form of `DefaultDataset`: ROOT/{train,val}/NAME/{coord,strength,segment}.npy."""
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            folder = Path(root, split, f"{split}{index}")
            folder.mkdir(parents=True)
            for name, values in cloud(seed, points).items():
                np.save(folder / f"{name}.npy", values)
            seed += 1
    return Path(root)


PTV3 = dict(
    type="PT-v3m1",
    in_channels=4,
    order=["z", "z-trans", "hilbert", "hilbert-trans"],
    stride=[2, 2],
    enc_depths=[1, 1, 1],
    enc_channels=[16, 16, 32],
    enc_num_head=[2, 2, 4],
    enc_patch_size=[48, 48, 48],
    dec_depths=[1, 1],
    dec_channels=[16, 16],
    dec_num_head=[2, 2],
    dec_patch_size=[48, 48],
    mlp_ratio=2,
    drop_path=0.0,
    shuffle_orders=False,
    enable_flash=False,
    upcast_attention=False,
    upcast_softmax=False,
)
SPUNET = dict(
    type="SpUNet-v1m1",
    in_channels=4,
    num_classes=CLASSES,
    base_channels=8,
    channels=[8, 8, 16, 16, 16, 16, 8, 8],
    layers=[1] * 8,
)
CRITERIA = [
    dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
    dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
]


def model(name):
    """Config of a tiny segmentor by the name of its backbone, PT-v3m1 or SpUNet-v1m1."""
    if name == "SpUNet-v1m1":
        return dict(type="DefaultSegmentor", backbone=dict(SPUNET), criteria=CRITERIA)
    return dict(
        type="DefaultSegmentorV2",
        num_classes=CLASSES,
        backbone_out_channels=PTV3["dec_channels"][0],
        backbone=dict(PTV3),
        criteria=CRITERIA,
    )


def values(data_root, save_path, name="PT-v3m1", keys=False, **changes):
    """A whole config with every runtime key; two iterations, an evaluation and a test.

    Args:
        data_root: folder of `write_folders`.
        save_path: experiment folder.
        name: backbone.
        keys: name the arrays that `GridSample` takes along, as Pointcept before 1.6.0 wants.
        changes: replace top-level keys.
    """
    named = dict(keys=["coord", "strength", "segment"]) if keys else {}
    grid = dict(type="GridSample", grid_size=0.25, hash_type="fnv", return_grid_coord=True, **named)
    collect = dict(type="Collect", feat_keys=["coord", "strength"])
    common = dict(type="DefaultDataset", data_root=str(data_root))
    whole = dict(
        weight=None, resume=False, evaluate=True, test_only=False, seed=3, save_path=str(save_path),
        num_worker=1, batch_size=2, gradient_accumulation_steps=1, batch_size_val=None, batch_size_test=None,
        epoch=1, eval_epoch=1, clip_grad=None, sync_bn=False, enable_amp=False, amp_dtype="float16",
        empty_cache=False, empty_cache_per_epoch=False, find_unused_parameters=False, enable_wandb=False,
        wandb_project="pointcept", wandb_key=None, mix_prob=0.5, param_dicts=[dict(keyword="block", lr=2e-4)],
        hooks=[
            dict(type="CheckpointLoader"),
            dict(type="IterationTimer", warmup_iter=1),
            dict(type="InformationWriter"),
            dict(type="SemSegEvaluator"),
            dict(type="CheckpointSaver", save_freq=None),
            dict(type="PreciseEvaluator", test_last=False),
        ],
        train=dict(type="DefaultTrainer"),
        test=dict(type="SemSegTester", verbose=True),
        model=model(name),
        optimizer=dict(type="AdamW", lr=2e-3, weight_decay=5e-3),
        scheduler=dict(type="OneCycleLR", max_lr=[2e-3, 2e-4], pct_start=0.04, anneal_strategy="cos",
                       div_factor=10.0, final_div_factor=100.0),
        data=dict(
            num_classes=CLASSES, ignore_index=-1, names=["a", "b", "c", "d"],
            train=dict(common, split="train", test_mode=False, ignore_index=-1, transform=[
                dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
                dict(type="RandomScale", scale=[0.9, 1.1]),
                dict(type="RandomFlip", p=0.5),
                dict(grid, mode="train"),
                dict(type="ToTensor"),
                dict(collect, keys=["coord", "grid_coord", "segment"]),
            ]),
            val=dict(common, split="val", test_mode=False, ignore_index=-1, transform=[
                dict(type="Copy", keys_dict=dict(segment="origin_segment")),
                dict(grid, mode="train", return_inverse=True),
                dict(type="ToTensor"),
                dict(collect, keys=["coord", "grid_coord", "segment", "origin_segment", "inverse"]),
            ]),
            test=dict(common, split="val", test_mode=True, ignore_index=-1, transform=[
                dict(type="Copy", keys_dict=dict(segment="origin_segment")),
                dict(type="GridSample", grid_size=0.125, hash_type="fnv", mode="train", return_inverse=True, **named),
            ], test_cfg=dict(
                voxelize=dict(grid, mode="test"),
                crop=None,
                post_transform=[
                    dict(type="ToTensor"),
                    dict(collect, keys=["coord", "grid_coord", "index"]),
                ],
                aug_transform=[[dict(type="RandomRotateTargetAngle", angle=[a], axis="z", center=[0, 0, 0], p=1)]
                               for a in (0, 0.5)],
            )),
        ),
    )  # fmt: skip
    return {**whole, **changes}


def write_config(path, data_root, save_path, **options):
    """`values` as a config file; returns its path."""
    lines = [
        f"{k} = {pprint.pformat(v)}" for k, v in values(data_root, save_path, **options).items()
    ]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)
