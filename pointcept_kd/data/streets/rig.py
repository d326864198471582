"""A car with a LiDAR of 32 beams and six cameras, as nuScenes' has them, in a simulated street.

Frames: the car's x points forward, y left, z up; the LiDAR's x points right, y forward; a camera's z
points forward, x right, y down. Every sensor has its own time and so its own place of the car.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from .ground import BARRIER, CONE, MACHINE
from .lidar import Caster, Difficulty, ray_directions, sense
from .render import Renderer, View
from .shapes import Soup
from .street import Solid, Street

BETWEEN_KEYS = 0.5  # seconds
TURN = 0.05  # seconds of a turn of the LiDAR; cameras are released when it points their way
REACH = 110.0  # metres within which traffic is drawn

# The classes of lidarseg; their index is the label.
CATEGORIES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle",
    "vehicle.trailer", "vehicle.truck", "flat.driveable_surface", "flat.other", "flat.sidewalk",
    "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
)  # fmt: skip

# Raw class of the street to category. A rider belongs to what is ridden.
CATEGORY_OF = {
    1: "noise", 10: "vehicle.car", 11: "vehicle.bicycle", 13: "vehicle.bus.rigid",
    15: "vehicle.motorcycle", 18: "vehicle.truck", 20: "vehicle.trailer",
    30: "human.pedestrian.adult", 31: "vehicle.bicycle", 32: "vehicle.motorcycle",
    40: "flat.driveable_surface", 44: "flat.driveable_surface", 60: "flat.driveable_surface",
    48: "flat.sidewalk", 49: "flat.other", 72: "flat.terrain", 50: "static.manmade",
    51: "static.manmade", 80: "static.manmade", 81: "static.manmade", 70: "static.vegetation",
    71: "static.vegetation", 99: "static.other", 252: "vehicle.car", 253: "vehicle.bicycle",
    254: "human.pedestrian.adult", 255: "vehicle.motorcycle", 257: "vehicle.bus.rigid",
    258: "vehicle.truck", MACHINE: "vehicle.construction", BARRIER: "movable_object.barrier",
    CONE: "movable_object.trafficcone",
}  # fmt: skip
LIDARSEG = np.zeros(1 << 16, np.uint8)
LIDARSEG[list(CATEGORY_OF)] = [CATEGORIES.index(name) for name in CATEGORY_OF.values()]

# Classes of the weak labels, from 1; 0 is none.
WEAK_CLASSES = (
    "barrier", "bicycle", "bus", "car", "motorcycle", "pedestrian", "traffic_cone", "truck", "road",
    "sidewalk", "terrain", "vegetation", "building",
)  # fmt: skip
_WEAK = {
    "barrier": (BARRIER,), "bicycle": (11, 31, 253), "bus": (13, 257), "car": (10, 252),
    "motorcycle": (15, 32, 255), "pedestrian": (30, 254), "traffic_cone": (CONE,),
    "truck": (18, 20, 258), "road": (40, 44, 60), "sidewalk": (48, 49), "terrain": (72,),
    "vegetation": (70, 71), "building": (50,),
}  # fmt: skip
WEAK_OF = {raw: WEAK_CLASSES.index(name) + 1 for name, ids in _WEAK.items() for raw in ids}
_SIMILAR = {
    "barrier": ("building",), "bicycle": ("motorcycle",), "bus": ("truck",), "car": ("truck",),
    "motorcycle": ("bicycle",), "pedestrian": ("bicycle",), "traffic_cone": ("barrier",),
    "truck": ("bus", "car"), "road": ("sidewalk",), "sidewalk": ("road", "terrain"),
    "terrain": ("vegetation", "sidewalk"), "vegetation": ("terrain",), "building": ("truck",),
}  # fmt: skip
SIMILAR = {
    WEAK_CLASSES.index(name) + 1: tuple(WEAK_CLASSES.index(other) + 1 for other in others)
    for name, others in _SIMILAR.items()
}

# Yaw to the left and field of view in degrees, place on the car in metres.
CAMERAS = {
    "CAM_FRONT": (0.0, 70.0, (1.70, 0.0, 1.50)),
    "CAM_FRONT_RIGHT": (-55.0, 70.0, (1.55, -0.49, 1.50)),
    "CAM_BACK_RIGHT": (-110.0, 70.0, (1.05, -0.48, 1.55)),
    "CAM_BACK": (180.0, 110.0, (0.05, 0.0, 1.57)),
    "CAM_BACK_LEFT": (110.0, 70.0, (1.05, 0.48, 1.55)),
    "CAM_FRONT_LEFT": (55.0, 70.0, (1.55, 0.49, 1.50)),
}
LIDAR = "LIDAR_TOP"
_LIDAR_PLACE = (0.94, 0.0, 1.84)


def quaternion(rotation: NDArray) -> list[float]:
    """w, x, y, z of a rotation matrix, w not negative."""
    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    sign = -1.0 if w < 0 else 1.0
    return [float(sign * v) for v in (w, x, y, z)]


@dataclass(frozen=True)
class Sensor:
    """A sensor on the car.

    Attributes:
        on_car: (4, 4) sensor to car.
        intrinsics: (3, 3) of a camera; empty for the LiDAR.
        delay: seconds from a key frame's time to its release, not positive.
    """

    on_car: NDArray
    intrinsics: NDArray
    delay: float


@dataclass(frozen=True)
class Annotation:
    """A thing at a key frame: its box in the world, points in it, and how much of it is seen."""

    instance: int
    box: Solid
    points: int
    visible: float


class Rig:
    """The car in one scene.

    Args:
        key: integers that seed the scene.
        keys: number of key frames.
        sweeps: turns of the LiDAR per key frame.
        spacing: metres between key frames.
        beams, columns, max_range: of the LiDAR.
        size: width and height of the images, pixels.
        unseen: lay the street out as one for validation or test.
    """

    def __init__(
        self, key: tuple[int, ...], keys: int, sweeps: int, spacing: float, beams: int, columns: int,
        max_range: float, size: tuple[int, int], unseen: bool, difficulty: Difficulty,
    ) -> None:  # fmt: skip
        self.key, self.sweeps, self.max_range, self.size = key, sweeps, max_range, size
        self.difficulty, self.beams, self.columns = difficulty, beams, columns
        self.speed = spacing / BETWEEN_KEYS
        self.turn_time = BETWEEN_KEYS / sweeps
        self.street = Street(
            key, spacing * (keys - 1), self.turn_time, (keys - 1) * sweeps + 1, unseen,
            difficulty.crowd, roadworks=True,
        )  # fmt: skip
        # The world's origin is put where all coordinates are positive, as a map's is.
        self.origin = np.array([*np.min(self.corners(), 0) - 5.0, 0.0])
        rng = np.random.default_rng([*key, 4])
        self.sensors = {LIDAR: self._lidar(rng)}
        self.sensors |= {name: self._camera(name, rng) for name in CAMERAS}
        self._shake = rng.uniform([0.6, 0.0], [1.9, 2 * np.pi], (3, 2))
        # Elevations of an HDL-32E for its 32 beams.
        degrees = np.linspace(10.67, -30.67, beams)
        self._directions = ray_directions(beams, columns, np.deg2rad(degrees))
        self._still = Caster(self.street.soup)
        self._renderer: Renderer | None = None
        self._triangles: dict[int, NDArray] | None = None

    def corners(self) -> NDArray:
        """World x, y (n, 2) along the borders of the ground, before the origin is moved."""
        s = np.arange(-60.0, self.street.length + 60.0, 4.0)
        sides = [np.stack(self.street.frame(s, 0 * s + d)[:2], 1) for d in (-47.0, 47.0)]
        return np.concatenate(sides)

    def _lidar(self, rng: np.random.Generator) -> Sensor:
        turn = Rotation.from_euler("zyx", [-np.pi / 2, 0, 0]) * Rotation.from_rotvec(
            rng.normal(0, 0.006, 3)
        )
        place = np.eye(4)
        place[:3, :3], place[:3, 3] = turn.as_matrix(), _LIDAR_PLACE
        return Sensor(place, np.empty((0, 0)), 0.0)

    def _camera(self, name: str, rng: np.random.Generator) -> Sensor:
        yaw, view, where = CAMERAS[name]
        axes = np.array(
            [[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]
        )  # camera axes on a car that looks ahead
        turn = Rotation.from_euler("z", np.deg2rad(yaw)) * Rotation.from_rotvec(
            rng.normal(0, 0.006, 3)
        )
        place = np.eye(4)
        place[:3, :3], place[:3, 3] = (
            turn.as_matrix() @ axes,
            np.array(where) + rng.normal(0, 0.01, 3),
        )
        width, height = self.size
        focal = width / 2 / np.tan(np.deg2rad(view) / 2) * rng.uniform(0.995, 1.005)
        middle = rng.uniform(-0.01, 0.01, 2) * width + [width / 2, height / 2]
        intrinsics = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1.0]])
        # The LiDAR turns clockwise from behind the car and is done at the key frame's time.
        passed = (180.0 - yaw) % 360.0 / 360.0
        return Sensor(place, intrinsics, -TURN * (1 - passed))

    def car(self, time: float) -> NDArray:
        """Pose (4, 4) of the car, in the street's coordinates."""
        sway = np.sin(2 * np.pi * self._shake[:, 0] * time + self._shake[:, 1])
        return self.street.ride(self.speed * time, 0.0, *(sway * [0.004, 0.005, 0.006]))

    def moving(self, time: float, reach: float) -> Soup | None:
        """What moves near the car."""
        return self.street.moving(time, self.speed * time, reach)

    def in_world(self, pose: NDArray) -> NDArray:
        """A pose in the street's coordinates, in those of the map."""
        moved = pose.copy()
        moved[:3, 3] -= self.origin
        return moved

    def turn(self, index: int) -> tuple[NDArray, NDArray]:
        """A turn of the LiDAR: points (n, 5) float32 x, y, z, intensity 0..255, ring; raw labels (n,).

        Ring 0 is the lowest beam.
        """
        time = index * self.turn_time
        pose = self.car(time) @ self.sensors[LIDAR].on_car
        moving = self.moving(time, self.max_range + 8)
        points, label, rays = sense(
            self._still, moving, self._directions, pose, self.max_range, self.difficulty,
            self.street.gain, (*self.key, 2, index),
        )  # fmt: skip
        ring = self.beams - 1 - rays // self.columns
        intensity = np.round(points[:, 3] * 255)
        return np.column_stack([points[:, :3], intensity, ring]).astype(np.float32), label

    def photograph(self, name: str, key_frame: int) -> View:
        """What a camera sees at a key frame."""
        if self._renderer is None:
            self._renderer = Renderer(self.street, self._still, self.difficulty.rain > 0)
        sensor = self.sensors[name]
        time = key_frame * BETWEEN_KEYS + sensor.delay
        pose = self.car(time) @ sensor.on_car
        return self._renderer.view(pose, sensor.intrinsics, *self.size, self.moving(time, REACH))

    def annotations(self, key_frame: int, points: NDArray) -> list[Annotation]:
        """Boxes that hold at least one of a key frame's points (n, 3), by instance."""
        time = key_frame * BETWEEN_KEYS
        pose = self.car(time) @ self.sensors[LIDAR].on_car
        world = points.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        boxes = self.street.solids_at(time, self.speed * time, self.max_range + 8)
        found = []
        for instance, box in sorted(boxes.items()):
            c, s = np.cos(box.yaw), np.sin(box.yaw)
            x, y, z = (world - box.place).T
            own = np.stack([c * x + s * y, c * y - s * x, z])
            count = int(((own >= box.low[:, None]) & (own <= box.high[:, None])).all(0).sum())
            if count:
                found.append((instance, box, count))
        seen = self._visible(
            pose[:3, 3], [i for i, *_ in found], self.moving(time, self.max_range + 8)
        )
        return [Annotation(i, b, n, v) for (i, b, n), v in zip(found, seen, strict=True)]

    def _visible(self, eye: NDArray, instances: list[int], moving: Soup | None) -> list[float]:
        """Share of directions towards each thing, seen from the LiDAR, in which it comes first."""
        if self._triangles is None:
            self._triangles = _middles(self.street.soup)
        middles = {**self._triangles, **(_middles(moving) if moving else {})}
        targets, owner = [], []
        for instance in instances:
            rng = np.random.default_rng([*self.key, 11, instance])
            spots = middles[instance]
            targets.append(spots[rng.integers(len(spots), size=40)])
            owner.append(np.full(40, instance))
        if not targets:
            return []
        way = np.concatenate(targets) - eye
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        distance, _, label, *_ = self._still.cast(eye, way)
        if moving is not None:
            others = Caster(moving).cast(eye, way)
            label = np.where(others[0] < distance, others[2], label)
        same = (label >> 16) == np.concatenate(owner)
        return same.reshape(len(instances), 40).mean(1).tolist()


def _middles(soup: Soup) -> dict[int, NDArray]:
    """Middles (t, 3) of the triangles of each thing that has an instance id."""
    triangles, label, *_ = soup.arrays()
    instance = label >> 16
    order = np.argsort(instance, kind="stable")
    ids, starts = np.unique(instance[order], return_index=True)
    parts = np.split(triangles[order].mean(1), starts[1:])
    return {int(i): part for i, part in zip(ids, parts, strict=True) if i}
