"""Messages are one line, however long or strange what they name is."""

import pytest

from mllm_align.errors import InputError, NotFinite, first_few, not_finite, one_line, quoted, refusal


@pytest.mark.parametrize(
    "value, shown",
    [
        ("plain", "plain"),
        ("two\nlines\r\n and\ttabs", "two lines and tabs"),
        ("bell \a, escape \x1b[31m, null \0.", "bell , escape [31m, null ."),
        ("half of a pair: \ud800", "half of a pair:"),
        ("right-to-left \u202e mark", "right-to-left mark"),
        ("Grüße 世界", "Grüße 世界"),
        (3.5, "3.5"),
        (None, "None"),
        ("", ""),
    ],
)
def test_one_line_is_printable(value, shown):
    assert one_line(value) == shown


def test_a_long_value_loses_its_middle():
    assert one_line("x" * 80) == "x" * 80
    assert one_line("x" * 200) == "x" * 38 + "..." + "x" * 38
    text = one_line("a" * 100 + "b" * 100, limit=23)
    assert text == "a" * 10 + "..." + "b" * 10


def test_quoted_is_short_and_in_quotes():
    assert quoted("a\nb") == "'a b'" and len(quoted("x" * 10**6)) < 90


def test_a_refusal_says_where_what_and_how_to_mend():
    error = refusal("pairs.jsonl record 3", "no field\n'prompt'", "add it")
    assert isinstance(error, InputError) and isinstance(error, ValueError)
    assert str(error) == "pairs.jsonl record 3: no field 'prompt'; add it"
    assert len(str(refusal("x" * 5000, "y", "z"))) <= 2000


def test_the_first_few_ids():
    assert first_few(["a"]) == "a"
    assert first_few(list("abcde")) == "a, b, c, d, e"
    assert first_few(list("abcdef")) == "a, b, c, d, e, ..."
    assert first_few(["two\nlines"]) == "two lines"


def test_what_is_not_finite_counts_each_record_once():
    error = not_finite("the log-probs are", ["b", "a", "b"], 7, "look at them")
    assert isinstance(error, NotFinite) and not isinstance(error, InputError)
    assert str(error) == "the log-probs are not finite for 2 of 7 records: b, a; look at them"
    many = str(not_finite("logits are", [str(i) for i in range(20)], 30))
    assert "for 20 of 30 records: 0, 1, 2, 3, 4, ...; look for NaN" in many
