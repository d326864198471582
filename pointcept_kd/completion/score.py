"""Score distillation: a few-step student whose completions look, once noised, like the teacher's.

    dL/dtheta = E[ ( e_T(x_t, t, c) - e_A(x_t, t, c) ) dx/dtheta ]            x = G(z, c), x_t = x + sigma_t e

e_T is the frozen teacher's prediction, e_A that of an auxiliary network which is trained on the student's completions:
the difference of the two scores, up to the factor -1/sigma_t, and so the gradient of the divergence KL(student ||
teacher) of the noised completions. As a loss it is written

    Dist = mean( stopgrad(e_T - e_A) x )

whose gradient is that one and whose value means nothing. (With x_t - x in place of x, which looks alike, the gradient
is 0: both carry the same graph.) Beside it stand two structural losses that compare the completion x with the full
scene g, always through nearest neighbours, since row i of one has nothing to do with row i of the other:

    L_scene = CD2(x, g)
    L_point = mean_{kl} ( | g_k - g_l | - | x_{j(k)} - x_{j(l)} | )^2         k, l: key points of g; j: nearest in x

Key points are those of highest curvature, lambda_min / (lambda_1 + lambda_2 + lambda_3) of the covariance of their
neighbours.

Zhang et al., 2024, arXiv:2412.03515. Score distillation: Wang et al., 2023, arXiv:2305.16213; Yin et al., 2024,
arXiv:2311.18828 (the normalisation).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pointcept_kd.host import InputError
from pointcept_kd.host.errors import check_choice
from pointcept_kd.host.joint import joint_mean
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.distance import chamfer_squared, nearest_rows
from pointcept_kd.ops.neighbors import knn
from pointcept_kd.ops.scatter import segment_mean

from .diffusion import full
from .schedule import spread

SCENE_KINDS = ("chamfer", "matched", "rows")
POINT_KINDS = ("matched", "rows")
# Neighbourhoods held at once; 180 neighbours of 2**13 points are 35 MB of doubles.
_BLOCK = 2**13


def score_gap(
    eps_teacher: Float[Tensor, "n 3"], eps_aux: Float[Tensor, "n 3"]
) -> Float[Tensor, "n 3"]:
    """What the student descends along, e_T - e_A, without graph and in float32 at least."""
    return (full(eps_teacher) - full(eps_aux)).detach()


def score_surrogate(
    x: Float[Tensor, "n 3"],
    eps_teacher: Float[Tensor, "n 3"],
    eps_aux: Float[Tensor, "n 3"],
    weight: Tensor | float = 1.0,
) -> Float[Tensor, ""]:
    """Dist = mean( weight * stopgrad(e_T - e_A) * x ) over all numbers.

    Args:
        x: the student's completion, with graph.
        eps_teacher, eps_aux: noise that the two networks see in the noised completion; constants here.
        weight: a number, or one per row as (n, 1); a constant.

    Returns:
        The loss; dL/dx = weight (e_T - e_A) / (3 n). Its value has no meaning. 0, still connected, without points.

    Raises:
        InputError: when the three shapes differ.
    """
    if not x.shape == eps_teacher.shape == eps_aux.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (x, eps_teacher, eps_aux))
        raise InputError(f"points and the two predictions must have one shape, got {shapes}")
    if not x.numel():
        return joint_mean(full(x).sum(), 0)
    direction = score_gap(eps_teacher, eps_aux)
    direction = direction * (weight.detach() if isinstance(weight, Tensor) else weight)
    return joint_mean((direction * full(x)).mean(), x.numel())


def normalising_weight(
    x: Float[Tensor, "n 3"], clean: Float[Tensor, "n 3"], offset: Int[Tensor, " b"]
) -> Float[Tensor, "n 1"]:
    """1 / mean |x - D_T| of each scan, per row: gradients of one size at all times.

    Args:
        x: completions; a constant here.
        clean: D_T, what the teacher takes them for at time 0.
        offset: end rows of the scans.

    Yin et al., 2024, arXiv:2311.18828.
    """
    x, clean = full(x).detach(), full(clean).detach()
    error = (x - clean).abs().mean(1, keepdim=True)
    mean = segment_mean(error, offset2batch(offset).to(x.device), len(offset))[:, 0]
    return spread(1 / mean.clamp(min=1e-6), offset, len(x))[:, None]


def scene_loss(
    x: Float[Tensor, "n 3"],
    g: Float[Tensor, "m 3"],
    x_offset: Int[Tensor, " b"],
    g_offset: Int[Tensor, " b"],
    kind: str = "chamfer",
) -> Float[Tensor, ""]:
    """How far completions are from full scenes: mean over scans, in square metres.

    Args:
        x: completions, with graph.
        g: full scenes.
        x_offset, g_offset: end rows of the scans.
        kind: `chamfer`: CD2, both directions; `matched`: mean squared difference, over rows and coordinates, of each
            completed point to the nearest one of the scene; `rows`: the same with the point of the same row instead,
            which belongs to no point of x in particular and so pulls all of them to the scene's centre. For ablation.

    Raises:
        InputError: for an unknown kind, or rows that do not pair off.
        ValueError: for empty scans or points that are not finite.
    """
    check_choice("scene loss", kind, SCENE_KINDS)
    x, g = full(x), full(g).detach()
    if kind == "chamfer":
        values = chamfer_squared(x, g, x_offset, g_offset)
    else:
        if kind == "rows":
            _check_rows(x_offset, g_offset)
            target = g
        else:
            target = g[nearest_rows(x, g, x_offset, g_offset)]
        square = (x - target).square().mean(1, keepdim=True)
        values = segment_mean(square, offset2batch(x_offset).to(x.device), len(x_offset))[:, 0]
    return _scan_mean(values)


def _check_rows(x_offset: Tensor, g_offset: Tensor) -> None:
    if x_offset.tolist() != g_offset.tolist():
        raise InputError(
            f"kind='rows' pairs row with row: the completions end at {x_offset.tolist()}, the scenes at "
            f"{g_offset.tolist()}"
        )


def _scan_mean(values: Tensor) -> Tensor:
    """Mean over the scans of all processes."""
    return joint_mean(values.mean() if len(values) else values.sum(), len(values))


@torch.no_grad()
def curvature(points: Float[Tensor, "n 3"], neighbours: int = 180) -> Float[Tensor, " n"]:
    """Surface variation of every point: lambda_min / (sum of lambda) of its neighbours' covariance, in [0, 1/3].

    Args:
        points: one cloud, in metres.
        neighbours: how many nearest points, itself included; all of them where there are fewer.

    Returns:
        0 in a plane and where all neighbours coincide; 1/3 where no direction is preferred. float64 inside.

    Raises:
        ValueError: for fewer than 1 neighbour, or points that are not finite.

    Pauly et al., 2002, "Efficient simplification of point-sampled surfaces".
    """
    count = min(neighbours, len(points)) if neighbours > 0 else neighbours
    if not len(points):
        return full(points).sum(1)
    exact = points.double()
    rows = knn(exact, exact, count)[1]
    values = []
    for part in rows.split(_BLOCK):
        near = exact[part]
        near = near - near.mean(1, keepdim=True)
        spectrum = torch.linalg.eigvalsh(near.mT @ near / count).clamp(min=0)
        total = spectrum.sum(1)
        flat = total <= 0
        values.append((spectrum[:, 0] / torch.where(flat, 1, total)).masked_fill(flat, 0))
    return torch.cat(values).to(points.dtype if points.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def key_points(
    g: Float[Tensor, "m 3"],
    candidates: int,
    keys: int,
    neighbours: int = 180,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " k"]:
    """Rows of the `keys` points of highest curvature among `candidates` random ones; curvature within those.

    Fewer where the cloud has fewer. Equal curvatures go by the order of the draw.

    Raises:
        InputError: for fewer than 1 candidate or key.
    """
    if candidates < 1 or keys < 1:
        raise InputError(f"need at least 1 candidate and 1 key, got {candidates} and {keys}")
    drawn = torch.randperm(len(g), generator=generator)[:candidates].to(g.device)
    order = curvature(g[drawn], neighbours).sort(descending=True, stable=True).indices
    return drawn[order[:keys]]


def point_loss(
    x: Float[Tensor, "n 3"],
    g: Float[Tensor, "m 3"],
    x_offset: Int[Tensor, " b"],
    g_offset: Int[Tensor, " b"],
    candidates: int | None = None,
    keys: int | None = None,
    neighbours: int = 180,
    kind: str = "matched",
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """How far the mutual distances of key points are from those of their counterparts: mean over scans, square metres.

    Args:
        x: completions, with graph.
        g: full scenes.
        x_offset, g_offset: end rows of the scans.
        candidates: points of each scene among which key points are looked for; a tenth of the scene if None.
        keys: key points of each scene; a thirtieth if None.
        neighbours: of each candidate, among the candidates.
        kind: `matched`: the counterpart of a key point is the nearest completed point; `rows`: that of the same row,
            which is an unrelated one. For ablation.
        generator: of the candidates.

    Raises:
        InputError: for an unknown kind, or rows that do not pair off.
        ValueError: for empty completions or points that are not finite.
    """
    check_choice("point loss", kind, POINT_KINDS)
    if len(x_offset) != len(g_offset):
        raise InputError(f"{len(x_offset)} completions of {len(g_offset)} scenes")
    if kind == "rows":
        _check_rows(x_offset, g_offset)
    x, g = full(x), full(g).detach()
    values = []
    begin = start = 0
    for end, stop in zip(x_offset.tolist(), g_offset.tolist()):
        completed, scene = x[begin:end], g[start:stop]
        begin, start = end, stop
        rows = key_points(
            scene,
            max(1, len(scene) // 10) if candidates is None else candidates,
            max(1, len(scene) // 30) if keys is None else keys,
            neighbours,
            generator,
        )
        wanted = scene[rows]
        match = rows if kind == "rows" else nearest_rows(wanted, completed)
        values.append(F.mse_loss(_distances(completed[match]), _distances(wanted)))
    return _scan_mean(torch.stack(values) if values else x.sum(1))


def _distances(points: Tensor) -> Tensor:
    # Not through expanded squares, which in float32 are off by millimetres; 0 has gradient 0 here.
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
