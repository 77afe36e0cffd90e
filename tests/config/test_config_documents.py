"""YAML texts: the core schema, and what no config needs."""

import pytest
from refusals import refusal

from mllm_align.config.documents import read_yaml, write_yaml


def test_scalars_are_those_of_yaml_1_2(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "a: 5e-7\nb: -3\nc: .5\nd: true\ne: ~\nf:\ng: on\nh: 010\ni: 1:30\nj: 2024-01-01\nk: '1'\n"
        "l: 1_000\nm: [1, {n: 0.10}]\n"
    )
    values, lines = read_yaml(tmp_path / "a.yaml")
    wanted = {"a": 5e-7, "b": -3, "c": 0.5, "d": True, "e": None, "f": None, "g": "on", "h": "010"}
    wanted |= {"i": "1:30", "j": "2024-01-01", "k": "1", "l": "1_000", "m": [1, {"n": 0.1}]}
    assert values == wanted and [type(v) for v in values.values()] == [type(v) for v in wanted.values()]
    assert lines["a"] == 1 and lines["l"] == 12 and lines["m.n"] == 13


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "null",
        "true",
        "010",
        "~",
        "0x10",
        "2024-01-01",
        "1:30",
        "on",
        " a: b # c",
        "",
        "<<",
        "=",
        "- a",
    ],
)
def test_what_is_written_is_read_again(tmp_path, text):
    values = {"text": text, "list": [text, 1e-6, 3, None, True], "tree": {"empty": [], "none": {}}}
    (tmp_path / "a.yaml").write_text(write_yaml(values))
    assert read_yaml(tmp_path / "a.yaml")[0] == values


@pytest.mark.parametrize(
    "body, said",
    [
        ("steps: 1\nsteps: 2", "mine.yaml line 2: 'steps' is given twice"),
        ("- steps", "holds list where fields of a config belong"),
        ("steps", "holds str where fields"),
        ("1: 2", "mine.yaml line 1: '1' is no name of a field"),
        ("? [a]\n: 2", "line 1: 'a collection' is no name of a field"),
        ("steps: [1", "mine.yaml line 1: is not YAML (expected ',' or ']'"),
        ("a: b: c", "line 1: is not YAML (mapping values are not allowed here)"),
        ("steps: 1\n---\nsteps: 2", "is not YAML"),
        ("steps: \x07", "is not YAML"),
        (
            "steps: !!python/object/apply:os.system ['true']",
            "the tag 'python/object/apply:os.system'",
        ),
        ("steps: !mine 3", "the tag '!mine' is not taken"),
        ("seed: " + "9" * 5000, "mine.yaml line 1: seed can't be read (Exceeds the limit"),
        ("freeze: &a [x, *a]", "line 1: an alias is not taken"),
        (
            "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]",
            "an alias is not taken; write the values out",
        ),
        ("freeze: " + "[" * 1000, "is nested too deeply"),
        ("seed: 1" + " " * 2**18, "is larger than 256 KiB"),
    ],
)
def test_texts_that_are_refused(tmp_path, body, said):
    (tmp_path / "mine.yaml").write_text(body)
    line = refusal(read_yaml, tmp_path / "mine.yaml")
    assert said in line and "mine.yaml" in line


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"steps: \xff")
    assert "mine.yaml: is not UTF-8" in refusal(read_yaml, tmp_path / "mine.yaml")
    assert "can't be read" in refusal(read_yaml, tmp_path)
