"""Colours of a simulated street: what every triangle looks like in a photograph.

LiDAR sees reflectivities, cameras see colours. A triangle's colour follows from its material, its
class, its reflectivity and the seed, drawn from generators of their own, so that scans stay as they
are. Fine structure (asphalt, paving, bricks, grass, leaves) is computed where a ray hits. Colours
are linear light, 0..1, unless they are called sRGB.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from .ground import LANE, OTHER, PARKING, ROAD, SIDEWALK, TERRAIN
from .shapes import Soup
from .street import Street

(PLAIN, ASPHALT, MARKING, PAVING, COBBLES, GRASS, KERB, BRICK, PLASTER, TILES, LEAF, BARK, WOOD,
 CLOTH, STRIPES, BANDS) = range(16)  # fmt: skip


def linear(color: ArrayLike) -> NDArray:
    """Linear light of sRGB values in 0..1 (IEC 61966-2-1 by its usual power law)."""
    return np.asarray(color, np.float64) ** 2.2


def _hsv(rng: Generator, hue: tuple, saturation: tuple, value: tuple) -> NDArray:
    h, s, v = (rng.uniform(*r) for r in (hue, saturation, value))
    return np.array(colorsys.hsv_to_rgb(h % 1.0, s, v))


# Paint by how much light of the LiDAR it returns: sRGB.
_DARK = [
    (0.07, 0.07, 0.08),
    (0.06, 0.09, 0.22),
    (0.05, 0.16, 0.1),
    (0.3, 0.03, 0.05),
    (0.2, 0.2, 0.22),
]
_MIDDLE = [
    (0.42, 0.44, 0.47), (0.68, 0.07, 0.08), (0.1, 0.25, 0.6), (0.13, 0.4, 0.3), (0.8, 0.38, 0.06),
    (0.35, 0.3, 0.26), (0.3, 0.34, 0.4),
]  # fmt: skip
_LIGHT = [
    (0.93, 0.93, 0.92), (0.93, 0.93, 0.92), (0.72, 0.74, 0.76), (0.78, 0.79, 0.8), (0.86, 0.8, 0.66),
    (0.92, 0.75, 0.1), (0.55, 0.75, 0.85),
]  # fmt: skip


def _vehicle_paint(rng: Generator, reflectivity: float) -> NDArray:
    colors = _DARK if reflectivity < 0.15 else _MIDDLE if reflectivity < 0.45 else _LIGHT
    return np.array(colors[int(rng.integers(len(colors)))])


def _cloth(rng: Generator, reflectivity: float) -> NDArray:
    if rng.random() < 0.35:
        return _hsv(rng, (0, 1), (0.0, 0.12), (0.08, 0.85))
    return _hsv(rng, (0, 1), (0.35, 0.85), (0.2, 0.35 + 0.7 * reflectivity))


_SKINS = [
    (0.92, 0.74, 0.62),
    (0.82, 0.6, 0.45),
    (0.6, 0.42, 0.3),
    (0.38, 0.25, 0.18),
    (0.3, 0.2, 0.12),
]
_SIGNS = [
    (0.78, 0.06, 0.08),
    (0.05, 0.22, 0.62),
    (0.93, 0.76, 0.08),
    (0.92, 0.92, 0.92),
    (0.8, 0.1, 0.1),
]
_BUSES = [(0.85, 0.1, 0.1), (0.93, 0.76, 0.15), (0.9, 0.9, 0.9), (0.1, 0.35, 0.65), (0.1, 0.5, 0.3)]

# Material: its sRGB colour from (rng, reflectivity), its texture, the share of light it mirrors.
_LOOKS: dict[str, tuple[Callable[[Generator, float], ArrayLike], int, float]] = {
    "paint": (_vehicle_paint, PLAIN, 0.10),
    "glass": (lambda g, r: (0.06, 0.08, 0.1), PLAIN, 0.22),
    "tyre": (lambda g, r: (0.07, 0.07, 0.075), PLAIN, 0.0),
    "plate": (lambda g, r: (0.95, 0.93, 0.75), PLAIN, 0.05),
    "chassis": (lambda g, r: (0.12, 0.12, 0.13), PLAIN, 0.02),
    "cargo": (_vehicle_paint, PLAIN, 0.04),
    "caravan": (lambda g, r: _hsv(g, (0.08, 0.16), (0.02, 0.12), (0.85, 0.95)), PLAIN, 0.06),
    "machine": (lambda g, r: _hsv(g, (0.1, 0.13), (0.85, 0.95), (0.8, 0.95)), PLAIN, 0.04),
    "bus": (lambda g, r: _BUSES[int(g.integers(len(_BUSES)))], PLAIN, 0.1),
    "metal": (lambda g, r: g.uniform(0.3, 0.62) * np.array([1, 1.02, 1.06]), PLAIN, 0.05),
    "trousers": (lambda g, r: _hsv(g, (0.55, 0.7), (0.1, 0.6), (0.1, 0.5)), CLOTH, 0.0),
    "cloth": (_cloth, CLOTH, 0.0),
    "bag": (_cloth, CLOTH, 0.0),
    "skin": (lambda g, r: _SKINS[int(g.integers(len(_SKINS)))], CLOTH, 0.0),
    "helmet": (_cloth, PLAIN, 0.08),
    "leaf": (lambda g, r: _hsv(g, (0.17, 0.3), (0.45, 0.75), (0.32, 0.55)), LEAF, 0.0),
    "bark": (lambda g, r: _hsv(g, (0.06, 0.1), (0.2, 0.5), (0.22, 0.45)), BARK, 0.0),
    "fence": (lambda g, r: _hsv(g, (0.06, 0.11), (0.05, 0.55), (0.3, 0.4 + 0.7 * r)), WOOD, 0.0),
    "sign": (lambda g, r: _SIGNS[int(g.integers(len(_SIGNS)))], PLAIN, 0.04),
    "bin": (lambda g, r: _hsv(g, (0.2, 0.65), (0.1, 0.5), (0.2, 0.5)), PLAIN, 0.04),
    "cone": (lambda g, r: (0.95, 0.33, 0.05), BANDS, 0.0),
    "stripes": (lambda g, r: (0.93, 0.93, 0.93), STRIPES, 0.0),
    "window": (lambda g, r: (0.13, 0.16, 0.19), PLAIN, 0.25),
    "wall": (lambda g, r: (0.5, 0.5, 0.5), PLASTER, 0.0),
}  # fmt: skip

_GROUND = {  # sRGB, texture
    ROAD: ((0.33, 0.33, 0.345), ASPHALT), LANE: ((0.87, 0.87, 0.84), MARKING),
    PARKING: ((0.42, 0.41, 0.405), COBBLES), SIDEWALK: ((0.59, 0.58, 0.555), PAVING),
    OTHER: ((0.63, 0.52, 0.43), COBBLES), TERRAIN: ((0.34, 0.42, 0.17), GRASS),
}  # fmt: skip

_WALLS = {  # sRGB of walls by their texture
    BRICK: [(0.56, 0.28, 0.2), (0.47, 0.25, 0.2), (0.68, 0.5, 0.34), (0.6, 0.36, 0.27)],
    PLASTER: [
        (0.87, 0.84, 0.76), (0.9, 0.8, 0.6), (0.82, 0.72, 0.64), (0.75, 0.79, 0.8), (0.85, 0.66, 0.52),
        (0.7, 0.74, 0.62), (0.9, 0.89, 0.87), (0.62, 0.62, 0.62),
    ],
}  # fmt: skip
_ROOFS = [(0.5, 0.22, 0.15), (0.4, 0.2, 0.16), (0.27, 0.27, 0.3), (0.36, 0.3, 0.27)]


@dataclass
class Look:
    """How the triangles of a soup look: one row each.

    Attributes:
        albedo: (t, 3) float32, linear.
        texture: (t,) uint8.
        mirror: (t,) float32, share of the light that is mirrored, seen head-on.
        frame: (t, 6) float32: a point of the centre line's frame at the triangle's middle: s, d,
            cosine and sine of the heading, x, y; zeros but for the ground.
    """

    albedo: NDArray
    texture: NDArray
    mirror: NDArray
    frame: NDArray


def look_of(soup: Soup, street: Street, key: tuple[int, ...]) -> Look:
    """Colours for the triangles of a soup; the same thing always gets the same ones."""
    triangles, labels, reflectivity, *_ = soup.arrays()
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    steep = np.abs(normals[:, 2]) / np.maximum(np.linalg.norm(normals, axis=1), 1e-12)
    count = len(triangles)
    look = Look(
        np.zeros((count, 3), np.float32),
        np.zeros(count, np.uint8),
        np.zeros(count, np.float32),
        np.zeros((count, 6), np.float32),
    )
    start = 0
    for number, group in enumerate(soup.groups):
        rows = np.s_[start : start + group.count]
        start += group.count
        if group.material == "ground":
            _ground_look(look, rows, labels[rows], reflectivity[rows], steep[rows], key)
            continue
        stream = 5 if group.thing > 0 else 6
        if number == 0 or soup.groups[number - 1].thing != group.thing:
            rng, shared = np.random.default_rng([*key, stream, abs(group.thing)]), None
        material = group.material
        if material == "paint" and (labels[start - 1] & 0xFFFF) in (13, 257):
            material = "bus"
        make, texture, mirror = _LOOKS[material]
        color = make(rng, float(reflectivity[rows][0])) if shared is None else shared
        if material in ("paint", "machine", "bus"):  # one colour for the body of a vehicle
            shared = color
        elif shared is not None:
            color = make(rng, float(reflectivity[rows][0]))
        look.albedo[rows] = linear(np.clip(color, 0, 1))
        look.texture[rows], look.mirror[rows] = texture, mirror
        if material == "wall":
            _wall_look(look, rows, triangles[rows], steep[rows], rng)
        elif material == "window":
            _window_look(look, rows, rng)
        elif material == "leaf":  # every leaf its own green
            tone = rng.normal(1, 0.16, (group.count, 1)) + rng.normal(0, 0.07, (group.count, 3))
            look.albedo[rows] *= np.clip(tone, 0.4, 1.8)
    ground = np.flatnonzero(look.frame[:, 2])
    if len(ground):
        look.frame[ground] = _frames(street, triangles[ground].mean(1))
    return look


def _ground_look(
    look: Look, rows: slice, labels: NDArray, shade: NDArray, steep: NDArray, key: tuple[int, ...]
) -> None:
    rng = np.random.default_rng([*key, 5, 0])  # the same for the ground and for its kerbs
    for label, (color, texture) in _GROUND.items():
        mine = np.flatnonzero(labels == label) + rows.start
        tint = linear(
            np.clip(np.array(color) * rng.uniform(0.88, 1.1) * rng.normal(1, 0.008, 3), 0, 1)
        )
        look.albedo[mine], look.texture[mine] = tint, texture
    tone = shade / max(float(np.median(shade)), 1e-6)
    flat = labels != LANE
    look.albedo[rows][flat] *= np.clip(0.75 + 0.25 * tone, 0.7, 1.3)[flat, None]
    look.frame[rows, 2] = 1.0
    kerb = np.flatnonzero((steep < 0.5) & (labels != TERRAIN)) + rows.start
    look.albedo[kerb], look.texture[kerb] = linear((0.62, 0.62, 0.6)), KERB


def _wall_look(look: Look, rows: slice, triangles: NDArray, steep: NDArray, rng: Generator) -> None:
    texture = BRICK if rng.random() < 0.45 else PLASTER
    choices = _WALLS[texture]
    color = np.array(choices[int(rng.integers(len(choices)))]) * rng.uniform(0.85, 1.08)
    look.albedo[rows], look.texture[rows] = linear(np.clip(color, 0, 0.95)), texture
    height = triangles[..., 2].max(1)
    roof = np.flatnonzero((steep > 0.15) & (steep < 0.985) & (height > 0.6 * height.max()))
    roof += rows.start
    look.albedo[roof] = linear(_ROOFS[int(rng.integers(len(_ROOFS)))])
    look.texture[roof] = TILES


def _window_look(look: Look, rows: slice, rng: Generator) -> None:
    """Two triangles are a pane: some dark, some with curtains, one a door now and then."""
    panes = -(-(rows.stop - rows.start) // 2)
    curtain = rng.random((panes, 1)) < 0.35
    light = linear(rng.uniform(0.45, 0.8, (panes, 1)) * np.array([[1.0, 0.96, 0.88]]))
    color = np.where(curtain, 0.6 * light, linear(rng.uniform(0.08, 0.22, (panes, 1)) * np.ones(3)))
    look.albedo[rows] = np.repeat(color, 2, axis=0)[: rows.stop - rows.start]


def _frames(street: Street, middles: NDArray) -> NDArray:
    """Frames (n, 6) of the centre line where places (n, 3) lie nearest to it."""
    table, x, y, heading, _ = street.line
    _, nearest = cKDTree(np.stack([x, y], 1)).query(middles[:, :2])
    c, s = np.cos(heading[nearest]), np.sin(heading[nearest])
    dx, dy = middles[:, 0] - x[nearest], middles[:, 1] - y[nearest]
    along, left = table[nearest] + c * dx + s * dy, c * dy - s * dx
    return np.stack([along, left, c, s, middles[:, 0], middles[:, 1]], 1).astype(np.float32)


# Texture

_SIZE = 256
_TABLE = np.random.default_rng(20240917).random((_SIZE, _SIZE)).astype(np.float32)


def noise(u: NDArray, v: NDArray) -> NDArray:
    """Smooth noise in 0..1 with features of size 1; it repeats after 256."""
    u, v = np.asarray(u, np.float32), np.asarray(v, np.float32)
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i0, j0 = iu.astype(np.int32) & 255, iv.astype(np.int32) & 255
    i1, j1 = (i0 + 1) & 255, (j0 + 1) & 255
    top = _TABLE[i0, j0] * (1 - fu) + _TABLE[i1, j0] * fu
    bottom = _TABLE[i0, j1] * (1 - fu) + _TABLE[i1, j1] * fu
    return top * (1 - fv) + bottom * fv


def _speck(u: NDArray, v: NDArray) -> NDArray:
    """Random values in 0..1, one per unit cell."""
    return _TABLE[np.floor(u).astype(np.int64) & 255, np.floor(v).astype(np.int64) & 255]


def _joint(x: NDArray, period: float, width: NDArray) -> NDArray:
    """How much of the width of a joint covers a place: 1 on the joint, 0 away from it."""
    away = np.abs((x / period + 0.5) % 1.0 - 0.5) * period
    return np.clip(1 - away / width, 0, 1)


def textured(
    look: Look, rows: NDArray, place: NDArray, normal: NDArray, distance: NDArray
) -> NDArray:
    """Albedo (n, 3) where rays hit: rows of `look`, places, normals, metres to the camera.

    Structure finer than a pixel fades with distance, so that it does not flicker.
    """
    albedo, kinds = look.albedo[rows].copy(), look.texture[rows]
    for kind, paint in _TEXTURES.items():
        mine = np.flatnonzero(kinds == kind)
        if len(mine):
            albedo[mine] = paint(
                albedo[mine], look.frame[rows[mine]], place[mine], normal[mine], distance[mine]
            )
    return albedo


def _street_place(frame: NDArray, place: NDArray) -> tuple[NDArray, NDArray]:
    dx, dy = place[:, 0] - frame[:, 4], place[:, 1] - frame[:, 5]
    c, s = frame[:, 2], frame[:, 3]
    return frame[:, 0] + c * dx + s * dy, frame[:, 1] + c * dy - s * dx


def _fade(distance: NDArray, half: float) -> NDArray:
    return 1 / (1 + (distance / half) ** 2)


def _facade(place: NDArray, normal: NDArray) -> NDArray:
    """The horizontal coordinate along an upright surface, metres."""
    length = np.maximum(np.hypot(normal[:, 0], normal[:, 1]), 1e-6)
    return (place[:, 1] * normal[:, 0] - place[:, 0] * normal[:, 1]) / length


def _asphalt(albedo, frame, place, normal, distance):
    s, d = _street_place(frame, place)
    grain = _speck(s / 0.03, d / 0.03) - 0.5
    coarse = noise(s / 0.25, d / 0.25) - 0.5
    patch = noise(s / 5.0 + 7, d / 2.2) - 0.5
    mended = (noise(s / 9.0 + 50, d / 3.0 + 9) > 0.74).astype(np.float32)
    crack = np.abs(noise(s / 1.7 + 90, d / 1.7 + 31) - 0.5) < 0.012 * (1 + distance / 25)
    tracks = np.exp(-(((np.abs(d) % 3.4) - 1.0) ** 2) / 0.1) + np.exp(
        -(((np.abs(d) % 3.4) - 2.6) ** 2) / 0.1
    )
    factor = 1 + 0.5 * grain * _fade(distance, 9) + 0.22 * coarse * _fade(distance, 25)
    factor += 0.25 * patch - 0.2 * mended - 0.08 * tracks - 0.35 * crack * _fade(distance, 18)
    return albedo * np.maximum(factor, 0.2)[:, None]


def _marking(albedo, frame, place, normal, distance):
    s, d = _street_place(frame, place)
    worn = np.clip((noise(s / 0.12, d / 0.05) - 0.62) * 4, 0, 1) * _fade(distance, 15)
    return albedo * (1 - 0.6 * worn - 0.12 * noise(s / 1.5, d / 1.5))[:, None]


def _slabs(albedo, frame, place, distance, long, wide, tint):
    s, d = _street_place(frame, place)
    row = np.floor(d / wide)
    shifted = s + 0.5 * long * (row % 2)
    width = 0.012 + 0.0012 * distance
    joint = np.maximum(_joint(shifted, long, width), _joint(d, wide, width))
    fine = 0.012 / width * _fade(distance, 60)
    tone = _speck(shifted / long + 3, row + 11) - 0.5
    grain = _speck(s / 0.02, d / 0.02) - 0.5
    dirt = noise(s / 2.3, d / 1.1) - 0.5
    factor = 1 + tint * tone + 0.25 * dirt + 0.25 * grain * _fade(distance, 7)
    factor -= 0.45 * joint * np.sqrt(fine)
    return albedo * np.maximum(factor, 0.2)[:, None]


def _paving(albedo, frame, place, normal, distance):
    return _slabs(albedo, frame, place, distance, 0.6, 0.4, 0.22)


def _cobbles(albedo, frame, place, normal, distance):
    return _slabs(albedo, frame, place, distance, 0.22, 0.12, 0.4)


def _grass(albedo, frame, place, normal, distance):
    x, y = place[:, 0], place[:, 1]
    blades = _speck(x / 0.035, y / 0.035) - 0.5
    tufts = noise(x / 0.22, y / 0.22) - 0.5
    clumps = noise(x / 1.1 + 40, y / 1.1) - 0.5
    dry = np.clip((noise(x / 4.5 + 13, y / 4.5 + 77) - 0.5) * 2.5, 0, 1)[:, None]
    factor = (
        1 + 1.1 * blades * _fade(distance, 8) + 0.7 * tufts * _fade(distance, 22) + 0.5 * clumps
    )
    albedo = albedo * (1 - dry) + dry * linear((0.5, 0.46, 0.28))
    return albedo * np.maximum(factor, 0.25)[:, None]


def _kerb(albedo, frame, place, normal, distance):
    s, _ = _street_place(frame, place)
    joint = _joint(s, 1.0, 0.015 + 0.001 * distance) * _fade(distance, 40)
    return albedo * (1 - 0.4 * joint + 0.2 * (noise(s / 0.1, place[:, 2] / 0.1) - 0.5))[:, None]


def _brick(albedo, frame, place, normal, distance):
    u, z = _facade(place, normal), place[:, 2]
    long, high = 0.3, 0.1
    row = np.floor(z / high)
    shifted = u + 0.5 * long * (row % 2)
    width = 0.01 + 0.0009 * distance
    joint = np.maximum(_joint(shifted, long, width), _joint(z, high, width))
    near = np.sqrt(0.01 / width) * _fade(distance, 70)
    tone = 0.45 * (_speck(shifted / long + 5, row) - 0.5) * _fade(distance, 45)
    stain = 0.3 * (noise(u / 1.9, z / 1.3) - 0.5)
    color = albedo * (1 + tone + stain)[:, None]
    mortar = linear((0.68, 0.65, 0.6))
    return color + (mortar - color) * (0.75 * joint * near)[:, None]


def _plaster(albedo, frame, place, normal, distance):
    u, z = _facade(place, normal), place[:, 2]
    streak = noise(u / 0.35, z / 3.5 + 20) - 0.5
    stain = noise(u / 2.7 + 9, z / 2.1) - 0.5
    grain = _speck(u / 0.02, z / 0.02) - 0.5
    factor = 1 + 0.13 * streak + 0.2 * stain + 0.16 * grain * _fade(distance, 8)
    return albedo * factor[:, None]


def _tiles(albedo, frame, place, normal, distance):
    u, z = _facade(place, normal), place[:, 2]
    row = np.floor(z / 0.22)
    edge = _joint(z, 0.22, 0.04 + 0.0015 * distance) * _fade(distance, 50)
    tone = _speck(u / 0.25 + 0.5 * (row % 2), row + 60) - 0.5
    factor = (
        1 - 0.35 * edge + 0.35 * tone * _fade(distance, 45) + 0.3 * (noise(u / 2, z / 1.4) - 0.5)
    )
    return albedo * np.maximum(factor, 0.3)[:, None]


def _leaf(albedo, frame, place, normal, distance):
    x, y, z = place.T
    fine = _speck((x + 0.7 * z) / 0.05, (y - 0.7 * z) / 0.05) - 0.5
    clump = noise((x + z) / 0.3, (y - z) / 0.3) - 0.5
    factor = 1 + 1.0 * fine * _fade(distance, 18) + 0.8 * clump
    return albedo * np.maximum(factor, 0.2)[:, None]


def _bark(albedo, frame, place, normal, distance):
    u, z = _facade(place, normal), place[:, 2]
    factor = 1 + (0.9 * (noise(u / 0.03, z / 0.3) - 0.5)) * _fade(distance, 20)
    return albedo * (factor + 0.4 * (noise(u / 0.2, z / 0.6) - 0.5))[:, None]


def _wood(albedo, frame, place, normal, distance):
    u, z = _facade(place, normal), place[:, 2]
    grain = noise(u / 0.04, z / 0.5) - 0.5
    return (
        albedo * (1 + 0.5 * grain * _fade(distance, 15) + 0.3 * (noise(u / 0.9, z) - 0.5))[:, None]
    )


def _fabric(albedo, frame, place, normal, distance):
    x, y, z = place.T
    return albedo * (1 + 0.5 * (noise((x + y) / 0.06, z / 0.09) - 0.5))[:, None]


def _stripes(albedo, frame, place, normal, distance):
    slant = (_facade(place, normal) + place[:, 2]) / 0.36
    red = (slant % 1.0 < 0.5)[:, None]
    return np.where(red, linear((0.85, 0.06, 0.06)), albedo)


def _bands(albedo, frame, place, normal, distance):
    white = (place[:, 2] / 0.3 % 1.0 < 0.38)[:, None]
    return np.where(white, linear((0.92, 0.92, 0.92)), albedo)


_TEXTURES: dict[int, Callable[..., NDArray]] = {
    ASPHALT: _asphalt, MARKING: _marking, PAVING: _paving, COBBLES: _cobbles, GRASS: _grass,
    KERB: _kerb, BRICK: _brick, PLASTER: _plaster, TILES: _tiles, LEAF: _leaf, BARK: _bark,
    WOOD: _wood, CLOTH: _fabric, STRIPES: _stripes, BANDS: _bands,
}  # fmt: skip
