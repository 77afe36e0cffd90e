"""Which records are chosen, by each measure."""

import numpy as np
import pytest
from encoder_folders import WORDS, make_folder
from published import trl
from refusals import assert_refusal
from runs import PAIRS, compiling, reward_run
from test_items import read, written

from mllm_align import RewardModel, Verdict, score, scored
from mllm_align.curation.select import Measured, select, told

assert compiling and reward_run  # fixtures
MEAN = {"word_embedding_dimension": 12, "pooling_mode_mean_tokens": True}
ANSWERS = ["A red cat.", "A red cat.", "A red dog sits.", "Nothing of it is here.", "A blue cat."]


@pytest.fixture
def data(tmp_path):
    rows = (trl(id=str(i), images=[], rejected=text, points=i % 3) for i, text in enumerate(ANSWERS))
    return written(tmp_path, *(row | {"chosen": "A red cat sits."} for row in rows))


def chosen(data, by, keep=None, suffix=".jsonl", lowest=False, per=None, **settings):
    out = data.with_name(f"chosen{suffix}")
    found = select([data], out, Measured(by, **settings), keep=keep, lowest=lowest, per=per)
    return {item.record.id: item.fields[f"{by}_score"] for item in read(out)}, found


def test_difference(data):
    found, counts = chosen(data, "difference")
    assert [*found] == list("01234") and (counts["kept"], counts["without_score"]) == (5, [])
    assert found == pytest.approx({"0": 1 / 7, "1": 1 / 7, "2": 1 / 4, "3": 1.0, "4": 3 / 7}, abs=1e-6)
    assert [*chosen(data, "difference", "2")[0]] == ["3", "4"]
    assert [*chosen(data, "difference", "0.4", lowest=True)[0]] == ["0", "1"]
    assert [*chosen(data, "difference", "1", lowest=True)[0]] == ["0"], "of equal ones the first"
    assert [*chosen(data, "difference", "1.0", ".parquet")[0]] == list("01234")


def test_a_number_of_the_rows(data):
    found, counts = chosen(data, "reward", "2", score="points * 2")
    assert found == {"2": 4.0, "1": 2.0} and counts["scores"] == [2.0, 4.0]
    found, counts = chosen(data, "reward", score="points if points > 0 else none")
    assert [*found] == ["1", "2", "4"] and counts["without_score"] == ["0", "3"]
    line = told(Measured("reward", score="points"), counts)
    assert line == "3 of 5 records, reward_score 1 to 2 (2 have none: 0, 3)"


def test_diversity_takes_the_farthest_from_all_that_were_taken(tmp_path):
    texts = ["a b c d e", "a b c d f", "g h i j k", "g h i j k", "a b c d e"]
    data = written(
        tmp_path, *(trl(images=[], prompt="l", chosen=text, id=str(i)) for i, text in enumerate(texts))
    )
    found, _ = chosen(data, "diversity", "3", seed=0)
    first = int(np.random.default_rng(0).integers(5))
    assert found[str(first)] == 1.0
    assert len({"0", "1", "4"} & found.keys()) == 2 and len({"2", "3"} & found.keys()) == 1
    assert {"0", "4"} - found.keys(), "a text that is there has no distance"
    everything, _ = chosen(data, "diversity", "5")
    assert sorted(everything.values())[:2] == [0.0, 0.0]
    before = (tmp_path / "chosen.jsonl").read_bytes()
    assert chosen(data, "diversity", "5")[0] and (tmp_path / "chosen.jsonl").read_bytes() == before


def test_diversity_by_sentence_embeddings(tmp_path):
    folder = make_folder(tmp_path / "encoder", "bert", MEAN)
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(12)]
    rows = [trl(images=[], prompt="the cat", chosen=text, id=str(i)) for i, text in enumerate(texts)]
    data = written(tmp_path, *rows)
    found, _ = chosen(data, "diversity", "4", similarity=str(folder))
    from mllm_align.generation.similarity import open_similarity

    vectors = open_similarity(str(folder)).encoder.embed([f"the cat\n{text}" for text in texts])
    taken = [int(np.random.default_rng(0).integers(12))]
    while len(taken) < 4:
        taken.append(int(np.argmax([min(1 - vectors[t] @ v for t in taken) for v in vectors])))
    assert [*found] == [str(i) for i in sorted(taken)]


