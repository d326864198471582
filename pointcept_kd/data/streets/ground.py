"""The ground of a simulated street, and the places on it.

Places are given as (s, d): metres along the gently curving centre line, metres to its left. Each
side is a row of blocks (house, terrace, low sheds, park, parking lot, plaza, side street) dealt
from a shuffled bag, so that every street, however short, shows every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from . import scenery
from .shapes import Part, Soup, placed

ROAD, PARKING, SIDEWALK, OTHER, LANE, TERRAIN = 40, 44, 48, 49, 60, 72
# Classes that only nuScenes knows; streets in SemanticKITTI's layout have none of them.
MACHINE, BARRIER, CONE = 400, 401, 402
MARGIN = 60.0  # metres of street before the first and after the last scan
REACH = 46.0  # metres of ground on each side of the centre line
STRIP = 2.3  # metres between carriageway and pavement: parked cars, grass or more pavement
STEP = 0.5  # metres, length of a ground cell

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


class Solid(NamedTuple):
    """Where a vehicle or a person stands and how big it is: corners in its own frame, metres."""

    label: int
    low: NDArray
    high: NDArray
    place: NDArray  # world x, y, z of the origin of its own frame
    yaw: float  # of its own x axis in the world

    @property
    def centre(self) -> NDArray:
        """World coordinates (3,) of the middle of the box."""
        middle = (self.low + self.high) / 2
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        x, y = c * middle[0] - s * middle[1], s * middle[0] + c * middle[1]
        return self.place + np.array([x, y, middle[2]])

    @property
    def size(self) -> NDArray:
        """Length, width and height (3,)."""
        return self.high - self.low


def solid(parts: list[Part], place: ArrayLike, yaw: float) -> Solid:
    """The box around parts that stand at `place`."""
    corners = np.concatenate([p.triangles for p in parts]).reshape(-1, 3).astype(np.float64)
    label = parts[0].label
    return Solid(label, corners.min(0), corners.max(0), np.asarray(place, np.float64), yaw)


def bag(rng: Generator, items: tuple[str, ...]) -> Iterator[str]:
    """Deal the items for ever: all of them, shuffled, then again."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


class Ground:
    """Heights and classes of the ground, and things put on it.

    Args:
        key: integers that seed everything.
        length: metres between the first and the last scan.
        ranges: from which road, pavements, slopes and bends are drawn.
    """

    def __init__(self, key: tuple[int, ...], length: float, ranges: dict[str, tuple]) -> None:
        self.key, self.length = key, length
        self.rng = rng = np.random.default_rng([*key, 0])
        self.road = rng.uniform(*ranges["road"])
        self.pavement = {side: rng.uniform(*ranges["pavement"]) for side in (1, -1)}
        self.slope = {side: rng.uniform(*ranges["slope"]) for side in (1, -1)}
        self.gain = rng.uniform(0.85, 1.15)  # the sensor's sensitivity in this recording
        self.soup = Soup()
        self._taken: list[tuple[float, float, float, float]] = []
        self._waiting: list[tuple[list[Part], float, float]] = []
        self._instances = 0
        self.solids: dict[int, Solid] = {}
        self._centre_line(rng.uniform(*ranges["bend"]))
        self._waves = rng.uniform([0.15, 0.1, 0.0], [0.6, 0.6, 2 * np.pi], (6, 3))
        self.blocks = [block for side in (1, -1) for block in self._plots(side)]
        self._ground()

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
        self.line = (s, xy[:, 0], xy[:, 1], heading, height)

    def frame(self, s: ArrayLike, d: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
        """World x, y and heading at places (s, d)."""
        table, x, y, heading, _ = self.line
        theta = np.interp(s, table, heading)
        left = np.asarray(d)
        x = np.interp(s, table, x) - left * np.sin(theta)
        return x, np.interp(s, table, y) + left * np.cos(theta), theta

    def edge(self, side: int) -> float:
        """Distance from the centre line to the far edge of the pavement."""
        return self.road + STRIP + self.pavement[side]

    def _base(self, s: NDArray, d: NDArray) -> NDArray:
        """Height without kerbs: the street's climb, the road's crown, slopes and waves beside."""
        table, *_, height = self.line
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

    def classes_at(self, s: NDArray, d: NDArray) -> NDArray:
        """Classes of the ground at places (n,)."""
        i = np.clip((s - self._s[0]) // STEP, 0, len(self._s) - 2).astype(np.int64)
        j = np.clip(np.searchsorted(self._d, d, "right") - 1, 0, len(self._d) - 2)
        return self._cells[i, j]

    # Ground

    def _plots(self, side: int) -> Iterator[Block]:
        rng = self.rng
        kinds, zones = bag(rng, _BLOCKS), bag(rng, _ZONES)
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
                self._waiting.append((scenery.sign(rng), s + 0.5, 0.0))

    # Placing things

    def put(self, parts: list[Part], s: float, d: float, yaw: float = 0.0) -> None:
        """Stand a thing on the ground at (s, d), turned by `yaw` against the street's direction."""
        instance = self._instance_of(parts)
        if instance:
            self.solids[instance] = solid(parts, *self._stand(s, d, yaw))
        self.soup.add_parts(self._standing(parts, s, d, yaw), instance)

    def _stand(self, s: float, d: float, yaw: float) -> tuple[list, float]:
        """World coordinates and heading of something on the ground at (s, d)."""
        x, y, theta = self.frame(s, d)
        return [x, y, self.height(s, d)], float(theta) + yaw

    def _standing(self, parts: list[Part], s: float, d: float, yaw: float) -> list[Part]:
        place, turn = self._stand(s, d, yaw)
        return placed(parts, turn, place)

    def _instance_of(self, parts: list[Part]) -> int:
        if not (10 <= parts[0].label <= 32 or parts[0].label >= MACHINE):
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
