"""A benchmark's folder: what is missing is named, pictures are where they are looked for; presets."""

from dataclasses import replace

import pytest
from bench_folders import lines, picture, value
from refusals import refusal

from mllm_align import DataConfig, SamplingConfig
from mllm_align.config import to_json
from mllm_align.evaluation.base import EVALUATORS
from mllm_align.evaluation.folders import ask, field, find, folder_of, pictures, read_lines, unique


def test_what_is_no_folder(tmp_path):
    assert folder_of(str(tmp_path)) == tmp_path
    for data, named in ((tmp_path / "gone", "gone"), (["a"], "a list")):
        assert named in refusal(folder_of, data) and "give the benchmark's folder" in refusal(
            folder_of, data
        )


def test_a_file_by_either_name(tmp_path):
    second = value(tmp_path / "coco/b.json", {})
    assert find(tmp_path, "a.json", "coco/b.json") == second
    assert f"{tmp_path}: a.json or c.json is missing; put it there" in refusal(
        find, tmp_path, "a.json", "c.json"
    )


def test_lines_of_objects(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": 1}\n\n{"a"\n')
    assert "a.jsonl line 3: is not JSON" in refusal(read_lines, file)
    file.write_text("[1]\n")
    assert "a.jsonl line 1: is no object" in refusal(read_lines, file)


@pytest.mark.parametrize(
    "row, problem", [({}, "is missing"), ({"a": True}, "is a bool"), ({"a": "1"}, "is a str")]
)
def test_a_field_of_its_type(row, problem):
    assert field({"a": 3}, "a", int, "row") == 3
    assert f"row 4, a: {problem}; get the file again" in refusal(field, row, "a", int, "row 4")


def test_ids_that_come_several_times(tmp_path):
    unique([1, 2], tmp_path)
    assert "2 ids come several times: 1, 3" in refusal(unique, [1, 2, 1, 3, 3], tmp_path)


def test_pictures_are_looked_for_in_order(tmp_path):
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "elsewhere/a.png")
    place = pictures(tmp_path, DataConfig(), "val2014", "images")
    assert place("a.png") == tmp_path / "images/a.png" and place("b.png") == tmp_path / "val2014/b.png"
    there = pictures(tmp_path, DataConfig(image_root=(tmp_path / "elsewhere",)), "images")
    assert there("a.png") == tmp_path / "elsewhere/a.png"
    for name in ("../a.png", "/a.png"):
        assert "leaves the folder" in refusal(place, name)


def test_a_benchmark_is_asked_as_a_whole(tmp_path):
    assert "leave out --data.max-records" in refusal(
        pictures, tmp_path, DataConfig(max_records=3), "images"
    )


def test_a_question_is_a_record(tmp_path):
    item = ask("q", tmp_path / "a.png", "Look. {question}", "Is {it}?", "file row 3", label="yes")
    assert item.record.id == "q" and item.record.messages[0].text == "Look. Is {it}?"
    assert item.record.messages[0].places == 1 == len(item.record.images)
    assert item.labels == {"question": "Is {it}?", "label": "yes"}
    assert ask("q", tmp_path, "Describe it.", "", "x").labels == {}


LMMS = {
    "pope": {"max_tokens": 128, "prompt": "{question}\nAnswer the question using a single word or phrase."},
    "gqa": {"max_tokens": 16, "prompt": "{question}\nAnswer the question using a single word or phrase."},
    "textvqa": {"max_tokens": 1024, "ocr": False},
    "llava-wild": {"max_tokens": 4096, "prompt": "{question}"},
    "mm-vet": {
        "max_tokens": 1024,
        "prompt": "First please perform reasoning, and think step by step to provide best answer to the"
        " following question: \n\n{question}",
    },
}


@pytest.mark.parametrize("name", LMMS)
def test_the_preset_lmms_eval(name):
    evaluator = EVALUATORS[name](preset="lmms-eval")
    saved = to_json(evaluator)
    assert saved["preset"] == "lmms-eval" and saved["sampling"]["temperature"] == 0
    assert {**saved, **saved["sampling"]}.items() >= LMMS[name].items()
    assert replace(evaluator) == evaluator and EVALUATORS[name]().preset == "llava"


def test_a_setting_wins_over_the_presets():
    own = EVALUATORS["gqa"](
        preset="lmms-eval", prompt="{question}?", sampling=SamplingConfig(0.5, max_tokens=128)
    )
    assert own.prompt == "{question}?" and own.sampling == SamplingConfig(0.5, max_tokens=16)
    more = SamplingConfig(temperature=0.0, max_tokens=32)
    assert EVALUATORS["gqa"](preset="lmms-eval", sampling=more).sampling == more


@pytest.mark.parametrize(
    "name, preset, has",
    [("mmhal", "lmms-eval", "mmhal has llava"), ("gqa", "lmms", "gqa has llava and lmms-eval")],
)
def test_a_preset_that_a_benchmark_does_not_have(name, preset, has):
    assert refusal(EVALUATORS[name], preset=preset) == f"evaluator.preset is '{preset}'; {has}"
