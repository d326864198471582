"""A tiny world in nuScenes' schema: all tables, scans, labels and images, and rotations worked out by hand."""

import json
import math
from itertools import pairwise

import numpy as np

from pointcept_kd.data.pictures import write_png

CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
SENSORS = ("LIDAR_TOP", *CAMERAS)
CATEGORIES = ("vehicle.car", "human.pedestrian.adult", "animal", "vehicle.bus.bendy")
SIZE = (40, 24)


def hamilton(p, q):
    """Product of two quaternions w, x, y, z."""
    a, b, c, d = p
    e, f, g, h = q
    return (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )


def conjugate(q):
    return (q[0], -q[1], -q[2], -q[3])


def rotate(q, point):
    """q p q*, the rotation of a point."""
    return hamilton(hamilton(q, (0.0, *point)), conjugate(q))[1:]


def outwards(record, point):
    """From the frame of a record (a sensor, or the car) to the one it is given in."""
    return tuple(
        a + b for a, b in zip(rotate(record["rotation"], point), record["translation"], strict=True)
    )


def inwards(record, point):
    """The way back."""
    moved = [a - b for a, b in zip(point, record["translation"], strict=True)]
    return rotate(conjugate(record["rotation"]), moved)


def quaternion(generator, tilt=1.0):
    """A random one; mostly about z where `tilt` is small."""
    w, z = generator.normal(size=2)
    x, y = generator.normal(size=2) * tilt
    length = math.sqrt(w * w + x * x + y * y + z * z)
    return [float(v / length) for v in (w, x, y, z)]


