"""Triangles of simple shapes, and the parts that things of a simulated street are made of.

A part carries the raw SemanticKITTI class of its triangles, their reflectivity in 0..1, the
probability that a ray which hits it does not come back (glass), the spread in metres of the
range (leaves), and what it is made of, by which cameras colour it. Metres, z up; triangles are
float32 (t, 3, 3): triangle, corner, xyz.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

Triangles = NDArray[np.float32]  # (t, 3, 3): triangle, corner, xyz


class Part(NamedTuple):
    """Triangles of one class and material."""

    triangles: Triangles
    label: int
    reflectivity: float
    drop: float = 0.0
    scatter: float = 0.0
    material: str = "paint"


# fmt: off
_FACES = [[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4], [1, 2, 6], [1, 6, 5],
          [2, 3, 7], [2, 7, 6], [3, 0, 4], [3, 4, 7]]
# fmt: on


def box(
    low: ArrayLike, high: ArrayLike, front: float = 0.0, back: float = 0.0, side: float = 0.0
) -> Triangles:
    """A box between two corners; `front`, `back` and `side` draw its top edges in (a frustum)."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    bottom = [(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)]
    u0, u1, v0, v1 = x0 + back, x1 - front, y0 + side, y1 - side
    top = [(u0, v0, z1), (u1, v0, z1), (u1, v1, z1), (u0, v1, z1)]
    return np.asarray(bottom + top, np.float32)[_FACES]


def tube(
    start: ArrayLike, end: ArrayLike, radius: float, end_radius: float | None = None, sides: int = 6
) -> Triangles:
    """A closed cylinder, or cone with another `end_radius`."""
    p, q = np.asarray(start, np.float64), np.asarray(end, np.float64)
    axis = (q - p) / np.linalg.norm(q - p)
    u = np.cross(axis, [0.0, 0.0, 1.0] if abs(axis[2]) < 0.9 else [1.0, 0.0, 0.0])
    u /= np.linalg.norm(u)
    angle = np.arange(sides) * (2 * np.pi / sides)
    circle = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * np.cross(axis, u)
    a, b = p + radius * circle, q + (radius if end_radius is None else end_radius) * circle
    a2, b2 = np.roll(a, -1, 0), np.roll(b, -1, 0)
    whole_p, whole_q = np.broadcast_to(p, a.shape), np.broadcast_to(q, a.shape)
    faces = [(a, a2, b2), (a, b2, b), (whole_p, a2, a), (whole_q, b, b2)]
    return np.concatenate([np.stack(f, 1) for f in faces]).astype(np.float32)


def ring(centre: ArrayLike, outer: float, inner: float, sides: int = 12) -> Triangles:
    """A flat ring in the x-z plane: a bicycle's wheel."""
    angle = np.arange(sides + 1) * (2 * np.pi / sides)
    circle = np.stack([np.cos(angle), np.zeros_like(angle), np.sin(angle)], 1)
    a, b = np.asarray(centre) + outer * circle, np.asarray(centre) + inner * circle
    faces = [(a[:-1], a[1:], b[1:]), (a[:-1], b[1:], b[:-1])]
    return np.concatenate([np.stack(f, 1) for f in faces]).astype(np.float32)


def ellipsoid(centre: ArrayLike, radii: ArrayLike, rows: int = 5, columns: int = 8) -> Triangles:
    """An ellipsoid of rows x columns quads."""
    polar = np.linspace(0, np.pi, rows + 1)[:, None]
    azimuth = np.linspace(0, 2 * np.pi, columns + 1)[None]
    z = np.broadcast_to(np.cos(polar), (rows + 1, columns + 1))
    grid = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), z], -1)
    return quads(np.asarray(centre) + grid * np.asarray(radii))


def quads(grid: NDArray) -> Triangles:
    """Triangles of a grid of corners (r + 1, c + 1, 3)."""
    a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]
    both = np.stack([np.stack([a, b, c], 2), np.stack([a, c, d], 2)], 2)
    return both.reshape(-1, 3, 3).astype(np.float32)


def leaves(rng: Generator, centres: NDArray, size: float) -> Triangles:
    """One randomly turned triangle of about `size` metres around each centre (n, 3)."""
    return (centres[:, None] + rng.normal(0, 0.45 * size, (len(centres), 3, 3))).astype(np.float32)


def in_ball(rng: Generator, count: int, centre: ArrayLike, radii: ArrayLike) -> NDArray:
    """Points spread evenly in an ellipsoid, (count, 3)."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.asarray(centre) + direction * np.cbrt(rng.random((count, 1))) * np.asarray(radii)


def turned(
    triangles: Triangles, yaw: float, shift: ArrayLike = (0, 0, 0), roll: float = 0.0
) -> Triangles:
    """Rolled about x, turned about z, then shifted; computed in float64."""
    c, s, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(roll), np.sin(roll)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, cr, -sr], [0, sr, cr]]
    )
    return (triangles @ rotation.T + np.asarray(shift)).astype(np.float32)


def placed(parts: list[Part], yaw: float, shift: ArrayLike, roll: float = 0.0) -> list[Part]:
    """The parts moved together."""
    return [p._replace(triangles=turned(p.triangles, yaw, shift, roll)) for p in parts]


def upright(x0: float, x1: float, z0: float, z1: float, y: float) -> Triangles:
    """An upright rectangle facing -y."""
    corners = np.array([[[x0, y, z0], [x1, y, z0]], [[x0, y, z1], [x1, y, z1]]])
    return quads(corners)


class Group(NamedTuple):
    """What triangles that were added together have in common."""

    count: int
    material: str
    thing: int  # parts of one thing share it: its instance id, or a negative number


class Soup:
    """Triangles, each with a label (instance id in the high 16 bits) and a material.

    `groups` lists them by what they are made of, in the order of `arrays`.
    """

    def __init__(self) -> None:
        self._triangles: list[Triangles] = []
        self._rows: list[tuple[NDArray, ...]] = []
        self.groups: list[Group] = []
        self._things = 0

    def add(
        self,
        triangles: Triangles,
        label: ArrayLike,
        reflectivity: ArrayLike,
        drop: float = 0.0,
        scatter: float = 0.0,
        material: str = "ground",
        thing: int = 0,
    ) -> None:
        """Add triangles; label and reflectivity are one value or one per triangle."""
        row = zip((label, reflectivity, drop, scatter), (np.uint32, *[np.float32] * 3), strict=True)
        columns = [np.broadcast_to(np.asarray(v, t), len(triangles)) for v, t in row]
        self._triangles.append(triangles)
        self._rows.append(tuple(columns))
        self.groups.append(Group(len(triangles), material, thing))

    def add_parts(self, parts: list[Part], instance: int = 0) -> None:
        """Add a thing; only vehicles, people and the like have an instance id."""
        self._things += 1
        thing = instance or -self._things
        for part in parts:
            label = part.label | (instance << 16)
            look = (part.reflectivity, part.drop, part.scatter, part.material, thing)
            self.add(part.triangles, label, *look)

    def arrays(self) -> tuple[Triangles, NDArray, NDArray, NDArray, NDArray]:
        """Triangles (t, 3, 3) float32, label (t,) uint32, reflectivity, drop, scatter (t,)."""
        columns = [np.concatenate(c) for c in zip(*self._rows, strict=True)]
        return (np.concatenate(self._triangles), *columns)
