"""A procedural street: ground, houses, plants, furniture, parked vehicles and traffic.

Everything is drawn from one seed; see `ground` for places and blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import things
from .ground import MACHINE, MARGIN, STRIP, Solid, bag, solid
from .plots import Plots
from .shapes import Part, Soup

__all__ = ["Mover", "Solid", "Soup", "Street"]

# A street that was never trained on is also laid out a little differently.
SEEN = {"road": (3.2, 4.8), "pavement": (1.6, 3.6), "slope": (-0.02, 0.10), "bend": (0.05, 0.30)}
UNSEEN = {"road": (3.5, 5.2), "pavement": (1.4, 3.0), "slope": (0.0, 0.13), "bend": (0.15, 0.35)}

_PARKED = ("car",) * 8 + ("none",) * 3 + ("truck", "other", "truck", "other", "motorcycle")
_SPARSE = ("car",) * 4 + ("none",) * 9 + ("truck", "other", "motorcycle")


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


# The label of a thing that moves; none of them ever stops.
_MOVERS: dict[str, tuple[Callable[..., list[Part]], int]] = {
    "car": (things.car, 252),
    "truck": (things.truck, 258),
    "bus": (things.bus, 257),
    "person": (things.person, 254),
    "bicyclist": (things.bicyclist, 253),
    "motorcyclist": (things.motorcyclist, 255),
}


class Street(Plots):
    """A street and its traffic.

    Args:
        key: integers that seed everything (seed and sequence number).
        length: metres between the first and the last scan.
        step_time: seconds between scans.
        scans: number of scans.
        unseen: lay it out as a street for validation or test.
        crowd: things per 60 m that stand in the way of others, beyond the usual ones; a negative
            number leaves half of the parking places empty.
        roadworks: with excavators, barriers and cones, and tractors counted as machines.
    """

    def __init__(
        self,
        key: tuple[int, ...],
        length: float,
        step_time: float,
        scans: int,
        unseen: bool,
        crowd: int = 0,
        roadworks: bool = False,
    ) -> None:
        super().__init__(key, length, UNSEEN if unseen else SEEN)
        self.step_time, self.scans = step_time, scans
        if roadworks:
            self.machine = MACHINE
        parked = bag(self.rng, _SPARSE if crowd < 0 else _PARKED)
        for block in self.blocks:
            getattr(self, f"_furnish_{block.kind}")(block)
            self._furnish_strip(block, parked)
        self._background()
        self._rare_things()
        ordinary = self.rng  # generators of their own: what has none of this stays as it was
        if roadworks:
            self.rng = np.random.default_rng([*key, 7])
            self._roadworks()
        if crowd > 0:
            self.rng = np.random.default_rng([*key, 8])
            self._crowd(crowd)
        self.rng = ordinary
        self.movers = self._traffic()

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
            yaw = 0.0 if mover.speed > 0 else np.pi
            parts = self._standing(self._shape(mover, 5.0 * s), s, mover.d, yaw)
            soup.add_parts(parts, mover.instance)
            any_here = True
        return soup if any_here else None

    def _shape(self, mover: Mover, phase: float) -> list[Part]:
        make, label = _MOVERS[mover.kind]
        pose = {"phase": phase} if mover.kind == "person" else {}
        return make(np.random.default_rng(mover.seed), label, **pose)

    def solids_at(self, time: float, near: float, reach: float) -> dict[int, Solid]:
        """The boxes of everything that has an instance id, by that id, as it is at `time`.

        The box of somebody who walks holds a whole stride, so that its size does not change.
        """
        here, found = np.array(self.frame(near, 0.0)[:2]), {}
        for instance, box in self.solids.items():
            if np.linalg.norm(box.place[:2] - here) <= reach:
                found[instance] = box
        for mover in self.movers:
            s = mover.place(time)
            if -MARGIN + 2 < s < self.length + MARGIN - 2 and abs(s - near) <= reach:
                place, yaw = self._stand(s, mover.d, 0.0 if mover.speed > 0 else np.pi)
                found[mover.instance] = solid(self._shape(mover, np.pi / 2), place, yaw)
        return found

    # The sensor

    def sensor_pose(self, scan: int, mast: float) -> NDArray:
        """Pose (4, 4) of the sensor in the world: on the right-hand lane, shaken a little."""
        rng = np.random.default_rng([*self.key, 3, scan])
        shake = (rng.normal(0, 0.004), rng.normal(0, 0.004), rng.normal(0, 0.006))
        return self.ride(self.length * scan / max(self.scans - 1, 1), mast, *shake)

    def ride(self, s: float, mast: float, pitch: float, roll: float, yaw: float) -> NDArray:
        """Pose (4, 4) in the world `mast` metres above the lane, turned by small angles from it."""
        d = -self.road / 2 + 0.15 * np.sin(s / 17.0)
        x, y, theta = self.frame(s, d)
        ends = [self._base(np.float64(s + e), np.float64(d)) for e in (-1.4, 1.4)]
        pitch = -np.arctan2(ends[1] - ends[0], 2.8) + pitch
        yaw = float(theta) + yaw
        cr, sr, cp, sp = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch)
        cy, sy = np.cos(yaw), np.sin(yaw)
        bank = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
        tilt = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
        turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        pose = np.eye(4)
        pose[:3, :3] = turn @ tilt @ bank
        pose[:3, 3] = [x, y, (ends[0] + ends[1]) / 2 + mast]
        return pose
