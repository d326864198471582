"""OpenPCDet's detectors with a VoxelNet encoder: their configs as dicts, and how many entries their states have.

Values are those of published KITTI results (SECOND, Yan et al., 2018; Part-A2, arXiv:1907.03670; PV-RCNN,
arXiv:1912.13192; Voxel R-CNN, arXiv:2012.15712; for ONCE, CenterPoint as in arXiv:2106.11037) as OpenPCDet 0.6 trains
them: x, y, z and reflectance of 0 to 1, Adam with one cycle over 80 epochs, boxes of other frames pasted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Entries of an encoder's state; the residual one has 16 fewer without the biases of its convolutions.
ENCODER_ENTRIES = {"VoxelBackBone8x": 72, "VoxelResBackBone8x": 142, "UNetV2": 168}
RESIDUAL_BIASES = 16
KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
ONCE_CLASSES = ("Car", "Bus", "Truck", "Pedestrian", "Cyclist")
QUARTER = 0.78539816  # of a turn's half, to as many digits as trained models were made with


@dataclass(frozen=True)
class Detector:
    """A model of OpenPCDet.

    model: its class there; backbones: encoders that its config can have, the usual one first; others: entries of its
    state beside the encoder; data: the data set; classes: that it finds.
    """

    model: str
    backbones: tuple[str, ...]
    others: int
    data: str = "kitti"
    classes: tuple[str, ...] = KITTI_CLASSES


DETECTORS = {
    "second": Detector("SECONDNet", ("VoxelBackBone8x",), 91),
    "pv_rcnn": Detector("PVRCNN", ("VoxelBackBone8x",), 295),
    "parta2": Detector("PartA2Net", ("UNetV2", "VoxelBackBone8x"), 165),
    "voxel_rcnn": Detector("VoxelRCNN", ("VoxelBackBone8x",), 185, classes=("Car",)),
    "second_iou": Detector("SECONDNetIoU", ("VoxelBackBone8x",), 117),
    "centerpoint": Detector(
        "CenterPoint", ("VoxelResBackBone8x", "VoxelBackBone8x"), 137, "once", ONCE_CLASSES
    ),
}


@dataclass(frozen=True)
class Space:
    """Where a data set's points are: range (x, y, z low, then high) and voxels in metres."""

    range: tuple[float, ...]
    voxel: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along x, y, z."""
        sides = zip(self.range[:3], self.range[3:], self.voxel)
        return tuple(round((high - low) / size) for low, high, size in sides)


SPACES = {
    "kitti": Space((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), (0.05, 0.05, 0.1)),
    "once": Space((-75.2, -75.2, -5.0, 75.2, 75.2, 3.0), (0.1, 0.1, 0.2)),
}


def config_backbone(name: str, given: str) -> str:
    """The encoder that the detector's config names, for weights of the class `given`.

    Part-A2 needs its decoder, so weights of an encoder alone fill a part of it.
    """
    return "UNetV2" if name == "parta2" else given


def entries(name: str, given: str, use_bias: bool = True) -> int:
    """Entries of the detector's state with weights of the class `given`."""
    backbone = config_backbone(name, given)
    fewer = 0 if use_bias or backbone != "VoxelResBackBone8x" else RESIDUAL_BIASES
    return DETECTORS[name].others + ENCODER_ENTRIES[backbone] - fewer


def config(
    name: str, given: str | None = None, use_bias: bool = True, inline: bool = False
) -> dict[str, Any]:
    """Config of a detector, for OpenPCDet's `--cfg_file`.

    Args:
        name: one of `DETECTORS`.
        given: class of the weights, by default the detector's usual encoder.
        use_bias: whether the residual encoder's convolutions have biases.
        inline: with all of the data set's config, instead of naming OpenPCDet's file of it as `_BASE_CONFIG_`.

    Raises:
        ValueError: for an encoder that the detector cannot have.
    """
    detector = DETECTORS[name]
    given = given or detector.backbones[0]
    if given not in detector.backbones:
        raise ValueError(f"{name} takes {' or '.join(detector.backbones)}, not {given}")
    base: dict[str, Any] = {"_BASE_CONFIG_": f"cfgs/dataset_configs/{detector.data}_dataset.yaml"}
    return {
        "CLASS_NAMES": list(detector.classes),
        "DATA_CONFIG": {
            **(_data_set(detector.data) if inline else base),
            "DATA_AUGMENTOR": _augmentor(name),
        },
        "MODEL": {"NAME": detector.model, **_model(name, config_backbone(name, given), use_bias)},
        "OPTIMIZATION": _optimization(name),
    }


