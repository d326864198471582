"""A procedural street: ground, houses, plants, furniture, parked vehicles and traffic.

Places are given as (s, d): metres along the gently curving centre line, metres to its left. Each
side is a row of blocks (house, terrace, low sheds, park, parking lot, plaza, side street) dealt
from a shuffled bag, so that every street, however short, shows every kind. Everything is drawn
from one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from . import things
from .shapes import Part, Triangles, placed

ROAD, PARKING, SIDEWALK, OTHER, LANE, TERRAIN = 40, 44, 48, 49, 60, 72
MARGIN = 60.0  # metres of street before the first and after the last scan
REACH = 46.0  # metres of ground on each side of the centre line
STRIP = 2.3  # metres between carriageway and pavement: parked cars, grass or more pavement
STEP = 0.5  # metres, length of a ground cell

# A street that was never trained on is also laid out a little differently.
SEEN = {"road": (3.2, 4.8), "pavement": (1.6, 3.6), "slope": (-0.02, 0.10), "bend": (0.05, 0.30)}
UNSEEN = {"road": (3.5, 5.2), "pavement": (1.4, 3.0), "slope": (0.0, 0.13), "bend": (0.15, 0.35)}

_BLOCKS = (
    "house",
    "house",
    "terrace",
    "low",
    "park",
    "park",
    "lot",
    "plaza",
    "plaza",
    "low",
    "side",
)
_ZONES = ("parking", "parking", "parking", "verge", "pavement", "road")
_PARKED = ("car",) * 8 + ("none",) * 3 + ("truck", "other", "truck", "other", "motorcycle")


class Soup:
    """Triangles, each with a label (instance id in the high 16 bits) and a material."""

    def __init__(self) -> None:
        self._triangles: list[Triangles] = []
        self._rows: list[tuple[NDArray, ...]] = []

    def add(
        self,
        triangles: Triangles,
        label: ArrayLike,
        reflectivity: ArrayLike,
        drop: float = 0.0,
        scatter: float = 0.0,
    ) -> None:
        """Add triangles; label and reflectivity are one value or one per triangle."""
        row = zip((label, reflectivity, drop, scatter), (np.uint32, *[np.float32] * 3), strict=True)
        columns = [np.broadcast_to(np.asarray(v, t), len(triangles)) for v, t in row]
        self._triangles.append(triangles)
        self._rows.append(tuple(columns))

    def add_parts(self, parts: list[Part], instance: int = 0) -> None:
        """Add a thing; only vehicles, people and the like have an instance id."""
        for part in parts:
            label = part.label | (instance << 16)
            self.add(part.triangles, label, part.reflectivity, part.drop, part.scatter)

    def arrays(self) -> tuple[Triangles, NDArray, NDArray, NDArray, NDArray]:
        """Triangles (t, 3, 3) float32, label (t,) uint32, reflectivity, drop, scatter (t,)."""
        columns = [np.concatenate(c) for c in zip(*self._rows, strict=True)]
        return (np.concatenate(self._triangles), *columns)


class Block(NamedTuple):
    """One plot along the street, with the choices that its ground and its furniture share."""

    kind: str
    zone: str
    side: int
    start: float
    end: float
    depth: float  # of the front garden, lot or plaza
    drive: bool  # has a paved drive of 3 m at its start

    @property
    def length(self) -> float:
        return self.end - self.start


class Mover(NamedTuple):
    """Something that moves: its shape comes from its own seed, its place from time."""

    kind: str
    instance: int
    seed: tuple[int, ...]
    start: float
    speed: float
    d: float

    def place(self, time: float) -> float:
        return self.start + self.speed * time


_MOVERS: dict[str, tuple[Callable[..., list[Part]], int]] = {
    "car": (things.car, 252),
    "truck": (things.truck, 258),
    "bus": (things.bus, 257),
    "person": (things.person, 254),
    "bicyclist": (things.bicyclist, 253),
    "motorcyclist": (things.motorcyclist, 255),
}


def _bag(rng: Generator, items: tuple[str, ...]) -> Iterator[str]:
    """Deal the items for ever: all of them, shuffled, then again."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


