"""What stands on the plots along a simulated street."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.random import Generator

from . import scenery, things
from .ground import BARRIER, CONE, MACHINE, REACH, STRIP, Block, Ground
from .shapes import Part


class Plots(Ground):
    """Houses, gardens, parks, parking lots, parked vehicles, street furniture."""

    machine = 20  # class of tractors

    def _other_vehicle(self, rng: Generator) -> list[Part]:
        return things.other_vehicle(rng, self.machine)

    def _facing(self, side: int) -> float:
        """Yaw that turns a thing's front (-y) towards the street."""
        return 0.0 if side > 0 else np.pi

    def _border(self, b: Block, s0: float, s1: float, d: float, styles: tuple[str, ...]) -> None:
        """A fence or a hedge along the street."""
        style, rng = self.rng.choice(list(styles)), self.rng
        if style == "none" or s1 - s0 < 1.5:
            return
        parts = (scenery.fence if style == "fence" else scenery.hedge)(rng, s1 - s0)
        self.put(parts, (s0 + s1) / 2, b.side * d, self._facing(b.side))
        self._taken.append((s0, s1, *sorted((b.side * (d - 0.4), b.side * (d + 0.4)))))

    def _house(self, b: Block, s0: float, s1: float, d: float, depth: float, tall: float) -> None:
        s, middle = (s0 + s1) / 2, b.side * (d + depth / 2)
        self.put(
            scenery.building(self.rng, s1 - s0, depth, tall), s, b.side * d, self._facing(b.side)
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
            style = scenery.fence if rng.random() < 0.6 else scenery.hedge
            d = edge + 0.5 + b.depth / 2
            self.put(style(rng, b.depth), b.end, b.side * d, np.pi / 2)
        garden = (start + 0.5, b.end - 0.8, edge + 0.9, edge + b.depth - 0.8)
        for _ in range(int(rng.integers(1, 6))):
            self._scatter(scenery.bush, garden, (0.7, 0.7), b.side)
        if b.depth > 3 and rng.random() < 0.75:
            self._scatter(scenery.tree, garden, (0.6, 0.6), b.side)

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
                self._scatter(scenery.tree, where, (0.6, 0.6), b.side)
            s += size + rng.uniform(0.1, 1.2)

    def _furnish_park(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        self._border(b, b.start, b.end, edge + 0.3, ("fence", "fence", "none", "hedge"))
        where = (b.start, b.end, edge + 1, edge + 16)
        for _ in range(int(rng.integers(5, 10))):
            self._scatter(scenery.tree, where, (0.7, 0.7), b.side)
        for _ in range(int(rng.integers(5, 11))):
            self._scatter(scenery.bush, where, (0.8, 0.8), b.side)
        self._scatter(scenery.lamp, where, (0.2, 0.2), b.side, self._facing(b.side))

    def _furnish_lot(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        back = edge + b.depth
        for s in np.arange(b.start + 2.4, b.end - 2.2, 2.7):
            roll, d = rng.random(), b.side * (back - 2.9)
            if roll < 0.6 and self._claim(s, d, 1.1, 2.5):
                self.put(things.car(rng), s, d, rng.choice([-1, 1]) * np.pi / 2)
        if b.depth > 9 and rng.random() < 0.5:
            make = self._other_vehicle if rng.random() < 0.6 else things.truck
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
            (things.bicycle, 3, 0.8), (things.person, 3, 0.4), (scenery.clutter, 3, 0.6),
            (scenery.lamp, 3, 0.2), (scenery.tree, 2, 0.5), (things.motorcycle, 2, 0.9),
        ):  # fmt: skip
            for _ in range(int(rng.integers(0, most + 1))):
                self._scatter(make, where, (half, half), b.side)

    def _furnish_side(self, b: Block) -> None:
        rng, edge = self.rng, self.edge(b.side)
        where = (b.start + 1.5, b.start + 1.5, edge + 4, edge + 14)
        if rng.random() < 0.6:
            self._scatter(things.car, where, (1.1, 2.5), b.side, np.pi / 2)
        corner = self.road + STRIP + 0.5
        self._scatter(scenery.sign, (b.start - 1.2, b.start - 0.6, corner, corner), (0.2, 0.2),
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
                "truck": (things.truck, 9.2), "other": (self._other_vehicle, 8.5),
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
            for make, chance in ((scenery.tree, 0.9), (scenery.tree, 0.6), (scenery.bush, 0.5)):
                if rng.random() < chance:
                    self._scatter(make, where, (0.6, 0.6), b.side)
        kerb = self.road + STRIP + 0.35
        where = (b.start + 0.5, b.end - 0.5, kerb, kerb + 0.1)
        for make, chance, yaw in (
            (scenery.lamp, 0.6, self._facing(b.side)), (scenery.sign, 0.5, 0.0), (scenery.sign, 0.4, np.pi),
            (scenery.clutter, 0.3, 0.0), (scenery.tree, 0.3, 0.0), (things.bicycle, 0.2, 0.1),
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
                self._scatter(scenery.tree, where, (0.8, 0.8), b.side)

    def _rare_things(self) -> None:
        """Bring the rare classes near the path, several per 60 m of it."""
        rng = self.rng
        counts = {
            things.person: (5, 0.4), things.bicycle: (6, 0.8), things.motorcycle: (4, 1.0),
            things.bicyclist: (2, 0.9), things.motorcyclist: (2, 1.0), scenery.sign: (3, 0.25),
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

    # Beyond the ordinary street

    def _crowd(self, per_60_m: int) -> None:
        """More of what hides the rest: people, bins, shrubs, bicycles, vehicles at the kerb."""
        rng = self.rng
        makes = (
            (things.person, 0.4, 3), (scenery.bush, 0.6, 2), (scenery.clutter, 0.5, 2),
            (things.bicycle, 0.8, 1), (things.car, 2.5, 2), (self._other_vehicle, 4.2, 1),
        )  # fmt: skip
        for make, half, share in makes:
            for _ in range(int(np.ceil(per_60_m * share * (self.length + 60) / 60 / 11))):
                side = int(rng.choice([1, -1]))
                where = (-25.0, self.length + 25, self.road + STRIP + 0.3, self.edge(side) - 0.2)
                if half > 2:
                    where = (*where[:2], self.road + 1.1, self.road + 1.2)
                yaw = rng.normal(0, 0.05) + (0 if side < 0 else np.pi)
                self._scatter(make, where, (half, min(half, 1.0)), side, yaw, tries=20)

    def _roadworks(self) -> None:
        """Sites with an excavator, striped barriers and a row of cones, one per 40 m."""
        rng = self.rng
        for start in np.arange(-10.0, self.length + 15, 40.0):
            side = int(rng.choice([1, -1]))
            edge = self.edge(side)
            middle = start + rng.uniform(0, 25)
            near = (middle - 10, middle + 10, self.road + 1.2, edge + 3)
            self._scatter(
                lambda r: things.excavator(r, MACHINE), near, (3.0, 1.3), side, tries=60,
                yaw=rng.choice([0.0, np.pi]) + rng.normal(0, 0.1),
            )  # fmt: skip
            line = self.road - 0.35
            for s in np.arange(middle - 6, middle + 6, 2.4):
                self._scatter(
                    lambda r: scenery.barrier(r, BARRIER), (s, s, line + 0.1, line + 0.1),
                    (1.05, 0.1), side, rng.normal(0, 0.04), tries=1,
                )  # fmt: skip
            for end in (-1, 1):
                for k in range(5):
                    s, d = middle + end * (7.5 + 1.6 * k), line + 0.1 + 0.12 * k
                    where = (s, s, d, d)
                    self._scatter(lambda r: scenery.cone(r, CONE), where, (0.2, 0.2), side, tries=1)
