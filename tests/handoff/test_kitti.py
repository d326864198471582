"""KITTI's figures: average precision from its definition, OpenPCDet's logs, tables of runs."""

import ast
import io
import os
import statistics
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.handoff import kitti

LIMITS = {"Car": (0.7, 0.5), "Pedestrian": (0.5, 0.25), "Cyclist": (0.5, 0.25)}


def evaluation(epoch, moderate, shift=0.0):
    """What OpenPCDet logs for a checkpoint: every class at two overlaps, R11 before R40."""
    lines = [
        f"2024-05-01 10:00:00,000   INFO  *************** Performance of EPOCH {epoch} *****************",
        "2024-05-01 10:00:00,000   INFO  recall_roi_0.3: 0.950000",
    ]
    for j, (name, value) in enumerate(moderate.items()):
        first, second = LIMITS[name]
        for i, overlaps in enumerate(((first,) * 3, (first, second, second))):
            limits = ", ".join(f"{x:.2f}" for x in overlaps)
            stamp = "2024-05-01 10:00:01,000   INFO  " if i == j == 0 else ""
            for kind, more in (("AP", 50.0), ("AP_R40", 0.0)):
                lines.append(f"{stamp if kind == 'AP' else ''}{name} {kind}@{limits}:")
                for view, off in (("bbox", 9.0), ("bev ", 2.0), ("3d  ", 0.0)):
                    base = value + shift + off + (more if kind == "AP" else 20.0 * i)
                    lines.append(f"{view} AP:{base + 5:.4f}, {base:.4f}, {base - 3:.4f}")
    return lines


PUBLISHED = {"Car": 82.0, "Pedestrian": 53.2, "Cyclist": 69.8}


def test_hand_worked_precision():
    samples = [1.0] * 21 + [0.0] * 20
    assert kitti.average_precision(samples) == pytest.approx(50.0)
    # Samples 0, 4, .. 20 of 0, 4, .. 40.
    assert kitti.average_precision(samples, 11) == pytest.approx(100 * 6 / 11)
    assert kitti.average_precision([1.0] + [0.0] * 40) == 0
    assert kitti.average_precision([1.0] + [0.0] * 40, 11) == pytest.approx(100 / 11)


def test_precision_is_a_plain_mean():
    samples = [((7 * i) % 41) / 41 for i in range(41)]
    assert kitti.average_precision(samples) == pytest.approx(
        statistics.fmean(100 * samples[i] for i in range(1, 41))
    )
    picked = [samples[i] for i in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)]
    assert kitti.average_precision(samples, 11) == pytest.approx(100 * statistics.fmean(picked))


@pytest.mark.parametrize(
    ("samples", "points", "message"),
    [
        ([0.5] * 40, 40, "40 samples of precision: expected 41"),
        ([0.5] * 40 + [1.1], 40, "between 0 and 1"),
        ([0.5] * 40 + [float("nan")], 40, "between 0 and 1"),
        ([0.5] * 41, 12, "points=12: expected 40 or 11"),
    ],
)
def test_precision_refuses(samples, points, message):
    with pytest.raises(ValueError, match=message):
        kitti.average_precision(samples, points)


@pytest.mark.parametrize(
    ("moderate", "expected"), [((82.0, 53.2, 69.8), 68.33), ((84.8, 59.3, 74.2), 72.77)]
)
def test_mean_of_published_rows(moderate, expected):
    values = {n: {"3d": {"moderate": v}} for n, v in zip(kitti.OVERLAPS, moderate)}
    assert kitti.mean_ap(values) == pytest.approx(expected, abs=0.005)
    del values["Cyclist"]
    assert kitti.mean_ap(values) is None


def test_a_log():
    lines = ["anything", *evaluation(79, PUBLISHED, -10.0), "between", *evaluation(80, PUBLISHED)]
    first, last = kitti.read_log(lines)
    assert (first.epoch, last.epoch) == ("79", "80")
    assert set(last.ap) == {"Car", "Pedestrian", "Cyclist"}
    # R40 at the strict overlaps: R11 is 50 higher here, and the easier overlaps 20.
    assert last.ap["Car"]["3d"] == {"easy": 87.0, "moderate": 82.0, "hard": 79.0}
    assert last.ap["Pedestrian"]["bev"] == pytest.approx(
        {"easy": 60.2, "moderate": 55.2, "hard": 52.2}
    )
    assert set(last.ap["Cyclist"]) == {"3d", "bev"}
    assert kitti.mean_ap(last.ap) == pytest.approx(68.333, abs=1e-3)
    assert first.ap["Car"]["3d"]["moderate"] == 72.0


