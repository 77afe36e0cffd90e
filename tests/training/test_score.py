"""Scores are the model's own log-probs, whatever batch a record travels in."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from runs import MODEL, PAIRS, TINY, bundle, compiling, nan_for_one, one_device, rows, write_pairs

from mllm_align import DataConfig, InputError, export, load, load_run, score, train
from mllm_align.batch import pad
from mllm_align.data.encode import Encoder
from mllm_align.errors import NotFinite
from mllm_align.models.bundle import make_model
from mllm_align.prepare import prepare

assert compiling  # a fixture
ONE_SHAPE = DataConfig(shapes=1)
SUMS = ("chosen_logp", "rejected_logp")


def sums(lines) -> np.ndarray:
    return np.array([[line[name] for name in SUMS] for line in lines])


@pytest.fixture(scope="module")
def scores():
    return score(bundle(), PAIRS, config=ONE_SHAPE)


def test_scores_are_the_models_log_probs(scores):
    """Each record alone, unpadded, through the model: nothing of the batch is left in the numbers."""
    encoder, records, _ = prepare(bundle(), PAIRS, DataConfig(), responses=2)
    apply = jax.jit(make_model(bundle().config).apply)
    assert isinstance(encoder, Encoder) and [s["index"] for s in scores] == list(range(8))
    for record, line in list(zip(records, scores, strict=True))[:2]:
        group = encoder.group(record)
        (logps,) = apply({"params": bundle().params}, pad([group], group.shape, 1))
        chosen, rejected = np.asarray(logps)[0]
        assert line["chosen_logp"] == pytest.approx(chosen.sum(), abs=1e-4)
        assert line["rejected_logp"] == pytest.approx(rejected.sum(), abs=1e-4)
        assert [line["chosen_tokens"], line["rejected_tokens"]] == [len(r) for r in record.responses]
        assert record.responses[0][-1] == encoder.end, "the end of sequence is scored"


@pytest.mark.slow
def test_batch_size_shapes_and_order_do_not_matter(scores):
    several = DataConfig(shapes=3, multiple=4)
    turned = score(bundle(), write_rows(rows()[::-1]), config=several, batch_size=2)
    assert np.abs(sums(turned[::-1]) - sums(scores)).max() < 1e-4
    assert [s["chosen_tokens"] for s in turned[::-1]] == [s["chosen_tokens"] for s in scores]


def write_rows(rows):
    return [{**row, "images": [str(PAIRS.parent / name) for name in row["images"]]} for row in rows]


def test_rows_in_memory(scores):
    """PIL images and arrays, as a data set's rows have them; each as the file would be read."""
    given = rows()
    for i, row in enumerate(given):
        image = Image.open(PAIRS.parent / row["images"][0])
        row["images"] = [np.asarray(image.convert("RGB")) if i % 2 else image]
    assert np.abs(sums(score(bundle(), iter(given), config=ONE_SHAPE)) - sums(scores)).max() < 1e-4


def test_over_long_records_are_refused_or_left_out(scores):
    lengths = [line["chosen_tokens"] for line in scores]
    config = replace(ONE_SHAPE, max_length=75)
    with pytest.raises(InputError, match=r"pairs\.jsonl record \d.*the limit is 75"):
        score(bundle(), PAIRS, config=config)
    lines = score(bundle(), PAIRS, config=replace(config, over_long="skip"))
    gone = [i for i, line in enumerate(lines) if line["chosen_logp"] is None]
    assert 0 < len(gone) < len(lengths) == len(lines)
    for line, before in zip(lines, scores, strict=True):
        if line["index"] in gone:
            nothing = dict.fromkeys(before.keys() - {"index"})
            assert line == {"index": before["index"], **nothing, "left_out": "over-long"}
        else:
            assert np.abs(sums([line]) - sums([before])).max() < 1e-4
    with pytest.raises(InputError, match="all 8 records are left out, 8 over-long"):
        score(bundle(), PAIRS, config=replace(config, max_length=10, over_long="skip"))


def test_log_probs_that_are_not_finite_are_told_with_their_record():
    broken, culprit = nan_for_one(2)
    said = f"log-probs are not finite for 1 of 8 records: {culprit}; look for NaN"
    with pytest.raises(NotFinite, match=said):
        score(broken, PAIRS, config=ONE_SHAPE)


def test_batch_size_0_is_refused():
    with pytest.raises(InputError, match="batch_size is 0"):
        score(bundle(), PAIRS, batch_size=0)


def test_a_chat_template_of_ones_own(tmp_path, scores):
    plain = MODEL / "chat_template.jinja"
    same = score(bundle(), PAIRS, config=replace(ONE_SHAPE, chat_template=plain))
    assert same == scores
    with pytest.raises(InputError, match=r"absent\.jinja"):
        score(bundle(), PAIRS, config=DataConfig(chat_template=tmp_path / "absent.jinja"))
    (tmp_path / "blind.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(InputError, match=r"pairs\.jsonl record 0"):
        score(bundle(), PAIRS, config=DataConfig(chat_template=tmp_path / "blind.jinja"))


@pytest.mark.slow
def test_a_run_scores_like_its_export(tmp_path, scores):
    train(TINY, bundle(), write_pairs(tmp_path, rows()), tmp_path / "run")
    run = load_run(tmp_path / "run", "float32", one_device())
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(run.trained["lora"]))
    report = export(tmp_path / "run", tmp_path / "merged")
    assert report["step"] == 4 and (tmp_path / "merged" / "model.safetensors").is_file()
    ours = sums(score(run, PAIRS, config=ONE_SHAPE))
    merged = sums(score(load(tmp_path / "merged", "float32", one_device()), PAIRS, config=ONE_SHAPE))
    assert np.abs(ours - merged).max() < 1e-3 < 1 < np.abs(ours - sums(scores)).max()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == str(MODEL)
