"""Camera images of simulated streets: geometry, light, files, restart, refusals."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.data import synthetic
from pointcept_kd.data.camera import kitti_camera
from pointcept_kd.data.pictures import read_image
from pointcept_kd.data.semantic_kitti import load_calib, map_labels
from pointcept_kd.data.streets import cameras as rendered
from pointcept_kd.data.streets import scenery, things
from pointcept_kd.data.streets.cameras import CameraPlan
from pointcept_kd.data.streets.colors import look_of, noise
from pointcept_kd.data.streets.render import Renderer
from pointcept_kd.data.streets.shapes import Soup
from pointcept_kd.host import InputError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"
PLAN = synthetic.Plan({"00": 2, "08": 1}, beams=32, columns=256, spacing=4.0, seed=5)
CAMERAS = CameraPlan(width=248, segments=60)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embreex") is None, reason="the extra `sim` is not installed"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    out = tmp_path_factory.mktemp("cameras")
    synthetic.simulate(out, PLAN, workers=1, progress=False)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = rendered.simulate_cameras(out, PLAN, CAMERAS, workers=1, progress=False)
    return out, report, before


@pytest.fixture(scope="module")
def simulator():
    simulator = synthetic.Simulator(PLAN, "00")
    return simulator, Renderer(simulator.street, simulator.still)


def test_points_land_on_what_they_hit(simulator):
    """P2 Tr X, worked out by hand from the calibration's rows, meets the class and depth of the image."""
    sim, renderer = simulator
    cameras = CameraPlan(width=621)
    table = sim.calibration(cameras.scale)
    for index in (0, 1):
        view = rendered.photograph(sim, renderer, cameras, index)
        points, label = sim.scan(index)
        homogeneous = np.column_stack([points[:, :3], np.ones(len(points))]).astype(np.float64)
        seen = table["P2"] @ np.vstack([table["Tr"], [0, 0, 0, 1]]) @ homogeneous.T
        depth = seen[2]
        u, v = np.floor(seen[0] / depth), np.floor(seen[1] / depth)
        inside = (depth > 1) & (u >= 0) & (u < cameras.width) & (v >= 0) & (v < cameras.height)
        assert inside.sum() > 400
        u, v = u[inside].astype(int), v[inside].astype(int)
        close = np.abs(view.depth[v, u] - depth[inside]) < 0.15 + 0.02 * depth[inside]
        assert close.mean() > 0.85  # the rest is hidden from the camera, or at a border
        same = map_labels(view.label[v, u]) == map_labels(label[inside])
        assert same[close].mean() > 0.98
        assert (view.label[v, u] == label[inside])[close].mean() > 0.97


def test_files_and_values(made):
    out, report, _ = made
    assert (report.written, report.kept) == (3, 0)
    for name, count in PLAN.scans.items():
        folder = out / "dataset" / "sequences" / name
        camera = kitti_camera(load_calib(folder / "calib.txt"), "image_2", 248, 75)
        assert camera.intrinsics[0, 2] == pytest.approx(607.2 * 248 / 1242)
        for i in range(count):
            image, weak, segments = (
                read_image(folder / part / f"{i:06d}.png")
                for part in ("image_2", "weak_labels", "superpixels")
            )
            assert image.shape == (75, 248, 3)
            assert image.dtype == np.uint8
            assert weak.shape == segments.shape == (75, 248)
            assert weak.dtype == np.uint8
            assert set(np.unique(weak).tolist()) <= {*range(19), 255}
            assert len(np.unique(weak)) > 6
            assert segments.max() < 60
        note = json.loads((folder / "weak_labels" / "classes.json").read_text())
        assert note["classes"][8] == "road"
        assert note["unknown"] == 255


def test_cameras_join_scans_without_changing_them(made):
    out, _, before = made
    for path, content in before.items():
        if path.name in ("calib.txt", "dataset.json"):
            assert path.read_bytes() != content
        else:
            assert path.read_bytes() == content
    old = load_lines(before[out / "dataset" / "sequences" / "00" / "calib.txt"])
    new = load_lines((out / "dataset" / "sequences" / "00" / "calib.txt").read_bytes())
    assert old["Tr"] == new["Tr"]
    scale = np.array([248 / 1242, 248 / 1242, 1]).repeat(4)
    assert np.array(new["P3"]) == pytest.approx(scale * old["P3"])


def load_lines(content):
    rows = (line.split(":") for line in content.decode().splitlines())
    return {name: [float(v) for v in row.split()] for name, row in rows}


def test_interrupted_run_goes_on(made):
    out, _, _ = made
    folder = out / "dataset" / "sequences" / "00"
    lost = folder / "superpixels" / "000001.png"
    image = folder / "image_2" / "000001.png"
    wanted, before = (lost.read_bytes(), image.read_bytes()), image.stat().st_mtime_ns
    lost.unlink()
    report = rendered.simulate_cameras(out, PLAN, CAMERAS, workers=1, progress=False)
    assert (report.written, report.kept) == (1, 2)
    assert (lost.read_bytes(), image.read_bytes()) == wanted
    assert image.stat().st_mtime_ns != before
    # Scans simulated again, without a word about cameras, keep the calibration of the images.
    calib = folder / "calib.txt"
    content = calib.read_bytes()
    calib.unlink()
    synthetic.simulate(out, PLAN, workers=1, progress=False)
    assert calib.read_bytes() == content


