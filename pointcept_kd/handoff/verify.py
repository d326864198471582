"""Load a file with OpenPCDet's own code, on a machine without its compiled parts.

    python pointcept_kd/handoff/verify.py JOB.json

A program of its own: it puts empty modules in the place of OpenPCDet's compiled operations and data sets, which no
other process should have. From the checkout it takes the reader of configs, the detectors, and the loader of weights.
One thread, since spconv's kernels for the CPU give some wrong rows with more.

The job: `root`, the checkout; `config` and `weights`, files; `space`, lists `range` and `voxel`; `channels` of a point;
`voxels`, a file with `indices` (n, 4) as (scan, z, y, x) and `features` (n, channels); `result`, the JSON to write. Its
name with `.pt` in the place of the suffix gets the encoder's state and what it makes of the voxels. The JSON has
`loaded` and `total`; `not_updated_backbone`, how many of the encoder's entries kept their initial values; `parts`,
entries by module; `lines`, what the loader logged; or else `error`, one line.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

COMPILED = (
    "iou3d_nms.iou3d_nms_cuda",
    "roiaware_pool3d.roiaware_pool3d_cuda",
    "roipoint_pool3d.roipoint_pool3d_cuda",
    "pointnet2.pointnet2_stack.pointnet2_stack_cuda",
    "pointnet2.pointnet2_batch.pointnet2_batch_cuda",
    "bev_pool.bev_pool_ext",
    "ingroup_inds.ingroup_inds_cuda",
)
# Nothing that is built here calls into these. Image networks alone use torchvision.
UNUSED = ("SharedArray", "numba", "numba.cuda", "torchvision", "pcdet.datasets")
UNUSED_TOO = ("pcdet.datasets.augmentor",)
NEEDED = ("easydict", "yaml", "scipy", "tqdm", "spconv")


def stand_in() -> None:
    """Put modules without content where OpenPCDet imports what the check does not need."""
    # Both look for torchvision and numba as they are imported, and would take the replacements for real.
    importlib.import_module("torch._dynamo")
    for name in (*UNUSED, *UNUSED_TOO):
        sys.modules[name] = MagicMock(name=name)
    for name in COMPILED:
        sys.modules[f"pcdet.ops.{name}"] = types.ModuleType(f"pcdet.ops.{name}")
    version = types.ModuleType("pcdet.version")  # setup.py writes it
    version.__version__ = "0.6.0"  # type: ignore[attr-defined]
    sys.modules["pcdet.version"] = version
    # The generator of anchors moves them to a GPU.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def build(job: dict[str, Any]) -> torch.nn.Module:
    """The detector of the config, on the CPU."""
    import numpy as np
    from easydict import EasyDict

    settings = importlib.import_module("pcdet.config").cfg_from_yaml_file(job["config"], EasyDict())
    low, high = np.array(job["space"]["range"], dtype=np.float64).reshape(2, 3)
    size = job["space"]["voxel"]
    data = types.SimpleNamespace(
        class_names=settings.CLASS_NAMES,
        point_feature_encoder=types.SimpleNamespace(num_point_features=job["channels"]),
        point_cloud_range=np.array(job["space"]["range"], dtype=np.float32),
        voxel_size=size,
        grid_size=np.round((high - low) / np.array(size)).astype(np.int64),
        depth_downsample_factor=None,
    )
    models = importlib.import_module("pcdet.models")
    return models.build_network(
        model_cfg=settings.MODEL, num_class=len(settings.CLASS_NAMES), dataset=data
    )


def load(model: Any, path: str) -> dict[str, Any]:
    """Run OpenPCDet's loader and count what it logs."""
    lines: list[str] = []
    log = types.SimpleNamespace(info=lambda text: lines.append(str(text)))
    model.load_params_from_file(filename=path, logger=log, to_cpu=True)
    match = re.search(r"loaded (\d+)/(\d+)", lines[-1])
    if match is None:
        raise ValueError(f"the loader's last line is {lines[-1]!r}, without 'loaded N/M'")
    left = [line for line in lines if line.startswith("Not updated weight backbone_3d.")]
    parts: dict[str, int] = {}
    for key in model.state_dict():
        top = key.partition(".")[0]
        parts[top] = parts.get(top, 0) + 1
    return {
        "loaded": int(match[1]),
        "total": int(match[2]),
        "not_updated_backbone": len(left),
        "parts": parts,
        "lines": lines,
    }


def encode(model: Any, path: str) -> dict[str, torch.Tensor]:
    """The encoder's last features of voxels, and their cells."""
    voxels = torch.load(path, weights_only=True)
    encoder = model.backbone_3d.eval()
    for module in encoder.modules():
        if hasattr(module, "indice_key"):
            module.training = True  # spconv refuses a bias on the CPU in evaluation
    batch = {
        "voxel_features": voxels["features"],
        "voxel_coords": voxels["indices"].float(),
        "batch_size": 1,
    }
    with torch.no_grad():
        out = encoder(batch)["encoded_spconv_tensor"]
    return {"indices": out.indices.long(), "features": out.features}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that a job asks for."""
    torch.set_num_threads(1)
    lacking = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            lacking.append({"yaml": "pyyaml"}.get(name, name))
    if lacking:
        return {"error": f"OpenPCDet needs {', '.join(lacking)} in {sys.executable}; install them"}
    stand_in()
    # Where OpenPCDet's commands run, and where it looks for configs from.
    os.chdir(Path(job["root"]) / "tools")
    sys.path.insert(0, job["root"])
    torch.manual_seed(0)
    model = build(job)
    report = load(model, job["weights"])
    state = model.state_dict()
    kept: dict[str, Any] = {
        "state": {k: v.clone() for k, v in state.items() if k.startswith("backbone_3d.")}
    }
    kept |= encode(model, job["voxels"])
    torch.save(kept, Path(job["result"]).with_suffix(".pt"))
    return report


def main(path: str) -> int:
    """Read a job, write its result."""
    # The folder of this file holds modules of other names than OpenPCDet would expect there.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    job = json.loads(Path(path).read_text())
    try:
        report = run(job)
    except Exception as error:  # a foreign program: whatever it raises is its answer
        first = (str(error).strip().splitlines() or [""])[0]
        report = {"error": f"{type(error).__name__}: {first[:300]}"}
    Path(job["result"]).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
