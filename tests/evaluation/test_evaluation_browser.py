"""The page of an evaluation as a browser shows it."""

import pytest
from browsing import (
    both_schemes,
    both_widths,
    browser,  # noqa: F401
    check_legible,
    check_width,
    each,
    opened,
)
from test_evaluation_page import sample

from mllm_align.evaluation.page import write_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of three models, and of one."""
    place = tmp_path_factory.mktemp("pages")
    found = sample(place)
    write_page(found, place / "three.html")
    write_page({"base": found["base"]}, place / "one.html")
    return place / "three.html", place / "one.html"


@both_schemes
def test_it_is_quiet_and_legible(files, browser, scheme):  # noqa: F811
    check_legible(browser, files, scheme)


@both_widths
def test_nothing_is_cut_off_and_columns_stand_below_each_other(files, browser, width):  # noqa: F811
    for file in files:
        with opened(browser, file, width) as shown:
            check_width(shown, width)
            cells = each(shown, "td.number:not(.n)", "[e.scrollWidth, e.clientWidth]")
            assert cells and all(inside <= wide for inside, wide in cells)
            rows = shown.page.locator("#result tbody tr")
            edges = {
                tuple(
                    round(box["x"])
                    for box in (cell.bounding_box() for cell in row.locator("td:not(.n)").all())
                )
                for row in rows.all()
            }
            assert len(edges) == 1


def test_pictures_and_marks_are_seen(files, browser):  # noqa: F811
    with opened(browser, files[0]) as shown:
        pictures = each(shown, "img", "[e.complete, e.naturalWidth, e.clientWidth, e.clientHeight]")
        marks = each(shown, "dd mark", "[e.textContent, box.width > 10, style.backgroundColor]")
    assert len(pictures) == 12
    assert all(done and natural == 480 and wide > 150 < high * 2 for done, natural, wide, high in pictures)
    assert {text for text, *_ in marks} == {"Mugs", "cup"} and all(wide for _, wide, _ in marks)
    assert "rgba(0, 0, 0, 0)" not in {colour for *_, colour in marks}
