"""CHAIR against counts by hand: words, pairs, objects of COCO's annotations."""

import pytest
from bench_folders import lines, picture, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.chair import Chair, words_of

SYNONYMS = """\
person, woman, man, people
traffic light, stop light
wine glass
toilet, urinal
chair, seat
elephant
cake,  cheesecake, pancake
tie, bow tie
bus, minibus
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "chair"
    value(folder / "objects.json", {"7": ["person", "chair", "cake"], "12": ["elephant"]})
    (folder / "synonyms.txt").write_text(SYNONYMS)
    return folder


@pytest.mark.parametrize(
    "text, objects",
    [
        ("Two Women and a man.", ["person", "person"]),
        ("A person.A woman. People", ["person", "person"]),  # a full stop within a word
        ("stop lights, a traffic light", ["traffic light", "traffic light"]),
        ("wine glasses and a wine glass; a glass", ["wine glass", "wine glass"]),
        ("a chair and the toilet. Its seat", ["chair", "toilet"]),
        ("a seat", ["chair"]),
        ("a toilet seat", ["toilet"]),
        ("a baby elephant", ["elephant"]),
        ("a bow tie", ["tie"]),
        ("cheesecake and pancakes", ["cake"]),  # the published code misses cheesecake
        ("a bus, two buses", ["bus"]),  # pattern makes bu of bus
        ("nothing of these", []),
    ],
)
def test_how_a_caption_is_read(folder, text, objects):
    assert words_of(folder).objects(text) == objects


def test_mentions_have_the_words_of_the_text(folder):
    said = words_of(folder).mentions(
        "Two Women at stop lights, on a toilet seat; their seats, baby elephants"
    )
    assert said == [
        ("women", "person"),
        ("stop lights", "traffic light"),
        ("toilet seat", "toilet"),
        ("baby elephants", "elephant"),
    ]


def test_the_figures_of_a_hand_count(folder, tmp_path):
    rows = [
        {"image_id": 12, "caption": "An elephant. The elephant has a chair."},
        {"image_id": 7, "caption": "A man and a woman on a chair."},
    ]
    found = score_answers(lines(tmp_path / "a.jsonl", rows), folder, "chair")
    assert found.results["scores"] == {
        "chair_s": 50,
        "chair_i": pytest.approx(100 / 6),
        "recall": 75,  # person, chair, elephant of four
    }
    assert found.results["n"] == 2 == found.results["intervals"]["recall"]["n"]
    assert [line["hallucinated"] for line in found.lines] == [[], ["chair"]]
    assert [line["hallucinated_words"] for line in found.lines] == [[], ["chair"]]
    one = score_answers(lines(tmp_path / "one.jsonl", rows[:1]), folder, "chair").results
    assert one["n"] == 1 and one["scores"]["chair_s"] == 100


def test_answers_for_other_images(folder, tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"image_id": 7, "caption": ""}, {"image_id": 8, "caption": ""}])
    assert "1 answers are to no question of the data: 8" in refusal(score_answers, file, folder, "chair")


def coco(folder, part="val"):
    names = {7: "COCO_val2014_000000000007.jpg", 12: "COCO_val2014_000000000012.jpg"}
    content = {
        "images": [{"id": id, "file_name": name} for id, name in names.items()],
        "categories": [{"id": 1, "name": "person"}, {"id": 22, "name": "elephant"}],
        "annotations": [{"image_id": 12, "category_id": 22}, {"image_id": 12, "category_id": 22}],
    }
    value(folder / f"annotations/instances_{part}2014.json", content)
    said = [(7, "People at traffic lights"), (7, "A bow tie."), (12, "A man on an elephant")]
    rows = [{"image_id": id, "caption": text} for id, text in said]
    value(folder / f"annotations/captions_{part}2014.json", {"annotations": rows})


def test_objects_of_cocos_annotations(folder):
    (folder / "objects.json").unlink()
    said = refusal(Chair().items, folder, DataConfig())
    assert "objects.json or annotations/instances_val2014.json is missing; put it there" in said
    coco(folder)
    found = {item.record.id: item.labels["objects"] for item in Chair().items(folder, DataConfig())}
    assert found == {"7": ["person", "tie", "traffic light"], "12": ["elephant", "person"]}


def test_annotations_that_do_not_fit(folder):
    (folder / "objects.json").unlink()
    coco(folder)
    (folder / "synonyms.txt").write_text("person, man\n")
    words_of.cache_clear()
    said = refusal(Chair().items, folder, DataConfig())
    assert "1 kinds of objects have no line in synonyms.txt: elephant" in said
    (folder / "synonyms.txt").write_text(SYNONYMS)
    words_of.cache_clear()
    value(folder / "annotations/captions_val2014.json", {"annotations": [{"image_id": 7, "caption": "x"}]})
    assert "1 of 2 images have no caption: 12" in refusal(Chair().items, folder, DataConfig())


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("objects.json", {"a7": []}, "objects.json, a7: is no image with its objects"),
        ("objects.json", {"7": ["cake", 3]}, "objects.json, 7: is no image with its objects"),
        (
            "annotations/instances_val2014.json",
            {"images": [{"id": 7}]},
            "a row of images has no id and file",
        ),
        ("annotations/captions_val2014.json", {"annotations": [5]}, "a row of annotations has no image_id"),
        ("annotations/captions_val2014.json", {}, "captions_val2014.json, annotations: is missing"),
    ],
)
def test_damaged_files(folder, name, content, problem):
    (folder / "objects.json").unlink()
    coco(folder)
    value(folder / name, content)
    assert problem in refusal(Chair().items, folder, DataConfig())


def test_the_pictures_that_are_there_are_captioned(folder):
    evaluator = Chair()
    items = evaluator.items(folder, DataConfig())
    assert items[0].record.messages[-1].text == "Please describe this image in detail."
    said = refusal(evaluator.asked, items)
    assert said.startswith(
        "0 pictures of images with objects are there, 500 are wanted; put more there, such as"
    )
    first, second = (
        folder / "val2014" / f"COCO_val2014_{7:012d}.jpg",
        folder / "val2014" / f"COCO_val2014_{12:012d}.jpg",
    )
    picture(second)
    assert str(first) in said and "give --evaluator.images 1" in refusal(evaluator.asked, items)
    few = Chair(images=1)
    assert [item.record.id for item in few.asked(items)] == ["12"]
    picture(first)
    assert {item.record.id for item in evaluator.asked(items)} == {"7", "12"}
    assert len(few.asked(items)) == 1 and few.asked(items) == few.asked(items)
    assert evaluator.row(items[0], "A man.") == {"image_id": 7, "caption": "A man."}
