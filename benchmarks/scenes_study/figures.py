"""The studies' figures, as self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from mllm_align.evaluation.intervals import Interval
from mllm_align.report.charts import ticks

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.mark{fill:#2563a8}.reach{stroke:#2563a8;stroke-width:2;"
    "stroke-opacity:.5}.grid{stroke:#ddd}.curve{fill:none;stroke:#2563a8;stroke-width:1.5}"
)


def ranges(points: Sequence[tuple[str, Interval]], label: str) -> str:
    """One line under the other: name, mean, interval, in percent. Intervals that leave the axis are cut."""
    left, right, top, row = 180.0, 620.0, 10.0, 24.0
    bottom = top + row * len(points)
    svg = _svg(680, bottom + 44, label)
    high = _ceiling([interval for _, interval in points])

    def x(value: float) -> float:
        return left + min(max(value, 0.0), high) / high * (right - left)

    for tick in ticks(0.0, high):
        _add(svg, "line", class_="grid", x1=x(tick), x2=x(tick), y1=top, y2=bottom)
        _add(svg, "text", f"{tick:g}", x=x(tick), y=bottom + 16, text_anchor="middle")
    for i, (name, interval) in enumerate(points):
        y, mean = top + row * (i + 0.5), 100 * interval.mean
        _add(svg, "text", name, x=left - 10, y=y + 4, text_anchor="end")
        if not math.isnan(interval.low):
            _add(
                svg, "line", class_="reach", x1=x(100 * interval.low), x2=x(100 * interval.high), y1=y, y2=y
            )
        _add(svg, "circle", class_="mark", cx=x(mean), cy=y, r=4.5)
        _add(svg, "text", f"{mean:.1f}", x=right + 12, y=y + 4)
    _add(svg, "text", label, x=(left + right) / 2, y=bottom + 36, text_anchor="middle")
    return _text(svg)


def scatter(points: Sequence[tuple[str, Interval, Interval]], across: str, up: str) -> str:
    """Means in percent, named."""
    left, right, top, bottom = 60.0, 560.0, 20.0, 360.0
    svg = _svg(760, 410, f"{up} against {across}")
    (x_low, x_high), (y_low, y_high) = (_around([100 * p[i].mean for p in points]) for i in (1, 2))

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    for tick in ticks(x_low, x_high):
        _add(svg, "line", class_="grid", x1=x(tick), x2=x(tick), y1=top, y2=bottom)
        _add(svg, "text", f"{tick:g}", x=x(tick), y=bottom + 16, text_anchor="middle")
    for tick in ticks(y_low, y_high):
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick))
        _add(svg, "text", f"{tick:g}", x=left - 8, y=y(tick) + 4, text_anchor="end")
    for _, chair, recall in points:
        _add(svg, "circle", class_="mark", cx=x(100 * chair.mean), cy=y(100 * recall.mean), r=4.5)
    for name, place, height in _apart([(n, x(100 * c.mean), y(100 * r.mean)) for n, c, r in points]):
        _add(svg, "text", name, x=place + 8, y=height + 4)
    _add(svg, "text", across, x=(left + right) / 2, y=bottom + 38, text_anchor="middle")
    _add(svg, "text", up, x=8, y=12)
    return _text(svg)


def curves(series: Mapping[str, Sequence[tuple[int, Interval]]], across: str, up: str) -> str:
    """A line of means with intervals, in percent, for each name; numbers across on a logarithmic scale."""
    left, right, top, bottom = 60.0, 560.0, 30.0, 330.0
    svg = _svg(700, 380, f"{up} over {across}")
    numbers = sorted({n for points in series.values() for n, _ in points})
    high = _ceiling([interval for points in series.values() for _, interval in points])
    first, last = math.log(numbers[0]), math.log(numbers[-1])

    def x(number: float) -> float:
        return left + (math.log(number) - first) / ((last - first) or 1.0) * (right - left)

    def y(value: float) -> float:
        return bottom - min(max(value, 0.0), high) / high * (bottom - top)

    for number in numbers:
        _add(svg, "line", class_="grid", x1=x(number), x2=x(number), y1=top, y2=bottom)
        _add(svg, "text", f"{number:,}", x=x(number), y=bottom + 16, text_anchor="middle")
    for tick in ticks(0.0, high):
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick))
        _add(svg, "text", f"{tick:g}", x=left - 8, y=y(tick) + 4, text_anchor="end")
    for shift, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x(n):.1f},{y(100 * each.mean):.1f}" for n, each in points)
        dashes = {"stroke_dasharray": "6 4"} if shift else {}
        _add(svg, "polyline", class_="curve", points=path, **dashes)
        for n, each in points:
            at = x(n) + 4 * shift  # intervals of two lines stand side by side
            if not math.isnan(each.low):
                ends = {"y1": y(100 * each.low), "y2": y(100 * each.high)}
                _add(svg, "line", class_="reach", x1=at, x2=at, **ends)
            _add(svg, "circle", class_="mark", cx=x(n), cy=y(100 * each.mean), r=4.5)
        number, each = points[-1]
        _add(svg, "text", name, x=x(number) + 10, y=y(100 * each.mean) + 4)
    _add(svg, "text", across, x=(left + right) / 2, y=bottom + 38, text_anchor="middle")
    _add(svg, "text", up, x=8, y=14)
    return _text(svg)


def _apart(names: list[tuple[str, float, float]], gap: float = 12.0) -> list[tuple[str, float, float]]:
    """Names moved down until none lies over another."""
    placed: list[tuple[str, float, float]] = []
    for name, x, y in sorted(names, key=lambda each: each[2]):
        while any(abs(x - a) < 150 and abs(y - b) < gap for _, a, b in placed):
            y += 2
        placed.append((name, x, y))
    return placed


def _ceiling(intervals: Sequence[Interval]) -> float:
    """Where the axis ends: wide intervals do not squeeze the means."""
    most = max(100 * interval.mean for interval in intervals)
    ends = [100 * i.high for i in intervals if not math.isnan(i.high)]
    return max(1.0, min(max([*ends, most]), 2 * most) * 1.05)


def _around(values: Sequence[float]) -> tuple[float, float]:
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _svg(width: float, height: float, label: str) -> Element:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    svg = Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "role": "img", "aria-label": label}
    )
    SubElement(svg, "style").text = STYLE
    SubElement(svg, "rect", {"width": f"{width:g}", "height": f"{height:g}", "fill": "#fff"})
    return svg


def _add(parent: Element, tag: str, text: str = "", **attributes: str | float) -> None:
    named = {
        k.rstrip("_").replace("_", "-"): v if isinstance(v, str) else f"{v:.1f}"
        for k, v in attributes.items()
    }
    SubElement(parent, tag, named).text = text or None


def _text(svg: Element) -> str:
    return tostring(svg, encoding="unicode") + "\n"
