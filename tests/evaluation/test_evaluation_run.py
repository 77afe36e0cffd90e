"""An evaluation from data to files: generated once, continued where it was stopped, refused in one line."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from goldens import FIXTURES
from refusals import refusal
from runs import MODEL, PAIRS, bundle, compiling, nan_for_one, rows

from mllm_align import DataConfig, Evaluator, Item, SamplingConfig, Scored, evaluate
from mllm_align.errors import NotFinite
from mllm_align.evaluation import results as results_module
from mllm_align.evaluation import run as module
from mllm_align.generation.respond import generate
from mllm_align.prepare import prepare
from mllm_align.training.score import score as score_pairs

assert compiling  # a fixture
SHORT = SamplingConfig(temperature=0.0, max_tokens=6)


@dataclass(frozen=True)
class Letters(Evaluator):
    references = 1
    sampling: SamplingConfig = SHORT

    def score(self, item, answer):
        return Scored({"letters": len(answer)}, {"reference": item.record.responses[0]})


@dataclass(frozen=True)
class Prefers(Evaluator):
    """How often the chosen response has the higher log-prob."""

    references = 2
    needs = "logps"

    def score(self, item, answer):
        chosen, rejected = (float(each.sum()) for each in answer)
        return Scored({"accuracy": chosen > rejected}, {"sums": [chosen, rejected]})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_responses_are_those_of_generate(out):
    wanted = [texts[0] for texts in generate(bundle(), PAIRS, SHORT, batch_size=4)]
    results, lines = evaluate(bundle(), PAIRS, Letters(), out=out, batch_size=4)
    assert [line["response"] for line in lines] == wanted
    assert [line["figures"] for line in lines] == [{"letters": [len(text), 1]} for text in wanted]
    assert lines[0]["reference"] == rows(1)[0]["chosen"]
    assert results["scores"] == {"letters": pytest.approx(np.mean([*map(len, wanted)]))}
    assert results["n"] == len(wanted) == results["intervals"]["letters"]["n"]
    assert results["fingerprint"] == bundle().folder.fingerprint and results["trained"] is None
    saved = json.loads((out / "results.json").read_text())
    assert saved == results and saved["model"] == str(MODEL)
    kept = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert kept == lines
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "results.json"]


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = evaluate(bundle(), rows_with_images(2), Letters())
    assert len(found.lines) == 2 and not list(tmp_path.iterdir())


def rows_with_images(count):
    return [row | {"images": [str(FIXTURES / name) for name in row["images"]]} for row in rows(count)]


@dataclass(frozen=True)
class Twice(Letters):
    """Two items of each record."""

    def items(self, data, config):
        found = super().items(data, config)
        return [
            replace(each, record=replace(each.record, id=f"{each.record.id}{i}"))
            for each in found
            for i in "ab"
        ]


def test_all_items_of_the_first_records_are_asked():
    found = evaluate(bundle(), rows_with_images(4), Twice(), config=DataConfig(max_records=2))
    assert [line["id"] for line in found.lines] == ["0a", "0b", "1a", "1b"]


def test_log_probs_are_those_of_score(out):
    wanted = [(each["chosen_logp"], each["rejected_logp"]) for each in score_pairs(bundle(), PAIRS)]
    results, lines = evaluate(bundle(), PAIRS, Prefers(), out=out)
    assert [tuple(line["sums"]) for line in lines] == wanted
    assert [tuple(sum(each) for each in line["logps"]) for line in lines] == [
        tuple(map(pytest.approx, pair)) for pair in wanted
    ]
    assert results["scores"]["accuracy"] == np.mean([a > b for a, b in wanted])


@pytest.mark.parametrize("evaluator", [Letters(), Prefers()], ids=lambda each: type(each).__name__)
def test_it_goes_on_where_it_was_stopped(out, monkeypatch, evaluator):
    straight = evaluate(bundle(), PAIRS, evaluator, out=out.with_name("straight"), batch_size=2)
    asked, real = [], {name: getattr(module, name) for name in ("respond", "response_logps")}

    def stopping(name, after):
        def call(*args, done, **options):
            records = next(each for each in args if isinstance(each, list))
            asked.append(len(options.get("wanted", records)))

            def finished(place, answer):
                done(place, answer)
                if len((out / "answers.jsonl.part").read_bytes().splitlines()) > after:
                    raise KeyboardInterrupt

            return real[name](*args, done=finished, **options)

        monkeypatch.setattr(module, name, call)

    for after in (2, 3, 10**6):
        for name in real:
            stopping(name, after)
        if after < 10**6:
            with pytest.raises(KeyboardInterrupt):
                evaluate(bundle(), PAIRS, evaluator, out=out, batch_size=2)
            assert not (out / "results.json").exists() and (out / "answers.jsonl.part").exists()
        else:
            found = evaluate(bundle(), PAIRS, evaluator, out=out, batch_size=2)
    total = len(straight.lines)
    assert asked == [total, total - 2, total - 3]
    timeless = {"seconds": 0}
    assert found.results | timeless == straight.results | timeless
    assert found.lines == straight.lines


def test_what_is_done_is_read_and_not_made_again(out, monkeypatch):
    first = evaluate(bundle(), PAIRS, Letters(), out=out)
    monkeypatch.setattr(module, "respond", None)
    again = evaluate(bundle(), PAIRS, Letters(), out=out)
    assert (again.results, again.lines) == (first.results, first.lines)
    other = replace(Letters(), sampling=replace(SHORT, max_tokens=7))
    words = "is of another evaluation: its evaluator, settings, data, model or answers differ"
    assert words in refusal(evaluate, bundle(), PAIRS, other, out=out)
    assert words in refusal(evaluate, bundle(), rows_with_images(3), Letters(), out=out)
    assert words in refusal(evaluate, bundle(), PAIRS, Letters(), out=out, seed=1)
    (out / "answers.jsonl").unlink()
    assert "answers.jsonl: can't be read" in refusal(evaluate, bundle(), PAIRS, Letters(), out=out)


def test_a_kill_between_lines_and_results(out, monkeypatch):
    """The lines are there first; they are written again."""
    real = results_module.new_file

    def kill(file):
        if file == out / "results.json":
            raise KeyboardInterrupt
        return real(file)

    with monkeypatch.context() as patch:
        patch.setattr(results_module, "new_file", kill)
        with pytest.raises(KeyboardInterrupt):
            evaluate(bundle(), PAIRS, Letters(), out=out)
    assert (out / "answers.jsonl").exists() and not (out / "results.json").exists()
    assert evaluate(bundle(), PAIRS, Letters(), out=out).results["n"] and (out / "results.json").exists()


def test_the_part_of_another_evaluation_is_named(out):
    out.mkdir()
    part = out / "answers.jsonl.part"
    part.write_text('{"evaluation": {"config": {"kind": "scenes"}}}\n')
    assert "was begun with another" in refusal(evaluate, bundle(), PAIRS, Letters(), out=out)


def test_over_long_records_are_left_out_and_told(out):
    _, records, _ = prepare(bundle(), PAIRS, DataConfig(), 0)
    longest = max(len(record.prefix) for record in records)
    config = DataConfig(max_length=longest - 1, over_long="skip")
    results, lines = evaluate(bundle(), PAIRS, Letters(), out=out, config=config)
    left = [line for line in lines if "left_out" in line]
    assert results["left_out"] == len(left) > 0 and results["n"] == len(lines) - len(left)
    assert len(lines) == len(records) and "response" not in left[0]


def test_answers_that_are_not_finite_are_told_and_the_others_kept(out):
    broken, name = nan_for_one(0)
    with pytest.raises(NotFinite, match=name):
        evaluate(broken, PAIRS, Letters(), out=out)
    kept = (out / "answers.jsonl.part").read_text().splitlines()
    assert len(kept) == len(rows()) and not (out / "results.json").exists()


def test_labels_reach_the_score_and_the_fingerprint():
    @dataclass(frozen=True)
    class Labelled(Letters):
        def score(self, item, answer):
            return Scored({item.labels["mode"]: 1})

    plain = Letters().items(PAIRS, DataConfig())[:2]
    found = [
        evaluate(bundle(), [Item(each.record, {"mode": mode}) for each in plain], Labelled()).results
        for mode in ("a", "b")
    ]
    assert [[*each["scores"]] for each in found] == [["a"], ["b"]]
    assert found[0]["data_fingerprint"] != found[1]["data_fingerprint"]


def test_what_is_written_must_be_found_again(out):
    @dataclass(frozen=True)
    class Local(Letters):
        pass

    assert "is not defined at the top of a Python file" in refusal(
        evaluate, bundle(), PAIRS, Local(), out=out
    )
    assert not out.parent.exists() or not list(out.parent.iterdir())
