"""Charts as SVG: marks stand where the numbers are, and every axis is sound."""

import math
import re
from xml.etree import ElementTree

import pytest

from mllm_align.report import charts
from mllm_align.report.charts import Dot, intervals, lines, spans, ticks

NAN = math.nan


def elements(svg, tag, style=""):
    """Attributes, as numbers where they are some, of the elements of a tag and class."""
    found = []
    for each in ElementTree.fromstring(svg).iter(tag):
        if style in each.get("class", "").split() or not style:
            numbers = {k: float(v) if re.fullmatch(r"-?[\d.]+", v) else v for k, v in each.items()}
            found.append(numbers | {"text": each.text})
    return found


def scale(marks, axis):
    """(value -> place) by the tick labels of an axis, which are apart from the marks."""
    (first, last) = marks[0], marks[-1]

    def number(mark):
        return float(mark["text"].rstrip("%").replace("−", "-"))

    slope = (last[axis] - first[axis]) / (number(last) - number(first))
    return lambda value: first[axis] + slope * (value - number(first))


# ---- ticks and ranges --------------------------------------------------------------------------------


def test_ticks_are_round_and_inside():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(-0.13, 0.11) == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1])
    for low, high in ((0, 1e-7), (1e6, 1e6 + 3), (-5, 99999), (3, 3.3)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-12)


def test_charts_of_shares_have_one_scale():
    def dots(*means):
        return [Dot("a", "sft", mean, mean - 2, mean + 2) for mean in means]

    ranges = spans([dots(15, 31), dots(67, 69), dots(1)])
    assert {round(high - low, 6) for low, high in ranges} == {26.0}
    assert all(low >= 0 and high <= 100 for low, high in ranges)
    assert spans([dots(0, 100)]) == [(0, 100)]
    assert spans([]) == []


def test_a_range_holds_all_dots_and_their_intervals():
    """1.3 times the widest, in its middle; intervals that are missing do not count."""
    (first, second) = spans([[Dot("a", "s", 50, 40, 60)], [Dot("b", "s", 30, NAN, NAN)]])
    assert first == pytest.approx((37, 63)) and second == pytest.approx((17, 43))


# ---- dots with intervals -----------------------------------------------------------------------------


def test_dots_stand_at_their_means():
    dots = [Dot("before", "sft", 30, 25, 35), Dot("after", "aligned", 10, NAN, NAN)]
    svg = intervals(dots, 5, 45, "CHAIR")
    place = scale(elements(svg, "text", "tick"), "x")
    before, after = elements(svg, "circle")
    assert before["cx"] == pytest.approx(place(30), abs=0.1) and before["class"] == "dot sft"
    assert after["cx"] == pytest.approx(place(10), abs=0.1) and after["cy"] > before["cy"]
    (reach,) = elements(svg, "line", "reach")
    assert (reach["x1"], reach["x2"]) == pytest.approx((place(25), place(35)), abs=0.1)
    assert reach["y1"] == reach["y2"] == before["cy"]
    assert [e["text"] for e in elements(svg, "text", "value")] == ["30.0%", "10.0%"]
    assert [e["text"] for e in elements(svg, "text", "name")] == ["before", "after"]
    assert 'aria-label="CHAIR"' in svg


def test_an_interval_ends_where_the_axis_ends():
    svg = intervals([Dot("a", "sft", 50, -20, 120)], 0, 100, "x")
    (reach,) = elements(svg, "line", "reach")
    grid = [e["x1"] for e in elements(svg, "line", "grid")]
    assert (reach["x1"], reach["x2"]) == (min(grid), max(grid))


# ---- lines -------------------------------------------------------------------------------------------


def points(curve):
    return [tuple(map(float, point.split(","))) for point in curve["points"].split()]


def test_a_line_goes_through_its_points():
    svg = lines([[(0, 1.0), (50, 3.0), (100, -1.0)]], "step", "nats", "loss")
    marks = elements(svg, "text", "tick")
    x = scale([m for m in marks if "middle" in m["class"]], "x")
    up = scale([m for m in marks if "end" in m["class"]], "y")
    (curve,) = elements(svg, "polyline")
    wanted = [(x(a), up(b) - 4) for a, b in ((0, 1), (50, 3), (100, -1))]  # labels stand 4 below
    assert points(curve) == [pytest.approx(point, abs=0.3) for point in wanted]
    assert [e["text"] for e in elements(svg, "text", "axis")] == ["nats", "step"]


@pytest.mark.parametrize(
    "points",
    [[(1, 0.69), (1200, 0.12)], [(0, -1.25e-4), (90000, 1.25e-4)], [(0, 1e30), (1, -1e30)], [(0, 1)]],
)
def test_tick_labels_are_whole(points):
    """At 7 units a character, more than any digit of the page's font takes."""
    svg = lines([points], "step", "nats", "loss")
    for mark in elements(svg, "text", "tick"):
        width = 7 * len(mark["text"])
        left = mark["x"] - (width if "end" in mark["class"] else width / 2)
        assert left >= 0 and left + width <= 440


@pytest.mark.parametrize("gap", [None, NAN, math.inf])
def test_a_line_breaks_where_a_value_is_missing(gap):
    svg = lines([[(0, 1.0), (1, 2.0), (2, gap), (3, 1.0), (4, gap), (5, 1.0), (6, 2.0)]], "x", "y", "l")
    assert [len(points(curve)) for curve in elements(svg, "polyline")] == [2, 2]
    assert len(elements(svg, "circle")) == 1, "a point between two gaps is a dot"


def test_nothing_finite_is_no_chart():
    assert lines([], "x", "y", "l") == lines([[], [(0, NAN), (NAN, 1)]], "x", "y", "l") == ""


@pytest.mark.parametrize(
    "points", [[(0, 1)], [(0, 2.5), (1, 2.5)], [(5, 0), (5, 0)], [(0, 1e30), (1, -1e30)]]
)
def test_flat_lines_are_drawn(points):
    svg = lines([points], "x", "y", "label")
    assert ("polyline" in svg or "circle" in svg) and "nan" not in svg and "inf" not in svg


def test_many_series_take_the_styles_in_turn():
    assert 'class="curve c0"' in lines([[]] * 6 + [[(0, 0), (1, 1)]], "x", "y", "label")


def test_texts_are_escaped():
    svg = intervals([Dot("<b> & 'c'", "sft", 50, NAN, NAN)], 0, 100, '"<&')
    assert elements(svg, "text", "name")[0]["text"] == "<b> & 'c'"
    assert ElementTree.fromstring(svg).get("aria-label") == '"<&'


def test_negative_labels_have_a_minus_sign():
    assert charts._short(-0.5) == "−0.5" and charts._short(1e-7) == "1e−07"
