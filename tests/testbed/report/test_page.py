"""The report page: every number and mark is on it, and nothing else gets in or out."""

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageDraw

from mllm_align.report.page import Curve, Marked
from mllm_align.testbed.report.page import Example, Report, render, write

NAN = math.nan
VOID = {"meta", "link", "img"}


def png(width, height):
    image = Image.new("RGB", (width, height), (232, 240, 236))
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 6, 20, 20), fill=(240, 190, 0))
    draw.rectangle((width - 18, height - 16, width - 6, height - 4), fill=(35, 80, 225))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def marked(text, *words, regenerated=()):
    return Marked(text, tuple((text.index(w), text.index(w) + len(w)) for w in words), regenerated)


def measures(chair, recall, n=300):
    means = {"chair_i": chair, "chair_s": 2 * chair, "recall": recall, "pope_accuracy": 0.781}
    shares = {k: {"mean": m, "low": m - 0.022, "high": m + 0.022, "n": n} for k, m in means.items()}
    return {**shares, "words": {"mean": 31.24, "low": 30.3, "high": 32.1, "n": n}}


def results():
    models = {
        "sft": measures(0.312, 0.683),
        "sft_control": measures(0.297, 0.694),
        "aligned": measures(0.148, 0.672),
    }
    return {
        "interval": "95% bootstrap over images",
        "seeds": [0],
        "split": "broken",
        **models,
        "other_splits": {"unbiased": {k: measures(0.09, 0.9, 250) for k in models}, "held_out": models},
        "pairs": {"count": 1512, "differ_after_iteration": {"0.99": [0.741, 0.846], "1.0": [0.77]}},
        "seconds": {"sft": 212.4, "make_pairs": 61.0},
    }


def sample():
    """A report with every part."""
    truth = "A small yellow moon stands beside a large blue cup."
    wrong = "A small yellow moon stands beside a large blue star."
    before = marked(wrong, "star")
    rejected = marked(wrong, "star", regenerated=((15, 52),))
    pair = Example("train-000007", png(32, 96), "Describe the picture.", truth, rejected=rejected)
    example = Example(
        "broken-000003", png(64, 64), "What is there?", truth, None, before, before, marked(truth)
    )
    return Report(
        title="Fewer hallucinations on Scenes",
        verdict=[
            "CHAIR_i fell from 31.2% to 14.8%; the intervals do not overlap.",
            "Recall did not change.",
        ],
        steps=[("A small LLaVA from scratch", "600 steps of SFT."), ("DPO", "200 steps with β = 0.1.")],
        results=results(),
        curves=[
            Curve("SFT loss", "step", "nats", {"loss": [(60 * k + 60, 3e-4 / (1 + k)) for k in range(20)]}),
            Curve("Rewards", "step", "nats", {"chosen": [(0, 0), (9, 1)], "rejected": [(0, 0), (9, -2)]}),
        ],
        pairs=[pair],
        examples=[example, replace(example, id="broken-000004", png=png(96, 32))],
        settings={"seed": 0, "dpo": {"beta": 0.1, "learning_rate": 0.0005}, "noise": None},
    )


class Tree(HTMLParser):
    """Every element and attribute, the visible text, and proof that what is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def words(page):
    return " ".join(" ".join(Tree(page).text).split())


def headings(page):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def test_every_number_is_there():
    text = words(render(sample()))
    for model in ("sft", "sft_control", "aligned"):
        for name, value in results()[model].items():
            mean, low, high = (
                value[end] * (1 if name == "words" else 100) for end in ("mean", "low", "high")
            )
            unit = "" if name == "words" else "%"
            assert f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]" in text
    for part in (
        "9.0% [6.8, 11.2]",
        "1,512 pairs.",
        "With 99% of the picture masked, the two responses of a pair differ enough in this share of the "
        "pairs, by iteration: 74.1% after 1, 84.6% after 2.",
        "With 100% of the picture masked,",
        "77.0% after 1.",
        "4 min 33 s in all.",
        "212.4 s",
        "61.0 s",
        "0.0005",
    ):
        assert part in text
    assert "Bias-breaking split; intervals: 95% bootstrap over images; seed 0" in text
    assert "CHAIR_i: before 31.2%, control 29.7%, after 14.8%" in render(sample())


def test_several_seeds_are_named():
    both = {**results(), "interval": "95% Student t over 3 seeds", "seeds": [0, 1, 2]}
    assert "over 3 seeds; seeds 0, 1, 2" in words(render(replace(sample(), results=both)))


def test_better_and_worse_need_intervals_that_do_not_meet():
    def notes(sft, aligned):
        values = {"sft": {"recall": sft}, "aligned": {"recall": aligned}}
        page = render(Report("r", results=values))
        return re.findall(r'<small class="(better|worse)">', page)

    def interval(low, high):
        return {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}

    assert notes(interval(0.3, 0.4), interval(0.41, 0.5)) == ["better"]
    assert notes(interval(0.3, 0.4), interval(0.1, 0.29)) == ["worse"]
    assert notes(interval(0.3, 0.4), interval(0.39, 0.5)) == []
    assert notes(interval(0.3, 0.4), {"mean": 0.9, "low": NAN, "high": NAN}) == []


def test_chance_is_marked_where_an_interval_holds_it():
    def notes(key, low, high):
        value = {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}
        page = render(Report("r", results={"sft": {key: value}}))
        return re.findall(r"<small class=\"at-chance\">(.*?)</small>", page)

    assert notes("pope_accuracy", 0.47, 0.52) == notes("relation_error", 0.7, 0.8) == ["at chance"]
    assert notes("pope_accuracy", 0.51, 0.55) == notes("pope_accuracy", NAN, NAN) == []
    assert notes("recall", 0.4, 0.6) == []


def test_one_setting_is_a_sentence():
    page = render(Report("r", settings={"seed": 0, "dpo": {"beta": 0.1, "rate": 0.5}}))
    assert "<p>general: seed 0</p>" in page and page.count("<table") == 1


HOSTILE = """"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 191 }}&lt;"""


