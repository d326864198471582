"""One self-contained HTML file about one distillation: `build_report(data) -> str`, from plain data to text.

`data` is a dict of plain values; nothing in it is trusted to be free of markup, and nothing in the page is fetched:

    title      str
    runs       three dicts, in the order teacher, student alone, distilled student:
                 label       str
                 miou        list of mIoU in [0, 1], one per seed
                 iou         per-class IoU in [0, 1], mean over seeds; NaN or None for a class that is absent
                 parameters  int
                 macs        multiply-accumulates per scan, or None where not measured
                 latency     seconds per scan, or None
                 loss        training loss per epoch: one list of (epoch, value) per seed
                 val_miou    validation mIoU per epoch, likewise
    classes    class names, one per entry of `iou`
    colors     (k, 3) integers in [0, 255], one colour per class
    scan       None, or dict(name=str, coord=(n, 3), segment=(n,), predictions=[three (n,)]); x forward, y left, metres
    notes      sentences printed under the table
    commands   command lines that made the report
    environment  list of (name, value)
"""

from __future__ import annotations

import base64
import math
import os
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pointcept_kd.data.pictures import IGNORED, birdseye_png

# Fallbacks for a picture taken out of the page; in the page the style sheet decides, also for dark screens.
SERIES_COLORS = ("#7a828c", "#c2570c", "#1d5fd0")
DASHES = ("", "5 3", "")
WIDTHS = (1.6, 1.6, 2.4)
RIGHT_WRONG = np.array([(84, 90, 100), (255, 86, 64)])

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1b1e23;--soft:#59606b;--line:#d9dbd6;--panel:#f3f4f0;
--s0:#7a828c;--s1:#c2570c;--s2:#1d5fd0}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--ink:#e8e9e6;--soft:#a2a8b1;--line:#343941;
--panel:#1d2026;--s0:#98a0ab;--s1:#f08c45;--s2:#78a9ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0 0 .75rem}
h2{font-size:1.2rem;line-height:1.3;margin:3rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .25rem}
p{max-width:42rem;margin:.5rem 0}
.lead{font:500 clamp(1.35rem,1rem + 2vw,1.95rem)/1.32 "Iowan Old Style","Palatino Linotype",Palatino,
"Book Antiqua",Georgia,serif;max-width:38rem;margin:0 0 1.75rem;text-wrap:pretty}
.soft,figcaption,caption,summary{color:var(--soft);font-size:.875rem}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible,pre:focus-visible{outline:2px solid var(--s2);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .5rem}
th,td{padding:.5rem .75rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;
white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:6.5rem}
thead th{font-size:.8125rem;font-weight:600;color:var(--soft);border-bottom:1.5px solid var(--ink);
vertical-align:bottom}
tbody th{font-weight:500}
td small{display:block;color:var(--soft);font-size:.78rem}
.main tbody tr:last-child>*{font-weight:650}
.main tbody tr:last-child small{font-weight:400}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem 2rem}
.pictures,.errors{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.errors{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}
figure{margin:0}
figcaption{margin:.3rem 0 0}
figcaption b{color:var(--ink);font-weight:600}
img{display:block;width:100%;height:auto;border-radius:4px;background:#101216}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font-family:inherit}
svg .soft{fill:var(--soft);font-size:10px}
svg .grid{stroke:var(--line)}
svg rect.s0,svg circle.s0{fill:var(--s0)}svg rect.s1,svg circle.s1{fill:var(--s1)}
svg rect.s2,svg circle.s2{fill:var(--s2)}
svg path.s0{stroke:var(--s0)}svg path.s1{stroke:var(--s1)}svg path.s2{stroke:var(--s2)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;padding:0;margin:.5rem 0 1rem;
font-size:.875rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend i{width:.85rem;height:.85rem;border-radius:2px;flex:none;border:1px solid rgba(128,128,128,.5)}
.legend i.s0{background:var(--s0)}.legend i.s1{background:var(--s1)}.legend i.s2{background:var(--s2)}
details{margin:1rem 0}summary{cursor:pointer}
pre{background:var(--panel);border-radius:4px;padding:.9rem 1rem;overflow-x:auto;font-size:.85rem;line-height:1.55}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.3rem 1.25rem;margin:.5rem 0;
font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:40rem){main{padding:1.5rem 1rem 3rem}th,td{padding:.45rem .2rem;font-size:.84rem}
thead th{white-space:normal;font-size:.75rem}td small{font-size:.7rem;white-space:normal;line-height:1.35}
th:first-child,td:first-child{min-width:4.5rem}}
@media print{main{padding:0}.scroll{overflow:visible}}
""".strip().replace("\n", "")


def absent(value: float | None) -> bool:
    """Whether a value is missing: None, NaN or infinite."""
    return value is None or not math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as percent, `n/a` for one that is missing."""
    return "n/a" if absent(value) else f"{100 * value:.{digits}f} %"


def points(difference: float | None) -> str:
    """A difference of fractions in signed percentage points, without the unit."""
    if absent(difference):
        return "n/a"
    # Adding 0 turns a rounded -0.0 into 0.0.
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def quantity(value: float | None, unit: str = "") -> str:
    """A count with three significant digits and a suffix: 2_780_000 -> `2.78 M`."""
    if absent(value):
        return "n/a"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_digits(value / size)} {suffix}{unit}"
    return f"{_digits(value)} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds as milliseconds, seconds, or minutes and seconds."""
    if absent(seconds):
        return "n/a"
    if seconds < 1:
        return f"{_digits(1000 * seconds)} ms"
    if seconds < 100:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest, largest and sample standard deviation (0 for a single value)."""
    numbers = np.asarray(values, dtype=np.float64)
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
    return {
        "mean": float(numbers.mean()),
        "min": float(numbers.min()),
        "max": float(numbers.max()),
        "std": deviation,
    }


def gains(runs: Sequence[dict[str, Any]]) -> list[float]:
    """What distillation added to the student's mIoU, seed by seed."""
    return [distilled - alone for alone, distilled in zip(runs[1]["miou"], runs[2]["miou"])]


def _fewer(teacher: float | None, value: float | None, less: str, more: str) -> str:
    if absent(teacher) or absent(value) or not teacher or not value:
        return ""
    ratio = teacher / value
    factor = max(ratio, 1 / ratio)
    shown = (
        f"{factor:.2f}" if factor < 1.095 else f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"
    )
    if shown == "1.00":
        return "the same"
    return f"{shown}× {less if ratio > 1 else more}"


def summary_table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The results table: its header, and rows of (value, remark) with remarks relative to the first run."""
    teacher = runs[0]
    rows = []
    for run in runs:
        first = run is teacher
        stats = spread(run["miou"])
        remark = ""
        if len(run["miou"]) > 1:
            remark = (
                f"{100 * stats['min']:.1f}–{100 * stats['max']:.1f}, sd {100 * stats['std']:.1f}"
            )
        elif not first:
            remark = f"{points(stats['mean'] - spread(teacher['miou'])['mean'])} points"
        rows.append(
            [
                (run["label"], ""),
                (percent(stats["mean"]), remark),
                (
                    quantity(run["parameters"]),
                    "" if first else _fewer(teacher["parameters"], run["parameters"], "fewer", "more"),
                ),
                (
                    quantity(run["macs"]),
                    "" if first else _fewer(teacher["macs"], run["macs"], "fewer", "more"),
                ),
                (
                    duration(run["latency"]),
                    "" if first else _fewer(teacher["latency"], run["latency"], "faster", "slower"),
                ),
            ]
        )  # fmt: skip
    return ["Network", "mIoU", "Parameters", "MACs", "Latency"], rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """The same table for a terminal: first column left, the others right."""
    cells = [list(header)] + [
        [f"{value} ({remark})" if remark else value for value, remark in row] for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def headline(runs: Sequence[dict[str, Any]]) -> str:
    """What distillation bought, in one sentence that does not flatter."""
    teacher, alone, distilled = (spread(run["miou"])["mean"] for run in runs)
    gain = 100 * (distilled - alone)
    change = (
        f"from {percent(alone)} to {percent(distilled)} mIoU ({points(distilled - alone)} points"
    )
    if len(runs[2]["miou"]) > 1:
        change += f", mean of {len(runs[2]['miou'])} seeds"
    if abs(gain) < 0.05:
        sentence = f"Distillation left the student where it was, at {percent(distilled)} mIoU"
    elif gain > 0:
        share = (distilled - alone) / (teacher - alone) if teacher > alone else 0.0
        if 0 < share < 0.995:
            change += f", {100 * share:.0f} % of the way to its teacher"
        sentence = f"Distillation lifted the student {change})"
    else:
        sentence = f"Distillation did not help: the student went {change})"
    facts = [
        fact
        for fact in (
            _fewer(
                runs[0]["parameters"], runs[2]["parameters"], "fewer parameters", "more parameters"
            ),
            _fewer(
                runs[0]["latency"], runs[2]["latency"], "less time per scan", "more time per scan"
            ),
        )
        if fact and fact != "the same"
    ]
    return f"{sentence}, with {' and '.join(facts)} than the teacher." if facts else f"{sentence}."


def html_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str | tuple[str, str]]],
    caption: str,
    css: str = "",
) -> str:
    """A table with a caption, column and row headers; a cell is a text, or (text, smaller remark)."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for row in rows:
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
        filled = [
            escape(text) + (f" <small>{escape(remark)}</small>" if remark else "")
            for text, remark in pairs
        ]
        first, *others = filled
        body.append(
            f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in others) + "</tr>"
        )
    kind = f' class="{escape(css)}"' if css else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def bars_svg(
    names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], title: str
) -> str:
    """Grouped horizontal bars, one group per name, one bar per series; values in [0, 1].

    A missing value is a gap with the words `n/a`.
    """
    left, full, bar, gap = 94.0, 226.0, 9.0, 9.0
    group = bar * len(series) + gap
    width, height = 360.0, group * len(names) + 22
    body = []
    for tick in (0, 25, 50, 75, 100):
        x = left + full * tick / 100
        body.append(
            f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="0" y2="{height - 18:g}" stroke="#ccc"/>'
            f'<text class="soft" x="{x:g}" y="{height - 5:g}" text-anchor="middle" font-size="10">{tick} %</text>'
        )
    for row, name in enumerate(names):
        top = row * group + gap / 2
        middle = top + bar * len(series) / 2
        body.append(
            f'<text x="{left - 8:g}" y="{middle + 4:g}" text-anchor="end" font-size="12">{escape(str(name))}</text>'
        )
        for index, (label, values) in enumerate(series):
            value, y = values[row], top + index * bar
            text = percent(value)
            length = 0.0 if absent(value) else full * min(max(value, 0.0), 1.0)
            if not absent(value):
                body.append(
                    f'<rect class="s{index}" x="{left:g}" y="{y + 0.5:g}" width="{length:.2f}" '
                    f'height="{bar - 1:g}" fill="{SERIES_COLORS[index % 3]}">'
                    f"<title>{escape(f'{name}, {label}: {text}')}</title></rect>"
                )
            body.append(
                f'<text class="soft" x="{left + length + 4:.2f}" y="{y + bar - 1:g}" font-size="9" '
                f'style="font-size:9px">{text.removesuffix(" %")}</text>'
            )
    return _svg(width, height, title, body)


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * 1.0001)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def curves_svg(
    series: Sequence[tuple[str, Sequence[Sequence[tuple[float, float | None]]]]],
    title: str,
    as_percent: bool = False,
) -> str:
    """Lines over epochs; a series is (label, lines), a line is a list of (epoch, value).

    Missing values break a line; a lone value is a dot; without any value the frame says so.
    """
    width, height, left, right, top, bottom = 360.0, 216.0, 42.0, 12.0, 10.0, 34.0
    points = [
        (x, y) for _, lines in series for line in lines for x, y in line if not absent(y)
    ]  # fmt: skip
    if not points:
        return _svg(
            width,
            height,
            f"{title}: nothing was logged",
            [
                f'<text class="soft" x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle" '
                'font-size="12">nothing was logged</text>'
            ],
        )
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)
    x1 = x1 if x1 > x0 else x0 + 1
    y1 = y0 + (y1 - y0) * 1.06 if y1 > y0 else y0 + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    body = []
    for tick in _ticks(y0, y1, 4):
        _, y = place(x0, tick)
        shown = f"{100 * tick:.0f} %" if as_percent else f"{tick:.3g}"
        body.append(
            f'<line class="grid" x1="{left:g}" x2="{width - right:g}" y1="{y:.2f}" y2="{y:.2f}" stroke="#ccc"/>'
            f'<text class="soft" x="{left - 6:g}" y="{y + 3.5:.2f}" text-anchor="end" font-size="10">{shown}</text>'
        )
    for tick in _ticks(min(xs), max(xs), 6, whole=True):
        x, _ = place(tick, y0)
        body.append(
            f'<text class="soft" x="{x:.2f}" y="{height - bottom + 14:g}" text-anchor="middle" '
            f'font-size="10">{tick:g}</text>'
        )
    body.append(
        f'<text class="soft" x="{(left + width - right) / 2:g}" y="{height - 4:g}" text-anchor="middle" '
        'font-size="10">epoch</text>'
    )
    # Dashed lines come last, so that of two equal ones both are seen.
    for index in sorted(range(len(series)), key=lambda i: bool(DASHES[i % 3])):
        label, lines = series[index]
        color, look = SERIES_COLORS[index % 3], f"s{index}"
        for line in lines:
            for piece in _pieces(line):
                places = [place(x, y) for x, y in piece]
                name = f"<title>{escape(label)}</title>"
                if len(places) == 1:
                    ((x, y),) = places
                    body.append(
                        f'<circle class="{look}" cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{color}">{name}</circle>'
                    )
                    continue
                dash = DASHES[index % 3]
                body.append(
                    f'<path class="{look}" d="M{"L".join(f"{x:.2f} {y:.2f}" for x, y in places)}" fill="none" '
                    f'stroke="{color}" stroke-width="{WIDTHS[index % 3]}" stroke-linejoin="round"'
                    + (f' stroke-dasharray="{dash}"' if dash else "")
                    + f">{name}</path>"
                )
    ends = [
        f"{label} {percent(last) if as_percent else f'{last:.3g}'}"
        for label, lines in series
        for last in [next((y for line in lines for _, y in reversed(line) if not absent(y)), None)]
        if last is not None
    ]
    return _svg(width, height, f"{title}; at the end: {', '.join(ends)}", body)


