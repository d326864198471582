"""A made-up scan with three cameras, whose images and maps tell where their pixels were."""

import numpy as np

from pointcept_kd.data.camera import Camera
from pointcept_kd.data.image_maps import ImageMapReader
from pointcept_kd.host.loader import DefaultDataset

SIZES = ((90, 160), (90, 160), (72, 140))  # height, width
BASE = 1000  # a map holds camera * BASE^2 + row * BASE + column


def looking(yaw, height, width, name):
    """A camera at the sensor's place, turned left by `yaw` degrees."""
    c, s = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    place = np.eye(4)
    place[:3, :3] = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ [
        [c, s, 0],
        [-s, c, 0],
        [0, 0, 1],
    ]
    lens = [[0.6 * width, 0, width / 2], [0, 0.6 * width, height / 2], [0, 0, 1]]
    return Camera(name, lens, place, width, height)


def rig():
    """Two cameras that overlap and one behind."""
    names = ("left", "right", "back")
    return [
        looking(yaw, *size, name)
        for yaw, size, name in zip((30, -30, 180), SIZES, names, strict=True)
    ]


def telling_image(number, height, width):
    """Red grows with the row, green with the column, blue is the camera's: bilinear keeps all three."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns, np.full_like(rows, 60 * number)], -1).astype(np.uint8)


def telling_map(number, height, width):
    """The place of every pixel."""
    rows, columns = np.mgrid[:height, :width]
    return number * BASE**2 + rows * BASE + columns


def read_place(values):
    """Camera, row and column (..., 3) of values of `telling_map`."""
    values = np.asarray(values)
    return np.stack([values // BASE**2, values // BASE % BASE, values % BASE], -1)


class Scene(ImageMapReader, DefaultDataset):
    """Random scans of different numbers of points; `blind` samples have no point before a camera."""

    def __init__(self, data_root, count=3, points=3000, blind=(), **others):
        self.count, self.points, self.blind, self.reads = count, points, set(blind), 0
        super().__init__(data_root=str(data_root), **others)

    def get_data_list(self):
        return [f"scan{i}" for i in range(self.count)]

    def get_data(self, idx):
        self.reads += 1
        rng = np.random.default_rng(idx)
        count = self.points + 37 * idx
        coord = rng.normal(size=(count, 3)) * (12, 12, 1.5)
        if idx in self.blind:
            coord = np.abs(coord) * (0.01, 0.01, 1) + (0, 0, 30)
        return {
            "coord": coord.astype(np.float32),
            "strength": np.arange(count, dtype=np.float32)[:, None],
            "segment": rng.integers(-1, 4, count).astype(np.int32),
            "name": self.get_data_name(idx),
        }

    def cameras(self, idx):
        return rig()

    def images(self, idx):
        return [telling_image(i, *size) for i, size in enumerate(SIZES)]

    def weak_classes(self):
        return ["near", "middle", "far", "top"]

    def weak_labels(self, idx):
        return [
            np.random.default_rng([idx, i]).integers(0, 5, size).astype(np.uint8)
            for i, size in enumerate(SIZES)
        ]

    def superpixels(self, idx, folder=None):
        return [telling_map(i, *size) for i, size in enumerate(SIZES)]
