"""What an answer is taken for, and what the answers in both orders come to."""

import pytest

from mllm_align.annotate.pairwise import Asked, Pairwise, read, request
from mllm_align.annotate.verdict import Question, counted, rank
from mllm_align.data.images import ImageSource
from mllm_align.data.records import Message, Part, Record

ONE = (Message("user", (Part(), Part("What is there?"))),)


def record(id="a", messages=ONE, images=1):
    return Record(id, messages, (), (ImageSource(data=b"x"),) * images, f"pairs.jsonl record {id}")


def question(*responses, id="a"):
    return Question(record(id), responses)


@pytest.mark.parametrize(
    "answer, taken",
    [
        ("Response 1", 1),
        ("Response 2", 2),
        ("Tie", "tie"),
        ("response 2", 2),
        ("RESPONSE 1.", 1),
        ("Response2", 2),
        ("**Response 1**", 1),
        ("**Response 1**: it is true", 1),
        ("### Response 2\nThe dog is brown.", 2),
        ("`Response 1`", 1),
        ('"Response 2"', 2),
        ("\n\n  Response 1  \r\nIt says less.", 1),
        ("Response 1\nResponse 2 invents a cat.", 1),
        ("Response 1: it invents nothing.", 1),
        ("Response 2 - the car is red", 2),
        ("Response 2 — the car is red", 2),
        ("Response 1 is better", 1),
        ("Response 1 is better because there are 2 dogs", 1),
        ("Tie.\nBoth are right.", "tie"),
        ("**Tie** – both are right", "tie"),
        ("", None),
        (" \n \n", None),
        ("***", None),
        ("1", None),
        ("Response", None),
        ("Response 3", None),
        ("Response 12", None),
        ("Response 1, 2", None),
        ("Response 1 - 2", None),
        ("Response 1 or Response 2", None),
        ("Response 1 and Response 2 are equal", None),
        ("Response 1 is better than Response 2", None),
        ("Response 1: unlike Response 2, it is true", None),
        ("Response 1 is not better", None),
        ("Response 1 is betterish", None),
        ("Response 1 invents a cat", None),
        ("Neither Response 1", None),
        ("I choose Response 1", None),
        ("The better one:\nResponse 1", None),
        ("Tie: Response 1 is longer", None),
        ("Tied", None),
        ("Tie breaker needed", None),
        ("It is a tie", None),
        ("I can't see the image.", None),
    ],
)
def test_only_a_first_line_that_takes_one_side_counts(answer, taken):
    assert read(answer) == taken


def test_what_the_judge_reads():
    asked = Asked(record(), "A {dog}.", "A cat.")
    assert "Request:\nWhat is there?\n" in asked.text and "about the image.\n" in asked.text
    assert "Response 1:\nA {dog}.\n\nResponse 2:\nA cat.\n" in asked.text
    (turn,) = asked.messages
    assert turn.role == "user" and turn.places == 1 and turn.text == asked.text
    assert "Look at the images closely" in Asked(record(images=2), "a", "b").text


def test_a_longer_conversation_names_its_turns_and_hides_the_system():
    turns = [("system", "Be brief."), ("user", " Hi "), ("assistant", "Hello"), ("user", "What is there?")]
    messages = tuple(Message(role, (Part(text),)) for role, text in turns)
    assert request(record(messages=messages)) == "User: Hi\nAssistant: Hello\nUser: What is there?"
    assert request(record(messages=messages[:2])) == "Hi"


class Scripted:
    """Answers by a rule of what is shown first and second."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, asked):
        self.asked += [(each.record.id, each.first, each.second) for each in asked]
        return [self.rule(each.first, each.second) for each in asked]


def best(first, second):
    """The lower letter is better."""
    return "Response 1" if first < second else "Response 2"


def test_every_two_responses_are_asked_about_in_both_orders():
    ask = Scripted(best)
    verdicts = Pairwise(ask)([question("b", "a"), question("c", "b", "a", id="x")])
    assert ask.asked[:2] == [("a", "b", "a"), ("a", "a", "b")]
    assert [shown for id, *shown in ask.asked if id == "x"] == [
        ["c", "b"],
        ["b", "c"],
        ["c", "a"],
        ["a", "c"],
        ["b", "a"],
        ["a", "b"],
    ]
    assert verdicts[0].outcome == "ranked" and verdicts[0].pair == (1, 0)
    assert verdicts[1].scores == (0, 1, 2) and verdicts[1].ranking == (2, 1, 0)
    assert (verdicts[1].first, verdicts[1].parsed) == (3, 6)
    assert verdicts[0].reason == "Response 2 | Response 1"


@pytest.mark.parametrize(
    "rule, outcome, first, parsed",
    [
        (lambda a, b: "Response 1", "disagreement", 2, 2),
        (lambda a, b: "Response 2", "disagreement", 0, 2),
        (lambda a, b: "Tie", "tie", 0, 0),
        (lambda a, b: "Tie" if a < b else "Response 2", "tie", 0, 1),
        (lambda a, b: "I can't say" if a < b else "Response 2", "unparsable", 0, 1),
        (lambda a, b: "", "unparsable", 0, 0),
        (lambda a, b: None if a < b else "Response 1", "failed", 1, 1),
        (lambda a, b: None if a < b else "no", "failed", 0, 0),
    ],
    ids=["first", "second", "tie", "half a tie", "unparsable", "empty", "failed", "both faults"],
)
def test_no_preference_without_two_orders_that_agree(rule, outcome, first, parsed):
    (verdict,) = Pairwise(Scripted(rule))([question("a", "b")])
    assert (verdict.outcome, verdict.first, verdict.parsed) == (outcome, first, parsed)
    assert verdict.pair is None and not verdict.ranking


def test_wins_count_among_three():
    def rule(first, second):  # a and b can't be told apart; both beat c
        return "Tie" if {first, second} == {"a", "b"} else best(first, second)

    (verdict,) = Pairwise(Scripted(rule))([question("c", "b", "a")])
    assert verdict.scores == (0, 1, 1) and verdict.pair == (1, 0)


def test_a_disagreement_among_three_costs_its_win_alone():
    def rule(first, second):
        return "Response 1" if {first, second} == {"b", "c"} else best(first, second)

    (verdict,) = Pairwise(Scripted(rule))([question("a", "b", "c")])
    assert verdict.scores == (2, 0, 0) and verdict.pair == (0, 2)


def test_a_circle_is_a_tie_and_one_bad_answer_spoils_its_group_alone():
    def circle(first, second):
        return "Response 1" if first + second in ("ab", "bc", "ca") else "Response 2"

    def broken(first, second):
        return "?" if first + second == "bc" else best(first, second)

    three = question("a", "b", "c")
    assert Pairwise(Scripted(circle))([three])[0].outcome == "tie"
    verdicts = Pairwise(Scripted(broken))([three, question("a", "b", id="x")])
    assert [v.outcome for v in verdicts] == ["unparsable", "ranked"]


def test_same_texts_are_not_compared():
    ask = Scripted(best)
    questions = [question("a", "a ", "b"), question("a", "a", id="x")]
    verdicts = rank(Pairwise(ask), questions)
    assert len(ask.asked) == 4 and verdicts[0].scores == (1, 1, 0)
    assert verdicts[1].outcome == "identical"
    assert counted(verdicts)["identical"] == counted(verdicts)["ranked"] == 1
    assert rank(Pairwise(ask), questions[1:])[0].outcome == "identical"
    assert len(ask.asked) == 4, "nothing to ask"
