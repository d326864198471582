"""Things that stand in a simulated street: vehicles, people, plants, poles, fences, houses.

Each function draws its sizes and materials from `rng` and returns parts that stand on z = 0 in a
local frame: x forward (or along the street), y left (or away from the street), z up; metres.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.random import Generator

from .shapes import Part, Triangles, box, ellipsoid, in_ball, leaves, ring, tube, upright


def _wheels(xs: list[float], half_width: float, radius: float, width: float) -> Triangles:
    pieces = []
    for x in xs:
        for y in (-half_width, half_width):
            pieces.append(
                tube([x, y - width / 2, radius], [x, y + width / 2, radius], radius, sides=10)
            )
    return np.concatenate(pieces)


def _paint(rng: Generator) -> float:
    return float(
        rng.choice([rng.uniform(0.04, 0.15), rng.uniform(0.15, 0.45), rng.uniform(0.45, 0.8)])
    )


def car(rng: Generator, label: int = 10) -> list[Part]:
    """A saloon, hatchback, estate or small van with glass, wheels and number plates."""
    length, width, height = rng.uniform(3.6, 4.9), rng.uniform(1.6, 1.9), rng.uniform(1.38, 1.6)
    style = rng.choice(["saloon", "hatch", "estate", "van"], p=[0.3, 0.3, 0.22, 0.18])
    if style == "van":
        length, height = rng.uniform(4.3, 5.2), rng.uniform(1.75, 2.15)
    bonnet = {"saloon": 1.05, "hatch": 0.85, "estate": 1.0, "van": 0.45}[style] * rng.uniform(
        0.9, 1.15
    )
    boot = {"saloon": 0.8, "hatch": 0.1, "estate": 0.05, "van": 0.0}[style]
    belt = height * rng.uniform(0.56, 0.64)
    h, w = length / 2, width / 2
    body = np.concatenate(
        [
            box([-h, -w, 0.22], [h, w, belt * 0.75], 0.03, 0.03, 0.02),
            box([-h + 0.02, -w + 0.02, belt * 0.75], [h - 0.05, w - 0.02, belt], 0.12, 0.06, 0.03),
            box([-h + boot + 0.35, -w + 0.2, height - 0.05], [h - bonnet - 0.6, w - 0.2, height]),
        ]
    )
    cabin = box(
        [-h + boot, -w + 0.05, belt],
        [h - bonnet, w - 0.05, height - 0.04],
        0.25 if style == "van" else 0.6,
        0.08 if boot < 0.3 else 0.4,
        0.14,
    )
    plates = np.concatenate(
        [box([x - 0.01, -0.26, 0.45], [x + 0.01, 0.26, 0.57]) for x in (-h - 0.005, h + 0.005)]
    )
    paint = _paint(rng)
    glass = [Part(cabin, label, 0.12, 0.55)]
    if style == "van" and rng.random() < 0.5:
        glass = [Part(cabin, label, paint, 0.02)]
    return [
        Part(body, label, paint, 0.04),
        *glass,
        Part(_wheels([-0.3 * length, 0.3 * length], w - 0.11, 0.31, 0.2), label, 0.08, 0.1),
        Part(plates, label, 0.95),
    ]


def truck(rng: Generator, label: int = 18) -> list[Part]:
    """A cab and, behind a gap, a box, a flat bed with boards, or a tank."""
    width, cab, load = rng.uniform(2.1, 2.5), rng.uniform(1.6, 2.3), rng.uniform(3.6, 6.5)
    cab_height, floor = rng.uniform(2.2, 2.9), rng.uniform(0.75, 1.1)
    w, h = width / 2, (cab + load + 0.35) / 2
    style = rng.choice(["box", "flat", "tank"], p=[0.5, 0.3, 0.2])
    top = rng.uniform(2.5, 3.6)
    if style == "box":
        cargo = box([-h, -w, floor], [-h + load, w, top])
    elif style == "flat":
        side = floor + rng.uniform(0.4, 0.9)
        cargo = np.concatenate(
            [
                box([-h, -w, floor - 0.15], [-h + load, w, floor]),
                box([-h, -w, floor], [-h + load, -w + 0.05, side]),
                box([-h, w - 0.05, floor], [-h + load, w, side]),
                box([-h, -w, floor], [-h + 0.05, w, side]),
                box(
                    [-h + load * 0.2, -w * 0.7, floor],
                    [-h + load * 0.7, w * 0.7, floor + rng.uniform(0.2, 1.2)],
                ),
            ]
        )
    else:
        radius = min(w, 1.0)
        cargo = tube([-h, 0, floor + radius], [-h + load, 0, floor + radius], radius, sides=12)
    chassis = box([-h, -0.45, 0.5], [h - 0.2, 0.45, floor])
    cabin = box([h - cab, -w + 0.04, 0.45], [h, w - 0.04, cab_height], 0.25, 0.0, 0.05)
    windscreen = box(
        [h - 0.12, -w + 0.2, cab_height * 0.58], [h + 0.02, w - 0.2, cab_height * 0.92], 0.12
    )
    paint = _paint(rng)
    return [
        Part(cargo, label, _paint(rng) if rng.random() < 0.6 else paint, 0.03),
        Part(chassis, label, 0.1, 0.1),
        Part(cabin, label, paint, 0.05),
        Part(windscreen, label, 0.12, 0.6),
        Part(_wheels([-h + 1.0, -h + 2.0, h - 1.0], w - 0.16, 0.46, 0.28), label, 0.08, 0.1),
    ]


def bus(rng: Generator, label: int = 13) -> list[Part]:
    """A long body with a band of windows and no separate cab."""
    paint = _paint(rng)
    h, w, top = rng.uniform(3.6, 5.6), rng.uniform(1.1, 1.27), rng.uniform(2.6, 3.2)
    return [
        Part(box([-h, -w, 0.32], [h, w, 1.15]), label, paint, 0.03),
        Part(
            box([-h + 0.02, -w + 0.02, 1.15], [h - 0.02, w - 0.02, top - 0.45]), label, 0.14, 0.45
        ),
        Part(box([-h, -w, top - 0.45], [h, w, top], 0.1, 0.1, 0.1), label, paint, 0.03),
        Part(_wheels([-h * 0.55, h * 0.6], w - 0.12, 0.46, 0.28), label, 0.08, 0.1),
    ]


def caravan(rng: Generator, label: int = 20) -> list[Part]:
    """A trailer on one axle with a drawbar."""
    paint = _paint(rng)
    h, w, top = rng.uniform(1.8, 2.9), rng.uniform(0.95, 1.15), rng.uniform(1.9, 2.6)
    window = box([-h * 0.5, -w - 0.01, top * 0.55], [h * 0.4, w + 0.01, top * 0.8])
    return [
        Part(box([-h, -w, 0.4], [h, w, top], 0.3, 0.12, 0.05), label, paint, 0.03),
        Part(window, label, 0.14, 0.5),
        Part(tube([h, 0, 0.45], [h + 1.1, 0, 0.45], 0.05), label, 0.2),
        Part(_wheels([-0.2], w - 0.1, 0.3, 0.18), label, 0.08, 0.1),
    ]


def tractor(rng: Generator, label: int = 20) -> list[Part]:
    """A bonnet, a tall cab of glass, big rear wheels."""
    paint = _paint(rng)
    h, w = rng.uniform(1.5, 1.9), rng.uniform(0.8, 1.0)
    cab = box([-h * 0.75, -w * 0.7, 1.5], [0.0, w * 0.7, 2.5], 0.1, 0.05, 0.08)
    return [
        Part(box([0.0, -0.38, 0.6], [h, 0.38, 1.35], 0.1), label, paint, 0.04),
        Part(box([-h * 0.8, -w * 0.75, 0.7], [0.05, w * 0.75, 1.5]), label, paint, 0.04),
        Part(cab, label, 0.15, 0.5),
        Part(_wheels([-h * 0.55], w, 0.75, 0.4), label, 0.08, 0.1),
        Part(_wheels([h * 0.75], w * 0.8, 0.45, 0.28), label, 0.08, 0.1),
    ]


def other_vehicle(rng: Generator) -> list[Part]:
    """A bus, a caravan or a tractor."""
    return (bus, caravan, tractor)[int(rng.integers(3))](rng)


def person(rng: Generator, label: int = 30, phase: float | None = None) -> list[Part]:
    """Somebody standing or walking; `phase` is the place in the stride, in radians."""
    size = rng.uniform(1.5, 1.95) / 1.75
    phase = rng.uniform(0, 2 * np.pi) if phase is None else phase
    stride, girth = 0.28 * np.sin(phase), rng.uniform(0.85, 1.3)
    clothes, trousers = rng.uniform(0.1, 0.6), rng.uniform(0.08, 0.5)
    legs = [
        tube([s * stride, s * 0.1, 0], [0, s * 0.09, 0.86], 0.07 * girth, 0.1 * girth)
        for s in (-1, 1)
    ]
    arms = [tube([-s * stride, s * 0.27, 0.85], [0, s * 0.21, 1.4], 0.05, 0.06) for s in (-1, 1)]
    torso = ellipsoid([0, 0, 1.14], [0.15 * girth, 0.23 * girth, 0.38])
    extra = []
    if rng.random() < 0.35:
        extra = [
            Part(
                size * box([-0.35, -0.17, 0.95], [-0.12, 0.17, 1.42]), label, rng.uniform(0.1, 0.6)
            )
        ]
    return [
        Part(size * np.concatenate(legs), label, trousers),
        Part(size * np.concatenate([torso, *arms]), label, clothes),
        Part(size * ellipsoid([0.02, 0, 1.63], [0.1, 0.09, 0.13]), label, rng.uniform(0.2, 0.5)),
        *extra,
    ]


def bicycle(rng: Generator, label: int = 11) -> list[Part]:
    """Two thin wheels, a frame of tubes, a handlebar and a saddle."""
    r, gap = rng.uniform(0.31, 0.36), rng.uniform(0.95, 1.1)
    x, seat, bar, thick = (
        gap / 2,
        [-0.2, 0, 0.85],
        [gap / 2 - 0.15, 0, 0.95],
        rng.uniform(0.022, 0.04),
    )
    pieces = [
        tube([-x, 0, r], [-0.08, 0, r], thick),
        tube([-0.08, 0, r], seat, thick),
        tube(seat, [bar[0], 0, 0.75], thick),
        tube([-0.08, 0, r], [bar[0], 0, 0.75], thick),
        tube([x, 0, r], bar, thick),
        tube([-x, 0, r], seat, thick),
        tube([bar[0], -0.28, 0.97], [bar[0], 0.28, 0.97], thick),
        box([-0.36, -0.08, 0.85], [-0.08, 0.08, 0.92]),
    ]
    if rng.random() < 0.4:
        pieces.append(box([x - 0.1, -0.17, 0.7], [x + 0.2, 0.17, 0.95]))
    tyres = np.concatenate([ring([end, 0, r], r, r - 0.07) for end in (-x, x)])
    return [
        Part(np.concatenate(pieces), label, rng.uniform(0.1, 0.7)),
        Part(tyres, label, rng.uniform(0.06, 0.25)),
    ]


def motorcycle(rng: Generator, label: int = 15) -> list[Part]:
    """A motorbike or a scooter with its front shield."""
    r, gap, w = rng.uniform(0.25, 0.33), rng.uniform(1.2, 1.45), rng.uniform(0.13, 0.2)
    x = gap / 2
    tyres = [tube([e, -0.07, r], [e, 0.07, r], r, sides=10) for e in (-x, x)]
    pieces = [
        box([-0.3, -w, 0.25], [0.3, w, 0.62]),
        box([-x - 0.15, -w * 0.9, 0.66], [0.05, w * 0.9, 0.8], 0.0, 0.1, 0.02),
        tube([x, 0, r], [x - 0.25, 0, 1.0], 0.06),
        tube([x - 0.25, -0.36, 1.02], [x - 0.25, 0.36, 1.02], 0.03),
    ]
    if rng.random() < 0.4:
        pieces += [
            box([x - 0.38, -0.2, 0.3], [x - 0.3, 0.2, 1.05]),
            box([-x, -w, 0.4], [-0.2, w, 0.7]),
        ]
    else:
        pieces.append(ellipsoid([0.15, 0, 0.78], [0.28, w, 0.16]))
    return [
        Part(np.concatenate(pieces), label, _paint(rng)),
        Part(np.concatenate(tyres), label, 0.08),
    ]


def _rider(rng: Generator, label: int, seat: float, lean: float, reach: float) -> list[Part]:
    hip, size = np.array([-0.22, 0, seat]), rng.uniform(0.92, 1.08)
    shoulder = hip + size * np.array([0.52 * np.sin(lean), 0, 0.52 * np.cos(lean)])
    pieces = [tube(hip, shoulder, 0.15, 0.19, sides=8)]
    for s in (-1, 1):
        knee = [0.2, s * 0.14, seat - 0.12 - 0.1 * s * rng.uniform(-1, 1)]
        pieces += [
            tube(np.add(hip, [0, s * 0.1, 0]), knee, 0.09, 0.07),
            tube(knee, [0.02, s * 0.13, 0.22], 0.065, 0.05),
        ]
        pieces.append(
            tube(np.add(shoulder, [0, s * 0.18, -0.05]), [reach, s * 0.25, 1.0], 0.05, 0.04)
        )
    head = np.add(shoulder, [0.06, 0, 0.24])
    return [
        Part(np.concatenate(pieces), label, rng.uniform(0.1, 0.6)),
        Part(ellipsoid(head, [0.12, 0.11, 0.14]), label, rng.uniform(0.15, 0.7)),
    ]


def bicyclist(rng: Generator, label: int = 31) -> list[Part]:
    """A bicycle with its rider."""
    return bicycle(rng, label) + _rider(rng, label, 0.95, rng.uniform(0.15, 0.7), 0.35)


def motorcyclist(rng: Generator, label: int = 32) -> list[Part]:
    """A motorcycle with its rider."""
    return motorcycle(rng, label) + _rider(rng, label, 0.85, rng.uniform(0.0, 0.45), 0.42)


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
    return [Part(np.concatenate(wood), 71, bark), Part(crown, 70, green, 0.06, 0.05)]


def bush(rng: Generator) -> list[Part]:
    """A shrub of one to three balls of leaves."""
    clumps = []
    for _ in range(int(rng.integers(1, 4))):
        radii = rng.uniform(0.3, 0.9, 3) * [1, 1, 0.9]
        centre = [*rng.normal(0, 0.4, 2), radii[2] * rng.uniform(0.5, 0.95)]
        clumps.append(in_ball(rng, int(150 * 4.2 * radii.prod()) + 8, centre, radii))
    return [
        Part(leaves(rng, np.concatenate(clumps), 0.25), 70, rng.uniform(0.15, 0.55), 0.05, 0.03)
    ]


def hedge(rng: Generator, length: float) -> list[Part]:
    """A clipped hedge along x."""
    height, depth = rng.uniform(0.7, 2.3), rng.uniform(0.5, 1.0)
    count = int(170 * length * height * depth)
    points = rng.uniform([-length / 2, -depth / 2, 0], [length / 2, depth / 2, height], (count, 3))
    points[:, 1] += 0.08 * np.sin(points[:, 0] * rng.uniform(1, 4))
    return [Part(leaves(rng, points, 0.24), 70, rng.uniform(0.15, 0.55), 0.04, 0.02)]


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
    return [Part(np.concatenate(pieces), 51, rng.uniform(0.12, 0.65), 0.02)]


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
    return [Part(np.concatenate(pieces), 80, rng.uniform(0.1, 0.6))]


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
            Part(legs, 80, pole_shade),
            Part(box([0.04, -w, lift], [0.07, w, lift + height]), 81, plate_shade),
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
    return [Part(pole, 80, pole_shade), Part(np.concatenate(plates), 81, plate_shade)]


def clutter(rng: Generator) -> list[Part]:
    """A bin, box or cabinet that no evaluated class covers (99)."""
    x, y, z = rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.45), rng.uniform(0.5, 1.4)
    return [Part(box([-x, -y, 0], [x, y, z], 0.04, 0.04, 0.04), 99, rng.uniform(0.1, 0.6))]


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
    return [Part(np.concatenate(wall), 50, shade, 0.01), Part(np.concatenate(glass), 50, 0.15, 0.5)]