def test_hostile_text_stays_text():
    h, plain = HOSTILE, render(sample())
    said = Marked(h, ((3, 12),), ((0, 5),))
    example = Example(h, png(64, 64), h, h, said, said, said, said)
    models = {m: {**measures(0.2, 0.5), h: 0.5} for m in ("sft", "sft_control", "aligned")}
    values = {
        **results(),
        **models,
        "interval": h,
        "split": h,
        "other_splits": {h: models},
        "seconds": {h: 1.0},
    }
    values["pairs"] = {h: h, "differ_after_iteration": {h: [0.5]}}
    curve = Curve(h, h, h, {h: [(0, 1), (1, 2)], h + "2": [(0, 1)]})
    page = render(Report(h, [h], [(h, h)], values, [curve], [example], [example], {h: h, "group": {h: h}}))
    tree = Tree(page)
    assert set(tree.tags) <= set(Tree(plain).tags) | {"circle"}
    assert not [name for name, _ in tree.attributes if name.startswith("on")]
    assert "script" not in tree.tags and "1337" not in page
    assert words(page).count("alert(1)") > 20


def test_what_is_not_utf8_is_replaced(tmp_path):
    report = Report("caf\udce9", settings={"out": "/tmp/caf\udce9"})
    write(report, tmp_path / "report.html")
    assert "<h1>caf?</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside():
    page = render(sample())
    links = [
        v
        for k, v in Tree(page).attributes
        if k in ("src", "href", "srcset", "action", "data", "xlink:href")
    ]
    assert len(links) > 8 and all(link.startswith(("data:", "#")) for link in links)
    lower = re.sub(r"base64,[\w+/=]+", "", page.lower())
    for word in (
        "http:",
        "https:",
        "://",
        "url(",
        "@import",
        "<script",
        "<iframe",
        "<object",
        "javascript:",
    ):
        assert word not in lower


def test_links_on_the_page_arrive():
    attributes = Tree(render(sample())).attributes
    ids = [v for k, v in attributes if k == "id"]
    assert len(ids) == len(set(ids))
    targets = [v[1:] for k, v in attributes if k == "href" and v.startswith("#")]
    assert len(targets) == 8 and set(targets) <= set(ids)
    assert {v for k, v in attributes if k == "aria-labelledby"} <= set(ids)


def shown(text, wrong, regenerated=()):
    example = Example("e", png(8, 8), "q", "t", after=Marked(text, wrong, regenerated))
    return re.findall("<dd>(.*?)</dd>", render(Report("r", examples=[example])), re.DOTALL)[1]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ((), "a blue star"),
        (((7, 11),), "a blue <mark>star</mark>"),
        (((0, 11),), "<mark>a blue star</mark>"),
        (((7, 9), (9, 11)), "a blue <mark>st</mark><mark>ar</mark>"),
        (((2, 9), (5, 11)), "a <mark>blu</mark><mark>e st</mark><mark>ar</mark>"),
        (((2, 11), (7, 9)), "a <mark>blue </mark><mark>st</mark><mark>ar</mark>"),
        (((7, 11), (7, 11)), "a blue <mark>star</mark>"),
        (((4, 4),), "a blue star"),
        (((9, 3),), "a blue star"),
        (((7, 99), (-5, 1)), "<mark>a</mark> blue <mark>star</mark>"),
    ],
)
def test_wrong_words_are_marked(spans, expected):
    assert shown("a blue star", spans) == expected


