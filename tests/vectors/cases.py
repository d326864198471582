"""Inputs of the acceptance vectors: everything here is generated, from numpy's frozen RandomState.

The stored numbers next to this file are what Pointcept 1.7.0 made of these inputs; see README.md.
"""

import random

import numpy as np
import torch

CLASSES = 5
RECIPE = [  # the augmentation of Pointcept's nuScenes recipe
    dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=0.5),
    dict(type="RandomScale", scale=[0.9, 1.1]),
    dict(type="RandomFlip", p=0.5),
    dict(type="RandomJitter", sigma=0.005, clip=0.02),
]
FINE = dict(type="GridSample", grid_size=0.05, hash_type="fnv", mode="train")
TAIL = [
    dict(type="ToTensor"),
    dict(type="Collect", keys=("coord", "grid_coord", "segment"), feat_keys=("coord", "strength")),
]
VALIDATION = [
    dict(type="Copy", keys_dict={"segment": "origin_segment"}),
    dict(**FINE, return_grid_coord=True, return_inverse=True),
    dict(type="ToTensor"),
    dict(
        type="Collect",
        keys=("coord", "grid_coord", "segment", "origin_segment", "inverse"),
        offset_keys_dict=dict(offset="coord", origin_offset="origin_segment"),
        feat_keys=("coord", "strength"),
    ),
]
COARSE = dict(type="GridSample", grid_size=2.0, return_inverse=True, return_grid_coord=True)
VIEWS = ["coord", "color", "normal", "origin_coord"]

# name -> transform configs. Where several points share a voxel, which of them a draw means depends on
# the processor's sorting code; such cases ("cells ...") keep the voxels only.
PIPELINES = {
    "nuScenes train": [*RECIPE, dict(**FINE, return_grid_coord=True), *TAIL],
    "nuScenes val": VALIDATION,
    "SemanticKITTI train": [
        RECIPE[0],
        dict(type="PointClip", point_cloud_range=(-35.2, -35.2, -4, 35.2, 35.2, 2)),
        *RECIPE[1:],
        dict(**FINE, return_grid_coord=True),
        *TAIL,
    ],
    "indoor style": [
        dict(type="CenterShift", apply_z=True),
        dict(type="RandomDropout", dropout_ratio=0.2, dropout_application_ratio=0.9),
        dict(type="RandomRotateTargetAngle", angle=(1 / 2, 1, 3 / 2), center=[0, 0, 0], p=0.75),
        dict(type="RandomRotate", angle=[-1 / 64, 1 / 64], axis="x", p=0.9),
        dict(type="RandomRotate", angle=[-1 / 64, 1 / 64], axis="y", p=0.9),
        dict(type="RandomScale", scale=[0.9, 1.1], anisotropic=True),
        dict(type="RandomShift"),
        dict(type="RandomFlip", p=0.5),
        dict(type="ElasticDistortion", distortion_params=[[8.0, 0.4], [16.0, 1.6]]),
        dict(type="ChromaticAutoContrast", p=0.8, blend_factor=None),
        dict(type="ChromaticTranslation", p=0.95, ratio=0.05),
        dict(type="ChromaticJitter", p=0.95, std=0.05),
        dict(type="SphereCrop", sample_rate=0.8, mode="random"),
        dict(type="CropBoundary"),
        dict(type="ShufflePoint"),
        dict(type="PositiveShift"),
        dict(type="NormalizeColor"),
        dict(type="NormalizeCoord"),
        dict(type="ToTensor"),
        dict(type="Collect", keys=("coord", "segment"), feat_keys=("color", "normal", "strength")),
    ],
    "colours": [
        dict(
            type="RandomColorJitter", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8
        ),
        dict(type="HueSaturationTranslation", hue_max=0.2, saturation_max=0.2),
        dict(type="RandomDropColor", drop_ratio=0.1, drop_application_ratio=0.5),
        dict(type="RandomDropNormal", drop_ratio=0.1, drop_application_ratio=0.5),
        dict(type="RandomColorGrayScale", p=0.3),
    ],
    "views": [
        dict(type="Update", keys_dict=dict(index_valid_keys=VIEWS)),
        dict(
            type="MultiViewGenerator",
            view_keys=VIEWS,
            static_view_keys=(),
            global_transform=[RECIPE[0], RECIPE[2]],
            local_transform=[RECIPE[1]],
        ),
    ],
    "contrast": [
        dict(
            type="ContrastiveViewsGenerator",
            view_keys=VIEWS,
            view_trans_cfg=[
                dict(type="Update", keys_dict=dict(index_valid_keys=VIEWS)),
                dict(type="RandomRotate", angle=[-1, 1], axis="z", center=[0, 0, 0], p=1),
                dict(type="RandomFlip"),
                dict(**FINE, return_grid_coord=True),
            ],
        ),
    ],
    "cells fnv": [COARSE],
    "cells ravel": [dict(COARSE, hash_type="ravel", return_min_coord=True)],
}
CELL_KEYS = ("grid_coord", "inverse", "min_coord")
SEEDS = (0, 1, 2)


