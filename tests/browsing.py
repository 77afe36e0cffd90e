"""Chromium, and what a page looks like in it."""

import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

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


@contextmanager
def opened(browser, file, width=WIDE, scheme="light"):
    """Open a page; what it logs and asks for is kept beside it."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown = SimpleNamespace(page=page, address=file.as_uri(), logged=[], requests=[])
    page.on("console", lambda message: shown.logged.append(message.text))
    page.on("pageerror", lambda error: shown.logged.append(str(error)))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.goto(shown.address)
    yield shown
    page.close()


def each(shown, selector, expression):
    """Evaluate a JavaScript expression about each element `e`, `box` and `style` as they are on screen."""
    body = f"const box = e.getBoundingClientRect(), style = getComputedStyle(e); return {expression};"
    return shown.page.eval_on_selector_all(selector, f"all => all.map(e => {{ {body} }})")


def check_legible(browser, files, scheme):
    """Pages of tables: each is quiet, and its texts stand out from their ground."""
    for file in files:
        with opened(browser, file, scheme=scheme) as shown:
            check_quiet(shown)
            check_contrast(shown, scheme, least=60)


def check_quiet(shown):
    """Nothing is logged, and nothing asked for but what the page has inside."""
    shown.page.wait_for_load_state("networkidle")
    assert shown.requests[0] == shown.address
    assert all(url.startswith("data:") for url in shown.requests[1:])
    assert shown.logged == []


def check_width(shown, width):
    """Nothing is wider than the window, nor than its own place."""
    assert each(shown, "html", "[e.scrollWidth, e.clientWidth]") == [[width, width]]
    assert all(each(shown, ".scroll", "e.scrollWidth <= e.clientWidth"))


def check_charts(shown, count):
    """Charts have size, hold what they draw, and their texts do not overlap."""
    edges = "[box.left, box.right, box.top, box.bottom]"
    charts = each(shown, "svg[role=img]", edges)
    assert len(charts) == count and all(each(shown, "svg[role=img]", "e.getAttribute('aria-label')"))
    for index, (left, right, top, bottom) in enumerate(charts):
        assert right - left > 250 and bottom - top > 80
        place = f"svg[role=img] >> nth={index} >> "
        parts = each(shown, f"{place}text, circle, polyline", edges)
        assert len(parts) > 5
        for one, other, upper, lower in parts:
            assert left - 2 <= one <= other <= right + 2 and top - 2 <= upper <= lower <= bottom + 2
        texts = each(shown, f"{place}text", edges)
        for at, (a, b, c, d) in enumerate(texts):
            for one, other, upper, lower in texts[:at]:
                assert b <= one or other <= a or d <= upper + 2 or lower <= c + 2, "texts overlap"


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


def check_contrast(shown, scheme, least=20):
    """The contrast that WCAG 2 asks of small text (AA), for each text on the page."""
    found = each(shown, "body *", f"{OWN_TEXT} && [e.textContent.trim(), {SVG_OR_TEXT}, {GROUND}]")
    ground = luminance(each(shown, "body", "style.backgroundColor")[0])
    texts = [entry for entry in found if entry]
    assert ground < 0.05 if scheme == "dark" else ground > 0.9
    assert len(texts) > least
    for text, ink, behind in texts:
        dark, light = sorted((luminance(ink), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text!r}: {ink} on {behind}"
