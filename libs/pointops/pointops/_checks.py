"""Checks of arguments, shared by all functions: one line that says what was wrong with which one."""

import math

import torch
from torch import Tensor


def cloud(name: str, points: Tensor) -> Tensor:
    """Points (n, 3) as float32, or float64 where they are; finite, cut from the graph.

    Raises:
        ValueError: not a floating point tensor (n, 3), or a coordinate is not finite.
    """
    if points.dim() != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(
            f"{name} must be floating point and (n, 3), got {points.dtype} {tuple(points.shape)}"
        )
    points = points.detach()
    if points.dtype != torch.float64:
        points = points.float()
    # A sum is not finite if a term is not; a sum that overflowed is looked at again. numpy on CPU:
    # such short work does not pay for waking torch's threads.
    total = points.numpy().sum() if points.device.type == "cpu" else points.sum().item()
    if not math.isfinite(total) and not torch.isfinite(points).all():
        row = int((~torch.isfinite(points).all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} is not finite in row {row}: {points[row].tolist()}")
    return points


def ends(name: str, offset: Tensor, rows: int | None = None) -> list[int]:
    """The cumulative ends of the scans as a list.

    Raises:
        ValueError: not a vector of whole numbers, decreasing or negative, or, where `rows` is
            given, not ending there.
    """
    if offset.dim() != 1 or offset.is_floating_point() or offset.dtype == torch.bool:
        raise ValueError(
            f"{name} must be a vector of whole numbers, got {offset.dtype} {tuple(offset.shape)}"
        )
    values = offset.tolist()
    for scan, (before, after) in enumerate(zip([0, *values], values)):
        if after < before:
            raise ValueError(
                f"{name} must not decrease: scan {scan} ends at {after}, after {before}"
            )
    last = values[-1] if values else 0
    if rows is not None and last != rows:
        raise ValueError(f"{name} ends at {last}, but there are {rows} points")
    return values


def spans(ends: list[int]) -> list[tuple[int, int]]:
    """First and one past the last row of every scan."""
    return list(zip([0, *ends[:-1]], ends))


def same_scans(ends: list[int], new_ends: list[int]) -> None:
    """Raise ValueError unless both have one end per scan."""
    if len(ends) != len(new_ends):
        raise ValueError(f"offset has {len(ends)} scans, new_offset has {len(new_ends)}")


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all are on one device."""
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {where}")


def at_least_one(name: str, value: int) -> None:
    """Raise ValueError for a count below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def shape(name: str, tensor: Tensor, *sizes: int | None) -> None:
    """Raise ValueError unless the tensor has these sizes; None stands for any."""
    given = tuple(tensor.shape)
    if len(given) != len(sizes) or any(s is not None and s != g for s, g in zip(sizes, given)):
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{name} must have the shape ({wanted}), got {given}")


def rows(name: str, index: Tensor, size: int, lowest: int = 0) -> None:
    """Raise ValueError unless the index is of whole numbers from `lowest` to size - 1.

    The values are looked at on CPU only: elsewhere that would wait for the device, which notices
    rows beyond the end itself.
    """
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{name} must be of whole numbers, got {index.dtype}")
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < lowest or high >= size:
        raise ValueError(
            f"{name} must be rows from {lowest} to {size - 1}, got values from {low} to {high}"
        )