def seed(value):
    """All three generators."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def generators():
    """One draw of each, to compare where they stand."""
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def scan(n=3000):
    """A sheet of points 80 m wide on a millimetre lattice, so that no rounding enters the input."""
    rng = np.random.RandomState(20)
    flat = rng.randint(-40000, 40000, (n, 3)) / 1000 * [1, 1, 0.05]
    coord = np.round(flat, 3).astype(np.float32)
    normal = rng.randint(-1000, 1001, (n, 3)) / 1000
    return dict(
        coord=coord,
        strength=(rng.randint(0, 1000, (n, 1)) / 1000).astype(np.float32),
        color=rng.randint(0, 256, (n, 3)).astype(np.float32),
        normal=normal.astype(np.float32),
        segment=rng.randint(-1, 16, n).astype(np.int32),
        origin_coord=coord.copy(),
        name="sheet",
    )


def voxels(counts=(420, 350), span=(24, 24, 10)):
    """A batch dict of scans with that many distinct voxels each."""
    rng = np.random.RandomState(7)
    cells = []
    for count in counts:
        flat = rng.permutation(span[0] * span[1] * span[2])[:count]
        cells.append(np.stack(np.unravel_index(flat, span), axis=1))
    grid = np.concatenate(cells).astype(np.int64)
    n = len(grid)
    place = rng.randint(0, 1000, (n, 3)) / 1000
    return dict(
        coord=torch.from_numpy((grid + place) * 0.05).float(),
        grid_coord=torch.from_numpy(grid),
        feat=torch.from_numpy(rng.randn(n, 4)).float(),
        segment=torch.from_numpy(rng.randint(-1, CLASSES, n)).long(),
        offset=torch.tensor(np.cumsum(counts)),
    )


def fill(module):
    """Weights and buffers from one RandomState, in the sorted order of their keys."""
    rng = np.random.RandomState(11)
    state = module.state_dict()
    for key in sorted(state):
        value = state[key]
        if not value.is_floating_point():
            continue
        draw = rng.randn(*value.shape)
        if key.endswith("running_var"):
            draw = 0.5 + np.abs(draw)
        elif value.ndim == 1:
            draw = 0.1 * draw + (1.0 if key.endswith("weight") else 0.0)
        elif not key.endswith("rpe_table"):
            draw = draw / np.sqrt(np.prod(value.shape[1:]))
        value.copy_(torch.from_numpy(draw))
    return module


CRITERIA = [
    dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
    dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
]


def ptv3(**changes):
    """A segmentor with a small PT-v3m1; patches are smaller than every scan at every level."""
    backbone = dict(
        type="PT-v3m1",
        in_channels=4,
        order=("z", "z-trans", "hilbert", "hilbert-trans"),
        stride=(2, 2),
        enc_depths=(1, 2, 1),
        enc_channels=(16, 32, 48),
        enc_num_head=(2, 4, 6),
        enc_patch_size=(48, 32, 8),
        dec_depths=(1, 2),
        dec_channels=(24, 32),
        dec_num_head=(3, 4),
        dec_patch_size=(48, 32),
        mlp_ratio=2,
        drop_path=0.0,
        shuffle_orders=False,
        enable_flash=False,
    )
    backbone.update(changes)
    width = sum(backbone["enc_channels"]) if backbone.get("enc_mode") else 24
    return dict(
        type="DefaultSegmentorV2",
        num_classes=CLASSES,
        backbone_out_channels=width,
        backbone=backbone,
        criteria=CRITERIA,
    )


def spunet(**changes):
    """A segmentor with a small SpUNet-v1m1."""
    backbone = dict(
        type="SpUNet-v1m1",
        in_channels=4,
        num_classes=CLASSES,
        base_channels=8,
        channels=(8, 16, 24, 32, 24, 24, 16, 8),
        layers=(1, 2, 1, 1, 1, 1, 2, 1),
    )
    backbone.update(changes)
    return dict(type="DefaultSegmentor", backbone=backbone, criteria=CRITERIA)


NETWORKS = {
    "PT-v3m1": ptv3(),
    "PT-v3m1, relative positions": ptv3(enable_rpe=True, order=("hilbert", "z")),
    "PT-v3m1, norm after": ptv3(pre_norm=False, upcast_attention=True, upcast_softmax=True),
    "PT-v3m1, encoder only": ptv3(enc_mode=True, qkv_bias=False),
    "SpUNet-v1m1": spunet(),
    "SpUNet-v1m1, other widths": spunet(
        base_channels=12, channels=(12, 12, 16, 16, 16, 20, 12, 12), layers=(2, 1, 1, 2, 2, 1, 1, 1)
    ),
}
FULL_SIZE = {
    "PT-v3m1": dict(
        type="DefaultSegmentorV2",
        num_classes=19,
        backbone_out_channels=64,
        backbone=dict(type="PT-v3m1", in_channels=4, enable_flash=False),
        criteria=[],
    ),
    "SpUNet-v1m1": dict(
        type="DefaultSegmentor",
        backbone=dict(type="SpUNet-v1m1", in_channels=4, num_classes=19),
        criteria=[],
    ),
}

LOSSES = {
    "cross entropy": dict(type="CrossEntropyLoss", ignore_index=-1),
    "cross entropy, weights": dict(
        type="CrossEntropyLoss",
        weight=[1.0, 2.5, 0.5, 4.0, 1.5],
        loss_weight=0.7,
        ignore_index=-1,
    ),
    "cross entropy, smooth": dict(type="CrossEntropyLoss", label_smoothing=0.2, ignore_index=-1),
    "cross entropy, sum": dict(type="CrossEntropyLoss", reduction="sum", ignore_index=-1),
    "Lovasz": dict(type="LovaszLoss", mode="multiclass", loss_weight=0.5, ignore_index=-1),
    "Lovasz, classes": dict(
        type="LovaszLoss", mode="multiclass", class_seen=[0, 3], ignore_index=-1
    ),
    "focal": dict(type="FocalLoss", gamma=2.0, alpha=0.25, ignore_index=-1),
    "dice": dict(type="DiceLoss", smooth=1, exponent=2, ignore_index=-1),
    "binary focal": dict(type="BinaryFocalLoss", gamma=2.0, alpha=0.3),
}


def loss_input(name):
    """Logits and labels; the binary loss has one logit per point."""
    rng = np.random.RandomState(5)
    if name.startswith("binary"):
        pred, target = rng.randn(200), (rng.rand(200) < 0.3).astype(np.float64)
        return torch.from_numpy(pred).float(), torch.from_numpy(target).float()
    pred, target = rng.randn(200, CLASSES) * 2, rng.randint(-1, CLASSES, 200)
    return torch.from_numpy(pred).float(), torch.from_numpy(target).long()


STEPS = 40
SCHEDULES = {
    "OneCycleLR": dict(
        type="OneCycleLR",
        max_lr=[0.002, 0.0002],
        pct_start=0.04,
        anneal_strategy="cos",
        div_factor=10.0,
        final_div_factor=100.0,
    ),
    "OneCycleLR, defaults": dict(type="OneCycleLR", max_lr=[0.01, 0.001]),
    "MultiStepLR": dict(type="MultiStepLR", milestones=[0.6, 0.8], gamma=0.1),
    "MultiStepWithWarmupLR": dict(
        type="MultiStepWithWarmupLR", milestones=[0.6, 0.8], gamma=0.1, warmup_rate=0.1
    ),
    "PolyLR": dict(type="PolyLR", power=0.9),
    "ExpLR": dict(type="ExpLR", gamma=0.9),
    "CosineAnnealingLR": dict(type="CosineAnnealingLR", eta_min=1e-5),
}
COSINE = dict(
    base_value=0.04,
    final_value=0.2,
    total_iters=STEPS,
    start_value=0.01,
    warmup_iters=5,
    freeze_iters=3,
)

DEPTHS = range(3, 17)
ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")


def cells(depth, n=12):
    """Random voxels of that many bits per axis, the corner ones first, and their scans."""
    rng = np.random.RandomState(depth)
    grid = rng.randint(0, 1 << depth, (n, 3))
    grid[0], grid[1] = 0, (1 << depth) - 1
    return torch.from_numpy(grid).long(), torch.from_numpy(rng.randint(0, 4, n)).long()


# name -> (files, the one to read, options of the command line)
DIALECT = {
    "merge": (
        {
            "base.py": "model = dict(type='A', inner=dict(x=1, y=[1, 2]), keep=True)\nlr = 0.1\n",
            "child.py": "_base_ = 'base.py'\nmodel = dict(inner=dict(y=[3], z=(4, 5)))\nepoch = 3\n",
        },
        "child.py",
        [],
    ),
    "two bases in folders": (
        {
            "_base_/a.py": "a = dict(one=1)\nhooks = [dict(type='H')]\n",
            "_base_/b.py": "b = None\nname = 'b'\n",
            "deep/child.py": "_base_ = ['../_base_/a.py', '../_base_/b.py']\na = dict(two=2)\nname = 'c'\n",
        },
        "deep/child.py",
        [],
    ),
    "a base of a base": (
        {
            "one.py": "value = dict(a=dict(b=dict(c=1, d=2)))\n",
            "two.py": "_base_ = 'one.py'\nvalue = dict(a=dict(b=dict(c=3)))\n",
            "three.py": "_base_ = ['two.py']\nvalue = dict(a=dict(e=4))\n",
        },
        "three.py",
        [],
    ),
    "delete": (
        {
            "base.py": "optimizer = dict(type='SGD', lr=0.1, momentum=0.9)\nother = dict(a=dict(b=1, c=2))\n",
            "child.py": (
                "_base_ = 'base.py'\noptimizer = dict(_delete_=True, type='Adam', lr=1e-3)\n"
                "other = dict(a=dict(_delete_=True, d=3))\n"
            ),
        },
        "child.py",
        [],
    ),
    "values of a base": (
        {
            "base.py": "data = dict(num_classes=19, names=['a', 'b'])\nrate = 0.002\n",
            "child.py": (
                "_base_ = 'base.py'\nmodel = dict(head=dict(classes={{ _base_.data.num_classes }}))\n"
                "names = {{ _base_.data.names }}\nrates = [{{ _base_.rate }}, {{_base_.rate}}]\n"
            ),
        },
        "child.py",
        [],
    ),
    "template words": (
        {
            "exp-one.py": (
                "name = '{{ fileBasenameNoExtension }}'\nfile = '{{ fileBasename }}'\n"
                "ending = '{{fileExtname}}'\n"
            )
        },
        "exp-one.py",
        [],
    ),
    "hidden names and arithmetic": (
        {
            "only.py": (
                "__hidden = dict(a=1)\n_kept = 2\nepoch = 50\neval_epoch = epoch // 5\n"
                "copies = [dict(scale=[s, s], **__hidden) for s in (0.9, 1.1)]\nflag = not False\n"
            )
        },
        "only.py",
        [],
    ),
    "plugin import": (
        {
            "only.py": (
                "custom_imports = dict(imports=['json'], allow_failed_imports=False)\nvalue = 1\n"
            )
        },
        "only.py",
        [],
    ),
    "options": (
        {
            "only.py": (
                "a = dict(b=1, c='x', new=dict(deep=False))\n"
                "data = dict(train=dict(transform=[dict(type='G', size=0.1), dict(type='T')]))\n"
                "lr = 0.1\nlist = listed = pair = nested = word = None\n"
            )
        },
        "only.py",
        [
            "a.b=2.5",
            "a.new.deep=true",
            "lr=1e-3",
            "data.train.transform.0.size=0.05",
            "list=1,2,x",
            "listed=[1,2.0,false]",
            "pair=(1,2)",
            "nested=[(1,2),(3,4)]",
            "word=hello",
        ],
    ),
}
