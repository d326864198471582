"""Simulated scenes in nuScenes' layout: schema, links, geometry, readers, restart."""

import importlib.util
import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pointcept_kd.data import synthetic
from pointcept_kd.data.nuscenes import NuScenesDataset
from pointcept_kd.data.nuscenes_files import LEARNING_MAP
from pointcept_kd.data.nuscenes_info import write_infos
from pointcept_kd.data.pictures import read_image
from pointcept_kd.data.preview import open_shot, write_preview
from pointcept_kd.data.streets import nuscenes_layout
from pointcept_kd.data.streets.nuscenes_layout import RigPlan
from pointcept_kd.data.streets.nuscenes_layout import simulate_nuscenes as run
from pointcept_kd.data.streets.rig import CAMERAS, CATEGORIES, CATEGORY_OF, LIDARSEG, quaternion
from pointcept_kd.host import InputError

PLAN = synthetic.Plan({"00": 3, "08": 1}, beams=32, columns=256, spacing=4.0, seed=3)
RIG = RigPlan(sweeps=3, width=96, segments=24)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embreex") is None or importlib.util.find_spec("PIL") is None,
    reason="the extras `sim` and `images` are not installed",
)

# The fields of nuScenes' schema (with lidarseg), by table.
SCHEMA = {
    "attribute": "token name description",
    "calibrated_sensor": "token sensor_token translation rotation camera_intrinsic",
    "category": "token name description index",
    "ego_pose": "token translation rotation timestamp",
    "instance": "token category_token nbr_annotations first_annotation_token last_annotation_token",
    "lidarseg": "token filename sample_data_token",
    "log": "token logfile vehicle date_captured location",
    "map": "token log_tokens category filename",
    "sample": "token timestamp scene_token next prev",
    "sample_annotation": "token sample_token instance_token attribute_tokens visibility_token translation size "
    "rotation num_lidar_pts num_radar_pts next prev",
    "sample_data": "token sample_token ego_pose_token calibrated_sensor_token filename fileformat width height "
    "timestamp is_key_frame next prev",
    "scene": "token name description log_token nbr_samples first_sample_token last_sample_token",
    "sensor": "token channel modality",
    "visibility": "token level description",
}
LINKS = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "instance": {"category_token": "category", "first_annotation_token": "sample_annotation",
                 "last_annotation_token": "sample_annotation"},
    "lidarseg": {"sample_data_token": "sample_data"},
    "map": {"log_tokens": "log"},
    "sample": {"scene_token": "scene"},
    "sample_annotation": {"sample_token": "sample", "instance_token": "instance",
                          "attribute_tokens": "attribute", "visibility_token": "visibility"},
    "sample_data": {"sample_token": "sample", "ego_pose_token": "ego_pose",
                    "calibrated_sensor_token": "calibrated_sensor"},
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("rig")
    report = run(out, PLAN, RIG, workers=1, progress=False)
    tables = {
        name: json.loads((out / "raw" / "v1.0-sim" / f"{name}.json").read_text()) for name in SCHEMA
    }
    return out, report, tables


def by_token(rows):
    return {row["token"]: row for row in rows}


def matrix(record):
    w, x, y, z = record["rotation"]
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = (
        Rotation.from_quat([x, y, z, w]).as_matrix(),
        record["translation"],
    )
    return place


def test_tables_have_the_fields_of_the_schema(made):
    _, report, tables = made
    assert (report.written, report.kept, report.images) == (4, 0, 24)
    for name, fields in SCHEMA.items():
        assert tables[name], name
        for row in tables[name]:
            assert set(row) == set(fields.split()), name
        assert len(by_token(tables[name])) == len(tables[name])


def test_links_lead_somewhere(made):
    _, _, tables = made
    known = {name: by_token(rows) for name, rows in tables.items()}
    for name, links in LINKS.items():
        for row in tables[name]:
            for field, target in links.items():
                values = row[field] if isinstance(row[field], list) else [row[field]]
                assert all(v in known[target] for v in values), (name, field)


