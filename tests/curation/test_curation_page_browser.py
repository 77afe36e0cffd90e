"""The page of a data set as a browser shows it."""

import pytest
from browsing import (
    both_schemes,
    both_widths,
    browser,  # noqa: F401
    check_contrast,
    check_quiet,
    check_width,
    each,
    opened,
)
from PIL import Image
from published import completion, trl, vlfeedback
from test_curation_page import BDHS, content
from test_items import written

from mllm_align.curation.page import write_page

pytestmark = pytest.mark.browser
COUNT = 300
WORDS = "a small red cat sleeps on the old sofa beside two grey dogs and a lamp".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Of 300 pairs with pictures of their own, one by BDHS, and 4 rated responses."""
    folder = tmp_path_factory.mktemp("set")
    rows = []
    for i in range(COUNT):
        Image.new("RGB", (300 + i % 40, 200), (i % 256, 90, 200)).save(folder / f"{i}.png")
        said = {"chosen": " ".join(WORDS[: 5 + i % 10]), "rejected": " ".join(WORDS[i % 7 : 9])}
        rows.append(trl(id=f"pair-{i}", images=[f"{i}.png"], **said))
    rows[0] |= {"chosen": "A big red cat.", "rejected": "A big black dog.", "bdhs": BDHS}
    rows[1]["chosen"] = "unbroken" * 40
    both = completion("A cat.", 5, model="gpt4v"), completion("A dog.", 2)
    rated = [vlfeedback(*both, id=str(i), img_path="0.png") for i in range(4)]
    sets = [written(folder, *rows), written(folder, *rated, name="rated.jsonl")]
    write_page(sets, folder / "page.html")
    return folder / "page.html"


def status(shown):
    return shown.page.text_content(".shown")


def cards(shown):
    return shown.page.locator("article").count()


@both_schemes
def test_it_is_quiet_and_legible(file, browser, scheme):  # noqa: F811
    with opened(browser, file, scheme=scheme) as shown:
        check_quiet(shown)
        check_contrast(shown, scheme)


@both_widths
def test_nothing_is_cut_off_and_pictures_are_seen(file, browser, width):  # noqa: F811
    with opened(browser, file, width) as shown:
        check_width(shown, width)
        boxes = each(shown, "article img", "[e.naturalWidth > 0, box.width, box.right]")
        assert boxes and all(there and wide > 90 and right <= width for there, wide, right in boxes)
        for selector in ("article dd", "form input", "form select"):
            assert all(right <= width for right in each(shown, selector, "box.right"))


def test_cards_are_made_as_they_come_into_view(file, browser):  # noqa: F811
    with opened(browser, file) as shown:
        assert status(shown) == f"{COUNT + 4} records" and 10 < cards(shown) < 60
        before = cards(shown)
        while cards(shown) < COUNT + 4:
            shown.page.locator("#end").scroll_into_view_if_needed()
            shown.page.locator("article").nth(before).wait_for()
            before = cards(shown)


def test_filters_and_order(file, browser):  # noqa: F811
    with opened(browser, file) as shown:
        page = shown.page
        page.select_option("[name=source]", "rated.jsonl")
        assert status(shown) == f"4 of {COUNT + 4} records" and cards(shown) == 4
        assert "gpt4v" in page.text_content("article >> nth=0")
        page.select_option("[name=source]", "")
        page.fill("[name=text]", "BLACK dog")
        assert cards(shown) == 1 and "98.7%" in page.text_content("article")
        assert page.text_content("article u") == "black dog" and page.text_content("article .cut") == "┃"
        assert each(shown, "article mark", "e.textContent") == ["red cat", "black dog"]
        kept, other = each(shown, "article mark", "style.backgroundColor")
        assert kept != other
        page.fill("[name=text]", "")
        page.fill("[name=shortest]", "8")
        lengths = each(shown, "article dl + .pair-facts", "e.textContent")
        assert lengths and all("the chosen" in told for told in lengths)
        page.fill("[name=shortest]", "3")
        page.fill("[name=longest]", "4")
        page.fill("[name=most]", "0.6")
        records = content(file)["records"]
        wanted = sum(3 <= each["difference"] <= 4 and each["likeness"] <= 0.6 for each in records)
        assert 0 < wanted < COUNT and status(shown).startswith(f"{wanted} of ")
        page.fill("[name=shortest]", "")
        page.fill("[name=longest]", "")
        page.fill("[name=most]", "")
        page.select_option("[name=order]", "likeness")
        told = each(shown, "article dl + .pair-facts", "e.textContent.match(/[0-9.]+/)[0]")
        assert told == sorted(told, key=float) and float(told[0]) == 0
        page.fill("[name=text]", "nowhere to be found")
        assert status(shown) == f"0 of {COUNT + 4} records" and cards(shown) == 0