def _pieces(line: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """A line cut where values are missing."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in line:
        if absent(y):
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _picture(png: bytes, name: str, remark: str, alt: str) -> str:
    encoded = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">'
        f"<figcaption><b>{escape(name)}</b> {escape(remark)}</figcaption></figure>"
    )


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><i aria-hidden="true" {look}></i>{escape(name)}</li>' for name, look in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _series_legend(runs: Sequence[dict[str, Any]]) -> str:
    return _legend((run["label"], f'class="s{index}"') for index, run in enumerate(runs))


def _scan_section(
    scan: dict[str, Any], runs: Sequence[dict[str, Any]], names: Sequence[str], colors: np.ndarray
) -> str:
    coord, truth = np.asarray(scan["coord"]), np.asarray(scan["segment"])
    known = truth >= 0
    pictures = [
        _picture(
            birdseye_png(coord, truth, colors),
            "Ground truth",
            "",
            f"Bird's-eye view of scan {scan['name']}, coloured by its true classes",
        )
    ]
    errors = []
    for run, prediction in zip(runs, scan["predictions"]):
        prediction = np.asarray(prediction)
        wrong = (prediction != truth)[known]
        right = percent(1 - float(wrong.mean()) if len(wrong) else None)
        pictures.append(
            _picture(
                birdseye_png(coord, prediction, colors),
                run["label"],
                f"{right} of points right",
                f"Bird's-eye view of the same scan, coloured by the classes that the {run['label']} network "
                f"predicts; {right} of the points are right",
            )
        )
        errors.append(
            _picture(
                birdseye_png(coord[known], wrong.astype(np.int64), RIGHT_WRONG, priority=wrong),
                run["label"],
                f"{int(wrong.sum()):,} of {len(wrong):,} points wrong",
                f"Bird's-eye view of the errors of the {run['label']} network: "
                f"{int(wrong.sum())} of {len(wrong)} points",
            )
        )
    seen = np.unique(np.concatenate([truth[known], *(np.asarray(p) for p in scan["predictions"])]))
    entries = [(str(names[k]), _swatch(colors[k])) for k in seen if 0 <= k < len(names)]
    if not known.all():
        entries.append(("not labelled", _swatch(IGNORED)))
    return (
        '<section aria-labelledby="seen"><h2 id="seen">What the networks see</h2>'
        f'<p class="soft">Validation scan {escape(str(scan["name"]))}, 50 × 50 m around the sensor (white cross); '
        "forward is up. What is higher covers what is lower.</p>"
        f'{_legend(entries)}<div class="pictures">{"".join(pictures)}</div><h3>Errors</h3>'
        f"{_legend([('right', _swatch(RIGHT_WRONG[0])), ('wrong', _swatch(RIGHT_WRONG[1]))])}"
        f'<div class="errors">{"".join(errors)}</div></section>'
    )


def _swatch(color: Sequence[int]) -> str:
    return 'style="background:rgb({},{},{})"'.format(*(int(c) for c in color))


def _class_section(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    half = (len(names) + 1) // 2
    bars = "".join(
        bars_svg(
            names[part],
            [(run["label"], run["iou"][part]) for run in runs],
            f"IoU per class, {number} of 2; the table below has the same numbers",
        )
        for number, part in enumerate((slice(0, half), slice(half, None)), start=1)
        if names[part]
    )
    table = html_table(
        ["Class", *(run["label"] for run in runs), "Distillation, points"],
        [
            [
                str(name),
                *(percent(run["iou"][k]) for run in runs),
                "n/a"
                if absent(runs[1]["iou"][k]) or absent(runs[2]["iou"][k])
                else points(runs[2]["iou"][k] - runs[1]["iou"][k]),
            ]
            for k, name in enumerate(names)
        ],
        "IoU per class on the validation scans",
    )
    return (
        '<section aria-labelledby="classes"><h2 id="classes">Class by class</h2>'
        '<p class="soft">Intersection over union on the validation scans. n/a: neither the labels nor the '
        "predictions contain the class.</p>"
        f'{_series_legend(runs)}<div class="pair">{bars}</div>'
        f"<details><summary>The same as a table</summary>{table}</details></section>"
    )


def _curve_section(runs: Sequence[dict[str, Any]]) -> str:
    loss = curves_svg([(run["label"], run["loss"]) for run in runs], "Training loss per epoch")
    miou = curves_svg(
        [(run["label"], run["val_miou"]) for run in runs],
        "Validation mIoU per epoch",
        as_percent=True,
    )
    return (
        '<section aria-labelledby="training"><h2 id="training">Training</h2>'
        f'{_series_legend(runs)}<div class="pair">'
        f"<figure>{loss}<figcaption><b>Training loss</b> What each run minimises; the distilled student's "
        "includes its distillation terms, so compare shapes, not heights.</figcaption></figure>"
        f"<figure>{miou}<figcaption><b>Validation mIoU</b> Measured after every epoch.</figcaption></figure>"
        "</div></section>"
    )


def build_report(data: dict[str, Any]) -> str:
    """The whole page as text; see the top of this file for `data`."""
    runs, names = data["runs"], list(data["classes"])
    colors = np.asarray(data["colors"])
    header, rows = summary_table(runs)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in data["notes"])
    scan = data.get("scan")
    parts = [
        f"<h1>{escape(data['title'])}</h1>",
        # No line may begin with the sign of a number that ended the one before.
        f'<p class="lead">{escape(headline(runs)).replace(" %", "&nbsp;%")}</p>',
        html_table(header, rows, "Teacher, student trained alone, and distilled student", "main"),
        notes,
        _class_section(runs, names),
        _scan_section(scan, runs, names, colors) if scan else "",
        _curve_section(runs),
        '<section aria-labelledby="again"><h2 id="again">How it was made</h2>'
        '<pre tabindex="0" aria-label="Commands"><code>'
        f"{escape(chr(10).join(data['commands']))}</code></pre><dl>",
        "".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in data["environment"]
        ),
        "</dl></section>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(data['title'])}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(part for part in parts if part)}</main></body></html>\n"
    )


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it, so that no reader sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