def test_logs_that_are_cut_or_have_no_figures():
    assert kitti.read_log([]) == []
    assert kitti.read_log(evaluation(80, PUBLISHED)[:2]) == []
    nan = [line.replace("77.0000", "nan") for line in evaluation(80, {"Car": 72.0})]
    values = kitti.read_log(nan)[0].ap
    assert values["Car"]["3d"]["easy"] is None
    assert "Car_3d/easy" not in kitti.flat(values)
    assert kitti.flat(values)["Car_3d/moderate"] == 72.0


@pytest.fixture
def openpcdet_figures():
    """Functions of OpenPCDet's evaluation that need no compiled code, from a checkout."""
    root = Path(os.environ.get("OPENPCDET_ROOT", ""))
    source = root / "pcdet" / "datasets" / "kitti" / "kitti_object_eval_python" / "eval.py"
    if not source.is_file():
        pytest.skip("OPENPCDET_ROOT does not name a checkout of OpenPCDet")
    wanted = {"print_str", "get_mAP", "get_mAP_R40", "get_official_eval_result"}
    tree = ast.parse(source.read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    assert {f.name for f in functions} == wanted
    space = {"np": np, "sysio": io}
    exec(compile(ast.Module(functions, []), str(source), "exec"), space)
    return space


def test_precision_as_openpcdet(openpcdet_figures):
    samples = np.random.default_rng(0).random((5, 41))
    r40, r11 = (openpcdet_figures[name](samples) for name in ("get_mAP_R40", "get_mAP"))
    for row, first, second in zip(samples, r40, r11):
        assert kitti.average_precision(row.tolist()) == pytest.approx(first)
        assert kitti.average_precision(row.tolist(), 11) == pytest.approx(second)


def test_a_report_of_openpcdet(openpcdet_figures):
    """Text that its own evaluation makes is read as it means."""
    # Class, difficulty, overlap; 2D, bird's-eye view, 3D, orientation; R11, then R40.
    figures = np.random.default_rng(1).random((8, 3, 3, 2)).round(3) * 100
    openpcdet_figures["do_eval"] = lambda *_, **__: tuple(figures)
    none = [{"alpha": np.array([-10.0])}]
    text, by_key = openpcdet_figures["get_official_eval_result"](
        none, none, ["Car", "Pedestrian", "Cyclist"]
    )
    head = "2024 INFO  *************** Performance of EPOCH 80 *****************"
    (found,) = kitti.read_log([head, *f"2024 INFO  {text}".splitlines()])
    flat = kitti.flat(found.ap)
    wanted = {k.removesuffix("_R40"): v for k, v in by_key.items() if "_3d/" in k or "_bev/" in k}
    assert len(wanted) == 18
    assert flat.pop("mAP@40") == pytest.approx(figures[6, :, 1, 0].mean())
    assert flat == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------ loading

LOAD = "2024 INFO  ==> Loading parameters from checkpoint {} to GPU"
DONE = "2024 INFO  ==> Done (loaded {})"
START = "2024 INFO  **********************Start training kitti_models/t(x)**********************"
LEFT = "2024 INFO  Not updated weight {}: torch.Size([16, 3, 3, 3, 4])"


def watched(lines, **more):
    watch = kitti.LoadWatch("/a/t.pth", (72, 163), **more)
    return [p for line in lines if (p := watch.feed(line))], watch


def test_a_load_as_it_should_be():
    lines = [
        LOAD.format("/a/t.pth"),
        LEFT.format("dense_head.conv_cls.weight"),
        DONE.format("72/163"),
    ]
    later = [LOAD.format("/run/ckpt/checkpoint_epoch_80.pth"), DONE.format("163/163")]
    problems, watch = watched([*lines, START, *later])
    assert problems == []
    assert watch.loaded
    assert watch.started


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [LOAD.format("/a/t.pth"), LEFT.format("backbone_3d.conv_input.0.weight"), DONE.format("68/163")],
            "loaded 68/163 entries and not 72/163; not updated: backbone_3d.conv_input.0.weight",
        ),
        ([LOAD.format("/a/t.pth"), DONE.format("0/163")], "loaded 0/163 entries and not 72/163"),
        ([LOAD.format("/a/t.pth"), DONE.format("72/367")], "loaded 72/367 entries and not 72/163"),
        (
            [LOAD.format("/a/t.pth"), LEFT.format("backbone_3d.conv1.0.0.weight"), DONE.format("72/163")],
            "others than the encoder's; not updated: backbone_3d.conv1.0.0.weight",
        ),
        (
            [LOAD.format("/a/t.pth"), DONE.format("72/163"), LOAD.format("/run/ckpt/latest_model.pth")],
            "loads /run/ckpt/latest_model.pth over the given weights",
        ),
        ([START], "trains without having loaded the weights"),
    ],
)  # fmt: skip
def test_loads_that_are_wrong(lines, message):
    problems, watch = watched(lines)
    assert len(problems) == 1
    assert message in problems[0]
    assert "\n" not in problems[0]
    assert watch.started == (lines == [START])


