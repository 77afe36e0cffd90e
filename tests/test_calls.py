"""The calls from Python: README's example, what a notebook shows, models and data in every form."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from decoding import Scripted
from runs import MODEL, PAIRS, TINY, bundle, compiling, events, one_device, rows

import mllm_align
from mllm_align import AnnotatorConfig, DataConfig, InputError, JudgeConfig, SamplingConfig, scored

assert compiling  # a fixture
README = (Path(__file__).parents[1] / "README.md").read_text()
PICTURE = str(PAIRS.parent / "images" / "0_L.png")


@dataclass(frozen=True)
class Longer(AnnotatorConfig):
    weight: int = 1

    def __call__(self, questions):
        return [scored([self.weight * len(text) for text in q.responses]) for q in questions]


def read(row):
    return {"prompt": row["question"], "image": PICTURE, "chosen": row["good"], "rejected": row["bad"]}


ROWS = [{"question": "gi?", "good": "A dog is here.", "bad": "A cat."}]


def test_dir_shows_the_public_names_alone():
    assert dir(mllm_align) == sorted(mllm_align.__all__)
    assert callable(mllm_align.generate) and callable(mllm_align.judge)


@pytest.mark.slow
def test_the_readmes_example_learns_and_is_quiet(tmp_path, monkeypatch, capfd):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)  # compiles faster
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    told = capfd.readouterr()
    assert "warn" not in (told.out + told.err).lower()
    losses = [line["loss"] for line in events(tmp_path / "runs/notebook/run", "train")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.66
    assert (tmp_path / "runs/notebook/aligned/config.json").is_file()


def test_a_bundle_is_shown_in_a_few_lines(trained):
    text = repr(bundle())
    assert len(text.splitlines()) == 4 and len(text) < 600 and "array" not in text.lower()
    count = sum(x.size for x in jax.tree.leaves(bundle().params))
    assert f"{count:,} in float32" in text and "(llava)" in text and str(MODEL) in text
    assert "trained     nothing" in text and "data 1, fsdp 1, tensor 1" in text
    model, _ = trained
    count = sum(x.size for x in jax.tree.leaves(model.trained))
    assert f"trained     {count:,} in float32: LoRA of rank 2, projector" in repr(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("calls") / "run"
    return mllm_align.train(TINY, bundle(), PAIRS, out), out


def test_a_run_is_a_model_to_every_call(trained, monkeypatch):
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)
    model, out = trained
    assert mllm_align.score(out, PAIRS) == mllm_align.score(model, PAIRS) != mllm_align.score(MODEL, PAIRS)
    assert repr(mllm_align.load(out)).splitlines()[1:] == repr(model).splitlines()[1:]


def test_generate_gives_texts_and_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mllm_align.generation.respond.Generator", lambda b, s, n: Scripted(b.config.decoder.vocab, n)
    )
    short = SamplingConfig(max_tokens=6)
    texts = mllm_align.generate(bundle(), PAIRS, short, samples=2, out=tmp_path / "said.jsonl")
    assert [len(each) for each in texts] == [2] * 8
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    ids = [row.get("id", str(i)) for i, row in enumerate(rows())]
    assert [(line["index"], line["id"]) for line in lines] == list(enumerate(ids))
    assert [line["responses"] for line in lines] == texts
    given = [{"prompt": row["prompt"], "images": [str(PAIRS.parent / row["images"][0])]} for row in rows(2)]
    assert [len(each) for each in mllm_align.generate(bundle(), given, short)] == [1, 1]
    with pytest.raises(InputError, match="is the data file itself"):
        mllm_align.generate(bundle(), tmp_path / "said.jsonl", short, out=tmp_path / "said.jsonl")


def test_judge_with_an_annotator_that_is_an_object(tmp_path):
    config = JudgeConfig(Longer(), data=DataConfig(format=read))
    results, lines = mllm_align.judge(None, ROWS, config, out=tmp_path / "judged.json")
    assert (results["right"], results["pairs"], results["model"], results["data"]) == (1, 1, None, None)
    assert lines[0]["outcome"] == "ranked" and lines[0]["right"]
    assert json.loads((tmp_path / "judged.json").read_text()) == results
    assert [json.loads(x) for x in (tmp_path / "judged.jsonl").read_text().splitlines()] == lines

    @dataclass(frozen=True)
    class Within(Longer):
        """As in a notebook: no file names it."""

    results, _ = mllm_align.judge(None, PAIRS, JudgeConfig(Within(weight=-1)))
    assert results["annotator"]["kind"].endswith("Within") and results["pairs"] == 8


def test_judge_needs_the_base_that_it_asks():
    with pytest.raises(InputError, match="the annotator is the policy's own base"):
        mllm_align.judge(None, PAIRS)
