"""The report page: well-formed, self-contained, escaped, and true to the numbers it is given."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from tools import report

NAMES = ["car", "pole", "bus & co"]
COLORS = np.array([(100, 150, 245), (255, 240, 150), (0, 0, 255)])
VOID = {"meta", "img", "br"}


def made_up(seeds=1, **changes):
    def run(label, base, parameters, macs, latency, seeds):
        return dict(
            label=label,
            miou=[base + 0.01 * s for s in range(seeds)],
            iou=[base + 0.2, base - 0.2, math.nan],
            parameters=parameters,
            macs=macs,
            latency=latency,
            loss=[[(e, 2.0 / e) for e in range(1, 6)] for _ in range(seeds)],
            val_miou=[[(e, base * e / 5) for e in range(1, 6)] for _ in range(seeds)],
        )

    rng = np.random.default_rng(0)
    coord = rng.uniform(-20, 20, (500, 3))
    segment = rng.integers(-1, 3, 500)
    wrong = np.where(np.arange(500) < 100, (segment + 1) % 3, np.maximum(segment, 0))
    data = dict(
        title="A <script>alert(1)</script> title",
        runs=[
            run("Teacher", 0.61, 1_200_000, 3.0e9, 0.4, 1),
            run("Student alone", 0.40, 100_000, 2.0e8, 0.05, seeds),
            run("Distilled student", 0.47, 100_000, 2.0e8, 0.05, seeds),
        ],
        classes=NAMES,
        colors=COLORS,
        scan=dict(name="08/000012", coord=coord, segment=segment, predictions=[wrong] * 3),
        notes=["One seed & no more."],
        commands=["python tools/demo.py --data 'a<b'"],
        environment=[("CPU", "x86 <fast>"), ("Wall time", "9 min 3 s")],
    )
    return {**data, **changes}


class Page(HTMLParser):
    """Checks nesting, and keeps text, attributes and elements."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_is_well_formed_and_self_contained():
    html = report.build_report(made_up())
    page = Page(html)
    outside = re.sub(r'src="data:image/png;base64,[^"]*"', "", html)
    assert not re.search(r"http|//[a-z]|src=|url\(|@import", outside)
    assert not page.all("script")
    assert not page.all("link")
    sources = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 7
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert not [attrs for _, attrs in page.tags if "href" in attrs]
    assert page.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme:dark" in html


def test_page_serves_screen_readers():
    page = Page(report.build_report(made_up()))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) == 2
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for attrs in page.all("section")} == set(ids)


def test_everything_is_escaped():
    data = made_up()
    data["runs"][0]["label"] = 'T"<b>'
    page = Page(report.build_report(data))
    assert len(page.all("b")) == 9  # the names under seven pictures and two curves, and no more
    assert "<script>alert(1)</script>" in page.text
    for words in ('T"<b>', "bus & co", "x86 <fast>", "--data 'a<b'", "One seed & no more."):
        assert words in page.text


def test_values_are_there():
    page = Page(report.build_report(made_up()))
    for words in (
        "40.0 %", "47.0 %", "61.0 %", "1.20 M", "100 k", "12× fewer", "200 M", "15× fewer",
        "50.0 ms", "8.0× faster", "+7.0", "9 min 3 s", "n/a", "not labelled",
    ):  # fmt: skip
        assert words in page.text, words


def test_headline_says_what_distillation_bought():
    runs = made_up()["runs"]
    assert report.headline(runs) == (
        "Distillation lifted the student from 40.0 % to 47.0 % mIoU (+7.0 points, 33 % of the way to its teacher), "
        "with 12× fewer parameters and 8.0× less time per scan than the teacher."
    )


@pytest.mark.parametrize(
    ("distilled", "words"),
    [(0.35, "did not help"), (0.40, "left the student where it was"), (0.62, "+22.0 points)")],
)
def test_headline_does_not_flatter(distilled, words):
    runs = made_up()["runs"]
    runs[2]["miou"] = [distilled]
    assert words in report.headline(runs)