@pytest.mark.parametrize("name", ["sample", "sample_data", "sample_annotation"])
def test_records_are_chained_in_time(made, name):
    _, _, tables = made
    rows, samples = by_token(tables[name]), by_token(tables["sample"])
    starts = [r for r in rows.values() if not r["prev"]]
    seen = 0
    for row in starts:
        times = []
        while True:
            seen += 1
            times.append(
                (samples[row["sample_token"]] if name == "sample_annotation" else row)["timestamp"]
            )
            if not row["next"]:
                break
            assert rows[row["next"]]["prev"] == row["token"]
            row = rows[row["next"]]
        assert times == sorted(set(times))
    assert seen == len(rows)


def test_files_are_as_the_tables_say(made):
    out, _, tables = made
    raw, data = out / "raw", by_token(tables["sample_data"])
    channels = {c["token"]: c for c in tables["calibrated_sensor"]}
    sensors = by_token(tables["sensor"])
    keys = turns = 0
    for row in data.values():
        path = raw / row["filename"]
        channel = sensors[channels[row["calibrated_sensor_token"]]["sensor_token"]]["channel"]
        assert path.parent.name == channel
        assert path.parent.parent.name == ("samples" if row["is_key_frame"] else "sweeps")
        assert str(row["timestamp"]) in path.name
        if channel == "LIDAR_TOP":
            points = np.fromfile(path, "<f4").reshape(-1, 5)
            assert np.isfinite(points).all()
            assert 0 <= points[:, 3].min() <= points[:, 3].max() <= 255
            assert set(np.unique(points[:, 4])) <= set(range(32))
            elevation = np.arctan2(points[:, 2], np.linalg.norm(points[:, :2], axis=1))
            means = [elevation[points[:, 4] == r].mean() for r in np.unique(points[:, 4])]
            assert (np.diff(means) > 0).all()  # ring 0 is the lowest
            keys, turns = keys + row["is_key_frame"], turns + 1
        else:
            image = read_image(path)
            assert image.shape == (row["height"], row["width"], 3) == (54, 96, 3)
            weak = read_image(raw / row["filename"].replace("samples/", "camseg/"))
            assert weak.shape == (54, 96)
            assert weak.max() <= 13
            segments = read_image(raw / "superpixels_slic" / f"{row['token']}.png")
            assert segments.dtype == np.uint8
            assert segments.max() < 24
    assert (keys, turns) == (4, 7 + 1)
    for row in tables["lidarseg"]:
        label = np.fromfile(raw / row["filename"], np.uint8)
        scan = raw / data[row["sample_data_token"]]["filename"]
        assert len(label) * 20 == scan.stat().st_size
        assert label.max() < 32
    for row in tables["map"]:
        mask = read_image(raw / row["filename"])
        assert set(np.unique(mask)) == {0, 255}


def test_the_car_is_on_the_road_of_its_map(made):
    out, _, tables = made
    scene, *_ = tables["scene"]
    row = next(m for m in tables["map"] if scene["log_token"] in m["log_tokens"])
    mask = read_image(out / "raw" / row["filename"])
    samples = {s["token"] for s in tables["sample"] if s["scene_token"] == scene["token"]}
    poses = by_token(tables["ego_pose"])
    for data in tables["sample_data"]:
        if data["sample_token"] in samples:
            x, y, _ = poses[data["ego_pose_token"]]["translation"]
            assert x > 0
            assert y > 0
            assert mask[mask.shape[0] - 1 - int(y * 10), int(x * 10)] == 255


