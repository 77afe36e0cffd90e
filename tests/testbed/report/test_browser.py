"""The report page as a browser shows it: Chromium opens the written file."""

import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from test_page import HOSTILE, results, sample

from mllm_align.report.page import Marked
from mllm_align.testbed.report.page import Example, Report, write

pytestmark = pytest.mark.browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
NARROW, WIDE = 400, 1280

both_widths = pytest.mark.parametrize("width", [NARROW, WIDE])
both_schemes = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def browser():
    """Chromium with a new profile. Where there is none the tests fail: skipped, they would look passed."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.fail(f"none of {', '.join(PROGRAMS)} is on PATH; `apt-get install chromium` installs one")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing; `pip install -e '.[test]'` installs it")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a report; what the page logs and asks for is kept beside it."""

    @contextmanager
    def opened(report, width=WIDE, scheme="light"):
        write(report, tmp_path / "report.html")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        address = (tmp_path / "report.html").as_uri()
        shown = SimpleNamespace(page=page, address=address, logged=[], requests=[])
        page.on("console", lambda message: shown.logged.append(message.text))
        page.on("pageerror", lambda error: shown.logged.append(str(error)))
        page.on("request", lambda request: shown.requests.append(request.url))
        page.goto(address)
        yield shown
        page.close()

    return opened


def each(shown, selector, expression):
    """Evaluate a JavaScript expression about each element `e`, `box` and `style` as they are on screen."""
    body = f"const box = e.getBoundingClientRect(), style = getComputedStyle(e); return {expression};"
    return shown.page.eval_on_selector_all(selector, f"all => all.map(e => {{ {body} }})")


def test_page_is_quiet_and_asks_for_nothing(show):
    with show(sample()) as shown:
        shown.page.wait_for_load_state("networkidle")
        assert shown.requests[0] == shown.address
        assert all(url.startswith("data:") for url in shown.requests[1:])
        assert shown.logged == []


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
    edges = "[box.left, box.right, box.top, box.bottom]"
    with show(sample(), width) as shown:
        charts = each(shown, "svg[role=img]", edges)
        for index, (left, right, top, bottom) in enumerate(charts):
            assert right - left > 250 and bottom - top > 80
            parts = each(shown, f"svg[role=img] >> nth={index} >> text, circle, polyline", edges)
            assert len(parts) > 8
            for one, other, upper, lower in parts:
                assert left - 2 <= one <= other <= right + 2 and top - 2 <= upper <= lower <= bottom + 2
        labels = each(shown, "svg[role=img]", "e.getAttribute('aria-label')")
    assert len(charts) == 4 and all(labels)


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
            assert each(shown, "html", "[e.scrollWidth, e.clientWidth]") == [[width, width]]
            assert all(each(shown, ".scroll", "e.scrollWidth <= e.clientWidth"))


SVG_OR_TEXT = "e instanceof SVGElement ? style.fill : style.color"
OWN_TEXT = "[...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && !e.closest('.unseen')"
GROUND = """(() => {
  let at = e;
  while (at && getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
  return at && getComputedStyle(at).backgroundColor;
})()"""


def luminance(colour):
    parts = [int(v) / 255 for v in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@both_schemes
def test_all_text_stands_out(show, scheme):
    """The contrast that WCAG 2 asks of small text (AA), for each text on the page."""
    with show(sample(), scheme=scheme) as shown:
        found = each(shown, "body *", f"{OWN_TEXT} && [e.textContent.trim(), {SVG_OR_TEXT}, {GROUND}]")
        ground = luminance(each(shown, "body", "style.backgroundColor")[0])
    texts = [entry for entry in found if entry]
    assert ground < 0.05 if scheme == "dark" else ground > 0.9
    assert len(texts) > 100
    for text, ink, behind in texts:
        dark, light = sorted((luminance(ink), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text!r}: {ink} on {behind}"


def test_hostile_text_does_nothing(show):
    said = Marked(HOSTILE, ((2, 20),))
    example = Example(HOSTILE, sample().examples[0].png, HOSTILE, HOSTILE, after=said)
    report = Report(HOSTILE, [HOSTILE], results=results(), examples=[example], settings={HOSTILE: HOSTILE})
    with show(report) as shown:
        assert shown.page.title() == shown.page.inner_text("h1") == HOSTILE
        assert shown.page.inner_text("dd >> nth=1") == HOSTILE
        assert shown.page.evaluate("[document.scripts.length, document.images.length]") == [0, 1]
        assert shown.logged == [] and all(url.startswith(("file:", "data:")) for url in shown.requests)
