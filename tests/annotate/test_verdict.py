"""What is asked of an annotator, and what becomes of its answers."""

import json
from dataclasses import asdict

import pytest
from judges import question

from mllm_align.annotate.verdict import OUTCOMES, Verdict, counted, rank, scored


def test_scores_rank_and_the_pair_is_best_and_worst():
    verdict = scored([1, 3, 2], "why", first=1, parsed=2)
    assert (verdict.outcome, verdict.scores, verdict.ranking) == ("ranked", (1.0, 3.0, 2.0), (1, 2, 0))
    assert verdict.pair == (1, 0) and (verdict.reason, verdict.first, verdict.parsed) == ("why", 1, 2)


def test_equal_scores_are_a_tie_and_make_no_pair():
    assert scored([2, 2.0]) == Verdict("tie", (2.0, 2.0)), "its scores are rewards all the same"
    assert scored([2, 2]).pair is None and not scored([2, 2]).ranking


def test_equals_among_three_keep_their_order():
    assert scored([1, 0, 1, 0]).ranking == (0, 2, 1, 3)


PLAIN = [(("A cat.", " A cat. "), "identical"), (("A cat.", " "), "empty"), (("", ""), "empty")]


@pytest.mark.parametrize("responses, outcome", PLAIN)
def test_what_can_be_told_is_not_asked(responses, outcome):
    asked = []

    def annotator(questions):
        asked.extend(questions)
        return [scored([1, 2]) for _ in questions]

    plain, ranked = question(*responses), question()
    assert [v.outcome for v in rank(annotator, [plain, ranked])] == [outcome, "ranked"]
    assert asked == [ranked]
    assert [v.outcome for v in rank(annotator, [plain])] == [outcome] and len(asked) == 1


def test_every_outcome_is_counted():
    found = counted([scored([1, 2]), scored([1, 1]), scored([2, 1]), Verdict("failed")])
    assert found == {**dict.fromkeys(OUTCOMES, 0), "ranked": 2, "tie": 1, "failed": 1}


def test_a_verdict_passes_through_json():
    verdict = scored([0.5, 1.5], "its length")
    assert Verdict.from_json(json.loads(json.dumps(asdict(verdict)))) == verdict
