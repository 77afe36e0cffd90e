"""The report page as a browser shows it: Chromium opens the written file."""

import pytest
from browsing import (
    WIDE,
    both_schemes,
    both_widths,
    browser,  # noqa: F401
    check_charts,
    check_contrast,
    check_quiet,
    check_width,
    each,
    opened,
)
from test_page import HOSTILE, results, sample

from mllm_align.report.page import Marked
from mllm_align.testbed.report.page import Example, Report, write

pytestmark = pytest.mark.browser


@pytest.fixture
def show(browser, tmp_path):  # noqa: F811
    """Open a report; what the page logs and asks for is kept beside it."""

    def shown(report, width=WIDE, scheme="light"):
        write(report, tmp_path / "report.html")
        return opened(browser, tmp_path / "report.html", width, scheme)

    return shown


def test_page_is_quiet_and_asks_for_nothing(show):
    with show(sample()) as shown:
        check_quiet(shown)


def test_a_request_or_an_error_would_be_noticed(show, tmp_path):
    page = """<title>t</title><img src="http://127.0.0.1:9/x.png"><script>nothing()</script>"""
    with show(sample()) as shown:
        (tmp_path / "report.html").write_text(page)
        shown.page.reload(wait_until="networkidle")
        assert "http://127.0.0.1:9/x.png" in shown.requests
        assert any("nothing is not defined" in text for text in shown.logged)


def test_pictures_are_shown_enlarged_and_sharp(show):
    with show(sample()) as shown:
        sizes = each(shown, "img", "[e.complete, e.naturalWidth, e.clientWidth, e.clientHeight]")
        styles = each(shown, "img", "[style.imageRendering, e.alt]")
    assert sizes == [[True, 64, 192, 192], [True, 96, 192, 64], [True, 32, 64, 192]]
    assert styles == [["pixelated", f"Picture: {sample().examples[0].truth}"]] * 3


@both_widths
def test_main_table_has_its_numbers(show, width):
    with show(sample(), width) as shown:
        heads = each(shown, "#result thead th", "[e.textContent, e.scope]")
        texts = each(shown, "#result tbody td:not(.n)", "e.innerText.split(/\\s+/).join(' ').trim()")
        boxes = each(shown, "#result tbody td:not(.n)", "[box.width, box.left, box.right]")
    assert heads == [
        [head, "col"] for head in ("Measure", "beforeSFT", "controlfurther SFT", "afteraligned", "n")
    ]
    models = [results()[model] for model in ("sft", "sft_control", "aligned")]
    expected = []
    for name in models[0]:
        for value in (model[name] for model in models):
            scale, unit = (1, "") if name == "words" else (100, "%")
            mean, low, high = (f"{scale * value[end]:.1f}" for end in ("mean", "low", "high"))
            better = " better" if value["mean"] in (0.148, 0.296) else ""
            expected.append(f"{mean}{unit} [{low}, {high}]{better}")
    assert texts == expected
    assert all(wide > 50 and left >= 0 and right <= width for wide, left, right in boxes)


def test_other_tables_have_their_numbers(show):
    with show(sample()) as shown:
        rows = {id: each(shown, f"#{id} tr", "e.innerText.split(/\\s+/).join(' ').trim()") for id in PLAIN}
    assert rows == PLAIN


PLAIN = {
    "seconds": ["Phase Time", "sft 212.4 s", "make pairs 61.0 s"],
    "settings": ["seed 0", "noise –", "beta 0.1", "learning_rate 0.0005"],
}


@both_widths
def test_charts_have_size_and_hold_what_they_draw(show, width):
    with show(sample(), width) as shown:
        check_charts(shown, 4)


@both_schemes
def test_marks_are_seen(show, scheme):
    with show(sample(), scheme=scheme) as shown:
        marks = each(shown, "dd mark", "[e.textContent, box.width, box.height, style.backgroundColor]")
        cards = each(shown, ".card", "style.backgroundColor")
        underlined = each(shown, "dd u", "[e.textContent, style.textDecorationLine]")
    assert [text for text, *_ in marks] == ["star"] * 5
    for _, wide, high, colour in marks:
        assert wide > 10 and high > 10 and colour not in ("rgba(0, 0, 0, 0)", *cards)
    assert "".join(text for text, _ in underlined) == "moon stands beside a large blue star."
    assert {line for _, line in underlined} == {"underline"}


@both_widths
def test_nothing_is_wider_than_the_window(show, width):
    long, full = "w" * 300, sample()
    example = Example(long, full.examples[0].png, long, long, after=Marked(long, ((5, 9),)))
    wide = Report(long, [long], [(long, long)], results(), full.curves, (), [example], {long: {long: long}})
    for report in (full, wide):
        with show(report, width) as shown:
            check_width(shown, width)


@both_schemes
def test_all_text_stands_out(show, scheme):
    with show(sample(), scheme=scheme) as shown:
        check_contrast(shown, scheme, least=100)


def test_hostile_text_does_nothing(show):
    said = Marked(HOSTILE, ((2, 20),))
    example = Example(HOSTILE, sample().examples[0].png, HOSTILE, HOSTILE, after=said)
    report = Report(HOSTILE, [HOSTILE], results=results(), examples=[example], settings={HOSTILE: HOSTILE})
    with show(report) as shown:
        assert shown.page.title() == shown.page.inner_text("h1") == HOSTILE
        assert shown.page.inner_text("dd >> nth=1") == HOSTILE
        assert shown.page.evaluate("[document.scripts.length, document.images.length]") == [0, 1]
        assert shown.logged == [] and all(url.startswith(("file:", "data:")) for url in shown.requests)
