"""Maps and crops as plainly as they can be written: point by point, and over everything again for each scan."""

import numpy as np

from pointcept_kd.data.maps import sequence_poses
from pointcept_kd.data.semantic_kitti import read_labels, read_scan

ROAD, CAR, MOVING_CAR = 40, 10, 252


def world_points(scan, labels, pose, near=3.5):
    """The points of a scan that belong into a map, one at a time, in the world frame."""
    found = []
    for (x, y, z), label in zip(scan[:, :3].astype(float), labels):
        if 1 < (int(label) & 0xFFFF) < 252 and (x * x + y * y + z * z) ** 0.5 > near:
            found.append(pose @ [x, y, z, 1.0])
    return np.array(found).reshape(-1, 4)[:, :3].astype(np.float32)


def map_by_loops(scans, labels, poses, cell=0.1):
    """A dictionary of cells; whoever comes first stays."""
    cells = {}
    for scan, label, pose in zip(scans, labels, poses):
        for point in world_points(scan, label, pose):
            key = tuple(np.floor(point.astype(float) / cell).astype(int).tolist())
            cells.setdefault(key, point)
    return np.array(list(cells.values()), np.float32)


def map_requantised(scans, labels, poses, cell=0.1, near=3.5):
    """The whole map is brought to one point per cell again after every scan."""
    points = np.empty((0, 3), np.float32)
    for scan, label, pose in zip(scans, labels, poses):
        ids, norm = label & 0xFFFF, np.linalg.norm(scan[:, :3].astype(float), axis=1)
        kept = scan[(ids > 1) & (ids < 252) & (norm > near), :3].astype(float)
        moved = kept @ pose[:3, :3].T + pose[:3, 3]
        points = np.concatenate([points, moved.astype(np.float32)])
        cells = np.floor(points.astype(float) / cell).astype(np.int64)
        first = np.unique(cells, axis=0, return_index=True)[1]
        points = points[np.sort(first)]
    return points


def crop_everywhere(points, pose, radius=50.0):
    """The distance of every point of the map, then the frame of the pose."""
    near = np.linalg.norm(points.astype(float) - pose[:3, 3], axis=1) < radius
    whole = np.column_stack([points[near].astype(float), np.ones(near.sum())])
    return (whole @ np.linalg.inv(pose).T)[:, :3].astype(np.float32)


def cells_by_loops(points, seen, cell=10.0):
    """The view-point mask with a set of tuples."""
    origin = [min(p[a] for p in seen.astype(float)) - cell / 2 for a in range(3)]

    def key(point):
        return tuple(int(np.floor((float(point[a]) - origin[a]) / cell)) for a in range(3))

    occupied = {key(p) for p in seen}
    return np.array([key(p) in occupied for p in points], bool)


def rows_of(points):
    """Points (n, 3) sorted by their coordinates, to compare clouds whatever their order."""
    return points[np.lexsort(points.T)]


def same_points(a, b):
    """Whether two clouds hold the same points, to the bit."""
    return a.shape == b.shape and np.array_equal(rows_of(a), rows_of(b))


def write_sequence(root, name, scans, labels, poses, calib=True):
    """A sequence in SemanticKITTI's layout whose velodyne poses are `poses`; camera axes turned, camera shifted."""
    folder = root / "dataset" / "sequences" / name
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, (scan, label) in enumerate(zip(scans, labels)):
        (folder / "velodyne" / f"{i:06d}.bin").write_bytes(scan.astype("<f4").tobytes())
        if label is not None:
            (folder / "labels" / f"{i:06d}.label").write_bytes(label.astype("<u4").tobytes())
    to_camera = np.eye(4)
    if calib:
        to_camera[:3] = [[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, 0.3]]
        row = " ".join(f"{v:.12e}" for v in to_camera[:3].ravel())
        (folder / "calib.txt").write_text(f"Tr: {row}\n")
    camera = [to_camera @ pose @ np.linalg.inv(to_camera) for pose in poses]
    lines = [" ".join(f"{v:.15e}" for v in pose[:3].ravel()) for pose in camera]
    (folder / "poses.txt").write_text("\n".join(lines) + "\n")
    return folder


def read_sequence(folder):
    """Scans, labels and velodyne poses of a sequence."""
    names = sorted(p.stem for p in (folder / "velodyne").glob("*.bin"))
    scans = [read_scan(folder / "velodyne" / f"{n}.bin") for n in names]
    labels = [read_labels(folder / "labels" / f"{n}.label") for n in names]
    poses = sequence_poses(folder)
    return scans, labels, [poses[int(n)] for n in names]


def drive(count=4, points=400, seed=0, step=6.0):
    """Scans of a street of ground, two walls and a box that drives along; the sensor turns as it goes.

    Returns scans (n, 4) float32, labels (n,) uint32 and poses (4, 4). Points are the same places seen again and again,
    with a little noise, so that cells are met several times.
    """
    rng = np.random.default_rng(seed)
    length = step * count + 60
    flat, tall = 40 * points, 20 * points
    ground = np.zeros((flat, 3))
    ground[:, :2] = rng.uniform([-30, -12], [length, 12], (flat, 2))
    wall = rng.uniform([-30, 0, 0], [length, 0, 6], (tall, 3))
    wall[:, 1] = rng.choice([-12, 12], tall)
    world = np.concatenate([ground, wall])
    classes = np.repeat([ROAD, 50], [len(ground), len(wall)])
    scans, labels, poses = [], [], []
    for i in range(count):
        angle = 0.05 * i
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[:3, 3] = [step * i, 0.3 * i, 1.7]
        middle = np.array([9 * i + 15, 3, 0])
        box = middle + rng.uniform([-2, -1, 0], [2, 1, 1.5], (points // 5, 3))
        near = np.flatnonzero(np.linalg.norm(world - pose[:3, 3], axis=1) < 60)
        near = rng.choice(near, points, replace=False)
        found = np.concatenate([world[near] + rng.normal(0, 0.02, (points, 3)), box])
        label = np.concatenate([classes[near], np.full(len(box), MOVING_CAR | 7 << 16)])
        # Unlabelled points, outliers and the car itself are in every scan.
        label[:10], label[10:15] = 0, 1
        local = (found - pose[:3, 3]) @ pose[:3, :3]
        local[15:25] = rng.uniform(-1.9, 1.9, (10, 3))
        order = rng.permutation(len(local))
        remission = rng.uniform(0, 1, (len(local), 1))
        scans.append(np.hstack([local, remission])[order].astype(np.float32))
        labels.append(label[order].astype(np.uint32))
        poses.append(pose)
    return scans, labels, poses
