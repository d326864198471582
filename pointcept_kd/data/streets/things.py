"""Vehicles and people of a simulated street.

Each function draws its sizes and materials from `rng` and returns parts that stand on z = 0 in a
local frame: x forward, y left, z up; metres.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from .shapes import Part, Triangles, box, ellipsoid, ring, tube


def _wheels(xs: list[float], half_width: float, radius: float, width: float) -> Triangles:
    pieces = []
    for x in xs:
        for y in (-half_width, half_width):
            pieces.append(
                tube([x, y - width / 2, radius], [x, y + width / 2, radius], radius, sides=10)
            )
    return np.concatenate(pieces)


def _tyres(triangles: Triangles, label: int) -> Part:
    return Part(triangles, label, 0.08, 0.1, material="tyre")


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
    glass = [Part(cabin, label, 0.12, 0.55, material="glass")]
    if style == "van" and rng.random() < 0.5:
        glass = [Part(cabin, label, paint, 0.02)]
    return [
        Part(body, label, paint, 0.04),
        *glass,
        _tyres(_wheels([-0.3 * length, 0.3 * length], w - 0.11, 0.31, 0.2), label),
        Part(plates, label, 0.95, material="plate"),
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
        Part(cargo, label, _paint(rng) if rng.random() < 0.6 else paint, 0.03, material="cargo"),
        Part(chassis, label, 0.1, 0.1, material="chassis"),
        Part(cabin, label, paint, 0.05),
        Part(windscreen, label, 0.12, 0.6, material="glass"),
        _tyres(_wheels([-h + 1.0, -h + 2.0, h - 1.0], w - 0.16, 0.46, 0.28), label),
    ]


def bus(rng: Generator, label: int = 13) -> list[Part]:
    """A long body with a band of windows and no separate cab."""
    paint = _paint(rng)
    h, w, top = rng.uniform(3.6, 5.6), rng.uniform(1.1, 1.27), rng.uniform(2.6, 3.2)
    return [
        Part(box([-h, -w, 0.32], [h, w, 1.15]), label, paint, 0.03),
        Part(
            box([-h + 0.02, -w + 0.02, 1.15], [h - 0.02, w - 0.02, top - 0.45]),
            label,
            0.14,
            0.45,
            material="glass",
        ),
        Part(box([-h, -w, top - 0.45], [h, w, top], 0.1, 0.1, 0.1), label, paint, 0.03),
        _tyres(_wheels([-h * 0.55, h * 0.6], w - 0.12, 0.46, 0.28), label),
    ]


def caravan(rng: Generator, label: int = 20) -> list[Part]:
    """A trailer on one axle with a drawbar."""
    paint = _paint(rng)
    h, w, top = rng.uniform(1.8, 2.9), rng.uniform(0.95, 1.15), rng.uniform(1.9, 2.6)
    window = box([-h * 0.5, -w - 0.01, top * 0.55], [h * 0.4, w + 0.01, top * 0.8])
    return [
        Part(
            box([-h, -w, 0.4], [h, w, top], 0.3, 0.12, 0.05), label, paint, 0.03, material="caravan"
        ),
        Part(window, label, 0.14, 0.5, material="glass"),
        Part(tube([h, 0, 0.45], [h + 1.1, 0, 0.45], 0.05), label, 0.2, material="metal"),
        _tyres(_wheels([-0.2], w - 0.1, 0.3, 0.18), label),
    ]


def tractor(rng: Generator, label: int = 20) -> list[Part]:
    """A bonnet, a tall cab of glass, big rear wheels."""
    paint = _paint(rng)
    h, w = rng.uniform(1.5, 1.9), rng.uniform(0.8, 1.0)
    cab = box([-h * 0.75, -w * 0.7, 1.5], [0.0, w * 0.7, 2.5], 0.1, 0.05, 0.08)
    return [
        Part(box([0.0, -0.38, 0.6], [h, 0.38, 1.35], 0.1), label, paint, 0.04, material="machine"),
        Part(
            box([-h * 0.8, -w * 0.75, 0.7], [0.05, w * 0.75, 1.5]),
            label,
            paint,
            0.04,
            material="machine",
        ),
        Part(cab, label, 0.15, 0.5, material="glass"),
        _tyres(_wheels([-h * 0.55], w, 0.75, 0.4), label),
        _tyres(_wheels([h * 0.75], w * 0.8, 0.45, 0.28), label),
    ]


def other_vehicle(rng: Generator, machine: int = 20) -> list[Part]:
    """A bus, a caravan or a tractor; `machine` is the class of the tractor."""
    kind = int(rng.integers(3))
    return tractor(rng, machine) if kind == 2 else (bus, caravan)[kind](rng)


def excavator(rng: Generator, label: int) -> list[Part]:
    """Two tracks, a turned body with a cab, a boom, an arm and a bucket."""
    paint, w, h = rng.uniform(0.4, 0.7), rng.uniform(0.95, 1.2), rng.uniform(1.4, 1.8)
    bend, fall = rng.uniform(2.6, 3.4), rng.uniform(0.3, 1.2)
    tracks = [
        box([-h, s * w - 0.25, 0], [h, s * w + 0.25, 0.75], 0.25, 0.25, 0.04) for s in (-1, 1)
    ]
    body = box([-h, -w, 0.85], [h * 0.55, w, 1.6], 0.0, 0.25, 0.05)
    cab = box([-0.1, 0.05, 1.6], [h * 0.55, w, 2.75], 0.25, 0.05, 0.08)
    elbow, wrist = [h + 1.6, -0.25, bend], [h + 2.9, -0.25, fall + 0.55]
    boom = [tube([h * 0.4, -0.25, 1.4], elbow, 0.2, 0.15), tube(elbow, wrist, 0.15, 0.1)]
    bucket = box([h + 2.5, -0.75, fall], [h + 3.2, 0.25, fall + 0.65], 0.3, 0.05)
    return [
        Part(np.concatenate([body, *boom]), label, paint, 0.03, material="machine"),
        Part(cab, label, 0.15, 0.4, material="glass"),
        Part(np.concatenate([*tracks, bucket]), label, 0.12, 0.05, material="chassis"),
    ]


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
        bag = size * box([-0.35, -0.17, 0.95], [-0.12, 0.17, 1.42])
        extra = [Part(bag, label, rng.uniform(0.1, 0.6), material="bag")]
    head = size * ellipsoid([0.02, 0, 1.63], [0.1, 0.09, 0.13])
    return [
        Part(size * np.concatenate(legs), label, trousers, material="trousers"),
        Part(size * np.concatenate([torso, *arms]), label, clothes, material="cloth"),
        Part(head, label, rng.uniform(0.2, 0.5), material="skin"),
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
        Part(tyres, label, rng.uniform(0.06, 0.25), material="tyre"),
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
        Part(np.concatenate(tyres), label, 0.08, material="tyre"),
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
        Part(np.concatenate(pieces), label, rng.uniform(0.1, 0.6), material="cloth"),
        Part(ellipsoid(head, [0.12, 0.11, 0.14]), label, rng.uniform(0.15, 0.7), material="helmet"),
    ]


def bicyclist(rng: Generator, label: int = 31) -> list[Part]:
    """A bicycle with its rider."""
    return bicycle(rng, label) + _rider(rng, label, 0.95, rng.uniform(0.15, 0.7), 0.35)


def motorcyclist(rng: Generator, label: int = 32) -> list[Part]:
    """A motorcycle with its rider."""
    return motorcycle(rng, label) + _rider(rng, label, 0.85, rng.uniform(0.0, 0.45), 0.42)