def test_rewards_of_a_model(data, monkeypatch):
    def verdict(responses):
        failed = " it " in responses[-1]
        return Verdict("failed") if failed else scored([len(text) for text in responses])

    def asks(questions):
        return [verdict(question.responses) for question in questions]

    monkeypatch.setattr(RewardModel, "open", lambda self, context: asks)
    found, counts = chosen(data, "reward", reward="run")
    chosen_length = len("A red cat sits.")
    assert found == {str(i): chosen_length - len(ANSWERS[i]) for i in (0, 1, 2, 4)}
    assert counts["without_score"] == ["3"]
    single = written(data.parent, {"prompt": "What?", "completion": "A cat."})
    assert chosen(single, "reward", reward="run")[0] == {"0": 6.0}, "without a rejected response, its own"


@pytest.mark.slow
def test_the_margin_of_a_reward_model(reward_run, tmp_path):
    out = tmp_path / "chosen.jsonl"
    found = select([PAIRS], out, Measured("reward", reward=str(reward_run)), keep="3")
    margins = [line["chosen_reward"] - line["rejected_reward"] for line in score(reward_run, PAIRS)]
    best = sorted(np.argsort(margins)[::-1][:3])
    items = read(out, allow_outside=True)
    assert [int(item.record.id) for item in items] == best and found["kept"] == 3
    np.testing.assert_allclose(
        [i.fields["reward_score"] for i in items], [margins[i] for i in best], atol=1e-5
    )


def test_the_best_of_each_value(data):
    found, counts = chosen(data, "reward", "1", score="points", per="points > 0")
    assert found == {"0": 0.0, "2": 2.0} and counts["kept"] == 2
    found, _ = chosen(data, "reward", "0.5", score="points", per="points > 0", lowest=True)
    assert [*found] == ["0", "1", "4"], "half of three are two, of two one"
    assert [*chosen(data, "reward", "3", score="points", per="points")[0]] == list("01234")


def test_a_second_score_has_another_name(data, tmp_path):
    chosen(data, "reward", score="points")
    first = data.with_name("chosen.jsonl").rename(tmp_path / "first.jsonl")
    out = tmp_path / "second.jsonl"
    select([first], out, Measured("reward", score="-reward_score", score_name="quality"), keep="2")
    fields = {item.record.id: item.fields for item in read(out)}
    assert {id: (own["reward_score"], own["quality"]) for id, own in fields.items()} == {
        "0": (0.0, 0.0),
        "3": (0.0, 0.0),
    }


def test_domains_of_the_states(data, monkeypatch):
    states = [np.array([9.0 * (i % 2), i / 10], np.float32) for i in range(4)] + [None]
    monkeypatch.setattr("mllm_align.curation.domains.model_states", lambda *_: states)
    monkeypatch.setattr("mllm_align.curation.domains.FOLDS", 2)
    found, counts = chosen(data, "domains", model="m", domains=2)
    assert [*found] == list("0123") and counts["without_score"] == ["4"]
    labels = [item.fields["domain"] for item in read(data.with_name("chosen.jsonl"))]
    assert labels[0] == labels[2] != labels[1] == labels[3]
    assert (counts["domain_sizes"], counts["probe_accuracy"]) == ([2, 2], 1.0)
    assert "2 domains of 2 to 2 records; the probe tells 100.0%" in told(
        Measured("domains", model="m"), counts
    )


def test_what_is_refused(data, tmp_path):
    def refused(*words, **settings):
        options = {"by": "difference"} | settings
        assert_refusal(lambda: chosen(data, **options), *words)
        assert not data.with_name("chosen.jsonl").exists()

    for keep in ("0", "0.01"):
        refused("--keep", f"'{keep}' keeps nothing of 5 records", keep=keep)
    refused("--keep", "'many'", "as 500, or a share", keep="many")
    refused("--keep", "is 6, and there are 5 records", keep="6")
    refused("--by reward needs either --reward RUN or --score", by="reward")
    refused("--score goes with --by reward", score="points")
    refused("give --keep, and no --lowest", by="diversity")
    refused("--score names 'pints'", "did you mean points?", by="reward", score="pints")
    refused("--by domains and --model go together", by="domains")
    refused("--domains is 1", by="domains", model="m", domains=1)
    refused("--score-name: 'chosen' can't hold a score", score_name="chosen")
    refused("--score-name: 'a b' can't hold a score", score_name="a b")
    refused("--per goes with --keep", per="points")
    refused("--per names 'pints'", keep="1", per="pints")
    refused("set.jsonl record 0", "--score gives 'A red cat.'", by="reward", score="rejected")
    refused("0 of 5 records have a score", by="reward", score="none")
    refused("3 of 5 records have a score", "keep fewer", by="reward", score="points or none", keep="4")
