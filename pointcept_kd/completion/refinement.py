"""The refiner's training and use: six moved points for every point of a completed scan.

    L = CD2(p + d, g) = mean_i min_j |q_i - g_j|^2 + mean_j min_i |g_j - q_i|^2,      q the moved points p_i + d_ik

averaged over scans; p are noisy points (P of a scan), d the offsets that the network finds for them (6 P), g the dense
scene (2 P). The network bounds an offset to 1 m along every axis.

Nunes et al., 2024, arXiv:2403.13470.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.checkpoint import load_checkpoint, load_into
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.ops.distance import chamfer_squared

from .diffusion import _build, cpu_threads, evaluating, full
from .sampler import crop

PUBLISHED = dict(type="kd.Refiner", cr=1.0)


def refinement_loss(
    moved: Float[Tensor, "n 3"],
    scene: Float[Tensor, "m 3"],
    moved_offset: Int[Tensor, " b"],
    scene_offset: Int[Tensor, " b"],
) -> Float[Tensor, ""]:
    """CD2 of moved points and dense scenes, mean over scans, in square metres.

    Args:
        moved: points that the network moved, with graph.
        scene: dense scenes.
        moved_offset, scene_offset: end rows of the scans.

    Raises:
        ValueError: see `pointcept_kd.ops.distance.chamfer_distance`.
    """
    values = chamfer_squared(full(moved), full(scene), moved_offset, scene_offset)
    return joint_mean(values.mean() if len(values) else full(moved).sum(), len(values))


@kd.MODELS.register_module()
class CompletionRefinement(nn.Module):
    """A network that moves copies of completed points to where the surface is.

    In training a batch holds `coord` (n, 3), noisy points in metres, with `offset`, and `complete` (m, 3), dense
    scenes, with `complete_offset`; returned are `loss` and `loss_chamfer`. In evaluation `coord` is a completed cloud;
    returned are `completed` and `completed_offset`.

    Args:
        network: config of the refiner, `forward(coord, offset) -> offsets (n, k, 3)` in metres; or the module.
        max_range: metres; in evaluation points farther from the sensor are dropped before they are refined.
    """

    def __init__(self, network: Mapping[str, Any] | nn.Module, max_range: float = 50.0) -> None:
        super().__init__()
        if not max_range > 0:
            raise InputError(f"max_range must be positive, got {max_range}")
        self.network: nn.Module = _build(network)
        self.max_range = max_range

    def moved(
        self, points: Float[Tensor, "n 3"], offset: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "m 3"], Int[Tensor, " b"]]:
        """All moved points, the k of a point in consecutive rows, and the end rows of their scans."""
        offsets = self.network(points, offset)
        if offsets.dim() != 3 or offsets.shape[::2] != (len(points), 3):
            raise InputError(
                f"{type(self.network).__name__} gives {tuple(offsets.shape)} for {len(points)} points; expected "
                "offsets of the shape (n, k, 3)"
            )
        return (points[:, None] + full(offsets)).flatten(0, 1), offset * offsets.shape[1]

    def refine(
        self,
        points: Float[Tensor, "n 3"],
        offset: Int[Tensor, " b"],
        threads: int | None = 1,
    ) -> tuple[Float[Tensor, "m 3"], Int[Tensor, " b"]]:
        """Refine completed scans, in evaluation mode and without gradient.

        One by one, and on the CPU by one thread, as `Completer.complete` does it.

        Args:
            points: completions in metres, sensor frame.
            offset: end rows of the scans; a scan without points stays without.
            threads: on the CPU; None: as many as torch has.

        Returns:
            k (six) times as many points, and their end rows.

        Raises:
            InputError: for offsets that do not cut the points into scans.
        """
        ends = offset.tolist()
        if ends != sorted(ends) or (ends[-1] if ends else 0) != len(points):
            raise InputError(f"offset {ends} does not divide {len(points)} points into scans")
        parts, counts = [], []
        with evaluating(self), cpu_threads(threads, points.device):
            for begin, end in zip([0, *ends[:-1]], ends):
                if begin < end:
                    parts.append(self.moved(points[begin:end], offset.new_tensor([end - begin]))[0])
                counts.append(len(parts[-1]) if begin < end else 0)
        moved = torch.cat(parts) if parts else points[:0]
        return moved, offset.new_tensor(counts).cumsum(0)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Refine the clouds of a batch; in training the loss."""
        coord, offset = batch["coord"], batch["offset"]
        if not self.training:
            near = coord.norm(dim=1) < self.max_range
            points, ends = self.refine(*crop(coord, offset, near))
            return {"completed": points, "completed_offset": ends}
        points, ends = self.moved(coord, offset)
        with torch.autocast(coord.device.type, enabled=False):
            loss = refinement_loss(points, batch["complete"], ends, batch["complete_offset"])
        return {"loss": loss, "loss_chamfer": loss.detach()}


def load_refinement(
    weight: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> CompletionRefinement:
    """A refiner with the weights of a checkpoint, frozen and in evaluation mode.

    Args:
        weight: a checkpoint of a training, or one that `tools/convert.py refiner` wrote.
        config: config file that the refiner was trained with. By default what the checkpoint itself says about its
            network, else the run's own `config.py` (exp/NAME/config.py beside exp/NAME/model/FILE), else the published
            size.
        device: where to put it.

    Raises:
        InputError: for a file that cannot be read, a config of something else, or weights that do not fit.
    """
    weight = Path(weight)
    checkpoint = load_checkpoint(weight)
    beside = weight.parent.parent / "config.py"
    source: Any = config or (beside if beside.is_file() else None)
    entry = None if config is not None else checkpoint.get("model_config")
    if entry is None:
        entry = PUBLISHED if source is None else Config.fromfile(source).get("model")
        said = "the published size" if source is None else str(source)
    else:
        said = f"what {weight} says about its network"
    model = None if not isinstance(entry, Mapping) else MODELS.build(_whole(entry))
    if not isinstance(model, CompletionRefinement):
        kind = type(model).__name__ if model is not None else "no model"
        raise InputError(
            f"{weight}: its config, {said}, has {kind}, expected a refiner; name the refiner's checkpoint, or its "
            "config"
        )
    weights = checkpoint["state_dict"]
    if not any(key.removeprefix("module.").startswith("network.") for key in weights):
        weights = {
            f"network.{key.removeprefix('module.')}": value for key, value in weights.items()
        }
    load_into(model, weights, strict=True, source=f"refiner: {weight}")
    return model.to(device).requires_grad_(False).eval()


def _whole(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a refinement, where only that of its network is given."""
    if str(entry.get("type")).removeprefix("kd.") == "Refiner":
        return dict(type="kd.CompletionRefinement", network=entry)
    return entry
