"""A spinning LiDAR, ray-cast (Embree): which rays come back, from what, how strong, how noisy."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .shapes import Soup

MIN_RANGE = 1.5
OUTLIER = 1  # raw class of returns that belong to no thing


@dataclass(frozen=True)
class Difficulty:
    """How untidy scans are.

    Attributes:
        noise: standard deviation of ranges, metres.
        scatter, loss: factors of the spread in leaves and of the chance to lose a return.
        rain: share of rays that a drop sends back early; it also clouds the pictures.
        ghosts: chance that a ray which meets glass comes back from behind it.
        crowd: things that stand in the way of others, beyond the usual ones, per 60 m; a negative
            number leaves half of the parking places empty.
    """

    noise: float = 0.02
    scatter: float = 1.0
    loss: float = 1.0
    rain: float = 0.0
    ghosts: float = 0.0
    crowd: int = 0


DIFFICULTIES = {
    "easy": Difficulty(noise=0.008, scatter=0.5, loss=0.4, crowd=-1),
    "normal": Difficulty(),
    "hard": Difficulty(noise=0.04, scatter=1.6, loss=2.5, rain=0.02, ghosts=0.3, crowd=24),
}


def beam_elevations(beams: int) -> NDArray:
    """Elevations (beams,) in radians, highest first."""
    if beams == 64:
        degrees = np.concatenate([np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.8, 32)])
    elif beams == 32:
        degrees = np.linspace(8.0, -25.0, 32)
    else:
        degrees = np.linspace(2.0, -24.8, beams)
    return np.deg2rad(degrees)


def ray_directions(beams: int, columns: int, elevations: NDArray | None = None) -> NDArray:
    """Unit directions (beams * columns, 3) in the sensor's frame, beam by beam.

    Args:
        elevations: (beams,) radians; those of `beam_elevations` if None.
    """
    elevation = (beam_elevations(beams) if elevations is None else elevations)[:, None]
    # The half step keeps rays off the exact axes, where they run along walls and kerbs.
    azimuth = np.pi - (np.arange(columns)[None] + 0.5) * (2 * np.pi / columns)
    flat = np.cos(elevation)
    up = np.broadcast_to(np.sin(elevation), (beams, columns))
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), up], -1).reshape(-1, 3)


def embree() -> tuple[Any, Any]:
    """The classes of a scene and of a mesh."""
    try:
        scene = importlib.import_module("embreex.rtcore_scene")
        mesh = importlib.import_module("embreex.mesh_construction")
    except ImportError as error:
        raise InputError(
            f'simulating needs Embree ({error}); install it: pip install "pointcept_kd[sim]"'
        ) from error
    return scene.EmbreeScene, mesh.TriangleMesh


class Caster:
    """Triangles ready for ray casting."""

    def __init__(self, soup: Soup) -> None:
        new_scene, new_mesh = embree()
        triangles, self.label, self.reflectivity, self.drop, self.scatter = soup.arrays()
        self.scene = new_scene(robust=True)
        new_mesh(self.scene, np.ascontiguousarray(triangles))

    def cast(self, origin: NDArray, directions: NDArray) -> tuple[NDArray, ...]:
        """First hits of rays from one origin.

        Returns:
            distance (r,) with inf for none, cosine of the incidence angle, label, reflectivity,
            drop, scatter.
        """
        count = len(directions)
        origins = np.broadcast_to(origin.astype(np.float32), (count, 3)).copy()
        directions = np.ascontiguousarray(directions, np.float32)
        hit = self.scene.run(origins, directions, output=True)
        triangle, normal = hit["primID"], hit["Ng"]
        found = triangle >= 0
        distance = np.where(found, hit["tfar"], np.float32(np.inf))
        length = np.maximum(np.linalg.norm(normal, axis=1), 1e-12)
        cosine = np.abs((normal * directions).sum(1)) / length
        rows = np.where(found, triangle, 0)
        materials = (self.reflectivity[rows], self.drop[rows], self.scatter[rows])
        return (distance, cosine, self.label[rows], *materials)


def sense(
    still: Caster,
    moving: Soup | None,
    directions: NDArray,
    pose: NDArray,
    max_range: float,
    difficulty: Difficulty,
    gain: float,
    key: tuple[int, ...],
) -> tuple[NDArray, NDArray, NDArray]:
    """One turn of a LiDAR.

    Args:
        directions: (r, 3) unit vectors in the sensor's frame.
        pose: (4, 4) of the sensor in the world.
        key: seeds the noise.
    Returns: points (n, 4) float32 x, y, z, remission in the sensor's frame; labels (n,) uint32; the
        rays (n,) that they belong to.
    """
    rng, rays = np.random.default_rng(list(key)), directions @ pose[:3, :3].T
    hits = still.cast(pose[:3, 3], rays)
    if moving is not None:
        others = Caster(moving).cast(pose[:3, 3], rays)
        nearer = others[0] < hits[0]
        hits = tuple(np.where(nearer, a, b) for a, b in zip(others, hits, strict=True))
    if difficulty.rain or difficulty.ghosts:
        hits = _weather(np.random.default_rng([*key, 1]), difficulty, hits)
    distance, cosine, label, reflectivity, drop, scatter = hits
    keep = (distance >= MIN_RANGE) & (distance <= max_range)
    keep &= ~_lost(rng, distance, cosine, reflectivity, drop, difficulty.loss)
    distance, cosine, label, reflectivity, scatter = (
        v[keep] for v in (distance, cosine, label, reflectivity, scatter)
    )
    spread = difficulty.scatter * scatter
    noisy = distance + rng.normal(0, difficulty.noise, len(distance))
    noisy = noisy + spread * rng.normal(size=len(distance))
    remission = _remission(rng, distance, cosine, reflectivity, gain)
    points = np.column_stack([directions[keep] * noisy[:, None], remission])
    return points.astype(np.float32), label.astype(np.uint32), np.flatnonzero(keep)


def _weather(
    rng: Generator, difficulty: Difficulty, hits: tuple[NDArray, ...]
) -> tuple[NDArray, ...]:
    """Drops of rain before things, and returns from behind glass: both are outliers."""
    distance, cosine, label, reflectivity, drop, scatter = (v.copy() for v in hits)
    ghost = (drop > 0.3) & (rng.random(len(distance)) < difficulty.ghosts)
    distance[ghost] += rng.uniform(1.5, 8.0, int(ghost.sum()))
    drop[ghost] = 0.2
    early = MIN_RANGE + rng.exponential(5.0, len(distance))
    rain = (rng.random(len(distance)) < difficulty.rain) & (early < distance)
    distance[rain] = early[rain]
    cosine[rain], reflectivity[rain], drop[rain] = 1.0, 0.08, 0.0
    label[ghost | rain], scatter[ghost | rain] = OUTLIER, 0.05
    return distance, cosine, label, reflectivity, drop, scatter


def _lost(
    rng: Generator,
    distance: NDArray,
    cosine: NDArray,
    reflectivity: NDArray,
    drop: NDArray,
    factor: float,
) -> NDArray:
    """Which rays do not come back: far, dark, grazing or through glass, and a few others."""
    reach = np.minimum(np.where(np.isfinite(distance), distance, 0) / 50, 1.5)
    weak = np.clip((0.05 - reflectivity * cosine) / 0.05, 0, 1)
    few, far, dark = (share * factor for share in (0.015, 0.2, 0.5))
    chance = 1 - (1 - drop) * (1 - few) * (1 - far * reach**2) * (1 - dark * weak * reach)
    return rng.random(len(distance)) < chance


def _remission(
    rng: Generator, distance: NDArray, cosine: NDArray, reflectivity: NDArray, gain: float
) -> NDArray:
    """Remission in 0..0.99 in steps of 0.01: material, angle, range, speckle."""
    speckle = rng.lognormal(0, 0.2, len(distance))
    signal = gain * reflectivity * (0.35 + 0.65 * cosine) * (1 - 0.35 * distance / 50) * speckle
    signal = signal + rng.normal(0, 0.02, len(distance))
    return np.round(np.clip(signal, 0, 0.99), 2)