class Street:
    """A street and its traffic.

    Args:
        key: integers that seed everything (seed and sequence number).
        length: metres between the first and the last scan.
        step_time: seconds between scans.
        scans: number of scans.
        unseen: lay it out as a street for validation or test.
    """

    def __init__(
        self, key: tuple[int, ...], length: float, step_time: float, scans: int, unseen: bool
    ) -> None:
        self.key, self.length, self.step_time, self.scans = key, length, step_time, scans
        self.rng = rng = np.random.default_rng([*key, 0])
        ranges = UNSEEN if unseen else SEEN
        self.road = rng.uniform(*ranges["road"])
        self.pavement = {side: rng.uniform(*ranges["pavement"]) for side in (1, -1)}
        self.slope = {side: rng.uniform(*ranges["slope"]) for side in (1, -1)}
        self.gain = rng.uniform(0.85, 1.15)  # the sensor's sensitivity in this recording
        self.soup = Soup()
        self._taken: list[tuple[float, float, float, float]] = []
        self._waiting: list[tuple[list[Part], float, float]] = []
        self._instances = 0
        self._centre_line(rng.uniform(*ranges["bend"]))
        self._waves = rng.uniform([0.15, 0.1, 0.0], [0.6, 0.6, 2 * np.pi], (6, 3))
        self.blocks = [block for side in (1, -1) for block in self._plots(side)]
        self._ground()
        parked = _bag(rng, _PARKED)
        for block in self.blocks:
            getattr(self, f"_furnish_{block.kind}")(block)
            self._furnish_strip(block, parked)
        self._background()
        self._rare_things()
        self.movers = self._traffic()

    # Geometry of the street

    def _centre_line(self, bend: float) -> None:
        rng, step = self.rng, 0.25
        s = np.arange(-MARGIN - 20, self.length + MARGIN + 20, step)
        heading, height = rng.uniform(-np.pi, np.pi) + 0 * s, 0 * s
        for wave in (rng.uniform(150, 220), rng.uniform(260, 400)):
            # The bend is bounded by its radius (70 m), or places 46 m inside it would fold over.
            swing = min(bend, wave / (2 * np.pi * 140))
            heading += swing * np.sin(2 * np.pi * s / wave + rng.uniform(0, 2 * np.pi))
            climb = rng.uniform(0.1, 0.8)
            height += climb * np.sin(2 * np.pi * s / wave + rng.uniform(0, 2 * np.pi))
        xy = np.cumsum(step * np.stack([np.cos(heading), np.sin(heading)], 1), 0)
        self._line = (s, xy[:, 0], xy[:, 1], heading, height)

    def frame(self, s: ArrayLike, d: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
        """World x, y and heading at places (s, d)."""
        table, x, y, heading, _ = self._line
        theta = np.interp(s, table, heading)
        left = np.asarray(d)
        x = np.interp(s, table, x) - left * np.sin(theta)
        return x, np.interp(s, table, y) + left * np.cos(theta), theta

    def edge(self, side: int) -> float:
        """Distance from the centre line to the far edge of the pavement."""
        return self.road + STRIP + self.pavement[side]

    def _base(self, s: NDArray, d: NDArray) -> NDArray:
        """Height without kerbs: the street's climb, the road's crown, slopes and waves beside."""
        table, *_, height = self._line
        left = d > 0
        beyond = np.abs(d) - np.where(left, self.edge(1), self.edge(-1))
        beyond = np.maximum(beyond, 0)
        u, v, phase = self._waves.T[:, :, None, None] if np.ndim(s) else self._waves.T
        waves = np.sin(u * s + v * d + phase).sum(0) * 0.06 * np.minimum(beyond / 3, 1)
        crown = -0.02 * np.minimum(np.abs(d), self.road)
        slope = np.where(left, self.slope[1], self.slope[-1]) * np.minimum(beyond, 18)
        return np.interp(s, table, height) + crown + slope + waves

    def height(self, s: float, d: float) -> float:
        """Height of the ground, kerbs included."""
        i = int(np.clip((s - self._s[0]) // STEP, 0, len(self._s) - 2))
        j = int(np.clip(np.searchsorted(self._d, d, "right") - 1, 0, len(self._d) - 2))
        return float(self._base(np.float64(s), np.float64(d)) + self._lift[self._cells[i, j]])

    # Ground

    def _plots(self, side: int) -> Iterator[Block]:
        rng = self.rng
        kinds, zones = _bag(rng, _BLOCKS), _bag(rng, _ZONES)
        s = -MARGIN
        while s < self.length + MARGIN:
            kind, zone = next(kinds), next(zones)
            low, high = {"side": (6.5, 10.0), "terrace": (9.0, 20.0)}.get(kind, (10.0, 19.0))
            size = np.round(rng.uniform(low, high) / STEP) * STEP
            depths = {"house": (2, 7), "terrace": (0, 0.7), "low": (0.3, 3.0), "lot": (7, 13)}
            depth = rng.uniform(*depths.get(kind, (5.0, 10.0)))
            drive = kind == "house" and rng.random() < 0.6
            yield Block(kind, zone, side, s, s + size, depth, drive)
            s += size

    def _ground(self) -> None:
        rng = self.rng
        near, mid = np.arange(0, 14, 0.25), np.arange(14, 24, 0.5)
        half = np.concatenate([near, mid, np.arange(24, REACH + 1, 1.0), [0.08, self.road]])
        half = np.unique(np.round(half, 3))
        self._d = d = np.concatenate([-half[:0:-1], half])
        self._s = s = np.arange(-MARGIN, self.length + MARGIN + STEP, STEP)
        self._cells = np.full((len(s) - 1, len(d) - 1), TERRAIN)
        self._paint(s[0], s[-1], 0, -self.road, self.road, ROAD)
        for block in self.blocks:
            self._paint_block(block)
        self._paint_markings()
        kerb = rng.uniform(0.08, 0.15)
        self._lift = {
            ROAD: 0.0, LANE: 0.0, PARKING: rng.uniform(0.0, 0.05), SIDEWALK: kerb,
            OTHER: kerb + rng.uniform(-0.03, 0.04), TERRAIN: kerb + rng.uniform(-0.06, 0.1),
        }  # fmt: skip
        rough = {ROAD: 0.004, LANE: 0.004, PARKING: 0.008, SIDEWALK: 0.006, OTHER: 0.014,
                 TERRAIN: rng.uniform(0.025, 0.05)}  # fmt: skip
        shade = {
            ROAD: rng.uniform(0.12, 0.34), LANE: rng.uniform(0.55, 0.9), TERRAIN: rng.uniform(0.2, 0.5),
            PARKING: rng.uniform(0.12, 0.42), SIDEWALK: rng.uniform(0.18, 0.48),
            OTHER: rng.uniform(0.16, 0.5),
        }  # fmt: skip
        lift, bump, tone = (
            np.select([self._cells == c for c in table], list(table.values()))
            for table in (self._lift, rough, shade)
        )
        grid_s, grid_d = np.meshgrid(s, d, indexing="ij")
        z = self._base(grid_s, grid_d)
        noise = rng.normal(size=z.shape)
        x, y, _ = self.frame(grid_s, grid_d)

        def corner(di: int, dj: int) -> NDArray:
            part = np.s_[di : len(s) - 1 + di, dj : len(d) - 1 + dj]
            return np.stack([x[part], y[part], z[part] + lift + bump * noise[part]], -1)

        c = {(i, j): corner(i, j) for i in (0, 1) for j in (0, 1)}
        patch = np.sin(grid_s[1:, 1:] * 0.9 + 2 * noise[0, 0]) + np.sin(grid_d[1:, 1:] * 1.3)
        tone = tone * (1 + 0.12 * patch + 0.08 * rng.normal(size=tone.shape))
        top = [(c[0, 0], c[1, 0], c[1, 1]), (c[0, 0], c[1, 1], c[0, 1])]
        for a, b, e in top:
            corners = np.stack([a, b, e], 2).reshape(-1, 3, 3).astype(np.float32)
            self.soup.add(corners, self._cells.ravel(), tone.ravel())
        # Kerbs: upright strips where neighbouring cells of different classes meet.
        along = (c[0, 1][:, :-1], c[1, 1][:, :-1], c[0, 0][:, 1:], c[1, 0][:, 1:])
        across = (c[1, 0][:-1], c[1, 1][:-1], c[0, 0][1:], c[0, 1][1:])
        for corners, first, second in (
            (along, np.s_[:, :-1], np.s_[:, 1:]),
            (across, np.s_[:-1], np.s_[1:]),
        ):
            step = self._cells[first] != self._cells[second]
            p, q, p2, q2 = (v[step] for v in corners)
            higher = np.where(lift[first] >= lift[second], self._cells[first], self._cells[second])
            for triangle in ((p, q, q2), (p, q2, p2)):
                corners_of = np.stack(triangle, 1).astype(np.float32)
                self.soup.add(corners_of, higher[step], tone[first][step])

    def _paint(self, s0: float, s1: float, side: int, d0: float, d1: float, label: int) -> None:
        """Give cells whose middle lies in the rectangle a class; d0 and d1 count outwards."""
        low, high = sorted((d0 * (side or 1), d1 * (side or 1)))
        mid_s, mid_d = (self._s[:-1] + self._s[1:]) / 2, (self._d[:-1] + self._d[1:]) / 2
        rows = np.flatnonzero((mid_s >= s0) & (mid_s < s1))
        columns = np.flatnonzero((mid_d >= low) & (mid_d < high))
        if len(rows) and len(columns):
            self._cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = label

    def _paint_block(self, b: Block) -> None:
        road, edge = self.road, self.edge(b.side)
        if b.kind == "side":
            self._paint(b.start, b.end, b.side, road, REACH, ROAD)
            return
        strip = {"parking": PARKING, "verge": TERRAIN, "pavement": SIDEWALK, "road": ROAD}[b.zone]
        self._paint(b.start, b.end, b.side, road, road + STRIP, strip)
        if b.zone == "parking":  # a parking bay ends before its plot does
            self._paint(b.start, b.start + 1.0, b.side, road, road + STRIP, SIDEWALK)
            self._paint(b.end - 1.0, b.end, b.side, road, road + STRIP, SIDEWALK)
        self._paint(b.start, b.end, b.side, road + STRIP, edge, SIDEWALK)
        if b.kind == "lot":
            self._paint(b.start + 1, b.end - 1, b.side, edge, edge + b.depth, PARKING)
            self._paint(b.start + 1, b.start + 5, b.side, road, edge, PARKING)
        elif b.kind == "plaza":
            self._paint(b.start, b.end, b.side, edge, edge + b.depth, OTHER)
        elif b.kind == "terrace":
            self._paint(b.start, b.end, b.side, edge, edge + b.depth, SIDEWALK)
        elif b.drive:
            self._paint(b.start, b.start + 3, b.side, road + STRIP, edge + b.depth + 5, PARKING)

    def _paint_markings(self) -> None:
        rng, half = self.rng, 0.08
        for s in np.arange(-MARGIN, self.length + MARGIN, 9.0):
            self._paint(s, s + 3, 0, -half, half, LANE)
        for s in np.arange(-MARGIN + rng.uniform(5, 20), self.length + MARGIN, rng.uniform(35, 60)):
            if self.road > 4.0 and rng.random() < 0.7:  # a traffic island
                self._paint(s, s + rng.uniform(5, 12), 0, -0.75, 0.75, OTHER)
                self._taken.append((s, s + 12, -0.75, 0.75))
                self._waiting.append((things.sign(rng), s + 0.5, 0.0))

    # Placing things

    def put(self, parts: list[Part], s: float, d: float, yaw: float = 0.0) -> None:
        """Stand a thing on the ground at (s, d), turned by `yaw` against the street's direction."""
        self.soup.add_parts(self._standing(parts, s, d, yaw), self._instance_of(parts))

    def _standing(self, parts: list[Part], s: float, d: float, yaw: float) -> list[Part]:
        x, y, theta = self.frame(s, d)
        return placed(parts, float(theta) + yaw, [x, y, self.height(s, d)])

    def _instance_of(self, parts: list[Part]) -> int:
        if not 10 <= parts[0].label <= 32:
            return 0
        self._instances += 1
        return self._instances

    def _claim(self, s: float, d: float, half_s: float, half_d: float) -> bool:
        """Take a rectangle of ground unless something stands there."""
        s0, s1, d0, d1 = s - half_s, s + half_s, d - half_d, d + half_d
        if any(s0 < b and a < s1 and d0 < f and e < d1 for a, b, e, f in self._taken):
            return False
        self._taken.append((s0, s1, d0, d1))
        return True

    def _scatter(
        self,
        make: Callable[[Generator], list[Part]],
        where: tuple[float, float, float, float],
        half: tuple[float, float],
        side: int = 1,
        yaw: float | None = None,
        tries: int = 12,
    ) -> bool:
        """Put a thing at a random free place in s0..s1, d0..d1 (outwards); any yaw unless given."""
        rng, (s0, s1, d0, d1) = self.rng, where
        for _ in range(tries):
            s, d = rng.uniform(s0, max(s0, s1)), side * rng.uniform(d0, max(d0, d1))
            if self._claim(s, d, *half):
                self.put(make(rng), s, d, rng.uniform(-np.pi, np.pi) if yaw is None else yaw)
                return True
        return False

    def _facing(self, side: int) -> float:
        """Yaw that turns a thing's front (-y) towards the street."""
        return 0.0 if side > 0 else np.pi

    def _border(self, b: Block, s0: float, s1: float, d: float, styles: tuple[str, ...]) -> None:
        """A fence or a hedge along the street."""
        style, rng = self.rng.choice(list(styles)), self.rng
        if style == "none" or s1 - s0 < 1.5:
            return
        parts = (things.fence if style == "fence" else things.hedge)(rng, s1 - s0)
        self.put(parts, (s0 + s1) / 2, b.side * d, self._facing(b.side))
        self._taken.append((s0, s1, *sorted((b.side * (d - 0.4), b.side * (d + 0.4)))))

    def _house(self, b: Block, s0: float, s1: float, d: float, depth: float, tall: float) -> None:
        s, middle = (s0 + s1) / 2, b.side * (d + depth / 2)
        self.put(
            things.building(self.rng, s1 - s0, depth, tall), s, b.side * d, self._facing(b.side)
        )
        self._taken.append((s0, s1, middle - depth / 2 - 0.3, middle + depth / 2 + 0.3))

    # What stands on a plot

    def _furnish_house(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        start = b.start + (3.2 if b.drive else 0.3)
        self._house(b, start + rng.uniform(0, 1), b.end - rng.uniform(0.5, 2.5),
                    edge + b.depth, rng.uniform(6, 10), rng.uniform(2.8, 8.5))  # fmt: skip
        self._border(b, start, b.end - 0.2, edge + 0.25, ("fence", "fence", "hedge", "none"))
        if b.drive and rng.random() < 0.5:
            self._scatter(
                things.car, (b.start + 1.5, b.start + 1.5, edge + 1.8, edge + b.depth + 1.5),
                (1.0, 2.4), b.side, rng.choice([-1, 1]) * np.pi / 2,
            )  # fmt: skip
        if rng.random() < 0.5:  # a fence between neighbours
            style = things.fence if rng.random() < 0.6 else things.hedge
            d = edge + 0.5 + b.depth / 2
            self.put(style(rng, b.depth), b.end, b.side * d, np.pi / 2)
        garden = (start + 0.5, b.end - 0.8, edge + 0.9, edge + b.depth - 0.8)
        for _ in range(int(rng.integers(1, 6))):
            self._scatter(things.bush, garden, (0.7, 0.7), b.side)
        if b.depth > 3 and rng.random() < 0.75:
            self._scatter(things.tree, garden, (0.6, 0.6), b.side)

    def _furnish_terrace(self, b: Block) -> None:
        rng = self.rng
        self._house(b, b.start, b.end - rng.uniform(0, 0.3), self.edge(b.side) + b.depth,
                    rng.uniform(7, 11), rng.uniform(5, 12))  # fmt: skip

    def _furnish_low(self, b: Block) -> None:
        rng, edge, s = self.rng, self.edge(b.side), b.start + 0.3
        while s < b.end - 3:
            size = min(rng.uniform(3, 7), b.end - s - 0.2)
            if rng.random() < 0.55:
                self._house(b, s, s + size, edge + b.depth, rng.uniform(3, 6), rng.uniform(2, 2.9))
            else:
                self._border(b, s, s + size, edge + 0.2 + b.depth / 2, ("fence", "hedge"))
                where = (s + 0.5, s + size - 0.5, edge + b.depth + 1.5, edge + b.depth + 6)
                self._scatter(things.tree, where, (0.6, 0.6), b.side)
            s += size + rng.uniform(0.1, 1.2)

    def _furnish_park(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        self._border(b, b.start, b.end, edge + 0.3, ("fence", "fence", "none", "hedge"))
        where = (b.start, b.end, edge + 1, edge + 16)
        for _ in range(int(rng.integers(5, 10))):
            self._scatter(things.tree, where, (0.7, 0.7), b.side)
        for _ in range(int(rng.integers(5, 11))):
            self._scatter(things.bush, where, (0.8, 0.8), b.side)
        self._scatter(things.lamp, where, (0.2, 0.2), b.side, self._facing(b.side))

    def _furnish_lot(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        back = edge + b.depth
        for s in np.arange(b.start + 2.4, b.end - 2.2, 2.7):
            roll, d = rng.random(), b.side * (back - 2.9)
            if roll < 0.6 and self._claim(s, d, 1.1, 2.5):
                self.put(things.car(rng), s, d, rng.choice([-1, 1]) * np.pi / 2)
        if b.depth > 9 and rng.random() < 0.5:
            make = things.other_vehicle if rng.random() < 0.6 else things.truck
            self._scatter(make, (b.start + 8, b.end - 5, edge + 1.6, edge + 1.6), (4.5, 1.3),
                          b.side, 0.0)  # fmt: skip
        self._border(b, b.start + 1, b.end - 1, back + 0.4, ("fence", "hedge", "fence"))
        self._border(b, b.start + 5.2, b.end - 1, edge + 0.2, ("none", "fence"))
        if rng.random() < 0.5:
            self._house(b, b.start, b.end, back + rng.uniform(3, 8), 8, rng.uniform(3, 9))

    def _furnish_plaza(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        self._house(b, b.start + 0.5, b.end - 0.5, edge + b.depth, 8, rng.uniform(3, 10))
        where = (b.start + 0.6, b.end - 0.6, edge + 0.5, edge + b.depth - 0.8)
        for make, most, half in (
            (things.bicycle, 3, 0.8), (things.person, 3, 0.4), (things.clutter, 3, 0.6),
            (things.lamp, 3, 0.2), (things.tree, 2, 0.5), (things.motorcycle, 2, 0.9),
        ):  # fmt: skip
            for _ in range(int(rng.integers(0, most + 1))):
                self._scatter(make, where, (half, half), b.side)

    def _furnish_side(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        where = (b.start + 1.5, b.start + 1.5, edge + 4, edge + 14)
        if rng.random() < 0.6:
            self._scatter(things.car, where, (1.1, 2.5), b.side, np.pi / 2)
        corner = self.road + STRIP + 0.5
        self._scatter(things.sign, (b.start - 1.2, b.start - 0.6, corner, corner), (0.2, 0.2),
                      b.side, np.pi)  # fmt: skip

    def _furnish_strip(self, b: Block, parked: Iterator[str]) -> None:
        """Parked vehicles, street trees, lamps and signs between carriageway and pavement."""
        if b.kind == "side":
            return
        rng, middle = self.rng, self.road + STRIP / 2
        s = b.start + rng.uniform(1.2, 2.0) + (4 if b.kind == "lot" or b.drive else 0)
        while b.zone in ("parking", "road") and s < b.end - 2:
            kind = next(parked)
            make, size = {
                "car": (things.car, 5.2), "none": (None, 4.0), "motorcycle": (things.motorcycle, 2.4),
                "truck": (things.truck, 9.2), "other": (things.other_vehicle, 8.5),
            }[kind]  # fmt: skip
            if s + size > b.end - 0.5 and kind in ("truck", "other"):
                make, size = things.car, 5.2
            if s + size > b.end - 0.5:
                break
            centre, side_d = s + size / 2, b.side * (middle + rng.normal(0, 0.08))
            if make and self._claim(centre, side_d, size / 2, 1.2):
                yaw = (0 if b.side < 0 else np.pi) + rng.normal(0, 0.03)
                self.put(make(rng), centre, side_d, yaw if rng.random() < 0.85 else yaw + np.pi)
            s += size + rng.uniform(0.2, 1.2)
        if b.zone == "verge":
            where = (b.start + 1, b.end - 1, self.road + 0.7, self.road + STRIP - 0.4)
            for make, chance in ((things.tree, 0.9), (things.tree, 0.6), (things.bush, 0.5)):
                if rng.random() < chance:
                    self._scatter(make, where, (0.6, 0.6), b.side)
        kerb = self.road + STRIP + 0.35
        where = (b.start + 0.5, b.end - 0.5, kerb, kerb + 0.1)
        for make, chance, yaw in (
            (things.lamp, 0.6, self._facing(b.side)), (things.sign, 0.5, 0.0), (things.sign, 0.4, np.pi),
            (things.clutter, 0.3, 0.0), (things.tree, 0.3, 0.0), (things.bicycle, 0.2, 0.1),
        ):  # fmt: skip
            if rng.random() < chance:
                self._scatter(make, where, (0.3, 0.2), b.side, yaw)

    def _background(self) -> None:
        """Trees and houses behind the first row."""
        rng = self.rng
        for b in self.blocks:
            edge = self.edge(b.side)
            where = (b.start, b.end, edge + 20, REACH - 2)
            if b.kind in ("park", "house", "low", "lot") and rng.random() < 0.5:
                self._house(b, b.start + 1, b.end - 1, rng.uniform(edge + 24, REACH - 8), 7, 8)
            for _ in range(int(rng.integers(0, 3))):
                self._scatter(things.tree, where, (0.8, 0.8), b.side)

    def _rare_things(self) -> None:
        """Bring the rare classes near the path, several per 60 m of it."""
        rng = self.rng
        counts = {
            things.person: (5, 0.4), things.bicycle: (6, 0.8), things.motorcycle: (4, 1.0),
            things.bicyclist: (2, 0.9), things.motorcyclist: (2, 1.0), things.sign: (3, 0.25),
        }  # fmt: skip
        for make, (count, half) in counts.items():
            for _ in range(int(np.ceil(count * (self.length + 30) / 60))):
                side = int(rng.choice([1, -1]))
                low, high = self.road + STRIP + 0.4, self.edge(side) - 0.3
                if make in (things.bicyclist, things.motorcyclist):  # waiting at the roadside
                    low, high = self.road - 0.6, self.road - 0.3
                yaw = rng.normal(0, 0.5) + (0 if side < 0 else np.pi)
                where = (-15.0, self.length + 15, low, high)
                self._scatter(make, where, (half, 0.35), side, yaw, tries=40)
        for waiting in self._waiting:  # islands' signs were drawn before the ground had a height
            self.put(*waiting)

    # Traffic

    def _traffic(self) -> list[Mover]:
        """Movers that meet the sensor during the drive and never run into each other."""
        rng = self.rng
        times = np.arange(self.scans) * self.step_time
        ego_speed = self.length / times[-1] if self.scans > 1 else 8.0
        lane = {1: self.road / 2, -1: -self.road / 2}
        ego = ego_speed * times
        paths: list[tuple[float, float, NDArray]] = [(lane[-1], 5.0, ego)]
        movers: list[Mover] = []
        round_ = ("car",) * 5 + ("truck", "bus", "motorcyclist", "motorcyclist", "bicyclist",
                                 "bicyclist", "person", "person", "person")  # fmt: skip
        wanted = round_ * int(np.ceil((self.length + 30) / 90))
        sizes = {"car": 4.8, "truck": 9.0, "bus": 10.5, "person": 0.8}
        for n, kind in enumerate(wanted):
            size = sizes.get(kind, 2.2)
            for _ in range(40):
                side = int(rng.choice([1, -1]))
                way = -side  # traffic keeps to the right
                if kind == "person":
                    d = side * rng.uniform(self.road + STRIP + 0.9, self.edge(side) - 0.4)
                    speed = rng.uniform(0.8, 1.8) * rng.choice([-1, 1])
                elif kind == "bicyclist":
                    d, speed = side * (self.road - 0.55), way * rng.uniform(3, 6)
                else:
                    d = lane[side] + rng.normal(0, 0.15)
                    speed = way * ego_speed * rng.uniform(0.9, 1.1)
                meet = rng.integers(self.scans)
                ahead = rng.uniform(-20, 25)
                start = ego[meet] + ahead - speed * times[meet]
                path = start + speed * times
                if kind == "bicyclist" and self._standing_near(path, d):
                    continue
                if all(
                    abs(d - other_d) > 1.4 or (np.abs(path - other) > (size + long) / 2 + 1.5).all()
                    for other_d, long, other in paths
                ):
                    self._instances += 1
                    seed = (*self.key, 1, n)
                    movers.append(Mover(kind, self._instances, seed, start, speed, d))
                    paths.append((d, size, path))
                    break
        return movers

    def _standing_near(self, path: NDArray, d: float) -> bool:
        return any(
            e - 0.4 < d < f + 0.4 and ((path > a - 1.5) & (path < b + 1.5)).any()
            for a, b, e, f in self._taken
        )

    def moving(self, time: float, near: float, reach: float) -> Soup | None:
        """Everything that moves within `reach` metres of the place `near`, as it is at `time`."""
        soup, any_here = Soup(), False
        for mover in self.movers:
            s = mover.place(time)
            inside = -MARGIN + 2 < s < self.length + MARGIN - 2
            if not inside or abs(s - near) > reach:
                continue
            make, label = _MOVERS[mover.kind]
            rng = np.random.default_rng(mover.seed)
            pose = {"phase": 5.0 * s} if mover.kind == "person" else {}
            yaw = 0.0 if mover.speed > 0 else np.pi
            parts = self._standing(make(rng, label, **pose), s, mover.d, yaw)
            soup.add_parts(parts, mover.instance)
            any_here = True
        return soup if any_here else None

    # The sensor

    def sensor_pose(self, scan: int, mast: float) -> NDArray:
        """Pose (4, 4) of the sensor in the world: on the right-hand lane, shaken a little."""
        rng = np.random.default_rng([*self.key, 3, scan])
        s = self.length * scan / max(self.scans - 1, 1)
        d = -self.road / 2 + 0.15 * np.sin(s / 17.0)
        x, y, theta = self.frame(s, d)
        ends = [self._base(np.float64(s + e), np.float64(d)) for e in (-1.4, 1.4)]
        pitch = -np.arctan2(ends[1] - ends[0], 2.8) + rng.normal(0, 0.004)
        roll, yaw = rng.normal(0, 0.004), float(theta) + rng.normal(0, 0.006)
        cr, sr, cp, sp = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch)
        cy, sy = np.cos(yaw), np.sin(yaw)
        bank = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
        tilt = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
        turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        pose = np.eye(4)
        pose[:3, :3] = turn @ tilt @ bank
        pose[:3, 3] = [x, y, (ends[0] + ends[1]) / 2 + mast]
        return pose