def test_other_images_are_refused(made):
    out, _, _ = made
    with pytest.raises(InputError, match=r"holds images with width=248, asked for width=300"):
        rendered.simulate_cameras(out, PLAN, CameraPlan(300), workers=1, progress=False)


def test_no_scans_no_images(tmp_path):
    with pytest.raises(InputError, match="simulate the scans first"):
        rendered.simulate_cameras(tmp_path, PLAN, CAMERAS, progress=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"width": 8}, "--image-width: 8"),
        ({"segments": 0}, "--superpixels: 0"),
        ({"confusion": 1.5}, "--confusion"),
    ],
)
def test_numbers_out_of_range(change, text):
    with pytest.raises(InputError, match=text):
        CameraPlan(**change).check()


# Light


def test_photographs_look_like_streets(simulator):
    sim, renderer = simulator
    view = rendered.photograph(sim, renderer, CAMERAS, 0)
    image, kind = view.image.astype(float), view.label & 0xFFFF
    assert np.isinf(view.depth[kind == 0]).all()
    assert np.isfinite(view.depth[kind > 0]).all()
    sky = image[:12][kind[:12] == 0]
    assert len(sky) > 100
    assert (sky[:, 2] >= sky[:, 0]).mean() > 0.9  # blue or grey, not red
    green = image[kind == 70].mean(0)
    assert green[1] > green[0] > green[2]
    for label in (40, 48, 50, 70):  # surfaces have texture
        assert image[kind == label].std(0).min() > 2
    assert 60 < image.mean() < 190


def test_a_wall_between_the_sun_and_the_road_casts_a_shadow(simulator):
    sim, renderer = simulator
    street = sim.street
    x, y, _ = street.frame(0.0, -street.road / 2)
    eye = np.array([float(x), float(y), street.height(0.0, -street.road / 2) + 6.0])
    down = np.eye(4)
    down[:3, :3], down[:3, 3] = np.diag([1.0, -1, -1]), eye
    lens = np.array([[30.0, 0, 32], [0, 30, 32], [0, 0, 1]])
    bright = renderer.view(down, lens, 64, 64, None)
    # A screen, out of sight, 30 m towards the sun.
    sun = renderer.sky.sun
    middle, aside = eye - [0, 0, 6] + 30 * sun, np.cross(sun, [0, 0, 1.0])
    aside, over = (
        15 * aside / np.linalg.norm(aside),
        15 * np.cross(aside / np.linalg.norm(aside), sun),
    )
    corners = [middle + a * aside + b * over for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    screen = Soup()
    triangles = np.array([[corners[i] for i in t] for t in ((0, 1, 2), (0, 2, 3))], np.float32)
    screen.add(triangles, 99, 0.5, material="bin", thing=1)
    dark = renderer.view(down, lens, 64, 64, screen)
    road = (bright.label == 40) & (dark.label == 40)
    assert road.sum() > 500
    shaded = dark.image[road].mean() / bright.image[road].mean()
    limit = 0.97 if renderer.sky.cover > 0.8 else 0.85
    assert shaded < limit


def test_colours_follow_thing_and_seed_only(simulator):
    street = simulator[0].street
    car = things.car(np.random.default_rng(1))
    first, second = Soup(), Soup()
    first.add_parts(car, 7)
    second.add_parts(scenery.tree(np.random.default_rng(2)))
    second.add_parts(car, 7)
    a, b = look_of(first, street, (1, 2)), look_of(second, street, (1, 2))
    assert np.array_equal(a.albedo, b.albedo[-len(a.albedo) :])
    others = [look_of(first, street, (seed, 2)).albedo[0] for seed in range(3, 9)]
    assert len({tuple(c) for c in others}) > 1
    assert (a.albedo >= 0).all()
    assert (a.albedo <= 1).all()
    assert not np.array_equal(a.albedo[0], a.albedo[-1])  # paint and number plate


def test_noise_is_smooth_and_in_range():
    u = np.linspace(0, 40, 4001)
    values = noise(u, 0.3 * u)
    assert 0 <= values.min() < 0.2
    assert 0.8 < values.max() <= 1
    assert np.abs(np.diff(values)).max() < 0.03
    assert noise(u + 256, u) == pytest.approx(noise(u, u), abs=1e-3)


def test_tool(tmp_path, capsys):
    pytest.importorskip("PIL", reason="the extra `images` is not installed")
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = str(tmp_path / "o")
    make = ["simulate", "--out", out, "--sequences", "8", "--scans", "1", "--beams", "8", "--columns", "64",
            "--workers", "1"]  # fmt: skip
    assert tool.main(make) == 0
    assert tool.main([*make, "--cameras", "kitti", "--image-width", "64"]) == 0
    assert "1 images of 64 x 19" in capsys.readouterr().out
    assert (
        tool.main(["preview", "--data-root", out, "--out", str(tmp_path / "p.png"), "--half", "20"])
        == 0
    )
    assert "08_000000" in capsys.readouterr().out
    assert read_image(tmp_path / "p.png").ndim == 3
    assert tool.main([*make, "--image-width", "64"]) == 2
    assert "--image-width needs --cameras kitti" in capsys.readouterr().err
    assert tool.main([*make, "--sweeps", "3"]) == 2
    assert tool.main([*make, "--layout", "nuscenes", "--cameras", "kitti"]) == 2
    assert "nuscenes always has its six" in capsys.readouterr().err
