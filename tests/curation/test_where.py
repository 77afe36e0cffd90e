"""Expressions over a record's fields."""

import pytest
from published import trl
from refusals import assert_refusal

from mllm_align.curation.items import Item
from mllm_align.curation.where import Where, everywhere
from mllm_align.data.records import parse_record


def item(source="set", fields=None, **row):
    record = parse_record(trl(**row), index=0, where="record", root=None)
    return Item(record, source, fields or {})


@pytest.mark.parametrize(
    "text, kept",
    [
        ('origin == "coco"', True),
        ('origin in ("vg", "flickr")', False),
        ('source == "set" and not rejected', False),
        ('"cat" in chosen and "cat" not in rejected', True),
        ("chosen|wordcount + 1 > rejected|wordcount", True),
        ("images == 1 and turns == 1", True),
        ('prompt.startswith("What")', True),
        ('id == "7" and image.endswith("/a.png")', True),
        ("meta.score is defined and meta.score > 0.5", True),
        ("missing is none", True),
        ('"}}" in chosen', False),
    ],
)
def test_records_are_kept(text, kept):
    one = item(fields={"origin": "coco", "meta": {"score": 0.75}}, id="7")
    assert Where(text)(one) is kept and everywhere(one)


def test_a_field_that_some_records_lack_is_none():
    where = Where('origin == "coco"')
    assert [where(item(fields=fields)) for fields in ({}, {"origin": "coco"}, {})] == [False, True, False]
    where.check()


def test_names_that_no_record_has():
    where = Where('orgin == "coco" and images')
    where(item(fields={"origin": "coco"}))
    assert_refusal(where.check, "names 'orgin'", "did you mean origin?")


@pytest.mark.parametrize("text", ['origin = "coco"', "origin ==", "", "a b", "nosuch(", "x|nosuch"])
def test_what_is_no_expression(text):
    assert_refusal(lambda: Where(text), "--where", "is no expression")


def test_an_expression_that_fails_names_the_record():
    assert_refusal(lambda: Where("chosen > 3")(item()), "record 0", "--where fails on it (TypeError")


@pytest.mark.parametrize("text", ["chosen.__class__.__mro__", "''.__class__.__base__.__subclasses__()"])
def test_python_is_out_of_reach(text):
    try:
        assert not Where(text)(item())
    except ValueError as error:
        assert "--where fails" in str(error)