def test_several_seeds_give_mean_range_and_spread():
    runs = made_up(seeds=3)["runs"]
    assert report.spread([0.40, 0.41, 0.42]) == pytest.approx(
        {"mean": 0.41, "min": 0.40, "max": 0.42, "std": 0.01}
    )
    assert report.spread([0.4])["std"] == 0
    assert report.gains(runs) == pytest.approx([0.07] * 3)
    header, rows = report.summary_table(runs)
    assert rows[1][1] == ("41.0 %", "40.0–42.0, sd 1.0")
    assert rows[0][1] == ("61.0 %", "")
    assert "mean of 3 seeds" in report.headline(runs)
    text = report.text_table(header, rows).splitlines()
    assert len(text) == 5
    assert text[0].startswith("Network")
    assert "41.0 % (40.0–42.0, sd 1.0)" in text[3]


def test_unmeasured_numbers_are_not_invented():
    data = made_up()
    for run in data["runs"]:
        run["macs"] = run["latency"] = None
    _, rows = report.summary_table(data["runs"])
    assert rows[2][3] == ("n/a", "")
    assert rows[2][4] == ("n/a", "")
    assert "time per scan" not in report.headline(data["runs"])
    Page(report.build_report(data))


def test_bars_have_the_length_of_their_value_and_gaps_for_absent_classes():
    svg = ET.fromstring(
        report.bars_svg(NAMES, [("A", [0.5, 1.0, math.nan]), ("B", [0.25, 0.0, None])], "IoU")
    )
    bars = svg.findall("rect")
    assert len(bars) == 4
    widths = {bar.find("title").text: float(bar.get("width")) for bar in bars}
    assert widths["car, A: 50.0 %"] == pytest.approx(widths["pole, A: 100.0 %"] / 2)
    assert widths["car, B: 25.0 %"] == pytest.approx(widths["pole, A: 100.0 %"] / 4)
    assert widths["pole, B: 0.0 %"] == 0
    texts = [text.text for text in svg.findall("text")]
    assert texts.count("n/a") == 2
    assert "bus & co" in texts


def test_curves_scale_and_break_at_missing_values():
    line = [(1, 4.0), (2, 2.0), (3, None), (4, 1.0), (5, 0.0)]
    svg = ET.fromstring(report.curves_svg([("A", [line])], "Loss"))
    paths = [path.get("d") for path in svg.findall("path")]
    assert len(paths) == 2
    points = [tuple(map(float, p.split())) for d in paths for p in d[1:].split("L")]
    xs, ys = zip(*points)
    assert xs[1] - xs[0] == pytest.approx((xs[3] - xs[0]) / 4, abs=0.02)
    # Twice the value stands twice as far above the zero line.
    assert ys[3] - ys[0] == pytest.approx(2 * (ys[3] - ys[1]), abs=0.02)


@pytest.mark.parametrize(
    "lines",
    [[], [[]], [[(1, None)]], [[(1, math.nan)]], [[(1, 0.5)]], [[(3, 0.0)], [(3, 0.0)]], [[(1, -2.0), (2, -1.0)]]],
)  # fmt: skip
def test_short_curves_are_drawn(lines):
    svg = ET.fromstring(report.curves_svg([("A & B", lines), ("C", [])], "mIoU", as_percent=True))
    values = [y for line in lines for _, y in line if y is not None and not math.isnan(y)]
    assert len(svg.findall("circle")) == (len(lines) if len(values) == len(lines) else 0)
    assert ("nothing was logged" in svg.get("aria-label")) == (not values)
    coordinates = re.findall(r'\s(?:cx|cy|x|y)="([^"]+)"', ET.tostring(svg, encoding="unicode"))
    assert all(math.isfinite(float(value)) for value in coordinates)


def test_every_svg_of_the_page_is_xml():
    html = report.build_report(made_up(seeds=2))
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawings) == 4
    for drawing in drawings:
        ET.fromstring(drawing)


def test_page_without_a_scan_or_with_an_unlabelled_one():
    page = Page(report.build_report(made_up(scan=None)))
    assert not page.all("img")
    data = made_up()
    data["scan"]["segment"] = np.full(500, -1)
    assert "n/a of points right" in Page(report.build_report(data)).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (0, "0.00"), (999, "999"), (999_900, "1.00 M"), (46_200_000, "46.2 M"), (3.1e9, "3.10 G")],
)  # fmt: skip
def test_quantities(value, text):
    assert report.quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0312, "31.2 ms"), (1.5, "1.50 s"), (125, "2 min 5 s"), (None, "n/a")]
)
def test_durations(value, text):
    assert report.duration(value) == text


def test_files_are_renamed_into_place(tmp_path):
    path = report.write_text(tmp_path / "new" / "r.html", "é")
    assert path.read_text(encoding="utf-8") == "é"
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
