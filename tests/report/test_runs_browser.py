"""The page of training runs as a browser shows it."""

import pytest
from browsing import (
    both_schemes,
    both_widths,
    browser,  # noqa: F401
    check_charts,
    check_legible,
    check_width,
    each,
    opened,
)
from test_runs import online, whole

from mllm_align.report.runs import write_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of three runs, and of one."""
    place = tmp_path_factory.mktemp("pages")
    runs = [
        whole(place / "dpo-1e-6"),
        online(place / "online"),
        whole(place / "a_run_with_a_long_name" / "x"),
    ]
    write_page(runs, place / "three.html")
    write_page(runs[:1], place / "one.html")
    return place / "three.html", place / "one.html"


@both_schemes
def test_it_is_quiet_and_legible(files, browser, scheme):  # noqa: F811
    check_legible(browser, files, scheme)


@both_widths
def test_charts_are_seen_and_nothing_is_cut_off(files, browser, width):  # noqa: F811
    for file, count in zip(files, (13, 12), strict=True):
        with opened(browser, file, width) as shown:
            check_width(shown, width)
            check_charts(shown, count)
            cells = each(shown, "td.number", "[e.scrollWidth, e.clientWidth]")
            assert cells and all(inside <= wide for inside, wide in cells)


@both_schemes
def test_curves_of_a_chart_have_colours_of_their_own(files, browser, scheme):  # noqa: F811
    with opened(browser, files[0], scheme=scheme) as shown:
        place = "#training figure >> nth=0 >> "
        curves = each(shown, f"{place}polyline", "[style.stroke, style.strokeDasharray, box.width > 50]")
        keys = each(shown, f"{place}.legend line", "[style.stroke, style.strokeDasharray]")
    assert len({colour for colour, *_ in curves}) == 3 and all(wide for *_, wide in curves)
    assert [curve[:2] for curve in curves] == keys