def test_categories_are_the_official_ones():
    assert len(CATEGORIES) == 32
    assert sorted(CATEGORIES[9:13]) == list(CATEGORIES[9:13])
    wanted = {"vehicle.car": 3, "flat.driveable_surface": 10, "flat.other": 11, "flat.sidewalk": 12,
              "flat.terrain": 13, "static.manmade": 14, "static.vegetation": 15, "noise": -1,
              "vehicle.construction": 4, "movable_object.barrier": 0, "movable_object.trafficcone": 7}  # fmt: skip
    for name, train_id in wanted.items():
        assert LEARNING_MAP[CATEGORIES.index(name)] == train_id
    assert LIDARSEG[254] == CATEGORIES.index("human.pedestrian.adult")
    assert set(CATEGORY_OF.values()) <= set(CATEGORIES)


def test_boxes_hold_the_points_they_count(made):
    """Counted again from the files, box by box, through the tables' own transformations."""
    out, _, tables = made
    data = [d for d in tables["sample_data"] if d["is_key_frame"] and d["fileformat"] == "pcd"]
    poses, calibrated = by_token(tables["ego_pose"]), by_token(tables["calibrated_sensor"])
    labels = {r["sample_data_token"]: r["filename"] for r in tables["lidarseg"]}
    instances, categories = by_token(tables["instance"]), by_token(tables["category"])
    agree = total = 0
    for row in data:
        points = (
            np.fromfile(out / "raw" / row["filename"], "<f4").reshape(-1, 5)[:, :3].astype(float)
        )
        kinds = np.fromfile(out / "raw" / labels[row["token"]], np.uint8)
        move = matrix(poses[row["ego_pose_token"]]) @ matrix(
            calibrated[row["calibrated_sensor_token"]]
        )
        world = points @ move[:3, :3].T + move[:3, 3]
        for box in tables["sample_annotation"]:
            if box["sample_token"] != row["sample_token"]:
                continue
            own = (world - box["translation"]) @ matrix(box)[:3, :3]
            width, length, height = box["size"]
            inside = (np.abs(own) <= np.array([length, width, height]) / 2 + 1e-9).all(1)
            assert inside.sum() == box["num_lidar_pts"] > 0
            kind = categories[instances[box["instance_token"]]["category_token"]]["index"]
            agree, total = agree + int((kinds[inside] == kind).sum()), total + int(inside.sum())
    assert total > 1000
    assert agree / total > 0.9  # the rest is road below a car, or a leaf


def test_movers_have_speed_and_the_rest_has_none(made):
    _, _, tables = made
    rows, samples = by_token(tables["sample_annotation"]), by_token(tables["sample"])
    names = {a["token"]: a["name"] for a in tables["attribute"]}
    speeds = {True: [], False: []}
    for row in rows.values():
        if not row["next"]:
            continue
        after = rows[row["next"]]
        passed = 1e-6 * (
            samples[after["sample_token"]]["timestamp"] - samples[row["sample_token"]]["timestamp"]
        )
        speed = np.linalg.norm(np.subtract(after["translation"], row["translation"])) / passed
        attribute = [names[t] for t in row["attribute_tokens"]]
        if attribute and attribute[0] in ("vehicle.moving", "pedestrian.moving"):
            speeds[True].append(speed)
        elif attribute and attribute[0] in (
            "vehicle.parked",
            "pedestrian.standing",
            "cycle.without_rider",
        ):
            speeds[False].append(speed)
    assert len(speeds[True]) > 2
    assert min(speeds[True]) > 0.5
    assert max(speeds[True]) < 12
    assert len(speeds[False]) > 10
    assert max(speeds[False]) < 1e-9


def test_cameras_look_the_way_nuscenes_does(made):
    _, _, tables = made
    channels = {s["token"]: s["channel"] for s in tables["sensor"]}
    seen = set()
    for row in tables["calibrated_sensor"]:
        channel, place = channels[row["sensor_token"]], matrix(row)
        if channel == "LIDAR_TOP":
            assert place[:3, 1] == pytest.approx([1, 0, 0], abs=0.03)  # its y is ahead
            assert row["camera_intrinsic"] == []
            continue
        yaw, view, _ = CAMERAS[channel]
        ahead = np.rad2deg(np.arctan2(place[1, 2], place[0, 2]))
        assert abs((ahead - yaw + 180) % 360 - 180) < 2.5
        assert place[2, 1] < -0.99  # y of the image points down
        focal = row["camera_intrinsic"][0][0]
        assert 2 * np.rad2deg(np.arctan(48 / focal)) == pytest.approx(view, abs=1.0)
        seen.add(channel)
    assert seen == set(CAMERAS)