def test_a_part_of_a_bigger_encoder_may_be_left():
    lines = [LOAD.format("/a/t.pth"), LEFT.format("backbone_3d.conv_up_t4.conv1.weight")]
    assert watched([*lines, DONE.format("72/163")], complete=False)[0] == []


def test_a_start_from_nothing():
    watch = kitti.LoadWatch(None)
    assert watch.feed(START) is None
    assert kitti.LoadWatch(None).missing() is None
    assert kitti.LoadWatch("/a/t.pth").missing()
    stale = kitti.LoadWatch(None).feed(LOAD.format("/run/ckpt/latest_model.pth"))
    assert "into a start from nothing" in stale


# ------------------------------------------------------------------------------------------ runs


def runs(*shifts):
    found = [kitti.read_log(evaluation(80, PUBLISHED, shift))[0] for shift in shifts]
    return [{"tag": f"t_{i}", "ap": each.ap} for i, each in enumerate(found)]


def test_mean_spread_and_best():
    whole = kitti.summarise(runs(0.0, 3.0, -1.5))
    assert whole["runs"] == 3
    assert whole["mean"]["mAP@40"] == pytest.approx(68.3333 + 0.5, abs=1e-3)
    # Deviations -0.5, 2.5, -2 of three: sqrt((0.25 + 6.25 + 4) / 2).
    assert whole["std"]["Car_3d/moderate"] == pytest.approx(5.25**0.5)
    assert whole["best"]["tag"] == "t_1"
    assert whole["best"]["by"] == "mAP@40"
    assert whole["best"]["ap"]["Car_3d/moderate"] == 85.0
    assert kitti.summarise(runs(0.0))["std"]["mAP@40"] is None
    with pytest.raises(ValueError, match="no runs"):
        kitti.summarise([])


def test_the_table():
    text = kitti.table(runs(0.0, 3.0), "second on KITTI val")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| 3d | Car | Pedestrian | Cyclist | mAP@40 |"
    assert rows[2] == (
        "| t_0 | 87.00 / 82.00 / 79.00 | 58.20 / 53.20 / 50.20 | 74.80 / 69.80 / 66.80 | 68.33 |"
    )
    assert rows[4].startswith("| mean | 88.50 / 83.50 / 80.50 |")
    assert rows[5].startswith("| std | 2.12 / 2.12 / 2.12 |")
    assert rows[6].startswith("| best (t_1) | 90.00 /")
    assert "| bev | Car | Pedestrian | Cyclist |" in rows
    one = kitti.table(runs(0.0), "t")
    assert "mean |" not in one
    cars = [{"tag": "a", "ap": {"Car": runs(0.0)[0]["ap"]["Car"]}}]
    assert "| 3d | Car | mAP@40 |" in kitti.table(cars, "t")
