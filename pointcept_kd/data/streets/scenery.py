"""Scenery of a simulated street: plants, fences, poles, signs, roadworks, houses.

Each function draws its sizes and materials from `rng` and returns parts that stand on z = 0 in a
local frame: x along the street, y away from it, z up; metres.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.random import Generator

from .shapes import Part, box, in_ball, leaves, tube, upright


def tree(rng: Generator) -> list[Part]:
    """A trunk (71) with branches and a crown of leaves (70): round, conical, or nearly bare."""
    style = rng.choice(["round", "cone", "bare"], p=[0.65, 0.17, 0.18])
    bole, radius = rng.uniform(1.5, 3.2), rng.uniform(0.08, 0.28)
    lean = rng.normal(0, 0.05, 2)
    top = np.array([*(lean * bole), bole])
    wood, bark = (
        [tube([0, 0, -0.4], top, radius * 1.15, radius * 0.8, sides=8)],
        rng.uniform(0.12, 0.5),
    )
    green, reach = rng.uniform(0.15, 0.55), rng.uniform(1.3, 2.9)
    if style == "cone":
        height, base = rng.uniform(4, 8), rng.uniform(0.4, 1.4)
        z = height * (1 - np.sqrt(rng.random(int(260 * reach))))
        spread = reach * 0.8 * (1 - z / height) * np.sqrt(rng.random(len(z)))
        angle = rng.uniform(0, 2 * np.pi, len(z))
        points = np.stack([spread * np.cos(angle), spread * np.sin(angle), base + z], 1)
        crown = leaves(rng, points, 0.4)
    else:
        for _ in range(int(rng.integers(3, 7))):
            angle, rise = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.3)
            end = top + reach * np.array([0.7 * np.cos(angle), 0.7 * np.sin(angle), rise])
            wood.append(
                tube(top * rng.uniform(0.75, 1.0), end, radius * 0.4, radius * 0.15, sides=5)
            )
        clumps = []
        for _ in range(int(rng.integers(3, 6))):
            centre = np.add(top, [*rng.normal(0, 0.45 * reach, 2), reach * rng.uniform(0.4, 1.2)])
            radii = reach * rng.uniform(0.4, 0.75, 3)
            dense = 38 * (0.12 if style == "bare" else rng.uniform(0.6, 1.2))
            clumps.append(in_ball(rng, int(dense * 4.2 * radii.prod()) + 4, centre, radii))
        crown = leaves(rng, np.concatenate(clumps), 0.42)
    return [
        Part(np.concatenate(wood), 71, bark, material="bark"),
        Part(crown, 70, green, 0.06, 0.05, "leaf"),
    ]


def bush(rng: Generator) -> list[Part]:
    """A shrub of one to three balls of leaves."""
    clumps = []
    for _ in range(int(rng.integers(1, 4))):
        radii = rng.uniform(0.3, 0.9, 3) * [1, 1, 0.9]
        centre = [*rng.normal(0, 0.4, 2), radii[2] * rng.uniform(0.5, 0.95)]
        clumps.append(in_ball(rng, int(150 * 4.2 * radii.prod()) + 8, centre, radii))
    green = leaves(rng, np.concatenate(clumps), 0.25)
    return [Part(green, 70, rng.uniform(0.15, 0.55), 0.05, 0.03, "leaf")]


def hedge(rng: Generator, length: float) -> list[Part]:
    """A clipped hedge along x."""
    height, depth = rng.uniform(0.7, 2.3), rng.uniform(0.5, 1.0)
    count = int(170 * length * height * depth)
    points = rng.uniform([-length / 2, -depth / 2, 0], [length / 2, depth / 2, height], (count, 3))
    points[:, 1] += 0.08 * np.sin(points[:, 0] * rng.uniform(1, 4))
    return [Part(leaves(rng, points, 0.24), 70, rng.uniform(0.15, 0.55), 0.04, 0.02, "leaf")]


def fence(rng: Generator, length: float) -> list[Part]:
    """Pickets, panels between posts, rails, or a low wall with pickets on it, along x."""
    height, style, h = (
        rng.uniform(0.8, 2.1),
        rng.choice(["pickets", "panels", "rails", "wall"]),
        length / 2,
    )
    posts = np.linspace(-h, h, max(2, int(length / rng.uniform(1.6, 2.6)) + 1))
    pieces = [box([x - 0.05, -0.05, 0], [x + 0.05, 0.05, height + 0.08]) for x in posts]
    if style == "panels":
        ends = itertools.pairwise(posts)
        lift = rng.uniform(0.0, 0.2)
        pieces += [
            box([a + 0.06, -0.02, lift], [b - 0.06, 0.02, height * rng.uniform(0.92, 1.0)])
            for a, b in ends
        ]
    elif style == "rails":
        for z in np.arange(0.3, height, rng.uniform(0.18, 0.35)):
            pieces.append(box([-h, -0.02, z], [h, 0.02, z + 0.07]))
    else:
        low = 0.0 if style == "pickets" else height * rng.uniform(0.3, 0.5)
        step, slat = rng.uniform(0.14, 0.24), rng.uniform(0.06, 0.1)
        pieces += [
            box([x, -0.012, low], [x + slat, 0.012, height]) for x in np.arange(-h, h - slat, step)
        ]
        pieces += [box([-h, -0.03, z], [h, 0.0, z + 0.07]) for z in (low + 0.15, height - 0.25)]
        if low:
            pieces.append(box([-h, -0.1, 0], [h, 0.1, low]))
    return [Part(np.concatenate(pieces), 51, rng.uniform(0.12, 0.65), 0.02, material="fence")]


def lamp(rng: Generator) -> list[Part]:
    """A lamp post, bollard or plain mast (80)."""
    style, radius = (
        rng.choice(["lamp", "mast", "bollard"], p=[0.55, 0.25, 0.2]),
        rng.uniform(0.05, 0.15),
    )
    height = rng.uniform(0.8, 1.2) if style == "bollard" else rng.uniform(3.5, 8.0)
    pieces = [tube([0, 0, -0.2], [0, 0, height], radius, radius * 0.7, sides=7)]
    if style == "lamp":
        reach = rng.uniform(0.3, 1.8)
        pieces += [
            tube([0, 0, height], [0, -reach, height + 0.15], 0.04),
            box([-0.12, -reach - 0.5, height + 0.08], [0.12, -reach, height + 0.2]),
        ]
    return [Part(np.concatenate(pieces), 80, rng.uniform(0.1, 0.6), material="metal")]


def sign(rng: Generator) -> list[Part]:
    """One or two plates (81) on a thin pole (80), or a wide board on two."""
    pole_shade, plate_shade, lift = (
        rng.uniform(0.15, 0.6),
        rng.uniform(0.35, 1.0),
        rng.uniform(1.5, 2.4),
    )
    if rng.random() < 0.2:
        w, height = rng.uniform(0.5, 1.1), rng.uniform(0.5, 1.2)
        legs = np.concatenate(
            [tube([0, y, -0.2], [0, y, lift + height], 0.045) for y in (-w * 0.8, w * 0.8)]
        )
        return [
            Part(legs, 80, pole_shade, material="metal"),
            Part(box([0.04, -w, lift], [0.07, w, lift + height]), 81, plate_shade, material="sign"),
        ]
    plates, z = [], lift
    for _ in range(int(rng.integers(1, 3))):
        half = rng.uniform(0.25, 0.42)
        shape = rng.choice(["disc", "square", "triangle"])
        if shape == "square":
            plates.append(box([0.04, -half, z], [0.06, half, z + 2 * half]))
        else:
            sides = 12 if shape == "disc" else 3
            plates.append(tube([0.04, 0, z + half], [0.06, 0, z + half], half, sides=sides))
        z += 2 * half + 0.03
    pole = tube([0, 0, -0.2], [0, 0, z], rng.uniform(0.03, 0.06))
    return [
        Part(pole, 80, pole_shade, material="metal"),
        Part(np.concatenate(plates), 81, plate_shade, material="sign"),
    ]


def clutter(rng: Generator) -> list[Part]:
    """A bin, box or cabinet that no evaluated class covers (99)."""
    x, y, z = rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.45), rng.uniform(0.5, 1.4)
    body = box([-x, -y, 0], [x, y, z], 0.04, 0.04, 0.04)
    return [Part(body, 99, rng.uniform(0.1, 0.6), material="bin")]


def cone(rng: Generator, label: int) -> list[Part]:
    """A traffic cone on its square foot."""
    height, foot = rng.uniform(0.5, 0.9), rng.uniform(0.17, 0.24)
    body = tube([0, 0, 0.03], [0, 0, height], foot * 0.75, 0.04, sides=10)
    base = box([-foot, -foot, 0], [foot, foot, 0.04])
    return [Part(np.concatenate([body, base]), label, 0.7, material="cone")]


def barrier(rng: Generator, label: int, length: float = 2.0) -> list[Part]:
    """Two striped boards on feet, along x."""
    h, top = length / 2, rng.uniform(0.95, 1.1)
    boards = [
        box([-h, -0.03, z], [h, 0.03, z + 0.25]) for z in (rng.uniform(0.2, 0.35), top - 0.25)
    ]
    feet = [box([x - 0.05, -0.3, 0], [x + 0.05, 0.3, 0.08]) for x in (-h * 0.8, h * 0.8)]
    feet += [box([x - 0.03, -0.035, 0], [x + 0.03, 0.035, top]) for x in (-h * 0.8, h * 0.8)]
    return [
        Part(np.concatenate(boards), label, 0.8, material="stripes"),
        Part(np.concatenate(feet), label, 0.3, material="metal"),
    ]


def building(rng: Generator, length: float, depth: float, height: float) -> list[Part]:
    """A house: its front at y = 0 has recessed windows and a door, sometimes balconies.

    The roof is flat or pitched.
    """
    h, shade = length / 2, rng.uniform(0.12, 0.65)
    floor_height = rng.uniform(2.6, 3.2)
    floors = max(1, int(height / floor_height))
    bays = max(1, int(length / rng.uniform(2.2, 3.4)))
    bay = length / bays
    window = rng.uniform(0.35, 0.6) * bay
    xs = np.concatenate(
        [
            [-h],
            *[
                [-h + (i + 0.5) * bay - window / 2, -h + (i + 0.5) * bay + window / 2]
                for i in range(bays)
            ],
            [h],
        ]
    )
    sill, lintel = rng.uniform(0.6, 1.0), rng.uniform(2.0, 2.35)
    zs = [-2.0]
    for f in range(floors):
        zs += [
            min(f * floor_height + sill, height - 0.05),
            min(f * floor_height + lintel, height - 0.02),
        ]
    zs = np.concatenate([zs, [height]])
    is_window = np.zeros((len(zs) - 1, len(xs) - 1), bool)
    is_window[1::2, 1::2] = rng.random((floors, bays)) < rng.uniform(0.6, 1.0)
    is_window[0, 1 + 2 * int(rng.integers(bays))] = True  # a door: the opening reaches the ground
    recess = rng.uniform(0.06, 0.3)
    wall, glass = [], []
    for r, c in np.ndindex(is_window.shape):
        x0, x1, z0, z1 = xs[c], xs[c + 1], zs[r], zs[r + 1]
        if is_window[r, c]:
            glass.append(upright(x0, x1, z0, z1, recess))
            wall += [
                box([x0, 0, z0 - 0.001], [x1, recess, z0]),
                box([x0, 0, z1], [x1, recess, z1 + 0.001]),
                box([x0 - 0.001, 0, z0], [x0, recess, z1]),
                box([x1, 0, z0], [x1 + 0.001, recess, z1]),
            ]
        else:
            wall.append(upright(x0, x1, z0, z1, 0.0))
    wall.append(box([-h, recess + 0.01, -2], [h, depth, height]))
    wall += [
        box([-h, 0, -2], [-h + 0.001, recess + 0.02, height]),
        box([h - 0.001, 0, -2], [h, recess + 0.02, height]),
    ]
    if rng.random() < 0.7:
        rise, eaves = rng.uniform(1.2, 3.5), rng.uniform(0.1, 0.5)
        wall.append(
            box(
                [-h - eaves, -eaves, height],
                [h + eaves, depth + eaves, height + rise],
                0.0,
                0.0,
                depth / 2 + eaves - 0.05,
            )
        )
    if floors > 1 and rng.random() < 0.5:
        for c in range(bays):
            if rng.random() < 0.4:
                x, reach = -h + (c + 0.5) * bay, rng.uniform(0.7, 1.4)
                for f in range(1, floors):
                    z = f * floor_height
                    wall.append(box([x - window * 0.7, -reach, z - 0.15], [x + window * 0.7, 0, z]))
                    wall.append(
                        box(
                            [x - window * 0.7, -reach, z + 0.1],
                            [x + window * 0.7, -reach + 0.05, z + 0.95],
                        )
                    )
    return [
        Part(np.concatenate(wall), 50, shade, 0.01, material="wall"),
        Part(np.concatenate(glass), 50, 0.15, 0.5, material="window"),
    ]
