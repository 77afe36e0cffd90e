"""Two small charts as inline SVG; the page's style sheet sets colours and fonts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Dot:
    """One mean and its interval (NaN if missing); `style`: a class of the style sheet."""

    name: str
    style: str
    mean: float
    low: float
    high: float


def ticks(low: float, high: float, max_count: int = 6) -> list[float]:
    """Return about `max_count` round numbers at most, from `low` to `high`, which must differ."""
    size = 10.0 ** math.floor(math.log10((high - low) / max_count))
    step = next(k * size for k in (1, 2, 5, 10, 20) if k * size * max_count >= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def spans(panels: Sequence[Sequence[Dot]]) -> list[tuple[float, float]]:
    """Return each panel's range in percent, all of equal length, so that the panels share one scale."""
    ends = [
        [v for dot in dots for v in (dot.mean, dot.low, dot.high) if math.isfinite(v)] for dots in panels
    ]
    length = min(100.0, max(1.0, 1.3 * max((max(v) - min(v) for v in ends), default=0)))
    starts = [(max(values) + min(values) - length) / 2 for values in ends]
    starts = [min(max(0.0, start), 100.0 - length) for start in starts]
    return [(start, start + length) for start in starts]


def intervals(dots: Sequence[Dot], low: float, high: float, label: str) -> str:
    """Draw dots with intervals, in percent, one below the other; each dot needs a finite mean."""
    left, right, top, row = 72.0, 404.0, 8.0, 42.0
    bottom = top + row * len(dots)
    svg = _svg(440, bottom + 26, label)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for tick in ticks(low, high):
        _add(svg, "line", class_="grid", x1=x(tick), x2=x(tick), y1=top, y2=bottom)
        _add(svg, "text", _short(tick) + "%", class_="tick middle", x=x(tick), y=bottom + 18)
    for i, dot in enumerate(dots):
        y = top + row * i + 28
        _add(svg, "text", dot.name, class_="name", x=0, y=y + 4)
        if math.isfinite(dot.low) and math.isfinite(dot.high):
            x1, x2 = x(max(dot.low, low)), x(min(dot.high, high))
            _add(svg, "line", class_=f"reach {dot.style}", x1=x1, x2=x2, y1=y, y2=y)
        _add(svg, "circle", class_=f"dot {dot.style}", cx=x(dot.mean), cy=y, r=5.5)
        _add(svg, "text", f"{dot.mean:.1f}%", class_="value middle", x=x(dot.mean), y=y - 12)
    return tostring(svg, encoding="unicode")


def lines(series: Iterable[Sequence[Point]], x_label: str, y_label: str, label: str) -> str:
    """Draw one line per series, in the styles `c0` to `c5` cyclically; "" if no point is finite.

    A line has gaps where a value is missing or not finite.
    """
    pieces = [_pieces(points) for points in series]
    points = [point for runs in pieces for run in runs for point in run]
    if not points:
        return ""
    (x_low, x_high), (y_low, y_high) = (_range(values) for values in zip(*points, strict=True))
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(y_low, y_high)
    # Room for whole tick labels, those of y before the axis and half the last one of x behind it.
    left = max(44.0, 12 + max(map(_width, y_ticks)))
    right = min(432.0, 438 - _width(x_ticks[-1]) / 2)
    top, bottom = 26.0, 196.0
    svg = _svg(440, 240, label)

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    for tick in y_ticks:
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick))
        _add(svg, "text", _short(tick), class_="tick end", x=left - 8, y=y(tick) + 4)
    for tick in x_ticks:
        _add(svg, "text", _short(tick), class_="tick middle", x=x(tick), y=bottom + 18)
    _add(svg, "text", y_label, class_="axis", x=0, y=12)
    _add(svg, "text", x_label, class_="axis end", x=right, y=bottom + 38)
    for i, runs in enumerate(pieces):
        for run in runs:
            if len(run) == 1:
                _add(svg, "circle", class_=f"dot c{i % 6}", cx=x(run[0][0]), cy=y(run[0][1]), r=3)
            else:
                path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in run)
                _add(svg, "polyline", class_=f"curve c{i % 6}", points=path)
    return tostring(svg, encoding="unicode")


def _pieces(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return the runs of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b):
            runs[-1].append((float(a), float(b)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis; they differ even if all values are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    return low, high


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _width(tick: float) -> float:
    """An upper bound of a tick label's width in the style sheet's font."""
    return 7.0 * len(_short(tick))


def _svg(width: float, height: float, label: str) -> Element:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return Element("svg", {**size, "role": "img", "aria-label": label})


def _add(parent: Element, tag: str, text: str = "", **attributes: str | float) -> None:
    named = {key.rstrip("_"): v if isinstance(v, str) else f"{v:.1f}" for key, v in attributes.items()}
    SubElement(parent, tag, named).text = text
