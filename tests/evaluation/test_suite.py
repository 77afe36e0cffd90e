"""Several models on several benchmarks: each its own job, one failing benchmark stops no other."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bench_folders import KITCHEN, lines, pope, value
from judges import base  # noqa: F401
from refusals import refusal

from mllm_align.errors import InputError, NotFinite
from mllm_align.evaluation import suite
from mllm_align.evaluation.run import evaluate
from mllm_align.evaluation.suite import evaluate_all, found_under
from mllm_align.testbed.demo import make_model


def mm_vet(folder, there=True):
    value(
        folder / "mm-vet.json",
        {"v1_0": {"imagename": KITCHEN, "question": "What?", "answer": "x", "capability": ["ocr"]}},
    )
    if there:
        (folder / "images").mkdir()
        (folder / "images" / KITCHEN).write_bytes((folder.parent / "pope/val2014" / KITCHEN).read_bytes())


@pytest.fixture
def answering(monkeypatch):
    """answering(say): models say that of each record; the calls are put down in what it returns."""

    def answering(say):
        calls = []

        def respond(decoder, encoder, records, sampling, *, seed, done):
            calls.append(records)
            for place, each in enumerate(records):
                ids = encoder.tokenizer(say(each.record), add_special_tokens=False)["input_ids"]
                done(place, [np.array([*ids, encoder.end], np.int32)])

        monkeypatch.setattr("mllm_align.evaluation.run.respond", respond)
        return calls

    return answering


@pytest.fixture
def root(tmp_path):
    pope(tmp_path / "root/pope")
    return tmp_path / "root"


def models(bundle):
    """Two of the same parameters: what they say is made up."""
    return {"one": bundle, "two": replace(bundle)}


def test_each_pair_is_a_job_of_its_own(root, base, answering, tmp_path, capsys):  # noqa: F811
    mm_vet(root / "mm-vet")
    (root / "notes").mkdir()
    asked = answering(lambda record: "No" if "zebra" in record.messages[-1].text else "Yes")
    seen = []
    found = evaluate_all(models(base), root, out=tmp_path / "out", done=lambda *each: seen.append(each[:2]))
    said = capsys.readouterr().out
    assert "left out, as no benchmark has their names: notes" in said
    order = [(model, name) for model in ("one", "two") for name in ("mm-vet", "pope")]
    assert sorted(seen) == order and found.failures == []
    alone = evaluate(base, root / "pope", "pope").results["scores"]
    assert found.results["two"]["pope"].results["scores"] == alone and alone["mean_accuracy"] > 0.5
    assert found.results["one"]["mm-vet"].results["scores"] == {}  # a judge was not asked
    for model, name in order:
        kept = json.loads((tmp_path / "out" / model / name / "results.json").read_text())
        assert kept == found.results[model][name].results
    assert (
        len(found.sentences) == 1 and "whether two is better than one can't be told" in found.sentences[0]
    )
    page = (tmp_path / "out/report.html").read_text()
    assert "two against one" in page and "mm-vet" not in page
    count = len(asked)
    again = evaluate_all(models(base), root, out=tmp_path / "out")
    assert len(asked) == count == 5 and again.results == found.results  # all was there


def test_one_that_fails_is_named_and_the_others_go_on(root, base, answering, tmp_path, capsys):  # noqa: F811
    mm_vet(root / "mm-vet", there=False)
    answering(lambda record: "Yes")
    found = evaluate_all(models(base), root, out=tmp_path / "out")
    assert list(found.results["one"]) == list(found.results["two"]) == ["pope"]
    told = capsys.readouterr().err
    assert told.startswith("mm-vet: ") and f"1 of 1 images are missing: {KITCHEN}" in told
    with pytest.raises(InputError, match=r"2 of 4 evaluations failed: mm-vet: .* images are missing"):
        found.check()


def test_one_that_fails_on_the_way_is_tried_again(root, base, answering, tmp_path, monkeypatch):  # noqa: F811
    mm_vet(root / "mm-vet")
    answering(lambda record: "Yes")
    answered = suite.answered

    def broken(model, items, *rest):
        if len(items) == 1:
            raise NotFinite("logits are not finite")
        return answered(model, items, *rest)

    monkeypatch.setattr(suite, "answered", broken)
    found = evaluate_all(models(base), root, out=tmp_path / "out")
    assert [each.what for each in found.failures] == ["one on mm-vet", "two on mm-vet"]
    with pytest.raises(NotFinite, match="2 of 4 evaluations failed: one on mm-vet: logits"):
        found.check()
    monkeypatch.setattr(suite, "answered", answered)
    assert evaluate_all(models(base), root, out=tmp_path / "out").failures == []


def test_a_model_is_opened_once(root, answering, tmp_path, monkeypatch):
    mm_vet(root / "mm-vet")
    answering(lambda record: "Yes")
    folders = [make_model(tmp_path / name / "model", "llava", layers=1) for name in "ab"]
    opened = []

    def load(model, *rest):
        from mllm_align.models.bundle import load as open_it

        opened.append(model)
        return open_it(model, *rest)

    monkeypatch.setattr(suite, "load", load)
    found = evaluate_all(folders, root, out=tmp_path / "out")
    assert opened == folders and list(found.results) == ["a-model", "b-model"]
    one = evaluate_all(folders[:1], root / "pope", "pope", out=tmp_path / "one")
    assert list(one.results) == ["model"] and (tmp_path / "one/model/pope/results.json").exists()


def test_folders_are_checked_before_any_model_is_opened(root, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "load", None)
    folder = make_model(tmp_path / "model", "llava", layers=1)

    def refused(models=(folder,), data=root, out="out", evaluator=None):
        return refusal(evaluate_all, models, data, evaluator, out=tmp_path / out)

    assert "gone" in refused(models=[folder, tmp_path / "gone"])
    assert "is given twice; give each once" in refused(models=[folder, f"{folder}/."])
    assert "there are no models" in refused(models=[])
    assert "give a folder with a subfolder for each benchmark" in refused(data=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "has no subfolder that is named like a benchmark; name them" in refused(data=tmp_path / "empty")
    lines(tmp_path / "out/model/pope/answers.jsonl", [])
    assert "is there without results.json" in refused()
    value(tmp_path / "single/results.json", {})
    assert "holds one evaluation; give another --out" in refused(out="single")
    (root / "pope/val2014" / KITCHEN).unlink()
    assert "pope: " in (said := refused(out="new")) and "1 of 2 images are missing" in said
    assert not (tmp_path / "new").exists()


def test_benchmarks_are_found_by_their_folders(tmp_path):
    for name in ("gqa", "mm_vet", "mmhal"):
        (tmp_path / name).mkdir()
    found = {type(each).__name__: folder.name for each, folder in found_under(tmp_path)}
    assert found == {"Gqa": "gqa", "MmVet": "mm_vet", "MmHal": "mmhal", "MmHalV": "mmhal"}
