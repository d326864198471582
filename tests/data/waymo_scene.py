"""A tiny Waymo segment of a known scene, encoded byte by byte from the format's documents, by plain loops."""

import struct
import zlib

import numpy as np
from scipy.spatial.transform import Rotation


def crc32c(data):
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value):
    value %= 2**64
    out = bytearray()
    while value >= 0x80:
        out.append(value % 0x80 + 0x80)
        value //= 0x80
    return bytes([*out, value])


def number(field, value):
    return varint(8 * field) + varint(value)


def block(field, data):
    return varint(8 * field + 2) + varint(len(data)) + data


def double(field, value):
    return varint(8 * field + 1) + struct.pack("<d", value)


def transform(matrix):
    return b"".join(double(1, v) for v in np.ravel(matrix))


def matrix(array, integer=False):
    values = array.ravel().tolist()
    data = b"".join(map(varint, values)) if integer else struct.pack(f"<{len(values)}f", *values)
    shape = b"".join(number(1, d) for d in array.shape)
    return zlib.compress(block(1, data) + block(2, shape))


def rigid(angles, position):
    made = np.eye(4)
    made[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix()  # about x, then y, then z
    made[:3, 3] = position
    return made


class Sensor:
    """`beams`: a table of inclinations, lowest first, or (low, high, rows) for evenly spread ones."""

    def __init__(self, name, extrinsic, beams, columns):
        self.name, self.extrinsic, self.columns = name, extrinsic, columns
        self.table = beams if isinstance(beams, list) else None
        self.span = None if self.table else beams[:2]
        if self.table:
            self.inclinations = self.table[::-1]
        else:
            low, high, rows = beams
            self.inclinations = [high - (high - low) * (i + 0.5) / rows for i in range(rows)]

    def calibration(self):
        parts = [number(1, self.name)]
        if self.table:
            parts += [double(2, v) for v in self.table]
        else:
            parts += [double(3 + i, v) for i, v in enumerate(self.span)]
        return b"".join(parts) + block(5, transform(self.extrinsic))

    def direction(self, row, column):
        """Unit vector in the sensor's frame. Column 0 looks back, the middle ahead, as the vehicle's azimuth goes."""
        yaw = np.arctan2(self.extrinsic[1, 0], self.extrinsic[0, 0])
        azimuth = np.pi - (column + 0.5) * 2 * np.pi / self.columns - yaw
        up = self.inclinations[row]
        return np.array([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)])


SENSORS = [
    Sensor(5, rigid((0.02, -0.01, 3.0), (-1.0, 0.1, 0.6)), (-1.2, 0.2, 4), 12),
    Sensor(
        1, rigid((0.01, 0.02, 2.6), (1.4, 0.0, 2.2)), [-0.35, -0.2, -0.12, -0.05, 0.03, 0.04], 30
    ),
]


class Scene:
    """A vehicle on the plane z = 3 of the world, a wall 15 m to its left; world coordinates are kilometres.

    `expect` holds, for each frame, the points that a converter should find: rows of x, y, z in the frame, intensity,
    label (-1 without), instance (0 without), TOP's first, returns one after the other.
    """

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.poses = [rigid((0.01, -0.02, 0.7), (1500, -900, 3 + i)) for i in (0, 0)]
        self.poses[1] = self.poses[0] @ rigid((0, 0, 0.05), (1.2, 0, 0))
        self.times = [1550000000000000, 1550000000100000]
        self.expect = []

    def distance(self, start, ray):
        """To the ground, or to the wall if that is nearer; 0 where a beam meets neither within 60 m."""
        left = self.poses[0][:3, 1] * (1, 1, 0)
        left /= np.linalg.norm(left)
        hits = []
        if ray[2] < 0:
            hits.append((3 - start[2]) / ray[2])
        if ray @ left > 0:
            hits.append((15 - (start - self.poses[0][:3, 3]) @ left) / (ray @ left))
        hits = [h for h in hits if 0 < h < 60]
        return min(hits) if hits else 0.0

    def laser(self, sensor, frame_pose, labelled):
        """The encoded laser, and the points of its returns."""
        shape = (len(sensor.inclinations), sensor.columns)
        images = [np.zeros((*shape, 4), np.float32) for _ in range(2)]
        pixels = np.zeros((*shape, 6), np.float32)
        labels = [np.zeros((*shape, 2), np.int32) for _ in range(2)]
        found = [[], []]
        for row in range(shape[0]):
            for column in range(shape[1]):
                moved = frame_pose
                if sensor.name == 1:  # the vehicle moves and turns while TOP turns
                    late = column / shape[1] - 0.5
                    moved = frame_pose @ rigid((0, 0, 0.05 * late), (1.2 * late, 0, 0))
                    turn = Rotation.from_matrix(moved[:3, :3]).as_euler("xyz")
                    pixels[row, column] = [*turn, *moved[:3, 3]]
                    moved = rigid(*np.split(pixels[row, column].astype(float), 2))
                start = (moved @ sensor.extrinsic)[:3, 3]
                ray = (moved @ sensor.extrinsic)[:3, :3] @ sensor.direction(row, column)
                reach = self.distance(start, ray)
                if reach == 0:
                    continue
                returns = (reach, 0.6 * reach) if (row + column) % 7 == 0 else (reach,)
                for back, r in enumerate(returns):
                    power = self.rng.uniform(0, 3)
                    images[back][row, column] = r, power, 0, -1
                    label, thing = -1, 0
                    if labelled and sensor.name == 1:
                        # Class ids of the files: 0 is no label, 300 instances take two bytes each.
                        label = (row + column + back) % 23 - 1
                        labels[back][row, column] = 300 * column, label + 1
                        thing = 300 * column if label >= 0 else 0
                    local = np.linalg.inv(frame_pose) @ [*(start + r * ray), 1]
                    found[back].append([*local[:3], np.tanh(np.float32(power)), label, thing])
        encoded = [number(1, sensor.name)]
        for back in range(2):
            part = block(2, matrix(images[back]))
            if sensor.name == 1 and back == 0:
                part += block(4, matrix(pixels))
            if labelled and sensor.name == 1:
                part += block(6, matrix(labels[back], integer=True))
            encoded.append(block(2 + back, part))
        return b"".join(encoded), found

    def frame(self, i, labelled, context=b"1234_000_020"):
        """Frame `i` encoded; its points go to `expect`."""
        lasers, points = [], {}
        for sensor in SENSORS:
            encoded, points[sensor.name] = self.laser(sensor, self.poses[i], labelled)
            lasers.append(block(5, encoded))
        self.expect.append(
            np.array([p for back in (0, 1) for name in (1, 5) for p in points[name][back]])
        )
        described = block(1, context) + b"".join(block(3, s.calibration()) for s in SENSORS)
        return b"".join(
            [
                block(1, described),
                number(2, self.times[i]),
                block(3, transform(self.poses[i])),
                block(4, number(1, 1) + block(2, b"\xff\xd8 a camera image")),
                *lasers,
            ]
        )


def segment(path, scene=None, labelled=(True, False)):
    """Write a segment of two frames; returns the scene."""
    scene = scene or Scene()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(scene.frame(i, flag)) for i, flag in enumerate(labelled)))
    return scene