def test_spans_count_characters_not_bytes():
    assert shown("ein schöner 🌙 & Stern", ((12, 13), (16, 21))) == (
        "ein schöner <mark>🌙</mark> &amp; <mark>Stern</mark>"
    )


def test_regenerated_text_is_underlined_and_marked_in_it():
    assert shown("a blue star.", ((7, 11),), ((2, 12),)) == (
        "a <u>blue </u><u><mark>star</mark></u><u>.</u>"
    )


def test_an_empty_response_is_told():
    assert "(nothing)" in shown("", ((0, 3),))


def test_pieces_make_up_the_text():
    response = Marked("a blue star", [(2, 9), (5, 40)], ((1, 3), (6, 6)))
    assert "".join(piece.text for piece in response.pieces) == response.text


def test_an_empty_report_is_a_title():
    page = render(Report("Nothing yet"))
    assert "<h1>Nothing yet</h1>" in page and not headings(page)
    assert not {"nav", "table", "svg", "ul", "img"} & set(Tree(page).tags)


@pytest.mark.parametrize(
    ("gone", "heading"),
    [
        ({"examples": ()}, "What the model says"),
        ({"steps": ()}, "How it was done"),
        ({"curves": ()}, "Curves"),
        ({"curves": [Curve("c", "x", "y", {"a": [(0, NAN)], "b": []})]}, "Curves"),
        ({"settings": {}}, "Settings"),
        ({"pairs": (), "results": {**results(), "pairs": None}}, "The training pairs"),
        ({"results": {**results(), "seconds": {}}}, "Time"),
        ({"results": {**results(), "other_splits": {"unbiased": {}}}}, "Other pictures"),
        (
            {"results": {k: v for k, v in results().items() if "sft" not in k and k != "aligned"}},
            "Before and after",
        ),
    ],
)
def test_a_missing_part_goes_with_its_heading(gone, heading):
    full, page = render(sample()), render(replace(sample(), **gone))
    assert len(headings(full)) == 8
    assert [h for h in headings(full) if h != heading] == headings(page)
    assert heading not in words(page)


def test_a_missing_model_is_a_missing_column():
    two = {key: value for key, value in results().items() if key != "sft_control"}
    page = render(Report("r", results={**two, "other_splits": {}}))
    assert re.findall(r'<th scope="col" class="number \w+">(\w+)', page) == ["before", "after", "n"]


def test_values_that_are_missing_are_dashes():
    values = {
        "sft": {"chair_i": {"mean": 0.3, "low": NAN, "high": None, "n": None}, "recall": None},
        "aligned": {"chair_i": {"mean": NAN, "low": NAN, "high": NAN}, "recall": {"mean": math.inf}},
        "pairs": {"count": None, "differ_after_iteration": {"0.99": [None, NAN]}},
        "seconds": {"sft": None, "dpo": NAN},
    }
    curve = Curve(
        "c", "x", "y", {"a": [(0, 1.0), (1, NAN), (2, 2.0), (3, None), (4, math.inf), (5, 1.0), (6, 3.0)]}
    )
    page = render(Report("r", results=values, curves=[curve], settings={"noise": None, "rate": NAN}))
    text = words(page)
    assert (
        "30.0% – –" in text
        and "– after 1, – after 2." in text
        and "sft –" in text
        and "noise – rate –" in text
    )
    body = re.search("<main>(.*)</main>", page, re.DOTALL)
    assert body and not re.search(r"\b(nan|inf|none)\b", body[1].lower())
    assert page.count('class="curve c0"') == 1 and page.count('class="dot c0"') == 2


def test_unknown_metrics_are_shown_as_they_are():
    values = {"sft": {"my_metric": {"mean": 12.3456, "n": 3}, "plain": 7, "odd": [1, 2], "other": {"a": 1}}}
    text = words(render(Report("r", results=values)))
    assert "my metric 12.35 3 plain 7 – odd – – other – –" in text


def test_small_pictures_grow_by_whole_factors():
    page = render(sample())
    assert re.findall(r'width="(\d+)" height="(\d+)" alt', page) == [
        ("192", "192"),
        ("192", "64"),
        ("64", "192"),
    ]
    example = replace(sample().examples[0], png=png(300, 200))
    page = render(Report("r", examples=[example]))
    assert 'width="300" height="200"' in page and 'class="enlarged"' not in page


def test_the_file_is_the_page(tmp_path):
    out = tmp_path / "deep" / "report.html"
    write(sample(), out)
    assert out.read_text(encoding="utf-8") == render(sample())
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