def tables(scenes=None, between=2, seed=0):
    """The tables of scenes (name to number of key frames), with `between` scans between two key frames.

    Every second annotation of an instance is missing once, some have no returns, and categories vary.
    """
    scenes = {"scene-0001": 4, "scene-0003": 3} if scenes is None else scenes
    generator = np.random.default_rng(seed)
    t = {name: [] for name in (
        "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "lidarseg", "log", "map", "sample",
        "sample_annotation", "sample_data", "scene", "sensor", "visibility",
    )}  # fmt: skip
    t["attribute"].append(dict(token="attribute0", name="vehicle.parked", description=""))
    t["visibility"].append(dict(token="1", level="v0-40", description=""))
    t["log"].append(
        dict(token="log0", logfile="", vehicle="n0", date_captured="2020-01-01", location="town")
    )
    t["map"].append(
        dict(token="map0", log_tokens=["log0"], category="semantic_prior", filename="maps/map0.png")
    )
    for i, name in enumerate(CATEGORIES):
        t["category"].append(dict(token=f"category{i}", name=name, description="", index=i))
    for channel in SENSORS:
        modality = "lidar" if channel == "LIDAR_TOP" else "camera"
        t["sensor"].append(dict(token=f"sensor-{channel}", channel=channel, modality=modality))
    for s, (scene, count) in enumerate(scenes.items()):
        for channel in SENSORS:
            intrinsics = (
                [] if channel == "LIDAR_TOP" else [[30.0 + s, 0, 20], [0, 31.0, 12], [0, 0, 1]]
            )
            t["calibrated_sensor"].append(
                dict(
                    token=f"cs-{s}-{channel}", sensor_token=f"sensor-{channel}", camera_intrinsic=intrinsics,
                    translation=generator.normal(size=3).tolist(), rotation=quaternion(generator),
                )
            )  # fmt: skip
        samples = [f"sample-{s}-{k}" for k in range(count)]
        t["scene"].append(
            dict(token=f"scenetoken{s}", name=scene, description="", log_token="log0", nbr_samples=count,
                 first_sample_token=samples[0], last_sample_token=samples[-1])
        )  # fmt: skip
        start = 1_600_000_000_000_000 + s * 100_000_000
        for k, token in enumerate(samples):
            t["sample"].append(
                dict(token=token, timestamp=start + k * 500_000 + 17, scene_token=f"scenetoken{s}",
                     prev=samples[k - 1] if k else "", next=samples[k + 1] if k + 1 < count else "")
            )  # fmt: skip
        for channel in SENSORS:
            chain = []
            for step in range((count - 1) * (between + 1) + 1):
                number, rest = divmod(step, between + 1)
                token = f"data-{s}-{channel}-{step}"
                time = start + step * 500_000 // (between + 1) + SENSORS.index(channel) * 3000
                folder, suffix = (
                    "sweeps" if rest else "samples",
                    "pcd.bin" if channel == "LIDAR_TOP" else "png",
                )
                t["ego_pose"].append(
                    dict(token=f"pose-{token}", timestamp=time, rotation=quaternion(generator, 0.02),
                         translation=[400 + time % 10_000_000 / 1e6, 1100 + generator.normal(), 0.0])
                )  # fmt: skip
                width, height = (0, 0) if channel == "LIDAR_TOP" else SIZE
                chain.append(
                    dict(token=token, sample_token=samples[number + bool(rest)], ego_pose_token=f"pose-{token}",
                         calibrated_sensor_token=f"cs-{s}-{channel}", timestamp=time, is_key_frame=not rest,
                         filename=f"{folder}/{channel}/{token}.{suffix}", fileformat=suffix, width=width,
                         height=height, prev="", next="")
                )  # fmt: skip
                if channel == "LIDAR_TOP" and not rest:
                    file = f"lidarseg/VERSION/{token}_lidarseg.bin"
                    t["lidarseg"].append(dict(token=token, sample_data_token=token, filename=file))
            for before, after in pairwise(chain):
                after["prev"], before["next"] = before["token"], after["token"]
            t["sample_data"] += chain
        for i in range(4):
            there = [k for k in range(count) if not (i == 2 and k == 1) and not (i == 3 and k)]
            names = [f"annotation-{s}-{i}-{k}" for k in there]
            t["instance"].append(
                dict(token=f"instance-{s}-{i}", category_token=f"category{i}", nbr_annotations=len(names),
                     first_annotation_token=names[0], last_annotation_token=names[-1])
            )  # fmt: skip
            for place, k in enumerate(there):
                t["sample_annotation"].append(
                    dict(token=names[place], sample_token=samples[k], instance_token=f"instance-{s}-{i}",
                         attribute_tokens=[], visibility_token="1", rotation=quaternion(generator, 0.0),
                         translation=(generator.normal(size=3) * 5 + (400, 1100, 1)).tolist(),
                         size=generator.uniform(0.5, 5, 3).tolist(),
                         num_lidar_pts=3 * i * (k != 2 or i == 3), num_radar_pts=int(i == 0 and k == 0),
                         prev=["", *names][place], next=[*names, ""][place + 1])
                )  # fmt: skip
    return t


def write(root, content, version="v1.0-trainval"):
    """Tables and files below `root`; returns the scans by file name."""
    folder = root / version
    folder.mkdir(parents=True)
    for name, records in content.items():
        text = json.dumps(records).replace("VERSION", version)
        (folder / f"{name}.json").write_text(text)
    (root / "maps").mkdir(exist_ok=True)
    write_png(root / "maps" / "map0.png", np.zeros((2, 2), np.uint8))
    generator, scans = np.random.default_rng(1), {}
    labelled = {r["sample_data_token"] for r in content["lidarseg"]}
    for record in content["sample_data"]:
        path = root / record["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if record["fileformat"] == "png":
            write_png(path, generator.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
            continue
        count = int(generator.integers(20, 40))
        scan = np.column_stack(
            [
                generator.normal(size=(count, 3)) * 10,
                generator.integers(0, 256, count),
                np.arange(count) % 32,
            ]
        ).astype(np.float32)
        path.write_bytes(scan.tobytes())
        scans[record["filename"]] = scan
        if record["token"] in labelled:
            path = root / "lidarseg" / version / f"{record['token']}_lidarseg.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(generator.integers(0, 32, count, dtype=np.uint8).tobytes())
    return scans
