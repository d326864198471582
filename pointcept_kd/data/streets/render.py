"""Photographs of a simulated street: ray-cast colours, classes and depths.

Sun with shadows, light of the sky, haze, mirrored sky on glass and paint, a skyline beyond the end
of the street. One ray per pixel through its middle says what the pixel shows; where neighbours
differ, three more rays smooth the edge of the colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .colors import LEAF, Look, linear, look_of, noise, textured
from .lidar import Caster
from .shapes import Soup
from .street import Street

EXPOSURE = 1.15


@dataclass(frozen=True)
class View:
    """What a camera sees.

    Attributes:
        image: (h, w, 3) uint8 sRGB.
        label: (h, w) uint32 raw class in the low 16 bits, instance in the high ones; 0 for the sky
            and what lies beyond the street.
        depth: (h, w) float32 metres along the optical axis; inf where label is 0.
    """

    image: NDArray
    label: NDArray
    depth: NDArray


class Sky:
    """Light of one recording: where the sun stands, how clear the air is.

    Args:
        rng: a generator that only this sky draws from.
        rain: overcast, with dense haze.
    """

    def __init__(self, rng: Generator, rain: bool = False) -> None:
        height, azimuth = np.deg2rad(rng.uniform(24, 58)), rng.uniform(-np.pi, np.pi)
        flat = np.cos(height)
        self.sun = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(height)])
        self.cover = 1.0 if rain else float(rng.choice([0.15, 0.35, 0.5, 0.85]))
        low = float(np.clip((58 - np.rad2deg(height)) / 40, 0, 1))  # a low sun is warmer
        self.sun_color = (
            2.9 * (1 - 0.8 * self.cover**2) * np.array([1, 0.96 - 0.1 * low, 0.88 - 0.25 * low])
        )
        blue, grey = np.array([0.2, 0.36, 0.7]), np.array([0.55, 0.59, 0.64])
        self.zenith = blue + (grey - blue) * self.cover**2
        self.horizon = np.array([0.66, 0.76, 0.88]) * (1 - 0.15 * self.cover)
        # A camera balances its white, so the light from the sky looks less blue than the sky.
        self.ambient = np.array([0.56, 0.6, 0.67]) * (0.75 + 0.5 * self.cover)
        self.haze = rng.uniform(450, 1100) * (0.2 if rain else 1.0)
        self._drift = rng.uniform(0, 200, 2)
        self._turn = rng.uniform(0, 256)

    def __call__(self, rays: NDArray) -> NDArray:
        """Colours (n, 3) of the sky and the skyline in directions (n, 3)."""
        up = rays[:, 2]
        share = np.clip(up, 0, 1)[:, None] ** 0.5
        color = self.horizon + (self.zenith - self.horizon) * share
        reach = 1 / np.maximum(up, 0.02)
        x, y = 0.9 * rays[:, 0] * reach + self._drift[0], 0.9 * rays[:, 1] * reach + self._drift[1]
        cloud = (
            0.55 * noise(x, y) + 0.28 * noise(2.1 * x + 5, 2.1 * y) + 0.17 * noise(4.3 * x, 4.3 * y)
        )
        thick = np.clip((cloud - 0.78 + 0.55 * self.cover) * 3.2, 0, 1) * np.clip(up * 9, 0, 1)
        white = (
            np.array([0.92, 0.93, 0.95])
            * (1 - 0.25 * self.cover)
            * (0.8 + 0.4 * (1 - cloud))[:, None]
        )
        color = color + (white - color) * (0.85 * thick)[:, None]
        glow = np.clip(rays @ self.sun, 0, 1)
        color += (self.sun_color * (1 - self.cover) * 0.12) * (glow**24)[:, None]
        return color

    def skyline(self, rays: NDArray) -> tuple[NDArray, NDArray]:
        """Which directions look at distant trees and roofs above the horizon, and their colours."""
        azimuth = (np.arctan2(rays[:, 1], rays[:, 0]) / (2 * np.pi) * 256 + self._turn) % 256
        trees = 0.012 + 0.03 * noise(azimuth / 4, azimuth * 0 + 3)
        trees += 0.012 * noise(azimuth * 2, azimuth * 0 + 9) + 0.006 * noise(
            azimuth * 9, azimuth * 0
        )
        block = np.floor(azimuth / 1.7)
        roofs = 0.012 + 0.05 * noise(block * 3.7, block * 0 + 60) * (
            noise(block, block * 0 + 20) > 0.55
        )
        beyond = rays[:, 2] < np.maximum(trees, roofs)
        wood = (
            linear((0.3, 0.36, 0.24))
            * (0.75 + 0.5 * noise(azimuth * 12, rays[:, 2] * 900))[:, None]
        )
        house = linear((0.6, 0.56, 0.52)) * (0.8 + 0.4 * noise(block * 5.3, block * 0 + 7))[:, None]
        return beyond, np.where((roofs > trees)[:, None], house, wood)


class Renderer:
    """A street and its light, ready for cameras.

    Args:
        street: what to photograph.
        still: the triangles of `street.soup`, ready for ray casting.
        rain: bad weather.
    """

    def __init__(self, street: Street, still: Caster, rain: bool = False) -> None:
        self.street, self.still = street, still
        self.sky = Sky(np.random.default_rng([*street.key, 4, 1]), rain)
        self.look = look_of(street.soup, street, street.key)

    def view(
        self, to_world: NDArray, intrinsics: NDArray, width: int, height: int, moving: Soup | None
    ) -> View:
        """A photograph.

        Args:
            to_world: (4, 4) camera coordinates (x right, y down, z forward) to the world's.
            intrinsics: (3, 3) pixels; pixel (column, row) covers [column, column + 1) x
                [row, row + 1), its ray goes through the middle.
            moving: what moves, where it is now.
        """
        scenes = [(self.still, self.look)]
        if moving is not None:
            scenes.append((Caster(moving), look_of(moving, self.street, self.street.key)))
        inverse = np.linalg.inv(intrinsics)
        rows, columns = np.divmod(np.arange(width * height), width)

        def rays(row: NDArray, column: NDArray, dx: float, dy: float) -> NDArray:
            spots = np.stack([column + 0.5 + dx, row + 0.5 + dy, np.ones(len(row))], 1)
            local = spots @ inverse.T
            return local / np.linalg.norm(local, axis=1, keepdims=True) @ to_world[:3, :3].T

        eye = to_world[:3, 3]
        directions = rays(rows, columns, 0.0, 0.0)
        color, label, distance, thing = self._shade(scenes, eye, directions)
        depth = distance * (directions @ to_world[:3, 2])
        for_edges = np.where(np.isfinite(distance), distance, 500.0)
        edges = np.flatnonzero(
            _edges(thing.reshape(height, width), for_edges.reshape(height, width))
        )
        total = color[edges]
        for dx, dy in ((-0.3, -0.12), (0.12, -0.3), (0.28, 0.25)):
            total = total + self._shade(scenes, eye, rays(rows[edges], columns[edges], dx, dy))[0]
        color[edges] = total / 4
        image = self._develop(color.reshape(height, width, 3))
        shape = (height, width)
        return View(image, label.reshape(shape), depth.reshape(shape).astype(np.float32))

    def _shade(
        self, scenes: list[tuple[Caster, Look]], eye: NDArray, rays: NDArray
    ) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Colour, label, distance and a number of the surface for rays from one place."""
        count = len(rays)
        color, label = np.empty((count, 3)), np.zeros(count, np.uint32)
        surface = np.full(count, -1, np.int64)
        hits = [_run(caster, eye, rays) for caster, _ in scenes]
        distance = np.min([hit[0] for hit in hits], axis=0)
        nearest = np.argmin([hit[0] for hit in hits], axis=0)
        missed = np.flatnonzero(~np.isfinite(distance))
        color[missed] = self._beyond(rays[missed])
        for number, ((caster, look), (_, triangle, normal)) in enumerate(
            zip(scenes, hits, strict=True)
        ):
            mine = np.flatnonzero((nearest == number) & np.isfinite(distance))
            if not len(mine):
                continue
            rows, reach, ways = triangle[mine], distance[mine], rays[mine]
            place = eye + ways * reach[:, None]
            up = normal[mine] / np.maximum(
                np.linalg.norm(normal[mine], axis=1, keepdims=True), 1e-12
            )
            up *= -np.sign((up * ways).sum(1, keepdims=True))  # surfaces have two sides
            color[mine] = self._lit(scenes, look, rows, place, up, ways, reach)
            label[mine] = caster.label[rows]
            surface[mine] = 1 + label[mine].astype(np.int64) * 64 + look.texture[rows]
            surface[mine] = surface[mine] * 8 + (np.round(up[:, 2] * 3) + 3).astype(np.int64)
        return color, label, distance, surface

    def _lit(
        self, scenes: list[tuple[Caster, Look]], look: Look, rows: NDArray, place: NDArray,
        normal: NDArray, rays: NDArray, distance: NDArray,
    ) -> NDArray:  # fmt: skip
        sky = self.sky
        albedo = textured(look, rows, place, normal, distance)
        facing = normal @ sky.sun
        thin = look.texture[rows] == LEAF  # light passes leaves
        facing = np.where(thin, 0.35 + 0.5 * np.abs(facing), np.maximum(facing, 0))
        asked = np.flatnonzero(facing > 0)
        start = (
            place[asked]
            + 0.01 * normal[asked]
            + np.where(thin[asked], 0.25, 0.01)[:, None] * sky.sun
        )
        shadow = np.zeros(len(rows), bool)
        shadow[asked] = _hidden(scenes, start, np.broadcast_to(sky.sun, start.shape), 80.0)
        direct = sky.sun_color * (facing * ~shadow)[:, None]
        open_ = 0.55 + 0.45 * normal[:, 2:]  # share of the sky above, the ground's light below
        around = sky.ambient * open_ + 0.22 * np.array([1, 0.95, 0.85]) * (1 - open_)
        around = around * (1 - 0.22 * self._corners(scenes, place, normal) * ~thin)[:, None]
        color = albedo * (direct + around) * 0.62
        mirror = look.mirror[rows]
        shiny = np.flatnonzero(mirror > 0)
        if len(shiny):
            head_on = -(normal[shiny] * rays[shiny]).sum(1)
            share = mirror[shiny] + (1 - mirror[shiny]) * (1 - np.clip(head_on, 0, 1)) ** 5 * 0.6
            back = rays[shiny] + 2 * head_on[:, None] * normal[shiny]
            # What is around, mirrored out of focus: the sky above, something dim below.
            above = np.clip((back[:, 2:] + 0.12) / 0.4, 0, 1)
            above = above * above * (3 - 2 * above)
            seen = 0.16 * sky.ambient * (1 - above) + sky(back) * above
            spot = np.clip(back @ sky.sun, 0, 1) ** 90 * ~shadow[shiny]
            seen += sky.sun_color * (0.8 * spot)[:, None]
            color[shiny] += (seen * 0.8 - color[shiny]) * share[:, None]
        return self._hazy(color, distance)

    def _corners(
        self, scenes: list[tuple[Caster, Look]], place: NDArray, normal: NDArray
    ) -> NDArray:
        """How many of two rays away from a surface soon meet something: corners are darker."""
        near = place + 0.02 * normal
        aside = np.stack([-normal[:, 1], normal[:, 0], 0 * normal[:, 0]], 1)
        flat = np.abs(normal[:, 2]) > 0.9
        aside[flat] = [0.8, 0.6, 0.0]
        return sum(
            _hidden(scenes, near, normal + turn * aside + [0, 0, 0.4], 0.9).astype(np.float64)
            for turn in (-0.9, 0.9)
        )

    def _hazy(self, color: NDArray, distance: NDArray) -> NDArray:
        share = (1 - np.exp(-distance / self.sky.haze))[:, None]
        return color + (self.sky.horizon - color) * share

    def _beyond(self, rays: NDArray) -> NDArray:
        """The sky, trees and roofs at the horizon, a plain below it, for rays that leave the street."""
        color, lit = self.sky(rays), self.sky.ambient + 0.5 * self.sky.sun_color
        beyond, far = self.sky.skyline(rays)
        rows = np.flatnonzero(beyond)
        color[rows] = self._hazy(far[rows] * lit * 0.62, np.full(len(rows), 260.0))
        rows = np.flatnonzero(rays[:, 2] < -0.002)
        reach = np.minimum(1.7 / -rays[rows, 2], 600.0)
        x, y = rays[rows, 0] * reach, rays[rows, 1] * reach
        field = linear((0.45, 0.46, 0.3)) * (0.8 + 0.4 * noise(x / 9, y / 9))[:, None]
        color[rows] = self._hazy(field * lit * 0.62, reach)
        return color

    def _develop(self, color: NDArray) -> NDArray:
        """Light to sRGB: a soft shoulder, darker corners, a little grain."""
        height, width = color.shape[:2]
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        light = EXPOSURE * color * (1 - 0.1 * (x**2 + y**2))[..., None]
        light = light * (1 + light / 9.0) / (1 + light * 0.6)  # Reinhard with a white point
        values = np.clip(light, 0, 1) ** (1 / 2.2)
        values = 255 * (values + 0.35 * values * (1 - values) * (2 * values - 1))  # contrast
        grain = _GRAIN[:height, :width] if height <= 512 and width <= 2048 else 0.0
        return np.clip(values + 1.6 * np.asarray(grain)[..., None], 0, 255).round().astype(np.uint8)


