"""A user's function as the annotator; whatever is wrong with it is told in one line."""

import sys

import pytest
from judges import question

from mllm_align import Scorer
from mllm_align.annotate.factory import open_annotator
from mllm_align.annotate.verdict import rank
from mllm_align.errors import InputError


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """hook(body): the annotator of the function `score(questions)` with that body."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"rules_{tmp_path.name}"

    def hook(body, function="score"):
        (tmp_path / f"{name}.py").write_text(f"kept = 3\ndef score(questions):\n    {body}\n")
        return open_annotator(Scorer(f"{name}:{function}"))

    yield hook
    sys.modules.pop(name, None)


def test_a_function_of_the_current_folder_ranks(hook):
    """It sees the record and the responses; a tuple, an array or a list is as good."""
    annotator = hook("return [[-len(r) for r in q.responses] for q in questions]")
    assert Scorer.on_devices is False
    two = [question("A large cat.", "A cat."), question("a", "bb", "ccc", name="r1")]
    first, second = rank(annotator, two)
    assert first.pair == (1, 0) and first.scores == (-12, -6) and first.reason == "-12, -6"
    assert second.ranking == (0, 1, 2) and type(second.scores[0]) is float


@pytest.mark.parametrize(
    "given",
    ["((1, 2.5),)", "np.array([[1, 2.5]])", "[np.float32([1, 2.5])]", "iter([iter([True, 2.5])])"],
)
def test_what_counts_as_lists_of_floats(hook, given):
    (verdict,) = rank(hook(f"import numpy as np; return {given}"), [question()])
    assert verdict.scores == (1.0, 2.5)


def test_equal_scores_are_a_tie(hook):
    (verdict,) = rank(hook("return [[0.5, 0.5]]"), [question()])
    assert (verdict.outcome, verdict.pair, verdict.reason) == ("tie", None, "0.5, 0.5")


def test_equal_responses_are_not_scored(hook):
    same, other = rank(
        hook("assert len(questions) == 1; return [[1, 0]]"), [question("a", "a "), question()]
    )
    assert (same.outcome, other.pair) == ("identical", (0, 1))


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError('no\\nweights')", "raises ValueError: no weights; mend the function"),
        ("raise SystemExit(3)", "raises SystemExit: 3"),
        ("return None", "the result is of type NoneType"),
        ("return 'ab'", "the result is of type str"),
        ("return {'a': 1}", "the result is of type dict"),
        ("return 1.0", "the result is of type float"),
        ("import numpy as np; return np.float32(1)", "the result "),
        ("return []", "the result has 0 items for 1 questions"),
        ("return [[1, 2], [1, 2]]", "the result has 2 items for 1 questions"),
        ("return [1.0]", "question 0 is of type float"),
        ("return [[1]]", "question 0 has 1 items for 2 responses"),
        ("return [[1, 2, 3]]", "question 0 has 3 items for 2 responses"),
        ("return [['high', 2]]", "score 0 of question 0 is of type str"),
        ("return [[1, None]]", "score 1 of question 0 is of type NoneType"),
        ("return [[1, float('nan')]]", "score 1 of question 0 is nan"),
        ("return [[float('-inf'), 1]]", "score 0 of question 0 is -inf"),
    ],
)
def test_results_that_are_refused(hook, body, said):
    annotator = hook(body)
    with pytest.raises(InputError) as error:
        rank(annotator, [question()])
    line = str(error.value)
    assert line.startswith("annotator.function rules_") and said in line and "\n" not in line
    assert "raises" in said or "return a list of lists of finite floats" in line


@pytest.mark.parametrize(
    "body, function, said",
    [
        ("return [", "score", "can't be imported (SyntaxError"),
        ("return []\nraise RuntimeError('no GPU')", "score", "can't be imported (RuntimeError: no GPU)"),
        ("return []\nraise SystemExit", "score", "can't be imported (SystemExit: )"),
        ("return []", "scores", ".py has no 'scores'; name a function"),
        ("return []", "kept", "'kept' in "),
    ],
)
def test_functions_that_are_refused_at_once(hook, body, function, said):
    with pytest.raises(InputError) as error:
        hook(body, function)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such_module:score", "no.such.module:score", "..up:score"])
def test_modules_that_are_not_there(name):
    with pytest.raises(InputError, match=r"annotator\.function \S+:score: can't be imported"):
        open_annotator(Scorer(name))
