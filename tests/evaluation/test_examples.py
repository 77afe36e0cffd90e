"""Which answers are shown, and what is marked in them."""

from dataclasses import dataclass

import pytest

from mllm_align import Evaluator
from mllm_align.evaluation.base import EVALUATORS
from mllm_align.evaluation.examples import part_of
from mllm_align.evaluation.results import Evaluation


@dataclass(frozen=True)
class Marks(Evaluator):
    ways = {"wrong": -1, "length": 0}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(type(EVALUATORS), "find", lambda self, name: Marks)


def line(id, figures, text="said", images=(), **more):
    record = {"id": str(id), "group": str(id), "question": f"{id}?", "images": list(images)}
    return {"id": str(id), "response": text, "figures": figures, "record": record, **more}


def of(*lines):
    return {"b": Evaluation({"benchmark": "x:Marks"}, list(lines))}


def rights(*values):
    return of(*(line(i, {"right": [value, 1]}) for i, value in enumerate(values)))


def test_as_many_got_better_as_got_worse_the_largest_changes_first():
    first, second = rights(*[0] * 9, *[1] * 5), rights(*range(9), *[0, -1, 1, 0, 0])
    part = part_of({"A": first, "B": second}, "b")
    assert [card.id for card in part.cards] == ["8", "7", "6", "10", "9", "12"]
    assert [card.said[1].note for card in part.cards] == ["better"] * 3 + ["worse"] * 3
    assert part.counts == ["B: 8 better, 4 worse, 2 scored as A’s."]


def test_few_of_one_kind_leave_room_to_the_other():
    part = part_of({"A": rights(*[0] * 9), "B": rights(*[1] * 8, -1)}, "b")
    assert [card.id for card in part.cards] == ["0", "1", "2", "3", "4", "8"]
    assert part_of({"A": rights(0, 1), "B": rights(0, 1)}, "b") is None


def test_lower_is_better_where_a_figure_says_so_and_others_do_not_count():
    figures = [{"wrong": [w, 2], "length": [n, 1], "gone": [0, 0]} for w, n in ((2, 5), (0, 5), (2, 90))]
    first = of(line(0, figures[0]), line(1, figures[0]))
    part = part_of({"A": first, "B": of(line(0, figures[1]), line(1, figures[2]))}, "b")
    assert [(card.id, card.said[1].note) for card in part.cards] == [("0", "better")]


def test_one_of_each_picture():
    lines = [line(i, {"right": [0, 1]}, images=[f"/{i // 2}.png"]) for i in range(4)]
    part = part_of({"A": of(*lines, line(4, {"right": [1, 1]}))}, "b")
    assert [card.id for card in part.cards] == ["0", "2"] and part.cards[0].picture is None


def test_runs_of_a_judge_are_averaged_and_its_text_is_shown():
    def judged(*grades):
        lines = [line(0, {"right": [grade, 1]}, content=f"Grade {grade}.") for grade in grades]
        for each in lines:
            del each["response"]
        return of(*lines)

    part = part_of({"A": judged(1, 3), "B": judged(2, 1)}, "b")
    assert [(said.note, said.judge, said.text.text) for said in part.cards[0].said] == [
        ("", "Grade 1.", ""),
        ("worse", "Grade 2.", ""),
    ]


def test_words_are_marked_wherever_they_stand_whole():
    text = "A dining  table, two Tables; tablet. TABLE"
    made = line(0, {"right": [0, 1]}, text, hallucinated_words=["table", "dining table"], label="none")
    part = part_of({"A": of(made, line(1, {"right": [1, 1]}))}, "b")
    card = part.cards[0]
    assert "".join(p.text if p.wrong else "." for p in card.said[0].text.pieces) == ".dining  table.TABLE"
    assert card.labels == "none" and card.question == "0?"