_GRAIN = np.random.default_rng(7).normal(size=(512, 2048)).astype(np.float32)


def _run(caster: Caster, eye: NDArray, rays: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Distance (inf for none), triangle and normal of first hits."""
    origins = np.broadcast_to(eye.astype(np.float32), (len(rays), 3)).copy()
    hit = caster.scene.run(origins, np.ascontiguousarray(rays, np.float32), output=True)
    found = hit["primID"] >= 0
    return np.where(found, hit["tfar"], np.inf), np.where(found, hit["primID"], 0), hit["Ng"]


def _hidden(
    scenes: list[tuple[Caster, Look]], start: NDArray, ways: NDArray, reach: float
) -> NDArray:
    """Whether something stands within `reach` metres of places, in the direction of `ways`."""
    start, ways = (np.ascontiguousarray(a, np.float32) for a in (start, ways))
    limit = np.full(len(start), reach, np.float32)
    shut = np.zeros(len(start), bool)
    for caster, _ in scenes:
        shut |= caster.scene.run(start, ways, dists=limit.copy(), query="OCCLUDED") >= 0
    return shut


def _edges(thing: NDArray, distance: NDArray) -> NDArray:
    """Pixels (h, w) whose right or lower neighbour shows another surface, and those neighbours."""
    marked = np.zeros(thing.shape, bool)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        jump = (
            np.abs(distance[a] - distance[b]) > 0.12 * np.minimum(distance[a], distance[b]) + 0.05
        )
        differ = (thing[a] != thing[b]) | (jump & (distance[a] < 80))
        marked[a] |= differ
        marked[b] |= differ
    return marked