def test_quaternions_by_hand():
    half = np.sqrt(0.5)
    assert quaternion(np.eye(3)) == pytest.approx([1, 0, 0, 0])
    assert quaternion(np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])) == pytest.approx(
        [half, 0, 0, -half]
    )


def test_readers_and_preview(made, tmp_path):
    out, _, _ = made
    splits = json.loads((out / "raw" / "v1.0-sim" / "splits.json").read_text())
    assert splits == {"train": ["scene-0000"], "val": ["scene-0008"]}
    write_infos(out / "raw", "v1.0-sim", out, 4, with_camera=True)
    dataset = NuScenesDataset("train", str(out), sweeps=4, aggregate_sweeps=3)
    assert len(dataset.data_list) == 3
    merged = dataset.get_data(2)
    # What is put together of four turns still is one street: the road has one height.
    road = (merged["segment"] == 10) & (np.linalg.norm(merged["coord"], axis=1) < 8)
    assert road.sum() > 50
    assert merged["coord"][road, 2].std() < 0.12
    assert merged["sweep"].max() == 3
    single = NuScenesDataset("train", str(out), sweeps=4)
    data, agree, count = single.get_data(1), 0, 0
    rig = nuscenes_layout._rig(json.dumps(vars(PLAN)), json.dumps(vars(RIG)), "00")[1]
    for camera in single.cameras(1):
        pixels, depth, visible = camera.project(data["coord"])
        assert visible.sum() > 50
        column, row = np.floor(pixels[visible]).astype(int).T
        view = rig.photograph(camera.name, 1)
        close = np.abs(view.depth[row, column] - depth[visible]) < 0.2 + 0.03 * depth[visible]
        kinds = [LEARNING_MAP[int(k)] for k in LIDARSEG[view.label[row, column] & 0xFFFF]]
        agree += int((np.array(kinds) == data["segment"][visible])[close].sum())
        count += int(close.sum())
        assert close.mean() > 0.6
    assert agree / count > 0.95
    name = single.get_data_name(1)
    shot = open_shot(out, name[:12])
    assert (shot.name, len(shot.cameras)) == (name, 6)
    write_preview(out, tmp_path / "p.png", name, width=600)
    assert read_image(tmp_path / "p.png").shape[1] == 600
    with pytest.raises(InputError, match="--scan zz: no scan among"):
        open_shot(out, "zz")


def test_interrupted_run_goes_on(made):
    out, _, _ = made
    raw = out / "raw"
    everything = {p: p.read_bytes() for p in raw.rglob("*") if p.is_file()}
    lost = [next(raw.glob("samples/CAM_BACK/scene-0000*")), next(raw.glob("sweeps/LIDAR_TOP/*")),
            raw / "v1.0-sim" / "sample_data.json"]  # fmt: skip
    for path in lost:
        path.unlink()
    report = run(out, PLAN, RIG, workers=1, progress=False)
    assert report.kept >= 2
    assert report.written + report.kept == 4
    assert {p: p.read_bytes() for p in everything} == everything


def test_other_plans_are_refused(made):
    out, _, _ = made
    with pytest.raises(InputError, match="asked for layout=kitti"):
        synthetic.simulate(out, PLAN, workers=1, progress=False)
    with pytest.raises(InputError, match="holds scans with sweeps=3, asked for sweeps=2"):
        run(out, PLAN, RigPlan(sweeps=2, width=96), workers=1, progress=False)
    with pytest.raises(InputError, match="--sweeps: 0"):
        RigPlan(sweeps=0).check()