# ------------------------------------------------------------------------------------------ data


def _data_set(data: str) -> dict[str, Any]:
    space, once = SPACES[data], data == "once"
    pickles = {split: [f"{data}_infos_{split}.pkl"] for split in ("train", "val")}
    features = ["x", "y", "z", "intensity"]
    most = {"train": 60000, "test": 60000} if once else {"train": 16000, "test": 40000}
    return {
        "DATASET": "ONCEDataset" if once else "KittiDataset",
        "DATA_PATH": f"../data/{data}",
        **({"CLOUD_DATA_PATH": "/cache/once"} if once else {}),
        "POINT_CLOUD_RANGE": list(space.range),
        "DATA_SPLIT": {"train": "train", "test": "val"},
        "INFO_PATH": {**pickles, "test": ["once_infos_test.pkl"]}
        if once
        else {"train": pickles["train"], "test": pickles["val"]},
        **({} if once else {"GET_ITEM_LIST": ["points"], "FOV_POINTS_ONLY": True}),
        "POINT_FEATURE_ENCODING": {
            "encoding_type": "absolute_coordinates_encoding",
            "used_feature_list": features,
            "src_feature_list": features,
        },
        "DATA_PROCESSOR": [
            {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
            {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": False}},
            {
                "NAME": "transform_points_to_voxels",
                "VOXEL_SIZE": list(space.voxel),
                "MAX_POINTS_PER_VOXEL": 5,
                "MAX_NUMBER_OF_VOXELS": most,
            },
        ],
    }


def _augmentor(name: str) -> dict[str, Any]:
    detector = DETECTORS[name]
    once = detector.data == "once"
    # Boxes pasted into a frame, and whether those that are there count.
    if once:
        groups = {"Car": 1, "Bus": 4, "Truck": 3, "Pedestrian": 2, "Cyclist": 2}
    elif name in ("pv_rcnn", "voxel_rcnn"):
        groups = {"Car": 15, "Pedestrian": 10, "Cyclist": 10}
    else:
        groups = {"Car": 20, "Pedestrian": 15, "Cyclist": 15}
    prepare: dict[str, Any] = {"filter_by_min_points": [f"{c}:5" for c in detector.classes]}
    if not once:
        prepare["filter_by_difficulty"] = [-1]
    sampling = {
        "NAME": "gt_sampling",
        "USE_ROAD_PLANE": not once,
        "DB_INFO_PATH": [f"{detector.data}_dbinfos_train.pkl"],
        "PREPARE": prepare,
        "SAMPLE_GROUPS": [f"{c}:{groups[c]}" for c in detector.classes],
        "NUM_POINT_FEATURES": 4,
        "DATABASE_WITH_FAKELIDAR": False,
        "REMOVE_EXTRA_WIDTH": [0.0, 0.0, 0.0],
        "LIMIT_WHOLE_SCENE": name not in ("pv_rcnn", "voxel_rcnn"),
    }
    return {
        "DISABLE_AUG_LIST": ["placeholder"],
        "AUG_CONFIG_LIST": [
            sampling,
            {"NAME": "random_world_flip", "ALONG_AXIS_LIST": ["x", "y"] if once else ["x"]},
            {"NAME": "random_world_rotation", "WORLD_ROT_ANGLE": [-QUARTER, QUARTER]},
            {"NAME": "random_world_scaling", "WORLD_SCALE_RANGE": [0.95, 1.05]},
        ],
    }


def _optimization(name: str) -> dict[str, Any]:
    two_stage = name in ("pv_rcnn", "voxel_rcnn")
    slow = name in ("second", "second_iou", "centerpoint")
    return {
        "BATCH_SIZE_PER_GPU": 2 if two_stage else 4,
        "NUM_EPOCHS": 80,
        "OPTIMIZER": "adam_onecycle",
        "LR": 0.003 if slow else 0.01,
        "WEIGHT_DECAY": 0.01,
        "MOMENTUM": 0.9,
        "MOMS": [0.95, 0.85],
        "PCT_START": 0.4,
        "DIV_FACTOR": 10,
        "DECAY_STEP_LIST": [35, 45],
        "LR_DECAY": 0.1,
        "LR_CLIP": 1e-7,
        "LR_WARMUP": False,
        "WARMUP_EPOCH": 1,
        "GRAD_NORM_CLIP": 35 if name == "centerpoint" else 10,
    }


# ------------------------------------------------------------------------------------------ model


def _model(name: str, backbone: str, use_bias: bool) -> dict[str, Any]:
    encoder: dict[str, Any] = {"NAME": backbone}
    if backbone == "VoxelResBackBone8x":
        encoder["USE_BIAS"] = use_bias
    narrow = 2 if name == "voxel_rcnn" else 1
    parts: dict[str, Any] = {
        "VFE": {"NAME": "MeanVFE"},
        "BACKBONE_3D": encoder,
        "MAP_TO_BEV": {"NAME": "HeightCompression", "NUM_BEV_FEATURES": 256},
        "BACKBONE_2D": {
            "NAME": "BaseBEVBackbone",
            "LAYER_NUMS": [5, 5],
            "LAYER_STRIDES": [1, 2],
            "NUM_FILTERS": [128 // narrow, 256 // narrow],
            "UPSAMPLE_STRIDES": [1, 2],
            "NUM_UPSAMPLE_FILTERS": [256 // narrow, 256 // narrow],
        },
        "DENSE_HEAD": _centre_head() if name == "centerpoint" else _anchor_head(name),
    }
    if name == "pv_rcnn":
        parts["PFE"] = _set_abstraction()
    if name in _POINT_HEADS:
        parts["POINT_HEAD"] = _POINT_HEADS[name]()
    if name in _ROI_HEADS:
        parts["ROI_HEAD"] = _ROI_HEADS[name]()
    parts["POST_PROCESSING"] = _post_processing(name)
    return parts


def _nms(threshold: float, before: int, after: int, **more: Any) -> dict[str, Any]:
    return {
        "MULTI_CLASSES_NMS": False,
        "NMS_TYPE": "nms_gpu",
        **more,
        "NMS_THRESH": threshold,
        "NMS_PRE_MAXSIZE": before,
        "NMS_POST_MAXSIZE": after,
    }


def _post_processing(name: str) -> dict[str, Any]:
    shared = {"RECALL_THRESH_LIST": [0.3, 0.5, 0.7], "OUTPUT_RAW_SCORE": False}
    if name == "centerpoint":  # its head filters boxes itself
        return {**shared, "EVAL_METRIC": "once"}
    return {
        **shared,
        "SCORE_THRESH": 0.3 if name == "voxel_rcnn" else 0.1,
        "EVAL_METRIC": "kitti",
        "NMS_CONFIG": _nms(0.01 if name in ("second", "second_iou") else 0.1, 4096, 500),
    }


def _anchor_head(name: str) -> dict[str, Any]:
    # Length, width, height and bottom in metres; the overlaps from which an anchor is an object, and below which not.
    kinds = {
        "Car": ([3.9, 1.6, 1.56], -1.78, 0.6, 0.45),
        "Pedestrian": ([0.8, 0.6, 1.73], -0.6, 0.5, 0.35),
        "Cyclist": ([1.76, 0.6, 1.73], -0.6, 0.5, 0.35),
    }
    anchors = []
    for label in DETECTORS[name].classes:
        size, bottom, matched, unmatched = kinds[label]
        anchors.append(
            {
                "class_name": label,
                "anchor_sizes": [size],
                "anchor_rotations": [0, 1.57],
                "anchor_bottom_heights": [-1.78 if name == "parta2" else bottom],
                "align_center": False,
                "feature_map_stride": 8,
                "matched_threshold": matched,
                "unmatched_threshold": unmatched,
            }
        )
    return {
        "NAME": "AnchorHeadSingle",
        "CLASS_AGNOSTIC": False,
        "USE_DIRECTION_CLASSIFIER": True,
        "DIR_OFFSET": 0.78539,
        "DIR_LIMIT_OFFSET": 0.0,
        "NUM_DIR_BINS": 2,
        "ANCHOR_GENERATOR_CONFIG": anchors,
        "TARGET_ASSIGNER_CONFIG": {
            "NAME": "AxisAlignedTargetAssigner",
            "POS_FRACTION": -1.0,
            "SAMPLE_SIZE": 512,
            "NORM_BY_NUM_EXAMPLES": False,
            "MATCH_HEIGHT": False,
            "BOX_CODER": "ResidualCoder",
        },
        "LOSS_CONFIG": {"LOSS_WEIGHTS": _weights(7, cls=1.0, loc=2.0, dir=0.2)},
    }


def _centre_head() -> dict[str, Any]:
    outputs = {"center": 2, "center_z": 1, "dim": 3, "rot": 2}
    return {
        "NAME": "CenterHead",
        "CLASS_AGNOSTIC": False,
        "CLASS_NAMES_EACH_HEAD": [list(ONCE_CLASSES)],
        "SHARED_CONV_CHANNEL": 64,
        "USE_BIAS_BEFORE_NORM": True,
        "NUM_HM_CONV": 2,
        "SEPARATE_HEAD_CFG": {
            "HEAD_ORDER": list(outputs),
            "HEAD_DICT": {k: {"out_channels": c, "num_conv": 2} for k, c in outputs.items()},
        },
        "TARGET_ASSIGNER_CONFIG": {
            "FEATURE_MAP_STRIDE": 8,
            "NUM_MAX_OBJS": 500,
            "GAUSSIAN_OVERLAP": 0.1,
            "MIN_RADIUS": 2,
            "DENSE_REG": 1,
        },
        "LOSS_CONFIG": {"LOSS_WEIGHTS": _weights(8, cls=1.0, loc=1.0)},
        "POST_PROCESSING": {
            "SCORE_THRESH": 0.1,
            "POST_CENTER_LIMIT_RANGE": list(SPACES["once"].range),
            "MAX_OBJ_PER_SAMPLE": 500,
            "NMS_CONFIG": _nms(0.01, 4096, 500),
        },
    }


def _weights(code: int, **parts: float) -> dict[str, Any]:
    named: dict[str, Any] = {f"{part}_weight": weight for part, weight in parts.items()}
    return {**named, "code_weights": [1.0] * code}


def _pooling(radii: Sequence[float], width: int, samples: Sequence[int]) -> dict[str, Any]:
    return {
        "MLPS": [[width, width]] * len(radii),
        "POOL_RADIUS": list(radii),
        "NSAMPLE": list(samples),
    }


def _set_abstraction() -> dict[str, Any]:
    levels = {
        f"x_conv{i + 1}": {"DOWNSAMPLE_FACTOR": 2**i, **_pooling(radii, width, samples)}
        for i, (radii, width, samples) in enumerate(
            [
                ((0.4, 0.8), 16, (16, 16)),
                ((0.8, 1.2), 32, (16, 32)),
                ((1.2, 2.4), 64, (16, 32)),
                ((2.4, 4.8), 64, (16, 32)),
            ]
        )
    }
    return {
        "NAME": "VoxelSetAbstraction",
        "POINT_SOURCE": "raw_points",
        "NUM_KEYPOINTS": 2048,
        "NUM_OUTPUT_FEATURES": 128,
        "SAMPLE_METHOD": "FPS",
        "FEATURES_SOURCE": ["bev", *levels, "raw_points"],
        "SA_LAYER": {"raw_points": _pooling((0.4, 0.8), 16, (16, 16)), **levels},
    }


def _point_head(name: str, losses: Sequence[str], **layers: Any) -> dict[str, Any]:
    return {
        "NAME": name,
        "CLASS_AGNOSTIC": True,
        **layers,
        "TARGET_CONFIG": {"GT_EXTRA_WIDTH": [0.2, 0.2, 0.2]},
        "LOSS_CONFIG": {
            "LOSS_REG": "smooth-l1",
            "LOSS_WEIGHTS": {f"point_{part}_weight": 1.0 for part in losses},
        },
    }


def _roi_head(
    name: str,
    shared: int,
    losses: dict[str, Any],
    second: str = "REG_FC",
    foreground: float = 0.55,
    test: dict[str, Any] | None = None,
    **pool: Any,
) -> dict[str, Any]:
    first = {} if second == "IOU_FC" else {"CLS_FC": [256, 256]}
    return {
        "NAME": name,
        "CLASS_AGNOSTIC": True,
        "SHARED_FC": [256] * shared,
        **first,
        second: [256, 256],
        "DP_RATIO": 0.3,
        "NMS_CONFIG": {"TRAIN": _nms(0.8, 9000, 512), "TEST": test or _nms(0.7, 1024, 100)},
        **pool,
        "TARGET_CONFIG": {
            "BOX_CODER": "ResidualCoder",
            "ROI_PER_IMAGE": 128,
            "FG_RATIO": 0.5,
            "SAMPLE_ROI_BY_EACH_CLASS": True,
            "CLS_SCORE_TYPE": "roi_iou",
            "CLS_FG_THRESH": 0.75,
            "CLS_BG_THRESH": 0.25,
            "CLS_BG_THRESH_LO": 0.1,
            "HARD_BG_RATIO": 0.8,
            "REG_FG_THRESH": foreground,
        },
        "LOSS_CONFIG": losses,
    }


def _box_losses(*more: str, **switches: Any) -> dict[str, Any]:
    parts = dict.fromkeys(("rcnn_cls", "rcnn_reg", "rcnn_corner", *more), 1.0)
    return {
        "CLS_LOSS": "BinaryCrossEntropy",
        "REG_LOSS": "smooth-l1",
        "CORNER_LOSS_REGULARIZATION": True,
        **switches,
        "LOSS_WEIGHTS": _weights(7, **parts),
    }


def _voxel_pooling() -> dict[str, Any]:
    layers = {
        f"x_conv{level}": {
            "MLPS": [[32, 32]],
            "QUERY_RANGES": [[4, 4, 4]],
            "POOL_RADIUS": [radius],
            "NSAMPLE": [16],
            "POOL_METHOD": "max_pool",
        }
        for level, radius in ((2, 0.4), (3, 0.8), (4, 1.6))
    }
    return {
        "FEATURES_SOURCE": list(layers),
        "PRE_MLP": True,
        "GRID_SIZE": 6,
        "POOL_LAYERS": layers,
    }


_POINT_HEADS = {
    "pv_rcnn": lambda: _point_head(
        "PointHeadSimple", ["cls"], CLS_FC=[256, 256], USE_POINT_FEATURES_BEFORE_FUSION=True
    ),
    "parta2": lambda: _point_head(
        "PointIntraPartOffsetHead", ["cls", "part"], CLS_FC=[], PART_FC=[]
    ),
}
_ROI_HEADS = {
    "pv_rcnn": lambda: _roi_head(
        "PVRCNNHead",
        2,
        _box_losses(),
        ROI_GRID_POOL={
            "GRID_SIZE": 6,
            **_pooling((0.8, 1.6), 64, (16, 16)),
            "POOL_METHOD": "max_pool",
        },
    ),
    "parta2": lambda: _roi_head(
        "PartA2FCHead",
        3,
        _box_losses(),
        foreground=0.65,
        SEG_MASK_SCORE_THRESH=0.3,
        ROI_AWARE_POOL={"POOL_SIZE": 12, "NUM_FEATURES": 128, "MAX_POINTS_PER_VOXEL": 128},
    ),
    "voxel_rcnn": lambda: _roi_head(
        "VoxelRCNNHead",
        2,
        _box_losses("rcnn_iou3d", GRID_3D_IOU_LOSS=False),
        test=_nms(0.7, 2048, 100, USE_FAST_NMS=False, SCORE_THRESH=0.0),
        ROI_GRID_POOL=_voxel_pooling(),
    ),
    "second_iou": lambda: _roi_head(
        "SECONDHead",
        2,
        {"IOU_LOSS": "BinaryCrossEntropy", "LOSS_WEIGHTS": _weights(7, rcnn_iou=1.0)},
        second="IOU_FC",
        ROI_GRID_POOL={"GRID_SIZE": 7, "IN_CHANNEL": 512, "DOWNSAMPLE_RATIO": 8},
    ),
}
